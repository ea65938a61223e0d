"""The bridge to autograd: what is saved, which gradients are wanted. No arithmetic of the loss.

``row_loss`` and ``row_grads`` know their own derivatives, so compilers and double backward see operators; the derivative of the gradient
comes from the reference. ``ReducedLoss`` is the one strategy that must know in the forward that a single number scales all rows.
"""

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .spec import LossSpec

NO_OPTIONS_GRAD = (None,) * len(ops.options(LossSpec(), "torch"))


def _save_row_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, *options = inputs
    ctx.save_for_backward(logits, target, class_weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = tuple(options)


def _row_loss_backward(ctx: Any, dloss: Tensor | None, dstats: None) -> tuple[Tensor | None, ...]:
    dlogits, dtarget = None, None
    if dloss is not None:
        logits, target, class_weight, stats = ctx.saved_tensors
        need_dlogits, need_dtarget = ctx.needs_input_grad[:2]
        grads = ops.row_grads(logits, target, class_weight, stats, dloss, need_dlogits, need_dtarget, *ctx.options)
        dlogits, dtarget = _wanted(grads, need_dlogits, need_dtarget)
    return dlogits, dtarget, None, *NO_OPTIONS_GRAD


def _save_row_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, _, dloss, need_dlogits, need_dtarget, *options = inputs
    ctx.save_for_backward(logits, target, class_weight, dloss)
    ctx.set_materialize_grads(False)
    ctx.needed = (need_dlogits, need_dtarget)
    ctx.spec = LossSpec(*options[:-1])


def _row_grads_backward(ctx: Any, v_dlogits: Tensor | None, v_dtarget: Tensor | None) -> tuple[Tensor | None, ...]:
    """Vector-Hessian products through the reference, differentiable in their turn."""
    logits, target, class_weight, dloss = ctx.saved_tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: the caller may have made one from the other, and hooks of theirs must not run in here
        x, dy = logits.view_as(logits), dloss.view_as(dloss)
        x, dy = (t if t.requires_grad else t.detach().requires_grad_() for t in (x, dy))
        t = target.view_as(target)
        leaves = [x]
        if t.is_floating_point():
            t = t if t.requires_grad else t.detach().requires_grad_()
            leaves.append(t)
        first = torch.autograd.grad(reference.row_loss(x, t, class_weight, ctx.spec), leaves, dy, create_graph=True)
        pairs = [(g, v) for g, v in zip(first, (v_dlogits, v_dtarget), strict=False) if v is not None and v.numel() > 0]
        if not pairs:
            return (None,) * (7 + len(NO_OPTIONS_GRAD))
        outputs, vectors = zip(*pairs, strict=True)
        wanted = [*leaves, dy]
        second = list(torch.autograd.grad(outputs, wanted, vectors, create_graph=again, allow_unused=True))
    ddloss = second.pop()
    return second[0], second[1] if len(second) > 1 else None, None, None, ddloss, None, None, *NO_OPTIONS_GRAD


torch.library.register_autograd("lossfuse::row_loss", _row_loss_backward, setup_context=_save_row_loss, lib=ops.library)
torch.library.register_autograd("lossfuse::row_grads", _row_grads_backward, setup_context=_save_row_grads, lib=ops.library)


class ReducedLoss(torch.autograd.Function):
    """(N, V) logits -> the sum of the row losses over ``divisor``; the gradient is formed in the forward, while a row is in cache.

    The first backward hands that gradient over, so that memory holds it once. A later one, or one with a graph, makes its own.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weight: Tensor | None, divisor: Tensor | None, spec: LossSpec, impl: str
    ) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        one = torch.ones((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32, device=logits.device)
        dloss = (one if divisor is None else one / divisor).expand(logits.shape[0])
        ctx.options = ops.options(spec, impl)
        loss, *grads = ops.row_loss_and_grads(logits, target, class_weight, dloss, *needed, *ctx.options)
        ctx.save_for_backward(logits, target, class_weight, dloss)
        ctx.formed = _wanted(grads, *needed)
        total: Tensor = loss.sum()
        return total if divisor is None else total / divisor

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        factor = None if ctx.formed is None or torch.is_grad_enabled() else _number(dtotal)
        if factor is not None:
            # logits are not asked for, so they may have changed since
            formed, ctx.formed = ctx.formed, None
            grads = (g if g is None or factor == 1.0 else g.mul_(factor) for g in formed)
        else:
            logits, target, class_weight, dloss = ctx.saved_tensors
            needed = ctx.needs_input_grad[:2]
            again = ops.row_grads(logits, target, class_weight, dloss.new_empty(0, len(logits)), dloss, *needed, *ctx.options)
            # outside the operator, so that a batch of factors multiplies one gradient
            grads = (None if g is None else (g * dtotal).to(g.dtype) for g in _wanted(again, *needed))
        return *grads, None, None, None, None


def _wanted(grads: Any, need_dlogits: bool, need_dtarget: bool) -> tuple[Tensor | None, Tensor | None]:
    dlogits, dtarget = grads
    return dlogits if need_dlogits else None, dtarget if need_dtarget else None


def _number(dtotal: Tensor) -> float | None:
    """The value of a CPU scalar, which is free to read; None where it has no one value, as a fake or a batch of them."""
    try:
        return float(dtotal)
    except RuntimeError:
        return None
