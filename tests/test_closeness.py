"""The tests of the tests: the right gradient passes each comparator, each wrong one is rejected."""

import pytest
import torch

import mutants
import program
from closeness import assert_formula_close, assert_gradient_close, assert_statistics_close
from rows import logits_and_ids

OPTIONS = {"lse_square_scale": mutants.Z_SCALE, "softcap": mutants.SOFTCAP}

# the two tiers as they are used: small in fp32, and a real vocabulary in each stored dtype
CASES = pytest.mark.parametrize(
    ("v", "dtype", "compare"),
    [
        pytest.param(17, torch.float32, assert_formula_close, id="V17-fp32"),
        pytest.param(32000, torch.float32, assert_gradient_close, id="V32000-fp32"),
        pytest.param(32000, torch.bfloat16, assert_gradient_close, id="V32000-bf16"),
    ],
)
RIGHT = {"loss": mutants.gradient, "statistics": mutants.statistics_gradient}
WRONG = {"loss": mutants.MUTANTS, "statistics": mutants.STATISTICS_MUTANTS}


def oracle(of, x, target):
    """The gradient of the loss, or of a mixture of statistics, in float64."""
    if of == "loss":
        return program.value_and_grads(x, target, label_smoothing=mutants.SMOOTHING, **OPTIONS)[1]
    leaf = x.detach().double().requires_grad_()
    options = {"logit_scale": mutants.LOGIT_SCALE, **OPTIONS}
    stats = program.cross_entropy_stats(leaf, target, **options)
    return torch.autograd.grad(mutants.objective(stats, x), leaf)[0]


@pytest.mark.parametrize("of", RIGHT)
@CASES
def test_the_right_gradient_passes(v, dtype, compare, of):
    x, target = logits_and_ids(8, v, dtype)
    want = oracle(of, x, target)
    torch.testing.assert_close(RIGHT[of](x, target), want, rtol=1e-9, atol=1e-14)
    compare(want.to(dtype), want)


@pytest.mark.parametrize(("of", "mutant"), [(of, name) for of in WRONG for name in WRONG[of]])
@CASES
def test_every_mutant_is_rejected(v, dtype, compare, of, mutant):
    x, target = logits_and_ids(8, v, dtype)
    want = oracle(of, x, target)
    with pytest.raises(AssertionError):
        compare(WRONG[of][mutant](x, target).to(dtype), want)


@pytest.mark.parametrize("name", [n for n in program.Statistics._fields if n != "n_valid"])
def test_a_statistic_of_another_row_is_rejected(name):
    x, target = logits_and_ids(8, 17, torch.float64)
    want = program.cross_entropy_stats(x, target, reduction="none", lse_square_scale=0.1)
    with pytest.raises(AssertionError):
        assert_statistics_close(want._replace(**{name: getattr(want, name).roll(1)}), want)
