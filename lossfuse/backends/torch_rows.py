"""Torch code over blocks of rows that fit a cache: the CPU's backend, and that of any device
without Triton.

On a CPU the wall is page faults and memory traffic, not arithmetic. So exponentials are written
straight into the rows that will hold the gradient, and everything else happens to that block while
it is in cache. Beyond the gradient there are a block and O(N). The target (for probabilities, the
largest class) stays out of the sum of exponentials, so that ``1 - p`` and ``log p`` keep their
digits however confident the model is. Only a CPU is asked for values."""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..row_types import RowStats, Upstream, Wants, log_sum_exp, no_class
from ..spec import LossSpec
from . import threads

# for each thread. Smaller blocks pay for python, larger ones leave the cache: 1 MiB takes 1.3 to
# 1.7 times as long as 8 on two cores
CPU_BLOCK_BYTES = 8 << 20
# less than this is not worth a thread of its own
THREAD_LEAST_BYTES = 1 << 20
# elsewhere a block is a handful of kernel launches
DEVICE_BLOCK_BYTES = 64 << 20
# what all blocks beside the gradient may take together: 4 % of the logits, or this if it is more
TEMPORARY_BYTES = 3 << 20
TEMPORARY_SHARE = 25
# blocks alive at once where the logits are shaped or summed, or targets are probabilities
FEATURE_BLOCKS = 6
# of a row, whose largest class is looked for where its largest logit was found; an operator that
# tells both takes ten times as long
SEGMENT = 256
# with fewer, a segment of each row is a good part of the block
LEAST_SEGMENTS = 16
# of distances from the maximum that are multiplied and summed at a time: by all threads 2 % of the
# logits, and within these for each
SUMMED_BYTES = (1 << 19, 4 << 20)
SUMMED_SHARE = 50


def row_loss(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """(N,) losses; this backend keeps no statistics, since the gradient's blocks make their own."""
    (loss,) = _rows(logits, target, class_weight, None, spec, None, None, None)
    return loss, loss.new_empty(0, logits.shape[0])


def row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    kept: Tensor,
    upstream: Upstream,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    """Fill the gradients that are given; ``dlogits`` may be ``logits``."""
    _rows(logits, target, class_weight, upstream, spec, dlogits, dtarget, None)


def row_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> Tensor:
    """(N,) losses, and the gradients that are given filled in the same pass; ``dlogits`` may be
    ``logits``."""
    (loss,) = _rows(logits, target, class_weight, Upstream(dloss), spec, dlogits, dtarget, None)
    return loss


def row_stats(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
    upstream: Upstream | None,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> RowStats:
    """Statistics of N rows, and the gradients that are given filled in the same pass; ``dlogits``
    may be ``logits``."""
    loss, lse, target_logprob, *more = _rows(
        logits, target, class_weight, upstream, spec, dlogits, dtarget, wants
    )
    argmax = more.pop() if wants.argmax else None
    entropy = more.pop() if wants.entropy else None
    return RowStats(loss, lse, target_logprob, entropy, argmax, loss.new_empty(0, logits.shape[0]))


def head_row_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> None:
    """Torch has no product whose logits stay in registers."""


def head_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
) -> None:
    """Nor one that leaves statistics."""


def multiply_in_place(t: Tensor, factor: Tensor) -> None:
    """t *= factor, a number on the device."""
    t.mul_(factor)


def _rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Upstream | None,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    wants: Wants | None,
) -> tuple[Tensor, ...]:
    """(N,) losses, and with ``wants`` log-sum-exps, the targets' log-probabilities and what is
    wanted."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = None if class_weight is None else class_weight.to(dtype)
    up = (
        None
        if upstream is None
        else Upstream(*(None if t is None else t.to(dtype)[:, None] for t in upstream))
    )
    for grad in (dlogits, dtarget):
        if grad is not None:
            prefer_huge_pages(grad)
    n, v = logits.shape
    soft = target.is_floating_point()
    temporaries = FEATURE_BLOCKS if soft or spec.label_smoothing or spec.shapes_logits else 0
    temporaries += dlogits is None or dlogits.dtype != dtype
    # distances of a whole block where they end in its gradient, of a few rows where they are summed
    # and forgotten
    temporaries += up is not None and up.entropy is not None

    def part(rows: slice, block: int, count: int) -> tuple[Tensor, ...]:
        x, t, dx, dt = (None if a is None else a[rows] for a in (logits, target, dlogits, dtarget))
        u = None if up is None else up.of(rows)
        assert x is not None and t is not None
        columns = (
            _soft_rows(x, t, weight, u, spec, dx, dt, dtype, block, wants)
            if soft
            else _id_rows(
                x,
                t[:, None],
                weight,
                u,
                spec,
                dx,
                dtype,
                block,
                summed_rows(n, v, dtype.itemsize, count),
                wants,
            )
        )
        return tuple(column[:, 0] for column in columns)

    parts = in_parts(logits, dtype, temporaries, part)
    return (
        parts[0]
        if len(parts) == 1
        else tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    )


T = TypeVar("T")


def in_parts(
    logits: Tensor, dtype: torch.dtype, temporaries: int, part: Callable[[slice, int, int], T]
) -> list[T]:
    """``part(rows, rows of a block, threads)`` for all rows, by as many threads as have enough to
    do."""
    (n, v), on_cpu = logits.shape, logits.device.type == "cpu"
    count = threads_for(n * v, logits.element_size(), dtype.itemsize, temporaries) if on_cpu else 1
    block = block_rows(n, v, logits.element_size(), dtype.itemsize, on_cpu, temporaries, count)
    if count == 1:
        return [part(slice(0, n), block, count)]
    # several parts for each thread, whole blocks, for when one of them is held up
    length = max(block, -(-n // (4 * count * block)) * block)
    return threads.run(
        [functools.partial(part, slice(i, i + length), block, count) for i in range(0, n, length)],
        count,
    )


def _spreads(up: Upstream | None, wants: Wants | None) -> bool:
    """Whether entropies are computed, which takes a block for the logits' distances from their
    maximum."""
    return (wants is not None and wants.entropy) or (up is not None and up.entropy is not None)


def threads_for(numel: int, itemsize: int, work_itemsize: int, temporaries: int) -> int:
    """How many threads take blocks of their own: as many as there are, if each has enough to do and
    the temporaries stay what they are."""
    enough = numel * work_itemsize // THREAD_LEAST_BYTES
    if temporaries:
        enough = min(
            enough,
            max(TEMPORARY_BYTES, numel * itemsize // TEMPORARY_SHARE)
            // temporaries
            // THREAD_LEAST_BYTES,
        )
    return max(1, min(threads.workers(), enough))


def block_rows(
    n: int, v: int, itemsize: int, work_itemsize: int, cpu: bool, temporaries: int, count: int = 1
) -> int:
    """The rows of a block of (N, V) logits, with so many temporaries of a block alive at once in
    each of ``count`` threads."""
    size = CPU_BLOCK_BYTES if cpu else DEVICE_BLOCK_BYTES
    if temporaries:
        size = min(
            size, max(TEMPORARY_BYTES, n * v * itemsize // TEMPORARY_SHARE) // (temporaries * count)
        )
    return max(1, min(n, size // (v * work_itemsize)))


def summed_rows(n: int, v: int, work_itemsize: int, count: int = 1) -> int:
    """The rows of (N, V) logits whose distances from the maximum are summed at a time, in each of
    ``count`` threads."""
    least, most = SUMMED_BYTES
    return max(
        1,
        min(most, max(least, n * v * work_itemsize // (SUMMED_SHARE * count)))
        // (v * work_itemsize),
    )


def _blocks(
    logits: Tensor, dlogits: Tensor | None, dtype: torch.dtype, rows: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits, a block to work in): rows of ``dlogits`` if they have the dtype, otherwise
    scratch, copied there after the work."""
    n, v = logits.shape
    direct = dlogits if dlogits is not None and dlogits.dtype == dtype else None
    scratch = torch.empty(
        0 if direct is not None else min(rows, n), v, dtype=dtype, device=logits.device
    )
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        work = direct[block] if direct is not None else scratch[: block.stop - block.start]
        yield block, logits[block], work
        if dlogits is not None and direct is None:
            dlogits[block].copy_(work)


def _id_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    up: Upstream | None,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtype: torch.dtype,
    block: int,
    summed: int,
    wants: Wants | None,
) -> list[Tensor]:
    """(N, 1) losses and statistics against (N, 1) class ids; entropies of ``summed`` rows at a
    time."""
    n, v = logits.shape
    ignored = target == spec.ignore_index
    valid = ~ignored & (target >= 0) & (target < v)
    y = torch.where(valid, target, 0)
    ones = torch.ones((), dtype=dtype, device=logits.device)
    w_y = ones.expand(n, 1) if weight is None else weight[y]
    kept = (1.0 - spec.label_smoothing) * w_y
    smooth = spec.label_smoothing / v
    # of the weights that may be of nobody, only if labels are smoothed
    smooth_sum = smooth * (v * ones if weight is None else weight.sum()) if smooth else 0.0 * ones
    up = Upstream() if up is None else up
    dloss = 0.0 * ones.expand(n, 1) if up.loss is None else up.loss
    # of the negative log-likelihood; a target outside [0, V) makes its row NaN
    dnll = torch.where(
        valid,
        dloss * kept if up.target_logprob is None else dloss * kept - up.target_logprob,
        torch.nan,
    )
    spreads = _spreads(up, wants)
    some = block if up.entropy is not None else min(block, summed)
    distances = torch.empty(min(some, n) if spreads else 0, v, dtype=dtype, device=logits.device)

    row_max, margin, others, shortfall, spread = torch.empty(
        5, n, 1, dtype=dtype, device=logits.device
    )
    wants_top = wants is not None and wants.argmax
    top = torch.empty(n if wants_top else 0, 1, dtype=torch.int64, device=logits.device)
    for rows, x, p in _blocks(logits, dlogits, dtype, block):
        if _nowhere(valid[rows]):
            continue
        y_b, margin_b, others_b = y[rows], margin[rows], others[rows]
        z, slope = shaped(x, spec, p)
        if wants_top:
            row_max[rows], top[rows] = largest(z)
        else:
            torch.amax(z, -1, keepdim=True, out=row_max[rows])
        if spreads:
            torch.gather(z, 1, y_b, out=margin_b).sub_(row_max[rows])
            for i in range(0, len(p), some):
                part, at = (
                    slice(i, i + some),
                    slice(rows.start + i, min(rows.start + i + some, rows.stop)),
                )
                d = torch.sub(z[part], row_max[at], out=distances[: at.stop - at.start])
                if smooth:
                    torch.sum(times(-d, weight), -1, keepdim=True, out=shortfall[at])
                moments, spread[at] = moments_of(torch.exp(d, out=p[part]), d)
        else:
            torch.sub(z, row_max[rows], out=p)
            torch.gather(p, 1, y_b, out=margin_b)
            if smooth:
                torch.sum(times(-p, weight), -1, keepdim=True, out=shortfall[rows])
            p.exp_()
        e_y = margin_b.exp()
        if up.entropy is not None:
            moment_y = moments.gather(1, y_b)
        p.scatter_(1, y_b, 0.0)
        torch.sum(p, -1, keepdim=True, out=others_b)
        if dlogits is None:
            continue

        factor, per_sum = dnll[rows], 1.0 / (others_b + e_y)
        dy = others_b * factor
        if smooth or spec.lse_square_scale or up.lse is not None:
            # what multiplies every p alike, the target's among them
            flat = dloss[rows] * (
                smooth_sum + 2.0 * spec.lse_square_scale * (row_max[rows] + _log_sum(others_b, e_y))
            )
            if up.lse is not None:
                flat += up.lse[rows]
            dy -= flat * e_y
            factor = factor + flat
        if up.entropy is not None:
            # p * (mean distance - distance), but for the sum of exponentials
            mean = spread[rows] * per_sum
            dy += up.entropy[rows] * (moment_y - mean * e_y)
            factor = factor + up.entropy[rows] * mean
        p.mul_(factor * per_sum)
        dy *= -per_sum
        if up.entropy is not None:
            p.addcmul_(moments, up.entropy[rows] * per_sum, value=-1.0)
        if smooth:
            p.addcmul_(
                (ones if weight is None else weight).expand_as(p),
                dloss[rows].expand_as(p),
                value=-smooth,
            )
            dy -= smooth * w_y[rows] * dloss[rows]
        p.scatter_(1, y_b, dy)
        if slope is not None:
            p.mul_(slope)

    if dlogits is not None:
        zero_rows(dlogits, ignored)
    e_y = margin.exp()
    log_sum = _log_sum(others, e_y)
    loss = (log_sum - margin) * kept
    if smooth:
        loss += smooth_sum * log_sum + smooth * shortfall
    if spec.lse_square_scale:
        loss += spec.lse_square_scale * (row_max + log_sum).square_()
    columns = [loss]
    if wants is not None:
        columns += [log_sum_exp(row_max, log_sum), margin - log_sum]
        if wants.entropy:
            columns.append(log_sum - spread / (others + e_y))
    columns = [
        torch.where(ignored, 0.0, torch.where(valid, column, torch.nan)) for column in columns
    ]
    return [*columns, torch.where(valid, top, no_class(spec))] if wants_top else columns


def _soft_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    up: Upstream | None,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    dtype: torch.dtype,
    block: int,
    wants: Wants | None,
) -> list[Tensor]:
    """(N, 1) losses and statistics against (N, V) probabilities."""
    n, v = logits.shape
    # results of an operator share no memory
    loss, all_lse, target_logprob, entropy = (
        torch.empty(n, 1, dtype=dtype, device=logits.device) for _ in range(4)
    )
    all_top = torch.empty(n, 1, dtype=torch.int64, device=logits.device)
    for rows, x, p in _blocks(logits, dlogits, dtype, block):
        z, slope = shaped(x, spec, p)
        row_max, top = largest(z)
        d = z - row_max
        t = target[rows].to(dtype)
        q = t
        if spec.label_smoothing:
            q = q * (1.0 - spec.label_smoothing) + spec.label_smoothing / v
        q = times(q, weight)
        if wants is not None:
            # before classes are left out by their weights, which are the loss's alone
            torch.sum(
                torch.where((t == 0.0) & (d == -torch.inf), 0.0, t * d),
                -1,
                keepdim=True,
                out=target_logprob[rows],
            )
        # a class of zero mass is out of the sum even where its logit is -inf
        out = (q == 0.0) & (d == -torch.inf)
        d.masked_fill_(out, 0.0)
        torch.exp(d, out=p)
        p.masked_fill_(out, 0.0)
        if _spreads(up, wants):
            moments, spread = moments_of(p, d.clone())
        p.scatter_(1, top, 0.0)
        # the NaN that a +inf logit makes stood at the top
        others = torch.where(row_max == torch.inf, torch.nan, p.sum(-1, keepdim=True))
        mass = q.sum(-1, keepdim=True)
        log_sum, sum_exp = torch.log1p(others), 1.0 + others
        lse = row_max + log_sum
        loss[rows] = (
            mass * log_sum - (q * d).sum(-1, keepdim=True) + spec.lse_square_scale * lse * lse
        )
        if wants is not None:
            all_lse[rows], all_top[rows] = log_sum_exp(row_max, log_sum), top
            target_logprob[rows] -= t.sum(-1, keepdim=True) * log_sum
            if wants.entropy:
                entropy[rows] = log_sum - spread / sum_exp
        if up is None:
            continue

        dloss_b = torch.zeros_like(lse) if up.loss is None else up.loss[rows]
        dlogprob_b = None if up.target_logprob is None else up.target_logprob[rows]
        if dlogits is not None:
            flat = 2.0 * spec.lse_square_scale * lse * dloss_b
            if up.lse is not None:
                flat = flat + up.lse[rows]
            dmass, dq_top = mass * dloss_b, q.gather(1, top) * dloss_b
            if dlogprob_b is not None:
                dmass = dmass - t.sum(-1, keepdim=True) * dlogprob_b
                dq_top = dq_top - t.gather(1, top) * dlogprob_b
            if up.entropy is not None:
                flat = flat + up.entropy[rows] * spread / sum_exp
            # mass * p - q cancels where p is nearly 1
            d_top = torch.where(
                others < 1.0, (dmass - dq_top) - dmass * others / sum_exp, dmass / sum_exp - dq_top
            )
            p.mul_((dmass + flat) / sum_exp).addcmul_(q, dloss_b, value=-1.0)
            if dlogprob_b is not None:
                p.addcmul_(t, dlogprob_b)
            if up.entropy is not None:
                p.addcmul_(moments, up.entropy[rows] / sum_exp, value=-1.0)
            p.scatter_(1, top, d_top + flat / sum_exp)
            if slope is not None:
                p.mul_(slope)
        if dtarget is not None:
            nll = log_sum - d
            dt = (
                times(nll, weight)
                .mul((1.0 - spec.label_smoothing) * dloss_b)
                .masked_fill_(out, 0.0)
            )
            if dlogprob_b is not None:
                nll.masked_fill_(out, torch.inf)
                dt -= torch.where((t == 0.0) & (nll == torch.inf), 0.0, nll * dlogprob_b)
            dtarget[rows].copy_(dt)
    if wants is None:
        return [loss]
    return [
        loss,
        all_lse,
        target_logprob,
        *([entropy] if wants.entropy else []),
        *([all_top] if wants.argmax else []),
    ]


def largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """(B, V) -> the largest of each row and the first class that has it, each (B, 1)."""
    v = z.shape[1]
    whole = v // SEGMENT
    if whole < LEAST_SEGMENTS:
        return torch.max(z, -1, keepdim=True)
    tops = z[:, : whole * SEGMENT].unflatten(1, (whole, SEGMENT)).amax(-1)
    if v > whole * SEGMENT:
        tops = torch.cat([tops, z[:, whole * SEGMENT :].amax(-1, keepdim=True)], 1)
    start = tops.argmax(-1, keepdim=True) * SEGMENT
    # beyond the last class that class again, which is not the first then
    classes = (start + torch.arange(SEGMENT, device=z.device)).clamp_(max=v - 1)
    largest, at = torch.max(z.gather(1, classes), -1, keepdim=True)
    return largest, start + at


def moments_of(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """e * d, in ``d``, and its sums (B, 1); nothing for a logit of -inf, whose exponential is 0."""
    sums = d.mul_(e).sum(-1, keepdim=True)
    if d.device.type != "cpu" or sums.isnan().any():
        sums = d.masked_fill_(d.isnan(), 0.0).sum(-1, keepdim=True)
    return d, sums


def shaped(x: Tensor, spec: LossSpec, scratch: Tensor) -> tuple[Tensor, Tensor | float | None]:
    """The logits the loss sees and their derivative (None for 1); in ``scratch`` if ``x`` is not in
    its dtype, and maybe ``x`` itself."""
    z = x if x.dtype == scratch.dtype else scratch.copy_(x)
    slope: Tensor | float | None = None
    if spec.logit_scale is not None:
        z = z * spec.logit_scale
        slope = spec.logit_scale
    if spec.softcap is not None:
        u = z / spec.softcap
        z = torch.tanh(u).mul_(spec.softcap)
        # 1 / cosh^2 keeps its digits where 1 - tanh^2 has none left
        slope = (1.0 if slope is None else slope) / u.cosh_().square_()
    return z, slope


def _log_sum(others: Tensor, e_y: Tensor) -> Tensor:
    """log of the sum of exponentials, the target's and the others': exact where they are 1 and
    nearly 0."""
    return torch.log1p(others + (e_y - 1.0))


def times(x: Tensor, weight: Tensor | None) -> Tensor:
    """x * weight, where a weight of 0 takes a class out even if x is infinite."""
    return x if weight is None else (x * weight).masked_fill_((weight == 0.0) & x.isinf(), 0.0)


def _nowhere(mask: Tensor) -> bool:
    """Whether a block can be skipped: looked up on the CPU, denied elsewhere rather than
    synchronise."""
    return mask.device.type == "cpu" and not mask.any()


def zero_rows(dlogits: Tensor, ignored: Tensor) -> None:
    """Not by a factor of 0: ignored rows may hold NaN."""
    if ignored.device.type == "cpu":
        dlogits.index_fill_(0, ignored[:, 0].nonzero()[:, 0], 0.0)
    else:
        dlogits.masked_fill_(ignored, 0.0)


_MADV_HUGEPAGE = 14
_PAGE, _HUGE_PAGE = 4096, 2 << 20
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def prefer_huge_pages(fresh: Tensor) -> None:
    """Ask Linux for huge pages under a new tensor, as numpy does: faulting in small ones takes
    longer than the loss. A hint, no more."""
    first = -(-fresh.data_ptr() // _PAGE) * _PAGE
    end = (fresh.data_ptr() + fresh.numel() * fresh.element_size()) // _PAGE * _PAGE
    if _libc is not None and fresh.device.type == "cpu" and end - first >= 2 * _HUGE_PAGE:
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
