"""binary_cross_entropy_with_logits: formula, tails, lists of ids, in place, autograd, compilers,
refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import lossfuse
from allocations import Largest
from closeness import assert_formula_close, assert_gradient_close, assert_loss_close
from lossfuse.label_inputs import flatten_labels
from options import COMPILERS

N, V = 5, 2060  # more than a block, ragged
bce = lossfuse.binary_cross_entropy_with_logits
OPERATORS = torch.ops.lossfuse


def logits(dtype=torch.float32, device="cpu", shape=(N, V), spread=4.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * spread
    return x.to(dtype).to(device).requires_grad_()


def lists(device="cpu", n=N, v=V):
    """Ids with padding, an id given twice, the first and last label, and a row of nothing."""
    ids = torch.randint(0, v, (n, 7), generator=torch.Generator().manual_seed(1))
    ids[0, 1] = ids[0, 0]
    ids[1, 2:] = -100
    ids[2] = -100
    ids[3, :3] = torch.tensor([-100, 0, v - 1])
    return ids.to(device)


def dense(ids, v=V):
    return torch.zeros(len(ids), v + 1, device=ids.device).scatter(1, ids.where(ids >= 0, v), 1.0)[
        :, :v
    ]


def truth(x, t, dloss=None, weight=None, pos_weight=None, **options):
    """[loss, d input, d target] of torch in float64."""
    x, t = (a.detach().double().requires_grad_() for a in (x, t))
    weight, pos_weight = (None if w is None else w.double() for w in (weight, pos_weight))
    loss = F.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight, **options)
    return [
        loss.detach(),
        *torch.autograd.grad(
            loss, [x, t], torch.ones_like(loss) if dloss is None else dloss.double()
        ),
    ]


def factors(names, device):
    g = torch.Generator().manual_seed(2)
    shapes = {"weight": (V,), "weight of rows": (N, 1), "weight of all": (N, V), "number": (1,)}
    made = {}
    for name in names:
        if name == "pos_weight":
            made[name] = (torch.rand(V, generator=g) * 3).to(device)
        else:
            made["weight"] = (torch.rand(shapes[name], generator=g) + 0.2).to(device)
    return made


FACTORS = [
    (),
    ("weight",),
    ("pos_weight",),
    ("weight", "pos_weight"),
    ("weight of rows",),
    ("weight of all", "pos_weight"),
    ("number",),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("names", FACTORS, ids="+".join)
@pytest.mark.parametrize("listed", [False, True], ids=["numbers", "ids"])
def test_formula(place, listed, names, reduction):
    x, ids = logits(device=place.device), lists(place.device)
    t = (
        ids
        if listed
        else torch.rand(N, V, generator=torch.Generator().manual_seed(3))
        .to(place.device)
        .requires_grad_()
    )
    given = factors(names, place.device)
    shape = (N, V) if reduction == "none" else ()
    dloss = torch.rand(shape, generator=torch.Generator().manual_seed(4)).to(place.device) + 0.5
    want = truth(x, dense(ids) if listed else t, dloss, reduction=reduction, **given)
    loss = bce(x, t, reduction=reduction, impl=place.impl, **given)
    assert loss.dtype == torch.float32 and loss.shape == shape
    assert_loss_close(loss, want[0])
    for got, wanted in zip(
        torch.autograd.grad(loss, [x] if listed else [x, t], dloss), want[1:], strict=False
    ):
        assert_formula_close(got, wanted)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("listed", [False, True], ids=["numbers", "ids"])
def test_each_entry_however_sure_the_model_is(place, listed, dtype, reduction, inplace):
    """Zeros and ones: no entry is a difference. Logits to +-45, where the smaller probability is
    1e-20."""
    x, ids = logits(dtype, place.device, spread=12.0), lists(place.device)
    dloss = torch.tensor(3e3, device=place.device).expand((N, V) if reduction == "none" else ())
    t, x64 = dense(ids).bool(), x.detach().double()
    want = [
        truth(x, dense(ids), reduction=reduction)[0],
        torch.where(t, -torch.sigmoid(-x64), torch.sigmoid(x64)) * 3e3,
    ]
    want[1] /= x.numel() if reduction == "mean" else 1
    z = x * 1.0
    address = z.data_ptr()
    loss = bce(
        z, ids if listed else dense(ids), reduction=reduction, inplace=inplace, impl=place.impl
    )
    (got,) = torch.autograd.grad(loss, z, dloss)
    if reduction == "none":
        # torch's own loss is a difference, in float64 too: good to 1e-14 of a logit
        torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-12)
    else:
        assert_loss_close(loss, want[0])
    scaled_after_rounding = dtype == torch.bfloat16 and reduction != "none"
    assert_gradient_close(
        got, want[1], terms=(want[1].abs() * 2.0**-8 / 5e-6) if scaled_after_rounding else 0.0
    )
    assert (got.data_ptr() == address) == (inplace and place.impl != "reference")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_logits_that_are_their_own_labels(fast_place, reduction):
    """One tensor in two arguments is one reader of its memory, which must not be written while it
    is the target."""
    x = logits(device=fast_place.device)
    z = x * 1.0
    with pytest.warns(UserWarning, match="target lies in the memory of input"):
        loss = bce(z, z, reduction=reduction, inplace=True, impl=fast_place.impl)
    x64 = x.detach().double().requires_grad_()
    want = F.binary_cross_entropy_with_logits(x64, x64, reduction=reduction)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        *torch.autograd.grad((loss.double().sum(), want.sum()), (x, x64)),
        rtol=1e-4,
        atol=1e-6,
        check_dtype=False,
    )


def test_small_losses_keep_their_digits(place):
    """torch's is 0 at -20."""
    x = torch.tensor([[-20.0, -10.0, 10.0, 20.0, -80.0]], device=place.device)
    for t in (torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]), torch.tensor([[2, 3]])):
        got = bce(x, t.to(place.device), reduction="none", impl=place.impl)
        torch.testing.assert_close(got.double(), F.softplus(-x.double().abs()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_infinite_logits_as_torch(place, t):
    x = torch.tensor(
        [[float("inf"), float("nan"), 1.0], [2.0, 1.0, -3.0]], device=place.device
    ).requires_grad_()
    low = torch.tensor([[-float("inf"), 1.0, 1.0]], device=place.device).requires_grad_()
    both = torch.tensor([[-float("inf"), float("nan"), 1.0]], device=place.device).requires_grad_()
    for logits in (x, low, both):
        target = torch.full_like(logits, t).detach()
        got, want = (
            bce(logits, target, reduction="none", impl=place.impl),
            F.binary_cross_entropy_with_logits(logits, target, reduction="none"),
        )
        if t == 0.5:
            # where torch knows one infinity and not the other
            got, want = got.nan_to_num(posinf=torch.nan), want.nan_to_num(posinf=torch.nan)
        torch.testing.assert_close(got, want, equal_nan=True)
        grads = (
            torch.autograd.grad(loss[loss.isfinite()].sum(), logits)[0] for loss in (got, want)
        )
        torch.testing.assert_close(*grads, equal_nan=True)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=place.device)
    want = bce(low, dense(ids, 3), reduction="none", impl=place.impl)
    torch.testing.assert_close(
        bce(low, ids, reduction="none", impl=place.impl), want, equal_nan=True
    )


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (0,), (3, 0), (0, 3), (2, 3, 4), (4, 1), (2, 3, 4, 5)], ids=str
)
def test_shapes(place, shape):
    x, t = logits(device=place.device, shape=shape), torch.rand(shape).to(place.device)
    for reduction in ("none", "mean", "sum"):
        got, want = (
            f(x, t, reduction=reduction)
            for f in (
                lambda *a, **k: bce(*a, **k, impl=place.impl),
                F.binary_cross_entropy_with_logits,
            )
        )
        torch.testing.assert_close(got, want, equal_nan=True)
        grads = (torch.autograd.grad(loss, x, torch.ones_like(loss))[0] for loss in (got, want))
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_strides(place, inplace):
    for make in (
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[::2, 3:],
        lambda x: x.unflatten(1, (-1, 2)).transpose(0, 1),
    ):
        leaf = logits(device=place.device, shape=(6, 34))
        w = torch.rand(make(leaf).shape[-1]).to(place.device)
        t = torch.rand(make(leaf).shape).to(place.device)
        z = make(leaf) * 1.0
        (got,) = torch.autograd.grad(
            bce(z, t, w, pos_weight=w, inplace=inplace, impl=place.impl), leaf
        )
        (want,) = torch.autograd.grad(
            F.binary_cross_entropy_with_logits(make(leaf), t, w, pos_weight=w), leaf
        )
        torch.testing.assert_close(got, want)


def test_no_ids_at_all_and_an_index_that_is_a_label(place):
    x = logits(device=place.device, shape=(3, 9))
    none = torch.empty(3, 0, dtype=torch.int64, device=place.device)
    torch.testing.assert_close(
        bce(x, none, impl=place.impl), bce(x, torch.zeros_like(x), impl=place.impl)
    )
    ids = torch.tensor([[2, 4], [2, 2], [4, 4]], device=place.device)
    want = bce(x, dense(ids.where(ids != 2, -1), 9), impl=place.impl)
    torch.testing.assert_close(bce(x, ids, ignore_index=2, impl=place.impl), want)


def test_float64_is_float64():
    x, t, ids = logits(torch.float64), torch.rand(N, V, dtype=torch.float64), lists()
    for impl in ("torch", "reference"):
        for target, as_dense in ((t, t), (ids, dense(ids))):
            want = truth(x, as_dense)
            loss = bce(x, target, impl=impl)
            torch.testing.assert_close(loss, want[0], rtol=1e-13, atol=0)
            torch.testing.assert_close(
                torch.autograd.grad(loss, x)[0], want[1], rtol=1e-11, atol=1e-25
            )


X, T = torch.randn(4, 7), torch.rand(4, 7)
REFUSED = {
    "input no tensor": (TypeError, "input is a list", ([1.0], T), {}),
    "input of integers": (
        TypeError,
        "input has dtype torch.int64 but logits must be",
        (X.long(), T),
        {},
    ),
    "target one column": (
        ValueError,
        r"target has shape \(4, 1\) but input has shape \(4, 7\); expected the same",
        (X, T[:, :1]),
        {},
    ),
    "target one row": (ValueError, r"nothing is broadcast", (X, T[0]), {}),
    "zeros and ones as integers": (
        TypeError,
        r"target has dtype torch.int64 and shape \(4, 7\)",
        (X, T.round().long()),
        {},
    ),
    "zeros and ones as bool": (TypeError, "target has dtype torch.bool", (X, T > 0.5), {}),
    "int32 ids": (
        TypeError,
        "target has dtype torch.int32",
        (X, torch.zeros(4, 2, dtype=torch.int32)),
        {},
    ),
    "ids of fewer rows": (
        ValueError,
        r"must be \(N, P\), rows padded with ignore_index",
        (X, torch.zeros(3, 2).long()),
        {},
    ),
    "ids without lists": (ValueError, r"must be \(N, P\)", (X, torch.zeros(4).long()), {}),
    "ids of a volume": (
        ValueError,
        r"must be \(N, P\)",
        (X[None], torch.zeros(1, 4, 2).long()),
        {},
    ),
    "weight of rows": (
        ValueError,
        r"weight has shape \(4,\), which does not broadcast to the shape of input, \(4, 7\)",
        (X, T, torch.ones(4)),
        {},
    ),
    "weight larger": (ValueError, r"weight has shape \(2, 4, 7\)", (X, T, torch.ones(2, 4, 7)), {}),
    "weight of integers": (
        TypeError,
        "weight has dtype torch.int64",
        (X, T, torch.ones(7).long()),
        {},
    ),
    "pos_weight": (
        ValueError,
        r"pos_weight has shape \(6,\)",
        (X, T),
        {"pos_weight": torch.ones(6)},
    ),
    "elsewhere": (ValueError, "target is on meta", (X, T.to("meta")), {}),
    "ignore_index of numbers": (ValueError, "ignore_index is 3", (X, T), {"ignore_index": 3}),
    "reduction": (ValueError, "reduction is 'avg'", (X, T), {"reduction": "avg"}),
    "impl": (ValueError, "impl is 'cuda'", (X, T), {"impl": "cuda"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    error, words, args, options = REFUSED[name]
    with pytest.raises(error, match=words):
        bce(*args, **options)


def test_triton_does_not_differentiate_weights():
    for name in ("weight", "pos_weight"):
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            bce(X, T, **{name: torch.ones(7, requires_grad=True)}, impl="torch")
        leaf = torch.rand(7, requires_grad=True)
        (got,) = torch.autograd.grad(bce(X, T, **{name: leaf}), leaf)
        sure = F.softplus(-X)
        want = T * sure if name == "pos_weight" else T * sure + (1 - T) * (X + sure)
        torch.testing.assert_close(got, want.sum(0) / X.numel())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("listed", [False, True], ids=["numbers", "ids"])
def test_consumed_logits(fast_place, listed, reduction):
    target = lists(fast_place.device) if listed else torch.rand(N, V).to(fast_place.device)
    leaf = logits(device=fast_place.device)
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        bce(leaf, target, inplace=True, impl=fast_place.impl)
    z = leaf * 1.0
    saver = (z * z).sum()
    loss = bce(z, target, reduction=reduction, inplace=True, impl=fast_place.impl).sum()
    (want,) = torch.autograd.grad(
        bce(leaf, target, reduction=reduction, impl="reference").sum(), leaf
    )
    with pytest.raises(RuntimeError, match="consumed by a loss of lossfuse"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    loss.backward(retain_graph=True)
    assert_formula_close(leaf.grad, want)
    with pytest.raises(RuntimeError, match="consumed by a loss of lossfuse"):
        z.argmax()
    with pytest.raises(RuntimeError, match="consumed by a loss of lossfuse"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saver.backward()


def test_memory_that_others_see_is_not_written(fast_place):
    z = logits(device=fast_place.device) * 1.0
    alias, before = z.detach(), z.detach().clone()
    with pytest.warns(UserWarning, match="inplace=True has no effect"):
        bce(z, lists(fast_place.device), inplace=True, impl="torch")
    assert torch.equal(alias, before)


def test_ids_make_no_tensor_of_zeros_and_ones():
    x = logits(shape=(64, 20_000)) * 1.0
    ids = lists(n=64, v=20_000)
    with Largest() as largest:
        torch.autograd.grad(bce(x, ids, inplace=True, impl="torch"), x)
    assert largest.bytes <= 3 << 20


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck_and_gradgradcheck(impl, reduction):
    x, t = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = torch.tensor([[0, 4], [-100, -100], [2, 2]])
    w, pw = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    for f, args in (
        (lambda x, t: bce(x, t, w, pos_weight=pw, reduction=reduction, impl=impl), (x, t)),
        (lambda x: bce(x, ids, w, pos_weight=pw, reduction=reduction, impl=impl), (x,)),
    ):
        assert gradcheck(f, args) and gradgradcheck(f, args)


def test_transforms():
    x, t, tangent = torch.randn(3, 5), torch.rand(3, 5), torch.randn(3, 5)
    with forward_ad.dual_level():
        got = [
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent), t)).tangent
            for f in (bce, F.binary_cross_entropy_with_logits)
        ]
    torch.testing.assert_close(*got)
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(bce)(x, t), transform(F.binary_cross_entropy_with_logits)(x, t)
        )
    got = torch.func.vmap(bce)(x, t)
    torch.testing.assert_close(got, torch.stack([bce(a, b) for a, b in zip(x, t, strict=True)]))


@pytest.mark.parametrize("listed", [False, True], ids=["numbers", "ids"])
def test_opcheck(thrifty_fast_place, listed):
    impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
    x = logits(device=device, shape=(4, 19))
    t = lists(device, 4, 19) if listed else torch.rand(4, 19).to(device)
    w = torch.rand(4, 19).to(device)
    for weight in (w,) if listed else (None, w):
        options = (t, weight, weight)
        for elementwise in (False, True):
            torch.library.opcheck(
                OPERATORS.sigmoid_loss.default, (x, *options, elementwise, -100, impl)
            )
        dloss = torch.rand(4, 1, device=device, requires_grad=True)
        torch.library.opcheck(
            OPERATORS.sigmoid_grads.default, (x, *options, dloss, True, not listed, -100, impl)
        )
        plain, d = x.detach(), dloss.detach()
        torch.library.opcheck(
            OPERATORS.sigmoid_loss_and_grads.default,
            (plain, *options, d, True, not listed, -100, impl),
        )
        torch.library.opcheck(
            OPERATORS.sigmoid_loss_and_grads_.default,
            (plain.clone(), *options, d, not listed, -100, impl),
        )
        torch.library.opcheck(
            OPERATORS.sigmoid_grads_.default, (plain.clone(), *options, d, not listed, -100, impl)
        )


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("listed", [False, True], ids=["numbers", "ids"])
@pytest.mark.parametrize("backend", COMPILERS)
def test_one_graph(place, backend, listed, reduction):
    torch._dynamo.reset()
    x = logits(device=place.device, shape=(4, 19))
    t = lists(place.device, 4, 19) if listed else torch.rand(4, 19).to(place.device)
    f = lambda x: bce(x * 1.5, t, reduction=reduction, inplace=True, impl=place.impl).sum() * 0.3  # noqa: E731
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), f(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(f(x), x))


def test_labels_are_strung_together_as_far_as_kernels_count():
    x = torch.empty(2, 2**20, 1000, device="meta")
    assert flatten_labels(x, x, None, None, -100).input.shape == (2**21, 1000)
    assert flatten_labels(x[:1], x[:1], None, None, -100).input.shape == (1, 2**20 * 1000)
