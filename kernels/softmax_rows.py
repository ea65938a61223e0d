"""Rows of logits -> loss and statistics; logits and statistics -> gradients. One row is never stored as probabilities.

Two pairs of kernels, because a class id and a row of class probabilities are different loops: the first reads one number beside
the logits, the second a whole row. ``stats`` is what the gradient needs again: the row maximum and the log-sum kept apart, and for
probabilities the mass of the target. Loss and statistics take one program per row, gradients one per row and block.

N rows, V classes. A target outside [0, V) that is not ignore_index makes its row NaN; nothing outside a row is read for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of, row_blocks
from .tile_math import (
    id_loss,
    id_slopes,
    lse_finish,
    lse_square,
    lse_start,
    lse_update,
    only_if,
    other_slope,
    shaped,
    shaped_slope,
    shortfall_finish,
    shortfall_update,
    soft_target_slope,
    softmax_slope,
    target_slope,
)

# compiled once for all values: rows differ from batch to batch
CHANGING = ["N", "ignore_index"]

# a product fused into the subtraction of a rounded maximum leaves the rounding error of the product: a loss of -1e-6 where it is 0
UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def logits_tile(row_ptr, offs_v, mask_v, scale, softcap):
    """(BLOCK_V,) fp32 logits as the loss sees them, -inf outside mask_v."""
    x = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    # after the scale and the cap, which would turn a padded -inf into another number
    return tl.where(mask_v, shaped(x, scale, softcap), -float("inf"))


@triton.jit
def target_logit(row_ptr, y, readable):
    """The fp32 logit of class y as it was given; 0 where it may not be read."""
    return tl.load(row_ptr + tl.where(readable, y, 0), mask=readable, other=0.0).to(tl.float32)


@triton.jit
def target_weight(class_weight_ptr, y, readable):
    """The weight of class y."""
    # triton 3.6 cannot return None, so callers without class weights do not ask
    return tl.load(class_weight_ptr + tl.where(readable, y, 0), mask=readable, other=0.0)


@triton.jit
def weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing):
    """The sum of the class weights, which is V without; read where smoothing needs it."""
    if smoothing is None:
        return 0.0
    elif class_weight_ptr is None:
        return V * 1.0
    else:
        return tl.load(class_weight_sum_ptr)


@triton.jit
def mass_tile(target_row_ptr, class_weight_ptr, offs_v, mask_v, V, smoothing):
    """(BLOCK_V,) fp32 class_weight * smoothed target probability, 0 outside mask_v."""
    q = tl.load(target_row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    if smoothing is not None:
        q = q * (1.0 - smoothing) + tl.where(mask_v, smoothing / V, 0.0)
    if class_weight_ptr is not None:
        q = q * tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0)
    return q


@triton.jit(do_not_specialize=CHANGING)
def row_loss_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    loss_ptr,  # (N,) fp32, output
    stats_ptr,  # (2, N) fp32, output: row maximum, log-sum
    stride_logits_n,
    N,
    V,
    ignore_index,
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,
):
    """One row per program: loss against a class id."""
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2**31 in ordinary runs
    row_ptr = logits_ptr + row * stride_logits_n
    y = tl.load(target_ptr + row).to(tl.int64)
    ignored = y == ignore_index
    readable = (y >= 0) & (y < V) & (y != ignore_index)

    top, ties, rest = lse_start(BLOCK_V)
    mass = tl.zeros([BLOCK_V], tl.float32)
    shortfall = tl.zeros([BLOCK_V], tl.float32)
    # two stages: with three, ptxas spills on sm_80
    for v in tl.range(0, tl.where(readable, V, 0), BLOCK_V, num_stages=2):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = logits_tile(row_ptr, offs_v, mask_v, scale, softcap)
        top_before = top
        top, ties, rest = lse_update(top, ties, rest, z)
        if smoothing is not None:
            w = tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0) if class_weight_ptr is not None else tl.where(mask_v, 1.0, 0.0)
            mass, shortfall = shortfall_update(mass, shortfall, w, z, top_before, top)

    row_max, log_sum = lse_finish(top, ties, rest)
    row_mass, row_shortfall = 0.0, 0.0
    if smoothing is not None:
        row_mass, row_shortfall = shortfall_finish(mass, shortfall, top, row_max)
    z_y = shaped(target_logit(row_ptr, y, readable), scale, softcap)
    w_y = target_weight(class_weight_ptr, y, readable) if class_weight_ptr is not None else None
    loss = id_loss(z_y, w_y, row_max, log_sum, row_mass, row_shortfall, V, smoothing, lse_square_scale)

    tl.store(loss_ptr + row, tl.where(ignored, 0.0, tl.where(readable, loss, float("nan"))))
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + N + row, log_sum)


@triton.jit(do_not_specialize=CHANGING)
def row_grads_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    class_weight_sum_ptr,  # () fp32, or None
    stats_ptr,  # (2, N) fp32
    dloss_ptr,  # (N,) fp32; stride 0 when it is one number
    dlogits_ptr,  # (N, V), output; may be logits
    stride_logits_n,
    stride_dlogits_n,
    stride_dloss,
    N,
    V,
    ignore_index,
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,
):
    """One row and block per program: gradient of the loss against a class id."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    start = tl.program_id(1) * BLOCK_V
    offs_v = start + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    y = tl.load(target_ptr + row).to(tl.int64)
    ignored = y == ignore_index
    readable = (y >= 0) & (y < V) & (y != ignore_index)
    row_max = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + N + row)
    w_y = target_weight(class_weight_ptr, y, readable) if class_weight_ptr is not None else None
    w = tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0) if smoothing is not None and class_weight_ptr is not None else None
    w_sum = weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing)

    x = tl.load(row_ptr + offs_v, mask=only_if(readable, mask_v), other=0.0).to(tl.float32)
    # in place the target's logit is lost once its block is stored: only the program of that block reads it,
    # and none of its warps stores before all have read
    here = readable & (y >= start) & (y < start + BLOCK_V)
    z_y = shaped(target_logit(row_ptr, y, here), scale, softcap)
    tl.debug_barrier()
    kept, flat, off = id_slopes(w_y, w_sum, row_max, log_sum, V, smoothing, lse_square_scale)
    p = tl.exp((shaped(x, scale, softcap) - row_max) - log_sum)
    dz = other_slope(p, w, kept + flat, off, smoothing)
    # compared as int32, like the offsets; a padded lane never equals it
    is_target = offs_v == tl.where(here, y, -1).to(tl.int32)
    dz = tl.where(is_target, target_slope((z_y - row_max) - log_sum, w_y, kept, flat, off, smoothing), dz)
    dx = dz * shaped_slope(x, scale, softcap) * tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)

    dx = tl.where(ignored, 0.0, tl.where(readable, dx, float("nan")))
    tl.store(dlogits_ptr + row * stride_dlogits_n + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=CHANGING)
def soft_row_loss_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N, V) any float dtype, probabilities
    class_weight_ptr,  # (V,) fp32, or None
    loss_ptr,  # (N,) fp32, output
    stats_ptr,  # (3, N) fp32, output: row maximum, log-sum, mass of the target
    stride_logits_n,
    stride_target_n,
    N,
    V,
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,
):
    """One row per program: loss against class probabilities."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    target_row_ptr = target_ptr + row * stride_target_n

    top, ties, rest = lse_start(BLOCK_V)
    mass = tl.zeros([BLOCK_V], tl.float32)
    shortfall = tl.zeros([BLOCK_V], tl.float32)
    # not pipelined: with the addresses of two tensors in flight ptxas spills on sm_80 and sm_100
    for v in tl.range(0, V, BLOCK_V, num_stages=1):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = logits_tile(row_ptr, offs_v, mask_v, scale, softcap)
        q = mass_tile(target_row_ptr, class_weight_ptr, offs_v, mask_v, V, smoothing)
        top_before = top
        top, ties, rest = lse_update(top, ties, rest, z)
        mass, shortfall = shortfall_update(mass, shortfall, q, z, top_before, top)

    row_max, log_sum = lse_finish(top, ties, rest)
    row_mass, row_shortfall = shortfall_finish(mass, shortfall, top, row_max)
    loss = row_mass * log_sum + row_shortfall
    if lse_square_scale is not None:
        loss = loss + lse_square(row_max, log_sum, lse_square_scale)

    tl.store(loss_ptr + row, loss)
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + N + row, log_sum)
    tl.store(stats_ptr + 2 * N + row, row_mass)


@triton.jit(do_not_specialize=CHANGING)
def soft_row_grads_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N, V) any float dtype, probabilities
    class_weight_ptr,  # (V,) fp32, or None
    stats_ptr,  # (3, N) fp32
    dloss_ptr,  # (N,) fp32; stride 0 when it is one number
    dlogits_ptr,  # (N, V), output, or None; may be logits, as a program reads only what it writes
    dtarget_ptr,  # (N, V), output, or None
    stride_logits_n,
    stride_target_n,
    stride_dlogits_n,
    stride_dtarget_n,
    stride_dloss,
    N,
    V,
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,
):
    """One row and block per program: gradients of the loss against class probabilities."""
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    row_max = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + N + row)
    mass = tl.load(stats_ptr + 2 * N + row)
    dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)

    x = tl.load(logits_ptr + row * stride_logits_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    q = mass_tile(target_ptr + row * stride_target_n, class_weight_ptr, offs_v, mask_v, V, smoothing)
    logp = (shaped(x, scale, softcap) - row_max) - log_sum
    if dlogits_ptr is not None:
        p = tl.exp(logp)
        dz = soft_target_slope(p, logp, q, mass)
        if lse_square_scale is not None:
            dz = dz + softmax_slope(p, row_max, log_sum, lse_square_scale)
        dx = dz * shaped_slope(x, scale, softcap) * dloss
        tl.store(dlogits_ptr + row * stride_dlogits_n + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_v)
    if dtarget_ptr is not None:
        dt = -logp * dloss
        if smoothing is not None:
            dt = dt * (1.0 - smoothing)
        if class_weight_ptr is not None:
            dt = dt * tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0)
        # a class of zero mass and -inf logit is out of the sum, as in shortfall_update
        dt = tl.where((q == 0.0) & (logp == -float("inf")), 0.0, dt)
        tl.store(dtarget_ptr + row * stride_dtarget_n + offs_v, dt.to(dtarget_ptr.dtype.element_ty), mask=mask_v)


def row_loss(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(N, V) logits with unit last stride, (N,) ids or (N, V) probabilities -> (N,) loss and the statistics ``row_grads`` takes."""
    n, v = logits.shape
    soft = target.is_floating_point()
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    stats = torch.empty(3 if soft else 2, n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return loss, stats
    config = row_blocks(v)
    options = {"scale": scale, "softcap": softcap, "smoothing": smoothing, "lse_square_scale": lse_square_scale}
    with on_device_of(logits):
        if soft:
            soft_row_loss_kernel[(n,)](
                logits, target, class_weight, loss, stats, logits.stride(0), target.stride(0), n, v,
                **options, BLOCK_V=config.block_v, num_warps=config.num_warps, **UNFUSED,
            )  # fmt: skip
        else:
            row_loss_kernel[(n,)](
                logits, target, class_weight, loss, stats, logits.stride(0), n, v, ignore_index,
                **options, BLOCK_V=config.block_v, num_warps=config.num_warps, **UNFUSED,
            )  # fmt: skip
    return loss, stats


def row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    *,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
) -> None:
    """Fill ``dlogits`` (and, for probabilities, ``dtarget``): (N, V) with unit last stride, or None where no gradient is wanted.

    ``dlogits`` may be ``logits``, or narrower and in its memory.
    """
    n, v = logits.shape
    if n == 0 or (dlogits is None and dtarget is None):
        return
    given = dlogits
    if dlogits is not None and dlogits.element_size() != logits.element_size() and _share_memory(dlogits, logits):
        # the blocks of a row are computed in any order, and one would write over logits that another has yet to read
        dlogits = torch.empty_like(dlogits, memory_format=torch.contiguous_format)
    config = row_blocks(v)
    # not triton.cdiv, which takes 3 us where it may be traced (triton 3.7)
    grid = (n, -(-v // config.block_v))
    options = {"scale": scale, "softcap": softcap, "smoothing": smoothing, "lse_square_scale": lse_square_scale}
    with on_device_of(logits):
        if target.is_floating_point():
            soft_row_grads_kernel[grid](
                logits, target, class_weight, stats, dloss, dlogits, dtarget,
                logits.stride(0), target.stride(0),
                0 if dlogits is None else dlogits.stride(0), 0 if dtarget is None else dtarget.stride(0), dloss.stride(0), n, v,
                **options, BLOCK_V=config.block_v, num_warps=config.num_warps, **UNFUSED,
            )  # fmt: skip
        else:
            assert dlogits is not None
            class_weight_sum = None if class_weight is None or smoothing is None else class_weight.sum()
            row_grads_kernel[grid](
                logits, target, class_weight, class_weight_sum, stats, dloss, dlogits,
                logits.stride(0), dlogits.stride(0), dloss.stride(0), n, v, ignore_index,
                **options, BLOCK_V=config.block_v, num_warps=config.num_warps, **UNFUSED,
            )  # fmt: skip
    if given is not None and dlogits is not None and given is not dlogits:
        given.copy_(dlogits)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
