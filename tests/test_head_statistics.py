"""Statistics of a head, beyond those laws that logits obey too (test_statistics): hidden states,
weight and bias, chunks, half-precision products, main_grad, memory."""

import pytest
import torch

import lossfuse
import program
from allocations import Largest
from closeness import (
    assert_formula_close,
    assert_statistics_close,
    relative_error,
)
from compared import gradient_pairs, requiring
from lossfuse import LinearOptions
from lossfuse.backends import torch_rows
from lossfuse.ops import head as head_ops
from lossfuse.ops import head_chunks, library
from lossfuse.row_types import Upstream, Wants
from lossfuse.spec import LossSpec
from options import (
    DIFFERENTIABLE,
    EVERYTHING,
    ROW_WEIGHTED,
    chunks_of,
    differentiated,
    options_of,
    upstreams,
)
from rows import class_weight, head_and_ids, probabilities

HALF = [torch.bfloat16, torch.float16]
COMBINATIONS = [
    (),
    ("sum",),
    ("negative scale",),
    EVERYTHING,
    (*EVERYTHING, "none"),
    (*EVERYTHING, "normalizer"),
    *ROW_WEIGHTED,
]
FLOATS = ("loss", "lse", "target_logprob", "entropy")
SOFT = pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])


def ours(operands, target, weight=None, **options):
    hidden, head, bias = operands
    return lossfuse.linear_cross_entropy_stats(
        hidden, head, target, linear_bias=bias, weight=weight, **options
    )


def wanted(operands, target, weight=None, **options):
    (hidden, head, bias, t, w), leaves = program.wide_leaves(*operands, target, weight)
    return program.linear_cross_entropy_stats(hidden, head, t, bias, w, **options), leaves


@pytest.fixture
def narrow(monkeypatch):
    """As on CUDA: products take half precision to fp32, and the gradient of the logits is rounded
    before them."""
    monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
@SOFT
def test_every_implementation_has_the_formula(place, soft, names):
    """5 rows of width 6 in chunks of 3 and 2; 17 classes, so that rows of logits are padded."""
    *operands, target = head_and_ids(5, 6, 17, device=place.device)
    target = probabilities(5, 17, device=place.device) if soft else target
    weight, options = options_of(names, 17, place.device)
    chunks = chunks_of(3, 17)
    got = ours(operands, target, weight, impl=place.impl, options=chunks, **options)
    want, wide = wanted(operands, target, weight, **options)
    assert_statistics_close(got, want)
    leaves = requiring(*operands, target)
    for g, w in gradient_pairs(got, leaves, want, wide, upstreams(got)):
        assert g.dtype == torch.float32 and g.shape == w.shape
        assert_formula_close(g, w)


@pytest.mark.parametrize("k", [(3,), (2, 3)], ids=str)
def test_weights_of_k_dimensions(k):
    h, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 5), (7, *k, 5), (7, *k)))
    target = torch.randint(0, 7, (4, *k))
    target[1] = -100
    got = lossfuse.linear_cross_entropy_stats(h, w, target, linear_bias=b, lse_square_scale=0.1)
    logits = torch.einsum("nd,v...d->nv...", h.double(), w.double()) + b.double()
    want = program.cross_entropy_stats(logits, target, lse_square_scale=0.1)
    assert_statistics_close(got, want)
    for pair in gradient_pairs(got, [h, w, b], want, [h, w, b], upstreams(got)):
        assert_formula_close(*pair)


# --- chunks and dtypes


@pytest.mark.parametrize("rows", [1, 7])
@SOFT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_any_chunk_size(dtype, soft, rows):
    *operands, target = head_and_ids(24, 8, 37, dtype)
    target = probabilities(24, 37, dtype) if soft else target
    chunks = chunks_of(rows, 37, 8 if dtype == torch.float64 else 4)
    leaves, most = requiring(*operands, target), torch.finfo(dtype).eps * 20 + 1e-12
    for reduction in ("mean", "none"):
        got = ours(operands, target, reduction=reduction, label_smoothing=0.1, options=chunks)
        want, wide = wanted(operands, target, reduction=reduction, label_smoothing=0.1)
        assert_statistics_close(got, want)
        assert got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for names in (DIFFERENTIABLE, ("loss",)):
            for g, w in gradient_pairs(got, leaves, want, wide, upstreams(got, names)):
                assert g.dtype == dtype and relative_error(g, w) < most


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("names", [("entropy",), FLOATS], ids="+".join)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 1e-9, 0.0])
def test_narrow_products_in_any_unit(narrow, thrifty_fast_place, scale, names, dtype):
    """fp16: the gradient of the logits is scaled into its range for any upstream gradient;
    65536 may be beyond that of the result."""
    impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
    *operands, target = head_and_ids(6, 8, 37, dtype, device=device)
    got = ours(operands, target, reduction="none", impl=impl, options=chunks_of(4, 37))
    want, wide = wanted(operands, target, reduction="none")
    assert_statistics_close(got, want)
    ups = {name: u * scale for name, u in upstreams(got, names).items()}
    info = torch.finfo(dtype)
    for g, w in gradient_pairs(got, operands, want, wide, ups):
        if scale == 0.0:
            assert not g.any()
            continue
        w = w.to(dtype).double()
        finite = w.isfinite() & g.isfinite()
        # only entries at the edge of the range may be infinite in one and finite in the other
        assert (finite | (w.abs() > 0.98 * info.max) | (g.double().abs() > 0.98 * info.max)).all()
        eps = 4 * info.eps
        atol = max(eps * float(w[finite].abs().max()), info.smallest_normal * info.eps)
        torch.testing.assert_close(g[finite].double(), w[finite], rtol=eps, atol=atol)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_mean_over_many_rows_in_narrow_products(narrow, dtype):
    *operands, target = head_and_ids(4, 8, 37, dtype)
    got = ours(operands, target, normalizer=4096.0, options=chunks_of(3, 37))
    want, wide = wanted(operands, target, normalizer=4096.0)
    for names in (("loss",), ("loss", "entropy")):
        ups = upstreams(got, names)
        # as a scaled bonus is
        ups = {name: u / (4096.0 if name == "entropy" else 1.0) for name, u in ups.items()}
        for g, w in gradient_pairs(got, operands, want, wide, ups):
            assert relative_error(g, w) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_real_vocabulary(thrifty_place, dtype):
    impl, device = thrifty_place.impl, thrifty_place.device
    *operands, target = head_and_ids(4, 16, 50257, dtype, device=device)
    got = ours(operands, target, reduction="none", impl=impl, options=chunks_of(3, 50257))
    want, wide = wanted(operands, target, reduction="none")
    assert_statistics_close(got, want)
    for g, w in gradient_pairs(got, operands, want, wide, upstreams(got)):
        assert relative_error(g, w) < max(2e-5, 2 * torch.finfo(dtype).eps)


def test_logits_in_bf16():
    *operands, target = head_and_ids(9, 8, 37, torch.bfloat16)
    want, wide = wanted(operands, target, reduction="none")
    lean = LinearOptions(logits_dtype=torch.bfloat16, acc_dtype=torch.bfloat16)
    got = ours(operands, target, reduction="none", options=lean)
    assert got.lse.dtype == torch.float32
    assert relative_error(got.entropy.detach(), want.entropy.detach()) < 0.02
    for g, w in gradient_pairs(got, operands, want, wide, upstreams(got)):
        assert relative_error(g, w) < 0.03


@pytest.mark.parametrize("drop", [None, False], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_ignored_row_with_an_infinite_upstream(narrow, dtype, drop):
    *operands, _ = head_and_ids(4, 4, 9, dtype)
    target = torch.tensor([3, -100, 8, 3])
    options = chunks_of(3, 9, drop_ignored=drop)
    made = []
    for up in (torch.ones(4), torch.tensor([1.0, torch.inf, 1.0, 1.0])):
        got = ours(operands, target, reduction="none", options=options)
        made.append(differentiated(got, operands, dict.fromkeys(FLOATS, up)))
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("drop", [None, True, False], ids=str)
def test_ignored_hidden_states_hold_anything(thrifty_place, drop):
    impl, device = thrifty_place.impl, thrifty_place.device
    hidden, weight, bias, _ = head_and_ids(6, 4, 9, device=device)
    target = torch.tensor([3, -100, -100, 8, -100, 3], device=device)
    dirty = hidden.detach().clone()
    dirty[1], dirty[2, 0], dirty[4, -1] = torch.nan, torch.inf, -torch.inf
    dirty.requires_grad_()
    for reduction in ("none", "mean"):
        given = {
            "reduction": reduction,
            "impl": impl,
            "options": chunks_of(4, 9, drop_ignored=drop),
        }
        got, want = (ours((h, weight, bias), target, **given) for h in (dirty, hidden))
        torch.testing.assert_close(tuple(got), tuple(want))
        pairs = gradient_pairs(
            got, [dirty, weight, bias], want, [hidden, weight, bias], upstreams(got)
        )
        for g, w in pairs:
            torch.testing.assert_close(g, w)


# --- main_grad and autocast


@pytest.mark.parametrize("names", [("loss",), ("entropy",), DIFFERENTIABLE], ids="+".join)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_main_grad_gets_each_gradient_once(reduction, names):
    hidden, weight, bias, target = head_and_ids(6, 5, 11, torch.bfloat16)
    weight.main_grad = torch.full((11, 5), 3.0)
    want, wide = wanted((hidden, weight, bias), target, reduction=reduction)
    ups = upstreams(want, names)
    w = differentiated(want, wide, ups)[1]
    options = chunks_of(4, 11, main_grad=True)
    for times in (1, 2):
        stats = ours((hidden, weight, bias), target, reduction=reduction, options=options)
        some = [(u, getattr(stats, name)) for name, u in ups.items()]
        sum((u.to(t.dtype) * t).sum() for u, t in some).backward()
        assert weight.grad is None and hidden.grad is not None
        total = (3.0 + times * w).float()
        torch.testing.assert_close(weight.main_grad, total, rtol=1e-5, atol=1e-5)


def test_main_grad_of_backwards_one_after_the_other():
    hidden, weight, bias, target = head_and_ids(6, 5, 11)
    weight.main_grad = torch.zeros(11, 5)
    want, wide = wanted((hidden, weight, bias), target)
    stats = ours((hidden, weight, bias), target, options=LinearOptions(main_grad=True))
    (2.0 * stats.loss).backward(retain_graph=True)
    stats.entropy.sum().backward(retain_graph=True)
    stats.loss.backward()
    (w,) = torch.autograd.grad(3.0 * want.loss + want.entropy.sum(), wide[1])
    assert_formula_close(weight.main_grad, w)


def test_autocast_rounds_operands_and_returns_gradients_of_their_dtype(thrifty_place):
    impl, device = thrifty_place.impl, thrifty_place.device
    *operands, target = head_and_ids(6, 5, 11, device=device)
    half = [t.detach().bfloat16().requires_grad_() for t in operands]
    for reduction in ("none", "mean"):
        with torch.autocast(device, torch.bfloat16):
            got = ours(operands, target, reduction=reduction, impl=impl)
        want = ours(half, target, reduction=reduction, impl=impl)
        torch.testing.assert_close(tuple(got), tuple(want))
        for g, w in gradient_pairs(got, operands, want, half, upstreams(got)):
            assert g.dtype == torch.float32
            torch.testing.assert_close(g, w.float(), rtol=2.0**-7, atol=1e-6)


# --- memory and compilers


@SOFT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_storage_of_all_logits(narrow, dtype, soft):
    n, d, v = 96, 8, 4000
    *operands, target = (t.detach() for t in head_and_ids(n, d, v, dtype))
    target = probabilities(n, v, dtype).detach() if soft else target
    head, needs = head_chunks.Head(*operands), head_chunks.Needs(True, True, True, False)
    wants, rest = Wants(True, True), (LossSpec(), chunks_of(16, v), torch_rows)
    most = max(16 * head_chunks.padded(v) * 4, v * d * 4)
    up = torch.ones(n)
    for upstream in (None, Upstream(up), Upstream(up, up, up, up)):
        with Largest() as largest:
            if upstream is None:
                head_chunks.row_stats(head, target, None, wants, *rest)
            else:
                head_chunks.row_stats_and_grads(head, target, None, upstream, needs, wants, *rest)
        assert 0 < largest.bytes <= most < n * v


@SOFT
def test_the_operators_pass_opcheck(thrifty_fast_place, soft):
    impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
    hidden, weight, bias, target = head_and_ids(4, 5, 19, device=device)
    target = probabilities(4, 19, device=device) if soft else target
    chunks = LinearOptions(chunk_bytes=2 * 32 * 4, allow_retain_graph=True)
    settings = (
        *head_ops.ChunkArgs.of(chunks),
        *library.OpArgs.of(LossSpec(-100, 0.1, 20.0, 0.7, 1e-3), impl),
    )
    head, needs = (
        (hidden, weight, bias, target, class_weight(19, device)),
        (True, True, True, soft),
    )
    plain, divisor = tuple(t.detach() for t in head), torch.tensor(3.0, device=device)
    for wants in (Wants(True, True), Wants(False, False))[
        : 1 if (impl, device) == ("triton", "cpu") else 2
    ]:
        torch.library.opcheck(head_ops.linear_row_stats, (*head, None, *wants, *settings))
        torch.library.opcheck(
            head_ops.linear_stats_total, (*head, divisor, None, None, *needs, *wants, *settings)
        )
    ups = [torch.randn(4, device=device) for _ in range(4)]
    for given in (ups, [None, ups[1], None, ups[3]]):
        torch.library.opcheck(head_ops.linear_grads, (*plain, *given, *needs, *settings))
