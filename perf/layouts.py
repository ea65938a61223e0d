"""What a loss costs over many ranks: bytes of each, bytes on the wire and collectives of a step, by
formula, for TP x SP x FSDP x DP.

``ours(loss, layout)`` and ``others(loss, layout)`` are lists of what is held and of what is sent;
``ASSUMPTIONS`` is what they rest on. The tests run the layouts that two and four ranks make and
demand what was counted there: every call, and every byte that was handed to it. Nothing here needs
ranks, so that a layout of thousands costs as little as one of two."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from ..ops.head_chunks import chunk_rows, padded
from ..row_types import Wants
from ..spec import LinearOptions, LossSpec
from ..vocab_parallel.backend import FINGERPRINT_INTS
from ..vocab_parallel.merge import empty_shard
from . import tables
from .cases import DTYPES, named
from .mistakes import Mistake
from .shown import digits

if TYPE_CHECKING:
    from rich.console import Console

# bytes of a float32, which statistics are whatever the logits are
NUMBER = 4

ASSUMPTIONS = (
    "Of tp ranks each has ceil(V / tp) classes, the same rows and the same options; all is said of the rank with the most classes.",
    "sp cuts the N tokens of a data-parallel rank: each has ceil(N / sp) of them, and nothing of the loss is sent over sp; the one number"
    " of a global mean (normalizer) is the trainer's.",
    "No row is left out: with drop_ignored ignored rows are neither computed nor sent.",
    "Of NxV logits the loss alone is counted, of an NxDxV head what surrounds it too. A gradient comes to the loss alone;"
    " probabilities and the bias have none, hidden states and weight both do.",
    "fsdp shards the head over fsdp x sp ranks in a unit of its own (FSDP2): one all-gather before the loss, in the dtype of the operands,"
    " and one more in the backward with --reshard; one reduce-scatter in the backward, in float32, of classes padded to a multiple of the"
    " ranks; its shard is float32. Chunks of the loss add up before that.",
    "dp holds replicas, over which the shard of the gradient is all-reduced in float32; without fsdp the gradient in its own dtype, over"
    " dp x sp.",
    "hidden_grad 'partial' is sequence parallelism on the tp ranks: their trainer all-gathers the hidden states before the head, and"
    " reduce-scatters their gradient.",
    "Bytes handed over are what a rank passes to a call. Bytes sent are a ring's: of P ranks an all-gather sends (P - 1) parts of its own"
    " size, a reduce-scatter (P - 1) / P of what it is given, an all-reduce twice that.",
    "Memory is that of an accelerator, at the largest of: the loop over chunks, the gradients rounded and handed over, the hidden gradient"
    " reduced, the weight's gradient reduced. Activations, optimizer, FSDP's copy while it gathers and the allocator's slack are left out.",
    "Logits gathered whole are transformers' colwise_gather_output with its loss on logits.float(), and Megatron its"
    " VocabParallelCrossEntropy, three all-reduces of N numbers: read off their code. Hidden and weight gradients are summed as here.",
)


@dataclass(frozen=True)
class Layout:
    """How ranks are arranged; the product of the degrees is their number.

    Args:
        tp: ranks among which the classes are cut.
        sp: ranks among which the tokens of a data-parallel rank are cut, by sequence or context
            parallelism.
        fsdp: data-parallel ranks among which the head's weight is sharded.
        dp: replicas of all that.
    """

    tp: int = 1
    sp: int = 1
    fsdp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for degree in fields(self):
            if getattr(self, degree.name) < 1:
                raise Mistake(
                    f"layout: {degree.name} is {getattr(self, degree.name)} but must be positive"
                )

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """tp=8,fsdp=64; what is not named is 1."""
        degrees = pairs(text, [degree.name for degree in fields(cls)], "layout")
        if any(value != int(value) for value in degrees.values()):
            raise Mistake(f"layout is {text!r} but degrees are whole numbers")
        return cls(**{name: int(value) for name, value in degrees.items()})

    @property
    def ranks(self) -> int:
        return self.tp * self.sp * self.fsdp * self.dp

    @property
    def sharding(self) -> int:
        """Ranks among which the head's weight is sharded."""
        return self.fsdp * self.sp if self.fsdp > 1 else 1

    @property
    def replicas(self) -> int:
        """Ranks over which what is left of the weight's gradient is summed."""
        return self.dp if self.fsdp > 1 else self.dp * self.sp

    def __str__(self) -> str:
        named = [
            f"{degree.name}={getattr(self, degree.name)}"
            for degree in fields(self)
            if getattr(self, degree.name) > 1
        ]
        return ",".join(named) or "tp=1"


def pairs(text: str, names: Sequence[str], what: str) -> dict[str, float]:
    """name=number,name=number -> a dictionary."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in names or name in found or not math.isfinite(number):
            raise Mistake(
                f"{what} is {text!r} but must be like {names[0]}=8,{names[-1]}=64, with each of {', '.join(names)} once at most"
            )
        found[name] = number
    return found


@dataclass(frozen=True)
class Loss:
    """A loss and its backward, once.

    Args:
        n: tokens of a data-parallel rank, all of them on each of its tp ranks.
        v: classes in all.
        d: width of the hidden states; None for a loss of logits that are there already.
        dtype: of logits or operands: fp32, bf16 or fp16.
        mode: one of ``cases.MODES``.
        reduction: none, mean or sum.
        probabilities: the targets are probabilities, each rank's columns of them, without a
            gradient.
        class_weights, smoothing, normalizer: whether these options are given.
        statistics: ``cross_entropy_stats`` or its linear form, with ``entropy`` and ``argmax``.
        hidden_grad: as in ``VocabShard``.
        options: as in ``linear_cross_entropy``.
        reshard: FSDP gives the gathered weight back after the forward.
    """

    n: int
    v: int
    d: int | None = None
    dtype: str = "bf16"
    mode: str = "forward+backward"
    reduction: str = "mean"
    probabilities: bool = False
    class_weights: bool = False
    smoothing: bool = False
    normalizer: bool = False
    statistics: bool = False
    entropy: bool = True
    argmax: bool = True
    hidden_grad: str = "reduced"
    options: LinearOptions = field(default_factory=LinearOptions)
    reshard: bool = False

    @property
    def b(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def step(self) -> bool:
        return self.mode == "forward+backward"

    def row_bytes(self, statistics: bool) -> int:
        """Of what a rank says of a row: numbers in float32, and a class in int64."""
        spec = LossSpec(label_smoothing=0.1 if self.smoothing else 0.0)
        wants = Wants(statistics and self.entropy, statistics and self.argmax)
        said = empty_shard(
            0, torch.empty(0), self.probabilities, self.class_weights, spec, wants, statistics
        )
        return sum(numbers.element_size() for numbers in said if numbers is not None)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step.

    Args:
        what: goes over the wire.
        by: whom it is called by: lossfuse, FSDP, DDP, the trainer; or transformers or Megatron, in
            their stead.
        kind: all-gather, all-reduce or reduce-scatter.
        over: the degree of the layout: tp, fsdp (and sp with it) or dp.
        ranks: of its group.
        payloads: bytes that a rank hands to each call.
    """

    what: str
    by: str
    kind: str
    over: str
    ranks: int
    payloads: tuple[int, ...]

    @property
    def calls(self) -> int:
        return len(self.payloads)

    @property
    def payload(self) -> int:
        return sum(self.payloads)

    @property
    def sent(self) -> int:
        """Bytes that a rank of a ring sends."""
        share = {"all-gather": self.ranks, "reduce-scatter": 1, "all-reduce": 2}[self.kind]
        return math.ceil(share * (self.ranks - 1) * self.payload / self.ranks)

    @property
    def ring_steps(self) -> int:
        """One after the other."""
        return self.calls * (self.ranks - 1) * (2 if self.kind == "all-reduce" else 1)


# when something is held
LOOP, HANDED, HIDDEN, WEIGHT = (
    "loop over chunks",
    "gradients handed over",
    "hidden gradient reduced",
    "weight gradient reduced",
)
ALWAYS = (LOOP, HANDED, HIDDEN, WEIGHT)


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds, and when."""

    what: str
    bytes: int
    when: tuple[str, ...] = ALWAYS


@dataclass(frozen=True)
class Way:
    """What a rank holds and sends where the loss is computed in some way."""

    name: str
    held: tuple[Held, ...]
    collectives: tuple[Collective, ...]

    def at(self, when: str) -> int:
        return sum(held.bytes for held in self.held if when in held.when)

    @property
    def peak_when(self) -> str:
        return max(ALWAYS, key=self.at)

    @property
    def peak(self) -> int:
        return self.at(self.peak_when)

    @property
    def calls(self) -> int:
        return sum(c.calls for c in self.collectives)

    def sent(self, *whats: str) -> int:
        """Bytes on the wire of some of them, or of all."""
        return sum(c.sent for c in self.collectives if not whats or c.what in whats)


# what goes over the wire
ROWS, CLASS_WEIGHTS, WHOLE_LOGITS = "numbers of rows", "sum of class weights", "logits"
HIDDEN_STATES, HIDDEN_GRADIENT = "hidden states", "hidden gradient"
HEAD_WEIGHT, HEAD_GRADIENT = "weight", "weight gradient"


def ours(loss: Loss, layout: Layout) -> Way:
    """lossfuse with ``shard=VocabShard.even(V, the tp group)``, or without where tp is 1."""
    sizes = _chunks(loss, layout)
    per_loop = [_rows_payload(loss, size, loss.statistics) for size in sizes]
    if loss.d is not None and loss.step and loss.reduction == "none":
        # logits are made again, and nothing but the loss is asked for
        per_loop += [_rows_payload(loss, size, False) for size in sizes]
    calls = [Collective(ROWS, "lossfuse", "all-gather", "tp", layout.tp, tuple(per_loop))]
    if (
        loss.class_weights
        and loss.reduction == "mean"
        and not (loss.probabilities or loss.normalizer)
    ):
        calls.insert(
            0, Collective(CLASS_WEIGHTS, "lossfuse", "all-reduce", "tp", layout.tp, (NUMBER,))
        )
    largest = max(sizes, default=0)
    gathered = (
        (layout.tp + 1) * _rows_payload(loss, largest, loss.statistics) if layout.tp > 1 else 0
    )
    return _way(
        "lossfuse",
        "lossfuse",
        loss,
        layout,
        calls,
        [*_our_memory(loss, layout, largest), Held("row numbers, gathered", gathered, (LOOP,))],
    )


def others(loss: Loss, layout: Layout) -> list[Way]:
    """What is done today, for what it can do: logits gathered whole, and three all-reduces over
    shards of them."""
    n, mine, b = _rows(loss, layout), _classes(loss, layout), loss.b
    gradients = _gradients_of_a_head(loss, layout)
    gather = Collective(
        WHOLE_LOGITS, "transformers", "all-gather", "tp", layout.tp, (n * mine * b,)
    )
    # logits, log-probabilities and a gradient of either, two or three at a time
    logits = Held(
        "whole logits and what is made of them, in fp32",
        n * loss.v * 4 * (3 if loss.step else 2),
        (LOOP,),
    )
    found = [_way("gathered whole", "transformers", loss, layout, [gather], [logits, *gradients])]
    if not (loss.probabilities or loss.statistics or loss.class_weights):
        numbers = Collective(ROWS, "Megatron", "all-reduce", "tp", layout.tp, (n * NUMBER,) * 3)
        # in fp32 over the logits, in half precision beside them
        held = Held(
            "logits, and their exponentials in fp32", n * mine * (4 if b == 4 else b + 4), (LOOP,)
        )
        found.append(_way("Megatron", "Megatron", loss, layout, [numbers], [held, *gradients]))
    return found


def _rows(loss: Loss, layout: Layout) -> int:
    return -(-loss.n // layout.sp)


def _classes(loss: Loss, layout: Layout) -> int:
    return -(-loss.v // layout.tp)


def _chunks(loss: Loss, layout: Layout) -> list[int]:
    """Rows of each call of the loss's kernels."""
    n = _rows(loss, layout)
    if loss.d is None:
        return [n]
    most = chunk_rows(
        n, loss.d, _classes(loss, layout), DTYPES[loss.dtype], loss.options, cpu=False
    )
    return [min(most, n - start) for start in range(0, n, most)]


def _rows_payload(loss: Loss, rows: int, statistics: bool) -> int:
    # and a header in int64, and a sum of class weights
    return 8 * FINGERPRINT_INTS + NUMBER * loss.class_weights + loss.row_bytes(statistics) * rows


def _way(
    name: str, by: str, loss: Loss, layout: Layout, calls: list[Collective], held: list[Held]
) -> Way:
    """With what surrounds a head in any case: its weight, its hidden states, and the gradients of
    both over all ranks."""
    before, after, around = _around(by, loss, layout) if loss.d is not None else ([], [], [])
    calls = [*before, *calls, *(after if loss.step else [])]
    return Way(
        name,
        tuple(one for one in (*around, *held) if one.bytes),
        tuple(c for c in calls if c.ranks > 1 and c.calls),
    )


def _around(
    by: str, loss: Loss, layout: Layout
) -> tuple[list[Collective], list[Collective], list[Held]]:
    """Collectives before a head's loss and after it, and what is held beside it."""
    n, d, b, tp, sharding = _rows(loss, layout), loss.d or 0, loss.b, layout.tp, layout.sharding
    sharded = sharding > 1
    part = -(-_classes(loss, layout) // sharding) * d
    if loss.hidden_grad == "partial":
        before = [
            Collective(HIDDEN_STATES, "trainer", "all-gather", "tp", tp, (-(-n // tp) * d * b,))
        ]
        after = [Collective(HIDDEN_GRADIENT, "trainer", "reduce-scatter", "tp", tp, (n * d * b,))]
    else:
        before = []
        after = [Collective(HIDDEN_GRADIENT, by, "all-reduce", "tp", tp, (n * d * b,))]
    gathers = 2 if loss.reshard and loss.step else 1
    before.append(
        Collective(HEAD_WEIGHT, "FSDP", "all-gather", "fsdp", sharding, (part * b,) * gathers)
    )
    after.append(
        Collective(
            HEAD_GRADIENT, "FSDP", "reduce-scatter", "fsdp", sharding, (sharding * part * 4,)
        )
    )
    replicated = part * (4 if sharded else b)
    after.append(
        Collective(
            HEAD_GRADIENT,
            "FSDP" if sharded else "DDP",
            "all-reduce",
            "dp",
            layout.replicas,
            (replicated,),
        )
    )
    held = [
        Held("hidden states", n * d * b),
        Held("weight, its shard in fp32", part * 4 * sharded),
        Held(
            "weight, gathered" if sharded else "weight",
            _classes(loss, layout) * d * b,
            (LOOP, HANDED, HIDDEN) if sharded else ALWAYS,
        ),
        Held("hidden gradient, for its reduction", n * d * b * (tp > 1) * loss.step, (HIDDEN,)),
        Held(
            "weight gradient, for its reduction",
            sharding * part * 4 * sharded * loss.step,
            (WEIGHT,),
        ),
        Held("weight gradient, its shard in fp32", part * 4 * sharded * loss.step, (WEIGHT,)),
    ]
    return before, after, held


def _our_memory(loss: Loss, layout: Layout, rows: int) -> list[Held]:
    n, b, mine, dtype = _rows(loss, layout), loss.b, _classes(loss, layout), DTYPES[loss.dtype]
    if loss.d is None:
        return [
            Held("logits", n * mine * b),
            Held("gradient of the logits", n * mine * b * loss.step),
        ]
    acc = loss.options.dtype("acc_dtype", dtype).itemsize
    summed = loss.step or (loss.mode == "forward" and loss.reduction != "none")
    # the sum is the gradient where their dtypes are the same
    when = ALWAYS if acc == b else (LOOP, HANDED)
    copied = rows * loss.d * b * (acc > b or not summed)
    return [
        Held(
            "chunk of logits",
            rows * padded(mine) * loss.options.dtype("logits_dtype", dtype).itemsize,
            (LOOP,),
        ),
        Held("chunk of hidden states", copied, (LOOP,)),
        Held(f"hidden gradient, its {8 * acc}-bit sum", n * loss.d * acc * summed, when),
        Held(f"weight gradient, its {8 * acc}-bit sum", mine * loss.d * acc * summed, when),
        *(_gradients_of_a_head(loss, layout, dlogits=False) if acc > b else ()),
    ]


def _gradients_of_a_head(loss: Loss, layout: Layout, *, dlogits: bool = True) -> list[Held]:
    """As autograd hands them on, in the dtype of the operands; while they are made, of all logits
    at a time."""
    n, b, d, mine = _rows(loss, layout), loss.b, loss.d or 0, _classes(loss, layout)
    later = (HANDED, HIDDEN, WEIGHT)
    return [
        Held("gradient of the logits", n * mine * b * loss.step * dlogits, (HANDED,)),
        Held("hidden gradient", n * d * b * loss.step, later),
        Held("weight gradient", mine * d * b * loss.step, later),
    ]


# --- the command


@dataclass(frozen=True)
class Links:
    """What a rank can send: gigabits per second over a degree of the layout, and seconds of each
    step of a ring."""

    gbps: dict[str, float]
    latency: float

    @classmethod
    def parse(cls, text: str, latency_us: float) -> "Links":
        """400, or tp=3600,fsdp=400,dp=400."""
        overs = ("tp", "fsdp", "dp")
        try:
            gbps = dict.fromkeys(overs, float(text))
        except ValueError:
            gbps = pairs(text, overs, "--link-gbps")
        if (
            not all(0 < value < math.inf for value in gbps.values())
            or not 0 <= latency_us < math.inf
        ):
            raise Mistake(
                f"--link-gbps is {text!r} and --latency-us {latency_us:g}; expected positive numbers"
            )
        return cls(gbps, latency_us / 1e6)

    def seconds(self, collective: Collective) -> float:
        if collective.over not in self.gbps:
            raise Mistake(
                f"--link-gbps says nothing of {collective.over}, over which there is an {collective.kind} of the layout"
            )
        return (
            8 * collective.sent / (self.gbps[collective.over] * 1e9)
            + self.latency * collective.ring_steps
        )


def main(
    cases: Sequence[str],
    losses: dict[str, Any],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    fits_gib: float | None,
    links: Links | None,
) -> None:
    """Print a table of the layouts, and for a single one what is held and sent; ``losses`` are
    options of ``Loss``."""
    console = tables.console()
    found = [Layout.parse(text) for text in layouts]
    for case in [named(name, torch.device("cuda")) for name in cases]:
        if case.op == "labels":
            raise Mistake(
                f"{case.name} has labels, but --layout is for classes: of NxV logits or an NxDxV head"
            )
        for dtype in dtypes:
            loss = Loss(case.n, case.v, case.d, dtype, **losses)
            title = f"{case.name}: {case.size} in {dtype} for each data-parallel rank, {loss.mode}; peak, calls and bytes sent of one rank"
            _show_layouts(console, title, loss, found, fits_gib, links)
            if len(found) == 1:
                way = ours(loss, found[0])
                _show_held(console, way)
                _show_collectives(console, way, links)
    said = list(ASSUMPTIONS)
    if links is not None:
        rates = ", ".join(f"{value:g} Gbit/s over {over}" for over, value in links.gbps.items())
        said.append(
            f"Times are bytes sent at {rates}, and {links.latency * 1e6:g} us a step of a ring: assumed, without overlap, not measured."
        )
    for sentence in said:
        console.print(f"- {sentence}", style="dim", highlight=False, markup=False)


def _show_layouts(
    console: "Console",
    title: str,
    loss: Loss,
    layouts: Sequence[Layout],
    fits_gib: float | None,
    links: Links | None,
) -> None:
    columns = [
        tables.Column("way", right=False),
        tables.Column("peak"),
        tables.Column("calls", rank=4),
    ]
    columns += [
        tables.Column("rows", rank=1),
        tables.Column("hidden", rank=2),
        tables.Column("weight", rank=3),
    ]
    columns += [tables.Column("time")] if links is not None else []
    columns += [tables.Column(f"in {fits_gib:g} GiB", right=False)] if fits_gib is not None else []
    lines = []
    for layout in layouts:
        for way in (ours(loss, layout), *others(loss, layout)):
            cells = [
                way.name,
                shown(way.peak),
                str(way.calls),
                shown(way.sent(ROWS, CLASS_WEIGHTS, WHOLE_LOGITS)),
                shown(way.sent(HIDDEN_STATES, HIDDEN_GRADIENT)),
                shown(way.sent(HEAD_WEIGHT, HEAD_GRADIENT)),
            ]
            if links is not None:
                cells.append(f"{1e3 * sum(map(links.seconds, way.collectives)):.2f} ms")
            fits = fits_gib is None or way.peak <= fits_gib * 2**30
            cells += [] if fits_gib is None else ["fits" if fits else "no"]
            lines.append(
                tables.Line(cells, f"{layout.ranks:,}: {layout}", style="" if fits else "red")
            )
    tables.show(console, columns, lines, title)


def _show_held(console: "Console", way: Way) -> None:
    columns = [
        tables.Column("held by a rank", right=False),
        tables.Column("bytes"),
        tables.Column("while", right=False, folds=True),
    ]
    lines = [
        tables.Line(
            [
                held.what,
                shown(held.bytes),
                "always" if held.when == ALWAYS else ", ".join(held.when),
            ]
        )
        for held in way.held
    ]
    tables.show(console, columns, [*lines, tables.Line(["peak", shown(way.peak), way.peak_when])])


def _show_collectives(console: "Console", way: Way, links: Links | None) -> None:
    columns = [
        tables.Column(name, right=False, folds=True) for name in ("of", "collective", "by", "over")
    ]
    columns += [
        tables.Column("ranks", rank=2),
        tables.Column("calls", rank=3),
        tables.Column("handed over", rank=1),
        tables.Column("sent"),
    ]
    columns += [tables.Column("time")] if links is not None else []
    lines = []
    for c in way.collectives:
        time = [] if links is None else [f"{1e3 * links.seconds(c):.3f} ms"]
        lines.append(
            tables.Line(
                [
                    c.what,
                    c.kind,
                    c.by,
                    c.over,
                    f"{c.ranks:,}",
                    str(c.calls),
                    shown(c.payload),
                    shown(c.sent),
                    *time,
                ]
            )
        )
    tables.show(console, columns, lines)


def shown(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        # half of a unit is said in it
        if size >= scale / 2:
            return f"{digits(size / scale)} {unit}"
    return f"{size} B" if size else "0"
