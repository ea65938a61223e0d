"""No kernel reads or writes a byte that is no element of what it was given, whatever its rows look
like and whatever its targets are."""

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
# the ends of a row, ids beside it, of 32 bits and of 64, the ignored one
TARGETS = [-1, "V", -100, 2**63 - 1, -5, 0, 2**31, -(2**63), "V+5", 7]
EVERYTHING = {"label_smoothing": 0.1, "softcap": 9.0, "logit_scale": 0.7, "lse_square_scale": 1e-2}
ALL = Wants(entropy=True, argmax=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a short row has several, and a ragged one."""
    blocks = launch.LaunchConfig(BLOCK, 1)
    for module in (softmax_rows, soft_target_rows, label_rows, log_softmax_rows):
        monkeypatch.setattr(module, "row_blocks", lambda v: blocks)
    if not GPU:
        monkeypatch.setattr(linear_rows, "TILE", linear_rows.TileConfig(16, BLOCK, 16, 2, 1, 1))
        monkeypatch.setattr(linear_rows, "MERGE_ROWS", 4)
        monkeypatch.setattr(linear_rows, "MERGE_TILES", 2)
    fused_rows._plans.clear()
    yield
    fused_rows._plans.clear()


@pytest.fixture
def force(monkeypatch):
    """Make the launcher of the one pass take a way: "whole", "sweeps", or the width of a slice."""

    def force(way):
        def plan(family, v, itemsize, *, wide, most_lead, shaping):
            if way == "sweeps" or (way != "whole" and (most_lead is None or v < 32 // itemsize)):
                return launch.SWEEPS
            if way == "whole":
                return launch.FusedPlan("whole", max(BLOCK, 1 << (v - 1).bit_length()), 1)
            return launch.FusedPlan("split", way, 1, -(-(v + most_lead) // way))

        monkeypatch.setattr(fused_rows, "fused_plan", plan)
        fused_rows._plans.clear()

    return force


class Inputs:
    """Of a case: everything a kernel may be given, by way of ``memory``; rows have the layout, what
    lies side by side starts anywhere."""

    def __init__(self, memory, v, dtype=torch.float32, *, lead=0, gap=0, n=10):
        self.memory, self.n, self.v, self.dtype = memory, n, v, dtype
        self.layout, self.lead = {"lead": lead, "gap": gap}, lead
        g = torch.Generator().manual_seed(v)
        self.logits = self.rows(torch.randn(n, v, generator=g) * 3)
        ids = [{"V": v, "V+5": v + 5, -1: v - 1, 7: min(7, v - 1)}.get(y, y) for y in TARGETS[:n]]
        self.ids = self.flat(torch.tensor(ids))
        self.probabilities = self.rows(probabilities(n, v).detach())
        self.weight = self.flat(class_weight(v))
        self.dloss = self.flat(torch.linspace(-1.0, 2.0, n))
        self.numbers = [self.flat(torch.linspace(-1.0 - i, 2.0, n)) for i in range(3)]

    def rows(self, t):
        return self.memory.place(t.to(self.dtype).to(DEVICE), **self.layout)

    def flat(self, t):
        return self.memory.place(t.to(DEVICE), lead=self.lead)

    def positive(self):
        return torch.rand(self.n, self.v, generator=torch.Generator().manual_seed(1)) + 0.5

    def room(self):
        """Rows for a gradient."""
        return self.rows(torch.zeros(self.n, self.v))


def statistics(b, case, target, spec, weight=None):
    """Loss, statistics, and their gradients, apart and in place."""
    up = Upstream(case.dloss, *case.numbers)
    made = b.row_stats(case.logits, target, weight, spec, ALL, None, None, None)
    room, dtarget = case.room(), case.room() if target.is_floating_point() else None
    b.row_grads(case.logits, target, weight, made.kept, up, spec, room, dtarget)
    loss = b.row_loss(case.logits, target, weight, spec)[0]
    b.row_grads(case.logits, target, weight, made.kept, up, spec, case.logits, None)
    return [*made[:5], loss, room, dtarget, case.logits]


def one_pass(b, case, options):
    """Loss and gradient at once, apart and in place."""
    room, spec, weight = case.room(), LossSpec(**options), case.weight if options else None
    loss = b.row_loss_and_grads(case.logits, case.ids, weight, case.dloss, spec, room, None)
    again = b.row_loss_and_grads(case.logits, case.ids, weight, case.dloss, spec, case.logits, None)
    return [loss, again, room, case.logits]


def shards(b, case, target, spec, weight=None):
    """What a shard says of its rows, and its gradient; the classes at hand are some in the
    middle."""
    cut = LossSpec(
        **{**spec.__dict__, "first_class": 3, "num_classes": case.v + 9, "group": "none"}
    )
    made = b.shard_rows(case.logits, target, weight, cut, ALL, target.is_floating_point())
    kept = case.memory.place(torch.linspace(0.5, 1.5, 5 * case.n, device=DEVICE).view(5, case.n))
    room, dtarget = case.room(), case.room() if target.is_floating_point() else None
    b.shard_grads(
        case.logits, target, weight, kept, Upstream(case.dloss, *case.numbers), cut, room, dtarget
    )
    bad = (
        (target < 0) | (target >= case.v)
        if not target.is_floating_point()
        else torch.zeros(case.n, dtype=torch.bool, device=DEVICE)
    )
    # of rows that are not read a shard may say anything
    return [room, dtarget, *(None if t is None else t.masked_fill(bad, 0) for t in made)]


def multiplied(b, case):
    flat = case.flat(torch.linspace(-3.0, 3.0, 2 * case.v + 1).to(case.dtype))
    b.multiply_in_place(flat, case.flat(torch.tensor([0.375])).squeeze())
    return [flat]


def labels(b, case, ids, **more):
    """Binary cross entropy: sums of rows, each label's loss, gradients, apart and in place."""
    target = case.memory.place(listed(case), lead=case.lead) if ids else case.probabilities
    weight, pos_weight, dloss = (
        case.rows(case.positive()),
        case.rows(case.positive()),
        case.positive().to(DEVICE),
    )
    dense = case.memory.place(torch.zeros(case.n, case.v, device=DEVICE), lead=case.lead)
    sums = case.memory.place(torch.zeros(case.n, 1, device=DEVICE), lead=case.lead)
    room, dtarget = (
        case.room(),
        None
        if ids
        else case.memory.place(torch.zeros(case.n, case.v, dtype=case.dtype, device=DEVICE)),
    )
    dloss = case.memory.place(dloss, **case.layout)

    def call(**out):
        given = {"loss": None, "dloss": None, "dlogits": None, "dtarget": None} | out
        b.label_loss_and_grads(case.logits, target, weight, pos_weight, -100, **given)

    call(loss=sums)
    call(loss=dense, dloss=dloss, dlogits=room, dtarget=dtarget)
    # one number for all of a row
    call(dloss=case.dloss[:, None], dlogits=case.logits)
    return [dense, sums, room, dtarget, case.logits]


def listed(case):
    """Ids of labels, some rows with a bad one."""
    made = torch.randint(0, case.v, (10, 5), generator=torch.Generator().manual_seed(0))
    made[1], made[2, 3], made[3, 0], made[4, 4], made[:, 1] = (
        -100,
        case.v,
        -5,
        2**63 - 1,
        case.v - 1,
    )
    return made[: case.n].to(DEVICE)


def log_softmax(b, case):
    logp, dlogits = case.room(), case.room()
    stats = case.memory.place(torch.zeros(2, case.n, device=DEVICE), lead=case.lead)
    b.log_softmax(case.logits, logp, stats)
    b.log_softmax_grad(case.logits, stats, case.probabilities, dlogits)
    return [logp, stats, dlogits]


def head(b, case, d=21, **options):
    """Losses and statistics of rows from hidden states, whose rows start on 16 bytes and end
    anywhere."""
    dtype = torch.float16 if GPU else case.dtype
    g = torch.Generator().manual_seed(0)
    per_16_bytes = 16 // dtype.itemsize
    hidden, weight = (
        torch.randn(rows, d, generator=g).to(dtype).to(DEVICE) for rows in (case.n, case.v)
    )
    hidden, weight = (
        case.memory.place(t, gap=-d % per_16_bytes + per_16_bytes) for t in (hidden, weight)
    )
    bias = case.flat(torch.linspace(-1.0, 1.0, case.v))
    spec = LossSpec(**options)
    loss = b.head_row_loss(hidden, weight, bias, case.ids, case.weight, spec)
    assert loss is not None
    return [loss, *b.head_row_stats(hidden, weight, None, case.ids, None, spec, ALL)[:5]]


CASES = {
    "statistics": lambda b, c: statistics(b, c, c.ids, LossSpec()),
    "statistics, every option": lambda b, c: statistics(
        b, c, c.ids, LossSpec(**EVERYTHING), c.weight
    ),
    "statistics of probabilities": lambda b, c: statistics(
        b, c, c.probabilities, LossSpec(), c.weight
    ),
    "statistics of probabilities, every option": lambda b, c: statistics(
        b, c, c.probabilities, LossSpec(**EVERYTHING), c.weight
    ),
    "shard": lambda b, c: shards(b, c, c.ids, LossSpec()),
    "shard, every option": lambda b, c: shards(
        b, c, c.ids, LossSpec(**(EVERYTHING | {"lse_square_scale": 0.0})), c.weight
    ),
    "shard of probabilities": lambda b, c: shards(
        b, c, c.probabilities, LossSpec(label_smoothing=0.1), c.weight
    ),
    "labels": lambda b, c: labels(b, c, False),
    "ids of labels": lambda b, c: labels(b, c, True),
}
ONLY_TRITON = {
    "log-softmax": log_softmax,
    "head": head,
    "head, every option": lambda b, c: head(
        b, c, softcap=9.0, logit_scale=0.7, lse_square_scale=1e-2
    ),
    "multiplied": multiplied,
}
# logits and gradient in one pass, by every way there is
WAYS = ("whole", BLOCK, 4 * BLOCK, "sweeps")
ONE_PASS = {
    f"{way}{', every option' * (len(options) > 0)}": (way, options)
    for way in WAYS
    for options in ({}, EVERYTHING)
}
WIDTHS = [BLOCK + 1, 1, BLOCK - 1, BLOCK, 3 * BLOCK - 1, 2 * BLOCK + 1]
GAPS = (1, 0, 8)
# each width at another alignment; where that decides which elements are read together, a width at
# each
EVERY = [(v, (3 * i + 5) % 8, GAPS[i % 3]) for i, v in enumerate(WIDTHS)]
# what is launched in no other test of these
ONCE = ("whole, every option", f"{BLOCK}, every option")
ALIGNED = [
    (v, (lead + 3) % 8, GAPS[(lead + i) % 3])
    for i, v in enumerate((2 * BLOCK + 1, BLOCK - 1))
    for lead in range(8)
]


def layouts(every, few):
    return [
        pytest.param(*layout, marks=() if i < few else pytest.mark.slow)
        for i, layout in enumerate(every)
    ]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            nan = (
                a.isnan() & b.isnan()
                if a.is_floating_point()
                else torch.zeros_like(a, dtype=torch.bool)
            )
            assert torch.equal(
                a.contiguous().view(bits).masked_fill(nan, 0),
                b.contiguous().view(bits).masked_fill(nan, 0),
            )


def check(run, b, v, lead, gap, dtype, *, thorough=True, exact=True):
    """Nothing beside a tensor is read or written; thoroughly, results are those of rows side by
    side in other memory, bit for bit."""
    n = 10 if thorough else 4
    guards = Guards()
    watch = Interpreter() if b is backend and not GPU else None
    case = Inputs(guards, v, dtype, lead=lead, gap=gap, n=n)
    with guards.allocations(), watch or contextlib.nullcontext():
        got = run(b, case)
    guards.check()
    assert watch is None or watch.launches
    if thorough or watch is None:
        # slices begin at boundaries of memory, as do vectors of torch's sums on a GPU: another
        # alignment adds up in another order
        layout = {} if exact and not GPU else {"lead": lead, "gap": gap}
        same(got, run(b, Inputs(Guards(poison=False), v, dtype, n=n, **layout)))


@pytest.fixture
def thorough(request):
    """Whether this is a slow test; every address is looked at anyway."""
    return request.node.get_closest_marker("slow") is not None


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("v", "lead", "gap"), layouts(EVERY, 1))
@pytest.mark.parametrize("name", CASES | ONLY_TRITON)
def test_kernels_keep_to_their_tensors(name, v, lead, gap, dtype, thorough):
    if name.startswith("head") and dtype == torch.bfloat16 and not GPU:
        pytest.skip("tl.dot of bf16 is wrong in the interpreter")
    obstacle = (
        linear_rows._device_obstacle(torch.device("cuda"))
        if name.startswith("head") and GPU
        else None
    )
    if obstacle:
        pytest.skip(obstacle)
    check((CASES | ONLY_TRITON)[name], backend, v, lead, gap, dtype, thorough=thorough)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("v", "lead", "gap"), layouts(ALIGNED, 1) + layouts(EVERY, 0))
@pytest.mark.parametrize(
    "name",
    [name if name in ONCE else pytest.param(name, marks=pytest.mark.slow) for name in ONE_PASS],
)
def test_one_pass_keeps_to_its_rows(force, name, v, lead, gap, dtype, thorough):
    way, options = ONE_PASS[name]
    force(way)
    check(
        lambda b, c: one_pass(b, c, options),
        backend,
        v,
        lead,
        gap,
        dtype,
        thorough=thorough,
        exact=not isinstance(way, int),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    # probabilities go one way
    ("v", "way", "soft"),
    [
        (33, "whole", True),
        (33, "whole", False),
        (65, 16, False),
        (64, 64, False),
        (71, "sweeps", False),
    ],
)
def test_a_narrower_gradient_keeps_to_the_first_bytes_of_its_rows(force, v, way, soft):
    """Over logits that programs of the row read before one of them writes: they have met in
    between."""
    force(way)
    guards = Guards()
    case = Inputs(guards, v, n=8, gap=-v % 4 + 4)
    rest = case.logits.clone()
    dlogits = (
        case.logits.view(torch.int32)
        .as_strided((8, case.logits.stride(0)), (case.logits.stride(0), 1))
        .view(torch.float16)[:, :v]
    )
    target = case.probabilities if soft else case.ids
    with (
        guards.allocations(),
        contextlib.nullcontext() if GPU else Interpreter(("split_row_kernel",)),
    ):
        loss = backend.row_loss_and_grads(
            case.logits, target, None, case.dloss, LossSpec(), dlogits, None
        )
    guards.check()
    want = torch.empty_like(rest)
    want_loss = backend.row_loss_and_grads(rest, target, None, case.dloss, LossSpec(), want, None)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        dlogits, want.to(torch.float16), rtol=2e-3, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("v", "lead", "gap"), [(33, 5, 1), (95, 3, 8)])
@pytest.mark.parametrize("name", [*CASES, "one pass", "one pass, every option"])
def test_blocks_of_torch_code_keep_to_their_tensors(name, v, lead, gap, dtype, monkeypatch):
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 1 << 9)
    monkeypatch.setattr(torch_labels, "CPU_BLOCK_BYTES", 1 << 9)
    b = (
        torch_shards
        if name.startswith("shard")
        else torch_labels
        if "labels" in name
        else torch_rows
    )
    options = EVERYTHING if name.endswith("every option") else {}
    run = CASES.get(name, lambda b, c: one_pass(b, c, options))
    check(run, b, v, lead, gap, dtype)


if not GPU:
    import triton
    import triton.language as tl

    @triton.jit
    def careless_kernel(x_ptr, out_ptr, V, stride, MISTAKE: tl.constexpr):
        row = tl.program_id(0)
        offs = tl.arange(0, 8)
        mask = offs < (V + 1 if MISTAKE == "reads past its row" else V)
        x = tl.load(x_ptr + row * stride + offs, mask=mask, other=0.0)
        if MISTAKE == "reads what nobody has written":
            x += tl.load(out_ptr + row * stride + offs, mask=mask, other=0.0)
        if MISTAKE == "writes past its row":
            mask = offs < V + 1
        if MISTAKE == "reads what another program writes":
            x += tl.load(out_ptr + (1 - row) * stride, mask=row == 1, other=0.0)
        at = 0 if MISTAKE == "writes what another program writes" else row * stride
        tl.store(out_ptr + at + offs, x, mask=mask)

    @pytest.mark.parametrize(
        ("mistake", "told"),
        [
            ("none", None),
            ("reads past its row", "4 bytes read that are no element"),
            ("writes past its row", "4 bytes written that are no element"),
            ("reads what nobody has written", "elements are read that nobody has written"),
            ("writes what another program writes", "20 bytes written by several programs"),
            (
                "reads what another program writes",
                "4 bytes written by one program of careless_kernel and read by another",
            ),
        ],
    )
    def test_a_careless_kernel_is_caught(mistake, told):
        guards = Guards()
        x = guards.place(torch.rand(2, 5), lead=1, gap=2)

        def run():
            out = torch.empty(2, 7)[:, :5]
            with Interpreter():
                careless_kernel[(2,)](x, out, 5, 7, MISTAKE=mistake)
            return out

        with guards.allocations():
            if told is None:
                assert torch.equal(run(), x)
            else:
                with pytest.raises(
                    (AssertionError, triton.runtime.errors.InterpreterError), match=told
                ):
                    run()


def test_a_changed_band_is_told():
    for lead, gap, at in ((0, 1, 5), (3, 0, -1), (3, 0, 10)):
        guards = Guards()
        t = guards.place(torch.rand(2, 5), lead=lead, gap=gap)
        guards.check()
        t.as_strided((1,), (1,), t.storage_offset() + at).fill_(1.0)
        with pytest.raises(AssertionError, match=f"the first at {at} from"):
            guards.check()
