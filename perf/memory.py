"""Memory profile of a call on CUDA or the CPU: its peak, its timeline, its places at the peak."""

import functools
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._C._profiler import RecordScope, _EventType

from .mistakes import Mistake
from .protocol import synchronize

if TYPE_CHECKING:
    import pandas as pd

# allocate memory for the operator that calls them
ALLOCATORS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
ENGINE = "autograd::engine::evaluate_function: "


class Change(NamedTuple):
    """An allocation or a free: time, ``bytes`` after it, ``change``, place of the allocation."""

    ms: float
    bytes: int
    change: int
    where: str


@dataclass(frozen=True)
class Alive:
    """Allocations of one place at the peak, and the ``stack`` of the largest, innermost first."""

    where: str
    bytes: int
    count: int
    share: float
    stack: tuple[str, ...]


@dataclass(frozen=True)
class MemoryProfile:
    """Memory of one call in bytes beyond the start; of several equal peaks the first.

    ``alive`` sums to the peak. Times are those of the recorded call, which recording slows."""

    device: str
    peak_bytes: int
    peak_ms: float
    end_bytes: int
    timeline: tuple[Change, ...]
    alive: tuple[Alive, ...]

    def frame(self) -> "pd.DataFrame":
        """The timeline as a frame with the columns of :class:`Change`."""
        import pandas as pd

        return pd.DataFrame(self.timeline, columns=Change._fields)


class _Event(NamedTuple):
    """An event of the allocator; ``size`` is 0 for a free."""

    ns: int
    address: int
    size: int
    where: str
    stack: tuple[str, ...]


# one level of a stack: "operator", "node" (of the backward graph) or "python", and its name
_Step = tuple[str, str]


def profile_memory(
    fn: Callable[[], object], *, device: torch.device | str | None = None, warmup: int = 1
) -> MemoryProfile:
    """Call ``fn`` once and record every allocation on ``device`` (default: CUDA, else the CPU).

    Each allocation is followed to its free, also in autograd's threads. The result of ``fn`` stays
    allocated until the recording ends and is freed afterwards.

    Only allocations of the call count. A free of older memory lowers nothing, because torch does
    not report its size on the CPU: a step that replaces its gradients counts the new ones in full.

    CUDA: requested bytes, as in ``requested_bytes.all.peak``; the allocator's blocks are up to 512
    bytes larger each, a few up to 1 MiB. A block that another stream still uses counts until it can
    be reused. CPU: torch's allocator, to the byte. Other memory (NumPy's, pinned or shared memory,
    scratch space of a library) and threads that ``fn`` starts are not seen.

    Args:
        fn: a function without arguments, for example a whole training step.
        device: "cpu" or a CUDA device.
        warmup: calls before the recorded one, so that one-time work does not count.

    Raises:
        ValueError: another kind of device, CUDA where there is none, or a negative ``warmup``.
        RuntimeError: CUDA's memory history, or a torch profiler, is recording already.
        Any exception of ``fn``, out of memory included; the recording has ended by then.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    known = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    if not known:
        found = f"device is {str(device)!r}"
        raise Mistake(f"{found}, expected 'cpu' or a CUDA device that torch can see")
    if warmup < 0:
        raise Mistake(f"warmup is {warmup}, expected 0 or more")
    for _ in range(warmup):
        fn()
    gc.collect()
    synchronize(device)
    record = _record_cpu if device.type == "cpu" else _record_cuda
    return _replay(*record(fn, device), str(device))


def _record_cpu(fn: Callable[[], object], device: torch.device) -> tuple[list[_Event], int, int]:
    """Events of a call, and the times of its start and end in ns."""
    # a second profiler would end the first silently
    if torch._C._autograd._profiler_enabled():
        raise RuntimeError("a torch profiler is recording already; end it before profile_memory")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, with_stack=True
    ) as profiler:
        start = time.time_ns()
        result = fn()
        end = time.time_ns()
    del result
    return _cpu_events(profiler.profiler.kineto_results.experimental_event_tree()), start, end


def _record_cuda(fn: Callable[[], object], device: torch.device) -> tuple[list[_Event], int, int]:
    if torch._C._cuda_isHistoryEnabled():
        stop = "torch.cuda.memory._record_memory_history(None)"
        raise RuntimeError(f"CUDA's memory history is being recorded already; {stop} ends that")
    # operators and backward nodes have C++ frames alone, which torch unwinds on Linux only
    stacks = "all" if sys.platform == "linux" else "python"
    torch.cuda.memory._record_memory_history(context="alloc", stacks=stacks)
    try:
        start = time.time_ns()
        result = fn()
        synchronize(device)
        end = time.time_ns()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    del result
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_events(snapshot, index), start, end


def _replay(events: list[_Event], start: int, end: int, device: str) -> MemoryProfile:
    """Follow each address from its allocation to its free; ``events`` are in order of time."""
    live: dict[int, _Event] = {}
    largest: dict[str, _Event] = {}
    timeline = [Change(0.0, 0, 0, "")]

    def change(ns: int, by: int, where: str) -> None:
        # the clocks of the call and of its events may differ by microseconds
        timeline.append(
            Change(max(timeline[-1].ms, (ns - start) / 1e6), timeline[-1].bytes + by, by, where)
        )

    for event in events:
        # also before an allocation: a reused address was freed outside the recording
        freed = live.pop(event.address, None)
        if freed is not None:
            change(event.ns, -freed.size, freed.where)
        if event.size:
            live[event.address] = event
            largest[event.where] = max(
                largest.get(event.where, event), event, key=lambda event: event.size
            )
            change(event.ns, event.size, event.where)
    change(end, 0, "")

    top = max(range(len(timeline)), key=lambda i: timeline[i].bytes)
    peak = timeline[top]
    held: dict[str, list[int]] = {}
    for past in timeline[: top + 1]:
        total = held.setdefault(past.where, [0, 0])
        total[0] += past.change
        total[1] += 1 if past.change > 0 else -1
    alive = [
        Alive(where, size, count, size / peak.bytes, largest[where].stack)
        for where, (size, count) in held.items()
        if size
    ]
    alive.sort(key=lambda group: -group.bytes)
    return MemoryProfile(
        device, peak.bytes, peak.ms, timeline[-1].bytes, tuple(timeline), tuple(alive)
    )


def _describe(steps: Iterator[_Step]) -> tuple[str, tuple[str, ...]]:
    """Name a place by its operator and the user's line or the backward node; and the stack.

    ``steps`` are innermost first."""
    operators: list[str] = []
    stack: list[str] = []
    place, in_python = "", False
    for kind, text in steps:
        in_python |= kind == "python"
        if kind == "operator" and not in_python and not place:
            operators.append(text)
        if not place and (kind == "node" or _is_users((kind, text))):
            place = text
        if stack[-1:] != [text]:
            stack.append(text)
    operator = next(
        (name for name in operators if name not in ALLOCATORS), operators[-1] if operators else ""
    )
    return ", ".join(dict.fromkeys(filter(None, (operator, place)))) or "unknown", tuple(stack)


@functools.lru_cache(1 << 16)
def _line(file: str, line: int, function: str) -> str:
    """A Python frame as 'folder/file.py:12 in function', relative to the import path."""
    paths = {"", os.path.dirname(os.path.dirname(torch.__file__)), *sys.path}
    roots = sorted(
        (os.path.join(os.path.abspath(path), "") for path in paths), key=len, reverse=True
    )
    root = next((root for root in roots if file.startswith(root)), "")
    return f"{file[len(root) :]}:{line} in {function}".replace("\\", "/")


def _is_users(step: _Step) -> bool:
    return step[0] == "python" and not step[1].startswith(("torch/", "<frozen"))


def _bare(name: str) -> str:
    return name.removeprefix("aten::").removeprefix("torch::autograd::")


def _is_ours(file: str, function: str) -> bool:
    return function == profile_memory.__name__ and os.path.basename(file) == os.path.basename(
        __file__
    )


# a linked list of events from an allocation outwards: (rest, event) or None; allocations share it
_Path = Any


def _is_backward(event: Any) -> bool:
    scope = event.extra_fields.scope
    return scope == RecordScope.BACKWARD_FUNCTION or event.name.startswith(ENGINE)


def _walk(tree: list[Any]) -> tuple[list[tuple[Any, _Path]], dict[int, _Path]]:
    """Allocations with their paths, and the path of the operator that made each graph node."""
    forward: dict[int, _Path] = {}
    found: list[tuple[Any, _Path]] = []
    todo: list[tuple[Any, _Path]] = [(event, None) for event in reversed(tree)]
    while todo:
        event, path = todo.pop()
        if event.tag == _EventType.Allocation:
            found.append((event, path))
        elif event.tag in (_EventType.TorchOp, _EventType.PyCall, _EventType.PyCCall):
            path = (path, event)
            # an operator reads the counter of nodes: the last one to read n makes node n
            operator = event.tag == _EventType.TorchOp and not _is_backward(event)
            if operator and event.extra_fields.sequence_number >= 0:
                forward[event.extra_fields.sequence_number] = path
        todo += [(child, path) for child in reversed(event.children)]
    return found, forward


def _cpu_steps(path: _Path, forward: dict[int, _Path] | None) -> Iterator[_Step]:
    """The stack of a path; a backward node has its forward line if ``forward`` is given."""
    in_python = False
    while path is not None:
        path, event = path
        fields = event.extra_fields
        if event.tag == _EventType.TorchOp:
            if event.name.startswith(ENGINE):
                line = _forward_line(forward, fields.sequence_number) if forward else None
                name = _bare(event.name.removeprefix(ENGINE))
                yield "node", f"backward of {line}" if line else f"backward, {name}"
            else:
                yield "operator", _bare(event.name)
            continue
        # a call knows its line; of the innermost function only the first line is known
        inner = event.tag == _EventType.PyCall and not in_python
        frames = [fields.callsite, fields.caller] if inner else [fields.caller]
        in_python = True
        for frame in frames:
            if _is_ours(frame.file_name, frame.function_name):
                return
            yield "python", _line(frame.file_name, frame.line_number, frame.function_name)


def _forward_line(forward: dict[int, _Path], number: int) -> str | None:
    # not through another node: each thread numbers its own, so that could loop forever
    steps = _cpu_steps(forward.get(number), None)
    kind, text = next((s for s in steps if s[0] == "node" or _is_users(s)), ("node", ""))
    return text if kind == "python" else None


def _cpu_events(tree: list[Any]) -> list[_Event]:
    """The profiler's allocations, each with the operators and Python calls around it."""
    found, forward = _walk(tree)
    known: dict[int, tuple[str, tuple[str, ...]]] = {}
    events = []
    for event, path in found:
        fields = event.extra_fields
        if fields.device.type != "cpu":
            continue
        if fields.alloc_size > 0 and id(path) not in known:
            known[id(path)] = _describe(_cpu_steps(path, forward))
        where, stack = known[id(path)] if fields.alloc_size > 0 else ("", ())
        size = max(0, fields.alloc_size)
        events.append(_Event(event.start_time_ns, fields.ptr, size, where, stack))
    return sorted(events, key=lambda event: event.ns)


def _cuda_events(snapshot: dict[str, Any], index: int) -> list[_Event]:
    """Allocations and completed frees of one device in the trace of a snapshot."""

    def steps(frames: list[dict[str, Any]]) -> Iterator[_Step]:
        for frame in frames:
            file, name = frame["filename"], frame["name"]
            if file.endswith(".py") or file.startswith("<"):
                if _is_ours(file, name):
                    return
                yield ("python", _line(file, frame["line"], name))
            elif operator := re.search(r"\bat::_ops::(\w+)::(?:call|redispatch)\(", name):
                yield ("operator", operator[1])
            elif node := re.search(r"\btorch::autograd::(?:\w+::)*(\w+)::apply\(", name):
                yield ("node", f"backward, {node[1]}")

    events = []
    for entry in snapshot["device_traces"][index]:
        if entry["action"] in ("alloc", "free_completed"):
            size = entry["size"] if entry["action"] == "alloc" else 0
            where, stack = _describe(steps(entry.get("frames", []))) if size else ("", ())
            events.append(_Event(entry["time_us"] * 1000, entry["addr"], size, where, stack))
    return events
