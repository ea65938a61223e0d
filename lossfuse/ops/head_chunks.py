"""The chunk loop of ``linear_cross_entropy``: hidden states and a head -> losses and gradients, a
chunk of logits at a time.

For each chunk of rows: the product that makes its logits, the row losses with the gradient written
over the logits, the products that make gradients of it. Backends give the row losses; the products
are torch's. N rows, D wide, V classes."""

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import without_autocast
from ..row_types import RowStats, Upstream, Wants, no_class
from ..spec import LinearOptions, LossSpec
from ..vocab_parallel.backend import even_classes, gather
from .matmul import Weight, mixes, narrow_on_cpu, product

# elements on which a row of logits starts, so that every access to it is wide and cuBLAS likes its
# stride
ROW_ALIGNMENT = 16
# rows of a tile of a product
TILE_ROWS = 128


class Head(NamedTuple):
    """What logits are made of."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    target: bool


class Gradients(NamedTuple):
    """None for what is not wanted; all but the target's in the dtype they are summed in."""

    hidden: Tensor | None = None  # (N, D)
    weight: Tensor | None = None  # (V, D)
    bias: Tensor | None = None  # (V,)
    target: Tensor | None = None  # (N, V)


def padded(v: int) -> int:
    """From one row of logits to the next, in elements."""
    return -(-v // ROW_ALIGNMENT) * ROW_ALIGNMENT


def chunk_rows(
    n: int, d: int, v: int, dtype: torch.dtype, options: LinearOptions, *, cpu: bool
) -> int:
    """Rows of a chunk: equal chunks, as few as the bytes allow; only the last may be shorter.

    On an accelerator a chunk of C rows costs, beside the 6 C D V operations of its products,

    - the weight read twice, 4 V D bytes in bfloat16, and its gradient's sum read and written, 8 V D
      bytes in float32, whatever C is. Half of that hides behind the products; they catch up with it
      at C = 1000 for a sum in bfloat16 and at 2000 for one in float32 (H100: the product that adds
      to the sum reaches 437 TFLOP/s at C = 1024 and 589 at 2048, of 651 at 8192);
    - a gradient of the hidden states of C x D, in tiles of 128 x 256, that leaves multiprocessors
        idle below C D = 2^22;
    - the logits, written, read and overwritten by their gradient, whatever C is.

    Beyond 4096 rows 1 or 2 % are left. So without ``chunk_bytes`` a chunk has 1 GiB of logits, but
    at least the rows above and at most 4096: 2048 for V = 128256 in float32, where 8192 rows then
    take 41.2 ms on an H100 (the three products alone 37.0), and 4096 take as long. On a CPU
    products reach their speed with some hundred rows: 256 MiB, at least 256 rows, at most 512.

    Args:
        n, d, v: rows, width, classes.
        dtype: of the operands.
        options: ``chunk_bytes``, which is obeyed down to a single row, ``logits_dtype`` and
            ``acc_dtype``.
        cpu: whether a CPU computes.
    """
    row_bytes = padded(v) * options.dtype("logits_dtype", dtype).itemsize
    if options.chunk_bytes is not None:
        most = options.chunk_bytes // row_bytes
    elif cpu:
        most = min(max((256 << 20) // row_bytes, 256), 512)
    else:
        wide_sum = options.dtype("acc_dtype", dtype).itemsize > 2
        least = max(2048 if wide_sum else 1024, 2**22 // max(d, 1))
        most = min(max((1 << 30) // row_bytes, least), 4096)
    most = max(1, min(most, n))
    equal = math.ceil(n / math.ceil(n / most)) if n else 1
    tiled = -(-equal // TILE_ROWS) * TILE_ROWS
    return tiled if tiled <= most else equal


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
        kept = _kept(target, spec, options)
        some, some_target = _rows_of(head, target, kept)
        loss: Tensor | None = backend.head_row_loss(*some, some_target, class_weight, spec)
        if loss is None:
            loss = _empty_loss(head.hidden, len(some_target))
            weight = _weight(some, spec, options)
            for rows, _, z in _logits(
                some, weight, some_target, spec, options, None, dropped=kept is not None
            ):
                loss[rows] = backend.row_loss(z, some_target[rows], class_weight, spec)[0]
        return _put_back(loss, kept, target)


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
    kept = _kept(target, spec, options)
    loss = _empty_loss(head.hidden, len(target if kept is None else kept))

    def fill(
        rows: slice, z: Tensor, t: Tensor, up: Upstream, g: Tensor | None, dt: Tensor | None
    ) -> None:
        loss[rows] = backend.row_loss_and_grads(z, t, class_weight, up.loss, spec, g, dt)

    grads = _grads(head, target, class_weight, Upstream(dloss), needs, spec, options, kept, fill)
    return _put_back(loss, kept, target), grads


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
        kept = _kept(target, spec, options)
        some, some_target = _rows_of(head, target, kept)
        made: RowStats | None = backend.head_row_stats(
            *some, some_target, class_weight, spec, wants
        )
        if made is None:
            made = _empty_stats(head.hidden, len(some_target), wants)
            weight = _weight(some, spec, options)
            for rows, _, z in _logits(
                some, weight, some_target, spec, options, None, dropped=kept is not None
            ):
                _store(
                    made,
                    rows,
                    backend.row_stats(
                        z, some_target[rows], class_weight, spec, wants, None, None, None
                    ),
                )
        return _stats_put_back(made, kept, target, spec)


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
    kept = _kept(target, spec, options)
    made = _empty_stats(head.hidden, len(target if kept is None else kept), wants)

    def fill(
        rows: slice, z: Tensor, t: Tensor, up: Upstream, g: Tensor | None, dt: Tensor | None
    ) -> None:
        _store(made, rows, backend.row_stats(z, t, class_weight, spec, wants, up, g, dt))

    grads = _grads(head, target, class_weight, upstream, needs, spec, options, kept, fill)
    return _stats_put_back(made, kept, target, spec), grads


# (rows, their logits, targets, upstream gradients, where the gradients of logits and of targets go)
Fill = Callable[[slice, Tensor, Tensor, Upstream, Tensor | None, Tensor | None], None]


def _grads(
    head: Head,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Upstream,
    needs: Needs,
    spec: LossSpec,
    options: LinearOptions,
    kept: Tensor | None,
    fill: Fill,
) -> Gradients:
    """The gradients of a head, from the gradient that ``fill`` writes over each chunk of logits."""
    with without_autocast(head.hidden):
        some, some_target = _rows_of(head, target, kept)
        upstream = upstream if kept is None else upstream.of(kept)
        hidden, weight = head.hidden, head.weight
        acc_dtype = options.dtype("acc_dtype", hidden.dtype)
        dhidden = (
            torch.empty_like(some.hidden, dtype=acc_dtype, memory_format=torch.contiguous_format)
            if needs.hidden
            else None
        )
        # the first chunk's product fills it; without a chunk nothing does
        dweight = (
            torch.empty_like(weight, dtype=acc_dtype, memory_format=torch.contiguous_format)
            if needs.weight
            else None
        )
        dbias = weight.new_zeros(len(weight), dtype=acc_dtype) if needs.bias else None
        dtarget = (
            torch.empty(target.shape, dtype=target.dtype, device=target.device)
            if needs.target
            else None
        )
        if dweight is not None and len(some.hidden) == 0:
            dweight.zero_()

        unit = None
        operands = _weight(some, spec, options)
        for rows, x, z in _logits(
            some, operands, some_target, spec, options, dhidden, dropped=kept is not None
        ):
            g = None
            if needs.hidden or needs.weight or needs.bias:
                g = _gradient_over(z, x.dtype)
                if g.dtype == torch.float16 and unit is None:
                    unit = _unit(upstream, class_weight, spec)
            x_target, up, dt = (
                some_target[rows],
                upstream.of(rows),
                None if dtarget is None else dtarget[rows],
            )
            if unit is not None:
                if dt is not None:
                    # no operand of a product, so it has no unit
                    fill(rows, z, x_target, up, None, dt)
                up, dt = up.over(unit), None
            fill(rows, z, x_target, up, g, dt)
            if g is None:
                continue
            dx = None
            if dhidden is not None:
                # added up as wide as it is computed, rounded once
                dx = dhidden[rows] if operands.whole else torch.empty_like(x)
            for classes, block in operands.blocks():
                part = g[:, classes].to(x.dtype)
                # before dx, which may be written over x
                if dweight is not None:
                    product(dweight[classes], part.T, x, add=rows.start > 0)
                if dx is not None:
                    product(dx, part, block, add=classes.start > 0)
            if dhidden is not None and dx is not None and not operands.whole:
                dhidden[rows] = dx
            if dbias is not None:
                dbias += g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))

        if unit is not None:
            for made in (dhidden, dweight, dbias):
                if made is not None:
                    made *= unit
        if dhidden is not None:
            dhidden = _put_back(dhidden, kept, target)
        return Gradients(dhidden, dweight, dbias, dtarget)


def _operand_dtype(head: Head, options: LinearOptions) -> torch.dtype:
    """float32 logits of half-precision operands: by a product that has them, or of operands made
    float32."""
    hidden, logits_dtype = head.hidden, options.dtype("logits_dtype", head.hidden.dtype)
    if mixes(hidden.device):
        return hidden.dtype
    if hidden.device.type != "cpu":
        return logits_dtype
    # products in bfloat16 of logits whose gradients are summed in float32 would convert the whole
    # weight's gradient
    narrow = options.dtype("acc_dtype", hidden.dtype) == logits_dtype and narrow_on_cpu(
        logits_dtype, hidden.shape[1], len(head.weight)
    )
    return logits_dtype if narrow else torch.promote_types(logits_dtype, torch.float32)


def _step(head: Head, spec: LossSpec, options: LinearOptions) -> int:
    """Rows of a chunk."""
    (n, d), v, on_cpu = head.hidden.shape, len(head.weight), head.hidden.device.type == "cpu"
    # every rank takes as many chunks, however many classes are its own
    return chunk_rows(
        n,
        d,
        v if spec.group is None else even_classes(spec),
        head.hidden.dtype,
        options,
        cpu=on_cpu,
    )


def _weight(head: Head, spec: LossSpec, options: LinearOptions) -> Weight:
    """The weight as the products of a chunk take it."""
    dtype = _operand_dtype(head, options)
    # narrower logits are converted with their block of the weight, and so are their gradients
    converted = options.dtype("logits_dtype", head.hidden.dtype).itemsize < dtype.itemsize
    return Weight(
        head.weight, dtype, min(_step(head, spec, options), len(head.hidden)) if converted else 0
    )


def _logits(
    head: Head,
    weight: Weight,
    target: Tensor,
    spec: LossSpec,
    options: LinearOptions,
    dhidden: Tensor | None,
    *,
    dropped: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, hidden states as the products take them, logits) of one chunk after the other, in the
    same memory.

    Where hidden states must be copied, the copy is put where their gradient will be, if it fits
    there."""
    hidden, _, bias = head
    (n, d), v = hidden.shape, len(head.weight)
    dtype = _operand_dtype(head, options)
    # a product with a gradient of 0 would keep the NaN that an ignored row may hold
    masks = not (dropped or target.is_floating_point())
    step = _step(head, spec, options)
    room = torch.empty(
        min(step, n),
        padded(v),
        dtype=options.dtype("logits_dtype", hidden.dtype),
        device=hidden.device,
    )
    copies = None
    if masks or dtype != hidden.dtype:
        fits = dhidden is not None and dhidden.dtype == dtype and weight.whole
        copies = (
            dhidden if fits else torch.empty(min(step, n), d, dtype=dtype, device=hidden.device)
        )
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        x = hidden[rows]
        if copies is not None:
            x = (copies[rows] if copies is dhidden else copies[: len(x)]).copy_(x)
        if masks:
            x.masked_fill_((target[rows] == spec.ignore_index)[:, None], 0.0)
        z = room[: len(x), :v]
        for classes, block in weight.blocks():
            product(z[:, classes], x, block.T)
        if bias is not None:
            z += bias
        yield rows, x, z


def _gradient_over(z: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """(C, V) for the gradient over the logits: a row of it in the first bytes of the row it takes
    the place of, if it is narrower."""
    dtype = min(z.dtype, operand_dtype, key=lambda dtype: dtype.itemsize)
    # a shard without classes has no bytes to share
    if z.dtype == dtype or z.shape[1] == 0:
        return z.to(dtype)
    rows, v = z.shape
    wide = z.as_strided((rows, z.stride(0)), (z.stride(0), 1)).view(dtype)
    return wide[:, :v]


def _unit(upstream: Upstream, class_weight: Tensor | None, spec: LossSpec) -> Tensor:
    """What gradients of logits are divided by before they are rounded to fp16, and their products
    multiplied by.

    A mean over many rows, a loss scaler, class weights or a scale of the logits take them out of
    the range of fp16. The largest factor of a row becomes 256: probabilities keep their digits down
    to 2e-7, and 255 are left for the z-loss and the logarithms of an entropy."""

    def of_finite(t: Tensor) -> Tensor:
        return torch.where(t.isfinite(), t.abs(), 0.0).amax()

    # a mean over no row is divided by 0, an ignored row's factor may be anything, and so may be the
    # weight of a class that is no target
    largest = [None if t is None else of_finite(t) for t in upstream]
    if class_weight is not None and largest[0] is not None:
        # a shard may have no classes
        heaviest = of_finite(torch.nn.functional.pad(class_weight.to(largest[0].dtype), (0, 1)))
        if spec.group is not None:
            # a row's factor is the weight of its target, wherever that is
            heaviest = gather(heaviest[None], spec.group).amax()
        largest[0] = largest[0] * heaviest
    most = torch.stack([t for t in largest if t is not None]).sum() * abs(spec.logit_scale or 1.0)
    return torch.where(most > 0.0, most, 1.0) / 256.0


def _kept(target: Tensor, spec: LossSpec, options: LinearOptions) -> Tensor | None:
    """The rows that count, where the others are to be left out; None for all."""
    # ranks whose targets differ, which is an error, must be as many rows to one another until they
    # find it
    drop = (
        options.drop_ignored
        if options.drop_ignored is not None
        else target.device.type == "cpu" and spec.group is None
    )
    if not drop or target.is_floating_point():
        return None
    kept = target != spec.ignore_index
    return None if bool(kept.all()) else kept.nonzero()[:, 0]


def _rows_of(head: Head, target: Tensor, kept: Tensor | None) -> tuple[Head, Tensor]:
    return (
        (head, target) if kept is None else (head._replace(hidden=head.hidden[kept]), target[kept])
    )


def _put_back(some: Tensor, kept: Tensor | None, target: Tensor) -> Tensor:
    """Zeros for the rows that were left out."""
    return (
        some
        if kept is None
        else some.new_zeros(len(target), *some.shape[1:]).index_copy_(0, kept, some)
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


def _store(made: RowStats, rows: slice, some: RowStats) -> None:
    for t, part in zip(made[:-1], some[:-1], strict=True):
        if t is not None and part is not None:
            t[rows] = part


def _stats_put_back(
    made: RowStats, kept: Tensor | None, target: Tensor, spec: LossSpec
) -> RowStats:
    if kept is None:
        return made
    argmax = made.argmax
    if argmax is not None:
        argmax = argmax.new_full((len(target),), no_class(spec)).index_copy_(0, kept, argmax)
    return RowStats(
        loss=_put_back(made.loss, kept, target),
        lse=_put_back(made.lse, kept, target),
        target_logprob=_put_back(made.target_logprob, kept, target),
        entropy=None if made.entropy is None else _put_back(made.entropy, kept, target),
        argmax=argmax,
        kept=made.kept,
    )


def _empty_loss(hidden: Tensor, n: int) -> Tensor:
    return torch.empty(
        n,
        dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
        device=hidden.device,
    )
