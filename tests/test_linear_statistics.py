"""Statistics of a head's rows against the torch program in fp64: formula, chunks, dtypes, fp16
units, autograd, memory, compilers."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lossfuse
import program
from allocations import Largest, least_peak
from closeness import assert_formula_close, assert_product_close, assert_statistics_close
from lossfuse import LinearOptions
from lossfuse.backends import torch_rows
from lossfuse.ops import head as head_ops
from lossfuse.ops import head_chunks, library
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
from rows import class_weight, head_and_ids, probabilities
from test_linear import chunks_of, relative_error
from test_statistics import where_they_are_looked_at

INF, NAN = float("inf"), float("nan")
HALF = [torch.bfloat16, torch.float16]
SINGLE = [
    (),
    *((name,) for name in OPTIONS),
    EVERYTHING,
    (*EVERYTHING, "none"),
    (*EVERYTHING, "normalizer"),
]
FLOATS = ("loss", "lse", "target_logprob", "entropy")
SUBSETS = [(name,) for name in DIFFERENTIABLE] + [
    ("loss", "entropy"),
    ("lse", "target_logprob"),
    ("entropy", "z_loss"),
    DIFFERENTIABLE,
]


def ours(operands, target, weight=None, **options):
    hidden, head, bias = operands
    return lossfuse.linear_cross_entropy_stats(
        hidden, head, target, linear_bias=bias, weight=weight, **options
    )


def wanted(operands, target, weight=None, **options):
    (hidden, head, bias, t, w), leaves = program.wide_leaves(*operands, target, weight)
    return program.linear_cross_entropy_stats(hidden, head, t, bias, w, **options), leaves


def leaves_of(operands, target):
    return [t for t in (*operands, target) if t is not None and t.requires_grad]


def check(
    operands, target, weight=None, names=DIFFERENTIABLE, *, impl="torch", chunks=None, **options
):
    got, (want, wide) = (
        ours(operands, target, weight, impl=impl, options=chunks, **options),
        wanted(operands, target, weight, **options),
    )
    assert_statistics_close(got, want)
    leaves, ups = leaves_of(operands, target), upstreams(got, names)
    for leaf, g, w in zip(
        leaves, differentiated(got, leaves, ups), differentiated(want, wide, ups), strict=True
    ):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        (assert_formula_close if g.dtype == torch.float32 else assert_product_close)(g, w)
    return got


@pytest.fixture
def narrow(monkeypatch):
    """As on CUDA: products take half precision to fp32, and the gradient of the logits is rounded
    before them."""
    monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)


class TestFormula:
    """5 rows of width 6 in chunks of 2, 2 and 1; 17 classes, so that rows of logits are padded."""

    @pytest.mark.parametrize(
        "names", THRIFTY_COMBINATIONS, ids=lambda names: "+".join(names) or "plain"
    )
    def test_class_ids(self, names):
        *operands, target = head_and_ids(5, 6, 17)
        weight, options = options_of(names, 17, "cpu")
        check(operands, target, weight, chunks=chunks_of(2, 17), **options)

    @pytest.mark.parametrize("names", SINGLE, ids=lambda names: "+".join(names) or "plain")
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_every_implementation(self, place, soft, names):
        *operands, target = head_and_ids(5, 6, 17, device=place.device)
        target = probabilities(5, 17, device=place.device) if soft else target
        weight, options = options_of(names, 17, place.device)
        check(operands, target, weight, impl=place.impl, chunks=chunks_of(3, 17), **options)

    @pytest.mark.parametrize("names", SUBSETS, ids="+".join)
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_some_statistics(self, thrifty_place, reduction, soft, names):
        *operands, target = head_and_ids(5, 6, 17, device=thrifty_place.device)
        target = probabilities(5, 17, device=thrifty_place.device) if soft else target
        weight, options = options_of(EVERYTHING, 17, thrifty_place.device)
        check(
            operands,
            target,
            weight,
            names,
            impl=thrifty_place.impl,
            chunks=chunks_of(3, 17),
            **(options | {"reduction": reduction}),
        )

    @pytest.mark.parametrize("ignore_index", [None, -1, 3])
    def test_ignored_ids(self, thrifty_place, ignore_index):
        *operands, target = head_and_ids(6, 4, 9, device=thrifty_place.device, ignored=0.0)
        target[::2] = -100 if ignore_index is None else ignore_index
        got = ours(operands, target, ignore_index=ignore_index, impl=thrifty_place.impl)
        assert (got.argmax[::2] == (-2 if ignore_index == -1 else -1)).all() and not got.lse[
            ::2
        ].any()
        if ignore_index is not None:
            check(
                operands,
                target,
                impl=thrifty_place.impl,
                chunks=chunks_of(4, 9),
                ignore_index=ignore_index,
            )

    def test_the_statistics_are_those_of_the_logits(self, place):
        *operands, target = head_and_ids(5, 6, 17, device=place.device)
        logits = torch.nn.functional.linear(*operands)
        want = lossfuse.cross_entropy_stats(logits, target, lse_square_scale=0.1, impl=place.impl)
        torch.testing.assert_close(
            tuple(ours(operands, target, lse_square_scale=0.1, impl=place.impl)), tuple(want)
        )

    @pytest.mark.parametrize("entropy", [True, False])
    @pytest.mark.parametrize("argmax", [True, False])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_what_is_not_asked_for_is_none(self, thrifty_place, reduction, argmax, entropy):
        *operands, target = head_and_ids(5, 6, 17, device=thrifty_place.device)
        options = {
            "reduction": reduction,
            "lse_square_scale": 0.1,
            "impl": thrifty_place.impl,
            "options": chunks_of(3, 17),
        }
        got, whole = (
            ours(operands, target, entropy=entropy, argmax=argmax, **options),
            ours(operands, target, **options),
        )
        assert (got.entropy is not None) == entropy and (got.argmax is not None) == argmax
        for g, w in zip(got, whole, strict=True):
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-6, atol=0)
        ups = upstreams(whole, ("loss", "lse", "target_logprob", "z_loss"))
        torch.testing.assert_close(
            differentiated(got, operands, ups), differentiated(whole, operands, ups)
        )


class TestShapes:
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3)], ids=str)
    def test_batches(self, shape, soft, reduction):
        n = torch.Size(shape).numel()
        hidden, weight, bias, target = head_and_ids(n, 4, 9)
        hidden = hidden.detach().reshape(*shape, 4).requires_grad_()
        target = (
            probabilities(n, 9).detach().reshape(*shape, 9).requires_grad_()
            if soft
            else target.reshape(shape)
        )
        got = check((hidden, weight, bias), target, reduction=reduction, chunks=chunks_of(2, 9))
        assert got.lse.shape == got.argmax.shape == shape

    @pytest.mark.parametrize("k", [(3,), (2, 3)], ids=str)
    def test_weights_of_k_dimensions(self, k):
        h, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 5), (7, *k, 5), (7, *k)))
        target = torch.randint(0, 7, (4, *k))
        target[1] = -100
        got = lossfuse.linear_cross_entropy_stats(h, w, target, linear_bias=b, lse_square_scale=0.1)
        logits = torch.einsum("nd,v...d->nv...", h.double(), w.double()) + b.double()
        want = program.cross_entropy_stats(logits, target, lse_square_scale=0.1)
        assert_statistics_close(got, want)
        ups = upstreams(got)
        for g, wanted_ in zip(
            differentiated(got, [h, w, b], ups), differentiated(want, [h, w, b], ups), strict=True
        ):
            assert_formula_close(g, wanted_)

    @pytest.mark.parametrize(
        "layout", ["hidden transposed", "weight transposed", "hidden strided", "hidden expanded"]
    )
    def test_layouts(self, thrifty_place, layout):
        hidden, weight, bias, target = (
            t.detach() for t in head_and_ids(6, 4, 9, device=thrifty_place.device)
        )
        if layout == "hidden transposed":
            hidden = hidden.t().contiguous().t()
        elif layout == "weight transposed":
            weight = weight.t().contiguous().t()
        elif layout == "hidden strided":
            hidden = hidden.repeat_interleave(2, 1)[:, ::2]
        else:
            hidden = hidden[:1].expand(6, 4)
        check(
            [t.requires_grad_() for t in (hidden, weight, bias)],
            target,
            impl=thrifty_place.impl,
            chunks=chunks_of(4, 9),
        )

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("rows", ["no rows", "all ignored"])
    @pytest.mark.parametrize("drop", [None, False], ids=str)
    def test_nothing_counts(self, thrifty_place, drop, rows, reduction):
        hidden, weight, bias, target = head_and_ids(6, 4, 9, device=thrifty_place.device)
        n = 0 if rows == "no rows" else 6
        hidden, target = hidden.detach()[:n].requires_grad_(), torch.full_like(target[:n], -100)
        options = LinearOptions(drop_ignored=drop)
        got = ours(
            (hidden, weight, bias),
            target,
            reduction=reduction,
            lse_square_scale=0.1,
            impl=thrifty_place.impl,
            options=options,
        )
        value = NAN if reduction == "mean" else 0.0
        torch.testing.assert_close(
            [got.loss.detach(), got.z_loss.detach()],
            [torch.full_like(got.loss, value)] * 2,
            equal_nan=True,
        )
        assert got.argmax.tolist() == [-1] * n and got.n_valid == 0
        assert not any(t.any() for t in (got.lse, got.target_logprob, got.entropy))
        for g in differentiated(got, [hidden, weight, bias], upstreams(got, FLOATS)):
            assert not g.any()


class TestChunksAndDtypes:
    @pytest.mark.parametrize(
        "rows", [1, 7, None], ids=["a row each", "several, the last ragged", "the default"]
    )
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
    def test_any_chunk_size(self, dtype, soft, rows):
        *operands, target = head_and_ids(24, 8, 37, dtype)
        target = probabilities(24, 37, dtype) if soft else target
        chunks = None if rows is None else chunks_of(rows, 37, 8 if dtype == torch.float64 else 4)
        for reduction in ("mean", "none"):
            got = ours(operands, target, reduction=reduction, label_smoothing=0.1, options=chunks)
            want, wide = wanted(operands, target, reduction=reduction, label_smoothing=0.1)
            assert_statistics_close(got, want)
            leaves, ups = leaves_of(operands, target), upstreams(got)
            for names in (DIFFERENTIABLE, ("loss",)):
                some = {name: ups[name] for name in names}
                (gs, ws) = (
                    differentiated(s, ls, some, retain_graph=True)
                    for s, ls in ((got, leaves), (want, wide))
                )
                for g, w in zip(gs, ws, strict=True):
                    assert (
                        g.dtype == dtype
                        and relative_error(g, w) < torch.finfo(dtype).eps * 20 + 1e-12
                    )
        assert got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize(
        "names", [("lse",), ("target_logprob",), ("entropy",), FLOATS], ids="+".join
    )
    @pytest.mark.parametrize("scale", [1.0, 65536.0, 1e-9, 0.0])
    def test_narrow_products_in_any_unit(self, narrow, thrifty_fast_place, scale, names, dtype):
        """fp16: the gradient of the logits is brought into its range, whatever comes from above;
        65536 may be beyond that of the result."""
        *operands, target = head_and_ids(6, 8, 37, dtype, device=thrifty_fast_place.device)
        got = ours(
            operands,
            target,
            reduction="none",
            impl=thrifty_fast_place.impl,
            options=chunks_of(4, 37),
        )
        want, wide = wanted(operands, target, reduction="none")
        assert_statistics_close(got, want)
        ups = {name: u * scale for name, u in upstreams(got, names).items()}
        for g, w in zip(
            differentiated(got, operands, ups), differentiated(want, wide, ups), strict=True
        ):
            w = w.to(dtype).double()
            atol = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            if scale == 0.0:
                assert not g.any()
            else:
                finite = w.isfinite() & g.isfinite()
                largest = float(w[finite].abs().max())
                # infinite where it is, but for what lies at the edge
                edge = w.abs() > 0.98 * torch.finfo(dtype).max
                assert (finite | edge | (g.double().abs() > 0.98 * torch.finfo(dtype).max)).all()
                eps = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    g[finite].double(), w[finite], rtol=eps, atol=max(eps * largest, atol)
                )

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_a_mean_over_many_rows_in_narrow_products(self, narrow, dtype):
        *operands, target = head_and_ids(4, 8, 37, dtype)
        got = ours(operands, target, normalizer=4096.0, options=chunks_of(3, 37))
        want, wide = wanted(operands, target, normalizer=4096.0)
        for names in (("loss",), ("loss", "entropy")):
            ups = upstreams(got, names)
            # as a scaled bonus is
            ups = {name: u / (4096.0 if name == "entropy" else 1.0) for name, u in ups.items()}
            (gs, ws) = (
                differentiated(s, ls, ups, retain_graph=True)
                for s, ls in ((got, operands), (want, wide))
            )
            for g, w in zip(gs, ws, strict=True):
                assert relative_error(g, w) < 2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("v", [32000, 50257])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_real_vocabularies(self, thrifty_place, dtype, v):
        *operands, target = head_and_ids(4, 16, v, dtype, device=thrifty_place.device)
        got = ours(
            operands, target, reduction="none", impl=thrifty_place.impl, options=chunks_of(3, v)
        )
        want, wide = wanted(operands, target, reduction="none")
        assert_statistics_close(got, want)
        ups = upstreams(got)
        for g, w in zip(
            differentiated(got, operands, ups), differentiated(want, wide, ups), strict=True
        ):
            assert relative_error(g, w) < max(2e-5, 2 * torch.finfo(dtype).eps)

    def test_logits_in_bf16(self):
        *operands, target = head_and_ids(9, 8, 37, torch.bfloat16)
        want, wide = wanted(operands, target, reduction="none")
        got = ours(
            operands,
            target,
            reduction="none",
            options=LinearOptions(logits_dtype=torch.bfloat16, acc_dtype=torch.bfloat16),
        )
        ups = upstreams(got)
        assert (
            got.lse.dtype == torch.float32
            and relative_error(got.entropy.detach(), want.entropy.detach()) < 0.02
        )
        for g, w in zip(
            differentiated(got, operands, ups), differentiated(want, wide, ups), strict=True
        ):
            assert relative_error(g, w) < 0.03


class TestHardRows:
    @pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
    @pytest.mark.parametrize("drop", [None, True, False], ids=str)
    def test_ignored_rows_hold_anything(self, thrifty_place, drop, value):
        hidden, weight, bias, _ = head_and_ids(6, 4, 9, device=thrifty_place.device)
        target = torch.tensor([3, -100, -100, 8, -100, 3], device=thrifty_place.device)
        dirty = hidden.detach().clone()
        dirty[1], dirty[2, 0], dirty[4, -1] = value, value, -value
        for reduction in ("none", "mean"):
            got, want = (
                ours(
                    (h, weight, bias),
                    target,
                    reduction=reduction,
                    impl=thrifty_place.impl,
                    options=chunks_of(4, 9, drop_ignored=drop),
                )
                for h in (dirty.requires_grad_(), hidden)
            )
            torch.testing.assert_close(tuple(got), tuple(want))
            ups = upstreams(got)
            torch.testing.assert_close(
                differentiated(got, [dirty, weight, bias], ups),
                differentiated(want, [hidden, weight, bias], ups),
            )

    @pytest.mark.parametrize("drop", [None, False], ids=str)
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_an_ignored_row_with_an_infinite_upstream(self, narrow, dtype, drop):
        *operands, _ = head_and_ids(4, 4, 9, dtype)
        target = torch.tensor([3, -100, 8, 3])
        options = chunks_of(3, 9, drop_ignored=drop)
        up = torch.tensor([1.0, INF, 1.0, 1.0])
        made = []
        for u in (up, torch.ones(4)):
            got = ours(operands, target, reduction="none", options=options)
            made.append(differentiated(got, operands, dict.fromkeys(FLOATS, u)))
        torch.testing.assert_close(*made)

    def test_confident_rows_keep_their_digits(self, fast_place):
        hidden = (torch.eye(4) * 30.0).to(fast_place.device).requires_grad_()
        weight = torch.eye(4, device=fast_place.device).requires_grad_()
        target = torch.arange(4, device=fast_place.device)
        got = ours((hidden, weight, None), target, reduction="none", impl=fast_place.impl)
        q = 3 * math.exp(-30)
        torch.testing.assert_close(got.entropy.tolist(), [q * 31] * 4, rtol=1e-5, atol=0)
        (dhidden,) = torch.autograd.grad(got.entropy.sum(), hidden)
        want = (1.0 - 4.0 * torch.eye(4, device=fast_place.device)) * math.exp(-30) * 30
        torch.testing.assert_close(dhidden, want, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_bad_ids(self, thrifty_place, reduction):
        *operands, _ = head_and_ids(3, 4, 7, device=thrifty_place.device)
        target = torch.tensor([0, 7, -100], device=thrifty_place.device)
        with (
            pytest.raises(IndexError, match="target of row 1 is 7 but input has 7 classes"),
            where_they_are_looked_at(thrifty_place),
        ):
            ours(operands, target, reduction=reduction, impl=thrifty_place.impl)


class TestAutograd:
    @pytest.mark.parametrize("retain", [False, True], ids=["handed over", "kept"])
    @pytest.mark.parametrize(
        "order",
        list(itertools.permutations([("loss",), ("loss",), ("entropy",), ("loss", "lse")], 3)),
        ids=str,
    )
    def test_backwards_in_any_order(self, order, retain):
        """What is handed over has another life: scaled, accumulated, zeroed; a later backward makes
        its own."""
        *operands, target = head_and_ids(6, 5, 11)
        got = ours(operands, target, options=chunks_of(4, 11, allow_retain_graph=retain))
        want, wide = wanted(operands, target)
        ups = upstreams(got)
        for names in order:
            some = {name: ups[name] for name in names}
            (gs, ws) = (
                differentiated(s, ls, some, retain_graph=True)
                for s, ls in ((got, operands), (want, wide))
            )
            for g, w in zip(gs, ws, strict=True):
                assert_formula_close(g, w)
                g.fill_(NAN)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_gradients_accumulate_in_leaves(self, thrifty_place, reduction):
        *operands, target = head_and_ids(6, 5, 11, device=thrifty_place.device)
        got = ours(operands, target, reduction=reduction, impl=thrifty_place.impl)
        got.loss.sum().backward(retain_graph=True)
        got.entropy.sum().backward(retain_graph=True)
        (2.0 * got.loss.sum() + got.lse.sum()).backward()
        want, wide = wanted(operands, target, reduction=reduction)
        wants = torch.autograd.grad(
            3.0 * want.loss.sum() + want.entropy.sum() + want.lse.sum(), wide
        )
        for t, w in zip(operands, wants, strict=True):
            assert_formula_close(t.grad, w)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("batched", [False, True], ids=["", "batched"])
    def test_a_second_derivative_is_refused(self, batched, reduction, name):
        *operands, target = head_and_ids(6, 5, 11)
        t = getattr(ours(operands, target, reduction=reduction, lse_square_scale=0.1), name)
        up = torch.ones(2, *t.shape) if batched else torch.ones_like(t)
        with pytest.raises(
            RuntimeError,
            match=r"no second derivative \(create_graph=True\) except with impl='reference'",
        ):
            torch.autograd.grad(t, operands, up, create_graph=True, is_grads_batched=batched)

    def test_the_reference_has_it(self):
        *operands, target = head_and_ids(4, 3, 5)
        found = []
        for stats, leaves in (
            (ours(operands, target, impl="reference"), operands),
            wanted(operands, target),
        ):
            first = torch.autograd.grad(stats.entropy.sum() + stats.loss, leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
        for g, w in zip(*found, strict=True):
            assert_formula_close(g, w)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    @pytest.mark.parametrize("name", FLOATS)
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_batched_upstream_gradients(self, reduction, name):
        *operands, target = head_and_ids(6, 5, 11)
        got, (want, wide) = (
            ours(operands, target, reduction=reduction),
            wanted(operands, target, reduction=reduction),
        )
        got, want = getattr(got, name), getattr(want, name)
        ups = torch.randn(3, *got.shape)
        gs = torch.autograd.grad(got, operands, ups, is_grads_batched=True)
        for g, w in zip(
            gs, torch.autograd.grad(want, wide, ups.double(), is_grads_batched=True), strict=True
        ):
            assert_formula_close(g, w)

    @pytest.mark.parametrize(
        "wants_grad",
        [(True, False, False), (False, True, False), (False, False, True), (False, False, False)],
        ids=str,
    )
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_frozen_operands(self, thrifty_place, reduction, wants_grad):
        *operands, target = head_and_ids(6, 5, 11, device=thrifty_place.device)
        for t, needed in zip(operands, wants_grad, strict=True):
            t.requires_grad_(needed)
        if any(wants_grad):
            for names in (DIFFERENTIABLE, ("loss",), ("entropy",)):
                check(
                    operands,
                    target,
                    None,
                    names,
                    impl=thrifty_place.impl,
                    chunks=chunks_of(4, 11),
                    reduction=reduction,
                )
        else:
            assert not any(
                t.requires_grad
                for t in ours(operands, target, reduction=reduction, impl=thrifty_place.impl)
            )

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_no_grad(self, thrifty_place, mode):
        *operands, target = head_and_ids(6, 5, 11, device=thrifty_place.device)
        want = ours(operands, target, impl=thrifty_place.impl)
        with mode():
            got = ours(operands, target, impl=thrifty_place.impl)
        assert not any(t.requires_grad for t in got)
        torch.testing.assert_close(tuple(got), tuple(want))

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("what", ["number", "with a gradient"])
    def test_normalizers(self, thrifty_place, what, soft):
        *operands, target = head_and_ids(5, 6, 17, device=thrifty_place.device)
        target = probabilities(5, 17, device=thrifty_place.device) if soft else target
        normalizer = torch.tensor(3.0, device=thrifty_place.device, requires_grad=what != "number")
        got = ours(
            operands, target, normalizer=normalizer, lse_square_scale=0.1, impl=thrifty_place.impl
        )
        want, wide = wanted(operands, target, normalizer=3.0, lse_square_scale=0.1)
        assert_statistics_close(got, want)
        ups = upstreams(got)
        leaves = leaves_of(operands, target)
        gs = differentiated(got, [*leaves, normalizer] if what != "number" else leaves, ups)
        ws = [
            *differentiated(want, wide, ups),
            -(ups["loss"] * want.loss + ups["z_loss"] * want.z_loss) / 3.0,
        ]
        for g, w in zip(gs, ws, strict=False):
            assert_formula_close(g, w)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    def test_checkpointing(self, reduction, reentrant):
        *operands, target = head_and_ids(6, 5, 11)

        def f(*operands):
            got = ours(operands, target, reduction=reduction)
            return got.loss.sum() + (got.entropy * torch.arange(6.0)).sum()

        want = torch.autograd.grad(f(*operands), operands)
        checkpoint(f, *operands, use_reentrant=reentrant).backward()
        torch.testing.assert_close([t.grad for t in operands], list(want))

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_what_is_held_goes_through_hooks(self, reduction):
        *operands, target = head_and_ids(6, 5, 11)
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: stored.append(t.clone()) or len(stored) - 1, lambda i: stored[i].clone()
        ):
            got = ours(operands, target, reduction=reduction)
        want = ours(operands, target, reduction=reduction)
        for names in (("loss",), DIFFERENTIABLE):
            gs, ws = (
                differentiated(s, operands, upstreams(got, names), retain_graph=True)
                for s in (got, want)
            )
            torch.testing.assert_close(gs, ws)

    @pytest.mark.parametrize("name", ["hidden", "weight"])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_operands_changed_before_the_backward(self, reduction, name):
        *operands, target = head_and_ids(6, 5, 11)
        stats = ours(operands, target, reduction=reduction)
        with torch.no_grad():
            operands[0 if name == "hidden" else 1].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(stats.entropy.sum(), operands)

    @pytest.mark.parametrize(
        "names", [("loss",), ("entropy",), ("loss", "entropy"), DIFFERENTIABLE], ids="+".join
    )
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_main_grad_gets_each_gradient_once(self, dtype, reduction, names):
        hidden, weight, bias, target = head_and_ids(6, 5, 11, dtype)
        weight.main_grad = torch.full((11, 5), 3.0)
        want, wide = wanted((hidden, weight, bias), target, reduction=reduction)
        ups = upstreams(want, names)
        w = differentiated(want, wide, ups)[1]
        options = chunks_of(4, 11, main_grad=True)
        for times in (1, 2):
            stats = ours((hidden, weight, bias), target, reduction=reduction, options=options)
            sum(
                (u.to(t.dtype) * t).sum()
                for u, t in ((u, getattr(stats, name)) for name, u in ups.items())
            ).backward()
            assert weight.grad is None and hidden.grad is not None
            torch.testing.assert_close(
                weight.main_grad, (3.0 + times * w).float(), rtol=1e-5, atol=1e-5
            )

    def test_main_grad_of_backwards_one_after_the_other(self):
        hidden, weight, bias, target = head_and_ids(6, 5, 11)
        weight.main_grad = torch.zeros(11, 5)
        want, wide = wanted((hidden, weight, bias), target)
        stats = ours((hidden, weight, bias), target, options=LinearOptions(main_grad=True))
        (2.0 * stats.loss).backward(retain_graph=True)
        stats.entropy.sum().backward(retain_graph=True)
        stats.loss.backward()
        (w,) = torch.autograd.grad(3.0 * want.loss + want.entropy.sum(), wide[1])
        assert_formula_close(weight.main_grad, w)

    def test_autocast(self, thrifty_place):
        hidden, weight, bias, target = head_and_ids(6, 5, 11, device=thrifty_place.device)
        half = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
        for reduction in ("none", "mean"):
            with torch.autocast(thrifty_place.device, torch.bfloat16):
                got = ours(
                    (hidden, weight, bias), target, reduction=reduction, impl=thrifty_place.impl
                )
            want = ours(half, target, reduction=reduction, impl=thrifty_place.impl)
            torch.testing.assert_close(tuple(got), tuple(want))
            ups = upstreams(got)
            for g, w in zip(
                differentiated(got, [hidden, weight, bias], ups),
                differentiated(want, half, ups),
                strict=True,
            ):
                assert g.dtype == torch.float32
                torch.testing.assert_close(g, w.float(), rtol=2.0**-7, atol=1e-6)

    def test_a_class_weight_with_a_gradient(self):
        *operands, target = head_and_ids(5, 6, 17)
        classes = class_weight(17).requires_grad_()
        got = ours(operands, target, classes, reduction="sum")
        rows = ours(operands, target, reduction="none").loss.detach()
        want = torch.zeros(17).index_add(0, target.clamp(min=0), rows)
        torch.testing.assert_close(
            torch.autograd.grad(got.loss + got.entropy.sum(), classes)[0], want
        )

    def test_torch_func(self):
        hidden, weight, bias, target = (t.detach() for t in head_and_ids(4, 3, 7))

        def mixture(f):
            def g(hidden, weight):
                got = f(hidden, weight, target, linear_bias=bias)
                return got.loss + (got.entropy + got.target_logprob).sum() + (got.lse**2).sum()

            return g

        got, want = (
            mixture(f)
            for f in (lossfuse.linear_cross_entropy_stats, program.linear_cross_entropy_stats)
        )
        both = (hidden, weight)
        torch.testing.assert_close(
            torch.func.grad(got, argnums=(0, 1))(*both),
            torch.func.grad(want, argnums=(0, 1))(*both),
        )
        tangents = torch.randn_like(hidden), torch.randn_like(weight)
        torch.testing.assert_close(
            torch.func.jvp(got, both, tangents), torch.func.jvp(want, both, tangents)
        )


class TestMemory:
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_no_storage_of_all_logits(self, narrow, dtype, soft):
        n, d, v = 96, 8, 4000
        hidden, weight, bias, target = (t.detach() for t in head_and_ids(n, d, v, dtype))
        target = probabilities(n, v, dtype).detach() if soft else target
        options = chunks_of(16, v)
        most = max(16 * head_chunks.padded(v) * 4, v * d * 4)
        head, needs, up = (
            head_chunks.Head(hidden, weight, bias),
            head_chunks.Needs(True, True, True, False),
            torch.ones(n),
        )
        for upstream in (Upstream(up), Upstream(up, up, up, up)):
            with Largest() as largest:
                head_chunks.row_stats_and_grads(
                    head,
                    target,
                    None,
                    upstream,
                    needs,
                    Wants(True, True),
                    LossSpec(),
                    options,
                    torch_rows,
                )
            assert 0 < largest.bytes <= most < n * v
        with Largest() as largest:
            head_chunks.row_stats(
                head, target, None, Wants(True, True), LossSpec(), options, torch_rows
            )
        assert 0 < largest.bytes <= most

    @pytest.mark.slow
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_peak_of_a_call_is_that_without_statistics(self, reduction):
        """The logits would be 256 MiB."""
        n, d, v = 2048, 128, 32000
        hidden, weight, _, target = head_and_ids(n, d, v, ignored=0.0)
        torch.use_deterministic_algorithms(False)  # which fills new memory twice
        options = LinearOptions(chunk_bytes=64 << 20)

        def peak(f):
            def call():
                loss = f()
                return torch.autograd.grad(loss.sum(), [hidden, weight])

            return least_peak(call, hidden.device)

        given = {"reduction": reduction, "options": options}
        without = peak(lambda: lossfuse.linear_cross_entropy(hidden, weight, target, **given))
        if without is None:
            pytest.skip("no /proc to ask")
        assert (
            peak(lambda: lossfuse.linear_cross_entropy_stats(hidden, weight, target, **given).loss)
            <= 1.05 * without
        )


class TestTheComparisonRejects:
    """Wrong on purpose."""

    def rejected(self, names=DIFFERENTIABLE, **options):
        *operands, target = head_and_ids(9, 6, 17)
        with pytest.raises(AssertionError):
            check(
                operands,
                target,
                None,
                names,
                chunks=chunks_of(4, 17),
                lse_square_scale=0.1,
                **options,
            )

    @pytest.mark.parametrize("forgotten", ["loss", "lse", "target_logprob", "entropy"])
    def test_an_upstream_gradient_that_is_forgotten(self, monkeypatch, forgotten):
        real = torch_rows.row_stats

        def row_stats(z, t, w, spec, wants, up, *grads):
            return real(
                z,
                t,
                w,
                spec,
                wants,
                None if up is None else up._replace(**{forgotten: None}),
                *grads,
            )

        monkeypatch.setattr(torch_rows, "row_stats", row_stats)
        self.rejected(reduction="none")

    def test_upstream_gradients_of_the_first_chunk_for_all(self, monkeypatch):
        monkeypatch.setattr(
            Upstream,
            "of",
            lambda up, rows: Upstream(*(None if t is None else t.roll(1)[rows] for t in up)),
        )
        self.rejected(reduction="none")

    def test_a_formed_gradient_where_an_entropy_wants_its_own(self, monkeypatch):
        real = head_ops._recomputed
        monkeypatch.setattr(
            head_ops,
            "_recomputed",
            lambda ctx, operands, up, needs: real(ctx, operands, up._replace(entropy=None), needs),
        )
        self.rejected()


class TestCompilers:
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_opcheck(self, thrifty_fast_place, soft):
        impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
        hidden, weight, bias, target = head_and_ids(4, 5, 19, device=device)
        target = probabilities(4, 19, device=device) if soft else target
        chunks = LinearOptions(chunk_bytes=2 * 32 * 4, allow_retain_graph=True)
        settings = (
            *head_ops.ChunkArgs.of(chunks),
            *library.OpArgs.of(LossSpec(-100, 0.1, 20.0, 0.7, 1e-3), impl),
        )
        head, needs = (
            (hidden, weight, bias, target, class_weight(19, device)),
            (True, True, True, soft),
        )
        plain, divisor = tuple(t.detach() for t in head), torch.tensor(3.0, device=device)
        for wants in (Wants(True, True), Wants(False, False))[
            : 1 if (impl, device) == ("triton", "cpu") else 2
        ]:
            torch.library.opcheck(head_ops.linear_row_stats, (*head, None, *wants, *settings))
            torch.library.opcheck(
                head_ops.linear_stats_total, (*head, divisor, None, *needs, *wants, *settings)
            )
        ups = [torch.randn(4, device=device) for _ in range(4)]
        for given in (ups, [None, ups[1], None, ups[3]]):
            torch.library.opcheck(head_ops.linear_grads, (*plain, *given, *needs, *settings))

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_one_graph_with_the_numbers_of_eager(self, thrifty_place, soft, reduction):
        torch._dynamo.reset()
        impl, device = thrifty_place.impl, thrifty_place.device
        *operands, target = head_and_ids(6, 5, 19, device=device)
        target = probabilities(6, 19, device=device) if soft else target

        def f(hidden, weight, bias, target):
            got = ours(
                (hidden * 1.5, weight, bias),
                target,
                lse_square_scale=0.1,
                reduction=reduction,
                impl=impl,
                options=chunks_of(4, 19),
            )
            mixture = (
                (got.entropy * got.target_logprob.detach()).sum() + got.lse.sum() + got.z_loss.sum()
            )
            return got.loss.sum() * 0.3, mixture, got.argmax, got.n_valid

        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        leaves = leaves_of(operands, target)
        for names in ((0,), (0, 1)):
            got, want = compiled(*operands, target), f(*operands, target)
            torch.testing.assert_close(got, want)
            got, want = (
                torch.autograd.grad(sum(made[i] for i in names), leaves) for made in (got, want)
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
