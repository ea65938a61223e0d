"""The chunk loop of ``linear_cross_entropy``: hidden states and a head -> losses and gradients,
with the logits of one chunk of rows in memory at a time.

For each chunk: a matrix product computes its logits, a backend the row losses and writes their
gradient over the logits, and matrix products the gradients of the head from it. The matrix products
are torch's. N rows, width D, V classes."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..inputs import without_autocast
from ..row_types import RowStats, Upstream, Wants, no_class
from ..spec import LinearOptions, LossSpec
from ..vocab_parallel.backend import even_classes, gather
from .chunk_plan import ChunkPlan, chunk_plan, chunk_rows, padded, weight_grad_dtype
from .matmul import Weight, cpu_multiplies_bf16, mm_returns_fp32, product


class Head(NamedTuple):
    """The operands of the logits."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)


class Needs(NamedTuple):
    """The operands that require grad."""

    hidden: bool
    weight: bool
    bias: bool
    target: bool


class Gradients(NamedTuple):
    """None where not needed. Those of hidden states and bias are in ``acc_dtype``, that of the
    weight in ``weight_grad_dtype``."""

    hidden: Tensor | None = None  # (N, D)
    weight: Tensor | None = None  # (V, D)
    bias: Tensor | None = None  # (V,)
    target: Tensor | None = None  # (N, V)


def row_loss(
    head: Head,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    options: LinearOptions,
    backend: ModuleType,
) -> Tensor:
    """(N,) losses, without a gradient."""
    with without_autocast(head.hidden):
        valid_rows = _valid_rows(target, spec, options)
        some, some_target = _select(head, target, valid_rows)
        loss: Tensor | None = backend.head_row_loss(*some, some_target, class_weight, spec)
        if loss is None:
            loss = _empty_loss(head.hidden, len(some_target))
            weight = _weight(some, spec, options)
            has_ignored = valid_rows is None
            step = _rows_per_chunk(head, spec, options)
            for chunk in _chunks(some, weight, some_target, spec, options, has_ignored, step, step):
                rows = chunk.rows
                loss[rows] = backend.row_loss(chunk.logits, some_target[rows], class_weight, spec)[
                    0
                ]
        return _scatter(loss, valid_rows, target)


def row_loss_and_grads(
    head: Head,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    needs: Needs,
    spec: LossSpec,
    options: LinearOptions,
    backend: ModuleType,
) -> tuple[Tensor, Gradients]:
    """(N,) losses, and the gradients of their sum weighted by ``dloss`` (N,)."""
    valid_rows = _valid_rows(target, spec, options)
    loss = _empty_loss(head.hidden, len(target if valid_rows is None else valid_rows))

    def compute(
        rows: slice,
        logits: Tensor,
        target: Tensor,
        upstream: Upstream,
        dlogits: Tensor | None = None,
        dtarget: Tensor | None = None,
    ) -> None:
        operands = logits, target, class_weight, upstream.loss, spec
        loss[rows] = backend.row_loss_and_grads(*operands, dlogits=dlogits, dtarget=dtarget)

    upstream = Upstream(dloss)
    grads = _grads(
        head, target, class_weight, upstream, needs, spec, options, valid_rows, compute=compute
    )
    return _scatter(loss, valid_rows, target), grads


def row_stats(
    head: Head,
    target: Tensor,
    class_weight: Tensor | None,
    wants: Wants,
    spec: LossSpec,
    options: LinearOptions,
    backend: ModuleType,
) -> RowStats:
    """Statistics of N rows, without a gradient."""
    with without_autocast(head.hidden):
        valid_rows = _valid_rows(target, spec, options)
        some, some_target = _select(head, target, valid_rows)
        stats: RowStats | None = backend.head_row_stats(
            *some, some_target, class_weight, spec, wants
        )
        if stats is None:
            stats = _empty_stats(head.hidden, len(some_target), wants)
            weight = _weight(some, spec, options)
            has_ignored = valid_rows is None
            step = _rows_per_chunk(head, spec, options)
            for chunk in _chunks(some, weight, some_target, spec, options, has_ignored, step, step):
                rows = chunk.rows
                part = backend.row_stats(chunk.logits, some_target[rows], class_weight, spec, wants)
                _store(stats, rows, part)
        return _scatter_stats(stats, valid_rows, target, spec)


def row_stats_and_grads(
    head: Head,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Upstream,
    needs: Needs,
    wants: Wants,
    spec: LossSpec,
    options: LinearOptions,
    backend: ModuleType,
) -> tuple[RowStats, Gradients]:
    """Statistics of N rows, and the gradients of their sum weighted by ``upstream``."""
    valid_rows = _valid_rows(target, spec, options)
    n = len(target if valid_rows is None else valid_rows)
    stats = _empty_stats(head.hidden, n, wants)

    def compute(
        rows: slice,
        logits: Tensor,
        target: Tensor,
        upstream: Upstream,
        dlogits: Tensor | None = None,
        dtarget: Tensor | None = None,
    ) -> None:
        operands = logits, target, class_weight, spec, wants
        part = backend.row_stats(*operands, upstream=upstream, dlogits=dlogits, dtarget=dtarget)
        _store(stats, rows, part)

    grads = _grads(
        head, target, class_weight, upstream, needs, spec, options, valid_rows, compute=compute
    )
    return _scatter_stats(stats, valid_rows, target, spec), grads


class Compute(Protocol):
    """Computes and stores the statistics of a chunk, and fills the gradients that are given."""

    def __call__(
        self,
        rows: slice,
        logits: Tensor,
        target: Tensor,
        upstream: Upstream,
        dlogits: Tensor | None = None,
        dtarget: Tensor | None = None,
    ) -> None: ...


def _grads(
    head: Head,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Upstream,
    needs: Needs,
    spec: LossSpec,
    options: LinearOptions,
    valid_rows: Tensor | None,
    *,
    compute: Compute,
) -> Gradients:
    """The gradients of a head. For each chunk: logits, ``compute``, which fills their gradient; for
    each group of chunks the products of it."""
    with without_autocast(head.hidden):
        some, some_target = _select(head, target, valid_rows)
        upstream = upstream if valid_rows is None else upstream.of(valid_rows)
        plan = _plan(some, needs, spec, options)
        grads = _empty_grads(some, target, needs, options, plan.sum_dtype)
        weight = _weight(some, spec, options)
        scale = held = None
        has_ignored, sizes = valid_rows is None, (plan.rows, plan.grad_rows)
        for chunk in _chunks(
            some, weight, some_target, spec, options, has_ignored, *sizes, buffer=grads.hidden
        ):
            rows, z, group, x = chunk
            operands, up = (rows, z, some_target[rows]), upstream.of(rows)
            dtarget = None if grads.target is None else grads.target[rows]
            if not (needs.hidden or needs.weight or needs.bias):
                compute(*operands, upstream=up, dtarget=dtarget)
                continue
            dz = _gradient_over(z, x.dtype)
            if plan.grad_rows > plan.rows:
                if held is None:
                    held = _rows_like(dz, min(plan.grad_rows, len(some.hidden)))
                dz = held[rows.start - group.start : rows.stop - group.start]
            if dz.dtype != torch.float16:
                compute(*operands, upstream=up, dlogits=dz, dtarget=dtarget)
            else:
                scale = _fp16_scale(upstream, class_weight, spec) if scale is None else scale
                if dtarget is not None:
                    # not scaled, as it is the operand of no product
                    compute(*operands, upstream=up, dtarget=dtarget)
                compute(*operands, upstream=up.over(scale), dlogits=dz)
            if chunk.completes_group:
                dzs = dz if held is None else held[: len(x)]
                _accumulate(grads, group, x, dzs, weight)

        del held
        dtype = weight_grad_dtype(some.hidden.dtype, options, some.hidden.device)
        return _finished(grads, scale, dtype, valid_rows, target)


def _finished(
    grads: Gradients,
    scale: Tensor | None,
    weight_dtype: torch.dtype,
    valid_rows: Tensor | None,
    target: Tensor,
) -> Gradients:
    """Multiply accumulated gradients by the scale of the fp16 products, give ignored rows their
    zeros and the gradient of the weight its dtype."""
    if scale is not None:
        for grad in (grads.hidden, grads.weight, grads.bias):
            if grad is not None:
                grad.mul_(scale)
    if grads.hidden is not None:
        grads = grads._replace(hidden=_scatter(grads.hidden, valid_rows, target))
    if grads.weight is not None:
        grads = grads._replace(weight=grads.weight.to(weight_dtype))
    return grads


def _plan(head: Head, needs: Needs, spec: LossSpec, options: LinearOptions) -> ChunkPlan:
    (n, d), dtype, device = head.hidden.shape, head.hidden.dtype, head.hidden.device
    v, narrow_sums = _widest_shard(head, spec), mm_returns_fp32(device)
    plan = chunk_plan(n, d, v, dtype, options, narrow_sums=narrow_sums, cpu=device.type == "cpu")
    if not needs.weight:
        rows = _rows_per_chunk(head, spec, options)
        plan = plan._replace(rows=rows, grad_rows=rows)
    return plan


def _rows_like(dz: Tensor, rows: int) -> Tensor:
    """(rows, V) of the dtype of ``dz``, with rows that start where accesses are wide."""
    v = dz.shape[1]
    return torch.empty(rows, padded(v), dtype=dz.dtype, device=dz.device)[:, :v]


def _empty_grads(
    head: Head, target: Tensor, needs: Needs, options: LinearOptions, sum_dtype: torch.dtype
) -> Gradients:
    """Memory for the gradients of the rows of ``head``, and for those of all probabilities."""
    hidden, weight = head.hidden, head.weight
    dtype = options.dtype("acc_dtype", hidden.dtype)
    dhidden = dweight = dbias = dtarget = None
    if needs.hidden:
        dhidden = torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
    if needs.weight:
        dweight = torch.empty_like(weight, dtype=sum_dtype, memory_format=torch.contiguous_format)
        if len(hidden) == 0:
            # the first chunk fills it, and there is none
            dweight.zero_()
    if needs.bias:
        dbias = weight.new_zeros(len(weight), dtype=dtype)
    if needs.target:
        dtarget = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    return Gradients(dhidden, dweight, dbias, dtarget)


def _accumulate(grads: Gradients, rows: slice, x: Tensor, dz: Tensor, weight: Weight) -> None:
    """The matrix products of a chunk's hidden states ``x`` and gradient ``dz``."""
    dx = None
    if grads.hidden is not None:
        # over several blocks it is accumulated in the dtype of x and rounded once
        dx = grads.hidden[rows] if weight.single_block else torch.empty_like(x)
    for classes, block in weight.blocks():
        part = dz[:, classes].to(x.dtype)
        # before dx, which may have the memory of x
        if grads.weight is not None:
            product(grads.weight[classes], part.T, x, add=rows.start > 0)
        if dx is not None:
            product(dx, part, block, add=classes.start > 0)
    if grads.hidden is not None and dx is not None and not weight.single_block:
        grads.hidden[rows] = dx
    if grads.bias is not None:
        grads.bias.add_(dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32)))


def _operand_dtype(head: Head, options: LinearOptions) -> torch.dtype:
    """The dtype in which matrix products take hidden states and weight. It is wider than theirs if
    no product of them returns float32 logits."""
    hidden, logits_dtype = head.hidden, options.dtype("logits_dtype", head.hidden.dtype)
    if mm_returns_fp32(hidden.device):
        return hidden.dtype
    if hidden.device.type != "cpu":
        return logits_dtype
    # with a float32 acc_dtype, products in bfloat16 would convert the whole gradient of the weight
    narrow = options.dtype("acc_dtype", hidden.dtype) == logits_dtype and cpu_multiplies_bf16(
        logits_dtype, hidden.shape[1], len(head.weight)
    )
    return logits_dtype if narrow else torch.promote_types(logits_dtype, torch.float32)


def _rows_per_chunk(head: Head, spec: LossSpec, options: LinearOptions) -> int:
    (n, d), cpu = head.hidden.shape, head.hidden.device.type == "cpu"
    return chunk_rows(n, d, _widest_shard(head, spec), head.hidden.dtype, options, cpu=cpu)


def _widest_shard(head: Head, spec: LossSpec) -> int:
    # shards of unequal sizes must have equal numbers of chunks
    return len(head.weight) if spec.group is None else even_classes(spec)


def _weight(head: Head, spec: LossSpec, options: LinearOptions) -> Weight:
    dtype = _operand_dtype(head, options)
    rows = 0
    if options.dtype("logits_dtype", head.hidden.dtype).itemsize < dtype.itemsize:
        rows = min(_rows_per_chunk(head, spec, options), len(head.hidden))
    return Weight(head.weight, dtype, converted_rows=rows)


class Chunk(NamedTuple):
    """Logits of some rows, and the group of chunks whose gradients are multiplied together."""

    rows: slice
    logits: Tensor
    group: slice
    hidden: Tensor  # of the group, in the products' dtype

    @property
    def completes_group(self) -> bool:
        return self.rows.stop == self.group.stop


def _chunks(
    head: Head,
    weight: Weight,
    target: Tensor,
    spec: LossSpec,
    options: LinearOptions,
    has_ignored: bool,
    rows: int,
    group_rows: int,
    buffer: Tensor | None = None,
) -> Iterator[Chunk]:
    """Chunks of ``rows`` in turn, in groups of ``group_rows``; all share the memory of the logits.

    Hidden states that must be copied go to ``buffer`` (N, D), that of their gradient, if it fits.
    """
    hidden, _, bias = head
    (n, d), v = hidden.shape, len(head.weight)
    dtype = _operand_dtype(head, options)
    # ignored rows may hold NaN, which a gradient of 0 would not remove from the products
    masks = has_ignored and not target.is_floating_point()
    logits_dtype = options.dtype("logits_dtype", hidden.dtype)
    logits = torch.empty(min(rows, n), padded(v), dtype=logits_dtype, device=hidden.device)
    copies = None
    if masks or dtype != hidden.dtype:
        if buffer is not None and buffer.dtype == dtype and weight.single_block:
            copies = buffer
        else:
            copies = torch.empty(min(group_rows, n), d, dtype=dtype, device=hidden.device)
    for group in _slices(0, n, group_rows):
        xs = hidden[group]
        if copies is not None:
            xs = (copies[group] if copies is buffer else copies[: len(xs)]).copy_(xs)
        if masks:
            xs.masked_fill_((target[group] == spec.ignore_index)[:, None], 0.0)
        for part in _slices(group.start, group.stop, rows):
            x = xs[part.start - group.start : part.stop - group.start]
            z = logits[: len(x), :v]
            for classes, block in weight.blocks():
                product(z[:, classes], x, block.T)
            if bias is not None:
                z += bias
            yield Chunk(part, z, group, xs)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for at in range(start, stop, step):
        yield slice(at, min(at + step, stop))


def _gradient_over(z: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """(C, V) memory for the gradient: that of the logits. A row of a narrower gradient takes the
    first bytes of the row of logits."""
    dtype = min(z.dtype, operand_dtype, key=lambda dtype: dtype.itemsize)
    # a shard without classes has no memory
    if z.dtype == dtype or z.shape[1] == 0:
        return z.to(dtype)
    rows, v = z.shape
    wide = z.as_strided((rows, z.stride(0)), (z.stride(0), 1)).view(dtype)
    return wide[:, :v]


def _fp16_scale(upstream: Upstream, class_weight: Tensor | None, spec: LossSpec) -> Tensor:
    """The number that upstream gradients are divided by, so that gradients of logits fit fp16; the
    gradients of the head are multiplied by it.

    Without it a mean over many rows, a loss scaler, class weights or a scale of the logits leave
    the range of fp16. The largest factor of a row becomes 256: probabilities down to 2e-7 stay
    accurate, and a factor of 255 is left for the z-loss and the logarithms of an entropy."""

    def of_finite(t: Tensor) -> Tensor:
        return torch.where(t.isfinite(), t.abs(), 0.0).amax()

    # some numbers may not be finite: a mean over no row, the factors of ignored rows, the weights
    # of classes that are no target
    largest = [None if t is None else of_finite(t) for t in upstream]
    if class_weight is not None and largest[0] is not None:
        # a shard may have no classes
        heaviest = of_finite(torch.nn.functional.pad(class_weight.to(largest[0].dtype), (0, 1)))
        if spec.group is not None:
            # any rank may have the class of a target
            heaviest = gather(heaviest[None], spec.group).amax()
        largest[0] = largest[0] * heaviest
    most = torch.stack([t for t in largest if t is not None]).sum() * abs(spec.logit_scale or 1.0)
    return torch.where(most > 0.0, most, 1.0) / 256.0


def _valid_rows(target: Tensor, spec: LossSpec, options: LinearOptions) -> Tensor | None:
    """Indices of the rows that are not ignored, if ignored rows are dropped; None for all rows."""
    # not by default with shards: ranks whose targets differ, which is an error, must have equal
    # numbers of rows until they have compared them
    drops = options.drop_ignored
    if drops is None:
        drops = target.device.type == "cpu" and spec.group is None
    if not drops or target.is_floating_point():
        return None
    valid = target != spec.ignore_index
    return None if bool(valid.all()) else valid.nonzero()[:, 0]


def _select(head: Head, target: Tensor, valid_rows: Tensor | None) -> tuple[Head, Tensor]:
    if valid_rows is None:
        return head, target
    return head._replace(hidden=head.hidden[valid_rows]), target[valid_rows]


def _scatter(some: Tensor, valid_rows: Tensor | None, target: Tensor) -> Tensor:
    """The inverse of ``_select``; 0 for dropped rows."""
    if valid_rows is None:
        return some
    return some.new_zeros(len(target), *some.shape[1:]).index_copy_(0, valid_rows, some)


def _scatter_stats(
    stats: RowStats, valid_rows: Tensor | None, target: Tensor, spec: LossSpec
) -> RowStats:
    if valid_rows is None:
        return stats
    argmax = stats.argmax
    if argmax is not None:
        argmax = argmax.new_full((len(target),), no_class(spec)).index_copy_(0, valid_rows, argmax)
    return RowStats(
        loss=_scatter(stats.loss, valid_rows, target),
        lse=_scatter(stats.lse, valid_rows, target),
        target_logprob=_scatter(stats.target_logprob, valid_rows, target),
        entropy=None if stats.entropy is None else _scatter(stats.entropy, valid_rows, target),
        argmax=argmax,
        saved=stats.saved,
    )


def _empty_stats(hidden: Tensor, n: int, wants: Wants) -> RowStats:
    loss, lse, target_logprob, entropy = (_empty_loss(hidden, n) for _ in range(4))
    argmax = torch.empty(n, dtype=torch.int64, device=hidden.device)
    return RowStats(
        loss,
        lse,
        target_logprob,
        entropy if wants.entropy else None,
        argmax if wants.argmax else None,
        loss.new_empty(0),
    )


def _store(stats: RowStats, rows: slice, part: RowStats) -> None:
    for t, some in zip(stats[:-1], part[:-1], strict=True):
        if t is not None and some is not None:
            t[rows] = some


def _empty_loss(hidden: Tensor, n: int) -> Tensor:
    return torch.empty(
        n,
        dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
        device=hidden.device,
    )
