"""Operations on rows of deferred logits, applied to the hidden states instead.

Logits are the head of the hidden states row by row. So a function that selects, repeats, joins or
reorders rows is called on the hidden states instead, with their last dimension where the logits
have their classes, and on all else that rows carry."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked_reads import joined_leaves, read_chunks, same_program, step
from .deferred_call import JoinedCalls, is_same_head
from .lazy_logits import LazyLogits, lazy_logits, of_classes, written
from .torch_functions import T, handles

# classes of a slice that are computed alone
FEW = 64


def on_rows(
    x: LazyLogits,
    func: Callable[[Tensor], Tensor],
    class_dim: int | None = None,
    *,
    copied: bool = False,
) -> LazyLogits:
    """``func`` of the logits, which keeps their classes together and leaves them in ``class_dim``,
    as the call of it on what rows carry."""
    at = x._class_dim
    to = at if class_dim is None else class_dim

    def moved(t: Tensor) -> Tensor:
        return func(t.movedim(-1, at)).movedim(to, -1)

    carried = {key: moved(t) for key, t in x._carried.items()}
    return x._with(rows=moved(x._rows), carried=carried, class_dim=to, copied=copied)


def _dim(x: LazyLogits, dim: Any) -> int | None:
    """A dimension of rows, counted from the first; None if it is that of the classes, or none at
    all."""
    n = x._rows.dim()
    if not isinstance(dim, int) or isinstance(dim, bool) or not -n <= dim < n or of_classes(x, dim):
        return None
    return dim % n


def _dims(x: LazyLogits, dims: Any) -> list[int] | None:
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    found = [_dim(x, d) for d in dims]
    return None if None in found else [d for d in found if d is not None]


def _ints(values: tuple[Any, ...]) -> tuple[int, ...] | None:
    if len(values) == 1 and isinstance(values[0], tuple | list):
        values = tuple(values[0])
    return values if all(isinstance(n, int) and not isinstance(n, bool) for n in values) else None


# --- parts


@handles(T.select, torch.select)
def _select(x: LazyLogits, dim: int, index: Any) -> Any:
    d = _dim(x, dim)
    if d is None:
        return _of_classes_alone(x, dim, index)
    return on_rows(x, lambda t: t.select(d, index), x._class_dim - (d < x._class_dim))


@handles(T.narrow, torch.narrow)
def _narrow(x: LazyLogits, dim: int, start: Any, length: int) -> Any:
    d = _dim(x, dim)
    if d is None:
        return _of_classes_alone(
            x,
            dim,
            slice(start % x._transform.num_classes, start % x._transform.num_classes + length),
        )
    return on_rows(x, lambda t: t.narrow(d, start, length))


def _of_classes_alone(x: LazyLogits, dim: Any, item: Any) -> Any:
    return (
        _getitem(x, (Ellipsis, item)) if x._classes_last and of_classes(x, dim) else NotImplemented
    )


@handles(T.index_select, torch.index_select)
def _index_select(x: Any, dim: int, index: Tensor) -> Any:
    d = _dim(x, dim) if isinstance(x, LazyLogits) and not isinstance(index, LazyLogits) else None
    if d is None:
        return (
            _of_classes_alone(x, dim, index.reshape(-1))
            if isinstance(x, LazyLogits)
            else NotImplemented
        )
    return on_rows(x, lambda t: t.index_select(d, index), copied=True)


def _pieces(x: LazyLogits, dim: int, lengths: Any) -> tuple[LazyLogits, ...]:
    result, start = [], 0
    for length in lengths:
        piece = on_rows(x, lambda t, s=start, n=length: t.narrow(dim, s, n))  # type: ignore[misc]
        piece._expression.record(T.narrow, (x, dim, start, length), {})
        result.append(piece)
        start += length
    return tuple(result)


@handles(T.unbind, torch.unbind)
def _unbind(x: LazyLogits, dim: int = 0) -> Any:
    d = _dim(x, dim)
    if d is None:
        return NotImplemented
    result = []
    for i in range(x.shape[d]):
        row = _select(x, d, i)
        row._expression.record(T.select, (x, d, i), {})
        result.append(row)
    return tuple(result)


@handles(T.split, torch.split, T.split_with_sizes, torch.split_with_sizes)
def _split(x: LazyLogits, split_size: Any, dim: int = 0) -> Any:
    d = _dim(x, dim)
    if d is None:
        return NotImplemented
    n = x.shape[d]
    if isinstance(split_size, int):
        if split_size <= 0:
            return NotImplemented
        split_size = [min(split_size, n - start) for start in range(0, max(n, 1), split_size)]
    return (
        _pieces(x, d, split_size)
        if all(isinstance(s, int) for s in split_size) and sum(split_size) == n
        else NotImplemented
    )


@handles(T.chunk, torch.chunk)
def _chunk(x: LazyLogits, chunks: int, dim: int = 0) -> Any:
    d = _dim(x, dim)
    return (
        NotImplemented
        if d is None or chunks <= 0
        else _split(x, max(1, -(-x.shape[d] // chunks)), d)
    )


@handles(T.tensor_split, torch.tensor_split)
def _tensor_split(x: LazyLogits, indices_or_sections: Any, dim: int = 0) -> Any:
    d = _dim(x, dim)
    if d is None or isinstance(indices_or_sections, Tensor):
        return NotImplemented
    lengths = [
        len(t) for t in torch.empty(x.shape[d], device="meta").tensor_split(indices_or_sections)
    ]
    return _pieces(x, d, lengths) if sum(lengths) == x.shape[d] else NotImplemented


# --- shapes


@handles(T.view, T.reshape, torch.reshape)
def _view(x: LazyLogits, *shape: Any) -> Any:
    sizes = _ints(shape)
    if not x._classes_last or not sizes:
        return NotImplemented
    rows, num_classes = math.prod(x._rows.shape[:-1]), x._transform.num_classes
    lead, last = list(sizes[:-1]), sizes[-1]
    known = math.prod(n for n in lead if n != -1)
    if last == -1:
        keeps = -1 not in lead and known == rows
    else:
        keeps = last == num_classes and (
            known == rows
            if -1 not in lead
            else lead.count(-1) == 1 and known > 0 and rows % known == 0
        )
    if not keeps:
        return NotImplemented
    lead = [rows // known if n == -1 else n for n in lead]
    return on_rows(x, lambda t: t.reshape(*lead, t.shape[-1]), len(lead))


@handles(T.view_as, T.reshape_as)
def _view_as(x: Any, other: Tensor) -> Any:
    return _view(x, tuple(other.shape)) if isinstance(x, LazyLogits) else NotImplemented


@handles(T.flatten, torch.flatten)
def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    first, last, at = _dim(x, start_dim), _dim(x, end_dim), x._class_dim
    if first is None or last is None or first > last or first < at < last:
        return NotImplemented
    return on_rows(x, lambda t: t.flatten(first, last), at - (last - first) * (last < at))


@handles(T.unflatten, torch.unflatten)
def _unflatten(x: LazyLogits, dim: Any, sizes: Any) -> Any:
    d, sizes = _dim(x, dim), _ints((sizes,))
    if d is None or not sizes:
        return NotImplemented
    return on_rows(
        x, lambda t: t.unflatten(d, sizes), x._class_dim + (len(sizes) - 1) * (d < x._class_dim)
    )


@handles(T.squeeze, torch.squeeze)
def _squeeze(x: LazyLogits, dim: Any = None) -> Any:
    dims = [d for d, n in enumerate(x.shape) if n == 1] if dim is None else _dims(x, dim)
    if dims is None or x._class_dim in dims:
        return NotImplemented
    gone = [d for d in dims if x.shape[d] == 1]
    return on_rows(
        x,
        lambda t: t.squeeze(tuple(gone)) if gone else t.view(t.shape),
        x._class_dim - sum(d < x._class_dim for d in gone),
    )


@handles(T.unsqueeze, torch.unsqueeze)
def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    n = x._rows.dim() + 1
    if not -n <= dim < n:
        return NotImplemented
    return on_rows(x, lambda t: t.unsqueeze(dim % n), x._class_dim + (dim % n <= x._class_dim))


@handles(T.expand, T.broadcast_to, torch.broadcast_to)
def _expand(x: LazyLogits, *sizes: Any, implicit: bool = False) -> Any:
    shape = _ints(sizes)
    if (
        shape is None
        or not x._classes_last
        or len(shape) < x._rows.dim()
        or shape[-1] not in (-1, x._transform.num_classes)
    ):
        return NotImplemented
    return on_rows(x, lambda t: t.expand(*shape[:-1], -1), len(shape) - 1)


@handles(T.expand_as)
def _expand_as(x: Any, other: Tensor) -> Any:
    return _expand(x, tuple(other.shape)) if isinstance(x, LazyLogits) else NotImplemented


@handles(torch.broadcast_tensors, torch.functional.broadcast_tensors)
def _broadcast_tensors(*tensors: Any) -> Any:
    """As ``torch.distributions.Categorical`` does to its logits and ids."""
    if len(tensors) == 1 and isinstance(tensors[0], tuple | list):
        tensors = tuple(tensors[0])
    shape = torch.broadcast_shapes(*(tuple(t.shape) for t in tensors))
    result = []
    for t in tensors:
        if not isinstance(t, LazyLogits):
            result.append(t.expand(shape))
            continue
        lazy = _expand(t, shape)
        if lazy is NotImplemented:
            return NotImplemented
        lazy._expression.record(T.expand, (t, shape), {})
        result.append(lazy)
    return tuple(result)


@handles(T.repeat)
def _repeat(x: LazyLogits, *repeats: Any) -> Any:
    times = _ints(repeats)
    if times is None or not x._classes_last or len(times) < x._rows.dim() or times[-1] != 1:
        return NotImplemented
    return on_rows(x, lambda t: t.repeat(*times), len(times) - 1, copied=True)


@handles(T.repeat_interleave, torch.repeat_interleave)
def _repeat_interleave(x: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> Any:
    d = _dim(x, dim) if isinstance(x, LazyLogits) and not isinstance(repeats, LazyLogits) else None
    return (
        NotImplemented
        if d is None
        else on_rows(
            x, lambda t: t.repeat_interleave(repeats, d, output_size=output_size), copied=True
        )
    )


# --- order


def _permuted(x: LazyLogits, order: Any) -> LazyLogits:
    return on_rows(x, lambda t: t.permute(order), list(order).index(x._class_dim))


def _order(x: LazyLogits, func: Callable[[Tensor], Tensor]) -> list[int]:
    """Return the order of dimensions after ``func``, as for ``torch.permute``."""
    return [
        int(n) - 2
        for n in func(torch.empty(tuple(range(2, 2 + x._rows.dim())), device="meta")).shape
    ]


@handles(T.transpose, torch.transpose, T.swapaxes, torch.swapaxes, T.swapdims, torch.swapdims)
def _transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    return _permuted(x, _order(x, lambda t: t.transpose(dim0, dim1)))


@handles(T.permute, torch.permute)
def _permute(x: LazyLogits, *dims: Any) -> Any:
    order = _ints(dims)
    return NotImplemented if order is None else _permuted(x, _order(x, lambda t: t.permute(order)))


@handles(T.movedim, torch.movedim, T.moveaxis, torch.moveaxis)
def _movedim(x: LazyLogits, source: Any, destination: Any) -> Any:
    return _permuted(x, _order(x, lambda t: t.movedim(source, destination)))


@handles(T.mT.__get__, T.t, torch.t)  # type: ignore[attr-defined]
def _matrix_transpose(x: LazyLogits, *_: Any) -> Any:
    return _transpose(x, -2, -1) if x._rows.dim() >= 2 else NotImplemented


@handles(T.flip, torch.flip)
def _flip(x: LazyLogits, *dims: Any) -> Any:
    found = _ints(dims)
    rows = None if found is None else _dims(x, found)
    return NotImplemented if rows is None else on_rows(x, lambda t: t.flip(rows), copied=True)


@handles(T.roll, torch.roll)
def _roll(x: LazyLogits, shifts: Any, dims: Any = ()) -> Any:
    rows = _dims(x, dims) if dims not in ((), []) else None
    return (
        NotImplemented if rows is None else on_rows(x, lambda t: t.roll(shifts, rows), copied=True)
    )


# --- several


def _alike(tensors: Any) -> bool:
    first = tensors[0] if isinstance(tensors, tuple | list) and len(tensors) > 0 else None
    if not isinstance(first, LazyLogits) or not all(isinstance(t, LazyLogits) for t in tensors):
        return False
    transform, head = first._transform, first._of_head
    for t in tensors:
        s = t._transform
        same = (
            is_same_head(t._call, first._call)
            and t._class_dim == first._class_dim
            and t._of_head == head
            and t._carried.keys() == first._carried.keys()
        )
        same = same and (s.kind, s.factor, s.dtype, s.placements) == (
            transform.kind,
            transform.factor,
            transform.dtype,
            transform.placements,
        )
        if not same or not s.same_logits(transform) or not same_program(t._program, first._program):
            return False
    return True


def _together(tensors: Any, func: Callable[[list[Tensor]], Tensor], at: int, to: int) -> LazyLogits:
    first = tensors[0]

    def moved(parts: list[Tensor]) -> Tensor:
        return func([t.movedim(-1, at) for t in parts]).movedim(to, -1)

    carried = {key: moved([t._carried[key] for t in tensors]) for key in first._carried}
    rows = moved([t._rows for t in tensors])
    calls = list({id(t._call): t._call for t in tensors}.values())
    call = calls[0] if len(calls) == 1 else JoinedCalls(calls)
    result: LazyLogits = first._with(
        rows=rows,
        carried=carried,
        class_dim=to,
        leaves=joined_leaves(tensors),
        copied=True,
        call=call,
    )
    return result


@handles(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Any, dim: Any = 0) -> Any:
    if not _alike(tensors):
        return NotImplemented
    d = _dim(tensors[0], dim)
    at = tensors[0]._class_dim
    return (
        NotImplemented
        if d is None
        else _together(tensors, lambda parts: torch.cat(parts, d), at, at)
    )


@handles(torch.stack)
def _stack(tensors: Any, dim: Any = 0) -> Any:
    if not _alike(tensors):
        return NotImplemented
    at, n = tensors[0]._class_dim, tensors[0]._rows.dim() + 1
    if not isinstance(dim, int) or not -n <= dim < n:
        return NotImplemented
    return _together(tensors, lambda parts: torch.stack(parts, dim % n), at, at + (dim % n <= at))


# --- indices


def _items(x: LazyLogits, index: Any) -> list[Any] | None:
    """An index as what it does to each dimension, without an ellipsis; None for one that is not
    known."""
    items: list[Any] = []
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, list | range):
            try:
                i = torch.as_tensor(list(i), device=x._rows.device)
            except (TypeError, ValueError, RuntimeError):
                return None
            i = i if i.numel() else i.long()
        if isinstance(i, Tensor):
            if (
                isinstance(i, LazyLogits)
                or i.dtype == torch.uint8
                or i.is_floating_point()
                or (i.dtype == torch.bool and i.dim() == 0)
            ):
                return None
        elif isinstance(i, bool) or not (isinstance(i, int | slice) or i is None or i is Ellipsis):
            return None
        items.append(i)
    missing = x._rows.dim() - sum(map(_takes, items))
    if missing < 0 or sum(i is Ellipsis for i in items) > 1:
        return None
    at = next((n for n, i in enumerate(items) if i is Ellipsis), len(items))
    return [*items[:at], *([slice(None)] * missing), *items[at + 1 :]]


def _takes(item: Any) -> int:
    """Return the number of dimensions that an item of an index selects from."""
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return int(item is not None and item is not Ellipsis)


def _is_advanced(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() > 0


@handles(T.__getitem__)
def _getitem(x: LazyLogits, index: Any) -> Any:
    items = _items(x, index)
    if items is None:
        return NotImplemented
    at, n = 0, 0
    # the item that is about classes
    while n + _takes(items[at]) <= x._class_dim:
        n += _takes(items[at])
        at += 1
    of_class, before, after, num_classes = (
        items[at],
        items[:at],
        items[at + 1 :],
        x._transform.num_classes,
    )
    if _takes(of_class) > 1:
        return NotImplemented
    if isinstance(of_class, slice) and range(num_classes)[of_class] == range(num_classes):
        whole = (*before, slice(None), *after)
        if not any(map(_is_advanced, items)):
            to = sum(i is None or isinstance(i, slice) for i in before)
            return on_rows(x, lambda t: t[whole], to)
        if not x._classes_last or after:
            return NotImplemented
        return on_rows(x, lambda t: t[whole], x._rows[whole].dim() - 1, copied=True)
    if not x._classes_last or after:
        return NotImplemented
    copies = any(map(_is_advanced, before))
    if _is_advanced(of_class):
        return (
            _rows_and_classes(x, before, of_class)
            if copies
            else _classes(_rows_of(x, before), of_class)
        )
    y = _rows_of(x, before)
    if y is NotImplemented:
        return y
    return _classes(y, of_class) if copies else _view_of_classes(y, of_class)


def _rows_of(x: LazyLogits, before: list[Any]) -> Any:
    return (
        x
        if all(isinstance(i, slice) and i == slice(None) for i in before)
        else _getitem(x, (*before, slice(None)))
    )


def _view_of_classes(x: LazyLogits, item: Any) -> Any:
    """Some classes of all rows, as a view of them."""
    num_classes, transform = x._transform.num_classes, x._transform
    if isinstance(item, Tensor):
        item = int(item)
    if isinstance(item, int):
        if not -num_classes <= item < num_classes:
            return NotImplemented
        item, shape = item % num_classes, tuple(x._rows.shape[:-1])
    else:
        classes = range(num_classes)[item]
        item, shape = (
            slice(classes.start, classes.stop, classes.step),
            (*x._rows.shape[:-1], len(classes)),
        )
        if len(classes) == 0:
            return NotImplemented
        first = classes.start == 0 and classes.step == 1
        if first or not _is_few(x, len(classes)):
            result = step(
                T.__getitem__,
                x,
                (slice(None), item),
                transform=transform.first_classes(len(classes)) if first else None,
            )
            if result is not NotImplemented:
                result._memory = x._memory
            return result
    if x._call.shard is not None:
        return NotImplemented
    result = lazy_logits(
        x._call,
        transform,
        x._rows,
        leaves=x._leaves,
        program=x._program,
        carried=x._carried,
        loses_gradient=len(x._leaves) > 0,
        shape=shape,
    )
    result._memory = x._memory
    alone = x._with()
    alone._expression.record(T.view_as, (x, x), {})
    result._compute_view = lambda: classes_of(alone, item)
    return result


def _is_few(x: LazyLogits, n: int) -> bool:
    return n <= FEW and 2 * n <= x._call.widest


def _classes(x: Any, item: Any) -> Any:
    """Some classes of all rows, as a copy."""
    if x is NotImplemented or x._call.shard is not None:
        return NotImplemented
    if not isinstance(item, Tensor):
        return classes_of(x, item)
    if item.dtype == torch.bool:
        if item.shape != (x._transform.num_classes,):
            return NotImplemented
        item = item.nonzero()[:, 0]
    if item.numel() == 0 or (item.dim() == 1 and not _is_few(x, len(item))):
        ids = item.clone()
        return step(lambda z: z[:, ids], x) if len(ids) else NotImplemented
    return classes_of(x, item)


def _rows_and_classes(x: LazyLogits, before: list[Any], ids: Tensor) -> Any:
    """One class for each selected row, as ``logits[torch.arange(n), ids]``."""
    found = [i for i in before if not isinstance(i, int)]
    first = next(n for n, i in enumerate(found) if _is_advanced(i))
    if ids.dtype == torch.bool or not all(map(_is_advanced, found[first:])):
        return NotImplemented
    pairs = [
        p
        for i in found[first:]
        for p in (i.nonzero(as_tuple=True) if i.dtype == torch.bool else (i,))
    ]
    *rows, ids = torch.broadcast_tensors(*pairs, ids)
    places, index = iter(rows), []
    for i in before:
        if _is_advanced(i):
            index += [next(places) for _ in range(_takes(i))]
        else:
            index.append(i)
    y = _getitem(x, (*index, slice(None)))
    if y is NotImplemented:
        return NotImplemented
    ids = torch.where(ids < 0, ids + x._transform.num_classes, ids)
    result = gather(y, ids.expand(y._rows.shape[:-1]).unsqueeze(-1))
    return NotImplemented if result is NotImplemented else result.squeeze(-1)


@handles(T.__setitem__)
def _setitem(x: Any, index: Any, value: Any) -> Any:
    """A number for some classes of all rows."""
    number = isinstance(value, int | float) or (
        isinstance(value, Tensor) and value.dim() == 0 and not isinstance(value, LazyLogits)
    )
    items = _items(x, index) if isinstance(x, LazyLogits) and x._classes_last and number else None
    if (
        items is None
        or len(items) != x._rows.dim()
        or any(not isinstance(i, slice) or i != slice(None) for i in items[:-1])
    ):
        return NotImplemented
    if isinstance(value, Tensor) and value.requires_grad:
        return NotImplemented
    mask = torch.zeros(x._transform.num_classes, dtype=torch.bool, device=x._rows.device)
    mask[items[-1]] = True
    return written(
        x,
        step(torch.masked_fill, x, mask, value),
        torch.masked_fill,
        (x, mask, value),
        {},
        value=None,
    )


def classes_of(x: LazyLogits, item: int | slice | Tensor) -> Tensor:
    """The values of some classes of all rows, from their rows of the weight alone if the head is
    linear."""
    call, transform = x._call, x._transform
    if call.weight is None or transform.kind != "logits":
        result: Tensor = read_chunks(x, lambda z: z[:, item])
        return result
    with call.unsharded(), call.call_context():
        call.require_unchanged()
        call.read = call.read or (x._of_head and torch.is_grad_enabled())
        rows, weight, bias = x._rows, call.weight, call.bias
        if not x._of_head:
            rows, weight, bias = (
                rows.detach(),
                weight.detach(),
                None if bias is None else bias.detach(),
            )
        n = transform.num_classes
        ids: Any = (
            slice(item, item + 1)
            if isinstance(item, int)
            else item.reshape(-1)
            if isinstance(item, Tensor)
            else item
        )
        z = F.linear(rows, weight[:n][ids], None if bias is None else bias[:n][ids])
        z = z if transform.scale == 1.0 else z * transform.scale
        z = z if transform.bias is None else z + transform.bias[ids]
        z = (z if transform.cap is None else transform.cap * torch.tanh(z)).to(transform.dtype)
    if isinstance(item, int):
        return z.squeeze(-1)
    return z.unflatten(-1, item.shape) if isinstance(item, Tensor) else z


def gather(x: LazyLogits, index: Tensor) -> Any:
    """The values of K classes for each row."""
    if x._call.shard is not None:
        return NotImplemented
    return read_chunks(x, lambda z, ids: z.gather(-1, ids), index)


def rows_along(x: LazyLogits, dim: int, index: Tensor) -> Any:
    """``take_along_dim`` or ``gather`` of whole rows: the index is the same for all classes."""
    d = _dim(x, dim)
    if d is None or not x._classes_last or index.dim() != x._rows.dim():
        return NotImplemented
    if index.shape[-1] not in (1, x._transform.num_classes) or (
        index.shape[-1] > 1 and index.stride(-1) != 0
    ):
        return NotImplemented
    index = index[..., :1]
    return on_rows(x, lambda t: torch.take_along_dim(t, index, d), copied=True)
