"""The promises of docs/promises.md, one by one: cases in which losses of other libraries are
silently wrong, for every function that can be given those logits, and every place."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import lossfuse
import program
from closeness import assert_gradient_close, assert_loss_close
from conftest import PLACES, Place
from lossfuse import targets
from lossfuse.call.dispatch import TRITON_INSTALLED
from lossfuse.kernels import launch
from lossfuse.ops import head_chunks
from ranks import cases_on_ranks
from rows import class_weight, logits_and_ids, probabilities
from subjects import FUNCTIONS, Subject, two_rows

INF, NAN = float("inf"), float("nan")
N, V = 5, 40
# blocks of so many classes: two, and a ragged one
WIDTH = 16
# in the interpreter, where a call takes a third of a second, the function with most kernels: of
# losses, of gradients, and of both at once
INTERPRETED = ("in place", "labels")


def subjects(names):
    made = []
    for name, place in itertools.product(names, PLACES):
        # these have one way through the package; the definition of statistics is that of logits
        if name in ("fused head", "head, every row") and place.impl != "torch":
            continue
        subject = Subject(name, place)
        slow = (
            name not in INTERPRETED
            if subject.interpreted
            else place.impl == "reference" and "statistics" in name
        )
        marks = [pytest.mark.gpu] if place.device != "cpu" else [pytest.mark.slow] if slow else []
        made.append(pytest.param(subject, marks=marks, id=str(subject)))
    return made


OF_CLASSES = [name for name in FUNCTIONS if not name.startswith("labels")]
UNFUSED = [name for name in OF_CLASSES if name != "fused head"]
HEADS = pytest.mark.parametrize("head_subject", subjects(["head", "head statistics"]))


@pytest.fixture(params=subjects(OF_CLASSES))
def subject(request):
    return request.param


@pytest.fixture(params=subjects(FUNCTIONS))
def any_subject(request):
    return request.param


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Kernels whose rows have several blocks at a size that the interpreter can do."""
    if not TRITON_INSTALLED:
        return
    from lossfuse.kernels import soft_target_rows, softmax_rows

    narrow = launch.LaunchConfig(WIDTH, 1)
    monkeypatch.setattr(soft_target_rows, "row_blocks", lambda v: narrow)
    monkeypatch.setattr(softmax_rows, "grad_blocks", lambda v, shaping: narrow)
    # a lane takes 4 classes, and the edges of a row take 8 lanes
    monkeypatch.setattr(softmax_rows, "stats_blocks", lambda v, shaping: launch.LaunchConfig(32, 1))


def extreme(name, *values, **how):
    """A parameter whose first and last values are tried by default."""
    middle = [pytest.param(v, marks=pytest.mark.slow) for v in values[1:-1]]
    return pytest.mark.parametrize(name, [values[0], *middle, values[-1]], **how)


def given(subject, n=N, v=V, dtype=torch.float32, **how):
    x, target = logits_and_ids(n, v, dtype, subject.place.device, **how)
    return x.detach(), target


def soft_targets(subject):
    return probabilities(N, V, device=subject.place.device).detach()


def check(subject, x, target, weight=None, *, bias=None, terms=0.0, **options):
    """Losses and gradients, each entry relative to itself."""
    logits, ones = x if bias is None else x + bias, torch.ones(len(x), device=x.device)
    rows, grads = program.value_and_grads(logits, target, weight, ones, reduction="none", **options)
    got = subject.results(x, target, weight, bias=bias, **options)
    assert_loss_close(got.rows, rows)
    assert_loss_close(got.total, rows.sum())
    for g in got.both_grads:
        assert_gradient_close(g, grads.cpu(), terms=terms)
    return got


def check_call(subject, x, target, **options):
    """The loss and its gradient, of an ``x`` that may have any layout."""
    leaf = x if x.requires_grad else x.detach().requires_grad_()
    loss, want = subject.loss(leaf, target, **options), subject.wanted(x, target, **options)
    assert_loss_close(loss.detach(), want[0])
    assert_gradient_close(subject.grad(loss, leaf, torch.ones_like(loss)), want[1])


def assert_only_rows_are_nan(got, clean, bad):
    """Losses and gradients of these rows are NaN, the others those of ``clean``."""
    # few rows without NaN may take other formulas, which round differently
    others = [row for row in range(len(got.rows)) if row not in bad]
    assert got.rows[bad].isnan().all() and got.total.isnan()
    torch.testing.assert_close(got.rows[others], clean.rows[others], rtol=5e-6, atol=0)
    for g, whole in zip(got.both_grads, clean.both_grads, strict=True):
        assert g[bad].isnan().all()
        torch.testing.assert_close(g[others], whole[others], rtol=5e-6, atol=0)


# --- numbers


@extreme("offset", 1e3, 1e4, -1e4, 1e6, -(2.0**24), 2.0**24)
def test_a_common_offset_cancels(subject, offset):
    """Multiples of 2 below 32, so that every sum is exact in fp32."""
    x, target = given(subject)
    x = (x / 2).round() * 2
    for options in subject.some({}, {"label_smoothing": 0.1}):
        here, there = (subject.results(z, target, **options) for z in (x, x + offset))
        torch.testing.assert_close(there[::2], here[::2], rtol=1e-6, atol=0)
        torch.testing.assert_close(there[1::2], here[1::2], rtol=1e-5, atol=1e-12)
    if not subject.interpreted:
        here, there = (subject.results(z, soft_targets(subject)) for z in (x, x + offset))
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-10)


@extreme("offset", -1e4, 1e4, 1e6, 2.0**24)
def test_the_gradient_of_a_z_loss_stays_accurate_at_an_offset(subject, offset):
    """A probability formed as exp(x - lse) has only the precision that is left of x."""
    x, target = given(subject)
    x, terms = (x / 2).round() * 2 + offset, 1.0 + 2e-6 * abs(offset)
    check(subject, x, target, lse_square_scale=1e-6, terms=terms)


@extreme("margin", 5.0, 10.0, 17.0, 25.0, 40.0, 20.0)
def test_a_confident_target_stays_accurate(subject, margin):
    """Below 6e-8 a loss formed as lse - x[y] is 0 in fp32, and so is the target's gradient formed
    as p - 1."""
    ids = torch.tensor([0, 20, V - 1], device=subject.place.device)
    x = torch.zeros(3, V, device=subject.place.device).scatter(1, ids[:, None], margin)
    others = (V - 1) * math.exp(-margin)
    # the reference takes the mass of a one-hot from softmax, which is 1
    soft = [] if subject.place.impl == "reference" else [F.one_hot(ids, V).float()]
    for target in (ids, *soft):
        got = subject.results(x, target)
        assert got.rows.tolist() == pytest.approx([math.log1p(others)] * 3, rel=1e-5)
        assert got.total.item() == pytest.approx(3 * math.log1p(others), rel=1e-5)
        for g in got.both_grads:
            want = [-others / (1 + others)] * 3
            assert g[torch.arange(3), ids.cpu()].tolist() == pytest.approx(want, rel=1e-5)
            assert g[0, 1].item() == pytest.approx(math.exp(-margin) / (1 + others), rel=1e-5)


@extreme("margin", 50.0, 90.0, 200.0, 5000.0)
def test_a_target_far_below_another_class(subject, margin):
    x = torch.zeros(2, V, device=subject.place.device)
    x[:, 7] = margin
    got = check(subject, x, torch.tensor([0, V - 1], device=subject.place.device))
    assert got.rows.tolist() == pytest.approx([margin] * 2, rel=1e-6)


OFF = {
    "first block": slice(0, WIDTH),
    "middle block": slice(WIDTH, 2 * WIDTH),
    "ragged block": slice(2 * WIDTH, None),
    "all but the ragged block": slice(0, 2 * WIDTH),
    "all but the first": slice(1, None),
    "all but the last": slice(0, -1),
}


def switched_off(v, where, device):
    """A bias that is -inf somewhere, and the classes elsewhere."""
    bias = torch.zeros(v, device=device)
    bias[where] = -INF
    return bias, (bias == 0).nonzero()[:, 0]


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("where", OFF.values(), ids=OFF)
def test_minus_infinity_over_whole_blocks(subject, where):
    """Logits of -inf, of heads by their bias; capped they are -softcap, as other logits."""
    x, _ = given(subject, 3)
    bias, left = switched_off(V, where, subject.place.device)
    for options in subject.some({}, {"softcap": 15.0}, {"logit_scale": 0.5}):
        check(subject, x, left[torch.tensor([0, len(left) // 2, -1])], bias=bias, **options)


WIDTHS = {2048, *(c.block_v for table in launch.FUSED_TABLES.values() for c in table.slices)}


@pytest.mark.slow
@pytest.mark.parametrize("width", sorted(WIDTHS))
@pytest.mark.parametrize("subject", subjects(UNFUSED))
def test_minus_infinity_over_blocks_of_every_width(subject, width):
    """As tables have them, and beyond the end of a block."""
    v = width + 300
    x, _ = given(subject, 2, v)
    for where in (slice(0, width), slice(width, None)):
        bias, left = switched_off(v, where, subject.place.device)
        check(subject, x, left[torch.tensor([0, -1])], bias=bias)


def test_a_target_of_minus_infinity_costs_infinity(subject):
    x, target = given(subject, ignored=0.0)
    bias, _ = switched_off(V, target[1], subject.place.device)
    got, off = subject.results(x, target, bias=bias), (target == target[1]).cpu()
    assert (got.rows[off] == INF).all() and got.rows[~off].isfinite().all() and got.total == INF
    for g in got.both_grads:
        assert (g[off, target[1].cpu()] == -1.0).all() and g.isfinite().all()


def test_rows_of_no_finite_logit_are_nan(subject):
    x, target = given(subject, ignored=0.0)
    bias, _ = switched_off(V, slice(None), subject.place.device)
    got = subject.results(x, target, bias=bias)
    assert got.rows.isnan().all() and got.total.isnan()
    assert all(g.isnan().any(1).all() for g in got.both_grads)


@extreme("poison", NAN, INF)
def test_an_undefined_row_is_nan_and_stays_alone(subject, poison):
    """All of its gradient, wherever the NaN or infinity stands."""
    x, target = given(subject, ignored=0.0)
    clean = subject.results(x, target)
    x[1], x[2, target[2]], x[3, (target[3] + 1) % V] = poison, poison, poison
    assert_only_rows_are_nan(subject.results(x, target), clean, [1, 2, 3])


@extreme("poison", NAN, -INF, INF)
def test_ignored_rows_may_hold_anything(subject, poison):
    x, target = given(subject, ignored=0.0)
    target[1], target[3] = -100, -100
    weight = class_weight(V, subject.place.device)
    dirty = x.clone()
    dirty[1], dirty[3, 20] = poison, poison
    every = {"label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 9.0, "weight": weight}
    for options in subject.some(every, {}):
        clean, got = (subject.results(z, target, **options) for z in (x, dirty))
        torch.testing.assert_close(got, clean, rtol=1e-6, atol=0)
        assert got.rows[[1, 3]].tolist() == [0.0, 0.0]
        assert not any(g[[1, 3]].any() for g in got.both_grads)
        # a mean is over the others
        leaf = dirty.requires_grad_()
        loss = subject.loss(leaf, target, **options)
        count = 3 if "weight" not in options else weight[target[[0, 2, 4]]].sum().cpu()
        grad = subject.grad(loss, leaf).cpu()
        torch.testing.assert_close(loss.detach().cpu(), got.total / count, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, got.grads / count, rtol=1e-5, atol=1e-12)


def test_all_ignored(subject):
    x, target = given(subject)
    x.requires_grad_()
    ignored = torch.full_like(target, -100)
    cases = (
        ({}, NAN),
        ({"reduction": "sum"}, 0.0),
        ({"reduction": "none"}, 0.0),
        ({"normalizer": 3.0}, 0.0),
        ({"weight": class_weight(V, subject.place.device)}, NAN),
        ({"label_smoothing": 0.1}, NAN),
        ({"lse_square_scale": 0.1, "reduction": "sum"}, 0.0),
    )
    for options, want in subject.some(*cases):
        loss = subject.loss(x, ignored, **options)
        torch.testing.assert_close(loss.detach(), torch.full_like(loss, want), equal_nan=True)
        assert torch.equal(subject.grad(loss.sum(), x), torch.zeros_like(x)), options


def test_targets_of_no_weight(subject):
    """0 / 0 without an ignored row: NaN, and its gradient too, as torch's. A sum of them is 0."""
    x, target = given(subject, ignored=0.0)
    x.requires_grad_()
    weight = class_weight(V, subject.place.device).index_fill(0, target, 0.0)
    loss = subject.loss(x, target, weight)
    assert loss.isnan() and subject.grad(loss, x).isnan().all()
    for options in ({"reduction": "sum"}, {"normalizer": 2.0}):
        loss = subject.loss(x, target, weight, **options)
        assert loss == 0.0 and not subject.grad(loss, x).any()


def other_class(target):
    """A class that is no row's target."""
    return torch.tensor([c for c in range(V) if c not in target.tolist()][:1], device=target.device)


@extreme("poison", NAN, INF)
def test_the_weight_of_a_class_that_is_no_target_may_be_anything(subject, poison):
    """Multiplied by 0 it would be NaN."""
    x, target = given(subject, ignored=0.0)
    target[1] = -100
    weight, other = class_weight(V, subject.place.device), other_class(target)
    for options in subject.some({"lse_square_scale": 0.1, "softcap": 9.0}, {}):
        clean, got = (
            subject.results(x, target, weight.index_fill(0, other, w), **options)
            for w in (1.0, poison)
        )
        torch.testing.assert_close(got, clean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", [NAN, INF])
@HEADS
def test_fp16_products_ignore_the_weight_of_a_class_that_is_no_target(
    head_subject, poison, monkeypatch
):
    """As on a GPU, where products take float16 and the gradient of the logits is scaled into its
    range."""
    monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
    x, target = given(head_subject, dtype=torch.float16, ignored=0.0)
    weight, other = class_weight(V, x.device), other_class(target)
    clean, got = (
        head_subject.results(x, target, weight.index_fill(0, other, w)) for w in (0.0, poison)
    )
    torch.testing.assert_close(got, clean, rtol=2.0**-9, atol=2.0**-24)


def test_all_logits_far_below_zero(subject):
    """A maximum that starts at 0 leaves exp(-200) of them."""
    x, target = given(subject)
    check(subject, x - 200.0, target)
    equal = check(subject, torch.full_like(x, -3.5), target.clamp(min=0))
    assert equal.rows.tolist() == pytest.approx([math.log(V)] * N, rel=1e-6)


@pytest.mark.usefixtures("narrow_blocks")
def test_softcap_counts_no_lanes_past_the_end(subject):
    """Capped, they would be classes of logit -softcap."""
    for v, softcap in subject.some((33, 2.0), (33, 30.0), (WIDTH + 1, 2.0), (V, 2.0)):
        x, target = given(subject, 3, v, spread=0.5)
        check(subject, x, target, softcap=softcap)


def test_the_derivative_of_softcap_stays_accurate_in_tails_and_centre(subject):
    """1 - tanh^2 is 0 at 10 caps, even in fp64, and (1 - t) / (1 + t) has no precision near 0."""
    if subject.place.impl == "reference":
        pytest.skip("it has torch's derivative of tanh")
    row = [-300.0, -100.0, -30.0, -3.0, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 3.0, 30.0, 100.0]
    x, target = torch.tensor([row] * 3), torch.tensor([0, 5, 11])
    got = subject.results(x.to(subject.place.device), target.to(subject.place.device), softcap=10.0)
    u = x.double() / 10.0
    want = program.value_and_grads(10.0 * torch.tanh(u), target, reduction="none")
    assert_loss_close(got.rows, want[0])
    for g in got.both_grads:
        assert_gradient_close(g, want[1] / torch.cosh(u) ** 2)


@extreme("scale", 0.0, 1e-3, 50.0, -2.0)
def test_scales_of_any_sign(subject, scale):
    if subject.name == "fused head" and scale == 0.0:
        pytest.skip("not recorded: the logits are materialized, as the model would")
    x, target = given(subject, 3, spread=1.0)
    check(subject, x, target, logit_scale=scale)


def test_logits_as_large_as_fp16_has_them(subject):
    x, target = given(subject, dtype=torch.float16, ignored=0.0)
    x[0], x[1, ::2], x[2] = 65504.0, 65504.0, -65504.0
    x[3, 5], x[3, 6] = 65504.0, -65504.0
    check(subject, x, target)


def test_fp16_gradients_see_a_loss_scale_before_they_are_rounded(subject):
    """Probabilities of 1e-6 over 4096 tokens are no fp16 numbers; times 65536 they are."""
    x, target = given(subject, dtype=torch.float16)
    x = (x * 3).requires_grad_()
    got = subject.grad(subject.loss(x, target, normalizer=4096.0) * 65536.0, x)
    want = program.value_and_grads(x, target, normalizer=4096.0)[1] * 65536.0
    normal = want.abs() > 2.0**-14
    assert normal.sum() > 20
    # on a GPU heads round each product to its operands' dtype
    rtol = 2.0**-9 if subject.is_head else 2.0**-10
    torch.testing.assert_close(got.double()[normal], want[normal], rtol=rtol, atol=0.0)


def test_the_loss_of_bf16_logits_is_float32(subject):
    x, target = given(subject, 4, dtype=torch.bfloat16)
    for reduction in ("none", "mean", "sum"):
        loss = subject.loss(x, target, reduction=reduction)
        want = program.cross_entropy(x.double(), target, reduction=reduction)
        assert loss.dtype == torch.float32 and not torch.equal(loss, loss.bfloat16().float())
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)


@extreme("rows", 3, 1, 2, 5, 16, 100, 300)
@HEADS
def test_a_loss_of_many_chunks_is_as_exact_as_of_one(head_subject, rows):
    """A sum in bf16 is off by 0.2 to 14 % over 300 of them."""
    x, target = given(head_subject, 30 if head_subject.interpreted else 300, dtype=torch.bfloat16)
    chunks = lossfuse.LinearOptions(chunk_bytes=rows * 48 * 4)
    for reduction in ("mean", "sum"):
        loss = head_subject.loss(x, target, reduction=reduction, options=chunks)
        want = program.cross_entropy(x.double(), target, reduction=reduction)
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


def test_smoothing_leaves_ignored_rows_out_and_weighs_every_class(subject):
    """Other libraries sum a shard of the classes, or the weights of ignored rows."""
    x, target = given(subject)
    target[1] = -100
    weight = class_weight(V, subject.place.device)
    weight[3] = 0.0
    for smoothing in subject.some(0.1, 1.0):
        check(subject, x, target, weight, label_smoothing=smoothing, terms=1.0)
        leaf = x.requires_grad_()
        loss = subject.loss(leaf, target, weight, label_smoothing=smoothing)
        want = program.value_and_grads(leaf, target, weight, label_smoothing=smoothing)
        assert_loss_close(loss, want[0])
        assert_gradient_close(subject.grad(loss, leaf), want[1], terms=1.0)


def test_probabilities_need_not_be_probabilities(subject):
    """Rows whose sum is not 1, or 0, and negative entries: the sum of q * (lse - x) for any q."""
    (x, _), soft = given(subject), soft_targets(subject)
    soft[0] *= 3.0
    soft[1] = 0.0
    soft[2, 5] = -0.7
    soft[3] = -soft[3]
    every = {"label_smoothing": 0.1, "weight": class_weight(V, subject.place.device)}
    for options in subject.some(every, {}):
        check(subject, x, soft, terms=10.0, **options)


def test_classes_of_no_probability_and_no_logit_are_left_out(subject):
    """torch has NaN there (0 * -inf); a mass of 0 is no loss."""
    (x, _), soft = given(subject), soft_targets(subject)
    bias, left = switched_off(V, slice(7, 20), subject.place.device)
    soft[:, 7:20] = 0.0
    got, ones = subject.results(x, soft, bias=bias), torch.ones(N, device=x.device)
    want = program.value_and_grads(x[:, left], soft[:, left], dloss=ones, reduction="none")
    assert_loss_close(got.rows, want[0])
    for g in got.both_grads:
        assert not g[:, 7:20].any()
        assert_gradient_close(g[:, left.cpu()], want[1].cpu(), terms=5.0)
    leaf = soft.requires_grad_()
    g = subject.grad(subject.loss(x, leaf, bias=bias), leaf)
    assert not g[:, 7:20].any() and g.isfinite().all()


@pytest.mark.parametrize("bad", [0, -1, INF, NAN])
def test_a_normalizer_that_is_no_divisor_is_refused(subject, bad):
    x, target = given(subject)
    with pytest.raises(ValueError, match=f"normalizer is {bad} but must be (positive|finite)"):
        subject.loss(x, target, normalizer=bad)


def test_a_normalizer_in_a_tensor_divides_unchecked(subject):
    """As torch divides by a tensor: nothing is finite over 0 or NaN."""
    x, target = given(subject, ignored=0.0)
    target[1] = -100
    x.requires_grad_()
    for value, want in subject.some((0.0, INF), (INF, 0.0), (NAN, NAN)):
        loss = subject.loss(x, target, normalizer=torch.tensor(value, device=subject.place.device))
        torch.testing.assert_close(loss.item(), want, equal_nan=True)
        g = subject.grad(loss, x)
        others = g[[0, 2, 3, 4]]
        assert not g[1].any() and not (others if value == INF else others.isfinite()).any()


# --- targets


@extreme("bad", V, V + 5, -5, 2**40)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_out_of_range_raises_on_the_cpu(any_subject, bad, reduction):
    x, target = given(any_subject, ignored=0.0)
    x.requires_grad_()
    target[1], target[3], target[4] = -100, bad, bad
    if any_subject.place.device != "cpu":
        with lossfuse.debug_targets(), pytest.raises(IndexError, match="target of row 3"):
            any_subject.loss(x, target, reduction=reduction)
        return
    words = rf"target of row 3 is {bad} but input has {V} classes; .* or ignore_index=-100"
    with pytest.raises(IndexError, match=words):
        any_subject.loss(x, target, reduction=reduction)


@extreme("dtype", torch.int32, torch.int16, torch.int8, torch.uint8, ids=str)
def test_ids_of_any_width(subject, dtype):
    """-100 is 156 in uint8, which is out of range and not ignored."""
    x, target = given(subject, ignored=0.0)
    exact = {"rtol": 0, "atol": 0}
    narrow = subject.results(x, target.to(dtype))
    torch.testing.assert_close(narrow, subject.results(x, target), **exact)
    unsigned = dtype == torch.uint8
    target[2] = 156 if unsigned else -100
    narrow = target.to(dtype)
    assert narrow[2] == target[2]
    if not unsigned:
        torch.testing.assert_close(subject.results(x, narrow), subject.results(x, target), **exact)
    elif subject.place.device == "cpu":
        with pytest.raises(IndexError, match="target of row 2 is 156"):
            subject.loss(x, narrow)
    # an ignore_index may lie beyond the width
    ignored = {"ignore_index": 156 if unsigned else -100}
    torch.testing.assert_close(
        subject.loss(x, target, **ignored), subject.loss(x, narrow, **ignored)
    )


@pytest.mark.usefixtures("narrow_blocks")
@extreme("bad", V, V + 5, -5, 2**40)
def test_a_bad_target_that_cannot_be_checked_makes_its_row_nan(any_subject, bad, monkeypatch):
    """As on a GPU: nothing beside the row is read or written, and no class past the end is a
    target."""
    monkeypatch.setattr(targets, "values_are_readable", lambda t: False)
    x, target = given(any_subject, ignored=0.0)
    clean = any_subject.results(x, target)
    target[1] = bad
    assert_only_rows_are_nan(any_subject.results(x, target), clean, [1])


# --- autograd


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_second_backward_is_the_first_or_raises(any_subject, reduction, factor):
    """A saved gradient that is scaled in place makes the second one wrong as soon as the upstream
    gradient is not 1."""
    x, target = given(any_subject)
    x.requires_grad_()
    loss = any_subject.loss(x, target, reduction=reduction)
    dloss = torch.full_like(loss, factor)
    first = any_subject.grad(loss, x, dloss, retain_graph=True)
    before = first.clone()
    assert_gradient_close(first, any_subject.wanted(x, target, dloss=dloss, reduction=reduction)[1])
    # the gradients of a head are returned once; its statistics compute the logits again
    once = any_subject.name in ("head", "head, every row", "fused head")
    once = once and reduction == "mean" and any_subject.place.impl != "reference"
    for again in (factor, 3.0 * factor):
        dloss = torch.full_like(loss, again)
        if any_subject.consumes or once:
            with pytest.raises(RuntimeError, match="a second backward"):
                any_subject.grad(loss, x, dloss, retain_graph=True)
        else:
            second = any_subject.grad(loss, x, dloss, retain_graph=True)
            torch.testing.assert_close(second, before * (again / factor), rtol=1e-6, atol=1e-12)
    # gradients that were returned are the caller's
    assert torch.equal(first, before)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_double_backward_is_right_or_raises(any_subject, reduction):
    """Other libraries return a gradient without a graph, or a wrong second derivative."""
    x, target = given(any_subject)
    x.requires_grad_()
    loss = any_subject.loss(x, target, reduction=reduction)
    if any_subject.consumes or (any_subject.is_head and any_subject.place.impl != "reference"):
        with pytest.raises(RuntimeError, match="create_graph"):
            any_subject.grad(loss.sum(), x, create_graph=True)
        return
    wide = x.detach().double().requires_grad_()
    want = any_subject.reference.loss(wide, target, reduction=reduction)
    pairs = [
        (any_subject.grad(of.sum(), leaf, create_graph=True), leaf)
        for of, leaf in ((loss, x), (want, wide))
    ]
    got, want = (torch.autograd.grad((g**2).sum(), leaf)[0] for g, leaf in pairs)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


UPSTREAM = {
    "one number for all": lambda shape: torch.tensor(0.3).expand(shape),
    "every other": lambda shape: torch.linspace(-1.0, 2.0, 2 * math.prod(shape)).view(
        *shape[:-1], -1
    )[..., ::2],
    "reversed": lambda shape: torch.linspace(-1.0, 2.0, math.prod(shape)).view(shape).flip(0),
    "transposed": lambda shape: (
        torch.linspace(-1.0, 2.0, math.prod(shape)).view(shape[::-1]).mT
        if len(shape) > 1
        else torch.linspace(-1.0, 2.0, shape[0])
    ),
}


@extreme("name", *UPSTREAM)
def test_an_upstream_gradient_has_any_stride_and_is_not_written(any_subject, name):
    x, target = given(any_subject)
    x.requires_grad_()
    loss = any_subject.loss(x, target, reduction="none")
    # a move to the device would make it dense
    with torch.device(x.device):
        dloss = UPSTREAM[name](loss.shape)
    before, version = dloss.clone(), dloss._version
    got = any_subject.grad(loss, x, dloss)
    assert torch.equal(dloss, before) and dloss._version == version
    assert_gradient_close(got, any_subject.wanted(x, target, dloss=dloss, reduction="none")[1])


@extreme("value", -0.5, 0.0, 2.0, 1e-30, 65536.0)
def test_any_upstream_factor(any_subject, value):
    x, target = given(any_subject)
    x.requires_grad_()
    dloss = torch.tensor(value, device=x.device)
    got = any_subject.grad(any_subject.loss(x, target), x, dloss)
    want = any_subject.wanted(x, target)[1] * value
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-37)
    assert dloss == value


def test_logits_used_around_the_loss_are_right_or_raise(any_subject):
    """A library that overwrites logits silently corrupts other uses of them."""
    x, target = given(any_subject)

    def total(subject, leaf):
        z = leaf * 2.0
        before = z.exp().sum()
        loss = subject.loss(z, target)
        return before * 1e-3 + loss + (z**2).sum() * 1e-3

    got, want = (
        torch.autograd.grad(total(subject, leaf), leaf)[0].double()
        for subject, leaf in (
            (any_subject, x.clone().requires_grad_()),
            (any_subject.reference, x.double().requires_grad_()),
        )
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_logits_changed_before_the_backward_raise_or_do_not_matter(any_subject, reduction):
    x, target = given(any_subject)
    want = any_subject.wanted(x, target, reduction=reduction)[1]
    leaf = x.requires_grad_()
    z = leaf * 1.0
    loss = any_subject.loss(z, target, reduction=reduction).sum()
    with torch.no_grad():
        z.zero_()
    try:
        got = any_subject.grad(loss, leaf)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-8)


CONSUMING = pytest.mark.parametrize("name", ["labels", "logits"])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@CONSUMING
@pytest.mark.not_reference
def test_logits_that_were_consumed_raise(place, name, reduction):
    """Read afterwards, saved before, differentiated again: a stale use never gives a number."""
    subject = Subject(name, place)
    x, target = given(subject)
    leaf = x.requires_grad_()
    z = leaf * 1.0
    saver = (z * z).sum()
    loss = subject.loss(z, target, reduction=reduction, inplace=True).sum()
    if reduction == "none":
        # these are written in the backward
        assert torch.equal(z, leaf)
    loss.backward(retain_graph=True)
    again = lambda z: subject.loss(z, target)  # noqa: E731
    for read in (torch.argmax, torch.clone, again, lambda z: z.data, lambda z: z.add_(1.0)):
        with pytest.raises(RuntimeError, match="consumed by a loss of lossfuse"):
            read(z)
    with pytest.raises(RuntimeError, match="a second backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saver.backward()
    want = subject.wanted(leaf, target, reduction=reduction)[1]
    torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-8)


@CONSUMING
@pytest.mark.not_reference
def test_leaves_and_shared_elements_are_never_consumed(place, name):
    subject = Subject(name, place)
    x, target = given(subject)
    window = (x * 1.0).requires_grad_() * 1.0
    cases = [
        ("is a leaf", x.clone().requires_grad_()),
        ("is a view of a leaf", x.clone().requires_grad_().view(N, V)),
        ("elements share memory", window.as_strided((N, V), (V // 2, 1))),
        ("elements share memory", window[:1].expand(N, V)),
    ]
    for words, z in cases:
        before = z.detach().clone()
        for reduction in ("none", "mean"):
            with pytest.raises(ValueError, match=words):
                subject.loss(z, target, reduction=reduction, inplace=True)
        assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@CONSUMING
def test_without_a_gradient_nothing_is_written(place, name, inplace):
    """Other libraries overwrite rows of a leaf in evaluation, or return 0."""
    subject = Subject(name, place)
    x, target = given(subject)
    for leaf, mode in (
        (x.clone().requires_grad_(), torch.no_grad()),
        (x.clone(), torch.inference_mode()),
        (x.clone(), torch.enable_grad()),
    ):
        version = leaf._version
        for reduction in ("none", "mean"):
            with mode:
                loss = subject.loss(leaf, target, reduction=reduction, inplace=inplace)
            assert_loss_close(loss, subject.wanted(x, target, reduction=reduction)[0])
            assert not loss.requires_grad
        assert torch.equal(leaf, x) and leaf._version == version and type(leaf) is torch.Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_the_loss_is_the_same(any_subject, mode):
    x, target = given(any_subject)
    for reduction in ("none", "mean"):
        with mode():
            loss = any_subject.loss(x, target, reduction=reduction)
        assert not loss.requires_grad
        assert_loss_close(loss, any_subject.wanted(x, target, reduction=reduction)[0])


AUTO = [Subject(name, Place("auto", "cpu")) for name in FUNCTIONS if name != "fused head"]


@pytest.mark.parametrize("any_subject", AUTO, ids=str)
def test_torch_func_is_right(any_subject):
    """There "auto" picks the reference."""
    (x, target), reference, loss = given(any_subject), any_subject.reference, any_subject.loss
    leaf = x.clone().requires_grad_()
    want, before = reference.grad(reference.loss(leaf, target), leaf), x.clone()
    torch.testing.assert_close(torch.func.grad(loss)(x, target), want)
    assert torch.equal(x, before)
    many, ids = torch.stack([x, 2 * x]), torch.stack([target, target])
    got = torch.func.vmap(loss)(many, ids)
    torch.testing.assert_close(got, torch.stack([reference.loss(z, target) for z in many]))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many, ids)[0], want)
    tangent = torch.ones_like(x)
    tangent[0] = 2.0
    tangent[:, 3] = 0.0
    _, along = torch.func.jvp(lambda z: loss(z, target), (x,), (tangent,))
    torch.testing.assert_close(along, (want * tangent).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("any_subject", subjects([n for n in FUNCTIONS if n != "fused head"]))
def test_torch_func_of_an_implementation_by_name_is_refused(any_subject):
    x, target = given(any_subject)
    if any_subject.place.impl == "reference":
        assert torch.func.grad(any_subject.loss)(x, target).isfinite().all()
        return
    with pytest.raises(ValueError, match="a torch.func transform is active"):
        torch.func.grad(any_subject.loss)(x, target)


# --- layouts and sizes

LAYOUTS = {
    "transposed": lambda: torch.randn(V, N).t(),
    "slice of columns": lambda: torch.randn(N, V + 20)[:, 3 : V + 3],
    "every other class": lambda: torch.randn(N, 2 * V)[:, ::2],
    "every other row": lambda: torch.randn(2 * N, V)[::2],
    "one row for all": lambda: torch.randn(1, V).expand(N, V),
    "one class for all": lambda: torch.randn(N, 1).expand(N, V),
    "at an odd address": lambda: torch.randn(N * V + 3)[3:].view(N, V),
    "a sliding window": lambda: torch.randn(N + V).as_strided((N, V), (1, 1)),
}


@extreme("name", *LAYOUTS)
def test_any_layout(any_subject, name):
    # a move to the device would make most of them dense
    with torch.device(any_subject.place.device):
        x = LAYOUTS[name]()
    _, target = given(any_subject)
    buffer = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0)
    before = buffer.clone()
    x.requires_grad_()
    for reduction in ("none", "mean"):
        check_call(any_subject, x, target, reduction=reduction)
    assert torch.equal(buffer, before)


def test_no_rows(any_subject):
    x, target = given(any_subject)
    x, target = x[:0].requires_grad_(), target[:0]
    for reduction, want in (("none", None), ("mean", NAN), ("sum", 0.0)):
        loss = any_subject.loss(x, target, reduction=reduction)
        if want is None:
            assert loss.numel() == 0 and len(loss) == 0
        else:
            torch.testing.assert_close(loss.item(), want, equal_nan=True)
        assert any_subject.grad(loss.sum(), x).shape == (0, V)
    if not any_subject.is_labels:
        soft = torch.empty(0, V, device=x.device)
        assert any_subject.loss(x, soft).isnan()
        assert any_subject.loss(x, soft, reduction="sum") == 0.0
        assert any_subject.loss(x, target, normalizer=3) == 0.0


def test_one_class_costs_nothing(subject):
    x = torch.tensor([[3.0], [-2.0]], device=subject.place.device)
    for target in (torch.tensor([0, -100], device=x.device), torch.ones(2, 1, device=x.device)):
        got = subject.results(x, target)
        assert got.rows.tolist() == [0.0, 0.0] and got.total == 0.0
        assert not any(g.any() for g in got.both_grads)


@pytest.mark.parametrize("subject", subjects(UNFUSED))
def test_no_class_is_refused(subject):
    x, target = given(subject, 3)
    with pytest.raises(
        ValueError, match=r"classes and must not be empty|expected at least one class"
    ):
        subject.loss(x[:, :0], target)


# --- heads


def losses_of_a_head(hidden, weight, target, **options):
    """The loss by both functions that have one."""
    yield lossfuse.linear_cross_entropy(hidden, weight, target, **options)
    yield lossfuse.linear_cross_entropy_stats(hidden, weight, target, **options).loss


@pytest.mark.parametrize("names", ["h", "w", "b", "hw", "wb", "hwb"])
@pytest.mark.slow_interpreted
def test_operands_that_require_grad_get_gradients_and_no_others(place, names):
    """Another library forgets the weight's where hidden states are frozen."""
    g = torch.Generator().manual_seed(0)
    shapes = {"h": (N, 6), "w": (V, 6), "b": (V,)}
    operands = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    h, w, b = (t.to(place.device).requires_grad_(name in names) for name, t in operands.items())
    target = torch.tensor([0, V - 1, -100, 7, 7], device=place.device)
    for reduction in ("none", "mean"):
        want = program.head_value_and_grads([h, w, b], target, reduction=reduction)
        given = {"reduction": reduction, "options": two_rows(V), "impl": place.impl}
        for loss in losses_of_a_head(h, w, target, linear_bias=b, **given):
            assert_loss_close(loss.detach(), want[0])
            loss.sum().backward()
            got = [t for name, t in zip("hwb", (h, w, b), strict=True) if name in names]
            assert [t for t in (h, w, b) if t.grad is not None] == got
            for t, grad in zip(got, want[1:], strict=True):
                torch.testing.assert_close(t.grad.double(), grad, rtol=1e-5, atol=1e-6)
                t.grad = None


def test_hidden_states_of_no_width(place):
    shapes = torch.empty(N, 0), torch.empty(V, 0), torch.randn(V)
    hidden, weight, bias = (t.to(place.device).requires_grad_() for t in shapes)
    target = torch.tensor([0, V - 1, -100, 7, 7], device=place.device)
    want = program.head_value_and_grads((hidden, weight, bias), target)
    for loss in losses_of_a_head(hidden, weight, target, linear_bias=bias, impl=place.impl):
        assert_loss_close(loss.detach(), want[0])
        dhidden, dweight, dbias = torch.autograd.grad(loss, [hidden, weight, bias])
        assert dhidden.shape == (N, 0) and dweight.shape == (V, 0)
        torch.testing.assert_close(dbias.double(), want[3], rtol=1e-5, atol=1e-7)


def test_a_nan_in_a_row_that_counts_reaches_the_gradient_of_the_weight(place):
    """The product carries it to the classes."""
    x, target = logits_and_ids(N, V, device=place.device, ignored=0.0)
    weight, hidden = torch.eye(V, device=place.device).requires_grad_(), x.detach().clone()
    hidden[2, 1] = NAN
    for reduction in ("none", "mean"):
        given = {"reduction": reduction, "impl": place.impl}
        loss = lossfuse.linear_cross_entropy(hidden, weight, target, **given)
        assert torch.autograd.grad(loss.sum(), weight)[0].isnan().any()


# --- labels


def label_results(place, x, t, **options):
    """Losses, the gradients of their sum, and the gradients of the sum as one number."""
    leaf, t = x.detach().to(place.device).requires_grad_(), t.to(place.device)
    losses = [
        lossfuse.binary_cross_entropy_with_logits(leaf, t, reduction=r, impl=place.impl, **options)
        for r in ("none", "sum")
    ]
    grads = [torch.autograd.grad(loss.sum(), leaf)[0].cpu() for loss in losses]
    return losses[0].detach().cpu(), *grads


def test_labels_of_logits_as_large_as_fp16_has_them(place):
    x = torch.tensor([[65504.0, -65504.0, 65504.0, -65504.0, 0.0]], dtype=torch.float16)
    want = torch.tensor([[0.0, 65504.0, 65504.0, 0.0, math.log(2.0)]])
    for t in (torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]]), torch.tensor([[0, 1, 4]])):
        loss, *grads = label_results(place, x, t)
        torch.testing.assert_close(loss, want)
        assert all(g.tolist() == [[0.0, -1.0, 1.0, 0.0, -0.5]] for g in grads)


def test_an_undefined_label_is_nan_and_stays_alone(place):
    x, t = torch.linspace(-3.0, 3.0, 2 * V).view(2, V), torch.rand(2, V)
    clean = label_results(place, x, t)
    x[1, 7], t[0, 3] = NAN, NAN
    bad = torch.zeros(2, V, dtype=torch.bool)
    bad[1, 7], bad[0, 3] = True, True
    for got, whole in zip(label_results(place, x, t), clean, strict=True):
        assert got[bad].isnan().all()
        torch.testing.assert_close(got[~bad], whole[~bad], rtol=1e-6, atol=0)


def test_fp16_gradients_of_labels_see_a_loss_scale_before_they_are_rounded(place):
    x = torch.linspace(-6.0, 6.0, 3 * V, device=place.device).view(3, V).half().requires_grad_()
    ids = torch.tensor([0, V - 1, -100], device=place.device)
    subject, scale = Subject("labels", place), 65536.0 / 1e5
    got = subject.grad(subject.loss(x, ids) / 1e5 * 65536.0, x)
    want = subject.wanted(x, ids)[1] * scale
    normal = want.abs() > 2.0**-14
    assert normal.sum() > 20
    torch.testing.assert_close(got.double()[normal], want[normal], rtol=2.0**-10, atol=0)


def test_labels_need_not_be_probabilities(place):
    """Beyond 0 and 1 the formula goes on, as torch's."""
    x = torch.linspace(-9.0, 9.0, 3 * V).view(3, V)
    t = torch.linspace(-2.0, 3.0, 3 * V).flip(0).view(3, V)
    wide = x.double().requires_grad_()
    want = F.binary_cross_entropy_with_logits(wide, t.double(), reduction="none")
    loss, *grads = label_results(place, x, t)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=1e-5)
    (want,) = torch.autograd.grad(want.sum(), wide)
    for g in grads:
        torch.testing.assert_close(g.double(), want, rtol=1e-5, atol=1e-6)


# --- beyond 2^31 elements


def far_apart(shape, strides, dtype, device):
    """Pages that are never touched take no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    assert reach > 2**31
    return torch.empty(reach, dtype=dtype, device=device).as_strided(shape, strides)


@pytest.mark.slow
@pytest.mark.parametrize("strides", [(1_200_000_000, 1), (1, 60_000_000)], ids=["rows", "classes"])
@pytest.mark.parametrize("any_subject", subjects(["logits", "statistics", "head", "labels"]))
def test_addresses_beyond_two_to_the_31_elements(any_subject, strides):
    x, target = given(any_subject, 3, dtype=torch.float16)
    far = far_apart((3, V), strides, torch.float16, x.device)
    far.copy_(x)
    far.requires_grad_()
    for reduction in ("none", "mean"):
        check_call(any_subject, far, target, reduction=reduction)


# --- over ranks: the same tests, of shards of the classes


# the first rank has one block
SHARDED = [
    Subject(name, Place("torch", "cpu"), cut=WIDTH / V)
    for name in ("logits", "head", "in place", "statistics", "head statistics")
]
# of kernels, of values on one device, or refused with a shard
NOT_OVER_RANKS = (
    test_minus_infinity_over_blocks_of_every_width,
    test_softcap_counts_no_lanes_past_the_end,
    test_a_target_out_of_range_raises_on_the_cpu,
    test_a_bad_target_that_cannot_be_checked_makes_its_row_nan,
    test_a_double_backward_is_right_or_raises,
    test_logits_used_around_the_loss_are_right_or_raise,
    test_torch_func_is_right,
    test_torch_func_of_an_implementation_by_name_is_refused,
    test_one_class_costs_nothing,
    test_no_class_is_refused,
    test_addresses_beyond_two_to_the_31_elements,
)


def subject_of(test):
    """The name of the argument that is a subject of any kind, if there is one."""
    return next(
        (n for n in inspect.signature(test).parameters if n in ("subject", "any_subject")), None
    )


OVER_RANKS = [
    test
    for name, test in list(globals().items())
    if name.startswith("test_") and test not in NOT_OVER_RANKS and subject_of(test)
]


def arguments_of(test, every):
    """Of each case of a parametrized test but its subject; all of them, or those of a default
    run."""
    names, values = [], []
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names.append(mark.args[0])
            slow = [
                value
                for value in mark.args[1]
                if any(m.name == "slow" for m in getattr(value, "marks", ()))
            ]
            values.append(
                [
                    getattr(value, "values", (value,))[0]
                    for value in mark.args[1]
                    if every or value not in slow
                ]
            )
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]


def holds_over_ranks(case):
    test, at, every = case
    test = globals()[test]
    for named in arguments_of(test, every):
        test(**{subject_of(test): SHARDED[at]}, **named)


def promises_over_ranks(*, every):
    """Cases for two ranks: by default logits and a head."""
    return [
        (test.__name__, at, every)
        for test in OVER_RANKS
        for at in range(len(SHARDED) if every else 2)
    ]


@pytest.mark.slow
def test_every_promise_over_ranks():
    cases_on_ranks(2, holds_over_ranks, promises_over_ranks(every=True), timeout=5000.0)
