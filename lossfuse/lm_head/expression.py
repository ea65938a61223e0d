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
    """How a tensor is made of the logits of a call: a call among whose arguments are expressions;
    none for the logits themselves."""

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
        """``inner``, as an argument of a call that was recorded, it must be what it was then."""
        lazy = self.lazy()
        if lazy is not None and lazy._value is not None:
            if inner and version_of(lazy._value) != lazy._value_version:
                raise RuntimeError(ERR_STALE.format(what="what was made of others like them"))
            return lazy._value
        made = (
            self.call.materialize()
            if self.func is None
            else self._called(lambda x: x.value(inner=True) if isinstance(x, Expression) else x)
        )
        if lazy is not None:
            lazy._value, lazy._value_version = made, version_of(made)
        return made

    def recompute(self, stops: dict[int, Tensor]) -> Tensor:
        """With a graph of its own: who has used what was made may have freed its. It ends at
        ``stops``, by the tensors they stand for."""
        lazy = self.lazy()
        if (
            lazy is not None
            and lazy._value is not None
            and version_of(lazy._value) != lazy._value_version
        ):
            return lazy._value
        if self.func is None:
            return self.call.original(stops.get(id(self.call.hidden)))
        return self._called(
            lambda x: x.recompute(stops) if isinstance(x, Expression) else stops.get(id(x), x)
        )

    def _called(self, value_of: Callable[[Any], Any]) -> Tensor:
        require_unchanged(self.watched)
        args, kwargs = tree_map(value_of, self.arguments)
        kind = self.call.hidden.device.type
        with (
            torch.set_grad_enabled(self.grad),
            torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            made: Tensor = self.func(*args, **kwargs)
        return made

    def like(self) -> Tensor | None:
        """Its layout, without memory; None where that takes values."""
        if self.func is None:
            return torch.empty(
                *self.call.hidden.shape[:-1], self.num_classes, dtype=self.dtype, device="meta"
            )
        try:
            args, kwargs = tree_map(self._like_of, self.arguments)
            made: Tensor = self.func(*args, **kwargs)
        except RuntimeError:
            # NotImplementedError is one
            return None
        return made if made.device.type == "meta" else None

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
    """An argument of a step that has a value, or V, for each row: which of the tensors that the
    rows carry."""

    key: int


@dataclass(frozen=True, eq=False)
class Step:
    """A call that keeps each row to itself; among its arguments are programs and what rows
    carry."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    grad: bool = True
    autocast: torch.dtype | None = None
    watched: tuple[tuple[str, Tensor, int], ...] = ()


@dataclass(frozen=True)
class Program:
    """In the place of lazy logits among the arguments of a step: what makes their values, or None
    for the logits of the head."""

    step: Step | None
