"""Torch code over blocks of rows that fit a cache: the CPU's backend, and that of any device without Triton.

On a CPU the wall is page faults and memory traffic, not arithmetic. So exponentials are written straight into the rows that will hold
the gradient, and everything else happens to that block while it is in cache. Beyond the gradient there are a block and O(N). The target
(for probabilities, the largest class) stays out of the sum of exponentials, so that ``1 - p`` and ``log p`` keep their digits however
confident the model is. Only a CPU is asked for values.
"""

import ctypes
import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ..spec import LossSpec
from . import threads

# for each thread. Smaller blocks pay for python, larger ones leave the cache: 1 MiB takes 1.3 to 1.7 times as long as 8 on two cores
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


def row_loss(logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(N,) losses; this backend keeps no statistics, since the gradient's blocks make their own."""
    loss = _rows(logits, target, class_weight, None, spec, None, None)
    return loss, loss.new_empty(0, logits.shape[0])


def row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    """Fill the gradients that are given; ``dlogits`` may be ``logits``."""
    _rows(logits, target, class_weight, dloss, spec, dlogits, dtarget)


def row_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> Tensor:
    """(N,) losses, and the gradients that are given filled in the same pass; ``dlogits`` may be ``logits``."""
    return _rows(logits, target, class_weight, dloss, spec, dlogits, dtarget)


def head_row_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, spec: LossSpec) -> None:
    """Torch has no product whose logits stay in registers."""


def multiply_in_place(t: Tensor, factor: Tensor) -> None:
    """t *= factor, a number on the device."""
    t.mul_(factor)


def _rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor | None,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = None if class_weight is None else class_weight.to(dtype)
    dloss = None if dloss is None else dloss.to(dtype)[:, None]
    for grad in (dlogits, dtarget):
        if grad is not None:
            prefer_huge_pages(grad)
    n, v = logits.shape
    on_cpu = logits.device.type == "cpu"
    soft = target.is_floating_point()
    temporaries = FEATURE_BLOCKS if soft or spec.label_smoothing or spec.shapes_logits else 0
    temporaries += dlogits is None or dlogits.dtype != dtype
    count = threads_for(n * v, logits.element_size(), dtype.itemsize, temporaries) if on_cpu else 1
    block = block_rows(n, v, logits.element_size(), dtype.itemsize, on_cpu, temporaries, count)

    def part(rows: slice) -> Tensor:
        x, t, d, dx, dt = (None if a is None else a[rows] for a in (logits, target, dloss, dlogits, dtarget))
        assert x is not None and t is not None
        if soft:
            return _soft_rows(x, t, weight, d, spec, dx, dt, dtype, block)[:, 0]
        return _id_rows(x, t[:, None], weight, d, spec, dx, dtype, block)[:, 0]

    if count == 1:
        return part(slice(0, n))
    # several parts for each thread, whole blocks, for when one of them is held up
    length = max(block, -(-n // (4 * count * block)) * block)
    return torch.cat(threads.run([functools.partial(part, slice(i, i + length)) for i in range(0, n, length)], count))


def threads_for(numel: int, itemsize: int, work_itemsize: int, temporaries: int) -> int:
    """How many threads take blocks of their own: as many as there are, if each has enough to do and the temporaries stay what they are."""
    enough = numel * work_itemsize // THREAD_LEAST_BYTES
    if temporaries:
        enough = min(enough, max(TEMPORARY_BYTES, numel * itemsize // TEMPORARY_SHARE) // temporaries // THREAD_LEAST_BYTES)
    return max(1, min(threads.workers(), enough))


def block_rows(n: int, v: int, itemsize: int, work_itemsize: int, cpu: bool, temporaries: int, count: int = 1) -> int:
    """The rows of a block of (N, V) logits, with so many temporaries of a block alive at once in each of ``count`` threads."""
    size = CPU_BLOCK_BYTES if cpu else DEVICE_BLOCK_BYTES
    if temporaries:
        size = min(size, max(TEMPORARY_BYTES, n * v * itemsize // TEMPORARY_SHARE) // (temporaries * count))
    return max(1, min(n, size // (v * work_itemsize)))


def _blocks(logits: Tensor, dlogits: Tensor | None, dtype: torch.dtype, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits, a block to work in): rows of ``dlogits`` if they have the dtype, otherwise scratch, copied there after the work."""
    n, v = logits.shape
    direct = dlogits if dlogits is not None and dlogits.dtype == dtype else None
    scratch = torch.empty(0 if direct is not None else min(rows, n), v, dtype=dtype, device=logits.device)
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
    dloss: Tensor | None,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtype: torch.dtype,
    block: int,
) -> Tensor:
    """(N, 1) losses against (N, 1) class ids."""
    n, v = logits.shape
    ignored = target == spec.ignore_index
    valid = ~ignored & (target >= 0) & (target < v)
    y = torch.where(valid, target, 0)
    ones = torch.ones((), dtype=dtype, device=logits.device)
    w_y = ones.expand(n, 1) if weight is None else weight[y]
    kept = (1.0 - spec.label_smoothing) * w_y
    smooth = spec.label_smoothing / v
    smooth_sum = smooth * (v * ones if weight is None else weight.sum())
    # a target outside [0, V) makes its row NaN
    dloss = torch.where(valid, ones if dloss is None else dloss, torch.nan)

    row_max, margin, others, shortfall = torch.empty(4, n, 1, dtype=dtype, device=logits.device)
    for rows, x, p in _blocks(logits, dlogits, dtype, block):
        if _nowhere(valid[rows]):
            continue
        y_b, margin_b, others_b = y[rows], margin[rows], others[rows]
        z, slope = _shaped(x, spec, p)
        torch.amax(z, -1, keepdim=True, out=row_max[rows])
        torch.sub(z, row_max[rows], out=p)
        torch.gather(p, 1, y_b, out=margin_b)
        if smooth:
            torch.sum(_times(-p, weight), -1, keepdim=True, out=shortfall[rows])
        p.exp_().scatter_(1, y_b, 0.0)
        torch.sum(p, -1, keepdim=True, out=others_b)
        if dlogits is None:
            continue

        e_y, kept_b, dloss_b = margin_b.exp(), kept[rows], dloss[rows]
        per_sum = dloss_b / (others_b + e_y)
        dy = others_b * kept_b
        if smooth or spec.lse_square_scale:
            # what multiplies every p alike, the target's among them
            flat = smooth_sum + 2.0 * spec.lse_square_scale * (row_max[rows] + _log_sum(others_b, e_y))
            dy -= flat * e_y
            kept_b = kept_b + flat
        p.mul_(kept_b * per_sum)
        dy *= -per_sum
        if smooth:
            p.addcmul_((ones if weight is None else weight).expand_as(p), dloss_b.expand_as(p), value=-smooth)
            dy -= smooth * w_y[rows] * dloss_b
        p.scatter_(1, y_b, dy)
        if slope is not None:
            p.mul_(slope)

    if dlogits is not None:
        _zero_rows(dlogits, ignored)
    log_sum = _log_sum(others, margin.exp())
    loss = (log_sum - margin) * kept
    if smooth:
        loss += smooth_sum * log_sum + smooth * shortfall
    if spec.lse_square_scale:
        loss += spec.lse_square_scale * (row_max + log_sum).square_()
    return torch.where(ignored, 0.0, torch.where(valid, loss, torch.nan))


def _soft_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor | None,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    dtype: torch.dtype,
    block: int,
) -> Tensor:
    """(N, 1) losses against (N, V) probabilities."""
    n, v = logits.shape
    loss = torch.empty(n, 1, dtype=dtype, device=logits.device)
    for rows, x, p in _blocks(logits, dlogits, dtype, block):
        z, slope = _shaped(x, spec, p)
        row_max, top = z.max(-1, keepdim=True)
        d = z - row_max
        q = target[rows].to(dtype)
        if spec.label_smoothing:
            q = q * (1.0 - spec.label_smoothing) + spec.label_smoothing / v
        q = _times(q, weight)
        # a class of zero mass is out of the sum even where its logit is -inf
        out = (q == 0.0) & (d == -torch.inf)
        d.masked_fill_(out, 0.0)
        torch.exp(d, out=p)
        p.masked_fill_(out, 0.0).scatter_(1, top, 0.0)
        others = p.sum(-1, keepdim=True)
        mass = q.sum(-1, keepdim=True)
        log_sum = torch.log1p(others)
        lse = row_max + log_sum
        loss[rows] = mass * log_sum - (q * d).sum(-1, keepdim=True) + spec.lse_square_scale * lse * lse
        if dloss is None:
            continue

        dloss_b = dloss[rows]
        if dlogits is not None:
            z_slope = 2.0 * spec.lse_square_scale * lse
            sum_exp = 1.0 + others
            q_top = q.gather(1, top)
            # mass * p - q cancels where p is nearly 1
            d_top = torch.where(others < 1.0, (mass - q_top) - mass * others / sum_exp, mass / sum_exp - q_top)
            p.mul_((mass + z_slope) / sum_exp).sub_(q).scatter_(1, top, d_top + z_slope / sum_exp).mul_(dloss_b)
            if slope is not None:
                p.mul_(slope)
        if dtarget is not None:
            nll = _times(log_sum - d, weight).mul_((1.0 - spec.label_smoothing) * dloss_b)
            dtarget[rows].copy_(nll.masked_fill_(out, 0.0))
    return loss


def _shaped(x: Tensor, spec: LossSpec, scratch: Tensor) -> tuple[Tensor, Tensor | float | None]:
    """The logits the loss sees and their derivative (None for 1); in ``scratch`` if ``x`` is not in its dtype, and maybe ``x`` itself."""
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
    """log of the sum of exponentials, the target's and the others': exact where they are 1 and nearly 0."""
    return torch.log1p(others + (e_y - 1.0))


def _times(x: Tensor, weight: Tensor | None) -> Tensor:
    """x * weight, where a weight of 0 takes a class out even if x is infinite."""
    return x if weight is None else (x * weight).masked_fill_((weight == 0.0) & x.isinf(), 0.0)


def _nowhere(mask: Tensor) -> bool:
    """Whether a block can be skipped: looked up on the CPU, denied elsewhere rather than synchronise."""
    return mask.device.type == "cpu" and not mask.any()


def _zero_rows(dlogits: Tensor, ignored: Tensor) -> None:
    """Not by a factor of 0: ignored rows may hold NaN."""
    if ignored.device.type == "cpu":
        dlogits.index_fill_(0, ignored[:, 0].nonzero()[:, 0], 0.0)
    else:
        dlogits.masked_fill_(ignored, 0.0)


_MADV_HUGEPAGE = 14
_PAGE, _HUGE_PAGE = 4096, 2 << 20
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def prefer_huge_pages(fresh: Tensor) -> None:
    """Ask Linux for huge pages under a new tensor, as numpy does: faulting in small ones takes longer than the loss. A hint, no more."""
    first = -(-fresh.data_ptr() // _PAGE) * _PAGE
    end = (fresh.data_ptr() + fresh.numel() * fresh.element_size()) // _PAGE * _PAGE
    if _libc is not None and fresh.device.type == "cpu" and end - first >= 2 * _HUGE_PAGE:
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
