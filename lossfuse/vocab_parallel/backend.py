"""Losses whose classes are sharded across the ranks of a group: the communication, and a backend
that wraps the backend of one shard.

A forward gathers a few numbers of each row from all ranks in one collective. The merged numbers
(``merge``) are the same on every rank, so a gradient needs no further communication. A fingerprint
of the call travels with them: the classes of the shard, the options, a checksum of the targets and
the first bad target. On a CPU, and within ``debug_targets``, every rank compares the fingerprints
and raises the same error. Elsewhere that would synchronize, and all results are NaN instead."""

import sys
import zlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..row_types import RowStats, ShardRows, Upstream, Wants
from ..spec import LossSpec
from ..targets import debugging, values_are_readable
from .merge import empty_shard, merge, row_loss, row_stats, saved_rows

# position of the shard, options, checksum of the targets, row of the first bad target (or -1),
# that target
FINGERPRINT_INTS = 5


class Sharded:
    """A backend for sharded rows: ``backend`` computes the local classes, the group merges them."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend

    def row_loss(
        self, logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec
    ) -> tuple[Tensor, Tensor]:
        wants = Wants(entropy=False, argmax=False)
        row, weight_sum = self._merged_rows(logits, target, class_weight, spec, wants)
        assert spec.num_classes is not None
        loss = row_loss(row, target, weight_sum, spec, spec.num_classes)
        return loss, saved_rows(row, weight_sum)

    def row_grads(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        saved: Tensor,
        upstream: Upstream,
        spec: LossSpec,
        dlogits: Tensor | None = None,
        dtarget: Tensor | None = None,
    ) -> None:
        """Fill the gradients that are given; ``dlogits`` may be ``logits``."""
        if logits.numel():
            self.backend.shard_grads(
                logits,
                target,
                class_weight,
                saved,
                upstream,
                spec,
                dlogits=dlogits,
                dtarget=dtarget,
            )

    def row_loss_and_grads(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        dloss: Tensor,
        spec: LossSpec,
        dlogits: Tensor | None = None,
        dtarget: Tensor | None = None,
    ) -> Tensor:
        loss, saved = self.row_loss(logits, target, class_weight, spec)
        operands = logits, target, class_weight, saved, Upstream(dloss), spec
        self.row_grads(*operands, dlogits=dlogits, dtarget=dtarget)
        return loss

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        wants: Wants,
        upstream: Upstream | None = None,
        dlogits: Tensor | None = None,
        dtarget: Tensor | None = None,
    ) -> RowStats:
        row, weight_sum = self._merged_rows(logits, target, class_weight, spec, wants, given=True)
        assert spec.num_classes is not None
        stats = row_stats(row, target, weight_sum, spec, spec.num_classes)
        if upstream is not None:
            operands = logits, target, class_weight, stats.saved, upstream, spec
            self.row_grads(*operands, dlogits=dlogits, dtarget=dtarget)
        return stats

    def head_row_loss(self, *arguments: Any) -> None:
        """None: the kernels that leave the logits in registers do not support shards."""

    def head_row_stats(self, *arguments: Any) -> None:
        """None, for the reason of ``head_row_loss``."""

    def multiply_in_place(self, t: Tensor, factor: Tensor) -> None:
        self.backend.multiply_in_place(t, factor)

    def _merged_rows(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        wants: Wants,
        given: bool = False,
    ) -> tuple[ShardRows, Tensor]:
        """Statistics of all classes of (N,) rows, and the sum of all class weights."""
        assert spec.first_class is not None and spec.group is not None
        (n, v), soft = logits.shape, target.is_floating_point()
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        like = torch.empty(0, dtype=dtype, device=logits.device)
        compares = values_are_readable(target)
        if debugging():
            _require_same_rows(n, like, spec.group)
        rows = (
            self.backend.shard_rows(logits, target, class_weight, spec, wants, given=given)
            if logits.numel()
            else empty_shard(n, like, soft, class_weight is not None, spec, wants, given)
        )
        if rows.argmax is not None:
            rows = rows._replace(argmax=rows.argmax + spec.first_class)

        fingerprint = _as_floats(_fingerprint(target, v, spec, compares), dtype)
        columns = [
            t.to(dtype) if t.is_floating_point() else _as_floats(t, dtype)
            for t in rows
            if t is not None
        ]
        weight_sum = [] if class_weight is None else [class_weight.sum(dtype=dtype)[None]]
        sent = [fingerprint, *weight_sum, *columns]
        gathered = gather(torch.cat(sent), spec.group)

        parts = list(gathered.split([len(t) for t in sent], 1))
        ints = _as_ints(parts.pop(0))
        # without class weights, the number of classes of each shard
        weight_sums = parts.pop(0)[:, 0] if weight_sum else (ints[:, 0] % 2**31).to(dtype)
        shards = ShardRows(*(None if t is None else parts.pop(0) for t in rows))  # type: ignore[arg-type]
        if shards.argmax is not None:
            shards = shards._replace(argmax=_as_ints(shards.argmax))
        agree = _all_equal(ints, spec, raises=compares)
        row = merge(shards, weight_sums)
        row = row._replace(log_sum=torch.where(agree, row.log_sum, torch.nan))
        return row, weight_sums.sum()


def check_ranks_agree(target: Tensor, v: int, spec: LossSpec) -> None:
    """Raise the same error on every rank if their calls differ, before anything is computed."""
    assert spec.group is not None
    compares = values_are_readable(target)
    if debugging():
        _require_same_rows(len(target), target, spec.group)
    ints = gather(_fingerprint(target, v, spec, compares), spec.group)
    _all_equal(ints, spec, raises=True)


def disable_inductor_reordering() -> None:
    """Turn off Inductor's ``reorder_for_peak_memory`` for this process.

    That pass, on by default in torch 2.13, orders operators by the memory they take, so ranks with
    shards of unequal sizes would issue their collectives in unequal orders. Remove this when the
    pass keeps the order of collectives.
    """
    config: Any = sys.modules.get("torch._inductor.config")
    if getattr(config, "reorder_for_peak_memory", False):
        config.reorder_for_peak_memory = False


def process_group(name: str) -> Any:
    """The process group with the name that a VocabShard stores."""
    from torch.distributed import distributed_c10d

    # private; functional collectives resolve names this way
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


def even_classes(spec: LossSpec) -> int:
    """The largest number of classes of a rank if all shards were even: the same on every rank."""
    assert spec.num_classes is not None and spec.group is not None
    return -(-spec.num_classes // process_group(spec.group).size())


def gather(local: Tensor, group: str) -> Tensor:
    """(K, ...) -> (P, K, ...) from all ranks."""
    import torch.distributed as dist

    of = process_group(group)
    gathered = local.new_empty(of.size(), *local.shape)
    # renamed in torch 2.13
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered.flatten(0, 1), local, group=of)
    return gathered


def all_sum_over(t: Tensor, group: str) -> Tensor:
    """The sum of a tensor over a group."""
    import torch.distributed as dist

    total = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=process_group(group))
    return total


def _require_same_rows(n: int, like: Tensor, group: str) -> None:
    """Raise if the ranks have unequal numbers of rows, with which the gather crashes or hangs. It
    synchronizes, as ``debug_targets`` does."""
    counts = gather(torch.tensor([n], device=like.device), group)[:, 0].tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"the ranks of shard.group have {counts} rows; expected the same rows on all ranks,"
            " each with its own classes"
        )


def _fingerprint(target: Tensor, v: int, spec: LossSpec, finds_bad: bool) -> Tensor:
    """(FINGERPRINT_INTS,) int64; with ``finds_bad`` also the first bad target, which
    synchronizes."""
    position = torch.full((1,), (spec.first_class or 0) * 2**31 + v, device=target.device)
    options = torch.full((1,), _hash_of_options(spec), device=target.device)
    none = torch.full((2,), -1, device=target.device)
    if target.is_floating_point() or len(target) == 0:
        return torch.cat([position, options, none[:1], none])
    # a checksum with an odd factor for each row, all of them different, so that it changes when two
    # rows are exchanged or an id changes. Fifth powers: with factors in an arithmetic sequence, two
    # exchanges of rows equally far apart would cancel
    first, step = 0x9E3779B97F4A7C15 >> 3 | 1, 0x85EBCA77C2B2AE3D >> 30 & ~1
    factors = torch.arange(first, first + step * len(target), step, device=target.device)[
        : len(target)
    ].pow_(5)
    checksum = (target * factors).sum(0, keepdim=True)
    if not finds_bad:
        return torch.cat([position, options, checksum, none])
    bad = (
        (target != spec.ignore_index) & ((target < 0) | (target >= (spec.num_classes or 0)))
    ).nonzero()[:1, 0]
    return torch.cat([position, options, checksum, *([bad, target[bad]] if len(bad) else [none])])


def _hash_of_options(spec: LossSpec) -> int:
    """Of the repr: hash(None) differs between processes."""
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
    """The bits of int64 viewed as floats, two for one in float32: a collective has one dtype."""
    return ints.view(dtype)


def _as_ints(floats: Tensor) -> Tensor:
    # a copy: a view of a wider dtype needs an aligned offset and contiguous memory
    flat = floats.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.int64).view(len(floats), -1)


def _all_equal(fingerprints: Tensor, spec: LossSpec, raises: bool) -> Tensor:
    """() True if the shards cover all classes once and the ranks have equal options and targets.

    ``raises``: raise an error if not, which synchronizes."""
    assert spec.num_classes is not None
    positions, options, checksums, bad_rows, bad_targets = fingerprints.unbind(1)
    # sorted by start; an empty shard comes before the one with the same start
    positions = positions.sort().values
    starts, sizes = positions >> 31, positions % 2**31
    covers = F.pad(starts, (0, 1), value=spec.num_classes) == F.pad(starts + sizes, (1, 0))
    same_options, same_targets = options == options[0], checksums == checksums[0]
    if raises:
        if not bool(same_options.all()):
            raise ValueError(
                "the ranks of shard.group differ in num_classes, ignore_index, label_smoothing,"
                " softcap, logit_scale or lse_square_scale; expected the same on all ranks"
            )
        if not bool(covers.all()):
            slices = zip(starts.tolist(), sizes.tolist(), strict=True)
            held = ", ".join(f"[{start}, {start + size})" for start, size in slices)
            raise ValueError(
                f"shard: the ranks hold the classes {held}; expected each of"
                f" [0, {spec.num_classes}) once"
            )
        _require_good_targets(bad_rows, bad_targets, spec)
        if not bool(same_targets.all()):
            raise ValueError(
                "target differs between the ranks of shard.group; expected the same rows on all"
                " ranks, each with its own classes"
            )
    return covers.all() & same_options.all() & same_targets.all()


def _require_good_targets(bad_rows: Tensor, bad_targets: Tensor, spec: LossSpec) -> None:
    pairs = zip(bad_rows.tolist(), bad_targets.tolist(), strict=True)
    for rank, (row, bad) in enumerate(pairs):
        if row >= 0:
            raise IndexError(
                f"target of row {row} is {bad} on rank {rank} of the group but there are"
                f" {spec.num_classes} classes; expected an id in [0, {spec.num_classes}) or"
                f" ignore_index={spec.ignore_index}"
            )
