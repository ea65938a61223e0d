"""What models do to logits between head and loss: recorded, not done.

Elementwise functions become part of the shaping, reshaping of rows happens to the hidden states. Handlers that cannot return
NotImplemented, and the logits are made.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import family
from .lazy_head import Shaping
from .lazy_logits import LazyLogits, T, can_be, handles, of_classes


def _reshaped(x: LazyLogits, shaping: Shaping | None) -> Any:
    return NotImplemented if shaping is None else x._but(shaping=shaping)


# --- elementwise


def _number(c: Any) -> float | None:
    """A number of the host. One on a device would have to be waited for."""
    if isinstance(c, int | float) and not isinstance(c, bool):
        return float(c)
    if isinstance(c, Tensor) and not isinstance(c, LazyLogits) and c.dim() == 0 and not c.requires_grad and c.device.type == "cpu":
        return float(c) if c.is_floating_point() or c.dtype == torch.int64 else None
    return None


@handles(T.mul, T.__mul__, T.__rmul__, torch.mul, T.multiply, torch.multiply)
def _mul(x: Any, other: Any) -> Any:
    if not isinstance(x, LazyLogits):
        x, other = other, x
    if isinstance(other, LazyLogits):
        return _times_logarithm(x, other)
    c = _number(other)
    return NotImplemented if c is None else _reshaped(x, x._shaping.times(c))


def _times_logarithm(x: LazyLogits, other: LazyLogits) -> Any:
    """p * logp or p * z of the same logits, whose sum over classes is a statistic."""
    if other._shaping.kind == "p":
        x, other = other, x
    kind = {"logp": "p logp", "logits": "p z"}.get(other._shaping.kind)
    together = x._source is other._source and x._rows is other._rows and x._shaping.same_logits(other._shaping)
    if x._shaping.kind != "p" or kind is None or not together or x._class_dim != other._class_dim:
        return NotImplemented
    dtype = torch.promote_types(x._shaping.dtype, other._shaping.dtype)
    return x._but(shaping=replace(x._shaping, kind=kind, factor=x._shaping.factor * other._shaping.factor, dtype=dtype))


@handles(T.div, T.__truediv__, torch.div, T.true_divide, torch.true_divide, T.divide, torch.divide)
def _div(x: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    c = _number(other)
    if not isinstance(x, LazyLogits) or rounding_mode is not None or not c:
        return NotImplemented
    return _reshaped(x, x._shaping.times(1.0 / c))


@handles(T.neg, T.__neg__, torch.neg, torch.negative, T.negative)
def _neg(x: LazyLogits) -> Any:
    return _reshaped(x, x._shaping.times(-1.0))


@handles(T.tanh, torch.tanh)
def _tanh(x: LazyLogits) -> Any:
    shaping = x._shaping
    return x._but(shaping=replace(shaping, cap=1.0)) if shaping.kind == "logits" and shaping.cap is None else NotImplemented


@handles(T.add, T.__add__, T.__radd__, torch.add)
def _add(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(x, LazyLogits):
        x, other = other, x
    one_row = isinstance(other, Tensor) and not isinstance(other, LazyLogits) and other.dim() > 0 and other.device == x.device
    fits = one_row and other.numel() == other.shape[-1] == x._shaping.num_classes and other.dim() <= x._rows.dim()
    if not fits or alpha != 1 or not x._classes_last or torch.promote_types(other.dtype, x._shaping.dtype) != x._shaping.dtype:
        return NotImplemented
    # it becomes a bias of the head, which must not cost it digits
    operands = x._source.autocast or x._rows.dtype
    shaping = x._shaping.plus(other)
    if shaping is None or (x._source.weight is not None and torch.promote_types(other.dtype, operands) != operands):
        return NotImplemented
    x._source.watch("what was added to them", other)
    return x._but(shaping=shaping, leaves=(*x._leaves, other))


@handles(T.exp, torch.exp)
def _exp(x: LazyLogits) -> Any:
    shaping = x._shaping
    return x._but(shaping=replace(shaping, kind="p")) if shaping.kind == "logp" and shaping.factor == 1.0 else NotImplemented


def _normalised(kind: str) -> Callable[..., Any]:
    def handler(x: LazyLogits, dim: Any = None, _stacklevel: Any = 3, dtype: torch.dtype | None = None) -> Any:
        if isinstance(_stacklevel, torch.dtype):
            dtype = _stacklevel
        if not of_classes(x, dim) or x._shaping.kind != "logits" or (dtype is not None and not can_be(x, dtype)):
            return NotImplemented
        # autocast computes them in float32, but on a CPU
        on = x._rows.device.type
        autocast = on != "cpu" and torch.is_autocast_enabled(on) and x._shaping.dtype.itemsize < 4
        return x._but(shaping=replace(x._shaping, kind=kind, dtype=dtype or (torch.float32 if autocast else x._shaping.dtype)))

    return handler


_log_softmax = _normalised("logp")
handles(F.log_softmax, torch.log_softmax, T.log_softmax, torch.special.log_softmax)(_log_softmax)
handles(F.softmax, torch.softmax, T.softmax, torch.special.softmax)(_normalised("p"))


@handles(family.log_softmax)
def _our_log_softmax(x: LazyLogits, dim: Any = None, _stacklevel: int = 3, dtype: Any = None, *, impl: str = "auto") -> Any:
    return _log_softmax(x, dim, dtype=dtype) if impl in ("auto", "torch") else NotImplemented


# --- dtype and memory


def _cast(x: LazyLogits, dtype: torch.dtype) -> Any:
    if dtype == x._shaping.dtype:
        return x
    return x._but(shaping=replace(x._shaping, dtype=dtype)) if can_be(x, dtype) else NotImplemented


@handles(T.float)
def _float(x: LazyLogits) -> Any:
    return _cast(x, torch.float32)


@handles(T.bfloat16)
def _bfloat16(x: LazyLogits) -> Any:
    return _cast(x, torch.bfloat16)


@handles(T.half)
def _half(x: LazyLogits) -> Any:
    return _cast(x, torch.float16)


@handles(T.type)
def _type(x: LazyLogits, dtype: Any = None, non_blocking: bool = False) -> Any:
    if dtype is None:
        return torch.empty(0, dtype=x._shaping.dtype, device=x._rows.device).type()
    return _cast(x, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


@handles(T.to)
def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    dtype, device = x._shaping.dtype, x._rows.device
    copy = kwargs.get("copy", False) or sum(value is True for value in args) == 2
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            device = torch.device(value)
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, value.device
        elif not isinstance(value, bool) and value is not None:
            return NotImplemented
    here = device.type == x._rows.device.type and device.index in (None, x._rows.device.index)
    if not here:
        return NotImplemented
    return x._but() if copy and dtype == x._shaping.dtype else _cast(x, dtype)


@handles(T.type_as)
def _type_as(x: Any, other: Tensor) -> Any:
    return _cast(x, other.dtype) if isinstance(x, LazyLogits) and other.device == x._rows.device else NotImplemented


@handles(T.contiguous, T.clone, torch.clone)
def _same(x: LazyLogits, *, memory_format: Any = None) -> LazyLogits:
    return x._but()


@handles(T.detach, torch.detach)
def _detach(x: LazyLogits) -> LazyLogits:
    return x._but(rows=x._rows.detach(), leaves=())


# --- rows


@handles(T.view, T.reshape, torch.reshape)
def _view(x: LazyLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], tuple | list):
        shape = tuple(shape[0])
    if not x._classes_last or not shape or not all(isinstance(n, int) for n in shape):
        return NotImplemented
    rows, num_classes = math.prod(x._rows.shape[:-1]), x._shaping.num_classes
    lead, last = shape[:-1], shape[-1]
    if last == -1:
        keeps = -1 not in lead and math.prod(lead) == rows
    else:
        known = math.prod(n for n in lead if n != -1)
        keeps = last == num_classes and (known == rows or (lead.count(-1) == 1 and known > 0 and rows % known == 0))
    return x._but(rows=x._rows.reshape(*lead, x._rows.shape[-1])) if keeps else NotImplemented


@handles(T.view_as, T.reshape_as)
def _view_as(x: Any, other: Tensor) -> Any:
    return _view(x, tuple(other.shape)) if isinstance(x, LazyLogits) else NotImplemented


@handles(T.flatten, torch.flatten)
def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    dims = x._rows.dim()
    first, last = start_dim % dims, end_dim % dims
    if not x._classes_last or last >= dims - 1 or first > last:
        return NotImplemented
    return x._but(rows=x._rows.flatten(first, last))


@handles(T.squeeze, torch.squeeze)
def _squeeze(x: LazyLogits, dim: Any = None) -> Any:
    if not x._classes_last or not isinstance(dim, int) or of_classes(x, dim):
        return NotImplemented
    return x._but(rows=x._rows.squeeze(dim % x._rows.dim()))


@handles(T.unsqueeze, torch.unsqueeze)
def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    at = dim % (x._rows.dim() + 1)
    return x._but(rows=x._rows.unsqueeze(at)) if x._classes_last and at < x._rows.dim() else NotImplemented


@handles(T.__getitem__)
def _getitem(x: LazyLogits, index: Any) -> Any:
    if not x._classes_last:
        return NotImplemented
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, LazyLogits | list) or i is None or (isinstance(i, Tensor) and i.dtype == torch.uint8) for i in index):
        return NotImplemented
    taken = sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else i is not Ellipsis for i in index)
    dots = [n for n, i in enumerate(index) if i is Ellipsis]
    reaches_classes = taken == x._rows.dim() or (len(dots) > 0 and dots[-1] < len(index) - 1)
    if not reaches_classes:
        return x._but(rows=x._rows[index]) if taken < x._rows.dim() and _index_stays(index) else NotImplemented
    cut = index[-1]
    if not isinstance(cut, slice) or cut.step not in (None, 1) or cut.start not in (None, 0) or not _index_stays(index[:-1]):
        return NotImplemented
    num_classes = len(range(*cut.indices(x._shaping.num_classes)))
    shaping = x._shaping if num_classes == x._shaping.num_classes else x._shaping.cut(num_classes)
    if shaping is None or num_classes == 0:
        return NotImplemented
    rows_index = (*index[:-1], slice(None))
    return x._but(shaping=shaping, rows=x._rows[rows_index])


def _index_stays(index: tuple[Any, ...]) -> bool:
    """Whether hidden states indexed so have their width last, as the logits have their classes."""
    return all((isinstance(i, int | slice | Tensor) and not isinstance(i, bool)) or i is Ellipsis for i in index)


@handles(T.transpose, torch.transpose, T.swapaxes, torch.swapaxes, T.swapdims, torch.swapdims)
def _transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    dims = x._rows.dim()
    a, b = sorted((dim0 % dims, dim1 % dims))
    if x._classes_last and dims == 3 and (a, b) == (1, 2):
        return x._but(class_dim=1)
    if not x._classes_last and dims == 3 and (a, b) == (1, 2):
        return x._but(class_dim=2)
    return NotImplemented


@handles(T.permute, torch.permute)
def _permute(x: LazyLogits, *dims: Any) -> Any:
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    n = x._rows.dim()
    order = tuple(d % n for d in order)
    if x._classes_last and order == (0, n - 1, *range(1, n - 1)):
        return x._but(class_dim=1)
    if x._class_dim == 1 and order == (0, *range(2, n), 1):
        return x._but(class_dim=n - 1)
    return NotImplemented


@handles(T.movedim, torch.movedim, T.moveaxis, torch.moveaxis)
def _movedim(x: LazyLogits, source: Any, destination: Any) -> Any:
    n = x._rows.dim()
    if not isinstance(source, int) or not isinstance(destination, int):
        return NotImplemented
    a, b = source % n, destination % n
    if x._classes_last and (a, b) == (n - 1, 1):
        return x._but(class_dim=1)
    return x._but(class_dim=n - 1) if x._class_dim == 1 and (a, b) == (1, n - 1) else NotImplemented
