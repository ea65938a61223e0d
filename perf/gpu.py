"""One command for a GPU: its tests, errors against bounds, the cases of our goals, a summary."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import tables
from .bounds import exceeded
from .cases import named
from .environment import CHECKOUT, run_tests, stamp
from .goals import GOALS, Goal, judge
from .rows import BOUNDS, BadRows, read, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

# at most this share of the time is for the tests, the rest for the goals
TESTS_SHARE = 0.25
ERRORS_SECONDS = 60.0
# one file per kernel; CONTRIBUTING.md has the command for all tests of a GPU, ten times as many
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "values",
        "gpu",
        "fused_kernel",
        "head_kernel",
        "statistics_kernels",
        "row_totals",
        "labels",
        "family",
    )
)
TEST_WORKERS = 4
# a rehearsal runs a few tests, and divides the sizes of cases by SHRINK
REHEARSED_TESTS = ("tests/test_values.py", "tests/test_closeness.py")
SHRINK = {"n": 64, "v": 32, "d": 16}
REHEARSAL = (
    "No GPU: this is a rehearsal on the CPU with small cases."
    " Its times, and its verdicts on goals of an H100, mean nothing."
)


@dataclass(frozen=True)
class Errand:
    """One call of ``bench`` in its own process, so that a crashing kernel ends no other case."""

    case: str
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    only: str | None

    def __str__(self) -> str:
        return f"{self.case} {' '.join(self.dtypes)}{' sweep' * (self.only == 'sweep')}"


# rows of a chunk and precision of the linear form, each variant about 41 ms a step on an H100
SWEEP = Errand("head-llama3", ("bf16",), ("forward+backward",), "sweep")


def errands(goals: Sequence[Goal]) -> list[Errand]:
    """The calls that measure all goals: our methods and torch's, a case in all its dtypes."""
    found = []
    for case in dict.fromkeys(goal.case for goal in goals):
        dtypes, modes = (
            tuple(dict.fromkeys(getattr(g, name) for g in goals if g.case == case))
            for name in ("dtype", "mode")
        )
        found.append(Errand(case, dtypes, modes, "lossfuse"))
    return found


def peers(goals: Sequence[Goal]) -> list[Errand]:
    """The calls that measure all peers, in bf16 alone."""
    return [
        replace(errand, dtypes=("bf16",), only=None)
        for errand in errands(goals)
        if "bf16" in errand.dtypes
    ]


def main(out: Path, minutes: float) -> int:
    """Write rows, bounds, sweep, log and summary to the folder ``out``.

    1 if a test failed, an error is beyond its bound or a goal was missed; 3 if a GPU left tests,
    errors or goals undecided; otherwise 0."""
    console = tables.console()
    end = time.monotonic() + 60 * minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rehearsal = device.type == "cpu"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "log.txt", b"")
    except OSError as error:
        raise BadRows(f"{out} cannot be written: {error.strerror or error}") from error
    where = stamp(device)
    versions = f"torch {where['torch']}, triton {where['triton'] or 'none'}"
    console.print(f"{where['device']}, {versions}, at most {minutes:g} minutes")
    if rehearsal:
        console.print(REHEARSAL)

    tests = _run_tests(out, rehearsal, 60 * minutes * TESTS_SHARE, console)
    errors, beyond = _measure_errors(out, min(ERRORS_SECONDS, end - time.monotonic()), console)
    goals = [replace(goal, case=_shrunk(goal.case)) for goal in GOALS] if rehearsal else GOALS
    failed = _measure_all(goals, out, tests, end, rehearsal, console)
    rows = out / "rows.csv"
    summary, counts = summarize(goals, rows, where, tests, errors, failed, rehearsal=rehearsal)
    write_atomically(out / "summary.md", summary.encode())
    console.print(summary, markup=False)
    console.print(f"rows, bounds, sweep, log and summary: {out}", markup=False)
    if tests == "failed" or beyond or (counts["miss"] and not rehearsal):
        return 1
    decided = tests == "passed" and beyond is not None and not counts["not measured"]
    return 0 if decided or rehearsal else 3


def _measure_all(
    goals: Sequence[Goal], out: Path, tests: str, end: float, rehearsal: bool, console: "Console"
) -> list[str]:
    """Measure goals, then peers, then the sweep; a sentence for each call that failed."""
    sweep = replace(SWEEP, case=_shrunk(SWEEP.case) if rehearsal else SWEEP.case)
    failed = []
    for todo, file in (
        (errands(goals), "rows.csv"),
        (peers(goals), "rows.csv"),
        # a file of its own: sixteen variants of one method would crowd a page
        ([sweep], "sweep.csv"),
    ):
        failed += _measure(todo, out / file, out, tests, end, rehearsal, console)
    return failed


def _run_tests(out: Path, rehearsal: bool, seconds: float, console: "Console") -> str:
    # four processes compile at once
    workers = ("-n", str(TEST_WORKERS)) if importlib.util.find_spec("xdist") is not None else ()
    arguments = REHEARSED_TESTS if rehearsal else (*TESTS, "-m", "gpu and not slow", *workers)
    with console.status(f"tests, at most {seconds:.0f} s"):
        start = time.monotonic()
        tests, said = run_tests(*arguments, limit_seconds=seconds)
    _log(out, f"$ pytest {' '.join(arguments)}\n{said}\n")
    seconds = time.monotonic() - start
    console.print(f"tests: {tests} in {seconds:.0f} s; {_last_line(said)}", markup=False)
    return tests


def _measure_errors(out: Path, seconds: float, console: "Console") -> tuple[str, bool | None]:
    """Run ``bounds``: a summary, and True if an error is beyond its bound, None if unknown."""
    file = out / "bounds.csv"
    with console.status(f"errors against bounds, at most {seconds:.0f} s"):
        trouble = _called(out, ["bounds", "--out", str(file.resolve())], seconds)
    rows = read([file], BOUNDS) if file.exists() else None
    if rows is None or not len(rows):
        console.print(f"errors: not measured: {trouble}", markup=False)
        return f"not measured: {trouble}", None
    rows = rows[rows["date"] == rows["date"].max()]
    beyond = exceeded(rows.to_dict("records"))
    unfinished = [trouble] if trouble.startswith("stopped") else []
    count = f"{len(beyond)} of {len(rows)} beyond their bounds"
    summary = "; ".join([count, *beyond[:5], *unfinished])
    console.print(f"errors: {summary}", markup=False)
    return summary, True if beyond else None if unfinished else False


def _measure(
    todo: list[Errand],
    rows: Path,
    out: Path,
    tests: str,
    end: float,
    rehearsal: bool,
    console: "Console",
) -> list[str]:
    """Run the calls one by one; a sentence for each that failed."""
    failed = []
    for i, errand in enumerate(todo):
        left = end - time.monotonic()
        # equal shares of the time left, and up to twice that for a slow call
        limit = min(left, max(2 * left / (len(todo) - i), 20.0))
        if left < 10:
            failed += [f"{e}: no time left" for e in todo[i:]]
            break
        command = ["bench", "--cases", errand.case, "--dtypes", *errand.dtypes]
        command += ["--modes", *errand.modes, "--out", str(rows.resolve()), "--tests", tests]
        command += ["--seconds", f"{limit / 20:.2f}"]
        command += ["--methods", errand.only] if errand.only else []
        command += ["--repeats", "3"] if rehearsal else []
        with console.status(f"{i + 1} of {len(todo)}: {errand}, {left:.0f} s left"):
            trouble = _called(out, command, limit)
        if trouble:
            failed.append(f"{errand}: {trouble}")
        console.print(f"{errand} {trouble.partition(';')[0] or 'measured'}", markup=False)
    return failed


def _called(out: Path, arguments: list[str], limit: float) -> str:
    """Run a command of this package in its own process and log it; '' or the reason it failed."""
    command = [sys.executable, "-m", "lossfuse.perf", *arguments]
    # the interpreter would take minutes for what a rehearsal compares
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
            env=env,
        )
        said, trouble = done.stdout, "" if done.returncode == 0 else f"exit {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        said = output.decode(errors="replace") if isinstance(output, bytes) else output
        trouble = f"stopped after {limit:.0f} s"
    _log(out, f"$ {' '.join(command[1:])}\n{said}\n")
    return trouble and f"{trouble}; {_last_line(said)}"


def summarize(
    goals: Sequence[Goal],
    rows: Path,
    where: dict[str, object],
    tests: str,
    errors: str,
    failed: Sequence[str],
    *,
    rehearsal: bool = False,
) -> tuple[str, dict[str, int]]:
    """A page of Markdown, and the number of goals by verdict."""
    frame = read([rows] if rows.exists() else [])
    outcomes = [judge(goal, frame) for goal in goals]
    verdicts = [outcome.verdict for outcome in outcomes]
    counts = {verdict: verdicts.count(verdict) for verdict in ("pass", "miss", "not measured")}
    totals = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    versions = f"torch {where['torch']}, triton {where['triton'] or 'none'}"
    commit = f"{where['commit'] or 'an unknown commit'}{' with changes' if where['dirty'] else ''}"
    lossfuse = f"lossfuse {where['lossfuse']} at {commit}"
    title = f"{where['device']}, {versions}, {lossfuse}, {where['date']}"
    lines = [f"# {title}", ""]
    told = f"Goals: {totals}"
    if rehearsal:
        lines = [f"# Rehearsal without a GPU: {title}", "", REHEARSAL, ""]
        told = f"Goals, rehearsed: {totals}, which means nothing"
    lines += [f"Tests: {tests}. {told}.", "", f"Errors: {_cell(errors)}.", ""]
    lines += ["| goal | measured | |", "|---|---|---|"]
    for outcome in outcomes:
        verdict = f"{'rehearsed: ' * rehearsal}{outcome.verdict}"
        lines.append(f"| {_cell(str(outcome.goal))} | {_cell(outcome.measured)} | {verdict} |")
    if failed:
        lines += ["", "Not measured:", "", *(f"- {_cell(line)}" for line in failed)]
    return "\n".join(lines) + "\n", counts


def _shrunk(name: str) -> str:
    case = named(name, torch.device("cuda"))
    n, v = max(8, case.n // SHRINK["n"]), max(256 if case.p else 64, case.v // SHRINK["v"])
    if case.p is not None:
        return f"{n}x{v}p{case.p}"
    d = "" if case.d is None else f"{max(16, case.d // SHRINK['d'])}x"
    return f"{n}x{d}{v}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _log(out: Path, text: str) -> None:
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        log.write(text)
