"""Losses of logits at real vocabularies and dtypes, every gradient entry relative to itself, and of
any dimensions."""

import pytest
import torch
import torch.nn.functional as F

import lossfuse
import program
from closeness import assert_gradient_close, assert_loss_close, distances
from rows import class_weight, logits_and_ids, probabilities

VOCABULARIES = [
    255,  # below the widest block
    2048,  # one block
    2049,  # and one class in the next
    4097,  # two, and one class in the next
    32000,  # Llama 2
    50257,  # GPT-2: odd, so that every row starts at another alignment
    128256,  # Llama 3
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(place, x, target, weight=None, **options):
    want = program.value_and_grads(x, target, weight, **options)
    loss = lossfuse.cross_entropy(x, target, weight, impl=place.impl, **options)
    leaves = [x, target] if target.requires_grad else [x]
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert loss.dtype == torch.float32
    assert_loss_close(loss, want[0])
    for leaf, got, wanted in zip(leaves, grads, want[1:], strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        # smoothing takes its share of every class from p, which may be as large; the mean divides
        # both
        share = (
            options.get("label_smoothing", 0.0) / x.shape[-1] * (1.1 if weight is not None else 1.0)
        )
        assert_gradient_close(got, wanted, terms=share * distances(x, options) if share else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_plain(thrifty_place, v, dtype):
    # fp16 gradients of a mean underflow in torch's own cast too; the sum stays in range
    x, target = logits_and_ids(4, v, dtype, thrifty_place.device)
    check(thrifty_place, x, target, reduction="sum" if dtype == torch.float16 else "mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [4097, 32000])
def test_as_gemma_is_trained(thrifty_place, v, dtype):
    x, target = logits_and_ids(4, v, dtype, thrifty_place.device)
    check(
        thrifty_place,
        x,
        target,
        reduction="none",
        softcap=30.0,
        lse_square_scale=1e-4,
        label_smoothing=0.1,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option(place, dtype):
    x, target = logits_and_ids(4, 4097, dtype, place.device)
    options = {
        "softcap": 20.0,
        "logit_scale": 0.8,
        "lse_square_scale": 1e-3,
        "label_smoothing": 0.1,
        "reduction": "sum",
    }
    check(place, x, target, class_weight(4097, place.device), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [2049, 32000])
def test_distillation(thrifty_place, v, dtype):
    x, _ = logits_and_ids(3, v, dtype, thrifty_place.device)
    target = probabilities(3, v, dtype, thrifty_place.device)
    want = program.value_and_grads(x, target, reduction="sum")
    loss = lossfuse.cross_entropy(x, target, reduction="sum", impl=thrifty_place.impl)
    dx, dt = torch.autograd.grad(loss, [x, target])
    assert_loss_close(loss, want[0])
    assert_gradient_close(dt, want[2])
    q = target.detach().double()
    assert_gradient_close(
        dx, want[1], terms=q + torch.softmax(x.detach().double(), -1) * q.sum(-1, keepdim=True)
    )


def test_no_grad_is_the_same_loss(place):
    x, target = logits_and_ids(4, 4097, torch.bfloat16, place.device)
    want = lossfuse.cross_entropy(x, target, impl=place.impl)
    with torch.no_grad():
        assert torch.equal(lossfuse.cross_entropy(x, target, impl=place.impl), want)
    with torch.inference_mode():
        assert torch.equal(lossfuse.cross_entropy(x.detach(), target, impl=place.impl), want)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(fast_place):
    if fast_place.impl == "triton" and fast_place.device == "cpu":
        pytest.skip("two billion elements are out of the interpreter's reach")
    n, v = 17000, 128256
    x = torch.zeros(n, v, dtype=torch.bfloat16, device=fast_place.device)
    target = torch.randint(0, v, (n,), device=fast_place.device)
    x[torch.arange(n), target] = 20.0
    x.requires_grad_()
    loss = lossfuse.cross_entropy(x, target, reduction="none", impl=fast_place.impl)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    tail = slice(n - 3, n)
    want = program.value_and_grads(x[tail], target[tail], reduction="sum")
    assert_loss_close(loss[tail].sum(), want[0])
    assert_gradient_close(grad[tail], want[1])


@pytest.mark.slow
def test_more_rows_than_a_grid_dimension_holds(fast_place):
    x, target = logits_and_ids(70000, 5, device=fast_place.device)
    check(fast_place, x, target, reduction="none")


def both(thrifty_place, x, target, weight=None, **options):
    """(loss, gradient) of torch and ours on leaves of their own, ours with the strides of ``x``."""
    found = []
    # torch's sums of losses of K dimensions are not deterministic on CUDA, and raise
    for f, device, extra in (
        (F.cross_entropy, "cpu", {}),
        (lossfuse.cross_entropy, x.device, {"impl": thrifty_place.impl}),
    ):
        leaf = x.detach().to(device).requires_grad_()
        loss = f(
            leaf,
            target.to(device),
            None if weight is None else weight.to(device),
            **options,
            **extra,
        )
        (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.5))
        found.append((loss, grad))
    (want, want_grad), (got, got_grad) = found
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_grad.cpu(), want_grad, rtol=1e-5, atol=1e-6)
    return got, got_grad


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("batch", [(), (4,), (4, 3), (2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_dimensions(thrifty_place, batch, reduction):
    c = 7
    x = torch.randn(*batch[:1], c, *batch[1:], device=thrifty_place.device)
    target = torch.randint(0, c, batch, device=thrifty_place.device)
    if target.dim():
        target[..., 0] = -100
    weight = torch.rand(c, device=thrifty_place.device)
    got, _ = both(thrifty_place, x, target, weight, reduction=reduction)
    assert got.shape == (batch if reduction == "none" else ())
    both(
        thrifty_place,
        x,
        torch.softmax(torch.randn_like(x), 0 if x.dim() == 1 else 1),
        weight,
        reduction=reduction,
    )


@pytest.mark.parametrize("to_rows", ["transpose", "movedim"])
def test_batch_time_vocabulary(thrifty_place, to_rows):
    """The usual idiom of a transformer, (B, T, V) seen as (B, V, T)."""
    x = torch.randn(2, 5, 33, device=thrifty_place.device)
    x = x.transpose(1, 2) if to_rows == "transpose" else x.movedim(2, 1)
    both(thrifty_place, x, torch.randint(0, 33, (2, 5), device=thrifty_place.device))


def test_a_slice_of_a_larger_buffer_leaves_its_neighbours_alone(thrifty_place):
    buffer = torch.randn(6, 40, device=thrifty_place.device)
    before = buffer.clone()
    x = buffer[1:5, 4:33].requires_grad_()
    _, target = logits_and_ids(4, 29, device=thrifty_place.device)
    (grad,) = torch.autograd.grad(lossfuse.cross_entropy(x, target, impl=thrifty_place.impl), x)
    assert grad.shape == (4, 29) and not grad.isnan().any()
    assert torch.equal(buffer, before)
