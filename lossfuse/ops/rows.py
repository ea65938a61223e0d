"""The operators of rows of logits, and their autograd.

``row_loss`` and ``row_grads`` are operators with a registered derivative, so that compilers and
double backward see them; the derivative of the gradient comes from the reference. ``RowLoss`` and
``ReducedLoss`` are the same for eager calls: ``RowLoss`` computes the gradient in the backward,
``ReducedLoss`` in the forward, where one number that is known there scales all rows.

``stats`` are the numbers per row that ``row_grads`` of the same backend needs from ``row_loss``. An
operator whose name ends in ``_`` writes the gradient over the logits."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import torch_small
from ..row_types import Upstream
from ..spec import LossSpec
from ..targets import values_are_readable
from ..vocab_parallel.merge import SAVED_ROWS
from .gradients import (
    formed_gradients,
    only_needed,
    refuse_second_derivative,
    row_gradients,
    second_derivative,
    writing,
)
from .inplace import Owner
from .library import (
    OPTIONS,
    OpArgs,
    backend,
    entry,
    library,
    new_grad,
    new_loss,
    no_grads,
    register,
)

_ROWS = "Tensor logits, Tensor target, Tensor? class_weight"
_CONSUMED_ROWS = "Tensor(a!) logits, Tensor target, Tensor? class_weight"
# with mean, the sum of the losses is divided by the divisor, or without one by the valid rows
_TOTAL = "Tensor? divisor, bool mean, Tensor? row_weight"
_NEEDS = "bool need_dlogits, bool need_dtarget"

library.define(f"row_loss({_ROWS}, {OPTIONS}) -> (Tensor loss, Tensor stats)")
library.define(
    f"row_grads({_ROWS}, Tensor stats, Tensor dloss, {_NEEDS}, {OPTIONS})"
    " -> (Tensor dlogits, Tensor dtarget)"
)
library.define(
    f"row_total_and_grads({_ROWS}, {_TOTAL}, {_NEEDS}, {OPTIONS})"
    " -> (Tensor total, Tensor dloss, Tensor dlogits, Tensor dtarget)"
)
library.define(
    f"row_total_and_grads_({_CONSUMED_ROWS}, {_TOTAL}, bool need_dtarget, {OPTIONS})"
    " -> (Tensor total, Tensor dloss, Tensor dtarget)"
)
library.define(
    f"row_grads_({_CONSUMED_ROWS}, Tensor stats, Tensor dloss, bool need_dtarget, {OPTIONS})"
    " -> Tensor dtarget"
)
library.define("mean_over_valid(Tensor loss, Tensor target, int ignore_index) -> Tensor")


def new_grads(
    logits: Tensor, target: Tensor, need_dlogits: bool, need_dtarget: bool
) -> tuple[Tensor, Tensor]:
    return new_grad(logits, need_dlogits), new_grad(target, need_dtarget)


def _row_loss(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    args = OpArgs(*options)
    spec = args.checked_spec(logits.shape[1], target)
    loss, stats = args.backend.row_loss(logits, target, class_weight, spec)
    return loss, stats


def _row_loss_fake(
    logits: Tensor, target: Tensor, _: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    args, loss = OpArgs(*options), new_loss(logits)
    if args.group is not None:
        n_stats = SAVED_ROWS
    elif args.impl == "torch":
        n_stats = 0
    else:
        n_stats = 3 if target.is_floating_point() else 2
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
    args = OpArgs(*options)
    grads = new_grads(logits, target, need_dlogits, need_dtarget)
    args.backend.row_grads(
        logits,
        target,
        class_weight,
        stats,
        Upstream(dloss),
        args.spec,
        *only_needed(grads, need_dlogits, need_dtarget),
    )
    return grads


def _row_grads_fake(
    logits: Tensor,
    target: Tensor,
    _class_weight: Tensor | None,
    _stats: Tensor,
    _dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return new_grads(logits, target, need_dlogits, need_dtarget)


def _row_total_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    mean: bool,
    row_weight: Tensor | None,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = OpArgs(*options)
    few = _of_few_logits(args, logits, target, class_weight, divisor, mean, row_weight)
    if few is not None:
        return *few, new_grad(target, False)
    grads = new_grads(logits, target, need_dlogits, need_dtarget)
    total, dloss = _total_and_fill(
        args,
        (logits, target, class_weight),
        divisor,
        mean,
        row_weight,
        *only_needed(grads, need_dlogits, need_dtarget),
    )
    return total, dloss, *grads


def _row_total_and_grads_fake(
    logits: Tensor,
    target: Tensor,
    _class_weight: Tensor | None,
    _divisor: Tensor | None,
    _mean: bool,
    _row_weight: Tensor | None,
    need_dlogits: bool,
    need_dtarget: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = new_loss(logits).new_empty(())
    return total, torch.empty_like(total), *new_grads(logits, target, need_dlogits, need_dtarget)


def _row_total_and_grads_(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    mean: bool,
    row_weight: Tensor | None,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    args, dtarget = OpArgs(*options), new_grad(target, need_dtarget)
    few = _of_few_logits(args, logits, target, class_weight, divisor, mean, row_weight)
    if few is not None:
        total, dloss, dlogits = few
        logits.copy_(dlogits)
        return total, dloss, dtarget
    total, dloss = _total_and_fill(
        args,
        (logits, target, class_weight),
        divisor,
        mean,
        row_weight,
        logits,
        dtarget if need_dtarget else None,
    )
    return total, dloss, dtarget


def _row_total_and_grads_fake_(
    logits: Tensor,
    target: Tensor,
    _class_weight: Tensor | None,
    _divisor: Tensor | None,
    _mean: bool,
    _row_weight: Tensor | None,
    need_dtarget: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    total = new_loss(logits).new_empty(())
    return total, torch.empty_like(total), new_grad(target, need_dtarget)


def _of_few_logits(
    args: OpArgs,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    mean: bool,
    row_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(total, dloss, dlogits), where few operators of torch compute them."""
    plain = (
        args.impl == "torch"
        and logits.device.type == "cpu"
        and class_weight is None
        and row_weight is None
        and args.softcap is None
        and args.logit_scale is None
        and args.group is None
        and args.label_smoothing == 0.0
        and args.lse_square_scale == 0.0
        and not target.is_floating_point()
    )
    if not plain or not values_are_readable(target):
        return None
    return torch_small.total_and_grad(logits, target, divisor, mean, args.ignore_index)


def _total_and_fill(
    args: OpArgs,
    rows: tuple[Tensor, Tensor, Tensor | None],
    divisor: Tensor | None,
    mean: bool,
    row_weight: Tensor | None,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(total, dloss), both (); fills the gradients that are given. ``dloss`` is the gradient of the
    total with respect to the loss of a row of weight 1."""
    logits, target, _ = rows
    spec, ids = args.checked_spec(logits.shape[1], target), not target.is_floating_point()
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if divisor is not None and divisor.device != logits.device:
        # from the CPU: a fill, which takes the number as an argument; a copy would be waited for
        divisor = torch.full((), float(divisor), dtype=dtype, device=logits.device)
    fewer_launches = args.impl == "triton" and args.group is None and row_weight is None
    if fewer_launches and ids and dlogits is not None:
        # with fewer launches than torch's operators
        total, dloss = args.backend.row_total_and_grads(*rows, divisor, mean, spec, dlogits)
        return total, dloss
    if mean and divisor is None:
        divisor = (target != spec.ignore_index).sum(dtype=dtype)
    if divisor is None:
        dloss = torch.ones((), dtype=dtype, device=logits.device)
    else:
        dloss = divisor.reciprocal()
    per_row = dloss.expand(len(logits)) if row_weight is None else dloss * row_weight
    loss = args.backend.row_loss_and_grads(*rows, per_row, spec, dlogits, dtarget)
    return total_of_rows(loss, divisor, row_weight), dloss


def _row_grads_(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> Tensor:
    args = OpArgs(*options)
    dtarget = new_grad(target, need_dtarget)
    args.backend.row_grads(
        logits,
        target,
        class_weight,
        stats,
        Upstream(dloss),
        args.spec,
        logits,
        dtarget if need_dtarget else None,
    )
    return dtarget


def _row_grads_fake_(
    _logits: Tensor,
    target: Tensor,
    _class_weight: Tensor | None,
    _stats: Tensor,
    _dloss: Tensor,
    need_dtarget: bool,
    *_: Any,
) -> Tensor:
    return new_grad(target, need_dtarget)


def _mean_over_valid(loss: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    mean: Tensor = backend("triton").mean_over_valid(loss, target, ignore_index)
    return mean


def _mean_over_valid_fake(loss: Tensor, *_: Any) -> Tensor:
    return loss.new_empty(())


register("mean_over_valid", _mean_over_valid, _mean_over_valid_fake)
register("row_loss", _row_loss, _row_loss_fake)
register("row_grads", _row_grads, _row_grads_fake)
register("row_total_and_grads", _row_total_and_grads, _row_total_and_grads_fake)
register("row_total_and_grads_", _row_total_and_grads_, _row_total_and_grads_fake_)
register("row_grads_", _row_grads_, _row_grads_fake_)

row_loss = entry("row_loss", _row_loss, 3)
row_grads = entry("row_grads", _row_grads, 5)
row_total_and_grads = entry("row_total_and_grads", _row_total_and_grads, 4)
row_total_and_grads_ = entry("row_total_and_grads_", _row_total_and_grads_, 4)
row_grads_ = entry("row_grads_", _row_grads_, 5)
mean_over_valid = entry("mean_over_valid", _mean_over_valid, 2)


def _save_row_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (logits, target, class_weight, *options), (_, stats) = inputs, output
    ctx.save_for_backward(logits, target, class_weight, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.options = OpArgs(*options)


def _row_loss_backward(ctx: Any, dloss: Tensor | None, dstats: None) -> tuple[Tensor | None, ...]:
    grads = (None, None) if dloss is None else _row_loss_gradients(ctx, dloss)
    return *grads, None, *no_grads(OpArgs)


def _row_loss_gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    logits, target, class_weight, stats = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    grads = row_grads(logits, target, class_weight, stats, dloss, *needed, *ctx.options)
    return only_needed(grads, *needed)


def _save_row_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, _, dloss, _, _, *options = inputs
    ctx.save_for_backward(logits, target, class_weight, dloss)
    ctx.set_materialize_grads(False)
    ctx.spec = OpArgs(*options).spec


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
    return ddlogits, ddtarget, None, None, ddloss, None, None, *no_grads(OpArgs)


torch.library.register_autograd(
    "lossfuse::row_loss", _row_loss_backward, setup_context=_save_row_loss, lib=library
)
torch.library.register_autograd(
    "lossfuse::row_grads", _row_grads_backward, setup_context=_save_row_grads, lib=library
)


class ReducedLoss(torch.autograd.Function):
    """(N, V) logits -> the sum of the row losses, with the gradient formed in the forward, from the
    same read of a row. With ``mean`` the sum is divided by ``divisor``, or without one by the
    number of valid rows.

    ``row_weight`` multiplies each row's loss in the sum.

    With an ``owner`` the gradient is written over the logits. The first backward returns the
    gradient that the forward formed; a later one, or one with a graph, computes it again, or raises
    if the logits were consumed."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        divisor: Tensor | None,
        mean: bool,
        row_weight: Tensor | None,
        spec: LossSpec,
        impl: str,
        owner: Owner | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        ctx.options, ctx.impl, ctx.consumed = OpArgs.of(spec, impl), impl, owner is not None
        grads: tuple[Tensor, ...]
        if owner is not None:
            _, need_dtarget = needed
            with writing(logits, owner) as dlogits:
                total, _, dtarget = row_total_and_grads_(
                    dlogits,
                    target,
                    class_weight,
                    divisor,
                    mean,
                    row_weight,
                    need_dtarget,
                    *ctx.options,
                )
            grads = dlogits, dtarget
        else:
            total, dloss, *grads = row_total_and_grads(
                logits, target, class_weight, divisor, mean, row_weight, *needed, *ctx.options
            )
            ctx.save_for_backward(logits, target, class_weight, dloss, row_weight)
        ctx.formed = only_needed(grads, *needed)
        result: Tensor = total
        return result

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        grads = formed_gradients(ctx, dtotal, _recomputed_gradients)
        return *grads, None, None, None, None, None, None, None


def total_of_rows(loss: Tensor, divisor: Tensor | None, row_weight: Tensor | None) -> Tensor:
    """(): the sum of (N,) losses times their weights, over the divisor."""
    total = loss.sum() if row_weight is None else (loss * row_weight).sum()
    return total if divisor is None else total / divisor


def row_gradient_of_total(
    rows: Tensor, divisor: Tensor | None, row_weight: Tensor | None
) -> Tensor:
    """(N,): the gradient of ``total_of_rows`` with respect to each row's loss."""
    if divisor is not None and divisor.device == rows.device:
        scale = divisor.reciprocal()
    else:
        # a divisor on the CPU becomes an argument of the launch; a copy of it would have to be
        # waited for
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        one = torch.ones((), dtype=dtype, device=rows.device)
        scale = one / (1.0 if divisor is None else divisor)
    return scale.expand(rows.shape[0]) if row_weight is None else scale * row_weight


def _recomputed_gradients(ctx: Any) -> tuple[Tensor, Tensor]:
    logits, target, class_weight, dloss, row_weight = ctx.saved_tensors
    dloss = dloss.expand(len(logits)) if row_weight is None else dloss * row_weight
    # the forward that formed the gradient saved no statistics, and the torch backend needs none
    stats = dloss.new_empty(0, len(logits))
    if ctx.impl == "triton" or ctx.options.group is not None:
        with torch.no_grad():
            _, stats = row_loss(logits, target, class_weight, *ctx.options)
    grads: tuple[Tensor, Tensor] = row_grads(
        logits, target, class_weight, stats, dloss, *ctx.needs_input_grad[:2], *ctx.options
    )
    return grads


class RowLoss(torch.autograd.Function):
    """(N, V) logits -> (N,) losses: the autograd of ``row_loss`` without the dispatcher.

    With an ``owner`` the backward writes the gradient over the logits."""

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
        ctx.options, ctx.owner, ctx.spent = OpArgs.of(spec, impl), owner, False
        loss, stats = row_loss(logits, target, class_weight, *ctx.options)
        ctx.save_for_backward(logits, target, class_weight, stats)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads = row_gradients(ctx, dloss, _row_loss_gradients, row_grads_)
        return *grads, None, None, None, None
