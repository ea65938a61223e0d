"""Statistics of a head, beyond those laws that logits obey too (test_statistics): hidden states,
weight and bias, chunks, half-precision products, main_grad, memory."""

import pytest
import torch

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
    ROW_WEIGHTED,
    differentiated,
    options_of,
    upstreams,
)
from rows import class_weight, head_and_ids, probabilities

INF, NAN = float("inf"), float("nan")
HALF = [torch.bfloat16, torch.float16]
SINGLE = [
    (),
    *((name,) for name in OPTIONS),
    EVERYTHING,
    (*EVERYTHING, "none"),
    (*EVERYTHING, "normalizer"),
    *ROW_WEIGHTED,
]
FLOATS = ("loss", "lse", "target_logprob", "entropy")


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


def chunks_of(rows, v, itemsize=4, **options):
    """Options for chunks of so many rows."""
    return LinearOptions(chunk_bytes=rows * head_chunks.padded(v) * itemsize, **options)


def relative_error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture
def narrow(monkeypatch):
    """As on CUDA: products take half precision to fp32, and the gradient of the logits is rounded
    before them."""
    monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)


class TestFormula:
    """5 rows of width 6 in chunks of 2, 2 and 1; 17 classes, so that rows of logits are padded."""

    @pytest.mark.parametrize("names", SINGLE, ids=lambda names: "+".join(names) or "plain")
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_every_implementation(self, place, soft, names):
        *operands, target = head_and_ids(5, 6, 17, device=place.device)
        target = probabilities(5, 17, device=place.device) if soft else target
        weight, options = options_of(names, 17, place.device)
        check(operands, target, weight, impl=place.impl, chunks=chunks_of(3, 17), **options)


class TestShapes:
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
        """fp16: the gradient of the logits is scaled into its range for any upstream gradient;
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


class TestAutograd:
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

    def test_upstream_gradients_of_the_first_chunk_for_all(self, monkeypatch):
        monkeypatch.setattr(
            Upstream,
            "of",
            lambda up, rows: Upstream(*(None if t is None else t.roll(1)[rows] for t in up)),
        )
        self.rejected(reduction="none")


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
                head_ops.linear_stats_total, (*head, divisor, None, None, *needs, *wants, *settings)
            )
        ups = [torch.randn(4, device=device) for _ in range(4)]
        for given in (ups, [None, ups[1], None, ups[3]]):
            torch.library.opcheck(head_ops.linear_grads, (*plain, *given, *needs, *settings))
