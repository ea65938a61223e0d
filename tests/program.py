"""The torch programs that the functions equal, as their docstrings state them: the oracle of the
tests, run in float64."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    x = input if logit_scale is None else input * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(
        x,
        target,
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    ids = not target.is_floating_point()
    if lse_square_scale:
        z_loss = lse_square_scale * x.logsumexp(0 if x.dim() == 1 else 1) ** 2
        loss = loss + (z_loss.where(target != ignore_index, 0) if ids else z_loss)
    return reduced(loss, target, weight, ignore_index, reduction, row_weight, normalizer)


def reduced(
    loss: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Reduce losses of rows."""
    loss = loss if row_weight is None else loss * row_weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if normalizer is not None:
        return loss.sum() / normalizer
    if target.is_floating_point():
        return loss.sum() / loss.numel()
    valid = target != ignore_index
    if weight is None:
        return loss.sum() / valid.sum()
    return loss.sum() / weight[target.where(valid, 0)].where(valid, 0).sum()


def upstream(loss: Tensor, dloss: Tensor | None) -> Tensor:
    """The upstream gradient of a loss in float64, on its device."""
    return torch.ones_like(loss) if dloss is None else dloss.to(loss).reshape(loss.shape)


def value_and_grads(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    dloss: Tensor | None = None,
    **options: Any,
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
    grads = torch.autograd.grad(loss, leaves, upstream(loss, dloss))
    return [loss.detach(), *grads]


class Statistics(NamedTuple):
    loss: Tensor
    lse: Tensor
    target_logprob: Tensor
    entropy: Tensor
    z_loss: Tensor
    argmax: Tensor
    n_valid: Tensor


def cross_entropy_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | None = None,
    lse_square_scale: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Statistics:
    dim = 0 if input.dim() == 1 else 1
    x = input if logit_scale is None else input * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    # logits of ignored rows may be anything
    ids = not target.is_floating_point()
    valid = target != ignore_index if ids else torch.ones_like(x.select(dim, 0), dtype=torch.bool)
    x = x.where(valid.unsqueeze(dim), 0.0)
    logp = x.log_softmax(dim)
    lse = x.logsumexp(dim).where(valid, 0.0)
    if ids:
        target_logprob = (
            logp.gather(dim, target.where(valid, 0).unsqueeze(dim)).squeeze(dim).where(valid, 0.0)
        )
    else:
        target_logprob = (target * logp).sum(dim)
    # 0 * -inf of a class that is out is 0
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim).where(valid, 0.0)
    z_loss = reduced(
        lse_square_scale * lse**2, target, weight, ignore_index, reduction, row_weight, normalizer
    )
    loss = cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=logit_scale,
        lse_square_scale=lse_square_scale,
        row_weight=row_weight,
        normalizer=normalizer,
    )
    argmax = x.argmax(dim).where(valid, -2 if ignore_index == -1 else -1)
    return Statistics(loss, lse, target_logprob, entropy, z_loss, argmax, valid.sum())


def wide_leaves(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[Tensor]]:
    """The same numbers in float64, and those of them that require a gradient."""
    wide = [t if t is None or not t.is_floating_point() else t.detach().double() for t in tensors]
    return wide, [
        w.requires_grad_()
        for t, w in zip(tensors, wide, strict=True)
        if t is not None and w is not None and t.requires_grad
    ]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Hidden states of any shape and a weight (V, D)."""
    return cross_entropy(
        *logits_and_target(input, linear_weight, target, linear_bias), weight, **options
    )


def linear_cross_entropy_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> Statistics:
    """Hidden states of any shape and a weight (V, D)."""
    return cross_entropy_stats(
        *logits_and_target(input, linear_weight, target, linear_bias), weight, **options
    )


def logits_and_target(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = F.linear(input, linear_weight, linear_bias)
    if logits.dim() > 2:
        logits = logits.movedim(-1, 1)
        target = target.movedim(-1, 1) if target.is_floating_point() else target
    return logits, target


def head_value_and_grads(
    operands: Sequence[Tensor | None],
    target: Tensor,
    weight: Tensor | None = None,
    dloss: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """[loss, then the gradients of hidden states, weight, bias and probabilities that require one],
    in float64 of the same numbers."""
    wide, leaves = wide_leaves(*operands, target)
    hidden, head, bias, t = wide
    loss = linear_cross_entropy(
        hidden, head, t, bias, None if weight is None else weight.detach().double(), **options
    )
    grads = torch.autograd.grad(loss, leaves, upstream(loss, dloss))
    return [loss.detach(), *grads]


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Numbers of the shape of input, or ids of the labels that are 1; as a sum of softplus, since
    torch's is a difference."""
    if not target.is_floating_point():
        ones = torch.zeros(len(input), input.shape[1] + 1, dtype=input.dtype)
        target = ones.scatter(1, target.where(target != ignore_index, input.shape[1]), 1.0)[:, :-1]
    yes = target if pos_weight is None else target * pos_weight
    loss = yes * F.softplus(-input, threshold=700.0) + (1.0 - target) * F.softplus(
        input, threshold=700.0
    )
    loss = loss if weight is None else loss * weight
    return (
        loss
        if reduction == "none"
        else loss.sum()
        if reduction == "sum"
        else loss.sum() / input.numel()
    )
