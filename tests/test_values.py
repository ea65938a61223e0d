"""Worked values of the specification."""

import pytest
import torch

import lossfuse


def value(place, logits, target, weight=None, **options):
    x, target = (torch.as_tensor(t, device=place.device) for t in (logits, target))
    weight = None if weight is None else torch.tensor(weight, device=place.device).float()
    return lossfuse.cross_entropy(x.float(), target, weight, impl=place.impl, **options)


SQUARE = [[0.1650, 1.7421, 0.1270], [-0.1254, -0.7676, -0.1373], [1.3294, -0.0838, -1.2392]]
CUBE, CUBE_IDS = [[[1, 2], [3, 5]], [[4, 7], [4, 6]]], [[0, 0], [1, 1]]
CASES = {
    "3x3": (SQUARE, [1, 2, 0], None, 0.5173),
    "flat row": ([[0.2, 0.7, 0.1]], [1], None, 0.7679),
    "steep row": ([[1.2, 2.4, 3.6]], [1], None, 1.5307),
    "2x2x2": (CUBE, CUBE_IDS, None, 1.7955),
    "2x2x2 weighted": (CUBE, CUBE_IDS, [1, 9], 1.1617),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_worked_values(place, case):
    assert value(place, *case[:3]).item() == pytest.approx(case[3], abs=5e-5)


def test_seeded_example_in_every_reduction(place):
    torch.manual_seed(0)
    x, target = torch.randn(3, 5), torch.randint(5, (3,))
    for reduction, want in (("none", [1.4639, 3.0493, 2.3056]), ("mean", 2.2729), ("sum", 6.8188)):
        got = value(place, x, target, reduction=reduction).tolist()
        assert got == pytest.approx(want, abs=5e-5)


def test_ignore_index_minus_one_is_not_the_weight_of_the_last_class(place):
    x, weight, target = torch.randn(6, 5), [0.5, 1.0, 2.0, 0.1, 9.0], [1, -1, 0, 4, -1, 2]
    got = value(place, x, target, weight, ignore_index=-1)
    want = torch.nn.functional.cross_entropy(
        x, torch.tensor(target), torch.tensor(weight), ignore_index=-1
    )
    torch.testing.assert_close(got.cpu(), want)
