"""log_softmax, nll_loss, binary_cross_entropy of probabilities, and the modules of the family."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.compiler import is_compiling
from torch.testing._internal.two_tensor import TwoTensor

import lossfuse
from closeness import assert_gradient_close, assert_loss_close
from conftest import GPU
from draws import dtypes, holds_for, laid_out, seeds
from lossfuse import binary_cross_entropy as bce
from lossfuse import binary_cross_entropy_with_logits as labels
from lossfuse import log_softmax, nll_loss
from lossfuse.call import dispatch

INF, NAN = float("inf"), float("nan")
HALF = (torch.bfloat16, torch.float16)

P1, T1 = [[0.6, 0.1], [0.3, 0.8]], [[0.0, 1], [1, 0]]
P2 = [[0.1531, 0.3302, 0.7537], [0.2200, 0.6875, 0.2268], [0.5109, 0.5873, 0.9275]]
T2, W2 = [[0.0, 0, 1], [0, 1, 0], [0, 0, 1]], [[0.1, 0.1, 0.9], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]]
VALUES = [
    (bce, (P1, T1), 1.5081),
    (lambda x, t: bce(x.sigmoid(), t), (P1, T1), 0.8518),
    (labels, (P1, T1), 0.8518),
    (bce, (P2, T2), 0.3784),
    (bce, (P2, T2, W2), 0.1030),
    (nll_loss, ([[2.0, 3, 1], [3, 7, 9]], [1, 2]), -6.0),
    (nll_loss, ([[[2.0, 3], [1, 5]], [[3, 7], [1, 9]]], [[1, 1], [0, 0]]), -4.0),
]


@pytest.mark.parametrize(("function", "args", "want"), VALUES)
def test_worked_values(device, function, args, want):
    got = function(*(torch.tensor(a, device=device) for a in args))
    assert got.item() == pytest.approx(want, abs=5e-5)


# --- against torch in float64


def assert_equals_torch(ours, theirs, x, terms=None):
    """Result and gradient. Each entry of the gradient is a difference of numbers of size
    ``terms``."""
    wide, leaf = x.double().contiguous().requires_grad_(), x.detach().requires_grad_()
    got, want = ours(leaf), theirs(wide)
    assert_gradient_close(got.detach(), want.detach(), terms=0.2 * (1.0 + want.detach().abs()))
    # powers of two, which do not round
    up = (2.0 ** (torch.arange(got.numel()) % 5)).view(got.shape)
    (grad,) = torch.autograd.grad(got, leaf, up.to(got))
    (want_grad,) = torch.autograd.grad(want, wide, up.double())
    sizes = 0.0 if terms is None else terms(wide.detach(), up.double()).nan_to_num(0.0, 0.0)
    largest = torch.finfo(x.dtype).max
    want_grad = want_grad.where(want_grad.abs() <= largest, want_grad.sign() * INF)
    assert_gradient_close(grad, want_grad, terms=sizes)


@st.composite
def log_softmax_calls(draw):
    torch.manual_seed(draw(seeds))
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    x = torch.randn(shape) * draw(st.sampled_from([0.0, 1.0, 8.0, 30.0]))
    x = (x + draw(st.sampled_from([0.0, 300.0]))).to(draw(dtypes))
    return draw(laid_out(x)), draw(st.integers(-len(shape), len(shape) - 1))


@holds_for(log_softmax_calls(), few=30)
def test_log_softmax_equals_torchs_along_any_dimension_of_any_layout(place, call):
    x, dim = call
    if place.device != "cpu" or (place.impl == "triton" and x.dtype == torch.float64):
        return

    def terms(x, up):
        logp = x.log_softmax(dim)
        return (up + logp.exp() * up.sum(dim, keepdim=True)) * (1.0 - logp)

    ours = lambda x: log_softmax(x, dim, impl=place.impl)  # noqa: E731
    assert ours(x).dtype == x.dtype
    assert_equals_torch(ours, lambda x: x.log_softmax(dim), x, terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(7,), (2, 7, 3, 2), (0, 7)], ids=str)
def test_losses_of_probabilities_equal_torchs(shape, reduction, dtype):
    """Of log-probabilities of classes, and of probabilities of labels, which may be 0 or 1."""
    x, w = torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]) * 8.0, torch.rand(14)[::2]
    ids = torch.randint(-1, 7, x.select(min(1, len(shape) - 1), 0).shape)
    options = {"reduction": reduction, "ignore_index": -1}
    assert_equals_torch(
        lambda x: nll_loss(x, ids, w, **options),
        lambda x: F.nll_loss(x, ids, w.double(), **options),
        F.logsigmoid(x).to(dtype),
    )
    p, t = torch.where(torch.rand(shape) < 0.3, x.sigmoid().round(), x.sigmoid()), torch.rand(shape)
    w = torch.rand(shape[-1])

    def terms(p, up):
        # of p - t, and of p * (1 - p) near torch's bound of 1e-12
        return up * w * (p + t) / (p * (1.0 - p)).clamp(min=1e-12)

    assert_equals_torch(
        lambda p: bce(p, t, w, reduction=reduction),
        lambda p: F.binary_cross_entropy(p, t.double(), w.double(), reduction=reduction),
        p.to(dtype),
        terms,
    )


# --- log_softmax of hard rows


def hard_rows(v):
    """Confident rows, offsets, classes of -inf, ties, differences that overflow; the results of the
    last three are NaN."""
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
    x[10, 0] = NAN
    return x


# a row in one program; a row that the backward reads twice; a row that both read twice; all ragged
WIDTHS = [37, pytest.param(20_001, marks=pytest.mark.slow), 40_001]


@pytest.mark.parametrize("v", WIDTHS)
def test_every_log_probability_of_hard_rows_is_accurate(place, v):
    x = hard_rows(v)
    got = log_softmax(x.to(place.device), 1, impl=place.impl).cpu()
    want = torch.log_softmax(x.double(), 1)
    assert got[8:].isnan().all()
    # torch adds in lanes of a vector, at least eight; kernels add tiles. Below float32's range is
    # -inf
    assert_loss_close(got[:8], want[:8].float(), additions=0.0 if place.impl == "triton" else v / 8)
    if place.impl == "triton":
        # for confident predictions more accurate than a difference, also in float64
        z = x[1:3].double() - x[1:3].double().amax(1, keepdim=True)
        confident = -torch.log1p(torch.where(z == 0, 0.0, z.exp()).sum(1))
        torch.testing.assert_close(got[1:3].double().amax(1), confident, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("v", WIDTHS)
def test_the_kernels_gradient_of_hard_rows_is_accurate(device, v, dtype):
    """Each entry relative to itself, for an upstream gradient of one class and one of all."""
    # the interpreter takes seconds for a long row
    x = hard_rows(v)[[0, 1, 2, 3, 4, 5, 8, 9, 10] if v < 100 else [1, 8]].to(dtype)
    p, top = x.double().softmax(1), F.one_hot(x.float().argmax(1), v).bool()
    for everywhere in (0.0, 0.5) if v < 100 else (0.5,):
        dlogp = (torch.full((len(x), v), everywhere / v) - top.float()).to(dtype)
        total = dlogp.double().sum(1, keepdim=True)
        want = dlogp.double() - p * total
        if not everywhere:
            # p - 1 cancels in float64 too
            want = torch.where(top, -torch.where(top, 0.0, p).sum(1, keepdim=True), want)
        z = x.to(device).requires_grad_()
        (got,) = torch.autograd.grad(log_softmax(z, 1, impl="triton"), z, dlogp.to(device))
        terms = (dlogp.double().abs() + p * total.abs()).nan_to_num() if everywhere else 0.0
        assert_gradient_close(got.cpu(), want, terms=terms)


# --- the choice of "auto"


@pytest.fixture
def gpu(monkeypatch):
    """A device that "auto" takes for a GPU; on the CPU kernels run in the interpreter."""
    if GPU:
        return "cuda"
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "_triton_obstacle", lambda *_: None)
    return "cpu"


@pytest.mark.parametrize(("dtype", "off"), [(HALF[0], 1 / 32), (HALF[1], 1 / 256)], ids=str)
def test_auto_computes_half_precision_gradients_from_the_logits(gpu, dtype, off):
    """torch's backward takes the rounded log-probabilities. Near -12 these are up to 1/32 off
    (float16: 1/256), and so are the entries of the gradient."""
    x = torch.linspace(-14.0, -10.0, 257).repeat(64, 1).to(dtype)
    x[:, 0] = torch.linspace(0.0, 1 / 16, 64)
    # large enough for the gradient to be normal in float16
    up = 4096.0 * F.one_hot(torch.zeros(64, dtype=torch.int64), 257)
    want = -4096.0 * x.double().softmax(1)[:, 1:]
    logp = x.float().log_softmax(1).to(dtype).float()
    torchs = torch.ops.aten._log_softmax_backward_data(up, logp, 1, torch.float32)
    leaf = x.to(gpu).requires_grad_()
    (ours,) = torch.autograd.grad(log_softmax(leaf, 1), leaf, up.to(leaf))
    errors = [float((g.cpu()[:, 1:] / want - 1.0).abs().max()) for g in (torchs, ours.double())]
    assert errors[0] == pytest.approx(off, rel=0.05)
    # one rounding of the gradient; the interpreter truncates
    assert errors[1] <= torch.finfo(dtype).eps


def test_auto_takes_torchs_log_softmax_where_its_gradient_is_as_accurate(gpu, monkeypatch):
    """And where only torch's operator works: subclasses, transforms, export and traces."""
    x = torch.zeros(2, 3, dtype=torch.bfloat16, device=gpu, requires_grad=True)

    def picked(x, context=None):
        with context or contextlib.nullcontext():
            return dispatch.pick_log_softmax("auto", x)

    assert picked(x) == picked(x.detach().half().requires_grad_()) == "triton"
    assert picked(x.float()) == picked(x.double()) == picked(x.detach()) == "torch"
    assert picked(x, torch.no_grad()) == picked(x, torch.autocast(gpu)) == "torch"
    assert picked(TwoTensor(x.detach(), x.detach()).requires_grad_()) == "torch"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert picked(dual) == "torch"
        with pytest.raises(ValueError, match="forward-mode tangent"):
            log_softmax(dual, 1, impl="triton")
    torch.func.grad(lambda x: log_softmax(x, 1).float().sum())(x.detach())
    for owner, name in ((torch.compiler, "is_exporting"), (dispatch, "is_jit_tracing")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda: True)
            assert picked(x) == "torch"
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ())
    assert picked(x) == "torch"


# --- autograd and compilers


IDS, LISTS = torch.tensor([2, -100, 0, 6]), torch.tensor([[0, 4], [-100, -100], [2, 2], [6, 1]])
W, T = torch.rand(7), torch.rand(4, 7)
FUNCTIONS = {
    "log_softmax": lambda x, impl: log_softmax(x, 1, impl=impl),
    "nll_loss": lambda x, impl: nll_loss(x, IDS.to(x.device), W.to(x), reduction="none"),
    "binary_cross_entropy": lambda x, impl: bce(x.sigmoid(), T.to(x), W.to(x)),
    "labels": lambda x, impl: labels(x, T.to(x), W.to(x), pos_weight=W.to(x), impl=impl),
    # a compiler ignores inplace
    "ids of labels": lambda x, impl: labels(
        x, LISTS.to(x.device), W.to(x), reduction="none", inplace=is_compiling(), impl=impl
    ),
}
NAMES = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@NAMES
def test_derivatives_of_every_order_and_mode_are_right(name, impl):
    x = torch.rand(4, 7, dtype=torch.float64, requires_grad=True)
    f = lambda x: FUNCTIONS[name](x, impl)  # noqa: E731
    assert gradcheck(f, x, check_forward_ad=True) and gradgradcheck(f, x)
    got = torch.func.grad(lambda x: f(x).sum())(x.detach())
    torch.testing.assert_close(got, torch.autograd.grad(f(x).sum(), x)[0])


def test_gradients_of_targets_and_weights_are_right():
    p, t, w = (torch.rand(4, 7, dtype=torch.float64) * 0.8 + 0.1 for _ in range(3))
    args = [a.requires_grad_() for a in (p, t, w)]
    assert gradcheck(bce, args) and gradgradcheck(bce, args)
    for impl in ("auto", "reference"):
        weights = {"weight": W.double(), "pos_weight": W.double()}
        f = functools.partial(labels, **weights, impl=impl)
        assert gradcheck(f, args[:2]) and gradgradcheck(f, args[:2])
    assert gradcheck(lambda x, t, w: labels(x, t, w, pos_weight=w), args)
    weight = torch.rand(7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda p, w: nll_loss(p, IDS, w), (p, weight))


@NAMES
def test_second_derivatives_of_kernels_are_right(device, name):
    def second(impl, x):
        x = x.clone().requires_grad_()
        y = FUNCTIONS[name](x, impl)
        up = torch.linspace(-1.0, 2.0, y.numel()).view(y.shape).to(y).requires_grad_()
        (grad,) = torch.autograd.grad(y, x, up, create_graph=True)
        v = torch.linspace(1.0, -2.0, grad.numel()).view(grad.shape).to(grad)
        return torch.autograd.grad(grad, [x, up], v, allow_unused=True, materialize_grads=True)

    got, want = second("triton", T.to(device)), second("reference", T.double())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double().cpu(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@NAMES
def test_functions_compile_to_one_graph_for_any_number_of_classes(gpu, name, impl):
    torch._dynamo.reset()
    f = lambda x: FUNCTIONS[name](x * 0.9, impl).sum() * 0.3  # noqa: E731
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=name == "log_softmax")
    for v in (7, 9, 20) if name == "log_softmax" else (7,):
        x = torch.rand(4, v, device=gpu).to(HALF[0]).requires_grad_()
        torch.testing.assert_close(compiled(x), f(x))
        torch.testing.assert_close(*(torch.autograd.grad(g(x), x)[0] for g in (compiled, f)))


def test_the_operators_pass_opcheck(device):
    x, dlogp = (torch.rand(4, 19, device=device, requires_grad=True) for _ in range(2))
    operators = torch.ops.lossfuse
    torch.library.opcheck(operators.log_softmax.default, (x,))
    _, stats = operators.log_softmax(x.detach())
    torch.library.opcheck(operators.log_softmax_grad.default, (x, stats, dlogp))


# --- errors and modules


P = torch.rand(4, 5)
LABELS, AT_2_3 = P.round(), torch.arange(20).view(4, 5) == 13
BY_NAME = functools.partial(log_softmax, dim=1, impl="triton")
REFUSED = [
    (ValueError, r"input at \(2, 3\) is -0.1", lambda: bce(P.masked_fill(AT_2_3, -0.1), LABELS)),
    (ValueError, r"must lie in \[0, 1\]", lambda: bce(P.masked_fill(AT_2_3, 1.5), LABELS)),
    (ValueError, r"input at \(2, 3\) is nan", lambda: bce(P.masked_fill(AT_2_3, NAN), LABELS)),
    (ValueError, "expected the same", lambda: bce(P, LABELS[:, :1])),
    (TypeError, "target has dtype torch.int64", lambda: bce(P, LABELS.long())),
    (ValueError, "does not broadcast", lambda: bce(P, LABELS, torch.ones(4))),
    (IndexError, "target of row 3 is 6 but input has 5 classes", lambda: nll_loss(P, IDS)),
    (TypeError, "class ids must be", lambda: nll_loss(P, LABELS)),
    (IndexError, "Dimension out of range", lambda: log_softmax(P, 7)),
    (TypeError, "input has dtype torch.int64 but logits", lambda: log_softmax(P.long(), 1)),
    (ValueError, "impl is 'cuda' but must be one of", lambda: log_softmax(P, 1, impl="cuda")),
    (ValueError, "impl='triton' cannot .* input is float64", lambda: BY_NAME(P.double())),
    (ValueError, "transform is active", lambda: torch.func.jacrev(BY_NAME)(P)),
]


@pytest.mark.parametrize(("error", "words", "call"), REFUSED)
def test_a_wrong_argument_is_named(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_a_change_of_the_input_before_the_backward_raises(device):
    z = torch.randn(4, 5, device=device, requires_grad=True) * 1.0
    loss = BY_NAME(z).sum()
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_an_unchecked_id_out_of_range_makes_its_row_nan(device, bad, monkeypatch):
    monkeypatch.setattr("lossfuse.family.require_ids_in_range", lambda *_: None)
    x = torch.randn(4, 5, device=device, requires_grad=True)
    ids = torch.tensor([1, -100, bad, 4], device=device)
    loss = nll_loss(x, ids, torch.rand(5, device=device), reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == dx.isnan().any(1).tolist() == [False, False, True, False]
    assert loss[1] == 0 and not dx[1].any()


MODULES = [
    ("BCELoss", {"weight": W, "reduction": "sum"}, (T, T)),
    ("BCEWithLogitsLoss", {"weight": W, "pos_weight": W, "reduction": "none"}, (T, T)),
    ("NLLLoss", {"weight": W, "ignore_index": 2}, (T, IDS.abs() % 7)),
    ("LogSoftmax", {"dim": 1}, (T,)),
]


@pytest.mark.parametrize(("name", "options", "call"), MODULES)
def test_modules_are_torchs_modules(name, options, call):
    ours, theirs = (getattr(owner, name)(**options) for owner in (lossfuse, torch.nn))
    assert isinstance(ours, type(theirs)) and [*ours.state_dict()] == [*theirs.state_dict()]
    torch.testing.assert_close(ours(*call), theirs(*call))
