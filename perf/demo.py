"""The same small transformer trained on the same real text with torch's loss and with ours, in
turn, step by step."""

import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import lossfuse

from . import interrupts, tables
from .corpus import batches, standard_library_sources, train_tokenizer
from .memory import MemoryProfile, profile_memory
from .mistakes import Mistake
from .model import Transformer
from .protocol import Step, Timing, peak_extra_bytes, synchronize, time_interleaved
from .rows import require_writable, write_atomically

if TYPE_CHECKING:
    import altair as alt
    from rich.console import Console

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {"F.cross_entropy": F.cross_entropy, "lossfuse": lossfuse.cross_entropy}
TORCH, OURS = LOSSES
# (model, tokens, their next ones) -> the loss of a training step, and the colour of its curve
STEPS: dict[str, tuple[Callable[[Transformer, Tensor, Tensor], Tensor], str]] = {
    "torch": (
        lambda model, tokens, target: F.cross_entropy(model(tokens).flatten(0, 1), target),
        "#9aa5b1",
    ),
    "drop-in": (
        lambda model, tokens, target: lossfuse.cross_entropy(model(tokens).flatten(0, 1), target),
        "#4c78a8",
    ),
    "in place": (
        lambda model, tokens, target: lossfuse.cross_entropy(
            model(tokens).flatten(0, 1), target, inplace=True
        ),
        "#e0a458",
    ),
    "linear": (
        lambda model, tokens, target: lossfuse.linear_cross_entropy(
            model.hidden(tokens).flatten(0, 1), model.head.weight, target
        ),
        "#d1495b",
    ),
}
STEP_REPEATS = 3
# of the CPUs: with more load than that times say little
BUSY = 0.5


@dataclass(frozen=True)
class Setup:
    """What is trained."""

    vocab_size: int = 32768
    characters: int = 12_000_000
    steps: int = 30
    batch: int = 8
    length: int = 128
    width: int = 128
    layers: int = 2
    heads: int = 4
    learning_rate: float = 1e-3
    seed: int = 0

    @property
    def about_seconds(self) -> int:
        """On two quiet CPU cores with the default sizes: 20 s before the first step, 1 s for one of
        both models, 10 s for whole steps."""
        return 30 + self.steps


@dataclass
class Run:
    """One model's training as it was seen."""

    loss_fn: Loss
    model: Transformer
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None

    @property
    def timing(self) -> Timing:
        # the first step pays for what is done once
        return Timing.of(self.milliseconds[1:] or self.milliseconds)

    def step(self, tokens: Tensor, target: Tensor) -> None:
        logits = self.model(tokens).flatten(0, 1)
        synchronize(logits.device)
        start = time.perf_counter()
        loss = self.loss_fn(logits, target.flatten())
        (dlogits,) = torch.autograd.grad(loss, logits, retain_graph=True)
        synchronize(logits.device)
        self.milliseconds.append((time.perf_counter() - start) * 1e3)
        self.losses.append(float(loss.detach()))
        del loss
        self.optimizer.zero_grad()
        logits.backward(dlogits)
        self.optimizer.step()


@dataclass(frozen=True)
class Cost:
    """Of a whole training step: forward, loss, backward, optimizer."""

    timing: Timing
    profile: MemoryProfile


@dataclass(frozen=True)
class Result:
    """Both runs, whole steps of one model with its loss computed in several ways, and what they ran
    on."""

    runs: dict[str, Run]
    costs: dict[str, Cost]
    device: torch.device
    logits_bytes: int
    rows: int
    vocab_size: int


def train(
    setup: Setup,
    device: torch.device,
    say: Callable[[str], None],
    advance: Callable[[dict[str, Run]], None],
) -> Result:
    """Tokenise, train both models alternately, then weigh each loss once; ``advance`` is called
    after every step of both."""
    say(f"reading the standard library, at most {setup.characters / 1e6:.0f} M characters")
    texts = standard_library_sources(setup.characters)
    say(
        f"training a byte-level BPE of {setup.vocab_size:,} entries on {sum(map(len, texts)) / 1e6:.1f} M characters"
    )
    tokenizer = interrupts.result_of(lambda: train_tokenizer(texts, setup.vocab_size))
    vocab_size = tokenizer.get_vocab_size()
    if vocab_size < setup.vocab_size:
        raise RuntimeError(
            f"the text gave {vocab_size} entries of the {setup.vocab_size} asked for; raise characters or lower vocab_size"
        )
    encodings = interrupts.result_of(lambda: tokenizer.encode_batch(texts))
    ids = torch.tensor([i for encoding in encodings for i in encoding.ids])
    say(
        f"{len(ids) / 1e6:.2f} M tokens; training two models of the same seed, {setup.steps} steps each"
    )

    runs = {}
    for name, loss_fn in LOSSES.items():
        torch.manual_seed(setup.seed)
        model = Transformer(vocab_size, setup.length, setup.width, setup.layers, setup.heads).to(
            device
        )
        runs[name] = Run(
            loss_fn, model, torch.optim.AdamW(model.parameters(), lr=setup.learning_rate)
        )
    for tokens, target in batches(ids, setup.batch, setup.length, setup.steps, setup.seed):
        for run in runs.values():
            run.step(tokens.to(device), target.to(device))
            interrupts.check()
        advance(runs)

    logits = runs[OURS].model(tokens.to(device)).flatten(0, 1)
    for run in runs.values():
        run.extra_bytes = peak_extra_bytes(
            Step(partial(_gradient, run.loss_fn, logits, target.to(device).flatten())), device
        )
    size, rows = logits.numel() * logits.element_size(), len(logits)
    del logits
    say(f"whole training steps of one model, its loss computed in {len(STEPS)} ways")
    costs = whole_steps(runs[TORCH], tokens.to(device), target.to(device).flatten(), device)
    return Result(runs, costs, device, size, rows, vocab_size)


def whole_steps(run: Run, tokens: Tensor, target: Tensor, device: torch.device) -> dict[str, Cost]:
    """Times, interleaved, then memory of each way to compute the loss of a training step."""

    def step(name: str) -> None:
        interrupts.check()
        run.optimizer.zero_grad()
        STEPS[name][0](run.model, tokens, target).backward()
        run.optimizer.step()

    times = time_interleaved(
        {name: Step(partial(step, name)) for name in STEPS}, device, STEP_REPEATS
    )
    # torch 2.13: its profiler writes two lines to stderr each time
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    costs = {}
    for name in STEPS:
        # of what is freed while it is recorded the profiler must know the size
        run.optimizer.zero_grad()
        costs[name] = Cost(
            times[name], profile_memory(partial(step, name), device=device, warmup=0)
        )
    return costs


def _gradient(loss_fn: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_fn(logits, target), logits, retain_graph=True)


def picture(result: Result, path: Path) -> None:
    """Loss curves, time and memory side by side, as PNG."""
    import altair as alt
    import pandas as pd

    names = list(result.runs)
    curves = pd.DataFrame(
        [
            {"step": i + 1, "loss": loss, "with": name}
            for name, run in result.runs.items()
            for i, loss in enumerate(run.losses)
        ]
    )
    scale = alt.Scale(domain=names, range=["#9aa5b1", "#d1495b"])
    legend = alt.Legend(title=None, orient="top-right", symbolType="square", symbolStrokeWidth=5)
    # ours is drawn over torch's: thin on thick, so that both show where they agree
    width = alt.Size("with:N", scale=alt.Scale(domain=names, range=[6, 1.8]), legend=None)
    left = alt.Chart(curves, title="The same curve", width=420, height=300).mark_line()
    left = left.encode(
        x="step:Q",
        y=alt.Y("loss:Q", title="training loss", scale=alt.Scale(zero=False)),
        color=alt.Color("with:N", scale=scale, legend=legend),
        size=width,
    )

    def bars(title: str, unit: str, values: dict[str, float], scale: alt.Scale) -> alt.LayerChart:
        frame = pd.DataFrame({"with": list(values), "value": list(values.values())})
        top = alt.Scale(domain=[0, 1.15 * max(values.values())], nice=False)
        base = alt.Chart(frame, title=title, width=210, height=300).encode(
            x=alt.X(
                "with:N", title=None, sort=list(values), axis=alt.Axis(labelAngle=0, ticks=False)
            ),
            y=alt.Y("value:Q", title=unit, scale=top),
        )
        label = base.mark_text(dy=-9, fontSize=13).encode(text=alt.Text("value:Q", format=",.0f"))
        return base.mark_bar().encode(color=alt.Color("with:N", scale=scale, legend=None)) + label

    loss = left | bars(
        "Loss, forward + backward",
        "ms",
        {name: run.timing.p50 for name, run in result.runs.items()},
        scale,
    )
    memory = {
        name: run.extra_bytes / 2**20
        for name, run in result.runs.items()
        if run.extra_bytes is not None
    }
    if len(memory) == len(names):
        loss |= bars("Peak memory beyond logits", "MiB", memory, scale)
    ways = alt.Scale(domain=list(result.costs), range=[STEPS[name][1] for name in result.costs])
    steps = (
        _memory_over_time(result.costs, ways)
        | bars(
            "The whole step",
            "ms",
            {name: cost.timing.p50 for name, cost in result.costs.items()},
            ways,
        )
        | bars(
            "Its peak memory",
            "MiB",
            {name: cost.profile.peak_bytes / 2**20 for name, cost in result.costs.items()},
            ways,
        )
    )
    chart = alt.vconcat(
        loss.resolve_scale(color="independent"),
        steps.resolve_scale(color="independent"),
        spacing=30,
    )
    caption = f"{result.rows} tokens x {result.vocab_size:,} classes, fp32, {result.device.type}, logits {result.logits_bytes / 2**20:.0f} MiB"
    chart = chart.properties(
        title=alt.Title(
            "torch's cross entropy and ours, training on Python's standard library",
            subtitle=caption,
        )
    )
    chart = chart.resolve_scale(color="independent")
    drawn = io.BytesIO()
    chart.configure_view(stroke=None).configure_axis(grid=False).save(
        drawn, format="png", scale_factor=2
    )
    write_atomically(path, drawn.getvalue())


def _memory_over_time(costs: dict[str, Cost], scale: "alt.Scale") -> "alt.Chart":
    """One curve for each way, from the beginning of a step to its end."""
    import altair as alt
    import pandas as pd

    frames = []
    for name, cost in costs.items():
        changes = cost.profile.frame()
        # of many changes within a moment the highest and the last
        moment = (changes["ms"] * (300 / max(changes["ms"].max(), 1e-9))).astype(int)
        kept = sorted(
            {
                0,
                *changes["bytes"].groupby(moment).idxmax(),
                *moment.index[~moment.duplicated(keep="last")],
            }
        )
        part = changes.loc[kept, ["ms", "bytes"]]
        frames.append(pd.DataFrame({"ms": part["ms"], "MiB": part["bytes"] / 2**20, "with": name}))
    chart = alt.Chart(pd.concat(frames), title="Memory of one training step", width=420, height=300)
    legend = alt.Legend(title=None, orient="top-right", symbolType="square", symbolStrokeWidth=5)
    return chart.mark_line(interpolate="step-after", strokeWidth=1.8).encode(
        x=alt.X("ms:Q", title="ms since the step began, while it is recorded"),
        y=alt.Y("MiB:Q", title="MiB beyond the start"),
        color=alt.Color("with:N", scale=scale, legend=legend),
    )


def busy() -> str | None:
    """A sentence if other programs keep the CPUs busy."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cpus:
        return None
    return f"This machine is busy: a load of {load:.1f} on {cpus} CPUs. Times are longer than on a quiet one, and ratios may be wrong."


def show(result: Result, console: "Console") -> None:
    """The curves at a few steps, then time and memory."""
    from rich.table import Table

    ours, theirs = result.runs[OURS], result.runs[TORCH]
    curves = Table("step", TORCH, OURS, "difference", title="Training loss")
    costs = Table(
        "the loss alone",
        TORCH,
        OURS,
        "ratio",
        title=f"{result.rows} x {result.vocab_size:,} logits, fp32, {result.device.type}",
    )
    for column in (*curves.columns, *costs.columns[1:]):
        column.justify = "right"
    last = len(ours.losses) - 1
    for i in sorted({0, last, *range(4, last, 5)}):
        curves.add_row(
            str(i + 1),
            f"{theirs.losses[i]:.5f}",
            f"{ours.losses[i]:.5f}",
            f"{ours.losses[i] - theirs.losses[i]:+.1e}",
        )
    console.print(curves)

    a, b = theirs.timing, ours.timing
    costs.add_row(
        "forward + backward, median", f"{a.p50:.1f} ms", f"{b.p50:.1f} ms", f"{a.p50 / b.p50:.2f}"
    )
    costs.add_row(
        "p20 to p80", f"{a.p20:.0f} - {a.p80:.0f} ms", f"{b.p20:.0f} - {b.p80:.0f} ms", ""
    )
    if theirs.extra_bytes is None or ours.extra_bytes is None:
        costs.add_row("peak memory beyond logits", "not measured", "not measured", "")
    else:
        sizes = [extra / 2**20 for extra in (theirs.extra_bytes, ours.extra_bytes)]
        costs.add_row(
            "peak memory beyond logits",
            *(f"{mib:.0f} MiB" for mib in sizes),
            f"{sizes[0] / max(sizes[1], 1e-9):.2f}",
        )
        shares = [extra / result.logits_bytes for extra in (theirs.extra_bytes, ours.extra_bytes)]
        costs.add_row("in units of the logits", *(f"{share:.2f}" for share in shares), "")
    console.print(costs)
    show_steps(result.costs, console)


def show_steps(costs: dict[str, Cost], console: "Console") -> None:
    """Time and memory of whole training steps, each beside torch's."""
    first = next(iter(costs.values()))
    columns = [
        tables.Column("a training step with the loss", right=False),
        tables.Column("ms"),
        tables.Column("faster"),
    ]
    columns += [tables.Column("peak memory"), tables.Column("of torch's")]
    lines = []
    for name, cost in costs.items():
        ratio, share = (
            first.timing.p50 / cost.timing.p50,
            cost.profile.peak_bytes / max(first.profile.peak_bytes, 1),
        )
        lines.append(
            tables.Line(
                [
                    name,
                    f"{cost.timing.p50:.0f}",
                    f"{ratio:.2f}",
                    f"{cost.profile.peak_bytes / 2**20:,.0f} MiB",
                    f"{share:.0%}",
                ]
            )
        )
    tables.show(console, columns, lines, "Forward, loss, backward and optimizer of one model")


def main(out: Path, setup: Setup) -> Result:
    """Train, show, draw; Mistake, before anything is trained, for a picture that cannot be
    written."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if out.suffix != ".png":
        raise Mistake(f"{str(out)!r} ends in {out.suffix!r}, expected .png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        require_writable(out)
    except OSError as error:
        raise Mistake(f"{out} cannot be written: {error.strerror or error}") from error
    console = tables.console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    console.print(
        f"[bold]lossfuse {lossfuse.__version__}[/bold] on {where}, torch {torch.__version__}"
    )
    console.print(
        f"This trains on real text, {setup.steps} steps with torch's loss and {setup.steps} with ours:",
        highlight=False,
    )
    console.print(
        f"about {setup.about_seconds} s on two quiet CPU cores, several times as long on a busy machine.",
        highlight=False,
    )
    if (noise := busy()) is not None:
        console.print(noise, style="yellow", highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        # a bar of unknown length moves while text is read and the tokenizer trained
        task = progress.add_task("preparing the text", total=None)

        def advance(runs: dict[str, Run]) -> None:
            losses = ", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items())
            progress.update(task, advance=1, total=setup.steps, description=losses)

        result = train(setup, device, progress.console.print, advance)
    show(result, console)
    try:
        picture(result, out)
    except OSError as error:
        raise Mistake(f"{out} cannot be written: {error.strerror or error}") from error
    console.print(f"picture: {out}", markup=False)
    return result
