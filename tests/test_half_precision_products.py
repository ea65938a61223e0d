"""Products of half-precision operands with an fp32 result, which only CUDA has, on the CPU with
stand-ins: their way through the chunk loop, and the range of float16."""

import pytest
import torch

import lossfuse
import program
from closeness import assert_loss_close, relative_error
from compared import head_loss_and_grads
from conftest import interpreted_only
from lossfuse.ops import head_chunks, matmul
from options import chunks_of
from rows import class_weight, head_and_ids, probabilities

N, D, V = 23, 16, 77
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def mixed(monkeypatch):
    """torch.mm and torch.addmm that take ``out_dtype`` on the CPU; counts their calls."""
    calls = []

    def wide(function):
        def call(*operands, out_dtype=None, out):
            if out_dtype is None:
                return function(*operands, out=out)
            calls.append(out_dtype)
            assert all(t.dtype in (torch.bfloat16, torch.float16) for t in operands[-2:])
            return function(*(t.to(out_dtype) for t in operands), out=out)

        return call

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, wide(getattr(torch, name)))
    for module in (head_chunks, matmul):
        monkeypatch.setattr(module, "mm_returns_fp32", lambda device: True)
    return calls


def inputs(dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))
    hidden, weight, bias = (torch.randn(s, generator=g).to(dtype).to(device) for s in shapes)
    target = torch.randint(0, V, (N,), generator=g)
    target[::4] = -100
    # an ignored row: a product with 0 would still be NaN
    hidden[0] = torch.nan
    return [t.requires_grad_() for t in (hidden, weight, bias)], target.to(device)


def assert_gradients_close(got, want, most):
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < most


@pytest.mark.parametrize(("normalizer", "factor"), [(N, 1.0), (10**7, 3e5), (N, 60_000.0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [5, 64])
@HALF
@pytest.mark.not_reference
@pytest.mark.slow_interpreted
def test_as_near_as_the_dtype_of_the_operands(
    mixed, place, dtype, rows, reduction, normalizer, factor
):
    """Gradients of logits must fit fp16 for the products, under loss scalers and in long batches;
    the sums need not."""
    operands, target = inputs(dtype, place.device)
    given = {"reduction": reduction, "label_smoothing": 0.1}
    given |= {"normalizer": normalizer} if reduction == "mean" else {}
    up = torch.tensor(factor if reduction == "mean" else factor / normalizer)
    dloss = up.expand(N if reduction == "none" else ())
    wide = [t.detach().double().nan_to_num().requires_grad_() for t in operands]
    want_loss, *want = program.head_value_and_grads(wide, target, None, dloss, **given)
    options = chunks_of(rows, V, drop_ignored=False)
    got_loss, *got = head_loss_and_grads(
        operands, target, None, dloss, impl=place.impl, options=options, **given
    )
    # the logits of each chunk, twice where the backward computes them again, and two gradients; the
    # bf16 gradient of the weight is one product without fp32 where there is one chunk
    chunks = -(-N // rows)
    once = dtype == torch.bfloat16 and chunks == 1
    assert len(mixed) == (3 if reduction == "mean" else 4) * chunks - once
    torch.testing.assert_close(got_loss.double(), want_loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        within = b.abs() < 0.99 * torch.finfo(dtype).max
        # entries are sums of products of rounded numbers; the interpreter truncates to bf16
        error = relative_error(torch.where(within, a, 0.0), torch.where(within, b, 0.0))
        assert error <= {torch.bfloat16: 7e-3, torch.float16: 7e-4}[dtype]
        assert a.isfinite()[within].all()
    assert (got[0][::4] == 0.0).all()


@HALF
def test_a_mean_over_nothing_has_no_gradient(dtype):
    operands, target = inputs(dtype)
    for drop in (None, False):
        given = {"options": lossfuse.LinearOptions(drop_ignored=drop)}
        loss, *grads = head_loss_and_grads(operands, torch.full_like(target, -100), **given)
        assert loss.isnan() and all((g == 0.0).all() for g in grads)


@HALF
def test_an_ignored_row_with_an_infinite_upstream_gradient(dtype):
    """0 times it is no row's gradient, and its size not the unit of the others."""
    *operands, _ = head_and_ids(4, 4, 9, dtype)
    target = torch.tensor([3, -100, 8, 3])
    given = {"reduction": "none", "options": chunks_of(3, 9, drop_ignored=False)}
    ups = (torch.ones(4), torch.tensor([1.0, torch.inf, 1.0, 1.0]))
    want, got = (head_loss_and_grads(operands, target, None, up, **given) for up in ups)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["logits_dtype", "acc_dtype"])
def test_lean_modes_are_within_two_percent(name):
    operands, target = inputs(torch.bfloat16)
    want, got = (
        head_loss_and_grads(operands, target, options=chunks_of(64, V, drop_ignored=False, **some))
        for some in ({}, {name: torch.bfloat16})
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-2, atol=0.0)
    assert_gradients_close(got[1:], want[1:], 2e-2)


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@HALF
def test_a_narrow_gradient_over_logits_by_kernels(device, dtype, soft):
    """A row of it in the first bytes of the row whose place it takes."""
    *operands, target = head_and_ids(5, 8, 301, dtype, device)
    target = probabilities(5, 301, dtype, device).detach() if soft else target
    want = program.head_value_and_grads(operands, target)
    got = head_loss_and_grads(operands, target, options=chunks_of(2, 301), impl="triton")
    assert_loss_close(got[0], want[0])
    assert_gradients_close(got[1:], want[1:], 2 * torch.finfo(dtype).eps)


@interpreted_only
def test_a_narrow_gradient_in_any_order_of_programs(monkeypatch):
    """A device runs a row's blocks in any order: the last one first, in the interpreter, for a
    vocabulary of several blocks."""
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    real = builder.set_grid_idx

    def last_first(*at):
        real(*(size - 1 - i for size, i in zip(builder.grid_dim, at, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", last_first)
    *operands, _ = head_and_ids(2, 3, 40000, torch.bfloat16)
    target = probabilities(2, 40000, torch.bfloat16).detach()
    want = program.head_value_and_grads(operands, target)
    assert_gradients_close(head_loss_and_grads(operands, target, impl="triton"), want, 0.01)


def test_a_narrow_gradient_lies_over_the_logits():
    room = torch.empty(4, 32)
    g = head_chunks._gradient_over(room[:3, :21], torch.bfloat16)
    assert g.shape == (3, 21) and g.dtype == torch.bfloat16
    assert [g[i].data_ptr() for i in range(3)] == [room[i].data_ptr() for i in range(3)]


@pytest.mark.parametrize("retain", [False, True], ids=["", "retain"])
@pytest.mark.parametrize("value", [65536.0, 1e-4])
@pytest.mark.parametrize("n", [4, 4096], ids=lambda n: f"mean over {n}")
def test_fp16_products_neither_overflow_nor_underflow(n, value, retain):
    """The gradient of the logits is scaled into the range of fp16: 1 / 4096 of a probability would
    be lost."""
    *operands, target = head_and_ids(4, 8, 37, torch.float16)
    given = {"normalizer": n, "options": chunks_of(3, 37, allow_retain_graph=retain)}
    want = program.head_value_and_grads(operands, target, normalizer=n)
    assert_gradients_close(head_loss_and_grads(operands, target, **given)[1:], want[1:], 2e-3)
    # the same, multiplied: nothing was lost before
    scaled = head_loss_and_grads(operands, target, None, torch.tensor(value), **given)
    for s, w in zip(scaled[1:], want[1:], strict=True):
        w = (w * value).half().double()
        atol = max(4e-3 * float(w[w.isfinite()].abs().max()), 2.0**-24)
        torch.testing.assert_close(s.double(), w, rtol=4e-3, atol=atol)


@pytest.mark.parametrize("classes", [2000.0, 2e-6, None], ids=str)
def test_fp16_products_with_large_and_small_factors(classes):
    """Of class weights, or of a logit_scale of 400."""
    hidden, weight, bias, target = head_and_ids(6, 8, 37, torch.float16)
    options = {"logit_scale": 400.0} if classes is None else {}
    if classes is None:
        hidden = (hidden / 400).detach().requires_grad_()
    classes = None if classes is None else class_weight(37) * classes
    args = ((hidden, weight, bias), target, classes)
    want = program.head_value_and_grads(*args, **options)
    got = head_loss_and_grads(*args, options=chunks_of(2, 37), **options)
    assert_gradients_close(got[1:], want[1:], 2e-3)
