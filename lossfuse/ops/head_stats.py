"""The operators of a head's statistics and their derivatives.

``linear_row_stats`` keeps nothing but its arguments. ``linear_stats_total``, for a loss that is
reduced to a number, forms that number's gradients with the statistics; they serve if nothing else
gets one, and are made again otherwise."""

from typing import Any

import torch
from torch import Tensor

from ..row_types import Upstream, Wants
from . import head_chunks
from .head import (
    CHUNKS,
    GRADS,
    HEAD,
    N_CHUNKS,
    NEEDS,
    as_tensors,
    checked_head_spec,
    dloss_of,
    handed_over,
    made_again,
    new_grads,
    split,
)
from .head_chunks import Head, Needs
from .library import N_OPTIONS, OPTIONS, STATS, WANTS, backend_of, library, register
from .row_stats import as_tensors as stats_as_tensors
from .row_stats import new_stats, without_gradient

library.define(
    f"linear_row_stats({HEAD}, Tensor? main_grad_buffer, {WANTS}, {CHUNKS}, {OPTIONS}) -> (Tensor loss, {STATS})"
)
library.define(
    f"linear_stats_total({HEAD}, Tensor? divisor, Tensor? main_grad_buffer, {NEEDS}, {WANTS}, {CHUNKS}, {OPTIONS})"
    f" -> (Tensor total, {STATS}, {GRADS})"
)

linear_row_stats = torch.ops.lossfuse.linear_row_stats.default
linear_stats_total = torch.ops.lossfuse.linear_stats_total.default


def _row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    buffer: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    wants, (chunks, loss_options) = Wants(*rest[:2]), split(rest[2:])
    spec = checked_head_spec(weight, target, loss_options)
    made = head_chunks.row_stats(
        Head(hidden, weight, bias),
        target,
        class_weight,
        wants,
        spec,
        chunks,
        backend_of(loss_options),
    )
    return stats_as_tensors(made)[:-1]


def _row_stats_shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    buffer: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return new_stats(hidden, Wants(*rest[:2]))


def _total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    buffer: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs, wants, (chunks, loss_options) = Needs(*rest[:4]), Wants(*rest[4:6]), split(rest[6:])
    spec = checked_head_spec(weight, target, loss_options)
    upstream = Upstream(dloss_of(hidden, divisor))
    made, grads = head_chunks.row_stats_and_grads(
        Head(hidden, weight, bias),
        target,
        class_weight,
        upstream,
        needs,
        wants,
        spec,
        chunks,
        backend_of(loss_options),
    )
    loss, *stats, _ = stats_as_tensors(made)
    total = loss.sum() if divisor is None else loss.sum() / divisor
    return total, *stats, *as_tensors(grads, hidden)


def _total_shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    buffer: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    loss, *stats = new_stats(hidden, Wants(*rest[4:6]))
    return (
        loss.sum(),
        *stats,
        *new_grads(hidden, weight, target, Needs(*rest[:4]), split(rest[6:])[0]),
    )


for _name, _impl, _shapes in (
    ("linear_row_stats", _row_stats, _row_stats_shapes),
    ("linear_stats_total", _total, _total_shapes),
):
    register(_name, _impl, _shapes)


def _save_row_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, buffer = inputs[:6]
    ctx.save_for_backward(*tensors)
    # not saved: a buffer is written by whoever has it
    ctx.buffer, ctx.options = buffer, inputs[8:]
    ctx.mark_non_differentiable(*without_gradient(inputs[6], *output[-2:]))
    ctx.set_materialize_grads(False)


def _row_stats_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = made_again(
        ctx.saved_tensors,
        Upstream(*upstream[:4]),
        ctx.needs_input_grad[:4],
        ctx.buffer,
        ctx.options,
    )
    return *grads, *(None,) * (4 + N_CHUNKS + N_OPTIONS)


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, divisor, ctx.buffer, ctx.needs, ctx.options = (
        inputs[:5],
        inputs[5],
        inputs[6],
        inputs[7:11],
        inputs[13:],
    )
    ctx.dtypes = [None if t is None else t.dtype for t in tensors[:4]]
    ctx.retain, ctx.impl, ctx.spent = ctx.options[4], ctx.options[-1], False
    made = output[5:]
    ctx.mark_non_differentiable(*without_gradient(inputs[11], *output[3:5]), *made)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, divisor, *made)


def _total_backward(
    ctx: Any, dtotal: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, divisor = ctx.saved_tensors[:6]
    dstats = rest[:3]
    if dtotal is not None and not ctx.spent and all(t is None for t in dstats):
        # under another name: what becomes of them must not keep a later backward from the arguments
        # saved beside them
        grads = handed_over(ctx, [g.data for g in ctx.saved_tensors[6:]], dtotal)
    else:
        dloss = None if dtotal is None else dloss_of(tensors[0], divisor) * dtotal
        grads = made_again(tensors, Upstream(dloss, *dstats), ctx.needs, ctx.buffer, ctx.options)
    return *grads, *(None,) * (3 + len(ctx.needs) + 2 + N_CHUNKS + N_OPTIONS)


torch.library.register_autograd(
    "lossfuse::linear_row_stats", _row_stats_backward, setup_context=_save_row_stats, lib=library
)
torch.library.register_autograd(
    "lossfuse::linear_stats_total", _total_backward, setup_context=_save_total, lib=library
)
