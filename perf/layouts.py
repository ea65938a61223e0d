"""Costs of a loss over many ranks, by formula: memory of a rank, collectives and bytes sent.

``lossfuse_plan`` and ``other_plans`` list the buffers and the collectives of one rank under the
assumptions of ``layout_tables``. The tests compare calls and bytes with what two and four ranks
pass to torch.distributed. The formulas run on one process for a layout of any size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch

from ..ops.chunk_plan import ChunkPlan, chunk_plan, chunk_rows, padded
from ..row_types import Wants
from ..spec import LinearOptions, LossSpec
from ..vocab_parallel.backend import FINGERPRINT_INTS
from ..vocab_parallel.merge import empty_shard
from .cases import DTYPES
from .mistakes import Mistake

FP32_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; their product is the number of ranks."""

    tp: int = 1  # shards the classes
    sp: int = 1  # shards the tokens of a data-parallel rank (sequence or context parallelism)
    fsdp: int = 1  # data-parallel ranks that shard the head's weight
    dp: int = 1  # replicas of all that

    def __post_init__(self) -> None:
        for degree in fields(self):
            if (value := getattr(self, degree.name)) < 1:
                raise Mistake(f"layout: {degree.name} is {value}, expected a positive degree")

    @property
    def ranks(self) -> int:
        return self.tp * self.sp * self.fsdp * self.dp

    @property
    def weight_shards(self) -> int:
        return self.fsdp * self.sp if self.fsdp > 1 else 1

    @property
    def replicas(self) -> int:
        """Ranks that all-reduce the weight's gradient, or its shard."""
        return self.dp if self.fsdp > 1 else self.dp * self.sp

    def __str__(self) -> str:
        degrees = {degree.name: getattr(self, degree.name) for degree in fields(self)}
        return ",".join(f"{name}={value}" for name, value in degrees.items() if value > 1) or "tp=1"


@dataclass(frozen=True)
class LossStep:
    """One call of a loss and its backward; ``True`` for an option means that it is given."""

    n: int  # tokens of a data-parallel rank, all of them on each of its tp ranks
    v: int  # classes of all ranks together
    d: int | None = None  # width of the hidden states; None for a loss of logits
    dtype: str = "bf16"  # of logits or operands
    mode: str = "forward+backward"
    reduction: str = "mean"
    probabilities: bool = False  # targets, sharded like the logits, that do not require grad
    class_weights: bool = False
    smoothing: bool = False
    normalizer: bool = False
    statistics: bool = False  # cross_entropy_stats or its linear form
    entropy: bool = True
    argmax: bool = True
    hidden_grad: str = "reduced"  # as in VocabShard
    options: LinearOptions = field(default_factory=LinearOptions)
    reshard: bool = False  # FSDP frees the gathered weight after the forward

    @property
    def has_backward(self) -> bool:
        return self.mode == "forward+backward"

    def payload(self, rows: int, statistics: bool) -> int:
        """Bytes a rank gathers for a chunk: int64 header, sum of class weights, row numbers."""
        spec = LossSpec(label_smoothing=0.1 if self.smoothing else 0.0)
        wants = Wants(statistics and self.entropy, statistics and self.argmax)
        given = (self.probabilities, self.class_weights, spec, wants, statistics)
        row = sum(t.element_size() for t in empty_shard(0, torch.empty(0), *given) if t is not None)
        return 8 * FINGERPRINT_INTS + FP32_BYTES * self.class_weights + row * rows


# contents of collectives
ROWS, CLASS_WEIGHTS, LOGITS = "numbers of rows", "sum of class weights", "logits"
HIDDEN_STATES, HIDDEN_GRADIENT = "hidden states", "hidden gradient"
HEAD_WEIGHT, HEAD_GRADIENT = "weight", "weight gradient"


@dataclass(frozen=True)
class Collective:
    """Calls of one collective in a step."""

    content: str  # one of the names above
    caller: str  # lossfuse, FSDP, DDP, trainer; transformers or Megatron in place of lossfuse
    kind: str  # all-gather, all-reduce or reduce-scatter
    axis: str  # degree of the layout: tp, fsdp (and sp with it) or dp
    ranks: int
    payloads: tuple[int, ...]  # bytes that a rank passes to each call

    @property
    def payload(self) -> int:
        return sum(self.payloads)

    @property
    def sent(self) -> int:
        """Bytes that a rank of a ring sends."""
        share = {"all-gather": self.ranks, "reduce-scatter": 1, "all-reduce": 2}[self.kind]
        return math.ceil(share * (self.ranks - 1) * self.payload / self.ranks)


# moments of a step, in order
LOOP, RETURNED = "loop over chunks", "gradients returned"
HIDDEN, WEIGHT = "hidden gradient reduced", "weight gradient reduced"
ALWAYS = (LOOP, RETURNED, HIDDEN, WEIGHT)


@dataclass(frozen=True)
class Buffer:
    """Memory of a rank, and the moments at which it is allocated."""

    name: str
    bytes: int
    when: tuple[str, ...] = ALWAYS


@dataclass(frozen=True)
class Plan:
    """Buffers and collectives of a rank for one way to compute the loss."""

    name: str
    buffers: tuple[Buffer, ...]
    collectives: tuple[Collective, ...]

    def bytes_at(self, moment: str) -> int:
        return sum(buffer.bytes for buffer in self.buffers if moment in buffer.when)

    @property
    def peak_moment(self) -> str:
        return max(ALWAYS, key=self.bytes_at)

    @property
    def peak(self) -> int:
        return self.bytes_at(self.peak_moment)

    def sent(self, *contents: str) -> int:
        """Bytes sent of these contents, or of all."""
        return sum(c.sent for c in self.collectives if not contents or c.content in contents)


GATHERED = "gathered whole"  # the name of the plan


def _local(step: LossStep, layout: Layout) -> tuple[int, int, int, int]:
    """Rows, classes and width of one rank, and bytes of an element."""
    n, v = math.ceil(step.n / layout.sp), math.ceil(step.v / layout.tp)
    return n, v, step.d or 0, DTYPES[step.dtype].itemsize


def _chunk_plan(step: LossStep, layout: Layout) -> ChunkPlan:
    """The chunks of our linear loss on one rank."""
    n, v, d, _ = _local(step, layout)
    dtype = DTYPES[step.dtype]
    if step.has_backward or (step.mode == "forward" and step.reduction != "none"):
        return chunk_plan(n, d, v, dtype, step.options, narrow_sums=True, cpu=False)
    rows = chunk_rows(n, d, v, dtype, step.options, cpu=False)
    return ChunkPlan(rows, rows, dtype)


def lossfuse_plan(step: LossStep, layout: Layout) -> Plan:
    """Plan of ``shard=VocabShard.even(V, the tp group)``, or unsharded where tp is 1."""
    n, _, d, _ = _local(step, layout)
    rows = _chunk_plan(step, layout).rows if d else n
    chunks = [min(rows, n - start) for start in range(0, n, rows)]
    payloads = [step.payload(chunk, step.statistics) for chunk in chunks]
    gathered = (layout.tp + 1) * payloads[0] if layout.tp > 1 else 0
    if d and step.has_backward and step.reduction == "none":
        # the backward recomputes the logits and gathers what the loss needs, without statistics
        payloads += [step.payload(chunk, False) for chunk in chunks]
    calls = [Collective(ROWS, "lossfuse", "all-gather", "tp", layout.tp, tuple(payloads))]
    unweighted = not step.class_weights or step.probabilities or step.normalizer
    if step.reduction == "mean" and not unweighted:
        total = Collective(CLASS_WEIGHTS, "lossfuse", "all-reduce", "tp", layout.tp, (FP32_BYTES,))
        calls.insert(0, total)
    numbers = Buffer("row numbers, gathered", gathered, (LOOP,))
    buffers = [*_lossfuse_buffers(step, layout, chunks[0]), numbers]
    return _plan("lossfuse", step, layout, calls, buffers)


def other_plans(step: LossStep, layout: Layout) -> list[Plan]:
    """Plans of libraries that can compute this step: gathered logits, and Megatron's loss."""
    n, v, _, b = _local(step, layout)
    tp, gradients = layout.tp, [*_returned_gradients(step, layout)]
    gather = Collective(LOGITS, "transformers", "all-gather", "tp", tp, (n * v * b,))
    # two or three of: logits, log-probabilities, and a gradient of either
    size = n * step.v * FP32_BYTES * (3 if step.has_backward else 2)
    logits = Buffer("unsharded logits and tensors like them, in fp32", size, (LOOP,))
    plans = [_plan(GATHERED, step, layout, [gather], [logits, *gradients])]
    if not (step.probabilities or step.statistics or step.class_weights):
        payloads = (n * FP32_BYTES,) * 3
        reduces = Collective(ROWS, "Megatron", "all-reduce", "tp", tp, payloads)
        # fp32 exponentials overwrite the logits; in half precision they are a second tensor
        size = n * v * (4 if b == 4 else b + 4)
        logits = Buffer("logits, and their exponentials in fp32", size, (LOOP,))
        plans.append(_plan("Megatron", step, layout, [reduces], [logits, *gradients]))
    return plans


def _plan(
    name: str, step: LossStep, layout: Layout, calls: list[Collective], buffers: list[Buffer]
) -> Plan:
    """Add what any loss of a head needs: its operands and the reductions of their gradients."""
    if step.d is not None:
        caller = "transformers" if name == GATHERED else name
        calls = [*_before(step, layout), *calls, *_after(caller, step, layout)]
        buffers = [*_operands(step, layout), *buffers]
    used = tuple(c for c in calls if c.ranks > 1 and c.payloads)
    return Plan(name, tuple(buffer for buffer in buffers if buffer.bytes), used)


def _weight_shard(step: LossStep, layout: Layout) -> int:
    """Elements of the weight that FSDP stores on a rank, padding included."""
    _, v, d, _ = _local(step, layout)
    return math.ceil(v / layout.weight_shards) * d


def _before(step: LossStep, layout: Layout) -> Iterator[Collective]:
    """Gather the operands of a head."""
    n, _, d, b = _local(step, layout)
    if step.hidden_grad == "partial":
        states = math.ceil(n / layout.tp) * d * b
        yield Collective(HIDDEN_STATES, "trainer", "all-gather", "tp", layout.tp, (states,))
    payloads = (_weight_shard(step, layout) * b,) * (2 if step.reshard and step.has_backward else 1)
    yield Collective(HEAD_WEIGHT, "FSDP", "all-gather", "fsdp", layout.weight_shards, payloads)


def _after(caller: str, step: LossStep, layout: Layout) -> Iterator[Collective]:
    """Reduce the gradients of a head's operands."""
    if not step.has_backward:
        return
    n, _, d, b = _local(step, layout)
    kind = "all-reduce"
    if step.hidden_grad == "partial":
        caller, kind = "trainer", "reduce-scatter"
    yield Collective(HIDDEN_GRADIENT, caller, kind, "tp", layout.tp, (n * d * b,))
    shards, shard = layout.weight_shards, _weight_shard(step, layout)
    padded_bytes = (shards * shard * FP32_BYTES,)
    yield Collective(HEAD_GRADIENT, "FSDP", "reduce-scatter", "fsdp", shards, padded_bytes)
    caller, size = ("FSDP", shard * FP32_BYTES) if shards > 1 else ("DDP", shard * b)
    yield Collective(HEAD_GRADIENT, caller, "all-reduce", "dp", layout.replicas, (size,))


def _operands(step: LossStep, layout: Layout) -> Iterator[Buffer]:
    """Operands of a head, and copies for the reductions of their gradients."""
    n, v, d, b = _local(step, layout)
    shards, shard = layout.weight_shards, _weight_shard(step, layout) * FP32_BYTES
    yield Buffer("hidden states", n * d * b)
    if shards > 1:
        yield Buffer("weight, its shard in fp32", shard)
        yield Buffer("weight, gathered", v * d * b, (LOOP, RETURNED, HIDDEN))
    else:
        yield Buffer("weight", v * d * b)
    if step.has_backward and layout.tp > 1:
        yield Buffer("hidden gradient, for its reduction", n * d * b, (HIDDEN,))
    if step.has_backward and shards > 1:
        yield Buffer("weight gradient, for its reduction", shards * shard, (WEIGHT,))
        yield Buffer("weight gradient, its shard in fp32", shard, (WEIGHT,))


def _lossfuse_buffers(step: LossStep, layout: Layout, rows: int) -> Iterator[Buffer]:
    """Buffers of our loss with ``rows`` of a chunk."""
    n, v, d, b = _local(step, layout)
    if step.d is None:
        yield Buffer("logits", n * v * b)
        yield Buffer("gradient of the logits", n * v * b * step.has_backward)
        return
    dtype = DTYPES[step.dtype]
    logits_dtype = step.options.dtype("logits_dtype", dtype)
    acc = step.options.dtype("acc_dtype", dtype).itemsize
    plan = _chunk_plan(step, layout)
    sums = plan.sum_dtype.itemsize
    held = min(plan.grad_rows, n) if plan.grad_rows > plan.rows else 0
    accumulates = step.has_backward or (step.mode == "forward" and step.reduction != "none")
    copied = (held or rows) * d * b if acc > b or not accumulates else 0
    yield Buffer("chunk of logits", rows * padded(v) * logits_dtype.itemsize, (LOOP,))
    yield Buffer("gradients of logits, held", held * padded(v) * b, (LOOP,))
    yield Buffer("chunk of hidden states", copied, (LOOP,))
    for name, elements, size in (("hidden", n * d, acc), ("weight", v * d, sums)):
        # the accumulator is the gradient if their dtypes are the same
        when = ALWAYS if size == b else (LOOP, RETURNED)
        yield Buffer(
            f"{name} gradient, its {8 * size}-bit sum", elements * size * accumulates, when
        )
        if size > b and step.has_backward:
            yield Buffer(f"{name} gradient", elements * b, (RETURNED, HIDDEN, WEIGHT))


def _returned_gradients(step: LossStep, layout: Layout) -> Iterator[Buffer]:
    """Gradients in the dtype of the operands; that of all logits until both products are done."""
    if step.has_backward:
        n, v, d, b = _local(step, layout)
        later = (RETURNED, HIDDEN, WEIGHT)
        yield Buffer("gradient of the logits", n * v * b, (RETURNED,))
        yield Buffer("hidden gradient", n * d * b, later)
        yield Buffer("weight gradient", v * d * b, later)
