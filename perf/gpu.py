"""Everything worth doing with a GPU in a few minutes: its tests, errors against bounds, the cases
behind our goals, a summary."""

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

from . import sanitizer, tables
from .bounds import exceeded
from .cases import named
from .environment import CHECKOUT, run_tests, stamp
from .goals import GOALS, Goal, judge
from .rows import BOUNDS, BadRows, read, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

# of the whole time: the tests may take this share, and goals get the rest
TESTS_SHARE = 0.25
# where there is a sanitizer: a program, three times under tools and once before them
SANITIZER_SHARE = 0.15
ERRORS_SECONDS = 60.0
# every kernel; all tests of a GPU, ten times as many, are pytest's own command (CONTRIBUTING.md)
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("values", "gpu", "fused_rows", "linear_rows", "stats_rows", "labels", "family")
)
TEST_WORKERS = 4
# a rehearsal runs a few tests of every kind and cases this much smaller
REHEARSED_TESTS = ("tests/test_values.py", "tests/test_closeness.py")
SHRINK = {"n": 64, "v": 32, "d": 16}
REHEARSAL = "No GPU: this is a rehearsal on the CPU with small cases. Its times, and its verdicts on goals of an H100, mean nothing."


@dataclass(frozen=True)
class Errand:
    """One call of ``bench`` in a process of its own: a kernel that dies takes no other case with
    it."""

    case: str
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    only: str | None

    def __str__(self) -> str:
        return f"{self.case} {' '.join(self.dtypes)}{' sweep' * (self.only == 'sweep')}"


# and that too: rows of a chunk and precision of the linear form, each variant about 41 ms a step
SWEEP = Errand("head-llama3", ("bf16",), ("forward+backward",), "sweep")


def errands(goals: Sequence[Goal]) -> list[Errand]:
    """What has to be measured for the goals: ours beside torch's, every case in all its dtypes."""
    found = []
    for case in dict.fromkeys(goal.case for goal in goals):
        dtypes, modes = (
            tuple(dict.fromkeys(getattr(g, name) for g in goals if g.case == case))
            for name in ("dtype", "mode")
        )
        found.append(Errand(case, dtypes, modes, "lossfuse"))
    return found


def peers(goals: Sequence[Goal]) -> list[Errand]:
    """With what time is left, all peers in bf16."""
    return [
        replace(errand, dtypes=("bf16",), only=None)
        for errand in errands(goals)
        if "bf16" in errand.dtypes
    ]


def main(out: Path, minutes: float) -> int:
    """Rows, those of bounds and of the sweep, log and summary under ``out``.

    1 if a test or a sanitizer failed, an error is beyond its bound or a goal was missed; 3 if
    something of it was not settled on a GPU; otherwise 0."""
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
    console.print(
        f"{where['device']}, torch {where['torch']}, triton {where['triton'] or 'none'}, at most {minutes:g} minutes"
    )
    if rehearsal:
        console.print(REHEARSAL)

    tests = _tests(out, rehearsal, 60 * minutes * TESTS_SHARE, console)
    errors, beyond = _errors(out, min(ERRORS_SECONDS, end - time.monotonic()), console)
    command = None if rehearsal else sanitizer.find()
    measured_by = end if command is None else end - 60 * minutes * SANITIZER_SHARE
    goals = [replace(goal, case=_shrunk(goal.case)) for goal in GOALS] if rehearsal else GOALS
    rows = out / "rows.csv"
    failed = _measure(errands(goals), rows, out, tests, measured_by, rehearsal, console)
    # in a file of its own: sixteen variants of one method would crowd a page
    sweep = replace(SWEEP, case=_shrunk(SWEEP.case) if rehearsal else SWEEP.case)
    failed += _measure(peers(goals), rows, out, tests, measured_by, rehearsal, console)
    failed += _measure([sweep], out / "sweep.csv", out, tests, measured_by, rehearsal, console)
    outcomes = _sanitize(command, out, end, console)
    summary, counts = summarize(
        goals, rows, where, tests, errors, outcomes, failed, rehearsal=rehearsal
    )
    write_atomically(out / "summary.md", summary.encode())
    console.print(summary, markup=False)
    console.print(f"rows, bounds, sweep, log and summary: {out}", markup=False)
    verdicts = {outcome.verdict for outcome in outcomes}
    if tests == "failed" or beyond or "failed" in verdicts or (counts["miss"] and not rehearsal):
        return 1
    settled = (
        tests == "passed"
        and beyond is not None
        and "not run" not in verdicts
        and not counts["not measured"]
    )
    return 0 if settled or rehearsal else 3


def _tests(out: Path, rehearsal: bool, seconds: float, console: "Console") -> str:
    # four processes compile at once
    workers = ("-n", str(TEST_WORKERS)) if importlib.util.find_spec("xdist") is not None else ()
    arguments = REHEARSED_TESTS if rehearsal else (*TESTS, "-m", "gpu and not slow", *workers)
    with console.status(f"tests, at most {seconds:.0f} s"):
        start = time.monotonic()
        tests, said = run_tests(*arguments, limit_seconds=seconds)
    _log(out, f"$ pytest {' '.join(arguments)}\n{said}\n")
    console.print(
        f"tests: {tests} in {time.monotonic() - start:.0f} s; {(said.strip().splitlines() or [''])[-1]}",
        markup=False,
    )
    return tests


def _errors(out: Path, seconds: float, console: "Console") -> tuple[str, bool | None]:
    """What errors came to in units of their bounds, in words, and whether one is beyond; None where
    nobody knows."""
    file = out / "bounds.csv"
    with console.status(f"errors against bounds, at most {seconds:.0f} s"):
        trouble = _called(out, ["bounds", "--out", str(file.resolve())], seconds)
    made = read([file], BOUNDS) if file.exists() else None
    if made is None or not len(made):
        console.print(f"errors: not measured: {trouble}", markup=False)
        return f"not measured: {trouble}", None
    made = made[made["date"] == made["date"].max()]
    beyond = exceeded(made.to_dict("records"))
    unfinished = [trouble] if trouble.startswith("stopped") else []
    told = "; ".join(
        [f"{len(beyond)} of {len(made)} beyond their bounds", *beyond[:5], *unfinished]
    )
    console.print(f"errors: {told}", markup=False)
    return told, True if beyond else None if unfinished else False


def _measure(
    todo: list[Errand],
    rows: Path,
    out: Path,
    tests: str,
    end: float,
    rehearsal: bool,
    console: "Console",
) -> list[str]:
    """What could not be measured, a line each."""
    failed = []
    for i, errand in enumerate(todo):
        left = end - time.monotonic()
        # what is left, in equal shares, but twice a share for one that needs it
        limit = min(left, max(2 * left / (len(todo) - i), 20.0))
        if left < 10:
            failed += [f"{e}: no time left" for e in todo[i:]]
            break
        command = ["bench", "--cases", errand.case, "--dtypes", *errand.dtypes]
        command += [
            "--modes",
            *errand.modes,
            "--out",
            str(rows.resolve()),
            "--tests",
            tests,
            "--seconds",
            f"{limit / 20:.2f}",
        ]
        command += ["--methods", errand.only] if errand.only else []
        command += ["--repeats", "3"] if rehearsal else []
        with console.status(f"{i + 1} of {len(todo)}: {errand}, {left:.0f} s left"):
            trouble = _called(out, command, limit)
        if trouble:
            failed.append(f"{errand}: {trouble}")
        console.print(f"{errand} {trouble.partition(';')[0] or 'measured'}", markup=False)
    return failed


def _called(out: Path, arguments: list[str], limit: float) -> str:
    """A command of this package in a process of its own, what it says in the log; '' or what went
    wrong and the last it said."""
    command = [sys.executable, "-m", "lossfuse.perf", *arguments]
    # what a rehearsal compares would take the interpreter minutes
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
        said = (
            error.stdout.decode(errors="replace")
            if isinstance(error.stdout, bytes)
            else error.stdout or ""
        )
        trouble = f"stopped after {limit:.0f} s"
    _log(out, f"$ {' '.join(command[1:])}\n{said}\n")
    return trouble and f"{trouble}; {(said.strip().splitlines() or [''])[-1]}"


def _sanitize(
    command: str | None, out: Path, end: float, console: "Console"
) -> list[sanitizer.Outcome]:
    """What each tool of the sanitizer finds, in equal shares of what time is left; nothing where
    there is none."""
    if command is None:
        console.print(
            f"{sanitizer.COMMAND}: not looked for without a GPU, or not on the path nor in a CUDA toolkit",
            markup=False,
        )
        return []
    with console.status("what the sanitizer watches, compiled first"):
        trouble = sanitizer.compile_first(max(1.0, (end - time.monotonic()) / 2))
    if trouble:
        console.print(f"what the sanitizer watches, without it: {trouble}", markup=False)
    outcomes = []
    for i, tool in enumerate(sanitizer.TOOLS):
        limit = (end - time.monotonic()) / (len(sanitizer.TOOLS) - i)
        if limit < 5:
            outcome = sanitizer.Outcome(tool, "not run", "no time left", "")
        else:
            with console.status(f"{tool}, at most {limit:.0f} s"):
                outcome = sanitizer.run(command, tool, limit)
        _log(out, f"$ {sanitizer.COMMAND} --tool {tool}\n{outcome.said}\n")
        console.print(f"{tool} {outcome.verdict}: {outcome.why}", markup=False)
        outcomes.append(outcome)
    return outcomes


def summarize(
    goals: Sequence[Goal],
    rows: Path,
    where: dict[str, object],
    tests: str,
    errors: str,
    sanitized: Sequence[sanitizer.Outcome],
    failed: Sequence[str],
    *,
    rehearsal: bool = False,
) -> tuple[str, dict[str, int]]:
    """A page of Markdown, and how many goals are of each verdict. That of a rehearsal says first
    that these mean nothing."""
    frame = read([rows] if rows.exists() else [])
    outcomes = [judge(goal, frame) for goal in goals]
    counts = {
        verdict: sum(o.verdict == verdict for o in outcomes)
        for verdict in ("pass", "miss", "not measured")
    }
    told = f"{counts['pass']} pass, {counts['miss']} miss, {counts['not measured']} not measured"
    title, goals_told, verdict = "", f"Goals: {told}", ""
    if rehearsal:
        title, goals_told, verdict = (
            "Rehearsal without a GPU: ",
            f"Goals, rehearsed: {told}, which means nothing",
            "rehearsed: ",
        )
    lines = [
        f"# {title}{where['device']}, torch {where['torch']}, triton {where['triton'] or 'none'}, lossfuse {where['lossfuse']} at "
        f"{where['commit'] or 'an unknown commit'}{' with changes' if where['dirty'] else ''}, {where['date']}",
        "",
        *([REHEARSAL, ""] if rehearsal else []),
        f"Tests: {tests}. {goals_told}.",
        "",
        f"Errors: {_cell(errors)}.",
        "",
        "| goal | measured | |",
        "|---|---|---|",
        *(
            f"| {_cell(str(o.goal))} | {_cell(o.measured)} | {verdict}{o.verdict} |"
            for o in outcomes
        ),
    ]
    if sanitized:
        lines += ["", "Every kernel under compute-sanitizer:", ""]
        lines += [f"- {o.tool} {o.verdict}: {_cell(o.why)}" for o in sanitized]
    if failed:
        lines += ["", "Not measured:", "", *(f"- {_cell(line)}" for line in failed)]
    return "\n".join(lines) + "\n", counts


def _shrunk(name: str) -> str:
    case = named(name, torch.device("cuda"))
    n, v = (
        max(8, case.n // SHRINK["n"]),
        max(256, case.v // SHRINK["v"]) if case.p else max(64, case.v // SHRINK["v"]),
    )
    if case.p is not None:
        return f"{n}x{v}p{case.p}"
    d = "" if case.d is None else f"{max(16, case.d // SHRINK['d'])}x"
    return f"{n}x{d}{v}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _log(out: Path, text: str) -> None:
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        log.write(text)
