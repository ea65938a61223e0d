"""The implementations that ``impl`` names: objects with the same functions of rows of logits and of
a head.

``Operators`` runs the operators of ``lossfuse.ops`` on a backend. ``Reference`` is made of torch's
operators, which torch can differentiate in every way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..inputs import HeadRows, Rows
from ..ops import head as head_ops
from ..ops import row_stats as stats_ops
from ..ops import rows as row_ops
from ..ops.head import ChunkArgs, HeadOperands, Reduction
from ..ops.head_chunks import Needs
from ..ops.inplace import Owner
from ..ops.library import OpArgs
from ..row_types import RowStats, Wants
from ..spec import LinearOptions, LossSpec
from ..targets import require_ids_in_range

# loss, lse, target_logprob, entropy and argmax; the last two empty where they were not asked for
Stats = Sequence[Tensor]


@dataclass(frozen=True)
class HeadCall:
    """A checked call of a head."""

    rows: HeadRows
    operands: HeadOperands
    reduction: Reduction
    needs: Needs
    forms_gradients: bool  # in the forward
    spec: LossSpec
    options: LinearOptions


class Operators:
    """The operators of this package on one backend, "triton" or "torch"."""

    def __init__(self, name: str) -> None:
        self.name = name

    def row_loss(self, rows: Rows, spec: LossSpec, owner: Owner | None) -> Tensor:
        """(N,) losses."""
        tensors = rows.logits, rows.target, rows.local_weight
        if differentiates(rows):
            loss: Tensor = row_ops.RowLoss.apply(*tensors, spec, self.name, owner)
        else:
            loss, _ = row_ops.row_loss(*tensors, *OpArgs.of(spec, self.name))
        return loss

    def total(
        self,
        rows: Rows,
        spec: LossSpec,
        divisor: Tensor | None,
        mean: bool,
        owner: Owner | None,
    ) -> Tensor:
        """The sum of the losses times their weights; with ``mean`` over ``divisor``, or without one
        over the number of valid rows. The forward forms its gradient."""
        total: Tensor = row_ops.ReducedLoss.apply(
            rows.logits,
            rows.target,
            rows.local_weight,
            divisor,
            mean,
            rows.row_weight,
            spec,
            self.name,
            owner,
        )
        return total

    def mean_over_valid(self, loss: Tensor, rows: Rows, spec: LossSpec) -> Tensor:
        """() of (N,) losses against class ids."""
        if self is TRITON and not (loss.requires_grad or torch.compiler.is_compiling()):
            mean: Tensor = row_ops.mean_over_valid(loss, rows.target, spec.ignore_index)
            return mean
        # a compiler fuses these, and autograd knows them
        valid = rows.target != spec.ignore_index
        return loss.sum() / valid.sum(dtype=loss.dtype)

    def row_stats(self, rows: Rows, spec: LossSpec, wants: Wants) -> Stats:
        *stats, _ = stats_ops.row_stats(
            rows.logits, rows.target, rows.local_weight, *wants, *OpArgs.of(spec, self.name)
        )
        return stats

    def stats_total(
        self, rows: Rows, spec: LossSpec, wants: Wants, divisor: Tensor | None
    ) -> Stats:
        """``row_stats`` with the sum of the losses over ``divisor``; the forward forms its
        gradient."""
        stats: Stats = stats_ops.ReducedStats.apply(
            rows.logits,
            rows.target,
            rows.local_weight,
            divisor,
            rows.row_weight,
            wants,
            spec,
            self.name,
        )
        return stats

    def head_row_loss(self, call: HeadCall) -> Tensor:
        loss: Tensor = head_ops.linear_row_loss(
            *call.operands, call.reduction.main_grad, *self._options(call)
        )
        return loss

    def head_total(self, call: HeadCall) -> Tensor:
        total: Tensor
        total, *_ = head_ops.linear_total(
            *call.operands, *call.reduction, *call.needs, *self._options(call)
        )
        return total

    def head_row_stats(self, call: HeadCall, wants: Wants) -> Stats:
        stats: Stats = head_ops.linear_row_stats(
            *call.operands, call.reduction.main_grad, *wants, *self._options(call)
        )
        return stats

    def head_stats_total(self, call: HeadCall, wants: Wants) -> Stats:
        total, lse, target_logprob, entropy, argmax, *_ = head_ops.linear_stats_total(
            *call.operands, *call.reduction, *call.needs, *wants, *self._options(call)
        )
        return total, lse, target_logprob, entropy, argmax

    def _options(self, call: HeadCall) -> tuple[object, ...]:
        return *ChunkArgs.of(call.options), *OpArgs.of(call.spec, self.name)


class Reference(Operators):
    """The reference. It forms no gradient in the forward, so that it has no totals."""

    def row_loss(self, rows: Rows, spec: LossSpec, owner: Owner | None) -> Tensor:
        _require_ids(rows, spec)
        return reference.row_loss(rows.logits, rows.target, rows.class_weight, spec)

    def row_stats(self, rows: Rows, spec: LossSpec, wants: Wants) -> Stats:
        _require_ids(rows, spec)
        return _tensors(reference.row_stats(rows.logits, rows.target, rows.class_weight, spec))

    def head_row_loss(self, call: HeadCall) -> Tensor:
        _require_ids(call.rows, call.spec)
        return reference.linear_row_loss(*call.operands, call.spec)

    def head_row_stats(self, call: HeadCall, wants: Wants) -> Stats:
        _require_ids(call.rows, call.spec)
        return _tensors(reference.linear_row_stats(*call.operands, call.spec))


TRITON, TORCH, REFERENCE = Operators("triton"), Operators("torch"), Reference("reference")


def differentiates(rows: Rows) -> bool:
    """Return True if autograd will differentiate this eager call."""
    requires_grad = rows.logits.requires_grad or rows.target.requires_grad
    return requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _require_ids(rows: Rows | HeadRows, spec: LossSpec) -> None:
    if not rows.soft:
        require_ids_in_range(rows.target, rows.num_classes, spec.ignore_index)


def _tensors(stats: RowStats) -> Stats:
    *outputs, _ = stats_ops.as_tensors(stats)
    return outputs
