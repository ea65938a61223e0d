"""The torch program that ``lossfuse.cross_entropy`` equals, as its docstring states it: the oracle of the tests, run in float64."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    lse_square_scale: float = 0.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    x = input if logit_scale is None else input * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    ids = not target.is_floating_point()
    if lse_square_scale:
        z_loss = lse_square_scale * x.logsumexp(0 if x.dim() == 1 else 1) ** 2
        loss = loss + (z_loss.where(target != ignore_index, 0) if ids else z_loss)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if normalizer is not None:
        return loss.sum() / normalizer
    valid = target != ignore_index if ids else None
    if valid is None:
        return loss.sum() / loss.numel()
    if weight is None:
        return loss.sum() / valid.sum()
    return loss.sum() / weight[target.where(valid, 0)].where(valid, 0).sum()


def value_and_grads(
    input: Tensor, target: Tensor, weight: Tensor | None = None, dloss: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """[loss, d input, d target if it has one], in float64 of the same numbers."""
    x = input.detach().double().requires_grad_()
    leaves = [x]
    t = target
    if target.is_floating_point():
        t = target.detach().double()
        if target.requires_grad:
            leaves.append(t.requires_grad_())
    loss = cross_entropy(x, t, None if weight is None else weight.detach().double(), **options)
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss) if dloss is None else dloss.double().reshape(loss.shape))
    return [loss.detach(), *grads]
