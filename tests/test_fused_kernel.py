"""Loss and gradient in one pass: each way of launching it by name, at sizes the interpreter can do,
and the tables that choose one."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import program
from closeness import assert_gradient_close, assert_loss_close
from lossfuse.row_types import Upstream
from lossfuse.spec import LossSpec
from rows import class_weight, logits_and_ids, probabilities

pytest.importorskip("triton")
from lossfuse.backends import triton as backend
from lossfuse.kernels import devices, fused_rows, launch, scale_rows

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "weight": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 9.0},
    "scale": {"logit_scale": -0.7},
    "z-loss": {"lse_square_scale": 1e-2},
    "other ignore_index": {"ignore_index": 2},
}
# no option, each, every pair, all
COMBINATIONS = [c for n in (0, 1, 2, len(OPTIONS)) for c in itertools.combinations(OPTIONS, n)]


@pytest.fixture(autouse=True)
def no_plans_kept():
    fused_rows._plans.clear()
    yield
    fused_rows._plans.clear()


@pytest.fixture
def force(monkeypatch):
    """Make the launcher take a way: "whole", "sweeps", or the width of a slice."""

    def force(way):
        def plan(device, v, itemsize, *, wide, most_lead, shaping):
            if way == "sweeps":
                return launch.SWEEPS
            if way == "whole":
                return launch.FusedPlan("whole", max(128, 1 << (v - 1).bit_length()), 1)
            assert most_lead is not None and v >= 2 * 16 // itemsize
            return launch.FusedPlan(
                "split", way, max(1, min(4, way // 128)), -(-(v + most_lead) // way)
            )

        monkeypatch.setattr(fused_rows, "fused_plan", plan)
        fused_rows._plans.clear()

    return force


def ours(x, target, weight=None, *, dloss=None, dlogits=None, **options):
    """(loss, gradient), in place of a copy unless there is a tensor for it."""
    dlogits = x.detach().clone() if dlogits is None else dlogits
    source = (
        dlogits
        if dlogits.shape == x.shape and torch.equal(dlogits.nan_to_num(), x.detach().nan_to_num())
        else x.detach()
    )
    dloss = torch.ones((), device=x.device).expand(len(x)) if dloss is None else dloss
    return backend.row_loss_and_grads(
        source, target, weight, dloss, LossSpec(**options), dlogits, None
    ), dlogits


def check(x, target, weight=None, *, apart=False, **options):
    """In place, and into another tensor as well if asked for."""
    n, v = x.shape
    dloss = torch.linspace(-1.0, 2.0, n, device=x.device)
    want = program.value_and_grads(x, target, weight, dloss=dloss, reduction="none", **options)
    share = options.get("label_smoothing", 0.0) / v * 2.2
    for dlogits in (torch.full_like(x, NAN, requires_grad=False), None) if apart else (None,):
        loss, grad = ours(x, target, weight, dloss=dloss, dlogits=dlogits, **options)
        assert_loss_close(loss, want[0])
        assert_gradient_close(grad, want[1], terms=share)
    return loss, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 2, 7, 128, 1001])
@pytest.mark.parametrize("way", ["whole", "sweeps"])
def test_rows_of_any_width(force, device, way, v, dtype):
    force(way)
    check(*logits_and_ids(4, v, dtype, device), apart=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("v", "width"),
    [
        (16, 16),  # two groups of bf16: the least
        (17, 16),  # one class in the next slice
        (64, 16),  # slices exactly full
        (50, 64),  # one slice
        (1001, 512),  # 7 x 11 x 13: every row at another alignment
        pytest.param(1007, 256, marks=pytest.mark.slow),
        (1013, 1024),  # one slice, or two by its alignment
        pytest.param(1024, 512, marks=pytest.mark.slow),
    ],
)
def test_rows_cut_into_slices(force, device, v, width, dtype):
    force(width)
    # more rows than run at a time, so that a program has several
    check(*logits_and_ids(3, v, dtype, device), apart=True)


@pytest.mark.parametrize(
    ("way", "given"),
    [
        # both ways compute a tile by the same helpers
        pytest.param(
            way,
            given,
            id=f"{way}-{'+'.join(given) or 'plain'}",
            marks=pytest.mark.slow if way == 64 and len(given) == 2 else (),
        )
        for way in ("whole", 64)
        for given in COMBINATIONS
    ],
)
def test_options_and_pairs(force, device, way, given):
    force(way)
    x, target = logits_and_ids(4, 83, device=device)
    options = {}
    for name in given:
        options |= OPTIONS[name]
    target = target.where(target != -100, options.get("ignore_index", -100))
    target[1], target[-1] = options.get("ignore_index", -100), 82
    check(x, target, class_weight(83, device) if "weight" in given else None, **options)


@pytest.mark.parametrize(
    "where", [slice(0, 64), slice(64, None), slice(1, None), slice(0, -1)], ids=str
)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 15.0}, {"logit_scale": -0.5}],
    ids=["plain", "softcap", "negative scale"],
)
@pytest.mark.parametrize("way", ["whole", 64])
def test_slices_without_a_finite_logit(force, device, way, options, where):
    force(way)
    x, _ = logits_and_ids(3, 150, device=device)
    x = x.detach()
    finite = torch.ones(150, dtype=torch.bool)
    finite[where] = False
    x[:, where] = INF if options.get("logit_scale", 1.0) < 0 else -INF
    at = finite.nonzero()[:, 0]
    check(x, at[torch.tensor([0, len(at) // 2, -1])].to(device), **options)


@pytest.mark.parametrize(("margin", "offset"), [(5.0, 1e4), (17.0, -(2.0**13)), (40.0, 0.0)])
@pytest.mark.parametrize("way", ["whole", 256, 1024])
def test_a_confident_target_stays_accurate_at_any_offset(force, device, way, margin, offset):
    """In fp32 max + log(sum) - x[y] is 0 from a margin of 17 on, and so is p - 1."""
    force(way)
    v = 1000
    x = torch.full((3, v), offset, device=device)
    target = torch.tensor([0, 500, v - 1], device=device)
    x[torch.arange(3), target] += margin
    loss, grad = ours(x, target)
    others = (v - 1) * math.exp(-margin)
    assert loss.tolist() == pytest.approx([math.log1p(others)] * 3, rel=1e-5)
    assert grad[torch.arange(3), target].tolist() == pytest.approx(
        [-others / (1 + others)] * 3, rel=1e-5
    )
    assert grad[0, 1].item() == pytest.approx(others / (1 + others) / (v - 1), rel=1e-5)


@pytest.mark.parametrize("top", [0.0, 30.0])
@pytest.mark.parametrize("at", [(0, 70), (0, 1), (5, 64, 128, 202), (63, 64)], ids=str)
def test_ties_of_the_maximum_in_one_and_in_several_slices(force, device, at, top):
    force(64)
    x = torch.full((2, 203), -20.0, device=device)
    x[:, list(at)] = top
    check(x, torch.tensor([at[0], 100], device=device))


@pytest.mark.parametrize("way", ["whole", 64, "sweeps"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 9.0, "logit_scale": 0.0}],
    ids=["plain", "all"],
)
def test_ignored_rows_may_hold_anything(force, device, way, poison, options):
    force(way)
    x, target = logits_and_ids(4, 120, device=device, ignored=0.0)
    x = x.detach()
    x[1], x[2, 5], target[1], target[2] = poison, poison, -100, -100
    loss, grad = ours(x, target, dloss=torch.tensor([0.5, NAN, INF, 1.0], device=device), **options)
    assert loss[1:3].tolist() == [0.0, 0.0] and torch.equal(grad[1:3].cpu(), torch.zeros(2, 120))
    assert loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("way", ["whole", 128, "sweeps"])
def test_bad_targets_are_nan_and_read_nothing(force, device, way):
    force(way)
    x, _ = logits_and_ids(6, 130, device=device)
    target = torch.tensor([0, 130, 135, -5, 2**40, 129], device=device)
    for options in ({}, {"label_smoothing": 0.1, "lse_square_scale": 0.1}):
        loss, grad = ours(x, target, class_weight(130, device), **options)
        bad = [False, True, True, True, True, False]
        assert (
            loss.isnan().tolist() == bad
            and grad.isnan().all(-1).tolist() == bad
            and grad.isnan().any(-1).tolist() == bad
        )


@pytest.mark.parametrize("way", ["whole", 64])
def test_undefined_rows_are_as_in_two_sweeps(force, device, way):
    x, target = logits_and_ids(6, 203, device=device, ignored=0.0)
    x = x.detach()
    x[0], x[1, 150], x[2, 100], x[3, 200] = -INF, INF, NAN, -INF
    target[3] = 200
    force("sweeps")
    want_loss, want_grad = ours(x, target)
    assert want_loss[:3].isnan().all() and want_grad[:3].isnan().all() and want_loss[3] == INF
    force(way)
    loss, grad = ours(x, target)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-12, equal_nan=True)


def in_frame(x, gap, lead, filler):
    """``x`` in a row of memory that holds ``filler`` around and between its rows, the first of
    which starts ``lead`` elements in."""
    n, v = x.shape
    memory = torch.full((64 + n * (v + gap) + 64,), filler, dtype=x.dtype, device=x.device)
    rows = memory.as_strided((n, v), (v + gap, 1), 32 + lead)
    rows.copy_(x)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided((n, v), (v + gap, 1), 32 + lead).fill_(False)
    return memory, rows, outside


@pytest.mark.parametrize(
    ("lead", "gap"),
    [*(pytest.param(*at, marks=pytest.mark.slow) for at in ((0, 0), (0, 1))), (1, 6), (3, 16)],
)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("way", ["whole", 64, "sweeps"])
def test_nothing_outside_the_rows_is_read_or_written(force, device, way, dtype, gap, lead):
    force(way)
    x, target = logits_and_ids(3, 101, dtype, device)
    want = program.value_and_grads(
        x, target, dloss=torch.ones(3), reduction="none", label_smoothing=0.1
    )
    dloss, spec = torch.ones(3, device=device), LossSpec(label_smoothing=0.1)
    memory, rows, outside = in_frame(x.detach(), gap, lead, NAN)
    into, drows, doutside = in_frame(torch.zeros_like(x), gap, lead, 7.0)
    # in place last: it overwrites the input
    for dlogits in (drows, rows):
        loss = backend.row_loss_and_grads(rows, target, None, dloss, spec, dlogits, None)
        assert_loss_close(loss, want[0])
        assert_gradient_close(dlogits, want[1], terms=2e-3)
    assert memory[outside].isnan().all() and into[doutside].eq(7.0).all()


@pytest.mark.parametrize(
    "case", ["logits off by one", "gradient off by one", "rows with gaps", "aligned rows with gaps"]
)
@pytest.mark.parametrize("v", [2500, 4097])
def test_where_logits_and_gradient_are_aligned_differently(device, v, case):
    """The launches that the tables choose are right."""
    x, target = logits_and_ids(3, v, torch.float32, device)
    want = program.value_and_grads(x, target, dloss=torch.ones(3), reduction="none")
    lead, gap = {
        "logits off by one": (1, 0),
        "gradient off by one": (0, 0),
        "rows with gaps": (0, 3),
    }.get(case, (0, 16))
    _, rows, _ = in_frame(x.detach(), gap, lead, NAN)
    _, dlogits, _ = in_frame(torch.zeros_like(x), 0, case == "gradient off by one", NAN)
    loss = backend.row_loss_and_grads(
        rows, target, None, torch.ones(3, device=device), LossSpec(), dlogits, None
    )
    assert_loss_close(loss, want[0])
    assert_gradient_close(dlogits, want[1])
    (plan,) = fused_rows._plans.values()
    assert plan.kind == ("split" if case == "aligned rows with gaps" else "whole")


def over(x, dtype, gap=0):
    """A copy of the logits in fp32 rows of a padded length, and a gradient over the first bytes of
    each, between guards."""
    n, v = x.shape
    length = -(-v // 16) * 16 + gap
    memory = torch.full((n, length), 7.0, device=x.device)
    logits = memory[:, :v]
    logits.copy_(x.detach())
    return logits, memory.view(dtype)[:, :v], memory


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(torch.bfloat16, {}, marks=pytest.mark.slow),
        (torch.float16, {"label_smoothing": 0.1, "lse_square_scale": 1e-2, "logit_scale": 0.7}),
    ],
    ids=["bf16", "fp16, options"],
)
@pytest.mark.parametrize("gap", [0, pytest.param(4, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    ("way", "v"),
    [
        ("whole", 203),
        (64, 203),
        (64, 256),
        *(pytest.param(*way, marks=pytest.mark.slow) for way in ((128, 1001), ("sweeps", 5000))),
    ],
)
def test_a_narrower_gradient_over_the_logits(force, device, way, v, gap, options, dtype):
    """A row of it ends where other programs' logits have been; rows that start between 16-byte
    boundaries go another way."""
    force(way if gap % 4 == 0 else "whole")
    x, target = logits_and_ids(5, v, torch.float32, device)
    logits, dlogits, memory = over(x, dtype, gap)
    weight = class_weight(v, device)
    dloss = torch.linspace(-1.0, 2.0, 5, device=device)
    want = program.value_and_grads(x, target, weight, dloss=dloss, reduction="none", **options)
    loss = backend.row_loss_and_grads(
        logits, target, weight, dloss, LossSpec(**options), dlogits, None
    )
    assert_loss_close(loss, want[0])
    assert_gradient_close(
        dlogits, want[1].to(dtype), terms=options.get("label_smoothing", 0.0) / v * 2.2
    )
    assert (memory[:, v:] == 7.0).all()


@pytest.mark.parametrize("v", [203, 40_000])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
def test_a_narrower_gradient_of_capped_logits(device, soft, v):
    """Their slope needs the logits again: as the launcher chooses, with rows that fit a program and
    rows that do not."""
    x, target = logits_and_ids(3, v, torch.float32, device)
    target = probabilities(3, v, torch.float32, device).detach() if soft else target
    logits, dlogits, _ = over(x, torch.float16)
    dloss = torch.full((3,), 100.0, device=device)
    want = program.value_and_grads(x, target, dloss=dloss, reduction="none", softcap=9.0)
    loss = backend.row_loss_and_grads(
        logits, target, None, dloss, LossSpec(softcap=9.0), dlogits, None
    )
    assert_loss_close(loss, want[0])
    assert_gradient_close(dlogits, want[1].to(torch.float16), terms=1e-3 if soft else 0.0)


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
def test_rows_that_are_columns_in_memory(device, soft):
    x, target = logits_and_ids(4, 203, device=device)
    target = probabilities(4, 203, device=device).detach() if soft else target
    x = x.detach()
    want = program.value_and_grads(x, target, dloss=torch.ones(4), reduction="none")
    columns = x.t().contiguous().t()
    dloss = torch.ones(4, device=device)
    for dlogits in (columns, columns.clone(), x.clone()):
        source = x.t().contiguous().t() if dlogits is not columns else columns
        loss = backend.row_loss_and_grads(source, target, None, dloss, LossSpec(), dlogits, None)
        assert_loss_close(loss, want[0])
        assert_gradient_close(dlogits, want[1], terms=1e-2 if soft else 0.0)
    stats = backend.row_loss(columns.copy_(x), target, None, LossSpec())[1]
    backend.row_grads(columns, target, None, stats, Upstream(dloss), LossSpec(), columns, None)
    assert_gradient_close(columns, want[1], terms=1e-2 if soft else 0.0)


@pytest.mark.parametrize("v", [203, 5000])
def test_in_place_is_the_same_from_statistics(device, v):
    """The target's logit is read before its block is overwritten, wherever it lies; of
    probabilities nothing is read twice."""
    x, target = logits_and_ids(4, v, device=device)
    target[:3] = torch.tensor([0, v // 2, v - 1])
    x = x.detach()
    dloss = torch.linspace(1.0, 2.0, 4, device=device)
    for t in (target, probabilities(4, v, device=device).detach()):
        _, stats = backend.row_loss(x, t, None, LossSpec())
        apart, place = torch.empty_like(x), x.clone()
        for source, dlogits in ((x, apart), (place, place)):
            backend.row_grads(source, t, None, stats, Upstream(dloss), LossSpec(), dlogits, None)
        assert torch.equal(apart, place)


@pytest.mark.parametrize("way", ["whole", 128])
def test_again_is_the_same_bit_for_bit(force, device, way):
    force(way)
    x, target = logits_and_ids(3, 201, torch.bfloat16, device)
    options = {"label_smoothing": 0.1, "softcap": 9.0}
    first, again = (ours(x, target, class_weight(201, device), **options) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("n", [0, 1, 9])
def test_numbers_of_rows(force, device, n):
    for way in ("whole", 32):
        force(way)
        x, target = (
            torch.randn(n, 19, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
        )
        loss, grad = ours(x, target, dlogits=torch.full_like(x, NAN))
        assert_loss_close(loss, -torch.log_softmax(x.double(), -1)[:, 0])
        assert grad.isfinite().all()


@pytest.mark.parametrize("way", ["whole", 64])
def test_rows_beyond_two_to_the_31_elements(force, device, way):
    force(way)
    # pages that are not touched cost nothing
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty(2 * 1200_000_000 + 256, dtype=torch.float16, device=device)
    rows = memory.as_strided((3, 203), (1200_000_000, 1))
    x, target = logits_and_ids(3, 203, torch.float16, device, ignored=0.0)
    rows.copy_(x.detach())
    want = program.value_and_grads(x, target, dloss=torch.ones(3), reduction="none")
    loss = backend.row_loss_and_grads(
        rows, target, None, torch.ones(3, device=device), LossSpec(), rows, None
    )
    assert_loss_close(loss, want[0])
    assert_gradient_close(rows, want[1])


@pytest.mark.parametrize("n", [0, 1, 4096, 50_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiply_in_place(device, n, dtype):
    t = torch.randn(n, device=device).to(dtype)
    for factor in (1.0, -0.375, NAN):
        for number in (
            torch.tensor(factor, device=device),
            torch.tensor(factor, dtype=dtype, device=device),
        ):
            got = t.clone()
            scale_rows.multiply_in_place(got, number)
            if factor == 1.0:
                assert torch.equal(got, t)
            else:
                # one unit in the last place: the interpreter truncates
                torch.testing.assert_close(
                    got,
                    (t.float() * factor).to(dtype),
                    rtol=torch.finfo(dtype).eps,
                    atol=1e-7,
                    equal_nan=True,
                )


@pytest.mark.parametrize("key", launch.FUSED_TABLES, ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_tables_cover_every_vocabulary(key, aligned):
    family, itemsize, shaping = key
    table, device = (
        launch.FUSED_TABLES[key],
        {"nvidia": devices.B200, "amd": devices.MI300X}[family],
    )
    lead = 0 if aligned else 16 // itemsize - 1
    real = (16384, 16385, 32000, 32768, 50257, 128256, 151936, 262144, 300_000)
    for v in itertools.chain(range(1, 3000), range(3000, 300_000, 23), real):
        plan = launch.fused_plan(
            device, v, itemsize, wide=aligned and v % 16 == 0, most_lead=lead, shaping=shaping
        )
        if plan.kind == "whole":
            assert v <= plan.block_v < max(129, 2 * v) and plan.block_v <= table.rows[-1].block_v
        elif plan.kind == "split":
            # no slice is empty, none is missing, and a row has the two groups that its edges need
            assert (
                plan.slices - 1
            ) * plan.block_v < v + lead <= plan.slices * plan.block_v and v >= 2 * 16 // itemsize
            assert (plan.block_v, plan.num_warps) in {
                (c.block_v, c.num_warps) for c in table.slices
            }
        else:
            assert v > table.rows[-1].block_v and not table.slices
        assert plan.kind == "sweeps" or (
            plan.num_warps in (1, 2, 4, 8, 16, 32)
            and plan.num_warps <= (16 if family == "amd" else 32)
        )


@pytest.mark.parametrize(
    ("v", "itemsize", "wide", "expected"),
    [
        (8192, 2, True, ("whole", 8192, 8, 0)),
        (16000, 2, True, ("whole", 16384, 16, 0)),
        (32000, 4, True, ("whole", 32768, 32, 0)),
        (128256, 2, True, ("split", 16384, 4, 8)),
        (32001, 2, False, ("split", 16384, 4, 2)),
        (50257, 2, False, ("split", 4096, 4, 13)),
        (151643, 2, False, ("split", 8192, 4, 19)),
        (128256, 4, True, ("split", 8192, 4, 16)),
    ],
)
def test_what_was_measured_to_win_is_chosen(v, itemsize, wide, expected):
    lead = 0 if wide else 16 // itemsize - 1
    plan = launch.fused_plan(devices.H100, v, itemsize, wide=wide, most_lead=lead, shaping=False)
    assert (plan.kind, plan.block_v, plan.num_warps, plan.slices) == expected


@pytest.mark.parametrize(
    ("device", "width"), [(devices.H100, 4096), (devices.H200, 8192), (devices.B200, 16384)]
)
def test_more_bandwidth_takes_more_bytes_in_flight(device, width):
    plan = launch.fused_plan(device, 50304, 2, wide=True, most_lead=0, shaping=False)
    assert plan.block_v == width


@pytest.mark.parametrize("name", [*devices.NAMED, "a GPU of next year"])
def test_a_device_is_known_by_its_name_or_by_its_multiprocessors(monkeypatch, name):
    properties = SimpleNamespace(name=f"NVIDIA {name} 80GB", multi_processor_count=100, major=11)
    module = SimpleNamespace(get_device_properties=lambda device: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for function in (devices.device_of, devices.multiprocessors):
        monkeypatch.setattr(devices, function.__name__, function.__wrapped__)
    found, known = devices.device_of(torch.device("cuda")), devices.NAMED.get(name)
    assert found == known or (known is None and found.pressure == pytest.approx(1.0))


@pytest.mark.parametrize("k", [1, 2, 8, 13, 32, 33, 128])
def test_no_two_lanes_of_a_warp_wait_for_one_word(k):
    assert fused_rows.words_block(k, 32) >= max(32, k)


def test_a_plan_is_of_what_was_compiled(monkeypatch, force):
    """Another stride is another kernel, and of another the driver may run fewer at once."""
    force(16)
    FakeDevice(monkeypatch, 30)
    x, target = torch.randn(4, 128), torch.zeros(4, dtype=torch.int64)
    for dloss in (torch.ones(4), torch.ones(()).expand(4)):
        ours(x, target, dloss=dloss)
    assert len(fused_rows._plans) == 2


def test_rows_that_32_bits_do_not_count_are_refused():
    assert launch.row_blocks(launch.MOST_CLASSES).block_v == 2048
    with pytest.raises(ValueError, match="rows have 2147483647 classes but kernels take at most"):
        launch.row_blocks(2**31 - 1)


def test_devices_without_a_table_and_gradients_at_other_alignments_sweep_twice():
    xpu, unaligned = devices.Device("xpu", 64, 1.0), {"wide": False, "most_lead": None}
    assert launch.fused_plan(xpu, 1000, 2, wide=True, most_lead=0, shaping=False) == launch.SWEEPS
    assert launch.fused_plan(devices.H100, 50257, 2, **unaligned, shaping=False) == launch.SWEEPS
    assert launch.fused_plan(devices.H100, 5000, 2, **unaligned, shaping=False).kind == "whole"


class FakeDevice:
    """Stands for a compiled kernel on a device with room for some programs; ``free`` of them at
    present."""

    def __init__(self, monkeypatch, resident, free=None):
        self.grids = []
        self.free = resident if free is None else free
        monkeypatch.setattr(fused_rows, "split_row_kernel", self)
        monkeypatch.setattr(fused_rows, "programs_run_together", lambda device: True)
        monkeypatch.setattr(fused_rows, "multiprocessors", lambda device: 10)
        monkeypatch.setattr(fused_rows, "resident_programs", lambda compiled, device: resident)

    def __getitem__(self, grid):
        def run(*args, **constants):
            assert constants["launch_cooperative_grid"] and constants["PHASE"] == 0
            if grid[0] > self.free:
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
            self.grids.append(grid[0])

        return run


@pytest.mark.parametrize(
    ("resident", "free", "grids", "kind"),
    [
        (
            35,
            None,
            [1, 32],
            "split",
        ),  # three rows of 8 and no part of a fourth: 24, but there are 4 rows to do
        (30, None, [1, 24], "split"),
        (8, None, [1, 8], "split"),
        (7, None, [1], "sweeps"),  # one program of a row would wait for ever
        (35, 16, [1, 8], "split"),  # refused with 32 and with 24, then 15 have room for one row
    ],
)
def test_no_more_programs_than_run_at_once(monkeypatch, force, device, resident, free, grids, kind):
    force(16)
    fake = FakeDevice(monkeypatch, resident, free)
    x, target = torch.randn(4, 128, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    for _ in range(2):
        loss, _ = ours(x, target)
    (plan,) = fused_rows._plans.values()
    assert plan.kind == kind
    # decided once: the second call launches at once
    assert fake.grids == [*grids, *grids[1:]]
    if kind == "sweeps":
        assert_loss_close(loss, -torch.log_softmax(x.double(), -1)[:, 0])


def test_a_launch_that_is_refused_while_others_use_the_device_is_tried_again(
    monkeypatch, force, device
):
    force(16)
    fake = FakeDevice(monkeypatch, 35, 5)
    x, target = torch.randn(4, 128, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    loss, _ = ours(x, target)
    assert_loss_close(loss, -torch.log_softmax(x.double(), -1)[:, 0])
    fake.free = 100
    ours(x, target)
    assert fake.grids == [1, 1, 32]


def test_other_errors_of_a_launch_are_not_swallowed(monkeypatch, force):
    force(16)
    device = FakeDevice(monkeypatch, 100)
    monkeypatch.setattr(
        FakeDevice,
        "__getitem__",
        lambda self, grid: (_ for _ in ()).throw(RuntimeError("illegal memory access")),
    )
    with pytest.raises(RuntimeError, match="illegal"):
        ours(torch.randn(4, 128), torch.zeros(4, dtype=torch.int64))
    assert device.grids == []


def test_residency_without_a_driver_to_ask(monkeypatch):
    class Compiled:
        n_regs = 255
        metadata = type("Metadata", (), {"num_warps": 4, "shared": 16})

    monkeypatch.setattr(launch, "_cuda_driver", lambda: None)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    assert launch.resident_programs(Compiled, torch.device("cuda:0")) == 132
    Compiled.n_regs = 64
    assert launch.resident_programs(Compiled, torch.device("cuda:0")) == 7 * 132
