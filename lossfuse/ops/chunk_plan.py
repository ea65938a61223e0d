"""How many rows of logits a head computes at a time, and how it adds up the gradient of its weight.

N rows, width D, V classes."""

import math
from typing import NamedTuple

import torch

from ..spec import LinearOptions
from .matmul import mm_returns_fp32

# rows of logits start at multiples of it (elements): vectorized loads, and strides that cuBLAS has
# fast kernels for
ROW_ALIGNMENT = 16
# rows of a tile of a matrix product
TILE_ROWS = 128


def padded(v: int) -> int:
    """The stride of rows of V logits, in elements."""
    return -(-v // ROW_ALIGNMENT) * ROW_ALIGNMENT


def chunk_rows(
    n: int, d: int, v: int, dtype: torch.dtype, options: LinearOptions, *, cpu: bool
) -> int:
    """Rows of a chunk: equal chunks, as few as the bytes allow; only the last may be shorter.

    On an accelerator a chunk of C rows costs, beside the 6 C D V operations of its matrix products,

    - the weight read twice, 4 V D bytes in bfloat16, and its gradient read and written, 8 V D bytes
      in float32, independent of C. Half of that overlaps with the matrix products, which take as
      long as it does at C = 1000 for a gradient in bfloat16 and at 2000 for one in float32 (H100:
      the product that accumulates reaches 437 TFLOP/s at C = 1024 and 589 at 2048, of 651 at 8192);
    - a gradient of the hidden states of C x D, in tiles of 128 x 256, which leaves SMs idle below
      C D = 2^22;
    - the logits, written, read and overwritten by their gradient, independent of C.

    Beyond 4096 rows 1 or 2 % are left. So without ``chunk_bytes`` a chunk has 1 GiB of logits, but
    at least the rows above and at most 4096: 2048 for V = 128256 in float32, where 8192 rows then
    take 41.2 ms on an H100 (the three products alone 37.0), and 4096 take as long. On a CPU
    products reach their full speed with some hundred rows: 256 MiB, at least 256 rows, at most 512.

    Args:
        n, d, v: rows, width, classes.
        dtype: of the operands.
        options: ``chunk_bytes``, which is obeyed down to a single row, ``logits_dtype`` and
            ``acc_dtype``.
        cpu: True for tensors on a CPU.
    """
    row_bytes = padded(v) * options.dtype("logits_dtype", dtype).itemsize
    if options.chunk_bytes is not None:
        most = options.chunk_bytes // row_bytes
    elif cpu:
        most = min(max((256 << 20) // row_bytes, 256), 512)
    else:
        wide_sum = options.dtype("acc_dtype", dtype).itemsize > 2
        least = max(2048 if wide_sum else 1024, 2**22 // max(d, 1))
        most = min(max((1 << 30) // row_bytes, least), 4096)
    most = max(1, min(most, n))
    equal = math.ceil(n / math.ceil(n / most)) if n else 1
    tiled = _tiled(equal)
    return tiled if tiled <= most else equal


def _tiled(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


# roundings of a sum in bfloat16
MOST_ROUNDINGS = 3
# rows of logits where their gradient is held for several chunks: the weight, which is read for each
# of them, takes half as long as the product
HELD_ROWS = 512


class ChunkPlan(NamedTuple):
    """How the gradients of a head are computed."""

    rows: int  # of logits at a time
    # rows whose gradient of the logits is multiplied at a time: ``rows``, which write it over their
    # logits, or a larger number of rows, which hold it in memory of its own
    grad_rows: int
    sum_dtype: torch.dtype  # of the gradient of the weight


def chunk_plan(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    options: LinearOptions,
    *,
    narrow_sums: bool,
    cpu: bool,
) -> ChunkPlan:
    """The plan for N rows, with the fewest bytes whose error is near that of one rounding.

    A sum of k products in bfloat16 is rounded k times. Against one rounding, the error of the
    gradient of the weight grows to 1.2 times for two products, 1.4 for three, 1.6 for four and 2.1
    for eight, where the products are about equal and independent (docs/numerics.md). Where float32
    is not asked for, it is therefore rounded at most three times, in the first of these ways that
    can be taken:

    1. The chunks of ``chunk_rows`` are at most three.
    2. 512 rows of logits at a time; the gradients of a third of all rows are held, and multiplied
       in one product, if that takes no more bytes than a sum in float32 (N up to about 5 D).
    3. The sum is in float32 and rounded after the last chunk.

    For N = 8192, D = 4096, V = 128256 in bfloat16, beyond the operands, with the time that is
    predicted from rates measured on an H100, as a fraction of the three products alone:

    ========================================  =========  ====  =====
    plan                                      bytes      time  error
    ========================================  =========  ====  =====
    default (2.)                              2.04 GiB   0.92  1.4
    ``acc_dtype=torch.float32``               3.12 GiB   0.87  1
    ``keep_dlogits=True``                     3.36 GiB   0.94  1
    ========================================  =========  ====  =====

    ``narrow_sums``: a product of bfloat16 can return float32 and bfloat16, as on CUDA.
    """
    rows = chunk_rows(n, d, v, dtype, options, cpu=cpu)
    wide = options.dtype("acc_dtype", dtype)
    chosen = options.acc_dtype is not None or not narrow_sums or dtype != torch.bfloat16
    logits_bytes = options.dtype("logits_dtype", dtype).itemsize
    holds = options.chunk_bytes is None and logits_bytes > dtype.itemsize and not cpu
    if options.keep_dlogits:
        rows = min(rows, HELD_ROWS) if holds else rows
        return ChunkPlan(rows, max(n, 1), wide if chosen else dtype)
    if chosen:
        return ChunkPlan(rows, rows, wide)
    if n <= MOST_ROUNDINGS * rows:
        return ChunkPlan(rows, rows, dtype)
    grad_rows = _tiled(math.ceil(n / MOST_ROUNDINGS))
    held = logits_bytes * HELD_ROWS + dtype.itemsize * grad_rows
    in_place = logits_bytes * rows + dtype.itemsize * d
    if holds and held <= in_place:
        return ChunkPlan(HELD_ROWS, grad_rows, dtype)
    return ChunkPlan(rows, rows, wide)


def weight_grad_dtype(
    operands: torch.dtype, options: LinearOptions, device: torch.device
) -> torch.dtype:
    """The dtype of the gradient of the weight between forward and backward."""
    if options.acc_dtype is None and operands == torch.bfloat16 and mm_returns_fp32(device):
        return operands
    return options.dtype("acc_dtype", operands)
