"""Tier 1: is it the right formula? Small sizes in fp32, every option alone and every pair, against
the torch program in fp64."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import lossfuse
import program
from closeness import assert_formula_close, assert_loss_close
from options import COMBINATIONS, EVERYTHING, options_of, upstream
from rows import class_weight, logits_and_ids, probabilities


def check(place, x, target, weight, options):
    want = program.value_and_grads(
        x, target, weight, dloss=(dloss := upstream(x, options)), **options
    )
    loss = lossfuse.cross_entropy(x, target, weight, impl=place.impl, **options)
    leaves = [x, target] if target.requires_grad else [x]
    grads = torch.autograd.grad(loss, leaves, dloss.to(loss).reshape(loss.shape))
    assert loss.dtype == torch.float32
    assert_loss_close(loss, want[0])
    for got, wanted in zip(grads, want[1:], strict=True):
        assert got.dtype == torch.float32
        assert_formula_close(got, wanted)


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
def test_class_ids(place, names):
    # 5 rows, 17 classes: less than a block, ragged
    x, target = logits_and_ids(5, 17, device=place.device)
    check(place, x, target, *options_of(names, 17, place.device))


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
def test_class_probabilities(place, names):
    x, _ = logits_and_ids(5, 17, device=place.device)
    check(place, x, probabilities(5, 17, device=place.device), *options_of(names, 17, place.device))


@pytest.mark.parametrize("v", [1, 2, 7, 33, 128, 129])
@pytest.mark.parametrize("n", [1, 7])
def test_small_sizes(place, n, v):
    x, target = logits_and_ids(n, v, device=place.device)
    check(place, x, target, *options_of(EVERYTHING, v, place.device))
    check(
        place, x, probabilities(n, v, device=place.device), *options_of(EVERYTHING, v, place.device)
    )


@pytest.mark.parametrize("only", ["input", "target"])
def test_one_gradient_alone(place, only):
    x, _ = logits_and_ids(4, 9, device=place.device)
    t = probabilities(4, 9, device=place.device)
    both = torch.autograd.grad(lossfuse.cross_entropy(x, t, impl=place.impl), [x, t])
    x.requires_grad_(only == "input")
    t.requires_grad_(only == "target")
    leaf = x if only == "input" else t
    (got,) = torch.autograd.grad(lossfuse.cross_entropy(x, t, impl=place.impl), [leaf])
    torch.testing.assert_close(got, both[only == "target"], rtol=0, atol=0)


def test_float64_is_float64(place):
    if place.impl == "triton":
        pytest.skip("fp64 goes elsewhere: test_errors holds the sentence")
    x, target = logits_and_ids(5, 17, device=place.device)
    x = x.detach().double().requires_grad_()
    weight, options = options_of(EVERYTHING, 17, place.device)
    weight = weight.double()
    loss = lossfuse.cross_entropy(x, target, weight, impl=place.impl, **options)
    (grad,) = torch.autograd.grad(loss, x)
    want = program.value_and_grads(x, target, weight, **options)
    assert loss.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(loss, want[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad, want[1], rtol=1e-11, atol=1e-14)


NUMBERS = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "0-d array": np.array,
    "Fraction": Fraction,
    "Decimal": Decimal,
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_kinds_are_their_values(place, kind):
    """Numpy's would be computed with in their own precision: 1 - label_smoothing in half, for
    logits of any dtype."""
    x, target = logits_and_ids(5, 17, device=place.device, ignored=0.0)
    values = {
        "label_smoothing": 0.0625,
        "softcap": 12.5,
        "logit_scale": 0.375,
        "lse_square_scale": 0.015625,
    }
    want = lossfuse.cross_entropy(x, target, impl=place.impl, ignore_index=16, **values)
    given = {name: NUMBERS[kind](value) for name, value in values.items()}
    got = lossfuse.cross_entropy(x, target, impl=place.impl, ignore_index=np.int64(16), **given)
    assert torch.equal(got, want)


def test_normalizer_as_a_tensor(place):
    x, target = logits_and_ids(5, 17, device=place.device)
    for normalizer in (
        torch.tensor(12, device=place.device),
        torch.tensor(12.0, device=place.device),
    ):
        got = lossfuse.cross_entropy(x, target, normalizer=normalizer, impl=place.impl)
        assert torch.equal(got, lossfuse.cross_entropy(x, target, normalizer=12, impl=place.impl))


def test_normalizer_may_require_grad(place):
    x, target = logits_and_ids(5, 17, device=place.device)
    normalizer = torch.tensor(4.0, device=place.device, requires_grad=True)
    loss = lossfuse.cross_entropy(x, target, normalizer=normalizer, impl=place.impl)
    got = torch.autograd.grad(loss, [x, normalizer])
    torch.testing.assert_close(got[1], -loss.detach() / 4)
    torch.testing.assert_close(
        got[0],
        torch.autograd.grad(lossfuse.cross_entropy(x, target, normalizer=4.0, impl=place.impl), x)[
            0
        ],
    )


@pytest.mark.parametrize(
    ("size_average", "reduce", "means"),
    [
        (None, True, "mean"),
        (True, None, "mean"),
        (False, None, "sum"),
        (False, True, "sum"),
        (True, False, "none"),
        (None, False, "none"),
    ],
)
def test_deprecated_arguments_warn_and_win(size_average, reduce, means):
    x, target = logits_and_ids(5, 17)
    with pytest.warns(UserWarning, match=f"reduction='{means}'"):
        got = lossfuse.cross_entropy(
            x, target, size_average=size_average, reduce=reduce, reduction="sum"
        )
    assert torch.equal(got, lossfuse.cross_entropy(x, target, reduction=means))


def test_inputs_are_not_written_to(place):
    x, target = logits_and_ids(6, 300, device=place.device)
    t = probabilities(6, 300, device=place.device)
    before = [a.detach().clone() for a in (x, target, t)]
    versions = [a._version for a in (x, target, t)]
    (
        lossfuse.cross_entropy(x, target, impl=place.impl)
        + lossfuse.cross_entropy(x, t, impl=place.impl)
    ).backward()
    assert all(torch.equal(a, b) for a, b in zip((x, target, t), before, strict=True))
    assert [a._version for a in (x, target, t)] == versions


def test_repeated_runs_are_bitwise_equal(fast_place):
    x, target = logits_and_ids(16, 5000, device=fast_place.device)
    first, *later = (lossfuse.cross_entropy(x, target, impl=fast_place.impl) for _ in range(3))
    (want,) = torch.autograd.grad(first, x)
    for loss in later:
        assert torch.equal(loss, first) and torch.equal(torch.autograd.grad(loss, x)[0], want)


def test_autocast_changes_nothing(place):
    x, target = logits_and_ids(5, 17, torch.bfloat16, device=place.device)
    t = probabilities(5, 17, device=place.device)
    for aim in (target, t):
        want = lossfuse.cross_entropy(
            x, aim, label_smoothing=0.1, lse_square_scale=0.1, impl=place.impl
        )
        with torch.autocast(place.device, dtype=torch.bfloat16):
            got = lossfuse.cross_entropy(
                x, aim, label_smoothing=0.1, lse_square_scale=0.1, impl=place.impl
            )
        (grad,) = torch.autograd.grad(got, x)
        assert got.dtype == torch.float32 and torch.equal(got, want)
        assert grad.dtype == torch.bfloat16 and torch.equal(grad, torch.autograd.grad(want, x)[0])


def test_module_is_the_function_and_a_torch_module(place):
    x, target = logits_and_ids(6, 9, device=place.device)
    weight = class_weight(9, place.device)
    target = target.where(target >= 0, 3)
    options = {
        "ignore_index": 3,
        "label_smoothing": 0.2,
        "reduction": "sum",
        "softcap": 9.0,
        "logit_scale": 2.0,
        "lse_square_scale": 0.1,
    }
    module = lossfuse.CrossEntropyLoss(weight, **options, impl=place.impl)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert (
        list(module.state_dict())
        == ["weight"]
        == list(torch.nn.CrossEntropyLoss(weight).state_dict())
    )
    assert torch.equal(
        module(x, target), lossfuse.cross_entropy(x, target, weight, **options, impl=place.impl)
    )
    mean = lossfuse.CrossEntropyLoss(reduction="mean", impl=place.impl)
    assert torch.equal(
        mean(x, target, normalizer=5),
        lossfuse.cross_entropy(x, target, normalizer=5, impl=place.impl),
    )
