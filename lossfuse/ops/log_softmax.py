"""The operators of log_softmax, nll_loss and binary cross entropy of probabilities, where torch's
own are not wanted: Triton's.

Opaque to compilers, as in ``library``; a gradient that is not needed is an empty tensor. Rows are
(N, V); a loss of probabilities is (N, V), or the sums of rows, (N, 1)."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..targets import require_ids_in_range
from .gradients import second_derivative
from .library import backend, library, new_grad, new_loss

library.define("log_softmax(Tensor logits) -> (Tensor logp, Tensor stats)")
library.define("log_softmax_grad(Tensor logits, Tensor stats, Tensor dlogp) -> Tensor dlogits")
library.define(
    "nll(Tensor logp, Tensor target, Tensor? class_weight, int ignore_index) -> Tensor loss"
)
library.define(
    "nll_grad(Tensor dloss, Tensor target, Tensor? class_weight, int ignore_index, SymInt num_classes, ScalarType dtype) -> Tensor dlogp"
)
library.define(
    "probability_loss(Tensor input, Tensor target, Tensor? weight, bool elementwise) -> Tensor loss"
)
library.define(
    "probability_grads(Tensor input, Tensor target, Tensor? weight, Tensor dloss, bool need_dinput, bool need_dtarget)"
    " -> (Tensor dinput, Tensor dtarget)"
)

log_softmax = torch.ops.lossfuse.log_softmax.default
log_softmax_grad = torch.ops.lossfuse.log_softmax_grad.default
nll = torch.ops.lossfuse.nll.default
nll_grad = torch.ops.lossfuse.nll_grad.default
probability_loss = torch.ops.lossfuse.probability_loss.default
probability_grads = torch.ops.lossfuse.probability_grads.default


def _triton() -> ModuleType:
    return backend("triton")


def _new_log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    stats = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    return new_grad(logits, True), stats


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    logp, stats = _new_log_softmax(logits)
    _triton().log_softmax(logits, logp, stats)
    return logp, stats


def _new_log_softmax_grad(logits: Tensor, stats: Tensor, dlogp: Tensor) -> Tensor:
    return new_grad(logits, True)


def _log_softmax_grad(logits: Tensor, stats: Tensor, dlogp: Tensor) -> Tensor:
    dlogits = new_grad(logits, True)
    _triton().log_softmax_grad(logits, stats, dlogp, dlogits)
    return dlogits


def _new_nll(
    logp: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int
) -> Tensor:
    return new_loss(logp)


def _nll(logp: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    require_ids_in_range(target, logp.shape[1], ignore_index)
    loss: Tensor = _triton().nll(logp, target, class_weight, ignore_index)
    return loss


def _new_nll_grad(
    dloss: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    num_classes: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(target.shape[0], num_classes, dtype=dtype, device=dloss.device)


def _nll_grad(
    dloss: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    num_classes: int,
    dtype: torch.dtype,
) -> Tensor:
    dlogp = _new_nll_grad(dloss, target, class_weight, ignore_index, num_classes, dtype)
    _triton().nll_grad(target, class_weight, dloss, ignore_index, dlogp)
    return dlogp


def _new_probability_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, elementwise: bool
) -> Tensor:
    return torch.empty(
        input.shape[0],
        input.shape[1] if elementwise else 1,
        dtype=torch.float32,
        device=input.device,
    )


def _probability_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, elementwise: bool
) -> Tensor:
    loss = _new_probability_loss(input, target, weight, elementwise)
    _triton().probability_loss_and_grads(
        input, target, weight, loss=loss, dloss=None, dinput=None, dtarget=None
    )
    return loss


def _new_probability_grads(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor,
    need_dinput: bool,
    need_dtarget: bool,
) -> tuple[Tensor, Tensor]:
    return new_grad(input, need_dinput), new_grad(target, need_dtarget)


def _probability_grads(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor,
    need_dinput: bool,
    need_dtarget: bool,
) -> tuple[Tensor, Tensor]:
    dinput, dtarget = new_grad(input, need_dinput), new_grad(target, need_dtarget)
    _triton().probability_loss_and_grads(
        input,
        target,
        weight,
        loss=None,
        dloss=dloss,
        dinput=dinput if need_dinput else None,
        dtarget=dtarget if need_dtarget else None,
    )
    return dinput, dtarget


for _name, _impl, _shapes in (
    ("log_softmax", _log_softmax, _new_log_softmax),
    ("log_softmax_grad", _log_softmax_grad, _new_log_softmax_grad),
    ("nll", _nll, _new_nll),
    ("nll_grad", _nll_grad, _new_nll_grad),
    ("probability_loss", _probability_loss, _new_probability_loss),
    ("probability_grads", _probability_grads, _new_probability_grads),
):
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossfuse::{_name}", _shapes, lib=library)


def _save_log_softmax(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _log_softmax_backward(ctx: Any, dlogp: Tensor | None, dstats: None) -> Tensor | None:
    return None if dlogp is None else log_softmax_grad(*ctx.saved_tensors, dlogp)


def _save_log_softmax_grad(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    logits, _, dlogp = inputs
    ctx.save_for_backward(logits, dlogp)


def _log_softmax_grad_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    logits, dlogp = ctx.saved_tensors
    # there is no target; an empty one has no derivative
    nobody = torch.empty(0, dtype=torch.int64, device=logits.device)
    ddlogits, _, (ddlogp,) = second_derivative(
        lambda x, _: [reference.log_softmax(x, 1)], logits, nobody, [dlogp], (v, None)
    )
    return ddlogits, None, ddlogp


def _save_nll(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logp, target, class_weight, ctx.ignore_index = inputs
    ctx.save_for_backward(target, class_weight)
    ctx.num_classes, ctx.dtype = logp.shape[1], logp.dtype


def _nll_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    return (
        nll_grad(dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.num_classes, ctx.dtype),
        None,
        None,
        None,
    )


def _save_nll_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, target, class_weight, ctx.ignore_index, _, _ = inputs
    ctx.save_for_backward(target, class_weight)


def _nll_grad_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    # the loss is linear, so each of the two is the other's transpose
    return nll(v, *ctx.saved_tensors, ctx.ignore_index), None, None, None, None, None


def _save_probability_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _probability_loss_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    grads = probability_grads(*ctx.saved_tensors, dloss, *needed)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None


def _save_probability_grads(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)


def _probability_grads_backward(
    ctx: Any, v_dinput: Tensor | None, v_dtarget: Tensor | None
) -> tuple[Tensor | None, ...]:
    input, target, weight, dloss = ctx.saved_tensors

    def values(x: Tensor, t: Tensor) -> list[Tensor]:
        loss = reference.probability_loss(x, t, weight)
        return [loss if loss.shape == dloss.shape else loss.sum(1, keepdim=True)]

    ddinput, ddtarget, (ddloss,) = second_derivative(
        values, input, target, [dloss], (v_dinput, v_dtarget)
    )
    return ddinput, ddtarget, None, ddloss, None, None


for _name, _backward, _save in (
    ("log_softmax", _log_softmax_backward, _save_log_softmax),
    ("log_softmax_grad", _log_softmax_grad_backward, _save_log_softmax_grad),
    ("nll", _nll_backward, _save_nll),
    ("nll_grad", _nll_grad_backward, _save_nll_grad),
    ("probability_loss", _probability_loss_backward, _save_probability_loss),
    ("probability_grads", _probability_grads_backward, _save_probability_grads),
):
    torch.library.register_autograd(
        f"lossfuse::{_name}", _backward, setup_context=_save, lib=library
    )
