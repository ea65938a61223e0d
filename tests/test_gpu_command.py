"""The one call for a GPU, rehearsed: every case measured or said why not, goals judged, inside its
time."""

import subprocess
import time

import pytest
import torch

for name in ("filelock", "pandas", "rich"):
    pytest.importorskip(name)

from lossfuse.perf import environment, goals, gpu, methods, sanitizer  # noqa: E402
from lossfuse.perf.__main__ import main  # noqa: E402
from lossfuse.perf.cases import CASES, MODES, named  # noqa: E402
from lossfuse.perf.goals import GOALS, Goal, judge  # noqa: E402
from lossfuse.perf.rows import BOUNDS, append, read  # noqa: E402

STEP = "forward+backward"


def test_goals_are_about_cases_and_modes_there_are():
    assert len(GOALS) == len({str(goal) for goal in GOALS})
    for goal in GOALS:
        named(goal.case, torch.device("cuda"))
        assert goal.mode in MODES and goal.dtype in ("fp32", "bf16", "fp16")
        assert goal.roofline or goal.peak_gib or goal.peak_logits or goal.loss_times
    # every named case that is no curiosity is measured
    assert set(CASES) - {goal.case for goal in GOALS} == {"many-rows", "head-smollm"}


def test_a_rehearsal_has_cases_of_every_kind():
    shrunk = {goal.case: named(gpu._shrunk(goal.case), torch.device("cpu")) for goal in GOALS}
    assert all(
        small.op == named(case, torch.device("cuda")).op and small.n * small.v < 2**24
        for case, small in shrunk.items()
    )


def test_goals_are_about_methods_that_run_on_a_gpu_in_that_dtype():
    there = {(m.name, dtype) for m in methods.METHODS if "cuda" in m.devices for dtype in m.dtypes}
    assert {(g.method, g.dtype) for g in GOALS} <= there


def test_errands_cover_every_goal_once():
    errands = gpu.errands(GOALS)
    done = [(e.case, dtype) for e in errands for dtype in e.dtypes]
    assert len(done) == len(set(done)) and set(done) == {(g.case, g.dtype) for g in GOALS}
    assert all(
        set(e.modes) >= {g.mode for g in GOALS if g.case == e.case and g.dtype in e.dtypes}
        for e in errands
    )
    ours = {m.name for m in methods.of("logits", torch.device("cpu"), "lossfuse")[0]}
    assert {e.only for e in errands} == {"lossfuse"} and ours >= {
        g.method for g in GOALS if "ids" not in g.method and "linear" not in g.method
    }


def test_then_peers_in_bf16():
    peers = gpu.peers(GOALS)
    assert {e.case for e in peers} == {g.case for g in GOALS if g.dtype == "bf16"} and {
        (e.dtypes, e.only) for e in peers
    } == {(("bf16",), None)}


def row(**changes):
    return {
        "case": "llama3",
        "op": "logits",
        "mode": STEP,
        "dtype": "bf16",
        "n": 10,
        "v": 100,
        "method": "lossfuse",
        "status": "ok",
        "ms_p50": 1.0,
        "ideal_ms": 0.7,
        "peak_extra_bytes": 2000,
        "dirty": False,
        "date": "2026-01-01",
    } | changes


@pytest.mark.parametrize(
    ("rows", "verdict", "measured"),
    [
        ([row()], "pass", "0.700 (1 ms), 1.0000 of the logits"),
        ([row(ideal_ms=0.6)], "miss", "0.600"),
        ([row(peak_extra_bytes=2100)], "miss", "1.0500 of the logits"),
        ([row(peak_extra_bytes=None)], "miss", "nan of the logits"),
        ([row(ideal_ms=None)], "miss", "nan"),
        ([row(ideal_ms=0.6), row(date="2026-01-02")], "pass", "0.700"),
        ([row(status="wrong", note="loss is off", ms_p50=None)], "miss", "wrong: loss is off"),
        ([row(dtype="fp32"), row(method="Liger"), row(mode="no_grad")], "not measured", "no row"),
    ],
)
def test_a_goal_is_judged_by_its_last_row(tmp_path, rows, verdict, measured):
    append(tmp_path / "rows.csv", rows)
    outcome = judge(
        Goal("llama3", "bf16", STEP, "lossfuse", roofline=0.66, peak_logits=1.01),
        read([tmp_path / "rows.csv"]),
    )
    assert outcome.verdict == verdict and measured in outcome.measured


STATS = row(method="lossfuse stats", ms_p50=1.08)


@pytest.mark.parametrize(
    ("rows", "verdict", "measured"),
    [
        ([row(), STATS], "pass", "1.080 times the loss (1.08 ms)"),
        ([row(), STATS | {"ms_p50": 1.2}], "miss", "1.200 times the loss"),
        ([row(), row(ms_p50=2.0, date="2026-01-02"), STATS], "pass", "1.080 times the loss"),
        ([row(date="2026-01-02"), STATS], "miss", "nan times the loss"),
        ([row(device="another"), STATS], "miss", "nan times the loss"),
        (
            [row(status="wrong", note="loss is off", ms_p50=None), STATS],
            "miss",
            "nan times the loss",
        ),
        (
            [row(mode="no_grad"), row(dtype="fp32"), row(method="F.cross_entropy"), STATS],
            "miss",
            "nan times the loss",
        ),
        ([row()], "not measured", "no row"),
    ],
)
def test_statistics_are_judged_by_the_loss_of_the_same_run(tmp_path, rows, verdict, measured):
    append(tmp_path / "rows.csv", rows)
    outcome = judge(
        Goal("llama3", "bf16", STEP, "lossfuse stats", loss_times=1.10),
        read([tmp_path / "rows.csv"]),
    )
    assert outcome.verdict == verdict and measured in outcome.measured


FEW = [
    Goal("llama2", "bf16", "no_grad", "lossfuse", roofline=0.01),
    Goal("llama2", "fp32", STEP, "nobody", roofline=0.9),
    Goal("head-llama3", "bf16", STEP, "lossfuse linear", roofline=0.01),
    Goal("llama2", "bf16", "no_grad", "lossfuse stats", loss_times=100.0),
]


@pytest.mark.slow
def test_a_rehearsal_leaves_rows_a_log_and_a_summary(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("a rehearsal is for where there is no GPU")
    monkeypatch.setattr(gpu, "GOALS", FEW)
    monkeypatch.setattr(gpu, "REHEARSED_TESTS", ("tests/test_closeness.py", "-p", "no:xdist"))
    begin = time.monotonic()
    assert main(["gpu", "--out", str(tmp_path / "out"), "--minutes", "4"]) == 0
    assert time.monotonic() - begin < 240
    frame = read([tmp_path / "out" / "rows.csv"])
    assert set(frame["dtype"]) == {"bf16", "fp32"} and (frame["tests"] == "passed").all()
    assert set(frame["method"]) >= {"lossfuse", "F.cross_entropy", "lossfuse linear"}
    sweep = read([tmp_path / "out" / "sweep.csv"])
    assert {m.name for m in methods.SWEEP} < set(sweep["method"]) and set(sweep["status"]) == {"ok"}
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert (
        "Tests: passed. Goals, rehearsed:" in summary
        and "1 not measured, which means nothing" in summary
    )
    assert "Errors: 0 of" in summary and len(read([tmp_path / "out" / "bounds.csv"], BOUNDS))
    assert "$ pytest tests/test_closeness.py" in (tmp_path / "out" / "log.txt").read_text()
    assert "rehearsal" in capsys.readouterr().out


def test_a_case_that_dies_or_hangs_takes_no_other_with_it(tmp_path, monkeypatch):
    def run(command, **options):
        case = command[command.index("--cases") + 1]
        if case == "hangs":
            raise subprocess.TimeoutExpired(command, options["timeout"], output=b"half a line")
        return subprocess.CompletedProcess(
            command, -11 if case == "dies" else 0, stdout="Segmentation fault\n"
        )

    monkeypatch.setattr(gpu.subprocess, "run", run)
    console = gpu_console()
    todo = [gpu.Errand(case, ("bf16",), (STEP,), None) for case in ("dies", "hangs", "works")]
    failed = gpu._measure(
        todo, tmp_path / "rows.csv", tmp_path, "passed", time.monotonic() + 100, True, console
    )
    assert failed[0] == "dies bf16: exit -11; Segmentation fault"
    assert (
        failed[1].startswith("hangs bf16: stopped after")
        and failed[1].endswith("half a line")
        and len(failed) == 2
    )
    late = gpu._measure(
        todo, tmp_path / "rows.csv", tmp_path, "passed", time.monotonic() + 5, True, console
    )
    assert late == [f"{case} bf16: no time left" for case in ("dies", "hangs", "works")]


def test_a_missed_goal_is_told(tmp_path):
    append(tmp_path / "rows.csv", [row(ideal_ms=0.1)])
    where = {
        "device": "a|b<c>",
        "torch": "2",
        "triton": "",
        "lossfuse": "0",
        "commit": "",
        "dirty": True,
        "date": "today",
    }
    goal = Goal("llama3", "bf16", STEP, "lossfuse", roofline=0.66)
    errors = "1 of 9 beyond their bounds; <b>"
    summary, counts = gpu.summarize(
        [goal], tmp_path / "rows.csv", where, "failed", errors, [], ["x | <script>"]
    )
    assert "Errors: 1 of 9 beyond their bounds; &lt;b>." in summary
    assert (
        counts == {"pass": 0, "miss": 1, "not measured": 0}
        and "0 pass, 1 miss, 0 not measured" in summary
        and "- x \\| &lt;script>" in summary
    )
    assert "rehears" not in summary.lower()
    about = ([goal], tmp_path / "rows.csv", where, "failed", errors, [], [])
    rehearsed, _ = gpu.summarize(*about, rehearsal=True)
    title, _, first, *rest = rehearsed.splitlines()
    assert (
        title.startswith("# Rehearsal without a GPU: a|b<c>")
        and first == gpu.REHEARSAL
        and "mean nothing" in first
    )
    assert (
        any("0 pass, 1 miss, 0 not measured, which means nothing" in line for line in rest)
        and "| rehearsed: miss |" in rehearsed
    )
    assert (
        gpu.summarize([goal], tmp_path / "absent.csv", where, "failed", errors, [], [])[1][
            "not measured"
        ]
        == 1
    )
    assert goals.GOALS is GOALS


def gpu_console():
    from rich.console import Console

    return Console(quiet=True)


@pytest.mark.parametrize(
    ("tests", "beyond", "verdict", "fraction", "status"),
    [
        ("passed", False, "passed", 1.0, 0),
        ("not run", False, "passed", 1.0, 3),
        ("passed", None, "passed", 1.0, 3),
        ("passed", False, "not run", 1.0, 3),
        ("passed", False, "passed", None, 3),
        ("failed", None, "not run", None, 1),
        ("passed", True, "passed", 1.0, 1),
        ("passed", False, "failed", 1.0, 1),
        ("passed", False, "passed", 0.1, 1),
    ],
)
def test_what_is_not_settled_on_a_gpu_is_no_success(
    tmp_path, monkeypatch, tests, beyond, verdict, fraction, status
):
    def measure(todo, rows, *_):
        if fraction is not None:
            append(rows, [row(ideal_ms=fraction)])
        return []

    where = {
        "device": "a",
        "torch": "2",
        "triton": "",
        "lossfuse": "0",
        "commit": "",
        "dirty": True,
        "date": "today",
    }
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "GOALS", [Goal("llama3", "bf16", STEP, "lossfuse", roofline=0.66)])
    for name, made in {
        "stamp": where,
        "_tests": tests,
        "_errors": ("", beyond),
        "_sanitize": [sanitizer.Outcome("memcheck", verdict, "", "")],
    }.items():
        monkeypatch.setattr(gpu, name, lambda *_, made=made: made)
    monkeypatch.setattr(gpu, "_measure", measure)
    assert gpu.main(tmp_path, 1.0) == status


@pytest.mark.parametrize(
    ("ratio", "trouble", "beyond"),
    [
        (0.5, "", False),
        (0.5, "stopped after 9 s; ", None),
        (2.0, "exit 1; ", True),
        (None, "exit 1; ", None),
    ],
)
def test_errors_measured_until_it_was_stopped_count(tmp_path, monkeypatch, ratio, trouble, beyond):
    def called(out, arguments, limit):
        if ratio is not None:
            about = {
                "op": "logits",
                "case": "easy",
                "dtype": "bf16",
                "n": 1,
                "v": 2,
                "method": "lossfuse",
                "output": "loss",
                "place": "0",
            }
            append(
                out / "bounds.csv",
                [
                    about
                    | {
                        "ratio": ratio,
                        "error": 1.0,
                        "bound": 2.0,
                        "dirty": False,
                        "date": "2026-01-01",
                    }
                ],
                BOUNDS,
            )
        return trouble

    monkeypatch.setattr(gpu, "_called", called)
    told, got = gpu._errors(tmp_path, 9.0, gpu_console())
    assert (
        got is beyond
        and ("not measured" in told) is (ratio is None)
        and ("stopped" in told) is ("stopped" in trouble)
    )


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
def test_tests_whose_time_is_up_say_what_has_failed(
    tmp_path, monkeypatch, time_is_up_when, passes, verdict
):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(HANGS.format(passes=passes))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    monkeypatch.setattr(environment, "LAST_WORDS_SECONDS", 600.0)
    time_is_up_when(tmp_path / "hangs")
    tests, said = environment.run_tests("-p", "no:cacheprovider", limit_seconds=10.0)
    assert (
        tests == verdict
        and "stopped after 10 s" in said
        and ("FAILED tests/test_it.py::test_it_fails" in said) is not passes
    )
