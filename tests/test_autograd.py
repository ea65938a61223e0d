"""What autograd may ask: any grad_output, again, twice, forwards, batched; right or a sentence."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import lossfuse
from rows import class_weight, logits_and_ids, probabilities


def loss_of(place, **options):
    return lambda x, target: lossfuse.cross_entropy(x, target, impl=place.impl, **options)


@pytest.mark.parametrize("value", [0.0, 2.0, -0.5, 1e-30, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
def test_any_grad_output(place, value, reduction, soft):
    x, target = logits_and_ids(6, 40, device=place.device)
    leaves = [x]
    if soft:
        target = probabilities(6, 40, device=place.device)
        leaves.append(target)
    ones = torch.autograd.grad(
        lossfuse.cross_entropy(x, target, reduction=reduction, impl=place.impl), leaves
    )
    loss = lossfuse.cross_entropy(x, target, reduction=reduction, impl=place.impl)
    for got, one in zip(
        torch.autograd.grad(loss, leaves, torch.tensor(value, device=place.device)),
        ones,
        strict=True,
    ):
        # entries of 1e-8 times 1e-30 are subnormal
        torch.testing.assert_close(got, one * value, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("shape", ["expanded", "strided", "transposed"])
def test_grad_output_of_any_stride(place, shape):
    x = torch.randn(3, 7, 4, device=place.device, requires_grad=True)
    target = torch.randint(0, 7, (3, 4), device=place.device)
    # a move would make it dense
    with torch.device(place.device):
        dloss = {
            "expanded": torch.tensor(0.3).expand(3, 4),
            "strided": torch.randn(6, 8)[::2, ::2],
            "transposed": torch.randn(4, 3).t(),
        }[shape]
    (got,) = torch.autograd.grad(
        lossfuse.cross_entropy(x, target, reduction="none", impl=place.impl), x, dloss
    )
    (want,) = torch.autograd.grad(F.cross_entropy(x, target, reduction="none"), x, dloss)
    torch.testing.assert_close(got, want)


def test_gradients_accumulate_in_a_leaf(place):
    x, target = logits_and_ids(6, 40, device=place.device)
    for _ in range(3):
        lossfuse.cross_entropy(x, target, impl=place.impl).backward()
    (once,) = torch.autograd.grad(lossfuse.cross_entropy(x, target, impl=place.impl), x)
    torch.testing.assert_close(x.grad, 3 * once)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck_and_gradgradcheck_in_fp64(impl, soft, reduction):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = (
        torch.softmax(torch.randn(3, 5, dtype=torch.float64), 1).requires_grad_()
        if soft
        else torch.tensor([1, -100, 4])
    )
    options = {
        "label_smoothing": 0.2,
        "softcap": 4.0,
        "logit_scale": 1.5,
        "lse_square_scale": 0.1,
        "reduction": reduction,
        "impl": impl,
    }
    weight = torch.rand(5, dtype=torch.float64)

    def f(x, target):
        return lossfuse.cross_entropy(x, target, weight, **options)

    assert gradcheck(f, (x, target))
    assert gradgradcheck(f, (x, target))


def test_double_backward_in_half_precision_has_the_dtypes(place):
    x, target = logits_and_ids(5, 11, torch.bfloat16, device=place.device)
    (g,) = torch.autograd.grad(
        lossfuse.cross_entropy(x, target, impl=place.impl), x, create_graph=True
    )
    assert (
        g.dtype == torch.bfloat16
        and torch.autograd.grad(g.float().pow(2).sum(), x)[0].dtype == torch.bfloat16
    )


class TestTransforms:
    """Forward mode and torch.func, which "auto" sends to the reference."""

    def test_forward_mode(self):
        x, target = logits_and_ids(5, 11)
        tangent = torch.randn(5, 11)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), tangent)
            got = forward_ad.unpack_dual(lossfuse.cross_entropy(dual, target)).tangent
        (grad,) = torch.autograd.grad(lossfuse.cross_entropy(x, target), x)
        torch.testing.assert_close(got, (grad * tangent).sum())

    def test_grad(self):
        x, target = logits_and_ids(5, 11)
        got = torch.func.grad(lossfuse.cross_entropy)(x.detach(), target)
        torch.testing.assert_close(got, torch.func.grad(F.cross_entropy)(x.detach(), target))

    @pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
    def test_vmap(self, in_dims):
        x, target = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
        args = [a if d == 0 else a[0] for a, d in zip((x, target), in_dims, strict=True)]
        got = torch.func.vmap(lossfuse.cross_entropy, in_dims=in_dims)(*args)
        want = torch.stack(
            [
                F.cross_entropy(
                    *(a[i] if d == 0 else a for a, d in zip(args, in_dims, strict=True))
                )
                for i in range(4)
            ]
        )
        torch.testing.assert_close(got, want)

    def test_per_sample_gradients(self):
        x, target = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
        got = torch.func.vmap(torch.func.grad(lossfuse.cross_entropy))(x, target)
        torch.testing.assert_close(
            got,
            torch.stack(
                [torch.func.grad(F.cross_entropy)(a, t) for a, t in zip(x, target, strict=True)]
            ),
        )

    @pytest.mark.parametrize(
        "transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian]
    )
    def test_jacobians(self, transform):
        x, target = torch.randn(3, 5), torch.tensor([0, 4, -100])
        got = transform(lambda x: lossfuse.cross_entropy(x, target, reduction="none"))(x)
        torch.testing.assert_close(
            got, transform(lambda x: F.cross_entropy(x, target, reduction="none"))(x)
        )

    def test_jvp_of_probabilities(self):
        x, q = torch.randn(3, 5), torch.softmax(torch.randn(3, 5), 1)
        tangents = (torch.randn(3, 5), torch.randn(3, 5))
        got = torch.func.jvp(lossfuse.cross_entropy, (x, q), tangents)
        torch.testing.assert_close(got, torch.func.jvp(F.cross_entropy, (x, q), tangents))


def test_a_weight_that_requires_grad_gets_one():
    """torch raises for class ids; the reference knows the derivative."""
    x, target = logits_and_ids(5, 11)
    weight = class_weight(11).requires_grad_()
    loss = lossfuse.cross_entropy(x, target, weight, reduction="sum")
    (got,) = torch.autograd.grad(loss, weight)
    rows = F.cross_entropy(x, target, reduction="none").detach()
    want = torch.zeros(11).index_add(0, target.clamp(min=0), rows)
    torch.testing.assert_close(got, want)
    q = probabilities(5, 11)
    (got,) = torch.autograd.grad(lossfuse.cross_entropy(x, q, weight), weight)
    torch.testing.assert_close(got, torch.autograd.grad(F.cross_entropy(x, q, weight), weight)[0])


def test_nothing_is_saved_without_grad(place):
    x, target = logits_and_ids(5, 11, device=place.device)
    saved = []
    with (
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        assert not lossfuse.cross_entropy(x, target, impl=place.impl).requires_grad
    assert saved == []


def test_what_is_saved_is_no_second_tensor_of_the_logits_size(fast_place):
    x, target = logits_and_ids(5, 1000, device=fast_place.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lossfuse.cross_entropy(x, target, reduction="none", impl=fast_place.impl)
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 4 * len(x)


def test_checkpointing_recomputes_it(place):
    x, target = logits_and_ids(5, 40, device=place.device)
    loss = torch.utils.checkpoint.checkpoint(loss_of(place), x, target, use_reentrant=False)
    torch.testing.assert_close(
        torch.autograd.grad(loss, x),
        torch.autograd.grad(lossfuse.cross_entropy(x, target, impl=place.impl), x),
    )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_create_graph_where_target_comes_from_the_logits(place, reduction):
    """Self-entropy with a penalty on its gradient: each path once."""

    def first(f):
        x = (
            torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
            .to(place.device)
            .requires_grad_()
        )
        (g,) = torch.autograd.grad(
            f(x, x.softmax(1), reduction=reduction).sum(), x, create_graph=True
        )
        return g, *torch.autograd.grad(g.pow(2).sum(), x)

    got = first(lambda *a, **k: lossfuse.cross_entropy(*a, **k, impl=place.impl))
    torch.testing.assert_close(got, first(F.cross_entropy), rtol=1e-4, atol=1e-6)


def test_hooks_run_once_under_create_graph(place):
    x, target = logits_and_ids(3, 5, device=place.device)
    z = x * 1
    calls = []
    z.register_hook(lambda g: calls.append(1) or g * 2)
    (got,) = torch.autograd.grad(
        lossfuse.cross_entropy(z, target, impl=place.impl), x, create_graph=True
    )
    (want,) = torch.autograd.grad(F.cross_entropy(x, target), x)
    assert calls == [1]
    torch.testing.assert_close(got, 2 * want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_batched_grad_outputs(place, reduction):
    x, target = logits_and_ids(3, 5, device=place.device)
    loss = lossfuse.cross_entropy(x, target, reduction=reduction, impl=place.impl)
    dlosses = torch.randn(4, *loss.shape, device=place.device)
    (got,) = torch.autograd.grad(loss, x, dlosses, is_grads_batched=True)
    want = F.cross_entropy(x, target, reduction=reduction)
    torch.testing.assert_close(got, torch.autograd.grad(want, x, dlosses, is_grads_batched=True)[0])


def test_a_bad_target_under_torch_func_is_nan_not_zero():
    """Nothing can look at values there; a zero gradient would be a silent lie."""
    grad = torch.func.grad(lambda x: lossfuse.cross_entropy(x, torch.tensor([0, 1, 7])))(
        torch.randn(3, 5)
    )
    assert grad[2].isnan().all() and grad[:2].isfinite().all()


def test_a_normalizer_with_a_tangent():
    x, target = logits_and_ids(3, 5)
    with forward_ad.dual_level():
        normalizer = forward_ad.make_dual(torch.tensor(4.0), torch.tensor(1.0))
        loss = forward_ad.unpack_dual(lossfuse.cross_entropy(x, target, normalizer=normalizer))
        torch.testing.assert_close(loss.tangent, -loss.primal / 4)


def test_a_checkpoint_frees_the_formed_gradient():
    """What autograd holds between forward and backward goes through its hooks, so that
    checkpointing can drop it."""
    x, target = logits_and_ids(5, 4000)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.shape, lambda shape: torch.zeros(shape)
    ):
        loss = lossfuse.cross_entropy(x, target)
    assert "ReducedLoss" not in type(loss.grad_fn).__name__
    held = []
    node = loss.grad_fn
    while node is not None:
        held += [
            v for v in getattr(node, "__dict__", {}).values() if isinstance(v, torch.Tensor | tuple)
        ]
        node = node.next_functions[0][0] if node.next_functions else None
    assert not [
        t
        for v in held
        for t in (v if isinstance(v, tuple) else (v,))
        if isinstance(t, torch.Tensor) and t.numel() >= x.numel()
    ]


def test_the_mean_does_not_need_the_logits_again_on_the_cpu():
    x, target = logits_and_ids(5, 40)
    z = x * 1.0
    loss = lossfuse.cross_entropy(z, target, impl="torch")
    with torch.no_grad():
        z.zero_()
    (got,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(got, torch.autograd.grad(F.cross_entropy(x, target), x)[0])
