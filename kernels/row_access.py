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

from .tile_math import only_if, shaped

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


# Rows that do not start on 16 bytes: groups of 16 bytes that are wholly the row's are loaded and
# stored at once, the elements of groups shared with the rows beside it one by one


@triton.jit
def lead_of(row, stride, lead, GROUP: tl.constexpr):
    """Elements from the 16-byte boundary at or before a row to the row."""
    return tl.cast(((row % GROUP) * (stride % GROUP) + lead) % GROUP, tl.int32)


@triton.jit
def aligned_row_ptr(ptr, row, stride, row_lead):
    """The 16-byte boundary at or before a row. Positions in a row are counted from there."""
    return tl.multiple_of(ptr + (tl.cast(row, tl.int64) * stride - row_lead), 16)


@triton.jit
def in_whole_groups(pos, base, lead, V, GROUP: tl.constexpr):
    """Mask of the positions of a slice whose group of 16 bytes is wholly the row's.

    It is the same for all positions of a group, so that accesses stay vectorized.
    """
    group = pos // GROUP
    first_group = (lead + GROUP - 1) // GROUP - base // GROUP
    return (group >= first_group) & (group < (lead + V) // GROUP - base // GROUP)


@triton.jit
def edge_elements(base, lead, V, SLICE: tl.constexpr, GROUP: tl.constexpr):
    """(positions, mask) of the row's elements in groups that it shares with its neighbors.

    These are at most its first and its last group; the mask holds for those in this slice.
    """
    q = tl.arange(0, 2 * GROUP)
    pos = tl.where(q < GROUP, q, (lead + V) // GROUP * GROUP + q - GROUP)
    shared = tl.where(q < GROUP, only_if(lead > 0, pos >= lead), pos < lead + V)
    return pos, shared & (pos >= base) & (pos < base + SLICE)


@triton.jit
def load_slice(
    logits_ptr,
    row,
    valid,
    y,
    stride,
    lead,
    V,
    scale,
    softcap,
    base,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(logits of whole groups, of edge elements, of the target or 0 if it is not in the slice).

    ``y`` is negative if the target is not local. Nothing is read of a row that is not valid.
    """
    row_lead = lead_of(row, stride, lead, GROUP)
    row_ptr = aligned_row_ptr(logits_ptr, row, stride, row_lead)
    pos = tl.arange(0, SLICE)
    x = tl.load(
        row_ptr + base + pos,
        mask=only_if(valid, in_whole_groups(pos, base, row_lead, V, GROUP)),
        other=padding(scale, softcap),
    )
    edge_pos, is_edge = edge_elements(base, row_lead, V, SLICE, GROUP)
    edge_x = tl.load(
        row_ptr + edge_pos,
        mask=only_if(valid, is_edge),
        other=padding(scale, softcap),
    )
    y_pos = tl.where(y >= 0, y + row_lead, -1)
    x_y = target_logit(row_ptr, y_pos, (y_pos >= base) & (y_pos < base + SLICE))
    return x, edge_x, x_y


def alignment(logits: Tensor, dlogits: Tensor) -> tuple[bool, int, int | None]:
    """(wide, lead, most_lead).

    ``wide`` and ``most_lead`` are as in ``fused_plan``; ``lead`` is that of the first row.
    """
    n, v = logits.shape
    size = logits.element_size()
    group = 16 // size
    strides = (logits.stride(0), dlogits.stride(0)) if n > 1 else (0, 0)
    leads = (
        logits.data_ptr() % 16 // size,
        dlogits.data_ptr() % 16 // dlogits.element_size(),
    )
    aligned = leads == (0, 0)
    wide = aligned and v % 16 == 0 and strides[0] % 16 == 0 and strides[1] % 16 == 0
    if dlogits.element_size() != size:
        # groups of 16 bytes hold other classes in the gradient: rows must start at a boundary
        aligned = aligned and strides[0] % group == 0
        aligned = aligned and strides[1] * dlogits.element_size() % 16 == 0
        return wide, leads[0], 0 if aligned else None
    if leads[0] != leads[1] or (strides[0] - strides[1]) % group:
        return wide, leads[0], None
    return wide, leads[0], group - 1 if strides[0] % group else leads[0]


def narrower_over(logits: Tensor, dlogits: Tensor) -> bool:
    """True if the gradient is written over the logits and is of a narrower dtype.

    The gradient of a block then lies over the logits of a lower block, so that programs of one row
    would overwrite what others still read. One program takes the row from its start to its end.
    """
    same_memory = dlogits.data_ptr() == logits.data_ptr()
    return same_memory and dlogits.element_size() != logits.element_size()
