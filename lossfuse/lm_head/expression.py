"""How lazy logits are computed from the output of their head: as calls of torch on all rows, and as
a program for a chunk of rows."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .deferred_call import ERR_STALE, DeferredCall, require_unchanged, version_of
from .torch_functions import name_of


class Expression:
    """A call of torch that computes a tensor from logits; its arguments may be expressions.

    ``func`` is None for the logits of the head."""

    def __init__(self, call: DeferredCall, lazy: Any) -> None:
        self.call = call
        self.lazy: Callable[[], Any] = weakref.ref(lazy)
        self.num_classes, self.dtype = lazy._transform.num_classes, lazy._transform.dtype
        self.func: Any = None
        self.arguments: Any = ()
        self.grad, self.autocast = True, call.autocast
        self.watched: list[tuple[str, Tensor, int]] = []

    def record(self, func: Any, args: Any, kwargs: Any) -> None:
        kind = self.call.hidden.device.type
        self.func = func
        self.arguments = tree_map(lambda x: getattr(x, "_expression", x), (args, kwargs))
        self.grad = torch.is_grad_enabled()
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        tensors = (t for t in tree_leaves(self.arguments) if isinstance(t, Tensor))
        self.watched = [(f"an argument of {name_of(func)}", t, version_of(t)) for t in tensors]

    def value(self, *, inner: bool = False) -> Tensor:
        """Return the tensor. ``inner``: it is an argument of a recorded call and must not have
        changed since."""
        lazy = self.lazy()
        if lazy is not None and lazy._value is not None:
            if inner and version_of(lazy._value) != lazy._value_version:
                raise RuntimeError(ERR_STALE.format(what="a tensor computed from them"))
            return lazy._value
        value = (
            self.call.materialize()
            if self.func is None
            else self._evaluate(lambda x: x.value(inner=True) if isinstance(x, Expression) else x)
        )
        if lazy is not None:
            lazy._value, lazy._value_version = value, version_of(value)
        return value

    def recompute(self, stops: dict[int, Tensor]) -> Tensor:
        """Compute the tensor again with a new autograd graph; a backward may have freed the first.

        ``stops`` maps ids of tensors to leaves that replace them."""
        lazy = self.lazy()
        if (
            lazy is not None
            and lazy._value is not None
            and version_of(lazy._value) != lazy._value_version
        ):
            return lazy._value
        if self.func is None:
            return self.call.original(stops.get(id(self.call.hidden)))
        return self._evaluate(
            lambda x: x.recompute(stops) if isinstance(x, Expression) else stops.get(id(x), x)
        )

    def _evaluate(self, value_of: Callable[[Any], Any]) -> Tensor:
        require_unchanged(self.watched)
        args, kwargs = tree_map(value_of, self.arguments)
        kind = self.call.hidden.device.type
        with (
            torch.set_grad_enabled(self.grad),
            torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            value: Tensor = self.func(*args, **kwargs)
        return value

    def like(self) -> Tensor | None:
        """Return a meta tensor of the same layout, or None if the layout depends on values."""
        if self.func is None:
            return torch.empty(
                *self.call.hidden.shape[:-1], self.num_classes, dtype=self.dtype, device="meta"
            )
        try:
            args, kwargs = tree_map(self._like_of, self.arguments)
            result: Tensor = self.func(*args, **kwargs)
        except RuntimeError:
            # includes NotImplementedError
            return None
        return result if result.device.type == "meta" else None

    @staticmethod
    def _like_of(x: Any) -> Any:
        if isinstance(x, Expression):
            like = x.like()
            if like is None:
                raise NotImplementedError
            return like
        return torch.empty_like(x, device="meta") if isinstance(x, Tensor) and x.dim() else x


@dataclass(frozen=True)
class Carried:
    """An argument of a step with one value, or V, per row: the key of a tensor in ``_carried``."""

    key: int


@dataclass(frozen=True, eq=False)
class Step:
    """A row-wise call; its arguments may be ``Program`` and ``Carried``."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    grad: bool = True
    autocast: torch.dtype | None = None
    watched: tuple[tuple[str, Tensor, int], ...] = ()


@dataclass(frozen=True)
class Program:
    """Stands for lazy logits in the arguments of a step: the step that computes them, or None for
    the logits of the head."""

    step: Step | None
