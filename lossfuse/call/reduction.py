"""Reductions of row losses: "none", "mean", "sum", and the divisor of a mean."""

from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import HeadRows, Rows, Targets
from ..ops.library import all_sum
from ..spec import LossSpec
from .dispatch import differentiates_row_weight

AnyRows = TypeVar("AnyRows", bound=Targets)


def divides_by_valid_rows(rows: Targets, normalizer: float | Tensor | None) -> bool:
    """Return True if the divisor of a mean is the number of targets other than ``ignore_index``."""
    return (
        normalizer is None
        and not rows.soft
        and rows.class_weight is None
        and rows.row_weight is None
    )


def ignore_rows_of_weight_0(rows: AnyRows, ignore_index: int) -> AnyRows:
    """``rows``, of which those with a ``row_weight`` of 0 have the target ``ignore_index``, so that
    they are computed, or left out, like ignored rows.

    They stay if their loss is the gradient of ``row_weight``, and for probabilities, which cannot
    be ignored."""
    row_weight = rows.row_weight
    if row_weight is None or rows.soft or differentiates_row_weight(rows):
        return rows
    return replace(rows, target=rows.target.masked_fill(row_weight == 0, ignore_index))


def denominator(
    rows: Rows | HeadRows, spec: LossSpec, reduction: str, normalizer: float | Tensor | None
) -> Tensor | None:
    """Return the divisor of the summed loss, a 0-d tensor; None for "none" and "sum".

    ``normalizer``, or else torch's: the sum of the class weights of the valid targets, the number
    of valid targets without weights, the number of rows for probabilities."""
    dtype = torch.float64 if rows.input.dtype == torch.float64 else torch.float32
    return divisor_of(rows, rows.num_classes, dtype, spec.ignore_index, reduction, normalizer)


def divisor_of(
    rows: Targets,
    num_classes: int,
    dtype: torch.dtype,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor | None:
    """``denominator`` for losses of a dtype, given only the targets."""
    if reduction != "mean":
        return None
    target = rows.target
    if isinstance(normalizer, Tensor):
        return normalizer.to(dtype)
    if normalizer is not None:
        # a product, so that a compiler does not specialize on the number
        return torch.ones((), dtype=dtype, device=target.device) * normalizer
    if rows.soft:
        return torch.full((), target.shape[0], dtype=dtype, device=target.device)
    valid = target != ignore_index
    if rows.class_weight is None or rows.local_weight is None:
        return valid.sum(dtype=dtype)
    if rows.shard is not None:
        # a rank may have the weights of its own classes only
        weights = F.pad(rows.local_weight.to(dtype), (0, 1))
        y = target - rows.shard.start
        local = valid & (y >= 0) & (y < rows.local_classes)
        total: Tensor = all_sum(weights[torch.where(local, y, -1)].sum(), rows.shard.group_name)
        return total
    # clamp before indexing: the id of an ignored row may be any number
    weights = rows.class_weight.to(dtype)[target.clamp(0, num_classes - 1)]
    return torch.where(valid, weights, 0.0).sum()


def reduce_rows(loss: Tensor, rows: Targets, reduction: str, divisor: Tensor | None) -> Tensor:
    """(N,) row losses -> the shape the caller expects, times ``row_weight``."""
    if rows.row_weight is not None:
        loss = loss * rows.row_weight
    if reduction == "none":
        return loss.reshape(rows.batch_shape)
    return loss.sum() if divisor is None else loss.sum() / divisor
