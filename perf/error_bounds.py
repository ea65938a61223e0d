"""Float64 loss and gradient of rows with a bound for each entry, and errors in units of bounds.

docs/numerics.md derives the formulas."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

C = 4.0
U = torch.finfo(torch.float32).eps / 2
SMALLEST = torch.finfo(torch.float32).smallest_normal
DEVIATIONS = 4.0


@dataclass(frozen=True)
class Finding:
    """The worst entry of an output."""

    output: str
    ratio: float
    error: float
    bound: float
    place: str = ""


def worst(output: str, error: Tensor, bound: Tensor) -> Finding:
    """The entry with the largest ratio; an error of NaN stands for a missing number."""
    ratio = torch.where(error == 0.0, 0.0, error / bound).nan_to_num(nan=math.inf)
    if not ratio.numel():
        return Finding(output, 0.0, 0.0, 0.0)
    at = int(ratio.argmax())
    place = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(at), ratio.shape))
    largest, off, allowed = (float(t.flatten()[at]) for t in (ratio, error, bound))
    return Finding(output, largest, off, allowed, place)


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def half_ulp(t: Tensor) -> Tensor:
    """Half a unit in the last place of each entry, in float64."""
    info = torch.finfo(t.dtype)
    exponent = torch.frexp(t.double().abs().clamp(min=info.smallest_normal))[1]
    return torch.ldexp(torch.full_like(t, info.eps / 4, dtype=torch.float64), exponent)


def distance(got: Tensor, want: Tensor) -> Tensor:
    """|got - want|; 0 where both are NaN or the same infinity."""
    got = got.double()
    return torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, (got - want).abs())


def mean_error(output: str, got: Tensor, want: Tensor, bound: Tensor, scale: Tensor) -> Finding:
    """The mean relative error of (N, K) entries; entries with a ``scale`` of 0 are left out."""
    counted = scale > 0.0
    count = counted.sum()
    signed = torch.where(counted, (got.double() - want) * want.sign() / scale, 0.0)
    mean = signed.sum() / count
    # rows are independent, entries of a row are not
    deviation = float((signed.sum(1) - mean * counted.sum(1)).square().sum().sqrt() / count)
    bias = float(torch.where(counted, bound / scale, 0.0).sum() / count) / 8
    allowed = DEVIATIONS * deviation + bias + unit_roundoff(got.dtype) ** 2
    error = float(mean.abs())
    ratio = error / allowed if math.isfinite(error) else math.inf
    return Finding(f"{output}, mean", ratio, error, allowed, f"of {int(count)}")


class Rows(NamedTuple):
    """Loss and gradient of N rows in float64 with bounds, for an upstream gradient of 1."""

    loss: Tensor  # (N,)
    loss_bound: Tensor
    grad: Tensor  # (N, V)
    grad_bound: Tensor  # without the rounding of the stored entry

    def mean(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of valid rows, and its bound."""
        count, total = (target != -100).sum(), self.loss.sum()
        summed = U * (math.log2(max(len(target), 2)) + 2.0) * total
        return total / count, (self.loss_bound.sum() + summed) / count


def rows_of(z: Tensor, target: Tensor, delta: Tensor | float) -> Rows:
    """``Rows`` of (N, V) logits in float64, each with an error of ``delta``."""
    valid = target != -100
    y = target.where(valid, 0)[:, None]
    d = z.amax(1, keepdim=True) - z
    e = torch.exp(-d)
    off = delta + C * U * (1.0 + torch.where(e == 0.0, 0.0, d))
    others = e.scatter(1, y, 0.0)
    rest, whole = others.sum(1, keepdim=True), e.sum(1, keepdim=True)

    def error_of_sum(terms: Tensor, total: Tensor) -> Tensor:
        error = (terms * torch.expm1(off)).sum(1, keepdim=True) / total.where(total > 0.0, 1.0)
        return torch.log1p(error) + C * U * math.log2(max(z.shape[1], 2))

    off_rest, off_whole = error_of_sum(others, rest), error_of_sum(e, whole)
    p, miss = e / whole, rest / whole
    grad = p.scatter(1, y, -miss)
    own_bound = miss * torch.expm1(off_rest + off_whole)
    grad_bound = (p * torch.expm1(off + off_whole)).scatter(1, y, own_bound)
    d_y, e_y = d.gather(1, y), e.gather(1, y)
    # log1p unless the target's exponential underflows
    direct = torch.log1p(rest / e_y.clamp(min=1e-200))
    loss = torch.where(d_y < 300.0, direct, torch.log(whole) + d_y)
    delta_y = delta.gather(1, y) if isinstance(delta, Tensor) else delta
    loss_bound = miss * torch.expm1(off_rest + delta_y) + C * U * loss + SMALLEST
    losses = (t[:, 0].where(valid, 0.0) for t in (loss, loss_bound))
    return Rows(*losses, *(t.where(valid[:, None], 0.0) for t in (grad, grad_bound)))


def upstream(n: int) -> float:
    """The upstream gradient of the mean of n rows."""
    return 2.0 ** round(math.log2(n))


@dataclass(frozen=True)
class Roundings:
    """Relative errors of roundings in a head; 0 where float32 is used."""

    logits: float = 0.0
    grad: float = 0.0  # gradient of the logits, before the products
    floor: float = 0.0  # the same for one row, absolute
    sums: float = 0.0  # accumulated gradients, once per chunk
    chunks: int = 1
