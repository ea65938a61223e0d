"""Statistics of rows beside the loss, against the torch program in fp64: formula, regimes, hard rows, shapes, and what autograd may ask."""

import functools
import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import lossfuse
import mutants
import program
from allocations import Largest
from closeness import assert_formula_close, assert_gradient_close, assert_statistics_close
from lossfuse import stats_ops
from lossfuse.backends import chunked, threads
from lossfuse.row_stats import Upstream, Wants
from lossfuse.spec import LossSpec
from options import COMBINATIONS, DIFFERENTIABLE, EVERYTHING, OPTIONS, differentiated, options_of, upstreams
from rows import class_weight, logits_and_ids, probabilities

INF, NAN = float("inf"), float("nan")
SINGLE = [(), *((name,) for name in OPTIONS), EVERYTHING, (*EVERYTHING, "none")]
FLOATS = ("loss", "lse", "target_logprob", "entropy")


def ours(place, x, target, weight=None, **options):
    return lossfuse.cross_entropy_stats(x, target, weight, impl=place.impl, **options)


def wanted(x, target, weight=None, **options):
    """(statistics, leaves) of the program, in float64 of the same numbers."""
    (x, t, w), leaves = program.wide_leaves(x, target, weight)
    return program.cross_entropy_stats(x, t, w, **options), leaves


def check(place, x, target, weight=None, names=DIFFERENTIABLE, compare=assert_formula_close, **options):
    """Values, and the gradients of a mixture."""
    got = ours(place, x, target, weight, **options)
    want, wide = wanted(x, target, weight, **options)
    assert_statistics_close(got, want)
    leaves = [t for t in (x, target) if t.requires_grad]
    ups = upstreams(got, names)
    for leaf, g, w in zip(leaves, differentiated(got, leaves, ups), differentiated(want, wide, ups), strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        compare(g, w)
    return got


class TestFormula:
    """5 rows of 17 classes: less than a block, ragged."""

    @pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
    def test_class_ids(self, place, names):
        x, target = logits_and_ids(5, 17, device=place.device)
        weight, options = options_of(names, 17, place.device)
        check(place, x, target, weight, **options)

    @pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
    def test_class_probabilities(self, place, names):
        x, _ = logits_and_ids(5, 17, device=place.device)
        weight, options = options_of(names, 17, place.device)
        check(place, x, probabilities(5, 17, device=place.device), weight, **options)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_one_statistic_alone(self, place, reduction, soft, name):
        x, target = logits_and_ids(5, 17, device=place.device)
        target = probabilities(5, 17, device=place.device) if soft else target
        weight, options = options_of(EVERYTHING, 17, place.device)
        options |= {"reduction": reduction}
        want, wide = wanted(x, target, weight, **options)
        got = ours(place, x, target, weight, **options)
        leaves = [t for t in (x, target) if t.requires_grad]
        ups = upstreams(got, (name,))
        for g, w in zip(differentiated(got, leaves, ups), differentiated(want, wide, ups), strict=True):
            assert_formula_close(g, w)

    @pytest.mark.parametrize("names", list(itertools.combinations(DIFFERENTIABLE, 2)), ids="+".join)
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_two_statistics(self, fast_place, reduction, names):
        x, target = logits_and_ids(5, 17, device=fast_place.device)
        weight, options = options_of(EVERYTHING, 17, fast_place.device)
        check(fast_place, x, target, weight, names, **(options | {"reduction": reduction}))
        check(fast_place, x, probabilities(5, 17, device=fast_place.device), weight, names, **(options | {"reduction": reduction}))

    @pytest.mark.parametrize("v", [1, 2, 33, 128, 129])
    @pytest.mark.parametrize("n", [1, 7])
    def test_small_sizes(self, place, n, v):
        x, target = logits_and_ids(n, v, device=place.device)
        weight, options = options_of(EVERYTHING, v, place.device)
        check(place, x, target, weight, **options)
        check(place, x, probabilities(n, v, device=place.device), weight, **options)

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_float64_is_float64(self, place, soft):
        if place.impl == "triton":
            pytest.skip("fp64 goes elsewhere: test_errors holds the sentence")
        x, target = (t.detach() for t in logits_and_ids(5, 17))
        x = x.double().requires_grad_()
        target = probabilities(5, 17, torch.float64) if soft else target
        weight, options = options_of(EVERYTHING, 17, "cpu")
        for reduction in ("mean", "none"):
            got = ours(place, x, target, weight.double(), **(options | {"reduction": reduction}))
            want, wide = wanted(x, target, weight.double(), **(options | {"reduction": reduction}))
            ups = upstreams(got)
            leaves = [x, target] if soft else [x]
            for g, w in zip(got[:5], want[:5], strict=True):
                assert g.dtype == torch.float64
                torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)
            for g, w in zip(differentiated(got, leaves, ups), differentiated(want, wide, ups), strict=True):
                torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("only", ["input", "target"])
    def test_one_gradient_alone(self, place, soft, only):
        x, target = logits_and_ids(5, 17, device=place.device)
        target = probabilities(5, 17, device=place.device).requires_grad_(only == "target") if soft else target
        x.requires_grad_(only == "input")
        if soft or only == "input":
            for reduction in ("none", "mean"):
                check(place, x, target, reduction=reduction)

    @pytest.mark.parametrize("what", ["number", "tensor", "with a gradient"])
    def test_normalizers(self, place, what):
        x, target = logits_and_ids(5, 17, device=place.device)
        normalizer = 7.5 if what == "number" else torch.tensor(7.5, device=place.device, requires_grad=what != "tensor")
        got = ours(place, x, target, lse_square_scale=0.1, normalizer=normalizer)
        want, wide = wanted(x, target, lse_square_scale=0.1, normalizer=7.5)
        assert_statistics_close(got, want)
        ups = upstreams(got)
        assert_formula_close(differentiated(got, [x], ups, retain_graph=True)[0], differentiated(want, wide, ups)[0])
        if what == "with a gradient":
            (slope,) = differentiated(got, [normalizer], {n: ups[n] for n in ("loss", "z_loss")})
            assert_formula_close(slope, -(ups["loss"] * want.loss + ups["z_loss"] * want.z_loss) / 7.5)

    @pytest.mark.parametrize("ignore_index", [-100, -1, 3, 0])
    def test_ignored_ids(self, place, ignore_index):
        """3 and 0 are classes, too; an argmax of no class is neither an id nor what is ignored."""
        x, target = logits_and_ids(6, 9, device=place.device, ignored=0.0)
        target[::2] = ignore_index
        got = check(place, x, target, ignore_index=ignore_index, label_smoothing=0.1, lse_square_scale=0.1)
        ignored = target == ignore_index
        assert (got.argmax[ignored] == (-2 if ignore_index == -1 else -1)).all()
        assert got.n_valid == (~ignored).sum() and not any(t[ignored].any() for t in (got.lse, got.target_logprob, got.entropy))

    def test_the_loss_is_that_of_cross_entropy(self, place):
        for dtype in (torch.float32, torch.bfloat16):
            x, target = logits_and_ids(6, 300, dtype, device=place.device)
            for names in SINGLE:
                weight, options = options_of(names, 300, place.device)
                want = lossfuse.cross_entropy(x, target, weight, impl=place.impl, **options)
                got = ours(place, x, target, weight, **options).loss
                torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
                (g,), (w,) = (torch.autograd.grad(loss.sum() * 0.3, x) for loss in (got, want))
                torch.testing.assert_close(g, w, rtol=1e-6 if dtype == torch.float32 else 2.0**-7, atol=1e-12)

    @pytest.mark.parametrize(
        ("size_average", "reduce", "means"), [(True, None, "mean"), (False, None, "sum"), (True, False, "none"), (None, False, "none")]
    )
    def test_deprecated_arguments_warn_and_win(self, size_average, reduce, means):
        x, target = logits_and_ids(5, 17)
        with pytest.warns(UserWarning, match=f"reduction='{means}'"):
            got = lossfuse.cross_entropy_stats(x, target, size_average=size_average, reduce=reduce, lse_square_scale=0.1)
        want = lossfuse.cross_entropy_stats(x, target, reduction=means, lse_square_scale=0.1)
        torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)


class TestNotAskedFor:
    @pytest.mark.parametrize("entropy", [True, False])
    @pytest.mark.parametrize("argmax", [True, False])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_it_is_none_and_the_rest_stays(self, place, reduction, soft, argmax, entropy):
        x, target = logits_and_ids(5, 600, device=place.device)
        target = probabilities(5, 600, device=place.device) if soft else target
        options = {"reduction": reduction, "lse_square_scale": 0.1, "label_smoothing": 0.1}
        got = ours(place, x, target, entropy=entropy, argmax=argmax, **options)
        whole = ours(place, x, target, **options)
        assert (got.entropy is not None) == entropy and (got.argmax is not None) == argmax
        for g, w in zip(got, whole, strict=True):
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-6, atol=0)
        ups = {name: u for name, u in upstreams(whole).items() if name != "entropy"}
        leaves = [x, target] if soft else [x]
        torch.testing.assert_close(differentiated(got, leaves, ups), differentiated(whole, leaves, ups), rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("bad", [{"entropy": 1}, {"argmax": None}, {"entropy": "yes"}], ids=str)
    def test_anything_but_a_bool_is_refused(self, bad):
        with pytest.raises(TypeError, match="must be True or False"):
            lossfuse.cross_entropy_stats(torch.randn(2, 3), torch.tensor([0, 1]), **bad)

    def test_no_grad_is_the_same(self, place):
        x, target = logits_and_ids(5, 600, torch.bfloat16, device=place.device)
        want = ours(place, x, target)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = ours(place, x.detach(), target)
            assert not any(t.requires_grad for t in got)
            torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-6, atol=0)

    def test_classes_and_counts_have_no_gradient(self, place):
        x, target = logits_and_ids(5, 17, device=place.device)
        for reduction in ("none", "mean"):
            got = ours(place, x, target, reduction=reduction)
            assert not got.argmax.requires_grad and not got.n_valid.requires_grad
            assert all(getattr(got, name).requires_grad for name in FLOATS)


def entropy_terms(x, ups, softcap=None, logit_scale=None, **unused):
    """The two products whose difference the gradient of an entropy is."""
    z = x.detach().double() * (logit_scale or 1.0)
    logp = (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1, keepdim=True)
    return logp.exp() * (entropy - logp) * ups["entropy"].abs()[:, None] * abs(logit_scale or 1.0)


class TestRegimes:
    """Real vocabularies and dtypes; every entry relative to itself."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("v", [511, 2049, 32000, 50257, 128257])
    @pytest.mark.parametrize("names", [*((name,) for name in FLOATS), FLOATS], ids="+".join)
    def test_plain(self, place, names, v, dtype):
        x, target = logits_and_ids(3, v, dtype, place.device)
        got, (want, wide) = ours(place, x, target, reduction="none"), wanted(x, target, reduction="none")
        assert_statistics_close(got, want)
        ups = upstreams(got, names)
        (g,), (w,) = differentiated(got, [x], ups), differentiated(want, wide, ups)
        terms = entropy_terms(x, ups) if "entropy" in names else 0.0
        if len(names) > 1:
            terms = terms + torch.softmax(x.detach().double(), 1) * sum(u.abs() for u in ups.values())[:, None]
        assert_gradient_close(g, w, terms=terms)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_policy_with_a_temperature_and_a_cap(self, place, dtype):
        """Probabilities' ratio and an entropy bonus, of every token its own weight; the loss is only looked at."""
        options = {"reduction": "none", "softcap": 30.0, "logit_scale": 1 / 0.7, "lse_square_scale": 1e-4}
        x, target = logits_and_ids(4, 32000, dtype, place.device)
        got, (want, wide) = ours(place, x, target, **options), wanted(x, target, **options)
        assert_statistics_close(got, want)
        ups = upstreams(got, ("target_logprob", "entropy", "z_loss"))
        (g,), (w,) = differentiated(got, [x], ups), differentiated(want, wide, ups)
        p = torch.softmax(30.0 * torch.tanh(x.detach().double() / 0.7 / 30.0), 1)
        assert_gradient_close(g, w, terms=entropy_terms(x, ups, **options) + 2 * p * ups["target_logprob"].abs()[:, None])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_distillation(self, place, dtype):
        x, _ = logits_and_ids(3, 32000, dtype, place.device)
        target = probabilities(3, 32000, dtype, place.device)
        got, (want, wide) = ours(place, x, target, reduction="none"), wanted(x, target, reduction="none")
        assert_statistics_close(got, want)
        ups = upstreams(got)
        (dx, dt), (wx, wt) = differentiated(got, [x, target], ups), differentiated(want, wide, ups)
        q, p = target.detach().double(), torch.softmax(x.detach().double(), 1)
        both = sum(u.abs() for u in ups.values())[:, None]
        assert_gradient_close(dx, wx, terms=entropy_terms(x, ups) + (q + p * (1 + q.sum(1, keepdim=True))) * both)
        assert_gradient_close(dt, wt, terms=wt.abs() + 1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_gradients_formed_and_made(self, place, reduction, dtype):
        """The loss alone, the loss and an entropy, the loss again: of one graph."""
        x, target = logits_and_ids(4, 5000, dtype, place.device)
        got, (want, wide) = ours(place, x, target, reduction=reduction), wanted(x, target, reduction=reduction)
        scale = 512.0 if reduction == "mean" else 1.0
        ups = {name: u * scale for name, u in upstreams(got, ("loss", "entropy")).items()}
        for names in (("loss",), ("loss", "entropy"), ("entropy",), ("loss",)):
            some = {name: ups[name] for name in names}
            (g,), (w,) = (differentiated(s, ls, some, retain_graph=True) for s, ls in ((got, [x]), (want, wide)))
            assert_gradient_close(g, w, terms=entropy_terms(x, ups) + torch.softmax(x.detach().double(), 1) * float(ups["loss"].abs()))


CASES = [
    pytest.param(17, torch.float32, assert_formula_close, id="V17-fp32"),
    pytest.param(32000, torch.float32, assert_gradient_close, id="V32000-fp32"),
    pytest.param(32000, torch.bfloat16, assert_gradient_close, id="V32000-bf16"),
]


@functools.cache
def mixture(v, dtype):
    """(logits, targets, the gradient of the mutants' objective, ours)."""
    x, target = logits_and_ids(8, v, dtype)
    options = {"softcap": mutants.SOFTCAP, "logit_scale": mutants.LOGIT_SCALE, "lse_square_scale": mutants.Z_SCALE}
    stats, (leaf,) = wanted(x, target, **options)
    got = lossfuse.cross_entropy_stats(x, target, **options)
    return x, target, torch.autograd.grad(mutants.objective(stats, x), leaf)[0], torch.autograd.grad(mutants.objective(got, x), x)[0]


class TestTheComparisonRejects:
    @pytest.mark.parametrize(("v", "dtype", "compare"), CASES)
    def test_not_what_is_right(self, v, dtype, compare):
        x, target, want, got = mixture(v, dtype)
        torch.testing.assert_close(mutants.statistics_gradient(x, target), want, rtol=1e-9, atol=1e-14)
        compare(want.to(dtype), want)
        terms = {} if v == 17 else {"terms": 20 * torch.softmax(x.detach().double(), 1)}
        compare(got, want, **terms)

    @pytest.mark.parametrize("mutant", mutants.STATISTICS_MUTANTS)
    @pytest.mark.parametrize(("v", "dtype", "compare"), CASES)
    def test_every_mutant(self, v, dtype, compare, mutant):
        x, target, want, _ = mixture(v, dtype)
        with pytest.raises(AssertionError):
            compare(mutants.STATISTICS_MUTANTS[mutant](x, target).to(dtype), want)

    @pytest.mark.parametrize("name", [n for n in program.Statistics._fields if n != "n_valid"])
    def test_a_statistic_of_another_row(self, name):
        x, target = logits_and_ids(8, 17)
        want, _ = wanted(x, target, reduction="none", lse_square_scale=0.1)
        assert_statistics_close(lossfuse.cross_entropy_stats(x, target, reduction="none", lse_square_scale=0.1), want)
        with pytest.raises(AssertionError):
            got = want._replace(**{name: getattr(want, name).roll(1)})
            assert_statistics_close(got, want)
