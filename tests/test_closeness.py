"""The tests of the tests: the right gradient passes each comparator, each wrong one is rejected."""

import pytest
import torch

import mutants
import program
from closeness import assert_formula_close, assert_gradient_close
from rows import logits_and_ids

OPTIONS = {
    "label_smoothing": mutants.SMOOTHING,
    "lse_square_scale": mutants.Z_SCALE,
    "softcap": mutants.SOFTCAP,
}

# the two tiers as they are used: small in fp32, and a real vocabulary in each stored dtype
CASES = [
    pytest.param(17, torch.float32, assert_formula_close, id="V17-fp32"),
    pytest.param(32000, torch.float32, assert_gradient_close, id="V32000-fp32"),
    pytest.param(32000, torch.bfloat16, assert_gradient_close, id="V32000-bf16"),
]


@pytest.mark.parametrize(("v", "dtype", "compare"), CASES)
def test_the_right_gradient_passes(v, dtype, compare):
    x, target = logits_and_ids(8, v, dtype)
    want = program.value_and_grads(x, target, **OPTIONS)[1]
    torch.testing.assert_close(mutants.gradient(x, target), want, rtol=1e-9, atol=1e-16)
    compare(want.to(dtype), want)


@pytest.mark.parametrize("mutant", mutants.MUTANTS)
@pytest.mark.parametrize(("v", "dtype", "compare"), CASES)
def test_every_mutant_is_rejected(v, dtype, compare, mutant):
    x, target = logits_and_ids(8, v, dtype)
    want = program.value_and_grads(x, target, **OPTIONS)[1]
    with pytest.raises(AssertionError):
        compare(mutants.MUTANTS[mutant](x, target).to(dtype), want)
