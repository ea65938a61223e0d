"""Worked values of the specification."""

import pytest
import torch

import lossfuse


def value(place, logits, target, weight=None, **options):
    to = lambda t: None if t is None else torch.tensor(t).to(place.device)  # noqa: E731
    logits = to(logits).float()
    weight = None if weight is None else to(weight).float()
    return lossfuse.cross_entropy(logits, to(target), weight, impl=place.impl, **options)


CASES = [
    (
        [[0.1650, 1.7421, 0.1270], [-0.1254, -0.7676, -0.1373], [1.3294, -0.0838, -1.2392]],
        [1, 2, 0],
        None,
        0.5173,
    ),
    ([[0.2, 0.7, 0.1]], [1], None, 0.7679),
    ([[1.2, 2.4, 3.6]], [1], None, 1.5307),
    ([[[1, 2], [3, 5]], [[4, 7], [4, 6]]], [[0, 0], [1, 1]], None, 1.7955),
    ([[[1, 2], [3, 5]], [[4, 7], [4, 6]]], [[0, 0], [1, 1]], [1, 9], 1.1617),
]


@pytest.mark.parametrize(
    ("logits", "target", "weight", "want"),
    CASES,
    ids=["3x3", "flat row", "steep row", "2x2x2", "2x2x2 weighted"],
)
def test_worked_values(place, logits, target, weight, want):
    got = value(place, logits, target, weight)
    assert got.item() == pytest.approx(want, abs=5e-5)


def test_seeded_example_in_every_reduction(place):
    torch.manual_seed(0)
    x, target = torch.randn(3, 5), torch.randint(5, (3,))
    x, target = x.to(place.device), target.to(place.device)
    rows = lossfuse.cross_entropy(x, target, reduction="none", impl=place.impl)
    assert rows.tolist() == pytest.approx([1.4639, 3.0493, 2.3056], abs=5e-5)
    assert lossfuse.cross_entropy(x, target, impl=place.impl).item() == pytest.approx(
        2.2729, abs=5e-5
    )
    assert lossfuse.cross_entropy(
        x, target, reduction="sum", impl=place.impl
    ).item() == pytest.approx(6.8188, abs=5e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignore_index_minus_one_with_class_weights(place, reduction):
    x, weight = torch.randn(6, 5), torch.rand(5)
    target = torch.tensor([1, -1, 0, 4, -1, 2])
    want = torch.nn.functional.cross_entropy(
        x, target, weight, ignore_index=-1, reduction=reduction
    )
    got = lossfuse.cross_entropy(
        x.to(place.device),
        target.to(place.device),
        weight.to(place.device),
        ignore_index=-1,
        reduction=reduction,
        impl=place.impl,
    )
    torch.testing.assert_close(got.cpu(), want)
