"""Losses and statistics read from deferred logits, computed by the linear form from the hidden
states."""

import inspect
import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from .. import family, functional, statistics
from ..call.dtensor import shared
from ..call.reduction import divisor_of, ignore_rows_of_weight_0, reduce_rows
from ..inputs import Targets, flatten_row_weight
from ..ops.chunk_plan import chunk_rows
from ..spec import LinearOptions, loss_spec, require_bool, resolve_reduction
from ..statistics import LossStats
from .chunked_reads import read_chunks, together
from .lazy_logits import LazyLogits, of_classes
from .row_ops import gather, rows_along
from .torch_functions import T, handles
from .transform import LogitTransform
from .value_ops import of_values, over_rows

# no target is it
NO_ID = -(2**63)


@handles(F.cross_entropy)
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
    if not isinstance(input, LazyLogits):
        return NotImplemented
    reduction = resolve_reduction(reduction, size_average, reduce)
    options = {
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    kind, factor = input._transform.kind, input._transform.factor
    if kind == "logp" and factor == 1.0:
        # log_softmax of those is what they are
        input = input._with(transform=replace(input._transform, kind="logits"))
    elif kind != "logits":
        return loss_of_values(F.cross_entropy, input, target, options)
    if isinstance(target, LazyLogits):
        return loss_of_values(F.cross_entropy, input, target, options)
    return _torchs(input, _loss(input, target, options))


@handles(functional.cross_entropy)
def _our_cross_entropy(input: Any, *args: Any, **named: Any) -> Any:
    given = _bound(functional.cross_entropy, input, *args, **named)
    require_bool("inplace", given.pop("inplace"))
    return _of_scaled_logits(given, None)


@handles(statistics.cross_entropy_stats)
def _our_cross_entropy_stats(input: Any, *args: Any, **named: Any) -> Any:
    given = _bound(statistics.cross_entropy_stats, input, *args, **named)
    reads = {name: given.pop(name) for name in ("entropy", "argmax")}
    return _of_scaled_logits(given, reads)


def _bound(function: Any, *args: Any, **named: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, with defaults."""
    bound = inspect.signature(function).bind(*args, **named)
    bound.apply_defaults()
    return bound.arguments


def _of_scaled_logits(options: dict[str, Any], reads: dict[str, bool] | None) -> Any:
    """Compute our loss of deferred logits, or our statistics with ``reads``: scale and cap of the
    call join those that were recorded."""
    input, target = options.pop("input"), options.pop("target")
    if not isinstance(input, LazyLogits):
        return NotImplemented
    scale, cap = options.pop("logit_scale"), options.pop("softcap")
    # checked before they are joined
    loss_spec(-100, 0.0, cap, scale)
    transform: LogitTransform | None = input._transform
    options["reduction"] = resolve_reduction(
        options["reduction"], options.pop("size_average"), options.pop("reduce")
    )
    if input._transform.kind != "logits" or (cap is not None and input._transform.cap is not None):
        return NotImplemented
    if scale is not None:
        transform = input._transform.times(scale)
    if cap is not None and transform is not None:
        inner = transform.times(1.0 / cap)
        transform = None if inner is None else replace(inner, cap=cap)
    if transform is None:
        return NotImplemented
    return _in_our_dtype(input, _loss(input._with(transform=transform), target, options, reads))


def _in_our_dtype(input: LazyLogits, result: Any) -> Any:
    """float64 for logits of that dtype alone."""
    if input._rows.dtype != torch.float64 or input._transform.dtype == torch.float64:
        return result
    return tree_map(
        lambda t: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t, result
    )


@handles(F.nll_loss)
def _nll_loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if (
        not isinstance(input, LazyLogits)
        or isinstance(target, LazyLogits)
        or target.is_floating_point()
    ):
        return NotImplemented
    reduction = resolve_reduction(reduction, size_average, reduce)
    if input._transform.kind != "logp" or input._transform.factor != 1.0:
        return loss_of_values(
            F.nll_loss,
            input,
            target,
            {"weight": weight, "ignore_index": ignore_index, "reduction": reduction},
        )
    return _torchs(
        input,
        _loss(
            input, target, {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
        ),
    )


@handles(family.nll_loss)
def _our_nll_loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if (
        not isinstance(input, LazyLogits)
        or input._transform.kind != "logp"
        or input._transform.factor != 1.0
        or target.is_floating_point()
    ):
        return NotImplemented
    reduction = resolve_reduction(reduction, size_average, reduce)
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    return _in_our_dtype(input, _loss(input, target, options))


@handles(T.gather, torch.gather)
def _gather(x: Any, dim: Any, index: Any = None, *, sparse_grad: bool = False) -> Any:
    if (
        not isinstance(x, LazyLogits)
        or not isinstance(index, Tensor)
        or isinstance(index, LazyLogits)
        or sparse_grad
    ):
        return NotImplemented
    if not of_classes(x, dim):
        rest = index.dim() == x._rows.dim() and x._classes_last and isinstance(dim, int)
        whole = rest and all(
            d == dim % x.dim() or n == m
            for d, (n, m) in enumerate(zip(index.shape, x.shape, strict=True))
        )
        return rows_along(x, dim, index) if whole else NotImplemented
    if not x._classes_last or index.shape[:-1] != x._rows.shape[:-1]:
        return NotImplemented
    if index.shape[-1] != 1 or x._transform.kind not in ("logits", "logp", "p"):
        return gather(x, index)
    read = _stats(x, index[..., 0])
    value = read.target_logprob
    if x._transform.kind == "logits":
        value = value + read.lse
    elif x._transform.kind == "p":
        value = value.exp()
    return _result(x, value.unsqueeze(-1))


@handles(torch.take_along_dim, T.take_along_dim)
def _take_along_dim(x: Any, indices: Any, dim: Any = None) -> Any:
    if (
        not isinstance(x, LazyLogits)
        or isinstance(indices, LazyLogits)
        or indices.dim() != x.dim()
        or not x._classes_last
    ):
        return NotImplemented
    if not of_classes(x, dim):
        return rows_along(x, dim, indices)
    lead = x._rows.shape[:-1]
    if any(n not in (1, rows) for n, rows in zip(indices.shape[:-1], lead, strict=True)):
        return NotImplemented
    return _gather(x, dim, indices.expand(*lead, -1))


@handles(T.logsumexp, torch.logsumexp, torch.special.logsumexp)
def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if not of_classes(x, dim):
        return NotImplemented
    if x._transform.kind != "logits":
        return of_values(torch.logsumexp, x, keepdim)
    lse = _result(x, _stats(x).lse)
    if not keepdim:
        return lse
    lse = lse.unsqueeze(x._class_dim)
    # to be known again when it is subtracted
    x._call.lses.append((weakref.ref(lse), lse._version, x._rows, x._transform))
    return lse


@handles(T.argmax, torch.argmax)
def _argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not of_classes(x, dim):
        return NotImplemented
    if x._transform.kind not in ("logits", "logp", "p") or x._transform.factor <= 0.0:
        return of_values(torch.argmax, x, keepdim)
    with torch.no_grad():
        argmax = _stats(x, argmax=True).argmax
    assert argmax is not None
    return argmax.unsqueeze(x._class_dim) if keepdim else argmax


@handles(T.sum, torch.sum)
def _sum(
    x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    floating = x._transform.dtype.is_floating_point
    return over_rows(
        x,
        dim,
        keepdim,
        lambda: _row_sums(x),
        torch.sum,
        dtype or (x._transform.dtype if floating else torch.int64),
    )


@handles(T.mean, torch.mean)
def _mean(
    x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if not x._transform.dtype.is_floating_point:
        return NotImplemented
    num_classes = x._transform.num_classes
    return over_rows(
        x, dim, keepdim, lambda: _row_sums(x) / num_classes, torch.mean, dtype or x._transform.dtype
    )


def _row_sums(x: LazyLogits) -> Tensor:
    """The sum over classes, in the dtype it is summed in."""
    transform = x._transform
    if transform.kind not in ("logp", "p logp", "p z"):
        wide = (
            torch.float64
            if transform.dtype == torch.float64
            else torch.float32
            if transform.dtype.is_floating_point
            else torch.int64
        )
        result: Tensor = read_chunks(x, lambda z: z.sum(-1, dtype=wide))
        return result
    if transform.kind == "logp":
        # a target that is spread evenly over all classes
        zeros = torch.zeros(x._rows.shape[:-1], dtype=torch.int64, device=x._rows.device)
        value = _read(
            x, zeros, {"ignore_index": NO_ID, "reduction": "none", "label_smoothing": 1.0}, None
        )
        assert isinstance(value, Tensor)
        value = value * -float(transform.num_classes)
    else:
        read = _stats(x, entropy=True)
        assert read.entropy is not None
        value = -read.entropy if transform.kind == "p logp" else read.lse - read.entropy
    return value * transform.factor


def loss_of_values(func: Any, x: LazyLogits, target: Any, options: dict[str, Any]) -> Any:
    """A loss of torch, a chunk of rows at a time, of what the linear form has no word for, or
    against a target that is computed from logits."""
    weight, reduction = options.get("weight"), options["reduction"]
    soft = target.is_floating_point()
    classes_first = x._class_dim == min(x._rows.dim() - 1, 1)
    if not classes_first or x._call.shard is not None or isinstance(weight, LazyLogits):
        return NotImplemented
    lead = x._rows.shape[:-1]
    if isinstance(target, LazyLogits):
        if not together(x, target) or target._transform.num_classes != x._transform.num_classes:
            return NotImplemented
        beside: Any = target
    else:
        beside = target.movedim(1, -1) if soft and target.dim() > 2 else target
        if (
            tuple(beside.shape) != (*lead, x._transform.num_classes)
            if soft
            else tuple(beside.shape) != tuple(lead)
        ):
            return NotImplemented
    options = {**options, "reduction": "none"}
    wide = torch.float64 if x._transform.dtype == torch.float64 else torch.float32

    def part(z: Tensor, t: Tensor) -> Tensor:
        return func(
            z.to(wide),
            t.to(wide) if soft else t,
            **{**options, "weight": None if weight is None else weight.to(wide)},
        )

    losses = read_chunks(x, part, beside)
    divisor = None
    if reduction == "mean":
        ids = torch.empty(lead.numel(), 0, device=losses.device) if soft else target.reshape(-1)
        divisor = divisor_of(
            Targets(ids, weight, lead),
            x._transform.num_classes,
            wide,
            options.get("ignore_index", -100),
            reduction,
            None,
        )
    return _torchs(
        x,
        losses
        if reduction == "none"
        else losses.sum()
        if divisor is None
        else losses.sum() / divisor,
    )


def _result(x: LazyLogits, value: Tensor) -> Tensor:
    """As torch would have it: in the dtype of what it was read off."""
    value = value if x._transform.factor == 1.0 else value * x._transform.factor
    return value.to(x._transform.dtype)


def _stats(
    x: LazyLogits, target: Tensor | None = None, *, entropy: bool = False, argmax: bool = False
) -> LossStats:
    if target is None:
        target = torch.zeros(x._rows.shape[:-1], dtype=torch.int64, device=x._rows.device)
    result = _read(
        x,
        target,
        {"ignore_index": NO_ID, "reduction": "none"},
        {"entropy": entropy, "argmax": argmax},
    )
    assert isinstance(result, LossStats)
    return result


def _loss(
    x: LazyLogits, target: Tensor, options: dict[str, Any], reads: dict[str, bool] | None = None
) -> Any:
    dims = x._rows.dim()
    # classes are in dimension 1 of a loss's logits, or alone; a teacher's logits are materialized
    if (
        x._class_dim != min(dims - 1, 1)
        or not isinstance(target, Tensor)
        or isinstance(target, LazyLogits)
    ):
        return NotImplemented
    weight = options.get("weight")
    if x._call.shard is not None and isinstance(weight, Tensor) and weight.requires_grad:
        return NotImplemented
    if target.is_floating_point() and dims > 2:
        target = target.movedim(1, -1)
    return _read(x, target, options, reads)


def _torchs(x: LazyLogits, loss: Any) -> Any:
    """A loss of torch has the dtype of its logits, which autocast makes float32; ours is
    float32."""
    if loss is NotImplemented or (
        torch.is_autocast_enabled(x._rows.device.type) and x._transform.dtype.itemsize < 4
    ):
        return loss
    return loss.to(x._transform.dtype)


def _read(
    x: LazyLogits, target: Tensor, options: dict[str, Any], reads: dict[str, bool] | None
) -> Tensor | LossStats:
    """The linear form of these rows, or of chunks of a head that is not linear."""
    call, transform = x._call, x._transform
    options = {**options, **transform.options}
    with call.unsharded(), call.call_context():
        call.require_unchanged(calls_head=call.weight is None)
        call.read = call.read or (x._of_head and torch.is_grad_enabled())
        if call.weight is None:
            return _read_chunks(x, target, options, reads)
        rows, weight, bias = x._rows, call.weight, call.bias
        if not x._of_head:
            # a view that was taken under no_grad requires grad all the same
            rows, weight, bias = (
                rows.detach(),
                weight.detach(),
                None if bias is None else bias.detach(),
            )
        local_classes, added = slice(0, transform.num_classes), transform.bias
        if call.shard is not None:
            weight, bias, added, target, local_classes = _of_this_rank(
                x, weight, bias, target, options
            )
        weight, bias = weight[local_classes], None if bias is None else bias[local_classes]
        if added is not None:
            bias = added / transform.scale if bias is None else bias + added / transform.scale
            bias = bias.to(weight.dtype)
        function: Any = functional.linear_cross_entropy
        if reads is not None:
            function, options = statistics.linear_cross_entropy_stats, {**options, **reads}
        result: Tensor | LossStats = function(
            rows, weight, target, linear_bias=bias, options=call.forward.fuser.options, **options
        )
        return result


def _of_this_rank(
    x: LazyLogits, weight: Any, bias: Any, target: Tensor, options: dict[str, Any]
) -> Any:
    """Return the local head, bias, target and slice of classes of a head whose classes are sharded
    across ranks, and set ``options["shard"]``."""
    head_shard = x._call.shard
    assert head_shard is not None
    local_classes, shard = head_shard.classes(x._transform.num_classes, len(weight))
    rank_classes = slice(shard.start, shard.start + local_classes.stop)
    options["shard"] = shard
    # replicated on every rank; each rank computes a part of their gradient
    reduced = replace(shard, hidden_grad="reduced")
    added = None if x._transform.bias is None else shared(x._transform.bias, reduced)[rank_classes]
    if target.is_floating_point():
        target = shared(target, reduced)[..., rank_classes]
    return (
        weight.to_local(),
        None if bias is None else bias.to_local(),
        added,
        target,
        local_classes,
    )


def _rows_of_a_chunk(rows: Tensor, num_classes: int, options: LinearOptions) -> int:
    """Hidden states whose logits are computed at a time by a head that is not linear."""
    cpu = rows.device.type == "cpu"
    step = chunk_rows(len(rows), rows.shape[-1], num_classes, rows.dtype, options, cpu=cpu)
    if options.chunk_bytes is None:
        # the linear form holds one tensor of a chunk's logits; a LoRA layer's terms, their sum and
        # its gradient are four. Freed blocks below 32 MiB stay in glibc's heap, in pieces
        least = (64 << 20) // (4 * num_classes) if cpu else 1
        step = min(step, max(-(-step // 4), least))
    return step


def _read_chunks(
    x: LazyLogits, target: Tensor, options: dict[str, Any], reads: dict[str, bool] | None
) -> Tensor | LossStats:
    """A head that is not linear materializes one chunk of logits at a time, and recomputes it in
    the backward."""
    call, transform = x._call, x._transform
    reduction, normalizer = options.pop("reduction"), options.pop("normalizer", None)
    row_weight = options.pop("row_weight", None)
    if row_weight is not None:
        row_weight = flatten_row_weight(row_weight, x._rows, x._rows.shape[:-1])
    ignore_index = options["ignore_index"]
    rows = x._rows.reshape(-1, x._rows.shape[-1])
    lead = x._rows.shape[:-1]
    t = (
        target.reshape(-1, transform.num_classes)
        if target.is_floating_point()
        else target.reshape(-1)
    )
    of = Targets(t, options.get("weight"), lead, row_weight=row_weight)
    some = of if reads is not None else ignore_rows_of_weight_0(of, ignore_index)

    def part(hidden: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        # runs again in the backward
        call.require_unchanged()
        with torch.set_grad_enabled(torch.is_grad_enabled() and x._of_head):
            z = call.run(hidden)[:, : transform.num_classes]
        if transform.bias is not None:
            z = z + transform.bias / transform.scale
        if reads is None:
            return (functional.cross_entropy(z, t, reduction="none", **options),)
        read = statistics.cross_entropy_stats(z, t, reduction="none", **options, **wants)
        result = read.loss, read.lse, read.target_logprob, read.z_loss, read.entropy, read.argmax
        return tuple(column for column in result if column is not None)

    wants: dict[str, Any] = reads or {}
    step = _rows_of_a_chunk(rows, transform.num_classes, call.forward.fuser.options)
    with call.random():
        parts = [
            checkpoint(part, h, targets, use_reentrant=False)
            for h, targets in zip(rows.split(step), some.target.split(step), strict=True)
        ]
    losses, *columns = (torch.cat(column) for column in zip(*parts, strict=True))
    divisor = divisor_of(
        of, transform.num_classes, losses.dtype, ignore_index, reduction, normalizer
    )
    loss = reduce_rows(losses, of, reduction, divisor)
    if reads is None:
        return loss
    lse, target_logprob, z_loss, *rest = columns
    argmax = rest.pop().reshape(lead) if wants["argmax"] else None
    entropy = rest.pop().reshape(lead) if wants["entropy"] else None
    n_valid = torch.full((), len(t), device=t.device) if of.soft else (t != ignore_index).sum()
    z_loss = reduce_rows(z_loss, of, reduction, divisor)
    return LossStats(
        loss, lse.reshape(lead), target_logprob.reshape(lead), entropy, z_loss, argmax, n_valid
    )
