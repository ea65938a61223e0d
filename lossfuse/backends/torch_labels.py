"""Binary cross entropy by torch code over blocks of rows that fit a cache.

Each label is a loss of its own, so a block is read once and its gradient written where it stays.
Listed ids are dealt with apart: all labels are taken for zeros, and the few that are ones are put
right, in the sum and in the gradient, before anybody adds them up."""

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
    prefer_huge_pages,
    threads_for,
)

# a block and what is made of it, alive at once
LISTED_BLOCKS, DENSE_BLOCKS = 2, 6
# beyond it exp(-x) is nothing to x, in float64 too
THRESHOLD = 40.0


def sigmoid_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    *,
    loss: Tensor | None,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    """Fill what is given: ``loss`` (N, V), or (N, 1) with the sums of rows; gradients (N, V).
    ``dlogits`` may be ``logits``."""
    n, v = logits.shape
    if n == 0 or v == 0:
        if loss is not None:
            loss.zero_()
        return
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for out in (loss, dlogits, dtarget):
        if out is not None:
            prefer_huge_pages(out)
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

    def part(first: int, last: int) -> None:
        scratch = torch.empty(temporaries, rows, width, dtype=dtype, device=logits.device)
        for i in range(first, last, rows):
            for j in range(0, v, width):
                block = slice(i, min(i + rows, last)), slice(j, min(j + width, v))
                x, w, pw, d, dx, dt = (
                    None if a is None else a[block]
                    for a in (logits, weight, pos_weight, dloss, dlogits, dtarget)
                )
                assert x is not None
                room = scratch[:, : x.shape[0], : x.shape[1]]
                if listed:
                    made = _listed(
                        x, target[block[0]], w, pw, ignore_index, d, dx, loss is not None, room
                    )
                else:
                    made = _dense(x, target[block], w, pw, d, dx, dt, loss is not None, room)
                if loss is None or made is None:
                    continue
                if elementwise:
                    loss[block].copy_(made)
                elif j == 0:
                    torch.sum(made, 1, keepdim=True, out=loss[block[0]])
                else:
                    loss[block[0]] += made.sum(1, keepdim=True)

    if count == 1:
        part(0, n)
        return
    # several parts for each thread, whole blocks, for when one of them is held up
    length = max(rows, -(-n // (4 * count * rows)) * rows)
    threads.run(
        [functools.partial(part, i, min(i + length, n)) for i in range(0, n, length)], count
    )


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
    """(rows, labels) of a block, with so many temporaries of a block alive at once in each of
    ``count`` threads."""
    size = min(
        CPU_BLOCK_BYTES if cpu else DEVICE_BLOCK_BYTES,
        max(TEMPORARY_BYTES, n * v * itemsize // TEMPORARY_SHARE),
    )
    most = max(1, size // (temporaries * count * work_itemsize))
    width = v if whole_rows else min(v, most)
    return max(1, min(n, most // width)), width


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
    """Losses of a block of whole rows against the ids (n, P) of the labels that are 1, in
    ``scratch`` (2, n, V); the gradient filled."""
    v = logits.shape[1]
    loss, work = scratch[0], scratch[1]
    x = logits if logits.dtype == work.dtype else work.copy_(logits)
    given = ids != ignore_index
    valid = given & (ids >= 0) & (ids < v)
    bad = (given & ~valid).any(1, keepdim=True)
    # padding repeats the row's largest id, and what is written twice is written alike; id 0 stays a
    # zero in a row without any
    y = torch.where(valid, ids, torch.where(valid, ids, 0).amax(1, keepdim=True))
    valid = valid.any(1, keepdim=True)
    x_y = x.gather(1, y)
    up, down = softplus(-x_y, threshold=THRESHOLD), softplus(x_y, threshold=THRESHOLD)
    factor = 1.0 if pos_weight is None else pos_weight.gather(1, y).to(x.dtype)
    if need_loss:
        torch.ops.aten.softplus.out(x, 1.0, THRESHOLD, out=loss)
        # 0 * x is NaN for infinite x, as torch's loss is
        loss.scatter_(1, y, torch.where(valid, factor * up + 0.0 * x_y, down))
        if _may_be(bad | _unbounded(x)):
            loss.masked_fill_(bad | (x == -torch.inf), torch.nan)
        if weight is not None:
            loss.mul_(weight)
    if dloss is not None and dlogits is not None:
        direct = dlogits.dtype == work.dtype
        dx = torch.sigmoid(x, out=dlogits if direct else work)
        dx.scatter_(1, y, torch.where(valid, -factor * torch.sigmoid(-x_y), torch.sigmoid(x_y)))
        dx.mul_(dloss if weight is None else dloss * weight)
        if _may_be(bad):
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
    """Losses of a block against its targets, in ``scratch`` (6, n, v); the gradients filled."""
    # new memory for every block would take longer than what is done in it
    loss, work, no, tail, x_room, t_room = scratch
    x, t = (
        a if a.dtype == room.dtype else room.copy_(a)
        for a, room in ((logits, x_room), (target, t_room))
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
        if _may_be(_unbounded(x)):
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
        # sigmoid(x) - t in two parts, each with all its digits
        no.mul_(torch.sigmoid(x, out=work)).addcmul_(
            yes, torch.neg(x, out=work).sigmoid_(), value=-1.0
        )
        if dlogits.dtype == no.dtype:
            torch.mul(no, scale, out=dlogits)
        else:
            dlogits.copy_(no.mul_(scale))
    return loss


def _unbounded(x: Tensor) -> Tensor:
    """(n, 1): rows with a logit of -inf, and those of a NaN, whose minimum says nothing."""
    return ~(x.amin(1, keepdim=True) > -torch.inf)


def _may_be(mask: Tensor) -> bool:
    """Whether a mask has anything in it: looked up on the CPU, taken for granted elsewhere rather
    than synchronise."""
    return mask.device.type != "cpu" or bool(mask.any())
