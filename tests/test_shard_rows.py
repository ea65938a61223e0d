"""Rows whose classes are cut into shards, in one process: what each shard says of them, and its
gradient from the merged numbers.

The merge stands here in float64, so that the backends are judged by nothing they share. Between the
shards' rows lie NaNs."""

import itertools

import pytest
import torch
from torch import Tensor

import mutants
from closeness import assert_formula_close, assert_gradient_close, gradient_terms
from lossfuse import reference
from lossfuse.ops import library
from lossfuse.row_types import ShardRows, Upstream, Wants
from lossfuse.spec import LossSpec
from lossfuse.vocab_parallel import merge
from options import EVERYTHING, OPTIONS, options_of
from rows import logits_and_ids, probabilities

INF, NAN = float("inf"), float("nan")
LOWEST = torch.finfo(torch.float32).min
ALL = Wants(entropy=True, argmax=True)
NAMES = ("loss", "lse", "target_logprob", "entropy")
ROW_OPTIONS = [name for name in OPTIONS if name not in ("sum", "none", "normalizer")]
SINGLE = [*((name,) for name in ROW_OPTIONS), ("weight", "smoothing")]
SOFT = pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
# sizes of shards: within a block, and beyond one
FEW = (20, 1, 19)
MANY = (2100, 1, 330)
MARGIN = 3


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


class Shard:
    """Classes from ``first`` on, in memory of their own with NaN around every row."""

    def __init__(self, logits, target, weight, first, v, base=0):
        self.first, self.v = first + base, v
        self.memory = torch.full(
            (len(logits), v + 2 * MARGIN), NAN, dtype=logits.dtype, device=logits.device
        )
        self.logits = self.memory[:, MARGIN : MARGIN + v]
        self.logits.copy_(logits[:, first : first + v])
        self.target = target[:, first : first + v] if target.is_floating_point() else target + base
        self.weight = None if weight is None else weight[first : first + v]

    def over(self, dtype):
        """A narrower gradient over the first bytes of each row."""
        ratio = self.memory.element_size() // dtype.itemsize
        return self.memory.view(dtype)[:, ratio * MARGIN : ratio * MARGIN + self.v]

    @property
    def margins(self):
        return torch.cat([self.memory[:, :MARGIN], self.memory[:, MARGIN + self.v :]], 1)


class Cut:
    """A tensor of rows as its shards see it, and what is made of it."""

    def __init__(
        self,
        place,
        logits,
        target,
        weight=None,
        options=None,
        sizes=FEW,
        *,
        base=0,
        ignore_index=-100,
    ):
        assert sum(sizes) == logits.shape[1]
        self.backend = library.backend(place.impl, sharded=True).backend
        self.whole = logits, target, weight
        self.soft = target.is_floating_point()
        self.options, self.ignore_index, self.num_classes = (
            options or {},
            ignore_index,
            base + sum(sizes),
        )
        starts = [0, *itertools.accumulate(sizes)]
        self.shards = [
            Shard(logits, target, weight, first, v, base)
            for first, v in zip(starts, sizes, strict=False)
        ]

    def spec(self, shard=None):
        place = (
            {} if shard is None else {"first_class": shard.first, "num_classes": self.num_classes}
        )
        return LossSpec(ignore_index=self.ignore_index, **self.options, **place)

    def rows(self, wants=ALL, given=True):
        """Of each shard."""
        return [
            self.backend.shard_rows(
                s.logits, s.target, s.weight, self.spec(s), wants, given and self.soft
            )
            for s in self.shards
        ]

    def forward(self, made=None):
        """Merged statistics, and (5, N) numbers for the gradient."""
        made = made or self.rows()
        _, target, weight = self.whole
        row = merged(made, self.shards, self.soft)
        return self.statistics(row, made, None if self.soft else target), self.numbers(row, weight)

    def statistics(self, row, made, ids):
        top, log_sum, mean, mass, shortfall, given_mass, given_shortfall, z_y, w_y = row
        c, smoothing = self.num_classes, self.options.get("label_smoothing", 0.0)
        if self.soft:
            loss = mass * log_sum + shortfall
            logprob = -(given_mass * log_sum + given_shortfall)
        else:
            logprob = (z_y - top) - log_sum
            loss = -(1.0 - smoothing) * w_y * logprob
            if smoothing:
                loss = loss + smoothing / c * (mass * log_sum + shortfall)
        lse = torch.where(top == INF, top, top + log_sum)
        loss = loss + self.options.get("lse_square_scale", 0.0) * lse**2
        stats = {"loss": loss, "lse": lse, "target_logprob": logprob, "entropy": log_sum + mean}
        # the first shard that has the maximum, and anything finite at all
        best = torch.stack([torch.where(m.log_sum == -INF, -INF, m.row_max) for m in made]).argmax(
            0
        )
        classes = torch.stack(
            [
                m.argmax + s.first - self.shards[0].first
                for m, s in zip(made, self.shards, strict=True)
            ]
        )
        argmax = classes.gather(0, best[None])[0]
        if ids is None:
            return stats | {"argmax": argmax}
        ignored = ids == self.ignore_index
        valid = ~ignored & (ids >= 0) & (ids < self.whole[0].shape[1])
        stats = {
            name: torch.where(valid, value, torch.where(ignored, 0.0, NAN))
            for name, value in stats.items()
        }
        return stats | {"argmax": torch.where(valid, argmax, -2 if self.ignore_index == -1 else -1)}

    def numbers(self, row, weight):
        top, log_sum, mean, mass, _, given_mass, _, _, w_y = row
        if self.soft:
            return torch.stack([top, log_sum, mass, given_mass, mean]).float()
        total = (
            torch.full_like(top, self.num_classes)
            if weight is None
            else weight.double().sum().expand_as(top)
        )
        return torch.stack([top, log_sum, mean, w_y, total]).float()

    def backward(self, kept, upstream, dlogits="new", dtype=None):
        """Gradients of the whole rows: in new memory, over the logits, or over their first
        bytes."""
        dx, dt = [], []
        for s in self.shards:
            made = s.logits
            if dlogits == "new":
                made = torch.full(
                    (len(s.logits), s.v), NAN, dtype=dtype or s.logits.dtype, device=s.logits.device
                )
            elif dtype is not None:
                made = s.over(dtype)
            dtarget = torch.full(s.target.shape, NAN, device=s.target.device) if self.soft else None
            self.backend.shard_grads(
                s.logits, s.target, s.weight, kept, upstream, self.spec(s), made, dtarget
            )
            assert s.margins.isnan().all()
            dx.append(made)
            dt.append(dtarget)
        return torch.cat(dx, 1), torch.cat(dt, 1) if self.soft else None


def merged(made: list[ShardRows], cut: list[Shard], soft: bool) -> list[Tensor | None]:
    """The numbers of whole rows in float64; a shard without a finite logit adds nothing."""

    def of(name):
        return torch.stack([getattr(m, name).double() for m in made])

    tops, log_sums = of("row_max"), of("log_sum")
    top, at = tops.clamp(min=LOWEST).max(0)
    others = (tops - top + log_sums).exp().scatter(0, at[None], 0.0).sum(0)
    log_sum = torch.log1p(torch.expm1(log_sums.gather(0, at[None])[0]) + others)
    share = (tops - top + log_sums - log_sum).exp()
    mean = torch.where(share == 0.0, 0.0, share * (of("mean_shortfall") + (top - tops))).sum(0)

    def moved(masses, shortfall):
        return (of(shortfall) + torch.where(masses == 0.0, 0.0, masses * (top - tops))).sum(0)

    if soft:
        assert all(m.target_logit is None and m.target_weight is None for m in made)
        mass, given = of("mass"), of("given_mass")
        sums = mass.sum(0), moved(mass, "shortfall"), given.sum(0), moved(given, "given_shortfall")
        return [top, log_sum, mean, *sums, None, None]
    assert all(m.mass is None and m.given_mass is None and m.given_shortfall is None for m in made)
    z_y = of("target_logit").sum(0)
    w_y = torch.ones_like(top) if made[0].target_weight is None else of("target_weight").sum(0)
    mass, shortfall = None, None
    if made[0].shortfall is not None:
        sums = [
            torch.tensor(s.v, dtype=top.dtype)
            if s.weight is None
            else s.weight.double().sum().cpu()
            for s in cut
        ]
        masses = torch.stack(sums).to(top)[:, None].expand_as(tops)
        mass, shortfall = masses.sum(0), moved(masses, "shortfall")
    return [top, log_sum, mean, mass, shortfall, None, None, z_y, w_y]


def merged_by_the_package(cut: Cut, made: list[ShardRows]):
    """In float32 and without a look at the classes."""
    x, target, _ = cut.whole
    sums = torch.stack(
        [x.new_tensor(s.v) if s.weight is None else s.weight.sum() for s in cut.shards]
    ).float()
    columns = [m._replace(argmax=m.argmax + s.first) for m, s in zip(made, cut.shards, strict=True)]
    row = merge.merge(
        ShardRows(*(None if c[0] is None else torch.stack(c) for c in zip(*columns, strict=True))),
        sums,
    )
    return merge.row_stats(row, target, sums.sum(), cut.spec(), cut.num_classes)


def assert_merged_alike(cut: Cut, made: list[ShardRows], stats: dict[str, Tensor], kept: Tensor):
    """The package's merge against the one above."""
    x, target, _ = cut.whole
    got = merged_by_the_package(cut, made)
    for name in NAMES:
        assert_formula_close(getattr(got, name), stats[name])
    assert torch.equal(got.argmax, stats["argmax"])
    # numbers of a row whose id is no class are nobody's
    ignored = (
        torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if cut.soft
        else target == cut.ignore_index
    )
    read = ~(stats["lse"].isnan() | ignored)
    assert_formula_close(got.saved[:, read], kept[:, read])


def upstream_of(n, names=NAMES, device="cpu"):
    """A number of its own for each row and statistic."""
    table = torch.randn(len(NAMES), n, generator=torch.Generator().manual_seed(5)).to(device)
    return Upstream(
        *(table[i].contiguous() if name in names else None for i, name in enumerate(NAMES))
    )


def case(soft, n, v, device, dtype=torch.float32, ignored=0.25):
    x, target = (t.detach() for t in logits_and_ids(n, v, dtype, device, ignored=ignored))
    return x, (probabilities(n, v, torch.float32, device).detach() if soft else target)


def wanted(cut: Cut, upstream: Upstream):
    """(statistics, gradient of the logits, gradient of the probabilities) of the whole rows, by the
    definition in float64."""
    x, target, weight = cut.whole
    leaves = [
        x.double().requires_grad_(),
        *([target.double().requires_grad_()] if cut.soft else []),
    ]
    stats = reference.row_stats(leaves[0], leaves[-1] if cut.soft else target, weight, cut.spec())
    total = sum(
        (u.double() * getattr(stats, name)).sum()
        for name, u in zip(NAMES, upstream, strict=True)
        if u is not None
    )
    dx, *dt = torch.autograd.grad(total, leaves, allow_unused=True)
    return stats, dx, dt[0] if dt and dt[0] is not None else torch.zeros_like(leaves[-1])


def assert_gradients(cut: Cut, upstream: Upstream, got, want):
    x, target, weight = cut.whole
    given = [u for u in upstream if u is not None]
    assert_gradient_close(
        got[0], want[0], terms=gradient_terms(x.double(), target, weight, cut.options, given)
    )
    if cut.soft:
        assert_gradient_close(got[1], want[1], terms=sum(u.abs() for u in given).double()[:, None])


def check(
    place,
    x,
    target,
    w=None,
    options=None,
    sizes=FEW,
    names=NAMES,
    dtype=None,
    over=False,
    **keywords,
):
    """Statistics, and gradients in memory of their own, then where asked the same over the logits;
    returns the statistics."""
    cut = Cut(place, x, target, w, options, sizes, **keywords)
    upstream = upstream_of(len(x), names, x.device)
    made = cut.rows()
    got, kept = cut.forward(made)
    assert_merged_alike(cut, made, got, kept)
    stats, *want = wanted(cut, upstream)
    for name in NAMES:
        assert_formula_close(got[name], getattr(stats, name).detach())
    if "softcap" not in cut.options:
        # a cap rounds the largest to ties
        assert torch.equal(got["argmax"], stats.argmax)
    grads = cut.backward(kept, upstream, dtype=dtype)
    assert_gradients(cut, upstream, grads, want)
    if over:
        assert torch.equal(cut.backward(kept, upstream, "over")[0], grads[0])
    return got


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
def test_cuts(thrifty, sizes, soft):
    check(
        thrifty, *case(soft, 2, sum(sizes), thrifty.device), None, {"label_smoothing": 0.1}, sizes
    )


@SOFT
@pytest.mark.parametrize(
    "names", [*((name,) for name in NAMES), ("loss", "entropy"), NAMES[1:]], ids="+".join
)
@pytest.mark.parametrize("given", [(), EVERYTHING], ids=["plain", "every option"])
def test_upstreams_alone_and_together(thrifty, names, given, soft):
    w, options = options_of(given, sum(FEW), thrifty.device)
    check(thrifty, *case(soft, 2, sum(FEW), thrifty.device), w, options, names=names)


@SOFT
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_what_is_not_needed_is_none_and_changes_nothing(thrifty, weighted, smoothing, soft):
    w, options = options_of(
        [*["weight"] * weighted, *["smoothing"] * bool(smoothing)], sum(FEW), thrifty.device
    )
    x, target = case(soft, 2, sum(FEW), thrifty.device, ignored=0.0)
    cut = Cut(thrifty, x, target, w, options)
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
    cut = Cut(here, *case(soft, 2, sum(FEW), here.device, ignored=0.0), w, options)
    _, kept = cut.forward()
    upstream = upstream_of(2, NAMES[:2], here.device)
    want = cut.backward(kept, upstream)
    # mean shortfall, and of probabilities the mass as given
    kept[[3, 4] if soft else [2]] = 0.0
    for got, same in zip(cut.backward(kept, upstream), want, strict=True):
        assert got is same is None or torch.equal(got, same)


@SOFT
def test_no_rows(here, soft):
    x, target = case(soft, 1, sum(FEW), here.device)
    cut = Cut(here, x[:0], target[:0])
    for made in cut.rows():
        assert {len(t) for t in made if t is not None} == {0}
    cut.backward(torch.empty(5, 0, device=here.device), upstream_of(0, NAMES, here.device))


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
    cut = Cut(place, x, target, w, options, ignore_index=ignore_index)
    got, kept = cut.forward()
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
    near, far = Cut(here, x, target), Cut(here, x, target, base=2**32)
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
def test_rows_without_a_finite_logit(thrifty, soft):
    x, target = case(soft, 2, sum(FEW), thrifty.device, ignored=0.0)
    x[:] = -INF
    cut = Cut(thrifty, x, target)
    got, kept = cut.forward()
    assert got["lse"].tolist() == [-INF] * 2
    assert all(got[name].isnan().all() for name in ("loss", "target_logprob", "entropy"))
    assert all(0 <= int(i) < sum(FEW) for i in got["argmax"])
    assert cut.backward(kept, upstream_of(2, NAMES, thrifty.device))[0].isnan().all()


@SOFT
def test_rows_filled_with_the_lowest_number(thrifty, soft):
    """As masks fill them; maxima start there. Of the second row, the first shard has not even
    these."""
    x, target = case(soft, 3, sum(FEW), thrifty.device, ignored=0.0)
    x[:] = LOWEST
    x[1, : FEW[0]] = -INF
    x[2, -1] = 0.0
    if soft:
        target = torch.zeros_like(target)
        target[:, -1] = 1.0
    else:
        target[:] = sum(FEW) - 1
    cut = Cut(thrifty, x, target)
    got, kept = cut.forward()
    assert got["argmax"].tolist() == [0, FEW[0], sum(FEW) - 1]
    equal = torch.tensor(
        [sum(FEW), sum(FEW[1:]), 1], dtype=torch.float64, device=thrifty.device
    ).log()
    for name, want in (("loss", equal), ("target_logprob", -equal), ("entropy", equal)):
        assert_formula_close(got[name], want)
    dx, _ = cut.backward(kept, upstream_of(3, ("entropy",), thrifty.device))
    assert (dx == 0.0).all()


@SOFT
@pytest.mark.parametrize("value", [NAN, INF])
def test_undefined_rows(thrifty, value, soft):
    """In the shard of the target and in another."""
    x, target = case(soft, 3, sum(FEW), thrifty.device, ignored=0.0)
    x[0, 3] = value
    x[1, -1] = value
    cut = Cut(thrifty, x, target)
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
@pytest.mark.parametrize("at", [(0, 20), (19, 20, 21), (20, 39), (37, 38)], ids=str)
def test_the_first_of_ties(thrifty, at, soft):
    x, target = case(soft, 1, sum(FEW), thrifty.device, ignored=0.0)
    x = x.clamp(-8.0, 8.0)
    x[:, at] = 9.0
    assert check(thrifty, x, target)["argmax"].tolist() == [at[0]]


def check_a_confident_row(place, sizes, margin, soft):
    v = sum(sizes)
    x = torch.zeros(3, v, device=place.device)
    y = torch.tensor([0, sizes[0], v - 1], device=place.device)
    x[torch.arange(3), y] = margin
    target = torch.nn.functional.one_hot(y, v).float() if soft else y
    cut = Cut(place, x, target, sizes=sizes)
    got, kept = cut.forward()
    # log1p wplace log_softmax has no digits left
    others = (v - 1) * torch.exp(-torch.tensor(margin, dtype=torch.float64))
    log_sum = torch.log1p(others)
    rtol = 1e-6 if place.device == "cpu" else 1e-5
    for name, want in (
        ("loss", log_sum),
        ("target_logprob", -log_sum),
        ("entropy", log_sum + others * margin / (1.0 + others)),
    ):
        torch.testing.assert_close(got[name].cpu(), want.expand(3), rtol=rtol, atol=0.0)
    dx, _ = cut.backward(kept, Upstream(torch.ones(3, device=place.device)))
    want_dx = torch.full(
        (3, v), torch.exp(-margin - log_sum).item(), dtype=torch.float64, device=place.device
    )
    want_dx[torch.arange(3), y] = -(others / (1.0 + others)).item()
    # masses are sums of probabilities: 1 to a rounding error each
    assert_gradient_close(dx, want_dx, terms=1.2e-2 if soft and margin < 10 else 0.0)


@SOFT
def test_a_confident_row_keeps_its_digits(here, soft):
    check_a_confident_row(here, FEW, 17.0, soft)


@SOFT
@pytest.mark.parametrize("margin", [5.0, 17.0, 80.0])
def test_confident_rows_of_several_blocks(thrifty, margin, soft):
    check_a_confident_row(thrifty, (2100, 300), margin, soft)


@SOFT
@pytest.mark.parametrize("offset", [2.0**20, -(2.0**24)])
def test_a_common_offset_cancels_exactly(thrifty, offset, soft):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (2, sum(MANY)), generator=g).float().to(thrifty.device) * 2
    target = case(soft, 2, sum(MANY), thrifty.device, ignored=0.0)[1]
    near, far = Cut(thrifty, x, target, sizes=MANY), Cut(thrifty, x + offset, target, sizes=MANY)
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
    cut = Cut(here, *case(soft, 1, sum(MANY), here.device), w, options, MANY)
    _, kept = cut.forward()
    upstream = upstream_of(1, NAMES, here.device)
    want, want_dt = cut.backward(kept, upstream)
    dx, dt = cut.backward(kept, upstream, "over", dtype)
    assert_gradient_close(dx, want)
    assert not soft or torch.equal(dt, want_dt)


@SOFT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(thrifty, dtype, soft):
    """Read as they are; what is stored is float32, which the interpreter does not round."""
    w, options = options_of(EVERYTHING, sum(FEW), thrifty.device)
    check(thrifty, *case(soft, 3, sum(FEW), thrifty.device, dtype), w, options, dtype=torch.float32)


@SOFT
def test_one_upstream_for_all_rows(thrifty, soft):
    """An expanded scalar, as from .sum()."""
    cut = Cut(
        thrifty,
        *case(soft, 4, sum(FEW), thrifty.device),
        *options_of(("z-loss",), sum(FEW), thrifty.device),
    )
    _, kept = cut.forward()
    one = torch.tensor(0.3, device=thrifty.device)
    got, want = (cut.backward(kept, Upstream(*(u,) * 4)) for u in (one.expand(4), one.repeat(4)))
    assert all(g is w is None or torch.equal(g, w) for g, w in zip(got, want, strict=True))


@SOFT
def test_any_strides(here, soft):
    x, target = case(soft, 2, 40, here.device)
    cut, apart = Cut(here, x, target, sizes=(40,)), Cut(here, x, target, sizes=(40,))
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


def test_ours_is_no_mutant(here):
    x, target = logits_and_ids(5, sum(FEW), device=here.device)
    target[0] = -100
    x = x.detach()
    options = {
        "label_smoothing": mutants.SMOOTHING,
        "lse_square_scale": mutants.Z_SCALE,
        "softcap": mutants.SOFTCAP,
    }
    cut = Cut(here, x, target, None, options)
    grad, _ = cut.backward(cut.forward()[1], Upstream((1.0 / (target != -100).sum()).expand(5)))
    assert_gradient_close(grad, mutants.gradient(x, target), terms=1e-3)
    for mutant in mutants.MUTANTS.values():
        with pytest.raises(AssertionError):
            assert_gradient_close(grad, mutant(x, target), terms=1e-3)


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
    cut = Cut(here, *case(False, 2, sum(FEW), here.device, ignored=0.0), w, options)
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
