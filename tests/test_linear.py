"""A head and its loss against the torch program in fp64: formula, shapes, dtypes and chunks;
precision; what runs and what is held."""

import pytest
import torch
import torch.nn.functional as F

import lossfuse
import program
from allocations import Largest, least_peak
from closeness import assert_formula_close, assert_loss_close, assert_product_close
from lossfuse import LinearOptions
from lossfuse.backends import torch_rows
from lossfuse.call import head_call
from lossfuse.ops import head_chunks, matmul
from lossfuse.spec import LossSpec
from options import COMBINATIONS, EVERYTHING, OPTIONS, options_of, upstream
from rows import class_weight, head_and_ids, probabilities

HALF = [torch.bfloat16, torch.float16]
LEAN = [
    {"logits_dtype": torch.bfloat16},
    {"acc_dtype": torch.bfloat16},
    {"logits_dtype": torch.bfloat16, "acc_dtype": torch.bfloat16},
]
SINGLE = [
    (),
    *((name,) for name in OPTIONS),
    EVERYTHING,
    (*EVERYTHING, "none"),
    (*EVERYTHING, "normalizer"),
]


def chunks_of(rows, v, itemsize=4, **options):
    """Options for chunks of so many rows."""
    return LinearOptions(chunk_bytes=rows * head_chunks.padded(v) * itemsize, **options)


def differentiated(operands, target, weight=None, dloss=None, **options):
    """[loss, then the gradients of what requires one]."""
    hidden, head, bias = operands
    loss = lossfuse.linear_cross_entropy(
        hidden, head, target, linear_bias=bias, weight=weight, **options
    )
    leaves = [t for t in (*operands, target) if t is not None and t.requires_grad]
    dloss = torch.ones_like(loss) if dloss is None else dloss.to(loss).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dloss)]


def assert_all_close(got, want, leaves):
    assert got[0].dtype == (torch.float64 if leaves[0].dtype == torch.float64 else torch.float32)
    assert_loss_close(got[0], want[0])
    for g, w, leaf in zip(got[1:], want[1:], leaves, strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        (assert_formula_close if g.dtype == torch.float32 else assert_product_close)(g, w)


def check(operands, target, weight=None, dloss=None, *, impl="torch", chunks=None, **options):
    want = program.head_value_and_grads(operands, target, weight, dloss, **options)
    got = differentiated(operands, target, weight, dloss, impl=impl, options=chunks, **options)
    assert_all_close(
        got, want, [t for t in (*operands, target) if t is not None and t.requires_grad]
    )


@pytest.fixture(params=[False, True], ids=["", "narrow products"])
def narrow(request, monkeypatch):
    """As on CUDA: products take half precision to fp32, and the gradient of a chunk is narrower
    than the logits whose place it takes."""
    if request.param:
        monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
    return request.param


class TestFormula:
    """5 rows of width 6 in chunks of 2, 2 and 1; 17 classes, so that rows of logits are padded."""

    @pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
    def test_class_ids(self, names):
        *operands, target = head_and_ids(5, 6, 17)
        weight, options = options_of(names, 17, "cpu")
        check(
            operands,
            target,
            weight,
            upstream(operands[0], options),
            chunks=chunks_of(2, 17),
            **options,
        )

    @pytest.mark.parametrize("names", SINGLE, ids=lambda names: "+".join(names) or "plain")
    def test_every_implementation(self, place, names):
        *operands, target = head_and_ids(5, 6, 17, device=place.device)
        weight, options = options_of(names, 17, place.device)
        check(
            operands,
            target,
            weight,
            upstream(operands[0], options),
            impl=place.impl,
            chunks=chunks_of(3, 17),
            **options,
        )

    @pytest.mark.parametrize("names", SINGLE, ids=lambda names: "+".join(names) or "plain")
    def test_class_probabilities(self, place, names):
        *operands, _ = head_and_ids(5, 6, 17, device=place.device)
        weight, options = options_of(names, 17, place.device)
        target = probabilities(5, 17, device=place.device)
        check(
            operands,
            target,
            weight,
            upstream(operands[0], options),
            impl=place.impl,
            chunks=chunks_of(3, 17),
            **options,
        )

    @pytest.mark.parametrize("v", [1, 2, 16, 127])
    @pytest.mark.parametrize("d", [1, 5])
    @pytest.mark.parametrize("n", [1, 3])
    def test_small_sizes(self, n, d, v):
        *operands, target = head_and_ids(n, d, v)
        weight, options = options_of(EVERYTHING, v, "cpu")
        check(operands, target, weight, chunks=chunks_of(2, v), **options)
        check(operands, probabilities(n, v), weight, chunks=chunks_of(2, v), **options)

    @pytest.mark.parametrize(
        "normalizer",
        [
            3,
            2.5,
            torch.tensor(4),
            torch.tensor(4.0, dtype=torch.float64),
            torch.tensor(7.0, dtype=torch.bfloat16),
        ],
        ids=lambda n: f"{n}",
    )
    def test_normalizers(self, place, normalizer):
        *operands, target = head_and_ids(5, 6, 17, device=place.device)
        check(operands, target, impl=place.impl, chunks=chunks_of(2, 17), normalizer=normalizer)

    @pytest.mark.parametrize("impl", ["torch", "reference"])
    def test_a_normalizer_with_a_gradient(self, impl):
        hidden, weight, bias, target = head_and_ids(5, 6, 17)
        normalizer = torch.tensor(3.0, requires_grad=True)
        loss = lossfuse.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, normalizer=normalizer, impl=impl
        )
        got = torch.autograd.grad(loss, [hidden, weight, bias, normalizer])
        want = program.head_value_and_grads((hidden, weight, bias), target, normalizer=3.0)
        for g, w in zip(got, [*want[1:], -want[0] / 3.0], strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-6)

    def test_a_class_weight_with_a_gradient(self):
        hidden, weight, bias, target = head_and_ids(5, 6, 17)
        classes = class_weight(17).requires_grad_()
        loss = lossfuse.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, weight=classes, reduction="sum"
        )
        rows = lossfuse.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction="none"
        ).detach()
        want = torch.zeros(17).index_add(0, target.clamp(min=0), rows)
        torch.testing.assert_close(torch.autograd.grad(loss, classes)[0], want)


class TestShapes:
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (2, 0)], ids=str)
    def test_batches(self, shape, soft, reduction):
        n = torch.Size(shape).numel()
        hidden, weight, bias, target = head_and_ids(max(n, 1), 4, 9)
        hidden = hidden.detach()[:n].reshape(*shape, 4).requires_grad_()
        target = (
            probabilities(max(n, 1), 9).detach()[:n].reshape(*shape, 9)
            if soft
            else target[:n].reshape(shape)
        )
        got = differentiated(
            (hidden, weight, bias), target, reduction=reduction, options=chunks_of(2, 9)
        )
        assert got[0].shape == (shape if reduction == "none" else ())
        # torch's mean over no rows is NaN with gradients of 0
        want = program.head_value_and_grads((hidden, weight, bias), target, reduction=reduction)
        want[1:] = [w if n else torch.zeros_like(w) for w in want[1:]]
        assert_all_close(got, want, (hidden, weight, bias))

    @pytest.mark.parametrize(
        "layout",
        [
            "hidden transposed",
            "weight transposed",
            "hidden strided",
            "hidden expanded",
            "target strided",
        ],
    )
    def test_layouts(self, place, layout):
        hidden, weight, bias, target = (
            t.detach() for t in head_and_ids(6, 4, 9, device=place.device)
        )
        if layout == "hidden transposed":
            hidden = hidden.t().contiguous().t()
        elif layout == "weight transposed":
            weight = weight.t().contiguous().t()
        elif layout == "hidden strided":
            hidden = hidden.repeat_interleave(2, 1)[:, ::2]
        elif layout == "hidden expanded":
            hidden = hidden[:1].expand(6, 4)
        else:
            target = target.repeat_interleave(2)[::2]
        operands = [t.requires_grad_() for t in (hidden, weight, bias)]
        for options in ({}, {"reduction": "none"}):
            check(operands, target, impl=place.impl, chunks=chunks_of(4, 9), **options)

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("k", [(), (3,), (2, 3)], ids=str)
    def test_the_arguments_of_torch(self, k, soft):
        """Weights of K dimensions among them."""
        if not hasattr(F, "linear_cross_entropy"):
            pytest.skip("this torch has no F.linear_cross_entropy")
        h, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 5), (7, *k, 5), (7, *k)))
        target = torch.softmax(torch.randn(4, 7, *k), 1) if soft else torch.randint(0, 7, (4, *k))
        if not soft:
            target[1] = -100
        given = {
            "linear_bias": b,
            "weight": class_weight(7),
            "ignore_index": None,
            "label_smoothing": 0.1,
        }
        for reduction in ("none", "mean", "sum"):
            got, want = (
                f(h, w, target, reduction=reduction, **given)
                for f in (lossfuse.linear_cross_entropy, F.linear_cross_entropy)
            )
            torch.testing.assert_close(got, want)
            got, want = (torch.autograd.grad(loss.sum() * 0.3, [h, w, b]) for loss in (got, want))
            torch.testing.assert_close(got, want)


class TestChunksAndDtypes:
    @pytest.mark.parametrize(
        "rows",
        [1, 7, 10**6, None],
        ids=["a row each", "several, the last ragged", "one", "the default"],
    )
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize(
        ("dtype", "narrow"),
        [
            (torch.float64, False),
            (torch.float32, False),
            *((dtype, narrow) for dtype in HALF for narrow in (False, True)),
        ],
        indirect=["narrow"],
        ids=str,
    )
    def test_any_chunk_size(self, narrow, dtype, soft, rows):
        *operands, target = head_and_ids(24, 8, 37, dtype)
        if soft:
            target = probabilities(24, 37, dtype)
        chunks = None if rows is None else chunks_of(rows, 37, 8 if dtype == torch.float64 else 4)
        for reduction in ("mean", "none"):
            dloss = upstream(operands[0], {"reduction": reduction})
            want = program.head_value_and_grads(
                operands, target, None, dloss, reduction=reduction, label_smoothing=0.1
            )
            got = differentiated(
                operands,
                target,
                None,
                dloss,
                reduction=reduction,
                label_smoothing=0.1,
                options=chunks,
            )
            leaves = [*operands, target] if soft else operands
            if not narrow:
                assert_all_close(got, want, leaves)
                continue
            # the gradient of the logits is rounded before the products
            assert_loss_close(got[0], want[0])
            for g, w in zip(got[1:], want[1:], strict=True):
                assert g.dtype == dtype and relative_error(g, w) < 2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_a_weight_converted_in_blocks(self, monkeypatch, dtype):
        monkeypatch.setattr(matmul, "BLOCK_BYTES", 5 * 8 * 4)
        *operands, target = head_and_ids(9, 8, 37, dtype)
        assert len(list(matmul.Weight(operands[1], torch.float32).blocks())) == 8
        for reduction in ("mean", "none"):
            check(operands, target, chunks=chunks_of(4, 37), reduction=reduction)

    @pytest.mark.parametrize("given", LEAN, ids=["logits", "sums", "both"])
    def test_lean_modes(self, monkeypatch, fast_place, given):
        monkeypatch.setattr(matmul, "BLOCK_BYTES", 5 * 8 * 4)
        *operands, target = head_and_ids(9, 8, 37, torch.bfloat16, device=fast_place.device)
        want = program.head_value_and_grads(operands, target)
        got = differentiated(
            operands, target, options=chunks_of(4, 37, **given), impl=fast_place.impl
        )
        for g, w in zip(got, want, strict=True):
            assert relative_error(g, w) < 0.02

    @pytest.mark.parametrize("given", LEAN, ids=["logits", "sums", "both"])
    @pytest.mark.parametrize(("d", "v"), [(64, 1024), (64, 1021), (33, 1024), (96, 77)])
    def test_the_padding_of_a_product_may_hold_anything(self, d, v, given):
        """New memory holds NaN, and so does what lies between rows that are apart: processors with
        AMX read both."""
        wide, weight, bias, target = head_and_ids(100, 2 * d, v, torch.bfloat16)
        hidden, weight = wide[:, :d], weight[:, :d]
        wide.data[:, d:] = torch.nan
        operands = hidden, weight, bias
        want = program.head_value_and_grads(operands, target)
        got = differentiated(operands, target, options=LinearOptions(**given))
        for g, w in zip(got, want, strict=True):
            assert relative_error(g, w) < 0.02

    @pytest.mark.parametrize(
        ("amx", "d", "v", "dtype"),
        [
            (False, 64, 1024, torch.float32),
            (True, 64, 1024, torch.bfloat16),
            (True, 64, 1021, torch.float32),
            (True, 33, 1024, torch.float32),
        ],
    )
    def test_a_cpu_multiplies_bfloat16_only_where_that_is_fast_and_right(
        self, monkeypatch, amx, d, v, dtype
    ):
        monkeypatch.setattr(matmul, "_has_amx", lambda: amx)
        monkeypatch.setattr(matmul, "BLOCK_BYTES", 4 * 100 * 256)
        multiplied, largest, multiply = set(), 0, head_chunks.product

        def product(out, a, b, **how):
            nonlocal largest
            multiplied.update((a.dtype, b.dtype))
            largest = max(largest, *(t.numel() for t in (a, b, out)))
            multiply(out, a, b, **how)

        monkeypatch.setattr(head_chunks, "product", product)
        *operands, target = head_and_ids(100, d, v, torch.bfloat16)
        differentiated(operands, target, options=LinearOptions(**LEAN[-1]))
        assert multiplied == {dtype}
        # in float32 a block of classes at a time
        assert dtype == torch.bfloat16 or largest <= 100 * 256

    def test_an_operand_of_the_wide_dtype_may_ask_for_it(self):
        *operands, target = head_and_ids(9, 8, 37)
        check(
            operands,
            target,
            chunks=LinearOptions(logits_dtype=torch.float32, acc_dtype=torch.float32),
        )

    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_a_narrow_gradient_over_logits_by_kernels(self, monkeypatch, device, dtype, soft):
        """A row of it in the first bytes of the row it takes the place of."""
        monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
        *operands, target = head_and_ids(5, 8, 301, dtype, device)
        target = probabilities(5, 301, dtype, device).detach() if soft else target
        want = program.head_value_and_grads(operands, target)
        got = differentiated(operands, target, options=chunks_of(2, 301), impl="triton")
        assert_loss_close(got[0], want[0])
        for g, w in zip(got[1:], want[1:], strict=True):
            assert relative_error(g, w) < 2 * torch.finfo(dtype).eps


def relative_error(got, want):
    """In the root mean square of all entries."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm())


def eager(operands, target, dloss=1.0):
    """[loss, gradients] of eager torch with fp32 logits."""
    hidden, weight, bias = operands
    loss = F.cross_entropy(F.linear(hidden.float(), weight.float(), bias.float()), target)
    return [loss.detach(), *torch.autograd.grad(loss, operands, torch.tensor(dloss))]


class TestPrecision:
    @pytest.mark.parametrize("rows", [1, 16, 512], ids=lambda rows: f"{512 // rows} chunks")
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_no_error_above_that_of_eager_with_fp32_logits(self, dtype, rows):
        """Targets repeat, so that rows of dW are sums of like numbers: where a sum in bf16
        stagnates."""
        *operands, target = head_and_ids(512, 16, 64, dtype, ignored=0.1)
        want = program.head_value_and_grads(operands, target, None, torch.tensor(0.3))
        got = differentiated(operands, target, None, torch.tensor(0.3), options=chunks_of(rows, 64))
        theirs = eager(operands, target, 0.3)
        assert abs(got[0] - want[0]) <= max(abs(theirs[0] - want[0]), 1e-6 * want[0])
        for ours, eagers, w in zip(got[1:], theirs[1:], want[1:], strict=True):
            assert relative_error(ours, w) <= 1.1 * relative_error(eagers, w) + 1e-6

    def test_a_sum_in_bf16_would_be_seen(self):
        *operands, target = head_and_ids(512, 16, 64, torch.bfloat16, ignored=0.1)
        want = program.head_value_and_grads(operands, target)
        got = differentiated(operands, target, options=chunks_of(1, 64, acc_dtype=torch.bfloat16))
        assert relative_error(got[2], want[2]) > 3 * relative_error(
            eager(operands, target)[2], want[2]
        )

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_narrow_products_are_as_good_as_products_of_logits_made_float(self, monkeypatch, dtype):
        monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
        hidden, weight, bias, target = head_and_ids(256, 16, 64, dtype, ignored=0.1)
        operands = hidden, weight, bias
        want = program.head_value_and_grads(operands, target)
        theirs = torch.autograd.grad(F.cross_entropy(F.linear(*operands).float(), target), operands)
        got = differentiated(operands, target, options=chunks_of(32, 64))
        for ours, eagers, w in zip(got[1:], theirs, want[1:], strict=True):
            assert relative_error(ours, w) <= 1.1 * relative_error(eagers, w)

    def test_a_loss_in_bf16_that_torch_gets_wrong(self):
        """Its chunked function is off by 0.2 to 14 % where rows are many."""
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            pytest.skip("this torch has no chunked F.linear_cross_entropy")
        hidden, weight, _, target = head_and_ids(1024, 16, 64, torch.bfloat16)
        want = program.head_value_and_grads((hidden, weight, None), target)[0]
        theirs = F.linear_cross_entropy(
            hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions()
        )
        assert abs(lossfuse.linear_cross_entropy(hidden, weight, target) - want) < 1e-4 * want
        assert abs(theirs.double() - want) > 1e-3 * want

    @pytest.mark.parametrize("value", [1.0, 0.3, -2.0, 0.0, 65536.0, 1e-4])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_any_grad_output(self, dtype, reduction, value):
        """fp16: no gradient is rounded before it has seen the factor, so a loss scaler's 65536
        brings back what 1e-4 would lose."""
        *operands, target = head_and_ids(9, 4, 11, dtype)
        operands = [
            t.detach().div(64 if value == 65536.0 else 1).requires_grad_() for t in operands
        ]
        dloss = torch.full((9,) if reduction == "none" else (), value)
        normalizer = 4096.0 if reduction == "mean" else None
        check(
            operands,
            target,
            None,
            dloss,
            chunks=chunks_of(4, 11),
            reduction=reduction,
            normalizer=normalizer,
        )

    @pytest.mark.parametrize("retain", [False, True], ids=["handed over", "kept"])
    @pytest.mark.parametrize("value", [65536.0, 1e-4])
    @pytest.mark.parametrize("n", [4, 4096], ids=lambda n: f"mean over {n}")
    def test_fp16_products_neither_overflow_nor_underflow(self, monkeypatch, n, value, retain):
        """Where products take fp16, the gradient of the logits is brought into its range: 1 / 4096
        of a probability would be lost."""
        monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
        *operands, target = head_and_ids(4, 8, 37, torch.float16)
        options = chunks_of(3, 37, allow_retain_graph=retain)
        want = program.head_value_and_grads(operands, target, normalizer=n)
        got = differentiated(
            [t.detach().requires_grad_() for t in operands], target, normalizer=n, options=options
        )
        for g, w in zip(got[1:], want[1:], strict=True):
            assert relative_error(g, w) < 2e-3
        # the same, multiplied: nothing was lost before
        scaled = differentiated(
            operands, target, None, torch.tensor(value), normalizer=n, options=options
        )
        for s, w in zip(scaled[1:], want[1:], strict=True):
            w = (w * value).half().double()
            torch.testing.assert_close(
                s.double(),
                w,
                rtol=4e-3,
                atol=max(4e-3 * float(w[w.isfinite()].abs().max()), 2.0**-24),
            )

    @pytest.mark.parametrize(
        "names", [("weights of 1000",), ("weights of 1e-6",), ("a scale of 400",)], ids="".join
    )
    def test_fp16_products_with_large_and_small_factors(self, monkeypatch, names):
        monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
        hidden, weight, bias, target = head_and_ids(6, 8, 37, torch.float16)
        classes = {"weights of 1000": 2000.0, "weights of 1e-6": 2e-6}.get(names[0])
        options = {"logit_scale": 400.0} if classes is None else {}
        if classes is None:
            hidden = (hidden / 400).detach().requires_grad_()
        classes = None if classes is None else class_weight(37) * classes
        want = program.head_value_and_grads((hidden, weight, bias), target, classes, **options)
        got = differentiated(
            (hidden, weight, bias), target, classes, options=chunks_of(2, 37), **options
        )
        for g, w in zip(got[1:], want[1:], strict=True):
            assert relative_error(g, w) < 2e-3


GRADIENTS = {
    # who requires grad, and the products of a chunk beside that of its logits
    "all": ("hidden weight bias", {"hidden", "weight"}),
    "frozen weight": ("hidden", {"hidden"}),
    "frozen hidden": ("weight", {"weight"}),
    "bias alone": ("bias", set()),
    "probabilities alone": ("target", set()),
    "nobody": ("", set()),
}


@pytest.fixture
def ran(monkeypatch):
    """The shapes of the results of all products."""
    shapes = []

    def product(out, *args, **kwargs):
        shapes.append(tuple(out.shape))
        return matmul.product(out, *args, **kwargs)

    monkeypatch.setattr(head_chunks, "product", product)
    return shapes


class TestOnlyWhatIsWantedRuns:
    """6 rows of width 5 in two chunks, 11 classes."""

    @pytest.mark.parametrize("case", GRADIENTS)
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_products(self, ran, reduction, case):
        names, wanted = GRADIENTS[case]
        hidden, weight, bias, target = head_and_ids(6, 5, 11, ignored=0.0)
        target = probabilities(6, 11) if "target" in names else target
        given = {"hidden": hidden, "weight": weight, "bias": bias, "target": target}
        for name, t in given.items():
            if t.is_floating_point():
                t.requires_grad_(name in names)
        loss = lossfuse.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction=reduction, options=chunks_of(3, 11)
        )
        again = bool(names) and reduction == "none"
        if names:
            loss.sum().backward()
            want = program.head_value_and_grads((hidden, weight, bias), target, reduction=reduction)
            for t, w in zip((t for t in given.values() if t.requires_grad), want[1:], strict=True):
                assert_formula_close(t.grad, w * 1.0)
        for name, t in given.items():
            assert (t.grad is not None) == (name in names.split())
        made = {"logits": (3, 11), "hidden": (3, 5), "weight": (11, 5)}
        assert ran.count(made["logits"]) == 2 * (1 + again)
        assert ran.count(made["hidden"]) == 2 * ("hidden" in wanted) and ran.count(
            made["weight"]
        ) == 2 * ("weight" in wanted)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_no_gradient_is_made_where_none_can_be_asked_for(self, ran, mode):
        hidden, weight, bias, target = head_and_ids(6, 5, 11, ignored=0.0)
        for reduction in ("none", "mean"):
            ran.clear()
            with mode():
                loss = lossfuse.linear_cross_entropy(
                    hidden,
                    weight,
                    target,
                    linear_bias=bias,
                    reduction=reduction,
                    options=chunks_of(3, 11),
                )
            assert ran == [(3, 11)] * 2 and not loss.requires_grad
            assert_loss_close(
                loss,
                program.linear_cross_entropy(
                    *(t.detach().double() for t in (hidden, weight)),
                    target,
                    bias.double(),
                    reduction=reduction,
                ).detach(),
            )

    @pytest.mark.parametrize(
        ("drop", "rows"), [(None, [2, 1]), (True, [2, 1]), (False, [2, 2, 2])], ids=str
    )
    def test_ignored_rows_are_left_out(self, ran, drop, rows):
        *operands, _ = head_and_ids(6, 5, 11)
        target = torch.tensor([-100, 3, -100, 4, 10, -100])
        check(operands, target, chunks=chunks_of(2, 11, drop_ignored=drop))
        assert [shape[0] for shape in ran if shape[1] == 11] == rows

    def test_nothing_is_saved_without_grad(self):
        hidden, weight, bias, target = head_and_ids(6, 5, 11)
        saved = []
        with (
            torch.no_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            lossfuse.linear_cross_entropy(hidden, weight, target, linear_bias=bias)
        assert saved == []

    def test_what_is_saved_is_gradients_or_arguments(self):
        hidden, weight, _, target = head_and_ids(60, 5, 400)
        for reduction, most, saved in (
            ("mean", hidden.numel() + weight.numel(), []),
            ("none", 0, []),
        ):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t
            ):
                lossfuse.linear_cross_entropy(hidden, weight, target, reduction=reduction)
            arguments = {t.data_ptr() for t in (hidden, weight, target)}
            assert sum(t.numel() for t in saved if t.data_ptr() not in arguments) <= most


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_no_storage_of_all_logits(self, narrow, dtype, soft):
        """Operator by operator; a mode does not see into an operator, so this is what the operators
        call."""
        n, d, v = 256, 8, 4000
        hidden, weight, bias, target = (t.detach() for t in head_and_ids(n, d, v, dtype))
        if soft:
            target = probabilities(n, v, dtype).detach()
        # the default of the blocks has a floor of MiBs
        options = chunks_of(16, v)
        most = max(16 * head_chunks.padded(v) * 4, v * d * 4)
        head, needs = (
            head_chunks.Head(hidden, weight, bias),
            head_chunks.Needs(True, True, True, False),
        )
        with Largest() as largest:
            head_chunks.row_loss_and_grads(
                head, target, None, torch.ones(()).expand(n), needs, LossSpec(), options, torch_rows
            )
        assert 0 < largest.bytes <= most < n * v
        with Largest() as largest:
            head_chunks.row_loss(
                head, target, None, LossSpec(label_smoothing=0.1), options, torch_rows
            )
        assert 0 < largest.bytes <= most

    @pytest.mark.parametrize("reduction", [pytest.param("none", marks=pytest.mark.slow), "mean"])
    @pytest.mark.parametrize(
        "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
    )
    def test_peak_of_a_call(self, dtype, reduction):
        """Chunk, sums and gradients; the logits would be 256 MiB, three times."""
        n, d, v = 2048, 128, 32000
        hidden, weight, _, target = head_and_ids(n, d, v, dtype, ignored=0.0)
        torch.use_deterministic_algorithms(False)  # which fills new memory twice
        options = LinearOptions(chunk_bytes=32 << 20)

        def call():
            loss = lossfuse.linear_cross_entropy(
                hidden, weight, target, reduction=reduction, options=options
            )
            return torch.autograd.grad(loss.sum(), [hidden, weight])

        peak = least_peak(call, hidden.device)
        if peak is None:
            pytest.skip("no /proc to ask")
        sums = (n + v) * d * 4
        if dtype == torch.float32:
            assert sums < peak < sums + (32 << 20) + (10 << 20)
        else:
            # malloc keeps some of the blocks of a converted weight that were freed
            assert sums < peak < sums + (32 << 20) + 3 * matmul.BLOCK_BYTES + (10 << 20)


class TestTheComparisonRejects:
    """Wrong on purpose, by the smallest of the mistakes of others."""

    def rejected(self, **options):
        *operands, target = head_and_ids(9, 6, 17)
        with pytest.raises(AssertionError):
            check(operands, target, chunks=chunks_of(4, 17), **options)

    def test_a_weight_gradient_without_the_last_chunk(self, monkeypatch):
        def product(out, a, b, *, add=False):
            if not (add and a.shape[1] == 3):
                matmul.product(out, a, b, add=add)

        monkeypatch.setattr(head_chunks, "product", product)
        *operands, target = head_and_ids(7, 6, 17, ignored=0.0)
        with pytest.raises(AssertionError, match="not close"):
            check(operands, target, chunks=chunks_of(4, 17))

    def test_hidden_gradients_scaled_twice(self, monkeypatch):
        def product(out, a, b, *, add=False):
            matmul.product(
                out, a * 0.5 if out.shape[0] < 17 and out.shape[1] == 6 else a, b, add=add
            )

        monkeypatch.setattr(head_chunks, "product", product)
        self.rejected()

    def test_ignored_rows_that_count(self, monkeypatch):
        monkeypatch.setattr(
            head_call, "denominator", lambda rows, *rest: torch.tensor(float(len(rows.target)))
        )
        self.rejected()

    def test_a_row_gradient_in_place_of_another(self, monkeypatch):
        monkeypatch.setattr(
            head_chunks,
            "_scatter",
            lambda some, kept, target: (
                some
                if kept is None
                else some.new_zeros(len(target), *some.shape[1:]).index_copy_(0, kept.flip(0), some)
            ),
        )
        self.rejected()
