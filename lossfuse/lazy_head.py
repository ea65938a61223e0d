"""The call of a head that is put off: what it takes, as it was then, and what its logits would be.

Whoever wants them later gets them from the head's own forward, or is told that what it takes has changed since.
"""

import math
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .cut_heads import Cut
from .spec import LinearOptions
from .wrappers import Lenders, Lent, held, is_plain_linear, lent

STALE = (
    "these logits were never made, and {what} has been changed since the forward that would have made them; read what you need of them"
    " before that, or lossfuse.unfuse_lm_head(model)"
)


@dataclass
class LogitsReport:
    """What became of the logits of a fused head: operations by name, and how often."""

    fused: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)


class Finder(Protocol):
    """Who knows which head a model has."""

    model: nn.Module
    report: LogitsReport
    options: LinearOptions
    closed: bool

    def close(self) -> None:
        """Undo it."""

    def finds(self, head: nn.Module) -> bool:
        """Whether it is this; if not, what it is is fused from now on."""


class HeadForward:
    """A fused head, and the forward that it had."""

    def __init__(self, head: nn.Module, instance_forward: Callable[..., Tensor] | None, finder: Finder) -> None:
        self.head = head
        self.instance_forward = instance_forward
        self.finder = finder
        # classes and dtype of the logits of a head that must be asked, by what decides them
        self.known: dict[Any, tuple[int, torch.dtype]] = {}
        self.lenders = Lenders()

    def original(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        made: Tensor = type(self.head).forward(self.head, *args, **kwargs)
        return made

    def leave(self, head: nn.Module) -> None:
        """Give a head back the forward it had."""
        # at no time has it neither
        if self.instance_forward is not None:
            head.forward = self.instance_forward
        else:
            del head.__dict__["forward"]


class Source:
    """One call of a head that has not been made: what it takes, as it was then."""

    def __init__(self, forward: HeadForward, hidden: Tensor, cut: Cut | None = None) -> None:
        self.forward = forward
        self.hidden = hidden
        self.cut = cut
        head, kind = forward.head, hidden.device.type
        plain = is_plain_linear(head) and forward.instance_forward is None and type(head.weight) in (Tensor, nn.Parameter)
        self.linear = plain or cut is not None
        self.weight: Tensor | None = cast(nn.Linear, head).weight if self.linear else None
        self.bias: Tensor | None = cast(nn.Linear, head).bias if self.linear else None
        # float64 is none of autocast's business
        casts = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
        self.autocast = torch.get_autocast_dtype(kind) if casts else None
        self.parameters = tuple(head.parameters())
        self.watched: list[tuple[str, Tensor, int]] = [("a parameter of the head", p, p._version) for p in self.parameters]
        self.watch("the hidden states", hidden)
        # FSDP1 puts views in place of parameters
        operands = [t for t in (*self.parameters, self.weight, self.bias) if t is not None]
        self.needed = [(t, t.shape) for t in operands]
        self.lent: list[Lent] = []
        self.watch_lent(forward.lenders(self.parameters, forward.finder.model))
        # who waits for a backward to begin, and what has been read, whose backward that is
        self.begins: OrderedDict[int, Callable[[Any], Any]] = OrderedDict()
        self.results: list[weakref.ref[Tensor]] = []
        # the logits themselves, once somebody has needed them, and when that was
        self.made: Tensor | None = None
        self.made_version = 0
        # whether a gradient goes past the logits
        self.read = False
        self.lazies: list[weakref.ref[Any]] = []

    def watch(self, what: str, t: Tensor) -> None:
        self.watched.append((what, t, t._version))

    def watch_lent(self, found: list[Lent]) -> None:
        """What an optimizer's step changes where the head's own parameters are copies."""
        self.lent += found
        for one in found:
            self.watch("a parameter of the head", one.sharded)

    def present(self) -> AbstractContextManager[None]:
        return held(self.lent, self.needed)

    def tell(self, hook: Callable[[Any], Any], modules: Iterable[nn.Module] = ()) -> RemovableHandle:
        """``hook`` is called when a backward of anything made or read of these logits begins."""
        handle = RemovableHandle(self.begins)
        self.begins[handle.id] = hook
        self.watch_lent(lent(tuple(p for p in self.parameters if all(p is not one.parameter for one in self.lent)), modules))
        results = [ref() for ref in self.results]
        for t in results:
            if t is not None:
                t.register_hook(hook)
        return handle

    def is_read(self, result: Any) -> None:
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.requires_grad:
                self.results.append(weakref.ref(t))
                for hook in self.begins.values():
                    t.register_hook(hook)

    def require_unchanged(self, *, calls_head: bool = True) -> None:
        require_unchanged(self.watched)
        # torch.func.functional_call puts others in their place for the time of a call
        if calls_head and any(mine is not now for mine, now in zip_longest(self.parameters, self.forward.head.parameters())):
            raise RuntimeError(STALE.format(what="a parameter of the head"))

    @contextmanager
    def as_called(self) -> Iterator[None]:
        kind = self.hidden.device.type
        # torch 2.8 hands a parameter that was cast under no_grad, without its gradient, to whoever casts it next
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            yield

    def shape_of_logits(self) -> tuple[int, torch.dtype] | None:
        """(classes, dtype); None where the head had better be asked for its logits."""
        if self.weight is not None:
            fits = self.weight.dtype == self.hidden.dtype or self.autocast is not None
            return (
                (len(self.weight), self.autocast or self.weight.dtype) if fits and self.weight.shape[1] == self.hidden.shape[-1] else None
            )
        device = self.hidden.device
        key = self.hidden.dtype, self.autocast, device, tuple(p.shape for p in self.parameters)
        if key not in self.forward.known:
            if self.hidden.numel() == 0:
                return None
            devices = [] if device.type == "cpu" else [device]
            with torch.no_grad(), self.as_called(), torch.random.fork_rng(devices, device_type=device.type):
                row = self.forward.original(self.hidden.reshape(-1, self.hidden.shape[-1])[:1])
            if not (isinstance(row, Tensor) and row.dim() == 2 and len(row) == 1):
                return None
            self.forward.known[key] = row.shape[1], row.dtype
        return self.forward.known[key]

    def original(self, hidden: Tensor | None = None) -> Tensor:
        self.require_unchanged()
        with torch.enable_grad(), self.as_called():
            return self.forward.original(self.hidden if hidden is None else hidden)

    def make(self) -> Tensor:
        if self.made is None:
            self.made = self.original()
            self.made_version = self.made._version
            self.is_read(self.made)
        elif self.made._version != self.made_version:
            raise RuntimeError(STALE.format(what="what was made of others like them"))
        return self.made


def require_unchanged(watched: Iterable[tuple[str, Tensor, int]]) -> None:
    for what, t, version in watched:
        if t._version != version:
            raise RuntimeError(STALE.format(what=what))


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
    # where the model would have a DTensor
    placements: tuple[Any, ...] | None = None

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
