"""Statistics of rows beside the loss, against the torch program in fp64: formula, regimes, hard
rows, shapes, and what autograd may ask."""

import contextlib
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
from lossfuse.backends import threads, torch_rows
from lossfuse.ops import row_stats
from lossfuse.row_types import Upstream, Wants
from lossfuse.spec import LossSpec
from options import (
    DIFFERENTIABLE,
    EVERYTHING,
    OPTIONS,
    THRIFTY_COMBINATIONS,
    differentiated,
    options_of,
    upstreams,
)
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


def check(
    place, x, target, weight=None, names=DIFFERENTIABLE, compare=assert_formula_close, **options
):
    """Values, and the gradients of a mixture."""
    got = ours(place, x, target, weight, **options)
    want, wide = wanted(x, target, weight, **options)
    assert_statistics_close(got, want)
    leaves = [t for t in (x, target) if t.requires_grad]
    ups = upstreams(got, names)
    for leaf, g, w in zip(
        leaves, differentiated(got, leaves, ups), differentiated(want, wide, ups), strict=True
    ):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        compare(g, w)
    return got


class TestFormula:
    """5 rows of 17 classes: less than a block, ragged."""

    @pytest.mark.parametrize(
        "names", THRIFTY_COMBINATIONS, ids=lambda names: "+".join(names) or "plain"
    )
    def test_class_ids(self, place, names):
        x, target = logits_and_ids(5, 17, device=place.device)
        weight, options = options_of(names, 17, place.device)
        check(place, x, target, weight, **options)

    @pytest.mark.parametrize(
        "names", THRIFTY_COMBINATIONS, ids=lambda names: "+".join(names) or "plain"
    )
    def test_class_probabilities(self, place, names):
        x, _ = logits_and_ids(5, 17, device=place.device)
        weight, options = options_of(names, 17, place.device)
        check(place, x, probabilities(5, 17, device=place.device), weight, **options)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize(
        "reduction", ["none", "mean", pytest.param("sum", marks=pytest.mark.slow)]
    )
    def test_one_statistic_alone(self, place, reduction, soft, name):
        x, target = logits_and_ids(5, 17, device=place.device)
        target = probabilities(5, 17, device=place.device) if soft else target
        weight, options = options_of(EVERYTHING, 17, place.device)
        options |= {"reduction": reduction}
        want, wide = wanted(x, target, weight, **options)
        got = ours(place, x, target, weight, **options)
        leaves = [t for t in (x, target) if t.requires_grad]
        ups = upstreams(got, (name,))
        for g, w in zip(
            differentiated(got, leaves, ups), differentiated(want, wide, ups), strict=True
        ):
            assert_formula_close(g, w)

    @pytest.mark.parametrize("names", list(itertools.combinations(DIFFERENTIABLE, 2)), ids="+".join)
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_two_statistics(self, thrifty_place, reduction, names):
        x, target = logits_and_ids(5, 17, device=thrifty_place.device)
        weight, options = options_of(EVERYTHING, 17, thrifty_place.device)
        check(thrifty_place, x, target, weight, names, **(options | {"reduction": reduction}))
        check(
            thrifty_place,
            x,
            probabilities(5, 17, device=thrifty_place.device),
            weight,
            names,
            **(options | {"reduction": reduction}),
        )

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
            for g, w in zip(
                differentiated(got, leaves, ups), differentiated(want, wide, ups), strict=True
            ):
                torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("only", ["input", "target"])
    def test_one_gradient_alone(self, thrifty_place, soft, only):
        x, target = logits_and_ids(5, 17, device=thrifty_place.device)
        target = (
            probabilities(5, 17, device=thrifty_place.device).requires_grad_(only == "target")
            if soft
            else target
        )
        x.requires_grad_(only == "input")
        if soft or only == "input":
            for reduction in ("none", "mean"):
                check(thrifty_place, x, target, reduction=reduction)

    @pytest.mark.parametrize("what", ["number", "tensor", "with a gradient"])
    def test_normalizers(self, thrifty_place, what):
        x, target = logits_and_ids(5, 17, device=thrifty_place.device)
        normalizer = (
            7.5
            if what == "number"
            else torch.tensor(7.5, device=thrifty_place.device, requires_grad=what != "tensor")
        )
        got = ours(thrifty_place, x, target, lse_square_scale=0.1, normalizer=normalizer)
        want, wide = wanted(x, target, lse_square_scale=0.1, normalizer=7.5)
        assert_statistics_close(got, want)
        ups = upstreams(got)
        assert_formula_close(
            differentiated(got, [x], ups, retain_graph=True)[0], differentiated(want, wide, ups)[0]
        )
        if what == "with a gradient":
            (slope,) = differentiated(got, [normalizer], {n: ups[n] for n in ("loss", "z_loss")})
            assert_formula_close(
                slope, -(ups["loss"] * want.loss + ups["z_loss"] * want.z_loss) / 7.5
            )

    @pytest.mark.parametrize("ignore_index", [-100, -1, 3, 0])
    def test_ignored_ids(self, thrifty_place, ignore_index):
        """3 and 0 are classes, too; an argmax of no class is neither an id nor what is ignored."""
        x, target = logits_and_ids(6, 9, device=thrifty_place.device, ignored=0.0)
        target[::2] = ignore_index
        got = check(
            thrifty_place,
            x,
            target,
            ignore_index=ignore_index,
            label_smoothing=0.1,
            lse_square_scale=0.1,
        )
        ignored = target == ignore_index
        assert (got.argmax[ignored] == (-2 if ignore_index == -1 else -1)).all()
        assert got.n_valid == (~ignored).sum() and not any(
            t[ignored].any() for t in (got.lse, got.target_logprob, got.entropy)
        )

    def test_the_loss_is_that_of_cross_entropy(self, thrifty_place):
        for dtype in (torch.float32, torch.bfloat16):
            x, target = logits_and_ids(6, 300, dtype, device=thrifty_place.device)
            for names in SINGLE:
                weight, options = options_of(names, 300, thrifty_place.device)
                want = lossfuse.cross_entropy(x, target, weight, impl=thrifty_place.impl, **options)
                got = ours(thrifty_place, x, target, weight, **options).loss
                torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
                (g,), (w,) = (torch.autograd.grad(loss.sum() * 0.3, x) for loss in (got, want))
                # exp(x) of a GPU is exp2(x * log2(e)), where x * log2(e) is rounded: of p by two
                # ways that is twice 1.3e-6 at x = -25
                rtol = 1e-6 if thrifty_place.device == "cpu" else 5e-6
                torch.testing.assert_close(
                    g, w, rtol=rtol if dtype == torch.float32 else 2.0**-7, atol=1e-12
                )

    @pytest.mark.parametrize(
        ("size_average", "reduce", "means"),
        [(True, None, "mean"), (False, None, "sum"), (True, False, "none"), (None, False, "none")],
    )
    def test_deprecated_arguments_warn_and_win(self, size_average, reduce, means):
        x, target = logits_and_ids(5, 17)
        with pytest.warns(UserWarning, match=f"reduction='{means}'"):
            got = lossfuse.cross_entropy_stats(
                x, target, size_average=size_average, reduce=reduce, lse_square_scale=0.1
            )
        want = lossfuse.cross_entropy_stats(x, target, reduction=means, lse_square_scale=0.1)
        torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)


class TestNotAskedFor:
    @pytest.mark.parametrize("entropy", [True, False])
    @pytest.mark.parametrize("argmax", [True, False])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_it_is_none_and_the_rest_stays(self, thrifty_place, reduction, soft, argmax, entropy):
        x, target = logits_and_ids(5, 600, device=thrifty_place.device)
        target = probabilities(5, 600, device=thrifty_place.device) if soft else target
        options = {"reduction": reduction, "lse_square_scale": 0.1, "label_smoothing": 0.1}
        got = ours(thrifty_place, x, target, entropy=entropy, argmax=argmax, **options)
        whole = ours(thrifty_place, x, target, **options)
        assert (got.entropy is not None) == entropy and (got.argmax is not None) == argmax
        for g, w in zip(got, whole, strict=True):
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-6, atol=0)
        ups = {name: u for name, u in upstreams(whole).items() if name != "entropy"}
        leaves = [x, target] if soft else [x]
        torch.testing.assert_close(
            differentiated(got, leaves, ups),
            differentiated(whole, leaves, ups),
            rtol=1e-5,
            atol=1e-9,
        )

    @pytest.mark.parametrize("bad", [{"entropy": 1}, {"argmax": None}, {"entropy": "yes"}], ids=str)
    def test_anything_but_a_bool_is_refused(self, bad):
        with pytest.raises(TypeError, match="must be True or False"):
            lossfuse.cross_entropy_stats(torch.randn(2, 3), torch.tensor([0, 1]), **bad)

    def test_no_grad_is_the_same(self, thrifty_place):
        x, target = logits_and_ids(5, 600, torch.bfloat16, device=thrifty_place.device)
        want = ours(thrifty_place, x, target)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = ours(thrifty_place, x.detach(), target)
            assert not any(t.requires_grad for t in got)
            torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-6, atol=0)

    def test_classes_and_counts_have_no_gradient(self, thrifty_place):
        x, target = logits_and_ids(5, 17, device=thrifty_place.device)
        for reduction in ("none", "mean"):
            got = ours(thrifty_place, x, target, reduction=reduction)
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
    @pytest.mark.parametrize(
        "v", [511, 2049, pytest.param(32000, marks=pytest.mark.slow), 50257, 128257]
    )
    def test_plain(self, thrifty_place, v, dtype):
        """Each statistic alone, and all of them."""
        x, target = logits_and_ids(3, v, dtype, thrifty_place.device)
        got, (want, wide) = (
            ours(thrifty_place, x, target, reduction="none"),
            wanted(x, target, reduction="none"),
        )
        assert_statistics_close(got, want)
        ups = upstreams(got)
        p = torch.softmax(x.detach().double(), 1)
        of_entropy = entropy_terms(x, ups)
        for names in (*((name,) for name in FLOATS), FLOATS):
            some = {name: ups[name] for name in names}
            (g,), (w,) = (
                differentiated(s, ls, some, retain_graph=True)
                for s, ls in ((got, [x]), (want, wide))
            )
            terms = of_entropy if "entropy" in names else 0.0
            if len(names) > 1:
                terms = terms + p * sum(u.abs() for u in some.values())[:, None]
            assert_gradient_close(g, w, terms=terms)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_policy_with_a_temperature_and_a_cap(self, thrifty_place, dtype):
        """Probabilities' ratio and an entropy bonus, of every token its own weight; the loss is
        only looked at."""
        options = {
            "reduction": "none",
            "softcap": 30.0,
            "logit_scale": 1 / 0.7,
            "lse_square_scale": 1e-4,
        }
        x, target = logits_and_ids(4, 32000, dtype, thrifty_place.device)
        got, (want, wide) = ours(thrifty_place, x, target, **options), wanted(x, target, **options)
        assert_statistics_close(got, want)
        ups = upstreams(got, ("target_logprob", "entropy", "z_loss"))
        (g,), (w,) = differentiated(got, [x], ups), differentiated(want, wide, ups)
        p = torch.softmax(30.0 * torch.tanh(x.detach().double() / 0.7 / 30.0), 1)
        assert_gradient_close(
            g,
            w,
            terms=entropy_terms(x, ups, **options) + 2 * p * ups["target_logprob"].abs()[:, None],
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_distillation(self, thrifty_place, dtype):
        x, _ = logits_and_ids(3, 32000, dtype, thrifty_place.device)
        target = probabilities(3, 32000, dtype, thrifty_place.device)
        got, (want, wide) = (
            ours(thrifty_place, x, target, reduction="none"),
            wanted(x, target, reduction="none"),
        )
        assert_statistics_close(got, want)
        ups = upstreams(got)
        (dx, dt), (wx, wt) = differentiated(got, [x, target], ups), differentiated(want, wide, ups)
        q, p = target.detach().double(), torch.softmax(x.detach().double(), 1)
        both = sum(u.abs() for u in ups.values())[:, None]
        assert_gradient_close(
            dx, wx, terms=entropy_terms(x, ups) + (q + p * (1 + q.sum(1, keepdim=True))) * both
        )
        assert_gradient_close(dt, wt, terms=wt.abs() + 1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_gradients_formed_and_made(self, thrifty_place, reduction, dtype):
        """The loss alone, the loss and an entropy, the loss again: of one graph."""
        x, target = logits_and_ids(4, 5000, dtype, thrifty_place.device)
        got, (want, wide) = (
            ours(thrifty_place, x, target, reduction=reduction),
            wanted(x, target, reduction=reduction),
        )
        scale = 512.0 if reduction == "mean" else 1.0
        ups = {name: u * scale for name, u in upstreams(got, ("loss", "entropy")).items()}
        for names in (("loss",), ("loss", "entropy"), ("entropy",), ("loss",)):
            some = {name: ups[name] for name in names}
            (g,), (w,) = (
                differentiated(s, ls, some, retain_graph=True)
                for s, ls in ((got, [x]), (want, wide))
            )
            assert_gradient_close(
                g,
                w,
                terms=entropy_terms(x, ups)
                + torch.softmax(x.detach().double(), 1) * float(ups["loss"].abs()),
            )


CASES = [
    pytest.param(17, torch.float32, assert_formula_close, id="V17-fp32"),
    pytest.param(32000, torch.float32, assert_gradient_close, id="V32000-fp32"),
    pytest.param(32000, torch.bfloat16, assert_gradient_close, id="V32000-bf16"),
]


@functools.cache
def mixture(v, dtype):
    """(logits, targets, the gradient of the mutants' objective, ours)."""
    x, target = logits_and_ids(8, v, dtype)
    options = {
        "softcap": mutants.SOFTCAP,
        "logit_scale": mutants.LOGIT_SCALE,
        "lse_square_scale": mutants.Z_SCALE,
    }
    stats, (leaf,) = wanted(x, target, **options)
    got = lossfuse.cross_entropy_stats(x, target, **options)
    return (
        x,
        target,
        torch.autograd.grad(mutants.objective(stats, x), leaf)[0],
        torch.autograd.grad(mutants.objective(got, x), x)[0],
    )


class TestTheComparisonRejects:
    @pytest.mark.parametrize(("v", "dtype", "compare"), CASES)
    def test_not_what_is_right(self, v, dtype, compare):
        x, target, want, got = mixture(v, dtype)
        torch.testing.assert_close(
            mutants.statistics_gradient(x, target), want, rtol=1e-9, atol=1e-14
        )
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
        assert_statistics_close(
            lossfuse.cross_entropy_stats(x, target, reduction="none", lse_square_scale=0.1), want
        )
        with pytest.raises(AssertionError):
            got = want._replace(**{name: getattr(want, name).roll(1)})
            assert_statistics_close(got, want)


def where_they_are_looked_at(place):
    """Ids, that is: on the CPU everywhere."""
    return contextlib.nullcontext() if place.device == "cpu" else lossfuse.debug_targets()


def shifted(stats, names):
    return [getattr(stats, name).detach().cpu() for name in names]


class TestHardRows:
    @pytest.mark.parametrize(
        "offset",
        [1e4, 2.0**24, *(pytest.param(x, marks=pytest.mark.slow) for x in (-1e4, -(2.0**24)))],
    )
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_a_common_offset_cancels_but_from_the_lse(self, place, soft, offset):
        """Multiples of 2, so that every sum is exact in fp32."""
        x, target = logits_and_ids(6, 3000)
        x = (x.detach() / 2).round() * 2
        target = probabilities(6, 3000).detach() if soft else target
        names = ("loss", "target_logprob", "entropy", "argmax")
        made = []
        for logits in (x, x + offset):
            leaf = logits.to(place.device).requires_grad_()
            stats = ours(place, leaf, target.to(place.device), reduction="none")
            made.append((stats, differentiated(stats, [leaf], upstreams(stats, FLOATS))[0]))
        (here, grad), (there, moved) = made
        torch.testing.assert_close(
            shifted(there, names), shifted(here, names), rtol=1e-6, atol=1e-12
        )
        torch.testing.assert_close(moved, grad, rtol=1e-5, atol=1e-9)
        valid = here.argmax >= 0
        torch.testing.assert_close(
            there.lse[valid].double(), here.lse[valid].double() + offset, rtol=2.0**-23, atol=0
        )

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "one-hot"])
    @pytest.mark.parametrize("margin", [5.0, 12.0, 17.0, 25.0, 40.0])
    def test_a_confident_row_keeps_its_digits(self, fast_place, margin, soft):
        """Where the target leads: below 6e-8, an entropy formed as lse - E[x] is 0 in fp32 or
        rounding."""
        v = 1000
        x = torch.zeros(3, v)
        target = torch.tensor([0, 500, v - 1])
        x[torch.arange(3), target] = margin
        x = x.to(fast_place.device).requires_grad_()
        ids = target
        target = torch.nn.functional.one_hot(target, v).float() if soft else target
        got = ours(fast_place, x, target.to(fast_place.device), reduction="none")
        q = (v - 1) * math.exp(-margin)
        others = q / (1 + q)
        assert got.entropy.tolist() == pytest.approx(
            [math.log1p(q) + others * margin] * 3, rel=1e-5
        )
        assert got.target_logprob.tolist() == pytest.approx([-math.log1p(q)] * 3, rel=1e-5)
        (grad,) = torch.autograd.grad(got.entropy.sum(), x)
        want = others / (1 + q) * margin
        assert grad[torch.arange(3), ids].tolist() == pytest.approx([-want] * 3, rel=1e-5)
        assert grad[0, 1].item() == pytest.approx(want / (v - 1), rel=1e-5)

    def test_a_confident_row_whose_target_is_another_is_near_zero(self, fast_place):
        """Of the entropy of such a row only 1e-7 is left; its gradient keeps its digits."""
        x = torch.zeros(1, 1000)
        x[0, 3] = 20.0
        x = x.to(fast_place.device).requires_grad_()
        got = ours(fast_place, x, torch.tensor([5], device=fast_place.device), reduction="none")
        want, wide = wanted(x, torch.tensor([5], device=fast_place.device), reduction="none")
        torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=0, atol=2e-7)
        (g,), (w,) = (
            torch.autograd.grad(got.entropy.sum(), x),
            torch.autograd.grad(want.entropy.sum(), wide),
        )
        assert_gradient_close(g, w)

    @pytest.mark.parametrize(
        "where", [slice(0, 4096), slice(4096, None), slice(1, None), slice(0, -1)], ids=str
    )
    @pytest.mark.parametrize(
        "options", [{}, {"softcap": 15.0}, {"logit_scale": 0.5}], ids=["plain", "softcap", "scale"]
    )
    def test_minus_infinity_over_whole_blocks(self, fast_place, where, options):
        x, _ = logits_and_ids(4, 5000)
        x = x.detach()
        x[:, where] = -INF
        finite = (x[0] > -INF).nonzero()[:, 0]
        target = finite[torch.tensor([0, len(finite) // 2, -1, 0])]
        x = x.to(fast_place.device).requires_grad_()
        got = check(fast_place, x, target.to(fast_place.device), **options, reduction="none")
        if "softcap" not in options:
            assert got.entropy.isfinite().all() and (len(finite) > 1 or not got.entropy.any())

    def test_a_target_of_minus_infinity(self, place):
        x, target = logits_and_ids(3, 50, ignored=0.0)
        x = x.detach()
        x[1, target[1]] = -INF
        x = x.to(place.device).requires_grad_()
        got = check(
            place,
            x,
            target.to(place.device),
            names=("lse", "target_logprob", "entropy"),
            reduction="none",
        )
        assert got.target_logprob[1] == -INF and got.entropy.isfinite().all()

    def test_undefined_rows_stay_alone(self, place):
        """And say so: no finite number comes of them, but for the class torch's argmax names."""
        x, target = logits_and_ids(5, 700, device=place.device, ignored=0.0)
        whole = ours(place, x, target, reduction="none")
        dirty = x.detach().clone()
        dirty[0], dirty[1, 250], dirty[2, 600] = -INF, INF, NAN
        dirty.requires_grad_()
        got = ours(place, dirty, target, reduction="none")
        for name in FLOATS:
            assert not getattr(got, name)[:3].isfinite().any()
            assert getattr(got, name)[1].isnan() or name == "lse"
            torch.testing.assert_close(
                getattr(got, name)[3:], getattr(whole, name)[3:], rtol=1e-6, atol=0
            )
        classes = got.argmax.tolist()
        assert classes[:2] + classes[3:] == [0, 250, *whole.argmax[3:].tolist()]
        # kernels compare numbers, and NaN is none
        assert classes[2] == 600 or (place.impl == "triton" and 0 <= classes[2] < 700)
        ups = upstreams(got)
        grads = [differentiated(s, [leaf], ups)[0] for s, leaf in ((got, dirty), (whole, x))]
        assert grads[0][:3].isnan().any(1).all()
        torch.testing.assert_close(grads[0][3:], grads[1][3:], rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("of_head", [False, True], ids=["logits", "head"])
    def test_an_infinite_logit_has_an_infinite_lse_and_nothing_else(self, place, of_head, soft):
        """As torch.logsumexp has it, however many there are, but beside a NaN; every gradient of
        its row is NaN."""
        x, target = logits_and_ids(5, 700, device=place.device, ignored=0.0)
        target = probabilities(5, 700).detach().to(place.device) if soft else target
        x = x.detach()
        x[0, 250], x[1, 3], x[1, 600], x[2], x[3, 9], x[3, 500] = INF, INF, INF, INF, INF, NAN
        weight = ()
        if of_head:
            # 2 * 3e38 is INF in float32, and 0 * INF would be NaN
            weight = (torch.where(x.isfinite(), x, 3e38).T.contiguous(),)
            x = torch.diag(torch.tensor([2.0, 2.0, 2.0, NAN, 1.0], device=place.device))
        x.requires_grad_()
        function = lossfuse.linear_cross_entropy_stats if of_head else lossfuse.cross_entropy_stats
        got = function(x, *weight, target, reduction="none", lse_square_scale=0.1, impl=place.impl)
        assert got.lse[:3].tolist() == got.z_loss[:3].tolist() == [INF] * 3
        assert got.lse[3].isnan() and got.lse[4].isfinite()
        for t in (got.loss, got.target_logprob, got.entropy):
            assert t[:4].isnan().all() and t[4].isfinite()
        (dx,) = torch.autograd.grad(got.lse.sum(), x)
        assert dx[:4].isnan().all()
        assert dx[4].isfinite().all() or of_head

    @pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e30, 0.0], ids=str)
    def test_masked_by_a_large_negative_number(self, place, value):
        """Whole rows of it are uniform; a row half of it is a row of the others."""
        x, target = logits_and_ids(4, 600, ignored=0.0)
        x = x.detach()
        x[0] = value
        x[1, ::2] = value
        target[1] = 1
        # not even in fp64 has torch's logsumexp a slope there
        names = ("loss", "target_logprob", "entropy")
        got = check(
            place,
            x.to(place.device).requires_grad_(),
            target.to(place.device),
            names=names,
            reduction="none",
        )
        assert (
            got.entropy[0].item() == pytest.approx(math.log(600), rel=1e-6) and got.argmax[0] == 0
        )

    @pytest.mark.parametrize("poison", [NAN, INF, -INF])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_ignored_rows_hold_anything_and_get_anything(self, place, reduction, poison):
        x, target = logits_and_ids(6, 300, device=place.device, ignored=0.0)
        target[2], target[4] = -100, -100
        dirty = x.detach().clone()
        dirty[2], dirty[4, 5] = poison, poison
        dirty.requires_grad_()
        options = {"lse_square_scale": 0.1, "label_smoothing": 0.1, "reduction": reduction}
        got, whole = ours(place, dirty, target, **options), ours(place, x, target, **options)
        torch.testing.assert_close(tuple(got), tuple(whole), rtol=1e-6, atol=0)
        ups = upstreams(got)
        for u in ups.values():
            if u.dim() and place.impl != "reference":
                u[2] = poison
        (g,) = differentiated(got, [dirty], ups)
        (w,) = differentiated(whole, [x], upstreams(whole))
        assert not g[[2, 4]].any()
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-9)

    def test_classes_without_weight_count_in_the_statistics(self, place):
        """A weight of 0 takes a class of -inf out of the loss, and out of nothing else."""
        x = torch.tensor([[0.0, -INF, 1.0], [0.5, -INF, 2.0]], device=place.device)
        q = torch.tensor(
            [[0.2, 0.3, 0.5], [0.5, 0.0, 0.5]], device=place.device, requires_grad=True
        )
        got = ours(
            place, x, q, torch.tensor([1.0, 0.0, 1.0], device=place.device), reduction="none"
        )
        assert (
            got.loss.isfinite().all()
            and got.target_logprob[0] == -INF
            and got.target_logprob[1].isfinite()
        )
        (dq,) = torch.autograd.grad(got.target_logprob.sum(), q)
        logp = x.log_softmax(1)
        torch.testing.assert_close(dq[:, [0, 2]], logp[:, [0, 2]])
        assert dq[0, 1] == -INF and dq[1, 1] == 0.0

    @pytest.mark.parametrize("v", [2, 511, 512, 513, 1300, 5000])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_the_first_of_equals(self, place, soft, v):
        x = torch.zeros(6, v)
        x[1, [v // 2, v - 1]] = 3.0
        x[2, -1] = 3.0
        x[3, v // 3 :] = 3.0
        x[4] = torch.arange(v) % 2
        x[5, 0] = -1.0
        target = torch.softmax(torch.randn(6, v), 1) if soft else torch.zeros(6, dtype=torch.long)
        for dtype in (torch.float32, torch.bfloat16):
            got = ours(place, x.to(place.device, dtype), target.to(place.device), reduction="none")
            assert got.argmax.tolist() == [0, v // 2, v - 1, v // 3, 1, 1]

    @pytest.mark.parametrize("scale", [0.0, -2.0, 50.0])
    def test_scales_of_any_sign(self, place, scale):
        x, target = logits_and_ids(4, 129, device=place.device, spread=1.0)
        got = check(place, x, target, logit_scale=scale, reduction="none")
        if scale == -2.0:
            valid = got.argmax >= 0
            assert torch.equal(got.argmax[valid], x.argmin(1)[valid])

    def test_bad_ids(self, place):
        x = torch.randn(3, 7, device=place.device, requires_grad=True)
        for reduction in ("none", "mean"):
            for bad in (7, -1):
                target = torch.tensor([0, bad, -100], device=place.device)
                with (
                    pytest.raises(
                        IndexError, match=f"target of row 1 is {bad} but input has 7 classes"
                    ),
                    where_they_are_looked_at(place),
                ):
                    ours(place, x, target, reduction=reduction)

    def test_bad_ids_where_nobody_looks_are_nan(self):
        target = torch.tensor([0, 7, -100])

        def f(x):
            got = lossfuse.cross_entropy_stats(x, target, reduction="none", lse_square_scale=0.1)
            return sum(t.sum() for t in (got.lse, got.target_logprob, got.entropy)), got

        grad, got = torch.func.grad(f, has_aux=True)(torch.randn(3, 7))
        for name in FLOATS:
            assert getattr(got, name).isnan().tolist() == [False, True, False]
        assert (
            got.argmax[1:].tolist() == [-1, -1]
            and grad[1].isnan().all()
            and grad[[0, 2]].isfinite().all()
        )


class TestShapes:
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("batch", [(), (1,), (4,), (4, 3), (2, 3, 4), (2, 1, 3, 2)], ids=str)
    def test_dimensions(self, thrifty_place, batch, reduction):
        x = torch.randn(*batch[:1], 7, *batch[1:], device=thrifty_place.device, requires_grad=True)
        target = torch.randint(0, 7, batch, device=thrifty_place.device)
        if target.dim() and target.numel() > 1:
            target[..., 0] = -100
        weight = class_weight(7, thrifty_place.device)
        got = check(thrifty_place, x, target, weight, reduction=reduction, lse_square_scale=0.1)
        assert got.lse.shape == got.argmax.shape == batch and got.n_valid.shape == ()
        soft = (
            torch.softmax(torch.randn_like(x), 0 if x.dim() == 1 else 1).detach().requires_grad_()
        )
        assert (
            check(thrifty_place, x, soft, weight, reduction=reduction, lse_square_scale=0.1).n_valid
            == target.numel()
        )

    @pytest.mark.parametrize(
        "layout",
        [
            "transposed",
            "column slice",
            "every other class",
            "rows expanded",
            "classes expanded",
            "batch, time, vocabulary",
        ],
    )
    def test_strides(self, thrifty_place, layout):
        make = {
            "transposed": lambda: torch.randn(9, 6).t(),
            "column slice": lambda: torch.randn(6, 20)[:, 3:12],
            "every other class": lambda: torch.randn(6, 18)[:, ::2],
            "rows expanded": lambda: torch.randn(1, 9).expand(6, 9),
            "classes expanded": lambda: torch.randn(6, 1).expand(6, 9),
            "batch, time, vocabulary": lambda: torch.randn(2, 3, 9).transpose(1, 2),
        }[layout]
        # a move would make most of them dense
        with torch.device(thrifty_place.device):
            x = make()
            target = torch.randint(0, 9, (6,) if x.dim() == 2 else (2, 3)).repeat_interleave(2, -1)[
                ..., ::2
            ]
        for reduction in ("none", "mean"):
            check(thrifty_place, x.requires_grad_(), target, reduction=reduction)

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize(("reduction", "value"), [("none", None), ("mean", NAN), ("sum", 0.0)])
    @pytest.mark.parametrize("asked", [{}, {"entropy": False}, {"argmax": False}], ids=str)
    def test_no_rows(self, thrifty_place, asked, reduction, value, soft):
        x = torch.empty(0, 5, device=thrifty_place.device, requires_grad=True)
        target = (
            torch.empty(0, 5, device=thrifty_place.device)
            if soft
            else torch.empty(0, dtype=torch.int64, device=thrifty_place.device)
        )
        got = ours(thrifty_place, x, target, reduction=reduction, lse_square_scale=0.1, **asked)
        assert got.lse.shape == got.target_logprob.shape == (0,) and got.n_valid == 0
        assert got.argmax is None or (got.argmax.shape == (0,) and got.argmax.dtype == torch.int64)
        assert got.entropy is None or (
            got.entropy.shape == (0,) and got.entropy.dtype == torch.float32
        )
        if value is not None:
            torch.testing.assert_close(
                [got.loss.item(), got.z_loss.item()], [value] * 2, equal_nan=True
            )
        assert torch.autograd.grad(got.loss.sum() + got.lse.sum(), x)[0].shape == (0, 5)
        assert ours(
            thrifty_place,
            torch.empty(2, 5, 0, device=thrifty_place.device),
            torch.empty(2, 0, dtype=torch.int64, device=thrifty_place.device),
        ).lse.shape == (
            2,
            0,
        )

    def test_one_class(self, thrifty_place):
        x = torch.tensor([[3.0], [-2.0]], device=thrifty_place.device, requires_grad=True)
        for target in (
            torch.tensor([0, -100], device=thrifty_place.device),
            torch.ones(2, 1, device=thrifty_place.device),
        ):
            got = ours(thrifty_place, x, target, reduction="none")
            assert (
                got.entropy.tolist() == got.target_logprob.tolist() == [0.0, 0.0]
                and got.lse[0] == 3.0
            )
            assert not torch.autograd.grad(got.entropy.sum() + got.target_logprob.sum(), x)[0].any()

    @pytest.mark.parametrize(("reduction", "value"), [("none", 0.0), ("mean", NAN), ("sum", 0.0)])
    def test_all_ignored(self, thrifty_place, reduction, value):
        x = torch.randn(4, 9, device=thrifty_place.device, requires_grad=True)
        got = ours(
            thrifty_place,
            x,
            torch.full((4,), -100, device=thrifty_place.device),
            reduction=reduction,
            lse_square_scale=0.1,
        )
        for t in (got.loss, got.z_loss):
            torch.testing.assert_close(t.detach(), torch.full_like(t, value), equal_nan=True)
        assert got.argmax.tolist() == [-1] * 4 and got.n_valid == 0
        assert not any(t.any() for t in (got.lse, got.target_logprob, got.entropy))
        names = FLOATS if reduction == "mean" else DIFFERENTIABLE
        assert not differentiated(got, [x], upstreams(got, names))[0].any()

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
    def test_ids_of_any_width(self, thrifty_place, dtype):
        x, target = logits_and_ids(6, 11, device=thrifty_place.device, ignored=0.0)
        torch.testing.assert_close(
            tuple(ours(thrifty_place, x, target.to(dtype))),
            tuple(ours(thrifty_place, x, target)),
            rtol=0,
            atol=0,
        )


class TestAutograd:
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("impl", ["reference", "torch"])
    def test_gradcheck_and_gradgradcheck_in_fp64(self, impl, soft, reduction):
        """Double backward of every statistic, of each by itself among the outputs."""
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        target = (
            torch.softmax(torch.randn(3, 4, dtype=torch.float64), 1).requires_grad_()
            if soft
            else torch.tensor([1, -100, 3])
        )
        options = {
            "label_smoothing": 0.2,
            "softcap": 4.0,
            "logit_scale": 1.5,
            "lse_square_scale": 0.1,
            "reduction": reduction,
            "impl": impl,
        }

        def f(x, target):
            got = lossfuse.cross_entropy_stats(
                x, target, torch.linspace(0.5, 2, 4, dtype=torch.float64), **options
            )
            return tuple(getattr(got, name) for name in DIFFERENTIABLE)

        assert gradcheck(f, (x, target), check_undefined_grad=False)
        assert gradgradcheck(f, (x, target), check_undefined_grad=False)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_double_backward(self, thrifty_place, reduction, name):
        x, target = logits_and_ids(5, 11, device=thrifty_place.device)
        options = {"reduction": reduction, "lse_square_scale": 0.1, "logit_scale": 0.8}

        def second(stats, leaf):
            (g,) = torch.autograd.grad(getattr(stats, name).sum(), leaf, create_graph=True)
            return torch.autograd.grad((g**2).sum(), leaf)[0]

        want, wide = wanted(x, target, **options)
        assert_formula_close(
            second(ours(thrifty_place, x, target, **options), x), second(want, wide[0])
        )

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_backwards_in_any_order(self, thrifty_place, reduction):
        """A gradient formed in the forward is handed over once, and to nobody who asks for more
        than it is."""
        x, target = logits_and_ids(6, 40, device=thrifty_place.device)
        got, (want, wide) = (
            f(x, target, reduction=reduction, lse_square_scale=0.1)
            for f in (functools.partial(ours, thrifty_place), wanted)
        )
        ups = upstreams(got)
        for names in itertools.permutations(
            [("loss",), ("entropy",), ("loss", "lse"), ("loss",)], 3
        ):
            again = (ours(thrifty_place, x, target, reduction=reduction, lse_square_scale=0.1), [x])
            kept = []
            for some in names:
                given = {name: ups[name] for name in some}
                (g,), (w,) = (
                    differentiated(s, ls, given, retain_graph=True)
                    for s, ls in (again, (want, wide))
                )
                assert_formula_close(g, w)
                kept.append((g, g.clone()))
            assert all(torch.equal(g, k) for g, k in kept)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_gradients_accumulate_in_a_leaf(self, thrifty_place, reduction):
        x, target = logits_and_ids(6, 40, device=thrifty_place.device)
        for _ in range(2):
            got = ours(thrifty_place, x, target, reduction=reduction)
            got.loss.sum().backward(retain_graph=True)
            got.entropy.sum().backward(retain_graph=True)
            (got.loss.sum() * 2.0).backward()
        got = ours(thrifty_place, x, target, reduction=reduction)
        (once,) = torch.autograd.grad(3.0 * got.loss.sum() + got.entropy.sum(), x)
        torch.testing.assert_close(x.grad, 2 * once, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("shape", ["expanded", "strided", "transposed"])
    def test_upstream_gradients_of_any_stride(self, thrifty_place, shape):
        x = torch.randn(3, 7, 4, device=thrifty_place.device, requires_grad=True)
        target = torch.randint(0, 7, (3, 4), device=thrifty_place.device)
        # a move would make it dense
        with torch.device(thrifty_place.device):
            up = {
                "expanded": torch.tensor(0.3).expand(3, 4),
                "strided": torch.randn(6, 8)[::2, ::2],
                "transposed": torch.randn(4, 3).t(),
            }
        up = up[shape]
        got, (want, wide) = (
            ours(thrifty_place, x, target, reduction="none"),
            wanted(x, target, reduction="none"),
        )
        ups = dict.fromkeys(FLOATS, up)
        assert_formula_close(differentiated(got, [x], ups)[0], differentiated(want, wide, ups)[0])

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("name", FLOATS)
    def test_batched_upstream_gradients(self, thrifty_place, name, reduction):
        x, target = logits_and_ids(3, 5, device=thrifty_place.device)
        got, (want, wide) = (
            ours(thrifty_place, x, target, reduction=reduction),
            wanted(x, target, reduction=reduction),
        )
        got, want = getattr(got, name), getattr(want, name)
        ups = torch.randn(4, *got.shape, device=thrifty_place.device)
        (g,) = torch.autograd.grad(got, x, ups, is_grads_batched=True)
        assert_formula_close(
            g, torch.autograd.grad(want, wide, ups.double(), is_grads_batched=True)[0]
        )

    def test_logits_changed_before_the_backward(self, thrifty_place):
        """The loss alone may not need them, a statistic does."""
        x, target = logits_and_ids(6, 40, device=thrifty_place.device)
        for name, reduction in itertools.product(("loss", "entropy"), ("none", "mean")):
            z = x * 1.0
            got = getattr(ours(thrifty_place, z, target, reduction=reduction), name).sum()
            (want,) = torch.autograd.grad(
                getattr(ours(thrifty_place, x, target, reduction=reduction), name).sum(), x
            )
            with torch.no_grad():
                z.zero_()
            try:
                (g,) = torch.autograd.grad(got, x)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
            else:
                torch.testing.assert_close(g, want)

    def test_statistics_changed_before_the_backward(self, thrifty_place):
        """As by a mask; what is another's business stays."""
        x, target = logits_and_ids(6, 40, device=thrifty_place.device)
        for reduction in ("none", "mean"):
            (want,) = torch.autograd.grad(
                ours(thrifty_place, x, target, reduction=reduction).loss.sum(), x
            )
            got = ours(thrifty_place, x, target, reduction=reduction)
            with torch.no_grad():
                for t in (got.lse, got.entropy, got.target_logprob, got.argmax):
                    t.zero_()
            torch.testing.assert_close(
                torch.autograd.grad(got.loss.sum(), x)[0], want, rtol=1e-6, atol=1e-9
            )

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    def test_checkpointing(self, thrifty_place, reduction, reentrant):
        x, target = logits_and_ids(5, 40, device=thrifty_place.device)

        def f(x, target):
            got = ours(thrifty_place, x, target, reduction=reduction)
            return (
                got.loss.sum()
                + (got.entropy * torch.arange(5.0, device=thrifty_place.device)).sum()
            )

        (want,) = torch.autograd.grad(f(x, target), x)
        torch.utils.checkpoint.checkpoint(f, x, target, use_reentrant=reentrant).backward()
        torch.testing.assert_close(x.grad, want)

    def test_what_is_held_goes_through_hooks(self, thrifty_place):
        x, target = logits_and_ids(5, 40, device=thrifty_place.device)
        stored = []
        for reduction in ("none", "mean"):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: stored.append(t.clone()) or len(stored) - 1, lambda i: stored[i].clone()
            ):
                got = ours(thrifty_place, x, target, reduction=reduction)
            want = ours(thrifty_place, x, target, reduction=reduction)
            ups = upstreams(got)
            torch.testing.assert_close(
                differentiated(got, [x], ups), differentiated(want, [x], ups)
            )

    def test_what_is_saved_is_no_second_tensor_of_the_logits_size(self, fast_place):
        x, target = logits_and_ids(5, 1000, device=fast_place.device)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            ours(fast_place, x, target, reduction="none")
        assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 8 * len(x)
        saved.clear()
        with (
            torch.no_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            ours(fast_place, x, target)
        assert saved == []

    def test_autocast_changes_nothing(self, thrifty_place):
        x, target = logits_and_ids(5, 17, torch.bfloat16, device=thrifty_place.device)
        for reduction in ("none", "mean"):
            want = ours(thrifty_place, x, target, lse_square_scale=0.1, reduction=reduction)
            with torch.autocast(thrifty_place.device, dtype=torch.bfloat16):
                got = ours(thrifty_place, x, target, lse_square_scale=0.1, reduction=reduction)
            torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
            ups = upstreams(got)
            torch.testing.assert_close(
                differentiated(got, [x], ups), differentiated(want, [x], ups), rtol=0, atol=0
            )

    def test_a_weight_that_requires_grad(self):
        x, target = logits_and_ids(5, 11)
        weight = class_weight(11).requires_grad_()
        got = lossfuse.cross_entropy_stats(x, target, weight, reduction="sum")
        # torch has no gradient for a weight beside ids
        want, wide = wanted(x, target, weight.detach(), reduction="sum")
        gx, gw = differentiated(got, [x, weight], ups := upstreams(got))
        assert_formula_close(gx, differentiated(want, wide, ups)[0])
        rows = torch.nn.functional.cross_entropy(x, target, reduction="none").detach()
        torch.testing.assert_close(
            gw, ups["loss"].float() * torch.zeros(11).index_add(0, target.clamp(min=0), rows)
        )
        with pytest.raises(ValueError, match="weight requires grad"):
            lossfuse.cross_entropy_stats(x, target, weight, impl="torch")


class TestTransforms:
    """Which "auto" sends to the reference."""

    def mixture(self, f, target):
        def g(x):
            got = f(x, target)
            return got.loss + (got.entropy + got.target_logprob).sum() + (got.lse**2).sum()

        return g

    def test_grad_jvp_and_hessian(self):
        x, target = torch.randn(3, 5), torch.tensor([0, 4, -100])
        got, want = (
            self.mixture(f, target)
            for f in (lossfuse.cross_entropy_stats, program.cross_entropy_stats)
        )
        torch.testing.assert_close(torch.func.grad(got)(x), torch.func.grad(want)(x))
        torch.testing.assert_close(torch.func.hessian(got)(x), torch.func.hessian(want)(x))
        tangent = torch.randn(3, 5)
        torch.testing.assert_close(
            torch.func.jvp(got, (x,), (tangent,)), torch.func.jvp(want, (x,), (tangent,))
        )

    def test_forward_mode(self):
        x, target = logits_and_ids(5, 11)
        tangent = torch.randn(5, 11)
        with forward_ad.dual_level():
            stats = lossfuse.cross_entropy_stats(forward_ad.make_dual(x.detach(), tangent), target)
            got = {name: forward_ad.unpack_dual(getattr(stats, name)).tangent for name in FLOATS}
        stats = lossfuse.cross_entropy_stats(x, target)
        for name in FLOATS:
            (grad,) = torch.autograd.grad(getattr(stats, name).sum(), x, retain_graph=True)
            torch.testing.assert_close(
                got[name].sum(), (grad * tangent).sum(), rtol=1e-4, atol=1e-5
            )

    def test_vmap(self):
        x, target = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
        got = torch.func.vmap(lossfuse.cross_entropy_stats)(x, target)
        for i in range(4):
            assert_statistics_close(
                type(got)(*(t[i] for t in got)),
                program.cross_entropy_stats(x[i].double(), target[i]),
            )


class TestThreadsAndMemory:
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_numbers_are_those_of_one_thread(self, dtype, soft, monkeypatch):
        monkeypatch.setattr(torch_rows, "THREAD_LEAST_BYTES", 1 << 10)
        monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 1 << 13)
        n, v = 131, 400
        x, target = logits_and_ids(n, v, dtype)
        target = probabilities(n, v, dtype) if soft else target
        used, real = [], threads.run
        monkeypatch.setattr(
            threads, "run", lambda tasks, count: used.append(count) or real(tasks, count)
        )
        made = []
        for count in (3, 1):
            monkeypatch.setattr(threads, "workers", lambda count=count: count)
            for reduction in ("none", "mean"):
                got = lossfuse.cross_entropy_stats(
                    x, target, reduction=reduction, lse_square_scale=0.1
                )
                leaves = [x, target] if soft else [x]
                loss = differentiated(got, leaves, upstreams(got, ("loss",)), retain_graph=True)
                made.append((*got, *differentiated(got, leaves, upstreams(got)), *loss))
        assert used and set(used) == {3}
        for several, one in zip(made[:2], made[2:], strict=True):
            torch.testing.assert_close(
                several, one, rtol=1e-5 if dtype == torch.float32 else 2.0**-7, atol=1e-9
            )

    def test_repeated_runs_are_bitwise_equal(self, thrifty_place):
        x, target = logits_and_ids(16, 5000, device=thrifty_place.device)
        first, again = (ours(thrifty_place, x, target, reduction="none") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(*(differentiated(s, [x], upstreams(s))[0] for s in (first, again)))

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({}, id="plain"),
            pytest.param(
                {"softcap": 30.0, "label_smoothing": 0.1, "lse_square_scale": 1e-4},
                id="every",
                marks=pytest.mark.slow,
            ),
        ],
    )
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_nothing_larger_than_a_block_is_allocated(self, soft, options):
        n, v = 512, 16000
        x, target = (t.detach() for t in logits_and_ids(n, v))
        target = probabilities(n, v).detach() if soft else target
        grad, spec, up = torch.empty_like(x), LossSpec(**options), torch.ones(n)
        for upstream in (Upstream(up), Upstream(up, up, up, up)):
            with Largest() as largest:
                torch_rows.row_stats(x, target, None, spec, Wants(True, True), upstream, grad, None)
            assert 0 < largest.bytes <= torch_rows.CPU_BLOCK_BYTES < grad.nbytes / 3
        with Largest() as largest:
            torch_rows.row_stats(x, target, None, spec, Wants(True, True), None, None, None)
        assert 0 < largest.bytes <= torch_rows.CPU_BLOCK_BYTES

    def test_inputs_are_not_written_to(self, thrifty_place):
        x, target = logits_and_ids(6, 300, device=thrifty_place.device)
        t = probabilities(6, 300, device=thrifty_place.device)
        before = [a.detach().clone() for a in (x, target, t)]
        for aim, reduction in itertools.product((target, t), ("none", "mean")):
            got = ours(thrifty_place, x, aim, reduction=reduction)
            differentiated(got, [x], upstreams(got))
        assert all(torch.equal(a, b) for a, b in zip((x, target, t), before, strict=True))


class TestCompilers:
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_opcheck(self, thrifty_fast_place, soft):
        impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
        x, target = logits_and_ids(4, 19, device=device)
        target = probabilities(4, 19, device=device) if soft else target
        spec, weight = LossSpec(-100, 0.1, 20.0, 0.7, 1e-3), class_weight(19, device)
        settings = row_stats.OpArgs.of(spec, impl)
        for wants in (Wants(True, True), Wants(False, False)):
            torch.library.opcheck(row_stats.row_stats, (x, target, weight, *wants, *settings))
        *_, kept = row_stats.row_stats(x, target, weight, True, True, *settings)
        ups = [torch.randn(4, device=device, requires_grad=True) for _ in range(4)]
        for given in (ups, [None, ups[1], None, ups[3]]):
            torch.library.opcheck(
                row_stats.row_stats_grads,
                (x, target, weight, kept.detach(), *given, True, soft, *settings),
            )
        if impl == "torch":
            plain = (
                x.detach(),
                target.detach(),
                weight,
                ups[0].detach(),
                True,
                soft,
                True,
                True,
                *settings,
            )
            torch.library.opcheck(row_stats.row_stats_and_grads, plain)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_one_graph_with_the_numbers_of_eager(self, thrifty_place, soft, reduction):
        torch._dynamo.reset()
        x, target = logits_and_ids(6, 19, device=thrifty_place.device)
        target = probabilities(6, 19, device=thrifty_place.device) if soft else target

        def f(x, target):
            got = ours(thrifty_place, x * 1.5, target, lse_square_scale=0.1, reduction=reduction)
            mixture = (
                got.loss.sum() * 0.3
                + (got.entropy * got.target_logprob.detach()).sum()
                + got.lse.sum()
                + got.z_loss.sum()
            )
            return mixture, got.argmax, got.n_valid

        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        leaves = [x, target] if soft else [x]
        got, want = compiled(x, target), f(x, target)
        torch.testing.assert_close(got, want)
        got, want = (torch.autograd.grad(made[0], leaves) for made in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_inductor_with_ignored_rows(self):
        torch._dynamo.reset()
        x, target = logits_and_ids(16, 1000, torch.bfloat16)

        def f(x):
            got = lossfuse.cross_entropy_stats(x, target)
            return got.loss - 0.01 * got.entropy.sum() / got.n_valid

        compiled = torch.compile(f, fullgraph=True)
        torch.testing.assert_close(compiled(x), f(x))
        got, want = (torch.autograd.grad(g(x), x)[0] for g in (compiled, f))
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
