"""Inputs: rounded to their dtype first, so that implementation and oracle see the same numbers."""

import torch
from torch import Tensor


def logits_and_ids(
    n: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    seed: int = 0,
    ignored: float = 0.25,
    spread: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Logits peaked as a model's are: the target leads by a few units in half of the rows. A share
    of rows is ignored, never all."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, v, generator=g) * spread
    target = torch.randint(0, v, (n,), generator=g)
    # the last class lies in the ragged block
    target[-1:] = v - 1
    x[torch.arange(0, n, 2), target[::2]] += 2 * spread
    target[torch.rand(n, generator=g) < ignored] = -100
    target[-1:] = v - 1
    return x.to(dtype).to(device).requires_grad_(), target.to(device)


def probabilities(
    n: int, v: int, dtype: torch.dtype = torch.float32, device: str = "cpu", *, seed: int = 1
) -> Tensor:
    """Rows of class probabilities, some classes exactly 0."""
    g = torch.Generator().manual_seed(seed)
    q = torch.softmax(torch.randn(n, v, generator=g) * 2, -1)
    q[torch.rand(n, v, generator=g) < 0.2] = 0.0
    return q.to(dtype).to(device).requires_grad_()


def class_weight(v: int, device: str = "cpu", *, seed: int = 2) -> Tensor:
    return (torch.rand(v, generator=torch.Generator().manual_seed(seed)) + 0.1).to(device)


def head_and_ids(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    seed: int = 0,
    ignored: float = 0.25,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (N, D), a weight (V, D) and a bias (V), logits of some units, and ids; the
    target leads in half of the rows."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=g)
    bias = torch.randn(v, generator=g)
    target = torch.randint(0, v, (n,), generator=g)
    target[-1:] = v - 1
    hidden = torch.randn(n, d, generator=g)
    hidden[::2] += weight[target[::2]]
    hidden *= 2.0 / max(d, 1) ** 0.5
    target[torch.rand(n, generator=g) < ignored] = -100
    target[-1:] = v - 1
    operands = (t.to(dtype).to(device).requires_grad_() for t in (hidden, weight, bias))
    return *operands, target.to(device)
