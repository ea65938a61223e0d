"""Rows of logits, each label a yes or no of its own -> binary cross entropy and its gradient, in one read and one write.

Or of the probabilities of labels, which are another formula in the same loop.

Nothing of a row is needed by another element of it, so one kernel does loss, gradient, or both, and the gradient may take the place of the
logits. Targets are a tensor like the logits, or the ids of the labels that are 1: each program looks for those of its block, so that the
tensor of zeros and ones they stand for never exists. Sums leave a number per block, added up in a fixed order by whoever called.

N rows, V labels, B blocks of a row, at most P ids a row. A row with an id outside [0, V) that is not ignore_index is NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, on_device_of, row_blocks
from .tile_math import (
    label_loss,
    label_slope,
    label_target_slope,
    probability_loss,
    probability_slope,
    probability_target_slope,
    sigmoid_parts,
)

# ids looked at in one go
MOST_IDS = 256

CHANGING = ["ignore_index", "P"]


@triton.jit
def row_tile(ptr, row, stride_n, stride_v, offs_v, mask_v):
    """fp32 numbers that go with a tile of a row; one number for all of it where stride_v is None, and otherwise side by side."""
    if stride_v is None:
        return tl.load(ptr + row * stride_n).to(tl.float32)
    else:
        return tl.load(ptr + row * stride_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)


@triton.jit
def listed_tile(ids_ptr, start, P, V, ignore_index, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr):
    """(BLOCK_V,) 1.0 for the labels from ``start`` on that are listed, however often, 0.0 for others; NaN if any id of the row is bad."""
    count = tl.zeros([BLOCK_V], tl.int32)
    worst = 0
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        y = tl.load(ids_ptr + offs_p, mask=offs_p < P, other=ignore_index).to(tl.int64)
        given = y != ignore_index
        here = given & (y >= start) & (y < start + BLOCK_V)
        found = tl.max(tl.where(given & ((y < 0) | (y >= V)), 2, here.to(tl.int32)), 0)
        # most blocks of a long row hold none
        if found == 1:
            count += tl.histogram(tl.where(here, y - start, 0).to(tl.int32), BLOCK_V, mask=here)
        worst = tl.maximum(worst, found)
    return tl.where(worst == 2, float("nan"), tl.where(count > 0, 1.0, 0.0))


@triton.jit(do_not_specialize=CHANGING)
def sigmoid_rows_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N, V) any float dtype, or None
    ids_ptr,  # (N, P) int64, or None
    weight_ptr,  # (N, V) any float dtype, or None
    pos_weight_ptr,  # (N, V) any float dtype, or None
    dloss_ptr,  # (N, V) fp32, or None where there is no gradient
    loss_ptr,  # (N, V) fp32, output, or None
    sums_ptr,  # (N, B) fp32, output, or None
    dlogits_ptr,  # (N, V), output, or None; may be logits, as a program reads only what it writes
    dtarget_ptr,  # (N, V), output, or None
    stride_logits_n,
    stride_target_n,
    stride_weight_n,
    stride_weight_v,  # 1, or None for one number a row; so are the next two
    stride_pos_weight_n,
    stride_pos_weight_v,
    stride_dloss_n,
    stride_dloss_v,
    stride_dlogits_n,
    V,
    P,
    ignore_index,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PROBABILITIES: tl.constexpr,  # in place of logits; without pos_weight and ids
):
    """One row and block per program."""
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    start = block * BLOCK_V
    offs_v = start + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    x = tl.load(logits_ptr + row * stride_logits_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    if ids_ptr is not None:
        t = listed_tile(ids_ptr + row * P, start, P, V, ignore_index, BLOCK_V, BLOCK_P)
    else:
        t = tl.load(target_ptr + row * stride_target_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    pos_weight = (
        row_tile(pos_weight_ptr, row, stride_pos_weight_n, stride_pos_weight_v, offs_v, mask_v) if pos_weight_ptr is not None else None
    )
    weight = row_tile(weight_ptr, row, stride_weight_n, stride_weight_v, offs_v, mask_v) if weight_ptr is not None else None

    if not PROBABILITIES:
        below, above, tail = sigmoid_parts(x)
    if loss_ptr is not None or sums_ptr is not None:
        loss = probability_loss(x, t) if PROBABILITIES else label_loss(x, t, pos_weight, tail)
        if weight is not None:
            loss = loss * weight
        if loss_ptr is not None:
            tl.store(loss_ptr + row * V + offs_v, loss, mask=mask_v)
        if sums_ptr is not None:
            tl.store(sums_ptr + row * blocks + block, tl.sum(tl.where(mask_v, loss, 0.0), 0))
    if dloss_ptr is not None:
        dloss = row_tile(dloss_ptr, row, stride_dloss_n, stride_dloss_v, offs_v, mask_v)
        if weight is not None:
            dloss = dloss * weight
        if dlogits_ptr is not None:
            dx = (probability_slope(x, t) if PROBABILITIES else label_slope(t, pos_weight, below, above)) * dloss
            tl.store(dlogits_ptr + row * stride_dlogits_n + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_v)
        if dtarget_ptr is not None:
            dt = (probability_target_slope(x) if PROBABILITIES else label_target_slope(x, pos_weight, tail)) * dloss
            tl.store(dtarget_ptr + row * V + offs_v, dt.to(dtarget_ptr.dtype.element_ty), mask=mask_v)


def blocks_of(v: int) -> LaunchConfig:
    """As wide as the sweeps of ``softmax_rows``."""
    return row_blocks(v)


def _of_rows(t: Tensor | None) -> tuple[int, int | None]:
    """(stride of rows, 1 or None for one number a row) of (N, V) whose last stride is 0 or 1."""
    if t is None:
        return 0, None
    return t.stride(0), 1 if t.stride(1) else None


def sigmoid_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    *,
    ignore_index: int,
    loss: Tensor | None,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    probabilities: bool = False,
) -> None:
    """Fill what is given: ``loss`` (N, V), or (N, 1) with the sums of rows; ``dlogits`` and ``dtarget`` (N, V), which take ``dloss``.

    (N, V) logits, targets and gradients have unit last stride, ``weight``, ``pos_weight`` and ``dloss`` (N, V) one of 0 or 1; ids (N, P)
    are contiguous, as are ``loss`` and ``dtarget``. ``dlogits`` may be ``logits``, which are no logits with ``probabilities``.
    """
    n, v = logits.shape
    if n == 0 or v == 0:
        if loss is not None:
            loss.zero_()
        return
    config = blocks_of(v)
    blocks = -(-v // config.block_v)
    ids = None if target.is_floating_point() else target
    most = 1 if ids is None else ids.shape[1]
    elementwise = loss is not None and loss.shape == logits.shape and v > 1
    sums = None
    if loss is not None and not elementwise:
        sums = loss if blocks == 1 else torch.empty(n, blocks, dtype=torch.float32, device=logits.device)
    with on_device_of(logits):
        sigmoid_rows_kernel[(n * blocks,)](
            logits, target if ids is None else None, ids, weight, pos_weight, dloss, loss if elementwise else None, sums, dlogits, dtarget,
            logits.stride(0), 0 if ids is not None else target.stride(0), *_of_rows(weight), *_of_rows(pos_weight), *_of_rows(dloss),
            0 if dlogits is None else dlogits.stride(0), v, most, ignore_index,
            BLOCK_V=config.block_v, BLOCK_P=min(MOST_IDS, max(16, 1 << (most - 1).bit_length())), PROBABILITIES=probabilities,
            num_warps=config.num_warps,
        )  # fmt: skip
    if loss is not None and sums is not None and sums is not loss:
        torch.sum(sums, 1, keepdim=True, out=loss)
