"""Loss and gradient of rows against class ids, from one read of the logits and one write.

A program holds its part of a row in registers between the two; the gradient may be written over the
logits. Where a row fits one program, ``whole_row_kernel`` takes it. Longer rows are split into K
slices, one program each: ``split_row_kernel``, whose programs exchange the statistics of their
slices. Where that is not possible, the two sweeps of ``softmax_rows`` read the logits twice.

N rows, V classes, K slices. The logits of a row that is not valid are not read.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import softmax_rows
from .devices import device_of, multiprocessors, warp_size
from .launch import (
    SWEEPS,
    UNFUSED,
    FusedPlan,
    LossOptions,
    fused_plan,
    on_device_of,
    resident_programs,
)
from .row_access import (
    IGNORED,
    aligned_row_ptr,
    alignment,
    class_of,
    class_weights,
    edge_elements,
    in_whole_groups,
    lead_of,
    load_slice,
    mask_row,
    narrower_over,
    padding,
    shaped_tile,
    target_logit,
    target_weight,
    weight_sum,
)
from .row_totals import divisor_of_many, prepare_rows, total_of
from .tile_math import (
    LOWEST,
    exp_flushed,
    id_grad_at_target,
    id_grad_coefs,
    id_grad_elsewhere,
    id_loss,
    log1p_from_minus_one,
    lse_merge,
    only_if,
    shaped,
    shaped_grad,
    shortfall_of,
)

# not specialized: they differ from batch to batch
CHANGING = ["N", "K", "rows_in_flight", "lead", "ignore_index"]


@triton.jit
def reload_class_weights(class_weight_ptr, offs_v, mask_v):
    """A tile of class weights, loaded once more for the gradient."""
    # volatile, so that the compiler does not hold the first load in a register for every class
    return tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0, volatile=True)


@triton.jit
def sum_of(t, edge_t):
    """The sum of a tile, and of a second one that may be None."""
    return tl.sum(t, 0) if edge_t is None else tl.sum(t, 0) + tl.sum(edge_t, 0)


@triton.jit
def excess_of(top, e, edge_e):
    """The excess of e = exp(z - top) with full relative accuracy around 0.

    It is -1 if no logit is finite, and NaN if a logit is NaN or +inf, as in torch.
    """
    total = sum_of(e, edge_e)
    excess = total - 1.0
    if (total >= 1.0) & (total < 1.5):
        # one class alone is at the top: sum the others without its 1, which would round them
        edge_rest = None if edge_e is None else tl.where(edge_e == 1.0, 0.0, edge_e)
        excess = sum_of(tl.where(e == 1.0, 0.0, e), edge_rest)
    return tl.where(top == float("inf"), float("nan"), excess)


@triton.jit
def row_factors(y, row_max, excess, dloss):
    """(row_max, log_sum, 1 / sum of exponentials, dloss) of a row, from which its gradient follows.

    No logit of a row that is not valid was read, so its exponentials are 0. Its factors are finite,
    so that the gradient is 0 times dloss, which is 0 or NaN.
    """
    valid = y >= 0
    log_sum = log1p_from_minus_one(excess)
    dloss = mask_row(dloss, valid, y == IGNORED)
    row_max = tl.where(valid, row_max, 0.0)
    log_sum = tl.where(valid, log_sum, 0.0)
    inv_sum = tl.where(valid, 1.0 / (1.0 + excess), 0.0)
    return row_max, log_sum, inv_sum, dloss


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
    dlogits_row_ptr = dlogits_ptr + row * stride_dlogits_n
    y = class_of(tl.load(target_ptr + row), V, ignore_index)
    valid = y >= 0
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    x_ptrs, mask_x = row_ptr + offs_v, only_if(valid, mask_v)
    x = tl.load(x_ptrs, mask=mask_x, other=padding(scale, softcap))
    x_y = target_logit(row_ptr, y, valid)
    w_y = target_weight(class_weight_ptr, y, valid) if class_weight_ptr is not None else None
    w_sum = weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing)

    z = shaped_tile(x, mask_x, scale, softcap)
    top = tl.maximum(tl.max(z, 0), LOWEST)
    shortfall = 0.0
    if smoothing is not None:
        shortfall = shortfall_of(class_weights(class_weight_ptr, offs_v, mask_x), z, top)
    e = exp_flushed(z - top)

    dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    row_max, log_sum, inv_sum, dloss = row_factors(y, top, excess_of(top, e, None), dloss)
    z_y = shaped(x_y, scale, softcap)
    loss = id_loss(z_y, w_y, row_max, log_sum, w_sum, shortfall, V, smoothing, lse_square_scale)
    tl.store(loss_ptr + row, mask_row(loss, valid, y == IGNORED))

    if softcap is not None:
        # loaded once more for the derivative of the softcap: x and the terms of tanh would take
        # several registers for every logit
        x = tl.load(x_ptrs, mask=mask_x, other=padding(scale, softcap), volatile=True)
    # dlogits may be logits: no warp stores before every warp has loaded
    tl.debug_barrier()
    target_coef, softmax_coef, smoothing_coef = id_grad_coefs(
        w_y, w_sum, row_max, log_sum, V, smoothing, lse_square_scale
    )  # fmt: skip
    e_coef = (target_coef + softmax_coef) * inv_sum * dloss
    w = None
    if smoothing is not None and class_weight_ptr is not None:
        w = reload_class_weights(class_weight_ptr, offs_v, mask_v)
    dz = id_grad_elsewhere(e, w, e_coef, smoothing_coef * dloss, smoothing)
    dx = dz * shaped_grad(x.to(tl.float32), scale, softcap)
    tl.store(dlogits_row_ptr + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_v)
    # then the target's entry, over the one that some thread has stored: cheaper than a comparison
    # for every class
    tl.debug_barrier()
    logp_y = (z_y - row_max) - log_sum
    dz_y = id_grad_at_target(logp_y, w_y, target_coef, softmax_coef, smoothing_coef, smoothing)
    dx_y = dz_y * dloss * shaped_grad(x_y, scale, softcap)
    tl.store(
        dlogits_row_ptr + tl.where(valid, y, 0),
        dx_y.to(dlogits_ptr.dtype.element_ty),
        mask=valid,
    )


# The protocol of the programs that share a row
#
# A row has K slices of SLICE classes. A grid of K * rows_in_flight programs computes rows_in_flight
# rows at a time: program i takes slice i % K of row i // K, then of every rows_in_flight-th row
# after it. For each row a program
#
#   1. computes (top, excess) of its slice, whose logits it holds in registers, and publishes the
#      two as one 64-bit word, words[row, k]; with smoothing also (shortfall, mass);
#   2. starts the loads of its slice of the next row, and of the target of the row after that;
#   3. waits until all K words of the row are published, and merges them, every program in the same
#      order, so that all compute the same bits;
#   4. stores the gradient of its slice. The program of the target's slice also stores the loss;
#      program 0 of the row does if the row is not valid.
#
# Publishing. A word is published when it is not 0: the launcher passes zeros, and ``pack_word``
# never returns 0. A word is written once, by one atomic, and read by one load. Its reader needs no
# other memory of the writer, so relaxed order is enough.
#
# Waiting. A program publishes the word of a row before it waits for that row, and the programs of a
# row take the same rows in the same order: they cannot wait for one another in a circle. But they
# spin without leaving their SM. All programs of a row must be resident, or those that are wait
# forever for the one that never starts. So the grid is cooperative: the launch starts all programs
# or fails, and the launcher starts no more than can be resident.
#
# Memory that two programs touch, apart from the words:
#
# - Rows that do not start on 16 bytes share groups of 16 bytes. Groups that belong to one row are
#   loaded and stored whole, and a group lies in one slice. The elements of a shared group, at the
#   start and the end of a row, are loaded and stored one by one (``edge_elements``).
# - A gradient of the same dtype over the logits: the gradient of a slice lies over its own logits,
#   which no other program loads. A barrier keeps its warps from storing before all have loaded.
# - A narrower gradient over the logits, bf16 over fp32: the gradient of class c lies over the logit
#   of class c // 2, in a slice that another program loads. A program stores after it has seen all
#   words of the row, and a word cannot be computed before the loads of its slice have returned:
#   ``top`` depends on every logit of the slice, the separately loaded logit of the target included.
#   This data dependency is the only order between the loads of one program and the stores of
#   another.
#
# What breaks, and how it shows:
#
# - A word that no longer depends on every load of its slice, or a load of logits after the word:
#   with a narrower gradient some rows are wrong on some runs, without an error. A softcap loads
#   logits again, so with a narrower gradient the launcher takes the two sweeps.
# - Words that do not start as zeros: other programs read stale statistics, without an error.
# - A program of a row that is not resident, or a K_BLOCK narrower than a warp (``words_block``):
#   the kernel never ends.
#
# PHASE is 0 for all of this. Triton's interpreter runs one program after the other, so that a
# program that waits would never return. There, a launch with PHASE 1 does step 1 for all rows and a
# launch with PHASE 2 the rest, without waiting. Then a narrower gradient relies on the order of the
# programs: a slice is overwritten only by its own program and by those that run after it.


@triton.jit
def pack_word(high, low):
    """Two fp32 as an int64 that is not 0: the last bit of the second is set."""
    high = high.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return high | ((low.to(tl.int32, bitcast=True) | 1).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def unpack_word(word):
    """The two fp32. The last bit of the second is cleared, so that 0 and -1 are exact."""
    low = (word & 0xFFFFFFFE).to(tl.int32)
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True), low.to(tl.float32, bitcast=True)


@triton.jit
def wait_for_words(word_ptr, ks, K, PHASE: tl.constexpr):
    """The K words of a row, unpacked, once all of them are published."""
    # volatile: every load goes to memory, because other programs write the words
    words = tl.load(word_ptr + ks, mask=ks < K, other=1, volatile=True)
    if PHASE == 0:
        while tl.min((words != 0).to(tl.int32), 0) == 0:
            words = tl.load(word_ptr + ks, mask=ks < K, other=1, volatile=True)
    return unpack_word(words)


@triton.jit
def load_target(target_ptr, row, N):
    """The target of a row; not a class beyond the last row."""
    return tl.load(target_ptr + row, mask=row < N, other=-1)


@triton.jit
def load_dloss(dloss_ptr, row, stride_dloss, N):
    """The upstream gradient of a row, in its own dtype."""
    return tl.load(dloss_ptr + tl.cast(row, tl.int64) * stride_dloss, mask=row < N, other=0.0)


@triton.jit(do_not_specialize=CHANGING)
def split_row_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    class_weight_sum_ptr,  # () fp32, or None
    dloss_ptr,  # (N,) fp32; stride 0 when it is one number
    loss_ptr,  # (N,) fp32, output
    dlogits_ptr,  # (N, V), output; may be logits; its rows have the leads of those of logits
    words_ptr,  # (N, K) int64, zeros: (top, excess) of each slice
    smooth_words_ptr,  # (N, K) int64, zeros, or None without smoothing: (shortfall, mass)
    stride_logits_n,
    stride_dlogits_n,
    stride_dloss,
    lead,  # elements from the 16-byte boundary before logits to logits; less than GROUP
    N,
    V,  # at least 2 * GROUP
    K,  # slices of a row: K * SLICE is at least V + the largest lead of a row
    rows_in_flight,
    ignore_index,
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    SLICE: tl.constexpr,
    K_BLOCK: tl.constexpr,  # at least K
    GROUP: tl.constexpr,  # elements in 16 bytes of logits
    PHASE: tl.constexpr,  # 0, or 1 and then 2 where programs do not run at the same time
):
    """One slice of every rows_in_flight-th row per program; the protocol is described above."""
    k = tl.program_id(0) % K
    first_row = tl.program_id(0) // K
    base = k * SLICE
    pos = tl.arange(0, SLICE)
    ks = tl.arange(0, K_BLOCK)
    weighted: tl.constexpr = smoothing is not None and class_weight_ptr is not None
    w_sum = weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing)

    y = class_of(load_target(target_ptr, first_row, N), V, ignore_index)
    target_next = load_target(target_ptr, first_row + rows_in_flight, N)
    dloss_next = load_dloss(dloss_ptr, first_row, stride_dloss, N)
    x, edge_x, x_y = load_slice(
        logits_ptr, first_row, y >= 0, y, stride_logits_n, lead, V, scale, softcap,
        base, SLICE, GROUP,
    )  # fmt: skip
    for row in range(first_row, N, rows_in_flight):
        row_64 = tl.cast(row, tl.int64)
        # loaded a row ago, converted here: a conversion next to the load would wait for it, and
        # with it for the loads of the next row's slice, which are issued together
        y_next = class_of(target_next, V, ignore_index)
        dloss = dloss_next.to(tl.float32)
        valid = y >= 0
        row_lead = lead_of(row, stride_dlogits_n, lead, GROUP)
        in_groups = in_whole_groups(pos, base, row_lead, V, GROUP)
        edge_pos, is_edge = edge_elements(base, row_lead, V, SLICE, GROUP)
        y_pos = tl.where(valid, y + row_lead, -1)
        # the target is in this program's slice
        mine = (y_pos >= base) & (y_pos < base + SLICE)

        z = shaped_tile(x, only_if(valid, in_groups), scale, softcap)
        edge_z = shaped_tile(edge_x, only_if(valid, is_edge), scale, softcap)
        top = tl.maximum(tl.maximum(tl.max(z, 0), tl.max(edge_z, 0)), LOWEST)
        if logits_ptr.dtype.element_ty != dlogits_ptr.dtype.element_ty:
            # a narrower gradient: x_y has its own load, on which the published word must depend.
            # It is one of the logits of the slice, so top does not change
            top = tl.maximum(top, tl.where(mine, shaped(x_y, scale, softcap), LOWEST))
        if smoothing is not None and PHASE != 2:
            q = class_weights(class_weight_ptr, base + pos - row_lead, only_if(valid, in_groups))
            edge_q = class_weights(class_weight_ptr, edge_pos - row_lead, only_if(valid, is_edge))
            shortfall = shortfall_of(q, z, top) + shortfall_of(edge_q, edge_z, top)
            tl.atomic_xchg(
                smooth_words_ptr + row_64 * K + k,
                pack_word(shortfall, tl.sum(q, 0) + tl.sum(edge_q, 0)),
                sem="relaxed",
            )
        e = exp_flushed(z - top)
        edge_e = exp_flushed(edge_z - top)
        if PHASE != 2:
            tl.atomic_xchg(
                words_ptr + row_64 * K + k,
                pack_word(top, excess_of(top, e, edge_e)),
                sem="relaxed",
            )

        next_row = row + rows_in_flight
        x_next, edge_x_next, x_y_next = load_slice(
            logits_ptr, next_row, y_next >= 0, y_next, stride_logits_n, lead, V, scale, softcap,
            base, SLICE, GROUP,
        )  # fmt: skip
        target_next = load_target(target_ptr, next_row + rows_in_flight, N)
        dloss_next = load_dloss(dloss_ptr, next_row, stride_dloss, N)

        if PHASE != 1:
            w_y = None
            if class_weight_ptr is not None:
                w_y = target_weight(class_weight_ptr, y, valid)
            tops, excesses = wait_for_words(words_ptr + row_64 * K, ks, K, PHASE)
            tops = tl.where(ks < K, tops, LOWEST)
            row_max, excess = lse_merge(tops, tl.where(ks < K, excesses, -1.0))
            row_shortfall = 0.0
            if smoothing is not None:
                shortfalls, masses = wait_for_words(smooth_words_ptr + row_64 * K, ks, K, PHASE)
                has_mass = (ks < K) & (masses != 0.0)
                # from the top of the slice to that of the row, as in shortfall_finish
                shift = tl.where(has_mass, masses * (row_max - tops), 0.0)
                row_shortfall = tl.sum(tl.where(ks < K, shortfalls, 0.0) + shift, 0)

            to_row_max = exp_flushed(top - row_max)
            row_max, log_sum, inv_sum, dloss = row_factors(y, row_max, excess, dloss)
            z_y = shaped(x_y, scale, softcap)
            loss = id_loss(
                z_y, w_y, row_max, log_sum, w_sum, row_shortfall, V, smoothing, lse_square_scale
            )  # fmt: skip
            # only the program of the target's slice has its logit
            tl.store(
                loss_ptr + row_64,
                mask_row(loss, valid, y == IGNORED),
                mask=mine | ((k == 0) & (y < 0)),
            )

            if softcap is not None:
                # loaded once more, as in whole_row_kernel
                row_ptr = aligned_row_ptr(logits_ptr, row, stride_logits_n, row_lead)
                x = tl.load(
                    row_ptr + base + pos,
                    mask=only_if(valid, in_groups),
                    other=padding(scale, softcap),
                    volatile=True,
                )
            # dlogits may be logits: no warp stores before every warp has loaded
            tl.debug_barrier()
            dlogits_row_ptr = aligned_row_ptr(dlogits_ptr, row, stride_dlogits_n, row_lead)
            target_coef, softmax_coef, smoothing_coef = id_grad_coefs(
                w_y, w_sum, row_max, log_sum, V, smoothing, lse_square_scale
            )  # fmt: skip
            e_coef = (target_coef + softmax_coef) * (to_row_max * inv_sum) * dloss
            w_coef = smoothing_coef * dloss
            w = None
            if weighted:
                w = reload_class_weights(class_weight_ptr, base + pos - row_lead, in_groups)
            dz = id_grad_elsewhere(e, w, e_coef, w_coef, smoothing)
            dx = dz * shaped_grad(x.to(tl.float32), scale, softcap)
            tl.store(
                dlogits_row_ptr + base + pos,
                dx.to(dlogits_ptr.dtype.element_ty),
                mask=in_groups,
            )
            edge_w = None
            if weighted:
                edge_w = reload_class_weights(class_weight_ptr, edge_pos - row_lead, is_edge)
            edge_dz = id_grad_elsewhere(edge_e, edge_w, e_coef, w_coef, smoothing)
            edge_dx = edge_dz * shaped_grad(edge_x.to(tl.float32), scale, softcap)
            tl.store(
                dlogits_row_ptr + edge_pos,
                edge_dx.to(dlogits_ptr.dtype.element_ty),
                mask=is_edge,
            )
            # then the target's entry, as in whole_row_kernel
            tl.debug_barrier()
            dz_y = id_grad_at_target(
                (z_y - row_max) - log_sum, w_y, target_coef, softmax_coef, smoothing_coef, smoothing
            )  # fmt: skip
            dx_y = dz_y * dloss * shaped_grad(x_y, scale, softcap)
            tl.store(
                dlogits_row_ptr + tl.where(mine, y_pos, 0),
                dx_y.to(dlogits_ptr.dtype.element_ty),
                mask=mine,
            )
        x, edge_x, x_y = x_next, edge_x_next, x_y_next
        y = y_next


# plans by all that Triton specializes a kernel by, and all that ``fused_plan`` depends on
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
    """(N,) fp32 loss of (N, V) logits; fills ``dlogits`` (N, V), both of unit last stride.

    ``dlogits`` may be ``logits``, or a narrower tensor over the first bytes of each of its rows.
    """
    options: LossOptions = {
        "scale": scale,
        "softcap": softcap,
        "smoothing": smoothing,
        "lse_square_scale": lse_square_scale,
    }
    return _launch(
        logits, target, class_weight, dloss, dlogits, ignore_index, options, prepare=_store_zeros
    )


def _store_zeros(*words: Tensor | None) -> None:
    for t in words:
        if t is not None:
            t.zero_()


def row_total_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    *,
    mean: bool,
    dlogits: Tensor,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(total, dloss) of (N, V) logits, both () fp32; fills ``dlogits`` as above.

    The total is the sum of the losses; with ``mean`` it is divided by ``divisor``, () fp32, or
    without one by the number of valid rows. ``dloss`` is the gradient of the total with respect to
    the loss of a row.
    """
    options: LossOptions = {
        "scale": scale,
        "softcap": softcap,
        "smoothing": smoothing,
        "lse_square_scale": lse_square_scale,
    }
    divisor = divisor_of_many(target, divisor, mean=mean, ignore_index=ignore_index)
    dloss = torch.empty((), dtype=torch.float32, device=logits.device)
    loss = _launch(
        logits,
        target,
        class_weight,
        dloss.expand(len(logits)),
        dlogits,
        ignore_index,
        options,
        prepare=functools.partial(
            prepare_rows, target, divisor, dloss, mean=mean, ignore_index=ignore_index
        ),
    )
    return total_of(loss, target, divisor, mean=mean, ignore_index=ignore_index), dloss


def _launch(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    options: LossOptions,
    *,
    prepare: Callable[[Tensor | None, Tensor | None], None],
) -> Tensor:
    """Return the losses and fill ``dlogits``.

    ``prepare`` stores zeros in the words of ``split_row_kernel``, and may fill ``dloss``.
    """
    n, v = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n == 0:
        prepare(None, None)
        return loss
    shaping = options["softcap"] is not None or options["smoothing"] is not None
    wide, lead, most_lead = alignment(logits, dlogits)
    if options["softcap"] is not None and narrower_over(logits, dlogits):
        # split_row_kernel would load logits again that other programs have overwritten
        most_lead = None
    absent = (class_weight is None, *(option is None for option in options.values()))
    # Triton specializes by these properties of strides, and occupancy is known per specialization
    strides = (dloss.stride(0), logits.stride(0) % 16 == 0, dlogits.stride(0) % 16 == 0)
    key = (logits.device, logits.dtype, dlogits.dtype, v, wide, most_lead, absent, strides)
    plan = _plans.get(key)
    if plan is None:
        plan = fused_plan(
            device_of(logits.device),
            v,
            logits.element_size(),
            wide=wide,
            most_lead=most_lead,
            shaping=shaping,
        )
    words = smooth_words = None
    if plan.kind == "split":
        words = torch.empty(n, plan.slices, dtype=torch.int64, device=logits.device)
        smooth_words = None if options["smoothing"] is None else torch.empty_like(words)
    prepare(words, smooth_words)
    if plan.kind != "sweeps":
        summed = None if options["smoothing"] is None else class_weight
        class_weight_sum = None if summed is None else summed.sum()
        operands = (logits, target, class_weight, class_weight_sum, dloss, loss, dlogits)
        with on_device_of(logits):
            if words is not None:
                launched = _split_rows(
                    plan, operands, words, smooth_words, lead, ignore_index, options
                )
                _plans[key] = launched or plan
                plan = launched or SWEEPS
            else:
                whole_row_kernel[(n,)](
                    *operands, logits.stride(0), dlogits.stride(0), dloss.stride(0), v,
                    ignore_index, **options, BLOCK_V=plan.block_v, num_warps=plan.num_warps,
                    **UNFUSED,
                )  # fmt: skip
    _plans.setdefault(key, plan)
    if plan.kind == "sweeps":
        rows = (logits, target, class_weight)
        loss, stats = softmax_rows.row_loss(*rows, ignore_index=ignore_index, **options)
        softmax_rows.row_grads(
            *rows, stats, dloss, dlogits=dlogits, ignore_index=ignore_index, **options
        )  # fmt: skip
    return loss


def words_block(k: int, lanes: int) -> int:
    """K_BLOCK for ``k`` slices and warps of ``lanes``: a lane for each word, and full warps.

    With fewer words than lanes, two lanes load the same word and may see different values. Lanes
    of a warp could then leave the loop of ``wait_for_words`` at different times, and the warp would
    wait for itself: Triton reduces the condition over as many lanes as there are words (3.6, 3.7).
    """
    return max(lanes, triton.next_power_of_2(k))


def programs_run_together(device: torch.device) -> bool:
    """False for the interpreter, which runs one program after the other."""
    return device.type != "cpu"


def _split_rows(
    plan: FusedPlan,
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor],
    words: Tensor,
    smooth_words: Tensor | None,
    lead: int,
    ignore_index: int,
    options: LossOptions,
) -> FusedPlan | None:
    """Launch ``split_row_kernel`` and return the plan with its occupancy.

    If the device cannot hold all programs of a row, launch nothing and return ``SWEEPS``; None if
    it could, but does not now, because others use it too.
    """
    logits, _, _, _, dloss, _, dlogits = operands
    n, v = logits.shape
    k = plan.slices

    def launch(rows: int, rows_in_flight: int, programs: int, phase: int) -> Any:
        return split_row_kernel[(programs,)](
            *operands, words, smooth_words,
            logits.stride(0), dlogits.stride(0), dloss.stride(0), lead, rows, v, k, rows_in_flight,
            ignore_index, **options, SLICE=plan.block_v,
            K_BLOCK=words_block(k, warp_size(logits.device)), GROUP=16 // logits.element_size(),
            PHASE=phase, num_warps=plan.num_warps, maxnreg=plan.most_registers,
            launch_cooperative_grid=phase == 0, **UNFUSED,
        )  # fmt: skip

    if not programs_run_together(logits.device):
        # two rows in flight, so that each program takes several rows
        rows_in_flight = min(n, 2)
        launch(n, rows_in_flight, rows_in_flight * k, 1)
        launch(n, rows_in_flight, rows_in_flight * k, 2)
        return plan
    try:
        resident = plan.resident
        if resident is None:
            # a launch of one program over no rows compiles and loads the kernel
            resident = resident_programs(launch(0, 1, 1, 0), logits.device)
        if resident < k:
            return SWEEPS
        while resident >= k:
            rows_in_flight = min(n, resident // k)
            try:
                launch(n, rows_in_flight, rows_in_flight * k, 0)
                return replace(plan, resident=resident)
            except RuntimeError as error:
                # too large for what others have left of the device
                if "cooperative" not in str(error):
                    raise
                resident -= multiprocessors(logits.device)
    except RuntimeError as error:
        if "not supported" not in str(error):
            raise
        return SWEEPS
    return None
