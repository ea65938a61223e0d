"""Matrix products whose operands are narrower than their result, where a device has them and where it has not."""

import torch
from torch import Tensor

# of a block of the weight that is converted for a product: enough rows for the product, few enough for a cache
BLOCK_BYTES = 16 << 20
# torch 2.8; how a product in bf16 comes out in fp32 without converting its operands
_HAS_OUT_DTYPE = any("out_dtype" in str(schema) for schema in torch._C._jit_get_schemas_for_operator("aten::addmm"))


def mixes(device: torch.device) -> bool:
    """Whether products of half-precision operands come out in fp32 there."""
    return device.type == "cuda" and _HAS_OUT_DTYPE


def class_blocks(weight: Tensor, wide: torch.dtype) -> list[slice]:
    """The classes of a weight (V, D) in the blocks that are converted to ``wide``: all at once where nothing is."""
    v, d = weight.shape
    step = v if weight.dtype == wide else max(1, BLOCK_BYTES // (max(d, 1) * wide.itemsize))
    return [slice(i, min(i + step, v)) for i in range(0, v, step)]


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``, summed in fp32 at least and rounded once, to the dtype of ``out``."""
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
