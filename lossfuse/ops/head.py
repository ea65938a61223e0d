"""The operators of a linear head, for losses and for statistics, and their autograd.

``linear_row_loss`` and ``linear_row_stats`` save only their arguments; their backward computes the
logits again. ``linear_total`` and ``linear_stats_total`` are for a loss that is reduced to a
number: they return its gradients as outputs, and their backward multiplies these by the upstream
gradient. All chunks of logits are computed and freed in ``head_chunks``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..row_types import Upstream, Wants
from ..spec import LinearOptions, LossSpec
from ..targets import values_are_readable
from ..vocab_parallel.backend import check_ranks_agree
from . import head_chunks
from .chunk_plan import weight_grad_dtype
from .gradients import is_plain, multiply
from .head_chunks import Gradients, Head, Needs
from .library import (
    OPTIONS,
    STATS,
    UPSTREAM,
    WANTS,
    OpArgs,
    grouped,
    library,
    new_loss,
    no_grads,
    register,
)
from .row_stats import as_tensors as stats_as_tensors
from .row_stats import mark_stats, new_stats
from .rows import row_gradient_of_total, total_of_rows

ERR_SECOND_BACKWARD = (
    "a second backward needs the gradients of linear_cross_entropy again, but the first has"
    " returned them; pass options=LinearOptions(allow_retain_graph=True), to fuse_lm_head if it"
    " has called this"
)
ERR_SECOND_DERIVATIVE = (
    "the linear form has no second derivative (create_graph=True) except with impl='reference'; if"
    " fuse_lm_head has called it, lossfuse.unfuse_lm_head(model)"
)
# bytes of a gradient that a CPU multiplies and rounds at a time: torch upcasts them first
ROUNDED_BYTES = 16 << 20


class HeadOperands(NamedTuple):
    """The tensors of a call, first in every schema."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,) ids or (N, V) probabilities
    class_weight: Tensor | None  # (V,)

    @property
    def head(self) -> Head:
        return Head(self.hidden, self.weight, self.bias)


class ChunkArgs(NamedTuple):
    """``LinearOptions`` as the schemas take them; ``main_grad`` is an argument of its own."""

    chunk_bytes: int | None
    logits_dtype: torch.dtype | None
    acc_dtype: torch.dtype | None
    drop_ignored: bool | None
    keep_dlogits: bool
    allow_retain_graph: bool

    @classmethod
    def of(cls, options: LinearOptions) -> "ChunkArgs":
        return cls(
            options.chunk_bytes,
            options.logits_dtype,
            options.acc_dtype,
            options.drop_ignored,
            options.keep_dlogits,
            options.allow_retain_graph,
        )


class MainGrad(NamedTuple):
    """``linear_weight.main_grad``, which the backward adds the gradient of the weight to."""

    main_grad: Tensor | None  # (V, D) float32


class Reduction(NamedTuple):
    """The further tensors of a call whose loss is reduced."""

    divisor: Tensor | None  # ()
    row_weight: Tensor | None  # (N,)
    main_grad: Tensor | None


OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight"
CHUNKS = (
    "int? chunk_bytes, ScalarType? logits_dtype, ScalarType? acc_dtype, bool? drop_ignored,"
    " bool keep_dlogits, bool allow_retain_graph"
)
REDUCTION = "Tensor? divisor, Tensor? row_weight, Tensor? main_grad"
NEEDS = "bool need_hidden, bool need_weight, bool need_bias, bool need_target"
GRADS = "Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dtarget"

library.define(f"linear_row_loss({OPERANDS}, Tensor? main_grad, {CHUNKS}, {OPTIONS}) -> Tensor")
library.define(
    f"linear_row_stats({OPERANDS}, Tensor? main_grad, {WANTS}, {CHUNKS}, {OPTIONS})"
    f" -> (Tensor loss, {STATS})"
)
library.define(f"linear_grads({OPERANDS}, {UPSTREAM}, {NEEDS}, {CHUNKS}, {OPTIONS}) -> ({GRADS})")
library.define(
    f"linear_total({OPERANDS}, {REDUCTION}, {NEEDS}, {CHUNKS}, {OPTIONS})"
    f" -> (Tensor total, {GRADS})"
)
library.define(
    f"linear_stats_total({OPERANDS}, {REDUCTION}, {NEEDS}, {WANTS}, {CHUNKS}, {OPTIONS})"
    f" -> (Tensor total, {STATS}, {GRADS})"
)

linear_row_loss = torch.ops.lossfuse.linear_row_loss.default
linear_row_stats = torch.ops.lossfuse.linear_row_stats.default
linear_grads = torch.ops.lossfuse.linear_grads.default
linear_total = torch.ops.lossfuse.linear_total.default
linear_stats_total = torch.ops.lossfuse.linear_stats_total.default


# --- kernels


def _checked_spec(operands: HeadOperands, args: OpArgs) -> LossSpec:
    spec = args.checked_spec(len(operands.weight), operands.target)
    # ranks compare all rows at once where values can be read or debug_targets() asks for it: a
    # chunk does not know how many chunks the other ranks have
    if spec.group is not None and values_are_readable(operands.target):
        check_ranks_agree(operands.target, len(operands.weight), spec)
    return spec


def _row_loss(*flat: Any) -> Tensor:
    operands, _, chunks, args = grouped(flat, HeadOperands, MainGrad, ChunkArgs, OpArgs)
    spec = _checked_spec(operands, args)
    return head_chunks.row_loss(
        operands.head,
        operands.target,
        operands.class_weight,
        spec,
        LinearOptions(*chunks),
        args.backend,
    )


def _row_loss_fake(hidden: Tensor, *_: Any) -> Tensor:
    return new_loss(hidden)


def _row_stats(*flat: Any) -> tuple[Tensor, ...]:
    operands, _, wants, chunks, args = grouped(
        flat, HeadOperands, MainGrad, Wants, ChunkArgs, OpArgs
    )
    spec = _checked_spec(operands, args)
    stats = head_chunks.row_stats(
        operands.head,
        operands.target,
        operands.class_weight,
        wants,
        spec,
        LinearOptions(*chunks),
        args.backend,
    )
    *outputs, _ = stats_as_tensors(stats)
    return tuple(outputs)


def _row_stats_fake(*flat: Any) -> tuple[Tensor, ...]:
    operands, _, wants = grouped(flat, HeadOperands, MainGrad, Wants)
    return new_stats(operands.hidden, wants)


def _grads(*flat: Any) -> tuple[Tensor, ...]:
    operands, upstream, needs, chunks, args = grouped(
        flat, HeadOperands, Upstream, Needs, ChunkArgs, OpArgs
    )
    tensors = operands.head, operands.target, operands.class_weight
    how = args.spec, LinearOptions(*chunks), args.backend
    if upstream.only_loss:
        _, grads = head_chunks.row_loss_and_grads(*tensors, upstream.loss, needs, *how)
    else:
        wants = Wants(entropy=upstream.entropy is not None, argmax=False)
        _, grads = head_chunks.row_stats_and_grads(*tensors, upstream, needs, wants, *how)
    return _as_tensors(grads, operands.hidden)


def _grads_fake(*flat: Any) -> tuple[Tensor, ...]:
    operands, _, needs, chunks = grouped(flat, HeadOperands, Upstream, Needs, ChunkArgs)
    return _new_grads(operands, needs, chunks)


def _total(*flat: Any) -> tuple[Tensor, ...]:
    operands, (divisor, row_weight, _), needs, chunks, args = grouped(
        flat, HeadOperands, Reduction, Needs, ChunkArgs, OpArgs
    )
    spec = _checked_spec(operands, args)
    loss, grads = head_chunks.row_loss_and_grads(
        operands.head,
        operands.target,
        operands.class_weight,
        row_gradient_of_total(operands.hidden, divisor, row_weight),
        needs,
        spec,
        LinearOptions(*chunks),
        args.backend,
    )
    return total_of_rows(loss, divisor, row_weight), *_as_tensors(grads, operands.hidden)


def _total_fake(*flat: Any) -> tuple[Tensor, ...]:
    operands, _, needs, chunks = grouped(flat, HeadOperands, Reduction, Needs, ChunkArgs)
    return new_loss(operands.hidden).sum(), *_new_grads(operands, needs, chunks)


def _stats_total(*flat: Any) -> tuple[Tensor, ...]:
    operands, (divisor, row_weight, _), needs, wants, chunks, args = grouped(
        flat, HeadOperands, Reduction, Needs, Wants, ChunkArgs, OpArgs
    )
    spec = _checked_spec(operands, args)
    computed, grads = head_chunks.row_stats_and_grads(
        operands.head,
        operands.target,
        operands.class_weight,
        Upstream(row_gradient_of_total(operands.hidden, divisor, row_weight)),
        needs,
        wants,
        spec,
        LinearOptions(*chunks),
        args.backend,
    )
    loss, *stats, _ = stats_as_tensors(computed)
    total = total_of_rows(loss, divisor, row_weight)
    return total, *stats, *_as_tensors(grads, operands.hidden)


def _stats_total_fake(*flat: Any) -> tuple[Tensor, ...]:
    operands, _, needs, wants, chunks = grouped(
        flat, HeadOperands, Reduction, Needs, Wants, ChunkArgs
    )
    loss, *stats = new_stats(operands.hidden, wants)
    return loss.sum(), *stats, *_new_grads(operands, needs, chunks)


def _as_tensors(grads: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs of the schema: gradients that were not computed are empty."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _new_grads(operands: HeadOperands, needs: Needs, chunks: ChunkArgs) -> tuple[Tensor, ...]:
    hidden, weight, _, target, _ = operands
    options = LinearOptions(*chunks)
    dtype = options.dtype("acc_dtype", hidden.dtype)
    dweight_dtype = weight_grad_dtype(hidden.dtype, options, hidden.device)
    grads = Gradients(
        hidden.new_empty(hidden.shape, dtype=dtype) if needs.hidden else None,
        hidden.new_empty(weight.shape, dtype=dweight_dtype) if needs.weight else None,
        hidden.new_empty(len(weight), dtype=dtype) if needs.bias else None,
        target.new_empty(target.shape) if needs.target else None,
    )
    return _as_tensors(grads, hidden)


register("linear_row_loss", _row_loss, _row_loss_fake)
register("linear_row_stats", _row_stats, _row_stats_fake)
register("linear_grads", _grads, _grads_fake)
register("linear_total", _total, _total_fake)
register("linear_stats_total", _stats_total, _stats_total_fake)


# --- autograd


def _save_row_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    operands, (ctx.main_grad,), *ctx.options = grouped(
        inputs, HeadOperands, MainGrad, ChunkArgs, OpArgs
    )
    # main_grad is not saved for backward: others add to it between forward and backward
    ctx.save_for_backward(*operands)
    ctx.set_materialize_grads(False)


def _row_loss_backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
    operands = HeadOperands(*ctx.saved_tensors)
    grads = _recomputed(ctx, operands, Upstream(dloss), Needs(*ctx.needs_input_grad[:4]))
    return *grads, None, *no_grads(MainGrad, ChunkArgs, OpArgs)


def _save_row_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, (ctx.main_grad,), wants, *ctx.options = grouped(
        inputs, HeadOperands, MainGrad, Wants, ChunkArgs, OpArgs
    )
    *_, entropy, argmax = output
    ctx.save_for_backward(*operands)
    mark_stats(ctx, wants, entropy, argmax)


def _row_stats_backward(
    ctx: Any,
    dloss: Tensor | None,
    dlse: Tensor | None,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    _: None,
) -> tuple[Tensor | None, ...]:
    operands, upstream = HeadOperands(*ctx.saved_tensors), Upstream(dloss, dlse, dlogprob, dentropy)
    grads = _recomputed(ctx, operands, upstream, Needs(*ctx.needs_input_grad[:4]))
    return *grads, None, *no_grads(MainGrad, Wants, ChunkArgs, OpArgs)


def _recomputed(ctx: Any, operands: HeadOperands, upstream: Upstream, needs: Needs) -> Gradients:
    """Return the gradients of statistics, from logits that are computed again."""
    given = [t for t in upstream if t is not None]
    if not given:
        return Gradients()
    for t in given:
        _refuse_second_derivative(t)
    chunks, args = ctx.options
    dhidden, dweight, dbias, dtarget = linear_grads(*operands, *upstream, *needs, *chunks, *args)
    hidden, weight, bias, _, _ = operands
    to_main_grad = needs.weight and ctx.main_grad is not None
    if to_main_grad:
        ctx.main_grad.add_(dweight)
    return Gradients(
        dhidden.to(hidden.dtype) if needs.hidden else None,
        dweight.to(weight.dtype) if needs.weight and not to_main_grad else None,
        dbias.to(bias.dtype) if needs.bias and bias is not None else None,
        dtarget if needs.target else None,
    )


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, (_, _, ctx.main_grad), ctx.needs, *ctx.options = grouped(
        inputs, HeadOperands, Reduction, Needs, ChunkArgs, OpArgs
    )
    _, *grads = output
    _save_formed(ctx, operands)
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)


def _total_backward(ctx: Any, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads = Gradients()
    if dtotal is not None:
        if ctx.spent:
            raise RuntimeError(ERR_SECOND_BACKWARD)
        grads = _times_upstream(ctx, ctx.saved_tensors, dtotal)
    return *grads, None, *no_grads(Reduction, Needs, ChunkArgs, OpArgs)


def _save_stats_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, (divisor, row_weight, ctx.main_grad), ctx.needs, wants, *ctx.options = grouped(
        inputs, HeadOperands, Reduction, Needs, Wants, ChunkArgs, OpArgs
    )
    _, _, _, entropy, argmax, *grads = output
    _save_formed(ctx, operands)
    mark_stats(ctx, wants, entropy, argmax, *grads)
    ctx.save_for_backward(*operands, divisor, row_weight, *grads)


def _stats_total_backward(
    ctx: Any,
    dtotal: Tensor | None,
    dlse: Tensor | None,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    *tensors, divisor, row_weight, dhidden, dweight, dbias, dtarget = ctx.saved_tensors
    operands = HeadOperands(*tensors)
    total_alone = dtotal is not None and dlse is dlogprob is dentropy is None
    if dtotal is not None and total_alone and not ctx.spent:
        # .data: writing to them must not invalidate the operands that are saved with them
        formed = [g.data for g in (dhidden, dweight, dbias, dtarget)]
        grads = _times_upstream(ctx, formed, dtotal)
    else:
        dloss = None
        if dtotal is not None:
            dloss = row_gradient_of_total(operands.hidden, divisor, row_weight) * dtotal
        upstream = Upstream(dloss, dlse, dlogprob, dentropy)
        grads = _recomputed(ctx, operands, upstream, ctx.needs)
    return *grads, None, *no_grads(Reduction, Needs, Wants, ChunkArgs, OpArgs)


def _save_formed(ctx: Any, operands: HeadOperands) -> None:
    """Save what ``_times_upstream`` reads, beside the gradients."""
    hidden, weight, bias, target, _ = operands
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype, target.dtype
    ctx.spent = False


def _times_upstream(ctx: Any, formed: Any, dtotal: Tensor) -> Gradients:
    """Return the gradients that the forward formed times ``dtotal``, in their own memory unless
    they stay for another backward."""
    _refuse_second_derivative(dtotal)
    chunks, args = ctx.options
    # a compiler, or a batch of upstream gradients, multiplies out of place
    in_place = is_plain(dtotal) and not chunks.allow_retain_graph
    ctx.spent = in_place

    def times(needed: bool, g: Tensor, dtype: torch.dtype) -> Tensor | None:
        if not needed:
            return None
        return _times(g, dtotal, dtype, args.impl) if in_place else (g * dtotal).to(dtype)

    needs, main_grad = ctx.needs, ctx.main_grad
    if needs.weight and main_grad is not None:
        _, dweight, *_ = formed
        main_grad.addcmul_(dweight, dtotal)
        needs = needs._replace(weight=False)
    return Gradients(*map(times, needs, formed, ctx.dtypes))


torch.library.register_autograd(
    "lossfuse::linear_row_loss", _row_loss_backward, setup_context=_save_row_loss, lib=library
)
torch.library.register_autograd(
    "lossfuse::linear_row_stats", _row_stats_backward, setup_context=_save_row_stats, lib=library
)
torch.library.register_autograd(
    "lossfuse::linear_total", _total_backward, setup_context=_save_total, lib=library
)
torch.library.register_autograd(
    "lossfuse::linear_stats_total",
    _stats_total_backward,
    setup_context=_save_stats_total,
    lib=library,
)


def _times(g: Tensor, factor: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """Return ``g * factor`` rounded once to ``dtype``, in the memory of ``g`` if it has that
    dtype."""
    if g.dtype == dtype:
        multiply(g, factor, impl)
        return g
    rounded = torch.empty(g.shape, dtype=dtype, device=g.device)
    rows = len(g)
    if g.device.type == "cpu":
        rows = max(1, ROUNDED_BYTES // max(1, g[:1].numel() * g.element_size()))
    for part, out in zip(g.split(rows), rounded.split(rows), strict=True):
        torch.mul(part, factor, out=out)
    return rounded


def _refuse_second_derivative(t: Tensor) -> None:
    # a compiler traces with another type; a batch, as under is_grads_batched, is a Tensor
    if torch.is_grad_enabled() and type(t) is Tensor:
        raise RuntimeError(ERR_SECOND_DERIVATIVE)
