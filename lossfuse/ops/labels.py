"""The operators of binary cross entropy with logits, and their autograd.

A loss is (N, V), or (N, 1) for the sums of rows; ``dloss`` has the shape of its loss.
"""

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..targets import require_ids_in_range
from .gradients import formed_gradients, only_needed, row_gradients, second_derivative, writing
from .inplace import Owner
from .library import library, new_grad

_BACKENDS = {"triton": "..backends.triton", "torch": "..backends.torch_labels"}


class LabelArgs(NamedTuple):
    """The last arguments of every operator of this file, in the order of the schemas."""

    logits: Tensor  # (N, V)
    target: Tensor  # (N, V) numbers, or (N, P) ids of the labels that are 1
    weight: Tensor | None  # (N, V)
    pos_weight: Tensor | None  # (N, V)
    ignore_index: int
    impl: str


_ARGS = (
    "Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight, int ignore_index, str impl"
)
_INPLACE_ARGS = _ARGS.replace("Tensor logits", "Tensor(a!) logits")
_GRADS = "Tensor dloss, bool need_dlogits, bool need_dtarget"
_INPLACE_GRADS = "Tensor dloss, bool need_dtarget"

library.define(f"label_loss(bool elementwise, {_ARGS}) -> Tensor")
library.define(f"label_grads({_GRADS}, {_ARGS}) -> (Tensor dlogits, Tensor dtarget)")
library.define(
    f"label_loss_and_grads({_GRADS}, {_ARGS}) -> (Tensor loss, Tensor dlogits, Tensor dtarget)"
)
library.define(
    f"label_loss_and_grads_({_INPLACE_GRADS}, {_INPLACE_ARGS}) -> (Tensor loss, Tensor dtarget)"
)
library.define(f"label_grads_({_INPLACE_GRADS}, {_INPLACE_ARGS}) -> Tensor dtarget")

label_loss = torch.ops.lossfuse.label_loss.default
label_grads = torch.ops.lossfuse.label_grads.default
label_loss_and_grads = torch.ops.lossfuse.label_loss_and_grads.default
label_loss_and_grads_ = torch.ops.lossfuse.label_loss_and_grads_.default
label_grads_ = torch.ops.lossfuse.label_grads_.default


@functools.cache
def _backend(impl: str) -> ModuleType:
    return importlib.import_module(_BACKENDS[impl], __package__)


def require_ids(target: Tensor, logits: Tensor, ignore_index: int) -> None:
    """Raise IndexError if the target is ids and one is out of range."""
    if not target.is_floating_point():
        require_ids_in_range(target, logits.shape[1], ignore_index)


def _new_loss(logits: Tensor, elementwise: bool) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    columns = logits.shape[1] if elementwise else 1
    return torch.empty(logits.shape[0], columns, dtype=dtype, device=logits.device)


def _fill(
    args: LabelArgs,
    *,
    loss: Tensor | None = None,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> None:
    """Fill ``loss`` and the gradients that are given."""
    if loss is not None:
        require_ids(args.target, args.logits, args.ignore_index)
    *operands, impl = args
    _backend(impl).label_loss_and_grads(
        *operands, loss=loss, dloss=dloss, dlogits=dlogits, dtarget=dtarget
    )


def _new_label_loss(elementwise: bool, *operands: Any) -> Tensor:
    args = LabelArgs(*operands)
    return _new_loss(args.logits, elementwise)


def _label_loss(elementwise: bool, *operands: Any) -> Tensor:
    args = LabelArgs(*operands)
    loss = _new_loss(args.logits, elementwise)
    _fill(args, loss=loss)
    return loss


def _new_label_grads(
    dloss: Tensor, need_dlogits: bool, need_dtarget: bool, *operands: Any
) -> tuple[Tensor, Tensor]:
    args = LabelArgs(*operands)
    return new_grad(args.logits, need_dlogits), new_grad(args.target, need_dtarget)


def _label_grads(
    dloss: Tensor, need_dlogits: bool, need_dtarget: bool, *operands: Any
) -> tuple[Tensor, Tensor]:
    args = LabelArgs(*operands)
    grads = _new_label_grads(dloss, need_dlogits, need_dtarget, *args)
    dlogits, dtarget = only_needed(grads, need_dlogits, need_dtarget)
    _fill(args, dloss=dloss, dlogits=dlogits, dtarget=dtarget)
    return grads


def _new_label_loss_and_grads(
    dloss: Tensor, need_dlogits: bool, need_dtarget: bool, *operands: Any
) -> tuple[Tensor, Tensor, Tensor]:
    args = LabelArgs(*operands)
    grads = _new_label_grads(dloss, need_dlogits, need_dtarget, *args)
    return _new_loss(args.logits, False), *grads


def _label_loss_and_grads(
    dloss: Tensor, need_dlogits: bool, need_dtarget: bool, *operands: Any
) -> tuple[Tensor, Tensor, Tensor]:
    args = LabelArgs(*operands)
    loss, dlogits, dtarget = _new_label_loss_and_grads(dloss, need_dlogits, need_dtarget, *args)
    _fill(
        args,
        loss=loss,
        dloss=dloss,
        dlogits=dlogits if need_dlogits else None,
        dtarget=dtarget if need_dtarget else None,
    )
    return loss, dlogits, dtarget


def _new_label_loss_and_grads_(
    dloss: Tensor, need_dtarget: bool, *operands: Any
) -> tuple[Tensor, Tensor]:
    args = LabelArgs(*operands)
    return _new_loss(args.logits, False), new_grad(args.target, need_dtarget)


def _label_loss_and_grads_(
    dloss: Tensor, need_dtarget: bool, *operands: Any
) -> tuple[Tensor, Tensor]:
    args = LabelArgs(*operands)
    loss, dtarget = _new_label_loss_and_grads_(dloss, need_dtarget, *args)
    filled = dtarget if need_dtarget else None
    _fill(args, loss=loss, dloss=dloss, dlogits=args.logits, dtarget=filled)
    return loss, dtarget


def _new_label_grads_(dloss: Tensor, need_dtarget: bool, *operands: Any) -> Tensor:
    args = LabelArgs(*operands)
    return new_grad(args.target, need_dtarget)


def _label_grads_(dloss: Tensor, need_dtarget: bool, *operands: Any) -> Tensor:
    args = LabelArgs(*operands)
    dtarget = new_grad(args.target, need_dtarget)
    filled = dtarget if need_dtarget else None
    _fill(args, dloss=dloss, dlogits=args.logits, dtarget=filled)
    return dtarget


for _name, _kernel, _shapes in (
    ("label_loss", _label_loss, _new_label_loss),
    ("label_grads", _label_grads, _new_label_grads),
    ("label_loss_and_grads", _label_loss_and_grads, _new_label_loss_and_grads),
    ("label_loss_and_grads_", _label_loss_and_grads_, _new_label_loss_and_grads_),
    ("label_grads_", _label_grads_, _new_label_grads_),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossfuse::{_name}", _shapes, lib=library)


def _save(ctx: Any, args: LabelArgs, *more: Tensor) -> None:
    ctx.save_for_backward(args.logits, args.target, args.weight, args.pos_weight, *more)
    ctx.options = args.ignore_index, args.impl


def _saved_gradients(
    ctx: Any, dloss: Tensor, need_dlogits: bool, need_dtarget: bool
) -> tuple[Tensor | None, Tensor | None]:
    grads = label_grads(dloss, need_dlogits, need_dtarget, *ctx.saved_tensors, *ctx.options)
    return only_needed(grads, need_dlogits, need_dtarget)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *operands = inputs
    _save(ctx, LabelArgs(*operands))


def _loss_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    _, *needed = ctx.needs_input_grad
    need_dlogits, need_dtarget, *_ = needed
    dlogits, dtarget = _saved_gradients(ctx, dloss, need_dlogits, need_dtarget)
    return None, dlogits, dtarget, None, None, None, None


def _save_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dloss, _, _, *operands = inputs
    _save(ctx, LabelArgs(*operands), dloss)
    ctx.set_materialize_grads(False)


def _grads_backward(
    ctx: Any, v_dlogits: Tensor | None, v_dtarget: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, target, weight, pos_weight, dloss = ctx.saved_tensors
    ignore_index, _ = ctx.options

    def values(x: Tensor, t: Tensor) -> list[Tensor]:
        loss = reference.label_loss(x, t, weight, pos_weight, ignore_index)
        return [loss if dloss.shape == loss.shape else loss.sum(1, keepdim=True)]

    ddlogits, ddtarget, (ddloss,) = second_derivative(
        values, logits, target, [dloss], (v_dlogits, v_dtarget)
    )
    return ddloss, None, None, ddlogits, ddtarget, None, None, None, None


for _name, _backward, _saver in (
    ("label_loss", _loss_backward, _save_loss),
    ("label_grads", _grads_backward, _save_grads),
):
    torch.library.register_autograd(
        f"lossfuse::{_name}", _backward, setup_context=_saver, lib=library
    )


class ReducedLoss(torch.autograd.Function):
    """Sum of the losses of (N, V) logits divided by ``count``; the gradient is formed in the
    forward, as in ``ops.rows``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        ignore_index: int,
        impl: str,
        count: int,
        owner: Owner | None,
    ) -> Tensor:
        args = LabelArgs(logits, target, weight, pos_weight, ignore_index, impl)
        need_dlogits, need_dtarget = ctx.needs_input_grad[:2]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # a count of 0 has no element to divide
        scale = torch.full((), 1.0 / max(count, 1), dtype=dtype, device=logits.device)
        dloss = scale.expand(len(logits), 1)
        ctx.impl, ctx.consumed = impl, owner is not None
        grads: tuple[Tensor, ...]
        if owner is not None:
            with writing(logits, owner) as dlogits:
                loss, dtarget = label_loss_and_grads_(
                    dloss, need_dtarget, *args._replace(logits=dlogits)
                )
            grads = dlogits, dtarget
        else:
            loss, *grads = label_loss_and_grads(dloss, need_dlogits, need_dtarget, *args)
            _save(ctx, args, dloss)
        ctx.formed = only_needed(grads, need_dlogits, need_dtarget)
        return loss.sum() / count

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dlogits, dtarget = formed_gradients(ctx, dtotal, _gradients_again)
        return dlogits, dtarget, None, None, None, None, None, None


def _gradients_again(ctx: Any) -> tuple[Tensor, Tensor]:
    *operands, dloss = ctx.saved_tensors
    need_dlogits, need_dtarget = ctx.needs_input_grad[:2]
    grads: tuple[Tensor, Tensor] = label_grads(
        dloss, need_dlogits, need_dtarget, *operands, *ctx.options
    )
    return grads


class Loss(torch.autograd.Function):
    """(N, V) losses of (N, V) logits, or the sums of rows. With an ``owner`` the backward writes
    the gradient over the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        ignore_index: int,
        impl: str,
        elementwise: bool,
        owner: Owner | None,
    ) -> Tensor:
        args = LabelArgs(logits, target, weight, pos_weight, ignore_index, impl)
        ctx.owner, ctx.spent = owner, False
        loss: Tensor = label_loss(elementwise, *args)
        _save(ctx, args)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dlogits, dtarget = row_gradients(ctx, dloss, _gradients, _write_gradients)
        return dlogits, dtarget, None, None, None, None, None, None


def _gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    need_dlogits, need_dtarget = ctx.needs_input_grad[:2]
    return _saved_gradients(ctx, dloss, need_dlogits, need_dtarget)


def _write_gradients(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    dloss: Tensor,
    need_dtarget: bool,
    *options: Any,
) -> Tensor:
    """Write the gradient over ``logits`` and return ``dtarget``, as ``row_gradients`` asks."""
    dtarget: Tensor = label_grads_(
        dloss, need_dtarget, logits, target, weight, pos_weight, *options
    )
    return dtarget
