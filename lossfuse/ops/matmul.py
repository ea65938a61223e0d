"""Matrix products whose operands are narrower than their result, also on devices without them."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# of a block of the weight that is converted to another dtype: large enough for a fast product,
# small enough for a cache
BLOCK_BYTES = 16 << 20


def mm_returns_fp32(device: torch.device) -> bool:
    """True if ``torch.mm`` of half-precision operands can return fp32."""
    return device.type == "cuda"


@functools.cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def cpu_multiplies_bf16(dtype: torch.dtype, d: int, v: int) -> bool:
    """True if hidden states (N, D) and a weight (V, D) of a dtype are multiplied on a CPU without
    conversion to float32.

    With AMX, products in bfloat16 take a fifth of the time of those in float32; without it, more
    than ten times as long. oneDNN's AMX kernels (3.12, in torch 2.13) read the left operand in
    tiles of 32 columns. Beyond its last column they read the next row, or memory that was never
    written, and multiply it by 0, which spreads a NaN. So the inner dimensions must be whole
    tiles."""
    return dtype == torch.bfloat16 and d % 32 == 0 and v % 32 == 0 and _has_amx()


def block_classes(v: int, width: int, dtype: torch.dtype, wide: torch.dtype) -> int:
    """Classes of a block that is converted from ``dtype`` to ``wide`` at a time, ``width`` numbers
    each; all classes if the dtypes are equal."""
    if dtype == wide:
        return max(1, v)
    return max(1, min(v, BLOCK_BYTES // (max(width, 1) * wide.itemsize)))


class Weight:
    """A weight (V, D) in blocks of classes, converted to the dtype of a matrix product; all blocks
    share their memory.

    ``converted_rows``: rows of logits that are converted with each block, 0 for none.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, converted_rows: int = 0) -> None:
        v, d = weight.shape
        self._weight = weight
        # the logits, their gradient and that of the weight then have converted blocks too
        width = 4 * max(d, converted_rows) if converted_rows else d
        self._step = block_classes(v, width, weight.dtype, dtype)
        # allocated once: a CPU's allocator does not return freed blocks of this size to the system
        self._buffer = None
        if weight.dtype != dtype:
            self._buffer = torch.empty(self._step, d, dtype=dtype, device=weight.device)
        self.single_block = self._step >= v

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(classes, their rows of the weight) in turn; the next block overwrites the rows."""
        # a weight without classes is one block too, whose products are 0
        for start in range(0, max(1, len(self._weight)), self._step):
            classes = slice(start, min(start + self._step, len(self._weight)))
            block = self._weight[classes]
            if self._buffer is not None:
                block = self._buffer[: len(block)].copy_(block)
            yield classes, block


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``; accumulated in fp32 or wider and rounded once, to the
    dtype of ``out``."""
    if out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif a.dtype.itemsize < out.dtype.itemsize and mm_returns_fp32(out.device):
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        wide = max(out.dtype, a.dtype, key=lambda dtype: dtype.itemsize)
        result = torch.mm(a.to(wide), b.to(wide))
        if add:
            out.add_(result)
        else:
            out.copy_(result)
