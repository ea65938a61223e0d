"""Measurement: variants timed in turn in one process, medians, memory in a separate pass."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repeats of one variant."""

    p20: float
    p50: float
    p80: float
    repeats: int = 1

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Timing":
        if len(milliseconds) < 2:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0])
        tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
        return cls(tenths[1], statistics.median(milliseconds), tenths[7], len(milliseconds))


@dataclass(frozen=True)
class Step:
    """A timed call, and an untimed one that prepares its arguments.

    A method that overwrites its input gets a new one."""

    run: Callable[..., object]
    prepare: Callable[[], tuple[Any, ...]] = tuple


def synchronize(device: torch.device) -> None:
    """Wait for all launched work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def time_interleaved(
    steps: Mapping[str, Step],
    device: torch.device,
    repeats: int,
    seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Time one call of each step in turn; the first round does not count.

    CUDA: events around the call, after the L2 cache is overwritten and while the device is busy, so
    that Python's launches are hidden. Elsewhere: wall clock. Results are freed outside the time.
    After three rounds no round begins that would end later than ``seconds`` after the first."""
    clock = _cuda_milliseconds(device) if device.type == "cuda" else _wall_milliseconds(device)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    begin = time.perf_counter()
    for done in range(repeats + 1):
        for name, step in steps.items():
            arguments = step.prepare()
            taken[name].append(clock(step.run, arguments))
            del arguments
        if done >= 3 and (time.perf_counter() - begin) * (done + 2) / (done + 1) > seconds:
            break
    return {name: Timing.of(ms[1:]) for name, ms in taken.items()}


Clock = Callable[[Callable[..., object], tuple[Any, ...]], float]


def _wall_milliseconds(device: torch.device) -> Clock:
    def clock(run: Callable[..., object], arguments: tuple[Any, ...]) -> float:
        synchronize(device)
        start = time.perf_counter()
        result = run(*arguments)
        synchronize(device)
        taken = time.perf_counter() - start
        del result
        return taken * 1e3

    return clock


def _cuda_milliseconds(device: torch.device) -> Clock:
    cache = torch.empty(
        max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size),
        dtype=torch.int8,
        device=device,
    )

    def clock(run: Callable[..., object], arguments: tuple[Any, ...]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        # about a millisecond, in which Python launches the call
        torch.cuda._sleep(2_000_000)
        start.record()
        result = run(*arguments)
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end)

    return clock


def peak_extra_bytes(step: Step, device: torch.device) -> int | None:
    """Peak memory of a call beyond that before it, result included; None if unknown.

    CUDA: the allocator's peak. CPU: the high-water mark of the process, which includes other
    threads. Memory cached by malloc is returned to the system first, or the call could reuse it."""
    gc.collect()
    arguments = step.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step.run(*arguments)
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
    result = step.run(*arguments)
    peak = _kilobytes(status, "VmHWM")
    del result
    return max(0, peak - before) * 1024


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated, with torch's cache on CUDA; None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    return _kilobytes(info, "MemAvailable") * 1024


def _kilobytes(status: Path, field: str) -> int:
    return next(
        int(line.split()[1])
        for line in status.read_text().splitlines()
        if line.startswith(field + ":")
    )
