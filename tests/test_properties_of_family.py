"""Random calls of the losses around cross entropy against the torch program in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis")

from hypothesis import strategies as st

import lossfuse
import program
from closeness import assert_gradient_close
from conftest import Place
from draws import (
    class_ids,
    dtypes,
    holds_for,
    laid_out,
    layouts,
    parent_and_view,
    reductions,
    seeds,
)

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)


def takes(place, *tensors):
    return place.impl != "triton" or all(t is None or t.dtype != torch.float64 for t in tensors)


def on(place, *tensors):
    return [None if t is None else t.detach().to(place.device) for t in tensors]


def upstream(loss):
    """A power of two for a number, as its gradient may have been rounded before it comes."""
    return (
        torch.linspace(-1, 2, loss.numel()).reshape(loss.shape) if loss.dim() else torch.tensor(2.0)
    )


@st.composite
def broadcast(draw, shape):
    """Positive numbers that broadcast to a shape, or None."""
    if draw(st.booleans()):
        return None
    sizes = [size if draw(st.booleans()) else 1 for size in shape][
        draw(st.integers(0, len(shape))) :
    ]
    return torch.rand(sizes) * 3.0 + 0.05


def assert_values_close(got, want, terms=0.0):
    rtol, floor = (1e-11, 1e-12) if got.dtype == torch.float64 else (1e-5, 5e-7)
    got = got.detach().double().cpu()
    wrong = (
        ~((got - want).abs() <= rtol * want.abs() + floor * terms + 1e-30)
        & ~(got.isnan() & want.isnan())
        & ~(got == want)
    )
    assert not wrong.any(), (got[wrong], want[wrong])


@st.composite
def labels(draw):
    """(parent and view of logits, target, weight, pos_weight, options)."""
    torch.manual_seed(draw(seeds))
    listed = draw(st.booleans())
    shape = (draw(st.integers(1, 9)), draw(st.integers(2, 300))) if listed else draw(shapes)
    dtype = draw(dtypes)
    x = (torch.randn(shape) * draw(st.sampled_from([0.0, 1.0, 8.0, 15.0]))).to(dtype)
    options = {"reduction": draw(reductions)}
    if listed:
        n, v = shape
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, v]))
        p = draw(st.integers(0, 9).filter(lambda p: p != v))
        ids = torch.randint(0, v, (n, p))
        target = ids.masked_fill(
            torch.rand(n, p) < draw(st.sampled_from([0.0, 0.4, 1.0])), options["ignore_index"]
        )
    else:
        kind = draw(st.sampled_from(["zeros and ones", "between"]))
        target = torch.rand(shape).round() if kind == "zeros and ones" else torch.rand(shape)
        target = target.to(draw(st.sampled_from([dtype, torch.float32])))
    parent, view = parent_and_view(x, draw(layouts))
    target = draw(laid_out(target))
    return parent, view, target, draw(broadcast(shape)), draw(broadcast(shape)), options


@holds_for(labels(), st.booleans(), few=30)
def test_labels_equal_the_torch_program(thrifty_place, call, inplace):
    parent, view, target, weight, pos_weight, options = call
    if not takes(thrifty_place, parent, target):
        return
    dense = target.is_floating_point()
    x, t = (
        view(parent).double().detach().requires_grad_(),
        target.double().detach().requires_grad_() if dense else target,
    )
    w, pw = (None if a is None else a.double() for a in (weight, pos_weight))
    want = program.binary_cross_entropy_with_logits(x, t, w, pos_weight=pw, **options)
    dloss = upstream(want)
    want_grads = torch.autograd.grad(want, [x, t] if dense else [x], dloss.double())

    leaf, target, weight, pos_weight = on(thrifty_place, parent, target, weight, pos_weight)
    leaf.requires_grad_()
    target.requires_grad_(dense)
    loss = lossfuse.binary_cross_entropy_with_logits(
        view(leaf) * 1.0 if inplace else view(leaf),
        target,
        weight,
        pos_weight=pos_weight,
        inplace=inplace,
        impl=thrifty_place.impl,
        **options,
    )
    grads = torch.autograd.grad(loss, [leaf, target] if dense else [leaf], dloss.to(loss))
    assert loss.shape == want.shape and loss.dtype == (
        torch.float64 if parent.dtype == torch.float64 else torch.float32
    )
    # losses are sums of what is not negative, and gradients of labels between 0 and 1 are
    # differences
    assert_values_close(loss, want.detach())
    size = dloss.double().abs() * (1.0 if w is None else w) * (1.0 if pw is None else pw + 1.0)
    size = (size / x.numel() if options["reduction"] == "mean" else size) * torch.ones_like(x)
    s = torch.sigmoid(x.detach())
    t = t.detach() if dense else 0.5
    assert_gradient_close(
        view(grads[0]).cpu(),
        want_grads[0],
        terms=size * (s * (1 - t) + (1 - s) * t) if dense else 0.0,
    )
    if dense:
        assert_gradient_close(
            grads[1].cpu(),
            want_grads[1],
            terms=size * (1.0 + x.detach().abs()) if pw is not None else 0.0,
        )


@st.composite
def certainties(draw):
    """Probabilities, the edges among them, their targets and a weight."""
    torch.manual_seed(draw(seeds))
    shape = draw(shapes)
    dtype = draw(dtypes)
    x = torch.sigmoid(torch.randn(shape) * draw(st.sampled_from([0.0, 1.0, 8.0])))
    edges = draw(st.booleans())
    if edges:
        x = torch.where(torch.rand(shape) < 0.3, x.round(), x)
    t = torch.rand(shape)
    t = t.round() if draw(st.booleans()) else t
    x, t = x.to(dtype), t.to(draw(st.sampled_from([dtype, torch.float32])))
    return draw(laid_out(x)), draw(laid_out(t)), draw(broadcast(shape)), draw(reductions)


@holds_for(certainties(), few=15)
def test_probabilities_of_labels_equal_torchs_in_float64(thrifty_place, call):
    x, t, weight, reduction = call
    if not takes(thrifty_place, x, t):
        return
    wide, w = x.double().detach().requires_grad_(), None if weight is None else weight.double()
    want = F.binary_cross_entropy(wide, t.double(), w, reduction=reduction)
    dloss = upstream(want)
    (want_grad,) = torch.autograd.grad(want, wide, dloss.double())
    leaf, target, weight = on(thrifty_place, x, t, weight)
    leaf.requires_grad_()
    loss = lossfuse.binary_cross_entropy(
        leaf, target, weight, reduction=reduction, impl=thrifty_place.impl
    )
    (grad,) = torch.autograd.grad(loss, leaf, dloss.to(loss))
    assert_values_close(loss, want.detach())
    size = (
        dloss.double().abs() * (1.0 if w is None else w) / (x.numel() if reduction == "mean" else 1)
    )
    spread = (x.double() * (1.0 - x.double())).clamp(min=1e-12)
    # a difference of a probability and its target; 1 - x is exact, and x * (1 - x) next to 1e-12 is
    # either up to 1e12, which float16 has not
    beyond = want_grad.abs() > torch.finfo(x.dtype).max
    want_grad = torch.where(beyond, want_grad.sign() * torch.inf, want_grad)
    assert_gradient_close(
        grad.cpu(), want_grad, terms=(size * (x.double() + t.double()) / spread).where(~beyond, 0.0)
    )


@st.composite
def volumes(draw):
    torch.manual_seed(draw(seeds))
    shape = draw(shapes.filter(len))
    x = torch.randn(shape) * draw(st.sampled_from([0.0, 1.0, 8.0, 30.0])) + draw(
        st.sampled_from([0.0, 300.0])
    )
    return draw(laid_out(x.to(draw(dtypes)))), draw(st.integers(-len(shape), len(shape) - 1))


@holds_for(volumes(), few=15)
def test_log_softmax_equals_torchs_in_float64(thrifty_place, call):
    x, dim = call
    if not takes(thrifty_place, x):
        return
    wide = x.double().detach().requires_grad_()
    want = torch.log_softmax(wide, dim)
    up = torch.linspace(-1, 2, x.numel()).reshape(x.shape).to(x.dtype)
    (want_grad,) = torch.autograd.grad(want, wide, up.double())
    leaf = x.detach().to(thrifty_place.device).requires_grad_()
    got = lossfuse.log_softmax(leaf, dim, impl=thrifty_place.impl)
    (grad,) = torch.autograd.grad(got, leaf, up.to(thrifty_place.device))
    assert got.dtype == x.dtype and got.shape == x.shape
    want = want.detach()
    # beside the largest logit, whose logarithm is next to nothing
    assert_gradient_close(
        got, want, terms=0.2 * (1.0 + (wide.detach().amax(dim, keepdim=True) - wide.detach()))
    )
    if thrifty_place == Place("torch", "cuda") and x.dtype in (torch.bfloat16, torch.float16):
        # torch's own is the gradient of the rounded logarithms
        return
    terms = up.double().abs() + want.exp() * up.double().abs().sum(dim, keepdim=True)
    assert_gradient_close(grad, want_grad, terms=terms * (1.0 - want))


@st.composite
def picks(draw):
    torch.manual_seed(draw(seeds))
    v = draw(st.integers(1, 60))
    batch = draw(
        st.sampled_from(
            [(), (1,), (draw(st.integers(1, 9)),), (draw(st.integers(1, 3)), 2), (2, 1, 3)]
        )
    )
    logp = (
        torch.log_softmax(torch.randn(*batch, v) * 4.0, -1)
        .movedim(-1, min(1, len(batch)))
        .to(draw(dtypes))
    )
    ignore_index = draw(st.sampled_from([-100, -1, 0, v]))
    target = draw(laid_out(draw(class_ids(batch, v, ignore_index))))
    weight = torch.rand(v) if draw(st.booleans()) else None
    return draw(laid_out(logp)), target, weight, ignore_index, draw(reductions)


@holds_for(picks(), few=15)
def test_nll_loss_equals_torchs_in_float64(thrifty_place, call):
    logp, target, weight, ignore_index, reduction = call
    if not takes(thrifty_place, logp):
        return
    wide, w = (
        logp.double().contiguous().detach().requires_grad_(),
        None if weight is None else weight.double(),
    )
    want = F.nll_loss(wide, target.long(), w, ignore_index=ignore_index, reduction=reduction)
    dloss = upstream(want)
    (want_grad,) = torch.autograd.grad(want, wide, dloss.double())
    leaf, t, weight = on(thrifty_place, logp, target, weight)
    leaf.requires_grad_()
    loss = lossfuse.nll_loss(
        leaf, t, weight, ignore_index=ignore_index, reduction=reduction, impl=thrifty_place.impl
    )
    (grad,) = torch.autograd.grad(loss, leaf, dloss.to(loss))
    assert_values_close(loss, want.detach())
    # torch's own gradient of a mean over no valid target is NaN or 0 by its device; ours is 0
    assert_gradient_close(grad.cpu(), want_grad.nan_to_num(nan=0.0))
