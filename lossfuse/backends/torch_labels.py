"""Binary cross entropy by torch code over blocks of rows that fit a cache.

No label depends on another, so a block is read once and its gradient written once. Against ids, a
block is computed as if all labels were 0; then the entries of the ids are overwritten, in the
losses before they are summed and in the gradient."""

import functools

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import threads
from .torch_rows import (
    CPU_BLOCK_BYTES,
    DEVICE_BLOCK_BYTES,
    TEMPORARY_BYTES,
    TEMPORARY_SHARE,
    threads_for,
)

# temporaries of the size of a block that are live at once: against ids, and against a dense target
LISTED_BLOCKS, DENSE_BLOCKS = 2, 6
# of softplus: beyond it exp(-x) is below float64's epsilon relative to x
THRESHOLD = 40.0


def label_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    *,
    loss: Tensor | None = None,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> None:
    """Fill ``loss`` and the gradients that are given.

    ``loss`` is (N, V), or (N, 1) for the sums of rows; gradients are (N, V). ``dlogits`` may be
    ``logits``."""
    n, v = logits.shape
    if n == 0 or v == 0:
        if loss is not None:
            loss.zero_()
        return
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    dloss = None if dloss is None else dloss.to(dtype).expand(n, v)
    listed = not target.is_floating_point()
    if listed and target.shape[1] == 0:
        target = target.new_full((n, 1), ignore_index)
    temporaries = LISTED_BLOCKS if listed else DENSE_BLOCKS
    on_cpu = logits.device.type == "cpu"
    count = threads_for(n * v, logits.element_size(), dtype.itemsize, temporaries) if on_cpu else 1
    rows, width = block_shape(
        n, v, logits.element_size(), dtype.itemsize, on_cpu, temporaries, count, listed
    )
    elementwise = loss is not None and loss.shape == logits.shape and v > 1

    def fill_rows(first: int, last: int) -> None:
        scratch = torch.empty(temporaries, rows, width, dtype=dtype, device=logits.device)
        for i in range(first, last, rows):
            for j in range(0, v, width):
                block = slice(i, min(i + rows, last)), slice(j, min(j + width, v))
                x, w, pw, d, dx, dt = (
                    None if a is None else a[block]
                    for a in (logits, weight, pos_weight, dloss, dlogits, dtarget)
                )
                assert x is not None
                buffers = scratch[:, : x.shape[0], : x.shape[1]]
                if listed:
                    block_loss = _listed(
                        x, target[block[0]], w, pw, ignore_index, d, dx, loss is not None, buffers
                    )
                else:
                    block_loss = _dense(
                        x, target[block], w, pw, d, dx, dt, loss is not None, buffers
                    )
                if loss is not None and block_loss is not None:
                    _store_loss(loss, block, block_loss, elementwise=elementwise)

    if count == 1:
        fill_rows(0, n)
        return
    # several parts per thread, each of whole blocks, so that a delayed thread has less left to do
    length = max(rows, -(-n // (4 * count * rows)) * rows)
    threads.run(
        [functools.partial(fill_rows, i, min(i + length, n)) for i in range(0, n, length)], count
    )


def _store_loss(
    loss: Tensor, block: tuple[slice, slice], block_loss: Tensor, *, elementwise: bool
) -> None:
    """Store the losses of a block, or add their sums to those of the blocks before it in its
    rows."""
    rows, labels = block
    if elementwise:
        loss[block].copy_(block_loss)
    elif labels.start == 0:
        torch.sum(block_loss, 1, keepdim=True, out=loss[rows])
    else:
        loss[rows] += block_loss.sum(1, keepdim=True)


def block_shape(
    n: int,
    v: int,
    itemsize: int,
    work_itemsize: int,
    cpu: bool,
    temporaries: int,
    count: int,
    whole_rows: bool,
) -> tuple[int, int]:
    """(rows, labels) of a block: ``count`` threads hold ``temporaries`` blocks each."""
    size = min(
        CPU_BLOCK_BYTES if cpu else DEVICE_BLOCK_BYTES,
        max(TEMPORARY_BYTES, n * v * itemsize // TEMPORARY_SHARE),
    )
    block = max(1, size // (temporaries * count * work_itemsize))
    width = v if whole_rows else min(v, block)
    return max(1, min(n, block // width)), width


def _listed(
    logits: Tensor,
    ids: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    need_loss: bool,
    scratch: Tensor,
) -> Tensor | None:
    """Losses of a block of whole rows against the ids (n, P) of the labels that are 1.

    Computed in ``scratch`` (2, n, V); fills ``dlogits``."""
    v = logits.shape[1]
    loss, work = scratch[0], scratch[1]
    x = logits if logits.dtype == work.dtype else work.copy_(logits)
    given = ids != ignore_index
    valid = given & (ids >= 0) & (ids < v)
    bad = (given & ~valid).any(1, keepdim=True)
    # padding becomes the row's largest id, whose entry is then written twice with the same value.
    # A row without ids writes the entry of label 0 as a zero's
    y = torch.where(valid, ids, torch.where(valid, ids, 0).amax(1, keepdim=True))
    valid = valid.any(1, keepdim=True)
    x_y = x.gather(1, y)
    up, down = softplus(-x_y, threshold=THRESHOLD), softplus(x_y, threshold=THRESHOLD)
    factor = 1.0 if pos_weight is None else pos_weight.gather(1, y).to(x.dtype)
    if need_loss:
        torch.ops.aten.softplus.out(x, 1.0, THRESHOLD, out=loss)
        # 0 * x is NaN for infinite x, as torch's loss is
        loss.scatter_(1, y, torch.where(valid, factor * up + 0.0 * x_y, down))
        if _may_have_any(bad | _unbounded(x)):
            loss.masked_fill_(bad | (x == -torch.inf), torch.nan)
        if weight is not None:
            loss.mul_(weight)
    if dloss is not None and dlogits is not None:
        direct = dlogits.dtype == work.dtype
        dx = torch.sigmoid(x, out=dlogits if direct else work)
        dx.scatter_(1, y, torch.where(valid, -factor * torch.sigmoid(-x_y), torch.sigmoid(x_y)))
        dx.mul_(dloss if weight is None else dloss * weight)
        if _may_have_any(bad):
            dx.masked_fill_(bad, torch.nan)
        if not direct:
            dlogits.copy_(dx)
    return loss if need_loss else None


def _dense(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    need_loss: bool,
    scratch: Tensor,
) -> Tensor | None:
    """Losses of a block against a dense target.

    Computed in ``scratch`` (6, n, v), since allocating takes longer than computing a block; fills
    the gradients."""
    loss, work, no, tail, x_buffer, t_buffer = scratch
    x, t = (
        a if a.dtype == buffer.dtype else buffer.copy_(a)
        for a, buffer in ((logits, x_buffer), (target, t_buffer))
    )
    factor = None if pos_weight is None else pos_weight.to(x.dtype)
    yes = t if factor is None else t * factor
    torch.sub(1.0, t, out=no)
    if need_loss or (dtarget is not None and factor is not None):
        torch.ops.aten.softplus.out(torch.abs(x, out=work).neg_(), 1.0, THRESHOLD, out=tail)
    if need_loss:
        if factor is None:
            loss.copy_(tail)
        else:
            torch.mul(tail, yes + no, out=loss)
        loss.addcmul_(no, torch.clamp(x, min=0.0, out=work)).addcmul_(
            yes, torch.clamp(x, max=0.0, out=work), value=-1.0
        )
        if _may_have_any(_unbounded(x)):
            loss.masked_fill_(x == -torch.inf, torch.nan)
        if weight is not None:
            loss.mul_(weight)
    if dloss is None:
        return loss
    scale = dloss if weight is None else dloss * weight
    if dtarget is not None:
        if factor is None:
            dtarget.copy_(torch.neg(x, out=work).mul_(scale))
        else:
            dtarget.copy_(
                (factor * (tail - x.clamp(max=0.0)) - (tail + x.clamp(min=0.0))).mul_(scale)
            )
    if dlogits is not None:
        # (1 - t) * sigmoid(x) - t * sigmoid(-x): does not cancel for a t of 0 or 1
        no.mul_(torch.sigmoid(x, out=work)).addcmul_(
            yes, torch.neg(x, out=work).sigmoid_(), value=-1.0
        )
        if dlogits.dtype == no.dtype:
            torch.mul(no, scale, out=dlogits)
        else:
            dlogits.copy_(no.mul_(scale))
    return loss


def _unbounded(x: Tensor) -> Tensor:
    """(n, 1) True for rows with a logit of -inf or NaN."""
    return ~(x.amin(1, keepdim=True) > -torch.inf)


def _may_have_any(mask: Tensor) -> bool:
    """False on the CPU if the mask is all False; always True elsewhere, to not synchronize."""
    return mask.device.type != "cpu" or bool(mask.any())
