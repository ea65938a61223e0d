"""Log-probabilities of rows of logits, their gradient, and the negative log-likelihood loss.

A row that fits one program is read once; a longer row is read twice, the second time to store its
log-probabilities. The gradient is computed from the logits, row_max and log_sum, and not from the
log-probabilities, which may have been rounded: exp of a bf16 near -12 has two digits.

N rows, V classes. ``row_access`` says which rows are ignored or invalid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, family, fused_plan, on_device_of, row_blocks
from .row_access import class_in_shard, target_weight
from .tile_math import (
    LOWEST,
    log1p_from_minus_one,
    lse_finish,
    lse_start,
    lse_update,
    soft_target_grad,
)

# rows per program of nll_kernel
NLL_ROWS = LaunchConfig(128, 4)

# not specialized: they differ from batch to batch
CHANGING = ["N", "ignore_index"]


@triton.jit
def row_tile(row_ptr, offs_v, V, absent):
    """A tile of a row in fp32, ``absent`` beyond its end."""
    return tl.load(row_ptr + offs_v, mask=offs_v < V, other=absent).to(tl.float32)


@triton.jit
def whole_lse(z):
    """(row_max, log_sum) of a row in one tile, as ``lse_finish`` gives them."""
    row_max = tl.maximum(tl.max(z, 0), LOWEST)
    at_max = z == row_max
    others = tl.sum(tl.where(at_max, 0.0, tl.exp(z - row_max)), 0)
    log_sum = log1p_from_minus_one(others + (tl.sum(tl.where(at_max, 1.0, 0.0), 0) - 1.0))
    return row_max, tl.where(row_max == float("inf"), float("nan"), log_sum)


@triton.jit(do_not_specialize=CHANGING)
def log_softmax_kernel(
    logits_ptr,  # (N, V) any float dtype
    logp_ptr,  # (N, V) any float dtype, output
    stats_ptr,  # (2, N) fp32, output: row_max, log_sum
    stride_logits_n,
    stride_logp_n,
    N,
    V,
    BLOCK_V: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # BLOCK_V is at least V
):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    logp_row_ptr = logp_ptr + row * stride_logp_n
    offs_v = tl.arange(0, BLOCK_V)
    if WHOLE_ROW:
        z = row_tile(row_ptr, offs_v, V, -float("inf"))
        row_max, log_sum = whole_lse(z)
        logp = (z - row_max) - log_sum
        tl.store(logp_row_ptr + offs_v, logp.to(logp_ptr.dtype.element_ty), mask=offs_v < V)
    else:
        top, ties, rest = lse_start(BLOCK_V)
        for v in tl.range(0, V, BLOCK_V, num_stages=2):
            z = row_tile(row_ptr, v + offs_v, V, -float("inf"))
            top, ties, rest = lse_update(top, ties, rest, z)
        row_max, log_sum = lse_finish(top, ties, rest)
        for v in tl.range(0, V, BLOCK_V, num_stages=2):
            z = row_tile(row_ptr, v + offs_v, V, 0.0)
            logp = (z - row_max) - log_sum
            tl.store(
                logp_row_ptr + v + offs_v,
                logp.to(logp_ptr.dtype.element_ty),
                mask=v + offs_v < V,
            )
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + N + row, log_sum)


@triton.jit
def log_softmax_grad_tile(z, dlogp, row_max, log_sum, total):
    """dlogp - p * total, accurate where p is nearly 1; ``total`` is the sum of dlogp."""
    logp = (z - row_max) - log_sum
    return -soft_target_grad(tl.exp(logp), logp, dlogp, total)


@triton.jit(do_not_specialize=CHANGING)
def log_softmax_grad_kernel(
    logits_ptr,  # (N, V) any float dtype
    stats_ptr,  # (2, N) fp32, as log_softmax_kernel fills it
    dlogp_ptr,  # (N, V) any float dtype
    dlogits_ptr,  # (N, V), output
    stride_logits_n,
    stride_dlogp_n,
    stride_dlogits_n,
    N,
    V,
    BLOCK_V: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # BLOCK_V is at least V
):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    dlogp_row_ptr = dlogp_ptr + row * stride_dlogp_n
    dlogits_row_ptr = dlogits_ptr + row * stride_dlogits_n
    row_max = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + N + row)
    offs_v = tl.arange(0, BLOCK_V)
    if WHOLE_ROW:
        z = row_tile(row_ptr, offs_v, V, 0.0)
        dlogp = row_tile(dlogp_row_ptr, offs_v, V, 0.0)
        dx = log_softmax_grad_tile(z, dlogp, row_max, log_sum, tl.sum(dlogp, 0))
        tl.store(
            dlogits_row_ptr + offs_v,
            dx.to(dlogits_ptr.dtype.element_ty),
            mask=offs_v < V,
        )
    else:
        sums = tl.zeros([BLOCK_V], tl.float32)
        for v in tl.range(0, V, BLOCK_V, num_stages=2):
            sums += row_tile(dlogp_row_ptr, v + offs_v, V, 0.0)
        total = tl.sum(sums, 0)
        # not pipelined: loads of two tensors in flight need too many registers
        for v in tl.range(0, V, BLOCK_V, num_stages=1):
            z = row_tile(row_ptr, v + offs_v, V, 0.0)
            dlogp = row_tile(dlogp_row_ptr, v + offs_v, V, 0.0)
            dx = log_softmax_grad_tile(z, dlogp, row_max, log_sum, total)
            tl.store(
                dlogits_row_ptr + v + offs_v,
                dx.to(dlogits_ptr.dtype.element_ty),
                mask=v + offs_v < V,
            )


@triton.jit
def load_target(target_ptr, class_weight_ptr, row, mask_n, V, ignore_index):
    """(classes, which are valid, factor of their log-probability: 0 if ignored, NaN if invalid)."""
    y = tl.load(target_ptr + row, mask=mask_n, other=ignore_index).to(tl.int64)
    y, valid, _ = class_in_shard(y, ignore_index, V, None, None)
    w_y = tl.where(valid, 1.0, 0.0)
    if class_weight_ptr is not None:
        w_y = target_weight(class_weight_ptr, y, valid)
    return y, valid, tl.where(valid | (y == ignore_index), -w_y, float("nan"))


@triton.jit(do_not_specialize=CHANGING)
def nll_kernel(
    logp_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    loss_ptr,  # (N,) fp32, output
    stride_logp_n,
    stride_logp_v,
    N,
    V,
    ignore_index,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N rows per program: one log-probability is read of each."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = row < N
    y, valid, factor = load_target(target_ptr, class_weight_ptr, row, mask_n, V, ignore_index)
    logp_y_ptr = logp_ptr + row * stride_logp_n + tl.where(valid, y, 0) * stride_logp_v
    logp_y = tl.load(logp_y_ptr, mask=mask_n & valid, other=0.0).to(tl.float32)
    # an ignored row is 0 and not -0
    loss = tl.where(y == ignore_index, 0.0, factor * logp_y)
    tl.store(loss_ptr + row, loss, mask=mask_n)


@triton.jit(do_not_specialize=CHANGING)
def nll_grad_kernel(
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    dloss_ptr,  # (N,) fp32; stride 0 when it is one number
    dlogp_ptr,  # (N, V), output, contiguous
    stride_dloss,
    V,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    """One block of a row per program: 0 but for the target's entry, NaN for an invalid row."""
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_v = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    y, valid, factor = load_target(target_ptr, class_weight_ptr, row, True, V, ignore_index)
    dlogp_y = factor * tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    # compared as int32, like the offsets
    is_target = offs_v == tl.where(valid, y, -1).to(tl.int32)
    invalid = (y != ignore_index) & (valid == 0)
    dlogp = tl.where(is_target, dlogp_y, tl.where(invalid, float("nan"), 0.0))
    tl.store(dlogp_ptr + row * V + offs_v, dlogp.to(dlogp_ptr.dtype.element_ty), mask=offs_v < V)


def row_plan(t: Tensor, tensors: int) -> tuple[LaunchConfig, bool]:
    """(block, whether it holds a whole row) for rows of ``t``; ``tensors``: how many are loaded."""
    v = t.shape[1]
    plan = fused_plan(
        family(t.device),
        v,
        t.element_size(),
        wide=True,
        most_lead=None,
        # a second tensor needs registers for every class, as these options do
        shaping=tensors > 1,
    )
    if plan.kind == "whole":
        return LaunchConfig(plan.block_v, plan.num_warps), True
    return row_blocks(v), False


def log_softmax(logits: Tensor, logp: Tensor, stats: Tensor) -> None:
    """Fill ``logp`` (N, V) and ``stats`` (2, N), which the gradient takes.

    ``logits`` and ``logp`` have unit last stride.
    """
    n, v = logits.shape
    if n == 0 or v == 0:
        return
    config, whole = row_plan(logits, 1)
    with on_device_of(logits):
        log_softmax_kernel[(n,)](
            logits, logp, stats, logits.stride(0), logp.stride(0), n, v,
            BLOCK_V=config.block_v, WHOLE_ROW=whole, num_warps=config.num_warps,
        )  # fmt: skip


def log_softmax_grad(logits: Tensor, stats: Tensor, dlogp: Tensor, dlogits: Tensor) -> None:
    """Fill ``dlogits``. The (N, V) tensors have unit last stride."""
    n, v = logits.shape
    if n == 0 or v == 0:
        return
    config, whole = row_plan(logits, 2)
    with on_device_of(logits):
        log_softmax_grad_kernel[(n,)](
            logits, stats, dlogp, dlogits,
            logits.stride(0), dlogp.stride(0), dlogits.stride(0), n, v,
            BLOCK_V=config.block_v, WHOLE_ROW=whole, num_warps=config.num_warps,
        )  # fmt: skip


def nll(logp: Tensor, target: Tensor, class_weight: Tensor | None, *, ignore_index: int) -> Tensor:
    """(N,) fp32 losses of (N, V) log-probabilities of any strides.

    ``target`` (N,) and ``class_weight`` (V,) fp32 are contiguous.
    """
    n, v = logp.shape
    loss = torch.empty(n, dtype=torch.float32, device=logp.device)
    if n == 0:
        return loss
    config = NLL_ROWS
    with on_device_of(logp):
        nll_kernel[(-(-n // config.block_v),)](
            logp, target, class_weight, loss,
            logp.stride(0), logp.stride(1), n, v, ignore_index,
            BLOCK_N=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
    return loss


def nll_grad(
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    dlogp: Tensor,
    *,
    ignore_index: int,
) -> None:
    """Fill contiguous ``dlogp`` (N, V) with the gradient of ``nll`` times ``dloss`` (N,)."""
    n, v = dlogp.shape
    if n == 0:
        return
    config = row_blocks(v)
    with on_device_of(dlogp):
        nll_grad_kernel[(n * -(-v // config.block_v),)](
            target, class_weight, dloss, dlogp, dloss.stride(0), v, ignore_index,
            BLOCK_V=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
