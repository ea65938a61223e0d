"""How far results are from float64 of the same inputs, in units of a bound for each: above 1 is
wrong, and what grows says so before.

With u = 2**-24 (half of float32's epsilon), s the same of the dtype that is stored, p the softmax,
d how far a logit is below its row's largest, delta how far it is off before the loss sees it, and
everything for a row unless it says otherwise:

- An exponential is off by ``off = delta + C u (1 + d)``, relative: the subtraction rounds d to u d,
  or its product with log2(e) does, and C = 4 leaves room for the products that follow and for a
  hardware exponential of 2 units in the last place. A sum of exponentials is off by the mean of
  that, weighted by what is summed, and C u log2(V) for additions in a tree or in blocks.
- Entry v of dlogits: ``p (exp(off + off of the sum) - 1)``, at the target with 1 - p and the sum of
  the others, since p - 1 is no difference of rounded numbers here. What is stored is the nearest
  number of its dtype: half a unit of its last place is taken off the error. Numbers below the
  smallest normal of float32 may be 0.
- Loss: ``(1 - p) (exp(off of the others, and delta) - 1) + C u loss``: it is log(1 + others /
  target), so that a small one keeps its digits. "mean loss" adds ``u (log2(N) + 2)`` of the sum of
  what is added.
- delta is 0 for logits that are given. For those of a head it is ``u sqrt(D) |X| |W|.T``, which
  sums that round at random keep to with all but certainty (Higham and Mary, "A new approach to
  probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019), and u |z|; s |z| more
  where logits are stored in half precision.
- Row of dhidden, in its 2-norm: ``sum_v |error of g_v| ||W_v||`` of the entries above, ``u sqrt(V)
  sum_v |g_v| ||W_v||`` for the product, ``s ||dhidden||``. g is rounded to s before the products
  where these are of half precision. Row of dweight likewise, over rows; where sums over chunks are
  kept in half precision, ``s sum_n |g_n| ||X_n||`` more for each chunk.
- "x, mean": rounding leans to no side, so the mean over 1e5 entries of what x is too large by,
  relative, is within four deviations of 0, where rows are independent and entries are not. An
  eighth of the bound without s is added, since exponentials of a library lean a little, and s**2,
  since of the numbers that round to one the smaller are the more. Truncated sums and dropped
  probability show here.

The upstream gradient of means is a power of two near N, which is exact, so that float16 has room
for the entries."""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import lossfuse

from ..ops.head_chunks import chunk_rows, padded
from . import interrupts, tables
from .cases import DTYPES, head_like_a_model, logits_like_a_model
from .rows import BOUNDS, append

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
CPU = torch.device("cpu")
C = 4.0
U = torch.finfo(torch.float32).eps / 2
SMALLEST = torch.finfo(torch.float32).smallest_normal
# what is below it differs from one CPU's exponential to another's; above, a ratio may not double
GROWTH, QUIET = 2.0, 0.1
DEVIATIONS = 4.0


def half_ulp(dtype: torch.dtype) -> float:
    """Of 1: what rounding to a dtype may be off by, relative."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Finding:
    """The worst entry of an output."""

    output: str
    ratio: float
    error: float
    bound: float
    place: str = ""


def worst(output: str, error: Tensor, bound: Tensor) -> Finding:
    """Of errors, which are NaN where there should have been a number."""
    ratio = torch.where(error == 0.0, 0.0, error / bound).nan_to_num(nan=math.inf)
    if not ratio.numel():
        return Finding(output, 0.0, 0.0, 0.0)
    at = int(ratio.argmax())
    place = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(at), ratio.shape))
    return Finding(
        output,
        float(ratio.flatten()[at]),
        float(error.flatten()[at]),
        float(bound.flatten()[at]),
        place,
    )


def half_unit(t: Tensor) -> Tensor:
    """Of the last place of each number: what it may be off by if it is the nearest of its dtype. In
    float64."""
    info = torch.finfo(t.dtype)
    exponent = torch.frexp(t.double().abs().clamp(min=info.smallest_normal))[1]
    return torch.ldexp(torch.full_like(t, info.eps / 4, dtype=torch.float64), exponent)


def distance(got: Tensor, want: Tensor) -> Tensor:
    """|got - want|, 0 where both are NaN or the same infinity."""
    got = got.double()
    return torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, (got - want).abs())


def leaning(output: str, got: Tensor, want: Tensor, arithmetic: Tensor, scale: Tensor) -> Finding:
    """The mean of how much larger than they should be numbers (N, K) are, over ``scale``; 0 of
    which leaves an entry out."""
    counted = scale > 0.0
    assert counted.any()
    count = counted.sum()
    signed = torch.where(counted, (got.double() - want) * want.sign() / scale, 0.0)
    mean = signed.sum() / count
    # of a sum over independent rows
    deviation = float((signed.sum(1) - mean * counted.sum(1)).square().sum().sqrt() / count)
    lean = (
        float(torch.where(counted, arithmetic / scale, 0.0).sum() / count) / 8
        + half_ulp(got.dtype) ** 2
    )
    bound = DEVIATIONS * deviation + lean
    error = float(mean.abs())
    return Finding(
        f"{output}, mean",
        error / bound if math.isfinite(error) else math.inf,
        error,
        bound,
        f"of {int(count)}",
    )


class Rows(NamedTuple):
    """N rows in float64, with an upstream gradient of 1, and what float32 may do to them."""

    loss: Tensor  # (N,)
    loss_bound: Tensor
    grad: Tensor  # (N, V)
    grad_bound: Tensor  # without the rounding of what is stored


def rows_of(z: Tensor, target: Tensor, delta: Tensor | float) -> Rows:
    """The loss, its gradient and their bounds for (N, V) logits in float64, each off by ``delta``
    before anything happens to it."""
    v = z.shape[1]
    valid = target != -100
    y = target.where(valid, 0)[:, None]
    d = z.amax(1, keepdim=True) - z
    e = torch.exp(-d)
    off = delta + C * U * (1.0 + torch.where(e == 0.0, 0.0, d))
    others = e.scatter(1, y, 0.0)
    rest, whole = others.sum(1, keepdim=True), e.sum(1, keepdim=True)

    def off_by(terms: Tensor, of: Tensor) -> Tensor:
        of = of.where(of > 0.0, 1.0)
        return torch.log1p(
            (terms * torch.expm1(off)).sum(1, keepdim=True) / of
        ) + C * U * math.log2(max(v, 2))

    off_rest, off_whole = off_by(others, rest), off_by(e, whole)
    p = e / whole
    miss = rest / whole
    grad = p.scatter(1, y, -miss)
    grad_bound = (p * torch.expm1(off + off_whole)).scatter(
        1, y, miss * torch.expm1(off_rest + off_whole)
    )
    d_y, e_y = d.gather(1, y), e.gather(1, y)
    # the target may be so far below that its exponential is 0
    loss = torch.where(
        d_y < 300.0, torch.log1p(rest / e_y.clamp(min=1e-200)), torch.log(whole) + d_y
    )
    delta_y = delta.gather(1, y) if isinstance(delta, Tensor) else delta
    loss_bound = miss * torch.expm1(off_rest + delta_y) + C * U * loss + SMALLEST
    loss, loss_bound = (t[:, 0].where(valid, 0.0) for t in (loss, loss_bound))
    return Rows(
        loss, loss_bound, grad.where(valid[:, None], 0.0), grad_bound.where(valid[:, None], 0.0)
    )


def mean_of(rows: Rows, target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss over valid targets, and its bound."""
    count = (target != -100).sum()
    size = U * (math.log2(max(len(target), 2)) + 2.0) * rows.loss.sum()
    return rows.loss.sum() / count, (rows.loss_bound.sum() + size) / count


def upstream(n: int) -> float:
    """What the gradients of a mean over n rows are multiplied by."""
    return 2.0 ** round(math.log2(n))


class LogitsResult(NamedTuple):
    """Losses of rows, their mean, and its gradient times ``upstream``."""

    losses: Tensor
    mean: Tensor
    dlogits: Tensor


class Logits:
    """Logits (N, V) and ids; what is right for them, and how far off a result is."""

    op = "logits"

    def __init__(self, logits: Tensor, target: Tensor, averages: bool = False) -> None:
        self.logits, self.target, self.averages = logits, target, averages
        self.n, self.v, self.d = *logits.shape, None
        # ignored rows may hold anything
        self.rows = rows_of(logits.double().where((target != -100)[:, None], 0.0), target, 0.0)

    def judge(self, got: LogitsResult) -> Iterator[Finding]:
        rows = self.rows
        mean, mean_bound = mean_of(rows, self.target)
        scale = upstream(self.n) / (self.target != -100).sum().clamp(min=1)
        want, arithmetic = rows.grad * scale, rows.grad_bound * scale
        error = (distance(got.dlogits, want) - half_unit(got.dlogits)).clamp(min=0.0)
        yield worst("loss", distance(got.losses, rows.loss), rows.loss_bound)
        yield worst("mean loss", distance(got.mean, mean), mean_bound)
        yield worst("dlogits", error, arithmetic + 2.0 * upstream(self.n) * SMALLEST)
        if self.averages:
            yield leaning(
                "loss",
                got.losses[:, None],
                rows.loss[:, None],
                rows.loss_bound[:, None],
                rows.loss[:, None],
            )
            # below the normal numbers rounding to 0 is no accident
            smallest = torch.finfo(got.dlogits.dtype).smallest_normal
            yield leaning(
                "dlogits", got.dlogits, want, arithmetic, want.abs() * (want.abs() > 2.0 * smallest)
            )


class HeadResult(NamedTuple):
    """Losses of rows, their mean, and its gradients times ``upstream``."""

    losses: Tensor
    mean: Tensor
    dhidden: Tensor
    dweight: Tensor


@dataclass(frozen=True)
class Roundings:
    """What numbers of a head are rounded to on their way, relative; 0 where they stay in
    float32."""

    logits: float = 0.0
    grad: float = 0.0  # of a gradient of logits, before the products
    floor: float = 0.0  # and of that of a row, absolute
    sums: float = 0.0  # of gradients, once for each chunk
    chunks: int = 1


class Head:
    """Hidden states (N, D), a weight (V, D) and ids; what is right for them, and how far off a
    result is."""

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

    def judge(self, got: HeadResult, how: Roundings) -> Iterator[Finding]:
        rows = rows_of(self.z, self.target, self.delta + how.logits * self.z.abs())
        mean, mean_bound = mean_of(rows, self.target)
        scale = upstream(self.n) / (self.target != -100).sum().clamp(min=1)
        grad, grad_bound = rows.grad * scale, rows.grad_bound * scale
        grad_bound = (
            grad_bound
            + how.grad * grad.abs()
            + scale * how.floor
            + 2.0 * upstream(self.n) * SMALLEST
        )
        yield worst("loss", distance(got.losses, rows.loss), rows.loss_bound)
        yield worst("mean loss", distance(got.mean, mean), mean_bound)
        for name, made, g, g_bound, other, chunks in (
            ("dhidden", got.dhidden, grad, grad_bound, self.w, 1),
            ("dweight", got.dweight, grad.T, grad_bound.T, self.x, how.chunks),
        ):
            want, lengths = g @ other, other.norm(dim=1)
            moved = g.abs() @ lengths
            arithmetic = g_bound @ lengths + (U * math.sqrt(len(other)) + how.sums * chunks) * moved
            info = torch.finfo(made.dtype)
            stored = (
                half_ulp(made.dtype) * (want.norm(dim=1) + arithmetic)
                + math.sqrt(self.d) * info.smallest_normal * info.eps
            )
            yield worst(name, distance(made, want).norm(dim=1), arithmetic + stored)
            if self.averages:
                size = want.norm(dim=1, keepdim=True) / math.sqrt(self.d)
                entries = size * (size > info.smallest_normal / info.eps)
                yield leaning(
                    name,
                    made,
                    want,
                    arithmetic[:, None] / math.sqrt(self.d),
                    entries.expand_as(want),
                )


# name: (inputs of a dtype, drawn on the CPU for every device; whether means are looked at)
LogitsInputs = Callable[[torch.dtype], tuple[Tensor, Tensor]]
HeadInputs = Callable[[torch.dtype], tuple[Tensor, Tensor, Tensor]]
# a prime; and rows that the interpreter gets through
CLASSES, FEW = 2053, 8


def _model(dtype: torch.dtype, n: int = 64, v: int = CLASSES) -> tuple[Tensor, Tensor]:
    return logits_like_a_model(n, v, dtype, CPU)


def _many_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    n, v = 1 << 17, 17
    return (torch.randn(n, v, generator=generator) * 3.0).to(dtype), torch.randint(
        0, v, (n,), generator=generator
    )


def _one_huge(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(dtype, FEW)
    rows = torch.arange(FEW)
    # of every other row the target
    logits[rows, torch.where(rows % 2 == 0, target.clamp(min=0), (7 * rows) % CLASSES)] = 1e4
    return logits, target


def _sure(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(dtype, FEW)
    logits.scatter_(
        1,
        target.clamp(min=0)[:, None],
        (logits.amax(1, keepdim=True) + torch.linspace(8.0, 40.0, FEW)[:, None]).to(dtype),
    )
    return logits, target


def _equal(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full((4, CLASSES), -3.5).to(dtype), torch.tensor([0, 5, 1024, CLASSES - 1])


def _hardly_any(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = torch.full((4, CLASSES), -math.inf)
    target = torch.tensor([0, 5, 1024, CLASSES - 1])
    logits[torch.arange(4), target] = torch.tensor([-2.0, 0.0, 3.0, 1.0])
    # of two rows another
    logits[[1, 3], [6, 0]] = 2.0
    return logits.to(dtype), target


def _normalized(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(torch.float32, FEW)
    return logits.log_softmax(1).to(dtype), target


def _far(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(torch.float32, FEW)
    return (logits + torch.where(torch.arange(FEW) % 2 == 0, 1e4, -1e4)[:, None]).to(dtype), target


def _ignored(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(dtype, 4)
    return logits.fill_(math.nan), torch.full_like(target, -100)


def _apart(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, target = _model(dtype, FEW)
    wide = torch.full((FEW, CLASSES + 7), math.nan, dtype=dtype)
    wide[:, 3 : CLASSES + 3] = logits
    return wide[:, 3 : CLASSES + 3], target


LOGITS: dict[str, LogitsInputs] = {
    "like a model's": _model,
    "many rows": _many_rows,
    "one logit huge": _one_huge,
    "a sure model": _sure,
    "all equal": _equal,
    "all but one or two -inf": _hardly_any,
    "log-sum-exp 0": _normalized,
    "about 1e4": _far,
    "all ignored": _ignored,
    "rows apart": _apart,
}


def _model_head(dtype: torch.dtype, n: int = 512, d: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    return head_like_a_model(n, d, 1021, dtype, CPU)


def _one_target(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    # what every row adds to the target's row of dweight points the same way: a narrow sum soon
    # stands still
    hidden, weight, target = _model_head(torch.float32, 256, 64)
    return (hidden * 0.1 + 1.0).to(dtype), (weight * 0.1).to(dtype), torch.full_like(target, 7)


def _large_products(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target = _model_head(torch.float32, 64)
    return (hidden * 64.0).to(dtype), (weight * 16.0).to(dtype), target


def _ignored_head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target = _model_head(dtype, 8)
    return hidden, weight, torch.full_like(target, -100)


HEADS: dict[str, HeadInputs] = {
    "like a model's": _model_head,
    "one target": _one_target,
    "about 1e4": _large_products,
    "all ignored": _ignored_head,
}
# cases of 1e5 entries, whose means mean something
AVERAGED = {"like a model's", "many rows"}


@dataclass(frozen=True)
class Method:
    """A way to the result. Of logits, whether in place; of a head, with which options."""

    name: str
    impl: str
    inplace: bool = False
    rows: int | None = None  # of a chunk
    lean: bool = False

    def of_logits(self, problem: Logits) -> LogitsResult:
        losses = lossfuse.cross_entropy(
            problem.logits, problem.target, reduction="none", impl=self.impl
        )
        leaf = problem.logits.detach().requires_grad_()
        consumed = leaf * 1.0 if self.inplace else leaf
        mean = lossfuse.cross_entropy(
            consumed, problem.target, inplace=self.inplace, impl=self.impl
        )
        return LogitsResult(
            losses,
            mean.detach(),
            torch.autograd.grad(mean, leaf, torch.full_like(mean, upstream(problem.n)))[0],
        )

    def of_head(self, problem: Head) -> HeadResult:
        options, target = self._options(problem), problem.target
        losses = lossfuse.linear_cross_entropy(
            problem.hidden,
            problem.weight,
            target,
            reduction="none",
            options=options,
            impl=self.impl,
        )
        hidden, weight = (t.detach().requires_grad_() for t in (problem.hidden, problem.weight))
        mean = lossfuse.linear_cross_entropy(
            hidden, weight, target, options=options, impl=self.impl
        )
        grads = torch.autograd.grad(
            mean, [hidden, weight], torch.full_like(mean, upstream(problem.n))
        )
        return HeadResult(losses, mean.detach(), *grads)

    def findings(self, problem: Logits | Head) -> list[Finding]:
        """Of two calls, which must have the same bits."""
        call: Callable[[Any], LogitsResult | HeadResult] = (
            self.of_logits if isinstance(problem, Logits) else self.of_head
        )
        first, again = call(problem), call(problem)
        found = [
            *(
                problem.judge(first)
                if isinstance(problem, Logits) and isinstance(first, LogitsResult)
                else ()
            ),
            *(
                problem.judge(first, self._roundings(problem))
                if isinstance(problem, Head) and isinstance(first, HeadResult)
                else ()
            ),
        ]
        differing = [
            name
            for name, a, b in zip(first._fields, first, again, strict=True)
            if not _same_bits(a, b)
        ]
        return [
            *found,
            Finding("repeated", math.inf if differing else 0.0, 0.0, 0.0, ", ".join(differing)),
        ]

    def _options(self, problem: Head) -> lossfuse.LinearOptions:
        narrow = torch.bfloat16 if self.lean else None
        itemsize = 2 if self.lean else 4
        size = None if self.rows is None else self.rows * padded(problem.v) * itemsize
        return lossfuse.LinearOptions(chunk_bytes=size, logits_dtype=narrow, acc_dtype=narrow)

    def _roundings(self, problem: Head) -> Roundings:
        dtype, on_cpu = problem.hidden.dtype, problem.hidden.device.type == "cpu"
        chunks = -(
            -problem.n
            // chunk_rows(
                problem.n, problem.d, problem.v, dtype, self._options(problem), cpu=on_cpu
            )
        )
        narrow = half_ulp(torch.bfloat16) if self.lean else 0.0
        # a CPU converts its operands, and its products are of float32
        grad = narrow if on_cpu or dtype == torch.float32 else half_ulp(dtype)
        # gradients are brought to 256 before they are rounded to float16
        floor = 2.0**-25 / 256.0 if dtype == torch.float16 and not on_cpu else 0.0
        return Roundings(narrow, grad, floor, narrow, chunks)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, nan=1.25), torch.nan_to_num(b, nan=1.25))


def methods(device: torch.device, op: str, dtype: str, n: int) -> list[Method]:
    """Those whose numbers mean something on a device, and come before the day ends.

    Triton's interpreter truncates what it stores in bfloat16, which no bound forgives, and takes a
    tenth of a second for a row."""
    interpreted = (
        device.type == "cpu"
        and os.environ.get("TRITON_INTERPRET") == "1"
        and dtype == "fp32"
        and n <= FEW
    )
    found = []
    for impl in ("torch", *(["triton"] if device.type == "cuda" or interpreted else [])):
        found.append(Method(impl, impl))
        if op == "logits":
            found.append(Method(f"{impl} in place", impl, inplace=True))
        else:
            found.append(Method(f"{impl}, many chunks", impl, rows=2))
            if dtype == "bf16":
                found.append(Method(f"{impl}, lean", impl, rows=64, lean=True))
    return found


def measure(
    device: torch.device,
    ops: Sequence[str] = ("logits", "head"),
    dtypes: Sequence[str] = tuple(DTYPES),
    cases: Sequence[str] | None = None,
) -> Iterator[Row]:
    """A row for each output of each method on each case, without its stamp."""
    for op in ops:
        for case in LOGITS if op == "logits" else HEADS:
            if cases is not None and case not in cases:
                continue
            for dtype in dtypes:
                problem = load(op, case, dtype, device)
                about = {
                    "case": case,
                    "op": op,
                    "dtype": dtype,
                    "n": problem.n,
                    "v": problem.v,
                    "d": problem.d,
                }
                for method in methods(device, op, dtype, problem.n):
                    for finding in method.findings(problem):
                        yield about | {"method": method.name} | _rounded(finding)


def load(op: str, case: str, dtype: str, device: torch.device) -> Logits | Head:
    """Draw the numbers of a case."""
    if op == "logits":
        logits, target = (_on(t, device) for t in LOGITS[case](DTYPES[dtype]))
        return Logits(logits, target, case in AVERAGED)
    hidden, weight, target = (_on(t, device) for t in HEADS[case](DTYPES[dtype]))
    return Head(hidden, weight, target, case in AVERAGED)


def _on(t: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu" or t.is_contiguous():
        return t.to(device)
    # the rows stay apart, and NaN is between them
    wide = torch.full((len(t), t.stride(0)), math.nan, dtype=t.dtype, device=device)
    return wide[:, : t.shape[1]].copy_(t)


def _rounded(finding: Finding) -> Row:
    numbers = {name: float(f"{getattr(finding, name):.3g}") for name in ("ratio", "error", "bound")}
    return {"output": finding.output, "place": finding.place} | numbers


# what a row is about
KEY = ("op", "case", "dtype", "n", "v", "d", "method", "output")


def grown(rows: Sequence[Row], kept: "pd.DataFrame") -> list[str]:
    """A sentence for each row whose ratio is more than GROWTH times that of its last row among
    those kept.

    Means are drawn, so that theirs say nothing while they are below 1; nor does a ratio below
    QUIET."""
    last = {
        tuple(_key(row)): row for row in kept.sort_values("date", kind="stable").to_dict("records")
    }
    said = []
    for row in rows:
        before = last.get(tuple(_key(row)))
        if before is None or str(row["output"]).endswith(", mean"):
            continue
        if row["ratio"] > GROWTH * max(before["ratio"], QUIET / GROWTH):
            said.append(
                f"{_about(row)}: the error has become {row['ratio']:.3g} of its bound, at {row['place']}, and was {before['ratio']:.3g}"
                f" at commit {before['commit'] or 'unknown'} (torch {before['torch']})"
            )
    return said


def exceeded(rows: Sequence[Row]) -> list[str]:
    """A sentence for each row whose error is beyond its bound."""
    return [
        f"{_about(row)}: the error is {row['ratio']:.3g} of its bound, {row['error']:.3g} at {row['place']} where {row['bound']:.3g} is"
        " allowed"
        for row in rows
        if not row["ratio"] <= 1.0
    ]


def _key(row: Row) -> Iterator[Any]:
    for name in KEY:
        value = row[name]
        # NaN is no key
        yield (
            -1
            if value is None or value != value
            else int(value)
            if name in ("n", "v", "d")
            else value
        )


def _about(row: Row) -> str:
    return f"{row['output']} of {row['op']} {row['case']} in {row['dtype']} by {row['method']}"


def main(out: Path | None) -> int:
    """Measure, append the rows of each case to a CSV, print the worst of each output; 1 if an error
    is beyond its bound."""
    from .environment import stamp

    console = tables.console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if out is not None:
        append(out, [], BOUNDS)
    where = stamp(device)
    rows: list[Row] = []
    with console.status("errors against their bounds") as status:
        for (op, case), made in itertools.groupby(
            measure(device), lambda row: (row["op"], row["case"])
        ):
            status.update(f"errors against their bounds: {op} {case}")
            mine = [row | where for row in made]
            rows += mine
            interrupts.check()
            # at once: an interrupt loses no more than a case
            if out is not None:
                append(out, mine, BOUNDS)
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        outputs = list(dict.fromkeys(row["output"] for row in mine))
        lines = []
        for method, dtype in dict.fromkeys((row["method"], row["dtype"]) for row in mine):
            ratios = [
                [
                    r["ratio"]
                    for r in mine
                    if (r["method"], r["dtype"], r["output"]) == (method, dtype, output)
                ]
                for output in outputs
            ]
            lines.append(
                tables.Line(
                    [method, *(f"{max(some):.2g}" if some else "" for some in ratios)], dtype
                )
            )
        columns = [
            tables.Column(f"{op} by", right=False),
            *(tables.Column(name, folds=True) for name in outputs),
        ]
        tables.show(
            console, columns, lines, "errors in units of their bounds, the largest of all cases"
        )
    console.print(
        f"{where['device']}, torch {where['torch']}, commit {where['commit'] or 'unknown'}{' with changes' * where['dirty']}"
    )
    wrong = exceeded(rows)
    for line in wrong:
        console.print(line, style="red", markup=False)
    if out is not None:
        console.print(f"rows: {out}")
    return int(bool(wrong))
