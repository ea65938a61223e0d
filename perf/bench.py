"""Cases x dtypes x modes x methods: checked against fp64, then timed in turn, then weighed; one row
each."""

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from . import interrupts, tables
from . import methods as known
from .cases import DTYPES, Case, named
from .environment import run_tests, stamp
from .estimate import estimate, gib
from .methods import Method
from .mistakes import Mistake
from .problems import Errors, Head, Logits, Result, bytes_of, load
from .protocol import Step, available_bytes, peak_extra_bytes, synchronize, time_interleaved
from .rows import append

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
LEAST = "the least work"


@dataclass(frozen=True)
class Effort:
    """How long to measure: at most so many repeats of each method, and no new round past so many
    seconds of a mode of a case."""

    repeats: int = 15
    seconds: float = 20.0


@dataclass
class Pace:
    """How far a run is; a part is a mode of a dtype of a case."""

    parts: int
    seconds: float  # of a part, until one has been measured
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    begin: float = field(init=False)
    latest: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.latest = self.clock()

    def finish(self) -> None:
        self.done, self.latest = self.done + 1, self.clock()

    def said(self, what: str) -> str:
        """3 of 12: what, about 2 min left."""
        each = (self.latest - self.begin) / self.done if self.done else self.seconds
        left = max(0.0, each * (self.parts - self.done) - (self.clock() - self.latest))
        about = f"{left / 60:.0f} min" if left >= 90 else f"{max(1.0, left):.0f} s"
        return f"{self.done + 1} of {self.parts}: {what}, about {about} left"


def measure(
    case: Case,
    dtype_name: str,
    device: torch.device,
    modes: Sequence[str],
    methods: Sequence[Method],
    effort: Effort,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """One row per mode and method for the dtype. What fails, is wrong or does not fit is a row that
    says so, without numbers.

    ``say`` is told what is measured, and ``keep`` is given the rows of each mode as soon as they
    are there."""
    methods = [method for method in methods if dtype_name in method.dtypes]
    if "torch._dynamo" in sys.modules:
        # it gives up on a function after eight shapes
        torch.compiler.reset()
    dtype = DTYPES[dtype_name]
    head = {
        "case": case.name,
        "op": case.op,
        "dtype": dtype_name,
        "n": case.n,
        "v": case.v,
        "d": case.d if case.p is None else case.p,
    }
    rows: list[Row] = []
    problem: Logits | Head | None = None
    why = "", ""
    say(f"{case.name} {dtype_name} {modes[0]}, inputs")
    try:
        problem = load(case, dtype, device)
    except Exception as error:
        why = _failure(error)
    for mode in modes:
        if problem is None:
            made: list[Row] = [_of(m) | {"status": why[0], "note": why[1]} for m in methods]
        else:
            needs = {
                need.method: need.bytes for need in estimate(case, dtype_name, mode, device.type)
            }
            part = f"{case.name} {dtype_name} {mode}"
            made = _measure_mode(
                problem, mode, methods, device, effort, needs, partial(_say_part, say, part)
            )
        interrupts.check()
        made = [head | {"mode": mode} | row for row in made]
        keep(made)
        rows += made
    return rows


def _say_part(say: Callable[[str], None], part: str, what: str) -> None:
    say(f"{part}, {what}")


def too_large(case: Case, dtype_name: str, device: torch.device) -> str | None:
    """Why a case cannot be loaded into the memory that is available."""
    room = available_bytes(device)
    _, most = bytes_of(case, DTYPES[dtype_name])
    if room is None or most <= room:
        return None
    need = f"its inputs and their check in float64 need {gib(most)}"
    return f"{case.name} in {dtype_name} is not run: {need}, {gib(room)} are available"


def _of(method: Method) -> Row:
    return {"method": method.name, "package": method.release}


def _measure_mode(
    problem: Logits | Head,
    mode: str,
    methods: Sequence[Method],
    device: torch.device,
    effort: Effort,
    needs: Mapping[str, int],
    say: Callable[[str], None],
) -> list[Row]:
    rows: list[Row] = []
    steps: dict[str, Step] = {}
    least, share = problem.least(mode)
    try:
        # the products of a head alone hold what torch's own way holds, or less
        if (
            _beyond(
                needs.get(known.BASELINE[problem.case.op], 0) if isinstance(problem, Head) else 0,
                device,
            )
            is None
        ):
            least.run()
            steps[LEAST] = least
    except Exception as error:
        # without a roofline the times still stand
        if _failure(error)[0] != "out of memory":
            raise
    for method in methods:
        say(method.name)
        row = _of(method) | {"status": "ok"}
        rows.append(row)
        copied = problem.logits.nbytes if method.consumes and isinstance(problem, Logits) else 0
        note = _beyond(needs[method.name] + copied, device) if method.name in needs else None
        if note is not None:
            row |= {"status": "out of memory", "note": note}
            continue
        try:
            step = problem.step(method.make(), mode, method.consumes)
            errors = _check(problem, step, device)
            row |= {"loss_error": errors.loss, "grad_error": errors.grad}
            complaint = errors.complaint(problem.dtype, problem.loss_gate)
            if complaint is None:
                row["peak_extra_bytes"] = peak_extra_bytes(step, device)
                steps[method.name] = step
            else:
                row |= {"status": "wrong", "note": complaint}
        except Exception as error:
            row["status"], row["note"] = _failure(error)
            _free(device)
    steps = {name: replace(step, prepare=_saying(say, name, step)) for name, step in steps.items()}
    times = time_interleaved(steps, device, effort.repeats, effort.seconds) if steps else {}
    ideal = times[LEAST].p50 * share if LEAST in times else None
    for row in rows:
        if row["method"] in times:
            timing = times[row["method"]]
            row |= {
                "ms_p50": timing.p50,
                "ms_p20": timing.p20,
                "ms_p80": timing.p80,
                "repeats": timing.repeats,
            }
            row |= {"ideal_ms": ideal} | _ceiling(problem, mode, ideal)
    return rows


def _saying(say: Callable[[str], None], name: str, step: Step) -> Callable[[], tuple[Any, ...]]:
    def prepare() -> tuple[Any, ...]:
        interrupts.check()
        say(name)
        return step.prepare()

    return prepare


def _beyond(need: int, device: torch.device) -> str | None:
    """A sentence if so many bytes are not available."""
    room = available_bytes(device)
    if room is None or need <= room:
        return None
    need_text = f"by formula it needs {gib(need)} beyond its inputs"
    return f"{need_text} and {gib(room)} are available; not run"


def _check(problem: Logits | Head, step: Step, device: torch.device) -> Errors:
    result = cast(Result, step.run(*step.prepare()))
    synchronize(device)
    return problem.errors(result)


def _ceiling(problem: Logits | Head, mode: str, ideal_ms: float | None) -> Row:
    if ideal_ms is None:
        return {}
    if isinstance(problem, Logits):
        return {
            "copy_gbps": problem.case.moved_bytes(mode, problem.logits.element_size())
            / ideal_ms
            / 1e6
        }
    return {"matmul_tflops": problem.case.flops(mode) / ideal_ms / 1e9}


def _failure(error: Exception) -> tuple[str, str]:
    """Status and note; an exception that is about this program and not about a method is nobody's
    result."""
    first = (str(error).strip() or "no message").splitlines()[0][:300]
    full = isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)
    return "out of memory" if full else "failed", f"{type(error).__name__}: {first}"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(
    cases: Sequence[str],
    dtypes: Sequence[str],
    modes: Sequence[str],
    only: str | None,
    effort: Effort,
    out: Path | None,
    tests: str,
) -> None:
    """Measure, print a table per case, append the rows of each mode of it to a CSV as soon as they
    are measured.

    ``tests`` is what the rows say of this commit's tests; ``run`` runs them first. Mistake if
    nothing could be measured."""
    console = tables.console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [named(name, device) for name in cases]
    ops = list(dict.fromkeys(case.op for case in chosen))
    if only is not None:
        known.require(ops, only)
    if out is not None:
        # before minutes are spent on rows that cannot be kept
        append(out, [])
    if tests == "run":
        with console.status("running the tests of this commit"):
            tests, said = run_tests()
        console.print(f"tests: {tests}; {said.strip().splitlines()[-1]}", markup=False)
    where = stamp(device, tests)
    methods = {}
    for op in ops:
        methods[op], lines = known.of(op, device, only)
        for line in lines:
            console.print(line, style="dim", markup=False)
    facts = f"{where['device']}, torch {where['torch']}, commit {where['commit'] or 'unknown'}{' with changes' * where['dirty']}"
    console.print(facts, markup=False)
    todo = [
        (
            case,
            [
                dtype
                for dtype in dtypes
                if any(dtype in method.dtypes for method in methods[case.op])
            ],
        )
        for case in chosen
    ]
    pace = Pace(len(modes) * sum(len(there) for _, there in todo), effort.seconds)
    refused = []
    for case, there in todo:
        refused += [
            f"{case.name} has no method in {dtype}" for dtype in dtypes if dtype not in there
        ]
        rows: list[Row] = []
        try:
            _measure_case(
                case,
                there,
                device,
                modes,
                methods[case.op],
                effort,
                pace,
                console,
                rows,
                refused,
                where,
                out,
            )
        finally:
            # also of a case that was interrupted
            if rows:
                show(case, rows, console)
            if rows and out is not None:
                console.print(f"rows: {out}", markup=False)
    for line in refused:
        console.print(line, style="red", markup=False)
    if not pace.done:
        raise Mistake("nothing was measured; see above")


def _measure_case(
    case: Case,
    dtypes: Sequence[str],
    device: torch.device,
    modes: Sequence[str],
    methods: Sequence[Method],
    effort: Effort,
    pace: Pace,
    console: "Console",
    rows: list[Row],
    refused: list[str],
    where: Row,
    out: Path | None,
) -> None:
    """Add the rows of a case to ``rows`` and to the file, and to ``refused`` what does not fit."""
    told = -1
    with console.status("") as status:

        def say(what: str) -> None:
            nonlocal told
            status.update(pace.said(what))
            # elsewhere than on a terminal nothing moves
            if not console.is_terminal and told != pace.done:
                console.print(pace.said(what.rpartition(",")[0]), markup=False, highlight=False)
                told = pace.done

        def keep(made: list[Row]) -> None:
            made = [row | where for row in made]
            rows.extend(made)
            pace.finish()
            # at once: an interrupt loses no more than one mode
            if out is not None:
                append(out, made)

        for dtype in dtypes:
            why = too_large(case, dtype, device)
            if why is not None:
                refused.append(why)
                pace.parts -= len(modes)
                continue
            measure(case, dtype, device, modes, methods, effort, say, keep)
            _free(device)


# numbers that say less are left out first where a terminal is narrow
COLUMNS = (
    tables.Column("method", right=False),
    tables.Column("ms"),
    tables.Column("p20-p80", rank=4),
    tables.Column("faster"),
    tables.Column("roofline", rank=3),
    tables.Column("memory"),
    tables.Column("loss off", rank=2),
    tables.Column("error", rank=1),
)


def show(case: Case, rows: list[Row], console: "Console") -> None:
    """A line per method, in groups of dtype and mode."""
    least = (
        "the matrix products alone"
        if case.op == "head"
        else "a copy of the logits (half of it without a backward)"
    )
    unit = "relative to its row's largest" if case.op == "head" else "relative to itself"
    caption = f"roofline: {least}, timed in turn with the methods; memory beyond inputs, results included; "
    caption += f"error: of the worst entry of the gradient, {unit}"
    lines = []
    for row in rows:
        group = f"{row['dtype']} {row['mode']}"
        base = next(
            (
                r.get("ms_p50")
                for r in rows
                if f"{r['dtype']} {r['mode']}" == group and r["method"] == known.BASELINE[case.op]
            ),
            None,
        )
        if row["status"] != "ok":
            lines.append(
                tables.Line([row["method"]], group, f"{row['status']}: {row['note']}", "red")
            )
            continue
        ms, peak = row["ms_p50"], row["peak_extra_bytes"]
        cells = [
            row["method"],
            f"{ms:.3g}" if ms < 100 else f"{ms:.0f}",
            f"{row['ms_p20']:.3g}-{row['ms_p80']:.3g}",
        ]
        cells += [
            f"{base / ms:.2f}" if base else "-",
            f"{row['ideal_ms'] / ms:.2f}" if row.get("ideal_ms") else "-",
        ]
        cells += ["-" if peak is None else f"{peak / 2**20:,.0f} MiB", f"{row['loss_error']:.0e}"]
        cells += ["-" if row["grad_error"] is None else f"{row['grad_error']:.0e}"]
        lines.append(tables.Line(cells, group))
    tables.show(console, COLUMNS, lines, f"{case.name}: {case.size} - {case.reason}", caption)
