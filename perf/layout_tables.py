"""``estimate --layout``: tables of memory, collectives and time of one rank of each layout."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from . import tables
from .cases import named
from .layouts import (
    ALWAYS,
    CLASS_WEIGHTS,
    HEAD_GRADIENT,
    HEAD_WEIGHT,
    HIDDEN_GRADIENT,
    HIDDEN_STATES,
    LOGITS,
    ROWS,
    Collective,
    Layout,
    LossStep,
    Plan,
    lossfuse_plan,
    other_plans,
)
from .mistakes import Mistake
from .shown import digits
from .tables import Column, Line

if TYPE_CHECKING:
    from rich.console import Console

ASSUMPTIONS = (
    "tp ranks have ceil(V / tp) classes each, the same rows and the same options. All numbers are"
    " those of the rank with the most classes.",
    "sp shards the N tokens of a data-parallel rank: each has ceil(N / sp) of them, and the loss"
    " sends nothing over sp. The trainer all-reduces the normalizer of a global mean.",
    "Every row counts: with drop_ignored, ignored rows are neither computed nor sent.",
    "NxV logits: the loss alone is counted. NxDxV head: its operands and their gradients too. The"
    " upstream gradient reaches the loss alone; probabilities and bias do not require grad, hidden"
    " states and weight do.",
    "fsdp shards the head over fsdp x sp ranks in an FSDP2 unit of its own: one all-gather before"
    " the loss in the dtype of the operands, one more in the backward with --reshard, and one"
    " reduce-scatter in the backward in float32 of classes padded to a multiple of the ranks. The"
    " shard is float32. Gradients of all chunks are accumulated before that.",
    "dp replicates: the gradient's shard is all-reduced in float32; without fsdp the whole gradient"
    " in its own dtype, over dp x sp.",
    "hidden_grad 'partial' is sequence parallelism on the tp ranks: the trainer all-gathers the"
    " hidden states before the head and reduce-scatters their gradient.",
    "The payload is what a rank passes to a call. The bytes sent are those of a ring of P ranks: an"
    " all-gather sends (P - 1) shards of its own size, a reduce-scatter (P - 1) / P of its input,"
    " an all-reduce twice that.",
    "Memory is that of an accelerator at the largest of these moments: the loop over chunks,"
    " gradients returned, hidden gradient reduced, weight gradient reduced. Activations, optimizer"
    " states, FSDP's copy during a gather and the allocator's slack are not counted.",
    "Gathered logits are transformers' colwise_gather_output with its loss on logits.float();"
    " Megatron is VocabParallelCrossEntropy with three all-reduces of N numbers. Both are read off"
    " their code. Hidden and weight gradients are reduced as here.",
)


def parse_layout(text: str) -> Layout:
    """Parse ``tp=8,fsdp=64``; an absent degree is 1."""
    degrees = _parse_pairs(text, [degree.name for degree in fields(Layout)], "layout")
    if any(value != int(value) for value in degrees.values()):
        raise Mistake(f"layout is {text!r}, expected whole numbers")
    return Layout(**{name: int(value) for name, value in degrees.items()})


def _parse_pairs(text: str, names: Sequence[str], argument: str) -> dict[str, float]:
    """Parse ``name=number,name=number``, each of ``names`` at most once."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in names or name in found or not math.isfinite(number):
            example = f"{names[0]}=8,{names[-1]}=64, with each of {', '.join(names)} at most once"
            raise Mistake(f"{argument} is {text!r}, expected something like {example}")
        found[name] = number
    return found


@dataclass(frozen=True)
class Links:
    """Assumed speed of a rank: gigabits per second over an axis, seconds per step of a ring."""

    gbps: dict[str, float]
    latency: float

    @classmethod
    def parse(cls, text: str, latency_us: float) -> "Links":
        """Parse ``400``, or ``tp=3600,fsdp=400,dp=400``."""
        axes = ("tp", "fsdp", "dp")
        try:
            gbps = dict.fromkeys(axes, float(text))
        except ValueError:
            gbps = _parse_pairs(text, axes, "--link-gbps")
        if not all(0 < value < math.inf for value in gbps.values()):
            raise Mistake(f"--link-gbps is {text!r}, expected positive numbers")
        return cls(gbps, latency_us / 1e6)

    def seconds(self, collective: Collective) -> float:
        if collective.axis not in self.gbps:
            raise Mistake(
                f"--link-gbps has no rate for {collective.axis}, which the layout's"
                f" {collective.kind} needs"
            )
        transfer = 8 * collective.sent / (self.gbps[collective.axis] * 1e9)
        rounds = (collective.ranks - 1) * (2 if collective.kind == "all-reduce" else 1)
        return transfer + self.latency * rounds * len(collective.payloads)


def main(
    cases: Sequence[str],
    losses: dict[str, Any],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    fits_gib: float | None,
    links: Links | None,
) -> None:
    """Print a table of all layouts, and of a single one its buffers and collectives.

    ``losses`` are arguments of ``LossStep``."""
    console = tables.console()
    parsed = [parse_layout(text) for text in layouts]
    for case in [named(name, torch.device("cuda")) for name in cases]:
        if case.op == "labels":
            raise Mistake(f"{case.name} has labels; --layout takes NxV logits or an NxDxV head")
        for dtype in dtypes:
            step = LossStep(case.n, case.v, case.d, dtype, **losses)
            where = f"{case.name}: {case.size} in {dtype} for each data-parallel rank, {step.mode}"
            title = f"{where}; peak, calls and bytes sent of one rank"
            lines = [line for one in parsed for line in _plan_lines(step, one, fits_gib, links)]
            tables.show(console, _plan_columns(fits_gib, links), lines, title)
            if len(parsed) == 1:
                plan = lossfuse_plan(step, parsed[0])
                _show_buffers(console, plan)
                _show_collectives(console, plan, links)
    notes = list(ASSUMPTIONS)
    if links is not None:
        rates = ", ".join(f"{value:g} Gbit/s over {axis}" for axis, value in links.gbps.items())
        ring = f"{links.latency * 1e6:g} us a step of a ring"
        notes.append(
            f"Times are bytes sent at {rates}, and {ring}: assumed, no overlap, not measured."
        )
    for note in notes:
        console.print(f"- {note}", style="dim", highlight=False, markup=False)


def _plan_columns(fits_gib: float | None, links: Links | None) -> list[Column]:
    columns = [Column("method", right=False), Column("peak"), Column("calls", rank=4)]
    columns += [Column("rows", rank=1), Column("hidden", rank=2), Column("weight", rank=3)]
    columns += [Column("time")] if links is not None else []
    return columns + ([Column(f"in {fits_gib:g} GiB", right=False)] if fits_gib is not None else [])


def _plan_lines(
    step: LossStep, layout: Layout, fits_gib: float | None, links: Links | None
) -> Iterator[Line]:
    for plan in (lossfuse_plan(step, layout), *other_plans(step, layout)):
        calls = sum(len(c.payloads) for c in plan.collectives)
        cells = [plan.name, size(plan.peak), str(calls)]
        cells.append(size(plan.sent(ROWS, CLASS_WEIGHTS, LOGITS)))
        cells.append(size(plan.sent(HIDDEN_STATES, HIDDEN_GRADIENT)))
        cells.append(size(plan.sent(HEAD_WEIGHT, HEAD_GRADIENT)))
        if links is not None:
            cells.append(f"{1e3 * sum(map(links.seconds, plan.collectives)):.2f} ms")
        fits = fits_gib is None or plan.peak <= fits_gib * 2**30
        cells += [] if fits_gib is None else ["fits" if fits else "no"]
        yield Line(cells, f"{layout.ranks:,}: {layout}", style="" if fits else "red")


def _show_buffers(console: "Console", plan: Plan) -> None:
    columns = [Column("buffer of a rank", right=False), Column("bytes")]
    columns.append(Column("while", right=False, folds=True))
    lines = []
    for buffer in plan.buffers:
        when = "always" if buffer.when == ALWAYS else ", ".join(buffer.when)
        lines.append(Line([buffer.name, size(buffer.bytes), when]))
    tables.show(console, columns, [*lines, Line(["peak", size(plan.peak), plan.peak_moment])])


def _show_collectives(console: "Console", plan: Plan, links: Links | None) -> None:
    names = ("of", "collective", "called by", "over")
    columns = [Column(name, right=False, folds=True) for name in names]
    columns += [Column("ranks", rank=2), Column("calls", rank=3), Column("payload", rank=1)]
    columns += [Column("sent"), *([Column("time")] if links is not None else [])]
    lines = []
    for c in plan.collectives:
        cells = [c.content, c.kind, c.caller, c.axis, f"{c.ranks:,}", str(len(c.payloads))]
        cells += [size(c.payload), size(c.sent)]
        cells += [] if links is None else [f"{1e3 * links.seconds(c):.3f} ms"]
        lines.append(Line(cells))
    tables.show(console, columns, lines)


def size(count: int) -> str:
    """A number of bytes in the largest unit of which it is at least a half."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale / 2:
            return f"{digits(count / scale)} {unit}"
    return f"{count} B" if count else "0"
