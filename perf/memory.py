"""Where a call's memory goes: the peak, the way there and back, and who holds what at the peak, on
CUDA and on the CPU."""

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

# they only make room for the operator above them
ROOM_MAKERS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
ENGINE = "autograd::engine::evaluate_function: "


class Change(NamedTuple):
    """An allocation or a free: when, ``bytes`` held after it, ``change`` by it, and where the
    memory was (once) allocated."""

    ms: float
    bytes: int
    change: int
    where: str


@dataclass(frozen=True)
class Alive:
    """What one place in the program holds at the peak; ``share`` is of the peak, ``stack`` of the
    largest allocation, innermost first."""

    where: str
    bytes: int
    count: int
    share: float
    stack: tuple[str, ...]


@dataclass(frozen=True)
class MemoryProfile:
    """One call's memory, in bytes beyond what was held before it; of several equal peaks the first.

    ``timeline`` holds from each change to the next, ``alive`` sums to the peak. Times are the
    recorded call's; recording slows it."""

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
    """As an allocator reports it: ``size`` is 0 for a free."""

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
    """Call ``fn`` once under the allocator's eye and say what it held, when, and for whom.

    Every allocation the call makes on ``device`` (default: CUDA where there is one, else the CPU)
    is followed to its free; autograd's threads are included. What ``fn`` returns is held to the end
    of the measurement and counts as held; it is dropped afterwards.

    Only the call's own allocations count. Freeing what was there before lowers nothing, because
    torch does not report the size of such a free on the CPU: a step that replaces its gradients
    counts the new ones in full. Nothing is negative, and ``alive`` is all of the peak.

    CUDA: requested bytes, as in ``requested_bytes.all.peak``; the allocator's blocks are up to 512
    bytes larger each, a few up to 1 MiB. A block that another stream still uses counts until it may
    be used again. CPU: torch's allocator, to the byte. Memory that does not pass through it
    (NumPy's, pinned or shared memory, a library's scratch space) is not seen, nor are threads that
    ``fn`` starts itself.

    Args:
        fn: anything callable without arguments, a whole training step for example.
        device: whose memory; "cpu" or a CUDA device.
        warmup: calls made before the recorded one, so that what is done once does not count.

    Raises:
        ValueError: a device of another kind, CUDA where there is none, or a negative ``warmup``.
        RuntimeError: CUDA's memory history, or a torch profiler, is recording already.
        Whatever ``fn`` raises, out of memory included; the recording is off by then.
    """
    device = torch.device(
        device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and not torch.cuda.is_available()
    ):
        raise Mistake(
            f"device is {str(device)!r}, expected 'cpu' or a CUDA device that torch can see"
        )
    if warmup < 0:
        raise Mistake(f"warmup is {warmup}, expected 0 or more")
    for _ in range(warmup):
        fn()
    gc.collect()
    synchronize(device)
    if device.type == "cpu":
        # a second profiler would end the first without a word
        if torch._C._autograd._profiler_enabled():
            raise RuntimeError(
                "a torch profiler is recording already; end it before profile_memory"
            )
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, with_stack=True
        ) as profiler:
            start = time.time_ns()
            result = fn()
            end = time.time_ns()
        events = _cpu_events(profiler.profiler.kineto_results.experimental_event_tree())
    else:
        if torch._C._cuda_isHistoryEnabled():
            raise RuntimeError(
                "CUDA's memory history is being recorded already; torch.cuda.memory._record_memory_history(None) ends that"
            )
        # C++ frames name the operators and the backward nodes, which have no Python frame; torch
        # unwinds them on Linux only
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
        events = _cuda_events(
            snapshot, torch.cuda.current_device() if device.index is None else device.index
        )
    del result
    return _replay(events, start, end, str(device))


def _replay(events: list[_Event], start: int, end: int, device: str) -> MemoryProfile:
    """Follow each address from its allocation to its free; ``events`` in the order they happened,
    times in ns."""
    live: dict[int, _Event] = {}
    largest: dict[str, _Event] = {}
    timeline = [Change(0.0, 0, 0, "")]

    def change(ns: int, by: int, where: str) -> None:
        # the clocks of the call and of its events may differ by microseconds
        timeline.append(
            Change(max(timeline[-1].ms, (ns - start) / 1e6), timeline[-1].bytes + by, by, where)
        )

    for event in events:
        # also before an allocation: an address given out again was freed where nobody recorded
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
    """Operator and nearest line of the user's, or of the node that backward runs for, out of a
    stack, innermost first; and the stack."""
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
        (name for name in operators if name not in ROOM_MAKERS), operators[-1] if operators else ""
    )
    return ", ".join(dict.fromkeys(filter(None, (operator, place)))) or "unknown", tuple(stack)


@functools.lru_cache(1 << 16)
def _line(file: str, line: int, function: str) -> str:
    """A Python frame as 'folder/file.py:12 in function', the file relative to where imports
    look."""
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


def _cpu_events(tree: list[Any]) -> list[_Event]:
    """The profiler's allocations, each with the operators and Python calls around it."""
    # a path is (the path outside it, event), so that what many allocations share is kept and
    # described once
    forward: dict[int, Any] = {}
    found: list[tuple[Any, Any]] = []
    todo: list[tuple[Any, Any]] = [(event, None) for event in reversed(tree)]

    def is_backward(event: Any) -> bool:
        return event.extra_fields.scope == RecordScope.BACKWARD_FUNCTION or event.name.startswith(
            ENGINE
        )

    while todo:
        event, path = todo.pop()
        if event.tag == _EventType.Allocation:
            found.append((event, path))
        elif event.tag in (_EventType.TorchOp, _EventType.PyCall, _EventType.PyCCall):
            path = (path, event)
            # an operator reads the counter that numbers the next node: the last to read n makes
            # node n
            if (
                event.tag == _EventType.TorchOp
                and event.extra_fields.sequence_number >= 0
                and not is_backward(event)
            ):
                forward[event.extra_fields.sequence_number] = path
        todo += [(child, path) for child in reversed(event.children)]

    def made_at(number: int) -> str | None:
        # not through another node: each thread numbers its own, so that way may lead in circles
        found = (
            step
            for step in steps(forward.get(number), False)
            if step[0] == "node" or _is_users(step)
        )
        kind, text = next(found, ("node", ""))
        return text if kind == "python" else None

    def steps(path: Any, follow: bool = True) -> Iterator[_Step]:
        in_python = False
        while path is not None:
            path, event = path
            fields = event.extra_fields
            if event.tag == _EventType.TorchOp:
                if event.name.startswith(ENGINE):
                    line = made_at(fields.sequence_number) if follow else None
                    yield (
                        "node",
                        f"backward of {line}"
                        if line
                        else f"backward, {_bare(event.name.removeprefix(ENGINE))}",
                    )
                else:
                    yield ("operator", _bare(event.name))
                continue
            # a call knows the line it was made on; of the innermost function only the first line is
            # known
            frames = (
                [fields.caller]
                if in_python or event.tag == _EventType.PyCCall
                else [fields.callsite, fields.caller]
            )
            in_python = True
            for frame in frames:
                if _is_ours(frame.file_name, frame.function_name):
                    return
                yield ("python", _line(frame.file_name, frame.line_number, frame.function_name))

    known: dict[int, tuple[str, tuple[str, ...]]] = {}
    events = []
    for event, path in found:
        fields = event.extra_fields
        if fields.device.type != "cpu":
            continue
        if fields.alloc_size > 0 and id(path) not in known:
            known[id(path)] = _describe(steps(path))
        where, stack = known[id(path)] if fields.alloc_size > 0 else ("", ())
        events.append(
            _Event(event.start_time_ns, fields.ptr, max(0, fields.alloc_size), where, stack)
        )
    return sorted(events, key=lambda event: event.ns)


def _cuda_events(snapshot: dict[str, Any], index: int) -> list[_Event]:
    """The allocations and frees of one device out of a snapshot's trace; segments and requests to
    free are passed over."""

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
