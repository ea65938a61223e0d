"""Rows of logits and class ids -> loss and gradient, from one read and one write of the logits; the gradient may take their place.

A program holds its piece of a row in registers between the two. Where a row fits one program, ``whole_row_kernel`` needs nothing else.
Longer rows are cut into slices, one program each: ``split_row_kernel``. The programs of a row publish what their slice adds to the sum of
exponentials and wait for one another, so they must run at the same time: a cooperative launch of no more programs than the device holds.
Where that cannot be had, the two sweeps of ``softmax_rows`` read twice.

N rows, V classes. What an ignored row, or one with a target outside [0, V), holds is not read.
"""

from dataclasses import replace
from typing import Any, TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import softmax_rows
from .launch import SWEEPS, FusedPlan, LaunchConfig, family, fused_plan, multiprocessors, on_device_of, resident_programs
from .softmax_rows import UNFUSED, target_logit, target_weight, weight_sum
from .tile_math import (
    LOWEST,
    exp_flushed,
    id_loss,
    id_slopes,
    log1p_from_minus_one,
    lse_merge,
    only_if,
    other_slope,
    shaped,
    shaped_slope,
    shortfall_of,
    target_slope,
)

CHANGING = ["N", "K", "G", "lead", "ignore_index"]


# in place of a class: nothing of such a row is read
IGNORED = tl.constexpr(-1)
BAD = tl.constexpr(-2)


@triton.jit
def class_of(y, V, ignore_index):
    """A target as int32: a class, IGNORED, or BAD for one that does not exist."""
    y = y.to(tl.int64)
    return tl.where(y == ignore_index, IGNORED, tl.where((y >= 0) & (y < V), y, BAD)).to(tl.int32)


@triton.jit
def padding(scale, softcap):
    """What stands for a logit that is not read."""
    # a scale or a cap would turn -inf into another number or NaN; without them it saves a selection for every logit
    return -float("inf") if scale is None and softcap is None else 0.0


@triton.jit
def shaped_tile(x, mask, scale, softcap):
    """Logits and their padding as the loss sees them: fp32, -inf outside the mask."""
    z = shaped(x.to(tl.float32), scale, softcap)
    if scale is not None or softcap is not None:
        z = tl.where(mask, z, -float("inf"))
    return z


@triton.jit
def smoothing_mass(class_weight_ptr, offs_v, mask):
    """fp32 weights of classes, 0 outside the mask."""
    return tl.load(class_weight_ptr + offs_v, mask=mask, other=0.0) if class_weight_ptr is not None else tl.where(mask, 1.0, 0.0)


@triton.jit
def weights_again(class_weight_ptr, offs_v, mask):
    """fp32 weights of classes for the gradient: read again, because kept since the sum they are a register for every class."""
    return tl.load(class_weight_ptr + offs_v, mask=mask, other=0.0, volatile=True)


@triton.jit
def lane_sum(t, edge_t):
    """The sum of a tile, and of the second if there is one."""
    return tl.sum(t, 0) if edge_t is None else tl.sum(t, 0) + tl.sum(edge_t, 0)


@triton.jit
def excess_of(top, e, edge_e):
    """The sum of e = exp(z - top), less 1, to its last digits; -1 for no finite logit, NaN if a logit was NaN or +inf, as torch."""
    total = lane_sum(e, edge_e)
    excess = total - 1.0
    if (total >= 1.0) & (total < 1.5):
        # one class alone is at the top; the others are added up without it, where its 1 would cost them digits
        excess = lane_sum(tl.where(e == 1.0, 0.0, e), None if edge_e is None else tl.where(edge_e == 1.0, 0.0, edge_e))
    return tl.where(top == float("inf"), float("nan"), excess)


@triton.jit
def unless_unread(y, number):
    """A number of a row; 0 if the row is ignored, NaN if its target is bad."""
    return tl.where(y >= 0, number, tl.where(y == IGNORED, 0.0, float("nan")))


@triton.jit
def settled(y, row_max, excess, dloss):
    """(row_max, log_sum, 1 / sum of exponentials, dloss), fit to make an unread row's gradient 0, or NaN for a bad target.

    Nothing was read of such a row, so its exponentials are 0, and finite numbers here keep them so until dloss decides.
    """
    readable = y >= 0
    log_sum = log1p_from_minus_one(excess)
    dloss = unless_unread(y, dloss)
    return tl.where(readable, row_max, 0.0), tl.where(readable, log_sum, 0.0), tl.where(readable, 1.0 / (1.0 + excess), 0.0), dloss


@triton.jit(do_not_specialize=CHANGING)
def whole_row_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    class_weight_sum_ptr,  # () fp32, or None
    dloss_ptr,  # (N,) fp32; stride 0 when it is one number
    loss_ptr,  # (N,) fp32, output
    dlogits_ptr,  # (N, V), output; may be logits
    stride_logits_n,
    stride_dlogits_n,
    stride_dloss,
    V,
    ignore_index,
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,  # at least V
):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    drow_ptr = dlogits_ptr + row * stride_dlogits_n
    y = class_of(tl.load(target_ptr + row), V, ignore_index)
    readable = y >= 0
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    x = tl.load(row_ptr + offs_v, mask=only_if(readable, mask_v), other=padding(scale, softcap))
    x_y = target_logit(row_ptr, y, readable)
    w_y = target_weight(class_weight_ptr, y, readable) if class_weight_ptr is not None else None
    w_sum = weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing)

    z = shaped_tile(x, only_if(readable, mask_v), scale, softcap)
    top = tl.maximum(tl.max(z, 0), LOWEST)
    shortfall = 0.0
    if smoothing is not None:
        shortfall = shortfall_of(smoothing_mass(class_weight_ptr, offs_v, only_if(readable, mask_v)), z, top)
    e = exp_flushed(z - top)

    dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    row_max, log_sum, per_sum, dloss = settled(y, top, excess_of(top, e, None), dloss)
    z_y = shaped(x_y, scale, softcap)
    loss = id_loss(z_y, w_y, row_max, log_sum, w_sum, shortfall, V, smoothing, lse_square_scale)
    tl.store(loss_ptr + row, unless_unread(y, loss))

    if softcap is not None:
        # read again for the cap's slope: kept, it and what tanh was made of take several registers for every logit
        x = tl.load(row_ptr + offs_v, mask=only_if(readable, mask_v), other=padding(scale, softcap), volatile=True)
    # dlogits may be logits: every warp has read before one stores
    tl.debug_barrier()
    kept, flat, off = id_slopes(w_y, w_sum, row_max, log_sum, V, smoothing, lse_square_scale)
    factor, off_dloss = (kept + flat) * per_sum * dloss, off * dloss
    w = weights_again(class_weight_ptr, offs_v, mask_v) if smoothing is not None and class_weight_ptr is not None else None
    dx = other_slope(e, w, factor, off_dloss, smoothing) * shaped_slope(x.to(tl.float32), scale, softcap)
    tl.store(drow_ptr + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_v)
    # the target's entry once more, after whichever thread has stored it: cheaper than a comparison for every class
    tl.debug_barrier()
    dx_y = target_slope((z_y - row_max) - log_sum, w_y, kept, flat, off, smoothing) * dloss * shaped_slope(x_y, scale, softcap)
    tl.store(drow_ptr + tl.where(readable, y, 0), dx_y.to(dlogits_ptr.dtype.element_ty), mask=readable)


@triton.jit
def packed(high, low):
    """Two fp32 in a word that is not 0: the last bit of the second is set."""
    high = high.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return high | ((low.to(tl.int32, bitcast=True) | 1).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def unpacked(word):
    """The two, the second without its last bit, so that 0 and -1 come back as themselves."""
    low = (word & 0xFFFFFFFE).to(tl.int32)
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True), low.to(tl.float32, bitcast=True)


@triton.jit
def collected(word_ptr, ks, K, PHASE: tl.constexpr):
    """The words of a row's slices, once all are there."""
    # other programs write them: volatile, so that every look is a new one
    words = tl.load(word_ptr + ks, mask=ks < K, other=1, volatile=True)
    if PHASE == 0:
        while tl.min((words != 0).to(tl.int32), 0) == 0:
            words = tl.load(word_ptr + ks, mask=ks < K, other=1, volatile=True)
    return unpacked(words)


@triton.jit
def lead_of(row, stride, lead, GROUP: tl.constexpr):
    """Elements from the 16-byte boundary at or before a row to the row."""
    return tl.cast(((row % GROUP) * (stride % GROUP) + lead) % GROUP, tl.int32)


@triton.jit
def aligned_row(ptr, row, stride, row_lead):
    """That boundary."""
    return tl.multiple_of(ptr + (tl.cast(row, tl.int64) * stride - row_lead), 16)


@triton.jit
def whole_groups(pos, base, lead, V, GROUP: tl.constexpr):
    """Which positions of a slice lie in groups of 16 bytes that are wholly the row's: all or none of a group, so accesses stay wide."""
    group = pos // GROUP
    return (group >= (lead + GROUP - 1) // GROUP - base // GROUP) & (group < (lead + V) // GROUP - base // GROUP)


@triton.jit
def edges(base, lead, V, SLICE: tl.constexpr, GROUP: tl.constexpr):
    """Positions of the row's elements in its first and last group where those are shared, and which of them are this slice's."""
    q = tl.arange(0, 2 * GROUP)
    pos = tl.where(q < GROUP, q, (lead + V) // GROUP * GROUP + q - GROUP)
    shared = tl.where(q < GROUP, only_if(lead > 0, pos >= lead), pos < lead + V)
    return pos, shared & (pos >= base) & (pos < base + SLICE)


@triton.jit
def row_class(target_ptr, row, N, V, ignore_index):
    """``class_of`` the target of a row, past the last one too."""
    return class_of(tl.load(target_ptr + row, mask=row < N, other=-1), V, ignore_index)


@triton.jit
def read_slice(logits_ptr, row, y, stride, lead, V, scale, softcap, base, SLICE: tl.constexpr, GROUP: tl.constexpr):
    """(logits of the whole groups, of the edges, of the target if it is in this slice); padding where nothing is read."""
    row_lead = lead_of(row, stride, lead, GROUP)
    row_ptr = aligned_row(logits_ptr, row, stride, row_lead)
    readable = y >= 0
    pos = tl.arange(0, SLICE)
    x = tl.load(row_ptr + base + pos, mask=only_if(readable, whole_groups(pos, base, row_lead, V, GROUP)), other=padding(scale, softcap))
    edge_pos, is_edge = edges(base, row_lead, V, SLICE, GROUP)
    edge_x = tl.load(row_ptr + edge_pos, mask=only_if(readable, is_edge), other=padding(scale, softcap))
    y_pos = tl.where(readable, y + row_lead, -1)
    return x, edge_x, target_logit(row_ptr, y_pos, (y_pos >= base) & (y_pos < base + SLICE))


@triton.jit(do_not_specialize=CHANGING)
def split_row_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    class_weight_sum_ptr,  # () fp32, or None
    dloss_ptr,  # (N,) fp32; stride 0 when it is one number
    loss_ptr,  # (N,) fp32, output
    dlogits_ptr,  # (N, V), output; may be logits; on 16-byte boundaries where logits is
    words_ptr,  # (N, K) int64, zero: maximum and excess of each slice
    smooth_words_ptr,  # (N, K) int64, zero, or None: shortfall and mass of each slice, for smoothing
    stride_logits_n,
    stride_dlogits_n,
    stride_dloss,
    lead,  # elements from the 16-byte boundary before logits to logits; less than GROUP
    N,
    V,  # at least 2 * GROUP
    K,  # slices: K * SLICE is at least V + the largest lead of a row
    G,  # rows at a time
    ignore_index,
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    SLICE: tl.constexpr,
    K_BLOCK: tl.constexpr,  # at least K
    GROUP: tl.constexpr,  # elements of 16 bytes
    PHASE: tl.constexpr,  # 0; or 1 to publish and 2 to go on, in two launches, where programs do not run at the same time
):
    """A slice of every G-th row per program, K programs per row; the next row is on its way while this one waits."""
    k = tl.program_id(0) % K
    first = tl.program_id(0) // K
    base = k * SLICE
    pos = tl.arange(0, SLICE)
    ks = tl.arange(0, K_BLOCK)
    weighted: tl.constexpr = smoothing is not None and class_weight_ptr is not None
    w_sum = weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing)

    y = row_class(target_ptr, first, N, V, ignore_index)
    y_next = row_class(target_ptr, first + G, N, V, ignore_index)
    x, edge_x, x_y = read_slice(logits_ptr, first, y, stride_logits_n, lead, V, scale, softcap, base, SLICE, GROUP)
    for row in range(first, N, G):
        n = tl.cast(row, tl.int64)
        readable = y >= 0
        row_lead = lead_of(row, stride_dlogits_n, lead, GROUP)
        inside = whole_groups(pos, base, row_lead, V, GROUP)
        edge_pos, is_edge = edges(base, row_lead, V, SLICE, GROUP)
        y_pos = tl.where(readable, y + row_lead, -1)
        mine = (y_pos >= base) & (y_pos < base + SLICE)

        z = shaped_tile(x, only_if(readable, inside), scale, softcap)
        edge_z = shaped_tile(edge_x, only_if(readable, is_edge), scale, softcap)
        top = tl.maximum(tl.maximum(tl.max(z, 0), tl.max(edge_z, 0)), LOWEST)
        if logits_ptr.dtype.element_ty != dlogits_ptr.dtype.element_ty:
            # a narrower gradient is written over other slices than its own: this one must have arrived in every thread before its word is
            # out, the target's logit too. It is no larger than the largest, so top stays what it is and waits for it
            top = tl.maximum(top, tl.where(mine, shaped(x_y, scale, softcap), LOWEST))
        if smoothing is not None and PHASE != 2:
            q = smoothing_mass(class_weight_ptr, base + pos - row_lead, only_if(readable, inside))
            edge_q = smoothing_mass(class_weight_ptr, edge_pos - row_lead, only_if(readable, is_edge))
            shortfall = shortfall_of(q, z, top) + shortfall_of(edge_q, edge_z, top)
            tl.atomic_xchg(smooth_words_ptr + n * K + k, packed(shortfall, tl.sum(q, 0) + tl.sum(edge_q, 0)), sem="relaxed")
        e = exp_flushed(z - top)
        edge_e = exp_flushed(edge_z - top)
        if PHASE != 2:
            tl.atomic_xchg(words_ptr + n * K + k, packed(top, excess_of(top, e, edge_e)), sem="relaxed")

        x_next, edge_x_next, x_y_next = read_slice(
            logits_ptr, row + G, y_next, stride_logits_n, lead, V, scale, softcap, base, SLICE, GROUP
        )
        y_after = row_class(target_ptr, row + 2 * G, N, V, ignore_index)

        if PHASE != 1:
            dloss = tl.load(dloss_ptr + n * stride_dloss).to(tl.float32)
            w_y = target_weight(class_weight_ptr, y, readable) if class_weight_ptr is not None else None
            tops, excesses = collected(words_ptr + n * K, ks, K, PHASE)
            tops = tl.where(ks < K, tops, LOWEST)
            row_max, excess = lse_merge(tops, tl.where(ks < K, excesses, -1.0))
            row_shortfall = 0.0
            if smoothing is not None:
                shortfalls, masses = collected(smooth_words_ptr + n * K, ks, K, PHASE)
                moved = tl.where((ks < K) & (masses != 0.0), masses * (row_max - tops), 0.0)
                row_shortfall = tl.sum(tl.where(ks < K, shortfalls, 0.0) + moved, 0)

            to_row_max = exp_flushed(top - row_max)
            row_max, log_sum, per_sum, dloss = settled(y, row_max, excess, dloss)
            z_y = shaped(x_y, scale, softcap)
            loss = id_loss(z_y, w_y, row_max, log_sum, w_sum, row_shortfall, V, smoothing, lse_square_scale)
            # the program of the target's slice knows its logit; a row without a target is left to the first
            tl.store(loss_ptr + n, unless_unread(y, loss), mask=mine | ((k == 0) & (y < 0)))

            if softcap is not None:
                # as in whole_row_kernel
                row_ptr = aligned_row(logits_ptr, row, stride_logits_n, row_lead)
                x = tl.load(row_ptr + base + pos, mask=only_if(readable, inside), other=padding(scale, softcap), volatile=True)
            # dlogits may be logits: every program of this row has its slice by now, what this one reads again only it writes, and every
            # warp of it has read before one stores
            tl.debug_barrier()
            drow_ptr = aligned_row(dlogits_ptr, row, stride_dlogits_n, row_lead)
            kept, flat, off = id_slopes(w_y, w_sum, row_max, log_sum, V, smoothing, lse_square_scale)
            factor, off_dloss = (kept + flat) * (to_row_max * per_sum) * dloss, off * dloss
            w = weights_again(class_weight_ptr, base + pos - row_lead, inside) if weighted else None
            dx = other_slope(e, w, factor, off_dloss, smoothing) * shaped_slope(x.to(tl.float32), scale, softcap)
            tl.store(drow_ptr + base + pos, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)
            w = weights_again(class_weight_ptr, edge_pos - row_lead, is_edge) if weighted else None
            dx = other_slope(edge_e, w, factor, off_dloss, smoothing) * shaped_slope(edge_x.to(tl.float32), scale, softcap)
            tl.store(drow_ptr + edge_pos, dx.to(dlogits_ptr.dtype.element_ty), mask=is_edge)
            # the target's entry once more, after whichever thread has stored it: cheaper than a comparison for every class
            tl.debug_barrier()
            dx_y = target_slope((z_y - row_max) - log_sum, w_y, kept, flat, off, smoothing) * dloss * shaped_slope(x_y, scale, softcap)
            tl.store(drow_ptr + tl.where(mine, y_pos, 0), dx_y.to(dlogits_ptr.dtype.element_ty), mask=mine)
        x, edge_x, x_y = x_next, edge_x_next, x_y_next
        y, y_next = y_next, y_after


@triton.jit
def scale_rows_kernel(
    t_ptr,  # (n,) any float dtype, changed
    factor_ptr,  # () any float dtype
    n,
    BLOCK: tl.constexpr,
):
    """t *= factor by a few programs that share it out, and have nothing to do for a factor of 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            offs = start + tl.arange(0, BLOCK)
            t = tl.load(t_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
            tl.store(t_ptr + offs, (t * factor).to(t_ptr.dtype.element_ty), mask=offs < n)


class _Options(TypedDict):
    scale: float | None
    softcap: float | None
    smoothing: float | None
    lse_square_scale: float | None


# what was decided for calls of a kind: a device, a dtype, a number of classes, an alignment, which options are given, strides
_plans: dict[tuple[object, ...], FusedPlan] = {}


def row_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    *,
    dlogits: Tensor,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
) -> Tensor:
    """(N, V) logits and (N,) ids -> (N,) fp32 loss; fills ``dlogits`` (N, V). Unit last strides.

    ``dlogits`` may be ``logits``, or of a narrower dtype over the first bytes of each row of them.
    """
    n, v = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return loss
    options: _Options = {"scale": scale, "softcap": softcap, "smoothing": smoothing, "lse_square_scale": lse_square_scale}
    wide, lead, most_lead = _alignment(logits, dlogits)
    if softcap is not None and softmax_rows.narrower_over(logits, dlogits):
        # the slices are read again for the cap's slope, after others have written over them
        most_lead = None
    given = (class_weight is None, scale is None, softcap is None, smoothing is None, lse_square_scale is None)
    # triton compiles again for other strides, and how many programs run at once is known of what was compiled
    strides = (dloss.stride(0), logits.stride(0) % 16 == 0, dlogits.stride(0) % 16 == 0)
    key = (logits.device, logits.dtype, dlogits.dtype, v, wide, most_lead, given, strides)
    plan = _plans.get(key)
    if plan is None:
        shaping = softcap is not None or smoothing is not None
        plan = fused_plan(family(logits.device), v, logits.element_size(), wide=wide, most_lead=most_lead, shaping=shaping)
    if plan.kind != "sweeps":
        class_weight_sum = None if class_weight is None or smoothing is None else class_weight.sum()
        operands = (logits, target, class_weight, class_weight_sum, dloss, loss, dlogits)
        with on_device_of(logits):
            if plan.kind == "split":
                plan = _split_rows(plan, operands, lead, ignore_index, options)
            else:
                whole_row_kernel[(n,)](
                    *operands, logits.stride(0), dlogits.stride(0), dloss.stride(0), v, ignore_index,
                    **options, BLOCK_V=plan.block_v, num_warps=plan.num_warps, **UNFUSED,
                )  # fmt: skip
    _plans[key] = plan
    if plan.kind == "sweeps":
        loss, stats = softmax_rows.row_loss(logits, target, class_weight, ignore_index=ignore_index, **options)
        softmax_rows.row_grads(
            logits, target, class_weight, stats, dloss, dlogits=dlogits, dtarget=None, ignore_index=ignore_index, **options
        )
    return loss


def _alignment(logits: Tensor, dlogits: Tensor) -> tuple[bool, int, int | None]:
    """(whether every row starts on 16 elements, the first row's lead, the largest; None where the gradient's leads are others)."""
    n, v = logits.shape
    size = logits.element_size()
    group = 16 // size
    strides = (logits.stride(0), dlogits.stride(0)) if n > 1 else (0, 0)
    leads = (logits.data_ptr() % 16 // size, dlogits.data_ptr() % 16 // dlogits.element_size())
    wide = leads == (0, 0) and v % 16 == 0 and strides[0] % 16 == 0 and strides[1] % 16 == 0
    if dlogits.element_size() != size:
        # boundaries of 16 bytes are not the same classes, but where rows start on them
        aligned = leads == (0, 0) and strides[0] % group == 0 and strides[1] * dlogits.element_size() % 16 == 0
        return wide, leads[0], 0 if aligned else None
    if leads[0] != leads[1] or (strides[0] - strides[1]) % group:
        return wide, leads[0], None
    return wide, leads[0], group - 1 if strides[0] % group else leads[0]


def words_block(k: int) -> int:
    """One lane of a warp for each of ``k`` words at least.

    With fewer words two lanes load the same one and may see it differently, and a warp whose lanes leave the loop that waits for it at
    different times waits for itself: the condition is reduced over as many lanes as there are words (triton 3.6, 3.7).
    """
    return max(32, triton.next_power_of_2(k))


def programs_run_together(device: torch.device) -> bool:
    """The interpreter runs one after the other."""
    return device.type != "cpu"


def _split_rows(
    plan: FusedPlan,
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor],
    lead: int,
    ignore_index: int,
    options: _Options,
) -> FusedPlan:
    """Launch, and return what is known then; ``SWEEPS`` where nothing was launched, because a row's programs cannot run at once."""
    logits, dloss, dlogits = operands[0], operands[4], operands[6]
    n, v = logits.shape
    k = plan.slices
    words = torch.zeros(n, k, dtype=torch.int64, device=logits.device)
    smooth_words = None if options["smoothing"] is None else torch.zeros_like(words)

    def launch(rows: int, groups: int, programs: int, phase: int) -> Any:
        return split_row_kernel[(programs,)](
            *operands, words, smooth_words, logits.stride(0), dlogits.stride(0), dloss.stride(0), lead, rows, v, k, groups, ignore_index,
            **options, SLICE=plan.block_v, K_BLOCK=words_block(k), GROUP=16 // logits.element_size(), PHASE=phase,
            num_warps=plan.num_warps, launch_cooperative_grid=phase == 0, **UNFUSED,
        )  # fmt: skip

    if not programs_run_together(logits.device):
        # two rows at a time, so that a program has several
        groups = min(n, 2)
        launch(n, groups, groups * k, 1)
        launch(n, groups, groups * k, 2)
        return plan
    try:
        # over no rows, to have it compiled and loaded
        resident = resident_programs(launch(0, 1, 1, 0), logits.device) if plan.resident is None else plan.resident
        while resident >= k:
            groups = min(n, resident // k)
            try:
                launch(n, groups, groups * k, 0)
                return replace(plan, resident=resident)
            except RuntimeError as error:
                # the driver knows of what shares the device with us
                if "cooperative" not in str(error):
                    raise
                resident -= multiprocessors(logits.device)
    except RuntimeError as error:
        if "not supported" not in str(error):
            raise
    return SWEEPS


MULTIPLY_BLOCK = LaunchConfig(4096, 8)


def multiply_in_place(t: Tensor, factor: Tensor) -> None:
    """``t *= factor``, a number on the device: multiplied in fp32, rounded once. A factor of 1 costs a launch."""
    n = t.numel()
    if n == 0:
        return
    if not t.is_contiguous():
        # rows with gaps: torch multiplies so too, but by 1 as well
        t.mul_(factor.reshape(()))
        return
    programs = min(-(-n // MULTIPLY_BLOCK.block_v), 8 * multiprocessors(t.device))
    with on_device_of(t):
        scale_rows_kernel[(programs,)](t, factor, n, BLOCK=MULTIPLY_BLOCK.block_v, num_warps=MULTIPLY_BLOCK.num_warps)
