"""The torch programs that the functions equal, as their docstrings state them: the oracle of the tests, run in float64."""

from collections.abc import Sequence
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


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """Hidden states of any shape and a weight (V, D)."""
    logits = F.linear(input, linear_weight, linear_bias)
    if logits.dim() > 2:
        logits = logits.movedim(-1, 1)
        target = target.movedim(-1, 1) if target.is_floating_point() else target
    return cross_entropy(logits, target, weight, **options)


def head_value_and_grads(
    operands: Sequence[Tensor | None], target: Tensor, weight: Tensor | None = None, dloss: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """[loss, then the gradients of hidden states, weight, bias and probabilities that require one], in float64 of the same numbers."""
    wide = [t if t is None or not t.is_floating_point() else t.detach().double() for t in (*operands, target)]
    leaves = [w.requires_grad_() for t, w in zip((*operands, target), wide, strict=True) if t is not None and t.requires_grad]
    hidden, head, bias, t = wide
    loss = linear_cross_entropy(hidden, head, t, bias, None if weight is None else weight.detach().double(), **options)
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss) if dloss is None else dloss.double().reshape(loss.shape))
    return [loss.detach(), *grads]
