"""What autograd and autocast may ask of a head's loss: once, twice, batched, recomputed; right or a
sentence."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import lossfuse
from closeness import assert_loss_close
from lossfuse import LinearOptions
from rows import class_weight, head_and_ids, probabilities

REDUCTIONS = ["none", "mean", "sum"]
KEPT = LinearOptions(allow_retain_graph=True)


def ours(hidden, weight, bias, target, **options):
    return lossfuse.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)


def eager(hidden, weight, bias, target, **options):
    return F.cross_entropy(F.linear(hidden, weight, bias), target, **options)


@pytest.fixture
def head():
    return head_and_ids(6, 5, 11)


class TestSecondBackward:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("retain", [False, True], ids=["", "retain_graph"])
    def test_it_raises_a_sentence(self, head, reduction, retain):
        loss = ours(*head, reduction=reduction)
        loss.backward(retain_graph=retain)
        before = [t.grad.clone() for t in head[:3]]
        with pytest.raises(
            RuntimeError,
            match=r"a second backward needs the gradients .*LinearOptions\(allow_retain_graph=True\)",
        ):
            loss.backward()
        assert all(torch.equal(t.grad, b) for t, b in zip(head, before, strict=False))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_it_is_right_when_asked_to_keep(self, place, reduction):
        head = head_and_ids(6, 5, 11, device=place.device)
        loss, want = (
            ours(*head, reduction=reduction, options=KEPT, impl=place.impl),
            eager(*head, reduction=reduction),
        )
        for factor in (0.3, -2.0, 1.0):
            got = torch.autograd.grad(loss.sum() * factor, head[:3], retain_graph=True)
            torch.testing.assert_close(
                got, torch.autograd.grad(want.sum() * factor, head[:3], retain_graph=True)
            )

    def test_none_keeps_nothing_and_can_again(self, head):
        loss = ours(*head, reduction="none").sum()
        first = torch.autograd.grad(loss, head[:3], retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, head[:3]), first, rtol=0, atol=0)

    def test_a_gradient_handed_over_is_not_touched_again(self, head):
        loss = ours(*head, options=KEPT)
        first = torch.autograd.grad(loss, head[:3], retain_graph=True)
        kept = [g.clone() for g in first]
        torch.autograd.grad(loss, head[:3], torch.tensor(5.0))
        torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)


class TestSecondDerivative:
    @pytest.mark.parametrize("batched", [False, True], ids=["", "batched"])
    @pytest.mark.parametrize("options", [LinearOptions(), KEPT], ids=["", "kept"])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_it_raises_a_sentence(self, fast_place, reduction, options, batched):
        head = head_and_ids(6, 5, 11, device=fast_place.device)
        loss = ours(*head, reduction=reduction, impl=fast_place.impl, options=options)
        dloss = torch.ones(2, *loss.shape, device=loss.device) if batched else torch.ones_like(loss)
        with pytest.raises(
            RuntimeError,
            match=r"no second derivative \(create_graph=True\) except with impl='reference'",
        ):
            torch.autograd.grad(loss, head[:3], dloss, create_graph=True, is_grads_batched=batched)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_the_reference_has_it(self, reduction):
        hidden, weight, bias, target = (t.detach() for t in head_and_ids(3, 2, 4))
        operands = [t.double().requires_grad_() for t in (hidden, weight, bias)]

        def f(*operands):
            return ours(
                *operands,
                target,
                reduction=reduction,
                impl="reference",
                softcap=4.0,
                lse_square_scale=0.1,
            )

        assert gradcheck(f, operands) and gradgradcheck(f, operands)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
    def test_gradcheck(self, reduction, soft):
        hidden, weight, bias, target = (t.detach() for t in head_and_ids(3, 2, 4))
        leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
        if soft:
            leaves.append(probabilities(3, 4, torch.float64))

        def f(hidden, weight, bias, target=target):
            given = {
                "weight": class_weight(4),
                "label_smoothing": 0.2,
                "reduction": reduction,
                "options": KEPT,
            }
            return lossfuse.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **given)

        assert gradcheck(f, leaves)


class TestTransforms:
    """Which "auto" sends to the reference."""

    def test_grad(self, head):
        operands, target = [t.detach() for t in head[:3]], head[3]
        got, want = (
            torch.func.grad(lambda *o, f=f: f(*o, target), argnums=(0, 1, 2))(*operands)
            for f in (ours, eager)
        )
        torch.testing.assert_close(got, want)

    def test_per_sample_gradients(self, head):
        hidden, weight, bias, target = (t.detach() for t in head)
        got, want = (
            torch.func.vmap(
                torch.func.grad(lambda w, h, t, f=f: f(h[None], w, bias, t[None], reduction="sum")),
                in_dims=(None, 0, 0),
            )(weight, hidden, target)
            for f in (ours, eager)
        )
        torch.testing.assert_close(got, want)

    def test_jvp(self, head):
        operands, target = tuple(t.detach() for t in head[:3]), head[3]
        tangents = tuple(torch.randn_like(t) for t in operands)
        got, want = (
            torch.func.jvp(lambda *o, f=f: f(*o, target), operands, tangents) for f in (ours, eager)
        )
        torch.testing.assert_close(got, want)

    def test_forward_mode(self, head):
        hidden, weight, bias, target = head
        tangent = torch.randn_like(weight)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight.detach(), tangent)
            got = forward_ad.unpack_dual(ours(hidden, dual, bias, target)).tangent
        (grad,) = torch.autograd.grad(ours(*head), weight)
        torch.testing.assert_close(got.detach(), (grad * tangent).sum())

    def test_a_bad_target_under_torch_func_is_nan_not_zero(self):
        weight = torch.randn(4, 2)
        grad = torch.func.grad(
            lambda h: lossfuse.linear_cross_entropy(h, weight, torch.tensor([0, 1, 7]))
        )(torch.randn(3, 2))
        assert grad[2].isnan().all() and grad[:2].isfinite().all()


class TestGraphs:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_between_other_uses_of_hidden_states_and_weight(self, place, reduction):
        """Hidden states of a layer, used before and after; the weight is the embedding's too."""
        ids = torch.tensor([1, 3, 10, 0, 3, 7], device=place.device)
        hidden, weight, bias, target = head_and_ids(6, 5, 11, device=place.device)

        def total(f, **options):
            h = (F.embedding(ids, weight) + hidden) * 2.0
            return (
                f(h, weight, bias, target, reduction=reduction, **options).sum() * 0.3
                + (h.square().sum() + weight.sum()) * 1e-2
            )

        got = torch.autograd.grad(total(ours, impl=place.impl), [hidden, weight, bias])
        torch.testing.assert_close(got, torch.autograd.grad(total(eager), [hidden, weight, bias]))

    def test_two_losses_of_one_weight(self, head):
        hidden, weight, bias, target = head

        def total(f):
            return f(hidden, weight, bias, target) * 2.0 - f(
                hidden * 0.5, weight, None, target, reduction="sum"
            )

        torch.testing.assert_close(
            torch.autograd.grad(total(ours), head[:3]), torch.autograd.grad(total(eager), head[:3])
        )

    @pytest.mark.parametrize("options", [LinearOptions(), KEPT], ids=["", "kept"])
    def test_gradients_accumulate(self, head, options):
        hidden, weight, bias, target = head
        for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
            ours(
                hidden[part],
                weight,
                bias,
                target[part],
                normalizer=float((target != -100).sum()),
                options=options,
            ).backward()
        torch.testing.assert_close(
            [t.grad for t in head[:3]], list(torch.autograd.grad(eager(*head), head[:3]))
        )

    def test_parts_of_a_backward(self, head):
        loss = ours(*head, options=KEPT)
        got = [torch.autograd.grad(loss, t, retain_graph=True)[0] for t in head[:3]]
        torch.testing.assert_close(got, list(torch.autograd.grad(eager(*head), head[:3])))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    def test_checkpointing(self, head, reduction, reentrant):
        def f(hidden, weight, bias):
            return ours(hidden, weight, bias, head[3], reduction=reduction)

        checkpoint(f, *head[:3], use_reentrant=reentrant).sum().backward()
        want = torch.autograd.grad(eager(*head, reduction=reduction).sum(), head[:3])
        torch.testing.assert_close([t.grad for t in head[:3]], list(want))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_saved_tensors_hooks(self, head, reduction):
        """All that is held between forward and backward goes through them."""
        stored = {}

        def pack(t):
            stored[len(stored)] = t.detach().clone()
            return len(stored) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: stored[i].clone()):
            loss = ours(*head, reduction=reduction).sum()
        torch.testing.assert_close(
            torch.autograd.grad(loss, head[:3]),
            torch.autograd.grad(eager(*head, reduction=reduction).sum(), head[:3]),
        )
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.shape, lambda shape: torch.zeros(shape)
        ):
            loss = ours(*head, reduction="mean")
        assert not any(g.any() for g in torch.autograd.grad(loss, head[:3]))

    def test_hooks_of_the_weight(self, head):
        calls = []
        head[1].register_hook(lambda g: calls.append(g.shape) or g * 2.0)
        head[1].register_post_accumulate_grad_hook(lambda w: calls.append("after"))
        ours(*head).backward()
        assert calls == [(11, 5), "after"]
        torch.testing.assert_close(
            head[1].grad, torch.autograd.grad(eager(*head), head[1])[0]
        )  # whose hook doubles, too

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_batched_grad_outputs(self, head, reduction):
        got, want = (f(*head, reduction=reduction) for f in (ours, eager))
        dlosses = torch.randn(4, *got.shape)
        got, want = (
            torch.autograd.grad(loss, head[:3], dlosses, is_grads_batched=True)
            for loss in (got, want)
        )
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("dloss", ["expanded", "strided", "reversed"])
    def test_grad_output_of_any_stride(self, place, dloss):
        head = head_and_ids(6, 5, 11, device=place.device)
        # a move would make it dense
        with torch.device(place.device):
            dloss = {
                "expanded": torch.tensor(0.3).expand(6),
                "strided": torch.randn(12)[::2],
                "reversed": torch.randn(6).flip(0),
            }[dloss]
        got = torch.autograd.grad(ours(*head, reduction="none", impl=place.impl), head[:3], dloss)
        torch.testing.assert_close(
            got, torch.autograd.grad(eager(*head, reduction="none"), head[:3], dloss)
        )

    @pytest.mark.parametrize("name", ["hidden", "weight"])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_operands_changed_before_the_backward(self, head, reduction, name):
        """Scalar reductions do not need them again; "none" does, and torch says so."""
        want = torch.autograd.grad(eager(*head, reduction=reduction).sum(), head[:3])
        loss = ours(*head, reduction=reduction).sum()
        with torch.no_grad():
            head[0 if name == "hidden" else 1].zero_()
        if reduction == "none":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, head[:3])
        else:
            torch.testing.assert_close(torch.autograd.grad(loss, head[:3]), want)


class TestMainGrad:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_gradients_are_added_without_rounding(self, reduction, dtype):
        hidden, weight, bias, target = head_and_ids(6, 5, 11, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight.main_grad = torch.full((11, 5), 3.0, dtype=wide)
        wants = weight.detach().double().requires_grad_()
        (want,) = torch.autograd.grad(
            eager(
                hidden.detach().double(), wants, bias.detach().double(), target, reduction=reduction
            ).sum()
            * 0.3,
            wants,
        )
        for times in (1, 2):
            (
                ours(
                    hidden,
                    weight,
                    bias,
                    target,
                    reduction=reduction,
                    options=LinearOptions(main_grad=True),
                ).sum()
                * 0.3
            ).backward()
            assert weight.grad is None and hidden.grad is not None and bias.grad is not None
            torch.testing.assert_close(
                weight.main_grad, 3.0 + times * want.to(wide), rtol=1e-6, atol=1e-6
            )

    def test_under_autocast_the_parameter_has_it(self):
        hidden, weight, bias, target = head_and_ids(6, 5, 11)
        weight.main_grad = torch.zeros(11, 5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(hidden, weight, bias, target, options=LinearOptions(main_grad=True))
        loss.backward()
        assert weight.grad is None
        torch.testing.assert_close(
            weight.main_grad,
            torch.autograd.grad(eager(hidden, weight, bias, target), weight)[0],
            rtol=0.05,
            atol=2e-3,
        )

    @pytest.mark.parametrize(
        ("buffer", "words"),
        [
            (None, "options.main_grad is True but linear_weight has no tensor main_grad"),
            (torch.zeros(11, 4), r"expected torch.float32 of shape \(11, 5\) on cpu"),
            (torch.zeros(11, 5, dtype=torch.bfloat16), "linear_weight.main_grad is torch.bfloat16"),
            (torch.zeros(11, 5, device="meta"), "linear_weight.main_grad is .* on meta"),
        ],
        ids=["none", "shape", "dtype", "device"],
    )
    def test_buffers_that_do_not_fit(self, head, buffer, words):
        if buffer is not None:
            head[1].main_grad = buffer
        with pytest.raises(ValueError, match=words):
            ours(*head, options=LinearOptions(main_grad=True))

    def test_where_nobody_would_write_it(self, head):
        head[1].main_grad = torch.zeros(11, 5)
        with pytest.raises(
            ValueError, match="options.main_grad needs another implementation than the reference"
        ):
            ours(*head, options=LinearOptions(main_grad=True), impl="reference")
        weight = torch.randn(11, 2, 5, requires_grad=True)
        weight.main_grad = torch.zeros_like(weight)
        with pytest.raises(ValueError, match="options.main_grad .* linear_weight has 3 dimensions"):
            lossfuse.linear_cross_entropy(
                head[0],
                weight,
                torch.zeros(6, 2, dtype=torch.long),
                options=LinearOptions(main_grad=True),
            )

    def test_a_frozen_weight_leaves_it_alone(self, head):
        head[1].requires_grad_(False).main_grad = torch.zeros(11, 5)
        ours(*head, options=LinearOptions(main_grad=True)).backward()
        assert not head[1].main_grad.any()


class TestAutocast:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_operands_are_cast_and_logits_are_float32(self, place, dtype, reduction):
        head = head_and_ids(6, 5, 11, device=place.device)
        with torch.autocast(place.device, dtype):
            got = ours(*head, reduction=reduction, impl=place.impl)
            grads = torch.autograd.grad(got.sum(), head[:3])
            theirs = eager(*head, reduction=reduction)
        assert got.dtype == torch.float32
        rounded = [t.detach().to(dtype).double() for t in head[:3]]
        assert_loss_close(got, eager(*rounded, head[3], reduction=reduction))
        for g, w in zip(grads, torch.autograd.grad(theirs.sum(), head[:3]), strict=True):
            assert g.dtype == torch.float32
            torch.testing.assert_close(g, w, rtol=0.05, atol=0.03)

    def test_weights_of_k_dimensions(self):
        hidden, weight, target = (
            torch.randn(4, 5),
            torch.randn(7, 3, 5),
            torch.randint(0, 7, (4, 3)),
        )
        with torch.autocast("cpu", torch.bfloat16):
            got = lossfuse.linear_cross_entropy(hidden, weight, target)
        logits = torch.einsum("nd,vkd->nvk", hidden.bfloat16().double(), weight.bfloat16().double())
        assert_loss_close(got, F.cross_entropy(logits, target))

    def test_mixed_dtypes(self, head):
        hidden, weight, bias, target = head
        with torch.autocast("cpu", torch.bfloat16):
            ours(hidden.bfloat16(), weight, bias, target).backward()
        assert weight.grad.dtype == torch.float32
        with pytest.raises(
            TypeError,
            match="linear_weight has dtype torch.float32 but input has dtype torch.bfloat16; cast one",
        ):
            ours(hidden.bfloat16(), weight, bias, target)

    def test_float64_stays(self, head):
        operands = [t.detach().double() for t in head[:3]]
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(*operands, head[3]).dtype == torch.float64


class TestModule:
    @pytest.mark.parametrize(
        "given",
        [{}, {"bias": True}, {"bias": True, "out_features": (2, 3), "weight": True}],
        ids=str,
    )
    def test_it_is_that_of_torch(self, given):
        if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
            pytest.skip("this torch has no LinearCrossEntropyLoss")
        given = (
            given
            | ({"weight": class_weight(7)} if "weight" in given else {})
            | {"label_smoothing": 0.1, "reduction": "sum"}
        )
        torch.manual_seed(5)
        theirs = torch.nn.LinearCrossEntropyLoss(5, 7, **given)
        torch.manual_seed(5)
        module = lossfuse.LinearCrossEntropyLoss(5, 7, **given)
        torch.testing.assert_close(
            dict(module.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0
        )
        other = lossfuse.LinearCrossEntropyLoss(5, 7, **given)
        other.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(other.state_dict())
        hidden, target = torch.randn(4, 5), torch.randint(0, 7, (4, *given.get("out_features", ())))
        torch.testing.assert_close(module(hidden, target), theirs(hidden, target))
        got, want = (
            torch.autograd.grad(m(hidden, target), m.parameters()) for m in (other, theirs)
        )
        torch.testing.assert_close(got, want)

    def test_copies(self):
        given = {
            "bias": True,
            "softcap": 9.0,
            "lse_square_scale": 1e-3,
            "ignore_index": None,
            "impl": "torch",
            "logit_scale": 0.5,
        }
        module = lossfuse.LinearCrossEntropyLoss(
            5, 7, **given, options=LinearOptions(acc_dtype=torch.float32, chunk_bytes=64)
        )
        hidden, target = torch.randn(4, 5), torch.tensor([0, -100, 6, 3])
        want = module(hidden, target, normalizer=3.0)
        stored = io.BytesIO()
        torch.save(module, stored)
        stored.seek(0)
        for other in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(stored, weights_only=False),
        ):
            assert (
                torch.equal(other(hidden, target, normalizer=3.0), want)
                and other.options == module.options
            )
        assert "num_classes=7" in repr(module) and "in_features=5" in repr(module)

    def test_a_tied_weight(self):
        embedding = torch.nn.Embedding(7, 5)
        module = lossfuse.LinearCrossEntropyLoss(5, 7)
        module.linear.weight = embedding.weight
        target = torch.tensor([0, -100, 6, 3])
        module(embedding(torch.tensor([1, 2, 3, 3])), target).backward()
        got, embedding.weight.grad = embedding.weight.grad, None
        F.cross_entropy(
            F.linear(embedding(torch.tensor([1, 2, 3, 3])), embedding.weight), target
        ).backward()
        torch.testing.assert_close(got, embedding.weight.grad)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"reduction": "avg"}, "reduction is 'avg'"),
            ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
            ({"softcap": -1.0}, "softcap is -1.0"),
            ({"weight": torch.ones(6)}, r"weight has shape \(6,\) but there are 7 classes"),
        ],
        ids=str,
    )
    def test_wrong_arguments(self, given, words):
        with pytest.raises(ValueError, match=words):
            lossfuse.LinearCrossEntropyLoss(5, 7, **given)
