"""Statistics of rows beside the loss, of logits and of a head, against the torch program in
float64."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import lossfuse
import program
from allocations import Largest
from closeness import assert_formula_close, assert_gradient_close, assert_statistics_close
from compared import gradient_pairs, requiring
from conftest import Place
from lossfuse.backends import threads, torch_rows
from lossfuse.ops import row_stats
from lossfuse.row_types import Upstream, Wants
from lossfuse.spec import LossSpec
from options import (
    DIFFERENTIABLE,
    EVERYTHING,
    THRIFTY_COMBINATIONS,
    differentiated,
    options_of,
    upstreams,
)
from rows import class_weight, logits_and_ids, probabilities
from subjects import operands, two_rows

INF, NAN = float("inf"), float("nan")
LOWEST = torch.finfo(torch.float32).min
FLOATS = ("loss", "lse", "target_logprob", "entropy")
SHIFTED = ("loss", "target_logprob", "entropy")
SOFT = pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
ROWS_OR_MEAN = pytest.mark.parametrize("reduction", ["none", "mean"])


class Form(NamedTuple):
    """The statistics of logits, or of a head whose product is these logits, two rows a chunk."""

    name: str
    place: Place

    def __call__(self, x, target, weight=None, **options):
        options = {"impl": self.place.impl} | options
        if self.name == "logits":
            return lossfuse.cross_entropy_stats(x, target, weight, **options)
        hidden, head = operands(x)
        chunks = two_rows(x.shape[1])
        return lossfuse.linear_cross_entropy_stats(
            hidden, head, target, weight=weight, options=chunks, **options
        )


FORMS = pytest.mark.parametrize("form", ["logits", "head"])


@pytest.fixture(params=["logits", "head"])
def form(request, place):
    return Form(request.param, place)


@pytest.fixture(params=["logits", "head"])
def thrifty_form(request, thrifty_place):
    return Form(request.param, thrifty_place)


@pytest.fixture
def thrifty_logits(thrifty_place):
    return Form("logits", thrifty_place)


def wanted(x, target, weight=None, **options):
    """(statistics, leaves) of the program, in float64 of the same numbers."""
    (x, t, w), leaves = program.wide_leaves(x, target, weight)
    return program.cross_entropy_stats(x, t, w, **options), leaves


def case(form, soft, n, v, dtype=torch.float32, **options):
    """(logits, targets, the leaves among them)."""
    x, target = logits_and_ids(n, v, dtype, form.place.device, **options)
    if not soft:
        return x, target, [x]
    target = probabilities(n, v, dtype, form.place.device)
    return x, target, [x, target]


def check(form, x, target, weight=None, names=DIFFERENTIABLE, **options):
    """Values, and the gradients of a mixture."""
    got = form(x, target, weight, **options)
    want, wide = wanted(x, target, weight, **options)
    assert_statistics_close(got, want)
    leaves = requiring(x, target)
    pairs = gradient_pairs(got, leaves, want, wide, upstreams(got, names))
    for leaf, (g, w) in zip(leaves, pairs, strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        assert_formula_close(g, w)
    return got


class TestFormula:
    """5 rows of 17 classes: less than a block, ragged."""

    @SOFT
    @pytest.mark.parametrize(
        "names", THRIFTY_COMBINATIONS, ids=lambda names: "+".join(names) or "plain"
    )
    def test_every_option_of_logits(self, place, names, soft):
        form = Form("logits", place)
        x, target, _ = case(form, soft, 5, 17)
        weight, options = options_of(names, 17, place.device)
        check(form, x, target, weight, **options)

    @SOFT
    @ROWS_OR_MEAN
    def test_each_statistic_alone_and_in_pairs(self, thrifty_form, reduction, soft):
        x, target, _ = case(thrifty_form, soft, 5, 17)
        weight, options = options_of(EVERYTHING, 17, thrifty_form.place.device)
        pairs = itertools.combinations(DIFFERENTIABLE, 2)
        for names in (*((name,) for name in DIFFERENTIABLE), *pairs):
            check(thrifty_form, x, target, weight, names, **options | {"reduction": reduction})

    @FORMS
    @pytest.mark.parametrize("impl", ["reference", "torch"])
    def test_float64_is_float64(self, impl, form):
        form = Form(form, Place(impl, "cpu"))
        x, _ = logits_and_ids(5, 17, torch.float64)
        target = probabilities(5, 17, torch.float64)
        weight, options = options_of(EVERYTHING, 17, "cpu")
        for reduction in ("mean", "none"):
            given = {"weight": weight.double(), **options, "reduction": reduction}
            got, (want, wide) = form(x, target, **given), wanted(x, target, **given)
            assert all(t.dtype == torch.float64 for t in got[:5])
            torch.testing.assert_close(got[:5], want[:5], rtol=1e-12, atol=1e-13)
            for g, w in gradient_pairs(got, [x, target], want, wide, upstreams(got)):
                torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("only", ["input", "target"])
    def test_one_gradient_alone(self, thrifty_form, only):
        x, target, _ = case(thrifty_form, True, 5, 17)
        x.requires_grad_(only == "input")
        target.requires_grad_(only == "target")
        for reduction in ("none", "mean"):
            check(thrifty_form, x, target, reduction=reduction)

    def test_a_normalizer_that_requires_grad_gets_one(self, thrifty_form):
        x, target, _ = case(thrifty_form, False, 5, 17)
        number = torch.tensor(7.5, device=x.device, requires_grad=True)
        got = thrifty_form(x, target, lse_square_scale=0.1, normalizer=number)
        want, wide = wanted(x, target, lse_square_scale=0.1, normalizer=7.5)
        assert_statistics_close(got, want)
        ups = upstreams(got)
        dx, of_number = differentiated(got, [x, number], ups)
        assert_formula_close(dx, differentiated(want, wide, ups)[0])
        total = ups["loss"] * want.loss + ups["z_loss"] * want.z_loss
        assert_formula_close(of_number, -total / 7.5)

    @pytest.mark.parametrize("ignore_index", [-1, 3])
    def test_ignored_ids(self, thrifty_form, ignore_index):
        """3 is a class too; the argmax of an ignored row is no class and not ignored."""
        x, target, _ = case(thrifty_form, False, 6, 9, ignored=0.0)
        target[::2] = ignore_index
        options = {"ignore_index": ignore_index, "label_smoothing": 0.1, "lse_square_scale": 0.1}
        got = check(thrifty_form, x, target, **options)
        ignored = target == ignore_index
        assert (got.argmax[ignored] == (-2 if ignore_index == -1 else -1)).all()
        assert got.n_valid == (~ignored).sum()
        assert not any(t[ignored].any() for t in (got.lse, got.target_logprob, got.entropy))


class TestNotAskedFor:
    @SOFT
    @ROWS_OR_MEAN
    def test_statistics_not_asked_for_are_none_and_the_others_equal(
        self, thrifty_form, reduction, soft
    ):
        x, target, leaves = case(thrifty_form, soft, 5, 600)
        options = {"reduction": reduction, "lse_square_scale": 0.1, "label_smoothing": 0.1}
        every = thrifty_form(x, target, **options)
        ups = {name: u for name, u in upstreams(every).items() if name != "entropy"}
        want = differentiated(every, leaves, ups)
        for entropy, argmax in ((False, False), (False, True), (True, False)):
            got = thrifty_form(x, target, entropy=entropy, argmax=argmax, **options)
            assert (got.entropy is not None, got.argmax is not None) == (entropy, argmax)
            for g, w in zip(got, every, strict=True):
                if g is not None:
                    torch.testing.assert_close(g, w, rtol=1e-6, atol=0)
            grads = differentiated(got, leaves, ups)
            torch.testing.assert_close(grads, want, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("name", ["entropy", "argmax"])
    def test_anything_but_a_bool_is_refused(self, name):
        with pytest.raises(TypeError, match=f"{name} is 1 but must be True or False"):
            lossfuse.cross_entropy_stats(torch.randn(2, 3), torch.tensor([0, 1]), **{name: 1})

    def test_no_grad_gives_the_same_statistics(self, thrifty_form):
        x, target, _ = case(thrifty_form, False, 5, 600)
        want = thrifty_form(x, target)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = thrifty_form(x.detach(), target)
            assert not any(t.requires_grad for t in got)
            torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-6, atol=1e-6)
        assert not want.argmax.requires_grad and not want.n_valid.requires_grad
        assert all(getattr(want, name).requires_grad for name in FLOATS)


def entropy_terms(x, ups, softcap=None, logit_scale=None, **unused):
    """The two products whose difference the gradient of an entropy is."""
    z = x.detach().double() * (logit_scale or 1.0)
    logp = (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1, keepdim=True)
    return logp.exp() * (entropy - logp) * ups["entropy"].abs()[:, None] * abs(logit_scale or 1.0)


HALF = [torch.bfloat16, torch.float16]
POLICY = {"softcap": 30.0, "logit_scale": 1 / 0.7, "lse_square_scale": 1e-4}


class TestRegimes:
    """Real vocabularies and dtypes; every entry relative to itself."""

    @pytest.mark.parametrize("options", [{}, POLICY], ids=["plain", "temperature and cap"])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("v", [511, 50257, pytest.param(128257, marks=pytest.mark.slow)])
    def test_each_statistic_of_class_ids(self, thrifty_logits, v, dtype, options):
        x, target, _ = case(thrifty_logits, False, 3, v, dtype)
        options = options | {"reduction": "none"}
        got, (want, wide) = thrifty_logits(x, target, **options), wanted(x, target, **options)
        # torch's log_softmax without AVX-512 adds the exponentials up in eight sums
        additions = v / 8 if thrifty_logits.place.impl == "reference" else 0.0
        assert_statistics_close(got, want, additions=additions)
        ups = upstreams(got)
        scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
        z = x.detach().double() * scale
        p = torch.softmax(z if cap is None else cap * torch.tanh(z / cap), 1)
        for names in (*((name,) for name in FLOATS), FLOATS):
            some = {name: ups[name] for name in names}
            ((g, w),) = gradient_pairs(got, [x], want, wide, some)
            terms = entropy_terms(x, ups, **options) if "entropy" in names else 0.0
            if len(names) > 1 or options.get("softcap"):
                terms = terms + 2 * p * sum(u.abs() for u in some.values())[:, None]
            assert_gradient_close(g, w, terms=terms)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_class_probabilities(self, thrifty_logits, dtype):
        x, target, leaves = case(thrifty_logits, True, 3, 32000, dtype)
        got = thrifty_logits(x, target, reduction="none")
        want, wide = wanted(x, target, reduction="none")
        assert_statistics_close(got, want)
        ups = upstreams(got)
        (dx, dt), (wx, wt) = differentiated(got, leaves, ups), differentiated(want, wide, ups)
        q, p = target.detach().double(), torch.softmax(x.detach().double(), 1)
        mass = (q + p * (1 + q.sum(1, keepdim=True))) * sum(u.abs() for u in ups.values())[:, None]
        assert_gradient_close(dx, wx, terms=entropy_terms(x, ups) + mass)
        assert_gradient_close(dt, wt, terms=wt.abs() + 1)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_a_gradient_formed_in_the_forward_and_later_ones(self, thrifty_logits, dtype):
        """The loss alone, the loss and an entropy, the loss again: of one graph."""
        x, target, _ = case(thrifty_logits, False, 4, 5000, dtype)
        got, (want, wide) = thrifty_logits(x, target), wanted(x, target)
        ups = {name: u * 512.0 for name, u in upstreams(got, ("loss", "entropy")).items()}
        p = torch.softmax(x.detach().double(), 1)
        terms = entropy_terms(x, ups) + p * float(ups["loss"].abs())
        for names in (("loss",), ("loss", "entropy"), ("entropy",), ("loss",)):
            some = {name: ups[name] for name in names}
            ((g, w),) = gradient_pairs(got, [x], want, wide, some)
            assert_gradient_close(g, w, terms=terms)


# --- hard rows


@SOFT
@pytest.mark.parametrize(
    "offset",
    [1e4, 2.0**24, *(pytest.param(x, marks=pytest.mark.slow) for x in (-1e4, -(2.0**24)))],
)
def test_a_common_offset_cancels_except_from_the_lse(place, soft, offset):
    """Multiples of 2, so that every sum is exact in fp32."""
    form = Form("logits", place)
    x, target, _ = case(form, soft, 6, 3000)
    x, target = (x.detach() / 2).round() * 2, target.detach()
    results = []
    for logits in (x, x + offset):
        leaf = logits.requires_grad_()
        stats = form(leaf, target, reduction="none")
        (grad,) = differentiated(stats, [leaf], upstreams(stats, FLOATS))
        results.append(([getattr(stats, name) for name in (*SHIFTED, "argmax")], stats.lse, grad))
    (near, lse, grad), (far, far_lse, far_grad) = results
    torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(far_grad, grad, rtol=1e-5, atol=1e-9)
    valid = near[-1] >= 0
    want = lse[valid].double() + offset
    torch.testing.assert_close(far_lse[valid].double(), want, rtol=2.0**-23, atol=0)


@SOFT
@FORMS
@pytest.mark.parametrize("margin", [5.0, 17.0, 40.0])
def test_a_confident_row_stays_accurate(fast_place, form, margin, soft):
    """Below 6e-8, an entropy computed as lse - E[x] is 0 in fp32 or rounding."""
    v = 1000
    ids = torch.tensor([0, 500, v - 1], device=fast_place.device)
    x = torch.zeros(3, v, device=fast_place.device)
    x[torch.arange(3), ids] = margin
    x.requires_grad_()
    target = torch.nn.functional.one_hot(ids, v).float() if soft else ids
    got = Form(form, fast_place)(x, target, reduction="none")
    q = (v - 1) * math.exp(-margin)
    others = q / (1 + q)
    assert got.entropy.tolist() == pytest.approx([math.log1p(q) + others * margin] * 3, rel=1e-5)
    assert got.target_logprob.tolist() == pytest.approx([-math.log1p(q)] * 3, rel=1e-5)
    (grad,) = torch.autograd.grad(got.entropy.sum(), x)
    want = others / (1 + q) * margin
    assert grad[torch.arange(3), ids].tolist() == pytest.approx([-want] * 3, rel=1e-5)
    assert grad[0, 1].item() == pytest.approx(want / (v - 1), rel=1e-5)


def test_a_confident_row_of_another_class_has_an_accurate_entropy_gradient(fast_place):
    x = torch.zeros(1, 1000, device=fast_place.device)
    x[0, 3] = 20.0
    x.requires_grad_()
    target = torch.tensor([5], device=x.device)
    got = Form("logits", fast_place)(x, target, reduction="none").entropy
    want, wide = wanted(x, target, reduction="none")
    torch.testing.assert_close(got.double(), want.entropy, rtol=0, atol=2e-7)
    (g,), (w,) = (
        torch.autograd.grad(t.sum(), leaf) for t, leaf in ((got, x), (want.entropy, wide))
    )
    assert_gradient_close(g, w)


@pytest.mark.parametrize(
    "where", [slice(0, 4096), slice(4096, None), slice(1, None), slice(0, -1)], ids=str
)
def test_minus_infinity_over_whole_blocks(thrifty_fast_place, where):
    x, _ = logits_and_ids(4, 5000, device=thrifty_fast_place.device)
    x = x.detach()
    x[:, where] = -INF
    finite = x[0].isfinite().nonzero()[:, 0]
    target = finite[[0, len(finite) // 2, -1, 0]]
    form, x = Form("logits", thrifty_fast_place), x.requires_grad_()
    for options in ({}, {"softcap": 15.0}, {"logit_scale": 0.5}):
        got = check(form, x, target, **options, reduction="none")
        if "softcap" not in options:
            assert got.entropy.isfinite().all() and (len(finite) > 1 or not got.entropy.any())


def test_a_target_of_minus_infinity_has_a_finite_entropy(place):
    x, target = logits_and_ids(3, 50, device=place.device, ignored=0.0)
    x = x.detach()
    x[1, target[1]] = -INF
    names = ("lse", "target_logprob", "entropy")
    got = check(Form("logits", place), x.requires_grad_(), target, names=names, reduction="none")
    assert got.target_logprob[1] == -INF and got.entropy.isfinite().all()


def test_undefined_rows_are_not_finite_and_leave_the_others_alone(place):
    """But for the argmax, which is that of torch."""
    form = Form("logits", place)
    x, target, _ = case(form, False, 5, 700, ignored=0.0)
    clean = form(x, target, reduction="none")
    dirty = x.detach().clone()
    dirty[0], dirty[1, 250], dirty[2, 600] = -INF, INF, NAN
    dirty.requires_grad_()
    got = form(dirty, target, reduction="none")
    for name in FLOATS:
        t = getattr(got, name)
        assert not t[:3].isfinite().any() and (t[1].isnan() or name == "lse")
        torch.testing.assert_close(t[3:], getattr(clean, name)[3:], rtol=1e-6, atol=0)
    classes = got.argmax.tolist()
    assert classes[:2] + classes[3:] == [0, 250, *clean.argmax[3:].tolist()]
    # kernels compare numbers, which NaN is not
    assert classes[2] == 600 or (place.impl == "triton" and 0 <= classes[2] < 700)
    ups = upstreams(got)
    grads = [differentiated(s, [leaf], ups)[0] for s, leaf in ((got, dirty), (clean, x))]
    assert grads[0][:3].isnan().any(1).all()
    torch.testing.assert_close(grads[0][3:], grads[1][3:], rtol=1e-5, atol=1e-9)


@SOFT
@FORMS
def test_an_infinite_logit_has_an_infinite_lse_and_nothing_else(place, form, soft):
    """However many there are, as in torch.logsumexp, but beside a NaN; every gradient of its row is
    NaN."""
    x, target = logits_and_ids(5, 700, device=place.device, ignored=0.0)
    target = probabilities(5, 700, device=place.device).detach() if soft else target
    x = x.detach()
    x[0, 250], x[1, 3], x[1, 600], x[2], x[3, 9], x[3, 500] = INF, INF, INF, INF, INF, NAN
    weight = ()
    if form == "head":
        # 2 * 3e38 is INF in float32, and 0 * INF would be NaN
        weight = (torch.where(x.isfinite(), x, 3e38).T.contiguous(),)
        x = torch.diag(torch.tensor([2.0, 2.0, 2.0, NAN, 1.0], device=place.device))
    x.requires_grad_()
    function = (
        lossfuse.linear_cross_entropy_stats if form == "head" else lossfuse.cross_entropy_stats
    )
    got = function(x, *weight, target, reduction="none", lse_square_scale=0.1, impl=place.impl)
    assert got.lse[:3].tolist() == got.z_loss[:3].tolist() == [INF] * 3
    assert got.lse[3].isnan() and got.lse[4].isfinite()
    for t in (got.loss, got.target_logprob, got.entropy):
        assert t[:4].isnan().all() and t[4].isfinite()
    (dx,) = torch.autograd.grad(got.lse.sum(), x)
    assert dx[:4].isnan().all()
    assert dx[4].isfinite().all() or form == "head"


@pytest.mark.parametrize("value", [LOWEST, 0.0], ids=str)
def test_rows_masked_by_a_large_negative_number(place, value):
    """A row of it is uniform; a row half of it is a row of the others."""
    x, target = logits_and_ids(4, 600, device=place.device, ignored=0.0)
    x = x.detach()
    x[0], x[1, ::2], target[1] = value, value, 1
    # not even in fp64 has torch's logsumexp a gradient there
    got = check(Form("logits", place), x.requires_grad_(), target, names=SHIFTED, reduction="none")
    assert got.entropy[0].item() == pytest.approx(math.log(600), rel=1e-6) and got.argmax[0] == 0


@ROWS_OR_MEAN
@pytest.mark.parametrize("poison", [NAN, -INF])
def test_ignored_rows_may_hold_and_receive_anything(form, reduction, poison):
    x, target, _ = case(form, False, 6, 30, ignored=0.0)
    target[2], target[4] = -100, -100
    dirty = x.detach().clone()
    dirty[2], dirty[4, 5] = poison, poison
    dirty.requires_grad_()
    options = {"lse_square_scale": 0.1, "label_smoothing": 0.1, "reduction": reduction}
    got, clean = form(dirty, target, **options), form(x, target, **options)
    torch.testing.assert_close(tuple(got), tuple(clean), rtol=1e-6, atol=1e-6)
    ups = upstreams(got)
    for u in ups.values():
        if u.dim() and form.place.impl != "reference":
            u[2] = poison
    (g,), (w,) = differentiated(got, [dirty], ups), differentiated(clean, [x], upstreams(clean))
    assert not g[[2, 4]].any()
    torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


def test_a_class_of_no_weight_and_no_logit_is_left_out_of_the_loss_alone(place):
    x = torch.tensor([[0.0, -INF, 1.0], [0.5, -INF, 2.0]], device=place.device)
    q = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.0, 0.5]], device=x.device, requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 1.0], device=x.device)
    got = Form("logits", place)(x, q, weight, reduction="none")
    assert got.loss.isfinite().all()
    assert got.target_logprob[0] == -INF and got.target_logprob[1].isfinite()
    (dq,) = torch.autograd.grad(got.target_logprob.sum(), q)
    torch.testing.assert_close(dq[:, [0, 2]], x.log_softmax(1)[:, [0, 2]])
    assert dq[0, 1] == -INF and dq[1, 1] == 0.0


@SOFT
@pytest.mark.parametrize("v", [2, 513, 5000])
def test_the_argmax_is_the_first_of_ties(place, soft, v):
    x = torch.zeros(6, v)
    x[1, [v // 2, v - 1]], x[2, -1], x[3, v // 3 :], x[5, 0] = 3.0, 3.0, 3.0, -1.0
    x[4] = torch.arange(v) % 2
    target = torch.softmax(torch.randn(6, v), 1) if soft else torch.zeros(6, dtype=torch.long)
    for dtype in (torch.float32, torch.bfloat16):
        logits = x.to(place.device, dtype)
        got = Form("logits", place)(logits, target.to(place.device), reduction="none")
        assert got.argmax.tolist() == [0, v // 2, v - 1, v // 3, 1, 1]


def test_a_target_out_of_range_under_a_transform_is_nan():
    target = torch.tensor([0, 7, -100])

    def f(x):
        got = lossfuse.cross_entropy_stats(x, target, reduction="none", lse_square_scale=0.1)
        return sum(t.sum() for t in (got.lse, got.target_logprob, got.entropy)), got

    grad, got = torch.func.grad(f, has_aux=True)(torch.randn(3, 7))
    for name in FLOATS:
        assert getattr(got, name).isnan().tolist() == [False, True, False]
    assert got.argmax[1:].tolist() == [-1, -1]
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


# --- shapes


@pytest.mark.parametrize(("reduction", "value"), [("none", 0.0), ("mean", NAN), ("sum", 0.0)])
@pytest.mark.parametrize("n", [0, 4], ids=["no rows", "all rows ignored"])
def test_no_row_counts(thrifty_form, n, reduction, value):
    x = torch.randn(n, 9, device=thrifty_form.place.device, requires_grad=True)
    targets = [torch.full((n,), -100, device=x.device)]
    # probabilities are never ignored
    targets += [torch.empty(0, 9, device=x.device)] if n == 0 else []
    options = {"reduction": reduction, "lse_square_scale": 0.1}
    for target, every in itertools.product(targets, (True, False)):
        got = thrifty_form(x, target, entropy=every, argmax=every, **options)
        for t in (got.loss, got.z_loss):
            torch.testing.assert_close(t.detach(), torch.full_like(t, value), equal_nan=True)
        assert got.n_valid == 0
        for t in (got.lse, got.target_logprob, *([got.entropy] if every else [])):
            assert t.shape == (n,) and t.dtype == torch.float32 and not t.any()
        if every:
            assert got.argmax.tolist() == [-1] * n and got.argmax.dtype == torch.int64
        names = FLOATS if every else FLOATS[:-1]
        assert not differentiated(got, [x], upstreams(got, names))[0].any()


def test_one_class(thrifty_form):
    x = torch.tensor([[3.0], [-2.0]], device=thrifty_form.place.device, requires_grad=True)
    for target in (torch.tensor([0, -100], device=x.device), torch.ones(2, 1, device=x.device)):
        got = thrifty_form(x, target, reduction="none")
        assert got.entropy.tolist() == got.target_logprob.tolist() == [0.0, 0.0]
        assert got.lse[0] == 3.0
        assert not torch.autograd.grad(got.entropy.sum() + got.target_logprob.sum(), x)[0].any()


# --- autograd


@SOFT
@ROWS_OR_MEAN
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_first_and_second_derivatives_in_fp64(impl, soft, reduction):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 3])
    if soft:
        target = torch.softmax(torch.randn(3, 4, dtype=torch.float64), 1).requires_grad_()
    weight = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    options = {"label_smoothing": 0.2, "softcap": 4.0, "logit_scale": 1.5, "lse_square_scale": 0.1}

    def f(x, target):
        form = Form("logits", Place(impl, "cpu"))
        got = form(x, target, weight, reduction=reduction, **options)
        return tuple(getattr(got, name) for name in DIFFERENTIABLE)

    assert gradcheck(f, (x, target), check_undefined_grad=False)
    assert gradgradcheck(f, (x, target), check_undefined_grad=False)


def double_backward(statistic, leaf):
    (g,) = torch.autograd.grad(statistic.sum(), leaf, create_graph=True)
    return torch.autograd.grad((g**2).sum(), leaf)[0]


@ROWS_OR_MEAN
def test_a_double_backward_of_an_entropy_is_right_or_raises(thrifty_form, reduction):
    x, target, _ = case(thrifty_form, False, 5, 11)
    options = {"reduction": reduction, "logit_scale": 0.8}
    got = thrifty_form(x, target, **options)
    if thrifty_form.name == "head" and thrifty_form.place.impl != "reference":
        with pytest.raises(RuntimeError, match=r"no second derivative \(create_graph=True\)"):
            double_backward(got.entropy, x)
        return
    want, wide = wanted(x, target, **options)
    assert_formula_close(double_backward(got.entropy, x), double_backward(want.entropy, *wide))


@ROWS_OR_MEAN
def test_backwards_in_any_order(thrifty_form, reduction):
    """A gradient formed in the forward is returned once, and only if no other is asked for."""
    x, target, _ = case(thrifty_form, False, 6, 40)
    want, wide = wanted(x, target, reduction=reduction)
    for order in itertools.permutations([("loss",), ("entropy",), ("loss", "lse"), ("loss",)], 3):
        got, earlier = thrifty_form(x, target, reduction=reduction), []
        ups = upstreams(got)
        for names in order:
            some = {name: ups[name] for name in names}
            ((g, w),) = gradient_pairs(got, [x], want, wide, some)
            assert_formula_close(g, w)
            earlier.append((g, g.clone()))
        assert all(torch.equal(g, copy) for g, copy in earlier)


@ROWS_OR_MEAN
def test_gradients_accumulate_in_a_leaf(thrifty_form, reduction):
    x, target, _ = case(thrifty_form, False, 6, 40)
    got = thrifty_form(x, target, reduction=reduction)
    got.loss.sum().backward(retain_graph=True)
    got.entropy.sum().backward(retain_graph=True)
    (got.loss.sum() * 2.0 + got.lse.sum()).backward()
    want, (wide,) = wanted(x, target, reduction=reduction)
    total = 3.0 * want.loss.sum() + want.entropy.sum() + want.lse.sum()
    assert_formula_close(x.grad, torch.autograd.grad(total, wide)[0])


def test_upstream_gradients_of_any_stride(thrifty_logits):
    # a move to the device would make them contiguous
    with torch.device(thrifty_logits.place.device):
        x, target = torch.randn(3, 7, 4, requires_grad=True), torch.randint(0, 7, (3, 4))
        expanded, strided = torch.tensor(0.3).expand(3, 4), torch.randn(6, 8)[::2, ::2]
        transposed = torch.randn(4, 3).t()
    got = thrifty_logits(x, target, reduction="none")
    want, wide = wanted(x, target, reduction="none")
    for up in (expanded, strided, transposed):
        ((g, w),) = gradient_pairs(got, [x], want, wide, dict.fromkeys(FLOATS, up))
        assert_formula_close(g, w)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@ROWS_OR_MEAN
@pytest.mark.parametrize("name", ["loss", "entropy"])
def test_batched_upstream_gradients(thrifty_form, name, reduction):
    x, target, _ = case(thrifty_form, False, 3, 5)
    got = getattr(thrifty_form(x, target, reduction=reduction), name)
    stats, wide = wanted(x, target, reduction=reduction)
    ups = torch.randn(4, *got.shape, device=x.device)
    (g,) = torch.autograd.grad(got, x, ups, is_grads_batched=True)
    want = torch.autograd.grad(getattr(stats, name), wide, ups.double(), is_grads_batched=True)
    assert_formula_close(g, want[0])


@ROWS_OR_MEAN
def test_inputs_changed_before_the_backward_of_an_entropy_raise(thrifty_form, reduction):
    x, target, _ = case(thrifty_form, False, 6, 40)
    z = x * 1.0
    got, want = (thrifty_form(t, target, reduction=reduction).entropy.sum() for t in (z, x))
    with torch.no_grad():
        z.zero_()
    if thrifty_form.place.impl == "reference":
        # which saves what it computed
        (g,), (w,) = torch.autograd.grad(got, x), torch.autograd.grad(want, x)
        torch.testing.assert_close(g, w)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(got, x)


@ROWS_OR_MEAN
def test_statistics_changed_before_the_backward_of_the_loss_do_not_matter(
    thrifty_logits, reduction
):
    x, target, _ = case(thrifty_logits, False, 6, 40)
    got, want = (thrifty_logits(x, target, reduction=reduction) for _ in range(2))
    with torch.no_grad():
        for t in (got.lse, got.entropy, got.target_logprob, got.argmax):
            t.zero_()
    g, w = (torch.autograd.grad(stats.loss.sum(), x)[0] for stats in (got, want))
    torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9)


@ROWS_OR_MEAN
def test_tensors_saved_for_backward_go_through_hooks(thrifty_form, reduction):
    x, target, _ = case(thrifty_form, False, 5, 40)
    stored = []

    def pack(t):
        stored.append(t.clone())
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: stored[i].clone()):
        got = thrifty_form(x, target, reduction=reduction)
    want = thrifty_form(x, target, reduction=reduction)
    for names in (("loss",), DIFFERENTIABLE):
        ups = upstreams(got, names)
        g, w = (differentiated(s, [x], ups, retain_graph=True) for s in (got, want))
        torch.testing.assert_close(g, w)


def test_no_second_tensor_of_the_logits_size_is_saved_for_backward(fast_place):
    form, saved = Form("logits", fast_place), []
    x, target, _ = case(form, False, 5, 1000)

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        form(x, target, reduction="none")
        assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 8 * len(x)
        saved.clear()
        with torch.no_grad():
            form(x, target)
    assert saved == []


def test_a_class_weight_may_require_grad():
    form = Form("logits", Place("auto", "cpu"))
    x, target, _ = case(form, False, 5, 11)
    weight = class_weight(11).requires_grad_()
    got = form(x, target, weight, reduction="sum")
    gx, gw = differentiated(got, [x, weight], ups := upstreams(got))
    # torch has no gradient for a weight beside ids
    want, wide = wanted(x, target, weight.detach(), reduction="sum")
    assert_formula_close(gx, differentiated(want, wide, ups)[0])
    rows = torch.nn.functional.cross_entropy(x, target, reduction="none").detach()
    of_weight = torch.zeros(11).index_add(0, target.clamp(min=0), rows)
    torch.testing.assert_close(gw, ups["loss"].float() * of_weight)


# --- transforms, which "auto" sends to the reference


def test_vmap():
    x, target = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    got = torch.func.vmap(lossfuse.cross_entropy_stats)(x, target)
    for i in range(4):
        want = program.cross_entropy_stats(x[i].double(), target[i])
        assert_statistics_close(type(got)(*(t[i] for t in got)), want)


# --- threads and memory


@SOFT
def test_several_threads_give_the_results_of_one(soft, monkeypatch):
    monkeypatch.setattr(torch_rows, "THREAD_LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 1 << 13)
    form = Form("logits", Place("torch", "cpu"))
    x, target, leaves = case(form, soft, 131, 400)
    used, run, results = [], threads.run, {3: [], 1: []}

    def counted(tasks, count):
        used.append(count)
        return run(tasks, count)

    monkeypatch.setattr(threads, "run", counted)
    for count, reduction in itertools.product(results, ("none", "mean")):
        monkeypatch.setattr(threads, "workers", lambda count=count: count)
        got = form(x, target, reduction=reduction, lse_square_scale=0.1)
        loss = differentiated(got, leaves, upstreams(got, ("loss",)), retain_graph=True)
        results[count] += [*got, *differentiated(got, leaves, upstreams(got)), *loss]
    assert used and set(used) == {3}
    torch.testing.assert_close(results[3], results[1], rtol=1e-5, atol=1e-9)


def test_repeated_runs_are_bitwise_equal(thrifty_form):
    x, target, _ = case(thrifty_form, False, 16, 5000)
    first, again = (thrifty_form(x, target, reduction="none") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(*(differentiated(s, [x], upstreams(s))[0] for s in (first, again)))


@SOFT
def test_nothing_larger_than_a_block_is_allocated(soft):
    n, v = 512, 16000
    x, target = (t.detach() for t in logits_and_ids(n, v))
    target = probabilities(n, v).detach() if soft else target
    grad, up, wants = torch.empty_like(x), torch.ones(n), Wants(True, True)
    for upstream in (None, Upstream(up), Upstream(up, up, up, up)):
        with Largest() as largest:
            dlogits = None if upstream is None else grad
            torch_rows.row_stats(x, target, None, LossSpec(), wants, upstream, dlogits, None)
        assert 0 < largest.bytes <= torch_rows.CPU_BLOCK_BYTES < grad.nbytes / 3


@SOFT
@ROWS_OR_MEAN
def test_inputs_are_not_written_to(thrifty_form, reduction, soft):
    x, target, leaves = case(thrifty_form, soft, 6, 300)
    before = [t.detach().clone() for t in (x, target)]
    got = thrifty_form(x, target, reduction=reduction)
    differentiated(got, leaves, upstreams(got))
    assert torch.equal(x, before[0]) and torch.equal(target, before[1])


# --- compilers


@SOFT
def test_opcheck(thrifty_fast_place, soft):
    impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
    x, target, _ = case(Form("logits", thrifty_fast_place), soft, 4, 19)
    weight = class_weight(19, device)
    settings = row_stats.OpArgs.of(LossSpec(-100, 0.1, 20.0, 0.7, 1e-3), impl)
    for wants in (Wants(True, True), Wants(False, False)):
        torch.library.opcheck(row_stats.row_stats, (x, target, weight, *wants, *settings))
    *_, kept = row_stats.row_stats(x, target, weight, True, True, *settings)
    ups = [torch.randn(4, device=device, requires_grad=True) for _ in range(4)]
    for given in (ups, [None, ups[1], None, ups[3]]):
        saved = (x, target, weight, kept.detach(), *given)
        torch.library.opcheck(row_stats.row_stats_grads, (*saved, True, soft, *settings))
    if impl == "torch":
        plain = (x.detach(), target.detach(), weight, ups[0].detach(), True, soft, True, True)
        torch.library.opcheck(row_stats.row_stats_and_grads, (*plain, *settings))


@ROWS_OR_MEAN
def test_checkpointed_statistics_have_the_same_gradient(thrifty_form, reduction):
    x, target, _ = case(thrifty_form, False, 5, 40)

    def f(x, target):
        got = thrifty_form(x, target, reduction=reduction)
        return got.loss.sum() + (got.entropy * torch.arange(5.0, device=x.device)).sum()

    (want,) = torch.autograd.grad(f(x, target), x)
    checkpoint(f, x, target, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, want)


# --- transforms and gradients of class weights, which "auto" leaves to the reference


@FORMS
def test_torch_func_differentiates_statistics(form):
    x, target = torch.randn(3, 5), torch.tensor([0, 4, -100])

    def mixture_of(f):
        def g(x):
            got = f(x, target)
            return got.loss + (got.entropy + got.target_logprob).sum() + (got.lse**2).sum()

        return g

    got = mixture_of(Form(form, Place("auto", "cpu")))
    want = mixture_of(program.cross_entropy_stats)
    torch.testing.assert_close(torch.func.hessian(got)(x), torch.func.hessian(want)(x))
    tangent = (torch.randn(3, 5),)
    torch.testing.assert_close(
        torch.func.jvp(got, (x,), tangent), torch.func.jvp(want, (x,), tangent)
    )


@FORMS
def test_a_class_weight_of_statistics_may_require_grad(form):
    form = Form(form, Place("auto", "cpu"))
    x, target, _ = case(form, False, 5, 11)
    weight = class_weight(11).requires_grad_()
    (got,) = torch.autograd.grad(form(x, target, weight, reduction="sum").loss, weight)
    rows = torch.nn.functional.cross_entropy(x, target, reduction="none").detach()
    want = torch.zeros(11).index_add(0, target.clamp(min=0), rows)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="weight requires grad"):
        form(x, target, weight, impl="torch")
