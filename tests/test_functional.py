"""Is it the right formula? Small sizes in fp32, every option alone and every pair, of logits,
logits in place and heads, against the torch program in fp64."""

import itertools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import lossfuse
import program
from closeness import (
    assert_formula_close,
    assert_gradient_close,
    assert_loss_close,
    assert_product_close,
)
from lossfuse import functional
from options import COMBINATIONS, EVERYTHING, PAIRS, chunks_of, options_of, row_weights, upstream
from rows import class_weight, head_and_ids, logits_and_ids, probabilities

SOFT = pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
FORM = pytest.mark.parametrize("form", ["logits", "in place", "head"])


def leaves_of(form, n, v, soft, device, d=6):
    """([logits] or [hidden, weight, bias], target)."""
    made = (
        head_and_ids(n, d, v, device=device)
        if form == "head"
        else logits_and_ids(n, v, device=device)
    )
    return [*made[:-1]], probabilities(n, v, device=device) if soft else made[-1]


def loss_of(form, leaves, target, weight=None, **options):
    if form == "head":
        hidden, head, bias = leaves
        given = {"linear_bias": bias, "weight": weight, "options": chunks_of(2, len(head))}
        return lossfuse.linear_cross_entropy(hidden, head, target, **given, **options)
    x = leaves[0] * 1.0 if form == "in place" else leaves[0]
    return lossfuse.cross_entropy(x, target, weight, inplace=form == "in place", **options)


def check(place, form, leaves, target, weight=None, **options):
    dloss = upstream(leaves[0], options)
    oracle = program.head_value_and_grads if form == "head" else program.value_and_grads
    of = leaves if form == "head" else leaves[0]
    want = oracle(of, target, weight, dloss=dloss, **options)
    loss = loss_of(form, leaves, target, weight, impl=place.impl, **options)
    leaves = [*leaves, target] if target.requires_grad else leaves
    grads = torch.autograd.grad(loss, leaves, dloss.to(loss).reshape(loss.shape))
    assert loss.dtype == torch.float32
    assert_loss_close(loss, want[0])
    for got, wanted in zip(grads, want[1:], strict=True):
        assert got.dtype == torch.float32
        (assert_product_close if form == "head" else assert_formula_close)(got, wanted)


def options_and_forms():
    """Every option with every form; pairs meet in the kernels of logits, and elsewhere in slow
    runs."""
    for names, form in itertools.product(COMBINATIONS, ("logits", "in place", "head")):
        slow = [pytest.mark.slow] * (names in PAIRS and form != "logits")
        yield pytest.param(names, form, marks=slow, id=f"{'+'.join(names) or 'plain'}-{form}")


@SOFT
@pytest.mark.parametrize(("names", "form"), [*options_and_forms()])
def test_every_option_and_every_pair(place, names, form, soft):
    # less than a block, ragged; chunks of 2, 2 and 1 rows
    leaves, target = leaves_of(form, 5, 17, soft, place.device)
    weight, options = options_of(names, 17, place.device)
    check(place, form, leaves, target, weight, **options)


@pytest.mark.parametrize("only", [0, 1], ids=["input", "target"])
def test_one_gradient_alone(place, only):
    (x,), target = leaves_of("logits", 4, 9, True, place.device)
    leaves = [x, target]
    both = torch.autograd.grad(lossfuse.cross_entropy(*leaves, impl=place.impl), leaves)
    leaves[1 - only].requires_grad_(False)
    loss = lossfuse.cross_entropy(*leaves, impl=place.impl)
    assert torch.equal(torch.autograd.grad(loss, leaves[only])[0], both[only])


def test_float64_is_float64(place):
    if place.impl == "triton":
        pytest.skip("fp64 goes elsewhere: test_errors has the sentence")
    x, target = logits_and_ids(5, 17, torch.float64, device=place.device)
    weight, options = options_of(EVERYTHING, 17, place.device)
    weight = weight.double()
    loss = lossfuse.cross_entropy(x, target, weight, impl=place.impl, **options)
    (grad,) = torch.autograd.grad(loss, x)
    want = program.value_and_grads(x, target, weight, **options)
    assert loss.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(loss, want[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad, want[1], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.array, Fraction, Decimal])
def test_numbers_of_other_kinds_are_their_values(kind):
    """Numpy's would be computed with in their own precision: 1 - label_smoothing in half."""
    x, target = logits_and_ids(5, 17, ignored=0.0)
    values = {
        "label_smoothing": 0.0625,
        "softcap": 12.5,
        "logit_scale": 0.375,
        "lse_square_scale": 0.015625,
    }
    want = lossfuse.cross_entropy(x, target, ignore_index=16, **values)
    given = {name: kind(value) for name, value in values.items()}
    got = lossfuse.cross_entropy(x, target, ignore_index=np.int64(16), **given)
    assert torch.equal(got, want)


@FORM
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16], ids=str)
def test_normalizers_of_any_dtype(place, form, dtype):
    leaves, target = leaves_of(form, 5, 17, False, place.device)
    normalizer = torch.tensor(4.0, device=place.device).to(dtype)
    check(place, form, leaves, target, normalizer=normalizer)


@FORM
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_rows_of_weight_0_are_ignored_to_the_bit(place, form, reduction):
    leaves, target = leaves_of(form, 6, 17, False, place.device)
    row_weight = torch.tensor([0.5, 0.0, -2.0, 1.0, 0.0, 3.0], device=place.device)
    with torch.no_grad():
        # where a weight is 0 logits may be anything
        leaves[0][1], leaves[0][4] = torch.nan, torch.inf
    given = {"reduction": reduction, "impl": place.impl, "row_weight": row_weight}
    given |= {"normalizer": 4.0} if reduction == "mean" else {}
    results = []
    for ids in (target, target.masked_fill(row_weight == 0, -100)):
        loss = loss_of(form, leaves, ids, **given)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    assert all(map(torch.equal, *results))
    assert not any(t.isnan().any() for t in results[0])


@FORM
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_row_weight_that_requires_grad_gets_the_losses(place, form, reduction):
    leaves, target = leaves_of(form, 5, 17, False, place.device)
    row_weight = row_weights(5, place.device).requires_grad_()
    given = {"reduction": reduction, "impl": place.impl, "weight": class_weight(17, place.device)}
    loss = loss_of(form, leaves, target, row_weight=row_weight, **given)
    *grads, own = torch.autograd.grad(loss.sum(), [*leaves, row_weight])
    fixed = loss_of(form, leaves, target, row_weight=row_weight.detach(), **given)
    torch.testing.assert_close(loss, fixed)
    torch.testing.assert_close(
        grads, [*torch.autograd.grad(fixed.sum(), leaves)], rtol=1e-5, atol=1e-6
    )
    losses = loss_of(form, leaves, target, **given | {"reduction": "none"}).detach()
    ones = torch.ones(5, device=place.device)
    total = loss_of(form, leaves, target, row_weight=ones, **given).sum().detach()
    torch.testing.assert_close(own, losses / (losses.sum() / total))


def test_a_second_backward_of_weighted_rows_is_the_first(place):
    x, target = logits_and_ids(5, 17, device=place.device)
    row_weight = row_weights(5, place.device)
    loss = lossfuse.cross_entropy(x, target, row_weight=row_weight, impl=place.impl)
    first, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_row_weights_of_any_real_dtype(place, dtype):
    x, target = logits_and_ids(4, 17, device=place.device)
    mask = torch.tensor([1, 0, 1, 1], device=place.device)
    got, want = (
        lossfuse.cross_entropy(x, target, row_weight=w, impl=place.impl)
        for w in (mask.to(dtype), mask.float())
    )
    assert got.dtype == torch.float32 and torch.equal(got, want)


@FORM
def test_a_normalizer_that_requires_grad_gets_one(place, form):
    leaves, target = leaves_of(form, 5, 17, False, place.device)
    normalizer = torch.tensor(3.0, device=place.device, requires_grad=True)
    total = loss_of(form, leaves, target, reduction="sum", impl=place.impl)
    loss = loss_of(form, leaves, target, normalizer=normalizer, impl=place.impl)
    *grads, own = torch.autograd.grad(loss, [*leaves, normalizer])
    torch.testing.assert_close(own, -total.detach() / 9)
    want = [g / 3 for g in torch.autograd.grad(total, leaves)]
    torch.testing.assert_close(grads, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_stats"])
@pytest.mark.parametrize(
    ("size_average", "reduce", "means"),
    [(None, True, "mean"), (True, None, "mean"), (False, None, "sum"), (False, True, "sum"),
        (True, False, "none"), (None, False, "none")],
)  # fmt: skip
def test_deprecated_arguments_warn_and_win(name, size_average, reduce, means):
    (x, target), function = logits_and_ids(5, 17), getattr(lossfuse, name)
    deprecated = {"size_average": size_average, "reduce": reduce}
    with pytest.warns(UserWarning, match=f"reduction='{means}'"):
        got = function(x, target, **deprecated, reduction="sum", impl="torch")
    want = function(x, target, reduction=means, impl="torch")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@SOFT
@pytest.mark.parametrize("form", ["logits", "head"])
def test_arguments_are_not_written(place, form, soft):
    leaves, target = leaves_of(form, 6, 300, soft, place.device)
    before = [t.detach().clone() for t in (*leaves, target)]
    versions = [t._version for t in (*leaves, target)]
    for reduction in ("none", "mean"):
        loss_of(form, leaves, target, reduction=reduction, impl=place.impl).sum().backward()
    assert all(map(torch.equal, before, (*leaves, target)))
    assert [t._version for t in (*leaves, target)] == versions


@FORM
@pytest.mark.not_reference
def test_repeated_runs_are_bitwise_equal(place, form):
    leaves, target = leaves_of(form, 16, 5000, False, place.device)
    first, *others = (
        (loss.detach(), *torch.autograd.grad(loss, leaves))
        for loss in (loss_of(form, leaves, target, impl=place.impl) for _ in range(3))
    )
    assert all(all(map(torch.equal, first, again)) for again in others)


@SOFT
@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_stats"])
def test_autocast_changes_nothing_of_logits(place, name, soft):
    x, target = logits_and_ids(5, 17, torch.bfloat16, device=place.device)
    target = probabilities(5, 17, device=place.device) if soft else target

    def results():
        got = getattr(lossfuse, name)(x, target, lse_square_scale=0.1, impl=place.impl)
        outputs = got if isinstance(got, tuple) else (got,)
        return [*outputs, *torch.autograd.grad(outputs[0], x)]

    want = results()
    with torch.autocast(place.device, dtype=torch.bfloat16):
        torch.testing.assert_close(results(), want, rtol=0, atol=0)


def test_the_module_is_the_function_and_a_torch_module(place):
    x, target = logits_and_ids(6, 9, device=place.device)
    weight, target = class_weight(9, place.device), target.where(target >= 0, 3)
    options = {
        "ignore_index": 3,
        "label_smoothing": 0.2,
        "reduction": "sum",
        "softcap": 9.0,
        "logit_scale": 2.0,
        "lse_square_scale": 0.1,
        "impl": place.impl,
    }
    module = lossfuse.CrossEntropyLoss(weight, **options)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert list(module.state_dict()) == ["weight"]
    got, want = module(x, target), lossfuse.cross_entropy(x, target, weight, **options)
    assert torch.equal(got, want)
    mean = lossfuse.CrossEntropyLoss(impl=place.impl)(x, target, normalizer=5)
    assert torch.equal(mean, lossfuse.cross_entropy(x, target, normalizer=5, impl=place.impl))


def small_case(n, v, dtype, sharp, ignored):
    """Logits whose target leads by ``sharp``, and ids of which some are ignored."""
    x, target = logits_and_ids(n, v, ignored=0.25 if ignored else 0.0)
    lead = torch.zeros(n, v).scatter_(1, target.clamp_min(0).unsqueeze(1), sharp)
    return (x.detach() + lead).to(dtype).requires_grad_(), target


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("sharp", [0.0, 3.0, 8.0, 15.0, 20.0, -200.0])
@pytest.mark.parametrize(
    ("n", "v", "dtype"),
    [(4, 10, torch.float32), (3, 1, torch.float32), (5, 700, torch.bfloat16),
        (4, 10, torch.float16), (2, 4096, torch.float32)],
)  # fmt: skip
def test_small_calls_are_accurate_however_confident(n, v, dtype, sharp, reduction):
    """Some of them are computed by operators of torch in float32, some in float64."""
    x, target = small_case(n, v, dtype, sharp, ignored=sharp == 3.0)
    want = program.value_and_grads(x, target, reduction=reduction)
    loss = lossfuse.cross_entropy(x, target, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-37)
    assert_gradient_close(grad, want[1])


@pytest.mark.parametrize("lead", [1.0, 10.0, 30.0, 80.0])
def test_small_calls_of_two_classes_have_the_logistic_loss(lead):
    x = torch.tensor([[0.0, lead]], requires_grad=True)
    loss = lossfuse.cross_entropy(x, torch.tensor([1]))
    (grad,) = torch.autograd.grad(loss, x)
    miss = math.exp(-lead) / (1 + math.exp(-lead))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-lead)), rel=1e-6, abs=0)
    assert grad[0].tolist() == pytest.approx([miss, -miss], rel=1e-6, abs=0)


def test_operators_of_torch_compute_small_calls_without_confident_predictions(monkeypatch):
    calls = []
    real = functional.small_loss

    def counted(*args):
        calls.append(real(*args))
        return calls[-1]

    monkeypatch.setattr(functional, "small_loss", counted)
    x, target = small_case(4, 10, torch.float32, 0.0, ignored=True)
    for changes in ({}, {"reduction": "none"}, {"sharp": 8.0}):
        sharp = changes.pop("sharp", 0.0)
        lossfuse.cross_entropy(*small_case(4, 10, torch.float32, sharp, True), **changes)
    assert all(loss is not None for loss in calls) and len(calls) == 3
    calls.clear()
    confident = small_case(64, 100, torch.float32, 8.0, False)
    for logits, ids in (confident, (x.detach() * torch.nan, target), (x.double(), target)):
        lossfuse.cross_entropy(logits, ids)
    assert calls == [None] * 3
    calls.clear()
    options = {"label_smoothing": 0.1, "softcap": 9.0, "normalizer": 3.0, "impl": "torch"}
    for name, value in options.items():
        lossfuse.cross_entropy(x, target, **{name: value})
    lossfuse.cross_entropy(x * 1.0, target, inplace=True)
    assert not calls
    with pytest.raises(IndexError, match="target"):
        lossfuse.cross_entropy(x, target + 10)
