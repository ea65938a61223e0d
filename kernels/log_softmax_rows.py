"""Log-probabilities of rows of logits, and their gradient.

A row that fits one program is read once; a longer row is read twice, the second time to store its
log-probabilities. The gradient is computed from the logits, row_max and log_sum, and not from the
log-probabilities, which may have been rounded: exp of a bf16 near -12 is up to 3.2 % off.

N rows, V classes.
"""

import triton
import triton.language as tl
from torch import Tensor

from .devices import device_of
from .launch import LaunchConfig, fused_plan, on_device_of, row_blocks
from .tile_math import (
    LOWEST,
    log1p_from_minus_one,
    lse_finish,
    lse_start,
    lse_update,
    soft_target_grad,
)

# not specialized: it differs from batch to batch
CHANGING = ["N"]


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


def row_plan(t: Tensor, tensors: int) -> tuple[LaunchConfig, bool]:
    """(block, True if a block is a whole row) for rows of ``t``, of ``tensors`` loaded tensors."""
    v = t.shape[1]
    plan = fused_plan(
        device_of(t.device),
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
