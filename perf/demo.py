"""Train one small transformer on real text twice, with torch's loss and ours, in turn."""

import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
# (model, tokens, next tokens) -> the loss of a training step, and the colour of its curve
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
# load per CPU above which times are unreliable
BUSY = 0.5


@dataclass(frozen=True)
class Setup:
    """Sizes of the model, the text and the training."""

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
        """On two quiet CPU cores: 20 s of preparation, 1 s for a step of both models, 10 s of
        whole steps."""
        return 30 + self.steps


@dataclass
class Run:
    """Losses, times and memory of one training."""

    loss_fn: Loss
    model: Transformer
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None

    @property
    def timing(self) -> Timing:
        # the first step includes one-time work
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
    """Time and memory of a whole training step: forward, loss, backward, optimizer."""

    timing: Timing
    profile: MemoryProfile


@dataclass(frozen=True)
class Result:
    """Both trainings, and whole steps of one model with several losses."""

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
    """Train both models in turn, then measure the memory of each loss.

    ``advance`` is called after every step of both."""
    say(f"reading the standard library, at most {setup.characters / 1e6:.0f} M characters")
    texts = standard_library_sources(setup.characters)
    size = f"{sum(map(len, texts)) / 1e6:.1f} M characters"
    say(f"training a byte-level BPE of {setup.vocab_size:,} entries on {size}")
    tokenizer = interrupts.result_of(lambda: train_tokenizer(texts, setup.vocab_size))
    vocab_size = tokenizer.get_vocab_size()
    if vocab_size < setup.vocab_size:
        gave = f"the text gave {vocab_size} entries of {setup.vocab_size}"
        raise RuntimeError(f"{gave}; raise characters or lower vocab_size")
    encodings = interrupts.result_of(lambda: tokenizer.encode_batch(texts))
    ids = torch.tensor([i for encoding in encodings for i in encoding.ids])
    text = f"{len(ids) / 1e6:.2f} M tokens"
    say(f"{text}; training two models of the same seed, {setup.steps} steps each")

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
    """Time training steps with each loss in turn, then profile the memory of each."""

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
        # gradients freed during the recording must have been allocated in it
        run.optimizer.zero_grad()
        costs[name] = Cost(
            times[name], profile_memory(partial(step, name), device=device, warmup=0)
        )
    return costs


def _gradient(loss_fn: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_fn(logits, target), logits, retain_graph=True)


def picture(result: Result, path: Path) -> None:
    """Write loss curves, time and memory side by side as PNG."""
    import altair as alt

    names = list(result.runs)
    scale = alt.Scale(domain=names, range=["#9aa5b1", "#d1495b"])
    times = {name: run.timing.p50 for name, run in result.runs.items()}
    loss = _curves(result, scale) | _value_bars("Loss, forward + backward", "ms", times, scale)
    extra = {name: run.extra_bytes for name, run in result.runs.items()}
    memory = {name: size / 2**20 for name, size in extra.items() if size is not None}
    if len(memory) == len(names):
        loss |= _value_bars("Peak memory beyond logits", "MiB", memory, scale)
    costs = result.costs
    ways = alt.Scale(domain=list(costs), range=[STEPS[name][1] for name in costs])
    times = {name: cost.timing.p50 for name, cost in costs.items()}
    peaks = {name: cost.profile.peak_bytes / 2**20 for name, cost in costs.items()}
    steps = _memory_over_time(costs, ways)
    steps |= _value_bars("The whole step", "ms", times, ways)
    steps |= _value_bars("Its peak memory", "MiB", peaks, ways)
    rows = [part.resolve_scale(color="independent") for part in (loss, steps)]
    shape = f"{result.rows} tokens x {result.vocab_size:,} classes, fp32, {result.device.type}"
    caption = f"{shape}, logits {result.logits_bytes / 2**20:.0f} MiB"
    title = "torch's cross entropy and ours, training on Python's standard library"
    chart = alt.vconcat(*rows, spacing=30).properties(title=alt.Title(title, subtitle=caption))
    chart = chart.resolve_scale(color="independent").configure_view(stroke=None)
    drawn = io.BytesIO()
    chart.configure_axis(grid=False).save(drawn, format="png", scale_factor=2)
    write_atomically(path, drawn.getvalue())


def _curves(result: Result, scale: "alt.Scale") -> "alt.Chart":
    import altair as alt
    import pandas as pd

    losses = [(name, run.losses) for name, run in result.runs.items()]
    points = [(i + 1, loss, name) for name, run in losses for i, loss in enumerate(run)]
    curves = pd.DataFrame(points, columns=["step", "loss", "with"])
    legend = alt.Legend(title=None, orient="top-right", symbolType="square", symbolStrokeWidth=5)
    # thin on thick, so that both curves show where they agree
    sizes = alt.Scale(domain=list(result.runs), range=[6, 1.8])
    chart = alt.Chart(curves, title="The same curve", width=420, height=300).mark_line()
    return chart.encode(
        x="step:Q",
        y=alt.Y("loss:Q", title="training loss", scale=alt.Scale(zero=False)),
        color=alt.Color("with:N", scale=scale, legend=legend),
        size=alt.Size("with:N", scale=sizes, legend=None),
    )


def _value_bars(title: str, unit: str, values: dict[str, float], scale: "alt.Scale") -> Any:
    """A bar with its number for each name."""
    import altair as alt
    import pandas as pd

    frame = pd.DataFrame({"with": list(values), "value": list(values.values())})
    top = alt.Scale(domain=[0, 1.15 * max(values.values())], nice=False)
    axis = alt.Axis(labelAngle=0, ticks=False)
    base = alt.Chart(frame, title=title, width=210, height=300).encode(
        x=alt.X("with:N", title=None, sort=list(values), axis=axis),
        y=alt.Y("value:Q", title=unit, scale=top),
    )
    label = base.mark_text(dy=-9, fontSize=13).encode(text=alt.Text("value:Q", format=",.0f"))
    return base.mark_bar().encode(color=alt.Color("with:N", scale=scale, legend=None)) + label


def _memory_over_time(costs: dict[str, Cost], scale: "alt.Scale") -> "alt.Chart":
    """One curve per loss over a training step."""
    import altair as alt
    import pandas as pd

    frames = []
    for name, cost in costs.items():
        changes = cost.profile.frame()
        # of many changes at one moment the highest and the last
        moment = (changes["ms"] * (300 / max(changes["ms"].max(), 1e-9))).astype(int)
        shown = sorted(
            {
                0,
                *changes["bytes"].groupby(moment).idxmax(),
                *moment.index[~moment.duplicated(keep="last")],
            }
        )
        part = changes.loc[shown, ["ms", "bytes"]]
        frames.append(pd.DataFrame({"ms": part["ms"], "MiB": part["bytes"] / 2**20, "with": name}))
    chart = alt.Chart(pd.concat(frames), title="Memory of one training step", width=420, height=300)
    legend = alt.Legend(title=None, orient="top-right", symbolType="square", symbolStrokeWidth=5)
    return chart.mark_line(interpolate="step-after", strokeWidth=1.8).encode(
        x=alt.X("ms:Q", title="ms since the step began, while it is recorded"),
        y=alt.Y("MiB:Q", title="MiB beyond the start"),
        color=alt.Color("with:N", scale=scale, legend=legend),
    )


def busy() -> str | None:
    """A sentence if other programs use the CPUs."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cpus:
        return None
    found = f"This machine is busy: a load of {load:.1f} on {cpus} CPUs."
    return f"{found} Times are longer than on a quiet one, and ratios may be wrong."


def show(result: Result, console: "Console") -> None:
    """Print losses at a few steps, then time and memory."""
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
    """Print time and memory of whole training steps relative to torch's."""
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
    """Train, print, draw; Mistake, before any training, if the picture cannot be written."""
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
    steps = f"{setup.steps} steps with torch's loss and {setup.steps} with ours"
    console.print(f"This trains on real text, {steps}:", highlight=False)
    quiet = f"about {setup.about_seconds} s on two quiet CPU cores"
    console.print(f"{quiet}, several times as long on a busy machine.", highlight=False)
    if (noise := busy()) is not None:
        console.print(noise, style="yellow", highlight=False)
    result = _train_with_progress(setup, device, console)
    show(result, console)
    try:
        picture(result, out)
    except OSError as error:
        raise Mistake(f"{out} cannot be written: {error.strerror or error}") from error
    console.print(f"picture: {out}", markup=False)
    return result


def _train_with_progress(setup: Setup, device: torch.device, console: "Console") -> Result:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    description = TextColumn("{task.description}")
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        # of unknown length while text is read and the tokenizer is trained
        task = progress.add_task("preparing the text", total=None)

        def advance(runs: dict[str, Run]) -> None:
            losses = ", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items())
            progress.update(task, advance=1, total=setup.steps, description=losses)

        return train(setup, device, progress.console.print, advance)
