"""How we time and how we weigh: variants interleaved in one process, medians, memory in a pass of its own."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repeats of one variant."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Timing":
        if len(milliseconds) < 2:
            return cls(*milliseconds * 3)
        tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
        return cls(tenths[1], statistics.median(milliseconds), tenths[7])


def synchronize(device: torch.device) -> None:
    """Wait for what was launched, so that a clock read next is about it."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, tick: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Wall time of each variant, one call of each in turn, after one round that is not counted; results are dropped outside the clock."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, run in variants.items():
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            result = run()
            synchronize(device)
            taken[name].append((time.perf_counter() - start) * 1e3)
            del result
            tick()
    return {name: Timing.of(ms[1:]) for name, ms in taken.items()}


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory a call holds beyond what was held before it; None where neither CUDA nor Linux can tell.

    CUDA: the allocator's peak. CPU: the process's high-water mark, reset before the call, so other threads count too; memory that was
    freed but kept by malloc is given back first, or a call would seem to need none.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device.type != "cpu" or not clear.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    clear.write_text("5")
    before = _kilobytes(status, "VmRSS")
    result = run()
    peak = _kilobytes(status, "VmHWM")
    del result
    return max(0, peak - before) * 1024


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field + ":"))
