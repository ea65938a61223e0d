"""Where peers are silently wrong about a head's loss, and each refusal by its words."""

import math

import pytest
import torch

import lossfuse
import program
from closeness import assert_loss_close
from conftest import interpreted_only
from lossfuse import LinearOptions
from lossfuse.ops import head_chunks
from rows import class_weight, head_and_ids, probabilities
from test_linear import check, chunks_of, differentiated

NAN, INF = float("nan"), float("inf")
ALL = torch.full((6,), -100)
REDUCTIONS = ["none", "mean", "sum"]
DROP = [None, True, False]


@pytest.fixture(params=["", "narrow products"])
def narrow(request, monkeypatch):
    """As on CUDA, where products take half precision to fp32 and nothing is dropped unless asked
    for."""
    if request.param:
        monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)


@pytest.mark.parametrize("drop", DROP, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
class TestNothingCounts:
    def expect(self, got, value):
        assert got[0].isnan().all() if math.isnan(value) else (got[0] == value).all()
        for g in got[1:]:
            assert not g.any() and g.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_all_ignored(self, narrow, dtype, reduction, drop):
        *operands, _ = head_and_ids(6, 4, 9, dtype)
        options = chunks_of(2, 9, drop_ignored=drop)
        self.expect(
            differentiated(operands, ALL, reduction=reduction, options=options),
            NAN if reduction == "mean" else 0.0,
        )
        if reduction == "mean":
            self.expect(differentiated(operands, ALL, normalizer=5, options=options), 0.0)
            self.expect(differentiated(operands, ALL, weight=class_weight(9), options=options), NAN)

    def test_no_rows(self, place, reduction, drop):
        hidden, weight, bias, target = head_and_ids(6, 4, 9, device=place.device)
        got = differentiated(
            (hidden.detach()[:0].requires_grad_(), weight, bias),
            target[:0],
            reduction=reduction,
            impl=place.impl,
            options=LinearOptions(drop_ignored=drop),
        )
        self.expect(got, NAN if reduction == "mean" else 0.0)

    @pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
    def test_ignored_rows_hold_anything(self, place, value, reduction, drop):
        hidden, weight, bias, _ = head_and_ids(6, 4, 9, device=place.device)
        target = torch.tensor([3, -100, -100, 8, -100, 3], device=place.device)
        want = differentiated((hidden, weight, bias), target, reduction=reduction, impl=place.impl)
        dirty = hidden.detach().clone()
        dirty[1], dirty[2, 0], dirty[4, -1] = value, value, -value
        got = differentiated(
            (dirty.requires_grad_(), weight, bias),
            target,
            reduction=reduction,
            impl=place.impl,
            options=chunks_of(4, 9, drop_ignored=drop),
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_ignored_row_with_an_infinite_grad_output(monkeypatch, dtype):
    """0 times it is nobody's gradient, and its size no unit of the others'."""
    monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
    *operands, _ = head_and_ids(4, 4, 9, dtype)
    target = torch.tensor([3, -100, 8, 3])
    options = chunks_of(3, 9, drop_ignored=False)
    want = differentiated(operands, target, None, torch.ones(4), reduction="none", options=options)
    got = differentiated(
        operands,
        target,
        None,
        torch.tensor([1.0, INF, 1.0, 1.0]),
        reduction="none",
        options=options,
    )
    torch.testing.assert_close(got, want)


class TestNumbers:
    @pytest.mark.parametrize("v", [1, 2, 127, 8191])
    def test_vocabularies_of_awkward_size(self, v):
        *operands, target = head_and_ids(4, 3, v)
        check(operands, target, chunks=chunks_of(2, v))

    def test_one_class_of_certain_loss_zero(self, place):
        *operands, _ = head_and_ids(3, 4, 1, device=place.device)
        loss, *grads = differentiated(
            operands, torch.zeros(3, dtype=torch.long, device=place.device), impl=place.impl
        )
        assert loss == 0.0 and not any(g.any() for g in grads)

    def test_confident_rows_keep_their_digits(self, place):
        """Losses of 1e-13: 1 - p is 0 in fp32, and its gradient is not."""
        hidden = torch.eye(4, device=place.device) * 30.0
        weight = torch.eye(4, device=place.device).requires_grad_()
        target = torch.arange(4, device=place.device)
        hidden.requires_grad_()
        loss, dhidden, dweight = differentiated((hidden, weight, None), target, impl=place.impl)
        # fp64 itself has three digits of such a loss by way of lse - z
        torch.testing.assert_close(loss.item(), 3 * math.exp(-30), rtol=1e-5, atol=0)
        want = (1.0 - 4.0 * torch.eye(4, device=place.device)) * math.exp(-30) / 4
        torch.testing.assert_close([dhidden, dweight], [want, 30 * want], rtol=1e-5, atol=0)

    def test_one_target_for_all(self, place):
        *operands, _ = head_and_ids(40, 3, 9, device=place.device)
        target = torch.full((40,), 5, device=place.device)
        check(operands, target, impl=place.impl, chunks=chunks_of(7, 9))

    def test_a_call_again_is_the_same_to_the_bit(self, fast_place):
        *operands, target = head_and_ids(40, 8, 300, torch.bfloat16, device=fast_place.device)
        first, again = (
            differentiated(operands, target, impl=fast_place.impl, options=chunks_of(16, 300))
            for _ in range(2)
        )
        torch.testing.assert_close(first, again, rtol=0, atol=0)

    def test_arguments_are_not_written(self, fast_place):
        *operands, target = head_and_ids(6, 4, 9, device=fast_place.device)
        target = target.masked_fill(target == -100, 0)
        target[1] = -100
        before = [t.detach().clone() for t in (*operands, target)]
        for reduction in REDUCTIONS:
            differentiated(operands, target, reduction=reduction, impl=fast_place.impl)
        torch.testing.assert_close(
            [t.detach() for t in (*operands, target)], before, rtol=0, atol=0
        )

    @interpreted_only
    def test_logits_of_a_narrow_gradient_in_any_order_of_programs(self, monkeypatch):
        """A device runs a row's blocks in any order: the last one first, in the interpreter, for a
        vocabulary of several blocks."""
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        builder = interpreter.interpreter_builder
        set_grid_idx = builder.set_grid_idx

        def reversed_grid_idx(x, y, z):
            last_x, last_y, last_z = (size - 1 for size in builder.grid_dim)
            set_grid_idx(last_x - x, last_y - y, last_z - z)

        monkeypatch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
        monkeypatch.setattr(builder, "set_grid_idx", reversed_grid_idx)
        v = 40000
        *operands, _ = head_and_ids(2, 3, v, torch.bfloat16)
        target = probabilities(2, v, torch.bfloat16).detach()
        want = program.head_value_and_grads(operands, target)
        got = differentiated(operands, target, impl="triton")
        for g, w in zip(got, want, strict=True):
            assert (g.double() - w).norm() < 0.01 * w.norm()


H, W, B = torch.randn(4, 5), torch.randn(7, 5), torch.randn(7)
IDS = torch.tensor([0, 6, 3, 1])
PROBABILITIES = torch.softmax(torch.randn(4, 7), 1)
OPTIONS = LinearOptions

REFUSED = {
    "input no tensor": (TypeError, "input is a list but must be a Tensor", ([[1.0]], W, IDS), {}),
    "input of integers": (
        TypeError,
        "input has dtype torch.int64 but must be float64",
        (H.long(), W, IDS),
        {},
    ),
    "input 0-d": (
        ValueError,
        r"input has shape \(\) but hidden states must be \(D\), \(N, D\)",
        (torch.tensor(1.0), W, torch.tensor(0)),
        {},
    ),
    "weight no tensor": (
        TypeError,
        "linear_weight is a list but must be a Tensor",
        (H, [1.0], IDS),
        {},
    ),
    "weight None": (
        TypeError,
        "linear_weight is a NoneType but must be a Tensor",
        (H, None, IDS),
        {},
    ),
    "weight 1-d": (
        ValueError,
        r"linear_weight has shape \(5,\) but must be \(C, D\)",
        (H, W[0], IDS),
        {},
    ),
    "weight transposed": (
        ValueError,
        r"linear_weight has shape \(5, 7\) but input has shape \(4, 5\); the last sizes must agree",
        (H, W.t(), IDS),
        {},
    ),
    "weight of another dtype": (
        TypeError,
        "linear_weight has dtype torch.float32 but input has dtype torch.bfloat16; cast one of the two, or use autocast",
        (H.bfloat16(), W, IDS),
        {},
    ),
    "weight elsewhere": (
        ValueError,
        "linear_weight is on meta but input is on cpu",
        (H, W.to("meta"), IDS),
        {},
    ),
    "no classes": (
        ValueError,
        r"linear_weight has shape \(0, 5\): expected at least one class",
        (H, W[:0], IDS),
        {},
    ),
    "bias of another shape": (
        ValueError,
        r"linear_bias has shape \(5,\) but linear_weight has shape \(7, 5\); expected \(7,\)",
        (H, W, IDS),
        {"linear_bias": B[:5]},
    ),
    "bias of another dtype": (
        TypeError,
        "linear_bias has dtype torch.float64 but input",
        (H, W, IDS),
        {"linear_bias": B.double()},
    ),
    "bias no tensor": (
        TypeError,
        "linear_bias is a float but must be a Tensor",
        (H, W, IDS),
        {"linear_bias": 1.0},
    ),
    "target no tensor": (TypeError, "target is a list but must be a Tensor", (H, W, [0, 1]), {}),
    "target short": (
        ValueError,
        r"target has shape \(3,\) but the logits have shape \(4, 7\); expected class ids of shape \(4,\)",
        (H, W, IDS[:3]),
        {},
    ),
    "target one column": (ValueError, r"target has shape \(4, 1\)", (H, W, IDS[:, None]), {}),
    "target shifted": (
        ValueError,
        r"target has shape \(2, 3\) but the logits have shape \(2, 4, 7\)",
        (torch.randn(2, 4, 5), W, torch.zeros(2, 3, dtype=torch.long)),
        {},
    ),
    "target as torch's class dimension has it": (
        ValueError,
        r"target has shape \(2, 7, 4\)",
        (torch.randn(2, 4, 5), W, torch.rand(2, 7, 4)),
        {},
    ),
    "ids as floats": (
        TypeError,
        "target has dtype torch.float32 but class ids must be int64",
        (H, W, IDS.float()),
        {},
    ),
    "ignoring probabilities": (
        ValueError,
        "ignore_index is 3 but class probabilities",
        (H, W, PROBABILITIES),
        {"ignore_index": 3},
    ),
    "class weight short": (
        ValueError,
        r"weight has shape \(6,\) but input has 7 classes",
        (H, W, IDS),
        {"weight": torch.ones(6)},
    ),
    "smoothing": (
        ValueError,
        r"label_smoothing is 1.5 but must lie in \[0, 1\]",
        (H, W, IDS),
        {"label_smoothing": 1.5},
    ),
    "softcap": (ValueError, "softcap is 0.0 but must be positive", (H, W, IDS), {"softcap": 0.0}),
    "ignore_index": (
        TypeError,
        "ignore_index is 1.5 but must be an int",
        (H, W, IDS),
        {"ignore_index": 1.5},
    ),
    "reduction": (
        ValueError,
        "reduction is 'avg' but must be one of",
        (H, W, IDS),
        {"reduction": "avg"},
    ),
    "normalizer of a sum": (
        ValueError,
        "normalizer divides reduction='mean'",
        (H, W, IDS),
        {"reduction": "sum", "normalizer": 2},
    ),
    "normalizer": (
        ValueError,
        "normalizer is -1 but must be positive",
        (H, W, IDS),
        {"normalizer": -1},
    ),
    "impl": (ValueError, "impl is 'cuda' but must be one of", (H, W, IDS), {"impl": "cuda"}),
    "triton in fp64": (
        ValueError,
        "impl='triton' cannot run here: .*float64",
        (H.double(), W.double(), IDS),
        {"impl": "triton"},
    ),
    "options of torch": (
        TypeError,
        "options is a dict but must be a lossfuse.LinearOptions",
        (H, W, IDS),
        {"options": {}},
    ),
    "bf16 logits of fp32": (
        ValueError,
        "logits_dtype is torch.bfloat16 but input has dtype torch.float32; expected torch.float32 or None",
        (H, W, IDS),
        {"options": OPTIONS(logits_dtype=torch.bfloat16)},
    ),
    "bf16 sums of fp16": (
        ValueError,
        "acc_dtype is torch.bfloat16 but input has dtype torch.float16",
        (H.half(), W.half(), IDS),
        {"options": OPTIONS(acc_dtype=torch.bfloat16)},
    ),
    "K dimensions of a batch": (
        ValueError,
        r"linear_weight has shape \(7, 2, 5\), so input must be \(N, D\), but input has shape \(2, 4, 5\)",
        (torch.randn(2, 4, 5), torch.randn(7, 2, 5), IDS),
        {},
    ),
    "K dimensions for a name": (
        ValueError,
        "impl='torch' cannot run here: linear_weight has 3 dimensions",
        (H, torch.randn(7, 2, 5), torch.zeros(4, 2, dtype=torch.long)),
        {"impl": "torch"},
    ),
    "K dimensions of a bias": (
        ValueError,
        r"linear_bias has shape \(7,\) .* expected \(7, 2\)",
        (H, torch.randn(7, 2, 5), torch.zeros(4, 2, dtype=torch.long)),
        {"linear_bias": B},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_computed(name, monkeypatch):
    error, words, args, options = REFUSED[name]

    def never(*args, **kwargs):
        raise RuntimeError("computed")

    monkeypatch.setattr(head_chunks, "product", never)
    monkeypatch.setattr(torch.nn.functional, "linear", never)
    with pytest.raises(error, match=words):
        lossfuse.linear_cross_entropy(*args, **options)


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (TypeError, "chunk_bytes is 1.5 but must be an int", {"chunk_bytes": 1.5}),
        (TypeError, "chunk_bytes is True but must be an int", {"chunk_bytes": True}),
        (ValueError, "chunk_bytes is 0 but must be positive", {"chunk_bytes": 0}),
        (
            ValueError,
            "logits_dtype is torch.float16 but must be torch.float32, torch.bfloat16 or None",
            {"logits_dtype": torch.float16},
        ),
        (ValueError, "acc_dtype is float32 but must be", {"acc_dtype": "float32"}),
        (TypeError, "drop_ignored is 1 but must be True or False", {"drop_ignored": 1}),
        (
            TypeError,
            "allow_retain_graph is None but must be True or False",
            {"allow_retain_graph": None},
        ),
        (TypeError, "main_grad is 'yes' but must be", {"main_grad": "yes"}),
    ],
    ids=str,
)
def test_options_refuse(error, words, given):
    with pytest.raises(error, match=words):
        LinearOptions(**given)


@pytest.mark.parametrize("bad", [7, -1, 2**40])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("drop", DROP, ids=str)
def test_a_target_out_of_range_names_its_row(place, monkeypatch, bad, reduction, drop):
    if place.device != "cpu":
        pytest.skip("nothing looks on a device: NaN, as of logits")
    target = torch.tensor([0, -100, bad, bad])

    def never(*args, **kwargs):
        raise RuntimeError("computed")

    monkeypatch.setattr(head_chunks, "product", never)
    monkeypatch.setattr(torch.nn.functional, "linear", never)
    hidden = H.clone().requires_grad_()
    with pytest.raises(
        IndexError, match=rf"target of row 2 is {bad} but input has 7 classes; .* ignore_index=-100"
    ):
        lossfuse.linear_cross_entropy(
            hidden,
            W,
            target,
            reduction=reduction,
            impl=place.impl,
            options=LinearOptions(drop_ignored=drop),
        )


def test_a_mean_with_ids_as_ignore_index(place):
    """An id that is ignored and one that is not an address."""
    hidden, weight = (t.to(place.device) for t in (H, W))
    for ignored, ids in ((2, [0, 2, 6, 2]), (300, [0, 300, 6, 300])):
        target = torch.tensor(ids, device=place.device)
        got = lossfuse.linear_cross_entropy(
            hidden,
            weight,
            target,
            ignore_index=ignored,
            weight=class_weight(7, place.device),
            impl=place.impl,
        )
        want = program.linear_cross_entropy(
            hidden.double(),
            weight.double(),
            target,
            weight=class_weight(7, place.device).double(),
            ignore_index=ignored,
        )
        assert_loss_close(got, want)
