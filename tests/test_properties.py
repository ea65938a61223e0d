"""Random calls of losses of logits and of heads, any shape, stride, dtype, option and target,
against the torch program in float64; and laws that hold without an oracle."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import one_hot

pytest.importorskip("hypothesis")

from hypothesis import strategies as st

import lossfuse
import program
import sharded_rows
from closeness import (
    GRADIENT_RTOL,
    assert_gradient_close,
    assert_statistics_close,
    gradient_terms,
)
from draws import calls, class_ids, cuts, holds_for, laid_out, loss_options, probabilities, seeds
from lossfuse.ops import head_chunks
from options import DIFFERENTIABLE, differentiated, upstreams
from public import LOSSES, tensors
from rows import class_weight, logits_and_ids
from rows import probabilities as probability_rows

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
NEAR = {"rtol": 1e-5, "atol": 1e-6}
interpreted = pytest.mark.slow_interpreted
not_reference = pytest.mark.not_reference


def computed(place, *given):
    """True if an implementation takes these; Triton's kernels have no float64."""
    return place.impl != "triton" or all(t is None or t.dtype != torch.float64 for t in given)


def moved(place, *given):
    return [None if t is None else t.detach().to(place.device) for t in given]


def as_rows(t, v):
    return t.movedim(min(1, t.dim() - 1), -1).reshape(-1, v)


def double(t):
    return None if t is None else t.double()


# --- losses of logits


class Case:
    """A drawn call: the oracle's leaves in float64, and ours on a place."""

    def __init__(self, place, call):
        self.place, self.call, self.soft = place, call, call.target.is_floating_point()
        x = call.logits.double().detach()
        if self.soft:
            # to torch a probability of 0 is NaN on a class of -inf, so that class is only very low
            x = x.masked_fill(x == -math.inf, -1e30)
        target = call.target.double().detach() if self.soft else call.target.long()
        self.wide = [x.requires_grad_(), target.requires_grad_(self.soft)]
        self.v = x.shape[min(1, x.dim() - 1)]
        self.rows = x.numel() // self.v
        self.parent, self.target, self.weight = moved(place, call.parent, call.target, call.weight)
        self.parent.requires_grad_()
        self.target.requires_grad_(self.soft)

    @property
    def wide_leaves(self):
        return self.wide[: 1 + self.soft]

    @property
    def leaves(self):
        return [self.parent, self.target][: 1 + self.soft]

    def upstream_of_rows(self, dloss):
        """The share of a loss's upstream gradient that comes to each row."""
        call, given = self.call, self.call.options
        if given["reduction"] == "none":
            return dloss.flatten().double()
        ones = torch.ones(self.rows, dtype=torch.float64)
        target = call.target if self.soft else call.target.flatten().long()
        reduction, normalizer = given["reduction"], given.get("normalizer")
        how = given.get("ignore_index", -100), reduction, None, normalizer
        made = program.reduced(ones, target, double(call.weight), *how)
        # the weights of rows are in the terms
        share = float(dloss * made / self.rows)
        return torch.full((self.rows,), share, dtype=torch.float64).nan_to_num(nan=0.0)

    def check_logits(self, got, want, ups):
        """Entry by entry, relative to the numbers whose difference it is."""
        call, v = self.call, self.v
        target = as_rows(call.target, v) if self.soft else call.target.flatten()
        x = as_rows(call.logits.double(), v)
        terms = gradient_terms(x, target, call.weight, call.options, ups).nan_to_num(nan=0.0)
        got = as_rows(call.view(got).cpu(), v)
        assert_gradient_close(got, as_rows(want, v), terms=terms)


@interpreted
@holds_for(calls(), st.booleans(), few=40)
def test_a_loss_equals_the_torch_program(place, call, inplace):
    if not computed(place, call.parent, call.target):
        return
    case = Case(place, call)
    want = program.cross_entropy(*case.wide, double(call.weight), **call.options)
    # a power of two, as the gradient may have been rounded before it comes
    dloss = torch.tensor(2.0)
    if want.dim() or call.options["reduction"] == "none":
        dloss = torch.linspace(-1, 1, want.numel()).reshape(want.shape)
    want_grads = torch.autograd.grad(want, case.wide_leaves, dloss.double())

    logits = call.view(case.parent) * 1.0 if inplace else call.view(case.parent)
    given = {"inplace": inplace, "impl": place.impl, **call.options}
    loss = lossfuse.cross_entropy(logits, case.target, case.weight, **given)
    grads = torch.autograd.grad(loss, case.leaves, dloss.to(loss))
    exact = call.parent.dtype == torch.float64
    assert loss.dtype == (torch.float64 if exact else torch.float32) and loss.shape == want.shape

    heaviest = 1.0 if call.weight is None else float(call.weight.amax().clamp(min=1.0))
    mass = max(1.0, float(call.target.double().sum())) if case.soft else 1.0
    rtol, atol = (1e-11, 1e-11) if exact else (2e-5, 2e-6)
    close = {"rtol": rtol, "atol": atol * heaviest * mass, "equal_nan": True}
    torch.testing.assert_close(loss.detach().double().cpu(), want.detach(), **close)
    # memory that is no part of the view gets nothing
    assert (grads[0] != 0).sum() == (call.view(grads[0]) != 0).sum()
    per_row = case.upstream_of_rows(dloss)
    case.check_logits(grads[0], want_grads[0], [per_row])
    if case.soft:
        # of a class of -inf it is infinite, or nothing if the class is out
        there = as_rows(case.wide[0], case.v) > -1e30
        got, wanted = (as_rows(g.cpu(), case.v)[there] for g in (grads[1], want_grads[1]))
        terms = (per_row.abs() * heaviest)[:, None].expand_as(there)[there]
        assert_gradient_close(got, wanted, terms=terms)


statistics = st.sets(st.sampled_from(DIFFERENTIABLE), min_size=1)


def without_ties(*stats):
    """Statistics without the class of the largest logit, where rounding may make two alike."""
    return [s._replace(argmax=torch.zeros_like(s.argmax)) for s in stats]


@interpreted
@holds_for(calls(), statistics, few=25)
def test_mixtures_of_statistics_equal_the_torch_program(place, call, names):
    if not computed(place, call.parent, call.target):
        return
    case = Case(place, call)
    want = program.cross_entropy_stats(*case.wide, double(call.weight), **call.options)
    args = (call.view(case.parent), case.target, case.weight)
    got = lossfuse.cross_entropy_stats(*args, impl=place.impl, **call.options)
    # a cap rounds the largest to ties
    assert_statistics_close(
        *(without_ties(got, want) if "softcap" in call.options else (got, want))
    )
    # a z-loss of scale 0 is no part of a graph
    ups = upstreams(
        want, sorted(names - (set() if "lse_square_scale" in call.options else {"z_loss"}))
    )
    there = {name: u.to(got.lse.device) for name, u in ups.items()}
    grads = differentiated(got, case.leaves, there)
    want_grads = differentiated(want, case.wide_leaves, ups)
    z_scale, lse = call.options.get("lse_square_scale", 0.0), want.lse.detach().flatten().abs()
    per_row = [torch.zeros(case.rows, dtype=torch.float64)]
    for name, up in ups.items():
        # reduced ones by their share, a z-loss by its derivative
        rows = case.upstream_of_rows(up) if name in ("loss", "z_loss") else up.flatten()
        factor = {"z_loss": 2.0 * z_scale * lse, "entropy": 1.0 + lse}.get(name, 1.0)
        per_row.append(rows * factor)
    case.check_logits(grads[0], want_grads[0], per_row)


# --- heads


@st.composite
def heads(draw):
    """((hidden, weight, bias), target, class weight, options of the loss, LinearOptions), hidden
    states of any shape."""
    torch.manual_seed(draw(seeds))
    v, d, n = draw(st.integers(1, 120)), draw(st.integers(1, 24)), draw(st.integers(1, 9))
    batch = draw(st.sampled_from([(), (1,), (n,), (draw(st.integers(1, 3)), 2), (2, 1, 3)]))
    kinds = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
    dtype, spread = draw(st.sampled_from(kinds)), draw(st.sampled_from([0.0, 1.0, 5.0]))
    hidden, weight = torch.randn(*batch, d) * spread / d**0.5, torch.randn(v, d)
    bias = (torch.randn(v) * 2.0).to(dtype) if draw(st.booleans()) else None
    options = draw(loss_options())
    if draw(st.booleans()):
        target = draw(probabilities(batch, v, dtype))
    else:
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0]))
        target = draw(class_ids(batch, v, options["ignore_index"]))
    classes = torch.rand(v) + 0.05 if draw(st.booleans()) else None
    how = lossfuse.LinearOptions(
        chunk_bytes=draw(st.sampled_from([None, 1, 700, 2000])),
        drop_ignored=draw(st.sampled_from([None, True, False])),
        allow_retain_graph=draw(st.booleans()),
    )
    hidden, weight = draw(laid_out(hidden.to(dtype))), draw(laid_out(weight.to(dtype)))
    return (hidden, weight, bias), draw(laid_out(target)), classes, options, how


def wanted(operands, target, class_weight, ups_of, options):
    """(statistics, gradients, and for each the sizes of the numbers that were added up) in
    float64."""
    soft = target if target.is_floating_point() else None
    wide = [None if t is None else t.double().detach().requires_grad_() for t in (*operands, soft)]
    hidden, head, bias, soft = wide
    t = target.long() if soft is None else soft
    logits, t = program.logits_and_target(hidden, head, t, bias)
    weight, v = double(class_weight), len(head)
    stats = program.cross_entropy_stats(logits, t, weight, **options)
    ups = ups_of(stats)
    leaves = [t for t in wide if t is not None]
    *grads, dlogits = differentiated(stats, [*leaves, logits], ups)
    z, made = (as_rows(t.detach(), v) for t in (logits, dlogits))
    rows = target.double().reshape(-1, v) if soft is not None else target.flatten().long()
    # sizes of the entries of dlogits, from upstream gradients as large as any of them
    most = sum(float(u.abs().max()) for u in ups.values() if u.numel())
    lse = z.logsumexp(1).abs() if len(z) else z.new_zeros(0)
    terms = gradient_terms(z, rows, weight, options, [most * (1.0 + lse)])
    terms = terms * (1.0 + rows.sum(1, keepdim=True)) if soft is not None else terms
    terms = terms + made.abs()
    x, w = hidden.detach().abs().reshape(-1, hidden.shape[-1]), head.detach().abs()
    sizes = [(terms @ w).reshape(hidden.shape), terms.T @ x]
    sizes += [] if bias is None else [terms.sum(0)]
    if soft is not None:
        heavy = 1.0 if weight is None else 1.0 + weight
        sizes.append(((lse[:, None] + z.abs() + 1.0) * most * heavy).reshape(target.shape))
    return stats, grads, sizes


def assert_sums_close(got, want, sizes, *, narrow=False):
    """Entry by entry: the result is rounded, its sum was in float32; its factors in the dtype if
    ``narrow``."""
    info, got = torch.finfo(got.dtype), got.cpu()
    unit = 1e-12 if got.dtype == torch.float64 else max(1e-5, info.eps if narrow else 0.0)
    allowed = GRADIENT_RTOL[got.dtype] * want.abs() + unit * sizes
    allowed += 2 * info.smallest_normal * info.eps
    wrong = ~((got.double() - want).abs() <= allowed) & ~(got.isnan() & want.isnan())
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        numbers = f"got {got[at].item():.7e}, want {want[at].item():.7e}"
        raise AssertionError(f"at {at}: {numbers}, allowed {allowed[at].item():.1e}")


def check_head(place, head, ups_of, *, statistics):
    operands, target, class_weight, options, how = head
    if not computed(place, operands[0], target):
        return
    want, want_grads, sizes = wanted(operands, target, class_weight, ups_of, options)
    hidden, weight, bias, t, classes = moved(place, *operands, target, class_weight)
    leaves = [
        a.requires_grad_()
        for a in (hidden, weight, bias, t)
        if a is not None and a.is_floating_point()
    ]
    function = lossfuse.linear_cross_entropy_stats if statistics else lossfuse.linear_cross_entropy
    given = {"linear_bias": bias, "weight": classes, "options": how, "impl": place.impl}
    got = function(hidden, weight, t, **given, **options)
    if statistics:
        assert_statistics_close(*without_ties(got, want))
        ups = {name: u.to(place.device) for name, u in ups_of(want).items()}
        grads = differentiated(got, leaves, ups)
    else:
        mass = float(target.double().sum(-1).max()) if t.is_floating_point() and t.dim() else 0.0
        exact = got.dtype == torch.float64
        rtol, atol = (1e-11, 1e-11) if exact else (2e-5, 1e-5 * (1.0 + mass))
        close = {"rtol": rtol, "atol": atol, "equal_nan": True}
        torch.testing.assert_close(got.detach().double().cpu(), want.loss.detach(), **close)
        grads = torch.autograd.grad(got, leaves, ups_of(want)["loss"].to(got))
    # where products take half precision, the gradient of the logits is rounded to it first
    narrow = place.impl != "reference" and head_chunks.mm_returns_fp32(torch.device(place.device))
    for g, leaf, w, s in zip(grads, leaves, want_grads, sizes, strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        assert_sums_close(g, w, s, narrow=narrow and leaf is not t)


@interpreted
@holds_for(heads(), few=20)
def test_a_head_equals_the_torch_program(place, head):
    # powers of two, as gradients may have been rounded before they come
    two = lambda stats: {"loss": torch.full_like(stats.loss.detach(), 2.0)}  # noqa: E731
    check_head(place, head, two, statistics=False)


@interpreted
@holds_for(heads(), statistics, few=12)
def test_mixtures_of_statistics_of_a_head_equal_the_torch_program(place, head, names):
    check_head(place, head, lambda stats: upstreams(stats, sorted(names)), statistics=True)


# --- laws


def logits(n, v, seed, device="cpu", ignored=0.0):
    """Logits and ids, the first row's never ignored."""
    torch.manual_seed(seed)
    x, target = (torch.randn(n, v) * 4.0).to(device).requires_grad_(), torch.randint(0, v, (n,))
    out = torch.rand(n) < ignored
    out[:1] = False
    return x, target.masked_fill(out, -100).to(device)


def grad(loss, *leaves, up=None):
    up = torch.ones_like(loss) if up is None else up
    how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    made = torch.autograd.grad(loss, leaves, up, **how)
    return made[0] if len(leaves) == 1 else made


def alike(pairs, x, loss=CLOSE, grads=NEAR):
    """Two ways to one loss, each named, and their gradients."""
    for name, (a, b) in pairs.items():
        say = lambda said, name=name: f"{name}: {said}"  # noqa: E731
        torch.testing.assert_close(b, a, **loss, msg=say)
        torch.testing.assert_close(grad(b.sum(), x), grad(a.sum(), x), **grads, msg=say)


rows, classes = st.integers(1, 6), st.integers(2, 200)
row_options = loss_options("none").map(
    lambda options: {k: v for k, v in options.items() if k != "reduction"}
)


@interpreted
@not_reference
@holds_for(rows, classes, st.integers(-10000, 10000), seeds)
def test_an_offset_common_to_a_row_cancels(place, n, v, offset, seed):
    torch.manual_seed(seed)
    # exact in float32
    x = torch.randint(-20, 20, (n, v)).float().to(place.device).requires_grad_()
    target = torch.randint(0, v, (n,), device=place.device)
    given = {"reduction": "none", "impl": place.impl}
    here, there = (lossfuse.cross_entropy_stats(z, target, **given) for z in (x, x + offset))
    names = ("loss", "target_logprob", "entropy")
    alike(
        {name: (getattr(here, name), getattr(there, name)) for name in names},
        x,
        {"rtol": 1e-6, "atol": 1e-6},
    )
    torch.testing.assert_close(there.lse, here.lse + offset)
    assert torch.equal(there.argmax, here.argmax)


@interpreted
@holds_for(rows, classes, row_options, st.booleans(), seeds)
def test_permuting_classes_permutes_gradients(place, n, v, options, soft, seed):
    x, target = logits(n, v, seed, place.device)
    order, w = torch.randperm(v, device=x.device), class_weight(v, x.device)
    target = torch.softmax(torch.randn(n, v), 1).to(x.device).requires_grad_() if soft else target
    moved_target = target[:, order] if soft else torch.argsort(order)[target]
    leaves = [x, target] if soft else [x]
    given = {"reduction": "none", "impl": place.impl, **options}
    here = lossfuse.cross_entropy_stats(x, target, w, **given)
    there = lossfuse.cross_entropy_stats(x[:, order], moved_target, w[order], **given)
    for name in ("loss", "lse", "target_logprob", "entropy"):
        a, b = getattr(here, name), getattr(there, name)
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(
            grad(b.sum(), *leaves), grad(a.sum(), *leaves), rtol=1e-4, atol=2e-5
        )


@interpreted
@holds_for(st.integers(2, 12), classes, row_options, st.integers(1, 7), st.booleans(), seeds)
def test_rows_do_not_know_each_other(place, n, v, options, size, weighted, seed):
    """Splitting a batch changes nothing, "none" summed is "sum", and a batch twice has its mean."""
    x, target = logits(n, v, seed, place.device, ignored=0.3)
    w = class_weight(v, x.device) if weighted else None

    def of(x, target, reduction="none"):
        given = {"reduction": reduction, "impl": place.impl, **options}
        return lossfuse.cross_entropy(x, target, w, **given)

    parts = [of(a, t) for a, t in zip(x.split(size), target.split(size), strict=True)]
    twice = of(torch.cat([x, x]), torch.cat([target, target]), "mean")
    pairs = {
        "parts": (of(x, target), torch.cat(parts)),
        "sum": (of(x, target, "sum"), of(x, target).sum()),
        "mean": (of(x, target, "mean"), twice),
    }
    alike(pairs, x)


@interpreted
@not_reference
@holds_for(rows, classes, row_options, st.floats(0.01, 100.0), seeds)
def test_class_weights_have_no_unit_under_mean(place, n, v, options, c, seed):
    # a z-loss has no weights, and is divided by them
    options.pop("lse_square_scale", None)
    x, target = logits(n, v, seed, place.device, ignored=0.3)
    w = class_weight(v, x.device)
    pair = tuple(
        lossfuse.cross_entropy(x, target, u, impl=place.impl, **options) for u in (w, c * w)
    )
    alike({"scaled": pair}, x)


@interpreted
@holds_for(rows, classes, row_options, st.booleans(), seeds)
def test_an_id_is_all_of_the_probability(place, n, v, options, weighted, seed):
    x, target = logits(n, v, seed, place.device)
    w = class_weight(v, x.device) if weighted else None
    here, there = (
        lossfuse.cross_entropy_stats(x, t, w, reduction="none", impl=place.impl, **options)
        for t in (target, one_hot(target, v).to(x.dtype))
    )
    names = [name for name in DIFFERENTIABLE if getattr(here, name).requires_grad]
    pairs = {name: (getattr(here, name), getattr(there, name)) for name in names}
    alike(pairs, x, {"rtol": 2e-5, "atol": 1e-5}, {"rtol": 1e-4, "atol": 2e-5})


@interpreted
@holds_for(rows, classes, st.sampled_from([0.25, 0.5, 2.0, -1.0]), row_options, seeds)
def test_a_scale_is_of_the_logits_and_a_distant_cap_changes_nothing(
    place, n, v, scale, options, seed
):
    # a power of two is exact
    options.pop("logit_scale", None)
    x, target = logits(n, v, seed, place.device)

    def of(x, **more):
        return lossfuse.cross_entropy(
            x, target, reduction="none", impl=place.impl, **options | more
        )

    alike({"scale": (of(scale * x), of(x, logit_scale=scale))}, x, {"rtol": 1e-6, "atol": 1e-6})
    pair = (of(x, softcap=None), of(x, softcap=1e6))
    alike({"cap": pair}, x, {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-4, "atol": 1e-6})


RETAIN = lossfuse.LinearOptions(allow_retain_graph=True)


def every_loss(place, seed, reduction):
    """{name: (a loss, its first leaf)}, of each public function."""
    t, made = tensors(place.device, seed=seed, n=4, d=8, v=30), {}
    for name, (loss, leaves) in LOSSES.items():
        given = {} if "none" in name or name == "log_softmax" else {"reduction": reduction}
        given |= {"options": RETAIN} if name.startswith("linear") else {}
        got = loss(t, impl=place.impl, **given)
        made[name] = (got if torch.is_tensor(got) else got.loss), getattr(t, leaves.split()[0])
    return made


reductions = st.sampled_from(["none", "mean", "sum"])


@interpreted
@not_reference
@holds_for(seeds, st.integers(-20, 20), reductions, few=6, many=200)
def test_powers_of_two_from_upstream_are_exact(place, seed, exponent, reduction):
    once, scaled = (
        {
            name: grad(loss, leaf, up=torch.full_like(loss, factor))
            for name, (loss, leaf) in every_loss(place, seed, reduction).items()
        }
        for factor in (1.0, 2.0**exponent)
    )
    for name, got in scaled.items():
        want = once[name] * 2.0**exponent
        # numbers below the normal ones have lost bits
        whole = want.abs() > torch.finfo(torch.float32).smallest_normal * 2.0**24
        assert torch.equal(got[whole], want[whole]), name


@interpreted
@not_reference
@holds_for(seeds, st.floats(-10.0, 10.0), reductions, few=6, many=200)
def test_gradients_are_linear_in_the_upstream_gradient(place, seed, factor, reduction):
    for name, (loss, leaf) in every_loss(place, seed, reduction).items():
        if "in place" in name or "of ids" in name or name == "cross_entropy none":
            # consumed by their first backward
            continue
        a, b = torch.randn_like(loss), torch.randn_like(loss)
        ga, gb, both = (grad(loss, leaf, up=up) for up in (a, b, a + factor * b))
        size = ga.abs().amax() + abs(factor) * gb.abs().amax()
        off = (both - (ga + factor * gb)).abs().amax()
        assert off <= 1e-5 * size, (name, float(off), float(size))


@st.composite
def head_calls(draw):
    n, v, d = draw(st.integers(1, 12)), draw(st.integers(2, 90)), draw(st.integers(1, 12))
    _, target = logits(n, v, draw(seeds), ignored=draw(st.sampled_from([0.0, 0.4])))
    operands = torch.randn(n, d), torch.randn(v, d), torch.randn(v)
    sizes = draw(st.lists(st.integers(1, n), min_size=1, max_size=2))
    return (
        operands,
        target,
        draw(loss_options()),
        [4 * row * head_chunks.padded(v) for row in sizes],
    )


def head_results(place, operands, target, options, how=None):
    """Loss and gradients of a head."""
    leaves = [t.detach().to(place.device).requires_grad_() for t in operands]
    hidden, weight, bias = leaves
    given = {"linear_bias": bias, "options": how, "impl": place.impl, **options}
    loss = lossfuse.linear_cross_entropy(hidden, weight, target.to(place.device), **given)
    up = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape)
    return loss.detach(), *grad(loss, *leaves, up=up)


@interpreted
@not_reference
@holds_for(head_calls(), st.booleans())
def test_chunks_change_nothing(place, call, drop_ignored):
    *given, sizes = call
    want = head_results(place, *given)
    atol = 2e-6 * (1.0 + max(float(t.abs().max()) for t in want))
    for size in sizes:
        how = lossfuse.LinearOptions(chunk_bytes=size, drop_ignored=drop_ignored)
        got = head_results(place, *given, how)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)


@interpreted
@not_reference
@holds_for(head_calls(), st.integers(-100, 100), seeds)
def test_an_offset_and_an_order_of_the_classes_of_a_head(place, call, offset, seed):
    (hidden, weight, bias), target, options, _ = call
    # a cap and a z-loss see the offset
    options = {k: v for k, v in options.items() if k not in ("softcap", "lse_square_scale")}
    torch.manual_seed(seed)
    order = torch.randperm(len(weight))
    there = torch.argsort(order)[target.clamp(min=0)].where(target >= 0, -100)
    loss, dhidden, dweight, dbias = head_results(place, (hidden, weight, bias), target, options)
    got = head_results(place, (hidden, weight[order], bias[order] + offset), there, options)
    want = (loss, dhidden, dweight[order], dbias[order])
    # the offset rounds the logits
    atol = 5e-5 * (1.0 + max(float(t.abs().max()) for t in want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=atol)


@st.composite
def labelled(draw):
    n, v = draw(rows), draw(st.integers(2, 60))
    torch.manual_seed(draw(seeds))
    ids = torch.randint(0, v, (n, draw(st.integers(1, 5).filter(lambda p: p != v))))
    ids = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    return torch.randn(n, v) * 5.0, ids, torch.rand(v) + 0.1, torch.rand(n, v) * 3.0


@interpreted
@holds_for(labelled(), st.integers(1, 4), seeds)
def test_labels_do_not_know_each_other(place, call, size, seed):
    """Lists stand for zeros and ones; rows, columns and order change nothing, "none" summed is
    "sum"; a pos_weight of one is none."""
    x, ids, weight, pos_weight = moved(place, *call)
    x.requires_grad_()
    v, order = x.shape[1], torch.randperm(x.shape[1], device=x.device)
    ones = torch.zeros(len(x), v + 1, device=x.device)
    ones = ones.scatter(1, ids.where(ids >= 0, v), 1.0)[:, :v]

    def bce(z, t, reduction="none", w=weight, pw=pos_weight):
        given = {"pos_weight": pw, "reduction": reduction, "impl": place.impl}
        return lossfuse.binary_cross_entropy_with_logits(z, t, w, **given)

    parts = zip(x.split(size), ones.split(size), pos_weight.split(size), strict=True)
    permuted = bce(x[:, order], ones[:, order], w=weight[order], pw=pos_weight[:, order])
    other_side = weight * (1.0 + (pos_weight - 1.0) * ones)
    all_ones, want = torch.ones(v, device=x.device), bce(x, ones)
    pairs = {
        "lists": (want, bce(x, ids)),
        "lists in another order": (want, bce(x, ids.flip(1))),
        "in parts": (want, torch.cat([bce(a, t, pw=w) for a, t, w in parts])),
        "permuted": (want, permuted[:, torch.argsort(order)]),
        "from the other side": (want, bce(-x, 1.0 - ones, w=other_side, pw=None)),
        "a pos_weight of one": (bce(x, ids, pw=None), bce(x, ids, pw=all_ones)),
    }
    for target in (ones, ids):
        for reduction, count in (("sum", 1), ("mean", x.numel())):
            pairs[f"{reduction} of {target.dtype}"] = want.sum() / count, bce(x, target, reduction)
    alike(pairs, x)


@interpreted
@holds_for(rows, classes, reductions, st.booleans(), seeds)
def test_losses_are_made_of_one_another(place, n, v, reduction, weighted, seed):
    x, target = logits(n, v, seed, place.device, ignored=0.3)
    w = class_weight(v, x.device) if weighted else None
    given = {"reduction": reduction, "impl": place.impl}
    # below a probability of 1
    yes, z = torch.rand(n, v, device=x.device), x.clamp(-8.0, 8.0)
    two, first = torch.stack([torch.zeros_like(z[:, 0]), z[:, 0]], 1), (target % 2).clamp(min=0)
    logp = lossfuse.log_softmax(x, 1, impl=place.impl)
    with_logits, eye = lossfuse.binary_cross_entropy_with_logits, torch.eye(v, device=x.device)
    loss = lossfuse.cross_entropy(x, target, w, **given)
    pairs = {
        "nll of log_softmax": (loss, lossfuse.nll_loss(logp, target, w, reduction=reduction)),
        "bce of sigmoid": (
            with_logits(z, yes, w, **given),
            lossfuse.binary_cross_entropy(torch.sigmoid(z), yes, w, reduction=reduction),
        ),
        "softmax of two classes": (
            lossfuse.cross_entropy(two, first, **given),
            with_logits(z[:, 0], first.to(z.dtype), **given),
        ),
        "a head of the identity": (
            loss,
            lossfuse.linear_cross_entropy(x, eye, target, weight=w, **given),
        ),
    }
    alike(pairs, x, {"rtol": 1e-4, "atol": 2e-5}, {"rtol": 1e-3, "atol": 2e-5})


# --- rows that are sharded


shard_sizes = st.integers(1, 90).flatmap(lambda v: cuts(v, most=6))
some_names = st.sets(st.sampled_from(sharded_rows.NAMES), min_size=1)


@interpreted
@not_reference
@holds_for(
    st.integers(1, 4), shard_sizes, row_options, st.booleans(), st.booleans(), seeds, some_names
)
def test_merged_shards_are_the_whole_row(place, n, sizes, options, soft, weighted, seed, names):
    v, device = sum(sizes), place.device
    x, ids = (t.detach() for t in logits_and_ids(n, v, device=device, seed=seed))
    target = probability_rows(n, v, device=device, seed=seed).detach() if soft else ids
    w = class_weight(v, device) if weighted else None
    given = (options, tuple(sizes), tuple(sorted(names)))
    sharded_rows.check(place, x, target, w, *given, over=True)


@holds_for(st.integers(2, 60).flatmap(lambda v: cuts(v, most=6)), st.integers(1, 5), seeds)
def test_merging_merged_shards_is_merging_them_all(sizes, n, seed):
    """Whichever neighbours are merged first."""
    from lossfuse.row_types import ShardRows
    from lossfuse.vocab_parallel import merge

    v, wide = sum(sizes), {"dtype": torch.float64}
    torch.manual_seed(seed)
    z = (torch.randn(n, v, **wide) * 5.0).masked_fill(torch.rand(n, v) < 0.2, -torch.inf)
    q, t = (torch.rand(n, v, **wide).masked_fill(z == -torch.inf, 0.0) for _ in range(2))
    sums = torch.ones(len(sizes), **wide)

    def rows_of(start, stop):
        part = slice(start, stop)
        top = z[:, part].amax(1)
        d = torch.where(top == -torch.inf, 0.0, top)[:, None] - z[:, part]
        e = torch.exp(-d)

        def below(of):
            return torch.where(of == 0.0, 0.0, of * d).sum(1)

        mean, a, b = below(e) / e.sum(1).clamp(min=1e-300), q[:, part], t[:, part]
        largest = z[:, part].argmax(1) + start
        of_targets = (a.sum(1), below(a), b.sum(1), below(b))
        return ShardRows(top, torch.log(e.sum(1)), None, None, *of_targets, mean, largest)

    def merged(parts, weights):
        fields = [None if c[0] is None else torch.stack(c) for c in zip(*parts, strict=True)]
        return merge.merge(ShardRows(*fields), weights)

    starts = [0, *itertools.accumulate(sizes)]
    made = [rows_of(a, b) for a, b in itertools.pairwise(starts)]
    whole, flat, at = rows_of(0, v), merged(made, sums), 1 + seed % len(sizes)
    nested = merged([merged(made[:at], sums[:at]), *made[at:]], sums[at - 1 :])
    # a row without a finite logit has no softmax
    some, close = whole.log_sum > -torch.inf, {"rtol": 1e-12, "atol": 1e-12}
    for name, want in whole._asdict().items():
        for got in (flat, nested):
            if want is not None:
                torch.testing.assert_close(getattr(got, name)[some], want[some], **close)
