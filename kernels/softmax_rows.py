"""Rows of logits -> loss and statistics; logits and statistics -> gradients. One row is never stored as probabilities.

Two pairs of kernels, because a class id and a row of class probabilities are different loops: the first reads one number beside
the logits, the second a whole row. ``stats`` is what the gradient needs again: the row maximum and the log-sum kept apart, and for
probabilities the mass of the target. Loss and statistics take one program per row, gradients one per row and block.

Where asked, the same pass gives what a row says beside its loss: lse, log-probability of the target, entropy, argmax.

The rows may be cut: a shard has V classes, from first_class on, of num_classes. Its first pass leaves what is merged with the other
shards' in place of a loss, and its gradient takes merged statistics.

N rows, V classes. A target outside [0, V), of a shard outside [0, num_classes), that is not ignore_index makes its row NaN; nothing outside
a row is read for it.
"""

from typing import TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of, row_blocks
from .tile_math import (
    NO_CLASS,
    entropy_slope,
    first_finish,
    first_update,
    id_loss,
    id_slopes,
    lse_finish,
    lse_of,
    lse_square,
    lse_start,
    lse_update,
    only_if,
    other_slope,
    shaped,
    shaped_slope,
    shortfall_finish,
    shortfall_update,
    soft_target_slope,
    softmax_slope,
    spread_finish,
    spread_update,
    target_slope,
)

# compiled once for all values: rows differ from batch to batch, shards from rank to rank
CHANGING = ["N", "ignore_index", "first_class", "num_classes"]

# a product fused into the subtraction of a rounded maximum leaves the rounding error of the product: a loss of -1e-6 where it is 0
UNFUSED = {"enable_fp_fusion": False}


class _Options(TypedDict):
    scale: float | None
    softcap: float | None
    smoothing: float | None
    lse_square_scale: float | None


@triton.jit
def logits_tile(row_ptr, offs_v, mask_v, scale, softcap):
    """(BLOCK_V,) fp32 logits as the loss sees them, -inf outside mask_v."""
    x = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    # after the scale and the cap, which would turn a padded -inf into another number
    return tl.where(mask_v, shaped(x, scale, softcap), -float("inf"))


@triton.jit
def target_logit(row_ptr, y, readable):
    """The fp32 logit of class y as it was given; 0 where it may not be read."""
    return tl.load(row_ptr + tl.where(readable, y, 0), mask=readable, other=0.0).to(tl.float32)


@triton.jit
def target_weight(class_weight_ptr, y, readable):
    """The weight of class y."""
    # triton 3.6 cannot return None, so callers without class weights do not ask
    return tl.load(class_weight_ptr + tl.where(readable, y, 0), mask=readable, other=0.0)


@triton.jit
def weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing):
    """The sum of the class weights, which is V without; read where smoothing needs it."""
    if smoothing is None:
        return 0.0
    elif class_weight_ptr is None:
        return V * 1.0
    else:
        return tl.load(class_weight_sum_ptr)


@triton.jit
def mass_tile(t, class_weight_ptr, offs_v, mask_v, num_classes, smoothing):
    """(BLOCK_V,) fp32 class_weight * smoothed target probability, 0 outside mask_v."""
    q = t
    if smoothing is not None:
        q = q * (1.0 - smoothing) + tl.where(mask_v, smoothing / num_classes, 0.0)
    if class_weight_ptr is not None:
        q = q * tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0)
    return q


@triton.jit
def class_at_hand(y, ignore_index, V, first_class, num_classes):
    """(target id from the first class at hand, whether it is a class of the row, whether it is one at hand)."""
    if first_class is None:
        readable = (y >= 0) & (y < V) & (y != ignore_index)
        return y, readable, readable
    else:
        readable = (y >= 0) & (y < num_classes) & (y != ignore_index)
        y = y - first_class
        return y, readable, readable & (y >= 0) & (y < V)


@triton.jit
def unless_unread(number, ignored, readable):
    """A number of a row, or a tile of it; 0 if the row is ignored, NaN if its target is bad."""
    return tl.where(ignored, 0.0, tl.where(readable, number, float("nan")))


@triton.jit(do_not_specialize=CHANGING)
def row_loss_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    loss_ptr,  # (N,) fp32, output, or None
    lse_ptr,  # (N,) fp32, output, or None
    logprob_ptr,  # (N,) fp32, output, or None: of the target
    entropy_ptr,  # (N,) fp32, output, or None
    argmax_ptr,  # (N,) int64, output, or None
    stats_ptr,  # (2, N) fp32, output: row maximum, log-sum; with entropy (3, N), its mean shortfall
    shard_ptr,  # (3, N) fp32, output, or None: logit of the target and its weight, 0 where it is not at hand; with smoothing, shortfall
    stride_logits_n,
    N,
    V,
    ignore_index,
    first_class,  # or None
    num_classes,  # or None
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,
):
    """One row per program: loss against a class id, and statistics of the row."""
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2**31 in ordinary runs
    row_ptr = logits_ptr + row * stride_logits_n
    y = tl.load(target_ptr + row).to(tl.int64)
    ignored = y == ignore_index
    y, readable, at_hand = class_at_hand(y, ignore_index, V, first_class, num_classes)

    top, ties, rest = lse_start(BLOCK_V)
    mass = tl.zeros([BLOCK_V], tl.float32)
    shortfall = tl.zeros([BLOCK_V], tl.float32)
    spread = tl.zeros([BLOCK_V], tl.float32)
    first = tl.full([BLOCK_V], NO_CLASS, tl.int32)
    # two stages: with three, ptxas spills on sm_80; entropy takes the registers of the second, 136 of them with every option
    for v in tl.range(0, tl.where(readable, V, 0), BLOCK_V, num_stages=2 if entropy_ptr is None else 1):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = logits_tile(row_ptr, offs_v, mask_v, scale, softcap)
        if entropy_ptr is not None:
            spread = spread_update(spread, top, ties, rest, z)
        top_before = top
        top, ties, rest = lse_update(top, ties, rest, z)
        if argmax_ptr is not None:
            first = first_update(first, top, ties, z, offs_v)
        if smoothing is not None:
            w = tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0) if class_weight_ptr is not None else tl.where(mask_v, 1.0, 0.0)
            mass, shortfall = shortfall_update(mass, shortfall, w, z, top_before, top)

    row_max, log_sum = lse_finish(top, ties, rest)
    row_mass, row_shortfall = 0.0, 0.0
    if smoothing is not None:
        row_mass, row_shortfall = shortfall_finish(mass, shortfall, top, row_max)
    z_y = shaped(target_logit(row_ptr, y, at_hand), scale, softcap)
    w_y = target_weight(class_weight_ptr, y, at_hand) if class_weight_ptr is not None else None

    if loss_ptr is not None:
        loss = id_loss(z_y, w_y, row_max, log_sum, row_mass, row_shortfall, V, smoothing, lse_square_scale)
        tl.store(loss_ptr + row, unless_unread(loss, ignored, readable))
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + N + row, log_sum)
    if shard_ptr is not None:
        tl.store(shard_ptr + row, z_y)
        if class_weight_ptr is not None:
            tl.store(shard_ptr + N + row, w_y)
        if smoothing is not None:
            tl.store(shard_ptr + 2 * N + row, row_shortfall)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, unless_unread(lse_of(row_max, log_sum), ignored, readable))
    if logprob_ptr is not None:
        tl.store(logprob_ptr + row, unless_unread((z_y - row_max) - log_sum, ignored, readable))
    if entropy_ptr is not None:
        mean_shortfall = spread_finish(spread, top, ties, rest, row_max, log_sum)
        tl.store(entropy_ptr + row, unless_unread(log_sum + mean_shortfall, ignored, readable))
        if shard_ptr is not None:
            # without a finite logit it has no part in the row's
            mean_shortfall = tl.where(log_sum == -float("inf"), 0.0, mean_shortfall)
        tl.store(stats_ptr + 2 * N + row, tl.where(readable, mean_shortfall, 0.0))
    if argmax_ptr is not None:
        no_class = tl.where(ignore_index == -1, -2, -1)
        tl.store(argmax_ptr + row, tl.where(readable, first_finish(first, top, row_max), no_class).to(tl.int64))


@triton.jit(do_not_specialize=CHANGING)
def row_grads_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    class_weight_sum_ptr,  # () fp32, or None
    stats_ptr,  # as row_loss_kernel left it; of a shard (5, N), merged, then weight of the target and sum of the class weights
    dloss_ptr,  # (N,) fp32, or None; stride 0 when it is one number
    dlse_ptr,  # (N,) fp32, or None
    dlogprob_ptr,  # (N,) fp32, or None
    dentropy_ptr,  # (N,) fp32, or None
    dlogits_ptr,  # (N, V), output; may be logits
    stride_logits_n,
    stride_dlogits_n,
    stride_dloss,
    N,
    V,
    ignore_index,
    first_class,  # or None
    num_classes,  # or None
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """One row and block per program, or one whole row: gradient of the loss against a class id and of the row's statistics."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    y = tl.load(target_ptr + row).to(tl.int64)
    ignored = y == ignore_index
    y, readable, at_hand = class_at_hand(y, ignore_index, V, first_class, num_classes)
    row_max = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + N + row)

    # all but the entropy has a slope of the same form
    if class_weight_ptr is None:
        w_y = None
    elif first_class is None:
        w_y = target_weight(class_weight_ptr, y, readable)
    else:
        w_y = tl.load(stats_ptr + 3 * N + row)
    kept, flat, off = 0.0, 0.0, 0.0
    if dloss_ptr is not None:
        if first_class is None:
            w_sum = weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing)
        else:
            w_sum = tl.load(stats_ptr + 4 * N + row)
        dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
        smoothed = V if num_classes is None else num_classes
        kept, flat, off = id_slopes(w_y, w_sum, row_max, log_sum, smoothed, smoothing, lse_square_scale)
        kept, flat, off = kept * dloss, flat * dloss, off * dloss
    if dlse_ptr is not None:
        flat = flat + tl.load(dlse_ptr + row)
    if dlogprob_ptr is not None:
        kept = kept - tl.load(dlogprob_ptr + row)
    if dentropy_ptr is not None:
        mean_shortfall = tl.load(stats_ptr + 2 * N + row)
        dentropy = tl.load(dentropy_ptr + row)

    # one step compiles to no loop
    for v in tl.range(0, V if WHOLE_ROW else BLOCK_V, BLOCK_V, num_stages=1):
        start = tl.program_id(1) * BLOCK_V + v
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        w = tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0) if smoothing is not None and class_weight_ptr is not None else None
        x = tl.load(row_ptr + offs_v, mask=only_if(readable, mask_v), other=0.0).to(tl.float32)
        # in place the target's logit is lost once its block is stored: it is read with its block, and no warp stores before all have read
        here = at_hand & (y >= start) & (y < start + BLOCK_V)
        z_y = shaped(target_logit(row_ptr, y, here), scale, softcap)
        tl.debug_barrier()
        below = shaped(x, scale, softcap) - row_max
        p = tl.exp(below - log_sum)
        dz = other_slope(p, w, kept + flat, off, smoothing)
        # compared as int32, like the offsets; a padded lane never equals it
        is_target = offs_v == tl.where(here, y, -1).to(tl.int32)
        dz = tl.where(is_target, target_slope((z_y - row_max) - log_sum, w_y, kept, flat, off, smoothing), dz)
        if dentropy_ptr is not None:
            dz = dz + dentropy * entropy_slope(p, below, mean_shortfall)
        dx = unless_unread(dz * shaped_slope(x, scale, softcap), ignored, readable)
        tl.store(dlogits_ptr + row * stride_dlogits_n + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=CHANGING)
def soft_row_loss_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N, V) any float dtype, probabilities
    class_weight_ptr,  # (V,) fp32, or None
    loss_ptr,  # (N,) fp32, output, or None
    lse_ptr,  # (N,) fp32, output, or None
    logprob_ptr,  # (N,) fp32, output, or None: of the target, on average over its probabilities as given
    entropy_ptr,  # (N,) fp32, output, or None
    argmax_ptr,  # (N,) int64, output, or None
    stats_ptr,  # (3, N) fp32, output: row maximum, log-sum, mass; with logprob (4, N), sum of target; with entropy (5, N), mean shortfall
    shard_ptr,  # (2, N) fp32, output, or None: shortfall; with logprob, that of the target as given
    stride_logits_n,
    stride_target_n,
    N,
    V,
    num_classes,  # or None
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,
):
    """One row per program: loss against class probabilities, and statistics of the row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    target_row_ptr = target_ptr + row * stride_target_n

    top, ties, rest = lse_start(BLOCK_V)
    mass = tl.zeros([BLOCK_V], tl.float32)
    shortfall = tl.zeros([BLOCK_V], tl.float32)
    given_mass = tl.zeros([BLOCK_V], tl.float32)
    given_shortfall = tl.zeros([BLOCK_V], tl.float32)
    spread = tl.zeros([BLOCK_V], tl.float32)
    first = tl.full([BLOCK_V], NO_CLASS, tl.int32)
    # not pipelined: with the addresses of two tensors in flight ptxas spills on sm_80 and sm_100
    for v in tl.range(0, V, BLOCK_V, num_stages=1):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = logits_tile(row_ptr, offs_v, mask_v, scale, softcap)
        t = tl.load(target_row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        q = mass_tile(t, class_weight_ptr, offs_v, mask_v, V if num_classes is None else num_classes, smoothing)
        if entropy_ptr is not None:
            spread = spread_update(spread, top, ties, rest, z)
        top_before = top
        top, ties, rest = lse_update(top, ties, rest, z)
        if argmax_ptr is not None:
            first = first_update(first, top, ties, z, offs_v)
        mass, shortfall = shortfall_update(mass, shortfall, q, z, top_before, top)
        if logprob_ptr is not None:
            given_mass, given_shortfall = shortfall_update(given_mass, given_shortfall, t, z, top_before, top)

    row_max, log_sum = lse_finish(top, ties, rest)
    row_mass, row_shortfall = shortfall_finish(mass, shortfall, top, row_max)

    if loss_ptr is not None:
        loss = row_mass * log_sum + row_shortfall
        if lse_square_scale is not None:
            loss = loss + lse_square(row_max, log_sum, lse_square_scale)
        tl.store(loss_ptr + row, loss)
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + N + row, log_sum)
    tl.store(stats_ptr + 2 * N + row, row_mass)
    if shard_ptr is not None:
        tl.store(shard_ptr + row, row_shortfall)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse_of(row_max, log_sum))
    if logprob_ptr is not None:
        row_given_mass, row_given_shortfall = shortfall_finish(given_mass, given_shortfall, top, row_max)
        tl.store(logprob_ptr + row, -(row_given_mass * log_sum + row_given_shortfall))
        tl.store(stats_ptr + 3 * N + row, row_given_mass)
        if shard_ptr is not None:
            tl.store(shard_ptr + N + row, row_given_shortfall)
    if entropy_ptr is not None:
        mean_shortfall = spread_finish(spread, top, ties, rest, row_max, log_sum)
        tl.store(entropy_ptr + row, log_sum + mean_shortfall)
        if shard_ptr is not None:
            # without a finite logit it has no part in the row's
            mean_shortfall = tl.where(log_sum == -float("inf"), 0.0, mean_shortfall)
        tl.store(stats_ptr + 4 * N + row, mean_shortfall)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + row, first_finish(first, top, row_max).to(tl.int64))


@triton.jit(do_not_specialize=CHANGING)
def soft_row_grads_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N, V) any float dtype, probabilities
    class_weight_ptr,  # (V,) fp32, or None
    stats_ptr,  # as soft_row_loss_kernel left it; of a shard, merged
    dloss_ptr,  # (N,) fp32, or None; stride 0 when it is one number
    dlse_ptr,  # (N,) fp32, or None
    dlogprob_ptr,  # (N,) fp32, or None
    dentropy_ptr,  # (N,) fp32, or None
    dlogits_ptr,  # (N, V), output, or None; may be logits
    dtarget_ptr,  # (N, V), output, or None
    stride_logits_n,
    stride_target_n,
    stride_dlogits_n,
    stride_dtarget_n,
    stride_dloss,
    N,
    V,
    num_classes,  # or None
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    lse_square_scale,  # or None
    BLOCK_V: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """One row and block per program, or one whole row: gradients of the loss against class probabilities and of the row's statistics."""
    row = tl.program_id(0).to(tl.int64)
    row_max = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + N + row)
    if dloss_ptr is not None:
        mass = tl.load(stats_ptr + 2 * N + row)
        dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + row)
    if dlogprob_ptr is not None:
        given_mass = tl.load(stats_ptr + 3 * N + row)
        dlogprob = tl.load(dlogprob_ptr + row)
    if dentropy_ptr is not None:
        mean_shortfall = tl.load(stats_ptr + 4 * N + row)
        dentropy = tl.load(dentropy_ptr + row)

    # one step compiles to no loop
    for v in tl.range(0, V if WHOLE_ROW else BLOCK_V, BLOCK_V, num_stages=1):
        start = tl.program_id(1) * BLOCK_V + v
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        x = tl.load(logits_ptr + row * stride_logits_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + row * stride_target_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        if WHOLE_ROW:
            # a narrower gradient lies over logits that other warps read
            tl.debug_barrier()
        below = shaped(x, scale, softcap) - row_max
        logp = below - log_sum
        q = mass_tile(t, class_weight_ptr, offs_v, mask_v, V if num_classes is None else num_classes, smoothing)
        if dlogits_ptr is not None:
            p = tl.exp(logp)
            dz = tl.zeros([BLOCK_V], tl.float32)
            if dloss_ptr is not None:
                dz = soft_target_slope(p, logp, q, mass)
                if lse_square_scale is not None:
                    dz = dz + softmax_slope(p, row_max, log_sum, lse_square_scale)
                dz = dz * dloss
            if dlse_ptr is not None:
                dz = dz + dlse * p
            if dlogprob_ptr is not None:
                dz = dz - dlogprob * soft_target_slope(p, logp, t, given_mass)
            if dentropy_ptr is not None:
                dz = dz + dentropy * entropy_slope(p, below, mean_shortfall)
            dx = dz * shaped_slope(x, scale, softcap)
            tl.store(dlogits_ptr + row * stride_dlogits_n + offs_v, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_v)
        if dtarget_ptr is not None:
            dt = tl.zeros([BLOCK_V], tl.float32)
            # a class of zero mass and -inf logit is out of the sum, as in shortfall_update
            impossible = logp == -float("inf")
            if dloss_ptr is not None:
                dt = -logp * dloss
                if smoothing is not None:
                    dt = dt * (1.0 - smoothing)
                if class_weight_ptr is not None:
                    dt = dt * tl.load(class_weight_ptr + offs_v, mask=mask_v, other=0.0)
                dt = tl.where((q == 0.0) & impossible, 0.0, dt)
            if dlogprob_ptr is not None:
                dt = dt + tl.where((t == 0.0) & impossible, 0.0, dlogprob * logp)
            tl.store(dtarget_ptr + row * stride_dtarget_n + offs_v, dt.to(dtarget_ptr.dtype.element_ty), mask=mask_v)


def row_loss(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(N, V) logits with unit last stride, (N,) ids or (N, V) probabilities -> (N,) loss and the statistics ``row_grads`` takes."""
    n = len(logits)
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    stats = torch.empty(3 if target.is_floating_point() else 2, n, dtype=torch.float32, device=logits.device)
    options: _Options = {"scale": scale, "softcap": softcap, "smoothing": smoothing, "lse_square_scale": lse_square_scale}
    _fill(logits, target, class_weight, (loss, None, None, None, None, stats, None), ignore_index, options)
    return loss, stats


def row_stats(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    entropy: bool,
    argmax: bool,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """As ``row_loss``, with (N,) lse, log-probability of the target, entropy and argmax between loss and statistics.

    For probabilities the log-probability is the sum over classes of the target as given, neither smoothed nor weighted. The argmax is the
    first of the largest logits; a row that is not read has -1, or -2 where that is ``ignore_index``.
    """
    n = len(logits)
    loss, lse, logprob = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
    row_entropy = torch.empty(n, dtype=torch.float32, device=logits.device) if entropy else None
    row_argmax = torch.empty(n, dtype=torch.int64, device=logits.device) if argmax else None
    kept = (4 if target.is_floating_point() else 2) + entropy
    stats = torch.empty(kept, n, dtype=torch.float32, device=logits.device)
    options: _Options = {"scale": scale, "softcap": softcap, "smoothing": smoothing, "lse_square_scale": lse_square_scale}
    _fill(logits, target, class_weight, (loss, lse, logprob, row_entropy, row_argmax, stats, None), ignore_index, options)
    return loss, lse, logprob, row_entropy, row_argmax, stats


def shard_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    first_class: int,
    num_classes: int,
    given: bool,
    entropy: bool,
    argmax: bool,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, V) logits of a shard -> what the kernels leave of its rows: statistics, numbers of the shard, and the argmax.

    Against ids (3, N) and (3, N), against probabilities (5, N) and (2, N); what is not wanted or not needed is not filled.
    """
    n = len(logits)
    soft = target.is_floating_point()
    stats = torch.empty(5 if soft else 3, n, dtype=torch.float32, device=logits.device)
    shard = torch.empty(2 if soft else 3, n, dtype=torch.float32, device=logits.device)
    row_argmax = torch.empty(n, dtype=torch.int64, device=logits.device) if argmax else None
    # among the shard's classes alone; what is merged comes with them
    logprob = torch.empty(n, dtype=torch.float32, device=logits.device) if soft and given else None
    row_entropy = torch.empty(n, dtype=torch.float32, device=logits.device) if entropy else None
    options: _Options = {"scale": scale, "softcap": softcap, "smoothing": smoothing, "lse_square_scale": None}
    outputs = (None, None, logprob, row_entropy, row_argmax, stats, shard)
    _fill(logits, target, class_weight, outputs, ignore_index, options, first_class, num_classes)
    return stats, shard, row_argmax


def _fill(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    outputs: tuple[Tensor | None, ...],
    ignore_index: int,
    options: _Options,
    first_class: int | None = None,
    num_classes: int | None = None,
) -> None:
    """``outputs`` as the kernels take them."""
    n, v = logits.shape
    if n == 0:
        return
    config = row_blocks(v)
    with on_device_of(logits):
        if target.is_floating_point():
            soft_row_loss_kernel[(n,)](
                logits, target, class_weight, *outputs, logits.stride(0), target.stride(0), n, v, num_classes,
                **options, BLOCK_V=config.block_v, num_warps=config.num_warps, **UNFUSED,
            )  # fmt: skip
        else:
            row_loss_kernel[(n,)](
                logits, target, class_weight, *outputs, logits.stride(0), n, v, ignore_index, first_class, num_classes,
                **options, BLOCK_V=config.block_v, num_warps=config.num_warps, **UNFUSED,
            )  # fmt: skip


def row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor | None,
    *,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
    dlse: Tensor | None = None,
    dlogprob: Tensor | None = None,
    dentropy: Tensor | None = None,
    first_class: int | None = None,
    num_classes: int | None = None,
) -> None:
    """Fill ``dlogits`` (and, for probabilities, ``dtarget``): (N, V) with unit last stride, or None where no gradient is wanted.

    ``dlogits`` may be ``logits``, or a narrower tensor over the first bytes of each row of them. ``dlogprob`` and ``dentropy`` take the
    statistics of ``row_stats``, and a shard merged ones: (5, N), as the kernels state them.
    """
    n, v = logits.shape
    if n == 0 or (dlogits is None and dtarget is None):
        return
    if dloss is None:
        # of the loss alone
        class_weight, smoothing, lse_square_scale = None, None, None
    config = row_blocks(v)
    # blocks of a row would lie over one another's logits: one program goes up the row and writes only over what it has read
    whole_row = dlogits is not None and narrower_over(logits, dlogits)
    # not triton.cdiv, which takes 3 us where it may be traced (triton 3.7)
    grid = (n, 1 if whole_row else -(-v // config.block_v))
    options: _Options = {"scale": scale, "softcap": softcap, "smoothing": smoothing, "lse_square_scale": lse_square_scale}
    upstream = (dloss, dlse, dlogprob, dentropy)
    stride_dloss = 0 if dloss is None else dloss.stride(0)
    with on_device_of(logits):
        if target.is_floating_point():
            soft_row_grads_kernel[grid](
                logits, target, class_weight, stats, *upstream, dlogits, dtarget,
                logits.stride(0), target.stride(0),
                0 if dlogits is None else dlogits.stride(0), 0 if dtarget is None else dtarget.stride(0), stride_dloss, n, v, num_classes,
                **options, BLOCK_V=config.block_v, WHOLE_ROW=whole_row, num_warps=config.num_warps, **UNFUSED,
            )  # fmt: skip
        else:
            assert dlogits is not None
            # of a shard it comes with the statistics
            summed = None if smoothing is None or first_class is not None else class_weight
            class_weight_sum = None if summed is None else summed.sum()
            row_grads_kernel[grid](
                logits, target, class_weight, class_weight_sum, stats, *upstream, dlogits,
                logits.stride(0), dlogits.stride(0), stride_dloss, n, v, ignore_index, first_class, num_classes,
                **options, BLOCK_V=config.block_v, WHOLE_ROW=whole_row, num_warps=config.num_warps, **UNFUSED,
            )  # fmt: skip


def narrower_over(logits: Tensor, dlogits: Tensor) -> bool:
    """Whether the gradient, of another dtype, lies over the logits."""
    return dlogits.data_ptr() == logits.data_ptr() and dlogits.element_size() != logits.element_size()
