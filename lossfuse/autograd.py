"""The bridge to autograd: what is saved, which gradients are wanted. No arithmetic of the loss."""

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .spec import LossSpec

Grads = tuple[Tensor | None, Tensor | None, None, None, None, None]


class RowLoss(torch.autograd.Function):
    """(N, V) logits -> (N,) losses; the gradient is formed in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec, impl: str) -> Tensor:
        loss, stats = ops.row_loss(logits, target, class_weight, *ops.options(spec, impl))
        ctx.save_for_backward(logits, target, class_weight, stats)
        ctx.spec, ctx.impl = spec, impl
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        logits, target, class_weight, stats = ctx.saved_tensors
        need_dlogits, need_dtarget = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            dlogits, dtarget = _differentiable_grads(logits, target, class_weight, dloss, ctx.spec, need_dlogits, need_dtarget)
        else:
            dlogits, dtarget = _grads(logits, target, class_weight, stats, dloss, ctx.spec, ctx.impl, need_dlogits, need_dtarget)
        return dlogits, dtarget, None, None, None


class ReducedLoss(torch.autograd.Function):
    """(N, V) logits -> the sum of the row losses over ``divisor``; the gradient is formed in the forward, while a row is in cache.

    The first backward hands that gradient over, so that memory holds it once. A later one recomputes it.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weight: Tensor | None, divisor: Tensor | None, spec: LossSpec, impl: str
    ) -> Tensor:
        need_dlogits, need_dtarget = ctx.needs_input_grad[:2]
        one = torch.ones((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32, device=logits.device)
        dloss = (one if divisor is None else one / divisor).expand(logits.shape[0])
        loss, *grads = ops.row_loss_and_grads(logits, target, class_weight, dloss, need_dlogits, need_dtarget, *ops.options(spec, impl))
        ctx.save_for_backward(logits, target, class_weight, dloss)
        ctx.grads = [g if needed else None for g, needed in zip(grads, (need_dlogits, need_dtarget), strict=True)]
        ctx.spec, ctx.impl = spec, impl
        total: Tensor = loss.sum()
        return total if divisor is None else total / divisor

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> Grads:  # type: ignore[override]
        logits, target, class_weight, dloss = ctx.saved_tensors
        need_dlogits, need_dtarget = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            dlogits, dtarget = _differentiable_grads(
                logits, target, class_weight, dtotal * dloss, ctx.spec, need_dlogits, need_dtarget
            )
            return dlogits, dtarget, None, None, None, None
        formed, ctx.grads = ctx.grads, None
        # a tensor somebody else holds by now must keep its values
        if formed is not None:
            dlogits, dtarget = (None if g is None else _scaled_in_place(g, dtotal) for g in formed)
        else:
            stats = dloss.new_empty(0, logits.shape[0])
            dlogits, dtarget = _grads(logits, target, class_weight, stats, dtotal * dloss, ctx.spec, ctx.impl, need_dlogits, need_dtarget)
        return dlogits, dtarget, None, None, None, None


def _grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    spec: LossSpec,
    impl: str,
    need_dlogits: bool,
    need_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dlogits, dtarget = ops.row_grads(logits, target, class_weight, stats, dloss, need_dlogits, need_dtarget, *ops.options(spec, impl))
    return dlogits if need_dlogits else None, dtarget if need_dtarget else None


def _differentiable_grads(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, dloss: Tensor, spec: LossSpec, need_dlogits: bool, need_dtarget: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same gradients through the reference, with a graph of their own: the caller asked for ``create_graph``."""
    wanted = [t for t, needed in ((logits, need_dlogits), (target, need_dtarget)) if needed]
    loss = reference.row_loss(logits, target, class_weight, spec)
    grads = iter(torch.autograd.grad(loss, wanted, dloss.to(loss.dtype), create_graph=True))
    return next(grads) if need_dlogits else None, next(grads) if need_dtarget else None


def _scaled_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    # reading the factor is free on the CPU, where a pass over the gradient is not
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return grad
    return grad.mul_(factor)
