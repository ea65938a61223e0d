"""Rows of logits -> log-probabilities and the gradient through them, and the one log-probability a class id picks out of its row.

A row that fits one program is read once; a longer one twice, the second time for what is written. The gradient takes the logits and two
numbers of each row and not the log-probabilities, which may have been rounded: of bf16 ones near -12, exp is good to two digits.

N rows, V classes. An id outside [0, V) that is not ignore_index makes its row NaN; nothing outside a row is read for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, family, fused_plan, on_device_of, row_blocks
from .tile_math import LOWEST, log1p_from_minus_one, lse_finish, lse_start, lse_update, soft_target_slope

# rows of one program that picks a number of each
ROWS_OF_PICK = LaunchConfig(128, 4)

CHANGING = ["N", "ignore_index"]


@triton.jit
def row_tile(row_ptr, offs_v, V, absent):
    """(BLOCK_V,) fp32 numbers of a row, ``absent`` beyond its end."""
    return tl.load(row_ptr + offs_v, mask=offs_v < V, other=absent).to(tl.float32)


@triton.jit
def whole_lse(z):
    """A row -> (maximum, log of the sum of exp(z - maximum)), the same as of its tiles."""
    row_max = tl.maximum(tl.max(z, 0), LOWEST)
    at_max = z == row_max
    others = tl.sum(tl.where(at_max, 0.0, tl.exp(z - row_max)), 0)
    log_sum = log1p_from_minus_one(others + (tl.sum(tl.where(at_max, 1.0, 0.0), 0) - 1.0))
    return row_max, tl.where(row_max == float("inf"), float("nan"), log_sum)


@triton.jit(do_not_specialize=CHANGING)
def log_softmax_kernel(
    logits_ptr,  # (N, V) any float dtype
    logp_ptr,  # (N, V) any float dtype, output
    stats_ptr,  # (2, N) fp32, output: row maximum, log-sum
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
            top, ties, rest = lse_update(top, ties, rest, row_tile(row_ptr, v + offs_v, V, -float("inf")))
        row_max, log_sum = lse_finish(top, ties, rest)
        for v in tl.range(0, V, BLOCK_V, num_stages=2):
            logp = (row_tile(row_ptr, v + offs_v, V, 0.0) - row_max) - log_sum
            tl.store(logp_row_ptr + v + offs_v, logp.to(logp_ptr.dtype.element_ty), mask=v + offs_v < V)
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + N + row, log_sum)


@triton.jit
def logit_slope(z, dlogp, row_max, log_sum, total):
    """dlogp - p * total, which keeps its digits where nearly all of the probability is one class's."""
    logp = (z - row_max) - log_sum
    return -soft_target_slope(tl.exp(logp), logp, dlogp, total)


@triton.jit(do_not_specialize=CHANGING)
def log_softmax_grad_kernel(
    logits_ptr,  # (N, V) any float dtype
    stats_ptr,  # as log_softmax_kernel left it
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
        dx = logit_slope(z, dlogp, row_max, log_sum, tl.sum(dlogp, 0))
        tl.store(dlogits_row_ptr + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=offs_v < V)
    else:
        sums = tl.zeros([BLOCK_V], tl.float32)
        for v in tl.range(0, V, BLOCK_V, num_stages=2):
            sums += row_tile(dlogp_row_ptr, v + offs_v, V, 0.0)
        total = tl.sum(sums, 0)
        # not pipelined: two tensors in flight take the registers of a third block
        for v in tl.range(0, V, BLOCK_V, num_stages=1):
            z = row_tile(row_ptr, v + offs_v, V, 0.0)
            dx = logit_slope(z, row_tile(dlogp_row_ptr, v + offs_v, V, 0.0), row_max, log_sum, total)
            tl.store(dlogits_row_ptr + v + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=v + offs_v < V)


@triton.jit
def picked(target_ptr, class_weight_ptr, row, there, V, ignore_index):
    """(class ids, which of them may be an address, what their log-probability is multiplied by: NaN for a bad id)."""
    y = tl.load(target_ptr + row, mask=there, other=ignore_index).to(tl.int64)
    readable = (y >= 0) & (y < V) & (y != ignore_index)
    weight = tl.where(readable, 1.0, 0.0)
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + tl.where(readable, y, 0), mask=readable, other=0.0)
    return y, readable, tl.where(readable | (y == ignore_index), -weight, float("nan"))


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
    """A block of rows per program: one number is read of each."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < N
    y, readable, factor = picked(target_ptr, class_weight_ptr, row, there, V, ignore_index)
    logp = tl.load(logp_ptr + row * stride_logp_n + tl.where(readable, y, 0) * stride_logp_v, mask=there & readable, other=0.0)
    # an ignored row is 0, and no -0
    loss = tl.where(y == ignore_index, 0.0, factor * logp.to(tl.float32))
    tl.store(loss_ptr + row, loss, mask=there)


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
    """One row and block per program: zeros, and one number in all of a row's blocks."""
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_v = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    y, readable, factor = picked(target_ptr, class_weight_ptr, row, True, V, ignore_index)
    dlogp = factor * tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    # compared as int32, like the offsets; a bad row is NaN throughout
    is_target = offs_v == tl.where(readable, y, -1).to(tl.int32)
    bad = (y != ignore_index) & (readable == 0)
    tile = tl.where(is_target, dlogp, tl.where(bad, float("nan"), 0.0))
    tl.store(dlogp_ptr + row * V + offs_v, tile.to(dlogp_ptr.dtype.element_ty), mask=offs_v < V)


def row_plan(t: Tensor, tensors: int) -> tuple[LaunchConfig, bool]:
    """The block for rows like those of ``t``, of which a program holds so many tensors, and whether it is the whole row."""
    v = t.shape[1]
    # where options take registers for every class, so does a second tensor
    plan = fused_plan(family(t.device), v, t.element_size(), wide=True, most_lead=None, shaping=tensors > 1)
    if plan.kind == "whole":
        return LaunchConfig(plan.block_v, plan.num_warps), True
    return row_blocks(v), False


def log_softmax(logits: Tensor, logp: Tensor, stats: Tensor) -> None:
    """Fill ``logp`` (N, V) and ``stats`` (2, N), which the gradient takes; (N, V) have unit last stride."""
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
    """Fill ``dlogits``; (N, V) have unit last stride."""
    n, v = logits.shape
    if n == 0 or v == 0:
        return
    config, whole = row_plan(logits, 2)
    with on_device_of(logits):
        log_softmax_grad_kernel[(n,)](
            logits, stats, dlogp, dlogits, logits.stride(0), dlogp.stride(0), dlogits.stride(0), n, v,
            BLOCK_V=config.block_v, WHOLE_ROW=whole, num_warps=config.num_warps,
        )  # fmt: skip


def nll(logp: Tensor, target: Tensor, class_weight: Tensor | None, *, ignore_index: int) -> Tensor:
    """(N, V) log-probabilities of any strides, contiguous (N,) ids and (V,) fp32 weights -> (N,) losses."""
    n, v = logp.shape
    loss = torch.empty(n, dtype=torch.float32, device=logp.device)
    if n == 0:
        return loss
    config = ROWS_OF_PICK
    with on_device_of(logp):
        nll_kernel[(-(-n // config.block_v),)](
            logp, target, class_weight, loss, logp.stride(0), logp.stride(1), n, v, ignore_index,
            BLOCK_N=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
    return loss


def nll_grad(target: Tensor, class_weight: Tensor | None, dloss: Tensor, dlogp: Tensor, *, ignore_index: int) -> None:
    """Fill contiguous ``dlogp`` (N, V), which is 0 but for a number a row, with the gradient of ``nll`` times ``dloss`` (N,)."""
    n, v = dlogp.shape
    if n == 0:
        return
    config = row_blocks(v)
    with on_device_of(dlogp):
        nll_grad_kernel[(n * -(-v // config.block_v),)](
            target, class_weight, dloss, dlogp, dloss.stride(0), v, ignore_index, BLOCK_V=config.block_v, num_warps=config.num_warps
        )
