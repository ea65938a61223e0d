"""Where peers are silently wrong: each case by name, for every implementation."""

import math

import pytest
import torch

import lossfuse
import program
from closeness import assert_gradient_close, assert_loss_close
from rows import logits_and_ids, probabilities

INF, NAN = float("inf"), float("nan")


def ours(place, x, target, **options):
    """Row losses and the gradient of their sum, on the place's device."""
    x = x.detach().to(place.device).requires_grad_()
    loss = lossfuse.cross_entropy(x, target.to(place.device), reduction="none", impl=place.impl, **options)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach().cpu(), grad.cpu()


def against_program(place, x, target, terms=0.0, **options):
    want = program.value_and_grads(x, target, dloss=torch.ones(len(x)), reduction="none", **options)
    loss, grad = ours(place, x, target, **options)
    assert_loss_close(loss, want[0])
    assert_gradient_close(grad, want[1], terms=terms)
    return loss, grad


@pytest.mark.parametrize("offset", [1e3, -1e3, 1e4, 1e6, 2.0**24, -(2.0**24)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
def test_a_common_offset_cancels_exactly(thrifty_place, offset, options):
    # multiples of 1/4 below 16, then of 2: every sum below is exact in fp32
    x, target = logits_and_ids(6, 5000)
    x = (x.detach() / 2).round() * 2
    loss, grad = ours(thrifty_place, x, target, **options)
    moved_loss, moved_grad = ours(thrifty_place, x + offset, target, **options)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-5, atol=1e-12)
    soft = probabilities(6, 5000).detach()
    loss, grad = ours(thrifty_place, x, soft, **options)
    moved_loss, moved_grad = ours(thrifty_place, x + offset, soft, **options)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("margin", [5.0, 10.0, 17.0, 20.0, 25.0, 40.0])
def test_a_confident_target_keeps_its_digits(place, margin):
    """Below 6e-8 a loss formed as lse - x[y] is 0 in fp32, and so is the target's gradient formed as p - 1."""
    v = 1000
    x = torch.zeros(3, v)
    target = torch.tensor([0, 500, v - 1])
    x[torch.arange(3), target] = margin
    loss, grad = ours(place, x, target)
    want = math.log1p((v - 1) * math.exp(-margin))
    p_others = (v - 1) * math.exp(-margin) / (1 + (v - 1) * math.exp(-margin))
    assert loss.tolist() == pytest.approx([want] * 3, rel=1e-5)
    assert grad[torch.arange(3), target].tolist() == pytest.approx([-p_others] * 3, rel=1e-5)
    assert grad[0, 1].item() == pytest.approx(p_others / (v - 1), rel=1e-5)


@pytest.mark.parametrize("margin", [5.0, 17.0, 25.0])
def test_a_confident_one_hot_keeps_its_digits(fast_place, margin):
    v = 1000
    x = torch.zeros(2, v)
    x[:, 3] = margin
    loss, grad = ours(fast_place, x, torch.nn.functional.one_hot(torch.tensor([3, 3]), v).float())
    others = (v - 1) * math.exp(-margin)
    assert loss.tolist() == pytest.approx([math.log1p(others)] * 2, rel=1e-5)
    assert grad[:, 3].tolist() == pytest.approx([-others / (1 + others)] * 2, rel=1e-5)


@pytest.mark.parametrize("margin", [50.0, 90.0, 200.0, 5000.0])
def test_a_hopeless_target(place, margin):
    x = torch.zeros(2, 300)
    x[:, 7] = margin
    loss, grad = against_program(place, x, torch.tensor([0, 299]))
    assert loss.tolist() == pytest.approx([margin] * 2, rel=1e-6)
    assert grad[0, 0].item() == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "where",
    [slice(0, 4096), slice(4096, 8192), slice(8192, None), slice(0, 8192), slice(1, None), slice(0, -1)],
    ids=["first block", "middle block", "ragged block", "all but the ragged block", "all but the first", "all but the last"],
)
@pytest.mark.parametrize("options", [{}, {"softcap": 15.0}, {"logit_scale": 0.5}], ids=["plain", "softcap", "scale"])
def test_minus_infinity_over_whole_blocks(place, where, options):
    x, _ = logits_and_ids(4, 9000)
    x = x.detach()
    x[:, where] = -INF
    finite = (x[0] > -INF).nonzero()[:, 0]
    target = finite[torch.tensor([0, len(finite) // 2, -1, 0])]
    against_program(place, x, target, **options)


def test_a_target_of_minus_infinity_costs_infinity(place):
    x, target = logits_and_ids(3, 50, ignored=0.0)
    x = x.detach()
    x[1, target[1]] = -INF
    loss, grad = against_program(place, x, target)
    assert loss[1] == INF and grad[1, target[1]] == -1.0 and grad.isfinite().all()


def test_undefined_rows_are_nan_and_stay_alone(place):
    x, target = logits_and_ids(5, 300, ignored=0.0)
    x = x.detach()
    want_loss, want_grad = ours(place, x, target)
    x[0] = -INF
    x[1, 250] = INF
    x[2, 100] = NAN
    loss, grad = ours(place, x, target)
    assert loss[:3].isnan().all() and grad[:3].isnan().any(-1).all()
    assert torch.equal(loss[3:], want_loss[3:]) and torch.equal(grad[3:], want_grad[3:])


def test_masked_classes_with_zero_probability_are_left_out(place):
    """torch makes this NaN (0 * -inf); a mass of 0 is no loss."""
    x = torch.tensor([[1.0, -INF, 2.0, 0.0]])
    q = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    loss, grad = ours(place, x, q)
    want = torch.nn.functional.cross_entropy(x[:, [0, 2, 3]], q[:, [0, 2, 3]])
    torch.testing.assert_close(loss[0], want)
    assert grad[0, 1] == 0.0 and grad.isfinite().all()
    q = q.to(place.device).requires_grad_()
    (dq,) = torch.autograd.grad(lossfuse.cross_entropy(x.to(place.device), q, impl=place.impl), q)
    assert dq[0, 1] == 0.0 and dq.isfinite().all()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_ignored_rows_may_hold_anything(place, poison):
    x, target = logits_and_ids(6, 300, ignored=0.0)
    x = x.detach()
    x[2], x[4, 5], target[2], target[4] = poison, poison, -100, -100
    for options in ({}, {"label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 9.0}):
        loss, grad = ours(place, x, target, **options)
        assert loss[[2, 4]].tolist() == [0.0, 0.0]
        assert torch.equal(grad[[2, 4]], torch.zeros(2, 300))
        assert loss.isfinite().all() and grad.isfinite().all()
        leaf = x.to(place.device).requires_grad_()
        mean = lossfuse.cross_entropy(leaf, target.to(place.device), impl=place.impl, **options)
        (mean_grad,) = torch.autograd.grad(mean, leaf)
        torch.testing.assert_close(mean.cpu(), loss.sum() / 4)
        torch.testing.assert_close(mean_grad.cpu(), grad / 4)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_all_ignored(place, weighted):
    x = torch.randn(4, 9, device=place.device, requires_grad=True)
    weight = torch.rand(9, device=place.device) if weighted else None
    target = torch.full((4,), -100, device=place.device)
    for options, want in (({}, NAN), ({"reduction": "sum"}, 0.0), ({"normalizer": 3.0}, 0.0), ({"label_smoothing": 0.1}, NAN)):
        loss = lossfuse.cross_entropy(x, target, weight, impl=place.impl, **options)
        torch.testing.assert_close(loss.item(), want, equal_nan=True)
        (grad,) = torch.autograd.grad(loss, x)
        assert torch.equal(grad, torch.zeros_like(x))


def test_all_logits_far_below_zero(place):
    x, target = logits_and_ids(4, 5000)
    against_program(place, x.detach() - 200.0, target)


def test_all_logits_equal(place):
    loss, grad = against_program(place, torch.full((2, 4097), -3.5), torch.tensor([0, 4096]))
    assert loss.tolist() == pytest.approx([math.log(4097)] * 2, rel=1e-6)
    assert grad[0, 1].item() == pytest.approx(1 / 4097, rel=1e-6)


@pytest.mark.parametrize("v", [17, 129, 4097])
@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_softcap_in_a_ragged_last_block(place, v, softcap):
    """Padded lanes must stay -inf: capped, they would count as classes of logit -softcap."""
    x, target = logits_and_ids(4, v, spread=0.5)
    against_program(place, x, target, softcap=softcap)


def test_softcap_tails_and_centre_keep_their_slope(fast_place):
    """1 - tanh^2 has no digits left at 10 caps, not even in fp64, and (1 - t) / (1 + t) none near 0."""
    x = torch.tensor([[-300.0, -100.0, -30.0, -3.0, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 3.0, 30.0, 100.0]])
    u = x.double() / 10.0
    for target in (0, 5, 11):
        loss, grad = ours(fast_place, x, torch.tensor([target]), softcap=10.0)
        want = program.value_and_grads(10.0 * torch.tanh(u), torch.tensor([target]), reduction="none")
        assert_loss_close(loss, want[0])
        assert_gradient_close(grad, want[1] / torch.cosh(u) ** 2)


@pytest.mark.parametrize("scale", [0.0, -2.0, 1e-3, 50.0])
def test_scales_of_any_sign(place, scale):
    x, target = logits_and_ids(4, 129, spread=1.0)
    against_program(place, x, target, logit_scale=scale)


def test_a_padded_lane_is_never_a_target(fast_place):
    """Targets just past the end fall into the padding of a block; without a look they must be NaN, not a number."""
    if fast_place.impl == "torch":
        from lossfuse.backends import chunked as backend
    else:
        from lossfuse.backends import triton as backend
    from lossfuse.row_stats import Upstream
    from lossfuse.spec import LossSpec

    v = 130
    x, _ = logits_and_ids(6, v, device=fast_place.device)
    x = x.detach()
    target = torch.tensor([0, v, v + 5, -5, 2**40, v - 1], device=fast_place.device)
    loss, stats = backend.row_loss(x, target, None, LossSpec())
    dlogits = torch.empty_like(x)
    backend.row_grads(x, target, None, stats, Upstream(torch.ones(6, device=x.device)), LossSpec(), dlogits, None)
    bad = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.equal(dlogits.isnan().all(-1).cpu(), bad) and torch.equal(dlogits.isnan().any(-1).cpu(), bad)


def test_fp16_gradients_survive_a_loss_scaler(place):
    """Rounded before the scaler's factor, p / n would be 0 in fp16."""
    n, v = 64, 4096
    x = torch.zeros(n, v, dtype=torch.float16, device=place.device, requires_grad=True)
    target = torch.zeros(n, dtype=torch.int64, device=place.device)
    (grad,) = torch.autograd.grad(lossfuse.cross_entropy(x, target, impl=place.impl) * 65536.0, x)
    assert grad[0, 1].item() == pytest.approx(65536.0 / (n * v), rel=1e-3)


def test_bf16_loss_is_not_rounded_to_bf16(place):
    x, target = logits_and_ids(32, 1000, torch.bfloat16)
    loss, _ = against_program(place, x, target)
    assert loss.dtype == torch.float32 and not torch.equal(loss, loss.bfloat16().float())
