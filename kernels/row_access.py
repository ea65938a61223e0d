"""Addressing of a row in kernels: its class, that class's logit and weight, tiles, its status.

A row is valid if its target is a class, ignored if its target is ``ignore_index``, and invalid
otherwise. The results of an ignored row are 0 and those of an invalid row NaN. Only the target of a
valid row is used as an address; a kernel cannot raise for the others.

Kernels take every optional tensor and number as an argument of its own, None where it is absent:
Triton compiles an absent argument away. That is why some have more than 20 arguments. Grouping
them in tuples would hide their shapes and would not change the machine code.
"""

import triton
import triton.language as tl
from torch import Tensor

from .tile_math import shaped

# in place of a class
IGNORED = tl.constexpr(-1)
INVALID = tl.constexpr(-2)


@triton.jit
def class_of(y, V, ignore_index):
    """A target as int32: its class, or IGNORED, or INVALID."""
    y = y.to(tl.int64)
    ignored = y == ignore_index
    return tl.where(ignored, IGNORED, tl.where((y >= 0) & (y < V), y, INVALID)).to(tl.int32)


@triton.jit
def class_in_shard(y, ignore_index, V, first_class, num_classes):
    """(class id relative to the shard, whether the row is valid, whether the class is local).

    A shard has the V classes from ``first_class`` on, of ``num_classes``. Without shards both are
    None, and the class of a valid row is local.
    """
    if first_class is None:
        valid = (y >= 0) & (y < V) & (y != ignore_index)
        return y, valid, valid
    else:
        valid = (y >= 0) & (y < num_classes) & (y != ignore_index)
        y = y - first_class
        return y, valid, valid & (y >= 0) & (y < V)


@triton.jit
def mask_row(value, valid, ignored):
    """``value``, a number of a row or a tile of it; 0 if the row is ignored, NaN if invalid."""
    return tl.where(valid, value, tl.where(ignored, 0.0, float("nan")))


@triton.jit
def masked_argmax(ignore_index):
    """The argmax of rows that are not valid: neither a class nor ``ignore_index``."""
    return tl.where(ignore_index == -1, -2, -1)


@triton.jit
def target_logit(row_ptr, y, local):
    """The fp32 logit of class y before scale and softcap; 0 where the class is not local."""
    return tl.load(row_ptr + tl.where(local, y, 0), mask=local, other=0.0).to(tl.float32)


@triton.jit
def target_weight(class_weight_ptr, y, local):
    """The fp32 weight of class y; 0 where the class is not local."""
    # triton 3.6 cannot return None: callers test for absent class weights themselves
    return tl.load(class_weight_ptr + tl.where(local, y, 0), mask=local, other=0.0)


@triton.jit
def class_weights(class_weight_ptr, offs_v, mask_v):
    """A tile of fp32 class weights, 1 without class weights; 0 outside mask_v."""
    if class_weight_ptr is None:
        return tl.where(mask_v, 1.0, 0.0)
    else:
        return tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0)


@triton.jit
def weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing):
    """The sum of the class weights, V without them; 0 and not read without smoothing."""
    if smoothing is None:
        return 0.0
    elif class_weight_ptr is None:
        return V * 1.0
    else:
        return tl.load(class_weight_sum_ptr)


@triton.jit
def logits_tile(row_ptr, offs_v, mask_v, scale, softcap):
    """A tile of fp32 logits after scale and softcap, -inf outside mask_v."""
    x = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    # masked after the scale and the softcap, which would change a padding of -inf
    return tl.where(mask_v, shaped(x, scale, softcap), -float("inf"))


@triton.jit
def padding(scale, softcap):
    """The padding of masked loads of logits for ``shaped_tile``."""
    # -inf saves a select per logit, but a scale or softcap would turn it into another number or NaN
    return -float("inf") if scale is None and softcap is None else 0.0


@triton.jit
def shaped_tile(x, mask_v, scale, softcap):
    """Logits loaded with ``padding`` to fp32 after scale and softcap, -inf outside mask_v."""
    z = shaped(x.to(tl.float32), scale, softcap)
    if scale is not None or softcap is not None:
        z = tl.where(mask_v, z, -float("inf"))
    return z


def narrower_over(logits: Tensor, dlogits: Tensor) -> bool:
    """True if the gradient is written over the logits and is of a narrower dtype.

    The gradient of a block then lies over the logits of a lower block, so that programs of one row
    would overwrite what others still read. One program takes the row from its start to its end.
    """
    same_memory = dlogits.data_ptr() == logits.data_ptr()
    return same_memory and dlogits.element_size() != logits.element_size()
