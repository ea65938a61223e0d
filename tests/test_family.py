"""binary_cross_entropy, log_softmax, nll_loss and the modules: torch's numbers, worked values, laws that join them."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import lossfuse

IMPLS = ["torch", "reference"]
EDGES = torch.tensor([0.0, 1.0, 1e-20, 0.3, 1 - 2**-24, 1e-45])


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_values(impl):
    p, t = torch.tensor([[0.6, 0.1], [0.3, 0.8]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert lossfuse.binary_cross_entropy(p, t, impl=impl).item() == pytest.approx(1.5081, abs=5e-5)
    assert lossfuse.binary_cross_entropy(p.sigmoid(), t, impl=impl).item() == pytest.approx(0.8518, abs=5e-5)
    assert lossfuse.binary_cross_entropy_with_logits(p, t, impl=impl).item() == pytest.approx(0.8518, abs=5e-5)
    p = torch.tensor([[0.1531, 0.3302, 0.7537], [0.2200, 0.6875, 0.2268], [0.5109, 0.5873, 0.9275]])
    t = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 1]])
    assert lossfuse.binary_cross_entropy(p, t, impl=impl).item() == pytest.approx(0.3784, abs=5e-5)
    assert lossfuse.binary_cross_entropy(p, t, t * 0.8 + 0.1, impl=impl).item() == pytest.approx(0.1030, abs=5e-5)
    rows = torch.tensor([[2.0, 3, 1], [3, 7, 9]])
    assert lossfuse.nll_loss(rows, torch.tensor([1, 2]), impl=impl).item() == -6
    volume = torch.tensor([[[2.0, 3], [1, 5]], [[3, 7], [1, 9]]])
    assert lossfuse.nll_loss(volume, torch.tensor([[1, 1], [0, 0]]), impl=impl).item() == -4


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("impl", IMPLS)
def test_probabilities_to_their_edges(impl, reduction):
    x, t = EDGES.repeat(3, 1).requires_grad_(), torch.tensor([[0.0], [0.4], [1.0]]).repeat(1, 6).requires_grad_()
    w = torch.rand(6)
    got = lossfuse.binary_cross_entropy(x, t, w, reduction=reduction, impl=impl)
    want = F.binary_cross_entropy(x, t, w, reduction=reduction)
    torch.testing.assert_close(got, want)
    (dx, dt), (want_dx, want_dt) = (torch.autograd.grad(loss.sum(), [x, t]) for loss in (got, want))
    torch.testing.assert_close(dx, want_dx)
    # torch's derivative for the target forgets its clamp, and is infinite at 0 and 1
    most = 100.0 * w.detach().expand_as(dt) / (t.numel() if reduction == "mean" else 1)
    torch.testing.assert_close(dt.clamp(-most, most), want_dt.clamp(-most, most))


@pytest.mark.parametrize("impl", IMPLS)
def test_derivatives(impl):
    p = torch.rand(3, 4, dtype=torch.float64).clamp(0.1, 0.9).requires_grad_()
    t, w = torch.rand(3, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    ids = torch.tensor([1, -100, 3])
    for f in (
        lambda p: lossfuse.binary_cross_entropy(p, t, w, impl=impl),
        lambda p: lossfuse.log_softmax(p, 1, impl=impl),
        lambda p: lossfuse.nll_loss(lossfuse.log_softmax(p, 1, impl=impl), ids, w, impl=impl),
    ):
        assert gradcheck(f, (p,), check_forward_ad=True) and gradgradcheck(f, (p,))
    p = p.detach()
    got = torch.func.grad(lambda p: lossfuse.binary_cross_entropy(p, t, impl=impl))(p)
    torch.testing.assert_close(got, torch.func.grad(F.binary_cross_entropy)(p, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision(impl, dtype):
    x, ids = torch.randn(5, 9).to(dtype), torch.tensor([0, 8, -100, 3, 2])
    p, w = x.sigmoid(), torch.rand(9).to(dtype)
    torch.testing.assert_close(lossfuse.binary_cross_entropy(p, p, w, impl=impl), F.binary_cross_entropy(p.float(), p.float(), w.float()))
    torch.testing.assert_close(lossfuse.nll_loss(x, ids, w, impl=impl), F.nll_loss(x.float(), ids, w.float()))
    torch.testing.assert_close(lossfuse.log_softmax(x, 1, impl=impl), F.log_softmax(x, 1))
    assert lossfuse.log_softmax(x, 1, dtype=torch.float32, impl=impl).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2), (0, 5)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_log_softmax_and_nll_are_cross_entropy(impl, shape, reduction):
    x = torch.randn(shape, requires_grad=True)
    dim = min(1, x.dim() - 1)
    ids = torch.randint(0, 5, shape[:dim] + shape[dim + 1 :])
    ids = ids.where(torch.rand(ids.shape) > 0.2, -100) if ids.dim() else ids
    w = torch.rand(5)
    logp = lossfuse.log_softmax(x, dim, impl=impl)
    torch.testing.assert_close(logp, F.log_softmax(x, dim))
    got, want = lossfuse.nll_loss(logp, ids, w, reduction=reduction, impl=impl), F.nll_loss(logp, ids, w, reduction=reduction)
    torch.testing.assert_close(got, want, equal_nan=True)
    ours = lossfuse.cross_entropy(x, ids, w, reduction=reduction)
    torch.testing.assert_close(got, ours, equal_nan=True)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (got, ours)), rtol=1e-4, atol=1e-6, equal_nan=True)


def test_two_classes_are_one_label(place):
    x, t = torch.randn(6, device=place.device), torch.tensor([0, 1, 1, 0, 1, 0], device=place.device)
    two = torch.stack([torch.zeros_like(x), x], 1)
    one = lossfuse.binary_cross_entropy_with_logits(x, t.float(), impl=place.impl)
    torch.testing.assert_close(one, lossfuse.cross_entropy(two, t, impl=place.impl))
    torch.testing.assert_close(one, lossfuse.binary_cross_entropy(x.sigmoid(), t.float()))


def test_modules_are_torch_modules():
    x, t, ids = torch.randn(4, 5), torch.rand(4, 5), torch.tensor([1, 2, -100, 4])
    w = torch.rand(5)
    for ours, theirs, args, call in (
        (lossfuse.BCELoss, torch.nn.BCELoss, {"weight": w, "reduction": "sum"}, (x.sigmoid(), t)),
        (lossfuse.BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss, {"weight": w, "pos_weight": w, "reduction": "none"}, (x, t)),
        (lossfuse.NLLLoss, torch.nn.NLLLoss, {"weight": w, "ignore_index": 2}, (x, ids.abs() % 5)),
        (lossfuse.LogSoftmax, torch.nn.LogSoftmax, {"dim": 1}, (x,)),
    ):
        module = ours(**args)
        assert isinstance(module, theirs) and list(module.state_dict()) == list(theirs(**args).state_dict())
        torch.testing.assert_close(module(*call), theirs(**args)(*call))


def test_refusals():
    p, t = torch.rand(4, 5), torch.rand(4, 5)
    for bad in (1.5, -0.1, float("nan")):
        q = p.clone()
        q[2, 3] = bad
        with pytest.raises(ValueError, match=r"input at \(2, 3\) is .* but probabilities must lie in \[0, 1\]"):
            lossfuse.binary_cross_entropy(q, t)
    with pytest.raises(ValueError, match="expected the same"):
        lossfuse.binary_cross_entropy(p, t[:, :1])
    with pytest.raises(TypeError, match="target has dtype torch.int64"):
        lossfuse.binary_cross_entropy(p, t.long())
    with pytest.raises(ValueError, match="does not broadcast"):
        lossfuse.binary_cross_entropy(p, t, torch.ones(4))
    with pytest.raises(IndexError, match="target of row 1 is 5 but input has 5 classes"):
        lossfuse.nll_loss(p, torch.tensor([0, 5, 1, 2]))
    with pytest.raises(TypeError, match="class ids must be"):
        lossfuse.nll_loss(p, t)
    with pytest.warns(UserWarning, match="takes dim=1"):
        lossfuse.log_softmax(p)
    for call in (lambda: lossfuse.log_softmax(p, 1, impl="triton"), lambda: lossfuse.binary_cross_entropy(p, t, impl="triton")):
        with pytest.raises(ValueError, match="impl='triton' cannot run here: there is no kernel"):
            call()
