"""Tables of block widths, occupancy and the device guard for launches. Plain Python."""

import ctypes
import functools
import sys
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from .devices import Device, multiprocessors


@dataclass(frozen=True)
class LaunchConfig:
    """Classes per block and warps per program."""

    block_v: int
    num_warps: int


@dataclass(frozen=True)
class SliceConfig(LaunchConfig):
    """A slice of a row, and the programs of it that an SM holds (sm_80 to sm_120, triton 3.7.1):
    ``limited`` where the device limits registers per thread to ``most_registers``."""

    programs: int = 1
    limited: int | None = None
    most_registers: int | None = None

    def bytes_in_flight(self, device: Device, itemsize: int) -> int:
        """Bytes of logits that an SM has loaded or is loading."""
        programs = self.programs
        if device.limits_registers and self.limited is not None:
            programs = self.limited
        return programs * self.block_v * itemsize


class LossOptions(TypedDict):
    """Options of kernels of a loss. Each is None where it has no effect, and compiled away."""

    scale: float | None
    softcap: float | None
    smoothing: float | None
    lse_square_scale: float | None


# fusing a product into the subtraction of the rounded maximum leaves the rounding error of the
# product, and then a loss that should be 0 is -1e-6
UNFUSED = {"enable_fp_fusion": False}
# kernels count the classes of a row in 32 bits, including those of the last block past the end
MOST_CLASSES = 2**31 - 2**16


@functools.cache
def row_blocks(v: int) -> LaunchConfig:
    """Blocks of kernels that loop over a row: 8 classes a thread, which are 16 bytes of bf16.

    Wider blocks spill in the statistics loops on sm_80 to sm_100 (triton 3.7.1).
    """
    if v > MOST_CLASSES:
        limit = f"kernels take at most {MOST_CLASSES}"
        raise ValueError(f"rows have {v} classes but {limit}; impl='torch' takes more")
    block_v = min(max(128, 1 << (v - 1).bit_length()), 2048)
    return LaunchConfig(block_v, max(1, block_v // 256))


@functools.cache
def stats_blocks(v: int, *, shaping: bool) -> LaunchConfig:
    """Blocks of the statistics of rows against class ids: 16 classes a thread, or 8 where a softcap
    or smoothing needs registers for each."""
    config = row_blocks(v)
    return config if v <= 2048 or shaping else LaunchConfig(4096, 8)


@functools.cache
def grad_blocks(v: int, *, shaping: bool) -> LaunchConfig:
    """Blocks of the gradient from statistics: 32 classes a thread, or 8 where a softcap, smoothing
    or an entropy needs registers for each."""
    config = row_blocks(v)
    if shaping:
        return config
    block_v = min(max(128, 1 << max(v - 1, 0).bit_length()), 8192)
    return LaunchConfig(block_v, max(1, block_v // 1024))


# programs an SM that hide the latency of memory, for rows that are split because they are few
PROGRAMS_AN_SM = 4
MOST_PARTS = 64


def row_parts(n: int, v: int, config: LaunchConfig, device: torch.device) -> int:
    """Parts of a row, each of a program of its own, so that few rows fill the device; a power of
    two."""
    parts, room = 1, PROGRAMS_AN_SM * multiprocessors(device)
    while 2 * parts * n <= room and 2 * parts * config.block_v <= v and parts < MOST_PARTS:
        parts *= 2
    return parts


@dataclass(frozen=True)
class FusedTable:
    """Blocks of the fused kernels, for one family of devices and one size of logit.

    A row that fits one of ``rows`` is computed by one program; narrower blocks have as many classes
    per thread as the first of ``rows``. A longer row is split into slices of one of ``slices``,
    which are sorted widest first; without slices it is read twice.
    """

    rows: tuple[LaunchConfig, ...]
    slices: tuple[SliceConfig, ...]


# by family, bytes of a logit, and whether a softcap or smoothing is given, which need registers for
# every class. The shares in the comments are of the speed of copying the logits, on an H100
FUSED_TABLES: dict[tuple[str, int, bool], FusedTable] = {
    # bf16. Rows of 8192 with 8 warps 0.983, of 16000 with 16 warps 0.982. Slices of 16384 with 4
    # warps 0.961 at 128256, 0.943 at 32001, 0.918 at 262147; of 8192 0.946 at 151643; of 4096 with
    # 4 warps 0.940 at 50304, 0.900 at 50257. These were measured with 4 programs an SM of 8192 and
    # 6 of 4096, which need the limits: a dozen registers are spilled, once a row (triton 3.7.1)
    ("nvidia", 2, False): FusedTable(
        rows=(LaunchConfig(8192, 8), LaunchConfig(16384, 16)),
        slices=(
            SliceConfig(16384, 4, programs=2),
            SliceConfig(8192, 4, programs=2, limited=4, most_registers=128),
            SliceConfig(4096, 4, programs=4, limited=6, most_registers=80),
        ),
    ),
    # rows of 32000 with 32 warps 0.975, of 8192 with 32 warps 0.988 in a prototype; here 8 warps
    # issue 17 instructions an element and 32 warps 46. Between them 32 warps spill (triton 3.6).
    # Slices of 8192 with 4 warps 0.973 at 65536, 0.961 at 128256; of 4096 or 8192
    # with 4 or 8 warps 0.961 at 32001, 0.952 at 50257, 0.917 at 262147
    ("nvidia", 4, False): FusedTable(
        rows=(LaunchConfig(8192, 8), LaunchConfig(16384, 16), LaunchConfig(32768, 32)),
        slices=(SliceConfig(8192, 4, programs=2), SliceConfig(4096, 4, programs=3)),
    ),
    # not measured: no spills on sm_80 to sm_100, two programs an SM; rows of 16384 spill with 16
    # warps (triton 3.9)
    ("nvidia", 2, True): FusedTable(
        rows=(LaunchConfig(8192, 8), LaunchConfig(16384, 32)),
        slices=(SliceConfig(4096, 4, programs=2),),
    ),
    # not measured: no spills on sm_80 to sm_100, three programs an SM
    ("nvidia", 4, True): FusedTable(
        rows=(LaunchConfig(8192, 32), LaunchConfig(16384, 32)),
        slices=(SliceConfig(2048, 4, programs=3),),
    ),
    # not measured: no spills on gfx942, whose programs have at most 16 wavefronts of 64. No slices:
    # that the programs of a row may wait for one another is not verified there
    ("amd", 2, False): FusedTable((LaunchConfig(8192, 4), LaunchConfig(16384, 8)), ()),
    ("amd", 4, False): FusedTable((LaunchConfig(8192, 4), LaunchConfig(32768, 16)), ()),
    ("amd", 2, True): FusedTable((LaunchConfig(8192, 8),), ()),
    ("amd", 4, True): FusedTable((LaunchConfig(8192, 8),), ()),
}


def predicted(slices: int, config: SliceConfig, v: int, itemsize: int, device: Device) -> float:
    """The share of the speed of copying the logits that a row split in this way reaches.

    The latency of memory limits it: on an H100 0.95 was measured with 64 KiB in flight an SM and
    0.90 with 48, and the curve goes through these two points. A device with more bandwidth an SM
    needs more bytes. Padding takes as long as classes.
    """
    kib = config.bytes_in_flight(device, itemsize) / 1024 / device.pressure
    return v / (slices * config.block_v) / (1.0 + (21.3 / kib) ** 2.7)


# unaligned rows with fewer classes are read element by element by one program; not measured
LEAST_UNALIGNED_SPLIT = 2048


@dataclass(frozen=True)
class FusedPlan:
    """Rows of a fused launch are whole, split into slices of ``block_v``, or read in two sweeps."""

    kind: Literal["whole", "split", "sweeps"]
    block_v: int = 0
    num_warps: int = 0
    slices: int = 0
    most_registers: int | None = None
    # programs resident on the device at once; known once the kernel is compiled
    resident: int | None = None


SWEEPS = FusedPlan("sweeps")


def fused_plan(
    device: Device,
    v: int,
    itemsize: int,
    *,
    wide: bool,
    most_lead: int | None,
    shaping: bool,
) -> FusedPlan:
    """The table's choice for rows of ``v`` classes.

    ``wide``: rows start at multiples of 16 elements, so that masked accesses are vectorized.
    ``most_lead``: the largest distance of a row from the 16-byte boundary before it, in elements;
    None where logits and gradient differ in it. ``shaping``: a softcap or smoothing is given.
    """
    table = FUSED_TABLES.get((device.family, itemsize, shaping))
    if table is None:
        return SWEEPS
    split = most_lead is not None and len(table.slices) > 0 and v >= LEAST_UNALIGNED_SPLIT
    if v <= table.rows[-1].block_v and (wide or not split):
        row = next(c for c in table.rows if v <= c.block_v)
        block_v = min(row.block_v, max(128, 1 << (v - 1).bit_length()))
        return FusedPlan("whole", block_v, max(1, row.num_warps * block_v // row.block_v))
    if not split:
        return SWEEPS
    assert most_lead is not None
    counts = [(-(-(v + most_lead) // c.block_v), c) for c in table.slices]
    shares = [predicted(k, c, v, itemsize, device) for k, c in counts]
    k, config = counts[shares.index(max(shares))]
    most_registers = config.most_registers if device.limits_registers else None
    return FusedPlan("split", config.block_v, config.num_warps, k, most_registers)


def resident_programs(compiled: Any, device: torch.device) -> int:
    """Programs of a compiled and loaded kernel that are resident on an NVIDIA GPU at once."""
    threads = 32 * int(compiled.metadata.num_warps)
    per_multiprocessor = _occupancy(compiled, threads)
    if per_multiprocessor is None:
        # from registers, which are allocated in multiples of 8; one program less, as a margin for
        # the other limits
        registers = -(-int(getattr(compiled, "n_regs", None) or 255) // 8) * 8
        per_multiprocessor = max(1, min(65536 // (registers * threads), 1024 // threads) - 1)
    return per_multiprocessor * multiprocessors(device)


def _occupancy(compiled: Any, threads: int) -> int | None:
    """Programs an SM, from the driver.

    None if there is no driver, or if Triton does not expose the function that it loaded.
    """
    function = getattr(compiled, "function", None)
    shared = getattr(compiled.metadata, "shared", None)
    driver = _cuda_driver()
    if not isinstance(function, int) or not isinstance(shared, int) or driver is None:
        return None
    count = ctypes.c_int(0)
    status = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(count),
        ctypes.c_void_p(function),
        ctypes.c_int(threads),
        ctypes.c_size_t(shared),
    )
    return count.value if status == 0 else None


@functools.cache
def _cuda_driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


# the interpreter has one grid and one builder for the whole process (triton 3.7), so that its
# launches must not overlap
_interpreter = threading.RLock()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which to launch: the tensor's device is current, because Triton launches there.

    For CPU tensors it is the interpreter's lock.
    """
    if tensor.device.type == "cpu":
        return _interpreter
    return torch.get_device_module(tensor.device).device(tensor.device)
