"""Losses of logits at real vocabularies and dtypes, every gradient entry relative to itself, and
beyond the sizes that 32 bits or a grid count."""

import pytest
import torch

import lossfuse
import program
from closeness import assert_gradient_close, assert_loss_close, distances
from rows import class_weight, logits_and_ids, probabilities

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


# below a block, one block, one class in the next; Llama 2, GPT-2 (odd), Llama 3
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [255, 2048, 2049, 32000, 50257, 128256])
def test_real_vocabularies(thrifty_place, v, dtype):
    # fp16 gradients of a mean underflow in torch's own cast too; the sum stays in range
    x, target = logits_and_ids(4, v, dtype, thrifty_place.device)
    check(thrifty_place, x, target, reduction="sum" if dtype == torch.float16 else "mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_over_several_blocks(place, dtype):
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
