"""Statistics of rows of logits against class ids, and the gradients from them.

The forward takes one program per row; it loops over blocks of classes and never stores
probabilities. The backward reads the logits again and takes one program per block of a row. Between
them, ``stats`` stores row_max and log_sum of each row: lse alone would be rounded to the magnitude
of an offset common to the row. On request the same pass computes lse,
the log-probability of the target, the entropy and the argmax.

The rows may be sharded by classes: a shard has V classes, from ``first_class`` on, of
``num_classes``. Its forward stores what is merged with the other shards in place of a loss, and its
backward takes the merged statistics.

N rows, V classes. ``row_access`` says which rows are ignored or invalid; their logits are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, LossOptions, on_device_of, row_blocks
from .row_access import (
    class_in_shard,
    class_weights,
    logits_tile,
    mask_row,
    masked_argmax,
    narrower_over,
    target_logit,
    target_weight,
    weight_sum,
)
from .tile_math import (
    NO_CLASS,
    entropy_grad,
    first_finish,
    first_update,
    id_grad_at_target,
    id_grad_coefs,
    id_grad_elsewhere,
    id_loss,
    lse_finish,
    lse_of,
    lse_start,
    lse_update,
    only_if,
    shaped,
    shaped_grad,
    shortfall_finish,
    shortfall_update,
    spread_finish,
    spread_update,
)

# not specialized: rows differ from batch to batch and shards from rank to rank
CHANGING = ["N", "ignore_index", "first_class", "num_classes"]


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
    stats_ptr,  # (2, N) fp32, output: row_max, log_sum; with entropy (3, N): mean_shortfall
    shard_ptr,  # (3, N) fp32, output, or None: as ``shard_rows`` says
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
    row = tl.program_id(0).to(tl.int64)  # N * V is often above 2**31
    row_ptr = logits_ptr + row * stride_logits_n
    y = tl.load(target_ptr + row).to(tl.int64)
    ignored = y == ignore_index
    y, valid, local = class_in_shard(y, ignore_index, V, first_class, num_classes)

    top, ties, rest = lse_start(BLOCK_V)
    mass = tl.zeros([BLOCK_V], tl.float32)
    shortfall = tl.zeros([BLOCK_V], tl.float32)
    spread = tl.zeros([BLOCK_V], tl.float32)
    first = tl.full([BLOCK_V], NO_CLASS, tl.int32)
    # three stages spill on sm_80; two with entropy need 136 registers
    stages: tl.constexpr = 2 if entropy_ptr is None else 1
    # no step if the row is not valid: its logits are not read
    for v in tl.range(0, tl.where(valid, V, 0), BLOCK_V, num_stages=stages):
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
            w = class_weights(class_weight_ptr, offs_v, mask_v)
            mass, shortfall = shortfall_update(mass, shortfall, w, z, top_before, top)

    row_max, log_sum = lse_finish(top, ties, rest)
    row_mass, row_shortfall = 0.0, 0.0
    if smoothing is not None:
        row_mass, row_shortfall = shortfall_finish(mass, shortfall, top, row_max)
    z_y = shaped(target_logit(row_ptr, y, local), scale, softcap)
    w_y = target_weight(class_weight_ptr, y, local) if class_weight_ptr is not None else None

    if loss_ptr is not None:
        loss = id_loss(
            z_y, w_y, row_max, log_sum, row_mass, row_shortfall, V, smoothing, lse_square_scale
        )  # fmt: skip
        tl.store(loss_ptr + row, mask_row(loss, valid, ignored))
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + N + row, log_sum)
    if shard_ptr is not None:
        tl.store(shard_ptr + row, z_y)
        if class_weight_ptr is not None:
            tl.store(shard_ptr + N + row, w_y)
        if smoothing is not None:
            tl.store(shard_ptr + 2 * N + row, row_shortfall)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, mask_row(lse_of(row_max, log_sum), valid, ignored))
    if logprob_ptr is not None:
        tl.store(logprob_ptr + row, mask_row((z_y - row_max) - log_sum, valid, ignored))
    if entropy_ptr is not None:
        mean_shortfall = spread_finish(spread, top, ties, rest, row_max, log_sum)
        tl.store(entropy_ptr + row, mask_row(log_sum + mean_shortfall, valid, ignored))
        if shard_ptr is not None:
            # a shard without a finite logit adds nothing to the row's
            mean_shortfall = tl.where(log_sum == -float("inf"), 0.0, mean_shortfall)
        tl.store(stats_ptr + 2 * N + row, tl.where(valid, mean_shortfall, 0.0))
    if argmax_ptr is not None:
        no_argmax = masked_argmax(ignore_index)
        argmax = tl.where(valid, first_finish(first, top, row_max), no_argmax)
        tl.store(argmax_ptr + row, argmax.to(tl.int64))


@triton.jit(do_not_specialize=CHANGING)
def row_grads_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    class_weight_sum_ptr,  # () fp32, or None
    stats_ptr,  # as row_loss_kernel fills it; of a shard (5, N), as ``row_grads`` says
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
    WHOLE_ROW: tl.constexpr,  # for a narrower gradient over the logits (``narrower_over``)
):
    """One block of a row per program, or a whole row: gradient of loss and statistics.

    The formula is at the top of ``tile_math``.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    y = tl.load(target_ptr + row).to(tl.int64)
    ignored = y == ignore_index
    y, valid, local = class_in_shard(y, ignore_index, V, first_class, num_classes)
    row_max = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + N + row)

    if class_weight_ptr is None:
        w_y = None
    elif first_class is None:
        w_y = target_weight(class_weight_ptr, y, valid)
    else:
        w_y = tl.load(stats_ptr + 3 * N + row)
    target_coef, softmax_coef, smoothing_coef = 0.0, 0.0, 0.0
    if dloss_ptr is not None:
        if first_class is None:
            w_sum = weight_sum(class_weight_ptr, class_weight_sum_ptr, V, smoothing)
        else:
            w_sum = tl.load(stats_ptr + 4 * N + row)
        dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
        all_classes = V if num_classes is None else num_classes
        target_coef, softmax_coef, smoothing_coef = id_grad_coefs(
            w_y, w_sum, row_max, log_sum, all_classes, smoothing, lse_square_scale
        )  # fmt: skip
        target_coef = target_coef * dloss
        softmax_coef = softmax_coef * dloss
        smoothing_coef = smoothing_coef * dloss
    if dlse_ptr is not None:
        softmax_coef = softmax_coef + tl.load(dlse_ptr + row)
    if dlogprob_ptr is not None:
        target_coef = target_coef - tl.load(dlogprob_ptr + row)
    if dentropy_ptr is not None:
        mean_shortfall = tl.load(stats_ptr + 2 * N + row)
        dentropy = tl.load(dentropy_ptr + row)

    # without WHOLE_ROW there is one step, which does not compile to a loop
    for v in tl.range(0, V if WHOLE_ROW else BLOCK_V, BLOCK_V, num_stages=1):
        start = tl.program_id(1) * BLOCK_V + v
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        w = None
        if smoothing is not None and class_weight_ptr is not None:
            w = class_weights(class_weight_ptr, offs_v, mask_v)
        x = tl.load(row_ptr + offs_v, mask=only_if(valid, mask_v), other=0.0).to(tl.float32)
        # in place, the store overwrites the target's logit: it is loaded with its own block, and
        # the barrier keeps every warp from storing before all have loaded
        in_block = local & (y >= start) & (y < start + BLOCK_V)
        z_y = shaped(target_logit(row_ptr, y, in_block), scale, softcap)
        tl.debug_barrier()
        below = shaped(x, scale, softcap) - row_max
        p = tl.exp(below - log_sum)
        dz = id_grad_elsewhere(p, w, target_coef + softmax_coef, smoothing_coef, smoothing)
        # compared as int32, like the offsets
        is_target = offs_v == tl.where(in_block, y, -1).to(tl.int32)
        dz_y = id_grad_at_target(
            (z_y - row_max) - log_sum, w_y, target_coef, softmax_coef, smoothing_coef, smoothing
        )  # fmt: skip
        dz = tl.where(is_target, dz_y, dz)
        if dentropy_ptr is not None:
            dz = dz + dentropy * entropy_grad(p, below, mean_shortfall)
        dx = mask_row(dz * shaped_grad(x, scale, softcap), valid, ignored)
        tl.store(
            dlogits_ptr + row * stride_dlogits_n + offs_v,
            dx.to(dlogits_ptr.dtype.element_ty),
            mask=mask_v,
        )


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
    """(N,) loss of (N, V) logits with unit last stride, and the (2, N) ``row_grads`` takes."""
    n = len(logits)
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    stats = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    options: LossOptions = {
        "scale": scale,
        "softcap": softcap,
        "smoothing": smoothing,
        "lse_square_scale": lse_square_scale,
    }
    _launch(logits, target, class_weight, stats, ignore_index, options, loss=loss)
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
    """(loss, lse, log-probability of the target, entropy, argmax, statistics) of each row.

    The statistics are those ``row_grads`` takes. The argmax is the first of the largest logits; for
    a row that is not valid it is -1, or -2 where -1 is ``ignore_index``.
    """
    n = len(logits)
    loss, lse, logprob = (
        torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3)
    )  # fmt: skip
    row_entropy = torch.empty_like(loss) if entropy else None
    row_argmax = torch.empty_like(loss, dtype=torch.int64) if argmax else None
    stats = torch.empty(2 + entropy, n, dtype=torch.float32, device=logits.device)
    options: LossOptions = {
        "scale": scale,
        "softcap": softcap,
        "smoothing": smoothing,
        "lse_square_scale": lse_square_scale,
    }
    _launch(
        logits,
        target,
        class_weight,
        stats,
        ignore_index,
        options,
        loss=loss,
        lse=lse,
        logprob=logprob,
        entropy=row_entropy,
        argmax=row_argmax,
    )
    return loss, lse, logprob, row_entropy, row_argmax, stats


def shard_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    first_class: int,
    num_classes: int,
    entropy: bool,
    argmax: bool,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(statistics, target and smoothing, argmax) of (N, V) logits of a shard, to be merged.

    The statistics are (3, N): row_max, log_sum and, with ``entropy``, mean_shortfall. The second is
    (3, N): the target's logit and, with class weights, its weight, both 0 where the class is not
    local, and, with smoothing, the shortfall. Numbers that do not apply are left uninitialized.
    """
    n = len(logits)
    stats = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    shard = torch.empty_like(stats)
    row_argmax = torch.empty(n, dtype=torch.int64, device=logits.device) if argmax else None
    # of the shard's classes alone, and not returned: with it the kernel stores mean_shortfall
    row_entropy = torch.empty(n, dtype=torch.float32, device=logits.device) if entropy else None
    options: LossOptions = {
        "scale": scale,
        "softcap": softcap,
        "smoothing": smoothing,
        "lse_square_scale": None,
    }
    _launch(
        logits,
        target,
        class_weight,
        stats,
        ignore_index,
        options,
        entropy=row_entropy,
        argmax=row_argmax,
        shard=shard,
        first_class=first_class,
        num_classes=num_classes,
    )
    return stats, shard, row_argmax


def _launch(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    options: LossOptions,
    *,
    loss: Tensor | None = None,
    lse: Tensor | None = None,
    logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    argmax: Tensor | None = None,
    shard: Tensor | None = None,
    first_class: int | None = None,
    num_classes: int | None = None,
) -> None:
    """Fill the outputs that are given."""
    n, v = logits.shape
    if n == 0:
        return
    config = row_blocks(v)
    with on_device_of(logits):
        row_loss_kernel[(n,)](
            logits, target, class_weight, loss, lse, logprob, entropy, argmax, stats, shard,
            logits.stride(0), n, v, ignore_index, first_class, num_classes,
            **options, BLOCK_V=config.block_v, num_warps=config.num_warps, **UNFUSED,
        )  # fmt: skip


def row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor | None,
    *,
    dlogits: Tensor,
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
    """Fill ``dlogits`` (N, V), of unit last stride.

    ``dlogits`` may be ``logits``, or a narrower tensor over the first bytes of each of its rows.
    ``dentropy`` needs the statistics that ``row_stats`` computes with ``entropy``. Those of a shard
    are (5, N) and merged: row_max, log_sum, mean_shortfall, then the weight of the target and the
    sum of the class weights of all shards.
    """
    n, v = logits.shape
    if n == 0:
        return
    if dloss is None:
        # options of the loss alone
        class_weight, smoothing, lse_square_scale = None, None, None
    config = row_blocks(v)
    whole_row = narrower_over(logits, dlogits)
    # not triton.cdiv, which takes 3 us where it may be traced (triton 3.7)
    grid = (n, 1 if whole_row else -(-v // config.block_v))
    options: LossOptions = {
        "scale": scale,
        "softcap": softcap,
        "smoothing": smoothing,
        "lse_square_scale": lse_square_scale,
    }
    # a shard's comes with its statistics
    summed = None if smoothing is None or first_class is not None else class_weight
    class_weight_sum = None if summed is None else summed.sum()
    with on_device_of(logits):
        row_grads_kernel[grid](
            logits, target, class_weight, class_weight_sum, stats,
            dloss, dlse, dlogprob, dentropy, dlogits,
            logits.stride(0), dlogits.stride(0), 0 if dloss is None else dloss.stride(0),
            n, v, ignore_index, first_class, num_classes,
            **options, BLOCK_V=config.block_v, WHOLE_ROW=whole_row, num_warps=config.num_warps,
            **UNFUSED,
        )  # fmt: skip
