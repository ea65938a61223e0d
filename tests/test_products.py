"""Products with an fp32 result of half-precision operands, which only CUDA has: their way through
the chunk loop, with stand-ins."""

import pytest
import torch

import lossfuse
from lossfuse.ops import head_chunks, matmul

N, D, V = 23, 16, 77


@pytest.fixture
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

    monkeypatch.setattr(torch, "mm", wide(torch.mm))
    monkeypatch.setattr(torch, "addmm", wide(torch.addmm))
    for module in (head_chunks, matmul):
        monkeypatch.setattr(module, "mm_returns_fp32", lambda device: True)
    return calls


def inputs(dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g).to(dtype).to(device) for shape in ((N, D), (V, D), (V,))
    )
    target = torch.randint(0, V, (N,), generator=g)
    target[::4] = -100
    # products with 0 would keep it
    hidden[0] = torch.nan
    return [t.requires_grad_() for t in (hidden, weight, bias)], target.to(device)


@pytest.mark.parametrize(("normalizer", "factor"), [(N, 1.0), (10**7, 3e5), (N, 60_000.0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_near_as_the_dtype_of_the_operands(
    mixed, thrifty_fast_place, dtype, rows, reduction, normalizer, factor
):
    """Loss scalers and long batches leave the range of fp16, where gradients of logits must be for
    the products; the sums do not."""
    if thrifty_fast_place.impl == "triton":
        pytest.importorskip("triton")
    operands, target = inputs(dtype, thrifty_fast_place.device)
    options = lossfuse.LinearOptions(chunk_bytes=rows * 80 * 4, drop_ignored=False)

    def run(operands, impl, options):
        hidden, weight, bias = operands
        divisor = {"normalizer": normalizer} if reduction == "mean" else {}
        loss = lossfuse.linear_cross_entropy(
            hidden,
            weight,
            target,
            linear_bias=bias,
            reduction=reduction,
            label_smoothing=0.1,
            options=options,
            impl=impl,
            **divisor,
        )
        return loss, torch.autograd.grad(
            (loss * factor).sum() if divisor else (loss / normalizer * factor).sum(), operands
        )

    exact = [t.detach().double().nan_to_num().requires_grad_() for t in operands]
    want_loss, want = run(exact, "reference", None)
    got_loss, got = run(operands, thrifty_fast_place.impl, options)
    assert len(mixed) == (1 if reduction == "mean" else 2) * -(-N // rows) + 2 * -(-N // rows)
    torch.testing.assert_close(got_loss.double(), want_loss, rtol=1e-5, atol=1e-5)
    largest = torch.finfo(dtype).max
    for name, a, b in zip(("hidden", "weight", "bias"), got, want, strict=True):
        within = b.abs() < 0.99 * largest
        # each entry is a sum of products of rounded numbers, so what is near is the whole
        error = torch.where(within, a.double() - b, 0.0).norm() / torch.where(within, b, 0.0).norm()
        # the interpreter truncates to bf16
        assert error <= {torch.bfloat16: 7e-3, torch.float16: 7e-4}[dtype], (name, error)
        assert a.isfinite()[within].all(), name
    assert (got[0][::4] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mean_over_nothing_has_no_gradient(mixed, dtype):
    (hidden, weight, bias), target = inputs(dtype)
    options = lossfuse.LinearOptions(drop_ignored=False)
    loss = lossfuse.linear_cross_entropy(
        hidden, weight, torch.full_like(target, -100), linear_bias=bias, options=options
    )
    assert loss.isnan()
    assert all((g == 0.0).all() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


@pytest.mark.parametrize(
    "lean", [{"logits_dtype": torch.bfloat16}, {"acc_dtype": torch.bfloat16}], ids=str
)
def test_less_memory_and_fewer_digits(mixed, lean):
    operands, target = inputs(torch.bfloat16)
    hidden, weight, _ = operands
    losses = [
        lossfuse.linear_cross_entropy(
            hidden, weight, target, options=lossfuse.LinearOptions(drop_ignored=False, **some)
        )
        for some in ({}, lean)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0.0)
    wants, gots = (torch.autograd.grad(loss, (hidden, weight)) for loss in losses)
    for got, want in zip(gots, wants, strict=True):
        assert (got.double() - want.double()).norm() <= 2e-2 * want.double().norm()


def test_half_the_bytes_hold_the_gradient_over_the_logits():
    room = torch.empty(4, 32)
    g = head_chunks._gradient_over(room[:3, :21], torch.bfloat16)
    assert g.shape == (3, 21) and g.dtype == torch.bfloat16
    assert g.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    assert [g[i].data_ptr() for i in range(3)] == [room[i].data_ptr() for i in range(3)]
