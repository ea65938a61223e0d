"""The operators of rows of logits and their derivatives.

``row_loss`` and ``row_grads`` know their own derivatives, so compilers and double backward see
operators; the derivative of the gradient comes from the reference. ``ReducedLoss`` is the one
strategy that must know in the forward that a single number scales all rows.

``stats`` is what a backend wants back in ``row_grads``. An operator whose name ends in ``_`` writes
the gradient over the logits."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..row_types import Upstream
from ..spec import LossSpec, loss_spec
from ..vocab_parallel.merge import SAVED_ROWS
from .gradients import (
    NO_OPTIONS_GRAD,
    formed_gradients,
    refuse_second_derivative,
    row_gradients,
    second_derivative,
    wanted,
    writing,
)
from .inplace import Owner
from .library import (
    OPTIONS,
    backend_of,
    checked_spec,
    entry,
    library,
    new_grad,
    new_loss,
    options,
    register,
)

library.define(
    f"row_loss(Tensor logits, Tensor target, Tensor? class_weight, {OPTIONS}) -> (Tensor loss, Tensor stats)"
)
library.define(
    "row_grads(Tensor logits, Tensor target, Tensor? class_weight, Tensor stats, Tensor dloss, bool need_dlogits, bool need_dtarget,"
    f" {OPTIONS}) -> (Tensor dlogits, Tensor dtarget)"
)
library.define(
    "row_loss_and_grads(Tensor logits, Tensor target, Tensor? class_weight, Tensor dloss, bool need_dlogits, bool need_dtarget,"
    f" {OPTIONS}) -> (Tensor loss, Tensor dlogits, Tensor dtarget)"
)

library.define(
    f"row_loss_and_grads_(Tensor(a!) logits, Tensor target, Tensor? class_weight, Tensor dloss, bool need_dtarget, {OPTIONS})"
    " -> (Tensor loss, Tensor dtarget)"
)
library.define(
    "row_grads_(Tensor(a!) logits, Tensor target, Tensor? class_weight, Tensor stats, Tensor dloss, bool need_dtarget,"
    f" {OPTIONS}) -> Tensor dtarget"
)


def _new_grads(
    logits: Tensor, target: Tensor, need_dlogits: bool, need_dtarget: bool
) -> tuple[Tensor, Tensor]:
    return new_grad(logits, need_dlogits), new_grad(target, need_dtarget)


def _row_loss(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    spec = checked_spec(logits.shape[1], target, options)
    loss, stats = backend_of(options).row_loss(logits, target, class_weight, spec)
    return loss, stats


def _row_loss_shapes(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    loss = new_loss(logits)
    n_stats = (
        SAVED_ROWS
        if options[-2]
        else 0
        if options[-1] == "torch"
        else 3
        if target.is_floating_point()
        else 2
    )
    return loss, loss.new_empty(n_stats, logits.shape[0])


def _row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    dlogits, dtarget = _new_grads(logits, target, need_dlogits, need_dtarget)
    backend_of(options).row_grads(
        logits,
        target,
        class_weight,
        stats,
        Upstream(dloss),
        loss_spec(*options[:-1]),
        dlogits if need_dlogits else None,
        dtarget if need_dtarget else None,
    )
    return dlogits, dtarget


def _row_grads_shapes(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return _new_grads(logits, target, need_dlogits, need_dtarget)


def _row_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = checked_spec(logits.shape[1], target, options)
    dlogits, dtarget = _new_grads(logits, target, need_dlogits, need_dtarget)
    loss: Tensor = backend_of(options).row_loss_and_grads(
        logits,
        target,
        class_weight,
        dloss,
        spec,
        dlogits if need_dlogits else None,
        dtarget if need_dtarget else None,
    )
    return loss, dlogits, dtarget


def _row_loss_and_grads_shapes(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return new_loss(logits), *_new_grads(logits, target, need_dlogits, need_dtarget)


def _row_loss_and_grads_(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    spec = checked_spec(logits.shape[1], target, options)
    dtarget = new_grad(target, need_dtarget)
    loss: Tensor = backend_of(options).row_loss_and_grads(
        logits, target, class_weight, dloss, spec, logits, dtarget if need_dtarget else None
    )
    return loss, dtarget


def _row_loss_and_grads_shapes_(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return new_loss(logits), new_grad(target, need_dtarget)


def _row_grads_(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> Tensor:
    dtarget = new_grad(target, need_dtarget)
    spec, wanted = loss_spec(*options[:-1]), dtarget if need_dtarget else None
    backend_of(options).row_grads(
        logits, target, class_weight, stats, Upstream(dloss), spec, logits, wanted
    )
    return dtarget


def _row_grads_shapes_(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> Tensor:
    return new_grad(target, need_dtarget)


register("row_loss", _row_loss, _row_loss_shapes)
register("row_grads", _row_grads, _row_grads_shapes)
register("row_loss_and_grads", _row_loss_and_grads, _row_loss_and_grads_shapes)
register("row_loss_and_grads_", _row_loss_and_grads_, _row_loss_and_grads_shapes_)
register("row_grads_", _row_grads_, _row_grads_shapes_)

row_loss = entry("row_loss", _row_loss, 3)
row_grads = entry("row_grads", _row_grads, 5)
row_loss_and_grads = entry("row_loss_and_grads", _row_loss_and_grads, 4)
row_loss_and_grads_ = entry("row_loss_and_grads_", _row_loss_and_grads_, 4)
row_grads_ = entry("row_grads_", _row_grads_, 5)


def _save_row_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, *options = inputs
    ctx.save_for_backward(logits, target, class_weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = tuple(options)


def _row_loss_backward(ctx: Any, dloss: Tensor | None, dstats: None) -> tuple[Tensor | None, ...]:
    grads = (None, None) if dloss is None else _row_loss_gradients(ctx, dloss)
    return *grads, None, *NO_OPTIONS_GRAD


def _row_loss_gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    logits, target, class_weight, stats = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    return wanted(
        row_grads(logits, target, class_weight, stats, dloss, *needed, *ctx.options), *needed
    )


def _save_row_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, _, dloss, need_dlogits, need_dtarget, *options = inputs
    ctx.save_for_backward(logits, target, class_weight, dloss)
    ctx.set_materialize_grads(False)
    ctx.needed = (need_dlogits, need_dtarget)
    ctx.spec = LossSpec(*options[:-1])


def _row_grads_backward(
    ctx: Any, v_dlogits: Tensor | None, v_dtarget: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, target, class_weight, dloss = ctx.saved_tensors
    refuse_second_derivative(ctx.spec)

    def values(x: Tensor, t: Tensor) -> list[Tensor]:
        return [reference.row_loss(x, t, class_weight, ctx.spec)]

    ddlogits, ddtarget, (ddloss,) = second_derivative(
        values, logits, target, [dloss], (v_dlogits, v_dtarget)
    )
    return ddlogits, ddtarget, None, None, ddloss, None, None, *NO_OPTIONS_GRAD


torch.library.register_autograd(
    "lossfuse::row_loss", _row_loss_backward, setup_context=_save_row_loss, lib=library
)
torch.library.register_autograd(
    "lossfuse::row_grads", _row_grads_backward, setup_context=_save_row_grads, lib=library
)


class ReducedLoss(torch.autograd.Function):
    """(N, V) logits -> the sum of the row losses over ``divisor``; the gradient is formed in the
    forward, while a row is at hand.

    The first backward hands that gradient over, so that memory holds it once. A later one, or one
    with a graph, makes its own; or raises where the gradient was written over the logits, which
    have an ``owner`` then."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        divisor: Tensor | None,
        spec: LossSpec,
        impl: str,
        owner: Owner | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if divisor is not None and divisor.device == logits.device:
            scale = divisor.reciprocal()
        else:
            # a number of the host goes with the launch, where a copy of it would be waited for
            scale = torch.ones((), dtype=dtype, device=logits.device) / (
                1.0 if divisor is None else divisor
            )
        dloss = scale.expand(logits.shape[0])
        ctx.options, ctx.impl, ctx.consumed = options(spec, impl), impl, owner is not None
        grads: tuple[Tensor, ...]
        if owner is not None:
            with writing(logits, owner) as dlogits:
                loss, dtarget = row_loss_and_grads_(
                    dlogits, target, class_weight, dloss, needed[1], *ctx.options
                )
            grads = dlogits, dtarget
        else:
            loss, *grads = row_loss_and_grads(
                logits, target, class_weight, dloss, *needed, *ctx.options
            )
            ctx.save_for_backward(logits, target, class_weight, dloss)
        ctx.formed = wanted(grads, *needed)
        total: Tensor = loss.sum()
        return total if divisor is None else total / divisor

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        return *formed_gradients(ctx, dtotal, _gradients_again), None, None, None, None, None


def _gradients_again(ctx: Any) -> tuple[Tensor, Tensor]:
    logits, target, class_weight, dloss = ctx.saved_tensors
    # a forward that forms a gradient keeps no statistics; the blocks of the torch backend make
    # their own
    stats = dloss.new_empty(0, len(logits))
    if ctx.impl == "triton" or ctx.options[-2] is not None:
        with torch.no_grad():
            _, stats = row_loss(logits, target, class_weight, *ctx.options)
    grads: tuple[Tensor, Tensor] = row_grads(
        logits, target, class_weight, stats, dloss, *ctx.needs_input_grad[:2], *ctx.options
    )
    return grads


class RowLoss(torch.autograd.Function):
    """(N, V) logits -> (N,) losses: what autograd knows of the operator, without the operator's way
    there, which takes longer.

    Where the logits have an ``owner``, the backward writes the gradient over them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        impl: str,
        owner: Owner | None,
    ) -> Tensor:
        ctx.options, ctx.owner, ctx.spent = options(spec, impl), owner, False
        loss, stats = row_loss(logits, target, class_weight, *ctx.options)
        ctx.save_for_backward(logits, target, class_weight, stats)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *row_gradients(ctx, dloss, _row_loss_gradients, row_grads_), None, None, None, None
