"""Logits that are computed a chunk of rows at a time, for functions that need their values.

What is done to lazy logits between the head and a read is also recorded as a program: calls of
torch that keep each row to itself. A read runs the head, the program and the function that reads on
a chunk of rows, and again in the backward, so that only one chunk is V wide."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..ops.chunk_plan import chunk_rows
from .deferred_call import DeferredCall, require_unchanged, version_of
from .expression import Carried, Program, Step
from .lazy_logits import LazyLogits, lazy_logits
from .transform import LogitTransform

_keys = itertools.count()


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors are views of the same memory with the same layout."""
    same = (
        a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
    )
    return a is b or (same and a.data_ptr() == b.data_ptr() and a.numel() > 0)


def together(x: LazyLogits, other: LazyLogits) -> bool:
    """Return True if two lazy tensors have the same rows of the same call of a head."""
    if (
        x._call is not other._call
        or x._class_dim != other._class_dim
        or not same_memory(x._rows, other._rows)
    ):
        return False
    return all(
        same_memory(t, other._carried[key])
        for key, t in x._carried.items()
        if key in other._carried
    )


def joined_leaves(lazies: Sequence[LazyLogits]) -> tuple[Tensor, ...]:
    """Of all of them, those of the head first."""
    leaves: dict[int, Tensor] = {}
    for x in sorted(lazies, key=lambda x: not x._of_head):
        leaves.update({id(t): t for t in x._leaves})
    return tuple(leaves.values())


def step(
    func: Callable[..., Any], *args: Any, transform: LogitTransform | None = None, **kwargs: Any
) -> Any:
    """Record ``func``, which works row by row and keeps the classes last, on lazy logits;
    ``transform`` if the linear form knows it.

    NotImplemented if an argument does not go along with the rows.
    """
    leaves, tree = tree_flatten((args, kwargs))
    lazies = [a for a in leaves if isinstance(a, LazyLogits)]
    x = lazies[0]
    if any(not together(x, other) for other in lazies[1:]) or (
        transform is None and x._call.shard is not None
    ):
        return NotImplemented
    carried = {key: t for other in lazies for key, t in other._carried.items()}
    ends, watched = list(joined_leaves(lazies)), []
    inside: list[Any] = []
    like: list[Any] = []
    autocast = _autocast(x)
    for a in leaves:
        if isinstance(a, LazyLogits):
            inside.append(Program(a._program))
            like.append((2, a._transform.num_classes, a._transform.dtype))
            continue
        if not isinstance(a, Tensor):
            inside.append(a)
            like.append(a)
            continue
        fitted = _fitted(a, x)
        if fitted is None:
            return NotImplemented
        watched.append(("an argument of what was done to them", a, version_of(a)))
        if a.requires_grad and torch.is_grad_enabled():
            ends.append(a)
        if fitted.dim() > 1:
            key = next(_keys)
            carried[key] = fitted
            inside.append(Carried(key))
            like.append((2, fitted.shape[-1], fitted.dtype))
        else:
            inside.append(fitted)
            like.append((len(fitted), fitted.dtype) if fitted.dim() else fitted)
    args, kwargs = tree_unflatten(inside, tree)
    if transform is None:
        result = _result_like(func, like, tree, x, autocast is not None)
        if result is None:
            return NotImplemented
        transform = _transform_of(result, x)
    program = Step(func, args, kwargs, torch.is_grad_enabled(), autocast, tuple(watched))
    rows = next((other._rows for other in lazies if other._of_head), x._rows)
    class_dim = None if x._classes_last else x._class_dim
    ends = ends if transform.dtype.is_floating_point else []
    return lazy_logits(
        x._call, transform, rows, class_dim, leaves=tuple(ends), program=program, carried=carried
    )


def _transform_of(result: Tensor, x: LazyLogits) -> LogitTransform:
    """The transform of values that the linear form does not know, in the classes and dtype of
    ``result``."""
    return replace(
        x._transform,
        num_classes=result.shape[1],
        dtype=result.dtype,
        kind="other",
        bias=None,
        cap=None,
        scale=1.0,
        factor=1.0,
    )


def _autocast(x: LazyLogits) -> torch.dtype | None:
    kind = x._rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _fitted(t: Tensor, x: LazyLogits) -> Tensor | None:
    """An argument beside logits, as 0-d, (1 or V,) if it is the same for all rows, or with a value
    or V values for each row."""
    if t.dim() == 0:
        return t if t.device in (x._rows.device, torch.device("cpu")) else None
    dims = x._rows.dim()
    if (
        t.device != x._rows.device
        or t.dim() > dims
        or isinstance(t, LazyLogits)
        or t.is_sparse
        or t.layout != torch.strided
    ):
        return None
    t = t.reshape(*([1] * (dims - t.dim())), *t.shape).movedim(x._class_dim, -1)
    lead, width = x._rows.shape[:-1], t.shape[-1]
    if width not in (1, x._transform.num_classes) or any(
        n not in (1, rows) for n, rows in zip(t.shape[:-1], lead, strict=True)
    ):
        return None
    if all(n == 1 for n in t.shape[:-1]):
        return t.reshape(width)
    return t.expand(*lead, width)


def _result_like(
    func: Any, like: list[Any], tree: Any, x: LazyLogits, autocast: bool
) -> Tensor | None:
    """The result of ``func`` for two rows, without values; None unless it has two rows again."""
    # dtypes under autocast are those of the device
    device = x._rows.device if autocast else torch.device("meta")

    def stand_in(a: Any) -> Any:
        if isinstance(a, tuple) and a and isinstance(a[-1], torch.dtype):
            return torch.ones(a[:-1], dtype=a[-1], device=device)
        return a

    args, kwargs = tree_unflatten([stand_in(a) for a in like], tree)
    try:
        with torch.no_grad():
            result = func(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return (
        result
        if isinstance(result, Tensor)
        and result.dim() == 2
        and len(result) == 2
        and result.shape[1] > 0
        else None
    )


def same_program(a: Any, b: Any) -> bool:
    """Return True if two programs compute the same."""
    if isinstance(a, Program) and isinstance(b, Program):
        return same_program(a.step, b.step)
    if isinstance(a, Step) and isinstance(b, Step):
        if a is b:
            return True
        leaves_a, leaves_b = tree_leaves((a.args, a.kwargs)), tree_leaves((b.args, b.kwargs))
        same = (a.func, a.grad, a.autocast, len(leaves_a)) == (
            b.func,
            b.grad,
            b.autocast,
            len(leaves_b),
        )
        return same and all(map(same_program, leaves_a, leaves_b))
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def run(
    program: Step | None, logits: Tensor, carried: dict[int, Tensor], memo: dict[int, Tensor]
) -> Tensor:
    """The program of a chunk."""
    if program is None:
        return logits
    if id(program) not in memo:
        require_unchanged(program.watched)

        def value_of(a: Any) -> Any:
            if isinstance(a, Program):
                return run(a.step, logits, carried, memo)
            return carried[a.key] if isinstance(a, Carried) else a

        args, kwargs = tree_map(value_of, (program.args, program.kwargs))
        kind = logits.device.type
        grad = torch.set_grad_enabled(program.grad and torch.is_grad_enabled())
        with (
            grad,
            torch.autocast(kind, dtype=program.autocast, enabled=program.autocast is not None),
        ):
            memo[id(program)] = program.func(*args, **kwargs)
    return memo[id(program)]


def read_chunks(x: LazyLogits, func: Callable[..., Any], *beside: Tensor | LazyLogits) -> Any:
    """``func`` of the logits ``(n, V)`` of n rows and what is beside them, which returns tensors
    ``(n, ...)``, for all rows.

    Args:
        beside: for each row a part of a tensor, ``(*rows, ...)``, or lazy logits of the same rows.
    """
    call, lead = x._call, x._rows.shape[:-1]
    lazies = [x, *(b for b in beside if isinstance(b, LazyLogits))]
    of_head = any(z._of_head for z in lazies)
    rows = next((z._rows for z in lazies if z._of_head), x._rows)
    rows = rows.reshape(lead.numel(), rows.shape[-1])
    carried = {key: _by_rows(t, len(lead)) for z in lazies for key, t in z._carried.items()}
    # what is lazy may be written to before the backward
    values_of = [
        Program(b._program) if isinstance(b, LazyLogits) else _by_rows(b, len(lead))
        for b in (x, *beside)
    ]
    if not of_head:
        rows = rows.detach()

    def part(hidden: Tensor, start: int) -> Any:
        # in the backward again
        call.require_unchanged()
        with torch.set_grad_enabled(torch.is_grad_enabled() and of_head), call.call_context():
            logits = call.run(hidden)
        stop, memo = start + len(hidden), dict[int, Tensor]()
        here = {key: t(start, stop) for key, t in carried.items()}
        return func(
            *(
                run(b.step, logits, here, memo) if isinstance(b, Program) else b(start, stop)
                for b in values_of
            )
        )

    with call.unsharded(), call.random():
        call.require_unchanged()
        call.read = call.read or (of_head and torch.is_grad_enabled())
        step = rows_of_a_chunk(call, rows, call.widest)
        starts = range(0, max(1, len(rows)), step)
        needs_grad = (
            torch.is_grad_enabled()
            and len(joined_leaves(lazies)) + sum(b.requires_grad for b in beside) > 0
        )
        parts = []
        for hidden, start in zip(rows.split(step), starts, strict=True):
            parts.append(
                checkpoint(part, hidden, start, use_reentrant=False)
                if needs_grad
                else part(hidden, start)
            )
    if isinstance(parts[0], Tensor):
        return torch.cat(parts).reshape((*lead, *parts[0].shape[1:]))
    result = [
        torch.cat(column).reshape((*lead, *column[0].shape[1:]))
        for column in zip(*parts, strict=True)
    ]
    return type(parts[0])(result)


def rows_of_a_chunk(call: DeferredCall, rows: Tensor, num_classes: int) -> int:
    """A quarter of the rows a linear head takes: values and what is computed of them are V wide
    too."""
    options, cpu = call.forward.fuser.options, rows.device.type == "cpu"
    step = chunk_rows(len(rows), rows.shape[-1], num_classes, rows.dtype, options, cpu=cpu)
    if options.chunk_bytes is None:
        step = min(step, max(-(-step // 4), (64 << 20) // (4 * num_classes) if cpu else 1))
    return step


def _by_rows(t: Tensor, dims: int) -> Callable[[int, int], Tensor]:
    """Rows ``start`` to ``stop`` of a tensor whose first dimensions are those of the rows."""
    lead, rest = t.shape[:dims], t.shape[dims:]
    try:
        flat = t.view(-1, *rest) if t.numel() else t.reshape(lead.numel(), *rest)
    except RuntimeError:
        if not t.requires_grad:
            # one that is expanded, or sliced, is not copied as a whole
            return lambda start, stop: t[
                torch.unravel_index(torch.arange(start, stop, device=t.device), lead)
            ]
        flat = t.reshape(-1, *rest)
    return lambda start, stop: flat[start:stop]
