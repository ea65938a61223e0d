"""Peak memory of each method beyond its inputs, by formula.

Symbols: E = N x V logits of b bytes; G = (N + V) D b, the gradients of a head; S = (N + V) D 4,
their sums in fp32; C rows of a chunk. Returned gradients count. Every seventh row is ignored, as in
the cases. Labels are lists of ids; a method with dense targets has E b more among its inputs.

On a CPU the tests compare the formulas with the allocator, and some for a GPU with an H100, both to
5 %. A star marks formulas that were read off the code and not measured. Entropies on a CPU count
for one thread; each further thread takes up to 4 MiB more."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..backends.torch_labels import DENSE_BLOCKS, LISTED_BLOCKS, block_shape
from ..backends.torch_rows import LEAST_SEGMENTS, SEGMENT, block_rows, summed_rows, threads_for
from ..ops.chunk_plan import ChunkPlan, chunk_plan, chunk_rows, padded
from ..ops.head import ROUNDED_BYTES
from ..ops.matmul import block_classes
from ..spec import LinearOptions
from . import tables
from .cases import DTYPES, IGNORED, Case, named
from .methods import KEPT, LEAN, LEANEST, OF_LABELS


@dataclass(frozen=True)
class Shape:
    """Arguments of a formula."""

    case: Case
    b: int
    mode: str
    cpu: bool
    dtype: str

    @property
    def e(self) -> int:
        return self.case.n * self.case.v

    @property
    def dhidden(self) -> int:
        return self.case.n * (self.case.d or 0) * self.b

    @property
    def dweight(self) -> int:
        return self.case.v * (self.case.d or 0) * self.b

    @property
    def g(self) -> int:
        return self.dhidden + self.dweight

    @property
    def sums(self) -> int:
        return self.g // self.b * 4

    @property
    def step(self) -> bool:
        return self.mode == "forward+backward"

    @property
    def wide(self) -> int:
        """Bytes per element of the fp32 copy that a CPU's product in bf16 makes of its result."""
        return 4 if self.cpu and self.dtype == "bf16" else 0


@dataclass(frozen=True)
class Formula:
    """A formula in words and as code; ``on_cpu`` and ``on_cuda``: compared with a measurement."""

    method: str
    op: str
    words: str
    peak: Callable[[Shape], int]
    on_cpu: bool
    on_cuda: bool
    dtypes: tuple[str, ...] = tuple(DTYPES)
    dense: bool = False  # has a dense target


def _upcast(s: Shape) -> int:
    return 4 * s.e * (3 if s.step else 1 if s.b == 4 else 2)


def _ours(s: Shape) -> int:
    if not s.cpu:
        return s.e * s.b * s.step + 24 * s.case.n
    # fp16 forms its gradient in the backward, the others in the forward
    gradient = s.step or (s.mode == "forward" and s.dtype != "fp16")
    scratch = (
        0
        if gradient and s.b == 4
        else block_rows(s.case.n, s.case.v, s.b, 4, True, 1) * s.case.v * 4
    )
    return s.e * s.b * gradient + scratch + 40 * s.case.n


def _ours_in_place(s: Shape) -> int:
    if not s.cpu:
        # plus the words with which the programs of a row synchronize
        return 24 * s.case.n + 8 * s.case.n * math.ceil(s.case.v / 4096)
    direct = s.b == 4 and s.mode != "no_grad"
    return (
        0 if direct else block_rows(s.case.n, s.case.v, s.b, 4, True, 1) * s.case.v * 4
    ) + 40 * s.case.n


def _our_stats(s: Shape) -> int:
    if not s.cpu:
        return _ours(s) + 40 * s.case.n
    # fp16 forms its gradient in a backward without statistics
    there = not (s.step and s.dtype == "fp16")
    direct = s.b == 4 and s.mode != "no_grad"
    return _ours(s) + 40 * s.case.n + _beside_a_block(s.case.n, s.case.v, s.b, direct) * there


def _beside_a_block(n: int, v: int, b: int, direct: bool) -> int:
    """Scratch of statistics on a CPU: distances from the maximum, and segments for the argmax."""
    rows = block_rows(n, v, b, 4, True, 0 if direct else 1)
    return min(rows, summed_rows(n, v, 4)) * 4 * v + rows * SEGMENT * 12 * (
        v >= LEAST_SEGMENTS * SEGMENT
    )


def _linear(s: Shape) -> int:
    logits = s.e * (s.b + s.wide)
    if not s.step:
        return max(logits, 2 * s.e * s.b)
    return max(logits, 3 * s.e * s.b, _gradients(s))


def _gradients(s: Shape) -> int:
    """Both gradients of a head while dlogits are allocated, one product after the other."""
    share = 1 + s.wide / s.b
    return s.e * s.b + int(
        max(s.dweight * share, s.dweight + s.dhidden * share, s.dhidden + s.dweight * share)
    )


def _stats_apart(s: Shape) -> int:
    return s.e * s.b * (3 if s.mode == "no_grad" else 4)


def _linear_upcast(s: Shape) -> int:
    if s.b == 4:
        return _linear(s)
    return max(_upcast(s), s.e * (s.b + s.wide), _gradients(s) if s.step else 0)


def _compiled_linear(s: Shape) -> int:
    return max(s.e * (s.b + s.wide), _gradients(s) if s.step else 0)


def _our_linear(s: Shape, options: LinearOptions, stats: bool = False) -> int:
    n, d, v, dtype = s.case.n, s.case.d or 0, s.case.v, DTYPES[s.dtype]
    # a CPU drops ignored rows before the products
    valid = n - math.ceil(n / IGNORED) if s.cpu else n
    plan = chunk_plan(valid, d, v, dtype, options, narrow_sums=not s.cpu, cpu=s.cpu)
    chunk = chunk_rows(valid, d, v, dtype, options, cpu=s.cpu)
    if not s.cpu:
        return _our_linear_on_cuda(s, options, plan, chunk, stats)
    buffer = chunk * padded(v) * options.dtype("logits_dtype", dtype).itemsize
    acc = options.dtype("acc_dtype", dtype).itemsize * s.g // s.b
    rounded = s.g if acc > s.g else 0
    x = chunk * d * 4 * (s.b < 4)
    block = block_classes(v, d, dtype, torch.float32)
    converted = block * d * 4 * (s.b < 4)
    loop = valid * d * s.b + buffer + (80 if stats else 40) * n
    beside = _beside_a_block(chunk, v, 4, s.mode != "no_grad") * stats
    if s.mode == "no_grad":
        return loop + x + converted + block_rows(chunk, v, 4, 4, True, 1) * v * 4 + beside
    dx = x * (block < v)
    left_out = (n - valid) * d * 4
    in_loop = acc - left_out + loop + x + converted + max(dx, beside)
    # zero rows of ignored targets are inserted into the hidden gradient
    after = acc + valid * d * 4 + loop + x + converted + dx
    backward = acc + rounded + min(v * d * 4, ROUNDED_BYTES) * (s.b < 4)
    return max(in_loop, after, backward * s.step)


def _our_linear_on_cuda(
    s: Shape, options: LinearOptions, plan: ChunkPlan, chunk: int, stats: bool
) -> int:
    """``chunk``: rows of a chunk where no gradient is computed."""
    n, d, v, dtype = s.case.n, s.case.d or 0, s.case.v, DTYPES[s.dtype]
    acc = options.dtype("acc_dtype", dtype).itemsize
    no_grad = s.mode == "no_grad"
    rows, grad_rows = (chunk, chunk) if no_grad else (plan.rows, plan.grad_rows)
    buffer = rows * padded(v) * options.dtype("logits_dtype", dtype).itemsize
    held = grad_rows * padded(v) * s.b * (grad_rows > rows)
    # hidden states without the NaN of ignored rows; in the memory of their gradient if both have
    # one dtype
    copy = grad_rows * d * s.b * (acc > s.b or no_grad)
    # plus the words with which the programs of a row synchronize
    loop = buffer + held + copy + (64 if stats else 24) * n + 8 * rows * math.ceil(v / 4096)
    if no_grad:
        return loop
    dhidden, dweight = s.dhidden // s.b * acc, s.dweight // s.b * plan.sum_dtype.itemsize
    # the sum of the weight's gradient is rounded in the forward, unless float32 was asked for
    rounded = dhidden + dweight + s.dweight * (plan.sum_dtype.itemsize > s.b)
    backward = rounded + s.dhidden * (acc > s.b)
    return max(dhidden + dweight + loop, backward * s.step)


def _our_linear_reference(s: Shape) -> int:
    converted = s.sums * (s.b < 4)
    if s.mode == "no_grad":
        return max(25 * s.e, 4 * s.e + converted)
    return converted + max(25 * s.e, (4 * s.e + s.sums) * s.step)


def torch_chunk_rows(n: int, d: int, v: int, halved: bool) -> int:
    """Rows of a chunk of ``F.linear_cross_entropy`` with default options (torch 2.13), and of
    Liger, which does not halve them."""
    rows = 1 << (math.ceil(n / math.ceil(v / d)) - 1).bit_length()
    return max(1, min(rows // 2 if halved else rows, n))


def _torch_chunked(s: Shape) -> int:
    n, d, v = s.case.n, s.case.d or 0, s.case.v
    gradient = s.mode != "no_grad"
    if s.cpu and s.b < 4:
        chunk = torch_chunk_rows(n, d, v, halved=False)
        acting = chunk * v * 4 + chunk * d * 4 * (2 if gradient else 1) + n * d * 4 * gradient
        # fp32: weight, accumulated gradient, the chunk's share, their product; plus the gradient
        return int(acting + v * d * 4 * (4.5 if gradient else 1))
    chunk = torch_chunk_rows(n, d, v, halved=True)
    logits = chunk * v * (4 if s.b == 4 else 6)
    return max(logits + s.g * gradient, 2 * s.g * s.step)


def _liger(s: Shape) -> int:
    n, d, v = s.case.n, s.case.d or 0, s.case.v
    return s.g + torch_chunk_rows(n, d, v, halved=False) * v * s.b


def _fla(s: Shape) -> int:
    n, d, v = s.case.n, s.case.d or 0, s.case.v
    chunk = math.ceil(n / 8)
    return s.g + 4 * v * d + chunk * (v * s.b + 4 * d)


def _labels(s: Shape) -> int:
    # on a CPU log_sigmoid saves a buffer, and half precision is upcast
    return 8 * s.e if s.cpu else 2 * s.e * s.b


def _upcast_labels(s: Shape) -> int:
    return 8 * s.e * (1 if s.b == 4 else 2)


def _our_labels(s: Shape, listed: bool, in_place: bool = False) -> int:
    n, v = s.case.n, s.case.v
    if not s.cpu:
        # plus sums of blocks
        return s.e * s.b * (s.step and not in_place) + 4 * n * math.ceil(v / 2048) + 24 * n
    blocks = LISTED_BLOCKS if listed else DENSE_BLOCKS
    count = threads_for(n * v, s.b, 4, blocks)
    rows, width = block_shape(n, v, s.b, 4, True, blocks, count, listed)
    return (
        s.e * s.b * (s.mode != "no_grad" and not in_place)
        + count * blocks * rows * width * 4
        + 40 * n
    )


def _our_labels_reference(s: Shape) -> int:
    return s.e * ((16 if s.mode == "no_grad" else 20) + (8 if s.b < 4 else 0))


def _of_labels(
    method: str, words: str, peak: Callable[[Shape], int], dense: bool = False
) -> Formula:
    return Formula(method, "labels", words, peak, True, False, OF_LABELS, dense)


_TORCHS = "F.binary_cross_entropy_with_logits"
LABELS = [
    _of_labels(_TORCHS, "2 E b; CPU: 8 E", _labels, dense=True),
    _of_labels(f"{_TORCHS}(x.float())", "8 E; half: 16 E", _upcast_labels, dense=True),
    _of_labels(f"scatter + {_TORCHS}", "3 E b; CPU: 8 E and E b", lambda s: _labels(s) + s.e * s.b),
    _of_labels(
        "torch.compile",
        "E b; no gradient: 0",
        lambda s: s.e * s.b * (s.mode != "no_grad"),
        dense=True,
    ),
    _of_labels("lossfuse", "E b; CPU: and a block", lambda s: _our_labels(s, False), dense=True),
    _of_labels(
        "lossfuse in place", "numbers per block", lambda s: _our_labels(s, False, True), dense=True
    ),
    _of_labels("lossfuse ids", "E b; CPU: and a block", lambda s: _our_labels(s, True)),
    _of_labels("lossfuse ids in place", "numbers per block", lambda s: _our_labels(s, True, True)),
    _of_labels("lossfuse reference", "20 E; half: 28 E", _our_labels_reference, dense=True),
]
FORMULAS = [
    Formula(
        "F.cross_entropy",
        "logits",
        "3 E b; no backward: E b",
        lambda s: s.e * s.b * (3 if s.step else 1),
        True,
        True,
    ),
    Formula("F.cross_entropy(x.float())", "logits", "12 E; no backward: 8 E", _upcast, True, False),
    Formula(
        "torch.compile", "logits", "E b; no backward: 0", lambda s: s.e * s.b * s.step, True, True
    ),
    Formula("lossfuse", "logits", "E b; CPU: and a block", _ours, True, False),
    Formula(
        "lossfuse in place",
        "logits",
        "numbers per row; CPU: and a block",
        _ours_in_place,
        True,
        False,
    ),
    Formula(
        "lossfuse reference",
        "logits",
        "21 E; half: 25 E",
        lambda s: s.e * (21 if s.b == 4 else 25),
        True,
        False,
    ),
    Formula("lossfuse stats", "logits", "E b; CPU: and a block and 2 %", _our_stats, True, False),
    Formula("lossfuse stats lean", "logits", "E b; CPU: and a block", _ours, True, False),
    Formula(
        "F.cross_entropy + stats", "logits", "4 E b; no gradient: 3 E b", _stats_apart, True, False
    ),
    *(
        Formula(name, "logits", "numbers per row", lambda s: 12 * s.case.n, False, True)
        for name in ("Liger", "quack", "flash-attention", "fla")
    ),
    Formula(
        "linear + F.cross_entropy",
        "head",
        "max(3 E b, E b + G); no backward: 2 E b",
        _linear,
        True,
        True,
    ),
    Formula(
        "linear + F.cross_entropy(x.float())",
        "head",
        "12 E; no backward: 8 E",
        _linear_upcast,
        True,
        True,
    ),
    Formula("torch.compile", "head", "E b + G; no backward: E b", _compiled_linear, True, True),
    Formula(
        "lossfuse linear",
        "head",
        "S + max(C V 4, half: G); bf16: 4 N D + V D b + third of E b; no gradient: C V 4",
        lambda s: _our_linear(s, LinearOptions()),
        True,
        False,
    ),
    Formula(
        "lossfuse linear kept",
        "head",
        "G + E b + C V 4",
        lambda s: _our_linear(s, KEPT),
        False,
        False,
    ),
    Formula(
        "lossfuse linear stats",
        "head",
        "as lossfuse linear; CPU: and 2 %",
        lambda s: _our_linear(s, LinearOptions(), stats=True),
        True,
        False,
    ),
    Formula(
        "lossfuse linear lean",
        "head",
        "G + C V b",
        lambda s: _our_linear(s, LEAN),
        False,
        False,
        ("bf16",),
    ),
    Formula(
        "lossfuse linear leanest",
        "head",
        "G + C V b",
        lambda s: _our_linear(s, LEANEST),
        False,
        False,
        ("bf16",),
    ),
    Formula(
        "lossfuse linear reference",
        "head",
        "max(25 E, 4 E + S); half: and S",
        _our_linear_reference,
        True,
        False,
    ),
    Formula(
        "F.linear_cross_entropy",
        "head",
        "max(C V (b or 6) + G, 2 G); CPU, half: 18 V D + C V 4",
        _torch_chunked,
        True,
        False,
    ),
    Formula("Liger", "head", "G + C V b", _liger, False, True),
    Formula(
        "CCE", "head", "G and numbers per row", lambda s: s.g * s.step + 12 * s.case.n, False, True
    ),
    Formula("fla", "head", "G + 4 V D + N / 8 (V b + 4 D)", _fla, False, True),
    *LABELS,
]


@dataclass(frozen=True)
class Need:
    """Peak bytes of a method beyond its inputs, and the formula in words."""

    method: str
    bytes: int
    words: str
    measured: bool
    inputs: int


def estimate(
    case: Case, dtype: str, mode: str = "forward+backward", device: str = "cuda"
) -> list[Need]:
    """One need per method of the case's op, the smallest first.

    ``dtype`` is fp32, bf16 or fp16, ``mode`` one of ``cases.MODES``, ``device`` cuda (any
    accelerator) or cpu. Activations, cuBLAS's workspace and other memory are not counted."""
    cpu = device == "cpu"
    shape = Shape(case, DTYPES[dtype].itemsize, mode, cpu, dtype)
    found = [f for f in FORMULAS if f.op == case.op and (f.on_cpu or not cpu) and dtype in f.dtypes]
    inputs = case.input_bytes(shape.b)
    needs = [
        Need(
            f.method,
            f.peak(shape),
            f.words,
            f.on_cpu if cpu else f.on_cuda,
            inputs + shape.e * shape.b * f.dense,
        )
        for f in found
    ]
    return sorted(needs, key=lambda need: need.bytes)


def main(
    cases: Sequence[str], dtypes: Sequence[str], mode: str, device: str, fits_gib: float | None
) -> None:
    """Print a table per case and dtype."""
    console = tables.console()
    columns = [
        tables.Column("method", right=False),
        tables.Column("beyond inputs"),
        tables.Column("in all", rank=1),
    ]
    columns += [tables.Column(f"in {fits_gib:g} GiB", right=False)] if fits_gib is not None else []
    columns.append(tables.Column("formula", rank=2, right=False))
    for case in [named(name, torch.device(device)) for name in cases]:
        for dtype in dtypes:
            inputs = gib(case.input_bytes(DTYPES[dtype].itemsize))
            title = f"{case.name}: {case.size} in {dtype}, {mode}, inputs {inputs}"
            lines = []
            for need in estimate(case, dtype, mode, device):
                total = need.inputs + need.bytes
                cells = [need.method, gib(need.bytes) + (" " if need.measured else "*"), gib(total)]
                fits = fits_gib is None or total <= fits_gib * 2**30
                cells += [] if fits_gib is None else ["fits" if fits else "no"]
                lines.append(tables.Line([*cells, need.words], style="" if fits else "red"))
            tables.show(console, columns, lines, title)
    symbols = (
        "E = N x V logits of b bytes, G = (N + V) D b the gradients of a head, S = (N + V) D 4"
    )
    note = f"{symbols}, C rows of a chunk; results included."
    console.print(note, style="dim", highlight=False)
    console.print("* by formula alone, not measured on such a device", style="dim", highlight=False)


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
