"""Lazy logits: tensors with the shape, dtype and device of logits and no storage.

In training a fused head returns ``LazyLogits``. Operations between head and loss (scale, cap, cast,
slice, reshape, bias) are recorded (``recorded_ops``, ``row_ops``). Losses and statistics
(``fused_ops``) run the linear form on the hidden states. Any other function materializes the
logits with the head's own forward and the recorded operations, bitwise equal to those of the model
without fusing. Nothing here depends on the code of a model."""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .deferred_call import DeferredCall, version_of
from .expression import Expression, Program, Step
from .fsdp import ddp_backward_hook, fsdp_hook_modules
from .tensor_parallel import (
    HeadShard,
    as_local,
    as_replicas,
    local_arguments,
    redistributed,
    replicas,
)
from .torch_functions import (
    DTYPE_AND_DEVICE,
    GRADIENT_HOOKS,
    GRADIENTS,
    HANDLERS,
    IDENTITY,
    LAYOUT,
    METADATA,
    SHAPE_AND_LAYOUT,
    WRITES,
    T,
    handler_of,
    name_of,
)
from .transform import LogitTransform

ERR_NO_GRADIENT = (
    "{name} needs the gradient of logits, but a loss was computed from them without materializing"
    " them, so they have no gradient; call logits.retain_grad() before the loss, or"
    " lossfuse.unfuse_lm_head(model)"
)
WARN_MATERIALIZED = (
    "{name} materializes the logits of a fused head, shape {rows} times {num_classes} classes,"
    " because it needs all of them or is unknown to lossfuse; docs/trainers.md lists fused ones"
)
ERR_WRITTEN_AFTER_VIEW = (
    "{name} writes to logits that were never materialized, after a view of some of their classes"
    " was read, and the view would not change; read it after the write, clone() it, or"
    " call lossfuse.unfuse_lm_head(model)"
)


class LazyLogits(Tensor):
    """Logits, or an elementwise function of them, without storage; see ``fuse_lm_head``."""

    _call: DeferredCall
    _transform: LogitTransform
    _rows: Tensor
    _class_dim: int
    _leaves: tuple[Tensor, ...]
    # the steps from a row of the head's logits to a row of these, for results that need values,
    # and tensors with one value, or V, per row that the steps read
    _program: Any
    _carried: dict[int, Tensor]
    # the same object for lazy logits that would be views of one memory
    _memory: object
    # set for a view of a few classes, which has no dimension of classes: computes only these
    _compute_view: Callable[[], Tensor] | None
    _view_value: Tensor | None
    _expression: "Expression"
    _node: Any
    _value: Tensor | None
    _value_version: int
    _unwrapped: "LazyLogits | None"

    @staticmethod
    def __new__(
        cls,
        call: DeferredCall,
        transform: LogitTransform,
        rows: Tensor,
        class_dim: int,
        shape: Any = None,
    ) -> "LazyLogits":
        lead = list(rows.shape[:-1] if shape is None else shape)
        if shape is None:
            lead.insert(class_dim, transform.num_classes)
        self: LazyLogits = Tensor._make_wrapper_subclass(
            cls, lead, dtype=transform.dtype, device=rows.device
        )
        self._call, self._transform, self._rows, self._class_dim = call, transform, rows, class_dim
        self._expression, self._value, self._node, self._unwrapped = (
            Expression(call, self),
            None,
            None,
            None,
        )
        self._program, self._carried, self._memory, self._compute_view, self._view_value = (
            None,
            {},
            object(),
            None,
            None,
        )
        call.widest = max(call.widest, transform.num_classes)
        call.lazies.append(weakref.ref(self))
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def _with(
        self,
        *,
        transform: LogitTransform | None = None,
        rows: Tensor | None = None,
        class_dim: int | None = None,
        leaves: tuple[Tensor, ...] | None = None,
        carried: dict[int, Tensor] | None = None,
        copied: bool = False,
        call: DeferredCall | None = None,
    ) -> "LazyLogits":
        """Return lazy logits with some fields replaced; a view of its memory unless ``copied``."""
        if class_dim is None and not self._classes_last:
            class_dim = self._class_dim
        made = lazy_logits(
            self._call if call is None else call,
            transform or self._transform,
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
        return len(self._leaves) > 0 and self._leaves[0] is self._call.hidden

    @property
    def _intercepted(self) -> bool:
        """Return True if an autograd function that bypasses ``__torch_function__`` returned this
        tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not self._node

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._value is not None:
            return repr(self._value)
        return (
            f"LazyLogits({self._transform.kind} of shape {tuple(self.size())},"
            f" dtype={self._transform.dtype}, not materialized)"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Callers that bypass ``__torch_function__``, such as C++, arrive here, below autograd,
        which has recorded the call."""
        lazies = _lazies_of((args, kwargs))
        with _above_autograd():
            if func._schema.is_mutable:
                materialize_all(lazies, func)
            values = {id(x): materialize(x, func).detach() for x in lazies}
        made_args, made_kwargs = tree_map(lambda x: values.get(id(x), x), (args, kwargs or {}))
        result = func(*made_args, **made_kwargs)
        return (
            args[0]
            if func._schema.is_mutable and lazies and result is values.get(id(args[0]))
            else result
        )


class DTensorLogits(LazyLogits):
    """Lazy logits in place of a DTensor, with the methods that tensor parallelism calls on the
    output of a head."""

    @property
    def placements(self) -> tuple[Any, ...]:
        placed = self._transform.placements or ()
        return tuple(p if p.is_replicate() else type(p)(self._class_dim) for p in placed)

    @property
    def device_mesh(self) -> Any:
        return self._shard.mesh

    @property
    def _shard(self) -> HeadShard:
        assert self._call.shard is not None
        return self._call.shard

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
            device_mesh in (None, self._shard.mesh)
            and placed is not None
            and not options
            and self._value is None
        )
        whole = known and all(p.is_replicate() for p in placed or ())
        if whole or (known and self._is_placed(placed or ())):
            placed = placed if whole else self.placements
            made = self._with(transform=replace(self._transform, placements=placed))
            made._expression.record(redistributed, (self, placed), {})
            return made
        value: Any = materialize(self, type(self).redistribute)
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
            self._value is None
            and grad_placements is None
            and all(p.is_replicate() for p in self.placements)
        ):
            made = self._with(transform=replace(self._transform, placements=None))
            made._expression.record(as_local, (self,), {})
            return made
        value: Any = materialize(self, type(self).to_local)
        return value.to_local(grad_placements=grad_placements)

    def full_tensor(self, *, grad_placements: Any = None) -> Any:
        if grad_placements is None:
            return self.redistribute(placements=replicas(self._shard.mesh)).to_local()
        value: Any = materialize(self, type(self).full_tensor)
        return value.full_tensor(grad_placements=grad_placements)


def lazy_logits(
    call: DeferredCall,
    transform: LogitTransform,
    rows: Tensor,
    class_dim: int | None = None,
    *,
    leaves: tuple[Tensor, ...],
    program: Any = None,
    carried: dict[int, Tensor] | None = None,
    loses_gradient: bool = False,
    shape: Any = None,
) -> LazyLogits:
    """Return lazy logits of ``rows``, hidden states (..., D), whose gradients go to ``leaves``.

    Classes are the last dimension, or ``class_dim``. ``loses_gradient``: without leaves, detach the
    result of the program."""
    with torch._C.DisableTorchFunctionSubclass(), call.requires_grad_restored():
        kind = LazyLogits if transform.placements is None else DTensorLogits
        made = _LazyNode.apply(
            lambda: kind(
                call, transform, rows, rows.dim() - 1 if class_dim is None else class_dim, shape
            ),
            *leaves,
        )
        made._node = made.grad_fn
        made._leaves = () if made._node is None else leaves
        made._carried = carried or {}
        detached = loses_gradient and not made._leaves
        made._program = Step(torch.detach, (Program(program),)) if detached else program
    return made


@contextmanager
def _above_autograd() -> Iterator[None]:
    """Enable autograd inside ``__torch_dispatch__``, which runs below it."""
    with ExitStack() as guards:
        for key in (
            torch._C.DispatchKey.AutogradFunctionality,
            torch._C.DispatchKey.ADInplaceOrView,
        ):
            guards.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


class _LazyNode(torch.autograd.Function):
    """The autograd node of lazy logits, for functions that bypass ``__torch_function__``, such as a
    custom ``autograd.Function``."""

    @staticmethod
    def forward(ctx: Any, build: Callable[[], LazyLogits], *leaves: Tensor) -> LazyLogits:
        made = build()
        ctx.expression, ctx.leaves = made._expression, leaves
        # an unused output has gradient None, and wrappers such as DDP pass it on
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[1:]
        if dlogits is None:
            return None, *(None for _ in needs)
        call: DeferredCall = ctx.expression.call
        for hook in call.backward_hooks.values():
            hook(dlogits)
        with call.unsharded():
            # stop at the hidden states: a tied weight is in their graph too, whose backward runs
            # later
            stops = {
                id(t): t.detach().requires_grad_() for t in ctx.leaves if t.grad_fn is not None
            }
            value = ctx.expression.recompute(stops)
            inputs = [
                stops.get(id(t), t) for t, needed in zip(ctx.leaves, needs, strict=True) if needed
            ]
            grads = iter(torch.autograd.grad(value, inputs, dlogits, allow_unused=True))
        return None, *(next(grads) if needed else None for needed in needs)


class _Materialized(torch.autograd.Function):
    """Materialize lazy logits and keep their autograd node, which gets the gradient."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> Tensor:
        return lazy._expression.value().detach()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:
        return dlogits


# a rule of ``_dispatch`` does not apply; operators of torch may return NotImplemented themselves
NEXT_RULE = object()


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function of torch that has lazy logits among its arguments.

    The first rule decides that does not return ``NEXT_RULE``:

    1. ``_answer``: metadata, layouts and new tensors need no values;
    2. ``_move_fsdp_hook``: a backward hook of FSDP2 goes to the call of the head;
    3. ``_read_views``: views of few classes are computed alone;
    4. ``_handle``: the function is recorded, or computed from the hidden states;
    5. ``_materialize_arguments``: the logits are materialized, with a warning.
    """
    for rule in (_answer, _move_fsdp_hook):
        result = rule(func, args, kwargs)
        if result is not NEXT_RULE:
            return result
    args, kwargs = tree_map(
        lambda x: _before_ddp(x) if isinstance(x, LazyLogits) else x, (args, kwargs)
    )
    for rule in (_read_views, _handle):
        result = rule(func, args, kwargs)
        if result is not NEXT_RULE:
            return result
    return _materialize_arguments(func, args, kwargs)


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    if func in METADATA and (args[0]._value is None or func in IDENTITY):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in LAYOUT and args[0]._value is None:
        like = args[0]._expression.like()
        return NEXT_RULE if like is None else func(like, *args[1:], **kwargs)
    if func in DTYPE_AND_DEVICE and isinstance(args[0], LazyLogits) and args[0]._value is None:
        like = torch.empty(0, dtype=args[0]._transform.dtype, device=args[0]._rows.device)
        return func(like, *args[1:], **kwargs)
    if func in SHAPE_AND_LAYOUT and all(x._value is None for x in _lazies_of((args, kwargs))):
        return _of_layout(func, args, kwargs)
    return NEXT_RULE


def _move_fsdp_hook(func: Any, args: Any, kwargs: Any) -> Any:
    if func is not T.register_hook or args[0]._value is not None:
        return NEXT_RULE
    hook = kwargs["hook"] if "hook" in kwargs else args[1]
    modules = fsdp_hook_modules(hook)
    return NEXT_RULE if modules is None else args[0]._call.add_backward_hook(hook, modules)


def _are_lazy(lazies: list[LazyLogits]) -> bool:
    """Return True if no call has been materialized and no tensor has a foreign autograd node."""
    return all(x._call.logits is None and not x._intercepted for x in lazies)


def _read_views(func: Any, args: Any, kwargs: Any) -> Any:
    lazies = _lazies_of((args, kwargs))
    if (
        all(x._compute_view is None for x in lazies)
        or not _are_lazy(lazies)
        or any(x._value is not None for x in lazies)
        or _writes(func, kwargs)
        or func in GRADIENTS
        or func in GRADIENT_HOOKS
    ):
        return NEXT_RULE
    args, kwargs = tree_map(
        lambda x: (
            _value_of_view(x, func)
            if isinstance(x, LazyLogits) and x._compute_view is not None
            else x
        ),
        (args, kwargs),
    )
    return func(*args, **kwargs)


def _handle(func: Any, args: Any, kwargs: Any) -> Any:
    lazies = _lazies_of((args, kwargs))
    if func not in HANDLERS or any(x._compute_view is not None for x in lazies):
        return NEXT_RULE
    given = args, kwargs
    on_mesh = next((x for x in lazies if isinstance(x, DTensorLogits)), None)
    if on_mesh is not None:
        leaves, tree = tree_flatten(given)
        local = local_arguments(on_mesh.device_mesh, leaves)
        if local is None:
            return NEXT_RULE
        args, kwargs = tree_unflatten(local, tree)
    if not _are_lazy(lazies):
        return NEXT_RULE
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    handler = handler_of(func, args, kwargs)
    if handler is None:
        return NEXT_RULE
    with torch._C.DisableTorchFunctionSubclass():
        result = handler(*args, **kwargs)
    if isinstance(result, Written):
        return result.value
    if result is NotImplemented:
        return NEXT_RULE
    if not _lazies_of(result):
        # computed from the hidden states
        call = lazies[0]._call
        call.forward.fuser.report.fused[name_of(func)] += 1
        if on_mesh is not None:
            mesh = on_mesh.device_mesh
            result = tree_map(
                lambda t: as_replicas(t, mesh) if isinstance(t, Tensor) else t, result
            )
        call.mark_read(result)
    elif (
        isinstance(result, LazyLogits)
        and result._expression.func is None
        and all(result is not x for x in lazies)
    ):
        result._expression.record(func, *given)
    return result


def _materialize_arguments(func: Any, args: Any, kwargs: Any) -> Any:
    if func in GRADIENTS:
        _require_on_path(func, args, kwargs)
    if _writes(func, kwargs):
        # tensors computed from these logits before the write must not see it
        materialize_all(_lazies_of((args, kwargs)), func)
    if func in GRADIENT_HOOKS and args[0]._call.read and args[0]._value is None:
        return _watch_gradient(func, args, kwargs)
    args, kwargs = tree_map(
        lambda x: materialize(x, func) if isinstance(x, LazyLogits) else x, (args, kwargs)
    )
    return func(*args, **kwargs)


def _before_ddp(lazy: LazyLogits) -> LazyLogits:
    """Return the logits that DDP wrapped in its autograd function, and call its backward
    from a hook instead."""
    with torch._C.DisableTorchFunctionSubclass():
        node: Any = lazy.grad_fn if lazy._value is None and lazy._node is None else None
    hook = ddp_backward_hook(node)
    if hook is None:
        return lazy
    if lazy._unwrapped is None:
        if lazy._expression.func is not T.clone:
            return lazy
        # the argument of the clone
        inner = lazy._expression.arguments[0][0]
        leaves = next(
            (n.leaves for n, _ in node.next_functions if getattr(n, "expression", None) is inner),
            None,
        )
        if leaves is None:
            return lazy
        with torch.enable_grad():
            lazy._unwrapped = lazy._with(leaves=leaves)
        lazy._unwrapped._expression.record(T.clone, (inner,), {})
        lazy._call.add_backward_hook(hook)
    return lazy._unwrapped


def _require_on_path(func: Any, args: Any, kwargs: Any) -> None:
    """Raise if the graph of the outputs bypasses logits among the inputs of ``autograd.grad``."""
    at = 1 if func is torch.autograd.grad else 5
    inputs = args[at] if len(args) > at else kwargs.get("inputs")
    outputs = args[0] if args else kwargs["outputs" if at == 1 else "tensors"]
    with torch._C.DisableTorchFunctionSubclass():
        if any(x._call.is_bypassed_by(outputs) for x in _lazies_of(inputs)):
            raise RuntimeError(ERR_NO_GRADIENT.format(name=f"torch.autograd.{name_of(func)}"))


def _watch_gradient(func: Any, args: Any, kwargs: Any) -> Any:
    """Register a hook on logits that the loss bypasses, with a warning: DeepSpeed registers one on
    every output of a model. Other functions raise."""
    if func is not T.register_hook:
        raise RuntimeError(ERR_NO_GRADIENT.format(name=name_of(func)))
    report = args[0]._call.forward.fuser.report
    if not report.made["register_hook"]:
        warnings.warn(
            ERR_NO_GRADIENT.format(name="register_hook"),
            UserWarning,
            stacklevel=frames_to_the_user(),
        )
    # later losses are computed from materialized logits, whose gradient calls the hook
    args[0]._node = None
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _of_layout(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function that needs only shape, dtype and layout."""
    device = next(x._rows.device for x in _lazies_of((args, kwargs)))

    def like(x: Any) -> Any:
        if not isinstance(x, LazyLogits):
            return x
        known = x._expression.like()
        return (
            torch.empty(x.shape, dtype=x._transform.dtype, device="meta")
            if known is None
            else known
        )

    args, kwargs = tree_map(like, (args, kwargs))
    if name_of(func).endswith("_like"):
        kwargs = {**kwargs, "device": device if kwargs.get("device") is None else kwargs["device"]}
    return func(*args, **kwargs)


class Written(NamedTuple):
    """The result of a function that wrote to lazy logits and was recorded."""

    value: Any


def written(x: LazyLogits, made: Any, func: Any, args: Any, kwargs: Any, *, value: Any) -> Any:
    """Replace lazy logits by ``made``, the result of the out-of-place ``func``; NotImplemented if
    other tensors view the memory."""
    if (
        not isinstance(made, LazyLogits)
        or made._transform.dtype != x._transform.dtype
        or made.shape != x.shape
    ):
        return NotImplemented
    others = (ref() for ref in x._call.lazies)
    seen = any(
        other is not None and other is not x and other is not made and other._memory is x._memory
        for other in others
    )
    # a write without gradient leaves the gradient as it was
    alike = [id(t) for t in made._leaves] == [id(t) for t in x._leaves] and (
        torch.is_grad_enabled() or not x._leaves
    )
    if seen or not alike or x._unwrapped is not None or x._call.shard is not None or x._call.views:
        return NotImplemented
    expression = Expression(x._call, x)
    expression.record(func, args, kwargs)
    x._expression.lazy = lambda: None
    x._expression = expression
    if x._node is not None:
        x._node.expression = expression
    x._transform, x._rows, x._program, x._carried = (
        made._transform,
        made._rows,
        made._program,
        made._carried,
    )
    return Written(value)


def _value_of_view(x: LazyLogits, func: Any) -> Tensor:
    """Return the values of a view of a few classes, computed without the others. A later write to
    the logits is detected."""
    if x._view_value is None:
        assert x._compute_view is not None
        with torch._C.DisableTorchFunctionSubclass():
            with torch.set_grad_enabled(len(x._leaves) > 0):
                x._view_value = x._compute_view()
            call = x._call
            call.watch("a view of some of their classes", x._view_value.detach())
            call.views.append((x._view_value, _uses(x._view_value)))
            call.forward.fuser.report.fused[name_of(x._expression.func)] += 1
            call.mark_read(x._view_value)
    return x._view_value


def _lazies_of(arguments: Any) -> list[LazyLogits]:
    return [x for x in tree_leaves(arguments) if isinstance(x, LazyLogits)]


def materialize_all(lazies: list[LazyLogits], why: Any) -> None:
    for call in {id(x._call): x._call for x in lazies}.values():
        if call.logits is None and any(_uses(t) > before for t, before in call.views):
            raise RuntimeError(ERR_WRITTEN_AFTER_VIEW.format(name=name_of(why)))
        for ref in call.lazies:
            other = ref()
            if other is not None:
                materialize(other, why)


def _uses(t: Tensor) -> int:
    """Return the number of tensors that share the storage of ``t``."""
    return int(torch._C._storage_Use_Count(t.untyped_storage()._cdata))


def materialize(lazy: LazyLogits, why: Any) -> Tensor:
    """Return the logits that the model computes without fusing; the first call warns."""
    if lazy._value is None:
        call, name = lazy._call, name_of(why)
        with call.unsharded():
            if call.logits is None:
                call.require_unchanged()
                report = call.forward.fuser.report
                if not report.made[name] and not torch.compiler.is_compiling():
                    warnings.warn(
                        WARN_MATERIALIZED.format(
                            name=name,
                            rows=tuple(call.hidden.shape[:-1]),
                            num_classes=lazy._transform.num_classes,
                        ),
                        UserWarning,
                        stacklevel=frames_to_the_user(),
                    )
                report.made[name] += 1
            if lazy._intercepted:
                value = _Materialized.apply(lazy)
                lazy._value, lazy._value_version = value, version_of(value)
            else:
                lazy._expression.value()
    assert lazy._value is not None
    return lazy._value


def frames_to_the_user() -> int:
    """Return the ``stacklevel`` of the nearest caller outside lossfuse and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "lossfuse",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level


def _writes(func: Any, kwargs: Any) -> bool:
    """Return True if a function writes to the memory of logits or returns a handle to it."""
    name = name_of(func)
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    in_place = (
        (name.endswith("_") and not name.endswith("__"))
        or name in WRITES
        or getattr(func, "__name__", "") == "__set__"
    )
    return in_place or kwargs.get("inplace") is True or len(_lazies_of(kwargs.get("out"))) > 0


def of_classes(x: LazyLogits, dim: Any) -> bool:
    """Return True if ``dim`` is the dimension of the classes."""
    return isinstance(dim, int) and dim in (x._class_dim, x._class_dim - x._rows.dim())


def can_be(x: LazyLogits, dtype: torch.dtype) -> bool:
    """Return True if the fused computation is at least as precise as ``dtype``."""
    return dtype.is_floating_point and (dtype != torch.float64 or x._rows.dtype == torch.float64)
