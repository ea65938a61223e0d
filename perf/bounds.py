"""Errors of losses and gradients against float64, in units of a bound for each entry.

A ratio above 1 is a wrong result. docs/numerics.md derives the bounds. The upstream gradient of a
mean is a power of two near N: it is exact, and float16 can represent the entries."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lossfuse

from ..ops.chunk_plan import chunk_plan, padded
from . import bound_cases, interrupts, tables
from .cases import DTYPES
from .error_bounds import (
    SMALLEST,
    Finding,
    Roundings,
    U,
    distance,
    half_ulp,
    mean_error,
    rows_of,
    unit_roundoff,
    upstream,
    worst,
)
from .rows import BOUNDS, append

Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A way to compute a result: in place for logits; rows of a chunk and precision for a head."""

    name: str
    impl: str
    inplace: bool = False
    rows: int | None = None
    lean: bool = False


class LogitsResult(NamedTuple):
    """Losses of rows, their mean, and its gradient times ``upstream``."""

    losses: Tensor
    mean: Tensor
    dlogits: Tensor


class LogitsProblem:
    """Logits (N, V) and class ids, with the float64 result."""

    op = "logits"

    def __init__(self, logits: Tensor, target: Tensor, averages: bool = False) -> None:
        self.logits, self.target, self.averages = logits, target, averages
        self.n, self.v, self.d = *logits.shape, None
        # ignored rows may contain NaN
        self.rows = rows_of(logits.double().where((target != -100)[:, None], 0.0), target, 0.0)
        self.scale = upstream(self.n) / (target != -100).sum().clamp(min=1)

    def call(self, how: Variant) -> LogitsResult:
        target, impl = self.target, how.impl
        losses = lossfuse.cross_entropy(self.logits, target, reduction="none", impl=impl)
        leaf = self.logits.detach().requires_grad_()
        consumed = leaf * 1.0 if how.inplace else leaf
        mean = lossfuse.cross_entropy(consumed, target, inplace=how.inplace, impl=impl)
        seed = torch.full_like(mean, upstream(self.n))
        return LogitsResult(losses, mean.detach(), torch.autograd.grad(mean, leaf, seed)[0])

    def judge(self, got: LogitsResult, how: Variant | None = None) -> Iterator[Finding]:
        rows = self.rows
        mean, mean_bound = rows.mean(self.target)
        want, bound = rows.grad * self.scale, rows.grad_bound * self.scale
        yield worst("loss", distance(got.losses, rows.loss), rows.loss_bound)
        yield worst("mean loss", distance(got.mean, mean), mean_bound)
        error = (distance(got.dlogits, want) - half_ulp(got.dlogits)).clamp(min=0.0)
        yield worst("dlogits", error, bound + 2.0 * upstream(self.n) * SMALLEST)
        if self.averages:
            losses, loss, loss_bound = (
                t[:, None] for t in (got.losses, rows.loss, rows.loss_bound)
            )
            yield mean_error("loss", losses, loss, loss_bound, loss)
            # subnormal entries may be flushed to 0
            normal = want.abs() > 2.0 * torch.finfo(got.dlogits.dtype).smallest_normal
            yield mean_error("dlogits", got.dlogits, want, bound, want.abs() * normal)


class HeadResult(NamedTuple):
    """Losses of rows, their mean, and its gradients times ``upstream``."""

    losses: Tensor
    mean: Tensor
    dhidden: Tensor
    dweight: Tensor


class HeadProblem:
    """Hidden states (N, D), a weight (V, D) and class ids, with the float64 logits."""

    op = "head"

    def __init__(
        self, hidden: Tensor, weight: Tensor, target: Tensor, averages: bool = False
    ) -> None:
        self.hidden, self.weight, self.target, self.averages = hidden, weight, target, averages
        (self.n, self.d), self.v = hidden.shape, len(weight)
        self.x = hidden.double().where((target != -100)[:, None], 0.0)
        self.w = weight.double()
        self.z = self.x @ self.w.T
        self.delta = U * (math.sqrt(self.d) * (self.x.abs() @ self.w.abs().T) + self.z.abs())
        self.scale = upstream(self.n) / (target != -100).sum().clamp(min=1)

    def options(self, how: Variant) -> lossfuse.LinearOptions:
        dtype = torch.bfloat16 if how.lean else None
        itemsize = 2 if how.lean else 4
        size = None if how.rows is None else how.rows * padded(self.v) * itemsize
        return lossfuse.LinearOptions(chunk_bytes=size, logits_dtype=dtype, acc_dtype=dtype)

    def call(self, how: Variant) -> HeadResult:
        target, given = self.target, {"options": self.options(how), "impl": how.impl}
        loss_fn: Any = lossfuse.linear_cross_entropy
        losses = loss_fn(self.hidden, self.weight, target, reduction="none", **given)
        operands = [t.detach().requires_grad_() for t in (self.hidden, self.weight)]
        mean = loss_fn(*operands, target, **given)
        seed = torch.full_like(mean, upstream(self.n))
        return HeadResult(losses, mean.detach(), *torch.autograd.grad(mean, operands, seed))

    def roundings(self, how: Variant) -> Roundings:
        dtype, cpu = self.hidden.dtype, self.hidden.device.type == "cpu"
        size = self.n, self.d, self.v, dtype
        plan = chunk_plan(*size, self.options(how), narrow_sums=not cpu, cpu=cpu)
        narrow = unit_roundoff(torch.bfloat16) if how.lean else 0.0
        # on a CPU operands are upcast, and products are in float32
        grad = narrow if cpu or dtype == torch.float32 else unit_roundoff(dtype)
        # gradients are scaled to 256 before they are rounded to float16
        floor = 2.0**-25 / 256.0 if dtype == torch.float16 and not cpu else 0.0
        # rounded for each product, and multiplied by the upstream gradient
        rounded = plan.sum_dtype == torch.bfloat16
        sums = unit_roundoff(torch.bfloat16) if rounded else 0.0
        return Roundings(narrow, grad, floor, sums, math.ceil(self.n / plan.grad_rows) + rounded)

    def judge(self, got: HeadResult, how: Variant | Roundings) -> Iterator[Finding]:
        how = self.roundings(how) if isinstance(how, Variant) else how
        rows = rows_of(self.z, self.target, self.delta + how.logits * self.z.abs())
        mean, mean_bound = rows.mean(self.target)
        grad, floor = rows.grad * self.scale, self.scale * how.floor
        bound = rows.grad_bound * self.scale + how.grad * grad.abs() + floor
        bound = bound + 2.0 * upstream(self.n) * SMALLEST
        yield worst("loss", distance(got.losses, rows.loss), rows.loss_bound)
        yield worst("mean loss", distance(got.mean, mean), mean_bound)
        yield from self._judge_product("dhidden", got.dhidden, grad, bound, self.w, how.logits)
        sums = how.sums * how.chunks
        yield from self._judge_product("dweight", got.dweight, grad.T, bound.T, self.x, sums)

    def _judge_product(
        self, name: str, got: Tensor, grad: Tensor, grad_bound: Tensor, other: Tensor, sums: float
    ) -> Iterator[Finding]:
        """Judge rows of ``grad @ other`` in their 2-norm."""
        want, lengths = grad @ other, other.norm(dim=1)
        size = want.norm(dim=1)
        moved = grad.abs() @ lengths
        bound = grad_bound @ lengths + (U * math.sqrt(len(other)) + sums) * moved
        info = torch.finfo(got.dtype)
        subnormal = math.sqrt(self.d) * info.smallest_normal * info.eps
        stored = unit_roundoff(got.dtype) * (size + bound) + subnormal
        yield worst(name, distance(got, want).norm(dim=1), bound + stored)
        if self.averages:
            entries, per_entry = (t[:, None] / math.sqrt(self.d) for t in (size, bound))
            scale = entries * (entries > info.smallest_normal / info.eps)
            yield mean_error(name, got, want, per_entry, scale.expand_as(want))


def findings(problem: Any, how: Variant) -> list[Finding]:
    """Judge one call, and require the same bits of a second one."""
    first, again = problem.call(how), problem.call(how)
    pairs = zip(first._fields, first, again, strict=True)
    differing = ", ".join(name for name, a, b in pairs if not _same_bits(a, b))
    repeated = Finding("repeated", math.inf if differing else 0.0, 0.0, 0.0, differing)
    return [*problem.judge(first, how), repeated]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, nan=1.25), torch.nan_to_num(b, nan=1.25))


def variants(device: torch.device, op: str, dtype: str, n: int) -> Iterator[Variant]:
    """Variants that are correct on a device and finish in seconds.

    Triton's interpreter truncates when it stores bfloat16, which no bound allows, and takes a tenth
    of a second for a row."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    small = dtype == "fp32" and n <= bound_cases.FEW
    triton = device.type == "cuda" or (interpreted and small)
    for impl in ("torch", "triton") if triton else ("torch",):
        yield Variant(impl, impl)
        if op == "logits":
            yield Variant(f"{impl} in place", impl, inplace=True)
        else:
            yield Variant(f"{impl}, many chunks", impl, rows=2)
            if dtype == "bf16":
                yield Variant(f"{impl}, lean", impl, rows=64, lean=True)


def load(op: str, case: str, dtype: str, device: torch.device) -> LogitsProblem | HeadProblem:
    tensors, averages = bound_cases.load(op, case, DTYPES[dtype], device)
    kind: Any = LogitsProblem if op == "logits" else HeadProblem
    return kind(*tensors, averages)


def measure(
    device: torch.device,
    ops: Sequence[str] = ("logits", "head"),
    dtypes: Sequence[str] = tuple(DTYPES),
    cases: Sequence[str] | None = None,
) -> Iterator[Row]:
    """A row for each output of each variant on each case, without the columns of ``stamp``."""
    for op in ops:
        known = bound_cases.LOGITS if op == "logits" else bound_cases.HEADS
        for case, dtype in itertools.product(known, dtypes):
            if cases is not None and case not in cases:
                continue
            problem = load(op, case, dtype, device)
            about: Row = {"case": case, "op": op, "dtype": dtype}
            about |= {"n": problem.n, "v": problem.v, "d": problem.d}
            for how in variants(device, op, dtype, problem.n):
                for found in findings(problem, how):
                    row = about | {"method": how.name, "output": found.output, "place": found.place}
                    for name in ("ratio", "error", "bound"):
                        row[name] = float(f"{getattr(found, name):.3g}")
                    yield row


def exceeded(rows: Sequence[Row]) -> list[str]:
    """A sentence for each row with an error beyond its bound."""
    return [
        f"{about(row)}: the error is {row['ratio']:.3g} of its bound, {row['error']:.3g} at"
        f" {row['place']} where {row['bound']:.3g} is allowed"
        for row in rows
        if not row["ratio"] <= 1.0
    ]


def about(row: Row) -> str:
    return f"{row['output']} of {row['op']} {row['case']} in {row['dtype']} by {row['method']}"


def main(out: Path | None) -> int:
    """Measure, append rows to a CSV, print the largest ratios; 1 if an error exceeds its bound."""
    from .environment import stamp

    console = tables.console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if out is not None:
        append(out, [], BOUNDS)
    where = stamp(device)
    rows: list[Row] = []
    with console.status("errors against their bounds") as status:
        grouped = itertools.groupby(measure(device), lambda row: (row["op"], row["case"]))
        for (op, case), measured in grouped:
            status.update(f"errors against their bounds: {op} {case}")
            mine = [row | where for row in measured]
            rows += mine
            interrupts.check()
            # case by case: an interrupt loses one at most
            if out is not None:
                append(out, mine, BOUNDS)
    for op in dict.fromkeys(row["op"] for row in rows):
        _show(console, op, [row for row in rows if row["op"] == op])
    commit = f"{where['commit'] or 'unknown'}{' with changes' * where['dirty']}"
    console.print(f"{where['device']}, torch {where['torch']}, commit {commit}")
    wrong = exceeded(rows)
    for line in wrong:
        console.print(line, style="red", markup=False)
    if out is not None:
        console.print(f"rows: {out}")
    return int(bool(wrong))


def _show(console: Any, op: str, rows: Sequence[Row]) -> None:
    """Print the largest ratio of each output by variant and dtype."""
    outputs = list(dict.fromkeys(row["output"] for row in rows))
    largest: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        ratios = largest.setdefault((row["method"], row["dtype"]), {})
        ratios[row["output"]] = max(row["ratio"], ratios.get(row["output"], 0.0))
    lines = []
    for (method, dtype), ratios in largest.items():
        cells = [f"{ratios[output]:.2g}" if output in ratios else "" for output in outputs]
        lines.append(tables.Line([method, *cells], dtype))
    columns = [tables.Column(f"{op} by", right=False)]
    columns += [tables.Column(name, folds=True) for name in outputs]
    title = "errors in units of their bounds, the largest of all cases"
    tables.show(console, columns, lines, title)
