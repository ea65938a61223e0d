"""Logits that are not made until somebody needs them: the output head of a model, fused with the loss that reads it.

In training the head's ``forward`` returns ``LazyLogits``: shape, dtype and device of logits, no storage. What models and trainers do
between head and loss (scale, cap, cast, slice, reshape, add a bias) is recorded; what reads them as a loss or a statistic
(``HANDLERS``) runs the linear form on the hidden states; anything else makes the logits, by the head's own forward and the recorded
operations, bit for bit what they would have been. No model's code is known here.
"""

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from . import functional, statistics
from .inputs import Targets
from .linear import chunk_rows
from .reduce import divisor_of, reduce_rows
from .spec import LinearOptions
from .statistics import LossStats

HEAD_NAMES = ("lm_head", "output", "embed_out", "head", "unembed")
STALE = (
    "these logits were never made, and {what} has been changed in place since the forward that would have made them; read what you need"
    " of them before that, or lossfuse.unfuse_lm_head(model)"
)


@dataclass
class LogitsReport:
    """What became of the logits of a fused head: operations by name, and how often."""

    fused: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)


def fuse_lm_head(model: nn.Module, *, head: str | nn.Module | None = None, options: LinearOptions | None = None) -> LogitsReport:
    """Fuse the output head of a model with whatever loss reads its logits, until ``unfuse_lm_head``.

    In training mode, with gradients enabled, the head then returns logits that are not made. They have the shape, dtype and device of
    logits. Scaling by a number, ``tanh``, casts, a bias, slices of classes and any indexing or reshaping of rows are recorded;
    ``F.cross_entropy`` and ``nn.CrossEntropyLoss`` with any arguments, ``lossfuse.cross_entropy``, ``log_softmax`` followed by ``gather``,
    ``nll_loss`` or a sum over classes, ``logsumexp``, ``argmax`` and entropies run ``linear_cross_entropy`` or its statistics instead.
    Any other use makes the logits as the model would have, bit for bit, and warns once, naming the operation. In eval mode, under
    ``no_grad`` and in ``generate()`` the head is the model's own.

    Equal to the model without: losses and gradients up to rounding (logits of half-precision heads are float32 here).

    Args:
        model: any module. Transformers models are asked for ``get_output_embeddings()``, at every forward, so that the head may be wrapped or
            replaced (LoRA, a resized vocabulary) before or after. Others are searched for a module called ``lm_head``, ``output``,
            ``embed_out``, ``head`` or ``unembed``.
        head: the head itself, or its name in ``model``, where that finds none or another.
        options: of the linear form; see ``LinearOptions``. ``main_grad`` and heads other than ``nn.Linear`` do not go together.

    Returns:
        What becomes of the logits from now on, as counters of operations: ``fused`` and ``made``. A second call for the same model
        changes its options and returns the same report.

    Raises:
        TypeError, ValueError: if no head can be found, naming what was looked for.
        RuntimeError, later: where logits are wanted after their hidden states or the head's parameters have been changed in place, as by
            an optimizer's step; a model of torch has made them before.

    A head that is a plain ``nn.Linear`` runs ``linear_cross_entropy``. Any other (adapters, wrappers, several layers) is called for a chunk
    of rows at a time, and again in the backward.

    Nothing of the model changes but its head's ``forward`` and one forward hook of the model: state dict, tied weights, hooks, pickling and
    ``copy.deepcopy`` (whose copy is fused too) are unaffected. Under ``torch.compile`` the head and the loss run outside the graphs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__} but must be a torch.nn.Module")
    if head is not None and not isinstance(head, str | nn.Module):
        raise TypeError(f"head is a {type(head).__name__} but must be a module, or the name of one in model")
    options = LinearOptions() if options is None else options
    if not isinstance(options, LinearOptions):
        raise TypeError(f"options is a {type(options).__name__} but must be a lossfuse.LinearOptions")
    if find_lm_head(model, head) is None:
        where = f"no module {head!r}" if head is not None else "neither get_output_embeddings() nor " + ", ".join(HEAD_NAMES)
        raise ValueError(f"model is a {type(model).__name__} in which no output head was found ({where}); pass head=, a module or its name")
    finder = _finder_of(model)
    if finder is None:
        finder = _HeadFinder(model)
        model.register_forward_pre_hook(finder)
    finder.name, finder.options = head, options
    finder(model, ())
    return finder.report


def unfuse_lm_head(model: nn.Module) -> None:
    """Undo ``fuse_lm_head``; nothing of it is left. A model that is not fused stays as it is."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _HeadFinder):
            hook.release()
            del model._forward_pre_hooks[key]


def _finder_of(model: nn.Module) -> "_HeadFinder | None":
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _HeadFinder)), None)


def find_lm_head(model: nn.Module, head: str | nn.Module | None = None) -> nn.Module | None:
    """The output head of a model, by ``head``, its own word or one of the usual names."""
    if isinstance(head, nn.Module):
        return head
    if head is not None:
        return dict(model.named_modules()).get(head)
    found = None
    if callable(getattr(model, "get_output_embeddings", None)):
        found = model.get_output_embeddings()
    if found is None:
        found = next((m for name in HEAD_NAMES if isinstance(m := getattr(model, name, None), nn.Module)), None)
    return found if isinstance(found, nn.Module) else None


class _HeadFinder:
    """A forward hook of a model: sees to it that the head it has now is the one that is fused."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = LogitsReport()
        self.name: str | nn.Module | None = None
        self.options = LinearOptions()
        self.fused: nn.Module | None = None

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: Any) -> None:
        head = find_lm_head(self.model, self.name)
        if head is self.fused:
            return
        self.release()
        if head is None:
            return
        known = head.__dict__.get("forward")
        if isinstance(known, LazyForward):
            # fused by way of another model that has it
            self.report = known.finder.report
        else:
            head.forward = LazyForward(head, known, self)  # type: ignore[method-assign, assignment]
        self.fused = head

    def release(self) -> None:
        forward = None if self.fused is None else self.fused.__dict__.get("forward")
        if self.fused is not None and isinstance(forward, LazyForward):
            del self.fused.__dict__["forward"]
            if forward.instance_forward is not None:
                self.fused.forward = forward.instance_forward  # type: ignore[method-assign]
        self.fused = None


class LazyForward:
    """What a fused head has in place of its ``forward``."""

    def __init__(self, head: nn.Module, instance_forward: Callable[..., Tensor] | None, finder: _HeadFinder) -> None:
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

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.get("input")
        plain = isinstance(hidden, Tensor) and len(args) + len(kwargs) == 1 and hidden.is_floating_point() and hidden.dim() > 0
        if not (plain and self.head.training and torch.is_grad_enabled()) or torch.is_inference_mode_enabled():
            return self.original(*args, **kwargs)
        assert isinstance(hidden, Tensor)
        if find_lm_head(self.finder.model, self.finder.name) is not self.head:
            # wrapped since, by an adapter: the wrapper is fused from the next call on
            self.finder(self.finder.model, ())
            return self.original(*args, **kwargs)
        source = _Source(self, hidden)
        made = source.shape_of_logits()
        if made is None:
            return self.original(*args, **kwargs)
        num_classes, dtype = made
        return LazyLogits(source, _Shaping(num_classes, dtype), hidden)


class _Source:
    """One call of a head that has not been made: what it takes, as it was then."""

    def __init__(self, forward: LazyForward, hidden: Tensor) -> None:
        self.forward = forward
        self.hidden = hidden
        head, kind = forward.head, hidden.device.type
        self.linear = type(head) is nn.Linear and forward.instance_forward is None and type(head.weight) in (Tensor, nn.Parameter)
        self.weight = head.weight if self.linear else None
        self.bias = head.bias if self.linear else None
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.watched = [("a parameter of the head", p, p._version) for p in head.parameters()]
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
class _Shaping:
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

    def times(self, c: float) -> "_Shaping | None":
        if c == 0.0 or not math.isfinite(c):
            return None
        if self.kind != "logits":
            return replace(self, factor=self.factor * c)
        if self.cap is not None:
            return replace(self, cap=self.cap * c)
        return replace(self, scale=self.scale * c, bias=None if self.bias is None else self.bias * c)

    def plus(self, bias: Tensor) -> "_Shaping | None":
        if self.kind != "logits" or self.cap is not None:
            return None
        bias = bias.flatten()
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    def cut(self, num_classes: int) -> "_Shaping | None":
        if self.kind != "logits":
            return None
        return replace(self, num_classes=num_classes, bias=None if self.bias is None else self.bias[:num_classes])

    @property
    def options(self) -> dict[str, float | None]:
        """As the losses take them."""
        scale = self.scale if self.cap is None else self.scale * self.cap
        return {"logit_scale": None if scale == 1.0 else scale, "softcap": None if self.cap is None else abs(self.cap)}

    def same_logits(self, other: "_Shaping") -> bool:
        mine, others = (replace(s, kind="logits", factor=1.0, bias=None, dtype=torch.float32) for s in (self, other))
        return mine == others and self.bias is other.bias


class LazyLogits(Tensor):
    """Logits, or something elementwise of them, that are not made; see ``fuse_lm_head``."""

    _source: _Source
    _shaping: _Shaping
    _rows: Tensor
    _expression: "_Expression"
    _class_dim: int
    _made: Tensor | None

    @staticmethod
    def __new__(cls, source: _Source, shaping: _Shaping, rows: Tensor, class_dim: int | None = None) -> "LazyLogits":
        """``rows`` (..., D) are the hidden states of the rows there are; classes are last, or in ``class_dim``."""
        lead = list(rows.shape[:-1])
        class_dim = len(lead) if class_dim is None else class_dim
        lead.insert(class_dim, shaping.num_classes)
        self: LazyLogits = Tensor._make_wrapper_subclass(cls, lead, dtype=shaping.dtype, device=rows.device)  # type: ignore[attr-defined]
        self._source, self._shaping, self._rows, self._class_dim = source, shaping, rows, class_dim
        self._expression, self._made = _Expression(), None
        source.lazies.append(weakref.ref(self))
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def _but(self, *, shaping: _Shaping | None = None, rows: Tensor | None = None, class_dim: int | None = None) -> "LazyLogits":
        return LazyLogits(
            self._source,
            self._shaping if shaping is None else shaping,
            self._rows if rows is None else rows,
            (None if self._classes_last else self._class_dim) if class_dim is None else class_dim,
        )

    @property
    def _classes_last(self) -> bool:
        return self._class_dim == self._rows.dim() - 1

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"LazyLogits({self._shaping.kind} of shape {tuple(self.size())}, dtype={self._shaping.dtype}, not made)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _of_lazy(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _made_of(func, (args, kwargs or {}))
        return func(*args, **kwargs)


@torch.compiler.disable
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
METADATA = {
    *(getattr(T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_meta", "is_nested")),
    *(getattr(T, name).__get__ for name in ("is_leaf", "grad_fn", "grad", "itemsize", "is_quantized", "is_cpu", "is_mps", "is_xpu")),
    *(getattr(T, name) for name in ("size", "dim", "numel", "nelement", "ndimension", "element_size", "get_device", "__len__", "__hash__")),
    *(getattr(T, name) for name in ("is_floating_point", "is_complex", "__repr__", "is_contiguous", "stride")),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return register


def _of_classes(x: LazyLogits, dim: Any) -> bool:
    return isinstance(dim, int) and dim in (x._class_dim, x._class_dim - x._rows.dim())


def _reshaped(x: LazyLogits, shaping: _Shaping | None) -> Any:
    return NotImplemented if shaping is None else x._but(shaping=shaping)


@_handles(T.requires_grad.__get__)  # type: ignore[attr-defined]
def _requires_grad(x: LazyLogits) -> bool:
    return x._source.requires_grad and torch.is_grad_enabled()


# --- elementwise


def _number(c: Any) -> float | None:
    """A number of the host. One on a device would have to be waited for."""
    if isinstance(c, int | float) and not isinstance(c, bool):
        return float(c)
    if isinstance(c, Tensor) and not isinstance(c, LazyLogits) and c.dim() == 0 and not c.requires_grad and c.device.type == "cpu":
        return float(c) if c.is_floating_point() or c.dtype == torch.int64 else None
    return None


@_handles(T.mul, T.__mul__, T.__rmul__, torch.mul, T.multiply, torch.multiply)
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


@_handles(T.div, T.__truediv__, torch.div, T.true_divide, torch.true_divide, T.divide, torch.divide)
def _div(x: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    c = _number(other)
    if not isinstance(x, LazyLogits) or rounding_mode is not None or not c:
        return NotImplemented
    return _reshaped(x, x._shaping.times(1.0 / c))


@_handles(T.neg, T.__neg__, torch.neg, torch.negative, T.negative)
def _neg(x: LazyLogits) -> Any:
    return _reshaped(x, x._shaping.times(-1.0))


@_handles(T.tanh, torch.tanh)
def _tanh(x: LazyLogits) -> Any:
    shaping = x._shaping
    return x._but(shaping=replace(shaping, cap=1.0)) if shaping.kind == "logits" and shaping.cap is None else NotImplemented


@_handles(T.add, T.__add__, T.__radd__, torch.add)
def _add(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(x, LazyLogits):
        x, other = other, x
    one_row = isinstance(other, Tensor) and not isinstance(other, LazyLogits) and other.dim() > 0 and other.device == x.device
    fits = one_row and other.numel() == other.shape[-1] == x._shaping.num_classes and other.dim() <= x._rows.dim()
    if not fits or alpha != 1 or not x._classes_last or torch.promote_types(other.dtype, x._shaping.dtype) != x._shaping.dtype:
        return NotImplemented
    return _reshaped(x, x._shaping.plus(other))


@_handles(T.exp, torch.exp)
def _exp(x: LazyLogits) -> Any:
    shaping = x._shaping
    return x._but(shaping=replace(shaping, kind="p")) if shaping.kind == "logp" and shaping.factor == 1.0 else NotImplemented


def _normalised(kind: str) -> Callable[..., Any]:
    def handler(x: LazyLogits, dim: Any = None, _stacklevel: Any = 3, dtype: torch.dtype | None = None) -> Any:
        if isinstance(_stacklevel, torch.dtype):
            dtype = _stacklevel
        if not _of_classes(x, dim) or x._shaping.kind != "logits" or (dtype is not None and not _can_be(x, dtype)):
            return NotImplemented
        # autocast computes them in float32
        autocast = torch.is_autocast_enabled(x.device.type) and x._shaping.dtype.itemsize < 4
        return x._but(shaping=replace(x._shaping, kind=kind, dtype=dtype or (torch.float32 if autocast else x._shaping.dtype)))

    return handler


_handles(F.log_softmax, torch.log_softmax, T.log_softmax, torch.special.log_softmax)(_normalised("logp"))
_handles(F.softmax, torch.softmax, T.softmax, torch.special.softmax)(_normalised("p"))


# --- dtype and memory


def _can_be(x: LazyLogits, dtype: torch.dtype) -> bool:
    """Whether what is fused has as many digits."""
    return dtype.is_floating_point and (dtype != torch.float64 or x._rows.dtype == torch.float64)


def _cast(x: LazyLogits, dtype: torch.dtype) -> Any:
    if dtype == x._shaping.dtype:
        return x
    return x._but(shaping=replace(x._shaping, dtype=dtype)) if _can_be(x, dtype) else NotImplemented


@_handles(T.float)
def _float(x: LazyLogits) -> Any:
    return _cast(x, torch.float32)


@_handles(T.bfloat16)
def _bfloat16(x: LazyLogits) -> Any:
    return _cast(x, torch.bfloat16)


@_handles(T.half)
def _half(x: LazyLogits) -> Any:
    return _cast(x, torch.float16)


@_handles(T.to, T.type)
def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    dtype, device = x._shaping.dtype, x._rows.device
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            try:
                device = torch.device(value)
            except RuntimeError:
                # a name of a type of tensors
                return NotImplemented
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, value.device
        elif not isinstance(value, bool | torch.memory_format) and value is not None:
            return NotImplemented
    here = device.type == x._rows.device.type and device.index in (None, x._rows.device.index)
    return _cast(x, dtype) if here else NotImplemented


@_handles(T.type_as)
def _type_as(x: Any, other: Tensor) -> Any:
    return _cast(x, other.dtype) if isinstance(x, LazyLogits) and other.device == x._rows.device else NotImplemented


@_handles(T.contiguous, T.clone, torch.clone)
def _same(x: LazyLogits, *, memory_format: Any = None) -> LazyLogits:
    return x._but()


@_handles(T.detach, torch.detach)
def _detach(x: LazyLogits) -> LazyLogits:
    return x._but(rows=x._rows.detach())


# --- rows


@_handles(T.view, T.reshape, torch.reshape)
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


@_handles(T.view_as, T.reshape_as)
def _view_as(x: Any, other: Tensor) -> Any:
    return _view(x, tuple(other.shape)) if isinstance(x, LazyLogits) else NotImplemented


@_handles(T.flatten, torch.flatten)
def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    dims = x._rows.dim()
    first, last = start_dim % dims, end_dim % dims
    if not x._classes_last or last >= dims - 1 or first > last:
        return NotImplemented
    return x._but(rows=x._rows.flatten(first, last))


@_handles(T.squeeze, torch.squeeze)
def _squeeze(x: LazyLogits, dim: Any = None) -> Any:
    if not x._classes_last or not isinstance(dim, int) or _of_classes(x, dim):
        return NotImplemented
    return x._but(rows=x._rows.squeeze(dim % x._rows.dim()))


@_handles(T.unsqueeze, torch.unsqueeze)
def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    at = dim % (x._rows.dim() + 1)
    return x._but(rows=x._rows.unsqueeze(at)) if x._classes_last and at < x._rows.dim() else NotImplemented


@_handles(T.__getitem__)
def _getitem(x: LazyLogits, index: Any) -> Any:
    if not x._classes_last:
        return NotImplemented
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, LazyLogits | list) or i is None for i in index):
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
    return x._but(shaping=shaping, rows=x._rows[(*index[:-1], slice(None))])


def _index_stays(index: tuple[Any, ...]) -> bool:
    """Whether hidden states indexed so have their width last, as the logits have their classes."""
    return all((isinstance(i, int | slice | Tensor) and not isinstance(i, bool)) or i is Ellipsis for i in index)


@_handles(T.transpose, torch.transpose, T.swapaxes, torch.swapaxes, T.swapdims, torch.swapdims)
def _transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    dims = x._rows.dim()
    a, b = sorted((dim0 % dims, dim1 % dims))
    if x._classes_last and dims == 3 and (a, b) == (1, 2):
        return x._but(class_dim=1)
    if not x._classes_last and dims == 3 and (a, b) == (1, 2):
        return x._but(class_dim=2)
    return NotImplemented


@_handles(T.permute, torch.permute)
def _permute(x: LazyLogits, *dims: Any) -> Any:
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    n = x._rows.dim()
    order = tuple(d % n for d in order)
    if x._classes_last and order == (0, n - 1, *range(1, n - 1)):
        return x._but(class_dim=1)
    if x._class_dim == 1 and order == (0, *range(2, n), 1):
        return x._but(class_dim=n - 1)
    return NotImplemented


@_handles(T.movedim, torch.movedim, T.moveaxis, torch.moveaxis)
def _movedim(x: LazyLogits, source: Any, destination: Any) -> Any:
    n = x._rows.dim()
    if not isinstance(source, int) or not isinstance(destination, int):
        return NotImplemented
    a, b = source % n, destination % n
    if x._classes_last and (a, b) == (n - 1, 1):
        return x._but(class_dim=1)
    return x._but(class_dim=n - 1) if x._class_dim == 1 and (a, b) == (1, n - 1) else NotImplemented


# --- what reads logits

# no target is it
NO_ID = -(2**63)


@_handles(F.cross_entropy)
def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(input, LazyLogits) or input._shaping.kind != "logits":
        return NotImplemented
    reduction = functional.resolve_reduction(reduction, size_average, reduce)
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return _loss(input, target, options)


@_handles(functional.cross_entropy, statistics.cross_entropy_stats)
def _ours(input: LazyLogits, *args: Any, **options: Any) -> Any:
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    options = {**dict(zip(names, args, strict=False)), **options}
    target, scale, cap = options.pop("target"), options.pop("logit_scale"), options.pop("softcap")
    shaping: _Shaping | None = input._shaping
    options["reduction"] = functional.resolve_reduction(options["reduction"], options.pop("size_average"), options.pop("reduce"))
    if input._shaping.kind != "logits" or (cap is not None and input._shaping.cap is not None):
        return NotImplemented
    if scale is not None:
        shaping = input._shaping.times(scale)
    if cap is not None and shaping is not None:
        inner = shaping.times(1.0 / cap)
        shaping = None if inner is None else replace(inner, cap=cap)
    if shaping is None:
        return NotImplemented
    # there are none to write over
    options.pop("inplace", None)
    reads = {name: options.pop(name) for name in ("entropy", "argmax") if name in options}
    return _loss(input._but(shaping=shaping), target, options, reads or None)


@_handles(F.nll_loss)
def _nll_loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if not isinstance(input, LazyLogits) or input._shaping.kind != "logp" or input._shaping.factor != 1.0 or target.is_floating_point():
        return NotImplemented
    reduction = functional.resolve_reduction(reduction, size_average, reduce)
    return _loss(input, target, {"weight": weight, "ignore_index": ignore_index, "reduction": reduction})


@_handles(T.gather, torch.gather)
def _gather(x: Any, dim: Any, index: Any = None, *, sparse_grad: bool = False) -> Any:
    one = isinstance(x, LazyLogits) and isinstance(index, Tensor) and x._classes_last and _of_classes(x, dim)
    if not one or tuple(index.shape) != (*x._rows.shape[:-1], 1) or sparse_grad or x._shaping.kind not in ("logits", "logp", "p"):
        return NotImplemented
    read = _stats(x, index[..., 0])
    value = read.target_logprob
    if x._shaping.kind == "logits":
        value = value + read.lse
    elif x._shaping.kind == "p":
        value = value.exp()
    return _result(x, value.unsqueeze(-1))


@_handles(torch.take_along_dim, T.take_along_dim)
def _take_along_dim(x: Any, indices: Any, dim: Any = None) -> Any:
    return _gather(x, dim, indices)


@_handles(T.logsumexp, torch.logsumexp, torch.special.logsumexp)
def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if x._shaping.kind != "logits" or not _of_classes(x, dim):
        return NotImplemented
    lse = _result(x, _stats(x).lse)
    return lse.unsqueeze(x._class_dim) if keepdim else lse


@_handles(T.argmax, torch.argmax)
def _argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _of_classes(x, dim) or x._shaping.kind not in ("logits", "logp", "p") or x._shaping.factor <= 0.0:
        return NotImplemented
    with torch.no_grad():
        argmax = _stats(x, argmax=True).argmax
    assert argmax is not None
    return argmax.unsqueeze(x._class_dim) if keepdim else argmax


@_handles(T.sum, torch.sum)
def _sum(x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    shaping = x._shaping
    if not _of_classes(x, dim) or shaping.kind not in ("logp", "p logp", "p z") or (dtype is not None and not _can_be(x, dtype)):
        return NotImplemented
    if shaping.kind == "logp":
        # a target that is spread evenly over all classes
        zeros = torch.zeros(x._rows.shape[:-1], dtype=torch.int64, device=x._rows.device)
        value = _loss(x, zeros, {"ignore_index": NO_ID, "reduction": "none", "label_smoothing": 1.0}) * -float(shaping.num_classes)
    else:
        read = _stats(x, entropy=True)
        assert read.entropy is not None
        value = -read.entropy if shaping.kind == "p logp" else read.lse - read.entropy
    value = (value * shaping.factor).to(dtype or shaping.dtype)
    return value.unsqueeze(x._class_dim) if keepdim else value


def _result(x: LazyLogits, value: Tensor) -> Tensor:
    """As torch would have it: in the dtype of what it was read off."""
    value = value if x._shaping.factor == 1.0 else value * x._shaping.factor
    return value.to(x._shaping.dtype)


def _stats(x: LazyLogits, target: Tensor | None = None, *, entropy: bool = False, argmax: bool = False) -> LossStats:
    if target is None:
        target = torch.zeros(x._rows.shape[:-1], dtype=torch.int64, device=x._rows.device)
    made = _read(x, target, {"ignore_index": NO_ID, "reduction": "none"}, {"entropy": entropy, "argmax": argmax})
    assert isinstance(made, LossStats)
    return made


def _loss(x: LazyLogits, target: Tensor, options: dict[str, Any], reads: dict[str, bool] | None = None) -> Any:
    dims = x._rows.dim()
    # classes are in dimension 1 of a loss's logits, or alone
    if x._class_dim != min(dims - 1, 1) or not isinstance(target, Tensor):
        return NotImplemented
    if target.is_floating_point() and dims > 2:
        target = target.movedim(1, -1)
    return _read(x, target, options, reads)


def _read(x: LazyLogits, target: Tensor, options: dict[str, Any], reads: dict[str, bool] | None) -> Tensor | LossStats:
    """The linear form of these rows, or of chunks of a head that is not linear."""
    source, shaping = x._source, x._shaping
    source.require_unchanged()
    options = {**options, **shaping.options}
    with source.as_called():
        if source.weight is None:
            return _read_chunks(x, target, options, reads)
        weight, bias = source.weight[: shaping.num_classes], source.bias
        if bias is not None:
            bias = bias[: shaping.num_classes]
        if shaping.bias is not None:
            bias = shaping.bias / shaping.scale if bias is None else bias + shaping.bias / shaping.scale
            bias = bias.to(weight.dtype)
        call: Any = functional.linear_cross_entropy
        if reads is not None:
            call, options = statistics.linear_cross_entropy_stats, {**options, **reads}
        made: Tensor | LossStats = call(x._rows, weight, target, linear_bias=bias, options=source.forward.finder.options, **options)
        return made


def _read_chunks(x: LazyLogits, target: Tensor, options: dict[str, Any], reads: dict[str, bool] | None) -> Tensor | LossStats:
    """A head that is not linear makes a chunk of logits at a time, and makes it again in the backward."""
    source, shaping = x._source, x._shaping
    reduction, normalizer = options.pop("reduction"), options.pop("normalizer", None)
    ignore_index = options["ignore_index"]
    rows = x._rows.reshape(-1, x._rows.shape[-1])
    lead = x._rows.shape[:-1]
    t = target.reshape(-1, shaping.num_classes) if target.is_floating_point() else target.reshape(-1)

    def part(hidden: Tensor, t: Tensor) -> tuple[Tensor | None, ...]:
        z = source.forward.original(hidden)[:, : shaping.num_classes]
        if shaping.bias is not None:
            z = z + shaping.bias / shaping.scale
        if reads is None:
            return (functional.cross_entropy(z, t, reduction="none", **options),)
        read = statistics.cross_entropy_stats(z, t, reduction="none", **options, **reads)
        return read.loss, read.lse, read.target_logprob, read.entropy, read.argmax

    cpu = rows.device.type == "cpu"
    step = chunk_rows(len(rows), rows.shape[-1], shaping.num_classes, rows.dtype, source.forward.finder.options, cpu=cpu)
    parts = [checkpoint(part, h, some, use_reentrant=False) for h, some in zip(rows.split(step), t.split(step), strict=True)]
    columns = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    of = Targets(t, options.get("weight"), lead)
    divisor = divisor_of(of, shaping.num_classes, columns[0].dtype, ignore_index, reduction, normalizer)
    loss = reduce_rows(columns[0], of, reduction, divisor)
    if reads is None:
        return loss
    lse, target_logprob, entropy, argmax = (None if t is None else t.reshape(lead) for t in columns[1:])
    return LossStats(loss, lse, target_logprob, entropy, torch.zeros_like(lse), argmax, (t != ignore_index).sum())
