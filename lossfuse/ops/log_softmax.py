"""The operators of Triton's ``log_softmax`` and their autograd.

They are opaque to compilers, as in ``library``. Logits are (N, V). ``stats`` (2, N) holds row_max
and log_sum, which the backward takes with the logits."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .gradients import second_derivative
from .library import backend, library, new_grad

library.define("log_softmax(Tensor logits) -> (Tensor logp, Tensor stats)")
library.define("log_softmax_grad(Tensor logits, Tensor stats, Tensor dlogp) -> Tensor dlogits")

log_softmax = torch.ops.lossfuse.log_softmax.default
log_softmax_grad = torch.ops.lossfuse.log_softmax_grad.default


def _new_log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    stats = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    return new_grad(logits, True), stats


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    logp, stats = _new_log_softmax(logits)
    backend("triton").log_softmax(logits, logp, stats)
    return logp, stats


def _new_log_softmax_grad(logits: Tensor, stats: Tensor, dlogp: Tensor) -> Tensor:
    return new_grad(logits, True)


def _log_softmax_grad(logits: Tensor, stats: Tensor, dlogp: Tensor) -> Tensor:
    dlogits = new_grad(logits, True)
    backend("triton").log_softmax_grad(logits, stats, dlogp, dlogits)
    return dlogits


def _save_log_softmax(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    (logits,) = inputs
    _, stats = output
    ctx.save_for_backward(logits, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _log_softmax_backward(ctx: Any, dlogp: Tensor | None, dstats: None) -> Tensor | None:
    return None if dlogp is None else log_softmax_grad(*ctx.saved_tensors, dlogp)


def _save_log_softmax_grad(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    logits, _, dlogp = inputs
    ctx.save_for_backward(logits, dlogp)


def _log_softmax_grad_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    logits, dlogp = ctx.saved_tensors
    # second_derivative differentiates a target if it is floating point; here there is none
    no_target = torch.empty(0, dtype=torch.int64, device=logits.device)
    ddlogits, _, (ddlogp,) = second_derivative(
        lambda x, _: [reference.log_softmax(x, 1)], logits, no_target, [dlogp], (v, None)
    )
    return ddlogits, None, ddlogp


for _name, _kernel, _shapes, _backward, _save in (
    (
        "log_softmax",
        _log_softmax,
        _new_log_softmax,
        _log_softmax_backward,
        _save_log_softmax,
    ),
    (
        "log_softmax_grad",
        _log_softmax_grad,
        _new_log_softmax_grad,
        _log_softmax_grad_backward,
        _save_log_softmax_grad,
    ),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossfuse::{_name}", _shapes, lib=library)
    torch.library.register_autograd(
        f"lossfuse::{_name}", _backward, setup_context=_save, lib=library
    )
