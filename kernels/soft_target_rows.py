"""Statistics of rows of logits against class probabilities, and the gradients from them.

The counterpart of ``softmax_rows`` for dense (N, V) targets: its kernels read a row of the target
beside the row of logits. ``stats`` also stores the mass of each row, the sum over classes of class
weight times smoothed target probability, which the gradient needs.

N rows, V classes. Every row is valid. Shards are as in ``softmax_rows``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, LossOptions, on_device_of, row_blocks
from .row_access import class_weights, logits_tile, narrower_over
from .tile_math import (
    NO_CLASS,
    entropy_grad,
    first_finish,
    first_update,
    lse_finish,
    lse_of,
    lse_square,
    lse_square_grad,
    lse_start,
    lse_update,
    shaped,
    shaped_grad,
    shortfall_finish,
    shortfall_update,
    soft_target_grad,
    spread_finish,
    spread_update,
)

# not specialized: rows differ from batch to batch and shards from rank to rank
CHANGING = ["N", "num_classes"]


@triton.jit
def mass_tile(t, class_weight_ptr, offs_v, mask_v, num_classes, smoothing):
    """A tile of class weight times smoothed target probability, 0 outside mask_v."""
    q = t
    if smoothing is not None:
        q = q * (1.0 - smoothing) + tl.where(mask_v, smoothing / num_classes, 0.0)
    if class_weight_ptr is not None:
        q = q * class_weights(class_weight_ptr, offs_v, mask_v)
    return q


@triton.jit(do_not_specialize=CHANGING)
def soft_row_loss_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N, V) any float dtype, probabilities
    class_weight_ptr,  # (V,) fp32, or None
    loss_ptr,  # (N,) fp32, output, or None
    lse_ptr,  # (N,) fp32, output, or None
    logprob_ptr,  # (N,) fp32, output, or None: sum of target * log-probability
    entropy_ptr,  # (N,) fp32, output, or None
    argmax_ptr,  # (N,) int64, output, or None
    stats_ptr,  # (3, N) fp32, output; with logprob (4, N), with entropy (5, N): see ``row_stats``
    shard_ptr,  # (2, N) fp32, output, or None: as ``shard_rows`` says
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
    all_classes = V if num_classes is None else num_classes

    top, ties, rest = lse_start(BLOCK_V)
    mass = tl.zeros([BLOCK_V], tl.float32)
    shortfall = tl.zeros([BLOCK_V], tl.float32)
    given_mass = tl.zeros([BLOCK_V], tl.float32)
    given_shortfall = tl.zeros([BLOCK_V], tl.float32)
    spread = tl.zeros([BLOCK_V], tl.float32)
    first = tl.full([BLOCK_V], NO_CLASS, tl.int32)
    # not pipelined: with loads of two tensors in flight ptxas spills on sm_80 and sm_100
    for v in tl.range(0, V, BLOCK_V, num_stages=1):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = logits_tile(row_ptr, offs_v, mask_v, scale, softcap)
        t = tl.load(target_row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        q = mass_tile(t, class_weight_ptr, offs_v, mask_v, all_classes, smoothing)
        if entropy_ptr is not None:
            spread = spread_update(spread, top, ties, rest, z)
        top_before = top
        top, ties, rest = lse_update(top, ties, rest, z)
        if argmax_ptr is not None:
            first = first_update(first, top, ties, z, offs_v)
        mass, shortfall = shortfall_update(mass, shortfall, q, z, top_before, top)
        if logprob_ptr is not None:
            given_mass, given_shortfall = shortfall_update(
                given_mass, given_shortfall, t, z, top_before, top
            )  # fmt: skip

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
        row_given_mass, row_given_shortfall = shortfall_finish(
            given_mass, given_shortfall, top, row_max
        )  # fmt: skip
        tl.store(logprob_ptr + row, -(row_given_mass * log_sum + row_given_shortfall))
        tl.store(stats_ptr + 3 * N + row, row_given_mass)
        if shard_ptr is not None:
            tl.store(shard_ptr + N + row, row_given_shortfall)
    if entropy_ptr is not None:
        mean_shortfall = spread_finish(spread, top, ties, rest, row_max, log_sum)
        tl.store(entropy_ptr + row, log_sum + mean_shortfall)
        if shard_ptr is not None:
            # a shard without a finite logit adds nothing to the row's
            mean_shortfall = tl.where(log_sum == -float("inf"), 0.0, mean_shortfall)
        tl.store(stats_ptr + 4 * N + row, mean_shortfall)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + row, first_finish(first, top, row_max).to(tl.int64))


@triton.jit(do_not_specialize=CHANGING)
def soft_row_grads_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N, V) any float dtype, probabilities
    class_weight_ptr,  # (V,) fp32, or None
    stats_ptr,  # as soft_row_loss_kernel fills it; of a shard, merged
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
    WHOLE_ROW: tl.constexpr,  # for a narrower gradient over the logits (``narrower_over``)
):
    """One block of a row per program, or a whole row: gradients of loss and statistics."""
    row = tl.program_id(0).to(tl.int64)
    all_classes = V if num_classes is None else num_classes
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

    # without WHOLE_ROW there is one step, which does not compile to a loop
    for v in tl.range(0, V if WHOLE_ROW else BLOCK_V, BLOCK_V, num_stages=1):
        start = tl.program_id(1) * BLOCK_V + v
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        x = tl.load(logits_ptr + row * stride_logits_n + offs_v, mask=mask_v, other=0.0)
        x = x.to(tl.float32)
        t = tl.load(target_ptr + row * stride_target_n + offs_v, mask=mask_v, other=0.0)
        t = t.to(tl.float32)
        if WHOLE_ROW:
            # the narrower gradient is stored over logits that other warps load
            tl.debug_barrier()
        below = shaped(x, scale, softcap) - row_max
        logp = below - log_sum
        q = mass_tile(t, class_weight_ptr, offs_v, mask_v, all_classes, smoothing)
        if dlogits_ptr is not None:
            p = tl.exp(logp)
            dz = tl.zeros([BLOCK_V], tl.float32)
            if dloss_ptr is not None:
                dz = soft_target_grad(p, logp, q, mass)
                if lse_square_scale is not None:
                    dz = dz + lse_square_grad(p, row_max, log_sum, lse_square_scale)
                dz = dz * dloss
            if dlse_ptr is not None:
                dz = dz + dlse * p
            if dlogprob_ptr is not None:
                dz = dz - dlogprob * soft_target_grad(p, logp, t, given_mass)
            if dentropy_ptr is not None:
                dz = dz + dentropy * entropy_grad(p, below, mean_shortfall)
            dx = dz * shaped_grad(x, scale, softcap)
            tl.store(
                dlogits_ptr + row * stride_dlogits_n + offs_v,
                dx.to(dlogits_ptr.dtype.element_ty),
                mask=mask_v,
            )
        if dtarget_ptr is not None:
            dt = tl.zeros([BLOCK_V], tl.float32)
            # a class of zero mass and -inf logit adds 0 to the loss, as in shortfall_update
            impossible = logp == -float("inf")
            if dloss_ptr is not None:
                dt = -logp * dloss
                if smoothing is not None:
                    dt = dt * (1.0 - smoothing)
                if class_weight_ptr is not None:
                    dt = dt * class_weights(class_weight_ptr, offs_v, mask_v)
                dt = tl.where((q == 0.0) & impossible, 0.0, dt)
            if dlogprob_ptr is not None:
                dt = dt + tl.where((t == 0.0) & impossible, 0.0, dlogprob * logp)
            tl.store(
                dtarget_ptr + row * stride_dtarget_n + offs_v,
                dt.to(dtarget_ptr.dtype.element_ty),
                mask=mask_v,
            )


def row_loss(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(N,) loss of (N, V) logits and probabilities, and the (3, N) ``row_grads`` takes.

    Logits and probabilities have unit last stride.
    """
    n = len(logits)
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    stats = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    options: LossOptions = {
        "scale": scale,
        "softcap": softcap,
        "smoothing": smoothing,
        "lse_square_scale": lse_square_scale,
    }
    _launch(logits, target, class_weight, stats, options, loss=loss)
    return loss, stats


def row_stats(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    entropy: bool,
    argmax: bool,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """(loss, lse, log-probability of the target, entropy, argmax, statistics) of each row.

    The log-probability of the target is the sum of target * log-probability over the classes, the
    target neither smoothed nor weighted. The argmax is the first of the largest logits. The
    statistics are (4, N), or (5, N) with ``entropy``: row_max, log_sum, mass, the sum of the
    target, mean_shortfall.
    """
    n = len(logits)
    loss, lse, logprob = (
        torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3)
    )  # fmt: skip
    row_entropy = torch.empty_like(loss) if entropy else None
    row_argmax = torch.empty_like(loss, dtype=torch.int64) if argmax else None
    stats = torch.empty(4 + entropy, n, dtype=torch.float32, device=logits.device)
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
    num_classes: int,
    given: bool,
    entropy: bool,
    argmax: bool,
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(statistics, shortfalls, argmax) of (N, V) logits and probabilities of a shard, to be merged.

    The statistics are (5, N): row_max, log_sum, mass, with ``given`` the sum of the target and with
    ``entropy`` mean_shortfall. The shortfalls are (2, N): that of the mass and, with ``given``,
    that of the target neither smoothed nor weighted. Numbers that do not apply are left
    uninitialized.
    """
    n = len(logits)
    stats = torch.empty(5, n, dtype=torch.float32, device=logits.device)
    shard = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    row_argmax = torch.empty(n, dtype=torch.int64, device=logits.device) if argmax else None
    # of the shard's classes alone, and not returned: with them the kernel stores what is merged
    logprob = torch.empty(n, dtype=torch.float32, device=logits.device) if given else None
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
        options,
        logprob=logprob,
        entropy=row_entropy,
        argmax=row_argmax,
        shard=shard,
        num_classes=num_classes,
    )
    return stats, shard, row_argmax


def _launch(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    options: LossOptions,
    *,
    loss: Tensor | None = None,
    lse: Tensor | None = None,
    logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    argmax: Tensor | None = None,
    shard: Tensor | None = None,
    num_classes: int | None = None,
) -> None:
    """Fill the outputs that are given."""
    n, v = logits.shape
    if n == 0:
        return
    config = row_blocks(v)
    with on_device_of(logits):
        soft_row_loss_kernel[(n,)](
            logits, target, class_weight, loss, lse, logprob, entropy, argmax, stats, shard,
            logits.stride(0), target.stride(0), n, v, num_classes,
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
    scale: float | None,
    softcap: float | None,
    smoothing: float | None,
    lse_square_scale: float | None,
    dlse: Tensor | None = None,
    dlogprob: Tensor | None = None,
    dentropy: Tensor | None = None,
    num_classes: int | None = None,
) -> None:
    """Fill ``dlogits`` and ``dtarget``, (N, V) with unit last stride, where they are given.

    ``dlogits`` may be ``logits``, or a narrower tensor over the first bytes of each of its rows.
    ``dlogprob`` and ``dentropy`` need the statistics of ``row_stats``, a shard merged ones, (5, N).
    """
    n, v = logits.shape
    if n == 0 or (dlogits is None and dtarget is None):
        return
    if dloss is None:
        # options of the loss alone
        class_weight, smoothing, lse_square_scale = None, None, None
    config = row_blocks(v)
    whole_row = dlogits is not None and narrower_over(logits, dlogits)
    # not triton.cdiv, which takes 3 us where it may be traced (triton 3.7)
    grid = (n, 1 if whole_row else -(-v // config.block_v))
    options: LossOptions = {
        "scale": scale,
        "softcap": softcap,
        "smoothing": smoothing,
        "lse_square_scale": lse_square_scale,
    }
    strides = (0 if t is None else t.stride(0) for t in (dlogits, dtarget, dloss))
    with on_device_of(logits):
        soft_row_grads_kernel[grid](
            logits, target, class_weight, stats, dloss, dlse, dlogprob, dentropy, dlogits, dtarget,
            logits.stride(0), target.stride(0), *strides, n, v, num_classes,
            **options, BLOCK_V=config.block_v, WHOLE_ROW=whole_row, num_warps=config.num_warps,
            **UNFUSED,
        )  # fmt: skip
