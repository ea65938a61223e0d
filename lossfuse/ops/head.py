"""The operators of a head and their derivatives: what ``ops.rows`` is for logits.

``linear_total`` is the strategy of the scalar reductions: it returns the loss with its gradients,
all in one operator without side effects, and its backward multiplies them by one number.
``linear_row_loss`` keeps nothing but its arguments, and its backward, ``linear_grads``, makes the
logits again."""

from typing import Any

import torch
from torch import Tensor

from ..row_types import Upstream, Wants
from ..spec import LinearOptions, LossSpec, loss_spec
from ..targets import values_are_readable
from ..vocab_parallel.backend import check_ranks_agree
from . import head_chunks
from .gradients import is_plain, multiply
from .head_chunks import Gradients, Head, Needs
from .library import (
    N_OPTIONS,
    OPTIONS,
    UPSTREAM,
    backend_of,
    checked_spec,
    library,
    new_loss,
    register,
)

SPENT = (
    "a second backward needs the gradients of linear_cross_entropy again, but the first has handed them over; pass"
    " options=LinearOptions(allow_retain_graph=True), to fuse_lm_head where it has called this"
)
NO_SECOND_DERIVATIVE = (
    "the linear form has no second derivative (create_graph=True) but with impl='reference'; if fuse_lm_head has called it,"
    " lossfuse.unfuse_lm_head(model)"
)

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight"
CHUNKS = "int? chunk_bytes, ScalarType? logits_dtype, ScalarType? acc_dtype, bool? drop_ignored, bool allow_retain_graph"
NEEDS = "bool need_hidden, bool need_weight, bool need_bias, bool need_target"
GRADS = "Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dtarget"
N_CHUNKS = 5

library.define(f"linear_row_loss({HEAD}, Tensor? main_grad_buffer, {CHUNKS}, {OPTIONS}) -> Tensor")
library.define(f"linear_grads({HEAD}, {UPSTREAM}, {NEEDS}, {CHUNKS}, {OPTIONS}) -> ({GRADS})")
library.define(
    f"linear_total({HEAD}, Tensor? divisor, Tensor? main_grad_buffer, {NEEDS}, {CHUNKS}, {OPTIONS}) -> (Tensor total, {GRADS})"
)

linear_row_loss = torch.ops.lossfuse.linear_row_loss.default
linear_grads = torch.ops.lossfuse.linear_grads.default
linear_total = torch.ops.lossfuse.linear_total.default


def chunk_options(options: LinearOptions) -> tuple[Any, ...]:
    """As the schemas take them; where there is a ``main_grad``, it is an argument of its own."""
    return (
        options.chunk_bytes,
        options.logits_dtype,
        options.acc_dtype,
        options.drop_ignored,
        options.allow_retain_graph,
    )


def split(options: tuple[Any, ...]) -> tuple[LinearOptions, tuple[Any, ...]]:
    return LinearOptions(*options[:N_CHUNKS]), options[N_CHUNKS:]


def checked_head_spec(weight: Tensor, target: Tensor, loss_options: tuple[Any, ...]) -> LossSpec:
    spec = checked_spec(len(weight), target, loss_options)
    # all rows at once, where that is free or asked for: a chunk knows neither which rows it is of
    # nor how many chunks other ranks make
    if spec.group is not None and values_are_readable(target):
        check_ranks_agree(target, len(weight), spec)
    return spec


def _row_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    buffer: Tensor | None,
    *options: Any,
) -> Tensor:
    chunks, loss_options = split(options)
    spec = checked_head_spec(weight, target, loss_options)
    return head_chunks.row_loss(
        Head(hidden, weight, bias), target, class_weight, spec, chunks, backend_of(loss_options)
    )


def _row_loss_shapes(hidden: Tensor, *rest: Any) -> Tensor:
    return new_loss(hidden)


def _grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    upstream, needs, (chunks, loss_options) = (
        Upstream(*rest[:4]),
        Needs(*rest[4:8]),
        split(rest[8:]),
    )
    arguments = Head(hidden, weight, bias), target, class_weight
    how = loss_spec(*loss_options[:-1]), chunks, backend_of(loss_options)
    if upstream.only_loss and upstream.loss is not None:
        _, grads = head_chunks.row_loss_and_grads(*arguments, upstream.loss, needs, *how)
    else:
        wants = Wants(entropy=upstream.entropy is not None, argmax=False)
        _, grads = head_chunks.row_stats_and_grads(*arguments, upstream, needs, wants, *how)
    return as_tensors(grads, hidden)


def _grads_shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return new_grads(hidden, weight, target, Needs(*rest[4:8]), split(rest[8:])[0])


def _total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    buffer: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    needs = Needs(*options[:4])
    chunks, loss_options = split(options[4:])
    spec = checked_head_spec(weight, target, loss_options)
    arguments = Head(hidden, weight, bias), target, class_weight, dloss_of(hidden, divisor)
    loss, grads = head_chunks.row_loss_and_grads(
        *arguments, needs, spec, chunks, backend_of(loss_options)
    )
    total = loss.sum() if divisor is None else loss.sum() / divisor
    return total, *as_tensors(grads, hidden)


def _total_shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    buffer: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    grads = new_grads(hidden, weight, target, Needs(*options[:4]), split(options[4:])[0])
    return new_loss(hidden).sum(), *grads


def dloss_of(hidden: Tensor, divisor: Tensor | None) -> Tensor:
    """What a sum over ``divisor`` makes of each row."""
    one = torch.ones((), dtype=new_loss(hidden[:0]).dtype, device=hidden.device)
    # the divisor may be a number of the host, which is not waited for
    return (one if divisor is None else one / divisor).expand(len(hidden))


def as_tensors(grads: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """A gradient nobody needs is an empty tensor."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def new_grads(
    hidden: Tensor, weight: Tensor, target: Tensor, needs: Needs, chunks: LinearOptions
) -> tuple[Tensor, ...]:
    dtype = chunks.dtype("acc_dtype", hidden.dtype)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dhidden, dweight, dbias = (
        hidden.new_empty(shape, dtype=dtype) if need else None
        for shape, need in zip(shapes, needs[:3], strict=True)
    )
    return as_tensors(
        Gradients(
            dhidden, dweight, dbias, target.new_empty(target.shape) if needs.target else None
        ),
        hidden,
    )


for _name, _impl, _shapes in (
    ("linear_row_loss", _row_loss, _row_loss_shapes),
    ("linear_grads", _grads, _grads_shapes),
    ("linear_total", _total, _total_shapes),
):
    register(_name, _impl, _shapes)


def _save_row_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, buffer = inputs[:6]
    ctx.save_for_backward(*tensors)
    # not saved: a buffer is written by whoever has it
    ctx.buffer, ctx.options = buffer, inputs[6:]
    ctx.set_materialize_grads(False)


def _row_loss_backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = made_again(
        ctx.saved_tensors, Upstream(dloss), ctx.needs_input_grad[:4], ctx.buffer, ctx.options
    )
    return *grads, *(None,) * (2 + N_CHUNKS + N_OPTIONS)


def made_again(
    tensors: Any, upstream: Upstream, needed: Any, buffer: Tensor | None, options: Any
) -> list[Tensor | None]:
    """Gradients of hidden states, weight, bias and probabilities from logits that are made
    again."""
    given = [t for t in upstream if t is not None]
    if not given:
        return [None] * 4
    for t in given:
        _refuse_second_derivative(t)
    made = linear_grads(*tensors, *upstream, *needed, *options)
    grads = [
        g.to(t.dtype) if need else None for g, t, need in zip(made, tensors, needed, strict=False)
    ]
    if buffer is not None and needed[1]:
        buffer.add_(made[1])
        grads[1] = None
    return grads


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.buffer, ctx.needs, options = inputs[:4], inputs[6], inputs[7:11], inputs[11:]
    ctx.dtypes = [None if t is None else t.dtype for t in tensors]
    ctx.retain, ctx.impl, ctx.spent = options[4], options[-1], False
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _total_backward(ctx: Any, dtotal: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 4
    if dtotal is not None:
        if ctx.spent:
            raise RuntimeError(SPENT)
        grads = handed_over(ctx, ctx.saved_tensors, dtotal)
    return *grads, *(None,) * (3 + len(ctx.needs) + N_CHUNKS + N_OPTIONS)


def handed_over(ctx: Any, made: Any, dtotal: Tensor) -> list[Tensor | None]:
    """The gradients of a forward times ``dtotal``, in their own memory if they need not stay."""
    _refuse_second_derivative(dtotal)
    # what a compiler traces, or a batch of factors, multiplies one gradient that stays
    hand_over = is_plain(dtotal) and not ctx.retain
    ctx.spent = hand_over
    grads: list[Tensor | None] = [None] * 4
    for i, (g, dtype) in enumerate(zip(made, ctx.dtypes, strict=True)):
        if not ctx.needs[i]:
            continue
        if i == 1 and ctx.buffer is not None:
            ctx.buffer.addcmul_(g, dtotal)
        else:
            grads[i] = _times(g, dtotal, dtype, ctx.impl) if hand_over else (g * dtotal).to(dtype)
    return grads


torch.library.register_autograd(
    "lossfuse::linear_row_loss", _row_loss_backward, setup_context=_save_row_loss, lib=library
)
torch.library.register_autograd(
    "lossfuse::linear_total", _total_backward, setup_context=_save_total, lib=library
)

# of a gradient that is multiplied and rounded on a CPU, whose operators convert all of it first
ROUNDED_BYTES = 16 << 20


def _times(g: Tensor, factor: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """``g * factor`` in a dtype, in the memory of ``g`` where it can be; rounded once."""
    if g.dtype == dtype:
        multiply(g, factor, impl)
        return g
    rounded = torch.empty(g.shape, dtype=dtype, device=g.device)
    rows = (
        len(g)
        if g.device.type != "cpu"
        else max(1, ROUNDED_BYTES // max(1, g[:1].numel() * g.element_size()))
    )
    for some, out in zip(g.split(rows), rounded.split(rows), strict=True):
        torch.mul(some, factor, out=out)
    return rounded


def _refuse_second_derivative(t: Tensor) -> None:
    # not what a compiler traces; a batch of them is a Tensor too
    if torch.is_grad_enabled() and type(t) is Tensor:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
