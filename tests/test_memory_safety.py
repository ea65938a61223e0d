"""No kernel and no block of torch code reads or writes a byte outside its tensors, for rows of any
layout and targets of any value."""

import contextlib

import pytest
import torch

from conftest import GPU
from guarded import Guards, Interpreter
from lossfuse.backends import torch_labels, torch_rows, torch_shards
from lossfuse.row_types import Upstream, Wants
from lossfuse.spec import LossSpec
from rows import class_weight, probabilities

pytest.importorskip("triton")
import triton
import triton.language as tl

from lossfuse.backends import triton as backend
from lossfuse.kernels import (
    fused_rows,
    label_rows,
    launch,
    linear_rows,
    log_softmax_rows,
    soft_target_rows,
    softmax_rows,
)

pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU else "cpu"
BLOCK = 32
# the first and last class, ids outside the classes in 32 and 64 bits, the ignored id
TARGETS = [-1, "V", -100, 2**63 - 1, -5, 0, 2**31, -(2**63), "V+5", 7]
OPTIONS = {"label_smoothing": 0.1, "softcap": 9.0, "logit_scale": 0.7, "lse_square_scale": 1e-2}
ALL, PLAIN = Wants(entropy=True, argmax=True), LossSpec()
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A short row has several blocks, the last one ragged."""
    small = launch.LaunchConfig(BLOCK, 1)
    for module in (soft_target_rows, label_rows, log_softmax_rows):
        monkeypatch.setattr(module, "row_blocks", lambda v: small)
    for table in ("stats_blocks", "grad_blocks"):
        monkeypatch.setattr(softmax_rows, table, lambda v, *, shaping: small)
    if not GPU:
        monkeypatch.setattr(linear_rows, "TILE", linear_rows.TileConfig(16, BLOCK, 16, 2, 1, 1))
        monkeypatch.setattr(linear_rows, "MERGE_ROWS", 4)
        monkeypatch.setattr(linear_rows, "MERGE_TILES", 2)
    monkeypatch.setattr(fused_rows, "_plans", {})


@pytest.fixture
def take_plan(monkeypatch):
    """Make the fused launcher take "whole" rows, "sweeps", or slices of a width."""

    def take(kind):
        def plan(device, v, itemsize, *, wide, most_lead, shaping):
            if kind == "whole":
                return launch.FusedPlan("whole", max(BLOCK, 1 << (v - 1).bit_length()), 1)
            if kind == "sweeps" or most_lead is None or v < 32 // itemsize:
                return launch.SWEEPS
            return launch.FusedPlan("split", kind, 1, -(-(v + most_lead) // kind))

        monkeypatch.setattr(fused_rows, "fused_plan", plan)

    return take


class Inputs:
    """Guarded arguments of a launch. Rows have a layout; one-dimensional tensors have its lead."""

    def __init__(self, guards, v, dtype=torch.float32, *, lead=0, gap=0, n=10):
        self.n, self.v, self.dtype = n, v, dtype
        self.flat = lambda t: guards.place(t.to(DEVICE), lead=lead)
        self.rows = lambda t: guards.place(t.to(DEVICE).to(dtype), lead=lead, gap=gap)
        self.fp32_rows = lambda t: guards.place(t.to(DEVICE), lead=lead, gap=gap)
        self.head_rows = lambda t: guards.place(t.to(DEVICE), gap=-t.shape[1] % 8 + 8)
        g = torch.Generator().manual_seed(v)
        self.logits = self.rows(torch.randn(n, v, generator=g) * 3)
        ids = [{"V": v, "V+5": v + 5, -1: v - 1, 7: min(7, v - 1)}.get(y, y) for y in TARGETS[:n]]
        self.ids, self.soft = self.flat(torch.tensor(ids)), self.rows(probabilities(n, v).detach())
        self.weight = self.flat(class_weight(v))
        self.upstream = Upstream(*(self.flat(torch.linspace(-1.0 - i, 2.0, n)) for i in range(4)))

    def empty_rows(self):
        return self.rows(torch.zeros(self.n, self.v))


def statistics(b, c, soft=False, spec=PLAIN, weight=False):
    """Loss, statistics and their gradients, in memory of their own and in place."""
    target, weight = c.soft if soft else c.ids, c.weight if weight else None
    stats = b.row_stats(c.logits, target, weight, spec, ALL, None, None, None)
    dlogits, dtarget = c.empty_rows(), c.empty_rows() if soft else None
    b.row_grads(c.logits, target, weight, stats.saved, c.upstream, spec, dlogits, dtarget)
    loss = b.row_loss(c.logits, target, weight, spec)[0]
    b.row_grads(c.logits, target, weight, stats.saved, c.upstream, spec, c.logits, None)
    return [*stats[:5], loss, dlogits, dtarget, c.logits]


def one_pass(b, c, options):
    """Loss and gradient at once, in memory of its own and in place."""
    dlogits, weight = c.empty_rows(), c.weight if options else None
    args = c.logits, c.ids, weight, c.upstream.loss, LossSpec(**options)
    losses = [b.row_loss_and_grads(*args, out, None) for out in (dlogits, c.logits)]
    return [*losses, dlogits, c.logits]


def shards(b, c, soft=False, spec=PLAIN, weight=False):
    """Statistics of a shard of the classes from 3 on, and its gradient."""
    target, weight = c.soft if soft else c.ids, c.weight if weight else None
    shard = {"first_class": 3, "num_classes": c.v + 9, "group": "none"}
    spec = LossSpec(**{**spec.__dict__, **shard})
    rows = b.shard_rows(c.logits, target, weight, spec, ALL, soft)
    merged = c.flat(torch.linspace(0.5, 1.5, 5 * c.n)).view(5, c.n)
    dlogits, dtarget = c.empty_rows(), c.empty_rows() if soft else None
    b.shard_grads(c.logits, target, weight, merged, c.upstream, spec, dlogits, dtarget)
    # rows that are not read have unspecified statistics
    unread = (target < 0) | (target >= c.v) if not soft else torch.zeros_like(c.ids).bool()
    return [dlogits, dtarget, *(None if t is None else t.masked_fill(unread, 0) for t in rows)]


def labels(b, c, ids=False):
    """Sums of rows, losses, gradients in memory of their own, and a gradient in place."""
    listed = torch.randint(0, c.v, (10, 5), generator=torch.Generator().manual_seed(0))
    listed[1], listed[2, 3], listed[3, 0], listed[4, 4] = -100, c.v, -5, 2**63 - 1
    listed[:, 1] = c.v - 1
    target = c.flat(listed[: c.n]) if ids else c.soft
    positive = torch.rand(c.n, c.v, generator=torch.Generator().manual_seed(1)) + 0.5
    args = c.logits, target, c.rows(positive), c.rows(positive), -100
    loss, sums = c.flat(torch.zeros(c.n, c.v)), c.flat(torch.zeros(c.n, 1))
    dlogits, dtarget = c.empty_rows(), c.flat(torch.zeros(c.n, c.v).to(c.dtype))
    b.label_loss_and_grads(*args, loss=sums)
    grads = {"dlogits": dlogits, "dtarget": None if ids else dtarget}
    b.label_loss_and_grads(*args, loss=loss, dloss=c.fp32_rows(positive), **grads)
    b.label_loss_and_grads(*args, dloss=c.upstream.loss[:, None], dlogits=c.logits)
    return [loss, sums, dlogits, dtarget, c.logits]


def log_softmax(b, c):
    logp, dlogits, stats = c.empty_rows(), c.empty_rows(), c.flat(torch.zeros(2, c.n))
    b.log_softmax(c.logits, logp, stats)
    b.log_softmax_grad(c.logits, stats, c.soft, dlogits)
    return [logp, stats, dlogits]


def head(b, c, **options):
    """Losses and statistics of hidden states of width 21, whose rows start on 16 bytes."""
    dtype, g = torch.float16 if GPU else c.dtype, torch.Generator().manual_seed(0)
    hidden, weight = (c.head_rows(torch.randn(k, 21, generator=g).to(dtype)) for k in (c.n, c.v))
    bias, spec = c.flat(torch.linspace(-1.0, 1.0, c.v)), LossSpec(**options)
    loss = b.head_row_loss(hidden, weight, bias, c.ids, c.weight, spec)
    return [loss, *b.head_row_stats(hidden, weight, None, c.ids, None, spec, ALL)[:5]]


def multiply(b, c):
    t = c.flat(torch.linspace(-3.0, 3.0, 2 * c.v + 1).to(c.dtype))
    b.multiply_in_place(t, c.flat(torch.tensor([0.375])).squeeze())
    return [t]


ALL_OPTIONS = {"spec": LossSpec(**OPTIONS), "weight": True}
SHARD_OPTIONS = {"spec": LossSpec(**OPTIONS | {"lse_square_scale": 0.0}), "weight": True}
CASES = {
    "statistics": (statistics, {}),
    "statistics, every option": (statistics, ALL_OPTIONS),
    "statistics of probabilities": (statistics, {"soft": True, "weight": True}),
    "statistics of probabilities, every option": (statistics, {"soft": True, **ALL_OPTIONS}),
    "shard": (shards, {}),
    "shard, every option": (shards, SHARD_OPTIONS),
    "shard of probabilities, every option": (shards, {"soft": True, **SHARD_OPTIONS}),
    "labels": (labels, {}),
    "ids of labels": (labels, {"ids": True}),
}
KERNELS = CASES | {
    "log_softmax": (log_softmax, {}),
    "head": (head, {}),
    "head, every option": (head, {k: v for k, v in OPTIONS.items() if k != "label_smoothing"}),
    "multiply": (multiply, {}),
}
ONE_PASS = {"one pass": (one_pass, {"options": {}})}
ONE_PASS |= {"one pass, every option": (one_pass, {"options": OPTIONS})}
# (V, lead, gap): each width with another alignment, then two widths with each alignment
WIDTHS = (BLOCK + 1, 1, BLOCK - 1, BLOCK, 3 * BLOCK - 1, 2 * BLOCK + 1)
EVERY = [(v, (3 * i + 5) % 8, (1, 0, 8)[i % 3]) for i, v in enumerate(WIDTHS)]
ALIGNED = [(v, lead, (1, 0, 8)[lead % 3]) for v in (BLOCK - 1, 2 * BLOCK + 1) for lead in range(8)]


def first_fast(layouts):
    return [pytest.param(*t, marks=SLOW if i else ()) for i, t in enumerate(layouts)]


def bits(t):
    """The bits of numbers that are not NaN, and where they are NaN."""
    if t is None or not t.is_floating_point():
        return torch.empty(0) if t is None else t
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(kind).masked_fill(t.isnan(), 0), t.isnan()


def check(case, b, v, lead, gap, dtype, *, thorough=True, exact=True):
    """Run a case among guards. If ``thorough``, its results are those of contiguous tensors without
    guards, bit for bit."""
    (run, options), n, guards = case, 10 if thorough else 4, Guards()
    watch = Interpreter() if b is backend and not GPU else None
    inputs = Inputs(guards, v, dtype, lead=lead, gap=gap, n=n)
    with guards.allocations(), watch or contextlib.nullcontext():
        got = run(b, inputs, **options)
    guards.check()
    assert watch is None or watch.launches
    if thorough or watch is None:
        # split rows, and torch's sums on a GPU, add in an order that depends on the alignment
        layout = {} if exact and not GPU else {"lead": lead, "gap": gap}
        want = run(b, Inputs(Guards(poison=False), v, dtype, n=n, **layout), **options)
        torch.testing.assert_close([*map(bits, got)], [*map(bits, want)], rtol=0, atol=0)


@pytest.fixture
def thorough(request):
    return request.node.get_closest_marker("slow") is not None


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=SLOW)], ids=str
)
@pytest.mark.parametrize(("v", "lead", "gap"), first_fast(EVERY))
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_use_no_memory_outside_their_tensors(name, v, lead, gap, dtype, thorough):
    if name.startswith("head") and GPU and linear_rows._device_obstacle(torch.device("cuda")):
        pytest.skip("the device has no kernel of a head")
    if name.startswith("head") and dtype == torch.bfloat16 and not GPU:
        pytest.skip("tl.dot of bf16 is wrong in the interpreter")
    check(KERNELS[name], backend, v, lead, gap, dtype, thorough=thorough)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SLOW)], ids=str
)
@pytest.mark.parametrize(("v", "lead", "gap"), first_fast(ALIGNED + EVERY))
@pytest.mark.parametrize("name", [pytest.param("one pass", marks=SLOW), "one pass, every option"])
@pytest.mark.parametrize(
    "plan", ["whole", BLOCK, *(pytest.param(p, marks=SLOW) for p in (4 * BLOCK, "sweeps"))]
)
def test_one_pass_uses_no_memory_outside_its_rows(
    take_plan, plan, name, v, lead, gap, dtype, thorough
):
    take_plan(plan)
    exact = not isinstance(plan, int)
    check(ONE_PASS[name], backend, v, lead, gap, dtype, thorough=thorough, exact=exact)


NARROWER = [(33, "whole", True), (33, "whole", False), (65, 16, False), (64, 64, False)]


@SLOW
@pytest.mark.parametrize(("v", "plan", "soft"), [*NARROWER, (71, "sweeps", False)])
def test_a_narrower_gradient_uses_the_first_bytes_of_its_rows(take_plan, v, plan, soft):
    """fp16 over fp32 logits, which the programs of a row have read before one of them writes."""
    take_plan(plan)
    guards = Guards()
    c = Inputs(guards, v, n=8, gap=-v % 4 + 4)
    copy, target, stride = c.logits.clone(), c.soft if soft else c.ids, c.logits.stride(0)
    row_bytes = c.logits.view(torch.int32).as_strided((8, stride), (stride, 1))
    dlogits = row_bytes.view(torch.float16)[:, :v]
    watch = contextlib.nullcontext() if GPU else Interpreter(waiting=("split_row_kernel",))
    options = target, None, c.upstream.loss, LossSpec()
    with guards.allocations(), watch:
        loss = backend.row_loss_and_grads(c.logits, *options, dlogits, None)
    guards.check()
    want = torch.empty_like(copy)
    want_loss = backend.row_loss_and_grads(copy, *options, want, None)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(dlogits, want.half(), rtol=2e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("v", "lead", "gap"), [(33, 5, 1), (95, 3, 8)])
@pytest.mark.parametrize("name", CASES | ONE_PASS)
def test_blocks_of_torch_code_use_no_memory_outside_their_tensors(
    name, v, lead, gap, dtype, monkeypatch
):
    modules = {"shard": torch_shards, "labels": torch_labels}
    b = next((module for word, module in modules.items() if word in name), torch_rows)
    for module in (torch_rows, torch_labels):
        monkeypatch.setattr(module, "CPU_BLOCK_BYTES", 1 << 9)
    check((CASES | ONE_PASS)[name], b, v, lead, gap, dtype)


@triton.jit
def careless_kernel(x_ptr, out_ptr, V, stride, MISTAKE: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, 8)
    x = tl.load(x_ptr + row * stride + offs, mask=offs < V + (MISTAKE == "read"), other=0.0)
    if MISTAKE == "unwritten":
        x += tl.load(out_ptr + row * stride + offs, mask=offs < V, other=0.0)
    if MISTAKE == "race":
        x += tl.load(out_ptr + (1 - row) * stride, mask=row == 1, other=0.0)
    at = 0 if MISTAKE == "same row" else row * stride
    tl.store(out_ptr + at + offs, x, mask=offs < V + (MISTAKE == "write"))


@pytest.mark.skipif(GPU, reason="the interpreter checks addresses")
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("read", "4 bytes read that are not elements"),
        ("write", "4 bytes written that are not elements"),
        ("unwritten", "elements are read before a write"),
        ("same row", "20 bytes written by several programs"),
        ("race", "4 bytes written by one program of careless_kernel and read by another"),
        ("none", None),
    ],
)
def test_a_careless_kernel_is_caught(mistake, words):
    guards = Guards()
    x = guards.place(torch.rand(2, 5), lead=1, gap=2)
    errors = AssertionError, triton.runtime.errors.InterpreterError
    caught = pytest.raises(errors, match=words) if words else contextlib.nullcontext()
    with guards.allocations(), Interpreter(), caught:
        out = torch.empty(2, 7)[:, :5]
        careless_kernel[(2,)](x, out, 5, 7, MISTAKE=mistake)
    assert words or torch.equal(out, x)


@pytest.mark.parametrize(("lead", "gap", "at"), [(0, 1, 5), (3, 0, -1), (3, 0, 10)])
def test_a_write_to_a_guard_is_caught(lead, gap, at):
    guards = Guards()
    t = guards.place(torch.rand(2, 5), lead=lead, gap=gap)
    guards.check()
    t.as_strided((1,), (1,), t.storage_offset() + at).fill_(1.0)
    with pytest.raises(AssertionError, match=f"the first at {at} from"):
        guards.check()
