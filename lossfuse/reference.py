"""The definition of every loss: eager torch, any float dtype, differentiable any number of times.

It computes in float64 for float64 logits and in float32 otherwise, and materializes a few N x V
tensors. Backends are tested against it."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .inputs import without_autocast
from .row_types import RowStats, no_class
from .spec import LossSpec


def transform_logits(x: Tensor, spec: LossSpec) -> Tensor:
    """softcap * tanh(logit_scale * x / softcap)"""
    z = x if spec.logit_scale is None else x * spec.logit_scale
    return z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)


def row_loss(logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec) -> Tensor:
    """(N, V) logits, (N,) class ids or (N, V) probabilities -> (N,) losses as ``LossSpec`` defines
    them; NaN for an id outside [0, V)."""
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    weight = None if class_weight is None else class_weight.to(x.dtype)
    if target.is_floating_point():
        return _soft_row_loss(transform_logits(x, spec), target.to(x.dtype), weight, spec)

    num_classes = x.shape[-1]
    ignored = target == spec.ignore_index
    valid = ~ignored & (target >= 0) & (target < num_classes)
    y = torch.where(valid, target, 0)[:, None]
    # ignored rows may hold NaN, and 0 * NaN would carry it into the gradient
    z = transform_logits(torch.where(ignored[:, None], 0.0, x), spec)
    loss = _negative_log_likelihood(z, y)
    if weight is not None:
        loss = loss * weight[y[:, 0]]
    if spec.label_smoothing:
        q = (torch.ones_like(z) if weight is None else weight.expand_as(z)) / num_classes
        loss = (1.0 - spec.label_smoothing) * loss + spec.label_smoothing * _expected_nll(z, q)
    loss = _plus_z_loss(loss, z, spec)
    return torch.where(ignored, 0.0, loss * _one_or_nan(ignored | valid, loss))


def row_stats(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec
) -> RowStats:
    """The losses of ``row_loss``, and statistics of the same rows; all but argmax are
    differentiable."""
    # one upcast for all of them, so that their gradients are summed before they are rounded
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if target.is_floating_point():
        target = target.to(x.dtype)
    loss = row_loss(x, target, class_weight, spec)
    if target.is_floating_point():
        z = transform_logits(x, spec)
        logp = torch.log_softmax(z, -1)
        target_logprob = -_expected_nll(z, target)
        valid = torch.ones_like(loss, dtype=torch.bool)
        ignored = ~valid
    else:
        ignored = target == spec.ignore_index
        valid = ~ignored & (target >= 0) & (target < x.shape[-1])
        z = transform_logits(torch.where(ignored[:, None], 0.0, x), spec)
        logp = torch.log_softmax(z, -1)
        target_logprob = -_negative_log_likelihood(z, torch.where(valid, target, 0)[:, None])

    def mask_rows(t: Tensor) -> Tensor:
        return torch.where(ignored, 0.0, t * _one_or_nan(ignored | valid, t))

    # a class of probability 0 adds 0, and its -inf must not reach the gradient
    absent = logp == -torch.inf
    entropy = -(logp.exp() * torch.where(absent, 0.0, logp)).sum(-1)
    argmax = torch.where(valid, z.argmax(-1), no_class(spec))
    return RowStats(
        loss,
        mask_rows(_logsumexp(z)),
        mask_rows(target_logprob),
        mask_rows(entropy),
        argmax,
        loss.new_empty(0),
    )


def _one_or_nan(good: Tensor, like: Tensor) -> Tensor:
    """1 where ``good`` and NaN elsewhere, in the dtype of ``like``. As a factor it makes gradients
    NaN too."""
    # torch.where of two Python numbers has the default dtype
    return torch.where(good, like.new_ones(()), torch.nan)


def linear_row_loss(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> Tensor:
    """(N, D) hidden states and a head (V, D) -> (N,) losses."""
    return row_loss(
        _head_logits(hidden, linear_weight, linear_bias, target, spec), target, class_weight, spec
    )


def linear_row_stats(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> RowStats:
    """(N, D) hidden states and a head (V, D) -> statistics."""
    return row_stats(
        _head_logits(hidden, linear_weight, linear_bias, target, spec), target, class_weight, spec
    )


def _head_logits(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    spec: LossSpec,
) -> Tensor:
    if not target.is_floating_point():
        # ignored rows may hold NaN, and 0 * NaN would carry it into the gradient of the weight
        hidden = torch.where((target == spec.ignore_index)[:, None], 0.0, hidden)
    return linear(hidden, linear_weight, linear_bias)


def linear(hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """The logits of a head, in the dtype the loss is computed in."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if linear_bias is None else linear_bias.to(dtype)
    with without_autocast(hidden):
        return torch.nn.functional.linear(hidden.to(dtype), linear_weight.to(dtype), bias)


def _negative_log_likelihood(z: Tensor, y: Tensor) -> Tensor:
    """lse(z) - z[y] = softplus(lse of the other classes - z[y]): no cancellation, however
    confident."""
    # the result does not depend on the offset, so it is a constant. As in torch, a +inf logit makes
    # the row and its gradient NaN
    top = z.amax(-1, keepdim=True).detach()
    z = z - torch.where(top == torch.inf, torch.nan, top)
    # 1 and not True, which torch.jit.trace cannot record here
    is_target = torch.zeros_like(z, dtype=torch.bool).scatter(1, y, 1)
    others = z.masked_fill(is_target, -torch.inf)
    # the logsumexp of only -inf has a NaN gradient; its value is -inf
    others_absent = (others == -torch.inf).all(-1)
    lse_others = torch.logsumexp(torch.where(others_absent[:, None], 0.0, others), -1)
    margin = torch.where(others_absent, -torch.inf, lse_others) - z.gather(1, y)[:, 0]
    return torch.logaddexp(margin, torch.zeros_like(margin))


def _soft_row_loss(z: Tensor, target: Tensor, weight: Tensor | None, spec: LossSpec) -> Tensor:
    q = target
    if spec.label_smoothing:
        q = (1.0 - spec.label_smoothing) * q + spec.label_smoothing / z.shape[-1]
    if weight is not None:
        q = q * weight
    return _plus_z_loss(_expected_nll(z, q), z, spec)


def _expected_nll(z: Tensor, q: Tensor) -> Tensor:
    """sum of q * (lse - z), leaving out classes of zero q and -inf z."""
    nll = -torch.log_softmax(z, -1)
    return (q * torch.where((q == 0) & (z == -torch.inf), 0.0, nll)).sum(-1)


def _logsumexp(z: Tensor) -> Tensor:
    """torch.logsumexp relative to the maximum: torch's gradient exp(z - lse) is inaccurate where an
    offset common to the row is large.

    A +inf logit makes it +inf, as in torch, and the gradient of its row NaN, as that of the loss.
    """
    top = z.amax(-1, keepdim=True).detach()
    infinite = top[:, 0] == torch.inf
    top = torch.where(top.isfinite(), top, 0.0)
    lse = (z - top).logsumexp(-1) + top[:, 0]
    return torch.where(infinite, torch.inf, lse * _one_or_nan(~infinite, lse))


def _plus_z_loss(loss: Tensor, z: Tensor, spec: LossSpec) -> Tensor:
    return loss + spec.lse_square_scale * _logsumexp(z) ** 2 if spec.lse_square_scale else loss


def label_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """(N, V) logits, (N, V) targets or (N, P) ids of the labels that are 1 -> (N, V) losses; a row
    is NaN for an id outside [0, V)."""
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    t = target.to(x.dtype) if target.is_floating_point() else multi_hot(target, x, ignore_index)
    positive = t if pos_weight is None else t * pos_weight.to(x.dtype)
    # a difference of the two would cancel for confident predictions; beyond the threshold exp(-x)
    # is below the fp64 epsilon relative to x
    loss = positive * softplus(-x, threshold=40.0) + (1.0 - t) * softplus(x, threshold=40.0)
    # NaN for -inf, as in torch; a constant, so that the gradient is torch's too
    loss = loss + torch.where(x == -torch.inf, torch.nan, x.new_zeros(()))
    return loss if weight is None else loss * weight.to(x.dtype)


def multi_hot(ids: Tensor, x: Tensor, ignore_index: int) -> Tensor:
    """(N, P) ids -> (N, V) zeros and ones, in the dtype of ``x``; NaN for rows with an id outside
    [0, V)."""
    v = x.shape[1]
    given = ids != ignore_index
    valid = given & (ids >= 0) & (ids < v)
    t = torch.zeros_like(x, requires_grad=False)
    if v:
        # scatter_add, as padding writes 0 to class 0, which may be 1
        t = t.scatter_add(1, torch.where(valid, ids, 0), valid.to(x.dtype)).clamp(max=1.0)
    return t * _one_or_nan((valid | ~given).all(1, keepdim=True), t)


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """x - logsumexp(x) relative to the maximum; computed in float32 or wider, in the dtype of
    ``x``."""
    z = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    z = z - z.amax(dim, keepdim=True).detach() if z.numel() else z
    return (z - z.exp().sum(dim, keepdim=True).log()).to(x.dtype)


def nll_row_loss(
    logp: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int
) -> Tensor:
    """(N, V) log-probabilities, (N,) ids -> (N,) losses; NaN for an id outside [0, V)."""
    ignored = target == ignore_index
    valid = ~ignored & (target >= 0) & (target < logp.shape[1])
    y = torch.where(valid, target, 0)
    # ignored rows may hold NaN, and 0 * NaN would carry it into the gradient
    loss = torch.where(
        ignored,
        0.0,
        -logp.gather(1, y[:, None])[:, 0].to(
            torch.float64 if logp.dtype == torch.float64 else torch.float32
        ),
    )
    if class_weight is not None:
        loss = loss * class_weight.to(loss.dtype)[y]
    return torch.where(ignored, 0.0, loss * _one_or_nan(ignored | valid, loss))
