"""What the operators share of autograd: gradients formed in the forward or written over the logits,
and second derivatives.

No arithmetic of the loss.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..spec import LossSpec
from .inplace import ERR_LOGITS_CONSUMED, Owner, is_sole_owner
from .library import multiply_, options

SPENT = f"a second backward, and a backward with create_graph=True, need the logits again, but {ERR_LOGITS_CONSUMED}; pass inplace=False"
NO_OPTIONS_GRAD = (None,) * len(options(LossSpec(), "torch"))


def refuse_second_derivative(spec: LossSpec) -> None:
    """Where rows are cut: the reference makes them whole, but outside an operator."""
    if spec.group is not None:
        raise RuntimeError(
            "with shard there is no second derivative (create_graph=True) but with impl='reference'"
        )


def second_derivative(
    values: Callable[[Tensor, Tensor], list[Tensor]],
    logits: Tensor,
    target: Tensor,
    upstream: list[Tensor],
    vectors: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Of the gradients of ``values``, weighted by ``upstream``, times ``vectors``: with respect to
    logits, target and ``upstream``.

    Vector-Hessian products by way of torch's operators, differentiable in their turn.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: the caller may have made one from the other, and hooks of theirs must not run in
        # here
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
            outputs, [*leaves, *ups], given, create_graph=again, allow_unused=True
        )
    return second[0], second[1] if len(leaves) > 1 else None, list(second[len(leaves) :])


def formed_gradients(
    ctx: Any, dtotal: Tensor, again: Callable[[Any], Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Of logits and target, times ``dtotal``: those a forward has formed, once; then what ``again``
    makes, if the logits are there."""
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
    dlogits, dtarget = (
        None if g is None else (g * dtotal).to(g.dtype)
        for g in wanted(again(ctx), *ctx.needs_input_grad[:2])
    )
    return dlogits, dtarget


def row_gradients(
    ctx: Any, dloss: Tensor, gradients: Callable[[Any, Tensor], Any], write: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Of logits and target, in memory of their own from ``gradients``, or that of logits with an
    owner, which ``write`` fills."""
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

    Whoever saved them finds their version changed, and whoever looks at them is told; also if the
    write stops half way."""
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


def wanted(
    grads: Any, need_dlogits: bool, need_dtarget: bool
) -> tuple[Tensor | None, Tensor | None]:
    dlogits, dtarget = grads
    return dlogits if need_dlogits else None, dtarget if need_dtarget else None


def is_plain(dtotal: Tensor) -> bool:
    """Not a batch of them, as under is_grads_batched, and not a compiler's."""
    # not public, as everything about batches below torch.func
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(
        dtotal
    ) or torch._C._functorch.is_legacy_batchedtensor(dtotal)
    return type(dtotal) is Tensor and not wrapped


def multiply(grad: Tensor, dtotal: Tensor, impl: str) -> None:
    """grad *= dtotal: looked at on the CPU, where that is free, and on the device elsewhere."""
    if dtotal.device.type != "cpu":
        multiply_(grad, dtotal, impl)
        return
    try:
        if float(dtotal) != 1.0:
            grad.mul_(dtotal)
    except RuntimeError:
        # a tracer's number has no value
        grad.mul_(dtotal)
