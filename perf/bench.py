"""Cases x dtypes x modes x methods: checked against fp64, then timed in turn, then weighed; one row each."""

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from . import methods as known
from .cases import DTYPES, Case, named
from .environment import run_tests, stamp
from .methods import Method
from .problems import Errors, Head, Logits, Result, load
from .protocol import Step, peak_extra_bytes, synchronize, time_interleaved
from .rows import append

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
LEAST = "the least work"


@dataclass(frozen=True)
class Effort:
    """How long to measure: at most so many repeats of each method, and no new round past so many seconds of a mode of a case."""

    repeats: int = 15
    seconds: float = 20.0


def measure(
    case: Case,
    dtype_name: str,
    device: torch.device,
    modes: Sequence[str],
    methods: Sequence[Method],
    effort: Effort,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """One row per mode and method for the dtype. What fails, is wrong or does not fit is a row that says so, without numbers."""
    methods = [method for method in methods if dtype_name in method.dtypes]
    if "torch._dynamo" in sys.modules:
        # it gives up on a function after eight shapes
        torch.compiler.reset()
    dtype = DTYPES[dtype_name]
    head = {"case": case.name, "op": case.op, "dtype": dtype_name, "n": case.n, "v": case.v, "d": case.d if case.p is None else case.p}
    try:
        problem = load(case, dtype, device)
    except Exception as error:
        status, note = _failure(error)
        return [head | _of(m) | {"mode": mode, "status": status, "note": note} for mode in modes for m in methods]
    rows = []
    for mode in modes:
        say(f"{case.name} {dtype_name} {mode}")
        rows += [head | {"mode": mode} | row for row in _measure_mode(problem, mode, methods, device, effort)]
    return rows


def _of(method: Method) -> Row:
    return {"method": method.name, "package": method.release}


def _measure_mode(problem: Logits | Head, mode: str, methods: Sequence[Method], device: torch.device, effort: Effort) -> list[Row]:
    rows: list[Row] = []
    steps: dict[str, Step] = {}
    least, share = problem.least(mode)
    try:
        least.run()
        steps[LEAST] = least
    except Exception as error:
        # without a roofline the times still stand
        if _failure(error)[0] != "out of memory":
            raise
    for method in methods:
        row = _of(method) | {"status": "ok"}
        rows.append(row)
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
    times = time_interleaved(steps, device, effort.repeats, effort.seconds)
    ideal = times[LEAST].p50 * share if LEAST in times else None
    for row in rows:
        if row["method"] in times:
            timing = times[row["method"]]
            row |= {"ms_p50": timing.p50, "ms_p20": timing.p20, "ms_p80": timing.p80, "repeats": timing.repeats}
            row |= {"ideal_ms": ideal} | _ceiling(problem, mode, ideal)
    return rows


def _check(problem: Logits | Head, step: Step, device: torch.device) -> Errors:
    result = cast(Result, step.run(*step.prepare()))
    synchronize(device)
    return problem.errors(result)


def _ceiling(problem: Logits | Head, mode: str, ideal_ms: float | None) -> Row:
    if ideal_ms is None:
        return {}
    if isinstance(problem, Logits):
        return {"copy_gbps": problem.case.moved_bytes(mode, problem.logits.element_size()) / ideal_ms / 1e6}
    return {"matmul_tflops": problem.case.flops(mode) / ideal_ms / 1e9}


def _failure(error: Exception) -> tuple[str, str]:
    """Status and note; an exception that is about this program and not about a method is nobody's result."""
    first = (str(error).strip() or "no message").splitlines()[0][:300]
    full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return "out of memory" if full else "failed", f"{type(error).__name__}: {first}"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(
    cases: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], only: str | None, effort: Effort, out: Path | None, tests: str
) -> None:
    """Measure, print a table per case, append the rows of each dtype of it to a CSV as soon as they are measured.

    ``tests`` is what the rows say of this commit's tests; ``run`` runs them first.
    """
    from rich.console import Console

    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [named(name, device) for name in cases]
    if out is not None:
        # before minutes are spent on rows that cannot be kept
        append(out, [])
    if tests == "run":
        with console.status("running the tests of this commit"):
            tests, said = run_tests()
        console.print(f"tests: {tests}; {said.strip().splitlines()[-1]}", markup=False)
    where = stamp(device, tests)
    methods = {}
    for op in dict.fromkeys(case.op for case in chosen):
        methods[op], lines = known.of(op, device, only)
        for line in lines:
            console.print(line, style="dim", markup=False)
    facts = f"{where['device']}, torch {where['torch']}, commit {where['commit'] or 'unknown'}{' with changes' * where['dirty']}"
    console.print(facts, markup=False)
    for case in chosen:
        rows: list[Row] = []
        with console.status("") as status:
            for dtype in dtypes:
                made = [row | where for row in measure(case, dtype, device, modes, methods[case.op], effort, status.update)]
                rows += made
                _free(device)
                # at once: whoever stops this keeps what was measured
                if out is not None:
                    append(out, made)
        show(case, rows, console)
    if out is not None:
        console.print(f"rows: {out}", markup=False)


def show(case: Case, rows: list[Row], console: "Console") -> None:
    """A line per method, in groups of dtype and mode."""
    from rich.markup import escape
    from rich.table import Table

    title = escape(f"{case.name}: {case.size} - {case.reason}")
    least = "the matrix products alone" if case.op == "head" else "a copy of the logits (half of it without a backward)"
    unit = "relative to its row's largest" if case.op == "head" else "relative to itself"
    caption = f"roofline: {least}, timed in turn with the methods; memory beyond inputs, results included; "
    caption += f"error: of the worst entry of the gradient, {unit}"
    table = Table("", "method", "ms", "p20-p80", "faster", "roofline", "memory", "loss off", "error", title=title, caption=caption)
    for column in table.columns[2:]:
        column.justify = "right"
    groups = list(dict.fromkeys((row["dtype"], row["mode"]) for row in rows))
    for group in groups:
        mine = [row for row in rows if (row["dtype"], row["mode"]) == group]
        base = next((row.get("ms_p50") for row in mine if row["method"] == known.BASELINE[case.op]), None)
        for i, row in enumerate(mine):
            cells = [" ".join(group) if i == 0 else "", escape(row["method"])]
            if row["status"] != "ok":
                table.add_row(*cells, escape(f"{row['status']}: {row['note']}"), style="red", end_section=row is mine[-1])
                continue
            ms, peak = row["ms_p50"], row["peak_extra_bytes"]
            cells += [f"{ms:.3g}" if ms < 100 else f"{ms:.0f}", f"{row['ms_p20']:.3g}-{row['ms_p80']:.3g}"]
            cells += [f"{base / ms:.2f}" if base else "-", f"{row['ideal_ms'] / ms:.2f}" if row.get("ideal_ms") else "-"]
            cells += ["-" if peak is None else f"{peak / 2**20:,.0f} MiB", f"{row['loss_error']:.0e}"]
            cells += ["-" if row["grad_error"] is None else f"{row['grad_error']:.0e}"]
            table.add_row(*cells, end_section=row is mine[-1])
    console.print(table)
