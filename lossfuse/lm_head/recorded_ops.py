"""Elementwise operations between head and loss, recorded on deferred logits instead of computed.

Scaling, caps, biases and softmax become part of the transform, which the linear form knows. Other
functions that keep each row to itself are steps of the program, which runs on a chunk of rows.
Handlers that cannot record an operation return NotImplemented; the logits are materialized."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import family
from .chunked_reads import joined_leaves, step, together
from .lazy_logits import LazyLogits, can_be, of_classes, written
from .torch_functions import HANDLERS, T, handles
from .transform import LogitTransform


def _number(c: Any) -> float | None:
    """A number of the host. One on a device would have to be waited for."""
    if isinstance(c, int | float) and not isinstance(c, bool):
        return float(c)
    if (
        isinstance(c, Tensor)
        and not isinstance(c, LazyLogits)
        and c.dim() == 0
        and not c.requires_grad
        and c.device.type == "cpu"
    ):
        return float(c) if c.is_floating_point() or c.dtype == torch.int64 else None
    return None


def _plain(t: Any) -> bool:
    return isinstance(t, Tensor) and not isinstance(t, LazyLogits)


# --- what the linear form knows


@handles(T.mul, T.__mul__, T.__rmul__, torch.mul, T.multiply, torch.multiply)
def _mul(x: Any, other: Any) -> Any:
    z, factor = (x, other) if isinstance(x, LazyLogits) else (other, x)
    if isinstance(factor, LazyLogits):
        return step(torch.mul, x, other, transform=_times_logarithm(z, factor))
    c = _number(factor)
    if c is None:
        scaled = _rows_times(z, factor, torch.mul)
        return step(torch.mul, x, other) if scaled is None else scaled
    return step(torch.mul, x, other, transform=z._transform.times(c))


@handles(T.div, T.__truediv__, torch.div, T.true_divide, torch.true_divide, T.divide, torch.divide)
def _div(x: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    c = _number(other)
    if not isinstance(x, LazyLogits) or rounding_mode is not None or c is None:
        scaled = (
            None
            if not isinstance(x, LazyLogits) or rounding_mode is not None
            else _rows_times(x, other, torch.div)
        )
        return step(torch.div, x, other, rounding_mode=rounding_mode) if scaled is None else scaled
    return step(torch.div, x, other, transform=x._transform.times(1.0 / c) if c else None)


def _rows_times(x: LazyLogits, factor: Any, func: Any) -> LazyLogits | None:
    """A factor for all rows or for each one, of logits that are linear in their hidden states,
    scales those; None if they are not."""
    call, transform = x._call, x._transform
    if (
        not _plain(factor)
        or factor.dim() > x._rows.dim()
        or factor.device not in (x._rows.device, torch.device("cpu"))
    ):
        return None
    linear = (
        call.weight is not None
        and call.bias is None
        and call.shard is None
        and call.autocast is None
    )
    alone = (
        transform.kind == "logits"
        and transform.bias is None
        and transform.cap is None
        and x._classes_last
        and not x._carried
    )
    wide = (
        x._rows.dtype.itemsize >= 4
        and torch.promote_types(factor.dtype, x._rows.dtype) == x._rows.dtype == transform.dtype
    )
    one = factor.dim() == 0 or (factor.shape[-1] == 1 and factor.device == x._rows.device)
    learnt = factor.requires_grad and torch.is_grad_enabled()
    if not (linear and alone and wide and one and factor.is_floating_point()) or (
        learnt and not x._of_head
    ):
        return None
    rows = func(x._rows, factor)
    if rows.shape != x._rows.shape:
        return None
    return x._with(rows=rows, leaves=(*x._leaves, factor) if learnt else None, copied=True)


def _times_logarithm(x: LazyLogits, other: LazyLogits) -> LogitTransform | None:
    """p * logp or p * z of the same logits, whose sum over classes is a statistic."""
    if other._transform.kind == "p":
        x, other = other, x
    kind = {"logp": "p logp", "logits": "p z"}.get(other._transform.kind)
    alike = (
        together(x, other)
        and x._transform.same_logits(other._transform)
        and x._of_head == other._of_head
    )
    if (
        x._transform.kind != "p"
        or kind is None
        or not alike
        or len(joined_leaves([x, other])) != len(x._leaves)
    ):
        return None
    dtype = torch.promote_types(x._transform.dtype, other._transform.dtype)
    return replace(
        x._transform, kind=kind, factor=x._transform.factor * other._transform.factor, dtype=dtype
    )


@handles(T.neg, T.__neg__, torch.neg, torch.negative, T.negative)
def _neg(x: LazyLogits) -> Any:
    return step(torch.neg, x, transform=x._transform.times(-1.0))


@handles(T.tanh, torch.tanh)
def _tanh(x: LazyLogits) -> Any:
    transform = x._transform
    capped = (
        replace(transform, cap=1.0)
        if transform.kind == "logits" and transform.cap is None
        else None
    )
    return step(torch.tanh, x, transform=capped)


@handles(T.add, T.__add__, T.__radd__, torch.add)
def _add(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    z, added = (x, other) if isinstance(x, LazyLogits) else (other, x)
    transform = _with_bias(z, added) if alpha == 1 else None
    result = step(torch.add, x, other, alpha=alpha, transform=transform)
    return _watched(result, added, transform)


@handles(T.sub, T.__sub__, torch.sub, T.subtract, torch.subtract)
def _sub(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(x, LazyLogits) or isinstance(other, LazyLogits) or alpha != 1:
        return step(torch.sub, x, other, alpha=alpha)
    number = isinstance(other, int | float) and not isinstance(other, bool)
    transform = _normalised_by(x, other)
    if transform is None and (
        number or (_plain(other) and not other.requires_grad and other.dtype != torch.bool)
    ):
        transform = _with_bias(x, -other)
    return _watched(step(torch.sub, x, other, transform=transform), other, transform)


@handles(T.__rsub__, torch.rsub)
def _rsub(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    return step(torch.rsub, x, other, alpha=alpha)


def _normalised_by(x: LazyLogits, other: Any) -> LogitTransform | None:
    """The logarithm of probabilities, if ``other`` is what has been read as the logsumexp of the
    same logits."""
    if not isinstance(other, Tensor):
        return None
    for ref, version, rows, transform in x._call.lses:
        same = rows is x._rows and x._transform.same_logits(transform) and not x._carried
        if ref() is other and other._version == version and same:
            alike = (
                other.requires_grad == (len(x._leaves) > 0)
                and x._transform.kind == "logits"
                and x._classes_last
            )
            return replace(x._transform, kind="logp") if alike else None
    return None


def _with_bias(x: LazyLogits, other: Any) -> LogitTransform | None:
    if isinstance(other, int | float) and not isinstance(other, bool):
        other = torch.full(
            (x._transform.num_classes,), other, dtype=x._transform.dtype, device=x._rows.device
        )
    one_row = _plain(other) and other.dim() > 0 and other.device == x._rows.device
    fits = (
        one_row
        and other.numel() == other.shape[-1] == x._transform.num_classes
        and other.dim() <= x._rows.dim()
    )
    if (
        not fits
        or not x._classes_last
        or torch.promote_types(other.dtype, x._transform.dtype) != x._transform.dtype
    ):
        return None
    # it becomes a bias of the head, which must not cost it digits
    operands = x._call.autocast or x._rows.dtype
    if x._call.weight is not None and torch.promote_types(other.dtype, operands) != operands:
        return None
    return x._transform.plus(other)


def _watched(result: Any, other: Any, transform: LogitTransform | None) -> Any:
    if result is not NotImplemented and transform is not None and _plain(other):
        result._call.watch("what was added to them", other)
    return result


@handles(T.exp, torch.exp)
def _exp(x: LazyLogits) -> Any:
    transform = x._transform
    return step(
        torch.exp,
        x,
        transform=replace(transform, kind="p")
        if transform.kind == "logp" and transform.factor == 1.0
        else None,
    )


def _normalised(kind: str, func: Any) -> Callable[..., Any]:
    def handler(
        x: LazyLogits, dim: Any = None, _stacklevel: Any = 3, dtype: torch.dtype | None = None
    ) -> Any:
        if isinstance(_stacklevel, torch.dtype):
            dtype = _stacklevel
        if not of_classes(x, dim):
            return NotImplemented
        transform = x._transform
        if (transform.kind != "logits" and (transform.kind, transform.factor) != ("logp", 1.0)) or (
            dtype is not None and not can_be(x, dtype)
        ):
            return step(func, x, -1, dtype=dtype)
        # autocast computes them in float32, but on a CPU
        on = x._rows.device.type
        autocast = on != "cpu" and torch.is_autocast_enabled(on) and x._transform.dtype.itemsize < 4
        result_dtype = dtype or (torch.float32 if autocast else x._transform.dtype)
        return step(
            func, x, -1, dtype=dtype, transform=replace(x._transform, kind=kind, dtype=result_dtype)
        )

    return handler


_log_softmax = _normalised("logp", torch.log_softmax)
handles(F.log_softmax, torch.log_softmax, T.log_softmax, torch.special.log_softmax)(_log_softmax)
handles(F.softmax, torch.softmax, T.softmax, torch.special.softmax)(_normalised("p", torch.softmax))


@handles(family.log_softmax)
def _our_log_softmax(
    x: LazyLogits, dim: Any = None, _stacklevel: int = 3, dtype: Any = None, *, impl: str = "auto"
) -> Any:
    return _log_softmax(x, dim, dtype=dtype) if impl in ("auto", "torch") else NotImplemented


# --- dtype and memory


def _cast(x: LazyLogits, dtype: torch.dtype) -> Any:
    if dtype == x._transform.dtype:
        return x
    known = can_be(x, dtype) and x._transform.kind != "other"
    return step(T.to, x, dtype, transform=replace(x._transform, dtype=dtype) if known else None)


@handles(T.float)
def _float(x: LazyLogits) -> Any:
    return _cast(x, torch.float32)


@handles(T.bfloat16)
def _bfloat16(x: LazyLogits) -> Any:
    return _cast(x, torch.bfloat16)


@handles(T.half)
def _half(x: LazyLogits) -> Any:
    return _cast(x, torch.float16)


@handles(T.double)
def _double(x: LazyLogits) -> Any:
    return _cast(x, torch.float64)


@handles(T.bool)
def _bool(x: LazyLogits) -> Any:
    return _cast(x, torch.bool)


@handles(T.int)
def _int(x: LazyLogits) -> Any:
    return _cast(x, torch.int32)


@handles(T.long)
def _long(x: LazyLogits) -> Any:
    return _cast(x, torch.int64)


@handles(T.type)
def _type(x: LazyLogits, dtype: Any = None, non_blocking: bool = False) -> Any:
    if dtype is None:
        return torch.empty(0, dtype=x._transform.dtype, device=x._rows.device).type()
    return _cast(x, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


@handles(T.to)
def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    dtype, device = x._transform.dtype, x._rows.device
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
    return x._with(copied=True) if copy and dtype == x._transform.dtype else _cast(x, dtype)


@handles(T.type_as)
def _type_as(x: Any, other: Tensor) -> Any:
    return (
        _cast(x, other.dtype)
        if isinstance(x, LazyLogits) and other.device == x._rows.device
        else NotImplemented
    )


@handles(T.contiguous)
def _contiguous(x: LazyLogits, *, memory_format: Any = None) -> LazyLogits:
    return x._with()


@handles(T.clone, torch.clone)
def _clone(x: LazyLogits, *, memory_format: Any = None) -> LazyLogits:
    return x._with(copied=True)


@handles(T.detach, torch.detach)
def _detach(x: LazyLogits) -> LazyLogits:
    return x._with(rows=x._rows.detach(), leaves=())


# --- steps of the program

_NAMES = (
    *(
        "abs",
        "absolute",
        "log",
        "log2",
        "log10",
        "log1p",
        "expm1",
        "sqrt",
        "rsqrt",
        "square",
        "reciprocal",
        "sigmoid",
        "relu",
        "sign",
    ),
    *(
        "isnan",
        "isinf",
        "isfinite",
        "logical_not",
        "bitwise_not",
        "nan_to_num",
        "clamp",
        "clip",
        "clamp_min",
        "clamp_max",
        "pow",
    ),
    *(
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "maximum",
        "minimum",
        "where",
        "masked_fill",
        "logical_and",
        "logical_or",
        "isneginf",
        "isposinf",
    ),
)
_OPERATORS = (
    "pow",
    "rpow",
    "rtruediv",
    "rdiv",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "invert",
    "abs",
)
ELEMENTWISE = {
    *(getattr(owner, name) for name in _NAMES for owner in (T, torch) if hasattr(owner, name)),
    *(getattr(T, f"__{name}__") for name in _OPERATORS),
    *(
        F.softplus,
        F.logsigmoid,
        torch.special.expit,
        torch.special.xlogy,
        torch.xlogy,
        T.xlogy,
        torch.special.entr,
    ),
}


def _elementwise(func: Any) -> Any:
    def handler(*args: Any, **kwargs: Any) -> Any:
        return NotImplemented if kwargs.get("out") is not None else step(func, *args, **kwargs)

    return handler


for _func in ELEMENTWISE:
    handles(_func)(_elementwise(_func))


@handles(F.relu)
def _relu(x: LazyLogits, inplace: bool = False) -> Any:
    return NotImplemented if inplace else step(torch.relu, x)


# --- in place

IN_PLACE = {
    **{
        f"{name}_": getattr(T, name)
        for name in (
            "mul",
            "div",
            "add",
            "sub",
            "neg",
            "exp",
            "tanh",
            "clamp",
            "masked_fill",
            "pow",
            "relu",
        )
    },
    "__imul__": T.mul,
    "__itruediv__": T.div,
    "__iadd__": T.add,
    "__isub__": T.sub,
}


def _in_place(func: Any) -> Any:
    def handler(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, LazyLogits):
            return NotImplemented
        result = HANDLERS[func][0](x, *args, **kwargs)
        return written(x, result, func, (x, *args), kwargs, value=x)

    return handler


for _name, _func in IN_PLACE.items():
    handles(getattr(T, _name))(_in_place(_func))
