"""The deferred call of a head: its inputs with their versions, and the shape of its logits.

The logits are materialized later by the head's own forward, or an error names the input that has
changed since the call."""

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
    "these logits were never materialized, and {what} has been changed since the forward; use the"
    " logits, such as argmax for an accuracy, before the change (before optimizer.step()), or call"
    " lossfuse.unfuse_lm_head(model)"
)


READS = "reads of fused logits"


@dataclass
class LogitsReport:
    """Counts of operations on the logits of a fused head, by name.

    ``fused`` counts losses and statistics that ran without logits. ``made`` counts operations that
    materialized them, and "forward" for calls of the head that were not deferred. ``calls`` is the
    number of calls of the head, in any mode."""

    fused: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    calls: int = field(default=0, repr=False, compare=False)


class Fuser(Protocol):
    """The hook that finds the head of a model before each forward."""

    report: LogitsReport
    options: LinearOptions
    row_wise: bool
    evaluation: bool
    closed: bool

    @property
    def outermost(self) -> nn.Module:
        """The outermost model, whose wrappers may own the head's parameters."""

    def close(self) -> None:
        """Restore the head's forward and remove all hooks."""

    def is_current_head(self, head: nn.Module) -> bool:
        """Return True if ``head`` is still the model's output head."""

    def fuse_current_head(self) -> None:
        """Fuse the head that the model has now."""

    def report_not_deferred(self, why: str) -> None:
        """Count a call of the head that was not deferred, and warn once with the reason."""


class HeadForward:
    """Base of the ``forward`` of a fused head; stores the original forward."""

    def __init__(
        self, head: nn.Module, instance_forward: Callable[..., Tensor] | None, fuser: Fuser
    ) -> None:
        self.head = head
        self.instance_forward = instance_forward
        self.fuser = fuser
        # number of classes and dtype of the logits of a head that is not linear, by dtype,
        # autocast, device and parameter shapes; valid while the flags of the head are shapes_flags
        self.shapes: dict[Any, tuple[int, torch.dtype]] = {}
        self.shapes_flags: Any = None
        self.sharded_params = ShardedParams()

    def original(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        logits: Tensor = type(self.head).forward(self.head, *args, **kwargs)
        return logits

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
        """Give ``head`` its original forward back."""
        # in one assignment: the head has a forward at any time
        for slot in SLOTS:
            if head.__dict__.get(slot) is not self:
                continue
            if self.instance_forward is not None:
                head.__dict__[slot] = self.instance_forward
            elif slot == "forward":
                del head.__dict__[slot]
            else:
                head.__dict__[slot] = types.MethodType(type(head).forward, head)


# attributes of a module with a forward of its own; accelerate's hooks store the original in the
# second
SLOTS = ("forward", "_old_forward")
PLAIN = (Tensor, nn.Parameter, type(None))


def fused_forward(head: nn.Module) -> HeadForward | None:
    """Return the fused ``forward`` of a head, or None if the head is not fused."""
    return next(
        (f for slot in SLOTS if isinstance(f := head.__dict__.get(slot), HeadForward)), None
    )


def version_of(t: Tensor) -> int:
    # tensors of inference mode have none
    return 0 if t.is_inference() else t._version


class DeferredCall:
    """A postponed call of a head, with the versions of all tensors that it reads."""

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
        # autocast leaves float64 unchanged
        casts = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
        self.autocast = torch.get_autocast_dtype(kind) if casts else None
        self.grad = torch.is_grad_enabled()
        self.parameters = tuple(head.parameters())
        self.trained = tuple(p.requires_grad for p in self.parameters)
        self.watched: list[tuple[str, Tensor, int]] = [
            ("a parameter of the head", p, version_of(p)) for p in self.parameters
        ]
        self.watch("the hidden states", hidden)
        # a linear head depends only on weight and bias; any other on all attributes and buffers
        self.state = None if self.linear else HeadState(head, draws=forward.fuser.row_wise)
        if self.state is not None:
            for what, t in self.state.tensors():
                self.watch(what, t)
        # FSDP1 puts views in place of parameters
        operands = [t for t in (*self.parameters, self.weight, self.bias) if t is not None]
        self.needed = [(t, t.shape) for t in operands]
        self.sharded_params: list[ShardedParam] = []
        self.watch_sharded(forward.sharded_params(self.parameters, forward.fuser.outermost))
        # hooks that run when the backward of a result begins, and the results
        self.backward_hooks: OrderedDict[int, Callable[[Any], Any]] = OrderedDict()
        self.results: list[weakref.ref[Tensor]] = []
        # marks autograd nodes of results that were computed from these logits
        self.mark = object()
        # the materialized logits and their version
        self.logits: Tensor | None = None
        self.logits_version = 0
        # True if the gradient of a result bypasses the logits
        self.read = False
        self.lazies: list[weakref.ref[Any]] = []
        # values of views of a few classes, with the number of tensors that share their storage;
        # the largest number of classes of these lazy logits
        self.views: list[tuple[Tensor, int]] = []
        self.widest = 0
        # results of logsumexp with version, rows and transform: subtracting one from the logits
        # gives log_softmax
        self.lses: list[tuple[weakref.ref[Tensor], int, Tensor, LogitTransform]] = []

    def watch(self, what: str, t: Tensor) -> None:
        self.watched.append((what, t, version_of(t)))

    def watch_sharded(self, found: list[ShardedParam]) -> None:
        """Also watch the sharded parameters, which the optimizer updates in place of the head's."""
        self.sharded_params += found
        for one in found:
            self.watch("a parameter of the head", one.sharded)

    def unsharded(self) -> AbstractContextManager[None]:
        return unsharded(self.sharded_params, self.needed)

    def add_backward_hook(
        self, hook: Callable[[Any], Any], modules: Iterable[nn.Module] = ()
    ) -> RemovableHandle:
        """Call ``hook`` when the backward of a tensor computed from these logits begins."""
        handle = RemovableHandle(self.backward_hooks)
        self.backward_hooks[handle.id] = hook
        self.watch_sharded(
            find_sharded_params(
                tuple(
                    p
                    for p in self.parameters
                    if all(p is not one.parameter for one in self.sharded_params)
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
        """Register the backward hooks on ``result``; ``past_logits``: its gradient bypasses the
        logits."""
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
        """Raise if an input of the logits has changed; with ``calls_head``, also if the head has
        other parameters."""
        require_unchanged(self.watched)
        if not (self.shard is not None or not self.linear if calls_head is None else calls_head):
            return
        # torch.func.functional_call replaces parameters during a call
        if any(
            mine is not now
            for mine, now in zip_longest(self.parameters, self.forward.head.parameters())
        ):
            raise RuntimeError(ERR_STALE.format(what="a parameter of the head"))
        what = None if self.state is None else self.state.changed(self.forward.head)
        if what is not None:
            raise RuntimeError(ERR_STALE.format(what=what))

    def run(self, hidden: Tensor) -> Tensor:
        """Run the head on ``hidden`` in the state of the call."""
        if self.linear and self.shard is None:
            assert self.weight is not None
            return nn.functional.linear(hidden, self.weight, self.bias)
        # parameters may be subclasses with __torch_function__, which is disabled while a handler
        # of lazy logits runs
        state = nullcontext() if self.state is None else self.state.restored()
        with torch._C._EnableTorchFunction(), self.requires_grad_restored(), state:
            return self.forward.original(hidden)

    def random(self) -> AbstractContextManager[None]:
        return nullcontext() if self.state is None else self.state.random(self.hidden.device)

    @contextmanager
    def call_context(self) -> Iterator[None]:
        kind = self.hidden.device.type
        # torch 2.8 caches a parameter that was cast under no_grad, and later casts get no gradient
        with (
            self.requires_grad_restored(),
            torch.autocast(
                kind, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
            ),
        ):
            yield

    def requires_grad_restored(self) -> AbstractContextManager[None]:
        """Restore ``requires_grad`` of the parameters as at the call: PEFT changes it when it
        switches adapters."""
        other: list[tuple[Tensor, bool]] = [
            (p, was)
            for p, was in zip(self.parameters, self.trained, strict=True)
            if p.requires_grad != was and p.is_leaf
        ]
        return _requiring_grad(other) if other else nullcontext()

    def shape_of_logits(self) -> tuple[int, torch.dtype] | None:
        """Return (number of classes, dtype), or None if the head must run to determine them."""
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
        if self.forward.shapes_flags != flags:
            self.forward.shapes, self.forward.shapes_flags = {}, flags
        if key not in self.forward.shapes:
            if self.hidden.numel() == 0:
                return None
            devices = [] if device.type == "cpu" else [device]
            with (
                torch.no_grad(),
                self.call_context(),
                torch.random.fork_rng(devices, device_type=device.type),
            ):
                row = self.forward.original(self.hidden.reshape(-1, self.hidden.shape[-1])[:1])
            if not (isinstance(row, Tensor) and row.dim() == 2 and len(row) == 1):
                return None
            self.forward.shapes[key] = row.shape[1], row.dtype
        return self.forward.shapes[key]

    def original(self, hidden: Tensor | None = None) -> Tensor:
        self.require_unchanged()
        with torch.set_grad_enabled(self.grad), self.call_context(), self.random():
            return self.run(self.hidden if hidden is None else hidden)

    def materialize(self) -> Tensor:
        if self.logits is None:
            self.logits = self.original()
            self.logits_version = version_of(self.logits)
            self.mark_read(self.logits, past_logits=False)
        elif version_of(self.logits) != self.logits_version:
            raise RuntimeError(ERR_STALE.format(what="a tensor computed from them"))
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

    A result of the joined rows is a result of every call. Materializing runs each call on its
    own."""

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
        self.autocast, self.grad, self.needed, self.sharded_params = (
            first.autocast,
            first.grad,
            first.needed,
            first.sharded_params,
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
    """List of lazy logits that appends to the lists of all joined calls, so that a write to the
    logits of one call finds them."""

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
