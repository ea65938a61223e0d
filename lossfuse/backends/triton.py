"""Rows and a spec -> launches of Triton kernels. The only importer of ``lossfuse.kernels``."""

from typing import TypedDict

import torch
from torch import Tensor

from ..kernels import (
    fused_rows,
    label_rows,
    linear_rows,
    log_softmax_rows,
    row_totals,
    scale_rows,
    soft_target_rows,
    softmax_rows,
)
from ..row_types import RowStats, ShardRows, Upstream, Wants
from ..spec import LossSpec


class _RowOptions(TypedDict):
    scale: float | None
    softcap: float | None
    smoothing: float | None


class _Options(_RowOptions):
    lse_square_scale: float | None


class _HeadOptions(TypedDict):
    ignore_index: int
    scale: float | None
    softcap: float | None
    lse_square_scale: float | None


def _row_options(spec: LossSpec) -> _RowOptions:
    """Absent options are None, so that Triton compiles no code for them."""
    return {
        "scale": spec.logit_scale,
        "softcap": spec.softcap,
        "smoothing": spec.label_smoothing or None,
    }


def _options(spec: LossSpec) -> _Options:
    return {**_row_options(spec), "lse_square_scale": spec.lse_square_scale or None}


def _has_unit_stride(t: Tensor) -> bool:
    return t.dim() < 2 or t.stride(-1) == 1 or t.shape[-1] == 1


def _unit_stride(t: Tensor) -> Tensor:
    """Kernels take rows of stride 1; other layouts are copied once."""
    return t if _has_unit_stride(t) else t.contiguous()


def _fp32(class_weight: Tensor | None) -> Tensor | None:
    return None if class_weight is None else class_weight.to(torch.float32).contiguous()


def _operands(
    logits: Tensor, target: Tensor, class_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    target = _unit_stride(target) if target.is_floating_point() else target.contiguous()
    return _unit_stride(logits), target, _fp32(class_weight)


def row_loss(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """(N,) losses, and the statistics that ``row_grads`` needs."""
    operands = _operands(logits, target, class_weight)
    if target.is_floating_point():
        return soft_target_rows.row_loss(*operands, **_options(spec))
    return softmax_rows.row_loss(*operands, ignore_index=spec.ignore_index, **_options(spec))


def _grad_buffer(x: Tensor, logits: Tensor, dlogits: Tensor | None) -> Tensor | None:
    """``dlogits``, or memory with rows of stride 1 to be copied there: ``x``, if it is a copy of
    ``logits``."""
    if dlogits is None or _has_unit_stride(dlogits):
        return dlogits
    return x if x is not logits else torch.empty_like(x, memory_format=torch.contiguous_format)


def row_grads(
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
    x, t, weight = _operands(logits, target, class_weight)
    buffer = _grad_buffer(x, logits, dlogits)
    dlse, dlogprob, dentropy = (None if d is None else d.contiguous() for d in upstream[1:])
    if target.is_floating_point():
        soft_target_rows.row_grads(
            x,
            t,
            weight,
            saved,
            upstream.loss,
            dlogits=buffer,
            dtarget=dtarget,
            dlse=dlse,
            dlogprob=dlogprob,
            dentropy=dentropy,
            num_classes=spec.num_classes,
            **_options(spec),
        )
    elif buffer is not None:
        softmax_rows.row_grads(
            x,
            t,
            weight,
            saved,
            upstream.loss,
            dlogits=buffer,
            dlse=dlse,
            dlogprob=dlogprob,
            dentropy=dentropy,
            first_class=spec.first_class,
            num_classes=spec.num_classes,
            ignore_index=spec.ignore_index,
            **_options(spec),
        )
    _copy_back(buffer, dlogits)


def _copy_back(buffer: Tensor | None, dlogits: Tensor | None) -> None:
    if dlogits is not None and buffer is not None and buffer is not dlogits:
        dlogits.copy_(buffer)


def row_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> Tensor:
    """(N,) losses; fills the gradients that are given. ``dlogits`` may be ``logits``."""
    if dlogits is None or target.is_floating_point():
        loss, saved = row_loss(logits, target, class_weight, spec)
        operands = logits, target, class_weight, saved, Upstream(dloss), spec
        row_grads(*operands, dlogits=dlogits, dtarget=dtarget)
        return loss
    x, t, weight = _operands(logits, target, class_weight)
    buffer = _grad_buffer(x, logits, dlogits)
    assert buffer is not None
    loss = fused_rows.row_loss_and_grads(
        x, t, weight, dloss, dlogits=buffer, ignore_index=spec.ignore_index, **_options(spec)
    )
    _copy_back(buffer, dlogits)
    return loss


def row_total_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    mean: bool,
    spec: LossSpec,
    dlogits: Tensor,
) -> tuple[Tensor, Tensor]:
    """(total, dloss), both (), of rows against class ids; fills ``dlogits``, which may be
    ``logits``.

    With ``mean`` the sum of the losses is divided by ``divisor``, which is on the device, or
    without one by the number of valid rows."""
    x, t, weight = _operands(logits, target, class_weight)
    buffer = _grad_buffer(x, logits, dlogits)
    assert buffer is not None
    total, dloss = fused_rows.row_total_and_grads(
        x,
        t,
        weight,
        divisor,
        mean=mean,
        dlogits=buffer,
        ignore_index=spec.ignore_index,
        **_options(spec),
    )
    _copy_back(buffer, dlogits)
    return total, dloss


def mean_over_valid(loss: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """(): the sum of (N,) losses over the number of valid rows."""
    return row_totals.total_of(
        loss, target.contiguous(), None, mean=True, ignore_index=ignore_index
    )


def row_stats(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
    upstream: Upstream | None = None,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> RowStats:
    """Statistics of N rows; then fills the gradients that are given. ``dlogits`` may be
    ``logits``."""
    operands = _operands(logits, target, class_weight)
    options = {**wants._asdict(), **_options(spec)}
    if target.is_floating_point():
        stats = RowStats(*soft_target_rows.row_stats(*operands, **options))
    else:
        stats = RowStats(
            *softmax_rows.row_stats(*operands, ignore_index=spec.ignore_index, **options)
        )
    if upstream is None or (dlogits is None and dtarget is None):
        return stats
    rows = logits, target, class_weight
    if upstream.only_loss and upstream.loss is not None:
        # the kernel of the loss alone reads the logits once, not twice
        row_loss_and_grads(*rows, upstream.loss, spec, dlogits=dlogits, dtarget=dtarget)
    else:
        row_grads(*rows, stats.saved, upstream, spec, dlogits=dlogits, dtarget=dtarget)
    return stats


def shard_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
    given: bool = False,
) -> ShardRows:
    """Statistics of a shard's rows; ``given`` adds the sums over the probabilities as given."""
    assert spec.first_class is not None and spec.num_classes is not None
    operands = _operands(logits, target, class_weight)
    options = {**wants._asdict(), **_row_options(spec)}
    soft = target.is_floating_point()
    if soft:
        stats, shard, argmax = soft_target_rows.shard_rows(
            *operands, num_classes=spec.num_classes, given=given, **options
        )
    else:
        stats, shard, argmax = softmax_rows.shard_rows(
            *operands,
            first_class=spec.first_class,
            num_classes=spec.num_classes,
            ignore_index=spec.ignore_index,
            **options,
        )
    return ShardRows(
        row_max=stats[0],
        log_sum=stats[1],
        target_logit=None if soft else shard[0],
        target_weight=None if soft or class_weight is None else shard[1],
        mass=stats[2] if soft else None,
        shortfall=shard[0] if soft else shard[2] if spec.label_smoothing else None,
        given_mass=stats[3] if soft and given else None,
        given_shortfall=shard[1] if soft and given else None,
        mean_shortfall=stats[-1] if wants.entropy else None,
        argmax=argmax,
    )


def shard_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    saved: Tensor,
    upstream: Upstream,
    spec: LossSpec,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> None:
    """``row_grads`` over a shard's classes; ``saved`` (5, N) is ``merge.saved_rows`` of the merged
    rows."""
    assert spec.first_class is not None and spec.num_classes is not None
    operands = logits, target, class_weight, saved, upstream, spec
    row_grads(*operands, dlogits=dlogits, dtarget=dtarget)


def _head_operands(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None] | None:
    """None if the loss needs all logits of a row, or the device does not run the kernels."""
    if (
        target.is_floating_point()
        or spec.label_smoothing
        or linear_rows.obstacle(hidden, weight) is not None
    ):
        return None
    bias = None if bias is None else bias.contiguous()
    return hidden, weight, bias, target.contiguous(), _fp32(class_weight)


def _head_options(spec: LossSpec) -> _HeadOptions:
    return {
        "ignore_index": spec.ignore_index,
        "scale": spec.logit_scale,
        "softcap": spec.softcap,
        "lse_square_scale": spec.lse_square_scale or None,
    }


def head_row_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> Tensor | None:
    """(N,) losses from a matrix product that leaves the logits in registers; None where it cannot
    be used."""
    operands = _head_operands(hidden, weight, bias, target, class_weight, spec)
    return None if operands is None else linear_rows.row_loss(*operands, **_head_options(spec))


def head_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
) -> RowStats | None:
    """Statistics, with the kernel and the limits of ``head_row_loss``."""
    operands = _head_operands(hidden, weight, bias, target, class_weight, spec)
    if operands is None:
        return None
    stats = linear_rows.row_stats(*operands, **wants._asdict(), **_head_options(spec))
    return RowStats(*stats, hidden.new_empty(0))


def multiply_in_place(t: Tensor, factor: Tensor) -> None:
    """``t *= factor``, a number on the device."""
    scale_rows.multiply_in_place(t, factor)


def label_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    *,
    loss: Tensor | None = None,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> None:
    """Fill ``loss`` and the gradients that are given; ``dlogits`` may be ``logits``."""
    x = _unit_stride(logits)
    buffer = _grad_buffer(x, logits, dlogits)
    label_rows.label_loss_and_grads(
        x,
        _unit_stride(target) if target.is_floating_point() else target.contiguous(),
        _unit_or_zero_stride(weight),
        _unit_or_zero_stride(pos_weight),
        ignore_index=ignore_index,
        loss=loss,
        dloss=None if dloss is None else _unit_or_zero_stride(dloss.expand(logits.shape)),
        dlogits=buffer,
        dtarget=dtarget,
    )
    _copy_back(buffer, dlogits)


def _unit_or_zero_stride(t: Tensor | None) -> Tensor | None:
    """``t`` with a last stride of 1, or of 0 for one number a row; other layouts are copied."""
    return t if t is None or t.stride(1) in (0, 1) else t.contiguous()


def log_softmax(logits: Tensor, logp: Tensor, stats: Tensor) -> None:
    """Fill ``logp``, and the ``stats`` that ``log_softmax_grad`` takes."""
    log_softmax_rows.log_softmax(_unit_stride(logits), logp, stats)


def log_softmax_grad(logits: Tensor, stats: Tensor, dlogp: Tensor, dlogits: Tensor) -> None:
    log_softmax_rows.log_softmax_grad(_unit_stride(logits), stats, _unit_stride(dlogp), dlogits)
