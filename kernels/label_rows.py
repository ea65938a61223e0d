"""Binary cross entropy of rows of logits and its gradient, in one read and one write.

No element needs another element of its row, so one kernel computes the loss, the gradient or both,
and the gradient may be written over the logits. The target is a tensor like the logits, or the ids
of the labels that are 1: then each program looks for the ids in its block, and the tensor of zeros
and ones is never materialized. A reduced loss is stored as one sum per block; the launcher adds
them up in a fixed order.

N rows, V labels, B blocks of a row, at most P ids a row. A row with an id outside [0, V) that is
not ``ignore_index`` is NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of, row_blocks
from .tile_math import label_grad, label_loss, label_target_grad, sigmoid_parts

# largest block of ids
MOST_IDS = 256

# not specialized: they differ from batch to batch
CHANGING = ["ignore_index", "P"]


@triton.jit
def broadcast_tile(ptr, row, stride_n, stride_v, offs_v, mask_v):
    """A tile of a row in fp32; one number for the whole row if stride_v is None, else stride 1."""
    if stride_v is None:
        return tl.load(ptr + row * stride_n).to(tl.float32)
    else:
        return tl.load(ptr + row * stride_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)


@triton.jit
def listed_tile(ids_ptr, start, P, V, ignore_index, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr):
    """(BLOCK_V,) 1.0 for labels from ``start`` on that are listed, 0.0 for the others.

    An id may be listed more than once. All are NaN if any id of the row is out of range.
    """
    count = tl.zeros([BLOCK_V], tl.int32)
    worst = 0
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        y = tl.load(ids_ptr + offs_p, mask=offs_p < P, other=ignore_index).to(tl.int64)
        given = y != ignore_index
        in_block = given & (y >= start) & (y < start + BLOCK_V)
        out_of_range = given & ((y < 0) | (y >= V))
        found = tl.max(tl.where(out_of_range, 2, in_block.to(tl.int32)), 0)
        # most blocks of a long row hold no id
        if found == 1:
            block_ids = tl.where(in_block, y - start, 0).to(tl.int32)
            count += tl.histogram(block_ids, BLOCK_V, mask=in_block)
        worst = tl.maximum(worst, found)
    return tl.where(worst == 2, float("nan"), tl.where(count > 0, 1.0, 0.0))


@triton.jit(do_not_specialize=CHANGING)
def label_rows_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N, V) any float dtype, or None
    ids_ptr,  # (N, P) int64, or None
    weight_ptr,  # (N, V) any float dtype, or None
    pos_weight_ptr,  # (N, V) any float dtype, or None
    dloss_ptr,  # (N, V) fp32, or None without a gradient
    loss_ptr,  # (N, V) fp32, output, or None
    sums_ptr,  # (N, B) fp32, output, or None
    dlogits_ptr,  # (N, V), output, or None; may be logits: a program reads only what it writes
    dtarget_ptr,  # (N, V), output, or None
    stride_logits_n,
    stride_target_n,
    stride_weight_n,
    stride_weight_v,  # 1, or None for one number a row, as are the other stride_*_v
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
):
    """One block of a row per program."""
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
        t = tl.load(target_ptr + row * stride_target_n + offs_v, mask=mask_v, other=0.0)
        t = t.to(tl.float32)
    pos_weight, weight = None, None
    if pos_weight_ptr is not None:
        pos_weight = broadcast_tile(
            pos_weight_ptr, row, stride_pos_weight_n, stride_pos_weight_v, offs_v, mask_v
        )  # fmt: skip
    if weight_ptr is not None:
        weight = broadcast_tile(weight_ptr, row, stride_weight_n, stride_weight_v, offs_v, mask_v)

    p, not_p, tail = sigmoid_parts(x)
    if loss_ptr is not None or sums_ptr is not None:
        loss = label_loss(x, t, pos_weight, tail)
        if weight is not None:
            loss = loss * weight
        if loss_ptr is not None:
            tl.store(loss_ptr + row * V + offs_v, loss, mask=mask_v)
        if sums_ptr is not None:
            tl.store(sums_ptr + row * blocks + block, tl.sum(tl.where(mask_v, loss, 0.0), 0))
    if dloss_ptr is not None:
        dloss = broadcast_tile(dloss_ptr, row, stride_dloss_n, stride_dloss_v, offs_v, mask_v)
        if weight is not None:
            dloss = dloss * weight
        if dlogits_ptr is not None:
            dx = label_grad(t, pos_weight, p, not_p) * dloss
            tl.store(
                dlogits_ptr + row * stride_dlogits_n + offs_v,
                dx.to(dlogits_ptr.dtype.element_ty),
                mask=mask_v,
            )
        if dtarget_ptr is not None:
            dt = label_target_grad(x, pos_weight, tail) * dloss
            tl.store(
                dtarget_ptr + row * V + offs_v,
                dt.to(dtarget_ptr.dtype.element_ty),
                mask=mask_v,
            )


def _row_strides(t: Tensor | None) -> tuple[int, int | None]:
    """(stride of rows, 1 or None for one number a row) of (N, V) whose last stride is 0 or 1."""
    if t is None:
        return 0, None
    return t.stride(0), 1 if t.stride(1) else None


def label_loss_and_grads(
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
) -> None:
    """Fill the outputs that are given; the gradients need ``dloss``.

    ``loss`` is (N, V), or (N, 1) for the sums of rows; ``dlogits`` and ``dtarget`` are (N, V).
    ``dlogits`` may be ``logits``. ``target`` is (N, V) of a float dtype, or contiguous ids (N, P).
    ``weight``, ``pos_weight`` and ``dloss`` are (N, V) with a last stride of 0 or 1, logits, target
    and dlogits (N, V) have unit last stride, ``loss`` and ``dtarget`` are contiguous.
    """
    n, v = logits.shape
    if n == 0 or v == 0:
        if loss is not None:
            loss.zero_()
        return
    config = row_blocks(v)
    blocks = -(-v // config.block_v)
    dense, ids = (target, None) if target.is_floating_point() else (None, target)
    num_ids = 1 if ids is None else ids.shape[1]
    elementwise = loss is not None and loss.shape == logits.shape and v > 1
    sums = None
    if loss is not None and not elementwise:
        sums = loss
        if blocks > 1:
            sums = torch.empty(n, blocks, dtype=torch.float32, device=logits.device)
    with on_device_of(logits):
        label_rows_kernel[(n * blocks,)](
            logits, dense, ids, weight, pos_weight, dloss,
            loss if elementwise else None, sums, dlogits, dtarget,
            logits.stride(0), 0 if dense is None else dense.stride(0),
            *_row_strides(weight), *_row_strides(pos_weight), *_row_strides(dloss),
            0 if dlogits is None else dlogits.stride(0), v, num_ids, ignore_index,
            BLOCK_V=config.block_v, BLOCK_P=min(MOST_IDS, max(16, 1 << (num_ids - 1).bit_length())),
            num_warps=config.num_warps,
        )  # fmt: skip
    if loss is not None and sums is not None and sums is not loss:
        torch.sum(sums, 1, keepdim=True, out=loss)
