"""Gradients that are wrong on purpose, each a mistake somebody shipped. Every comparator must
reject every one of them."""

from collections.abc import Callable

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
    smoothing_classes: int | None = None,
    divide_by_all_rows: bool = False,
    cap_slope: bool = True,
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
        - SMOOTHING / (smoothing_classes or v)
        + z_term * 2 * Z_SCALE * lse * p
    )
    if cap_slope:
        g = g / torch.cosh(u) ** 2
    if ignore:
        g = g * valid[:, None]
    g = g / (len(target) if divide_by_all_rows else valid.sum())
    return g[:1].expand_as(g) if row_zero_everywhere else g


MUTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros": lambda x, t: torch.zeros_like(x, dtype=torch.float64),
    "softmax term dropped": lambda x, t: gradient(x, t, softmax_term=0.0),
    "sign of the target term": lambda x, t: gradient(x, t, target_sign=-1.0),
    "z-loss gradient forgotten": lambda x, t: gradient(x, t, z_term=0.0),
    "smoothing over half the classes": lambda x, t: gradient(
        x, t, smoothing_classes=max(1, x.shape[-1] // 2)
    ),
    "divided by all rows": lambda x, t: gradient(x, t, divide_by_all_rows=True),
    "slope of the cap forgotten": lambda x, t: gradient(x, t, cap_slope=False),
    "ignored rows not ignored": lambda x, t: gradient(x, t, ignore=False),
    "first row's gradient for all": lambda x, t: gradient(x, t, row_zero_everywhere=True),
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
    z_slope: float = 1.0,
    scale_slope: bool = True,
    cap_slope: bool = True,
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
    g = g + 20.0 * Z_SCALE * (2.0 * lse * p if z_slope else 0.0) / rows
    if scale_slope:
        g = g * LOGIT_SCALE
    if cap_slope:
        g = g / torch.cosh(capped) ** 2
    return g * valid[:, None] if ignore else g


STATISTICS_MUTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros": lambda x, t: torch.zeros_like(x, dtype=torch.float64),
    "entropy without its own value": lambda x, t: statistics_gradient(x, t, entropy_mean=0.0),
    "sign of the entropy": lambda x, t: statistics_gradient(x, t, entropy_sign=-1.0),
    "entropy forgotten": lambda x, t: statistics_gradient(x, t, entropy_sign=0.0),
    "sign of the target term": lambda x, t: statistics_gradient(x, t, target_sign=-1.0),
    "target's log-probability as its logit": lambda x, t: statistics_gradient(
        x, t, softmax_of_target=0.0
    ),
    "lse forgotten": lambda x, t: statistics_gradient(x, t, lse_term=0.0),
    "slope of the z-loss forgotten": lambda x, t: statistics_gradient(x, t, z_slope=False),
    "slope of the temperature forgotten": lambda x, t: statistics_gradient(x, t, scale_slope=False),
    "slope of the cap forgotten": lambda x, t: statistics_gradient(x, t, cap_slope=False),
    "ignored rows not ignored": lambda x, t: statistics_gradient(x, t, ignore=False),
    "first row's weights for all": lambda x, t: statistics_gradient(
        x, t, weights_of_first_row=True
    ),
    "z-loss divided by all rows": lambda x, t: statistics_gradient(x, t, divide_by_all_rows=True),
}
