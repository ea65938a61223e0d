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

from .launch import (
    UNFUSED,
    LossOptions,
    grad_blocks,
    on_device_of,
    row_parts,
    stats_blocks,
)
from .row_access import (
    aligned_row_ptr,
    alignment,
    class_in_shard,
    class_weights,
    edge_elements,
    in_whole_groups,
    lead_of,
    mask_row,
    masked_argmax,
    narrower_over,
    padding,
    shaped_tile,
    target_logit,
    target_weight,
    weight_sum,
)
from .tile_math import (
    LOWEST,
    NO_CLASS,
    entropy_grad,
    exp_flushed,
    group_finish,
    group_merge,
    group_start,
    group_update,
    higher,
    id_grad_at_target,
    id_grad_coefs,
    id_grad_elsewhere,
    id_loss,
    lse_of,
    only_if,
    shaped,
    shaped_grad,
    shortfall_finish,
    spread_about,
)

# not specialized: rows differ from batch to batch and shards from rank to rank
CHANGING = ["lead", "N", "ignore_index", "first_class", "num_classes"]


@triton.jit
def fold_groups(
    top,
    excess,
    spread,
    first,
    mass,
    shortfall,
    z,  # (BLOCK_V,)
    w,  # (BLOCK_V,) class weights, or None without smoothing
    start,  # (LANES,) the first class of each lane's group
    SPREAD: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Fold a tile into the statistics of the lanes, a group of neighboring classes each."""
    LANES: tl.constexpr = top.shape[0]
    GROUP: tl.constexpr = z.shape[0] // top.shape[0]
    z = tl.reshape(z, (LANES, GROUP))
    top_before, excess_before = top, excess
    top, excess, spread, first = group_update(top, excess, spread, first, z, start, SPREAD, FIRST)
    if w is not None:
        w = tl.reshape(w, (LANES, GROUP))
        # about the top before, then all moved to the new one: triton 3.7.1 does not compile the
        # other order for AMD
        about = tl.where(excess_before == -1.0, top, top_before)
        about = tl.where(mass == 0.0, top, about)
        # a class of zero mass adds 0 even if its logit is -inf
        added = tl.sum(tl.where(w == 0.0, 0.0, w * (about[:, None] - z)), 1)
        mass = mass + tl.sum(w, 1)
        moved = tl.where(mass == 0.0, 0.0, mass * (top - about))
        shortfall = shortfall + added + moved
    return top, excess, spread, first, mass, shortfall


@triton.jit
def sweep_row(
    logits_ptr,
    class_weight_ptr,  # or None
    row,
    valid,
    stride_logits_n,
    lead,
    V,
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    SPREAD: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    EDGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(top, excess, spread, first, mass, shortfall) of the lanes that read a part of a row.

    The part is program_id(1) of PARTS. A lane takes GROUP neighboring classes at a time, which are
    16 bytes; ``first`` is the first class of such a group. Nothing is read if the row is not valid.
    """
    LANES: tl.constexpr = BLOCK_V // GROUP
    lanes = tl.arange(0, LANES)
    offs_v = tl.arange(0, BLOCK_V)
    row_ptr = logits_ptr + row * stride_logits_n
    top, excess, spread, first = group_start(LANES)
    mass = tl.zeros([LANES], tl.float32)
    shortfall = tl.zeros([LANES], tl.float32)
    part = tl.program_id(1) if PARTS > 1 else 0
    # the classes from ``skip`` to ``skip + inner`` are in groups of 16 bytes that are wholly the
    # row's
    skip, inner = 0, V
    if EDGES:
        skip = tl.minimum((GROUP - lead_of(row, stride_logits_n, lead, GROUP)) % GROUP, V)
        inner = (V - skip) // GROUP * GROUP
        # the first tile are the classes beside them, one a lane
        edge_v = tl.where(lanes < GROUP, lanes, skip + inner + lanes - GROUP)
        is_edge = tl.where(lanes < GROUP, lanes < skip, (lanes < 2 * GROUP) & (edge_v < V))
        is_edge = only_if(valid & (part == 0), is_edge)
        edge_x = tl.load(row_ptr + edge_v, mask=is_edge, other=padding(scale, softcap))
        edge_z = shaped_tile(edge_x, is_edge, scale, softcap)
        top = higher(top, edge_z)
        # -1 for -inf, 0 for any other number
        excess = exp_flushed(edge_z - top) - 1.0
        first = tl.where(edge_z >= LOWEST, edge_v, NO_CLASS)
        if smoothing is not None:
            mass = class_weights(class_weight_ptr, edge_v, is_edge)
            shortfall = tl.where(mass == 0.0, 0.0, mass * (top - edge_z))
    inner = tl.where(valid, inner, 0)
    inner_ptr = tl.multiple_of(row_ptr + skip, 16)
    full_blocks = inner // BLOCK_V
    start, stop = 0, full_blocks
    if PARTS > 1:
        size = tl.cdiv(tl.cdiv(inner, BLOCK_V), PARTS)
        start, stop = part * size, tl.minimum((part + 1) * size, full_blocks)

    stages: tl.constexpr = 1 if smoothing is not None else 2 if SPREAD else 3
    for block in tl.range(start, stop, num_stages=stages):
        v = block * BLOCK_V
        w = None
        if smoothing is not None:
            w = class_weights(class_weight_ptr, skip + v + offs_v, offs_v >= 0)
        z = shaped(tl.load(inner_ptr + v + offs_v).to(tl.float32), scale, softcap)
        top, excess, spread, first, mass, shortfall = fold_groups(
            top, excess, spread, first, mass, shortfall, z, w, skip + v + lanes * GROUP,
            SPREAD, FIRST,
        )  # fmt: skip
    # the last block, which is not full
    v = full_blocks * BLOCK_V
    mine = v < inner
    if PARTS > 1:
        mine = (
            mine
            & (start <= full_blocks)
            & (stop == full_blocks)
            & ((part + 1) * size > full_blocks)
        )
    if mine:
        mask_v = v + offs_v < inner
        w = None
        if smoothing is not None:
            w = class_weights(class_weight_ptr, skip + v + offs_v, mask_v)
        x = tl.load(inner_ptr + v + offs_v, mask=mask_v, other=padding(scale, softcap))
        z = shaped_tile(x, mask_v, scale, softcap)
        top, excess, spread, first, mass, shortfall = fold_groups(
            top, excess, spread, first, mass, shortfall, z, w, skip + v + lanes * GROUP,
            SPREAD, FIRST,
        )  # fmt: skip
    return top, excess, spread, first, mass, shortfall


@triton.jit
def store_row(
    top,  # of lanes, as are the next five
    excess,
    spread,
    first,
    mass,
    shortfall,
    logits_ptr,
    target_ptr,
    class_weight_ptr,
    loss_ptr,
    lse_ptr,
    logprob_ptr,
    entropy_ptr,
    argmax_ptr,
    stats_ptr,
    shard_ptr,
    row,
    stride_logits_n,
    N,
    V,
    ignore_index,
    first_class,
    num_classes,
    scale,
    softcap,
    smoothing,
    lse_square_scale,
    GROUP: tl.constexpr,
):
    """Reduce lanes to a row and store what ``row_loss_kernel`` stores."""
    row_ptr = logits_ptr + row * stride_logits_n
    y = tl.load(target_ptr + row).to(tl.int64)
    ignored = y == ignore_index
    y, valid, local = class_in_shard(y, ignore_index, V, first_class, num_classes)
    row_max, log_sum, row_excess = group_finish(top, excess)
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
        mean_shortfall = tl.sum(spread_about(row_max, top, excess, spread), 0) / (1.0 + row_excess)
        tl.store(entropy_ptr + row, mask_row(log_sum + mean_shortfall, valid, ignored))
        if shard_ptr is not None:
            # a shard without a finite logit adds nothing to the row's
            mean_shortfall = tl.where(log_sum == -float("inf"), 0.0, mean_shortfall)
        tl.store(stats_ptr + 2 * N + row, tl.where(valid, mean_shortfall, 0.0))
    if argmax_ptr is not None:
        # the group whose maximum is the row's, and its first class with it
        group = tl.min(tl.where(top == row_max, first, NO_CLASS), 0)
        found = group != NO_CLASS
        offs_v = tl.where(found, group, 0) + tl.arange(0, GROUP)
        mask_v = found & (offs_v < V)
        x = tl.load(row_ptr + offs_v, mask=mask_v, other=padding(scale, softcap))
        z = shaped_tile(x, mask_v, scale, softcap)
        argmax = tl.min(tl.where(z == row_max, offs_v, NO_CLASS), 0)
        # 0 for a row without a finite logit, and for one with a NaN
        argmax = tl.where(argmax == NO_CLASS, 0, argmax)
        argmax = tl.where(valid, argmax, masked_argmax(ignore_index))
        tl.store(argmax_ptr + row, argmax.to(tl.int64))


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
    lead,  # elements from the 16-byte boundary before logits to logits
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
    GROUP: tl.constexpr,  # elements in 16 bytes of logits
    EDGES: tl.constexpr,  # False if all rows start and end on 16 bytes
):
    """One row per program: loss against a class id, and statistics of the row."""
    row = tl.program_id(0).to(tl.int64)  # N * V is often above 2**31
    y = tl.load(target_ptr + row).to(tl.int64)
    _, valid, _ = class_in_shard(y, ignore_index, V, first_class, num_classes)
    top, excess, spread, first, mass, shortfall = sweep_row(
        logits_ptr, class_weight_ptr, row, valid, stride_logits_n, lead, V, scale, softcap,
        smoothing, entropy_ptr is not None, argmax_ptr is not None, BLOCK_V, GROUP, EDGES, 1,
    )  # fmt: skip
    store_row(
        top, excess, spread, first, mass, shortfall,
        logits_ptr, target_ptr, class_weight_ptr, loss_ptr, lse_ptr, logprob_ptr, entropy_ptr,
        argmax_ptr, stats_ptr, shard_ptr, row, stride_logits_n, N, V, ignore_index, first_class,
        num_classes, scale, softcap, smoothing, lse_square_scale, GROUP,
    )  # fmt: skip


# where a part of a row stands in ``parts``: top, excess, spread, mass, shortfall
PART_STATS = tl.constexpr(5)


@triton.jit(do_not_specialize=CHANGING)
def row_parts_kernel(
    logits_ptr,  # (N, V) any float dtype
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (V,) fp32, or None
    parts_ptr,  # (N, PARTS, PART_STATS) fp32, output
    groups_ptr,  # (N, PARTS) int32, output
    stride_logits_n,
    lead,
    V,
    ignore_index,
    first_class,  # or None
    num_classes,  # or None
    scale,  # or None
    softcap,  # or None
    smoothing,  # or None
    SPREAD: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    EDGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One part of a row per program, where there are fewer rows than the device has room for."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row).to(tl.int64)
    _, valid, _ = class_in_shard(y, ignore_index, V, first_class, num_classes)
    top, excess, spread, first, mass, shortfall = sweep_row(
        logits_ptr, class_weight_ptr, row, valid, stride_logits_n, lead, V, scale, softcap,
        smoothing, SPREAD, FIRST, BLOCK_V, GROUP, EDGES, PARTS,
    )  # fmt: skip
    part_top, part_excess = group_merge(top, excess)
    at = row * PARTS + tl.program_id(1)
    part_ptr = parts_ptr + at * PART_STATS
    tl.store(part_ptr, part_top)
    tl.store(part_ptr + 1, part_excess)
    if SPREAD:
        tl.store(part_ptr + 2, tl.sum(spread_about(part_top, top, excess, spread), 0))
    if smoothing is not None:
        part_mass, part_shortfall = shortfall_finish(mass, shortfall, top, part_top)
        tl.store(part_ptr + 3, part_mass)
        tl.store(part_ptr + 4, part_shortfall)
    if FIRST:
        tl.store(groups_ptr + at, tl.min(tl.where(top == part_top, first, NO_CLASS), 0))


@triton.jit(do_not_specialize=CHANGING)
def merge_parts_kernel(
    parts_ptr,  # as row_parts_kernel fills them, as the next
    groups_ptr,
    logits_ptr,  # from here on as in row_loss_kernel
    target_ptr,
    class_weight_ptr,
    loss_ptr,
    lse_ptr,
    logprob_ptr,
    entropy_ptr,
    argmax_ptr,
    stats_ptr,
    shard_ptr,
    stride_logits_n,
    N,
    V,
    ignore_index,
    first_class,
    num_classes,
    scale,
    softcap,
    smoothing,
    lse_square_scale,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two
):
    """One row per program, from its parts."""
    row = tl.program_id(0).to(tl.int64)
    at = row * PARTS + tl.arange(0, PARTS)
    part_ptr = parts_ptr + at * PART_STATS
    spread = tl.zeros([PARTS], tl.float32)
    mass = tl.zeros([PARTS], tl.float32)
    shortfall = tl.zeros([PARTS], tl.float32)
    first = tl.full([PARTS], NO_CLASS, tl.int32)
    if entropy_ptr is not None:
        spread = tl.load(part_ptr + 2)
    if smoothing is not None:
        mass = tl.load(part_ptr + 3)
        shortfall = tl.load(part_ptr + 4)
    if argmax_ptr is not None:
        first = tl.load(groups_ptr + at)
    store_row(
        tl.load(part_ptr), tl.load(part_ptr + 1), spread, first, mass, shortfall,
        logits_ptr, target_ptr, class_weight_ptr, loss_ptr, lse_ptr, logprob_ptr, entropy_ptr,
        argmax_ptr, stats_ptr, shard_ptr, row, stride_logits_n, N, V, ignore_index, first_class,
        num_classes, scale, softcap, smoothing, lse_square_scale, GROUP,
    )  # fmt: skip


@triton.jit
def grad_block(
    logits_ptr,
    class_weight_ptr,
    dlogits_ptr,
    row,
    base,  # the first position of the block, counted from the 16-byte boundary before the row
    valid,
    y,  # int32, -1 if the target is not local
    target_coef,  # these are 0 for an ignored row and NaN for an invalid one
    softmax_coef,
    smoothing_coef,
    dentropy,  # or None
    w_y,  # or None
    row_max,
    log_sum,
    mean_shortfall,
    stride_logits_n,
    stride_dlogits_n,
    lead,
    V,
    scale,
    softcap,
    smoothing,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Store the gradient of a block of a row."""
    row_lead = lead_of(row, stride_logits_n, lead, GROUP)
    row_ptr = aligned_row_ptr(logits_ptr, row, stride_logits_n, row_lead)
    dlogits_row_ptr = aligned_row_ptr(dlogits_ptr, row, stride_dlogits_n, row_lead)
    pos = tl.arange(0, BLOCK_V)
    in_groups = in_whole_groups(pos, base, row_lead, V, GROUP)
    x = tl.load(
        row_ptr + base + pos, mask=only_if(valid, in_groups), other=padding(scale, softcap)
    )  # fmt: skip
    if EDGES:
        edge_pos, is_edge = edge_elements(base, row_lead, V, BLOCK_V, GROUP)
        edge_x = tl.load(
            row_ptr + edge_pos, mask=only_if(valid, is_edge), other=padding(scale, softcap)
        )  # fmt: skip
    y_pos = tl.where(y >= 0, y + row_lead, -1)
    in_block = (y_pos >= base) & (y_pos < base + BLOCK_V)
    x_y = target_logit(row_ptr, y_pos, in_block)
    # dlogits may be logits: no warp stores before every warp has loaded
    tl.debug_barrier()
    # what is not read of a row that is not valid is 0 after this
    at_max = tl.where(valid, row_max, 0.0)
    e_coef = (target_coef + softmax_coef) * tl.where(valid, tl.exp(-log_sum), 1.0)
    weighted: tl.constexpr = smoothing is not None and class_weight_ptr is not None
    w = None
    if weighted:
        # not of an ignored row: 0 times a weight of NaN is NaN
        w = class_weights(class_weight_ptr, base + pos - row_lead, only_if(valid, in_groups))
    dx = grad_tile(
        x, w, valid, e_coef, smoothing_coef, dentropy, at_max, log_sum, mean_shortfall,
        scale, softcap, smoothing,
    )  # fmt: skip
    tl.store(dlogits_row_ptr + base + pos, dx.to(dlogits_ptr.dtype.element_ty), mask=in_groups)
    if EDGES:
        edge_w = None
        if weighted:
            edge_w = class_weights(class_weight_ptr, edge_pos - row_lead, only_if(valid, is_edge))
        edge_dx = grad_tile(
            edge_x, edge_w, valid, e_coef, smoothing_coef, dentropy, at_max, log_sum,
            mean_shortfall, scale, softcap, smoothing,
        )  # fmt: skip
        tl.store(dlogits_row_ptr + edge_pos, edge_dx.to(dlogits_ptr.dtype.element_ty), mask=is_edge)
    if in_block:
        # the target's entry, over the one that some thread has stored: cheaper than a comparison
        # for every class
        tl.debug_barrier()
        z_y = shaped(x_y, scale, softcap)
        logp_y = (z_y - row_max) - log_sum
        dz_y = id_grad_at_target(logp_y, w_y, target_coef, softmax_coef, smoothing_coef, smoothing)
        if dentropy is not None:
            dz_y = dz_y + dentropy * entropy_grad(tl.exp(logp_y), z_y - row_max, mean_shortfall)
        dx_y = dz_y * shaped_grad(x_y, scale, softcap)
        tl.store(dlogits_row_ptr + y_pos, dx_y.to(dlogits_ptr.dtype.element_ty))


@triton.jit
def grad_tile(
    x,
    w,  # or None
    valid,
    e_coef,
    smoothing_coef,
    dentropy,  # or None
    row_max,
    log_sum,
    mean_shortfall,
    scale,
    softcap,
    smoothing,
):
    """The gradient of logits other than the target's; x may be ``padding``."""
    x = x.to(tl.float32)
    below = shaped(x, scale, softcap) - row_max
    e = exp_flushed(below)
    dz = id_grad_elsewhere(e, w, e_coef, smoothing_coef, smoothing)
    if dentropy is not None:
        p = e * tl.exp(-log_sum)
        dz = dz + tl.where(valid, dentropy * entropy_grad(p, below, mean_shortfall), 0.0)
    return dz * shaped_grad(x, scale, softcap)


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
    lead,  # elements from the 16-byte boundary before logits, and before dlogits, to them
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
    GROUP: tl.constexpr,  # elements in 16 bytes of logits; 1 if rows of dlogits have other leads
    EDGES: tl.constexpr,  # False if all rows start and end on 16 bytes, or GROUP is 1
    WHOLE_ROW: tl.constexpr,  # for a narrower gradient over the logits (``narrower_over``)
):
    """One block of a row per program, or a whole row: gradient of loss and statistics.

    The formula is at the top of ``tile_math``.
    """
    row = tl.program_id(0).to(tl.int64)
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
    mean_shortfall, dentropy = 0.0, None
    if dentropy_ptr is not None:
        mean_shortfall = tl.load(stats_ptr + 2 * N + row)
        dentropy = tl.load(dentropy_ptr + row)
    target_coef = mask_row(target_coef, valid, ignored)
    softmax_coef = mask_row(softmax_coef, valid, ignored)
    smoothing_coef = mask_row(smoothing_coef, valid, ignored)
    y = tl.where(local, y, -1).to(tl.int32)

    # without WHOLE_ROW there is one step, which does not compile to a loop
    for v in tl.range(0, V + lead if WHOLE_ROW else BLOCK_V, BLOCK_V, num_stages=1):
        grad_block(
            logits_ptr, class_weight_ptr, dlogits_ptr, row, tl.program_id(1) * BLOCK_V + v, valid,
            y, target_coef, softmax_coef, smoothing_coef, dentropy, w_y, row_max, log_sum,
            mean_shortfall, stride_logits_n, stride_dlogits_n, lead, V, scale, softcap, smoothing,
            BLOCK_V, GROUP, EDGES,
        )  # fmt: skip


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
    shaping = options["softcap"] is not None or options["smoothing"] is not None
    config = stats_blocks(v, shaping=shaping)
    group = 16 // logits.element_size()
    lead = logits.data_ptr() % 16 // logits.element_size()
    edges = lead > 0 or v % group > 0 or (n > 1 and logits.stride(0) % group > 0)
    parts = row_parts(n, v, config, logits.device)
    outputs = (loss, lse, logprob, entropy, argmax, stats, shard)
    shape = {"BLOCK_V": config.block_v, "GROUP": group, "EDGES": edges}
    launch = {"num_warps": config.num_warps, **UNFUSED}
    with on_device_of(logits):
        if parts == 1:
            row_loss_kernel[(n,)](
                logits, target, class_weight, *outputs, logits.stride(0), lead, n, v,
                ignore_index, first_class, num_classes, **options, **shape, **launch,
            )  # fmt: skip
            return
        part_stats = torch.empty(n, parts, 5, dtype=torch.float32, device=logits.device)
        groups = torch.empty(n, parts, dtype=torch.int32, device=logits.device)
        scale, softcap, smoothing = options["scale"], options["softcap"], options["smoothing"]
        row_parts_kernel[(n, parts)](
            logits, target, class_weight, part_stats, groups, logits.stride(0), lead, v,
            ignore_index, first_class, num_classes, scale, softcap, smoothing,
            SPREAD=entropy is not None, FIRST=argmax is not None, PARTS=parts, **shape, **launch,
        )  # fmt: skip
        merge_parts_kernel[(n,)](
            part_stats, groups, logits, target, class_weight, *outputs, logits.stride(0), n, v,
            ignore_index, first_class, num_classes, **options, GROUP=group, PARTS=parts,
            num_warps=1, **UNFUSED,
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
    shaping = softcap is not None or smoothing is not None or dentropy is not None
    config = grad_blocks(v, shaping=shaping)
    whole_row = narrower_over(logits, dlogits)
    _, lead, most_lead = alignment(logits, dlogits)
    group = 16 // logits.element_size()
    if most_lead is None or v < 2 * group:
        # element by element
        group, lead, most_lead = 1, 0, 0
    edges = most_lead > 0 or v % group > 0
    # not triton.cdiv, which takes 3 us where it may be traced (triton 3.7)
    grid = (n, 1 if whole_row else -(-(v + most_lead) // config.block_v))
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
            lead, n, v, ignore_index, first_class, num_classes,
            **options, BLOCK_V=config.block_v, GROUP=group, EDGES=edges, WHOLE_ROW=whole_row,
            num_warps=config.num_warps, **UNFUSED,
        )  # fmt: skip
