"""Rows sharded by classes, in one process: the numbers of each shard, and its gradient from the
merged numbers.

The merge is written here in float64, so that backends and oracle share no code. The memory between
the rows of a shard is NaN."""

import itertools

import pytest
import torch
from torch import Tensor

from closeness import assert_formula_close, assert_gradient_close, gradient_terms
from lossfuse import reference
from lossfuse.ops import library
from lossfuse.row_types import ShardRows, Upstream, Wants
from lossfuse.spec import LossSpec
from lossfuse.vocab_parallel import merge
from options import OPTIONS
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


class ShardedRows:
    """Rows, their shards, the merged statistics and the gradients."""

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


def merged_by_the_package(cut: ShardedRows, made: list[ShardRows]):
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


def assert_merged_alike(
    cut: ShardedRows, made: list[ShardRows], stats: dict[str, Tensor], kept: Tensor
):
    """The package's merge against the one above."""
    x, target, _ = cut.whole
    got = merged_by_the_package(cut, made)
    for name in NAMES:
        assert_formula_close(getattr(got, name), stats[name])
    assert torch.equal(got.argmax, stats["argmax"])
    # the numbers of a row whose id is no class are not compared
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


def wanted(cut: ShardedRows, upstream: Upstream):
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


def assert_gradients(cut: ShardedRows, upstream: Upstream, got, want):
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
    cut = ShardedRows(place, x, target, w, options, sizes, **keywords)
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
