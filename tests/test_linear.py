"""A head and its loss, beyond the formula: chunks and dtypes, precision, the products that
run, and memory."""

import pytest
import torch
import torch.nn.functional as F

import lossfuse
import program
from allocations import Largest, least_peak
from closeness import (
    assert_formula_close,
    assert_loss_close,
    assert_product_close,
    relative_error,
)
from compared import head_loss_and_grads, requiring
from lossfuse import LinearOptions
from lossfuse.backends import torch_rows
from lossfuse.ops import head_chunks, matmul
from lossfuse.spec import LossSpec
from options import chunks_of, upstream
from rows import class_weight, head_and_ids, probabilities

HALF = [torch.bfloat16, torch.float16]
LEAN = [
    {"logits_dtype": torch.bfloat16},
    {"acc_dtype": torch.bfloat16},
    {"logits_dtype": torch.bfloat16, "acc_dtype": torch.bfloat16},
]
SOFT = pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])


def assert_all_close(got, want, leaves):
    assert got[0].dtype == (torch.float64 if leaves[0].dtype == torch.float64 else torch.float32)
    assert_loss_close(got[0], want[0])
    for g, w, leaf in zip(got[1:], want[1:], leaves, strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        (assert_formula_close if g.dtype == torch.float32 else assert_product_close)(g, w)


def check(operands, target, chunks, **options):
    want = program.head_value_and_grads(operands, target, **options)
    got = head_loss_and_grads(operands, target, options=chunks, **options)
    assert_all_close(got, want, requiring(*operands, target))


def assert_errors_below(got, want, most):
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < most


@pytest.fixture(params=[False, True], ids=["", "mixed products"])
def mixed(request, monkeypatch):
    """As on CUDA: products take half precision to fp32, and the gradient of a chunk is narrower
    than the logits whose place it takes."""
    if request.param:
        monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
    return request.param


@SOFT
@pytest.mark.parametrize("k", [(), (3,), (2, 3)], ids=str)
def test_the_arguments_of_torch(k, soft):
    """Weights of K dimensions among them."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no F.linear_cross_entropy")
    h, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 5), (7, *k, 5), (7, *k)))
    target = torch.softmax(torch.randn(4, 7, *k), 1) if soft else torch.randint(0, 7, (4, *k))
    if not soft:
        target[1] = -100
    given = {"linear_bias": b, "weight": class_weight(7), "ignore_index": None}
    for reduction in ("none", "mean", "sum"):
        losses = [
            f(h, w, target, reduction=reduction, label_smoothing=0.1, **given)
            for f in (lossfuse.linear_cross_entropy, F.linear_cross_entropy)
        ]
        torch.testing.assert_close(*losses)
        grads = (torch.autograd.grad(loss.sum() * 0.3, [h, w, b]) for loss in losses)
        torch.testing.assert_close(*grads)


# --- chunks and dtypes


CASES = [
    (torch.float64, False),
    (torch.float32, False),
    *((d, m) for d in HALF for m in (False, True)),
]


@pytest.mark.parametrize("rows", [1, 7, None])
@SOFT
@pytest.mark.parametrize(("dtype", "mixed"), CASES, indirect=["mixed"], ids=str)
def test_chunks_of_any_size(mixed, dtype, soft, rows):
    """24 rows: one a chunk, several with a ragged last chunk, the default."""
    *operands, target = head_and_ids(24, 8, 37, dtype)
    target = probabilities(24, 37, dtype) if soft else target
    chunks = None if rows is None else chunks_of(rows, 37, 8 if dtype == torch.float64 else 4)
    for reduction in ("mean", "none"):
        dloss = upstream(operands[0], {"reduction": reduction})
        args = (operands, target, None, dloss)
        given = {"reduction": reduction, "label_smoothing": 0.1}
        want = program.head_value_and_grads(*args, **given)
        got = head_loss_and_grads(*args, **given, options=chunks)
        if not mixed:
            assert_all_close(got, want, requiring(*operands, target))
            continue
        # the gradient of the logits is rounded before the products
        assert_loss_close(got[0], want[0])
        assert_errors_below(got[1:], want[1:], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_weight_converted_in_blocks(monkeypatch, dtype):
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 5 * 8 * 4)
    *operands, target = head_and_ids(9, 8, 37, dtype)
    assert len(list(matmul.Weight(operands[1], torch.float32).blocks())) == 8
    for reduction in ("mean", "none"):
        check(operands, target, chunks=chunks_of(4, 37), reduction=reduction)


@pytest.mark.parametrize("given", LEAN, ids=["logits", "sums", "both"])
@pytest.mark.not_reference
def test_lean_modes_are_within_two_percent(monkeypatch, place, given):
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 5 * 8 * 4)
    *operands, target = head_and_ids(9, 8, 37, torch.bfloat16, device=place.device)
    want = program.head_value_and_grads(operands, target)
    got = head_loss_and_grads(operands, target, options=chunks_of(4, 37, **given), impl=place.impl)
    assert_errors_below(got, want, 0.02)


@pytest.mark.parametrize("given", LEAN, ids=["logits", "sums", "both"])
@pytest.mark.parametrize(("d", "v"), [(64, 1024), (64, 1021), (33, 1024), (96, 77)])
def test_the_padding_of_a_product_may_hold_anything(d, v, given):
    """New memory holds NaN, and so does the memory between strided rows: processors with AMX read
    both."""
    wide, weight, bias, target = head_and_ids(100, 2 * d, v, torch.bfloat16)
    operands = wide[:, :d], weight[:, :d], bias
    wide.data[:, d:] = torch.nan
    want = program.head_value_and_grads(operands, target)
    got = head_loss_and_grads(operands, target, options=LinearOptions(**given))
    assert_errors_below(got, want, 0.02)


@pytest.mark.parametrize(
    ("amx", "d", "v", "dtype"),
    [
        (False, 64, 1024, torch.float32),
        (True, 64, 1024, torch.bfloat16),
        (True, 64, 1021, torch.float32),
        (True, 33, 1024, torch.float32),
    ],
)
def test_a_cpu_multiplies_bfloat16_only_where_that_is_fast_and_right(monkeypatch, amx, d, v, dtype):
    monkeypatch.setattr(matmul, "_has_amx", lambda: amx)
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 4 * 100 * 256)
    multiplied, sizes, multiply = set(), [], head_chunks.product

    def product(out, a, b, **how):
        multiplied.update((a.dtype, b.dtype))
        sizes.extend(t.numel() for t in (a, b, out))
        multiply(out, a, b, **how)

    monkeypatch.setattr(head_chunks, "product", product)
    *operands, target = head_and_ids(100, d, v, torch.bfloat16)
    head_loss_and_grads(operands, target, options=LinearOptions(**LEAN[-1]))
    assert multiplied == {dtype}
    # in float32 a block of classes at a time
    assert dtype == torch.bfloat16 or max(sizes) <= 100 * 256


# --- precision


@pytest.mark.parametrize("rows", [1, 16, 512], ids=lambda rows: f"{512 // rows} chunks")
@pytest.mark.parametrize(("dtype", "mixed"), CASES[1:], indirect=["mixed"], ids=str)
def test_no_error_above_that_of_eager_with_fp32_logits(mixed, dtype, rows):
    """Targets repeat, so that rows of dW are sums of like numbers: where a sum in bf16
    stagnates. Products of half precision are compared with those of eager, also of half
    precision."""
    *operands, target = head_and_ids(512, 16, 64, dtype, ignored=0.1)
    dloss = torch.tensor(0.3)
    want = program.head_value_and_grads(operands, target, None, dloss)
    logits = F.linear(*(operands if mixed else [t.float() for t in operands])).float()
    loss = F.cross_entropy(logits, target)
    theirs = torch.autograd.grad(loss, operands, dloss)
    got = head_loss_and_grads(operands, target, None, dloss, options=chunks_of(rows, 64))
    assert abs(got[0] - want[0]) <= max(abs(loss - want[0]), 1e-6 * want[0])
    for ours, eagers, w in zip(got[1:], theirs, want[1:], strict=True):
        slack = 0.0 if mixed else 1e-6
        assert relative_error(ours, w) <= 1.1 * relative_error(eagers, w) + slack
    if dtype == torch.bfloat16 and rows == 1 and not mixed:
        lean = chunks_of(1, 64, acc_dtype=torch.bfloat16)
        got = head_loss_and_grads(operands, target, None, dloss, options=lean)
        assert relative_error(got[2], want[2]) > 3 * relative_error(theirs[1], want[2])


# --- the products that run


GRADIENTS = {
    # operands that require grad, and the products of a chunk beside that of its logits
    "all": ("hidden weight bias", {"hidden", "weight"}),
    "frozen weight": ("hidden", {"hidden"}),
    "frozen hidden": ("weight", {"weight"}),
    "bias alone": ("bias", set()),
    "probabilities alone": ("target", set()),
    "none": ("", set()),
}


@pytest.fixture
def ran(monkeypatch):
    """The shapes of the results of all products."""
    shapes = []

    def product(out, *args, **kwargs):
        shapes.append(tuple(out.shape))
        return matmul.product(out, *args, **kwargs)

    monkeypatch.setattr(head_chunks, "product", product)
    return shapes


@pytest.mark.parametrize("case", GRADIENTS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_the_products_of_required_gradients_run(ran, reduction, case):
    """6 rows of width 5 in two chunks, 11 classes."""
    names, products = GRADIENTS[case]
    hidden, weight, bias, target = head_and_ids(6, 5, 11, ignored=0.0)
    target = probabilities(6, 11) if "target" in names else target
    given = {"hidden": hidden, "weight": weight, "bias": bias, "target": target}
    for name, t in given.items():
        if t.is_floating_point():
            t.requires_grad_(name in names)
    # weights of rows take no further product
    how = {"reduction": reduction, "row_weight": torch.linspace(-1.0, 1.0, 6)}
    loss = lossfuse.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, options=chunks_of(3, 11), **how
    )
    if names:
        loss.sum().backward()
        want = program.head_value_and_grads((hidden, weight, bias), target, **how)
        for t, w in zip(requiring(*given.values()), want[1:], strict=True):
            assert_formula_close(t.grad, w)
    assert [name for name, t in given.items() if t.grad is not None] == names.split()
    again = bool(names) and reduction == "none"
    assert ran.count((3, 11)) == 2 * (1 + again)
    assert ran.count((3, 5)) == 2 * ("hidden" in products)
    assert ran.count((11, 5)) == 2 * ("weight" in products)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_only_logits_are_computed(ran, mode):
    hidden, weight, bias, target = head_and_ids(6, 5, 11, ignored=0.0)
    wide = [t.detach().double() for t in (hidden, weight, bias)]
    for reduction in ("none", "mean"):
        ran.clear()
        given = {"linear_bias": bias, "reduction": reduction, "options": chunks_of(3, 11)}
        with mode():
            loss = lossfuse.linear_cross_entropy(hidden, weight, target, **given)
        assert ran == [(3, 11)] * 2 and not loss.requires_grad
        head = (*wide[:2], target, wide[2])
        assert_loss_close(loss, program.linear_cross_entropy(*head, reduction=reduction))


@pytest.mark.parametrize(
    ("drop", "rows"), [(None, [2, 1]), (True, [2, 1]), (False, [2, 2, 2])], ids=str
)
def test_ignored_rows_are_left_out(ran, drop, rows):
    *operands, _ = head_and_ids(6, 5, 11)
    target = torch.tensor([-100, 3, -100, 4, 10, -100])
    check(operands, target, chunks=chunks_of(2, 11, drop_ignored=drop))
    assert [shape[0] for shape in ran if shape[1] == 11] == rows


# --- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SOFT
def test_no_storage_of_all_logits(mixed, dtype, soft):
    """Operator by operator; a mode does not see into an operator, so these are the functions that
    the operators call."""
    n, d, v = 256, 8, 4000
    *operands, target = (t.detach() for t in head_and_ids(n, d, v, dtype))
    target = probabilities(n, v, dtype).detach() if soft else target
    # the default of the blocks has a floor of MiBs
    options, most = chunks_of(16, v), max(16 * head_chunks.padded(v) * 4, v * d * 4)
    head, smooth = head_chunks.Head(*operands), LossSpec(label_smoothing=0.1)
    needs, ones = head_chunks.Needs(True, True, True, False), torch.ones(()).expand(n)
    with Largest() as largest:
        head_chunks.row_loss_and_grads(
            head, target, None, ones, needs, LossSpec(), options, torch_rows
        )
    assert 0 < largest.bytes <= most < n * v
    with Largest() as largest:
        head_chunks.row_loss(head, target, None, smooth, options, torch_rows)
    assert 0 < largest.bytes <= most


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_peak_of_a_call(dtype, reduction):
    """Chunk, sums and gradients; the logits would be 256 MiB, three times."""
    n, d, v = 2048, 128, 32000
    hidden, weight, _, target = head_and_ids(n, d, v, dtype, ignored=0.0)
    torch.use_deterministic_algorithms(False)  # which fills new memory twice
    given = {"reduction": reduction, "options": LinearOptions(chunk_bytes=32 << 20)}

    def call():
        loss = lossfuse.linear_cross_entropy(hidden, weight, target, **given)
        return torch.autograd.grad(loss.sum(), [hidden, weight])

    peak, sums = least_peak(call, hidden.device), (n + v) * d * 4
    if peak is None:
        pytest.skip("no /proc to ask")
    # malloc keeps some of the blocks of a converted weight that were freed
    blocks = 0 if dtype == torch.float32 else 3 * matmul.BLOCK_BYTES
    assert sums < peak < sums + (32 << 20) + blocks + (10 << 20)
