"""The memory profiler: bytes exact, places named, recording always off afterwards, pictures that no
name can break."""

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

for name in ("altair", "pandas", "rich", "vl_convert"):
    pytest.importorskip(name)

import pandas as pd  # noqa: E402
from rich.console import Console  # noqa: E402

import lossfuse  # noqa: E402
from browsers import browser, opened  # noqa: E402
from lossfuse.perf import memory, memory_view  # noqa: E402
from lossfuse.perf.memory import Alive, Change, MemoryProfile, profile_memory  # noqa: E402
from lossfuse.perf.memory_view import load_step, save, timeline_chart  # noqa: E402
from lossfuse.perf.pages import THEMES  # noqa: E402

N, V = 64, 1000
LOGITS_BYTES = 4 * N * V


def on_cpu(fn, **kwargs):
    return profile_memory(fn, device="cpu", **kwargs)


def loss_step(loss_fn, rows=N):
    logits, target = torch.randn(rows, V, requires_grad=True), torch.randint(0, V, (rows,))

    def step():
        logits.grad = None
        loss_fn(logits, target).backward()

    return step


def require_consistent(profile):
    held, places = 0, {}
    for change in profile.timeline:
        held += change.change
        places[change.where] = places.get(change.where, 0) + change.change
        assert change.bytes == held >= 0
    times = [change.ms for change in profile.timeline]
    assert times == sorted(times) and times[0] == 0
    assert (
        profile.peak_bytes
        == max(change.bytes for change in profile.timeline)
        == sum(group.bytes for group in profile.alive)
    )
    assert profile.end_bytes == held == sum(places.values())
    assert [group.bytes for group in profile.alive] == sorted(
        (group.bytes for group in profile.alive), reverse=True
    )
    if profile.alive:
        assert sum(group.share for group in profile.alive) == pytest.approx(1)


def test_known_allocations_to_the_byte():
    def step():
        a = torch.ones(1000)
        b = torch.ones(300, dtype=torch.float64)
        del a
        c = torch.ones(7, dtype=torch.int8)
        return b, c

    profile = on_cpu(step)
    require_consistent(profile)
    assert [change.bytes for change in profile.timeline] == [0, 4000, 6400, 2400, 2407, 2407]
    assert (profile.peak_bytes, profile.end_bytes, profile.device) == (6400, 2407, "cpu")
    assert [(group.bytes, group.count, group.share) for group in profile.alive] == [
        (4000, 1, 0.625),
        (2400, 1, 0.375),
    ]
    line = step.__code__.co_firstlineno
    assert [group.where.split(", ")[0] for group in profile.alive] == ["ones", "ones"]
    for group, offset in zip(profile.alive, (1, 2), strict=True):
        assert group.where.endswith(f"test_memory_profile.py:{line + offset} in step")
        assert group.stack[:2] == ("empty", "ones") and "profile_memory" not in " ".join(
            group.stack
        )


def test_allocations_of_one_place_are_one_group():
    profile = on_cpu(lambda: [torch.ones(n) for n in (10, 30, 20)])
    assert [(group.bytes, group.count) for group in profile.alive] == [(240, 3)]


@pytest.mark.parametrize("fn", [lambda: None, lambda: torch.empty(0)], ids=["nothing", "no-bytes"])
def test_a_call_that_allocates_nothing(fn, tmp_path):
    profile = on_cpu(fn)
    require_consistent(profile)
    assert (profile.peak_bytes, profile.end_bytes, profile.alive) == (0, 0, ())
    save(profile, tmp_path / "nothing.png")
    memory_view.show(profile, Console(file=io.StringIO()))


def test_memory_from_before_the_call_lowers_nothing():
    kept = [torch.ones(100_000) for _ in range(3)]

    def step():
        kept.clear()
        return torch.ones(10)

    profile = on_cpu(step, warmup=0)
    require_consistent(profile)
    assert profile.peak_bytes == 40


def test_a_recorded_call_after_another_starts_from_zero():
    kept = []
    first = on_cpu(lambda: kept.append(torch.ones(1000)), warmup=0)
    # freed where nobody records: its address may be given out again in the second
    kept.clear()
    second = on_cpu(lambda: [torch.ones(1000) for _ in range(4)], warmup=0)
    require_consistent(second)
    assert (first.end_bytes, second.peak_bytes) == (4000, 16000)


def test_warmup_comes_first_and_results_are_dropped():
    calls = []
    profile = on_cpu(lambda: calls.append(1) or torch.ones(5), warmup=3)
    assert len(calls) == 4
    assert profile.end_bytes == 20


def test_torch_cross_entropy_holds_three_times_the_logits():
    profile = on_cpu(loss_step(F.cross_entropy))
    require_consistent(profile)
    # three scalars at most: the loss, the total weight, the gradient of the loss
    assert 3 * LOGITS_BYTES <= profile.peak_bytes <= 3 * LOGITS_BYTES + 12
    assert profile.end_bytes == LOGITS_BYTES
    forward, *backward = profile.alive[:3]
    assert [group.bytes for group in profile.alive[:3]] == [LOGITS_BYTES] * 3
    assert forward.where.startswith("_log_softmax, ") and "backward" not in forward.where
    # no Python runs in these; they are traced to the line whose backward they are
    assert [group.where for group in backward] == [
        f"{operator}, backward of {forward.where.split(', ')[1]}"
        for operator in ("nll_loss_backward", "_log_softmax_backward_data")
    ]


def test_lossfuse_holds_the_gradient_and_little_else():
    profile = on_cpu(loss_step(lossfuse.cross_entropy, 1024))
    require_consistent(profile)
    logits_bytes = 4 * 1024 * V
    assert logits_bytes < profile.peak_bytes < 1.1 * logits_bytes
    assert profile.alive[0].bytes == profile.end_bytes == logits_bytes
    assert "lossfuse/" in profile.alive[0].where


class Nested(torch.autograd.Function):
    """Backward inside backward, as reentrant checkpointing does it; autograd moves to other threads
    when it is deep."""

    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        if ctx.depth == 0:
            NESTED.append((threading.get_native_id(), torch.ones(12345)))
        else:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
        return dx, None


NESTED = []


def test_autograd_threads_are_seen():
    NESTED.clear()
    profile = on_cpu(
        lambda: Nested.apply(torch.ones(1, requires_grad=True), 62).sum().backward(), warmup=0
    )
    ((thread, _),) = NESTED
    assert thread != threading.get_native_id()
    largest = profile.alive[0]
    assert 4 * 12345 <= largest.bytes < 5 * 12345
    assert largest.where == "ones, backward, NestedBackward", (
        "its line is another thread's, and numbers of nodes are each thread's own"
    )


def test_errors_pass_through_and_end_the_recording():
    def step():
        torch.ones(10)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        on_cpu(step, warmup=0)
    assert on_cpu(lambda: torch.ones(10)).peak_bytes == 40


def test_another_profiler_is_left_alone():
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


def python_frame(line, function, file="/somewhere/train.py"):
    return {"filename": file, "line": line, "name": function}


def native_frame(name):
    return {"filename": "??", "line": 0, "name": name}


def trace(action, addr, size, us, frames=None):
    return {"action": action, "addr": addr, "size": size, "time_us": us, "stream": 0} | (
        {} if frames is None else {"frames": frames}
    )


def snapshot():
    torch_file = torch.nn.functional.__file__
    forward = [
        native_frame("at::detail::empty_generic(c10::ArrayRef<long>)"),
        native_frame("at::_ops::empty_strided::call(c10::ArrayRef<c10::SymInt>)"),
        native_frame(
            "at::_ops::_log_softmax::redispatch(c10::DispatchKeySet, at::Tensor const&, long, bool)"
        ),
        native_frame("at::_ops::cross_entropy_loss::call(at::Tensor const&)"),
        python_frame(3555, "cross_entropy", torch_file),
        python_frame(12, "step"),
        python_frame(120, "profile_memory", memory.__file__),
        python_frame(1, "<module>"),
    ]
    backward = [
        native_frame("at::_ops::_log_softmax_backward_data::call(at::Tensor const&)"),
        native_frame(
            "torch::autograd::generated::LogSoftmaxBackward0::apply(std::vector<at::Tensor>&&)"
        ),
        native_frame(
            "torch::autograd::Engine::evaluate_function(std::shared_ptr<torch::autograd::GraphTask>&)"
        ),
    ]
    entries = [
        trace("free_requested", 0x10, 5000, 1_000_000),
        trace("free_completed", 0x10, 5000, 1_000_000),
        trace("segment_alloc", 0x1000, 2 << 20, 1_000_100, forward),
        trace("alloc", 0x1000, 1000, 1_001_000, forward),
        trace(
            "alloc", 0x2000, 300, 1_002_000, [python_frame(20, "helper"), python_frame(12, "step")]
        ),
        trace("free_requested", 0x2000, 300, 1_003_000),
        # another stream still uses 0x2000 here
        trace("alloc", 0x3000, 700, 1_004_000, backward),
        trace("free_completed", 0x2000, 300, 1_005_000),
        trace("free_requested", 0x1000, 1000, 1_006_000),
        trace("free_completed", 0x1000, 1000, 1_006_000),
        trace("alloc", 0x1000, 50, 1_007_000),
        trace("oom", 0, 1 << 40, 1_008_000, forward),
        trace("snapshot", 0, 0, 1_009_000),
    ]
    return {
        "segments": [],
        "device_traces": [[trace("alloc", 0x1000, 9999, 1_000_000, forward)], entries],
    }


def test_cuda_trace_is_replayed():
    profile = memory._replay(
        memory._cuda_events(snapshot(), 1), 1_000_000_000, 1_010_000_000, "cuda:1"
    )
    require_consistent(profile)
    steps = [
        (1.0, 1000),
        (2.0, 1300),
        (4.0, 2000),
        (5.0, 1700),
        (6.0, 700),
        (7.0, 750),
        (10.0, 750),
    ]
    assert [(change.ms, change.bytes) for change in profile.timeline] == [(0, 0), *steps]
    assert (profile.peak_bytes, profile.peak_ms, profile.end_bytes) == (2000, 4.0, 750)
    assert [(group.bytes, group.where) for group in profile.alive] == [
        (1000, "_log_softmax, /somewhere/train.py:12 in step"),
        (700, "_log_softmax_backward_data, backward, LogSoftmaxBackward0"),
        (300, "/somewhere/train.py:20 in helper"),
    ]
    assert profile.alive[0].stack == (
        "empty_strided",
        "_log_softmax",
        "cross_entropy_loss",
        "torch/nn/functional.py:3555 in cross_entropy",
        "/somewhere/train.py:12 in step",
    )
    assert profile.timeline[-2].where == "unknown"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_allocator():
    device = torch.device("cuda")
    logits, target = (
        torch.randn(512, 4000, device=device, requires_grad=True),
        torch.randint(0, 4000, (512,), device=device),
    )

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
    assert profile.peak_bytes == want
    assert profile.end_bytes == logits.nbytes
    assert any("in step" in group.where for group in profile.alive)
    assert not torch._C._cuda_isHistoryEnabled()

    with pytest.raises(torch.OutOfMemoryError):
        profile_memory(lambda: torch.empty(1 << 50, dtype=torch.uint8, device=device), warmup=0)
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
    """A profile with a name made to break a page, and more places than are shown."""
    changes, held = [Change(0.0, 0, 0, "")], 0
    for i in range(9):
        held += 1000 - i
        changes.append(Change(i + 1.0, held, 1000 - i, NASTY if i == 0 else f"place {i}"))
    alive = tuple(
        Alive(change.where, change.change, 1, change.change / held, (NASTY, "[bold]"))
        for change in changes[1:]
    )
    changes.append(Change(12.0, held - 992, -992, "place 8"))
    return MemoryProfile("cpu", held, 9.0, changes[-1].bytes, tuple(changes), alive)


def test_html_is_offline_and_no_name_escapes_into_it(nasty, tmp_path):
    save(nasty, tmp_path / "memory.html")
    page = (tmp_path / "memory.html").read_text(encoding="utf-8")
    assert NASTY not in page and "</script><script>alert" not in page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert (
        NASTY in json.dumps(json.loads(data)).replace('\\"', '"') and html.escape(NASTY) in page
    ), "the name itself must survive"
    assert "source: false" in page, "view source would write the spec unescaped"
    assert '<script src="http' not in page and 'type="text/javascript" src=' not in page


@browser
def test_the_page_has_a_title_fits_a_phone_and_names_what_is_grey(nasty, tmp_path):
    save(nasty, tmp_path / "memory.html")
    page = (tmp_path / "memory.html").read_text(encoding="utf-8")
    dom, console = opened(
        page, tmp_path, "", "--window-size=390,844", "--blink-settings=preferredColorScheme=0"
    )
    assert (
        not console
        and 'data-drawn="1"' in dom
        and "<title>Peak memory: 8.8 KiB beyond the start</title>" in dom
    )
    shown = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", dom, flags=re.DOTALL)
    # chromium's narrowest window has 485 pixels
    assert max(float(width) for width in re.findall(r'<svg[^>]* width="([\d.]+)"', shown)) <= 485
    assert (
        "other allocations (2 places)" in shown
        and "peak 8.8 KiB" in shown
        and html.escape(NASTY, quote=False) in shown
    )
    assert THEMES["dark"]["ink"] in shown and THEMES["light"]["ink"] not in shown
    # every label has room for itself and a gap, in pixels of 12 pixels' type
    labels = re.findall(
        r'<text [^>]*transform="translate\(([\d.]+),[\d.]+\)"[^>]*opacity="1">([\d.,]+)</text>',
        shown,
    )
    across = sorted({float(x): text for x, text in labels if float(x) >= 0}.items())
    assert len(across) > 2 and all(
        b - a > 7 * len(text) for (a, text), (b, _) in itertools.pairwise(across)
    )


def test_what_is_gone_by_the_peak_is_counted_among_the_others():
    profile = on_cpu(lambda: (torch.zeros(500).sum().item(), torch.ones(1000)))
    held = memory_view._held_at_peak(profile)
    assert [(one.label, one.bytes) for one in held] == [
        (profile.alive[0].where, 4000),
        ("other allocations, up to 2.0 KiB at another time", 0),
    ]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".csv"])
def test_saved_by_suffix(suffix, nasty, tmp_path):
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
    monkeypatch.setattr(
        memory_view.os, "replace", lambda partial, path: 1 / len(partial.read_text()[:0])
    )
    with pytest.raises(ZeroDivisionError):
        save(nasty, path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an older one"]


@pytest.mark.parametrize("file", ["memory.pdf", "memory"])
def test_unknown_suffix_is_said(file, nasty, tmp_path):
    with pytest.raises(
        ValueError, match=rf"{file}' ends in .*, expected one of \.png, \.svg, \.html, \.csv"
    ):
        save(nasty, tmp_path / file)


def test_no_spike_is_lost_in_the_picture():
    # 20,000 changes of one byte in 2 ms, and in between one large allocation for 100 ns
    events = [memory._Event(100 * i, i // 2, (i + 1) % 2, "small", ()) for i in range(20_000)]
    events[7776:7778] = [
        memory._Event(777_600, -1, 1000, "spike", ()),
        memory._Event(777_700, -1, 0, "spike", ()),
    ]
    profile = memory._replay(events, 0, 2_000_000, "cpu")
    require_consistent(profile)
    assert (profile.peak_bytes, profile.peak_ms) == (1000, 0.7776)
    frame = memory_view._held_by(profile, ["spike"])
    assert len(frame) < 5000, "more rows than Altair takes"
    assert frame[frame["ms"] == profile.peak_ms]["bytes"].sum() == profile.peak_bytes
    assert frame[frame["ms"] == 2.0]["bytes"].sum() == profile.end_bytes
    timeline_chart(profile).to_dict()


def test_chart_shows_seven_places_and_the_rest(nasty):
    spec = timeline_chart(nasty).to_dict()
    (bars,) = (rows for rows in spec["datasets"].values() if "count" in rows[0])
    assert [row["label"] for row in bars] == [group.where for group in nasty.alive[:7]] + [
        "other allocations (2 places)"
    ]
    assert bars[-1]["bytes"] == sum(group.bytes for group in nasty.alive[7:])


def test_show_prints_names_as_they_are(nasty):
    out = io.StringIO()
    memory_view.show(nasty, Console(file=out, width=200), top=4)
    printed = out.getvalue()
    assert "peak 8.8 KiB beyond the start, after 9.0 ms" in printed
    assert NASTY in printed and "place 3" in printed
    assert "and 5 more" in printed and "place 4" not in printed


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
def test_main_loads_measures_shows_and_writes(folder, capsys):
    profile = memory_view.main("my_train_step:step", folder / "out.csv", 1)
    assert profile.peak_bytes == 4096
    assert (folder / "out.csv").exists()
    printed = capsys.readouterr().out
    assert "4.0 KiB" in printed and "my_train_step.py" in printed
    assert load_step("my_train_step:Deep.step")().nbytes == 1024
    with pytest.raises(ValueError, match="expected one of"):
        memory_view.main("my_train_step:step", folder / "out.gif")


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "no colon": ("my_train_step", r"step is 'my_train_step', expected module:function"),
        "no attribute": ("my_train_step:", r"expected module:function"),
        "no module": (":step", r"expected module:function"),
        "a path": ("./my_train_step.py:step", r"expected module:function"),
        "absent": ("my_absent.part:step", r"there is no module 'my_absent'"),
        "missing": ("my_train_step:Deep.other", r"'Deep' has no attribute 'other'"),
        "no callable": ("my_train_step:number", r"is int, expected something to call"),
        "arguments": (
            "my_train_step:Deep.needs",
            r"without arguments, but missing a required argument: 'a'",
        ),
    }.values(),
)
def test_a_step_that_cannot_be_is_named(text, message, folder):
    with pytest.raises(ValueError, match=message):
        load_step(text)


def test_errors_in_the_users_module_are_not_hidden(folder):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_step("my_broken_step:step")
    with pytest.raises(AttributeError, match="on purpose"):
        load_step("my_failing_step:step")
