"""The operators of binary cross entropy and their derivatives: what ``ops.rows`` is for rows of
classes.

A loss is (N, V), or the sums of rows, (N, 1); ``dloss`` is whichever of the two its loss was.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..targets import require_ids_in_range
from .gradients import formed_gradients, only_needed, row_gradients, second_derivative, writing
from .inplace import Owner
from .library import library, new_grad

_BACKENDS = {"triton": "..backends.triton", "torch": "..backends.torch_labels"}
_TENSORS = "Tensor target, Tensor? weight, Tensor? pos_weight"
_OPTIONS = "int ignore_index, str impl"

library.define(f"sigmoid_loss(Tensor logits, {_TENSORS}, bool elementwise, {_OPTIONS}) -> Tensor")
library.define(
    f"sigmoid_grads(Tensor logits, {_TENSORS}, Tensor dloss, bool need_dlogits, bool need_dtarget, {_OPTIONS})"
    " -> (Tensor dlogits, Tensor dtarget)"
)
library.define(
    f"sigmoid_loss_and_grads(Tensor logits, {_TENSORS}, Tensor dloss, bool need_dlogits, bool need_dtarget, {_OPTIONS})"
    " -> (Tensor loss, Tensor dlogits, Tensor dtarget)"
)
library.define(
    f"sigmoid_loss_and_grads_(Tensor(a!) logits, {_TENSORS}, Tensor dloss, bool need_dtarget, {_OPTIONS}) -> (Tensor loss, Tensor dtarget)"
)
library.define(
    f"sigmoid_grads_(Tensor(a!) logits, {_TENSORS}, Tensor dloss, bool need_dtarget, {_OPTIONS}) -> Tensor dtarget"
)

sigmoid_loss = torch.ops.lossfuse.sigmoid_loss.default
sigmoid_grads = torch.ops.lossfuse.sigmoid_grads.default
sigmoid_loss_and_grads = torch.ops.lossfuse.sigmoid_loss_and_grads.default
sigmoid_loss_and_grads_ = torch.ops.lossfuse.sigmoid_loss_and_grads_.default
sigmoid_grads_ = torch.ops.lossfuse.sigmoid_grads_.default


@functools.cache
def _backend(impl: str) -> ModuleType:
    return importlib.import_module(_BACKENDS[impl], __package__)


def require_ids(target: Tensor, logits: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        require_ids_in_range(target, logits.shape[1], ignore_index)


def _new_loss(logits: Tensor, elementwise: bool) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(
        logits.shape[0], logits.shape[1] if elementwise else 1, dtype=dtype, device=logits.device
    )


def _fill(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    options: tuple[Any, ...],
    loss: Tensor | None,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    ignore_index, impl = options
    if loss is not None:
        require_ids(target, logits, ignore_index)
    _backend(impl).sigmoid_loss_and_grads(
        logits,
        target,
        weight,
        pos_weight,
        ignore_index,
        loss=loss,
        dloss=dloss,
        dlogits=dlogits,
        dtarget=dtarget,
    )


def _loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    elementwise: bool,
    *options: Any,
) -> Tensor:
    loss = _new_loss(logits, elementwise)
    _fill(logits, target, weight, pos_weight, options, loss, None, None, None)
    return loss


def _loss_shapes(
    logits: Tensor, target: Tensor, weight: Any, pos_weight: Any, elementwise: bool, *options: Any
) -> Tensor:
    return _new_loss(logits, elementwise)


def _grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    dlogits, dtarget = new_grad(logits, need_dlogits), new_grad(target, need_dtarget)
    _fill(
        logits,
        target,
        weight,
        pos_weight,
        options,
        None,
        dloss,
        *only_needed((dlogits, dtarget), need_dlogits, need_dtarget),
    )
    return dlogits, dtarget


def _grads_shapes(
    logits: Tensor,
    target: Tensor,
    weight: Any,
    pos_weight: Any,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return new_grad(logits, need_dlogits), new_grad(target, need_dtarget)


def _loss_and_grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, dlogits, dtarget = _loss_and_grads_shapes(
        logits, target, weight, pos_weight, dloss, need_dlogits, need_dtarget
    )
    _fill(
        logits,
        target,
        weight,
        pos_weight,
        options,
        loss,
        dloss,
        *only_needed((dlogits, dtarget), need_dlogits, need_dtarget),
    )
    return loss, dlogits, dtarget


def _loss_and_grads_shapes(
    logits: Tensor,
    target: Tensor,
    weight: Any,
    pos_weight: Any,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_loss(logits, False), new_grad(logits, need_dlogits), new_grad(target, need_dtarget)


def _loss_and_grads_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    loss, dtarget = _new_loss(logits, False), new_grad(target, need_dtarget)
    _fill(
        logits,
        target,
        weight,
        pos_weight,
        options,
        loss,
        dloss,
        logits,
        dtarget if need_dtarget else None,
    )
    return loss, dtarget


def _loss_and_grads_shapes_(
    logits: Tensor,
    target: Tensor,
    weight: Any,
    pos_weight: Any,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return _new_loss(logits, False), new_grad(target, need_dtarget)


def _grads_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> Tensor:
    dtarget = new_grad(target, need_dtarget)
    _fill(
        logits,
        target,
        weight,
        pos_weight,
        options,
        None,
        dloss,
        logits,
        dtarget if need_dtarget else None,
    )
    return dtarget


def _grads_shapes_(
    logits: Tensor,
    target: Tensor,
    weight: Any,
    pos_weight: Any,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> Tensor:
    return new_grad(target, need_dtarget)


for _name, _impl, _shapes in (
    ("sigmoid_loss", _loss, _loss_shapes),
    ("sigmoid_grads", _grads, _grads_shapes),
    ("sigmoid_loss_and_grads", _loss_and_grads, _loss_and_grads_shapes),
    ("sigmoid_loss_and_grads_", _loss_and_grads_, _loss_and_grads_shapes_),
    ("sigmoid_grads_", _grads_, _grads_shapes_),
):
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossfuse::{_name}", _shapes, lib=library)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, weight, pos_weight, _, *options = inputs
    ctx.save_for_backward(logits, target, weight, pos_weight)
    ctx.options = tuple(options)


def _gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    needed = ctx.needs_input_grad[:2]
    return only_needed(sigmoid_grads(*ctx.saved_tensors, dloss, *needed, *ctx.options), *needed)


def _loss_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dloss), None, None, None, None, None


def _save_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, weight, pos_weight, dloss, _, _, ctx.ignore_index, _ = inputs
    ctx.save_for_backward(logits, target, weight, pos_weight, dloss)
    ctx.set_materialize_grads(False)


def _grads_backward(
    ctx: Any, v_dlogits: Tensor | None, v_dtarget: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, target, weight, pos_weight, dloss = ctx.saved_tensors

    def values(x: Tensor, t: Tensor) -> list[Tensor]:
        loss = reference.sigmoid_loss(x, t, weight, pos_weight, ctx.ignore_index)
        return [loss if dloss.shape == loss.shape else loss.sum(1, keepdim=True)]

    ddlogits, ddtarget, (ddloss,) = second_derivative(
        values, logits, target, [dloss], (v_dlogits, v_dtarget)
    )
    return ddlogits, ddtarget, None, None, ddloss, None, None, None, None


torch.library.register_autograd(
    "lossfuse::sigmoid_loss", _loss_backward, setup_context=_save_loss, lib=library
)
torch.library.register_autograd(
    "lossfuse::sigmoid_grads", _grads_backward, setup_context=_save_grads, lib=library
)


class ReducedLoss(torch.autograd.Function):
    """(N, V) logits -> the sum of all losses, over ``count`` of them; the gradient is formed in the
    forward, as in ``ops.rows``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        count: int,
        ignore_index: int,
        impl: str,
        owner: Owner | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # a count of 0 has no element to divide
        dloss = torch.full((), 1.0 / max(count, 1), dtype=dtype, device=logits.device).expand(
            len(logits), 1
        )
        ctx.options, ctx.impl, ctx.consumed = (ignore_index, impl), impl, owner is not None
        grads: tuple[Tensor, ...]
        if owner is not None:
            with writing(logits, owner) as dlogits:
                loss, dtarget = sigmoid_loss_and_grads_(
                    dlogits, target, weight, pos_weight, dloss, needed[1], *ctx.options
                )
            grads = dlogits, dtarget
        else:
            loss, *grads = sigmoid_loss_and_grads(
                logits, target, weight, pos_weight, dloss, *needed, *ctx.options
            )
            ctx.save_for_backward(logits, target, weight, pos_weight, dloss)
        ctx.formed = only_needed(grads, *needed)
        return loss.sum() / count

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        return *formed_gradients(ctx, dtotal, _gradients_again), None, None, None, None, None, None


def _gradients_again(ctx: Any) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = sigmoid_grads(
        *ctx.saved_tensors, *ctx.needs_input_grad[:2], *ctx.options
    )
    return grads


class Loss(torch.autograd.Function):
    """(N, V) logits -> (N, V) losses or the sums of rows; over logits with an ``owner`` the
    backward writes the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        elementwise: bool,
        ignore_index: int,
        impl: str,
        owner: Owner | None,
    ) -> Tensor:
        ctx.options, ctx.owner, ctx.spent = (ignore_index, impl), owner, False
        loss: Tensor = sigmoid_loss(logits, target, weight, pos_weight, elementwise, *ctx.options)
        ctx.save_for_backward(logits, target, weight, pos_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *row_gradients(ctx, dloss, _gradients, sigmoid_grads_),
            None,
            None,
            None,
            None,
            None,
            None,
        )
