"""binary_cross_entropy_with_logits: formula, accuracy, lists of ids, layouts, autograd, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import lossfuse
import program
from allocations import Largest
from closeness import assert_gradient_close, assert_loss_close
from draws import dtypes, holds_for, laid_out, reductions, seeds
from lossfuse.label_inputs import flatten_labels

N, V = 5, 2060  # more than a block, ragged
INF, NAN = float("inf"), float("nan")
bce = lossfuse.binary_cross_entropy_with_logits
OPERATORS = torch.ops.lossfuse

LISTED = pytest.mark.parametrize("listed", [False, True], ids=["numbers", "ids"])


def logits(dtype=torch.float32, device="cpu", shape=(N, V), spread=4.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * spread
    return x.to(dtype).to(device).requires_grad_()


def lists(device="cpu", n=N, v=V):
    """Ids with padding, an id given twice, the first and last label, and a row without ids."""
    ids = torch.randint(0, v, (n, 7), generator=torch.Generator().manual_seed(1))
    ids[0, 1] = ids[0, 0]
    ids[1, 2:] = -100
    ids[2] = -100
    ids[3, :3] = torch.tensor([-100, 0, v - 1])
    return ids.to(device)


def dense(ids, v=V):
    ones = torch.zeros(len(ids), v + 1, device=ids.device).scatter(1, ids.where(ids >= 0, v), 1.0)
    return ones[:, :v]


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@LISTED
def test_gradients_of_labels_are_accurate_for_confident_predictions(
    place, listed, dtype, reduction, inplace
):
    """Against 0 and 1 no entry is a difference. Logits reach +-45, where the smaller probability is
    1e-20."""
    x, ids = logits(dtype, place.device, spread=12.0), lists(place.device)
    dloss = torch.tensor(3e3, device=place.device).expand((N, V) if reduction == "none" else ())
    t, x64 = dense(ids).bool(), x.detach().double()
    want = F.binary_cross_entropy_with_logits(x64, t.double(), reduction=reduction)
    want_grad = torch.where(t, -torch.sigmoid(-x64), torch.sigmoid(x64)) * 3e3
    want_grad /= x.numel() if reduction == "mean" else 1
    z = x * 1.0
    address = z.data_ptr()
    target = ids if listed else dense(ids)
    loss = bce(z, target, reduction=reduction, inplace=inplace, impl=place.impl)
    (got,) = torch.autograd.grad(loss, z, dloss)
    if reduction == "none":
        # torch's loss is a difference, also in float64: accurate to 1e-14 of a logit
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-12)
    else:
        assert_loss_close(loss, want)
    scaled_after_rounding = dtype == torch.bfloat16 and reduction != "none"
    terms = want_grad.abs() * 2.0**-8 / 5e-6 if scaled_after_rounding else 0.0
    assert_gradient_close(got, want_grad, terms=terms)
    assert (got.data_ptr() == address) == (inplace and place.impl != "reference")


def test_losses_of_confident_predictions_are_accurate(place):
    """torch's loss at -20 is 0."""
    x = torch.tensor([[-20.0, -10.0, 10.0, 20.0, -80.0]], device=place.device)
    for t in (torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]), torch.tensor([[2, 3]])):
        got = bce(x, t.to(place.device), reduction="none", impl=place.impl)
        torch.testing.assert_close(got.double(), F.softplus(-x.double().abs()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_infinite_logits_have_torchs_loss_and_gradient(place, t):
    # of a target of 0.5, torch's loss is +inf for one infinity and NaN for the other
    inf = NAN if t == 0.5 else INF
    for row in ([INF, NAN, 1.0], [-INF, 1.0, 1.0], [-INF, NAN, 1.0]):
        x = torch.tensor([row], device=place.device).requires_grad_()
        target = torch.full_like(x, t).detach()
        ids = torch.full((1, 2), 0 if t else -100, device=place.device)
        for y, numbers in ((target, target), (ids, dense(ids, 3))):
            got = bce(x, y, reduction="none", impl=place.impl)
            want = F.binary_cross_entropy_with_logits(x, numbers, reduction="none")
            pair = (a.nan_to_num(NAN, inf) for a in (got, want))
            torch.testing.assert_close(*pair, equal_nan=True)
            grads = (torch.autograd.grad(a[a.isfinite()].sum(), x)[0] for a in (got, want))
            torch.testing.assert_close(*grads, equal_nan=True)


X, T = torch.randn(4, 7), torch.rand(4, 7)
IDS, ROW_3 = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([[0], [0], [0], [1]])
REFUSED = [
    (TypeError, "input is a list", ([1.0], T), {}),
    (TypeError, "input has dtype torch.int64 but logits must be", (X.long(), T), {}),
    (ValueError, r"target has shape \(4, 1\) but input has shape \(4, 7\)", (X, T[:, :1]), {}),
    (ValueError, "nothing is broadcast", (X, T[0]), {}),
    (TypeError, r"target has dtype torch.int64 and shape \(4, 7\)", (X, T.round().long()), {}),
    (TypeError, "target has dtype torch.bool", (X, T > 0.5), {}),
    (TypeError, "target has dtype torch.int32", (X, IDS.int()), {}),
    (ValueError, r"must be \(N, P\), rows padded with ignore_index", (X, IDS[:3]), {}),
    (ValueError, r"must be \(N, P\)", (X, IDS[:, 0]), {}),
    (ValueError, r"must be \(N, P\)", (X[None], IDS[None]), {}),
    (IndexError, "target of row 3 is 7 but input has 7 classes", (X, IDS + 7 * ROW_3), {}),
    (ValueError, r"weight has shape \(4,\), which does not broadcast", (X, T, torch.ones(4)), {}),
    (ValueError, r"weight has shape \(2, 4, 7\)", (X, T, torch.ones(2, 4, 7)), {}),
    (TypeError, "weight has dtype torch.int64", (X, T, torch.ones(7).long()), {}),
    (ValueError, r"pos_weight has shape \(6,\)", (X, T), {"pos_weight": torch.ones(6)}),
    (ValueError, "target is on meta", (X, T.to("meta")), {}),
    (ValueError, "ignore_index is 3", (X, T), {"ignore_index": 3}),
    (ValueError, "reduction is 'avg'", (X, T), {"reduction": "avg"}),
    (ValueError, "impl is 'cuda'", (X, T), {"impl": "cuda"}),
    (ValueError, "weight requires grad", (X, T, T.clone().requires_grad_()), {"impl": "torch"}),
]


@pytest.mark.parametrize(("error", "words", "args", "options"), REFUSED)
def test_a_wrong_argument_is_named(error, words, args, options):
    with pytest.raises(error, match=words):
        bce(*args, **options)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_logits_that_are_also_the_target_are_not_written(fast_place, reduction):
    x = logits(device=fast_place.device)
    z = x * 1.0
    with pytest.warns(UserWarning, match="target lies in the memory of input"):
        loss = bce(z, z, reduction=reduction, inplace=True, impl=fast_place.impl)
    x64 = x.detach().double().requires_grad_()
    want = F.binary_cross_entropy_with_logits(x64, x64, reduction=reduction)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((loss.double().sum(), want.sum()), (x, x64))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6, check_dtype=False)


def test_ids_materialize_no_dense_target():
    x, ids = logits(shape=(64, 20_000)) * 1.0, lists(n=64, v=20_000)
    with Largest() as largest:
        torch.autograd.grad(bce(x, ids, inplace=True, impl="torch"), x)
    assert largest.bytes <= 3 << 20


@LISTED
def test_the_operators_pass_opcheck(thrifty_fast_place, listed):
    impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
    x, t, w = (torch.rand(4, 19, device=device) for _ in range(3))
    t = lists(device, 4, 19) if listed else t
    leaf, dloss = (x.clone().requires_grad_(), torch.rand(4, 1, device=device, requires_grad=True))
    check = torch.library.opcheck
    for weight in (w,) if listed else (None, w):
        options = (t, weight, weight, -100, impl)
        for elementwise in (False, True):
            check(OPERATORS.label_loss.default, (elementwise, leaf, *options))
        check(OPERATORS.label_grads.default, (dloss, True, not listed, leaf, *options))
        d = dloss.detach()
        check(OPERATORS.label_loss_and_grads.default, (d, True, not listed, x, *options))
        for operator in (OPERATORS.label_loss_and_grads_, OPERATORS.label_grads_):
            check(operator.default, (d, not listed, x.clone(), *options))


def test_short_rows_are_flattened_up_to_the_count_of_a_kernel():
    x = torch.empty(2, 2**20, 1000, device="meta")
    assert flatten_labels(x, x, None, None, -100).input.shape == (2**21, 1000)
    assert flatten_labels(x[:1], x[:1], None, None, -100).input.shape == (1, 2**20 * 1000)


@st.composite
def label_calls(draw):
    """(logits, target, weight and pos_weight if given, other options)."""
    torch.manual_seed(draw(seeds))
    listed, dtype = draw(st.booleans()), draw(dtypes)
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    if draw(st.booleans()) or listed:
        # 2060 labels are more than a block of the kernel
        shape = n, v = draw(st.integers(1, 9)), draw(st.one_of(st.integers(2, 300), st.just(2060)))
    x = (torch.randn(shape) * draw(st.sampled_from([0.0, 1.0, 8.0, 15.0]))).to(dtype)
    options = {"reduction": draw(reductions), "inplace": draw(st.booleans())}
    if listed:
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, v]))
        p = draw(st.integers(0, 9).filter(lambda p: p != v))
        padding = torch.rand(n, p) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        target = torch.randint(0, v, (n, p)).masked_fill(padding, options["ignore_index"])
    else:
        target = torch.rand(shape).round() if draw(st.booleans()) else torch.rand(shape)
        target = target.to(draw(st.sampled_from([dtype, torch.float32])))
    weights = {}
    for name in draw(st.sets(st.sampled_from(["weight", "pos_weight"]))):
        sizes = [size if draw(st.booleans()) else 1 for size in shape]
        weights[name] = torch.rand(sizes[draw(st.integers(0, len(shape))) :]) * 3.0 + 0.05
    return draw(laid_out(x)), draw(laid_out(target)), weights, options


@holds_for(label_calls(), few=60)
def test_any_call_equals_the_torch_program_in_float64(place, call):
    x, target, weights, options = call
    if place.impl == "triton" and torch.float64 in (x.dtype, target.dtype):
        return
    numbers = target.is_floating_point()
    leaves = [x, target] if numbers else [x]
    wide = [a.double().detach().requires_grad_() for a in leaves]
    leaves = [a.detach().to(place.device).requires_grad_() for a in leaves]
    y = target.to(place.device)

    scales = {name: w.double() for name, w in weights.items()}
    given = {name: value for name, value in options.items() if name != "inplace"}
    want = program.binary_cross_entropy_with_logits(*wide, *[y][numbers:], **scales, **given)
    # a power of two: "mean" and "sum" round their gradient before they multiply it
    dloss = torch.linspace(-1, 2, want.numel()).view(want.shape) if want.dim() else torch.tensor(2)
    want_grads = torch.autograd.grad(want, wide, dloss.double())

    z = leaves[0] * 1.0 if options["inplace"] else leaves[0]
    weights = {name: w.to(place.device) for name, w in weights.items()}
    loss = bce(z, *leaves[1:], *[y][numbers:], impl=place.impl, **weights, **options)
    grads = torch.autograd.grad(loss, leaves, dloss.to(loss))

    dtype, rtol = (torch.float64, 1e-11) if x.dtype == torch.float64 else (torch.float32, 1e-5)
    assert loss.shape == want.shape and loss.dtype == dtype
    got = loss.detach().double().cpu()
    torch.testing.assert_close(got, want.detach(), rtol=rtol, atol=1e-30, equal_nan=True)
    # gradients of a target between 0 and 1, and of a target with pos_weight, are differences
    x, t = wide[0].detach(), wide[1].detach() if numbers else 0.5
    size = dloss.abs() * scales.get("weight", 1.0) * (scales.get("pos_weight", 0.0) + 1.0)
    size = size / (x.numel() if options["reduction"] == "mean" else 1)
    p = torch.sigmoid(x)
    of_logits = size * (p * (1 - t) + (1 - p) * t) if numbers else 0.0
    of_target = size * (1.0 + x.abs()) if "pos_weight" in scales else 0.0
    for grad, want_grad, terms in zip(grads, want_grads, (of_logits, of_target), strict=False):
        assert_gradient_close(grad.cpu(), want_grad, terms=terms)
