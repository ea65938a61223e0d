"""Autograd shared by the operators: gradients that the forward formed, gradients written over the
logits, second derivatives.

The formulas of losses are elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..spec import LossSpec
from .inplace import ERR_LOGITS_CONSUMED, Owner, is_sole_owner
from .library import multiply_

ERR_SECOND_BACKWARD = (
    "a second backward, and a backward with create_graph=True, need the logits again, but"
    f" {ERR_LOGITS_CONSUMED}; pass inplace=False"
)


def refuse_second_derivative(spec: LossSpec) -> None:
    """Raise for logits that are sharded across ranks: the reference, which has the derivative of a
    gradient, does not know shards."""
    if spec.group is not None:
        raise RuntimeError(
            "with shard there is no second derivative (create_graph=True); gather the logits first"
        )


def second_derivative(
    values: Callable[[Tensor, Tensor], list[Tensor]],
    logits: Tensor,
    target: Tensor,
    upstream: list[Tensor],
    vectors: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Differentiate the gradients of ``sum(upstream * values(logits, target))``.

    ``vectors`` are the upstream gradients of dlogits and dtarget. Returns the gradients of logits,
    target and each of ``upstream``: vector-Hessian products, differentiable themselves if grad mode
    is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: one argument may have been computed from another, and the caller's hooks must not
        # run here
        x, t, *ups = (a.view_as(a) for a in (logits, target, *upstream))
        x, *ups = (a if a.requires_grad else a.detach().requires_grad_() for a in (x, *ups))
        leaves = [x]
        if t.is_floating_point():
            t = t if t.requires_grad else t.detach().requires_grad_()
            leaves.append(t)
        first = torch.autograd.grad(values(x, t), leaves, ups, create_graph=True, allow_unused=True)
        pairs = [
            (g, v)
            for g, v in zip(first, vectors, strict=False)
            if g is not None and v is not None and v.numel() > 0
        ]
        if not pairs:
            return None, None, [None] * len(upstream)
        outputs, given = zip(*pairs, strict=True)
        second = torch.autograd.grad(
            outputs, [*leaves, *ups], given, create_graph=create_graph, allow_unused=True
        )
    return second[0], second[1] if len(leaves) > 1 else None, list(second[len(leaves) :])


def formed_gradients(
    ctx: Any, dtotal: Tensor, recompute: Callable[[Any], Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of logits and target of a reduced loss, times ``dtotal``.

    The first backward returns the tensors that the forward formed, so that memory holds them once.
    A later one, or one with a graph, calls ``recompute``, which needs the logits."""
    if ctx.formed is not None and not torch.is_grad_enabled() and is_plain(dtotal):
        # the logits are not read here and may have changed since the forward
        grads: tuple[Tensor | None, Tensor | None] = ctx.formed
        ctx.formed = None
        for g in grads:
            if g is not None:
                multiply(g, dtotal, ctx.impl)
        return grads
    if ctx.consumed:
        raise RuntimeError(ERR_SECOND_BACKWARD)
    # out of place, because under is_grads_batched dtotal is a batch
    dlogits, dtarget = (
        None if g is None else (g * dtotal).to(g.dtype)
        for g in only_needed(recompute(ctx), *ctx.needs_input_grad[:2])
    )
    return dlogits, dtarget


def row_gradients(
    ctx: Any, dloss: Tensor, gradients: Callable[[Any, Tensor], Any], write: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of logits and target of (N,) losses.

    ``gradients`` allocates them; ``write`` writes that of the logits over the logits, if the
    forward found an owner that gave them up and they still have no alias."""
    if ctx.owner is None:
        return gradients(ctx, dloss)
    if ctx.spent or torch.is_grad_enabled() or not is_plain(dloss):
        raise RuntimeError(ERR_SECOND_BACKWARD)
    logits, *rest = ctx.saved_tensors
    if not is_sole_owner(logits, *ctx.owner.alive()):
        # an alias was created after the forward
        return gradients(ctx, dloss)
    ctx.spent = True
    need_dlogits, need_dtarget, *_ = ctx.needs_input_grad
    with writing(logits, ctx.owner) as dlogits:
        dtarget = write(dlogits, *rest, dloss, need_dtarget, *ctx.options)
    return only_needed((dlogits, dtarget), need_dlogits, need_dtarget)


@contextlib.contextmanager
def writing(logits: Tensor, owner: Owner) -> Iterator[Tensor]:
    """Return the memory of the logits, to be overwritten by their gradient.

    Bumps the version counter, so that graphs that saved the logits raise, and marks the tensor as
    consumed, so that reading it raises; also when the write fails midway."""
    dlogits = logits.detach()
    # before the write: an interrupt may come at any time
    torch.autograd.graph.increment_version(logits)
    owner.mark()
    try:
        yield dlogits
    except (IndexError, ValueError):
        # an invalid target, or ranks that disagree: found before the write
        owner.unmark()
        raise


def only_needed(
    grads: Any, need_dlogits: bool, need_dtarget: bool
) -> tuple[Tensor | None, Tensor | None]:
    dlogits, dtarget = grads
    return dlogits if need_dlogits else None, dtarget if need_dtarget else None


def is_plain(dtotal: Tensor) -> bool:
    """Return True for a plain tensor: no batch, as under ``is_grads_batched``, and no tensor of a
    compiler."""
    # functorch has no public test for this
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(
        dtotal
    ) or torch._C._functorch.is_legacy_batchedtensor(dtotal)
    return type(dtotal) is Tensor and not wrapped


def multiply(grad: Tensor, dtotal: Tensor, impl: str) -> None:
    """``grad *= dtotal``, skipped if ``dtotal`` is 1: read here on the CPU, by the kernel on a
    device, so that the host does not wait."""
    if dtotal.device.type != "cpu":
        multiply_(grad, dtotal, impl)
        return
    try:
        if float(dtotal) != 1.0:
            grad.mul_(dtotal)
    except RuntimeError:
        # a tracer's tensor has no value
        grad.mul_(dtotal)
