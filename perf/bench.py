"""Benchmark: each method is checked against fp64, timed in turn with the others, and weighed."""

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
    """Limits: repeats of each method, and seconds after which no round of a mode begins."""

    repeats: int = 15
    seconds: float = 20.0


@dataclass
class Pace:
    """Progress of a run; a part is a mode of a dtype of a case."""

    parts: int
    seconds: float  # estimate for a part until one is done
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    begin: float = field(init=False)
    latest: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.latest = self.clock()

    def finish(self) -> None:
        self.done, self.latest = self.done + 1, self.clock()

    def said(self, what: str) -> str:
        """A line such as ``3 of 12: what, about 2 min left``."""
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
    """One row per mode and method; a failed, wrong or too large method has a status, no numbers.

    ``say`` gets a line of progress, ``keep`` the rows of a mode as soon as they are measured."""
    methods = [method for method in methods if dtype_name in method.dtypes]
    if "torch._dynamo" in sys.modules:
        # torch.compile gives up on a function after eight shapes
        torch.compiler.reset()
    head = {"case": case.name, "op": case.op, "dtype": dtype_name, "n": case.n, "v": case.v}
    head["d"] = case.d if case.p is None else case.p
    rows: list[Row] = []
    problem: Logits | Head | None = None
    why = "", ""
    say(f"{case.name} {dtype_name} {modes[0]}, inputs")
    try:
        problem = load(case, DTYPES[dtype_name], device)
    except Exception as error:
        why = _failure(error)
    for mode in modes:
        if problem is None:
            found: list[Row] = [_of(m) | {"status": why[0], "note": why[1]} for m in methods]
        else:
            needs = {n.method: n.bytes for n in estimate(case, dtype_name, mode, device.type)}
            tell = partial(_say_part, say, f"{case.name} {dtype_name} {mode}")
            found = _measure_mode(problem, mode, methods, device, effort, needs, tell)
        interrupts.check()
        found = [head | {"mode": mode} | row for row in found]
        keep(found)
        rows += found
    return rows


def _say_part(say: Callable[[str], None], part: str, what: str) -> None:
    say(f"{part}, {what}")


def too_large(case: Case, dtype_name: str, device: torch.device) -> str | None:
    """The reason why a case does not fit into the available memory."""
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
    if _runs_least(problem, least, needs, device):
        steps[LEAST] = least
    for method in methods:
        say(method.name)
        row, step = _checked(problem, mode, method, device, needs)
        rows.append(row)
        if step is not None:
            steps[method.name] = step
    steps = {name: replace(step, prepare=_saying(say, name, step)) for name, step in steps.items()}
    times = time_interleaved(steps, device, effort.repeats, effort.seconds) if steps else {}
    ideal = times[LEAST].p50 * share if LEAST in times else None
    for row in rows:
        if (timing := times.get(row["method"])) is not None:
            row |= {"ms_p50": timing.p50, "ms_p20": timing.p20, "ms_p80": timing.p80}
            row |= {"repeats": timing.repeats, "ideal_ms": ideal}
            row |= _ceiling(problem, mode, ideal)
    return rows


def _runs_least(
    problem: Logits | Head, least: Step, needs: Mapping[str, int], device: torch.device
) -> bool:
    """Run the least work once; False if it does not fit, and rows have times without a roofline."""
    # the products of a head need what torch's own method needs, or less
    need = needs.get(known.BASELINE[problem.case.op], 0) if isinstance(problem, Head) else 0
    if _beyond(need, device) is not None:
        return False
    try:
        least.run()
    except Exception as error:
        if _failure(error)[0] != "out of memory":
            raise
        return False
    return True


def _checked(
    problem: Logits | Head,
    mode: str,
    method: Method,
    device: torch.device,
    needs: Mapping[str, int],
) -> tuple[Row, Step | None]:
    """The row of a method before it is timed, and its step if it is correct."""
    row = _of(method) | {"status": "ok"}
    copied = problem.logits.nbytes if method.consumes and isinstance(problem, Logits) else 0
    note = _beyond(needs[method.name] + copied, device) if method.name in needs else None
    if note is not None:
        return row | {"status": "out of memory", "note": note}, None
    try:
        step = problem.step(method.make(), mode, method.consumes)
        errors = _check(problem, step, device)
        row |= {"loss_error": errors.loss, "grad_error": errors.grad}
        complaint = errors.complaint(problem.dtype, problem.loss_gate)
        if complaint is not None:
            return row | {"status": "wrong", "note": complaint}, None
        return row | {"peak_extra_bytes": peak_extra_bytes(step, device)}, step
    except Exception as error:
        row["status"], row["note"] = _failure(error)
        _free(device)
    return row, None


def _saying(say: Callable[[str], None], name: str, step: Step) -> Callable[[], tuple[Any, ...]]:
    def prepare() -> tuple[Any, ...]:
        interrupts.check()
        say(name)
        return step.prepare()

    return prepare


def _beyond(need: int, device: torch.device) -> str | None:
    """A sentence if more bytes are needed than available."""
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
    """Status and note of an exception."""
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
    """Measure, print a table per case, append the rows of each mode to a CSV.

    ``tests`` goes into the rows as the state of this commit's tests; ``run`` runs them first.
    Mistake if nothing could be measured."""
    console = tables.console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [named(name, device) for name in cases]
    ops = list(dict.fromkeys(case.op for case in chosen))
    if only is not None:
        known.require(ops, only)
    if out is not None:
        # before minutes are spent on rows that cannot be written
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
    commit = f"{where['commit'] or 'unknown'}{' with changes' * where['dirty']}"
    facts = f"{where['device']}, torch {where['torch']}, commit {commit}"
    console.print(facts, markup=False)
    run = _Run(device, modes, effort, console, where, out)
    todo = [(case, _dtypes(methods[case.op], dtypes)) for case in chosen]
    run.pace.parts = len(modes) * sum(len(there) for _, there in todo)
    for case, there in todo:
        missing = [dtype for dtype in dtypes if dtype not in there]
        run.refused += [f"{case.name} has no method in {dtype}" for dtype in missing]
        run.measure(case, there, methods[case.op])
    for line in run.refused:
        console.print(line, style="red", markup=False)
    if not run.pace.done:
        raise Mistake("nothing was measured; see above")


def _dtypes(methods: Sequence[Method], dtypes: Sequence[str]) -> list[str]:
    return [dtype for dtype in dtypes if any(dtype in method.dtypes for method in methods)]


@dataclass
class _Run:
    """One call of the command: progress, and the reasons for cases that were not measured."""

    device: torch.device
    modes: Sequence[str]
    effort: Effort
    console: "Console"
    where: Row
    out: Path | None
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pace = Pace(0, self.effort.seconds)
        self.told = -1

    def measure(self, case: Case, dtypes: Sequence[str], methods: Sequence[Method]) -> None:
        """Measure a case, append its rows to the file, print its table."""
        rows: list[Row] = []

        def keep(found: list[Row]) -> None:
            found = [row | self.where for row in found]
            rows.extend(found)
            self.pace.finish()
            # mode by mode: an interrupt loses one at most
            if self.out is not None:
                append(self.out, found)

        try:
            with self.console.status("") as status:
                say = partial(self._say, status)
                for dtype in dtypes:
                    why = too_large(case, dtype, self.device)
                    if why is not None:
                        self.refused.append(why)
                        self.pace.parts -= len(self.modes)
                        continue
                    given = (case, dtype, self.device, self.modes, methods, self.effort)
                    measure(*given, say, keep)
                    _free(self.device)
        finally:
            # also after an interrupt
            if rows:
                show(case, rows, self.console)
            if rows and self.out is not None:
                self.console.print(f"rows: {self.out}", markup=False)

    def _say(self, status: Any, what: str) -> None:
        line = self.pace.said(what)
        status.update(line)
        # a status line moves on a terminal alone
        if not self.console.is_terminal and self.told != self.pace.done:
            line = self.pace.said(what.rpartition(",")[0])
            self.console.print(line, markup=False, highlight=False)
            self.told = self.pace.done


# a narrow terminal omits columns of high rank first
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
    """Print a line per method, in groups of dtype and mode."""
    head = case.op == "head"
    copy = "a copy of the logits (half of it without a backward)"
    least = "the matrix products alone" if head else copy
    unit = "relative to its row's largest" if head else "relative to itself"
    roofline = f"roofline: {least}, timed in turn with the methods"
    memory = "memory beyond inputs, results included"
    caption = f"{roofline}; {memory}; error: of the worst entry of the gradient, {unit}"
    base = {
        (row["dtype"], row["mode"]): row.get("ms_p50")
        for row in rows
        if row["method"] == known.BASELINE[case.op]
    }
    lines = []
    for row in rows:
        group = f"{row['dtype']} {row['mode']}"
        if row["status"] != "ok":
            remark = f"{row['status']}: {row['note']}"
            lines.append(tables.Line([row["method"]], group, remark, "red"))
            continue
        ms, peak, eager = (
            row["ms_p50"],
            row["peak_extra_bytes"],
            base.get((row["dtype"], row["mode"])),
        )
        cells = [row["method"], f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"]
        cells.append(f"{row['ms_p20']:.3g}-{row['ms_p80']:.3g}")
        cells.append(f"{eager / ms:.2f}" if eager else "-")
        cells.append(f"{row['ideal_ms'] / ms:.2f}" if row.get("ideal_ms") else "-")
        cells.append("-" if peak is None else f"{peak / 2**20:,.0f} MiB")
        cells.append(f"{row['loss_error']:.0e}")
        cells.append("-" if row["grad_error"] is None else f"{row['grad_error']:.0e}")
        lines.append(tables.Line(cells, group))
    tables.show(console, COLUMNS, lines, f"{case.name}: {case.size} - {case.reason}", caption)
