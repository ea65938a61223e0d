"""Losses whose classes are cut among the ranks of a group: what goes over the wire, and a backend made of one for a shard.

A forward gathers a few numbers a row from every rank, in one collective; merged (``shards``), they are the same on every rank, and a
gradient is made of them without another. With them goes what tells whether the ranks do the same thing: where their shards lie, how their
targets sum up, whether one of them is bad. On a CPU, and within ``debug_targets``, every rank looks at it and raises the same error;
elsewhere all that is returned is NaN.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .row_stats import RowStats, ShardRows, Upstream, Wants
from .shards import merge, nothing, row_stats
from .spec import LossSpec
from .targets import debugging, values_are_at_hand

# of a shard: its first class, its classes, sum of the targets, row of the first bad target (or -1), that target; then its weights' sum
HEADER_INTS = 5


class Sharded:
    """What ``ops`` and ``linear`` ask of a backend, where rows are cut: ``backend`` for this shard, the group for the rows."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend

    def row_loss(self, logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
        made = self._rows(logits, target, class_weight, spec, Wants(False, False), given=False)
        return made.loss, made.kept

    def row_grads(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        kept: Tensor,
        upstream: Upstream,
        spec: LossSpec,
        dlogits: Tensor | None,
        dtarget: Tensor | None,
    ) -> None:
        """Fill the gradients that are given; ``dlogits`` may be ``logits``."""
        if logits.numel():
            self.backend.shard_grads(logits, target, class_weight, kept, upstream, spec, dlogits, dtarget)

    def row_loss_and_grads(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        dloss: Tensor,
        spec: LossSpec,
        dlogits: Tensor | None,
        dtarget: Tensor | None,
    ) -> Tensor:
        loss, kept = self.row_loss(logits, target, class_weight, spec)
        self.row_grads(logits, target, class_weight, kept, Upstream(dloss), spec, dlogits, dtarget)
        return loss

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        wants: Wants,
        upstream: Upstream | None,
        dlogits: Tensor | None,
        dtarget: Tensor | None,
    ) -> RowStats:
        made = self._rows(logits, target, class_weight, spec, wants, given=True)
        if upstream is not None:
            self.row_grads(logits, target, class_weight, made.kept, upstream, spec, dlogits, dtarget)
        return made

    def head_row_loss(self, *arguments: Any) -> None:
        """Products whose logits stay in registers know nothing of shards."""

    def head_row_stats(self, *arguments: Any) -> None:
        """As ``head_row_loss``."""

    def multiply_in_place(self, t: Tensor, factor: Tensor) -> None:
        self.backend.multiply_in_place(t, factor)

    def _rows(self, logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec, wants: Wants, given: bool) -> RowStats:
        assert spec.first_class is not None and spec.num_classes is not None and spec.group is not None
        (n, v), soft = logits.shape, target.is_floating_point()
        like = torch.empty(0, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32, device=logits.device)
        if debugging():
            _require_same_rows(n, like, spec.group)
        rows = (
            self.backend.shard_rows(logits, target, class_weight, spec, wants, given)
            if logits.numel()
            else nothing(n, like, soft, class_weight is not None, spec, wants, given)
        )
        if rows.argmax is not None:
            rows = rows._replace(argmax=rows.argmax + spec.first_class)
        gathered = gather(_packed(rows, _header(target, v, class_weight, spec, like)), spec.group)
        shards, ints, weight_sums = _unpacked(gathered, rows, n)
        agreed = _agree(ints, spec, soft, looked_at=values_are_at_hand(target))
        weight_sum = weight_sums.sum()
        made = row_stats(merge(shards, weight_sums), target, weight_sum, spec, spec.num_classes)
        doubt = torch.where(agreed, 0.0, torch.nan)
        return RowStats(*(t + doubt if t is not None and t.is_floating_point() else t for t in made))  # type: ignore[arg-type]


def process_group(name: str) -> Any:
    """By the name a VocabShard keeps of it."""
    from torch.distributed import distributed_c10d

    # what functional collectives do with a name; not public
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


def even_classes(spec: LossSpec) -> int:
    """Of the largest shard, were all even: what every rank knows alike."""
    assert spec.num_classes is not None and spec.group is not None
    return -(-spec.num_classes // process_group(spec.group).size())


def gather(mine: Tensor, group: str) -> Tensor:
    """(K, ...) -> (P, K, ...) from all ranks."""
    import torch.distributed as dist

    of = process_group(group)
    everyones = mine.new_empty(of.size(), *mine.shape)
    # torch 2.13 has a new name for it
    one_for_all = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    one_for_all(everyones.flatten(0, 1), mine, group=of)
    return everyones


def all_sum_over(t: Tensor, group: str) -> Tensor:
    """The sum of a tensor over a group."""
    import torch.distributed as dist

    total = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=process_group(group))
    return total


def _require_same_rows(n: int, like: Tensor, group: str) -> None:
    """What a gather of different sizes would make of it is a crash or a wait without end."""
    counts = gather(torch.tensor([n], device=like.device), group)[:, 0].tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"the ranks of shard.group have {counts} rows; each takes the same rows, with its own classes of them")


def _header(target: Tensor, v: int, class_weight: Tensor | None, spec: LossSpec, like: Tensor) -> Tensor:
    ints = torch.zeros(HEADER_INTS, dtype=torch.int64, device=like.device)
    ints[0], ints[1], ints[3] = spec.first_class or 0, v, -1
    if not target.is_floating_point() and len(target):
        # odd factors, so that neither an exchange of two rows nor another id goes unseen
        places = torch.arange(1, 2 * len(target) + 1, 2, device=target.device)
        ints[2] = ((target + 0x9E3779B1) * (places * 0x85EBCA77 | 1)).sum() >> 20
        bad = (target != spec.ignore_index) & ((target < 0) | (target >= (spec.num_classes or 0)))
        first = bad.to(torch.uint8).argmax()
        ints[3] = torch.where(bad[first], first, -1)
        ints[4] = target[first].clamp(-(2**31), 2**31 - 1)
    weight_sum = like.new_full((1,), v) if class_weight is None else class_weight.sum(dtype=like.dtype)[None]
    return torch.cat([_as_floats(ints, like.dtype), weight_sum])


def _as_floats(ints: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of integers under another name, since a collective has one dtype."""
    return ints.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


def _as_ints(floats: Tensor) -> Tensor:
    return floats.view(torch.int64 if floats.dtype == torch.float64 else torch.int32).to(torch.int64)


def _packed(rows: ShardRows, header: Tensor) -> Tensor:
    columns = [t if t.is_floating_point() else _as_floats(t, header.dtype) for t in rows if t is not None]
    return torch.cat([header, *(t.to(header.dtype) for t in columns)])


def _unpacked(gathered: Tensor, like: ShardRows, n: int) -> tuple[ShardRows, Tensor, Tensor]:
    """(P, K) -> (P, N) of the rows, (P, HEADER_INTS), and (P,) sums of class weights."""
    ints, weight_sums, columns = gathered[:, :HEADER_INTS], gathered[:, HEADER_INTS], gathered[:, HEADER_INTS + 1 :]
    parts = iter(columns.split(n, 1) if n else [columns] * len(like))
    found = [None if t is None else next(parts) for t in like]
    if found[-1] is not None:
        found[-1] = _as_ints(found[-1].contiguous())
    return ShardRows(*found), _as_ints(ints.contiguous()), weight_sums  # type: ignore[arg-type]


def _agree(ints: Tensor, spec: LossSpec, soft: bool, *, looked_at: bool) -> Tensor:
    """Whether all ranks do the same thing, (); if it is looked at, every rank raises what every other does."""
    starts, sizes, sums, bad_rows, bad_targets = ints.unbind(1)
    order = starts * (2 * (spec.num_classes or 0) + 2) + sizes
    by_start = order.argsort()
    ends = (starts + sizes)[by_start]
    tiles = (starts[by_start][1:] == ends[:-1]).all() & (starts.amin() == 0) & (ends[-1] == spec.num_classes)
    same_targets = (sums == sums[0]).all()
    if looked_at:
        if not bool(tiles):
            held = ", ".join(f"[{start}, {start + size})" for start, size in zip(starts.tolist(), sizes.tolist(), strict=True))
            raise ValueError(f"shard: the ranks hold the classes {held}; expected each of [0, {spec.num_classes}) once")
        for rank, (row, bad) in enumerate(zip(bad_rows.tolist(), bad_targets.tolist(), strict=True)):
            if row >= 0:
                raise IndexError(
                    f"target of row {row} is {bad} on rank {rank} of the group but there are {spec.num_classes} classes;"
                    f" expected an id in [0, {spec.num_classes}) or ignore_index={spec.ignore_index}"
                )
        if not bool(same_targets):
            raise ValueError("target differs between the ranks of shard.group; each takes the same rows, with its own classes of them")
    return tiles & same_targets
