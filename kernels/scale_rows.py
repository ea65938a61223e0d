"""A tensor times a number that is on the device, in place."""

import triton
import triton.language as tl
from torch import Tensor

from .devices import multiprocessors
from .launch import LaunchConfig, on_device_of

SCALE_BLOCK = LaunchConfig(4096, 8)


@triton.jit
def scale_rows_kernel(
    t_ptr,  # (n,) any float dtype, in and out
    factor_ptr,  # () any float dtype
    n,
    BLOCK: tl.constexpr,
):
    """t *= factor. A program takes every num_programs-th block; for a factor of 1 it takes none."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            offs = start + tl.arange(0, BLOCK)
            t = tl.load(t_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
            tl.store(t_ptr + offs, (t * factor).to(t_ptr.dtype.element_ty), mask=offs < n)


def multiply_in_place(t: Tensor, factor: Tensor) -> None:
    """``t *= factor``, multiplied in fp32 and rounded once. A factor of 1 costs only the launch."""
    n = t.numel()
    if n == 0:
        return
    if not t.is_contiguous():
        # rows with gaps: torch rounds in the same way, but also multiplies by a factor of 1
        t.mul_(factor.reshape(()))
        return
    programs = min(-(-n // SCALE_BLOCK.block_v), 8 * multiprocessors(t.device))
    with on_device_of(t):
        scale_rows_kernel[(programs,)](
            t, factor, n, BLOCK=SCALE_BLOCK.block_v, num_warps=SCALE_BLOCK.num_warps
        )  # fmt: skip
