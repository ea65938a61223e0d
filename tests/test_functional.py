"""Is it the right formula? Small sizes in fp32, every option alone and every pair, of logits,
logits in place and heads, against the torch program in fp64."""

import itertools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import lossfuse
import program
from closeness import assert_formula_close, assert_loss_close, assert_product_close
from options import COMBINATIONS, EVERYTHING, PAIRS, chunks_of, options_of, upstream
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
        got = function(x, target, **deprecated, reduction="sum")
    want = function(x, target, reduction=means)
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
