"""Hidden states and the weight of a head -> loss and statistics of rows; logits exist in registers, a tile at a time, and nowhere else.

A tile is 128 rows x 256 classes. Its program multiplies, and leaves (maximum, sum of exponentials) of its part of every row; the program
whose classes hold a row's target leaves the target's logit as well, out of the same product, so that a target at the top equals the
maximum bit for bit and a confident row keeps its digits. For the entropy and the largest class of a row every program leaves one number
more. A second kernel merges the parts of a row in the order of classes. No atomics: the same call gives the same bits.

N rows, V classes, D width. A target outside [0, V) that is not ignore_index makes its row NaN, and no id becomes an address in weight.
"""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_rows import class_of, unless_unread
from .launch import family, multiprocessors, on_device_of
from .softmax_rows import UNFUSED, target_weight
from .tile_math import (
    HIGHEST,
    LOWEST,
    NO_CLASS,
    exp_flushed,
    first_join,
    first_merge,
    id_loss,
    log1p_from_minus_one,
    lse_join,
    lse_merge,
    shaped,
    shortfall_join,
    shortfall_merge,
)

CHANGING = ["N", "T", "ignore_index"]


@triton.jit
def tile_at(i, rows_of_tiles, columns_of_tiles, GROUP: tl.constexpr):
    """(row, column) of the i-th tile: GROUP rows of tiles at a time, so that a tile of weight is read once for all of them."""
    first = i // (GROUP * columns_of_tiles) * GROUP
    size = tl.minimum(rows_of_tiles - first, GROUP)
    rest = i % (GROUP * columns_of_tiles)
    return first + rest % size, rest // size


@triton.jit
def halves(t):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def part_stats(x, bias_ptr, start, y, any_y, V, scale, softcap, shortfalls_ptr, firsts_ptr):
    """(maximum, excess, target's logit or 0, shortfall, first class of the maximum) of each row of a part of a tile, products with classes
    from ``start`` on; the last two mean nothing without their pointers.

    ``y`` is the target, or less than any class; where ``any_y`` is false it is none of these.
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
    # a +inf logit makes excess +inf, and a NaN logit NaN
    e = exp_flushed(z - tl.minimum(top, HIGHEST)[:, None])
    # those at the top are counted apart from the others, to whom a 1 would cost digits
    excess = tl.sum(tl.where(e == 1.0, 0.0, e), 1) + (tl.sum(tl.where(e == 1.0, 1.0, 0.0), 1) - 1.0)
    shortfall = tl.zeros([x.shape[0]], tl.float32)
    if shortfalls_ptr is not None:
        # finite, so that e of 0 keeps a logit of -inf out of the sum
        shortfall = tl.sum(e * tl.minimum(top[:, None] - z, -LOWEST), 1)
    first = tl.zeros([x.shape[0]], tl.int32)
    if firsts_ptr is not None:
        first = tl.min(tl.where(z == top[:, None], offs_v[None, :], NO_CLASS), 1)
    return top, excess, z_y, shortfall, first


@triton.jit(do_not_specialize=CHANGING)
def tile_stats_kernel(
    hidden_ptr,  # (N, D)
    weight_ptr,  # (V, D), same dtype
    bias_ptr,  # (V,) any float dtype, or None
    target_ptr,  # (N,) int64
    tops_ptr,  # (T, N) fp32, output: maximum of each tile's part of a row
    excesses_ptr,  # (T, N) fp32, output: sum of exp(z - maximum), less 1
    shortfalls_ptr,  # (T, N) fp32, output: sum of exp(z - maximum) * (maximum - z), or None
    firsts_ptr,  # (T, N) int32, output: first class of that maximum, or None
    target_logit_ptr,  # (N,) fp32, output where the target is a class
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
    """Every so many tiles per program."""
    hidden = tl.make_tensor_descriptor(hidden_ptr, [N, D], [stride_hidden_n, 1], [BLOCK_N, BLOCK_D])
    weight = tl.make_tensor_descriptor(weight_ptr, [V, D], [stride_weight_v, 1], [BLOCK_V, BLOCK_D])
    rows_of_tiles = tl.cdiv(N, BLOCK_N)
    columns_of_tiles = tl.cdiv(V, BLOCK_V)
    for i in tl.range(tl.program_id(0), rows_of_tiles * columns_of_tiles, tl.num_programs(0)):
        tile_n, tile_v = tile_at(i, rows_of_tiles, columns_of_tiles, GROUP)
        row, start = tile_n * BLOCK_N, tile_v * BLOCK_V
        offs_n = row + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        # on its way during the product
        y = class_of(tl.load(target_ptr + offs_n, mask=mask_n, other=ignore_index), V, ignore_index)

        x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for d in range(0, D, BLOCK_D):
            x = tl.dot(hidden.load([row, d]), weight.load([start, d]).T, x)

        here = (y >= start) & (y < start + BLOCK_V)
        # few tiles hold a target
        any_y = tl.max(here.to(tl.int32), 0) > 0
        # by quarters: ptxas spills when the whole of a tile is shaped, compared and summed at once
        left, right = halves(x)
        x_0, x_1 = halves(left)
        x_2, x_3 = halves(right)
        top, excess, z_y, shortfall, first = part_stats(x_0, bias_ptr, start, y, any_y, V, scale, softcap, shortfalls_ptr, firsts_ptr)
        top_1, excess_1, z_1, shortfall_1, first_1 = part_stats(
            x_1, bias_ptr, start + BLOCK_V // 4, y, any_y, V, scale, softcap, shortfalls_ptr, firsts_ptr
        )
        if shortfalls_ptr is not None:
            shortfall = shortfall_join(top, excess, shortfall, top_1, excess_1, shortfall_1)
        if firsts_ptr is not None:
            first = first_join(top, first, top_1, first_1)
        top, excess = lse_join(top, excess, top_1, excess_1)
        top_2, excess_2, z_2, shortfall_2, first_2 = part_stats(
            x_2, bias_ptr, start + BLOCK_V // 2, y, any_y, V, scale, softcap, shortfalls_ptr, firsts_ptr
        )
        if shortfalls_ptr is not None:
            shortfall = shortfall_join(top, excess, shortfall, top_2, excess_2, shortfall_2)
        if firsts_ptr is not None:
            first = first_join(top, first, top_2, first_2)
        top, excess = lse_join(top, excess, top_2, excess_2)
        top_3, excess_3, z_3, shortfall_3, first_3 = part_stats(
            x_3, bias_ptr, start + 3 * BLOCK_V // 4, y, any_y, V, scale, softcap, shortfalls_ptr, firsts_ptr
        )
        if shortfalls_ptr is not None:
            shortfall = shortfall_join(top, excess, shortfall, top_3, excess_3, shortfall_3)
        if firsts_ptr is not None:
            first = first_join(top, first, top_3, first_3)
        top, excess = lse_join(top, excess, top_3, excess_3)

        at = tl.cast(tile_v, tl.int64) * N + offs_n
        tl.store(tops_ptr + at, top, mask=mask_n)
        tl.store(excesses_ptr + at, excess, mask=mask_n)
        if shortfalls_ptr is not None:
            tl.store(shortfalls_ptr + at, shortfall, mask=mask_n)
        if firsts_ptr is not None:
            tl.store(firsts_ptr + at, first, mask=mask_n)
        tl.store(target_logit_ptr + offs_n, z_y + z_1 + z_2 + z_3, mask=here)


@triton.jit(do_not_specialize=CHANGING)
def merge_tiles_kernel(
    tops_ptr,  # (T, N) fp32
    excesses_ptr,  # (T, N) fp32
    shortfalls_ptr,  # (T, N) fp32, or None
    firsts_ptr,  # (T, N) int32, or None
    target_ptr,  # (N,) int64
    target_logit_ptr,  # (N,) fp32, read where the target is a class
    class_weight_ptr,  # (V,) fp32, or None
    loss_ptr,  # (N,) fp32, output
    lse_ptr,  # (N,) fp32, output, or None for the loss alone
    target_logprob_ptr,  # (N,) fp32, output, or None with lse
    entropy_ptr,  # (N,) fp32, output, or None with shortfalls
    argmax_ptr,  # (N,) int64, output, or None with firsts
    N,
    V,
    T,
    ignore_index,
    lse_square_scale,  # or None
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """BLOCK_N rows per program: parts of rows to loss and statistics."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y = class_of(tl.load(target_ptr + offs_n, mask=mask_n, other=ignore_index), V, ignore_index)
    tops = tl.full([BLOCK_T, BLOCK_N], LOWEST, tl.float32)
    excesses = tl.full([BLOCK_T, BLOCK_N], -1.0, tl.float32)
    shortfalls = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    firsts = tl.full([BLOCK_T, BLOCK_N], NO_CLASS, tl.int32)
    for t in range(0, T, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < T)[:, None] & mask_n[None, :]
        at = offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
        top = tl.load(tops_ptr + at, mask=mask, other=LOWEST)
        excess = tl.load(excesses_ptr + at, mask=mask, other=-1.0)
        if shortfalls_ptr is not None:
            shortfall = tl.load(shortfalls_ptr + at, mask=mask, other=0.0)
            shortfalls = shortfall_join(tops, excesses, shortfalls, top, excess, shortfall)
        if firsts_ptr is not None:
            firsts = first_join(tops, firsts, top, tl.load(firsts_ptr + at, mask=mask, other=NO_CLASS))
        tops, excesses = lse_join(tops, excesses, top, excess)

    row_max, excess = lse_merge(tops, excesses)
    log_sum = log1p_from_minus_one(excess)
    lse = row_max + log_sum
    # as in torch, a +inf logit leaves no loss
    log_sum = tl.where(row_max == float("inf"), float("nan"), log_sum)
    readable = y >= 0
    z_y = tl.load(target_logit_ptr + offs_n, mask=readable, other=0.0)
    w_y = target_weight(class_weight_ptr, y, readable) if class_weight_ptr is not None else None
    loss = id_loss(z_y, w_y, row_max, log_sum, 0.0, 0.0, V, None, lse_square_scale)
    tl.store(loss_ptr + offs_n, unless_unread(y, loss), mask=mask_n)
    if lse_ptr is not None:
        tl.store(lse_ptr + offs_n, unless_unread(y, lse), mask=mask_n)
        tl.store(target_logprob_ptr + offs_n, unless_unread(y, (z_y - row_max) - log_sum), mask=mask_n)
    if entropy_ptr is not None:
        entropy = log_sum + shortfall_merge(tops, excesses, shortfalls) / (1.0 + excess)
        tl.store(entropy_ptr + offs_n, unless_unread(y, entropy), mask=mask_n)
    if argmax_ptr is not None:
        first = first_merge(tops, firsts)
        # a row without a finite logit has a class too
        first = tl.where(first < V, first, 0)
        # no target, and not ignore_index either
        unread = tl.where(ignore_index == -1, -2, -1)
        tl.store(argmax_ptr + offs_n, tl.where(readable, first, unread).to(tl.int64), mask=mask_n)


@dataclass(frozen=True)
class TileConfig:
    """A tile of the product, and what its program takes."""

    block_n: int = 128
    block_v: int = 256
    block_d: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of the operands in flight, and of what is beside them."""
        return self.num_stages * (self.block_n + self.block_v) * self.block_d * itemsize + 1024


# H100, bf16, N = 8192 D = 4096 V = 128256: 11.9 ms, where cuBLAS takes 12.6 for the logits alone; as a prototype, which neither counted
# those at the top apart nor left the target's logit. This kernel is not measured
TILE = TileConfig()
MERGE_ROWS, MERGE_TILES, MERGE_WARPS = 32, 32, 4
# bytes of parts at a time, which is 32k rows of 128k classes; never fewer rows than keep a device busy
PARTS_BUDGET, LEAST_ROWS = 128 * 2**20, 8192


def runs_on(hidden: Tensor, weight: Tensor) -> str | None:
    """Why ``row_loss`` and ``row_stats`` cannot take these; None if they can."""
    device = hidden.device
    if device.type == "cpu":
        if isinstance(tile_stats_kernel, triton.JITFunction):
            return "Triton runs on cpu tensors in its interpreter alone"
        # tl.dot of bf16 is silently wrong in the interpreter
        dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.float32)
    else:
        obstacle = _device_obstacle(device)
        if obstacle:
            return obstacle
        dtypes = (torch.bfloat16, torch.float16)
    if hidden.dtype != weight.dtype or hidden.dtype not in dtypes:
        return f"hidden is {hidden.dtype} and weight {weight.dtype}; on {device.type} both must be {' or '.join(map(str, dtypes))}"
    if hidden.shape[1] == 0 or weight.shape[0] == 0:
        return f"there are {weight.shape[0]} classes of width {hidden.shape[1]}"
    for name, t in (("hidden", hidden), ("weight", weight)):
        if t.shape[1] > 1 and t.stride(1) != 1:
            return f"{name} has a last stride of {t.stride(1)}, not 1"
        if t.data_ptr() % 16 or _row_stride(t) * t.element_size() % 16 or _row_stride(t) < t.shape[1]:
            return f"{name} has rows {t.stride(0)} elements apart; rows must not overlap and start on 16 bytes"
    return None


def _device_obstacle(device: torch.device) -> str | None:
    if family(device) != "nvidia":
        return f"{device.type} is not CUDA"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9:
        return f"compute capability {properties.major}.{properties.minor} is below 9.0, the first that copies tiles by descriptor"
    there, needed = getattr(properties, "shared_memory_per_block_optin", 0), TILE.shared_memory(2)
    return f"a block has {there} bytes of shared memory and a tile takes {needed}" if there < needed else None


def _row_stride(t: Tensor) -> int:
    """Elements from row to row; of a row that has no next, what a descriptor accepts."""
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
    """(N, D) hidden, (V, D) weight, (V,) bias, (N,) ids -> (N,) fp32 losses of the logits hidden @ weight.T + bias.

    ``runs_on`` says what hidden and weight must be; bias, target and class_weight are contiguous.
    """
    loss, target_logit = _numbers_of_rows(2, hidden)
    _fill(
        hidden, weight, bias, target, class_weight, target_logit, (loss, None, None, None, None),
        ignore_index=ignore_index, scale=scale, softcap=softcap, lse_square_scale=lse_square_scale,
    )  # fmt: skip
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
    """``row_loss`` and, of the logits it sees: (loss, lse, log-probability of the target, entropy, first class of the largest logit).

    Each is (N,) fp32, but for int64 classes; entropy and argmax are None where they are not asked for. Of an ignored row the numbers are 0
    and of a bad target NaN; the class of both is -1, or -2 where -1 is ignore_index. A row with NaN has some class.
    """
    loss, lse, target_logprob, target_logit = _numbers_of_rows(4, hidden)
    entropies = torch.empty_like(loss) if entropy else None
    classes = torch.empty_like(loss, dtype=torch.int64) if argmax else None
    _fill(
        hidden, weight, bias, target, class_weight, target_logit, (loss, lse, target_logprob, entropies, classes),
        ignore_index=ignore_index, scale=scale, softcap=softcap, lse_square_scale=lse_square_scale,
    )  # fmt: skip
    return loss, lse, target_logprob, entropies, classes


def _numbers_of_rows(count: int, hidden: Tensor) -> tuple[Tensor, ...]:
    return torch.empty(count, hidden.shape[0], dtype=torch.float32, device=hidden.device).unbind()


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
    """Fill the outputs that are given, as many rows at a time as ``PARTS_BUDGET`` holds the parts of."""
    (n, d), v, tiles = hidden.shape, weight.shape[0], triton.cdiv(weight.shape[0], TILE.block_v)
    if n == 0:
        return
    _, _, _, entropy, argmax = outputs
    numbers_of_part = 2 + (entropy is not None) + (argmax is not None)
    most = max(LEAST_ROWS, PARTS_BUDGET // (4 * numbers_of_part * tiles) // TILE.block_n * TILE.block_n)
    tops, excesses = torch.empty(2, tiles * min(n, most), dtype=torch.float32, device=hidden.device).unbind()
    shortfalls = None if entropy is None else torch.empty_like(tops)
    firsts = None if argmax is None else torch.empty_like(tops, dtype=torch.int32)
    parts = (tops, excesses, shortfalls, firsts)

    def launch() -> None:
        for start in range(0, n, most):
            rows = min(n - start, most)
            chunk = slice(start, start + rows)
            programs = min(triton.cdiv(rows, TILE.block_n) * tiles, multiprocessors(hidden.device))
            tile_stats_kernel[(programs,)](
                hidden[chunk], weight, bias, target[chunk], *parts, target_logit[chunk],
                _row_stride(hidden), _row_stride(weight), rows, v, d, ignore_index, scale, softcap,
                BLOCK_N=TILE.block_n, BLOCK_V=TILE.block_v, BLOCK_D=TILE.block_d, GROUP=TILE.group,
                num_warps=TILE.num_warps, num_stages=TILE.num_stages, **UNFUSED,
            )  # fmt: skip
            merge_tiles_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
                *parts, target[chunk], target_logit[chunk], class_weight,
                *(None if t is None else t[chunk] for t in outputs), rows, v, tiles, ignore_index, lse_square_scale,
                BLOCK_N=MERGE_ROWS, BLOCK_T=MERGE_TILES, num_warps=MERGE_WARPS, **UNFUSED,
            )  # fmt: skip

    with on_device_of(hidden):
        _with_descriptors(hidden.device, launch)


def _with_descriptors(device: torch.device, launch: Callable[[], None]) -> None:
    """Launch kernels that make descriptors, which live in memory that triton asks the thread that launches for."""

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        launch()

    # the caller's allocator is in the context, so a copy of that leaves it alone; triton 3.4 has one for the process, and keeps ours
    contextvars.copy_context().run(run)
