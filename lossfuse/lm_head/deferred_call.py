"""The call of a head that is put off: what it takes, as it was then, and what its logits would be.

Whoever wants them later gets them from the head's own forward, or is told that what it takes has
changed since."""

import types
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..spec import LinearOptions
from .deferrable import HeadState, is_own_forward
from .fsdp import ShardedParam, ShardedParams, find_sharded_params, is_plain_linear, unsharded
from .tensor_parallel import HeadShard
from .transform import LogitTransform

ERR_STALE = (
    "these logits were never made, and {what} has been changed since the forward that would have made them; read what you need of them,"
    " as argmax for an accuracy, before that (before optimizer.step()), or lossfuse.unfuse_lm_head(model)"
)


READS = "reads of fused logits"


@dataclass
class LogitsReport:
    """Operations on the logits of a fused head, by name and how often: ``fused`` without logits,
    ``made`` materialized them.

    ``fused``, losses and statistics that ran without logits; ``made``, operations that materialized
    them, "forward" where the call of the head was not deferred; ``calls``, how often the model has
    called the head, in any mode."""

    fused: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    calls: int = field(default=0, repr=False, compare=False)


class Fuser(Protocol):
    """The hook that knows which head a model has."""

    report: LogitsReport
    options: LinearOptions
    row_wise: bool
    evaluation: bool
    closed: bool

    @property
    def outermost(self) -> nn.Module:
        """The model whose wrappers may hold the head's parameters."""

    def close(self) -> None:
        """Undo it."""

    def is_current_head(self, head: nn.Module) -> bool:
        """Return True if ``head`` is still the model's output head."""

    def fuse_current_head(self) -> None:
        """Fuse the head that the model has now."""

    def not_deferred(self, why: str) -> None:
        """Count a call of the head that was wanted deferred, and say why it is not, once."""


class HeadForward:
    """A fused head, and the forward that it had."""

    def __init__(
        self, head: nn.Module, instance_forward: Callable[..., Tensor] | None, fuser: Fuser
    ) -> None:
        self.head = head
        self.instance_forward = instance_forward
        self.fuser = fuser
        # classes and dtype of the logits of a head that must be asked, by what decides them, in the
        # state it was in
        self.known: dict[Any, tuple[int, torch.dtype]] = {}
        self.known_in: Any = None
        self.sharded_params = ShardedParams()

    def original(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        made: Tensor = type(self.head).forward(self.head, *args, **kwargs)
        return made

    @property
    def is_linear(self) -> bool:
        """Return True if the head is a plain ``nn.Linear`` with plain parameters and the forward of
        its class."""
        head = self.head
        own = self.instance_forward is None or is_own_forward(head, self.instance_forward)
        return (
            is_plain_linear(head)
            and own
            and type(head.weight) in (Tensor, nn.Parameter)
            and type(head.bias) in PLAIN
        )

    def restore(self, head: nn.Module) -> None:
        """Give a head back the forward it had."""
        # at no time has it neither
        for slot in SLOTS:
            if head.__dict__.get(slot) is not self:
                continue
            if self.instance_forward is not None:
                head.__dict__[slot] = self.instance_forward
            elif slot == "forward":
                del head.__dict__[slot]
            else:
                head.__dict__[slot] = types.MethodType(type(head).forward, head)


# where the forward of a module's instance is; accelerate's hooks keep the one they found in the
# second
SLOTS = ("forward", "_old_forward")
PLAIN = (Tensor, nn.Parameter, type(None))


def fused_forward(head: nn.Module) -> HeadForward | None:
    """The fused ``forward`` of a head, or None if the head is not fused."""
    return next(
        (f for slot in SLOTS if isinstance(f := head.__dict__.get(slot), HeadForward)), None
    )


def version_of(t: Tensor) -> int:
    # tensors of inference mode have none
    return 0 if t.is_inference() else t._version


class DeferredCall:
    """One call of a head that has not been made: what it takes, as it was then."""

    def __init__(
        self, forward: HeadForward, hidden: Tensor, shard: HeadShard | None = None
    ) -> None:
        self.forward = forward
        self.hidden = hidden
        self.shard = shard
        head, kind = forward.head, hidden.device.type
        self.linear = forward.is_linear or shard is not None
        self.weight: Tensor | None = cast(nn.Linear, head).weight if self.linear else None
        self.bias: Tensor | None = cast(nn.Linear, head).bias if self.linear else None
        # float64 is none of autocast's business
        casts = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
        self.autocast = torch.get_autocast_dtype(kind) if casts else None
        self.grad = torch.is_grad_enabled()
        self.parameters = tuple(head.parameters())
        self.trained = tuple(p.requires_grad for p in self.parameters)
        self.watched: list[tuple[str, Tensor, int]] = [
            ("a parameter of the head", p, version_of(p)) for p in self.parameters
        ]
        self.watch("the hidden states", hidden)
        # a linear head is its weight and bias; of any other, whatever its forward may look at
        self.state = None if self.linear else HeadState(head, draws=forward.fuser.row_wise)
        if self.state is not None:
            for what, t in self.state.tensors():
                self.watch(what, t)
        # FSDP1 puts views in place of parameters
        operands = [t for t in (*self.parameters, self.weight, self.bias) if t is not None]
        self.needed = [(t, t.shape) for t in operands]
        self.find_sharded_params: list[ShardedParam] = []
        self.watch_sharded(forward.sharded_params(self.parameters, forward.fuser.outermost))
        # who waits for a backward to begin, and what has been read, whose backward that is
        self.backward_hooks: OrderedDict[int, Callable[[Any], Any]] = OrderedDict()
        self.results: list[weakref.ref[Tensor]] = []
        # in the metadata of nodes of the graph that are reads of these logits
        self.mark = object()
        # the logits themselves, once somebody has needed them, and when that was
        self.logits: Tensor | None = None
        self.logits_version = 0
        # whether a gradient goes past the logits
        self.read = False
        self.lazies: list[weakref.ref[Any]] = []
        # values of views of few classes, computed alone, with how many tensors view their memory;
        # the most classes of any of these logits
        self.views: list[tuple[Tensor, int]] = []
        self.widest = 0
        # what has been read as their logsumexp, to be known again when it is subtracted: its
        # version, rows and transform
        self.lses: list[tuple[weakref.ref[Tensor], int, Tensor, LogitTransform]] = []

    def watch(self, what: str, t: Tensor) -> None:
        self.watched.append((what, t, version_of(t)))

    def watch_sharded(self, found: list[ShardedParam]) -> None:
        """The parameters that an optimizer updates where the parameters of the head are copies of
        them."""
        self.find_sharded_params += found
        for one in found:
            self.watch("a parameter of the head", one.sharded)

    def unsharded(self) -> AbstractContextManager[None]:
        return unsharded(self.find_sharded_params, self.needed)

    def add_backward_hook(
        self, hook: Callable[[Any], Any], modules: Iterable[nn.Module] = ()
    ) -> RemovableHandle:
        """``hook`` is called when a backward of anything made or read of these logits backward_hooks."""
        handle = RemovableHandle(self.backward_hooks)
        self.backward_hooks[handle.id] = hook
        self.watch_sharded(
            find_sharded_params(
                tuple(
                    p
                    for p in self.parameters
                    if all(p is not one.parameter for one in self.find_sharded_params)
                ),
                modules,
            )
        )
        results = [ref() for ref in self.results]
        for t in results:
            if t is not None:
                t.register_hook(hook)
        return handle

    def mark_read(self, result: Any, *, past_logits: bool = True) -> None:
        """Tell those who wait for the backward of ``result``, whose gradient goes past the logits,
        or through them."""
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.requires_grad:
                # a view that is written to, as by masked_fill_, gets another node above that of its
                # base
                nodes: list[Any] = [
                    of.grad_fn for of in (t, t._base) if of is not None and past_logits
                ]
                for node in nodes:
                    if node is not None:
                        node.metadata.setdefault(READS, set()).add(self.mark)
                self.results.append(weakref.ref(t))
                for hook in self.backward_hooks.values():
                    t.register_hook(hook)

    def is_bypassed_by(self, outputs: Any) -> bool:
        """Return True if the graph of ``outputs`` reads these logits without materializing them, so
        that they get no gradient from it."""
        todo: list[Any] = [
            t.grad_fn if isinstance(t, Tensor) else getattr(t, "node", None)
            for t in tree_leaves(outputs)
        ]
        seen = set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if self.mark in node.metadata.get(READS, ()):
                return True
            todo += [following for following, _ in node.next_functions]
        return False

    def require_unchanged(self, *, calls_head: bool | None = None) -> None:
        """Raise if what the logits are made of has changed; with ``calls_head``, also if the head
        has other parameters by now."""
        require_unchanged(self.watched)
        if not (self.shard is not None or not self.linear if calls_head is None else calls_head):
            return
        # torch.func.functional_call puts others in their place for the time of a call
        if any(
            mine is not now
            for mine, now in zip_longest(self.parameters, self.forward.head.parameters())
        ):
            raise RuntimeError(ERR_STALE.format(what="a parameter of the head"))
        what = None if self.state is None else self.state.changed(self.forward.head)
        if what is not None:
            raise RuntimeError(ERR_STALE.format(what=what))

    def run(self, hidden: Tensor) -> Tensor:
        """The head as it was at the call, of these hidden states."""
        if self.linear and self.shard is None:
            assert self.weight is not None
            return nn.functional.linear(hidden, self.weight, self.bias)
        # the classes of its parameters may have functions of their own, which are off while a
        # function of lazy logits runs
        state = nullcontext() if self.state is None else self.state.restored()
        with torch._C._EnableTorchFunction(), self.trained_as_called(), state:
            return self.forward.original(hidden)

    def random(self) -> AbstractContextManager[None]:
        return nullcontext() if self.state is None else self.state.random(self.hidden.device)

    @contextmanager
    def as_called(self) -> Iterator[None]:
        kind = self.hidden.device.type
        # torch 2.8 hands a parameter that was cast under no_grad, without its gradient, to whoever
        # casts it next
        with (
            self.trained_as_called(),
            torch.autocast(
                kind, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
            ),
        ):
            yield

    def trained_as_called(self) -> AbstractContextManager[None]:
        """With the parameters requiring grad that did at the call, as before PEFT switched to
        another adapter."""
        other: list[tuple[Tensor, bool]] = [
            (p, was)
            for p, was in zip(self.parameters, self.trained, strict=True)
            if p.requires_grad != was and p.is_leaf
        ]
        return _requiring_grad(other) if other else nullcontext()

    def shape_of_logits(self) -> tuple[int, torch.dtype] | None:
        """(classes, dtype); None where the head had better be asked for its logits."""
        if self.weight is not None:
            fits = self.weight.dtype == self.hidden.dtype or self.autocast is not None
            return (
                (len(self.weight), self.autocast or self.weight.dtype)
                if fits and self.weight.shape[1] == self.hidden.shape[-1]
                else None
            )
        assert self.state is not None
        device = self.hidden.device
        key = self.hidden.dtype, self.autocast, device, tuple(p.shape for p in self.parameters)
        flags = self.state.flags()
        if self.forward.known_in != flags:
            self.forward.known, self.forward.known_in = {}, flags
        if key not in self.forward.known:
            if self.hidden.numel() == 0:
                return None
            devices = [] if device.type == "cpu" else [device]
            with (
                torch.no_grad(),
                self.as_called(),
                torch.random.fork_rng(devices, device_type=device.type),
            ):
                row = self.forward.original(self.hidden.reshape(-1, self.hidden.shape[-1])[:1])
            if not (isinstance(row, Tensor) and row.dim() == 2 and len(row) == 1):
                return None
            self.forward.known[key] = row.shape[1], row.dtype
        return self.forward.known[key]

    def original(self, hidden: Tensor | None = None) -> Tensor:
        self.require_unchanged()
        with torch.set_grad_enabled(self.grad), self.as_called(), self.random():
            return self.run(self.hidden if hidden is None else hidden)

    def materialize(self) -> Tensor:
        if self.logits is None:
            self.logits = self.original()
            self.logits_version = version_of(self.logits)
            self.mark_read(self.logits, past_logits=False)
        elif version_of(self.logits) != self.logits_version:
            raise RuntimeError(ERR_STALE.format(what="what was made of others like them"))
        return self.logits


def is_same_head(a: DeferredCall, b: DeferredCall) -> bool:
    """Return True if two calls are of one linear head in the same state, so that joined rows are
    rows of one call."""
    if a is b:
        return True
    same = a.forward is b.forward and a.weight is b.weight and a.bias is b.bias
    linear = a.linear and b.linear and a.shard is None and b.shard is None
    if not (same and linear and (a.autocast, a.grad, a.trained) == (b.autocast, b.grad, b.trained)):
        return False
    versions = [
        [(id(t), version) for _, t, version in s.watched if any(t is p for p in s.parameters)]
        for s in (a, b)
    ]
    return versions[0] == versions[1]


class JoinedCalls(DeferredCall):
    """Several calls of one linear head, whose rows have been joined.

    What is read of the joined rows is read of every call; the calls are run, where logits are
    materialized, each by itself."""

    def __init__(self, calls: list[DeferredCall]) -> None:
        self.calls = calls
        first = calls[0]
        self.forward, self.hidden, self.parameters, self.trained = (
            first.forward,
            first.hidden,
            first.parameters,
            first.trained,
        )
        self.shard, self.linear, self.weight, self.bias, self.state = (
            None,
            True,
            first.weight,
            first.bias,
            None,
        )
        self.autocast, self.grad, self.needed, self.find_sharded_params = (
            first.autocast,
            first.grad,
            first.needed,
            first.find_sharded_params,
        )
        self.watched = [one for call in calls for one in call.watched]
        self.lazies = _OfAll(calls)
        self.views, self.lses, self.widest = [], [], first.widest

    @property
    def logits(self) -> Tensor | None:  # type: ignore[override]
        return next((call.logits for call in self.calls if call.logits is not None), None)

    @property
    def backward_hooks(self) -> "OrderedDict[int, Callable[[Any], Any]]":  # type: ignore[override]
        return OrderedDict(item for call in self.calls for item in call.backward_hooks.items())

    @property
    def read(self) -> bool:
        return all(call.read for call in self.calls)

    @read.setter
    def read(self, value: bool) -> None:
        for call in self.calls:
            call.read = value

    def add_backward_hook(
        self, hook: Callable[[Any], Any], modules: Iterable[nn.Module] = ()
    ) -> RemovableHandle:
        modules = tuple(modules)
        handles = [call.add_backward_hook(hook, modules) for call in self.calls]
        return handles[0]

    def mark_read(self, result: Any, *, past_logits: bool = True) -> None:
        for call in self.calls:
            call.mark_read(result, past_logits=past_logits)

    def is_bypassed_by(self, outputs: Any) -> bool:
        return any(call.is_bypassed_by(outputs) for call in self.calls)


class _OfAll(list["weakref.ref[Any]"]):
    """The lazy logits of joined calls, which a write to those of any of the calls has to know."""

    def __init__(self, calls: list[DeferredCall]) -> None:
        super().__init__()
        self.calls = calls

    def append(self, ref: "weakref.ref[Any]") -> None:
        super().append(ref)
        for call in self.calls:
            call.lazies.append(ref)


@contextmanager
def _requiring_grad(flags: list[tuple[Tensor, bool]]) -> Iterator[None]:
    try:
        for p, flag in flags:
            p.requires_grad_(flag)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(not flag)


def require_unchanged(watched: Iterable[tuple[str, Tensor, int]]) -> None:
    for what, t, version in watched:
        if version_of(t) != version:
            raise RuntimeError(ERR_STALE.format(what=what))
