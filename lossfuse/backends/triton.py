"""Rows and a spec -> launches of our Triton kernels. The only importer of ``lossfuse.kernels``."""

from typing import TypedDict

import torch
from torch import Tensor

from ..kernels import (
    fused_rows,
    label_rows,
    linear_rows,
    log_softmax_rows,
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


def _row_options(spec: LossSpec) -> _RowOptions:
    """What is not asked for is None, so that no code is made for it."""
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
    """Kernels step through a row one element at a time; other layouts are copied once."""
    return t if _has_unit_stride(t) else t.contiguous()


def _operands(
    logits: Tensor, target: Tensor, class_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = None if class_weight is None else class_weight.to(torch.float32).contiguous()
    return (
        _unit_stride(logits),
        _unit_stride(target) if target.is_floating_point() else target.contiguous(),
        weight,
    )


def row_loss(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """(N,) losses, and the statistics ``row_grads`` takes."""
    operands = _operands(logits, target, class_weight)
    if target.is_floating_point():
        return soft_target_rows.row_loss(*operands, **_options(spec))
    return softmax_rows.row_loss(*operands, ignore_index=spec.ignore_index, **_options(spec))


def _room(x: Tensor, logits: Tensor, dlogits: Tensor | None) -> Tensor | None:
    """Where kernels put the gradient: ``dlogits``, or rows with unit stride to be copied there;
    ``x`` is ``logits`` or such a copy."""
    if dlogits is None or _has_unit_stride(dlogits):
        return dlogits
    return x if x is not logits else torch.empty_like(x, memory_format=torch.contiguous_format)


def row_grads(
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
    x, t, weight = _operands(logits, target, class_weight)
    room = _room(x, logits, dlogits)
    dlse, dlogprob, dentropy = (None if t is None else t.contiguous() for t in upstream[1:])
    if target.is_floating_point():
        soft_target_rows.row_grads(
            x,
            t,
            weight,
            kept,
            upstream.loss,
            dlogits=room,
            dtarget=dtarget,
            dlse=dlse,
            dlogprob=dlogprob,
            dentropy=dentropy,
            num_classes=spec.num_classes,
            **_options(spec),
        )
    elif room is not None:
        softmax_rows.row_grads(
            x,
            t,
            weight,
            kept,
            upstream.loss,
            dlogits=room,
            dlse=dlse,
            dlogprob=dlogprob,
            dentropy=dentropy,
            first_class=spec.first_class,
            num_classes=spec.num_classes,
            ignore_index=spec.ignore_index,
            **_options(spec),
        )
    if dlogits is not None and room is not None and room is not dlogits:
        dlogits.copy_(room)


def row_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> Tensor:
    """(N,) losses, and the gradients that are given filled; ``dlogits`` may be ``logits``."""
    if dlogits is None or target.is_floating_point():
        loss, stats = row_loss(logits, target, class_weight, spec)
        row_grads(logits, target, class_weight, stats, Upstream(dloss), spec, dlogits, dtarget)
        return loss
    x, t, weight = _operands(logits, target, class_weight)
    room = _room(x, logits, dlogits)
    assert room is not None
    loss = fused_rows.row_loss_and_grads(
        x, t, weight, dloss, dlogits=room, ignore_index=spec.ignore_index, **_options(spec)
    )
    if room is not dlogits:
        dlogits.copy_(room)
    return loss


def row_stats(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
    upstream: Upstream | None,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> RowStats:
    """Statistics of N rows, and then the gradients that are given filled; ``dlogits`` may be
    ``logits``."""
    operands, options = (
        _operands(logits, target, class_weight),
        {**wants._asdict(), **_options(spec)},
    )
    if target.is_floating_point():
        made = RowStats(*soft_target_rows.row_stats(*operands, **options))
    else:
        made = RowStats(
            *softmax_rows.row_stats(*operands, ignore_index=spec.ignore_index, **options)
        )
    if upstream is None or (dlogits is None and dtarget is None):
        return made
    if upstream.only_loss and upstream.loss is not None:
        # what is made of the loss alone reads its row only once more
        row_loss_and_grads(logits, target, class_weight, upstream.loss, spec, dlogits, dtarget)
    else:
        row_grads(logits, target, class_weight, made.kept, upstream, spec, dlogits, dtarget)
    return made


def shard_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
    given: bool,
) -> ShardRows:
    """What a shard's rows are merged by; ``given`` asks for the sums of the probabilities as
    given."""
    assert spec.first_class is not None and spec.num_classes is not None
    operands, options = (
        _operands(logits, target, class_weight),
        {**wants._asdict(), **_row_options(spec)},
    )
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
    kept: Tensor,
    upstream: Upstream,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    """As ``row_grads``, of a shard's classes.

    ``kept`` are five numbers of each row, (5, N), merged: its maximum, log-sum, mean shortfall,
    weight of the target and sum of all class weights; against probabilities maximum, log-sum, mass,
    mass as given, mean shortfall."""
    assert spec.first_class is not None and spec.num_classes is not None
    row_grads(logits, target, class_weight, kept, upstream, spec, dlogits, dtarget)


def head_row_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> Tensor | None:
    """(N,) losses from a product whose logits stay in registers; None where there is no such
    product, or the loss needs all logits."""
    if (
        target.is_floating_point()
        or spec.label_smoothing
        or linear_rows.runs_on(hidden, weight) is not None
    ):
        return None
    return linear_rows.row_loss(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        target.contiguous(),
        None if class_weight is None else class_weight.to(torch.float32).contiguous(),
        ignore_index=spec.ignore_index,
        scale=spec.logit_scale,
        softcap=spec.softcap,
        lse_square_scale=spec.lse_square_scale or None,
    )


def head_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
) -> RowStats | None:
    """Statistics from a product whose logits stay in registers; None as for ``head_row_loss``."""
    if (
        target.is_floating_point()
        or spec.label_smoothing
        or linear_rows.runs_on(hidden, weight) is not None
    ):
        return None
    made = linear_rows.row_stats(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        target.contiguous(),
        None if class_weight is None else class_weight.to(torch.float32).contiguous(),
        **wants._asdict(),
        ignore_index=spec.ignore_index,
        scale=spec.logit_scale,
        softcap=spec.softcap,
        lse_square_scale=spec.lse_square_scale or None,
    )
    return RowStats(*made, hidden.new_empty(0))


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
    room = _room(x, logits, dlogits)
    label_rows.label_loss_and_grads(
        x,
        _unit_stride(target) if target.is_floating_point() else target.contiguous(),
        _unit_or_zero_stride(weight),
        _unit_or_zero_stride(pos_weight),
        ignore_index=ignore_index,
        loss=loss,
        dloss=None if dloss is None else _unit_or_zero_stride(dloss.expand(logits.shape)),
        dlogits=room,
        dtarget=dtarget,
    )
    if dlogits is not None and room is not None and room is not dlogits:
        dlogits.copy_(room)


def _unit_or_zero_stride(t: Tensor | None) -> Tensor | None:
    """``t`` with a last stride of 1, or of 0 for one number a row; other layouts are copied."""
    return t if t is None or t.stride(1) in (0, 1) else t.contiguous()


def log_softmax(logits: Tensor, logp: Tensor, stats: Tensor) -> None:
    """Fill ``logp``, and the ``stats`` that ``log_softmax_grad`` takes."""
    log_softmax_rows.log_softmax(_unit_stride(logits), logp, stats)


def log_softmax_grad(logits: Tensor, stats: Tensor, dlogp: Tensor, dlogits: Tensor) -> None:
    """Fill ``dlogits``."""
    log_softmax_rows.log_softmax_grad(_unit_stride(logits), stats, _unit_stride(dlogp), dlogits)
