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
