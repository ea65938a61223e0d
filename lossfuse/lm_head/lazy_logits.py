"""Logits that are not made until somebody needs them.

In training a fused head returns ``LazyLogits``: shape, dtype and device of logits, no storage. What
models and trainers do between head and loss (scale, cap, cast, slice, reshape, add a bias) is
recorded by ``recorded_ops``; what reads them as a loss or a statistic (``fused_ops``) runs the
linear form on the hidden states; anything else makes the logits, by the head's own forward and the
recorded operations, bit for bit what they would have been. No model's code is known here."""

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .deferred_call import STALE, Shaping, Source, require_unchanged, version_of
from .fsdp import modules_told, told_by
from .tensor_parallel import Cut, as_replicas, local_arguments, localised, redistributed, replicas

UNSEEN = (
    "{name} asks for the gradient of logits that a loss has been read off without making them, so there is none; ask for it before that"
    " (logits.retain_grad()), or lossfuse.unfuse_lm_head(model)"
)
MADE = (
    "{name} makes the logits of a fused head, shape {rows} times {num_classes} classes, for it needs all of them at once or is not known;"
    " docs/trainers.md lists what runs without logits"
)
WRITTEN = (
    "these logits were never made, and {name} writes to them after some of their classes have been read as a view, which would not see it;"
    " read those afterwards, clone() them, or lossfuse.unfuse_lm_head(model)"
)


class LazyLogits(Tensor):
    """Logits, or something elementwise of them, that are not made; see ``fuse_lm_head``."""

    _source: Source
    _shaping: Shaping
    _rows: Tensor
    _class_dim: int
    _leaves: tuple[Tensor, ...]
    # what is done to each row of the head's logits, for reads that need their values, and what its
    # rows carry beside the hidden states
    _program: Any
    _carried: dict[int, Tensor]
    # shared by those that torch would have view the same memory
    _memory: object
    # of a view of few classes, which has no dimension of classes: what computes it alone
    _take: Callable[[], Tensor] | None
    _taken: Tensor | None
    _expression: "_Expression"
    _node: Any
    _made: Tensor | None
    _made_version: int
    _unwrapped: "LazyLogits | None"

    @staticmethod
    def __new__(
        cls, source: Source, shaping: Shaping, rows: Tensor, class_dim: int, shape: Any = None
    ) -> "LazyLogits":
        lead = list(rows.shape[:-1] if shape is None else shape)
        if shape is None:
            lead.insert(class_dim, shaping.num_classes)
        self: LazyLogits = Tensor._make_wrapper_subclass(
            cls, lead, dtype=shaping.dtype, device=rows.device
        )
        self._source, self._shaping, self._rows, self._class_dim = source, shaping, rows, class_dim
        self._expression, self._made, self._node, self._unwrapped = (
            _Expression(source, self),
            None,
            None,
            None,
        )
        self._program, self._carried, self._memory, self._take, self._taken = (
            None,
            {},
            object(),
            None,
            None,
        )
        source.widest = max(source.widest, shaping.num_classes)
        source.lazies.append(weakref.ref(self))
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def _but(
        self,
        *,
        shaping: Shaping | None = None,
        rows: Tensor | None = None,
        class_dim: int | None = None,
        leaves: tuple[Tensor, ...] | None = None,
        carried: dict[int, Tensor] | None = None,
        copied: bool = False,
        source: Source | None = None,
    ) -> "LazyLogits":
        """The same but for what is given; a view of the same memory unless ``copied``."""
        if class_dim is None and not self._classes_last:
            class_dim = self._class_dim
        made = lazy_logits(
            self._source if source is None else source,
            shaping or self._shaping,
            self._rows if rows is None else rows,
            class_dim,
            leaves=self._leaves if leaves is None else leaves,
            program=self._program,
            carried=self._carried if carried is None else carried,
            loses_gradient=len(self._leaves) > 0,
        )
        if not copied:
            made._memory = self._memory
        return made

    @property
    def _classes_last(self) -> bool:
        return self._class_dim == self._rows.dim() - 1

    @property
    def _of_head(self) -> bool:
        """Return True if gradients reach the head and its input; False once detached."""
        return len(self._leaves) > 0 and self._leaves[0] is self._source.hidden

    @property
    def _intercepted(self) -> bool:
        """Return True if an autograd function that bypasses ``__torch_function__`` stands between
        these and their logits."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not self._node

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._made is not None:
            return repr(self._made)
        return f"LazyLogits({self._shaping.kind} of shape {tuple(self.size())}, dtype={self._shaping.dtype}, not made)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _of_lazy(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Callers that bypass ``__torch_function__``, such as C++, arrive here, below autograd,
        which has recorded the call."""
        lazies = _lazies_of((args, kwargs))
        with _above_autograd():
            if func._schema.is_mutable:
                _make_all(lazies, func)
            values = {id(x): _made(x, func).detach() for x in lazies}
        made_args, made_kwargs = tree_map(lambda x: values.get(id(x), x), (args, kwargs or {}))
        result = func(*made_args, **made_kwargs)
        return (
            args[0]
            if func._schema.is_mutable and lazies and result is values.get(id(args[0]))
            else result
        )


class PlacedLogits(LazyLogits):
    """Lazy logits in place of a DTensor; of what a DTensor can, what tensor parallelism does to the
    output of a head."""

    @property
    def placements(self) -> tuple[Any, ...]:
        placed = self._shaping.placements or ()
        return tuple(p if p.is_replicate() else type(p)(self._class_dim) for p in placed)

    @property
    def device_mesh(self) -> Any:
        return self._cut.mesh

    @property
    def _cut(self) -> Cut:
        assert self._source.cut is not None
        return self._source.cut

    def redistribute(
        self,
        device_mesh: Any = None,
        placements: Any = None,
        *,
        async_op: bool = False,
        **options: Any,
    ) -> Any:
        placed = None if placements is None else tuple(placements)
        known = (
            device_mesh in (None, self._cut.mesh)
            and placed is not None
            and not options
            and self._made is None
        )
        whole = known and all(p.is_replicate() for p in placed or ())
        if whole or (known and self._is_placed(placed or ())):
            placed = placed if whole else self.placements
            made = self._but(shaping=replace(self._shaping, placements=placed))
            made._expression.is_call(redistributed, (self, placed), {})
            return made
        value: Any = _made(self, type(self).redistribute)
        return value.redistribute(device_mesh, placements, async_op=async_op, **options)

    def _is_placed(self, placements: tuple[Any, ...]) -> bool:
        dims = self._rows.dim()
        pairs = zip(placements, self.placements, strict=False)
        same = (
            p == mine or (type(p) is type(mine) and p.is_shard() and p.dim % dims == mine.dim)
            for p, mine in pairs
        )
        return len(placements) == len(self.placements) and all(same)

    def to_local(self, *, grad_placements: Any = None) -> Any:
        if (
            self._made is None
            and grad_placements is None
            and all(p.is_replicate() for p in self.placements)
        ):
            made = self._but(shaping=replace(self._shaping, placements=None))
            made._expression.is_call(localised, (self,), {})
            return made
        value: Any = _made(self, type(self).to_local)
        return value.to_local(grad_placements=grad_placements)

    def full_tensor(self, *, grad_placements: Any = None) -> Any:
        if grad_placements is None:
            return self.redistribute(placements=replicas(self._cut.mesh)).to_local()
        value: Any = _made(self, type(self).full_tensor)
        return value.full_tensor(grad_placements=grad_placements)


def lazy_logits(
    source: Source,
    shaping: Shaping,
    rows: Tensor,
    class_dim: int | None = None,
    *,
    leaves: tuple[Tensor, ...],
    program: Any = None,
    carried: dict[int, Tensor] | None = None,
    loses_gradient: bool = False,
    shape: Any = None,
) -> LazyLogits:
    """Lazy logits of ``rows`` (..., D), hidden states; classes are last, or in ``class_dim``. Their
    gradients go to ``leaves``.

    ``loses_gradient``, the program has a gradient that these do not have if they have no leaves.
    """
    with torch._C.DisableTorchFunctionSubclass(), source.trained_as_called():
        kind = LazyLogits if shaping.placements is None else PlacedLogits
        made = _Unmade.apply(
            lambda: kind(
                source, shaping, rows, rows.dim() - 1 if class_dim is None else class_dim, shape
            ),
            *leaves,
        )
        made._node = made.grad_fn
        made._leaves = () if made._node is None else leaves
        made._carried = carried or {}
        detached = loses_gradient and not made._leaves
        made._program = Step(torch.detach, (Program(program),)) if detached else program
    return made


# --- what is done to a chunk of rows, and how it is run: chunked_reads


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


@contextmanager
def _above_autograd() -> Iterator[None]:
    """Inside ``__torch_dispatch__``, where autograd is over, for what has a graph of its own."""
    with ExitStack() as guards:
        for key in (
            torch._C.DispatchKey.AutogradFunctionality,
            torch._C.DispatchKey.ADInplaceOrView,
        ):
            guards.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


class _Unmade(torch.autograd.Function):
    """The autograd node of deferred logits, for readers that bypass ``__torch_function__``, such as
    a custom ``autograd.Function``."""

    @staticmethod
    def forward(ctx: Any, build: Callable[[], LazyLogits], *leaves: Tensor) -> LazyLogits:
        made = build()
        ctx.expression, ctx.leaves = made._expression, leaves
        # a wrapper that passes on what an unused output has not got
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[1:]
        if dlogits is None:
            return None, *(None for _ in needs)
        source: Source = ctx.expression.source
        for hook in source.begins.values():
            hook(dlogits)
        with source.present():
            # a tied weight is behind the hidden states too, whose own backward comes later
            cut = {id(t): t.detach().requires_grad_() for t in ctx.leaves if t.grad_fn is not None}
            value = ctx.expression.again(cut)
            wanted = [
                cut.get(id(t), t) for t, needed in zip(ctx.leaves, needs, strict=True) if needed
            ]
            grads = iter(torch.autograd.grad(value, wanted, dlogits, allow_unused=True))
        return None, *(next(grads) if needed else None for needed in needs)


class _Value(torch.autograd.Function):
    """Lazy logits -> theirs, where autograd's way back must be the lazy ones'."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> Tensor:
        return lazy._expression.value().detach()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:
        return dlogits


def _of_lazy(func: Any, args: Any, kwargs: Any) -> Any:
    if func in METADATA and (args[0]._made is None or func in IDENTITY):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in LAYOUT and args[0]._made is None:
        like = args[0]._expression.like()
        if like is not None:
            return func(like, *args[1:], **kwargs)
    if func in OF_KIND and isinstance(args[0], LazyLogits) and args[0]._made is None:
        return func(
            torch.empty(0, dtype=args[0]._shaping.dtype, device=args[0]._rows.device),
            *args[1:],
            **kwargs,
        )
    if func in OF_LAYOUT and all(x._made is None for x in _lazies_of((args, kwargs))):
        return _of_layout(func, args, kwargs)
    if func is T.register_hook and args[0]._made is None:
        hook = kwargs["hook"] if "hook" in kwargs else args[1]
        modules = modules_told(hook)
        if modules is not None:
            return args[0]._source.tell(hook, modules)
    args, kwargs = tree_map(
        lambda x: _past_wrapper(x) if isinstance(x, LazyLogits) else x, (args, kwargs)
    )
    lazies = _lazies_of((args, kwargs))
    known = HANDLERS.get(func)
    placed = next((x for x in lazies if isinstance(x, PlacedLogits)), None)
    given = args, kwargs
    if known is not None and placed is not None:
        leaves, tree = tree_flatten(given)
        local = local_arguments(placed.device_mesh, leaves)
        known = None if local is None else known
        args, kwargs = given if local is None else tree_unflatten(local, tree)
    lazy_still = all(x._source.made is None and not x._intercepted for x in lazies)
    if any(x._take is not None for x in lazies):
        known = None
        if (
            lazy_still
            and all(x._made is None for x in lazies)
            and not _writes(func, kwargs)
            and func not in (*GRADIENTS, *WATCHES_GRADIENT)
        ):
            args, kwargs = tree_map(
                lambda x: (
                    _taken(x, func) if isinstance(x, LazyLogits) and x._take is not None else x
                ),
                given,
            )
            return func(*args, **kwargs)
    if known is not None and lazy_still:
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        result: Any = NotImplemented
        handler, takes = known
        if _binds(takes, args, kwargs):
            with torch._C.DisableTorchFunctionSubclass():
                result = handler(*args, **kwargs)
        if isinstance(result, Written):
            return result.value
        if result is not NotImplemented:
            made = _lazies_of(result)
            if not made:
                lazies[0]._source.forward.finder.report.fused[_name(func)] += 1
                if placed is not None:
                    mesh = placed.device_mesh
                    result = tree_map(
                        lambda t: as_replicas(t, mesh) if isinstance(t, Tensor) else t, result
                    )
                lazies[0]._source.is_read(result)
            elif (
                isinstance(result, LazyLogits)
                and result._expression.func is None
                and all(result is not x for x in lazies)
            ):
                result._expression.is_call(func, *given)
            return result
    args, kwargs = given
    if func in GRADIENTS:
        _require_on_the_way(func, args, kwargs)
    if _writes(func, kwargs):
        # whatever else has been made of these logits was made of what they were
        _make_all(lazies, func)
    if func in WATCHES_GRADIENT and args[0]._source.read and args[0]._made is None:
        return _watch_gradient(func, args, kwargs)
    args, kwargs = tree_map(
        lambda x: _made(x, func) if isinstance(x, LazyLogits) else x, (args, kwargs)
    )
    return func(*args, **kwargs)


def _past_wrapper(lazy: LazyLogits) -> LazyLogits:
    """The same logits before DDP put its function around them, which is told of their backward
    instead."""
    with torch._C.DisableTorchFunctionSubclass():
        node: Any = lazy.grad_fn if lazy._made is None and lazy._node is None else None
    tell = told_by(node)
    if tell is None:
        return lazy
    if lazy._unwrapped is None:
        if lazy._expression.func is not T.clone:
            return lazy
        # of what it was given
        inner = lazy._expression.arguments[0][0]
        leaves = next(
            (n.leaves for n, _ in node.next_functions if getattr(n, "expression", None) is inner),
            None,
        )
        if leaves is None:
            return lazy
        with torch.enable_grad():
            lazy._unwrapped = lazy._but(leaves=leaves)
        lazy._unwrapped._expression.is_call(T.clone, (inner,), {})
        lazy._source.tell(tell)
    return lazy._unwrapped


def _require_on_the_way(func: Any, args: Any, kwargs: Any) -> None:
    """Raise if a gradient is asked for with respect to logits that it goes past."""
    at = 1 if func is torch.autograd.grad else 5
    inputs = args[at] if len(args) > at else kwargs.get("inputs")
    outputs = args[0] if args else kwargs["outputs" if at == 1 else "tensors"]
    with torch._C.DisableTorchFunctionSubclass():
        if any(x._source.is_passed(outputs) for x in _lazies_of(inputs)):
            raise RuntimeError(UNSEEN.format(name=f"torch.autograd.{_name(func)}"))


def _watch_gradient(func: Any, args: Any, kwargs: Any) -> Any:
    """The loss goes past logits that have been read; DeepSpeed has a hook on every output of a
    model all the same."""
    if func is not T.register_hook:
        raise RuntimeError(UNSEEN.format(name=_name(func)))
    report = args[0]._source.forward.finder.report
    if not report.made["register_hook"]:
        warnings.warn(
            UNSEEN.format(name="register_hook"), UserWarning, stacklevel=frames_to_the_user()
        )
    # from now on whoever reads these passes the hook
    args[0]._node = None
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _of_layout(func: Any, args: Any, kwargs: Any) -> Any:
    """A function for which shapes, dtypes and layouts will do, or that makes a tensor of the
    same."""
    device = next(x._rows.device for x in _lazies_of((args, kwargs)))

    def like(x: Any) -> Any:
        if not isinstance(x, LazyLogits):
            return x
        known = x._expression.like()
        return (
            torch.empty(x.shape, dtype=x._shaping.dtype, device="meta") if known is None else known
        )

    args, kwargs = tree_map(like, (args, kwargs))
    if _name(func).endswith("_like"):
        kwargs = {**kwargs, "device": device if kwargs.get("device") is None else kwargs["device"]}
    return func(*args, **kwargs)


class Written(NamedTuple):
    """The result of a function that has written to lazy logits, by what was recorded."""

    value: Any


def written(x: LazyLogits, made: Any, func: Any, args: Any, kwargs: Any, *, value: Any) -> Any:
    """Lazy logits become ``made``, the result of ``func``, which writes nothing; NotImplemented
    where others view the memory."""
    if (
        not isinstance(made, LazyLogits)
        or made._shaping.dtype != x._shaping.dtype
        or made.shape != x.shape
    ):
        return NotImplemented
    others = (ref() for ref in x._source.lazies)
    seen = any(
        other is not None and other is not x and other is not made and other._memory is x._memory
        for other in others
    )
    # a write without gradient leaves the gradient as it was
    alike = [id(t) for t in made._leaves] == [id(t) for t in x._leaves] and (
        torch.is_grad_enabled() or not x._leaves
    )
    if (
        seen
        or not alike
        or x._unwrapped is not None
        or x._source.cut is not None
        or x._source.taken
    ):
        return NotImplemented
    expression = _Expression(x._source, x)
    expression.is_call(func, args, kwargs)
    x._expression.lazy = lambda: None
    x._expression = expression
    if x._node is not None:
        x._node.expression = expression
    x._shaping, x._rows, x._program, x._carried = (
        made._shaping,
        made._rows,
        made._program,
        made._carried,
    )
    return Written(value)


def _taken(x: LazyLogits, func: Any) -> Tensor:
    """The values of a view of few classes, computed alone; who writes to them is found out."""
    if x._taken is None:
        assert x._take is not None
        with torch._C.DisableTorchFunctionSubclass():
            with torch.set_grad_enabled(len(x._leaves) > 0):
                x._taken = x._take()
            source = x._source
            source.watch("a view of some of their classes", x._taken.detach())
            source.taken.append((x._taken, _uses(x._taken)))
            source.forward.finder.report.fused[_name(x._expression.func)] += 1
            source.is_read(x._taken)
    return x._taken


def _binds(takes: inspect.Signature, args: Any, kwargs: Any) -> bool:
    try:
        takes.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _lazies_of(arguments: Any) -> list[LazyLogits]:
    return [x for x in tree_leaves(arguments) if isinstance(x, LazyLogits)]


def _make_all(lazies: list[LazyLogits], why: Any) -> None:
    for source in {id(x._source): x._source for x in lazies}.values():
        if source.made is None and any(_uses(t) > before for t, before in source.taken):
            raise RuntimeError(WRITTEN.format(name=_name(why)))
        for ref in source.lazies:
            other = ref()
            if other is not None:
                _made(other, why)


def _uses(t: Tensor) -> int:
    """How many tensors view the memory of one."""
    return int(torch._C._storage_Use_Count(t.untyped_storage()._cdata))


class _Expression:
    """How a tensor is made of the logits of a source: a call among whose arguments are expressions;
    none for the logits themselves."""

    def __init__(self, source: Source, lazy: LazyLogits) -> None:
        self.source = source
        self.lazy: Callable[[], LazyLogits | None] = weakref.ref(lazy)
        self.num_classes, self.dtype = lazy._shaping.num_classes, lazy._shaping.dtype
        self.func: Any = None
        self.arguments: Any = ()
        self.grad, self.autocast = True, source.autocast
        self.watched: list[tuple[str, Tensor, int]] = []

    def is_call(self, func: Any, args: Any, kwargs: Any) -> None:
        kind = self.source.hidden.device.type
        self.func = func
        self.arguments = tree_map(
            lambda x: x._expression if isinstance(x, LazyLogits) else x, (args, kwargs)
        )
        self.grad = torch.is_grad_enabled()
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        tensors = (t for t in tree_leaves(self.arguments) if isinstance(t, Tensor))
        self.watched = [(f"an argument of {_name(func)}", t, version_of(t)) for t in tensors]

    def value(self, *, inner: bool = False) -> Tensor:
        """``inner``, as an argument of a call that was recorded, it must be what it was then."""
        lazy = self.lazy()
        if lazy is not None and lazy._made is not None:
            if inner and version_of(lazy._made) != lazy._made_version:
                raise RuntimeError(STALE.format(what="what was made of others like them"))
            return lazy._made
        made = (
            self.source.make()
            if self.func is None
            else self._called(lambda x: x.value(inner=True) if isinstance(x, _Expression) else x)
        )
        if lazy is not None:
            lazy._made, lazy._made_version = made, version_of(made)
        return made

    def again(self, cut: dict[int, Tensor]) -> Tensor:
        """With a graph of its own: who has used what was made may have freed its. It ends at
        ``cut``, by the tensors they stand for."""
        lazy = self.lazy()
        if (
            lazy is not None
            and lazy._made is not None
            and version_of(lazy._made) != lazy._made_version
        ):
            return lazy._made
        if self.func is None:
            return self.source.original(cut.get(id(self.source.hidden)))
        return self._called(
            lambda x: x.again(cut) if isinstance(x, _Expression) else cut.get(id(x), x)
        )

    def _called(self, value_of: Callable[[Any], Any]) -> Tensor:
        require_unchanged(self.watched)
        args, kwargs = tree_map(value_of, self.arguments)
        kind = self.source.hidden.device.type
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
                *self.source.hidden.shape[:-1], self.num_classes, dtype=self.dtype, device="meta"
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
        if isinstance(x, _Expression):
            like = x.like()
            if like is None:
                raise NotImplementedError
            return like
        return torch.empty_like(x, device="meta") if isinstance(x, Tensor) and x.dim() else x


def _made(lazy: LazyLogits, why: Any) -> Tensor:
    """Materialize the logits that the model would have here."""
    if lazy._made is None:
        source, name = lazy._source, _name(why)
        with source.present():
            if source.made is None:
                source.require_unchanged()
                report = source.forward.finder.report
                if not report.made[name] and not torch.compiler.is_compiling():
                    warnings.warn(
                        MADE.format(
                            name=name,
                            rows=tuple(source.hidden.shape[:-1]),
                            num_classes=lazy._shaping.num_classes,
                        ),
                        UserWarning,
                        stacklevel=frames_to_the_user(),
                    )
                report.made[name] += 1
            if lazy._intercepted:
                value = _Value.apply(lazy)
                lazy._made, lazy._made_version = value, version_of(value)
            else:
                lazy._expression.value()
    assert lazy._made is not None
    return lazy._made


def frames_to_the_user() -> int:
    """The ``stacklevel`` at which a function that warns names the nearest line that is neither of
    this package nor of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "lossfuse",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    # of an attribute
    return (
        getattr(getattr(func, "__self__", None), "__name__", name)
        if name in ("__get__", "__set__")
        else name
    )


def _writes(func: Any, kwargs: Any) -> bool:
    """Return True if a function writes to the memory of logits or returns a handle to it."""
    name = _name(func)
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    in_place = (
        (name.endswith("_") and not name.endswith("__"))
        or name in WRITE
        or getattr(func, "__name__", "") == "__set__"
    )
    return in_place or kwargs.get("inplace") is True or len(_lazies_of(kwargs.get("out"))) > 0


T = Tensor
# what is known of logits that are not made
IDENTITY = {T.__hash__}
_ATTRIBUTES = (
    *(
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "itemsize",
        "nbytes",
        "requires_grad",
        "is_leaf",
        "grad_fn",
        "grad",
        "retains_grad",
    ),
    *(
        "_version",
        "_base",
        "output_nr",
        "name",
        "names",
        "is_cuda",
        "is_cpu",
        "is_mps",
        "is_xpu",
        "is_xla",
        "is_mtia",
        "is_ipu",
        "is_maia",
    ),
    *(
        "is_vulkan",
        "is_meta",
        "is_nested",
        "is_quantized",
        "is_sparse",
        "is_sparse_csr",
        "is_mkldnn",
    ),
)
_METHODS = (
    *(
        "size",
        "dim",
        "numel",
        "nelement",
        "ndimension",
        "element_size",
        "get_device",
        "__len__",
        "is_floating_point",
        "is_complex",
    ),
    *("is_inference", "has_names"),
)
METADATA = {
    # torch before 2.13 has names, and which devices there are changes
    *(getattr(T, name).__get__ for name in _ATTRIBUTES if hasattr(T, name)),
    *(getattr(owner, name) for name in _METHODS for owner in (T, torch) if hasattr(owner, name)),
    *IDENTITY,
}
# what follows from how they would be made
LAYOUT = {T.stride, T.is_contiguous, T.storage_offset, T._is_view, T.dim_order}
# of whose first argument only dtype and device matter
OF_KIND = {
    *(
        getattr(T, f"new_{name}")
        for name in ("zeros", "ones", "empty", "full", "tensor", "empty_strided")
    ),
    *(
        T.is_conj,
        T.is_neg,
        T.is_signed,
        T.is_shared,
        T.is_pinned,
        torch.is_conj,
        torch.is_neg,
        torch.is_signed,
    ),
}
# for which everything but values is enough
OF_LAYOUT = {
    *(
        getattr(torch, f"{name}_like")
        for name in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")
    ),
    *(torch.result_type, torch.is_same_size, T.is_same_size),
}
GRADIENTS = {torch.autograd.grad, torch.autograd.backward}
WATCHES_GRADIENT = {T.register_hook, T.retain_grad, T.register_post_accumulate_grad_hook}
# beside names that end with an underscore
WRITE = {
    *(
        f"__i{name}__"
        for name in (
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "and",
            "or",
            "xor",
            "lshift",
            "rshift",
        )
    ),
    *(
        "__setitem__",
        "__array__",
        "__array_interface__",
        "__cuda_array_interface__",
        "__dlpack__",
        "data",
        "data_ptr",
        "numpy",
    ),
    *("storage", "untyped_storage", "_typed_storage"),
}
# functions of torch -> what they do with logits that are not made (lazy ones again, a result, or
# NotImplemented), and what that takes
HANDLERS: dict[Any, tuple[Callable[..., Any], inspect.Signature]] = {}


def handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        takes = inspect.signature(handler)
        for function in functions:
            HANDLERS[function] = handler, takes
        return handler

    return register


def of_classes(x: LazyLogits, dim: Any) -> bool:
    """Return True if ``dim`` is the dimension of the classes."""
    return isinstance(dim, int) and dim in (x._class_dim, x._class_dim - x._rows.dim())


def can_be(x: LazyLogits, dtype: torch.dtype) -> bool:
    """Return True if the fused computation is at least as precise as ``dtype``."""
    return dtype.is_floating_point and (dtype != torch.float64 or x._rows.dtype == torch.float64)
