"""The two launches beside the kernel of loss and gradient: what all rows share before it (the
upstream gradient of their losses, zeros where programs publish), and the total of the losses after
it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, on_device_of

BLOCK = LaunchConfig(4096, 8)
# one program counts targets and adds losses up to here, in 4 steps; torch's reductions, which take
# a launch more, above
MOST_ROWS = 16384

CHANGING = ["N", "n_words", "ignore_index"]


@triton.jit
def valid_rows(target_ptr, N, ignore_index, BLOCK: tl.constexpr):
    """The number of targets that are not ``ignore_index``, in fp32."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < N
        target = tl.load(target_ptr + offs, mask=mask, other=0).to(tl.int64)
        count += (mask & (target != ignore_index)).to(tl.int32)
    return tl.sum(count, 0).to(tl.float32)


@triton.jit(do_not_specialize=CHANGING)
def prepare_rows_kernel(
    target_ptr,  # (N,) int64, or None: the divisor is given, or 1
    divisor_ptr,  # () fp32, or None
    dloss_ptr,  # () fp32, output: 1 over the divisor
    words_ptr,  # (n_words,) int64, output: zeros; or None
    smooth_words_ptr,  # (n_words,) int64, output: zeros; or None
    N,
    n_words,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Program 0 takes the reciprocal of the divisor; the others store zeros, a block each."""
    if tl.program_id(0) == 0:
        divisor = 1.0
        if divisor_ptr is not None:
            divisor = tl.load(divisor_ptr)
        if target_ptr is not None:
            divisor = valid_rows(target_ptr, N, ignore_index, BLOCK)
        tl.store(dloss_ptr, tl.div_rn(1.0, divisor))
    elif words_ptr is not None:
        offs = (tl.program_id(0) - 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], tl.int64)
        tl.store(words_ptr + offs, zeros, mask=offs < n_words)
        if smooth_words_ptr is not None:
            tl.store(smooth_words_ptr + offs, zeros, mask=offs < n_words)


@triton.jit(do_not_specialize=CHANGING)
def total_kernel(
    loss_ptr,  # (N,) fp32
    target_ptr,  # (N,) int64, or None: the divisor is given, or 1
    divisor_ptr,  # () fp32, or None
    total_ptr,  # () fp32, output
    N,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """The sum of the losses over the divisor, in one program."""
    lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        lanes += tl.load(loss_ptr + offs, mask=offs < N, other=0.0)
    total = tl.sum(lanes, 0)
    if target_ptr is not None:
        total = tl.div_rn(total, valid_rows(target_ptr, N, ignore_index, BLOCK))
    elif divisor_ptr is not None:
        total = tl.div_rn(total, tl.load(divisor_ptr))
    tl.store(total_ptr, total)


def prepare_rows(
    target: Tensor,
    divisor: Tensor | None,
    dloss: Tensor,
    words: Tensor | None,
    smooth_words: Tensor | None,
    *,
    mean: bool,
    ignore_index: int,
) -> None:
    """Fill ``dloss``, () fp32, with the gradient of the total with respect to the loss of a row,
    and the words that are given with zeros.

    The total is the sum of the losses; with ``mean`` it is divided by ``divisor``, () fp32, or
    without one by the number of valid rows, which are at most MOST_ROWS."""
    n_words = 0 if words is None else words.numel()
    counted = target if mean and divisor is None else None
    with on_device_of(target):
        prepare_rows_kernel[(1 - (-n_words // BLOCK.block_v),)](
            counted, divisor, dloss, words, smooth_words, len(target), n_words, ignore_index,
            BLOCK=BLOCK.block_v, num_warps=BLOCK.num_warps,
        )  # fmt: skip


def total_of(
    loss: Tensor, target: Tensor, divisor: Tensor | None, *, mean: bool, ignore_index: int
) -> Tensor:
    """The total of (N,) fp32 losses, as in ``prepare_rows``: () fp32."""
    if len(loss) > MOST_ROWS:
        divisor = divisor_of_many(target, divisor, mean=mean, ignore_index=ignore_index)
        return loss.sum() if divisor is None else loss.sum() / divisor
    total = torch.empty((), dtype=torch.float32, device=loss.device)
    counted = target if mean and divisor is None else None
    with on_device_of(loss):
        total_kernel[(1,)](
            loss, counted, divisor, total, len(loss), ignore_index,
            BLOCK=BLOCK.block_v, num_warps=BLOCK.num_warps,
        )  # fmt: skip
    return total


def divisor_of_many(
    target: Tensor, divisor: Tensor | None, *, mean: bool, ignore_index: int
) -> Tensor | None:
    """``divisor``, or the number of valid rows where the kernels would have to count too many."""
    if mean and divisor is None and len(target) > MOST_ROWS:
        return (target != ignore_index).sum(dtype=torch.float32)
    return divisor
