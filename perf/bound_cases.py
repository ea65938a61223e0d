"""Inputs of ``bounds``: easy and hard ones, drawn on the CPU so that every device gets the same."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .cases import head_like_a_model, logits_like_a_model

CPU = torch.device("cpu")
CLASSES = 2053  # a prime
FEW = 8  # rows for which Triton's interpreter takes a second
LogitsInputs = Callable[[torch.dtype], tuple[Tensor, Tensor]]
HeadInputs = Callable[[torch.dtype], tuple[Tensor, Tensor, Tensor]]


def _model(dtype: torch.dtype, n: int = 64) -> tuple[Tensor, Tensor]:
    return logits_like_a_model(n, CLASSES, dtype, CPU)


def _many_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    n, v = 1 << 17, 17
    logits = torch.randn(n, v, generator=generator) * 3.0
    return logits.to(dtype), torch.randint(0, v, (n,), generator=generator)


def _one_huge(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(dtype, FEW)
    rows = torch.arange(FEW)
    # the target's logit in even rows, another one in odd rows
    huge = torch.where(rows % 2 == 0, target.clamp(min=0), (7 * rows) % CLASSES)
    logits[rows, huge] = 1e4
    return logits, target


def _confident(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(dtype, FEW)
    margin = torch.linspace(8.0, 40.0, FEW)[:, None]
    own = (logits.amax(1, keepdim=True) + margin).to(dtype)
    return logits.scatter_(1, target.clamp(min=0)[:, None], own), target


def _equal(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full((4, CLASSES), -3.5).to(dtype), torch.tensor([0, 5, 1024, CLASSES - 1])


def _mostly_inf(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = torch.full((4, CLASSES), -math.inf)
    target = torch.tensor([0, 5, 1024, CLASSES - 1])
    logits[torch.arange(4), target] = torch.tensor([-2.0, 0.0, 3.0, 1.0])
    # rows 1 and 3 have a second finite logit
    logits[[1, 3], [6, 0]] = 2.0
    return logits.to(dtype), target


def _normalized(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(torch.float32, FEW)
    return logits.log_softmax(1).to(dtype), target


def _offset(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(torch.float32, FEW)
    offset = torch.where(torch.arange(FEW) % 2 == 0, 1e4, -1e4)[:, None]
    return (logits + offset).to(dtype), target


def _all_ignored(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(dtype, 4)
    return logits.fill_(math.nan), torch.full_like(target, -100)


def _strided(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(dtype, FEW)
    wide = torch.full((FEW, CLASSES + 7), math.nan, dtype=dtype)
    wide[:, 3 : CLASSES + 3] = logits
    return wide[:, 3 : CLASSES + 3], target


def _model_head(dtype: torch.dtype, n: int = 512, d: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    return head_like_a_model(n, d, 1021, dtype, CPU)


def _one_target(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    # all rows add to one row of dweight in the same direction: a sum in half precision stagnates
    hidden, weight, target = _model_head(torch.float32, 256, 64)
    return (hidden * 0.1 + 1.0).to(dtype), (weight * 0.1).to(dtype), torch.full_like(target, 7)


def _large_products(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target = _model_head(torch.float32, 64)
    return (hidden * 64.0).to(dtype), (weight * 16.0).to(dtype), target


def _ignored_head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target = _model_head(dtype, 8)
    return hidden, weight, torch.full_like(target, -100)


# rows of perf/results/bounds-cpu.csv have these names
LOGITS: dict[str, LogitsInputs] = {
    "like a model's": _model,
    "many rows": _many_rows,
    "one logit huge": _one_huge,
    "a sure model": _confident,
    "all equal": _equal,
    "all but one or two -inf": _mostly_inf,
    "log-sum-exp 0": _normalized,
    "about 1e4": _offset,
    "all ignored": _all_ignored,
    "rows apart": _strided,
}
HEADS: dict[str, HeadInputs] = {
    "like a model's": _model_head,
    "one target": _one_target,
    "about 1e4": _large_products,
    "all ignored": _ignored_head,
}
# with 1e5 entries, so that the mean error of an output says something
AVERAGED = {"like a model's", "many rows"}


def load(
    op: str, case: str, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], bool]:
    """Tensors of a case on the device, and True if mean errors are to be checked."""
    draw: Callable[[torch.dtype], tuple[Tensor, ...]]
    draw = LOGITS[case] if op == "logits" else HEADS[case]
    return tuple(_to_device(t, device) for t in draw(dtype)), case in AVERAGED


def _to_device(t: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu" or t.is_contiguous():
        return t.to(device)
    # keep the stride, with NaN between the rows
    wide = torch.full((len(t), t.stride(0)), math.nan, dtype=t.dtype, device=device)
    return wide[:, : t.shape[1]].copy_(t)
