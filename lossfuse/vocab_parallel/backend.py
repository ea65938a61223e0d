"""Losses whose classes are cut among the ranks of a group: what goes over the wire, and a backend
made of one for a shard.

A forward gathers a few numbers a row from every rank, in one collective; merged (``merge``), they
are the same on every rank, and a gradient is made of them without another. With them goes what
tells whether the ranks do the same thing: where their shards lie, what their options are, how their
targets sum up, whether one of them is bad. On a CPU, and within ``debug_targets``, every rank looks
at it and raises the same error; elsewhere all that is returned is NaN."""

import sys
import zlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..row_types import RowStats, ShardRows, Upstream, Wants
from ..spec import LossSpec
from ..targets import debugging, values_are_at_hand
from .merge import kept, merge, nothing, row_loss, row_stats

# of a rank: where its classes lie, its options, what its targets sum up to, row of its first bad
# target (or -1), that target
HEADER_INTS = 5


class Sharded:
    """What ``ops`` asks of a backend, where rows are cut: ``backend`` for this shard, the group for
    the rows."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend

    def row_loss(
        self, logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec
    ) -> tuple[Tensor, Tensor]:
        row, weight_sum = self._rows(
            logits, target, class_weight, spec, Wants(False, False), given=False
        )
        assert spec.num_classes is not None
        return row_loss(row, target, weight_sum, spec, spec.num_classes), kept(row, weight_sum)

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
            self.backend.shard_grads(
                logits, target, class_weight, kept, upstream, spec, dlogits, dtarget
            )

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
        row, weight_sum = self._rows(logits, target, class_weight, spec, wants, given=True)
        assert spec.num_classes is not None
        made = row_stats(row, target, weight_sum, spec, spec.num_classes)
        if upstream is not None:
            self.row_grads(
                logits, target, class_weight, made.kept, upstream, spec, dlogits, dtarget
            )
        return made

    def head_row_loss(self, *arguments: Any) -> None:
        """Products whose logits stay in registers know nothing of shards."""

    def head_row_stats(self, *arguments: Any) -> None:
        """As ``head_row_loss``."""

    def multiply_in_place(self, t: Tensor, factor: Tensor) -> None:
        self.backend.multiply_in_place(t, factor)

    def _rows(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        wants: Wants,
        given: bool,
    ) -> tuple[ShardRows, Tensor]:
        """(N,) of whole rows, and the sum of all class weights."""
        assert spec.first_class is not None and spec.group is not None
        (n, v), soft = logits.shape, target.is_floating_point()
        like = torch.empty(
            0,
            dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32,
            device=logits.device,
        )
        looked_at = values_are_at_hand(target)
        if debugging():
            _require_same_rows(n, like, spec.group)
        rows = (
            self.backend.shard_rows(logits, target, class_weight, spec, wants, given)
            if logits.numel()
            else nothing(n, like, soft, class_weight is not None, spec, wants, given)
        )
        if rows.argmax is not None:
            rows = rows._replace(argmax=rows.argmax + spec.first_class)
        header = _as_floats(_header(target, v, spec, looked_at), like.dtype)
        columns = [
            t.to(like.dtype) if t.is_floating_point() else _as_floats(t, like.dtype)
            for t in rows
            if t is not None
        ]
        weight_sum = [] if class_weight is None else [class_weight.sum(dtype=like.dtype)[None]]
        gathered = gather(torch.cat([header, *weight_sum, *columns]), spec.group)

        parts = list(gathered.split([len(header), *(len(t) for t in (*weight_sum, *columns))], 1))
        ints = _as_ints(parts.pop(0))
        weight_sums = parts.pop(0)[:, 0] if weight_sum else (ints[:, 0] % 2**31).to(like.dtype)
        shards = ShardRows(*(None if t is None else parts.pop(0) for t in rows))  # type: ignore[arg-type]
        if shards.argmax is not None:
            shards = shards._replace(argmax=_as_ints(shards.argmax))
        agreed = _agree(ints, spec, looked_at)
        whole = merge(shards, weight_sums)
        return whole._replace(
            log_sum=torch.where(agreed, whole.log_sum, torch.nan)
        ), weight_sums.sum()


def look_together(target: Tensor, v: int, spec: LossSpec) -> None:
    """Raise, on every rank alike, what the ranks find where they compare themselves, before
    anything is computed."""
    assert spec.group is not None
    looked_at = values_are_at_hand(target)
    if debugging():
        _require_same_rows(len(target), target, spec.group)
    _agree(gather(_header(target, v, spec, looked_at), spec.group), spec, looked_at=True)


def keep_order() -> None:
    """Inductor orders operators by the memory they take, by which ranks with unequal shards would
    gather in unequal orders."""
    config: Any = sys.modules.get("torch._inductor.config")
    if getattr(config, "reorder_for_peak_memory", False):
        config.reorder_for_peak_memory = False


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
    """What a gather of different sizes would make of it is a crash or a wait without end; for
    ``debug_targets``, which waits anyway."""
    counts = gather(torch.tensor([n], device=like.device), group)[:, 0].tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"the ranks of shard.group have {counts} rows; each takes the same rows, with its own classes of them"
        )


def _header(target: Tensor, v: int, spec: LossSpec, looked_at: bool) -> Tensor:
    """(HEADER_INTS,) int64; bad targets only where they are looked at, since elsewhere their rows
    are NaN."""
    place = torch.full((1,), (spec.first_class or 0) * 2**31 + v, device=target.device)
    chosen = torch.full((1,), _options_of(spec), device=target.device)
    none = torch.full((2,), -1, device=target.device)
    if target.is_floating_point() or len(target) == 0:
        return torch.cat([place, chosen, none[:1], none])
    # odd factors, all of them different, so that neither an exchange of two rows nor another id
    # goes unseen; powers, since of a line of factors two exchanges cancel where they are as far
    # apart
    first, step = 0x9E3779B97F4A7C15 >> 3 | 1, 0x85EBCA77C2B2AE3D >> 30 & ~1
    factors = torch.arange(first, first + step * len(target), step, device=target.device)[
        : len(target)
    ].pow_(5)
    total = (target * factors).sum(0, keepdim=True)
    if not looked_at:
        return torch.cat([place, chosen, total, none])
    bad = (
        (target != spec.ignore_index) & ((target < 0) | (target >= (spec.num_classes or 0)))
    ).nonzero()[:1, 0]
    return torch.cat(
        [place, chosen, total, bad, target[bad]] if len(bad) else [place, chosen, total, none]
    )


def _options_of(spec: LossSpec) -> int:
    """A number for what the ranks must have alike; of texts, since those of numbers and None differ
    between processes."""
    numbers = (spec.label_smoothing, spec.softcap, spec.logit_scale, spec.lse_square_scale)
    text = repr(
        (
            int(spec.ignore_index),
            spec.num_classes,
            *(None if x is None else float(x) for x in numbers),
        )
    )
    return zlib.crc32(text.encode())


def _as_floats(ints: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of int64 under another name, two for one in float32, since a collective has one
    dtype."""
    return ints.view(dtype)


def _as_ints(floats: Tensor) -> Tensor:
    # copied to the start of memory of its own and seen as one line: wider numbers take neither any
    # offset nor any stride
    flat = floats.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.int64).view(len(floats), -1)


def _agree(ints: Tensor, spec: LossSpec, looked_at: bool) -> Tensor:
    """Whether all ranks do the same thing, (); what is looked at every rank raises alike."""
    assert spec.num_classes is not None
    places, chosen, sums, rows, targets = ints.unbind(1)
    # by their starts, where they have the same the empty ones first
    places = places.sort().values
    starts, sizes = places >> 31, places % 2**31
    tiles = F.pad(starts, (0, 1), value=spec.num_classes) == F.pad(starts + sizes, (1, 0))
    same_options, same_targets = chosen == chosen[0], sums == sums[0]
    # on a CPU, or inside debug_targets: nothing is waited for that was not asked for
    if looked_at:
        if not bool(same_options.all()):
            raise ValueError(
                "the ranks of shard.group differ in num_classes, ignore_index, label_smoothing, softcap, logit_scale or lse_square_scale;"
                " all of them pass the same"
            )
        if not bool(tiles.all()):
            held = ", ".join(
                f"[{start}, {start + size})"
                for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
            )
            raise ValueError(
                f"shard: the ranks hold the classes {held}; expected each of [0, {spec.num_classes}) once"
            )
        for rank, (row, bad) in enumerate(zip(rows.tolist(), targets.tolist(), strict=True)):
            if row >= 0:
                raise IndexError(
                    f"target of row {row} is {bad} on rank {rank} of the group but there are {spec.num_classes} classes;"
                    f" expected an id in [0, {spec.num_classes}) or ignore_index={spec.ignore_index}"
                )
        if not bool(same_targets.all()):
            raise ValueError(
                "target differs between the ranks of shard.group; each takes the same rows, with its own classes of them"
            )
    return tiles.all() & same_options.all() & same_targets.all()
