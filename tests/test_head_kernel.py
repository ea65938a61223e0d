"""The kernel that computes losses and statistics of a head without materializing logits: tiles at
sizes the interpreter can do, refused inputs, and its use by the public function."""

import math
import threading

import pytest
import torch

import lossfuse
from closeness import assert_formula_close, assert_product_close
from conftest import nothing_waits
from lossfuse import reference
from lossfuse.spec import LossSpec
from rows import class_weight

pytest.importorskip("triton")
import triton

from lossfuse.kernels import linear_rows

GPU = torch.cuda.is_available()
INF, NAN = float("inf"), float("nan")
# tl.dot of bf16 is wrong in the interpreter; on a GPU products of fp32 are not taken, which it
# would round to tf32
DTYPES = [torch.bfloat16, torch.float16] if GPU else [torch.float32, torch.float16]
TILE_V = linear_rows.TILE.block_v
# no option, each, every pair, all


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if GPU else "cpu"])
def device(request):
    if request.param == "cuda" and linear_rows._device_obstacle(torch.device("cuda")):
        pytest.skip(str(linear_rows._device_obstacle(torch.device("cuda"))))
    return request.param


def on_16_bytes(t, dtype, device):
    """The same numbers, with every row on 16 bytes and NaN between them."""
    per_16_bytes = 16 // dtype.itemsize
    n, d = t.shape
    memory = torch.full(
        (n, -(-d // per_16_bytes) * per_16_bytes + per_16_bytes), NAN, dtype=dtype, device=device
    )
    memory[:, :d] = t.to(dtype)
    return memory[:, :d]


def head(n, v, d, dtype=DTYPES[0], device="cpu", *, seed=0, ignored=0.25):
    """(hidden, weight, target): logits of spread 3, half of the targets ahead by some units."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g) * 3 / d**0.5
    target = torch.randint(0, v, (n,), generator=g)
    hidden[::2] += weight[target[::2]] * 0.5
    target[torch.rand(n, generator=g) < ignored] = -100
    # the last class lies in the ragged tile
    target[-1:] = v - 1
    return on_16_bytes(hidden, dtype, device), on_16_bytes(weight, dtype, device), target.to(device)


def keywords(spec):
    return {"ignore_index": spec.ignore_index, "scale": spec.logit_scale, "softcap": spec.softcap}


def ours(hidden, weight, target, bias=None, class_weight=None, **options):
    spec = LossSpec(**options)
    assert linear_rows.obstacle(hidden, weight) is None
    z_scale = spec.lse_square_scale or None
    return linear_rows.row_loss(
        hidden, weight, bias, target, class_weight, **keywords(spec), lse_square_scale=z_scale
    )


def our_stats(
    hidden, weight, target, bias=None, class_weight=None, *, entropy=True, argmax=True, **options
):
    spec = LossSpec(**options)
    return linear_rows.row_stats(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        entropy=entropy,
        argmax=argmax,
        **keywords(spec),
        lse_square_scale=spec.lse_square_scale or None,
    )


def logits_of(hidden, weight, bias=None):
    logits = hidden.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


def oracle(hidden, weight, target, bias=None, class_weight=None, **options):
    w = None if class_weight is None else class_weight.double()
    return reference.row_loss(logits_of(hidden, weight, bias), target, w, LossSpec(**options))


def assert_close(got, want, *, atol=5e-6):
    """By default as near as a product in fp32 is, whose terms add up to some tens."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=atol, equal_nan=True)


def oracle_stats(hidden, weight, target, bias=None, **options):
    """(lse, log-probability of the target, entropy) in float64, largest class; of rows without a
    target what ``row_stats`` says."""
    spec = LossSpec(**options)
    z = reference.transform_logits(logits_of(hidden, weight, bias), spec)
    ignored, bad = (
        target == spec.ignore_index,
        ((target < 0) | (target >= len(weight))) & (target != spec.ignore_index),
    )
    logp = torch.log_softmax(z, -1)
    entropy = -torch.where(logp == -INF, 0.0, logp.exp() * logp).sum(-1)
    of_target = logp.gather(1, torch.where(ignored | bad, 0, target)[:, None])[:, 0]
    numbers = (
        t.masked_fill(ignored, 0.0).masked_fill(bad, NAN)
        for t in (torch.logsumexp(z, -1), of_target, entropy)
    )
    return *numbers, z.argmax(-1).masked_fill(ignored | bad, -2 if spec.ignore_index == -1 else -1)


def check_stats(hidden, weight, target, bias=None, class_weight=None, **options):
    got = our_stats(hidden, weight, target, bias, class_weight, **options)
    assert_close(got[0], oracle(hidden, weight, target, bias, class_weight, **options))
    *numbers, classes = oracle_stats(hidden, weight, target, bias, **options)
    for a, b in zip(got[1:4], numbers, strict=True):
        assert_close(a, b)
    assert got[4].dtype == torch.int64 and got[4].tolist() == classes.tolist()
    return got


def check(hidden, weight, target, bias=None, class_weight=None, **options):
    got = ours(hidden, weight, target, bias, class_weight, **options)
    assert_close(got, oracle(hidden, weight, target, bias, class_weight, **options))
    return got


def test_more_rows_of_tiles_than_are_taken_at_a_time(device):
    n = linear_rows.TILE.block_n * linear_rows.TILE.group + 100
    check(*head(n, 2 * TILE_V + 3, 16, device=device))


STATISTICS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 9.0},
    "negative scale": {"logit_scale": -0.7},
    "every option": {
        "bias": True,
        "weight": True,
        "softcap": 9.0,
        "logit_scale": 0.7,
        "lse_square_scale": 1e-2,
    },
    "ignore_index of -1": {"ignore_index": -1},
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics(device, case):
    v = TILE_V + 44
    hidden, weight, target = head(9, v, 24, device=device)
    options = dict(STATISTICS[case])
    bias = torch.linspace(-2, 2, v, device=device) if options.pop("bias", False) else None
    class_weights = class_weight(v, device) if options.pop("weight", False) else None
    target = target.where(target != -100, options.get("ignore_index", -100))
    target[:4] = torch.tensor([v, -7, 2**40, options.get("ignore_index", -100)])
    check_stats(hidden, weight, target, bias, class_weights, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "v", "d"),
    [
        (1, 1, 1),
        (1, 7, 8),
        (3, TILE_V, 64),  # one tile, exactly full
        (5, TILE_V - 1, 65),  # one class and one step less or more
        (129, 2 * TILE_V, 129),
        (130, TILE_V + 64, 40),  # a quarter of a tile
    ],
)
def test_sizes(device, n, v, d, dtype):
    check_stats(*head(n, v, d, dtype, device))


def test_no_rows(device):
    hidden, weight, target = head(1, 9, 8, device=device)
    for t in our_stats(hidden[:0], weight, target[:0]):
        assert t.shape == (0,)


def test_statistics_of_more_parts_than_are_merged_at_a_time(device, monkeypatch):
    monkeypatch.setattr(linear_rows, "MERGE_TILES", 2)
    check_stats(*head(7, 4 * TILE_V + 5, 8, device=device))


def test_statistics_not_asked_for(device):
    hidden, weight, target = head(5, 300, 24, device=device)
    every = our_stats(hidden, weight, target)
    # what else is computed changes no bit
    assert torch.equal(every[0], ours(hidden, weight, target))
    for entropy, argmax in ((False, False), (True, False), (False, True)):
        got = our_stats(hidden, weight, target, entropy=entropy, argmax=argmax)
        assert [t is not None for t in got] == [True, True, True, entropy, argmax]
        assert all(a is None or torch.equal(a, b) for a, b in zip(got, every, strict=True))


@pytest.mark.parametrize("at", [(0, 300), (5, 64, 128, 255, 256), (65, 66)], ids=str)
def test_the_first_of_equal_classes(device, at):
    weight = torch.full((303, 8), -20.0)
    weight[list(at)] = 3.0
    hidden = torch.zeros(3, 8)
    hidden[:, 0] = torch.tensor([1.0, 1.0, 0.0])
    target = torch.tensor([at[0], 100, 7], device=device)
    got = check_stats(
        on_16_bytes(hidden, DTYPES[0], device), on_16_bytes(weight, DTYPES[0], device), target
    )
    # of the last row every class is the largest
    assert got[4].tolist() == [at[0], at[0], 0]


def test_logits_far_apart_have_an_entropy(device):
    """Tops of 1e36 and -3e38, whose difference is finite, times a number of classes is not."""
    bias = torch.full((3 * TILE_V,), -3e38, device=device)
    bias[TILE_V : TILE_V + 2] = 1e36
    hidden, weight, target = head(1, len(bias), 8, device=device, ignored=0.0)
    _, _, _, entropy, classes = our_stats(hidden, weight, target, bias)
    assert entropy.tolist() == pytest.approx([math.log(2)]) and classes.tolist() == [TILE_V]


@pytest.mark.parametrize("at", [(3, 5), (3, 100), (3, TILE_V + 7), (200, 2 * TILE_V + 1)], ids=str)
def test_several_infinite_logits(device, at):
    """In one part of a tile, in several parts and in several tiles; a NaN beside them is a NaN."""
    hidden, weight, target = head(2, 3 * TILE_V, 24, device=device, ignored=0.0)
    hidden[1, 3] = NAN
    bias = torch.zeros(3 * TILE_V, device=device)
    bias[list(at)] = INF
    loss, lse, target_logprob, entropy, _ = our_stats(hidden, weight, target, bias)
    assert lse[0] == INF and lse[1].isnan()
    assert all(t.isnan().all() for t in (loss, target_logprob, entropy))


@pytest.mark.parametrize(
    "options",
    [{}, {"lse_square_scale": 0.1, "softcap": 9.0, "logit_scale": 0.0}],
    ids=["plain", "all"],
)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_ignored_rows_may_hold_anything(device, poison, options):
    hidden, weight, target = head(5, 300, 24, device=device, ignored=0.0)
    want = oracle(hidden, weight, target, **options)
    hidden[1], hidden[2, 5], target[1], target[2] = poison, poison, -100, -100
    want[1:3] = 0.0
    got = ours(hidden, weight, target, **options)
    assert got[1:3].tolist() == [0.0, 0.0]
    assert_close(got, want)


@pytest.mark.parametrize(
    "where",
    [
        slice(0, TILE_V),
        slice(64, 128),
        slice(TILE_V, None),
        slice(1, None),
        slice(0, -1),
        slice(10, 700),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"logit_scale": -0.5}], ids=["plain", "negative scale"])
def test_tiles_and_parts_without_a_finite_logit(device, options, where):
    v = 3 * TILE_V + 5
    hidden, weight, target = head(3, v, 24, device=device)
    bias = torch.zeros(v, device=device)
    bias[where] = -INF if options.get("logit_scale", 1.0) > 0 else INF
    at = bias.isfinite().nonzero()[:, 0]
    check_stats(hidden, weight, at[[0, len(at) // 2, -1]], bias, **options)
    # a target without a finite logit
    target[:] = bias.isinf().nonzero()[0]
    assert ours(hidden, weight, target, bias, **options).tolist() == [INF] * 3


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 100, 299])
def test_undefined_rows_are_undefined(device, value, at):
    hidden, weight, target = head(4, 300, 24, device=device, ignored=0.0)
    target[:] = torch.tensor([5, 250, at, -100])
    bias = torch.zeros(300, device=device)
    bias[at] = value
    loss = ours(hidden, weight, target, bias)
    torch.testing.assert_close(
        loss.double(), oracle(hidden, weight, target, bias), rtol=1e-5, atol=5e-6, equal_nan=True
    )
    assert loss[3] == 0.0 and (value == -INF or loss[:3].isnan().all())
    # only the row that holds it
    hidden[1, 3] = value
    loss = ours(hidden, weight, target)
    assert loss.isnan().tolist() == [False, True, False, False]


def whole_numbers(n, v, d, device):
    """Logits without rounding: even and small."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randint(-2, 3, (n, d), generator=g),
        torch.randint(-2, 3, (v, d), generator=g) * 2,
    )
    target = torch.randint(0, v, (n,), generator=g)
    return (
        on_16_bytes(hidden, DTYPES[0], device),
        on_16_bytes(weight, DTYPES[0], device),
        target.to(device),
    )


@pytest.mark.parametrize("offset", [1e4, -(2.0**24)])
def test_a_common_offset_cancels_exactly(device, offset):
    hidden, weight, target = whole_numbers(6, 600, 8, device)
    loss = check(hidden, weight, target)
    assert torch.equal(
        ours(hidden, weight, target, torch.full((600,), offset, device=device)), loss
    )


@pytest.mark.parametrize("margin", [5.0, 17.0, 40.0])
@pytest.mark.parametrize("v", [200, 1000])
def test_a_confident_target_keeps_its_digits(device, v, margin):
    """In fp32 max + log(sum) - z[y] is 0 from a margin of 17 on."""
    target = torch.tensor([0, v // 2, v - 1], device=device)
    weight = torch.zeros(v, 8)
    weight[target.cpu(), torch.arange(3)] = margin
    hidden = torch.eye(3, 8)
    loss = ours(
        on_16_bytes(hidden, DTYPES[0], device), on_16_bytes(weight, DTYPES[0], device), target
    )
    assert loss.tolist() == pytest.approx([math.log1p((v - 1) * math.exp(-margin))] * 3, rel=1e-5)


def test_rows_beyond_two_to_the_31_elements(device):
    # pages that are not touched cost nothing
    torch.utils.deterministic.fill_uninitialized_memory = False
    hidden, weight, target = head(3, 300, 24, torch.float16, device, ignored=0.0)
    memory = torch.empty(2 * 1200_000_000 + 64, dtype=torch.float16, device=device)
    rows = memory.as_strided((3, 24), (1200_000_000, 1))
    rows.copy_(hidden)
    assert torch.equal(ours(rows, weight, target), ours(hidden, weight, target))


def test_again_is_the_same_bit_for_bit(device):
    hidden, weight, target = head(200, 1001, 40, torch.float16, device)
    first, again = (ours(hidden, weight, target, softcap=9.0) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.slow
def test_neither_programs_nor_chunks_change_a_bit(device, monkeypatch):
    hidden, weight, target = head(300, 1001, 40, torch.float16, device)
    bias = torch.linspace(-2, 2, 1001, device=device)
    want = ours(hidden, weight, target, bias)
    want_stats = our_stats(hidden, weight, target, bias)
    for programs in (2, 7):
        monkeypatch.setattr(
            linear_rows, "multiprocessors", lambda device, programs=programs: programs
        )
        assert torch.equal(ours(hidden, weight, target, bias), want)
    monkeypatch.setattr(linear_rows, "LEAST_ROWS", linear_rows.TILE.block_n)
    monkeypatch.setattr(linear_rows, "PARTS_BUDGET", 0)
    assert torch.equal(ours(hidden, weight, target, bias), want)
    stats = our_stats(hidden, weight, target, bias)
    assert all(torch.equal(a, b) for a, b in zip(stats, want_stats, strict=True))


REFUSED = {
    "another dtype": lambda h, w: (h, w.to(torch.float64)),
    "fp64": lambda h, w: (h.double(), w.double()),
    "an integer": lambda h, w: (h.long(), w.long()),
    "columns": lambda h, w: (h.t().contiguous().t(), w),
    "columns of weight": lambda h, w: (h, w.t().contiguous().t()),
    "off by one": lambda h, w: (h[:, 1:], w[:, 1:]),
    "rows not on 16 bytes": lambda h, w: (h[:, :7].contiguous(), w[:, :7].contiguous()),
    "one row again and again": lambda h, w: (h[:1].expand(3, -1), w),
    "overlapping rows": lambda h, w: (h.as_strided((2, 24), (16, 1)), w),
    "no width": lambda h, w: (h[:, :0], w[:, :0]),
    "no classes": lambda h, w: (h, w[:0]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_descriptor_cannot_hold_is_refused(device, case):
    hidden, weight, _ = head(3, 40, 24, torch.float16, device)
    assert linear_rows.obstacle(hidden, weight) is None
    assert isinstance(linear_rows.obstacle(*REFUSED[case](hidden, weight)), str)


def test_one_row_may_have_any_stride(device):
    hidden, weight, target = head(1, 40, 24, torch.float16, device, ignored=0.0)
    odd = hidden.as_strided((1, 24), (7, 1))
    assert torch.equal(ours(odd, weight, target), ours(hidden, weight, target))


@pytest.mark.skipif(GPU, reason="of the interpreter")
def test_bf16_is_refused_where_it_would_be_wrong():
    hidden, weight, _ = head(3, 40, 24, torch.bfloat16)
    assert "bfloat16" in linear_rows.obstacle(hidden, weight)


class FakeProperties:
    def __init__(self, major, minor, shared):
        self.major, self.minor, self.shared_memory_per_block_optin = major, minor, shared


@pytest.mark.skipif(torch.version.hip is not None, reason="of CUDA")
@pytest.mark.parametrize(
    ("major", "minor", "shared", "obstacle"),
    [
        (9, 0, 232448, None),
        (10, 0, 232448, None),
        (8, 0, 166912, "8.0"),
        (8, 9, 101376, "8.9"),
        (12, 0, 101376, "101376 bytes"),
    ],
)
def test_devices(monkeypatch, major, minor, shared, obstacle):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: FakeProperties(major, minor, shared)
    )
    said = linear_rows._device_obstacle(torch.device("cuda"))
    assert said is None if obstacle is None else obstacle in said
    assert "CUDA" in linear_rows._device_obstacle(torch.device("xpu"))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["this thread", "another thread"])
def test_the_callers_allocator_is_left_alone(elsewhere):
    allocation = pytest.importorskip("triton.runtime._allocation")
    if not hasattr(allocation._allocator, "get"):
        pytest.skip(f"triton {triton.__version__} has one allocator for the process")
    seen = []

    def use():
        before = allocation._allocator.get()
        linear_rows._with_descriptors(
            torch.device("cpu"), lambda: seen.append(allocation._allocator.get()(64, 128, None))
        )
        assert allocation._allocator.get() is before
        seen.append("left alone")

    if elsewhere:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    else:
        use()
    assert seen[0].numel() == 64 and seen[1:] == ["left alone"]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("v", [50257, 128256])
def test_real_sizes_in_little_memory_without_waiting(device, v, options):
    n, d = 2048, 1024
    hidden, weight, target = head(n, v, d, torch.bfloat16, device)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    ours(hidden, weight, target, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with nothing_waits():
        loss = ours(hidden, weight, target, **options)
    parts = 8 * n * -(-v // TILE_V)
    assert torch.cuda.max_memory_allocated() - before <= parts + 8 * n + 2**20
    rows = slice(0, n, 37)
    want = oracle(hidden[rows], weight, target[rows], **options)
    torch.testing.assert_close(loss[rows].double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_statistics_of_undefined_rows(device, value):
    hidden, weight, target = head(3, 300, 24, device=device, ignored=0.0)
    target[0] = -100
    bias = torch.zeros(300, device=device)
    bias[slice(None) if value == -INF else slice(100, 101)] = value
    loss, lse, target_logprob, entropy, classes = our_stats(hidden, weight, target, bias)
    assert loss[0] == lse[0] == target_logprob[0] == entropy[0] == 0.0 and classes[0] == -1
    for t in (loss, target_logprob, entropy):
        assert t[1:].isnan().all()
    torch.testing.assert_close(
        lse[1:], torch.full((2,), value, device=device), rtol=0, atol=0, equal_nan=True
    )
    assert ((classes[1:] >= 0) & (classes[1:] < 300)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_of_rounded_products(device, dtype):
    """The target's logit and the maximum are the same number, so what is left is the sum of the
    others."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 96, generator=g) / 96**0.5
    target = torch.tensor([3, 255, 256, 450, 699])
    hidden, weight = (
        on_16_bytes(weight[target] * 30, dtype, device),
        on_16_bytes(weight, dtype, device),
    )
    want = oracle(hidden, weight, target.to(device))
    assert want.max() < 1e-5
    # logits of size 30 are off by some fp32 units, and a loss as small as this by as much of itself
    torch.testing.assert_close(
        ours(hidden, weight, target.to(device)).double(), want, rtol=1e-4, atol=0
    )


# --- through the public function, where no gradient is needed

PUBLIC_OPTIONS = {
    "plain": {},
    "cap and scale": {"softcap": 9.0, "logit_scale": -0.7},
    "z-loss": {"lse_square_scale": 1e-2},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored rows dropped": {"options": lossfuse.LinearOptions(drop_ignored=True)},
    "ignored rows kept": {"options": lossfuse.LinearOptions(drop_ignored=False)},
}


@pytest.fixture
def used(monkeypatch):
    """How many rows the product got."""
    rows = []
    row_loss = linear_rows.row_loss

    def watched(hidden, *rest, **options):
        rows.append(len(hidden))
        return row_loss(hidden, *rest, **options)

    monkeypatch.setattr(linear_rows, "row_loss", watched)
    return rows


def public_inputs(device, n=70, d=24, v=300):
    g = torch.Generator().manual_seed(0)
    # the product takes no fp32 on a GPU
    dtype = torch.float32 if device == "cpu" else torch.float16
    hidden, weight, bias = (
        torch.randn(*shape, generator=g).to(dtype).to(device) for shape in ((n, d), (v, d), (v,))
    )
    target = torch.randint(0, v, (n,), generator=g)
    target[::7] = -100
    obstacle = None if device == "cpu" else linear_rows._device_obstacle(torch.device(device))
    if obstacle is not None:
        pytest.skip(obstacle)
    return hidden, weight, bias, target.to(device)


@pytest.mark.parametrize("name", PUBLIC_OPTIONS)
def test_a_loss_without_gradient_never_materializes_logits(used, device, name):
    hidden, weight, bias, target = public_inputs(device)
    class_weight = torch.rand(300, generator=torch.Generator().manual_seed(1)).to(device)
    given = {"linear_bias": bias, "weight": class_weight, **PUBLIC_OPTIONS[name]}
    got = lossfuse.linear_cross_entropy(hidden, weight, target, impl="triton", **given)
    given |= {"linear_bias": bias.double(), "impl": "reference"}
    want = lossfuse.linear_cross_entropy(hidden.double(), weight.double(), target, **given)
    assert_formula_close(got, want)
    # looking for ignored rows costs nothing on a CPU
    dropped = name == "ignored rows dropped" or (device == "cpu" and name != "ignored rows kept")
    assert used == [60 if dropped else 70]


BEYOND = {
    "label_smoothing": lambda hidden: 0.1,
    "linear_weight": lambda hidden: torch.randn(24, 300).to(hidden).T,
    "target": lambda hidden: torch.rand(70, 300).to(hidden),
}


@pytest.mark.parametrize("name", BEYOND)
def test_options_that_the_kernel_lacks_are_computed_in_chunks(used, device, name):
    hidden, weight, _, target = public_inputs(device)
    given = {"linear_weight": weight, "target": target, name: BEYOND[name](hidden)}
    got = lossfuse.linear_cross_entropy(hidden, impl="triton", **given)
    want = lossfuse.linear_cross_entropy(hidden, impl="reference", **given)
    assert_formula_close(got, want)
    assert used == []


def test_per_token_losses_have_a_backward(used, device):
    """Their forward needs no gradient either; the backward makes the logits again."""
    hidden, weight, _, target = public_inputs(device)
    operands = [hidden.requires_grad_(), weight.requires_grad_()]
    grads = []
    for impl in ("triton", "reference"):
        loss = lossfuse.linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl)
        grads.append(
            torch.autograd.grad((loss * torch.linspace(-1, 1, 70, device=device)).sum(), operands)
        )
    assert used == [60 if device == "cpu" else 70]
    for got, want in zip(*grads, strict=True):
        if got.dtype == torch.float32:
            assert_formula_close(got, want)
        else:
            # the gradient of the logits is rounded before the products
            assert_product_close(got, want)
