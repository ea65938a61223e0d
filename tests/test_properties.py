"""Random shapes, strides, dtypes and options against the torch program in fp64, and laws that need no oracle."""

import math

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import lossfuse  # noqa: E402
import program  # noqa: E402
from closeness import assert_gradient_close, assert_loss_close  # noqa: E402

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "expanded rows", "stepped"])


@st.composite
def calls(draw):
    """(input, target, weight, options): everything F.cross_entropy takes and what it does not."""
    n, v = draw(st.integers(1, 9)), draw(st.integers(1, 300))
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    dtype = draw(dtypes)
    layout = draw(layouts)
    spread = draw(st.sampled_from([0.0, 1.0, 8.0, 30.0]))
    x = {
        "contiguous": lambda: torch.randn(n, v),
        "transposed": lambda: torch.randn(v, n).t(),
        "sliced": lambda: torch.randn(n, v + 5)[:, 2 : v + 2],
        "expanded rows": lambda: torch.randn(1, v).expand(n, v),
        "stepped": lambda: torch.randn(2 * n, 2 * v)[::2, ::2],
    }[layout]()
    x = (x * spread).to(dtype)
    if draw(st.booleans()) and v > 1:
        x = x.masked_fill(torch.rand(v) < 0.3, -math.inf)
        x[..., -1] = 0.0
    soft = draw(st.booleans())
    if soft:
        target = torch.softmax(torch.randn(n, v) * 3, -1).to(dtype)
        # program and package differ where torch is NaN: a masked class with no probability
        target = target if x.isfinite().all() else torch.ones(n, v, dtype=dtype) / v
    else:
        target = torch.randint(0, v, (n,))
        target[torch.rand(n) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    weight = torch.rand(v) + 0.05 if draw(st.booleans()) else None
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    options = {
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        "logit_scale": draw(st.sampled_from([None, 0.5, 2.0])),
        "lse_square_scale": draw(st.sampled_from([0.0, 1e-3])),
    }
    if reduction == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([3, 10.5]))
    return x, target, weight, options


@FEW
@given(calls())
def test_any_call_equals_the_torch_program(thrifty_fast_place, call):
    x, target, weight, options = call
    if thrifty_fast_place.impl == "triton" and x.dtype == torch.float64:
        return
    n, v = x.shape
    dloss = torch.linspace(-1, 1, n) if options["reduction"] == "none" else torch.tensor(1.0)
    want = program.value_and_grads(x, target, weight, dloss, **options)
    leaf = x.to(thrifty_fast_place.device).requires_grad_()
    to = lambda t: None if t is None else t.to(thrifty_fast_place.device)  # noqa: E731
    loss = lossfuse.cross_entropy(leaf, to(target), to(weight), impl=thrifty_fast_place.impl, **options)
    (grad,) = torch.autograd.grad(loss, leaf, dloss.to(loss))
    # an infinite loss has no gradient to compare: program and package meet inf * 0 in different places
    finite = want[0].isfinite()
    assert torch.equal(loss.isfinite().cpu(), finite)
    if not finite.all():
        return
    scale = 1.0 if weight is None else float(weight.max())
    torch.testing.assert_close(loss.double().cpu(), want[0], rtol=2e-5, atol=2e-5 * scale * v**0.5)
    # a row's gradient is a difference of probabilities and target masses, whose sizes are at most the weights'
    assert_gradient_close(grad, want[1], terms=scale * 0.2 * abs(options["logit_scale"] or 1.0))


@FEW
@given(st.integers(1, 6), st.integers(1, 200), st.floats(-1e4, 1e4), st.integers(0, 2**20))
def test_shift_invariance(thrifty_fast_place, n, v, offset, seed):
    torch.manual_seed(seed)
    offset = round(offset)
    x = torch.randint(-20, 20, (n, v)).float().to(thrifty_fast_place.device)
    target = torch.randint(0, v, (n,), device=thrifty_fast_place.device)
    want = lossfuse.cross_entropy(x, target, reduction="none", impl=thrifty_fast_place.impl)
    torch.testing.assert_close(
        lossfuse.cross_entropy(x + offset, target, reduction="none", impl=thrifty_fast_place.impl), want, rtol=1e-6, atol=1e-6
    )


@FEW
@given(st.integers(1, 6), st.integers(2, 200), st.integers(0, 2**20))
def test_permuting_classes_permutes_the_gradient(thrifty_place, n, v, seed):
    torch.manual_seed(seed)
    x = (torch.randn(n, v) * 5).to(thrifty_place.device).requires_grad_()
    order = torch.randperm(v)
    target = torch.randint(0, v, (n,))
    place_of = torch.argsort(order)
    loss = lossfuse.cross_entropy(x, target.to(thrifty_place.device), impl=thrifty_place.impl)
    moved = lossfuse.cross_entropy(x[:, order], place_of[target].to(thrifty_place.device), impl=thrifty_place.impl)
    assert_loss_close(moved, loss)
    torch.testing.assert_close(torch.autograd.grad(moved, x)[0], torch.autograd.grad(loss, x)[0], rtol=1e-4, atol=1e-7)


@FEW
@given(st.integers(2, 12), st.integers(1, 200), st.integers(0, 2**20))
def test_rows_do_not_know_each_other(thrifty_place, n, v, seed):
    """Splitting a batch changes nothing, and "none" summed is "sum"."""
    torch.manual_seed(seed)
    x = (torch.randn(n, v) * 5).to(thrifty_place.device)
    target = torch.randint(0, v, (n,), device=thrifty_place.device)
    whole = lossfuse.cross_entropy(x, target, reduction="none", impl=thrifty_place.impl)
    parts = [
        lossfuse.cross_entropy(a, t, reduction="none", impl=thrifty_place.impl) for a, t in zip(x.split(5), target.split(5), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole.sum(), lossfuse.cross_entropy(x, target, reduction="sum", impl=thrifty_place.impl))
