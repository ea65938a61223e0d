"""The memory profiler: exact bytes, named places, recording always ended, safe pictures."""

import html
import io
import itertools
import json
import re
import sys
import threading
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F

import perf_commands  # noqa: F401  # isort: skip
import pandas as pd
from rich.console import Console

import lossfuse
from browsers import browser, opened, phone
from lossfuse.perf import memory, memory_view
from lossfuse.perf.memory import Alive, Change, MemoryProfile, profile_memory
from lossfuse.perf.memory_view import load_step, save, timeline_chart
from lossfuse.perf.pages import THEMES

N, V = 64, 1000
LOGITS_BYTES = 4 * N * V


def on_cpu(fn, **kwargs):
    """A consistent profile: the timeline adds up, and the peak is the sum of its places."""
    profile = profile_memory(fn, device="cpu", **kwargs)
    require_consistent(profile)
    return profile


def loss_step(loss_fn, rows=N):
    logits, target = torch.randn(rows, V, requires_grad=True), torch.randint(0, V, (rows,))

    def step():
        logits.grad = None
        loss_fn(logits, target).backward()

    return step


def require_consistent(profile):
    steps, sizes = profile.timeline, [group.bytes for group in profile.alive]
    assert [c.bytes for c in steps] == list(itertools.accumulate(c.change for c in steps))
    assert profile.peak_bytes == max(c.bytes for c in steps) == sum(sizes)
    assert profile.end_bytes == steps[-1].bytes and min(c.bytes for c in steps) >= 0
    times = [change.ms for change in steps]
    assert times == sorted(times) and times[0] == 0
    assert sizes == sorted(sizes, reverse=True)
    assert sum(group.share for group in profile.alive) == pytest.approx(1 if sizes else 0)


def test_known_allocations_to_the_byte():
    def step():
        a = torch.ones(1000)
        b = torch.ones(300, dtype=torch.float64)
        del a
        c = torch.ones(7, dtype=torch.int8)
        return b, c

    profile = on_cpu(step)
    assert [change.bytes for change in profile.timeline] == [0, 4000, 6400, 2400, 2407, 2407]
    assert (profile.peak_bytes, profile.end_bytes, profile.device) == (6400, 2407, "cpu")
    alive = [(group.bytes, group.count, group.share) for group in profile.alive]
    assert alive == [(4000, 1, 0.625), (2400, 1, 0.375)]
    first = step.__code__.co_firstlineno
    for line, group in enumerate(profile.alive, first + 1):
        assert group.where.startswith("ones, ")
        assert group.where.endswith(f"test_memory_profile.py:{line} in step")
        assert group.stack[:2] == ("empty", "ones")
        assert "profile_memory" not in " ".join(group.stack)


def test_allocations_of_one_place_are_one_group():
    profile = on_cpu(lambda: [torch.ones(n) for n in (10, 30, 20)])
    assert [(group.bytes, group.count) for group in profile.alive] == [(240, 3)]


@pytest.mark.parametrize("fn", [lambda: None, lambda: torch.empty(0)], ids=["nothing", "no-bytes"])
def test_a_call_that_allocates_nothing(fn, tmp_path):
    profile = on_cpu(fn)
    assert (profile.peak_bytes, profile.end_bytes, profile.alive) == (0, 0, ())
    save(profile, tmp_path / "nothing.png")
    memory_view.show(profile, Console(file=io.StringIO()))


def test_only_allocations_of_the_recorded_call_count():
    older, calls = [torch.ones(100_000) for _ in range(3)], []

    def step():
        older.clear()
        return torch.ones(10)

    assert on_cpu(step, warmup=0).peak_bytes == 40
    first = on_cpu(lambda: older.append(torch.ones(1000)), warmup=0)
    # freed while nothing records: its address may be reused in the next call
    older.clear()
    second = on_cpu(lambda: [torch.ones(1000) for _ in range(4)], warmup=0)
    assert (first.end_bytes, second.peak_bytes) == (4000, 16000)
    assert on_cpu(lambda: calls.append(1) or torch.ones(5), warmup=3).end_bytes == 20
    assert len(calls) == 4


def test_torch_cross_entropy_takes_three_times_the_logits():
    profile = on_cpu(loss_step(F.cross_entropy))
    # three scalars at most: the loss, the total weight, the gradient of the loss
    assert 3 * LOGITS_BYTES <= profile.peak_bytes <= 3 * LOGITS_BYTES + 12
    assert profile.end_bytes == LOGITS_BYTES
    assert [group.bytes for group in profile.alive[:3]] == [LOGITS_BYTES] * 3
    forward, *backward = (group.where.partition(", ") for group in profile.alive[:3])
    assert forward[0] == "_log_softmax" and "backward" not in forward[2]
    # the backward runs no Python; it is traced to the line of the forward
    operators = ("nll_loss_backward", "_log_softmax_backward_data")
    assert backward == [(operator, ", ", f"backward of {forward[2]}") for operator in operators]


def test_lossfuse_takes_little_more_than_the_gradient():
    profile, logits_bytes = on_cpu(loss_step(lossfuse.cross_entropy, 1024)), 4 * 1024 * V
    assert logits_bytes < profile.peak_bytes < 1.1 * logits_bytes
    assert profile.alive[0].bytes == profile.end_bytes == logits_bytes
    assert "lossfuse/" in profile.alive[0].where


class Nested(torch.autograd.Function):
    """Backward inside backward, as in reentrant checkpointing; autograd changes threads if deep."""

    @staticmethod
    def forward(ctx, x, depth, found):
        ctx.depth, ctx.found = depth, found
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        if ctx.depth == 0:
            ctx.found.append((threading.get_native_id(), torch.ones(12345)))
        else:
            with torch.enable_grad():
                leaf = torch.ones(1, requires_grad=True)
                Nested.apply(leaf, ctx.depth - 1, ctx.found).sum().backward()
        return dx, None, None


def test_allocations_of_autograd_threads_are_seen():
    found, leaf = [], torch.ones(1, requires_grad=True)
    profile = on_cpu(lambda: Nested.apply(leaf, 62, found).sum().backward(), warmup=0)
    ((thread, _),) = found
    assert thread != threading.get_native_id()
    largest = profile.alive[0]
    assert 4 * 12345 <= largest.bytes < 5 * 12345
    # its forward line is unknown: each thread numbers its own nodes
    assert largest.where == "ones, backward, NestedBackward"


def test_an_exception_passes_through_and_ends_the_recording():
    def step():
        torch.ones(10)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        on_cpu(step, warmup=0)
    assert on_cpu(lambda: torch.ones(10)).peak_bytes == 40


def test_another_profiler_is_not_ended():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with pytest.raises(RuntimeError, match="recording already"):
            on_cpu(lambda: None)
        torch.ones(3).neg()
    assert "aten::neg" in {event.name for event in profiler.events()}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="device is 'meta', expected 'cpu' or a CUDA device"):
        profile_memory(lambda: None, device="meta")
    with pytest.raises(ValueError, match="warmup is -1"):
        on_cpu(lambda: None, warmup=-1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is 'cuda:0'"):
            profile_memory(lambda: None, device="cuda:0")


def frame(name, line=0, file="??"):
    return {"filename": file, "line": line, "name": name}


def cuda_trace():
    """Two devices' traces as ``torch.cuda.memory._snapshot`` returns them."""
    step = frame("step", 12, "/somewhere/train.py")
    forward = [
        frame("at::detail::empty_generic(c10::ArrayRef<long>)"),
        frame("at::_ops::empty_strided::call(c10::ArrayRef<c10::SymInt>)"),
        frame("at::_ops::_log_softmax::redispatch(c10::DispatchKeySet, at::Tensor const&, long)"),
        frame("at::_ops::cross_entropy_loss::call(at::Tensor const&)"),
        frame("cross_entropy", 3555, F.__file__),
        step,
        frame("profile_memory", 120, memory.__file__),
        frame("<module>", 1, "/somewhere/train.py"),
    ]
    backward = [
        frame("at::_ops::_log_softmax_backward_data::call(at::Tensor const&)"),
        frame("torch::autograd::generated::LogSoftmaxBackward0::apply(std::vector<at::Tensor>&&)"),
        frame("torch::autograd::Engine::evaluate_function(std::shared_ptr<GraphTask>&)"),
    ]
    entries = [
        ("free_requested", 0x10, 5000, 0, None),
        ("free_completed", 0x10, 5000, 0, None),
        ("segment_alloc", 0x1000, 2 << 20, 0.1, forward),
        ("alloc", 0x1000, 1000, 1, forward),
        ("alloc", 0x2000, 300, 2, [frame("helper", 20, "/somewhere/train.py"), step]),
        ("free_requested", 0x2000, 300, 3, None),
        # another stream still uses 0x2000
        ("alloc", 0x3000, 700, 4, backward),
        ("free_completed", 0x2000, 300, 5, None),
        ("free_requested", 0x1000, 1000, 6, None),
        ("free_completed", 0x1000, 1000, 6, None),
        ("alloc", 0x1000, 50, 7, None),
        ("oom", 0, 1 << 40, 8, forward),
        ("snapshot", 0, 0, 9, None),
    ]
    traces = [[("alloc", 0x1000, 9999, 0, forward)], entries]
    keys = ("action", "addr", "size", "time_us", "frames")
    for trace in traces:
        for i, (action, addr, size, ms, frames) in enumerate(trace):
            trace[i] = dict(
                zip(keys, (action, addr, size, 10**6 + int(1000 * ms), frames), strict=True)
            )
            if frames is None:
                del trace[i]["frames"]
    return {"segments": [], "device_traces": traces}


def test_a_cuda_trace_is_replayed():
    events = memory._cuda_events(cuda_trace(), 1)
    profile = memory._replay(events, 1_000_000_000, 1_010_000_000, "cuda:1")
    require_consistent(profile)
    steps = [(0, 0), (1, 1000), (2, 1300), (4, 2000), (5, 1700), (6, 700), (7, 750), (10, 750)]
    assert [(change.ms, change.bytes) for change in profile.timeline] == steps
    assert (profile.peak_bytes, profile.peak_ms, profile.end_bytes) == (2000, 4.0, 750)
    assert [(group.bytes, group.where) for group in profile.alive] == [
        (1000, "_log_softmax, /somewhere/train.py:12 in step"),
        (700, "_log_softmax_backward_data, backward, LogSoftmaxBackward0"),
        (300, "/somewhere/train.py:20 in helper"),
    ]
    *operators, torch_line, user_line = profile.alive[0].stack
    assert operators == ["empty_strided", "_log_softmax", "cross_entropy_loss"]
    assert torch_line == "torch/nn/functional.py:3555 in cross_entropy"
    assert user_line == "/somewhere/train.py:12 in step"
    assert profile.timeline[-2].where == "unknown"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_profile_agrees_with_the_cuda_allocator():
    logits = torch.randn(512, 4000, device="cuda", requires_grad=True)
    target = torch.randint(0, 4000, (512,), device="cuda")

    def step():
        logits.grad = None
        F.cross_entropy(logits, target).backward()

    step()
    logits.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    want = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    profile = profile_memory(step)
    require_consistent(profile)
    assert (profile.peak_bytes, profile.end_bytes) == (want, logits.nbytes)
    assert any("in step" in group.where for group in profile.alive)
    assert not torch._C._cuda_isHistoryEnabled()
    with pytest.raises(torch.OutOfMemoryError):
        profile_memory(lambda: torch.empty(1 << 50, dtype=torch.uint8, device="cuda"), warmup=0)
    assert not torch._C._cuda_isHistoryEnabled()
    torch.cuda.memory._record_memory_history()
    try:
        with pytest.raises(RuntimeError, match="recorded already"):
            profile_memory(step)
        assert torch._C._cuda_isHistoryEnabled()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


NASTY = "</script><script>alert('<b>&\"')</script>[bold]"


@pytest.fixture(scope="module")
def nasty():
    """A profile with a name that would break a page, and more places than are shown."""
    names = [NASTY, *(f"place {i}" for i in range(1, 9))]
    sizes = list(itertools.accumulate(1000 - i for i in range(9)))
    peak = sizes[-1]
    changes = [Change(0.0, 0, 0, "")]
    changes += [Change(i + 1.0, sizes[i], 1000 - i, name) for i, name in enumerate(names)]
    alive = [Alive(c.where, c.change, 1, c.change / peak, (NASTY, "[bold]")) for c in changes[1:]]
    changes.append(Change(12.0, peak - 992, -992, "place 8"))
    return MemoryProfile("cpu", peak, 9.0, peak - 992, tuple(changes), tuple(alive))


@pytest.fixture
def page(nasty, tmp_path):
    save(nasty, tmp_path / "memory.html")
    return (tmp_path / "memory.html").read_text(encoding="utf-8")


def test_no_name_breaks_out_of_a_page(page):
    assert NASTY not in page and "</script><script>alert" not in page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert NASTY in json.dumps(json.loads(data)).replace('\\"', '"') and html.escape(NASTY) in page
    assert "source: false" in page, "view source would write the spec unescaped"
    assert '<script src="http' not in page and 'type="text/javascript" src=' not in page


@browser
def test_a_page_fits_a_phone_and_follows_its_theme(page, tmp_path):
    dom, console = opened(page, tmp_path, "", *phone)
    assert not console and 'data-drawn="1"' in dom
    assert "<title>Peak memory: 8.8 KiB beyond the start</title>" in dom
    shown = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", dom, flags=re.DOTALL)
    # chromium's narrowest window has 485 pixels
    assert max(float(width) for width in re.findall(r'<svg[^>]* width="([\d.]+)"', shown)) <= 485
    for text in ("other allocations (2 places)", "peak 8.8 KiB", html.escape(NASTY, quote=False)):
        assert text in shown
    assert THEMES["dark"]["ink"] in shown and THEMES["light"]["ink"] not in shown
    # no label overlaps the next, at 12 pixels a line
    label = r'<text [^>]*transform="translate\(([\d.]+),[\d.]+\)"[^>]*opacity="1">([\d.,]+)</text>'
    across = sorted({float(x): text for x, text in re.findall(label, shown)}.items())
    gaps = [b - a - 7 * len(text) for (a, text), (b, _) in itertools.pairwise(across)]
    assert len(gaps) > 1 and min(gaps) > 0


def test_memory_freed_before_the_peak_is_counted_among_the_others():
    profile = on_cpu(lambda: (torch.zeros(500).sum().item(), torch.ones(1000)))
    shown = [(one.label, one.bytes) for one in memory_view._largest_at_peak(profile)]
    others = "other allocations, up to 2.0 KiB at another time"
    assert shown == [(profile.alive[0].where, 4000), (others, 0)]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".csv"])
def test_the_suffix_chooses_the_format(suffix, nasty, tmp_path):
    path = tmp_path / f"memory{suffix}"
    path.write_text("an older one")
    save(nasty, str(path))
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
    elif suffix == ".svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    else:
        frame = pd.read_csv(path, keep_default_na=False)
        assert list(frame.columns) == ["ms", "bytes", "change", "where"]
        assert [Change(*row) for row in frame.itertuples(index=False)] == list(nasty.timeline)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_older_file(nasty, tmp_path, monkeypatch):
    path = tmp_path / "memory.csv"
    path.write_text("an older one")
    fails = lambda *_: 1 / 0  # noqa: E731
    monkeypatch.setattr(memory_view.os, "replace", fails)
    with pytest.raises(ZeroDivisionError):
        save(nasty, path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an older one"]


@pytest.mark.parametrize("file", ["memory.pdf", "memory"])
def test_an_unknown_suffix_is_refused(file, nasty, tmp_path):
    expected = rf"{file}' ends in .*, expected one of \.png, \.svg, \.html, \.csv"
    with pytest.raises(ValueError, match=expected):
        save(nasty, tmp_path / file)


def test_a_picture_shows_every_spike():
    # 20,000 changes of one byte in 2 ms, and one large allocation for 100 ns
    events = [memory._Event(100 * i, i // 2, (i + 1) % 2, "small", ()) for i in range(20_000)]
    spike = [
        memory._Event(ns, -1, size, "spike", ()) for ns, size in ((777_600, 1000), (777_700, 0))
    ]
    events[7776:7778] = spike
    profile = memory._replay(events, 0, 2_000_000, "cpu")
    require_consistent(profile)
    assert (profile.peak_bytes, profile.peak_ms) == (1000, 0.7776)
    frame = memory_view._bytes_over_time(profile, ["spike"])
    assert len(frame) < 5000, "more rows than Altair takes"
    totals = frame.groupby("ms")["bytes"].sum()
    assert (totals[profile.peak_ms], totals[2.0]) == (profile.peak_bytes, profile.end_bytes)
    timeline_chart(profile).to_dict()


def test_a_chart_shows_seven_places_and_the_rest(nasty):
    spec = timeline_chart(nasty).to_dict()
    (bars,) = (rows for rows in spec["datasets"].values() if "count" in rows[0])
    named = [group.where for group in nasty.alive[:7]]
    assert [row["label"] for row in bars] == [*named, "other allocations (2 places)"]
    assert bars[-1]["bytes"] == sum(group.bytes for group in nasty.alive[7:])


def test_names_are_printed_as_they_are(nasty):
    out = io.StringIO()
    memory_view.show(nasty, Console(file=out, width=200), top=4)
    printed = out.getvalue()
    for text in ("peak 8.8 KiB beyond the start, after 9.0 ms", NASTY, "place 3", "and 5 more"):
        assert text in printed
    assert "place 4" not in printed


MODULE = """
import torch
class Deep:
    @staticmethod
    def step(): return torch.ones(256)
    def needs(a, b=1): return a
number = 3
def step(): return torch.ones(1024, device="cuda" if torch.cuda.is_available() else "cpu")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_train_step.py").write_text(MODULE)
    (tmp_path / "my_broken_step.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "my_failing_step.py").write_text("raise AttributeError('on purpose')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for module in [module for module in sys.modules if module.startswith("my_")]:
        del sys.modules[module]


@pytest.mark.usefixtures("device")
def test_the_command_loads_measures_shows_and_saves(folder, capsys):
    profile = memory_view.main("my_train_step:step", folder / "out.csv", 1)
    assert profile.peak_bytes == 4096 and (folder / "out.csv").exists()
    printed = capsys.readouterr().out
    assert "4.0 KiB" in printed and "my_train_step.py" in printed
    assert load_step("my_train_step:Deep.step")().nbytes == 1024
    with pytest.raises(ValueError, match="expected one of"):
        memory_view.main("my_train_step:step", folder / "out.gif")


BAD_STEPS = {
    "my_train_step": r"step is 'my_train_step', expected module:function",
    "my_train_step:": r"expected module:function",
    ":step": r"expected module:function",
    "./my_train_step.py:step": r"expected module:function",
    "my_absent.part:step": r"there is no module 'my_absent'",
    "my_train_step:Deep.other": r"'Deep' has no attribute 'other'",
    "my_train_step:number": r"is int, expected something to call",
    "my_train_step:Deep.needs": r"without arguments, but missing a required argument: 'a'",
}


@pytest.mark.parametrize("text", BAD_STEPS)
def test_a_step_that_cannot_be_loaded_is_named(text, folder):
    with pytest.raises(ValueError, match=BAD_STEPS[text]):
        load_step(text)


def test_exceptions_of_the_users_module_are_raised(folder):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_step("my_broken_step:step")
    with pytest.raises(AttributeError, match="on purpose"):
        load_step("my_failing_step:step")
