"""Gradients that are wrong on purpose, each a mistake that a library has shipped. Every comparator
must reject every one of them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

SMOOTHING, Z_SCALE, SOFTCAP = 0.1, 1e-3, 8.0


def gradient(
    x: Tensor,
    target: Tensor,
    *,
    softmax_term: float = 1.0,
    target_sign: float = 1.0,
    z_term: float = 1.0,
    half_the_classes: bool = False,
    divide_by_all_rows: bool = False,
    cap_derivative: bool = True,
    ignore: bool = True,
    row_zero_everywhere: bool = False,
) -> Tensor:
    """d mean loss / d x in closed form, with label smoothing, z-loss and a soft cap; the arguments
    are the mistakes."""
    x = x.detach().double()
    v = x.shape[-1]
    u = x / SOFTCAP
    z = SOFTCAP * torch.tanh(u)
    p = torch.softmax(z, -1)
    valid = target != -100
    one_hot = torch.zeros_like(p).scatter(1, target.where(valid, 0)[:, None], 1.0)
    lse = z.logsumexp(-1, keepdim=True)
    g = (
        softmax_term * p
        - target_sign * (1 - SMOOTHING) * one_hot
        - SMOOTHING / (max(1, v // 2) if half_the_classes else v)
        + z_term * 2 * Z_SCALE * lse * p
    )
    if cap_derivative:
        g = g / torch.cosh(u) ** 2
    if ignore:
        g = g * valid[:, None]
    g = g / (len(target) if divide_by_all_rows else valid.sum())
    return g[:1].expand_as(g) if row_zero_everywhere else g


def zeros(x: Tensor, target: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.float64)


Mutants = dict[str, Callable[[Tensor, Tensor], Tensor]]
MUTANTS: Mutants = {
    "zeros": zeros,
    "softmax term dropped": partial(gradient, softmax_term=0.0),
    "sign of the target term": partial(gradient, target_sign=-1.0),
    "z-loss gradient forgotten": partial(gradient, z_term=0.0),
    "smoothing over half the classes": partial(gradient, half_the_classes=True),
    "divided by all rows": partial(gradient, divide_by_all_rows=True),
    "derivative of the cap forgotten": partial(gradient, cap_derivative=False),
    "ignored rows not ignored": partial(gradient, ignore=False),
    "first row's gradient for all": partial(gradient, row_zero_everywhere=True),
}


LOGIT_SCALE = 0.7


def objective(stats, rows: Tensor) -> Tensor:
    """A mixture of all statistics, with a weight for each row and statistic, from 1 to 3."""
    u = torch.linspace(1.0, 3.0, len(rows), dtype=stats.lse.dtype)
    return (
        (u * stats.lse).sum()
        + (u.flip(0) * stats.target_logprob).sum()
        + (1.5 * u * stats.entropy).sum()
        + 20.0 * stats.z_loss
    )


def statistics_gradient(
    x: Tensor,
    target: Tensor,
    *,
    entropy_mean: float = 1.0,
    entropy_sign: float = 1.0,
    target_sign: float = 1.0,
    softmax_of_target: float = 1.0,
    lse_term: float = 1.0,
    z_derivative: float = 1.0,
    scale_derivative: bool = True,
    cap_derivative: bool = True,
    ignore: bool = True,
    weights_of_first_row: bool = False,
    divide_by_all_rows: bool = False,
) -> Tensor:
    """d objective / d x in closed form, with a scale, a soft cap and z-loss; the arguments are the
    mistakes."""
    x = x.detach().double()
    capped = LOGIT_SCALE * x / SOFTCAP
    z = SOFTCAP * torch.tanh(capped)
    logp = torch.log_softmax(z, -1)
    p, lse = logp.exp(), z.logsumexp(-1, keepdim=True)
    valid = target != -100
    one_hot = torch.zeros_like(p).scatter(1, target.where(valid, 0)[:, None], 1.0)
    h = -(p * logp).sum(-1, keepdim=True)
    u = torch.linspace(1.0, 3.0, len(x), dtype=torch.float64)[:, None]
    flipped = u.flip(0)
    if weights_of_first_row:
        u, flipped = u[:1], flipped[:1]
    rows = len(target) if divide_by_all_rows else valid.sum()
    g = lse_term * u * p + flipped * (target_sign * one_hot - softmax_of_target * p)
    g = g - entropy_sign * 1.5 * u * p * (logp + entropy_mean * h)
    g = g + 20.0 * Z_SCALE * (2.0 * lse * p if z_derivative else 0.0) / rows
    if scale_derivative:
        g = g * LOGIT_SCALE
    if cap_derivative:
        g = g / torch.cosh(capped) ** 2
    return g * valid[:, None] if ignore else g


STATISTICS_MUTANTS: Mutants = {
    "zeros": zeros,
    "entropy without its own value": partial(statistics_gradient, entropy_mean=0.0),
    "sign of the entropy": partial(statistics_gradient, entropy_sign=-1.0),
    "entropy forgotten": partial(statistics_gradient, entropy_sign=0.0),
    "sign of the target term": partial(statistics_gradient, target_sign=-1.0),
    "target's log-probability as its logit": partial(statistics_gradient, softmax_of_target=0.0),
    "lse forgotten": partial(statistics_gradient, lse_term=0.0),
    "derivative of the z-loss forgotten": partial(statistics_gradient, z_derivative=False),
    "derivative of the temperature forgotten": partial(statistics_gradient, scale_derivative=False),
    "derivative of the cap forgotten": partial(statistics_gradient, cap_derivative=False),
    "ignored rows not ignored": partial(statistics_gradient, ignore=False),
    "first row's weights for all": partial(statistics_gradient, weights_of_first_row=True),
    "z-loss divided by all rows": partial(statistics_gradient, divide_by_all_rows=True),
}
