"""Matrix products whose operands are narrower than their result, where a device has them and where
it has not."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# of a block of the weight that is converted for a product: enough rows for the product, few enough
# for a cache
BLOCK_BYTES = 16 << 20


def mixes(device: torch.device) -> bool:
    """Whether products of half-precision operands come out in fp32 there."""
    return device.type == "cuda"


@functools.cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def narrow_on_cpu(dtype: torch.dtype, d: int, v: int) -> bool:
    """Whether a CPU multiplies hidden states (N, D) and a weight (V, D) of a dtype as they are,
    without a conversion to float32.

    With AMX products in bfloat16 take a fifth of the time of those in float32; without its
    instructions more than ten times as long. oneDNN's AMX kernels (3.12, in torch 2.13) read the
    left operand in tiles of 32 columns. Beyond its last column they read the next row or memory
    that was never written and multiply that by 0, so a NaN there spreads. Hence the inner
    dimensions must be whole tiles."""
    return dtype == torch.bfloat16 and d % 32 == 0 and v % 32 == 0 and _has_amx()


def block_classes(v: int, width: int, dtype: torch.dtype, wide: torch.dtype) -> int:
    """The classes whose rows of a weight are converted to ``wide`` at a time, with ``width``
    numbers each: all where nothing is."""
    return (
        max(1, v)
        if dtype == wide
        else max(1, min(v, BLOCK_BYTES // (max(width, 1) * wide.itemsize)))
    )


class Weight:
    """A weight (V, D) as products take it: block by block in the dtype of the other operand, in the
    same memory.

    ``rows``: of logits that are converted with a block of classes, 0 for none.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int = 0) -> None:
        v, d = weight.shape
        self._weight = weight
        # beside such a block of the weight there are as large ones of the logits' gradient and of
        # the weight's
        width = 4 * max(d, rows) if rows else d
        self._step = block_classes(v, width, weight.dtype, dtype)
        # one piece for all: a CPU's allocator keeps what is given back in pieces of this size
        self._room = (
            None
            if weight.dtype == dtype
            else torch.empty(self._step, d, dtype=dtype, device=weight.device)
        )
        self.whole = self._step >= v

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(classes, their rows); the rows are good until the next."""
        # a weight without classes is one block too, whose products are 0
        for start in range(0, max(1, len(self._weight)), self._step):
            classes = slice(start, min(start + self._step, len(self._weight)))
            block = self._weight[classes]
            yield classes, block if self._room is None else self._room[: len(block)].copy_(block)


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``, summed in fp32 at least and rounded once, to the dtype
    of ``out``."""
    if out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif a.dtype.itemsize < out.dtype.itemsize and mixes(out.device):
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        wide = max(out.dtype, a.dtype, key=lambda dtype: dtype.itemsize)
        made = torch.mm(a.to(wide), b.to(wide))
        if add:
            out.add_(made)
        else:
            out.copy_(made)
