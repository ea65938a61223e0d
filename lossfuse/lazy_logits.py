"""Logits that are not made until somebody needs them.

In training a fused head returns ``LazyLogits``: shape, dtype and device of logits, no storage. What models and trainers do between head
and loss (scale, cap, cast, slice, reshape, add a bias) is recorded by ``lazy_recorded``; what reads them as a loss or a statistic
(``lazy_readers``) runs the linear form on the hidden states; anything else makes the logits, by the head's own forward and the recorded
operations, bit for bit what they would have been. No model's code is known here.
"""

import functools
import math
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .spec import LinearOptions

STALE = (
    "these logits were never made, and {what} has been changed in place since the forward that would have made them; read what you need"
    " of them before that, or lossfuse.unfuse_lm_head(model)"
)


def outside_graphs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable`` for those who compile: it imports Dynamo, and Triton with it."""
    disabled: Callable[..., Any] | None = None

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return fn(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(fn)
        return disabled(*args, **kwargs)

    return call


@dataclass
class LogitsReport:
    """What became of the logits of a fused head: operations by name, and how often."""

    fused: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)


class Finder(Protocol):
    """Who knows which head a model has."""

    report: LogitsReport
    options: LinearOptions

    def finds(self, head: nn.Module) -> bool:
        """Whether it is this; if not, what it is is fused from now on."""


class LazyForward:
    """What a fused head has in place of its ``forward``."""

    def __init__(self, head: nn.Module, instance_forward: Callable[..., Tensor] | None, finder: Finder) -> None:
        self.head = head
        self.instance_forward = instance_forward
        self.finder = finder
        # classes and dtype of the logits of a head that must be asked, by what decides them
        self.known: dict[Any, tuple[int, torch.dtype]] = {}

    def original(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        made: Tensor = type(self.head).forward(self.head, *args, **kwargs)
        return made

    @outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.get("input")
        plain = isinstance(hidden, Tensor) and len(args) + len(kwargs) == 1 and hidden.is_floating_point() and hidden.dim() > 0
        if not (plain and self.head.training and torch.is_grad_enabled()) or torch.is_inference_mode_enabled():
            return self.original(*args, **kwargs)
        assert isinstance(hidden, Tensor)
        if not self.finder.finds(self.head):
            # wrapped since, by an adapter
            return self.original(*args, **kwargs)
        source = Source(self, hidden)
        made = source.shape_of_logits()
        if made is None:
            return self.original(*args, **kwargs)
        num_classes, dtype = made
        return LazyLogits(source, Shaping(num_classes, dtype), hidden)


class Source:
    """One call of a head that has not been made: what it takes, as it was then."""

    def __init__(self, forward: LazyForward, hidden: Tensor) -> None:
        self.forward = forward
        self.hidden = hidden
        head, kind = forward.head, hidden.device.type
        self.linear = type(head) is nn.Linear and forward.instance_forward is None and type(head.weight) in (Tensor, nn.Parameter)
        self.weight: Tensor | None = cast(nn.Linear, head).weight if self.linear else None
        self.bias: Tensor | None = cast(nn.Linear, head).bias if self.linear else None
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.watched: list[tuple[str, Tensor, int]] = [("a parameter of the head", p, p._version) for p in head.parameters()]
        self.watch("the hidden states", hidden)
        # the logits themselves, once somebody has needed them
        self.made: Tensor | None = None
        self.lazies: list[weakref.ref[LazyLogits]] = []

    def watch(self, what: str, t: Tensor) -> None:
        self.watched.append((what, t, t._version))

    def require_unchanged(self) -> None:
        for what, t, version in self.watched:
            if t._version != version:
                raise RuntimeError(STALE.format(what=what))

    @contextmanager
    def as_called(self) -> Iterator[None]:
        with torch.autocast(self.hidden.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    def shape_of_logits(self) -> tuple[int, torch.dtype] | None:
        """(classes, dtype); None where the head had better be asked for its logits."""
        if self.weight is not None:
            fits = self.weight.dtype == self.hidden.dtype or self.autocast is not None
            return (
                (len(self.weight), self.autocast or self.weight.dtype) if fits and self.weight.shape[1] == self.hidden.shape[-1] else None
            )
        key = self.hidden.dtype, self.autocast, self.hidden.device
        if key not in self.forward.known:
            if self.hidden.numel() == 0:
                return None
            with torch.no_grad(), self.as_called(), torch.random.fork_rng([] if self.hidden.device.type == "cpu" else None):
                row = self.forward.original(self.hidden.reshape(-1, self.hidden.shape[-1])[:1])
            if not (isinstance(row, Tensor) and row.dim() == 2 and len(row) == 1):
                return None
            self.forward.known[key] = row.shape[1], row.dtype
        return self.forward.known[key]

    def make(self) -> Tensor:
        if self.made is None:
            self.require_unchanged()
            with torch.enable_grad(), self.as_called():
                self.made = self.forward.original(self.hidden)
        return self.made

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad or any(p.requires_grad for p in self.forward.head.parameters())


@dataclass(frozen=True)
class Shaping:
    """What becomes of a row of the head's output ``x``: ``z = scale * x + bias``, or ``cap * tanh(z)``, of the first classes.

    ``kind`` says what of it a lazy tensor holds: "logits" z, or ``factor`` times one of "logp", "p", "p logp", "p z".
    """

    num_classes: int
    dtype: torch.dtype
    scale: float = 1.0
    bias: Tensor | None = None
    cap: float | None = None
    kind: str = "logits"
    factor: float = 1.0

    def times(self, c: float) -> "Shaping | None":
        if c == 0.0 or not math.isfinite(c):
            return None
        if self.kind != "logits":
            return replace(self, factor=self.factor * c)
        if self.cap is not None:
            return replace(self, cap=self.cap * c)
        return replace(self, scale=self.scale * c, bias=None if self.bias is None else self.bias * c)

    def plus(self, bias: Tensor) -> "Shaping | None":
        if self.kind != "logits" or self.cap is not None:
            return None
        bias = bias.flatten()
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    def cut(self, num_classes: int) -> "Shaping | None":
        if self.kind != "logits":
            return None
        return replace(self, num_classes=num_classes, bias=None if self.bias is None else self.bias[:num_classes])

    @property
    def options(self) -> dict[str, float | None]:
        """As the losses take them."""
        scale = self.scale if self.cap is None else self.scale * self.cap
        return {"logit_scale": None if scale == 1.0 else scale, "softcap": None if self.cap is None else abs(self.cap)}

    def same_logits(self, other: "Shaping") -> bool:
        mine, others = (replace(s, kind="logits", factor=1.0, bias=None, dtype=torch.float32) for s in (self, other))
        return mine == others and self.bias is other.bias


class LazyLogits(Tensor):
    """Logits, or something elementwise of them, that are not made; see ``fuse_lm_head``."""

    _source: Source
    _shaping: Shaping
    _rows: Tensor
    _expression: "_Expression"
    _class_dim: int
    _made: Tensor | None

    @staticmethod
    def __new__(cls, source: Source, shaping: Shaping, rows: Tensor, class_dim: int | None = None) -> "LazyLogits":
        """``rows`` (..., D) are the hidden states of the rows there are; classes are last, or in ``class_dim``."""
        lead = list(rows.shape[:-1])
        class_dim = len(lead) if class_dim is None else class_dim
        lead.insert(class_dim, shaping.num_classes)
        self: LazyLogits = Tensor._make_wrapper_subclass(cls, lead, dtype=shaping.dtype, device=rows.device)
        self._source, self._shaping, self._rows, self._class_dim = source, shaping, rows, class_dim
        self._expression, self._made = _Expression(), None
        source.lazies.append(weakref.ref(self))
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def _but(self, *, shaping: Shaping | None = None, rows: Tensor | None = None, class_dim: int | None = None) -> "LazyLogits":
        return LazyLogits(
            self._source,
            self._shaping if shaping is None else shaping,
            self._rows if rows is None else rows,
            (None if self._classes_last else self._class_dim) if class_dim is None else class_dim,
        )

    @property
    def _classes_last(self) -> bool:
        return self._class_dim == self._rows.dim() - 1

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyLogits({self._shaping.kind} of shape {tuple(self.size())}, dtype={self._shaping.dtype}, not made)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _of_lazy(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = _made_of(func, (args, kwargs or {}))
        return func(*args, **kwargs)


@outside_graphs
def _of_lazy(func: Any, args: Any, kwargs: Any) -> Any:
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    lazies = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyLogits)]
    handler = HANDLERS.get(func)
    if handler is not None and all(x._source.made is None for x in lazies):
        with torch._C.DisableTorchFunctionSubclass():
            result = handler(*args, **kwargs)
        if result is not NotImplemented:
            if not isinstance(result, LazyLogits):
                lazies[0]._source.forward.finder.report.fused[_name(func)] += 1
            elif all(result is not x for x in lazies):
                _remember(result, func, args, kwargs)
            return result
    if _writes(func, kwargs):
        # whatever else has been made of these logits was made of what they were
        for source in {id(x._source): x._source for x in lazies}.values():
            for ref in source.lazies:
                other = ref()
                if other is not None:
                    _made(other, func)
    args, kwargs = _made_of(func, (args, kwargs))
    return func(*args, **kwargs)


class _Expression:
    """How a tensor is made of the logits of a source: a call among whose arguments are expressions; none for the logits themselves."""

    def __init__(self, func: Any = None, args: Any = (), kwargs: Any = None) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs or {}

    def value(self, logits: Tensor) -> Tensor:
        if self.func is None:
            return logits
        args, kwargs = tree_map(lambda x: x.value(logits) if isinstance(x, _Expression) else x, (self.args, self.kwargs))
        made: Tensor = self.func(*args, **kwargs)
        return made


def _remember(result: LazyLogits, func: Any, args: Any, kwargs: Any) -> None:
    for t in tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and not isinstance(t, LazyLogits):
            result._source.watch(f"an argument of {_name(func)}", t)
    args, kwargs = tree_map(lambda x: x._expression if isinstance(x, LazyLogits) else x, (args, kwargs))
    result._expression = _Expression(func, args, kwargs)


def _made_of(func: Any, arguments: Any) -> Any:
    return tree_map(lambda x: _made(x, func) if isinstance(x, LazyLogits) else x, arguments)


def _made(lazy: LazyLogits, why: Any) -> Tensor:
    """What the model would have had here."""
    if lazy._made is None:
        source, name = lazy._source, _name(why)
        if source.made is None:
            report = source.forward.finder.report
            if not report.made[name] and not torch.compiler.is_compiling():
                warnings.warn(
                    f"{name} makes the logits of a fused head, shape {tuple(source.hidden.shape[:-1])} times"
                    f" {lazy._shaping.num_classes} classes; what is fused is said by lossfuse.fuse_lm_head",
                    UserWarning,
                    stacklevel=4,
                )
            report.made[name] += 1
        made = source.make()
        with torch.enable_grad():
            lazy._made = lazy._expression.value(made)
    return lazy._made


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    # of an attribute
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _writes(func: Any, kwargs: Any) -> bool:
    name = _name(func)
    in_place = (name.endswith("_") and not name.endswith("__")) or name in (
        "__setitem__",
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
    )
    return in_place or name == "__set__" or isinstance(kwargs.get("out"), LazyLogits)


T = Tensor
# what is known of logits that are not made
METADATA = {
    *(getattr(T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_meta", "is_nested")),
    *(getattr(T, name).__get__ for name in ("is_leaf", "grad_fn", "grad", "itemsize", "is_quantized", "is_cpu", "is_mps", "is_xpu")),
    *(getattr(T, name) for name in ("size", "dim", "numel", "nelement", "ndimension", "element_size", "get_device", "__len__", "__hash__")),
    *(getattr(T, name) for name in ("is_floating_point", "is_complex", "__repr__", "is_contiguous", "stride")),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
# functions of torch -> what they do with logits that are not made: lazy ones again, a result, or NotImplemented
HANDLERS: dict[Any, Callable[..., Any]] = {}


def handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return register


def of_classes(x: LazyLogits, dim: Any) -> bool:
    """Whether ``dim`` is the dimension of the classes."""
    return isinstance(dim, int) and dim in (x._class_dim, x._class_dim - x._rows.dim())


def can_be(x: LazyLogits, dtype: torch.dtype) -> bool:
    """Whether what is fused has as many digits."""
    return dtype.is_floating_point and (dtype != torch.float64 or x._rows.dtype == torch.float64)
