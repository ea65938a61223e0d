"""Loss and statistics of rows of a head, from hidden states and weight, without logits in memory.

A tile is 128 rows x 256 classes. Its program computes the matrix product in registers, adds the
bias, and stores (top, excess) of its part of every row, and for the entropy and the argmax one more
number each. The program whose classes hold a row's target also stores the target's logit, taken
from the same product: a target that is the largest class then equals the maximum bit for bit, and
the loss of a confident prediction stays accurate. A second kernel merges the parts of a row in the
order of the classes. There are no atomics, so repeated calls give the same bits.

N rows, V classes, D width, T tiles of classes. ``row_access`` says which rows are ignored or
invalid; their targets are not used as addresses.
"""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import multiprocessors
from .launch import UNFUSED, on_device_of
from .row_access import IGNORED, class_of, mask_row, masked_argmax, target_weight
from .tile_math import (
    HIGHEST,
    LOWEST,
    NO_CLASS,
    exp_flushed,
    first_join,
    first_merge,
    halves,
    id_loss,
    log1p_from_minus_one,
    lse_join,
    lse_merge,
    shaped,
    spread_join,
    spread_merge,
)

# not specialized: they differ from batch to batch
CHANGING = ["N", "T", "ignore_index"]


@triton.jit
def tile_at(i, rows_of_tiles, columns_of_tiles, GROUP: tl.constexpr):
    """(row, column) of the i-th tile.

    GROUP rows of tiles go together, column by column, so that a tile of weight is read once for all
    of them.
    """
    first = i // (GROUP * columns_of_tiles) * GROUP
    size = tl.minimum(rows_of_tiles - first, GROUP)
    rest = i % (GROUP * columns_of_tiles)
    return first + rest % size, rest // size


@triton.jit
def part_stats(x, bias_ptr, start, y, any_y, V, scale, softcap, spreads_ptr, firsts_ptr):
    """(top, excess, target's logit or 0, spread, first) of each row of a part of a tile.

    ``x`` are products with the classes from ``start`` on. ``any_y`` is False if no row of the tile
    has its target ``y`` in it. ``spread`` and ``first`` are 0 if their pointers are None.
    """
    offs_v = start + tl.arange(0, x.shape[1])
    if bias_ptr is not None:
        x = x + tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    z = shaped(x, scale, softcap)
    if start + x.shape[1] > V:
        z = tl.where(offs_v[None, :] < V, z, -float("inf"))
    z_y = tl.zeros([x.shape[0]], tl.float32)
    if any_y:
        z_y = tl.sum(tl.where(offs_v[None, :] == y[:, None], z, 0.0), 1)
    top = tl.maximum(tl.max(z, 1), LOWEST)
    # a +inf logit makes the excess +inf, a NaN logit NaN
    e = exp_flushed(z - tl.minimum(top, HIGHEST)[:, None])
    # logits at the top are counted apart: their 1 would round the sum of the others
    rest = tl.sum(tl.where(e == 1.0, 0.0, e), 1)
    ties = tl.sum(tl.where(e == 1.0, 1.0, 0.0), 1)
    excess = rest + (ties - 1.0)
    spread = tl.zeros([x.shape[0]], tl.float32)
    if spreads_ptr is not None:
        # bounded, so that an e of 0 removes a logit of -inf from the sum
        spread = tl.sum(e * tl.minimum(top[:, None] - z, -LOWEST), 1)
    first = tl.zeros([x.shape[0]], tl.int32)
    if firsts_ptr is not None:
        first = tl.min(tl.where(z == top[:, None], offs_v[None, :], NO_CLASS), 1)
    return top, excess, z_y, spread, first


@triton.jit
def join_stats(
    top,
    excess,
    spread,
    first,
    other_top,
    other_excess,
    other_spread,
    other_first,
    spreads_ptr,
    firsts_ptr,
):
    """(top, excess, spread, first) of two parts of rows; the last two only with their pointers."""
    if spreads_ptr is not None:
        spread = spread_join(top, excess, spread, other_top, other_excess, other_spread)
    if firsts_ptr is not None:
        first = first_join(top, first, other_top, other_first)
    top, excess = lse_join(top, excess, other_top, other_excess)
    return top, excess, spread, first


@triton.jit(do_not_specialize=CHANGING)
def tile_stats_kernel(
    hidden_ptr,  # (N, D)
    weight_ptr,  # (V, D), same dtype
    bias_ptr,  # (V,) any float dtype, or None
    target_ptr,  # (N,) int64
    tops_ptr,  # (T, N) fp32, output, as are the next three: of each tile's part of a row
    excesses_ptr,  # (T, N) fp32
    spreads_ptr,  # (T, N) fp32, or None
    firsts_ptr,  # (T, N) int32, or None
    target_logit_ptr,  # (N,) fp32, output for valid rows
    stride_hidden_n,
    stride_weight_v,
    N,
    V,
    D,
    ignore_index,
    scale,  # or None
    softcap,  # or None
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Every num_programs-th tile per program."""
    hidden = tl.make_tensor_descriptor(hidden_ptr, [N, D], [stride_hidden_n, 1], [BLOCK_N, BLOCK_D])
    weight = tl.make_tensor_descriptor(weight_ptr, [V, D], [stride_weight_v, 1], [BLOCK_V, BLOCK_D])
    rows_of_tiles = tl.cdiv(N, BLOCK_N)
    columns_of_tiles = tl.cdiv(V, BLOCK_V)
    for i in tl.range(tl.program_id(0), rows_of_tiles * columns_of_tiles, tl.num_programs(0)):
        tile_n, tile_v = tile_at(i, rows_of_tiles, columns_of_tiles, GROUP)
        row, start = tile_n * BLOCK_N, tile_v * BLOCK_V
        offs_n = row + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        # loaded ahead of the product, which hides its latency
        y = class_of(tl.load(target_ptr + offs_n, mask=mask_n, other=ignore_index), V, ignore_index)

        x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for d in range(0, D, BLOCK_D):
            x = tl.dot(hidden.load([row, d]), weight.load([start, d]).T, x)

        in_tile = (y >= start) & (y < start + BLOCK_V)
        # few tiles hold a target
        any_y = tl.max(in_tile.to(tl.int32), 0) > 0
        # by quarters: ptxas spills when the statistics of the whole tile are computed at once
        left, right = halves(x)
        x_0, x_1 = halves(left)
        x_2, x_3 = halves(right)
        top, excess, z_0, spread, first = part_stats(
            x_0, bias_ptr, start, y, any_y, V, scale, softcap, spreads_ptr, firsts_ptr
        )  # fmt: skip
        top_1, excess_1, z_1, spread_1, first_1 = part_stats(
            x_1, bias_ptr, start + BLOCK_V // 4, y, any_y, V, scale, softcap,
            spreads_ptr, firsts_ptr,
        )  # fmt: skip
        top, excess, spread, first = join_stats(
            top, excess, spread, first, top_1, excess_1, spread_1, first_1,
            spreads_ptr, firsts_ptr,
        )  # fmt: skip
        top_2, excess_2, z_2, spread_2, first_2 = part_stats(
            x_2, bias_ptr, start + BLOCK_V // 2, y, any_y, V, scale, softcap,
            spreads_ptr, firsts_ptr,
        )  # fmt: skip
        top, excess, spread, first = join_stats(
            top, excess, spread, first, top_2, excess_2, spread_2, first_2,
            spreads_ptr, firsts_ptr,
        )  # fmt: skip
        top_3, excess_3, z_3, spread_3, first_3 = part_stats(
            x_3, bias_ptr, start + 3 * BLOCK_V // 4, y, any_y, V, scale, softcap,
            spreads_ptr, firsts_ptr,
        )  # fmt: skip
        top, excess, spread, first = join_stats(
            top, excess, spread, first, top_3, excess_3, spread_3, first_3,
            spreads_ptr, firsts_ptr,
        )  # fmt: skip

        at = tl.cast(tile_v, tl.int64) * N + offs_n
        tl.store(tops_ptr + at, top, mask=mask_n)
        tl.store(excesses_ptr + at, excess, mask=mask_n)
        if spreads_ptr is not None:
            tl.store(spreads_ptr + at, spread, mask=mask_n)
        if firsts_ptr is not None:
            tl.store(firsts_ptr + at, first, mask=mask_n)
        tl.store(target_logit_ptr + offs_n, z_0 + z_1 + z_2 + z_3, mask=in_tile)


@triton.jit(do_not_specialize=CHANGING)
def merge_tiles_kernel(
    tops_ptr,  # (T, N) fp32
    excesses_ptr,  # (T, N) fp32
    spreads_ptr,  # (T, N) fp32, or None
    firsts_ptr,  # (T, N) int32, or None
    target_ptr,  # (N,) int64
    target_logit_ptr,  # (N,) fp32, read for valid rows
    class_weight_ptr,  # (V,) fp32, or None
    loss_ptr,  # (N,) fp32, output
    lse_ptr,  # (N,) fp32, output, or None for the loss alone
    target_logprob_ptr,  # (N,) fp32, output, or None with lse
    entropy_ptr,  # (N,) fp32, output, or None with spreads
    argmax_ptr,  # (N,) int64, output, or None with firsts
    N,
    V,
    T,
    ignore_index,
    lse_square_scale,  # or None
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """BLOCK_N rows per program: loss and statistics from the parts of rows."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y = class_of(tl.load(target_ptr + offs_n, mask=mask_n, other=ignore_index), V, ignore_index)
    tops = tl.full([BLOCK_T, BLOCK_N], LOWEST, tl.float32)
    excesses = tl.full([BLOCK_T, BLOCK_N], -1.0, tl.float32)
    spreads = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    firsts = tl.full([BLOCK_T, BLOCK_N], NO_CLASS, tl.int32)
    for t in range(0, T, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < T)[:, None] & mask_n[None, :]
        at = offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
        top = tl.load(tops_ptr + at, mask=mask, other=LOWEST)
        excess = tl.load(excesses_ptr + at, mask=mask, other=-1.0)
        spread, first = spreads, firsts
        if spreads_ptr is not None:
            spread = tl.load(spreads_ptr + at, mask=mask, other=0.0)
        if firsts_ptr is not None:
            first = tl.load(firsts_ptr + at, mask=mask, other=NO_CLASS)
        tops, excesses, spreads, firsts = join_stats(
            tops, excesses, spreads, firsts, top, excess, spread, first, spreads_ptr, firsts_ptr
        )  # fmt: skip

    row_max, excess = lse_merge(tops, excesses)
    log_sum = log1p_from_minus_one(excess)
    lse = row_max + log_sum
    # as in torch, a +inf logit leaves no loss
    log_sum = tl.where(row_max == float("inf"), float("nan"), log_sum)
    valid, ignored = y >= 0, y == IGNORED
    z_y = tl.load(target_logit_ptr + offs_n, mask=valid, other=0.0)
    w_y = target_weight(class_weight_ptr, y, valid) if class_weight_ptr is not None else None
    loss = id_loss(z_y, w_y, row_max, log_sum, 0.0, 0.0, V, None, lse_square_scale)
    tl.store(loss_ptr + offs_n, mask_row(loss, valid, ignored), mask=mask_n)
    if lse_ptr is not None:
        tl.store(lse_ptr + offs_n, mask_row(lse, valid, ignored), mask=mask_n)
        logprob = mask_row((z_y - row_max) - log_sum, valid, ignored)
        tl.store(target_logprob_ptr + offs_n, logprob, mask=mask_n)
    if entropy_ptr is not None:
        entropy = log_sum + spread_merge(tops, excesses, spreads) / (1.0 + excess)
        tl.store(entropy_ptr + offs_n, mask_row(entropy, valid, ignored), mask=mask_n)
    if argmax_ptr is not None:
        first = first_merge(tops, firsts)
        # 0 for a row without a finite logit
        first = tl.where(first < V, first, 0)
        argmax = tl.where(valid, first, masked_argmax(ignore_index))
        tl.store(argmax_ptr + offs_n, argmax.to(tl.int64), mask=mask_n)


@dataclass(frozen=True)
class TileConfig:
    """Shape of a tile of the product, and the warps and pipeline stages of its program."""

    block_n: int = 128
    block_v: int = 256
    block_d: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of shared memory: operands of all stages, and 1 KiB for barriers and reductions."""
        return self.num_stages * (self.block_n + self.block_v) * self.block_d * itemsize + 1024


# The shape of a prototype that took 11.9 ms on an H100 (bf16, N = 8192, D = 4096, V = 128256), and
# cuBLAS 12.6 ms for the logits alone. The prototype neither counted ties nor stored the target's
# logit; this kernel has not been measured
TILE = TileConfig()
MERGE_ROWS, MERGE_TILES, MERGE_WARPS = 32, 32, 4
# bytes of parts at a time, which are 32k rows of 128k classes; at least LEAST_ROWS rows, so that
# every SM has work
PARTS_BUDGET, LEAST_ROWS = 128 * 2**20, 8192


def obstacle(hidden: Tensor, weight: Tensor) -> str | None:
    """None if ``row_loss`` and ``row_stats`` take these tensors, else the reason why not."""
    device = hidden.device
    if device.type == "cpu":
        if isinstance(tile_stats_kernel, triton.JITFunction):
            return "Triton runs on cpu tensors in its interpreter alone"
        # tl.dot of bf16 is wrong in the interpreter, without an error
        dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.float32)
    else:
        obstacle = _device_obstacle(device)
        if obstacle:
            return obstacle
        dtypes = (torch.bfloat16, torch.float16)
    if hidden.dtype != weight.dtype or hidden.dtype not in dtypes:
        expected = f"on {device.type} both must be {' or '.join(map(str, dtypes))}"
        return f"hidden is {hidden.dtype} and weight {weight.dtype}; {expected}"
    if hidden.shape[1] == 0 or weight.shape[0] == 0:
        return f"there are {weight.shape[0]} classes of width {hidden.shape[1]}"
    for name, t in (("hidden", hidden), ("weight", weight)):
        if t.shape[1] > 1 and t.stride(1) != 1:
            return f"{name} has a last stride of {t.stride(1)}, not 1"
        stride = _row_stride(t)
        if t.data_ptr() % 16 or stride * t.element_size() % 16 or stride < t.shape[1]:
            expected = "rows must not overlap and start on 16 bytes"
            return f"{name} has rows {t.stride(0)} elements apart; {expected}"
    return None


def _device_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return f"{device.type} is not CUDA"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9:
        found = f"compute capability {properties.major}.{properties.minor}"
        return f"{found} is below 9.0, the first that copies tiles by descriptor"
    available = getattr(properties, "shared_memory_per_block_optin", 0)
    needed = TILE.shared_memory(2)
    if available < needed:
        return f"a block has {available} bytes of shared memory and a tile takes {needed}"
    return None


def _row_stride(t: Tensor) -> int:
    """Elements from row to row. A single row may have any stride; a descriptor needs 16 bytes."""
    per_16_bytes = 16 // t.element_size()
    return t.stride(0) if t.shape[0] > 1 else triton.cdiv(t.shape[1], per_16_bytes) * per_16_bytes


def row_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    lse_square_scale: float | None,
) -> Tensor:
    """(N,) fp32 losses of the logits hidden @ weight.T + bias.

    hidden is (N, D), weight (V, D), and ``obstacle`` must accept them. bias (V,), target (N,) and
    class_weight (V,) fp32 are contiguous.
    """
    loss, target_logit = _fp32_rows(2, hidden)
    _fill(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        target_logit,
        (loss, None, None, None, None),
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
        lse_square_scale=lse_square_scale,
    )
    return loss


def row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    entropy: bool,
    argmax: bool,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    lse_square_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, lse, log-probability of the target, entropy, argmax) of each row.

    Arguments are as in ``row_loss``. entropy and argmax are None if not asked for. argmax is the
    first of the largest logits; for a row that is not valid it is -1, or -2 where -1 is
    ``ignore_index``; for a row with a NaN it is unspecified.
    """
    loss, lse, target_logprob, target_logit = _fp32_rows(4, hidden)
    row_entropy = torch.empty_like(loss) if entropy else None
    row_argmax = torch.empty_like(loss, dtype=torch.int64) if argmax else None
    _fill(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        target_logit,
        (loss, lse, target_logprob, row_entropy, row_argmax),
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
        lse_square_scale=lse_square_scale,
    )
    return loss, lse, target_logprob, row_entropy, row_argmax


def _fp32_rows(count: int, hidden: Tensor) -> tuple[Tensor, ...]:
    """``count`` uninitialized (N,) tensors."""
    n = hidden.shape[0]
    return torch.empty(count, n, dtype=torch.float32, device=hidden.device).unbind()


# loss, lse, target_logprob, entropy, argmax
_Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _fill(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    target_logit: Tensor,
    outputs: _Outputs,
    *,
    ignore_index: int,
    scale: float | None,
    softcap: float | None,
    lse_square_scale: float | None,
) -> None:
    """Fill the outputs that are given, in chunks of rows whose parts fit ``PARTS_BUDGET``."""
    n, d = hidden.shape
    v = weight.shape[0]
    tiles = triton.cdiv(v, TILE.block_v)
    if n == 0:
        return
    _, _, _, entropy, argmax = outputs
    bytes_per_row = 4 * tiles * (2 + (entropy is not None) + (argmax is not None))
    chunk_rows = PARTS_BUDGET // bytes_per_row // TILE.block_n * TILE.block_n
    chunk_rows = max(LEAST_ROWS, chunk_rows)
    size = tiles * min(n, chunk_rows)
    tops, excesses = torch.empty(2, size, dtype=torch.float32, device=hidden.device).unbind()
    spreads = None if entropy is None else torch.empty_like(tops)
    firsts = None if argmax is None else torch.empty_like(tops, dtype=torch.int32)
    parts = (tops, excesses, spreads, firsts)

    def launch() -> None:
        for start in range(0, n, chunk_rows):
            rows = min(n - start, chunk_rows)
            chunk = slice(start, start + rows)
            all_tiles = triton.cdiv(rows, TILE.block_n) * tiles
            tile_stats_kernel[(min(all_tiles, multiprocessors(hidden.device)),)](
                hidden[chunk], weight, bias, target[chunk], *parts, target_logit[chunk],
                _row_stride(hidden), _row_stride(weight), rows, v, d, ignore_index, scale, softcap,
                BLOCK_N=TILE.block_n, BLOCK_V=TILE.block_v, BLOCK_D=TILE.block_d, GROUP=TILE.group,
                num_warps=TILE.num_warps, num_stages=TILE.num_stages, **UNFUSED,
            )  # fmt: skip
            merge_tiles_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
                *parts, target[chunk], target_logit[chunk], class_weight,
                *(None if t is None else t[chunk] for t in outputs),
                rows, v, tiles, ignore_index, lse_square_scale,
                BLOCK_N=MERGE_ROWS, BLOCK_T=MERGE_TILES, num_warps=MERGE_WARPS, **UNFUSED,
            )  # fmt: skip

    with on_device_of(hidden):
        _with_descriptors(hidden.device, launch)


def _with_descriptors(device: torch.device, launch: Callable[[], None]) -> None:
    """Call ``launch`` with an allocator for tensor descriptors, which lie in global memory."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run() -> None:
        triton.set_allocator(allocate)
        launch()

    # the allocator is a context variable: set in a copy of the context, the caller's stays. Triton
    # 3.4 has one allocator per process, and there ours remains set
    contextvars.copy_context().run(run)
