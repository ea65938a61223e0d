"""Random shapes, strides, dtypes, options and targets of losses of logits against the torch program
in float64."""

import math

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import strategies as st

import lossfuse
import program
from closeness import assert_gradient_close, assert_statistics_close, gradient_terms
from draws import calls, holds_for
from options import differentiated, upstreams


def computes(place, *tensors):
    """Whether an implementation takes these; Triton's kernels have no float64."""
    return place.impl != "triton" or all(t is None or t.dtype != torch.float64 for t in tensors)


def moved(place, *tensors):
    return [None if t is None else t.detach().to(place.device) for t in tensors]


def oracles_logits(call):
    """In float64. To torch a probability of 0 is NaN on a class of -inf, so that class is only very
    low."""
    x = call.logits.double().detach()
    return x.masked_fill(x == -math.inf, -1e30) if call.target.is_floating_point() else x


def as_rows(t, v):
    return t.movedim(min(1, t.dim() - 1), -1).reshape(-1, v)


def assert_logit_gradient(got, want, call, per_row):
    """Entry by entry, relative to what it is a difference of; ``per_row`` is what comes from
    above."""
    v = want.shape[min(1, want.dim() - 1)]
    x, target = as_rows(call.logits.double(), v), call.target
    target = as_rows(target, v) if target.is_floating_point() else target.flatten()
    terms = gradient_terms(x, target, call.weight, call.options, per_row)
    assert_gradient_close(as_rows(got.cpu(), v), as_rows(want, v), terms=terms.nan_to_num(nan=0.0))


def in_rows(dloss, call, n):
    """The share of a loss's upstream gradient that comes to each row."""
    reduction, options = (
        call.options["reduction"],
        {k: call.options[k] for k in ("ignore_index", "normalizer") if k in call.options},
    )
    if reduction == "none":
        return dloss.flatten().double()
    ones = torch.ones(n, dtype=torch.float64)
    target = call.target if call.target.is_floating_point() else call.target.flatten().long()
    weight = None if call.weight is None else call.weight.double()
    made = program.reduced(
        ones,
        target,
        weight,
        options.get("ignore_index", -100),
        reduction,
        options.get("normalizer"),
    )
    # the weights of rows are in the terms
    return torch.full((n,), float(dloss * made / n), dtype=torch.float64).nan_to_num(nan=0.0)


@holds_for(calls(), st.booleans(), few=40)
def test_a_loss_equals_the_torch_program(thrifty_place, call, inplace):
    if not computes(thrifty_place, call.parent, call.target):
        return
    soft = call.target.is_floating_point()
    wide = [
        oracles_logits(call).requires_grad_(),
        call.target.double().detach().requires_grad_() if soft else call.target.long(),
    ]
    weight = None if call.weight is None else call.weight.double()
    want = program.cross_entropy(wide[0], wide[1], weight, **call.options)
    # a power of two, as the gradient may have been rounded before it comes
    dloss = (
        torch.linspace(-1, 1, want.numel()).reshape(want.shape)
        if want.dim() or call.options["reduction"] == "none"
        else torch.tensor(2.0)
    )
    want_grads = torch.autograd.grad(want, wide[: 1 + soft], dloss.double())

    parent, target, w = moved(thrifty_place, call.parent, call.target, call.weight)
    parent.requires_grad_()
    target = target.requires_grad_(soft)
    logits = call.view(parent) * 1.0 if inplace else call.view(parent)
    loss = lossfuse.cross_entropy(
        logits, target, w, inplace=inplace, impl=thrifty_place.impl, **call.options
    )
    grads = torch.autograd.grad(loss, [parent, *([target] if soft else [])], dloss.to(loss))
    assert (
        loss.dtype == (torch.float64 if call.parent.dtype == torch.float64 else torch.float32)
        and loss.shape == want.shape
    )

    close = (
        {"rtol": 1e-11, "atol": 1e-11}
        if loss.dtype == torch.float64
        else {"rtol": 2e-5, "atol": 2e-6}
    )
    heaviest = 1.0 if call.weight is None else float(call.weight.amax().clamp(min=1.0))
    close["atol"] *= heaviest * max(1.0, float(call.target.double().sum()) if soft else 1.0)
    torch.testing.assert_close(loss.detach().double().cpu(), want.detach(), equal_nan=True, **close)
    # what is no part of the view gets nothing
    assert (grads[0] != 0).sum() == (call.view(grads[0]) != 0).sum()
    v = want_grads[0].shape[min(1, want_grads[0].dim() - 1)]
    per_row = in_rows(dloss, call, call.logits.numel() // v)
    assert_logit_gradient(call.view(grads[0]), want_grads[0], call, [per_row])
    if soft:
        # of a class of -inf it is infinite, or nothing if the class is out
        there = as_rows(oracles_logits(call), v) > -1e30
        got, wanted = (as_rows(g.cpu(), v)[there] for g in (grads[1], want_grads[1]))
        assert_gradient_close(
            got, wanted, terms=(per_row.abs() * heaviest)[:, None].expand_as(there)[there]
        )


@holds_for(
    calls(),
    st.sets(st.sampled_from(["loss", "lse", "target_logprob", "entropy", "z_loss"]), min_size=1),
    few=25,
)
def test_mixtures_of_statistics_equal_the_torch_program(thrifty_place, call, names):
    if not computes(thrifty_place, call.parent, call.target):
        return
    soft = call.target.is_floating_point()
    wide = [
        oracles_logits(call).requires_grad_(),
        call.target.double().detach().requires_grad_() if soft else call.target.long(),
    ]
    want = program.cross_entropy_stats(
        *wide, None if call.weight is None else call.weight.double(), **call.options
    )
    parent, target, w = moved(thrifty_place, call.parent, call.target, call.weight)
    parent.requires_grad_()
    target = target.requires_grad_(soft)
    got = lossfuse.cross_entropy_stats(
        call.view(parent), target, w, impl=thrifty_place.impl, **call.options
    )
    if "softcap" in call.options:
        # a cap rounds the largest to ties
        got, want = (stats._replace(argmax=torch.zeros_like(stats.argmax)) for stats in (got, want))
    assert_statistics_close(got, want)
    # a z-loss that is not asked for is no part of a graph
    asked = names - (set() if "lse_square_scale" in call.options else {"z_loss"})
    ups = upstreams(want, sorted(asked))
    got_grads = differentiated(
        got,
        [parent, *([target] if soft else [])],
        {name: u.to(got.lse.device) for name, u in ups.items()},
    )
    want_grads = differentiated(want, wide[: 1 + soft], ups)
    v = want_grads[0].shape[min(1, want_grads[0].dim() - 1)]
    n = call.logits.numel() // v
    z_scale = call.options.get("lse_square_scale", 0.0)
    lse = want.lse.detach().flatten().abs()
    # what comes to each row: the reduced ones by their share, a z-loss by its slope
    per_row = [torch.zeros(n, dtype=torch.float64)]
    for name, up in ups.items():
        reduced = name in ("loss", "z_loss")
        rows = in_rows(up, call, n) if reduced else up.flatten()
        per_row.append(
            rows * 2.0 * z_scale * lse
            if name == "z_loss"
            else rows * (1.0 + lse)
            if name == "entropy"
            else rows
        )
    assert_logit_gradient(call.view(got_grads[0]), want_grads[0], call, per_row)
