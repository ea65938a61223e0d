"""Every layout torch takes: dimensions, strides, and sizes of nothing."""

import pytest
import torch
import torch.nn.functional as F

import lossfuse
from rows import logits_and_ids

SHAPES = [(), (4,), (4, 3), (2, 3, 4), (2, 1, 3, 2)]


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
@pytest.mark.parametrize("batch", SHAPES, ids=str)
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


def strided(name: str) -> torch.Tensor:
    return {
        "transposed": lambda: torch.randn(9, 6).t(),
        "column slice": lambda: torch.randn(6, 20)[:, 3:12],
        "every other row": lambda: torch.randn(12, 9)[::2],
        "every other class": lambda: torch.randn(6, 18)[:, ::2],
        "rows expanded": lambda: torch.randn(1, 9).expand(6, 9),
        "classes expanded": lambda: torch.randn(6, 1).expand(6, 9),
        "reversed": lambda: torch.randn(6, 9).flip(1),
        "offset in storage": lambda: torch.randn(6 * 9 + 3)[3:].view(6, 9),
    }[name]()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    "name",
    [
        "transposed",
        "column slice",
        "every other row",
        "every other class",
        "rows expanded",
        "classes expanded",
        "reversed",
        "offset in storage",
    ],
)
def test_strides(thrifty_place, name, reduction):
    # a move would make most of them dense
    with torch.device(thrifty_place.device):
        x, other = strided(name), strided(name)
    both(
        thrifty_place,
        x,
        torch.tensor([0, 8, -100, 3, 3, 1], device=thrifty_place.device),
        reduction=reduction,
    )
    both(thrifty_place, x, torch.softmax(other, 1), reduction=reduction)
    target = torch.tensor(
        [[0, 1], [8, 1], [-100, 1], [3, 1], [3, 1], [1, 1]], device=thrifty_place.device
    )[:, 0]
    both(
        thrifty_place,
        x,
        target,
        torch.rand(18, device=thrifty_place.device)[::2],
        reduction=reduction,
    )


@pytest.mark.parametrize("to_rows", ["transpose", "movedim"])
def test_batch_time_vocabulary(thrifty_place, to_rows):
    """The usual idiom of a transformer, (B, T, V) seen as (B, V, T)."""
    x = torch.randn(2, 5, 33, device=thrifty_place.device)
    x = x.transpose(1, 2) if to_rows == "transpose" else x.movedim(2, 1)
    both(thrifty_place, x, torch.randint(0, 33, (2, 5), device=thrifty_place.device))


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize(
    ("reduction", "want"), [("none", None), ("mean", float("nan")), ("sum", 0.0)]
)
def test_empty_batch(thrifty_place, reduction, want, soft):
    x = torch.empty(0, 5, device=thrifty_place.device, requires_grad=True)
    target = (
        torch.empty(0, 5, device=thrifty_place.device)
        if soft
        else torch.empty(0, dtype=torch.int64, device=thrifty_place.device)
    )
    loss = lossfuse.cross_entropy(x, target, reduction=reduction, impl=thrifty_place.impl)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.shape == (0, 5)
    if want is None:
        assert loss.shape == (0,)
    else:
        torch.testing.assert_close(loss.item(), want, equal_nan=True)
    x = torch.empty(2, 5, 0, device=thrifty_place.device)
    target = torch.empty(2, 0, dtype=torch.int64, device=thrifty_place.device)
    assert lossfuse.cross_entropy(x, target, reduction="none", impl=thrifty_place.impl).shape == (
        2,
        0,
    )


def test_a_slice_of_a_larger_buffer_leaves_its_neighbours_alone(thrifty_place):
    buffer = torch.randn(6, 40, device=thrifty_place.device)
    before = buffer.clone()
    x = buffer[1:5, 4:33].requires_grad_()
    _, target = logits_and_ids(4, 29, device=thrifty_place.device)
    (grad,) = torch.autograd.grad(lossfuse.cross_entropy(x, target, impl=thrifty_place.impl), x)
    assert grad.shape == (4, 29) and not grad.isnan().any()
    assert torch.equal(buffer, before)
