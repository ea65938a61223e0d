"""binary_cross_entropy, log_softmax, nll_loss and the modules: torch's numbers, worked values, laws
that join them."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, nop
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import lossfuse
from allocations import Largest
from closeness import assert_gradient_close, assert_loss_close
from conftest import GPU

IMPLS = ["torch", "reference"]
EDGES = torch.tensor([0.0, 1.0, 1e-20, 0.3, 1 - 2**-24, 1e-45])
OPERATORS = torch.ops.lossfuse
INF = float("inf")


def same(got, want, **options):
    """What torch computes on the CPU, where all of it is deterministic."""
    torch.testing.assert_close(got.cpu(), want, equal_nan=True, **options)


def test_worked_values(place):
    impl = place.impl
    p, t = (
        torch.tensor([[0.6, 0.1], [0.3, 0.8]], device=place.device),
        torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=place.device),
    )
    assert lossfuse.binary_cross_entropy(p, t, impl=impl).item() == pytest.approx(1.5081, abs=5e-5)
    assert lossfuse.binary_cross_entropy(p.sigmoid(), t, impl=impl).item() == pytest.approx(
        0.8518, abs=5e-5
    )
    assert lossfuse.binary_cross_entropy_with_logits(p, t, impl=impl).item() == pytest.approx(
        0.8518, abs=5e-5
    )
    p = torch.tensor(
        [[0.1531, 0.3302, 0.7537], [0.2200, 0.6875, 0.2268], [0.5109, 0.5873, 0.9275]],
        device=place.device,
    )
    t = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 1]], device=place.device)
    assert lossfuse.binary_cross_entropy(p, t, impl=impl).item() == pytest.approx(0.3784, abs=5e-5)
    assert lossfuse.binary_cross_entropy(p, t, t * 0.8 + 0.1, impl=impl).item() == pytest.approx(
        0.1030, abs=5e-5
    )
    rows = torch.tensor([[2.0, 3, 1], [3, 7, 9]], device=place.device)
    assert (
        lossfuse.nll_loss(rows, torch.tensor([1, 2], device=place.device), impl=impl).item() == -6
    )
    volume = torch.tensor([[[2.0, 3], [1, 5]], [[3, 7], [1, 9]]], device=place.device)
    assert (
        lossfuse.nll_loss(
            volume, torch.tensor([[1, 1], [0, 0]], device=place.device), impl=impl
        ).item()
        == -4
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_probabilities_to_their_edges(place, reduction):
    x, t = (
        EDGES.repeat(3, 1).requires_grad_(),
        torch.tensor([[0.0], [0.4], [1.0]]).repeat(1, 6).requires_grad_(),
    )
    w = torch.rand(6)
    ours = [a.to(place.device) for a in (x, t, w)]
    got = lossfuse.binary_cross_entropy(*ours, reduction=reduction, impl=place.impl)
    want = F.binary_cross_entropy(x, t, w, reduction=reduction)
    same(got, want)
    (dx, dt), (want_dx, want_dt) = (torch.autograd.grad(loss.sum(), [x, t]) for loss in (got, want))
    same(dx, want_dx)
    # torch's derivative for the target forgets its clamp, and is infinite at 0 and 1
    most = 100.0 * w.detach().expand_as(dt) / (t.numel() if reduction == "mean" else 1)
    assert place.impl == "torch" or (dt.abs() <= most * (1 + 1e-6)).all()
    same(dt.clamp(-most, most), want_dt.clamp(-most, most))


@pytest.mark.parametrize("impl", IMPLS)
def test_derivatives(impl):
    p = torch.rand(3, 4, dtype=torch.float64).clamp(0.1, 0.9).requires_grad_()
    t, w = torch.rand(3, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    ids = torch.tensor([1, -100, 3])
    for f in (
        lambda p: lossfuse.binary_cross_entropy(p, t, w, impl=impl),
        lambda p: lossfuse.log_softmax(p, 1, impl=impl),
        lambda p: lossfuse.nll_loss(lossfuse.log_softmax(p, 1, impl=impl), ids, w, impl=impl),
    ):
        assert gradcheck(f, (p,), check_forward_ad=True) and gradgradcheck(f, (p,))
    p = p.detach()
    got = torch.func.grad(lambda p: lossfuse.binary_cross_entropy(p, t, impl=impl))(p)
    torch.testing.assert_close(got, torch.func.grad(F.binary_cross_entropy)(p, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(place, dtype):
    impl = place.impl
    x, ids = torch.randn(5, 9).to(dtype), torch.tensor([0, 8, -100, 3, 2])
    p, w = x.sigmoid(), torch.rand(9).to(dtype)
    our_x, our_ids, our_p, our_w = (t.to(place.device) for t in (x, ids, p, w))
    same(
        lossfuse.binary_cross_entropy(our_p, our_p, our_w, impl=impl),
        F.binary_cross_entropy(p.float(), p.float(), w.float()),
    )
    same(lossfuse.nll_loss(our_x, our_ids, our_w, impl=impl), F.nll_loss(x.float(), ids, w.float()))
    same(lossfuse.log_softmax(our_x, 1, impl=impl), F.log_softmax(x, 1))
    assert lossfuse.log_softmax(our_x, 1, dtype=torch.float32, impl=impl).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2), (0, 5)], ids=str)
def test_log_softmax_and_nll_are_cross_entropy(place, shape, reduction):
    x = torch.randn(shape, requires_grad=True)
    dim = min(1, x.dim() - 1)
    ids = torch.randint(0, 5, shape[:dim] + shape[dim + 1 :])
    ids = ids.where(torch.rand(ids.shape) > 0.2, -100) if ids.dim() else ids
    w = torch.rand(5)
    logp = lossfuse.log_softmax(x.to(place.device), dim, impl=place.impl)
    same(logp, F.log_softmax(x, dim))
    got = lossfuse.nll_loss(
        logp, ids.to(place.device), w.to(place.device), reduction=reduction, impl=place.impl
    )
    same(got, F.nll_loss(logp.cpu(), ids, w, reduction=reduction))
    ours = lossfuse.cross_entropy(x, ids, w, reduction=reduction)
    same(got, ours)
    same(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (got, ours)), rtol=1e-4, atol=1e-6)


def rows_of_log_softmax(v):
    """Sure and undecided rows, offsets, classes that are ruled out, ties; the last three are
    NaN."""
    x = torch.randn(11, v, generator=torch.Generator().manual_seed(0)) * 4.0
    x[1, v // 2] += 40.0
    x[2, -1] += 90.0
    x[3] = 2.0**24 + 2.0 * torch.arange(v) % 16
    x[4, ::2] = -INF
    x[5] = -INF
    x[5, v - 1] = -3.0
    x[6] = torch.finfo(torch.float32).min
    x[7] = 1e38 * torch.linspace(-3, 3, v)
    x[8] = -INF
    x[9, 0] = INF
    x[10, 0] = float("nan")
    return x


# a row of one program, one that is read twice by the backward and one that always is, all ragged
WIDTHS = [37, pytest.param(20_001, marks=pytest.mark.slow), 40_001]


@pytest.mark.parametrize("v", WIDTHS)
def test_every_log_probability(place, v):
    x = rows_of_log_softmax(v)
    got = lossfuse.log_softmax(x.to(place.device), 1, impl=place.impl)
    want = torch.log_softmax(x.double(), 1)
    assert got[8:].isnan().all() and want[8:].isnan().all()
    # torch's operator adds in lanes of a vector, of which the narrowest has eight; kernels add
    # tiles
    additions = 0.0 if place.impl == "triton" else v / 8
    # what is further apart than float32 reaches is -inf
    assert_loss_close(got[:8], want[:8].float(), additions=additions)
    if place.impl == "triton":
        # of a sure class, the digits that a difference has lost, in float64 too
        z = x[1:3].double() - x[1:3].double().amax(1, keepdim=True)
        others = torch.where(z == 0, 0.0, z.exp()).sum(1)
        torch.testing.assert_close(
            got[1:3].cpu().double().amax(1), -torch.log1p(others), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(
    ("v", "dtype"),
    [
        *((37, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *(
            pytest.param(v, dtype, marks=pytest.mark.slow)
            for v in (20_001, 40_001)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        (33_001, torch.float16),
    ],
    ids=str,
)
def test_gradients_through_log_probabilities(device, v, dtype):
    """Each entry relative to itself, of a loss that picks a class and of one that takes all."""
    x = rows_of_log_softmax(v)[:6].to(dtype)
    # a program of the interpreter takes its time
    x = x if v < 100 else x[1:2]
    rows = torch.arange(len(x))
    x64 = x.double()
    for sums in (0.0, 0.5) if v < 100 else (0.5,):
        dlogp = torch.full_like(x64, sums / v)
        dlogp[rows, x64.argmax(1)] -= 1.0
        dlogp = dlogp.to(dtype)
        total = dlogp.double().sum(1, keepdim=True)
        p = x64.softmax(1)
        want = dlogp.double() - p * total
        if not sums:
            # by its complement, which float64 would cancel too
            others = torch.where(torch.nn.functional.one_hot(x64.argmax(1), v).bool(), 0.0, p).sum(
                1
            )
            want[rows, x64.argmax(1)] = -others
        z = x.to(device).requires_grad_()
        (got,) = torch.autograd.grad(lossfuse.log_softmax(z, 1, impl="triton"), z, dlogp.to(device))
        assert_gradient_close(
            got.cpu(), want, terms=(dlogp.double().abs() + p * total.abs()) if sums else 0.0
        )
    nothing = rows_of_log_softmax(v)[8 : 11 if v < 100 else 9].to(dtype).to(device).requires_grad_()
    (got,) = torch.autograd.grad(lossfuse.log_softmax(nothing, 1, impl="triton").sum(), nothing)
    assert got.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_log_softmax_is_rounded_once(thrifty_place, dim, dtype):
    """torch's operator on a CPU rounds the log-sum of the last dimension to the dtype: 0.28 of
    itself for a logarithm of -0.08."""
    x = (torch.randn(64, 64) * 8.0).to(dtype)
    leaf = x.to(thrifty_place.device).requires_grad_()
    got = lossfuse.log_softmax(leaf, dim, impl=thrifty_place.impl)
    want = torch.log_softmax(x.double(), dim)
    assert_gradient_close(got.detach(), want, terms=0.2)
    if thrifty_place.impl == "torch" and thrifty_place.device != "cpu":
        # torch keeps the rounded result for its gradient
        return
    up = torch.randn(64, 64).to(dtype)
    (grad,) = torch.autograd.grad(got, leaf, up.to(thrifty_place.device))
    wide = x.double().requires_grad_()
    (want_grad,) = torch.autograd.grad(torch.log_softmax(wide, dim), wide, up.double())
    assert_gradient_close(
        grad,
        want_grad,
        terms=up.double().abs() + want.exp() * up.double().abs().sum(dim, keepdim=True),
    )


@pytest.mark.parametrize("dim", [0, -2, -1])
def test_log_softmax_along_any_dimension_of_any_layout(place, dim):
    for make in (
        lambda x: x,
        lambda x: x.transpose(0, 2),
        lambda x: x[:, ::2],
        lambda x: x[0, 0, :1].expand(3, 2, 4),
        lambda x: x[:, :, :1],
    ):
        x = torch.randn(2, 4, 3, requires_grad=True)
        got, want = (
            lossfuse.log_softmax(make(x.to(place.device)), dim, impl=place.impl),
            F.log_softmax(make(x), dim),
        )
        same(got, want)
        for dlogp in (
            torch.ones(()).expand(want.shape),
            torch.randn(want.shape).transpose(0, 1).contiguous().transpose(0, 1),
        ):
            grads = (
                torch.autograd.grad(y, x, dlogp.to(y.device), retain_graph=True)[0]
                for y in (got, want)
            )
            same(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (0, 5), (5, 0), (1,), (3, 1)], ids=str)
def test_nearly_nothing(place, shape):
    x = torch.rand(shape, requires_grad=True)
    ours = x.to(place.device)
    dim = len(shape) - 1 if shape else 0
    got = lossfuse.log_softmax(ours, dim, impl=place.impl)
    same(got, F.log_softmax(x, dim))
    same(torch.autograd.grad(got.sum(), x)[0], torch.zeros(shape))
    with pytest.raises(IndexError, match="Dimension out of range"):
        lossfuse.log_softmax(ours, 7, impl=place.impl)
    for reduction in ("none", "mean", "sum"):
        got = lossfuse.binary_cross_entropy(
            ours, ours.detach(), reduction=reduction, impl=place.impl
        )
        same(got, F.binary_cross_entropy(x, x.detach(), reduction=reduction))


def test_picked_log_probabilities_of_any_layout(place):
    ids = torch.tensor([[1, -1, 4], [0, 0, 3]])
    w = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])[::2]
    for make in (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[:, :1].expand(2, 5, 3),
    ):
        x = torch.randn(2, 5, 3, requires_grad=True)
        for reduction in ("none", "mean", "sum"):
            got, want = (
                f(
                    make(x.to(d)),
                    ids.to(d),
                    w.to(d),
                    ignore_index=-1,
                    reduction=reduction,
                    **options,
                )
                for f, d, options in (
                    (lossfuse.nll_loss, place.device, {"impl": place.impl}),
                    (F.nll_loss, "cpu", {}),
                )
            )
            same(got, want)
            same(
                *(
                    torch.autograd.grad(loss, x, torch.full(loss.shape, 1.7, device=loss.device))[0]
                    for loss in (got, want)
                )
            )


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_where_nobody_looks_a_bad_id_makes_its_row_nan(device, bad, monkeypatch):
    monkeypatch.setattr("lossfuse.ops.log_softmax.require_ids_in_range", lambda *a: None)
    x, ids = (
        torch.randn(4, 5, device=device, requires_grad=True),
        torch.tensor([1, -100, bad, 4], device=device),
    )
    loss = OPERATORS.nll(x, ids, torch.rand(5, device=device), -100)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [False, False, True, False] and loss[1] == 0
    assert (
        dx.isnan().all(1).tolist() == [False, False, True, False]
        and dx[[0, 1, 3]].isfinite().all()
        and not dx[1].any()
    )


def test_what_is_no_probability_is_nan(device, monkeypatch):
    monkeypatch.setattr("lossfuse.family.values_are_readable", lambda t: False)
    x = torch.tensor(
        [[0.5, 1.5, -1e-9], [float("nan"), 1.0, INF]], device=device, requires_grad=True
    )
    t = torch.rand(2, 3, device=device, requires_grad=True)
    loss = lossfuse.binary_cross_entropy(x, t, reduction="none", impl="triton")
    for made in (loss, *torch.autograd.grad(loss.sum(), [x, t])):
        assert made.isnan().tolist() == [[False, True, True], [True, False, True]]


@pytest.mark.skipif(GPU, reason="counts what the CPU allocates")
def test_no_tensor_is_made_beside_the_result(monkeypatch):
    monkeypatch.setattr("lossfuse.family.values_are_readable", lambda t: False)
    x, t, ids = (
        torch.rand(8, 3000).requires_grad_(),
        torch.rand(8, 3000),
        torch.zeros(8, dtype=torch.int64),
    )
    with Largest() as largest:
        lossfuse.binary_cross_entropy(x, t, impl="triton")
        lossfuse.nll_loss(x, ids, impl="triton")
        lossfuse.nll_loss(x.t(), torch.zeros(3000, dtype=torch.int64), impl="triton")
    assert largest.bytes <= 8 * 3000


def second_derivatives(f, x, others=()):
    """Of a sum of what f makes, times a vector, and with respect to what comes from above."""
    leaves = [x, *others]
    y = f(*leaves)
    up = (
        torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype)
        .reshape(y.shape)
        .to(y.device)
        .requires_grad_()
    )
    first = torch.autograd.grad(y, leaves, up, create_graph=True)
    vectors = [
        torch.linspace(1.0, -2.0, g.numel(), dtype=g.dtype).reshape(g.shape).to(g.device)
        for g in first
    ]
    # a loss that is linear has no more than the derivative for what comes from above
    outputs = [(g, v) for g, v in zip(first, vectors, strict=True) if g.requires_grad]
    made, given = zip(*outputs, strict=True)
    found = torch.autograd.grad(
        made, [*leaves, up], given, allow_unused=True, materialize_grads=True
    )
    return [*first, *found]


IDS = torch.tensor([2, -100, 0, 6])
TWICE = {
    "log_softmax": lambda impl, w, x, t: lossfuse.log_softmax(x, 1, impl=impl),
    "nll_loss": lambda impl, w, x, t: lossfuse.nll_loss(
        x, IDS.to(x.device), w, reduction="none", impl=impl
    ),
    "both": lambda impl, w, x, t: lossfuse.nll_loss(
        lossfuse.log_softmax(x, 1, impl=impl), IDS.to(x.device), w, impl=impl
    ),
    "probabilities": lambda impl, w, x, t: lossfuse.binary_cross_entropy(
        x, t, w, reduction="none", impl=impl
    ),
    "mean of probabilities": lambda impl, w, x, t: lossfuse.binary_cross_entropy(
        x, t, w, impl=impl
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_double_backward_of_kernels(device, name):
    f = TWICE[name]
    made = []
    for impl, dtype, where in (
        ("triton", torch.float32, device),
        ("reference", torch.float64, "cpu"),
    ):
        g = torch.Generator().manual_seed(0)
        x, t = (
            torch.rand(4, 7, generator=g).clamp(0.05, 0.95).to(dtype).to(where).requires_grad_()
            for _ in range(2)
        )
        w = torch.rand(7, generator=g).to(dtype).to(where)
        others = (t,) if "probabilities" in name else ()
        made.append(
            second_derivatives(
                lambda x, *o, impl=impl, w=w: f(impl, w, x, *(o or (None,))), x, others
            )
        )
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize(
    ("impl", "backend"), [("triton", "eager"), ("triton", "aot_eager"), ("torch", "eager")]
)
def test_one_graph(device, impl, backend, name):
    torch._dynamo.reset()
    x, t = (torch.rand(4, 7, device=device).requires_grad_() for _ in range(2))
    w = torch.rand(7, device=device)
    f = lambda x, t: TWICE[name](impl, w, x * 0.9, t).sum() * 0.3  # noqa: E731
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, t), f(x, t))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, t), x), torch.autograd.grad(f(x, t), x)
    )


def test_one_graph_for_any_shape(device):
    torch._dynamo.reset()

    def f(x, ids):
        return lossfuse.nll_loss(lossfuse.log_softmax(x, 1, impl="triton"), ids, impl="triton")

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, v in ((4, 7), (6, 9), (3, 20)):
        x, ids = (
            torch.randn(n, v, device=device, requires_grad=True),
            torch.randint(0, v, (n,), device=device),
        )
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, ids), x), torch.autograd.grad(f(x, ids), x)
        )
    if device == "cpu":
        with pytest.raises(IndexError, match="target of row 1 is 99 but input has 20 classes"):
            compiled(x, torch.tensor([1, 99, 2]))


@pytest.mark.slow
def labels_of(x, *, least):
    return torch.linspace(least, 1.0, x.numel()).reshape(x.shape)


TRACED = {
    "cross_entropy": lambda x, t: lossfuse.cross_entropy(x, t),
    "cross_entropy of the reference": lambda x, t: lossfuse.cross_entropy(x, t, impl="reference"),
    "linear_cross_entropy": lambda x, t: lossfuse.linear_cross_entropy(
        x, torch.linspace(-1.0, 1.0, 7 * x.shape[1]).reshape(7, -1), t
    ),
    "cross_entropy_stats": lambda x, t: lossfuse.cross_entropy_stats(x, t).loss,
    "nll_loss": lambda x, t: lossfuse.nll_loss(x, t),
    "binary_cross_entropy": lambda x, t: lossfuse.binary_cross_entropy(
        x.sigmoid(), labels_of(x, least=0.1)
    ),
    "binary_cross_entropy_with_logits": lambda x, t: lossfuse.binary_cross_entropy_with_logits(
        x, t.clamp(min=0)[:, None]
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_tracers_without_a_compiler(name):
    """What they are given has no values either; what they have made is right for other numbers."""
    (x, t), (other, ids) = (
        (torch.randn(4, 7), torch.tensor(ids)) for ids in ([0, 6, -100, 3], [1, -100, 5, 2])
    )

    def step(x, t):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(TRACED[name](leaf, t) * 3.0, leaf)[0]

    want = step(other, ids)
    torch.testing.assert_close(make_fx(step)(x, t)(other, ids), want)
    compiled = aot_function(TRACED[name], fw_compiler=nop, bw_compiler=nop)
    compiled(x.clone().requires_grad_(), t)
    leaf = other.clone().requires_grad_()
    (compiled(leaf, ids) * 3.0).backward()
    torch.testing.assert_close(leaf.grad, want)


def test_opcheck(device):
    x, t = (torch.rand(4, 19, device=device, requires_grad=True) for _ in range(2))
    w, up = torch.rand(4, 19, device=device), torch.rand(4, 1, device=device, requires_grad=True)
    ids, row_up = (
        torch.tensor([1, -100, 18, 0], device=device),
        torch.rand(4, device=device, requires_grad=True),
    )
    check = torch.library.opcheck
    check(OPERATORS.log_softmax.default, (x,))
    stats = OPERATORS.log_softmax(x.detach())[1]
    check(OPERATORS.log_softmax_grad.default, (x, stats, t))
    for weight in (None, torch.rand(19, device=device)):
        check(OPERATORS.nll.default, (x, ids, weight, -100))
        check(OPERATORS.nll_grad.default, (row_up, ids, weight, -100, 19, torch.float32))
    for weight in (None, w):
        for elementwise in (False, True):
            check(OPERATORS.probability_loss.default, (x, t, weight, elementwise))
        check(OPERATORS.probability_grads.default, (x, t, weight, up, True, True))


def test_kernels_refuse_what_they_cannot_do(device):
    x, ids = torch.rand(4, 5, device=device), torch.tensor([1, 2, 0, 4], device=device)
    w = torch.rand(5, device=device, requires_grad=True)
    calls = {
        "log_softmax": lambda x, impl="triton": lossfuse.log_softmax(x, 1, impl=impl),
        "nll_loss": lambda x, impl="triton": lossfuse.nll_loss(x, ids, impl=impl),
        "binary_cross_entropy": lambda x, impl="triton": lossfuse.binary_cross_entropy(
            x, x.detach(), impl=impl
        ),
    }
    for f in calls.values():
        with pytest.raises(ValueError, match="impl='triton' cannot run here: .* input is float64"):
            f(x.double())
        with pytest.raises(ValueError, match="a torch.func transform is active"):
            torch.func.grad(lambda x: f(x).sum())(x)  # noqa: B023
        with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode tangent"):
            f(forward_ad.make_dual(x, x))
        with pytest.raises(ValueError, match="impl is 'cuda' but must be one of"):
            f(x, impl="cuda")
    for f in (lossfuse.nll_loss, lossfuse.binary_cross_entropy):
        with pytest.raises(ValueError, match="impl='triton' cannot run here: weight requires grad"):
            f(x, ids if f is lossfuse.nll_loss else x, w, impl="triton")
    with pytest.raises(ValueError, match="target is float64"):
        lossfuse.binary_cross_entropy(x, x.double(), impl="triton")


def test_a_changed_input_is_told(device):
    x = torch.randn(4, 5, device=device, requires_grad=True) * 1.0
    y = lossfuse.log_softmax(x, 1, impl="triton")
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_two_classes_are_one_label(place):
    x, t = (
        torch.randn(6, device=place.device),
        torch.tensor([0, 1, 1, 0, 1, 0], device=place.device),
    )
    two = torch.stack([torch.zeros_like(x), x], 1)
    one = lossfuse.binary_cross_entropy_with_logits(x, t.float(), impl=place.impl)
    torch.testing.assert_close(one, lossfuse.cross_entropy(two, t, impl=place.impl))
    torch.testing.assert_close(one, lossfuse.binary_cross_entropy(x.sigmoid(), t.float()))


def test_modules_are_torch_modules():
    x, t, ids = torch.randn(4, 5), torch.rand(4, 5), torch.tensor([1, 2, -100, 4])
    w = torch.rand(5)
    for ours, theirs, args, call in (
        (lossfuse.BCELoss, torch.nn.BCELoss, {"weight": w, "reduction": "sum"}, (x.sigmoid(), t)),
        (
            lossfuse.BCEWithLogitsLoss,
            torch.nn.BCEWithLogitsLoss,
            {"weight": w, "pos_weight": w, "reduction": "none"},
            (x, t),
        ),
        (lossfuse.NLLLoss, torch.nn.NLLLoss, {"weight": w, "ignore_index": 2}, (x, ids.abs() % 5)),
        (lossfuse.LogSoftmax, torch.nn.LogSoftmax, {"dim": 1}, (x,)),
    ):
        module = ours(**args)
        assert isinstance(module, theirs) and list(module.state_dict()) == list(
            theirs(**args).state_dict()
        )
        torch.testing.assert_close(module(*call), theirs(**args)(*call))


def test_refusals():
    p, t = torch.rand(4, 5), torch.rand(4, 5)
    for bad in (1.5, -0.1, float("nan")):
        q = p.clone()
        q[2, 3] = bad
        with pytest.raises(
            ValueError, match=r"input at \(2, 3\) is .* but probabilities must lie in \[0, 1\]"
        ):
            lossfuse.binary_cross_entropy(q, t)
    with pytest.raises(ValueError, match="expected the same"):
        lossfuse.binary_cross_entropy(p, t[:, :1])
    with pytest.raises(TypeError, match="target has dtype torch.int64"):
        lossfuse.binary_cross_entropy(p, t.long())
    with pytest.raises(ValueError, match="does not broadcast"):
        lossfuse.binary_cross_entropy(p, t, torch.ones(4))
    with pytest.raises(IndexError, match="target of row 1 is 5 but input has 5 classes"):
        lossfuse.nll_loss(p, torch.tensor([0, 5, 1, 2]))
    with pytest.raises(TypeError, match="class ids must be"):
        lossfuse.nll_loss(p, t)
    with pytest.warns(UserWarning, match="takes dim=1"):
        lossfuse.log_softmax(p)
