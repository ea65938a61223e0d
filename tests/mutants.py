"""Gradients that are wrong on purpose, each a mistake somebody shipped. Every comparator must reject every one of them."""

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
    """d mean loss / d x in closed form, with label smoothing, z-loss and a soft cap; the arguments are the mistakes."""
    x = x.detach().double()
    v = x.shape[-1]
    u = x / SOFTCAP
    z = SOFTCAP * torch.tanh(u)
    p = torch.softmax(z, -1)
    valid = target != -100
    one_hot = torch.zeros_like(p).scatter(1, target.where(valid, 0)[:, None], 1.0)
    lse = z.logsumexp(-1, keepdim=True)
    g = softmax_term * p - target_sign * (1 - SMOOTHING) * one_hot - SMOOTHING / (smoothing_classes or v) + z_term * 2 * Z_SCALE * lse * p
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
    "smoothing over half the classes": lambda x, t: gradient(x, t, smoothing_classes=max(1, x.shape[-1] // 2)),
    "divided by all rows": lambda x, t: gradient(x, t, divide_by_all_rows=True),
    "slope of the cap forgotten": lambda x, t: gradient(x, t, cap_slope=False),
    "ignored rows not ignored": lambda x, t: gradient(x, t, ignore=False),
    "first row's gradient for all": lambda x, t: gradient(x, t, row_zero_everywhere=True),
}
