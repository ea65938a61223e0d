"""Functions of torch that read values of deferred logits over their classes, called on a chunk of
rows at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import resolve_reduction
from .chunked_reads import read_chunks, step
from .lazy_logits import LazyLogits, of_classes
from .torch_functions import HANDLERS, T, handles


def of_values(
    func: Callable[..., Any],
    x: LazyLogits,
    keepdim: bool,
    *args: Any,
    keeps: bool = False,
    **options: Any,
) -> Any:
    """``func(logits, *args, dim=classes)``, one result for each row; or several where it ``keeps``
    the dimension."""
    if x._call.shard is not None:
        return NotImplemented
    result = read_chunks(x, lambda z: func(z, *args, dim=-1, **options))
    if keeps or not keepdim:
        return (
            result
            if not keeps or x._classes_last
            else _each(result, lambda t: t.movedim(-1, x._class_dim))
        )
    return _each(result, lambda t: t.unsqueeze(x._class_dim))


def _each(result: Any, func: Callable[[Tensor], Tensor]) -> Any:
    return func(result) if isinstance(result, Tensor) else type(result)([func(t) for t in result])


def over_rows(
    x: LazyLogits,
    dim: Any,
    keepdim: bool,
    row_values: Callable[[], Tensor],
    func: Callable[..., Tensor],
    dtype: torch.dtype | None,
) -> Any:
    """A reduction over classes, and over rows as far as ``dim`` says, by ``func`` of what it is for
    each row."""
    dims = x._rows.dim()
    if x._call.shard is not None and x._transform.kind not in ("logp", "p logp", "p z"):
        return NotImplemented
    chosen = dim if isinstance(dim, tuple | list) else range(dims) if dim is None else (dim,)
    if len(chosen) == 0:
        chosen = range(dims)
    if not all(isinstance(d, int) and -dims <= d < dims for d in chosen):
        return NotImplemented
    if not any(of_classes(x, d) for d in chosen):
        return NotImplemented
    value = row_values()
    for d in sorted((d % dims for d in chosen), reverse=True):
        if d != x._class_dim:
            value = func(value, d - (d > x._class_dim))
    if keepdim:
        for d in sorted(d % dims for d in chosen):
            value = value.unsqueeze(d)
    return value if dtype is None else value.to(dtype)


# --- one or a few numbers for each row

# what takes the classes' dimension as its second argument, and nothing else but keepdim
_BY_DIM = {
    "amax": torch.amax,
    "amin": torch.amin,
    "argmin": torch.argmin,
    "median": torch.median,
    "nansum": torch.nansum,
}
_BY_DIM |= {"count_nonzero": torch.count_nonzero, "var": torch.var, "std": torch.std}


def _by_dim(func: Any) -> Callable[..., Any]:
    def handler(x: LazyLogits, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        if options.get("out") is not None or not of_classes(x, dim):
            return NotImplemented
        return of_values(func, x, keepdim, **options)

    return handler


for _name, _func in _BY_DIM.items():
    handles(getattr(T, _name), getattr(torch, _name))(_by_dim(_func))


def _extreme(func: Any, pairwise: Any, each: Any) -> Callable[..., Any]:
    def handler(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, Tensor):
            return step(pairwise, x, dim)
        if not isinstance(x, LazyLogits):
            return NotImplemented
        if dim is not None:
            return of_values(func, x, keepdim) if of_classes(x, dim) else NotImplemented
        if x._call.shard is not None or x.numel() == 0:
            return NotImplemented
        # the gradient is shared by all that are equal, in whichever rows

        def part(z: Tensor) -> tuple[Tensor, Tensor]:
            value = each(z, dim=-1)
            return value, (z == value.unsqueeze(-1)).sum(-1)

        values, equal = read_chunks(x, part)
        best = func(values.detach())
        counts = torch.where(values == best, equal, 0)
        total = torch.where(counts > 0, values * counts.to(values.dtype), 0.0).sum() / counts.sum()
        return torch.where(best.isfinite(), total, best)

    return handler


handles(T.max, torch.max)(_extreme(torch.max, torch.maximum, torch.amax))
handles(T.min, torch.min)(_extreme(torch.min, torch.minimum, torch.amin))


def _truth(func: Any) -> Callable[..., Any]:
    def handler(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
        return over_rows(
            x, dim, keepdim, lambda: read_chunks(x, lambda z: func(z, dim=-1)), func, None
        )

    return handler


handles(T.any, torch.any)(_truth(torch.any))
handles(T.all, torch.all)(_truth(torch.all))


@handles(T.topk, torch.topk)
def _topk(x: LazyLogits, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return (
        of_values(torch.topk, x, True, k, keeps=True, largest=largest, sorted=sorted)
        if of_classes(x, dim)
        else NotImplemented
    )


@handles(torch.linalg.vector_norm)
def _vector_norm(
    x: LazyLogits, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    return (
        of_values(torch.linalg.vector_norm, x, keepdim, ord, dtype=dtype)
        if of_classes(x, dim)
        else NotImplemented
    )


@handles(T.norm, torch.norm)
def _norm(
    x: LazyLogits, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    return (
        of_values(torch.norm, x, keepdim, p, dtype=dtype) if of_classes(x, dim) else NotImplemented
    )


# --- losses of pairs of elements, as a distance to a teacher


def _pointwise(func: Any) -> Callable[..., Any]:
    def handler(
        input: Any,
        target: Any,
        size_average: Any = None,
        reduce: Any = None,
        reduction: str = "mean",
        **options: Any,
    ) -> Any:
        batchmean = reduction == "batchmean" and func is F.kl_div
        reduction = "sum" if batchmean else resolve_reduction(reduction, size_average, reduce)
        if (
            not (isinstance(input, Tensor) and isinstance(target, Tensor))
            or input.shape != target.shape
            or options.pop("weight", None) is not None
        ):
            return NotImplemented
        lazy = step(partial(func, reduction="none", **options), input, target)
        if lazy is NotImplemented or reduction == "none":
            return lazy
        result = HANDLERS[torch.sum if reduction == "sum" else torch.mean][0](lazy)
        return result / input.shape[0] if batchmean and result is not NotImplemented else result

    return handler


for _loss in (F.kl_div, F.mse_loss, F.l1_loss):
    handles(_loss)(_pointwise(_loss))


@handles(F.multi_margin_loss)
def _multi_margin_loss(
    input: Any,
    target: Any,
    p: int = 1,
    margin: float = 1.0,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    reduction = resolve_reduction(reduction, size_average, reduce)
    plain = (
        isinstance(input, LazyLogits)
        and input._rows.dim() == 2
        and input._classes_last
        and input._call.shard is None
    )
    if (
        not plain
        or isinstance(target, LazyLogits)
        or tuple(target.shape) != tuple(input._rows.shape[:1])
    ):
        return NotImplemented
    losses = read_chunks(
        input, lambda z, t: F.multi_margin_loss(z, t, p, margin, weight, reduction="none"), target
    )
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
