"""The bridge to autograd: what is saved, which gradients are wanted. No arithmetic of the loss.

``row_loss`` and ``row_grads`` know their own derivatives, so compilers and double backward see operators; the derivative of the gradient
comes from the reference. ``ReducedLoss`` is the one strategy that must know in the forward that a single number scales all rows.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import LossSpec
from . import library
from .inplace import GONE, Owner, is_sole_owner

SPENT = f"a second backward, and a backward with create_graph=True, need the logits again, but {GONE}; pass inplace=False"
NO_OPTIONS_GRAD = (None,) * len(library.options(LossSpec(), "torch"))


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
    return wanted(library.row_grads(logits, target, class_weight, stats, dloss, *needed, *ctx.options), *needed)


def _save_row_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, _, dloss, need_dlogits, need_dtarget, *options = inputs
    ctx.save_for_backward(logits, target, class_weight, dloss)
    ctx.set_materialize_grads(False)
    ctx.needed = (need_dlogits, need_dtarget)
    ctx.spec = LossSpec(*options[:-1])


def _row_grads_backward(ctx: Any, v_dlogits: Tensor | None, v_dtarget: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, target, class_weight, dloss = ctx.saved_tensors
    refuse_second_derivative(ctx.spec)

    def values(x: Tensor, t: Tensor) -> list[Tensor]:
        return [reference.row_loss(x, t, class_weight, ctx.spec)]

    ddlogits, ddtarget, (ddloss,) = second_derivative(values, logits, target, [dloss], (v_dlogits, v_dtarget))
    return ddlogits, ddtarget, None, None, ddloss, None, None, *NO_OPTIONS_GRAD


def refuse_second_derivative(spec: LossSpec) -> None:
    """Where rows are cut: the reference makes them whole, but outside an operator."""
    if spec.group is not None:
        raise RuntimeError("with shard there is no second derivative (create_graph=True) but with impl='reference'")


def second_derivative(
    values: Callable[[Tensor, Tensor], list[Tensor]],
    logits: Tensor,
    target: Tensor,
    upstream: list[Tensor],
    vectors: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Of the gradients of ``values``, weighted by ``upstream``, times ``vectors``: with respect to logits, target and ``upstream``.

    Vector-Hessian products by way of torch's operators, differentiable in their turn.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: the caller may have made one from the other, and hooks of theirs must not run in here
        x, t, *ups = (a.view_as(a) for a in (logits, target, *upstream))
        x, *ups = (a if a.requires_grad else a.detach().requires_grad_() for a in (x, *ups))
        leaves = [x]
        if t.is_floating_point():
            t = t if t.requires_grad else t.detach().requires_grad_()
            leaves.append(t)
        first = torch.autograd.grad(values(x, t), leaves, ups, create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(first, vectors, strict=False) if g is not None and v is not None and v.numel() > 0]
        if not pairs:
            return None, None, [None] * len(upstream)
        outputs, given = zip(*pairs, strict=True)
        second = torch.autograd.grad(outputs, [*leaves, *ups], given, create_graph=again, allow_unused=True)
    return second[0], second[1] if len(leaves) > 1 else None, list(second[len(leaves) :])


torch.library.register_autograd("lossfuse::row_loss", _row_loss_backward, setup_context=_save_row_loss, lib=library.library)
torch.library.register_autograd("lossfuse::row_grads", _row_grads_backward, setup_context=_save_row_grads, lib=library.library)


class ReducedLoss(torch.autograd.Function):
    """(N, V) logits -> the sum of the row losses over ``divisor``; the gradient is formed in the forward, while a row is at hand.

    The first backward hands that gradient over, so that memory holds it once. A later one, or one with a graph, makes its own; or raises
    where the gradient was written over the logits, which have an ``owner`` then.
    """

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
            scale = torch.ones((), dtype=dtype, device=logits.device) / (1.0 if divisor is None else divisor)
        dloss = scale.expand(logits.shape[0])
        ctx.options, ctx.impl, ctx.consumed = library.options(spec, impl), impl, owner is not None
        grads: tuple[Tensor, ...]
        if owner is not None:
            with writing(logits, owner) as dlogits:
                loss, dtarget = library.row_loss_and_grads_(dlogits, target, class_weight, dloss, needed[1], *ctx.options)
            grads = dlogits, dtarget
        else:
            loss, *grads = library.row_loss_and_grads(logits, target, class_weight, dloss, *needed, *ctx.options)
            ctx.save_for_backward(logits, target, class_weight, dloss)
        ctx.formed = wanted(grads, *needed)
        total: Tensor = loss.sum()
        return total if divisor is None else total / divisor

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        return *formed_gradients(ctx, dtotal, _gradients_again), None, None, None, None, None


def _gradients_again(ctx: Any) -> tuple[Tensor, Tensor]:
    logits, target, class_weight, dloss = ctx.saved_tensors
    # a forward that forms a gradient keeps no statistics; the blocks of the torch backend make their own
    stats = dloss.new_empty(0, len(logits))
    if ctx.impl == "triton" or ctx.options[-2] is not None:
        with torch.no_grad():
            _, stats = library.row_loss(logits, target, class_weight, *ctx.options)
    grads: tuple[Tensor, Tensor] = library.row_grads(logits, target, class_weight, stats, dloss, *ctx.needs_input_grad[:2], *ctx.options)
    return grads


class RowLoss(torch.autograd.Function):
    """(N, V) logits -> (N,) losses: what autograd knows of the operator, without the operator's way there, which takes longer.

    Where the logits have an ``owner``, the backward writes the gradient over them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec, impl: str, owner: Owner | None
    ) -> Tensor:
        ctx.options, ctx.owner, ctx.spent = library.options(spec, impl), owner, False
        loss, stats = library.row_loss(logits, target, class_weight, *ctx.options)
        ctx.save_for_backward(logits, target, class_weight, stats)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *row_gradients(ctx, dloss, _row_loss_gradients, library.row_grads_), None, None, None, None


def formed_gradients(ctx: Any, dtotal: Tensor, again: Callable[[Any], Any]) -> tuple[Tensor | None, Tensor | None]:
    """Of logits and target, times ``dtotal``: those a forward has formed, once; then what ``again`` makes, if the logits are there."""
    if ctx.formed is not None and not torch.is_grad_enabled() and is_plain(dtotal):
        # logits are not asked for, so they may have changed since
        grads: tuple[Tensor | None, Tensor | None] = ctx.formed
        ctx.formed = None
        for g in grads:
            if g is not None:
                multiply(g, dtotal, ctx.impl)
        return grads
    if ctx.consumed:
        raise RuntimeError(SPENT)
    # outside the operator, so that a batch of factors multiplies one gradient
    dlogits, dtarget = (None if g is None else (g * dtotal).to(g.dtype) for g in wanted(again(ctx), *ctx.needs_input_grad[:2]))
    return dlogits, dtarget


def row_gradients(
    ctx: Any, dloss: Tensor, gradients: Callable[[Any, Tensor], Any], write: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Of logits and target, in memory of their own from ``gradients``, or that of logits with an owner, which ``write`` fills."""
    if ctx.owner is None:
        return gradients(ctx, dloss)
    if ctx.spent or torch.is_grad_enabled() or not is_plain(dloss):
        raise RuntimeError(SPENT)
    if not is_sole_owner(ctx.saved_tensors[0], *ctx.owner.alive()):
        # somebody has made an alias since the forward
        return gradients(ctx, dloss)
    ctx.spent = True
    logits, *rest = ctx.saved_tensors
    need_dlogits, need_dtarget = ctx.needs_input_grad[:2]
    with writing(logits, ctx.owner) as dlogits:
        dtarget = write(dlogits, *rest, dloss, need_dtarget, *ctx.options)
    return wanted((dlogits, dtarget), need_dlogits, need_dtarget)


@contextlib.contextmanager
def writing(logits: Tensor, owner: Owner) -> Iterator[Tensor]:
    """The logits under the name of the gradient they become.

    Whoever saved them finds their version changed, and whoever looks at them is told; also if the write stops half way.
    """
    dlogits = logits.detach()
    # before anything is written: an interrupt may come at any time
    torch.autograd.graph.increment_version(logits)
    owner.mark()
    try:
        yield dlogits
    except (IndexError, ValueError):
        # a bad target, or ranks that disagree, found before anything is written
        owner.unmark()
        raise


def wanted(grads: Any, need_dlogits: bool, need_dtarget: bool) -> tuple[Tensor | None, Tensor | None]:
    dlogits, dtarget = grads
    return dlogits if need_dlogits else None, dtarget if need_dtarget else None


def is_plain(dtotal: Tensor) -> bool:
    """Not a batch of them, as under is_grads_batched, and not a compiler's."""
    # not public, as everything about batches below torch.func
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(dtotal) or torch._C._functorch.is_legacy_batchedtensor(dtotal)
    return type(dtotal) is Tensor and not wrapped


def multiply(grad: Tensor, dtotal: Tensor, impl: str) -> None:
    """grad *= dtotal: looked at on the CPU, where that is free, and on the device elsewhere."""
    if dtotal.device.type != "cpu":
        library.multiply_(grad, dtotal, impl)
        return
    try:
        if float(dtotal) != 1.0:
            grad.mul_(dtotal)
    except RuntimeError:
        # a tracer's number has no value
        grad.mul_(dtotal)
