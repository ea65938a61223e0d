"""Where peers are wrong in silence: each promise by name, for every function of ours that can be
given those logits, and every place."""

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
# in the interpreter, where a call takes a third of a second, the function with most kernels: to
# losses, gradients, and both at once
INTERPRETED = ("in place", "labels")


def subjects(names):
    made = []
    for name, place in itertools.product(names, PLACES):
        # a fused head picks its implementation itself, and the definition of statistics is that of
        # logits
        if name == "fused head" and place.impl != "torch":
            continue
        interpreted = (place.impl, place.device) == ("triton", "cpu")
        slow = (
            name not in INTERPRETED
            if interpreted
            else place.impl == "reference" and "statistics" in name
        )
        marks = [pytest.mark.gpu] if place.device != "cpu" else [pytest.mark.slow] if slow else []
        made.append(pytest.param(Subject(name, place), marks=marks, id=f"{name}-{place}"))
    return made


OF_CLASSES = [name for name in FUNCTIONS if not name.startswith("labels")]
UNFUSED = [name for name in OF_CLASSES if name != "fused head"]


@pytest.fixture(params=subjects(OF_CLASSES))
def subject(request):
    return request.param


@pytest.fixture(params=subjects(FUNCTIONS))
def any_subject(request):
    return request.param


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Kernels whose rows are of several blocks at a size that the interpreter can do."""
    if not TRITON_INSTALLED:
        return
    from lossfuse.kernels import soft_target_rows, softmax_rows

    for module in (softmax_rows, soft_target_rows):
        monkeypatch.setattr(module, "row_blocks", lambda v: launch.LaunchConfig(WIDTH, 1))


def extreme(*values):
    """The first and the last by default."""
    return [values[0], *(pytest.param(v, marks=pytest.mark.slow) for v in values[1:-1]), values[-1]]


def given(subject, n=N, v=V, dtype=torch.float32, **how):
    x, target = logits_and_ids(n, v, dtype, subject.place.device, **how)
    return x.detach(), target


def check(subject, x, target, weight=None, *, bias=None, terms=0.0, **options):
    """Losses and gradients, each entry relative to itself."""
    logits = x if bias is None else x + bias
    want_rows, want_slopes = program.value_and_grads(
        logits, target, weight, torch.ones(len(x), device=x.device), reduction="none", **options
    )
    got = subject.results(x, target, weight, bias=bias, **options)
    assert_loss_close(got.rows, want_rows)
    assert_loss_close(got.total, want_rows.sum())
    for slopes in (got.slopes, got.total_slopes):
        assert_gradient_close(slopes, want_slopes.cpu(), terms=terms)
    return got


# --- numbers


@pytest.mark.parametrize("offset", extreme(1e3, 1e4, -1e4, 1e6, -(2.0**24), 2.0**24))
def test_a_common_offset_cancels(subject, offset):
    """Multiples of 2 below 32, so that every sum is exact in fp32."""
    x, target = given(subject)
    x = (x / 2).round() * 2
    for options in subject.some({}, {"label_smoothing": 0.1}):
        here, there = (subject.results(z, target, **options) for z in (x, x + offset))
        torch.testing.assert_close(there.rows, here.rows, rtol=1e-6, atol=0)
        torch.testing.assert_close(there.total, here.total, rtol=1e-6, atol=0)
        torch.testing.assert_close(there[1::2], here[1::2], rtol=1e-5, atol=1e-12)
    if not subject.interpreted:
        soft = probabilities(N, V, device=subject.place.device).detach()
        here, there = (subject.results(z, soft) for z in (x, x + offset))
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("offset", extreme(-1e4, 1e4, 1e6, 2.0**24))
def test_a_z_loss_keeps_its_slope_at_an_offset(subject, offset):
    """A probability formed as exp(x - lse) has as many digits as are left of x."""
    x, target = given(subject)
    check(
        subject,
        (x / 2).round() * 2 + offset,
        target,
        lse_square_scale=1e-6,
        terms=1.0 + 2e-6 * abs(offset),
    )


@pytest.mark.parametrize("margin", extreme(5.0, 10.0, 17.0, 25.0, 40.0, 20.0))
def test_a_confident_target_keeps_its_digits(subject, margin):
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
        for slopes in (got.slopes, got.total_slopes):
            assert slopes[torch.arange(3), ids.cpu()].tolist() == pytest.approx(
                [-others / (1 + others)] * 3, rel=1e-5
            )
            assert slopes[0, 1].item() == pytest.approx(math.exp(-margin) / (1 + others), rel=1e-5)


@pytest.mark.parametrize("margin", extreme(50.0, 90.0, 200.0, 5000.0))
def test_a_hopeless_target(subject, margin):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "width",
    sorted({2048, *(c.block_v for table in launch.FUSED_TABLES.values() for c in table.slices)}),
)
@pytest.mark.parametrize("subject", subjects(UNFUSED))
def test_minus_infinity_over_blocks_of_every_width(subject, width):
    """As tables have them, and beyond the end of what a block holds."""
    v = width + 300
    x, _ = given(subject, 2, v)
    for where in (slice(0, width), slice(width, None)):
        bias, left = switched_off(v, where, subject.place.device)
        check(subject, x, left[torch.tensor([0, -1])], bias=bias)


def test_a_target_of_minus_infinity_costs_infinity(subject):
    x, target = given(subject, ignored=0.0)
    bias, _ = switched_off(V, target[1], subject.place.device)
    got = subject.results(x, target, bias=bias)
    hopeless = (target == target[1]).cpu()
    assert (
        (got.rows[hopeless] == INF).all()
        and got.rows[~hopeless].isfinite().all()
        and got.total == INF
    )
    for slopes in (got.slopes, got.total_slopes):
        assert (slopes[hopeless, target[1].cpu()] == -1.0).all() and slopes.isfinite().all()


def test_rows_of_no_finite_logit_are_nan(subject):
    x, target = given(subject, ignored=0.0)
    bias, _ = switched_off(V, slice(None), subject.place.device)
    got = subject.results(x, target, bias=bias)
    assert got.rows.isnan().all() and got.total.isnan()
    assert got.slopes.isnan().any(1).all() and got.total_slopes.isnan().any(1).all()


@pytest.mark.parametrize("poison", extreme(NAN, INF))
def test_an_undefined_row_is_nan_and_stays_alone(subject, poison):
    """All of its gradient is, wherever the number stands that is none."""
    x, target = given(subject, ignored=0.0)
    clean = subject.results(x, target)
    x[1], x[2, target[2]], x[3, (target[3] + 1) % V] = poison, poison, poison
    got, bad, others = subject.results(x, target), torch.tensor([1, 2, 3]), torch.tensor([0, 4])
    assert got.rows[bad].isnan().all() and got.total.isnan()
    torch.testing.assert_close(got.rows[others], clean.rows[others], rtol=1e-6, atol=0)
    for slopes, whole in ((got.slopes, clean.slopes), (got.total_slopes, clean.total_slopes)):
        assert slopes[bad].isnan().all()
        torch.testing.assert_close(slopes[others], whole[others], rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", extreme(NAN, -INF, INF))
def test_ignored_rows_may_hold_anything(subject, poison):
    x, target = given(subject, ignored=0.0)
    target[1], target[3] = -100, -100
    weight = class_weight(V, subject.place.device)
    dirty = x.clone()
    dirty[1], dirty[3, 20] = poison, poison
    for options in subject.some(
        {"label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 9.0, "weight": weight}, {}
    ):
        clean, got = (
            subject.results(x, target, **options),
            subject.results(dirty, target, **options),
        )
        torch.testing.assert_close(got, clean, rtol=1e-6, atol=0)
        assert (
            got.rows[[1, 3]].tolist() == [0.0, 0.0]
            and not got.slopes[[1, 3]].any()
            and not got.total_slopes[[1, 3]].any()
        )
        # a mean is over the others
        leaf = dirty.requires_grad_()
        loss = subject.loss(leaf, target, **options)
        count = 3 if "weight" not in options else weight[target[[0, 2, 4]]].sum().cpu()
        torch.testing.assert_close(loss.detach().cpu(), got.total / count, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            subject.grad(loss, leaf).cpu(), got.slopes / count, rtol=1e-5, atol=1e-12
        )


def test_all_ignored(subject):
    x, target = given(subject)
    x.requires_grad_()
    weight = class_weight(V, subject.place.device)
    nobody = torch.full_like(target, -100)
    cases = (
        ({}, NAN),
        ({"reduction": "sum"}, 0.0),
        ({"reduction": "none"}, 0.0),
        ({"normalizer": 3.0}, 0.0),
        ({"weight": weight}, NAN),
        ({"label_smoothing": 0.1}, NAN),
        ({"lse_square_scale": 0.1, "reduction": "sum"}, 0.0),
    )
    for options, want in subject.some(*cases):
        loss = subject.loss(x, nobody, **options)
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


@pytest.mark.parametrize("poison", extreme(NAN, INF))
def test_the_weight_of_a_class_that_is_no_target_may_be_anything(subject, poison):
    """0 * NaN is no way to leave it out."""
    x, target = given(subject, ignored=0.0)
    target[1] = -100
    weight = class_weight(V, subject.place.device)
    nobody = torch.tensor([c for c in range(V) if c not in target.tolist()][:1], device=x.device)
    for options in subject.some({"lse_square_scale": 0.1, "softcap": 9.0}, {}):
        clean, got = (
            subject.results(x, target, weight.index_fill(0, nobody, w), **options)
            for w in (1.0, poison)
        )
        torch.testing.assert_close(got, clean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("head_subject", subjects(["head", "head statistics"]))
def test_nor_is_it_in_the_unit_of_fp16_products(head_subject, poison, monkeypatch):
    """As on a GPU, where products take float16 and the gradient of the logits is brought into its
    range."""
    monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
    x, target = given(head_subject, dtype=torch.float16, ignored=0.0)
    weight = class_weight(V, head_subject.place.device)
    nobody = torch.tensor([c for c in range(V) if c not in target.tolist()][:1], device=x.device)
    clean, got = (
        head_subject.results(x, target, weight.index_fill(0, nobody, w)) for w in (0.0, poison)
    )
    torch.testing.assert_close(got, clean, rtol=2.0**-9, atol=2.0**-24)


def test_all_logits_far_below_zero(subject):
    """A maximum that starts at 0 leaves exp(-200) of them."""
    x, target = given(subject)
    check(subject, x - 200.0, target)
    equal = check(subject, torch.full_like(x, -3.5), target.clamp(min=0))
    assert equal.rows.tolist() == pytest.approx([math.log(V)] * N, rel=1e-6)


@pytest.mark.usefixtures("narrow_blocks")
def test_softcap_leaves_the_lanes_past_the_end_alone(subject):
    """Capped, they would count as classes of logit -softcap."""
    for v, softcap in subject.some((33, 2.0), (33, 30.0), (WIDTH + 1, 2.0), (V, 2.0)):
        x, target = given(subject, 3, v, spread=0.5)
        check(subject, x, target, softcap=softcap)


def test_softcap_tails_and_centre_keep_their_slope(subject):
    """1 - tanh^2 has no digits left at 10 caps, not even in fp64, and (1 - t) / (1 + t) none near
    0."""
    if subject.place.impl == "reference":
        pytest.skip("torch's derivative of tanh, which is what it is")
    x = (
        torch.tensor(
            [[-300.0, -100.0, -30.0, -3.0, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 3.0, 30.0, 100.0]]
        )
        .expand(3, 12)
        .contiguous()
    )
    target, u = torch.tensor([0, 5, 11]), x.double() / 10.0
    got = subject.results(x.to(subject.place.device), target.to(subject.place.device), softcap=10.0)
    want = program.value_and_grads(10.0 * torch.tanh(u), target, reduction="none")
    assert_loss_close(got.rows, want[0])
    for slopes in (got.slopes, got.total_slopes):
        assert_gradient_close(slopes, want[1] / torch.cosh(u) ** 2)


@pytest.mark.parametrize("scale", extreme(0.0, 1e-3, 50.0, -2.0))
def test_scales_of_any_sign(subject, scale):
    if subject.name == "fused head" and scale == 0.0:
        pytest.skip("not recorded: the logits are made, as the model would have")
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
    # heads round each product to its operands' dtype on a GPU, in a unit that knows the factor of
    # the forward alone
    x = (x * 3).requires_grad_()
    loss = subject.loss(x, target, normalizer=4096.0)
    got = subject.grad(loss * 65536.0, x)
    want = program.value_and_grads(x, target, normalizer=4096.0)[1] * 65536.0
    normal = want.abs() > 2.0**-14
    assert normal.sum() > 20
    torch.testing.assert_close(
        got.double()[normal], want[normal], rtol=2.0**-9 if subject.is_head else 2.0**-10, atol=0.0
    )


def test_the_loss_of_bf16_logits_is_float32(subject):
    x, target = given(subject, 4, dtype=torch.bfloat16)
    for reduction in ("none", "mean", "sum"):
        loss = subject.loss(x, target, reduction=reduction)
        want = program.cross_entropy(x.double(), target, reduction=reduction)
        assert loss.dtype == torch.float32 and not torch.equal(loss, loss.bfloat16().float())
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", extreme(3, 1, 2, 5, 16, 100, 300))
@pytest.mark.parametrize("head_subject", subjects(["head", "head statistics"]))
def test_a_loss_of_many_chunks_is_as_exact_as_of_one(head_subject, rows):
    """A sum in bf16 is off by 0.2 to 14 % over 300 of them."""
    x, target = given(head_subject, 30 if head_subject.interpreted else 300, dtype=torch.bfloat16)
    chunks = lossfuse.LinearOptions(chunk_bytes=rows * 48 * 4)
    for reduction in ("mean", "sum"):
        loss = head_subject.loss(x, target, reduction=reduction, options=chunks)
        torch.testing.assert_close(
            loss.double(),
            program.cross_entropy(x.double(), target, reduction=reduction),
            rtol=1e-6,
            atol=0,
        )


def test_smoothing_leaves_ignored_rows_out_and_weighs_every_class(subject):
    """Local sums of a slice of the classes, and weights of ignored rows, are what goes wrong
    elsewhere."""
    x, target = given(subject)
    target[1] = -100
    weight = class_weight(V, subject.place.device).index_fill(
        0, torch.tensor([3], device=subject.place.device), 0.0
    )
    for smoothing in subject.some(0.1, 1.0):
        check(subject, x, target, weight, label_smoothing=smoothing, terms=1.0)
        leaf = x.requires_grad_()
        loss = subject.loss(leaf, target, weight, label_smoothing=smoothing)
        want = program.value_and_grads(leaf, target, weight, label_smoothing=smoothing)
        assert_loss_close(loss, want[0])
        assert_gradient_close(subject.grad(loss, leaf), want[1], terms=1.0)


def test_probabilities_need_not_be_probabilities(subject):
    """Rows whose sum is not 1, or 0, and negative entries: the sum of q * (lse - x), whatever q
    is."""
    x, _ = given(subject)
    soft = probabilities(N, V, device=subject.place.device).detach()
    soft[0] *= 3.0
    soft[1] = 0.0
    soft[2, 5] = -0.7
    soft[3] = -soft[3]
    for options in subject.some(
        {"label_smoothing": 0.1, "weight": class_weight(V, subject.place.device)}, {}
    ):
        check(subject, x, soft, terms=10.0, **options)


def test_classes_of_no_probability_and_no_logit_are_left_out(subject):
    """torch makes this NaN (0 * -inf); a mass of 0 is no loss."""
    x, _ = given(subject)
    bias, left = switched_off(V, slice(7, 20), subject.place.device)
    soft = probabilities(N, V, device=subject.place.device).detach()
    soft[:, 7:20] = 0.0
    got = subject.results(x, soft, bias=bias)
    want = program.value_and_grads(
        x[:, left], soft[:, left], dloss=torch.ones(N, device=x.device), reduction="none"
    )
    assert_loss_close(got.rows, want[0])
    for slopes in (got.slopes, got.total_slopes):
        assert not slopes[:, 7:20].any()
        assert_gradient_close(slopes[:, left.cpu()], want[1].cpu(), terms=5.0)
    leaf = soft.requires_grad_()
    slopes = subject.grad(subject.loss(x, leaf, bias=bias), leaf)
    assert not slopes[:, 7:20].any() and slopes.isfinite().all()


@pytest.mark.parametrize("bad", [0, -1, INF, NAN])
def test_a_normalizer_that_is_no_divisor_is_refused(subject, bad):
    x, target = given(subject)
    with pytest.raises(ValueError, match=f"normalizer is {bad} but must be (positive|finite)"):
        subject.loss(x, target, normalizer=bad)


def test_a_normalizer_that_nobody_looks_at_is_divided_by(subject):
    """As torch divides by a tensor: no finite number comes of 0 or NaN."""
    x, target = given(subject, ignored=0.0)
    target[1] = -100
    x.requires_grad_()
    for value, want in subject.some((0.0, INF), (INF, 0.0), (NAN, NAN)):
        loss = subject.loss(x, target, normalizer=torch.tensor(value, device=subject.place.device))
        torch.testing.assert_close(loss.item(), want, equal_nan=True)
        slopes = subject.grad(loss, x)
        assert not slopes[1].any()
        assert (
            not slopes[[0, 2, 3, 4]].any()
            if value == INF
            else not slopes[[0, 2, 3, 4]].isfinite().any()
        )


# --- targets


@pytest.mark.parametrize("bad", extreme(V, V + 5, -5, 2**40))
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_out_of_range_raises_on_the_cpu(any_subject, bad, reduction):
    x, target = given(any_subject, ignored=0.0)
    x.requires_grad_()
    target[1], target[3], target[4] = -100, bad, bad
    if any_subject.place.device != "cpu":
        with lossfuse.debug_targets(), pytest.raises(IndexError, match="target of row 3"):
            any_subject.loss(x, target, reduction=reduction)
        return
    with pytest.raises(
        IndexError,
        match=rf"target of row 3 is {bad} but input has {V} classes; .* or ignore_index=-100",
    ):
        any_subject.loss(x, target, reduction=reduction)


@pytest.mark.parametrize(
    "dtype", extreme(torch.int32, torch.int16, torch.int8, torch.uint8), ids=str
)
def test_ids_of_any_width(subject, dtype):
    """And what is out of range in theirs: -100 is 156 in uint8, which is no row to ignore."""
    x, target = given(subject, ignored=0.0)
    torch.testing.assert_close(
        subject.results(x, target.to(dtype)), subject.results(x, target), rtol=0, atol=0
    )
    target[2] = 156 if dtype == torch.uint8 else -100
    narrow = target.to(dtype)
    assert narrow[2] == target[2]
    if dtype != torch.uint8:
        torch.testing.assert_close(
            subject.results(x, narrow), subject.results(x, target), rtol=0, atol=0
        )
    elif subject.place.device == "cpu":
        with pytest.raises(IndexError, match="target of row 2 is 156"):
            subject.loss(x, narrow)
    # beyond the width itself, whatever the ids are in
    torch.testing.assert_close(
        subject.loss(x, target, ignore_index=156 if dtype == torch.uint8 else -100),
        subject.loss(x, narrow, ignore_index=156 if dtype == torch.uint8 else -100),
    )


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("bad", extreme(V, V + 5, -5, 2**40))
def test_where_nobody_looks_a_bad_target_makes_its_row_nan(any_subject, bad, monkeypatch):
    """As on a GPU: nothing beside the row is read or written, and no class past the end is a
    target."""
    monkeypatch.setattr(targets, "values_are_readable", lambda t: False)
    x, target = given(any_subject, ignored=0.0)
    clean = any_subject.results(x, target)
    target[1], target[3] = bad, -100
    got, others = any_subject.results(x, target), torch.tensor([0, 2, 4])
    assert got.rows[1].isnan().all() and got.total.isnan()
    torch.testing.assert_close(got.rows[others], clean.rows[others], rtol=1e-6, atol=0)
    for slopes, whole in ((got.slopes, clean.slopes), (got.total_slopes, clean.total_slopes)):
        assert slopes[1].isnan().all()
        torch.testing.assert_close(slopes[others], whole[others], rtol=1e-6, atol=0)


# --- autograd


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_second_backward_is_the_first_or_raises(any_subject, reduction, factor):
    """In place scaling of a saved gradient makes the second one wrong as soon as grad_output is not
    1."""
    x, target = given(any_subject)
    x.requires_grad_()
    loss = any_subject.loss(x, target, reduction=reduction)
    dloss = torch.full_like(loss, factor)
    first = any_subject.grad(loss, x, dloss, retain_graph=True)
    kept = first.clone()
    assert_gradient_close(first, any_subject.wanted(x, target, dloss=dloss, reduction=reduction)[1])
    # gradients of a head are handed over; its statistics make the logits again
    handed_over = (
        any_subject.name in ("head", "fused head")
        and reduction == "mean"
        and any_subject.place.impl != "reference"
    )
    for again in (factor, 3.0 * factor):
        if any_subject.consumes or handed_over:
            with pytest.raises(RuntimeError, match="a second backward"):
                any_subject.grad(loss, x, torch.full_like(loss, again), retain_graph=True)
        else:
            second = any_subject.grad(loss, x, torch.full_like(loss, again), retain_graph=True)
            torch.testing.assert_close(second, kept * (again / factor), rtol=1e-6, atol=1e-12)
    # what was handed over is the caller's
    assert torch.equal(first, kept)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_double_backward_is_right_or_raises(any_subject, reduction):
    """Peers return a gradient without a graph, or a wrong second derivative."""
    x, target = given(any_subject)
    x.requires_grad_()
    loss = any_subject.loss(x, target, reduction=reduction)
    if any_subject.consumes or (any_subject.is_head and any_subject.place.impl != "reference"):
        with pytest.raises(RuntimeError, match="create_graph"):
            any_subject.grad(loss.sum(), x, create_graph=True)
        return
    slopes = any_subject.grad(loss.sum(), x, create_graph=True)
    assert slopes.requires_grad
    wide = x.detach().double().requires_grad_()
    want = Subject(any_subject.name, Place("reference", any_subject.place.device)).loss(
        wide, target, reduction=reduction
    )
    (want_slopes,) = torch.autograd.grad(want.sum(), wide, create_graph=True)
    got, want = (
        torch.autograd.grad((s**2).sum(), leaf)[0] for s, leaf in ((slopes, x), (want_slopes, wide))
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


UPSTREAM = {
    "one number for all": lambda shape: torch.tensor(0.3).expand(shape),
    "every other": lambda shape: torch.linspace(-1.0, 2.0, 2 * math.prod(shape)).view(
        *shape[:-1], -1
    )[..., ::2],
    "reversed": lambda shape: torch.linspace(-1.0, 2.0, math.prod(shape)).view(shape).flip(0),
    "transposed": lambda shape: (
        torch.linspace(-1.0, 2.0, math.prod(shape))
        .view(shape[::-1])
        .permute(*reversed(range(len(shape))))
    ),
}


@pytest.mark.parametrize("name", extreme(*UPSTREAM))
def test_what_comes_from_above_may_have_any_stride_and_is_not_written(any_subject, name):
    x, target = given(any_subject)
    x.requires_grad_()
    loss = any_subject.loss(x, target, reduction="none")
    # a move would make it dense
    with torch.device(x.device):
        dloss = UPSTREAM[name](loss.shape)
    before, version = dloss.clone(), dloss._version
    got = any_subject.grad(loss, x, dloss)
    assert torch.equal(dloss, before) and dloss._version == version
    assert_gradient_close(got, any_subject.wanted(x, target, dloss=dloss, reduction="none")[1])


@pytest.mark.parametrize("value", extreme(-0.5, 0.0, 2.0, 1e-30, 65536.0))
def test_any_factor_from_above(any_subject, value):
    x, target = given(any_subject)
    x.requires_grad_()
    dloss = torch.tensor(value, device=x.device)
    got = any_subject.grad(any_subject.loss(x, target), x, dloss)
    want = any_subject.wanted(x, target)[1] * value
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-37)
    assert dloss == value


def test_logits_used_around_the_loss_are_right_or_raise(any_subject):
    """A peer that overwrites logits corrupts what was made of them before, and after, without a
    word."""
    x, target = given(any_subject)
    leaf = x.requires_grad_()

    def total(subject, leaf):
        z = leaf * 2.0
        before = z.exp().sum()
        loss = subject.loss(z, target)
        return before * 1e-3 + loss + (z**2).sum() * 1e-3

    got = any_subject.grad(total(any_subject, leaf), leaf)
    reference = Subject(any_subject.name, Place("reference", any_subject.place.device))
    wide = x.detach().double().requires_grad_()
    torch.testing.assert_close(
        got.double(), reference.grad(total(reference, wide), wide), rtol=1e-5, atol=1e-6
    )


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


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", ["labels", "logits"])
def test_logits_that_were_consumed_raise(fast_place, name, reduction):
    """Read afterwards, saved before, differentiated again: nothing that is stale is a number."""
    subject = Subject(name, fast_place)
    x, target = given(subject)
    leaf = x.requires_grad_()
    z = leaf * 1.0
    saver = (z * z).sum()
    loss = subject.loss(z, target, reduction=reduction, inplace=True).sum()
    if reduction == "none":
        # these are written in the backward
        assert torch.equal(z, leaf)
    loss.backward(retain_graph=True)
    for read in (
        torch.argmax,
        torch.clone,
        lambda z: subject.loss(z, target),
        lambda z: z.data,
        lambda z: z.add_(1.0),
    ):
        with pytest.raises(RuntimeError, match="consumed by a loss of lossfuse"):
            read(z)
    with pytest.raises(RuntimeError, match="a second backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saver.backward()
    want = subject.wanted(leaf, target, reduction=reduction)[1]
    torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["labels", "logits"])
def test_leaves_and_shared_elements_are_never_consumed(fast_place, name):
    subject = Subject(name, fast_place)
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
@pytest.mark.parametrize("name", ["labels", "logits"])
def test_without_a_gradient_nothing_is_written(place, name, inplace):
    """Peers overwrite rows of a leaf in evaluation, or return 0."""
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


@pytest.mark.parametrize(
    "any_subject",
    [Subject(name, Place("auto", "cpu")) for name in FUNCTIONS if name != "fused head"],
    ids=str,
)
def test_torch_func_is_right(any_subject):
    """What "auto" takes there is the reference."""
    x, target = given(any_subject)
    reference = Subject(any_subject.name, Place("reference", any_subject.place.device))
    leaf = x.clone().requires_grad_()
    want = reference.grad(reference.loss(leaf, target), leaf)
    held = x.clone()
    torch.testing.assert_close(torch.func.grad(any_subject.loss)(held, target), want)
    assert torch.equal(held, x)
    many, ids = torch.stack([x, 2 * x]), torch.stack([target, target])
    got = torch.func.vmap(any_subject.loss)(many, ids)
    torch.testing.assert_close(got, torch.stack([reference.loss(z, target) for z in many]))
    got = torch.func.vmap(torch.func.grad(any_subject.loss))(many, ids)
    torch.testing.assert_close(got[0], want)
    tangent = torch.ones_like(x)
    tangent[0] = 2.0
    tangent[:, 3] = 0.0
    _, slope = torch.func.jvp(lambda z: any_subject.loss(z, target), (x,), (tangent,))
    torch.testing.assert_close(slope, (want * tangent).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "any_subject", subjects([name for name in FUNCTIONS if name != "fused head"])
)
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


@pytest.mark.parametrize("name", extreme(*LAYOUTS))
def test_any_layout(any_subject, name):
    # a move would make most of them dense
    with torch.device(any_subject.place.device):
        x = LAYOUTS[name]()
    _, target = given(any_subject)
    buffer = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0)
    before = buffer.clone()
    x.requires_grad_()
    for reduction in ("none", "mean"):
        loss = any_subject.loss(x, target, reduction=reduction)
        want = any_subject.wanted(x, target, reduction=reduction)
        assert_loss_close(loss.detach(), want[0])
        assert_gradient_close(any_subject.grad(loss, x, torch.ones_like(loss)), want[1])
    assert torch.equal(buffer, before)


def test_no_rows(any_subject):
    x, target = given(any_subject)
    x = x[:0].requires_grad_()
    for reduction, want in (("none", None), ("mean", NAN), ("sum", 0.0)):
        loss = any_subject.loss(x, target[:0], reduction=reduction)
        if want is None:
            assert loss.numel() == 0 and len(loss) == 0
        else:
            torch.testing.assert_close(loss.item(), want, equal_nan=True)
        assert any_subject.grad(loss.sum(), x).shape == (0, V)
    if not any_subject.is_labels:
        soft = torch.empty(0, V, device=x.device)
        assert (
            any_subject.loss(x, soft).isnan() and any_subject.loss(x, soft, reduction="sum") == 0.0
        )
        assert any_subject.loss(x, target[:0], normalizer=3) == 0.0


def test_one_class_costs_nothing(subject):
    x = torch.tensor([[3.0], [-2.0]], device=subject.place.device)
    for target in (torch.tensor([0, -100], device=x.device), torch.ones(2, 1, device=x.device)):
        got = subject.results(x, target)
        assert (
            got.rows.tolist() == [0.0, 0.0]
            and got.total == 0.0
            and not got.slopes.any()
            and not got.total_slopes.any()
        )


@pytest.mark.parametrize("subject", subjects(UNFUSED))
def test_no_class_is_refused(subject):
    with pytest.raises(
        ValueError, match=r"classes and must not be empty|expected at least one class"
    ):
        subject.loss(
            torch.empty(3, 0, device=subject.place.device),
            torch.zeros(3, dtype=torch.int64, device=subject.place.device),
        )


# --- heads

WANTED = [
    ("hidden",),
    ("weight",),
    ("bias",),
    ("hidden", "weight"),
    ("weight", "bias"),
    ("hidden", "weight", "bias"),
]


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@pytest.mark.parametrize(
    "form", [lossfuse.linear_cross_entropy, lossfuse.linear_cross_entropy_stats]
)
def test_who_asks_for_a_gradient_gets_it(thrifty_place, form, wanted):
    """A peer forgets the weight's where hidden states are frozen."""
    g = torch.Generator().manual_seed(0)
    operands = {
        "hidden": torch.randn(N, 6, generator=g),
        "weight": torch.randn(V, 6, generator=g),
        "bias": torch.randn(V, generator=g),
    }
    place = thrifty_place
    operands = {
        name: t.to(place.device).requires_grad_(name in wanted) for name, t in operands.items()
    }
    target = torch.tensor([0, V - 1, -100, 7, 7], device=place.device)
    for reduction in ("none", "mean"):
        loss = form(
            operands["hidden"],
            operands["weight"],
            target,
            linear_bias=operands["bias"],
            reduction=reduction,
            options=two_rows(V),
            impl=place.impl,
        )
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        want = program.head_value_and_grads(list(operands.values()), target, reduction=reduction)
        assert_loss_close(loss.detach(), want[0])
        loss.sum().backward()
        slopes = iter(want[1:])
        for name, t in operands.items():
            assert (t.grad is not None) == (name in wanted)
            if t.grad is not None:
                torch.testing.assert_close(t.grad.double(), next(slopes), rtol=1e-5, atol=1e-6)
                t.grad = None


def test_hidden_states_of_no_width(place):
    hidden, weight, bias = (
        t.to(place.device).requires_grad_()
        for t in (torch.empty(N, 0), torch.empty(V, 0), torch.randn(V))
    )
    target = torch.tensor([0, V - 1, -100, 7, 7], device=place.device)
    for form in (lossfuse.linear_cross_entropy, lossfuse.linear_cross_entropy_stats):
        loss = form(hidden, weight, target, linear_bias=bias, impl=place.impl)
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        want = program.head_value_and_grads((hidden, weight, bias), target)
        assert_loss_close(loss.detach(), want[0])
        dhidden, dweight, dbias = torch.autograd.grad(loss, [hidden, weight, bias])
        assert dhidden.shape == (N, 0) and dweight.shape == (V, 0)
        torch.testing.assert_close(dbias.double(), want[3], rtol=1e-5, atol=1e-7)


def test_a_nan_in_a_row_that_counts_is_seen_in_the_gradient_of_the_weight(place):
    """The product carries it to the classes; a gradient without it would be a lie."""
    x, target = logits_and_ids(N, V, device=place.device, ignored=0.0)
    weight = torch.eye(V, device=place.device).requires_grad_()
    hidden = x.detach().clone()
    hidden[2, 1] = NAN
    for reduction in ("none", "mean"):
        loss = lossfuse.linear_cross_entropy(
            hidden, weight, target, reduction=reduction, impl=place.impl
        )
        assert torch.autograd.grad(loss.sum(), weight)[0].isnan().any()


# --- labels


def label_results(place, x, t, **options):
    """Losses, the slopes of their sum, and the slopes of their sum as one number."""
    leaf = x.detach().to(place.device).requires_grad_()
    t = t.to(place.device)
    made = [
        lossfuse.binary_cross_entropy_with_logits(leaf, t, reduction=r, impl=place.impl, **options)
        for r in ("none", "sum")
    ]
    return made[0].detach().cpu(), *(
        torch.autograd.grad(loss.sum(), leaf)[0].cpu() for loss in made
    )


def test_labels_of_logits_as_large_as_fp16_has_them(place):
    x = torch.tensor([[65504.0, -65504.0, 65504.0, -65504.0, 0.0]], dtype=torch.float16)
    for t in (torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]]), torch.tensor([[0, 1, 4]])):
        loss, *slopes = label_results(place, x, t)
        torch.testing.assert_close(
            loss, torch.tensor([[0.0, 65504.0, 65504.0, 0.0, math.log(2.0)]])
        )
        for s in slopes:
            assert s.tolist() == [[0.0, -1.0, 1.0, 0.0, -0.5]]


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
    ids = torch.tensor([[0], [V - 1], [-100]], device=place.device)
    (got,) = torch.autograd.grad(
        lossfuse.binary_cross_entropy_with_logits(x, ids, impl=place.impl) / 1e5 * 65536.0, x
    )
    subject = Subject("labels", place)
    want = subject.wanted(x, ids[:, 0])[1] / 1e5 * 65536.0
    normal = want.abs() > 2.0**-14
    assert normal.sum() > 20
    torch.testing.assert_close(got.double()[normal], want[normal], rtol=2.0**-10, atol=0)


def test_labels_need_not_be_probabilities(place):
    """Beyond 0 and 1 the formula goes on, as torch's."""
    x = torch.linspace(-9.0, 9.0, 3 * V).view(3, V)
    t = torch.linspace(-2.0, 3.0, 3 * V).flip(0).view(3, V)
    wide = x.double().requires_grad_()
    want = F.binary_cross_entropy_with_logits(wide, t.double(), reduction="none")
    loss, *slopes = label_results(place, x, t)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=1e-5)
    for s in slopes:
        torch.testing.assert_close(
            s.double(),
            torch.autograd.grad(want.sum(), wide, retain_graph=True)[0],
            rtol=1e-5,
            atol=1e-6,
        )


# --- beyond 2^31 elements


def far_apart(shape, strides, dtype, device):
    """Memory that nobody touches costs nothing."""
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
        loss = any_subject.loss(far, target, reduction=reduction)
        want = any_subject.wanted(x, target, reduction=reduction)
        assert_loss_close(loss.detach(), want[0])
        assert_gradient_close(any_subject.grad(loss, far, torch.ones_like(loss)), want[1])


# --- over ranks: the same tests, of slices of the classes


# of which the first block is one
SHARDED = [
    Subject(name, Place("torch", "cpu"), cut=WIDTH / V)
    for name in ("logits", "head", "in place", "statistics", "head statistics")
]
OF_SHARDS = (
    test_a_common_offset_cancels,
    test_a_confident_target_keeps_its_digits,
    test_a_hopeless_target,
    test_minus_infinity_over_whole_blocks,
    test_a_target_of_minus_infinity_costs_infinity,
    test_rows_of_no_finite_logit_are_nan,
    test_an_undefined_row_is_nan_and_stays_alone,
    test_ignored_rows_may_hold_anything,
    test_all_ignored,
    test_targets_of_no_weight,
    test_all_logits_far_below_zero,
    test_softcap_tails_and_centre_keep_their_slope,
    test_scales_of_any_sign,
    test_logits_as_large_as_fp16_has_them,
    test_fp16_gradients_see_a_loss_scale_before_they_are_rounded,
    test_the_loss_of_bf16_logits_is_float32,
    test_smoothing_leaves_ignored_rows_out_and_weighs_every_class,
    test_probabilities_need_not_be_probabilities,
    test_classes_of_no_probability_and_no_logit_are_left_out,
    test_a_normalizer_that_is_no_divisor_is_refused,
    test_a_normalizer_that_nobody_looks_at_is_divided_by,
    test_ids_of_any_width,
    test_any_layout,
    test_no_rows,
    test_any_factor_from_above,
    test_what_comes_from_above_may_have_any_stride_and_is_not_written,
    test_the_weight_of_a_class_that_is_no_target_may_be_anything,
    test_a_second_backward_is_the_first_or_raises,
    test_a_z_loss_keeps_its_slope_at_an_offset,
    test_without_a_gradient_the_loss_is_the_same,
    test_logits_changed_before_the_backward_raise_or_do_not_matter,
)


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


def kept_over_ranks(case):
    test, at, every = case
    test = globals()[test]
    (name,) = {"subject", "any_subject"} & {*inspect.signature(test).parameters}
    for named in arguments_of(test, every):
        test(**{name: SHARDED[at]}, **named)


def promises_over_ranks(*, every):
    """For two ranks: in a default run what has no other test over slices of logits and of a
    head."""
    return [
        (test.__name__, at, every)
        for test in OF_SHARDS
        for at in range(len(SHARDED) if every else 2)
    ]


@pytest.mark.slow
def test_every_promise_over_ranks():
    cases_on_ranks(2, kept_over_ranks, promises_over_ranks(every=True), timeout=5000.0)
