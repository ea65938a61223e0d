"""Random heads, and how they are cut into chunks, against the torch program in float64."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import strategies as st

import lossfuse
import program
from closeness import GRADIENT_RTOL, assert_statistics_close, gradient_terms
from draws import class_ids, holds_for, laid_out, loss_options, probabilities, seeds
from lossfuse.ops import head_chunks
from options import DIFFERENTIABLE, differentiated, upstreams


@st.composite
def heads(draw):
    """((hidden, weight, bias), target, class weight, options of the loss, LinearOptions), hidden
    states of any shape."""
    torch.manual_seed(draw(seeds))
    v, d = draw(st.integers(1, 120)), draw(st.integers(1, 24))
    batch = draw(
        st.sampled_from(
            [(), (1,), (draw(st.integers(1, 9)),), (draw(st.integers(1, 3)), 2), (2, 1, 3)]
        )
    )
    dtype = draw(
        st.sampled_from(
            [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
        )
    )
    spread = draw(st.sampled_from([0.0, 1.0, 5.0]))
    hidden = (torch.randn(*batch, d) * spread / d**0.5).to(dtype)
    weight = torch.randn(v, d).to(dtype)
    bias = (torch.randn(v) * 2.0).to(dtype) if draw(st.booleans()) else None
    options = draw(loss_options())
    if draw(st.booleans()):
        target = draw(probabilities(batch, v, dtype))
    else:
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0]))
        target = draw(class_ids(batch, v, options["ignore_index"]))
    class_weight = torch.rand(v) + 0.05 if draw(st.booleans()) else None
    how = lossfuse.LinearOptions(
        chunk_bytes=draw(st.sampled_from([None, 1, 700, 2000])),
        drop_ignored=draw(st.sampled_from([None, True, False])),
        allow_retain_graph=draw(st.booleans()),
    )
    return (
        (draw(laid_out(hidden)), draw(laid_out(weight)), bias),
        draw(laid_out(target)),
        class_weight,
        options,
        how,
    )


def wanted(operands, target, class_weight, ups_of, options):
    """(statistics, gradients, and for each the sizes of the numbers that were added up) in
    float64."""
    wide = [
        None if t is None else t.double().detach().requires_grad_()
        for t in (*operands, target if target.is_floating_point() else None)
    ]
    hidden, head, bias, soft = wide
    logits, t = program.logits_and_target(
        hidden, head, target.long() if soft is None else soft, bias
    )
    weight = None if class_weight is None else class_weight.double()
    stats = program.cross_entropy_stats(logits, t, weight, **options)
    ups = ups_of(stats)
    leaves = [t for t in wide if t is not None]
    *grads, dlogits = differentiated(stats, [*leaves, logits], ups)
    v = len(head)
    z, made = (
        t.detach().movedim(min(1, t.dim() - 1), -1).reshape(-1, v) for t in (logits, dlogits)
    )
    rows = target.double().reshape(-1, v) if soft is not None else target.flatten().long()
    # sizes of the entries of dlogits, from upstream gradients as large as any of them
    most = sum(float(u.abs().max()) for u in ups.values() if u.numel())
    lse = z.logsumexp(1).abs() if len(z) else z.new_zeros(0)
    terms = gradient_terms(z, rows, weight, options, [most * (1.0 + lse)])
    if soft is not None:
        terms = terms * (1.0 + rows.sum(1, keepdim=True))
    terms = terms + made.abs()
    x, w = hidden.detach().abs().reshape(-1, hidden.shape[-1]), head.detach().abs()
    sizes = [(terms @ w).reshape(hidden.shape), terms.T @ x]
    if bias is not None:
        sizes.append(terms.sum(0))
    if soft is not None:
        nll = (lse[:, None] + z.abs() + 1.0) * most * (1.0 if weight is None else 1.0 + weight)
        sizes.append(nll.reshape(target.shape))
    return stats, grads, sizes


def assert_sums_close(name, got, want, sizes, *, narrow=False):
    """Entry by entry: what is stored is rounded, and what was added up is held in float32; its
    factors in the dtype if ``narrow``."""
    info = torch.finfo(got.dtype)
    unit = 1e-12 if got.dtype == torch.float64 else max(1e-5, info.eps if narrow else 0.0)
    allowed = (
        GRADIENT_RTOL[got.dtype] * want.abs() + unit * sizes + 2 * info.smallest_normal * info.eps
    )
    wrong = ~((got.cpu().double() - want).abs() <= allowed) & ~(got.cpu().isnan() & want.isnan())
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name} at {at}: got {got[at].item():.7e}, want {want[at].item():.7e}, allowed {allowed[at].item():.1e}"
        )


def check(place, head, ups_of, statistics):
    operands, target, class_weight, options, how = head
    if place.impl == "triton" and (
        operands[0].dtype == torch.float64 or target.dtype == torch.float64
    ):
        return
    want, want_grads, sizes = wanted(operands, target, class_weight, ups_of, options)
    soft = target.is_floating_point()
    hidden, weight, bias, t = (
        None if a is None else a.to(place.device) for a in (*operands, target)
    )
    leaves = [
        a.detach().requires_grad_()
        for a in (hidden, weight, bias, t if soft else None)
        if a is not None
    ]
    given = dict(
        zip(
            [
                "hidden",
                "weight",
                *(["bias"] if bias is not None else []),
                *(["target"] if soft else []),
            ],
            leaves,
            strict=True,
        )
    )
    function = lossfuse.linear_cross_entropy_stats if statistics else lossfuse.linear_cross_entropy
    got = function(
        given["hidden"],
        given["weight"],
        given.get("target", t),
        linear_bias=given.get("bias"),
        weight=None if class_weight is None else class_weight.to(place.device),
        options=how,
        impl=place.impl,
        **options,
    )
    if statistics:
        # logits that differ by less than they are rounded may be either the largest
        got, want = (stats._replace(argmax=torch.zeros_like(stats.argmax)) for stats in (got, want))
        assert_statistics_close(got, want)
        grads = differentiated(
            got, leaves, {name: u.to(place.device) for name, u in ups_of(want).items()}
        )
    else:
        wide = got.dtype == torch.float64
        rtol, atol = (
            (1e-11, 1e-11)
            if wide
            else (
                2e-5,
                1e-5
                * (1.0 + float(target.double().sum(-1).max()) if soft and target.dim() else 1.0),
            )
        )
        torch.testing.assert_close(
            got.detach().double().cpu(), want.loss.detach(), rtol=rtol, atol=atol, equal_nan=True
        )
        grads = torch.autograd.grad(got, leaves, ups_of(want)["loss"].to(got))
    # where products take half precision, the gradient of the logits is rounded to it first
    narrow = place.impl != "reference" and head_chunks.mm_returns_fp32(torch.device(place.device))
    for name, g, leaf, w, s in zip(given, grads, leaves, want_grads, sizes, strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        assert_sums_close(name, g, w, s, narrow=narrow and name != "target")


@holds_for(heads(), few=20)
def test_a_head_equals_the_torch_program(thrifty_place, head):
    # powers of two, as gradients may have been rounded before they come
    check(
        thrifty_place,
        head,
        lambda stats: {"loss": torch.full_like(stats.loss.detach(), 2.0)},
        statistics=False,
    )


@holds_for(heads(), st.sets(st.sampled_from(DIFFERENTIABLE), min_size=1), few=12)
def test_mixtures_of_statistics_of_a_head_equal_the_torch_program(thrifty_place, head, names):
    check(thrifty_place, head, lambda stats: upstreams(stats, sorted(names)), statistics=True)
