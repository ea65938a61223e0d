"""Rows sharded by classes, in one process: the numbers of each shard, and its gradient from the
merged numbers. ``sharded_rows`` has the merge in float64 and the check."""

import itertools

import pytest
import torch

from closeness import assert_formula_close, assert_gradient_close, gradient_terms
from lossfuse.row_types import Upstream, Wants
from lossfuse.spec import LossSpec
from options import EVERYTHING, options_of
from sharded_rows import (
    FEW,
    INF,
    MANY,
    NAMES,
    NAN,
    SINGLE,
    SOFT,
    ShardedRows,
    assert_gradients,
    assert_merged_alike,
    case,
    check,
    merged_by_the_package,
    upstream_of,
    wanted,
)


@pytest.fixture
def here(fast_place):
    if fast_place.impl == "triton":
        pytest.importorskip("triton")
    return fast_place


@pytest.fixture
def thrifty(thrifty_fast_place):
    """As ``here``, but in the interpreter only if slow tests are asked for."""
    if thrifty_fast_place.impl == "triton":
        pytest.importorskip("triton")
    return thrifty_fast_place


@SOFT
@pytest.mark.parametrize("given", [(), EVERYTHING], ids=["plain", "every option"])
def test_values_and_gradients(here, given, soft):
    w, options = options_of(given, sum(FEW), here.device)
    check(here, *case(soft, 2, sum(FEW), here.device), w, options, over=True)


@SOFT
@pytest.mark.parametrize("names", SINGLE, ids="+".join)
def test_each_option(thrifty, names, soft):
    w, options = options_of(names, sum(FEW), thrifty.device)
    check(thrifty, *case(soft, 3, sum(FEW), thrifty.device), w, options)


@SOFT
@pytest.mark.parametrize("given", [(), EVERYTHING], ids=["plain", "every option"])
def test_shards_of_several_blocks(here, given, soft):
    w, options = options_of(given, sum(MANY), here.device)
    check(here, *case(soft, 2, sum(MANY), here.device), w, options, MANY, over=True)


@SOFT
@pytest.mark.parametrize("sizes", [(1,), (40,), (1, 39), (39, 1), (20, 20), (1,) * 8], ids=str)
def test_any_sizes_of_shards(thrifty, sizes, soft):
    check(
        thrifty, *case(soft, 2, sum(sizes), thrifty.device), None, {"label_smoothing": 0.1}, sizes
    )


@SOFT
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_what_is_not_needed_is_none_and_changes_nothing(thrifty, weighted, smoothing, soft):
    w, options = options_of(
        [*["weight"] * weighted, *["smoothing"] * bool(smoothing)], sum(FEW), thrifty.device
    )
    x, target = case(soft, 2, sum(FEW), thrifty.device, ignored=0.0)
    cut = ShardedRows(thrifty, x, target, w, options)
    everything = cut.rows()
    for entropy, argmax, given in itertools.product([False, True], repeat=3):
        needed = {
            "row_max": True,
            "log_sum": True,
            "target_logit": not soft,
            "target_weight": not soft and weighted,
            "mass": soft,
            "shortfall": soft or smoothing > 0,
            "given_mass": soft and given,
            "given_shortfall": soft and given,
            "mean_shortfall": entropy,
            "argmax": argmax,
        }
        for some, every in zip(cut.rows(Wants(entropy, argmax), given), everything, strict=True):
            for name, value in some._asdict().items():
                assert (value is not None) == needed[name], name
                if value is not None:
                    assert value.dtype == (
                        torch.int64 if name == "argmax" else torch.float32
                    ) and value.shape == (2,)
                    assert torch.equal(value, getattr(every, name)), name


@SOFT
def test_numbers_that_no_upstream_needs_change_nothing(here, soft):
    w, options = options_of(EVERYTHING, sum(FEW), here.device)
    cut = ShardedRows(here, *case(soft, 2, sum(FEW), here.device, ignored=0.0), w, options)
    _, kept = cut.forward()
    upstream = upstream_of(2, NAMES[:2], here.device)
    want = cut.backward(kept, upstream)
    # mean shortfall, and of probabilities the mass as given
    kept[[3, 4] if soft else [2]] = 0.0
    for got, same in zip(cut.backward(kept, upstream), want, strict=True):
        assert got is same is None or torch.equal(got, same)


def test_the_ends_of_shards(here):
    """Ids one before, at, and one behind every cut: of a padded block the next shard's classes are
    out of bounds."""
    sizes = (130, 1, 29)
    ends = [
        i
        for first in itertools.accumulate(sizes, initial=0)
        for i in (first - 1, first, first + 1)
        if 0 <= i < sum(sizes)
    ]
    target = torch.tensor(ends, device=here.device)
    x, _ = case(False, len(ends), sum(sizes), here.device)
    w, options = options_of(("weight",), sum(sizes), here.device)
    check(here, x, target, w, options, sizes)


def check_ignored_and_bad_ids(place, given, ignore_index, bad):
    v = sum(FEW)
    target = torch.tensor([5, ignore_index, v - 1, *bad], device=place.device)
    w, options = options_of(given, v, place.device)
    x, _ = case(False, len(target), v, place.device)
    x[1] = NAN
    cut = ShardedRows(place, x, target, w, options, ignore_index=ignore_index)
    made = cut.rows()
    got, kept = cut.forward(made)
    assert_merged_alike(cut, made, got, kept)
    upstream = upstream_of(len(x), NAMES, place.device)
    stats, want, _ = wanted(cut, upstream)
    undefined = [False] * 3 + [True] * len(bad)
    for name in NAMES:
        assert_formula_close(got[name], getattr(stats, name).detach())
        assert got[name].isnan().tolist() == undefined and got[name][1] == 0.0
    assert torch.equal(got["argmax"], stats.argmax)
    dx, _ = cut.backward(kept, upstream, "over")
    # of no row that is not read
    assert_gradient_close(
        dx, want, terms=gradient_terms(x.nan_to_num(0.0).double(), target, w, options, [*upstream])
    )
    assert (dx[1] == 0.0).all()
    assert dx.isnan().all(1).tolist() == undefined and dx.isnan().any(1).tolist() == undefined


@pytest.mark.parametrize("ignore_index", [-100, 25])
def test_ignored_and_bad_ids(here, ignore_index):
    v = sum(FEW)
    check_ignored_and_bad_ids(here, ("weight", "smoothing"), ignore_index, [-5, v, 2**32 + 5])


@pytest.mark.parametrize("ignore_index", [-1, 3])
@pytest.mark.parametrize("given", [(), EVERYTHING], ids=["plain", "every option"])
def test_more_bad_ids(thrifty, given, ignore_index):
    v = sum(FEW)
    bad = [
        -2,
        v + 1,
        v + 100,
        2**31 - 1,
        2**31,
        2**32,
        2**32 + v - 1,
        2**63 - 1,
        -(2**63),
        -(2**31),
    ]
    check_ignored_and_bad_ids(thrifty, given, ignore_index, bad)


def test_ids_beyond_32_bits(here):
    """Of classes so far along that an id cut to 32 bits would be another one of the same shard."""
    x, target = case(False, 2, sum(FEW), here.device, ignored=0.0)
    near, far = ShardedRows(here, x, target), ShardedRows(here, x, target, base=2**32)
    (want, kept), (got, far_kept) = near.forward(), far.forward()
    assert all(torch.equal(want[name], got[name]) for name in want)
    upstream = upstream_of(2, NAMES, here.device)
    assert torch.equal(near.backward(kept, upstream)[0], far.backward(far_kept, upstream)[0])


def check_shards_without_a_finite_logit(place, sizes, given, soft):
    """Each of them, and all but the second."""
    _, options = options_of(given, sum(sizes), place.device)
    nowhere = -INF if options.get("logit_scale", 1.0) > 0 else INF
    starts = [*itertools.accumulate(sizes, initial=0)]
    x, target = case(soft, len(sizes) + 1, sum(sizes), place.device, ignored=0.0)
    if not soft:
        target = torch.tensor(
            [*(first % sum(sizes) for first in starts[1:]), starts[1]], device=place.device
        )
    for row, (first, last) in enumerate(itertools.pairwise(starts)):
        x[row, first:last] = nowhere
    x[-1, : starts[1]] = x[-1, starts[2] :] = nowhere
    if soft:
        target[x.isinf()] = 0.0
    check(place, x, target, None, options, sizes)


@SOFT
def test_shards_without_a_finite_logit(here, soft):
    check_shards_without_a_finite_logit(here, FEW, (), soft)


@SOFT
@pytest.mark.parametrize("given", [("softcap",), ("negative scale",), ("weight",)], ids="+".join)
@pytest.mark.parametrize("sizes", [FEW, (2100, 300)], ids=["few", "several blocks"])
def test_more_shards_without_a_finite_logit(thrifty, sizes, given, soft):
    check_shards_without_a_finite_logit(thrifty, sizes, given, soft)


@SOFT
@pytest.mark.parametrize("at", [(0, 20), (19, 20, 21), (20, 39), (37, 38)], ids=str)
def test_the_first_of_ties(thrifty, at, soft):
    x, target = case(soft, 1, sum(FEW), thrifty.device, ignored=0.0)
    x = x.clamp(-8.0, 8.0)
    x[:, at] = 9.0
    assert check(thrifty, x, target)["argmax"].tolist() == [at[0]]


@SOFT
@pytest.mark.parametrize("offset", [2.0**20, -(2.0**24)])
def test_a_common_offset_cancels_exactly(thrifty, offset, soft):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (2, sum(MANY)), generator=g).float().to(thrifty.device) * 2
    target = case(soft, 2, sum(MANY), thrifty.device, ignored=0.0)[1]
    near, far = (
        ShardedRows(thrifty, x, target, sizes=MANY),
        ShardedRows(thrifty, x + offset, target, sizes=MANY),
    )
    (want, kept), (got, far_kept) = near.forward(), far.forward()
    for name in ("loss", "target_logprob", "entropy", "argmax"):
        assert torch.equal(want[name], got[name]), name
    upstream = upstream_of(2, NAMES, thrifty.device)
    assert torch.equal(near.backward(kept, upstream)[0], far.backward(far_kept, upstream)[0])


@SOFT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrower_gradient_over_the_logits(here, dtype, soft):
    """A program goes up its row: 2 bytes of gradient over 4 of logits that it has read."""
    w, options = options_of(EVERYTHING, sum(MANY), here.device)
    cut = ShardedRows(here, *case(soft, 1, sum(MANY), here.device), w, options, MANY)
    _, kept = cut.forward()
    upstream = upstream_of(1, NAMES, here.device)
    want, want_dt = cut.backward(kept, upstream)
    dx, dt = cut.backward(kept, upstream, "over", dtype)
    assert_gradient_close(dx, want)
    assert not soft or torch.equal(dt, want_dt)


@SOFT
def test_any_strides(here, soft):
    x, target = case(soft, 2, 40, here.device)
    cut, apart = (
        ShardedRows(here, x, target, sizes=(40,)),
        ShardedRows(here, x, target, sizes=(40,)),
    )
    (shard,) = apart.shards
    shard.logits = x.t().contiguous().t()
    shard.target = target.t().contiguous().t()
    (want,), (got,) = cut.rows(), apart.rows()
    valid = slice(None) if soft else target != -100
    for name, value in want._asdict().items():
        if value is not None:
            assert_formula_close(getattr(got, name)[valid], value[valid])
    _, kept = cut.forward()
    upstream = upstream_of(2, NAMES, here.device)
    want_dx, want_dt = cut.backward(kept, upstream)
    dx, dt = apart.backward(kept, upstream, "over")
    assert_gradient_close(dx, want_dx)
    if soft:
        assert_gradient_close(dt, want_dt)


def _own_numbers(cut, kept, made, s):
    return torch.stack([made.row_max, made.log_sum, *kept[2:]])


def _own_smoothing(cut, kept, made, s):
    total = torch.full_like(kept[4], s.v) if s.weight is None else s.weight.sum().expand_as(kept[4])
    return torch.stack([*kept[:4], total])


# a mistake in the numbers that a shard gets, or in where it thinks it is
MISTAKES = {
    "the shard's own log-sum": (_own_numbers, lambda s: {}),
    "the shard's own class weights": (_own_smoothing, lambda s: {}),
    "a target of no weight": (
        lambda cut, kept, made, s: torch.stack([*kept[:3], torch.zeros_like(kept[3]), kept[4]]),
        lambda s: {},
    ),
    "another row's numbers": (lambda cut, kept, made, s: kept.roll(1, 1), lambda s: {}),
    "another shard's place": (
        lambda cut, kept, made, s: kept,
        lambda s: {"first_class": s.first + 1},
    ),
    "smoothing over the shard": (
        lambda cut, kept, made, s: kept,
        lambda s: {"num_classes": s.first + s.v},
    ),
}


def test_the_comparison_rejects(here):
    w, options = options_of(EVERYTHING, sum(FEW), here.device)
    cut = ShardedRows(here, *case(False, 2, sum(FEW), here.device, ignored=0.0), w, options)
    made = cut.rows()
    _, kept = cut.forward(made)
    upstream = upstream_of(2, ("loss",), here.device)
    want = wanted(cut, upstream)[1:]

    def grads(numbers, place):
        found = []
        for s, m in zip(cut.shards, made, strict=True):
            spec = LossSpec(
                **options, **{"first_class": s.first, "num_classes": cut.num_classes} | place(s)
            )
            found.append(torch.empty(2, s.v, device=here.device))
            cut.backend.shard_grads(
                s.logits,
                s.target,
                s.weight,
                numbers(cut, kept, m, s),
                upstream,
                spec,
                found[-1],
                None,
            )
        return torch.cat(found, 1), None

    assert_gradients(cut, upstream, grads(lambda cut, kept, made, s: kept, lambda s: {}), want)
    for mistake in MISTAKES.values():
        with pytest.raises(AssertionError, match="entries differ"):
            assert_gradients(cut, upstream, grads(*mistake), want)


@SOFT
@pytest.mark.parametrize("value", [NAN, INF])
def test_undefined_rows(thrifty, value, soft):
    """In the shard of the target and in another."""
    x, target = case(soft, 3, sum(FEW), thrifty.device, ignored=0.0)
    x[0, 3] = value
    x[1, -1] = value
    cut = ShardedRows(thrifty, x, target)
    got, kept = cut.forward()
    stats = merged_by_the_package(cut, cut.rows())
    for name in NAMES:
        for t in (got[name], getattr(stats, name)):
            undefined = t == INF if name == "lse" and value == INF else t.isnan()
            assert undefined.tolist() == [True, True, False], name
    assert cut.backward(kept, upstream_of(3, NAMES, thrifty.device))[0].isnan().any(1).tolist() == [
        True,
        True,
        False,
    ]


@SOFT
@pytest.mark.parametrize(("margin", "offset"), [(5.0, 0.0), (17.0, 2.0**13), (80.0, 0.0)])
@pytest.mark.parametrize("sizes", [FEW, (2100, 300)], ids=["few", "several blocks"])
def test_confident_rows_stay_accurate(thrifty, sizes, margin, offset, soft):
    v, device = sum(sizes), thrifty.device
    y = torch.tensor([0, sizes[0], v - 1], device=device)
    x = torch.full((3, v), offset, device=device)
    x[torch.arange(3), y] += margin
    target = torch.nn.functional.one_hot(y, v).float() if soft else y
    rows = ShardedRows(thrifty, x, target, sizes=sizes)
    got, kept = rows.forward()
    # log1p, where log_softmax is not accurate
    others = (v - 1) * torch.exp(-torch.tensor(margin, dtype=torch.float64))
    log_sum = torch.log1p(others)
    entropy = log_sum + others * margin / (1.0 + others)
    rtol = 1e-6 if device == "cpu" else 1e-5
    for name, want in (("loss", log_sum), ("target_logprob", -log_sum), ("entropy", entropy)):
        torch.testing.assert_close(got[name].cpu(), want.expand(3), rtol=rtol, atol=0.0)
    dx, _ = rows.backward(kept, Upstream(torch.ones(3, device=device)))
    elsewhere = torch.exp(-margin - log_sum).item()
    want_dx = torch.full((3, v), elsewhere, dtype=torch.float64, device=device)
    want_dx[torch.arange(3), y] = -(others / (1.0 + others)).item()
    # masses are sums of probabilities: 1 to a rounding error each
    assert_gradient_close(dx, want_dx, terms=1.2e-2 if soft and margin < 10 else 0.0)
