"""One command for a GPU: every case measured or refused with a reason, goals judged, in time."""

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perf_commands import perf  # isort: skip
from fake_rows import bounds_row
from fake_rows import row as measured_row
from lossfuse.perf import environment, gpu, methods, tables
from lossfuse.perf.cases import CASES, MODES, named
from lossfuse.perf.goals import GOALS, Goal, judge
from lossfuse.perf.rows import BOUNDS, append, read

STEP = "forward+backward"
ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda")
WHERE = dict.fromkeys(("device", "torch", "triton", "lossfuse", "commit", "date"), "")
WHERE |= {"device": "a|b<c>", "dirty": True}


def row(**changes):
    few = {"case": "llama3", "n": 10, "v": 100, "ideal_ms": 0.7, "peak_extra_bytes": 2000}
    return measured_row(**few | {"date": "2026-01-01"} | changes)


def test_the_tests_that_it_runs_exist():
    assert all((ROOT / path).is_file() for path in gpu.TESTS)


def test_goals_name_cases_modes_dtypes_and_methods_that_exist():
    assert len(GOALS) == len({str(goal) for goal in GOALS})
    on_gpu = {(m.name, dtype) for m in methods.METHODS if "cuda" in m.devices for dtype in m.dtypes}
    for goal in GOALS:
        case, small = (named(name, GPU) for name in (goal.case, gpu._shrunk(goal.case)))
        assert small.op == case.op and small.n * small.v < 2**24
        assert goal.mode in MODES and (goal.method, goal.dtype) in on_gpu
        assert goal.roofline or goal.peak_gib or goal.peak_logits or goal.loss_times
    assert set(CASES) - {goal.case for goal in GOALS} == {"many-rows", "head-smollm"}


def test_every_goal_is_measured_once_and_then_its_peers_in_bf16():
    errands, peers = gpu.errands(GOALS), gpu.peers(GOALS)
    measured = [(e.case, dtype) for e in errands for dtype in e.dtypes]
    assert len(measured) == len(set(measured))
    assert set(measured) == {(goal.case, goal.dtype) for goal in GOALS}
    modes = {(e.case, mode) for e in errands for mode in e.modes}
    assert modes == {(goal.case, goal.mode) for goal in GOALS}
    assert {e.only for e in errands} == {"lossfuse"}
    assert all("lossfuse" in goal.method for goal in GOALS)
    assert {e.case for e in peers} == {goal.case for goal in GOALS if goal.dtype == "bf16"}
    assert {(e.dtypes, e.only) for e in peers} == {(("bf16",), None)}


FAST = {"roofline": 0.66, "peak_logits": 1.01}
BROKEN = {"status": "wrong", "note": "loss is off", "ms_p50": None}
STATS = row(method="lossfuse stats", ms_p50=1.08)
LATER = {"date": "2026-01-02"}


@pytest.mark.parametrize(
    ("bounds", "rows", "verdict", "measured"),
    [
        (FAST, [row()], "pass", "0.700 (1 ms), 1.0000 of the logits"),
        (FAST, [row(ideal_ms=0.6)], "miss", "0.600"),
        (FAST, [row(peak_extra_bytes=2100)], "miss", "1.0500 of the logits"),
        (FAST, [row(peak_extra_bytes=None)], "miss", "nan of the logits"),
        (FAST, [row(ideal_ms=None)], "miss", "nan"),
        (FAST, [row(ideal_ms=0.6), row(**LATER)], "pass", "0.700"),
        (FAST, [row(**BROKEN)], "miss", "wrong: loss is off"),
        (FAST, [row(dtype="fp32"), row(method="Liger"), row(mode="no_grad")], "not measured", "no"),
        ({}, [row(), STATS], "pass", "1.080 times the loss (1.08 ms)"),
        ({}, [row(), STATS | {"ms_p50": 1.2}], "miss", "1.200 times the loss"),
        ({}, [row(), row(ms_p50=2.0, **LATER), STATS], "pass", "1.080 times the loss"),
        ({}, [row(**LATER), STATS], "miss", "nan times the loss"),
        ({}, [row(device="another"), STATS], "miss", "nan times the loss"),
        ({}, [row(**BROKEN), STATS], "miss", "nan times the loss"),
        ({}, [row(mode="no_grad"), row(dtype="fp32"), STATS], "miss", "nan times the loss"),
        ({}, [row()], "not measured", "no row"),
    ],
)
def test_a_goal_is_judged_by_the_last_row_and_a_loss_of_its_run(
    tmp_path, bounds, rows, verdict, measured
):
    method, bounds = ("lossfuse", bounds) if bounds else ("lossfuse stats", {"loss_times": 1.10})
    append(tmp_path / "rows.csv", rows)
    goal = Goal("llama3", "bf16", STEP, method, **bounds)
    outcome = judge(goal, read([tmp_path / "rows.csv"]))
    assert outcome.verdict == verdict and measured in outcome.measured


FEW = [
    Goal("llama2", "bf16", "no_grad", "lossfuse", roofline=0.01),
    Goal("llama2", "fp32", STEP, "not a method", roofline=0.9),
    Goal("head-llama3", "bf16", STEP, "lossfuse linear", roofline=0.01),
    Goal("llama2", "bf16", "no_grad", "lossfuse stats", loss_times=100.0),
]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses where there is no GPU")
def test_a_rehearsal_leaves_rows_a_log_and_a_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "GOALS", FEW)
    monkeypatch.setattr(gpu, "REHEARSED_TESTS", ("tests/test_closeness.py", "-p", "no:xdist"))
    begin = time.monotonic()
    assert perf("gpu --minutes 4 --out", tmp_path / "out") == 0
    assert time.monotonic() - begin < 240
    frame, sweep = (read([tmp_path / "out" / name]) for name in ("rows.csv", "sweep.csv"))
    assert set(frame["dtype"]) == {"bf16", "fp32"} and (frame["tests"] == "passed").all()
    assert set(frame["method"]) >= {"lossfuse", "F.cross_entropy", "lossfuse linear"}
    assert {m.name for m in methods.SWEEP} < set(sweep["method"]) and set(sweep["status"]) == {"ok"}
    assert len(read([tmp_path / "out" / "bounds.csv"], BOUNDS))
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "Tests: passed. Goals, rehearsed:" in summary and "Errors: 0 of" in summary
    assert "1 not measured, which means nothing" in summary
    assert "$ pytest tests/test_closeness.py" in (tmp_path / "out" / "log.txt").read_text()
    assert "rehearsal" in capsys.readouterr().out


def test_a_case_that_crashes_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch):
    def run(command, **options):
        case = command[command.index("--cases") + 1]
        if case == "hangs":
            raise subprocess.TimeoutExpired(command, options["timeout"], output=b"half a line")
        return SimpleNamespace(stdout="Segmentation fault\n", returncode=-11 * (case == "crashes"))

    def measure(seconds):
        end, console = time.monotonic() + seconds, tables.console()
        todo = [gpu.Errand(case, ("bf16",), (STEP,), None) for case in cases]
        return gpu._measure(todo, tmp_path / "rows.csv", tmp_path, "passed", end, True, console)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    cases = ("crashes", "hangs", "works")
    crashed, hung = measure(100)
    assert crashed == "crashes bf16: exit -11; Segmentation fault"
    assert hung.startswith("hangs bf16: stopped after") and hung.endswith("half a line")
    assert measure(5) == [f"{case} bf16: no time left" for case in cases]


@pytest.mark.parametrize("rehearsal", [False, True])
def test_a_summary_has_all_verdicts_and_escapes_them(tmp_path, rehearsal):
    append(tmp_path / "rows.csv", [row(ideal_ms=0.1)])
    goals = [Goal("llama3", "bf16", STEP, "lossfuse", roofline=0.66)]
    told = (WHERE, "failed", "1 of 9 beyond; <b>", ["x | <script>"])
    summary, counts = gpu.summarize(goals, tmp_path / "rows.csv", *told, rehearsal=rehearsal)
    assert counts == {"pass": 0, "miss": 1, "not measured": 0}
    assert "0 pass, 1 miss, 0 not measured" in summary
    assert "Errors: 1 of 9 beyond; &lt;b>." in summary and "- x \\| &lt;script>" in summary
    assert ("| rehearsed: miss |" in summary) == rehearsal == ("which means nothing" in summary)
    first, _, second, *_ = summary.splitlines()
    assert first.startswith("# Rehearsal without a GPU: a|b<c>") == rehearsal
    assert (second == gpu.REHEARSAL) == rehearsal
    absent = gpu.summarize(goals, tmp_path / "absent.csv", *told)[1]
    assert absent["not measured"] == 1


@pytest.mark.parametrize(
    ("tests", "beyond", "fraction", "code"),
    [
        ("passed", False, 1.0, 0),
        ("not run", False, 1.0, 3),
        ("passed", None, 1.0, 3),
        ("passed", False, None, 3),
        ("failed", None, None, 1),
        ("passed", True, 1.0, 1),
        ("passed", False, 0.1, 1),
    ],
)
def test_an_undecided_run_on_a_gpu_is_no_success(
    tmp_path, monkeypatch, tests, beyond, fraction, code
):
    def measure(goals, out, *_):
        if fraction is not None:
            append(out / "rows.csv", [row(ideal_ms=fraction)])
        return []

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "GOALS", [Goal("llama3", "bf16", STEP, "lossfuse", roofline=0.66)])
    monkeypatch.setattr(gpu, "stamp", lambda device: WHERE)
    monkeypatch.setattr(gpu, "_run_tests", lambda *_: tests)
    monkeypatch.setattr(gpu, "_measure_errors", lambda *_: ("", beyond))
    monkeypatch.setattr(gpu, "_measure_all", measure)
    assert gpu.main(tmp_path, 1.0) == code


@pytest.mark.parametrize(
    ("ratio", "trouble", "beyond"),
    [
        (0.5, "", False),
        (0.5, "stopped after 9 s; ", None),
        (2.0, "exit 1; ", True),
        (None, "exit 1; ", None),
    ],
)
def test_errors_measured_before_the_time_limit_count(tmp_path, monkeypatch, ratio, trouble, beyond):
    def called(out, arguments, limit):
        if ratio is not None:
            append(out / "bounds.csv", [bounds_row(ratio=ratio)], BOUNDS)
        return trouble

    monkeypatch.setattr(gpu, "_called", called)
    told, got = gpu._measure_errors(tmp_path, 9.0, tables.console())
    assert got is beyond and ("not measured" in told) is (ratio is None)
    assert ("stopped" in told) is ("stopped" in trouble)


HANGS = """
import pathlib
import time

def test_it_fails():
    assert {passes}

def test_it_hangs():
    pathlib.Path("hangs").touch()
    time.sleep(1000)
"""


@pytest.mark.parametrize(("passes", "verdict"), [(False, "failed"), (True, "not run")])
def test_interrupted_tests_report_failures_so_far(
    tmp_path, monkeypatch, time_is_up_when, passes, verdict
):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(HANGS.format(passes=passes))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    monkeypatch.setattr(environment, "LAST_WORDS_SECONDS", 600.0)
    time_is_up_when(tmp_path / "hangs")
    tests, said = environment.run_tests("-p", "no:cacheprovider", limit_seconds=10.0)
    assert tests == verdict and "stopped after 10 s" in said
    assert ("FAILED tests/test_it.py::test_it_fails" in said) is not passes
