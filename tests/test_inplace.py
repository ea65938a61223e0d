"""``inplace=True``: the gradient lies where the logits were, autograd knows, and a stale use raises
instead of giving a number."""

import gc
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

import lossfuse
from allocations import Largest
from closeness import assert_gradient_close
from lossfuse.ops.inplace import Consumed
from options import COMPILERS
from rows import logits_and_ids, probabilities

N, V = 6, 50
ERR_LOGITS_CONSUMED = "consumed by a loss of lossfuse"


def produced(x):
    """As a layer hands it over: no leaf, its memory its own. The gradient arrives at the leaf."""
    leaf = x.detach().clone().requires_grad_()
    return leaf, leaf * 1.0


def truth(x, target, grad_output=None, **options):
    x64 = x.detach().double().requires_grad_()
    t64 = target.double() if target.is_floating_point() else target
    loss = lossfuse.cross_entropy(x64, t64, impl="reference", **options)
    (want,) = torch.autograd.grad(loss, x64, None if grad_output is None else grad_output.double())
    return loss.detach(), want


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap, scale, z-loss": {"softcap": 3.0, "logit_scale": 0.7, "lse_square_scale": 1e-2},
    "all": {"label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 1.3, "lse_square_scale": 1e-3},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_right_and_lies_in_the_logits(fast_place, dtype, reduction, options, weighted):
    x, target = logits_and_ids(N, V, dtype, fast_place.device)
    if weighted:
        options = options | {"weight": torch.rand(V, device=x.device) + 0.5}
    dloss = (
        torch.rand(N, device=x.device) + 0.3
        if reduction == "none"
        else torch.tensor(2.0, device=x.device)
    )
    loss64, want = truth(
        x,
        target,
        dloss,
        reduction=reduction,
        **{k: v.double() if k == "weight" else v for k, v in options.items()},
    )
    _, logits = produced(x)
    address = logits.data_ptr()
    loss = lossfuse.cross_entropy(
        logits, target, reduction=reduction, inplace=True, impl=fast_place.impl, **options
    )
    torch.testing.assert_close(loss.double(), loss64, rtol=2e-6, atol=1e-6)
    (got,) = torch.autograd.grad(loss, logits, dloss)
    assert got.data_ptr() == address and type(got) is torch.Tensor
    # where a gradient is a difference, of numbers of its row's dloss
    terms = 0.0 if options.keys() <= {"weight"} else 2.0
    assert_gradient_close(got, want, terms=terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_factor_is_applied_after_a_first_rounding(fast_place, dtype):
    x, target = logits_and_ids(N, V, dtype, fast_place.device)
    leaf, logits = produced(x)
    (call(logits, target, fast_place) * 1.7).backward()
    want = 1.7 * truth(x, target)[1]
    torch.testing.assert_close(
        leaf.grad.double(), want, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-30
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probabilities_keep_their_memory_and_get_a_gradient(fast_place, reduction):
    x, _ = logits_and_ids(N, V, torch.float32, fast_place.device)
    q = probabilities(N, V, torch.float32, fast_place.device).detach().requires_grad_()
    before = q.detach().clone()
    leaf, logits = produced(x)
    lossfuse.cross_entropy(
        logits, q, reduction=reduction, inplace=True, impl=fast_place.impl
    ).sum().backward()
    q64, x64 = q.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    F.cross_entropy(x64, q64, reduction=reduction).sum().backward()
    assert torch.equal(q.detach(), before)
    torch.testing.assert_close(leaf.grad.double(), x64.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(q.grad.double(), q64.grad, rtol=1e-5, atol=1e-9)


def call(logits, target, place, reduction="mean", **options):
    return lossfuse.cross_entropy(
        logits, target, reduction=reduction, inplace=True, impl=place.impl, **options
    )


def values_of(logits):
    """The memory as it is, whatever the tensor says."""
    with torch._C.DisableTorchFunctionSubclass():
        return logits.detach().clone()


READERS = {
    "another loss": lambda x, t: F.cross_entropy(x, t),
    "the loss again": lambda x, t: lossfuse.cross_entropy(x, t),
    "argmax": lambda x, t: x.argmax(-1),
    "softmax": lambda x, t: torch.softmax(x, -1),
    "detach": lambda x, t: x.detach().clone(),
    "data": lambda x, t: x.data,
    "T": lambda x, t: x.T,
    "index": lambda x, t: x[0],
    "view": lambda x, t: x.view(-1),
    "item": lambda x, t: x.sum().item(),
    "numpy": lambda x, t: x.numpy(),
    "tolist": lambda x, t: x.tolist(),
    "in place": lambda x, t: x.zero_(),
    "out": lambda x, t: torch.neg(torch.ones(N, V), out=x),
    "no grad": lambda x, t: torch.no_grad()(lambda: x + 1)(),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_use_of_consumed_logits_raises(fast_place, reader):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    _, logits = produced(x)
    call(logits, target, fast_place)
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        reader(logits, target)


def test_consumed_logits_still_know_their_shape(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    loss = call(logits, target, fast_place)
    assert isinstance(logits, Consumed) and isinstance(logits, torch.Tensor)
    assert (
        logits.shape == (N, V)
        and logits.dtype == torch.float32
        and logits.device == leaf.device
        and len(logits) == N
    )
    assert (
        logits.requires_grad
        and not logits.is_leaf
        and logits.grad_fn is not None
        and logits.numel() == N * V
    )
    assert ERR_LOGITS_CONSUMED in repr(logits) and ERR_LOGITS_CONSUMED in f"{logits}"
    seen = []
    logits.register_hook(seen.append)
    loss.backward()
    assert len(seen) == 1 and torch.equal(seen[0], leaf.grad)


def test_before_the_loss_everything_is_as_ever(fast_place):
    """Uses before the loss whose backward does not need the logits are right: their gradients are
    added."""
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    before = logits.sum() * 0.5
    guess = logits.argmax(-1)
    (call(logits, target, fast_place) + before).backward()
    _, want = truth(x, target)
    torch.testing.assert_close(leaf.grad.double(), want + 0.5, rtol=1e-5, atol=1e-6)
    assert torch.equal(guess, x.argmax(-1))


def test_until_the_backward_of_none_the_logits_are_whole(fast_place):
    """What is written in the backward may be read, and saved, before it; what was saved counts if
    its backward comes first."""
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    losses = call(logits, target, fast_place, "none")
    guess, saver = logits.argmax(-1), (logits * logits).sum()
    (losses.sum() + saver).backward()
    assert torch.equal(guess, x.argmax(-1))
    want = truth(x, target, reduction="sum")[1] + 2 * x.detach().double()
    torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        logits.argmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_that_arrives_is_not_written(fast_place, reduction, dtype):
    """A peer scales by it in its own memory."""
    x, target = logits_and_ids(N, V, dtype, fast_place.device)
    _, logits = produced(x)
    loss = call(logits, target, fast_place, reduction)
    dloss = torch.full_like(loss, 2.0)
    version = dloss._version
    torch.autograd.grad(loss, logits, dloss)
    assert (dloss == 2.0).all() and dloss._version == version


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_raises(fast_place, reduction, factor):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    loss = call(logits, target, fast_place, reduction).sum() * factor
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        loss.backward()
    assert torch.equal(leaf.grad, first)
    torch.testing.assert_close(
        first.double(),
        factor * truth(x, target, reduction="sum" if reduction == "none" else "mean")[1],
        rtol=1e-5,
        atol=1e-8,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_double_backward_raises_before_anything_is_returned(fast_place, reduction):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    loss = call(logits, target, fast_place, reduction).sum()
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        torch.autograd.grad(loss, leaf, create_graph=True)
    if reduction == "none":
        # nothing was written by the attempt
        assert torch.equal(logits, x.detach())


def test_a_batch_of_factors_raises(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    loss = call(logits, target, fast_place)
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        torch.autograd.grad(loss, leaf, torch.ones(3, device=x.device), is_grads_batched=True)


def test_bad_input_is_refused_before_anything_is_written(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    _, logits = produced(x)
    target[2] = V
    if fast_place.device == "cpu":
        with pytest.raises(IndexError, match="target"):
            call(logits, target, fast_place)
        assert torch.equal(logits, x.detach())
    with pytest.raises(ValueError, match="label_smoothing"):
        call(logits, target, fast_place, label_smoothing=2.0)
    assert torch.equal(logits, x.detach())


def test_a_gradient_for_the_probabilities_alone_leaves_the_logits(fast_place):
    x, _ = logits_and_ids(N, V, torch.float32, fast_place.device)
    q = probabilities(N, V, torch.float32, fast_place.device).detach().requires_grad_()
    logits = x.detach().clone()
    call(logits, q, fast_place).backward()
    assert torch.equal(logits, x.detach()) and q.grad.abs().sum() > 0


def test_inplace_is_off_unless_asked_for(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    _, logits = produced(x)
    version = logits._version
    lossfuse.cross_entropy(logits, target, impl=fast_place.impl).backward()
    assert (
        torch.equal(logits, x.detach())
        and logits._version == version
        and type(logits) is torch.Tensor
    )


def aliases(x):
    """Logits whose memory somebody else can read afterwards, by name."""
    x = x.detach()
    linear = torch.nn.Linear(4, V, device=x.device)
    held = produced(x)[1]
    sliced = produced(torch.cat([x, x]))[1]
    # as F.linear of three dimensions is, in many releases of torch
    biased = linear(torch.randn(6, 4, device=x.device)).view(2, 3, V)
    square = produced(x[:, :N])[1]
    return {
        "a detached alias": (held, held.detach()),
        "a slice of a longer tensor": (sliced[:N], sliced),
        "a layer's own view": (biased.view(-1, V), biased),
        "a transpose": (square, square.t()),
    }


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "name", ["a detached alias", "a slice of a longer tensor", "a layer's own view", "a transpose"]
)
def test_memory_that_others_see_is_not_written(fast_place, name, reduction):
    """Peers write it and the others read gradients for logits."""
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    logits, other = aliases(x)[name]
    target = target % logits.shape[1] * (target >= 0) + target * (target < 0)
    before = other.detach().clone()
    want_loss, want = truth(logits, target, reduction="mean" if reduction == "mean" else "sum")
    # the interpreter warns of the unused sides of its selections
    with pytest.warns(UserWarning, match="inplace=True has no effect: "), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        loss = call(logits, target, fast_place, reduction).sum()
    (got,) = torch.autograd.grad(loss, logits)
    assert torch.equal(other.detach(), before) and type(logits) is torch.Tensor
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-8)


def test_an_alias_made_before_the_backward_is_not_written(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    loss = call(logits, target, fast_place, "none").sum()
    alias = logits.detach()
    loss.backward()
    assert torch.equal(alias, x.detach()) and type(logits) is torch.Tensor
    torch.testing.assert_close(
        leaf.grad.double(), truth(x, target, reduction="sum")[1], rtol=1e-5, atol=1e-8
    )


PARTS = {
    "split": lambda x: x.split([2, 4]),
    "chunk": lambda x: x.chunk(2),
    "unbind": lambda x: x.view(2, 3, V).unbind(0),
    "unflatten": lambda x: tuple(x.unflatten(0, (2, 3))),
    "tensor_split": lambda x: x.tensor_split(2),
    # views that autograd does not know for such
    "unsafe_split": lambda x: x.unsafe_split(3),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_one_tensor_leave_each_other_alone(fast_place, name, reduction):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    parts = PARTS[name](logits)
    del logits
    targets = target.split([len(part) for part in parts])
    with pytest.warns(UserWarning, match="inplace=True has no effect: "), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        # sums: a part may have no valid target
        losses = [
            call(part, t, fast_place, "none" if reduction == "none" else "sum").sum()
            for part, t in zip(parts, targets, strict=True)
        ]
    assert torch.equal(torch.cat([part.detach() for part in parts]), x.detach())
    sum(losses).backward()
    assert torch.equal(torch.cat([part.detach() for part in parts]), x.detach())
    torch.testing.assert_close(
        leaf.grad.double(), truth(x, target, reduction="sum")[1], rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "only",
    [lambda x: x.chunk(1), lambda x: x.split(N), lambda x: x[None].unbind(0)],
    ids=["chunk", "split", "unbind"],
)
def test_the_only_part_is_the_whole(fast_place, only, reduction):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x)
    (part,) = only(logits)
    call(part, target, fast_place, reduction).sum().backward()
    for t in (part, logits):
        with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
            t.argmax(-1)
    want = truth(x, target, reduction="mean" if reduction == "mean" else "sum")[1]
    torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("argument", ["target", "normalizer"])
def test_arguments_in_the_memory_of_the_logits(argument):
    x = torch.rand(N, V)
    logits = x.clone().requires_grad_() * 1.0
    q = logits.detach() if argument == "target" else torch.arange(N)
    options = {"normalizer": logits[0, 0].detach()} if argument == "normalizer" else {}
    with pytest.warns(UserWarning, match="has no effect"):
        loss = lossfuse.cross_entropy(logits, q, inplace=True, **options)
    want = (
        F.cross_entropy(x, x)
        if argument == "target"
        else F.cross_entropy(x, q, reduction="sum") / x[0, 0]
    )
    torch.testing.assert_close(loss, want)


# of the interpreter, whose module is lost on the way through pytest.warns
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_logits_that_are_their_own_probabilities(fast_place, reduction):
    """One tensor in two arguments is one reader of its memory, which must not be written while it
    is the target."""
    x = torch.rand(N, V, device=fast_place.device)
    leaf, logits = produced(x)
    with pytest.warns(UserWarning, match="target lies in the memory of input"):
        loss = call(logits, logits, fast_place, reduction)
    loss.sum().backward()
    x64 = x.double().requires_grad_()
    want = F.cross_entropy(x64, x64, reduction=reduction)
    want.sum().backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), x64.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_negative_view_is_not_written(fast_place):
    """Its memory holds the numbers with another sign, as that of the imaginary part of a conjugate
    does."""
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf = x.detach().clone().requires_grad_()
    with pytest.warns(UserWarning, match="input is a negative view"):
        loss = call(torch._neg_view(leaf * -1.0), target, fast_place)
    loss.backward()
    assert_gradient_close(leaf.grad, truth(x, target)[1])


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_traced_call_is_right_and_whole(reduction):
    """TorchScript's tracer keeps the operator that writes, and differentiates the graph without
    what it has written."""
    (x, target), (other, ids) = (logits_and_ids(N, V, seed=seed) for seed in (0, 1))

    def step(x, target):
        return lossfuse.cross_entropy(
            x * 1.0, target, reduction=reduction, inplace=True, impl="torch"
        ).sum()

    traced = torch.jit.trace(step, (x.detach().requires_grad_(), target), check_trace=False)
    leaf = other.detach().requires_grad_()
    traced(leaf, ids).backward()
    assert_gradient_close(
        leaf.grad, truth(other, ids, reduction="mean" if reduction == "mean" else "sum")[1]
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "view", [lambda t: t.view(-1, V), lambda t: t.view(-1, V)[:]], ids=["view", "view of a view"]
)
def test_a_whole_view_takes_its_base_with_it(fast_place, view, reduction):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf, logits = produced(x.detach().view(2, 3, V))
    call(view(logits), target, fast_place, reduction).sum().backward()
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        logits.argmax(-1)
    torch.testing.assert_close(
        leaf.grad.view(N, V).double(),
        truth(x, target, reduction="mean" if reduction == "mean" else "sum")[1],
        rtol=1e-5,
        atol=1e-8,
    )


def test_a_transpose_handed_over_is_marked_in_the_backward(fast_place):
    """(B, T, V) to (B, V, T) is a temporary view; the tensor the caller has is its base."""
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    _, logits = produced(x.detach().view(2, 3, V))
    call(logits.transpose(1, 2), target.view(2, 3), fast_place, "none").sum().backward()
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        logits.argmax(-1)


def test_a_consumed_view_keeps_its_place_in_the_graph(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    _, logits = produced(x.detach().view(2, 3, V))
    view = logits.view(-1, V)
    node = view.grad_fn
    loss = call(view, target, fast_place)
    assert view.grad_fn is node
    with pytest.raises(RuntimeError, match="on a view, register_hook before the loss"):
        view.register_hook(print)
    (got,) = torch.autograd.grad(loss, view)
    torch.testing.assert_close(got.double(), truth(x, target)[1], rtol=1e-5, atol=1e-8)


def test_outputs_may_be_passed_around_and_detached(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    _, logits = produced(x)
    call(logits, target, fast_place)
    kept = logits.detach()
    assert isinstance(kept, Consumed) and kept.shape == (N, V) and dir(logits)
    logits.grad = None
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        kept.argmax()


def test_a_write_that_stops_half_way_is_told(fast_place, monkeypatch):
    """The usual answer to out of memory is to try again, on logits that are half a gradient."""
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    _, logits = produced(x)
    saver = (logits * logits).sum()

    def full(logits, *_):
        logits[0] = 7.0
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(
            lossfuse.ops.library,
            "backend",
            lambda impl, cut: types.SimpleNamespace(row_loss_and_grads=full),
        )
        call(logits, target, fast_place)
    with pytest.raises(RuntimeError, match=ERR_LOGITS_CONSUMED):
        lossfuse.cross_entropy(logits, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saver.backward()


LAYOUTS = {
    "(N, C, d)": lambda x: x.view(2, 3, V).transpose(1, 2).contiguous(),
    "(N, C, d) of a transpose": lambda x: x.view(2, 3, V).clone().transpose(1, 2),
    "transposed": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: (
        torch.full((N, 2 * V), 7.0).to(x).as_strided((N, V), (2 * V, 1)).copy_(x)
    ),
    "an odd offset": lambda x: (
        torch.full((N * V + 9,), 7.0).to(x).as_strided((N, V), (V, 1), 1).copy_(x)
    ),
}


class Hand(torch.autograd.Function):
    """A tensor of any layout as a layer hands it over; what arrives is kept, and the memory around
    it."""

    @staticmethod
    def forward(ctx, anchor, make, arrived):
        ctx.arrived = arrived
        # a view of nothing that anybody knows
        return make().detach()

    @staticmethod
    def backward(ctx, grad):
        whole = grad.as_strided((grad.untyped_storage().nbytes() // grad.element_size(),), (1,), 0)
        ctx.arrived += [grad.clone(), whole.clone()]
        return None, None, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_is_right_and_its_neighbours_untouched(fast_place, name, reduction, dtype):
    x, target = logits_and_ids(N, V, dtype, fast_place.device)
    x = x.detach()
    held = LAYOUTS[name](x)
    target = target.view(2, 3) if held.dim() == 3 else target
    want = truth(held, target, reduction="mean" if reduction == "mean" else "sum")[1]
    arrived = []
    logits = Hand.apply(
        torch.zeros((), device=x.device, requires_grad=True), lambda: LAYOUTS[name](x), arrived
    )
    call(logits, target, fast_place, reduction).sum().backward()
    assert isinstance(logits, Consumed) == (name != "(N, C, d)")
    got, whole = arrived
    assert_gradient_close(got, want)
    if whole.numel() > got.numel():
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside.as_strided(held.shape, held.stride(), held.storage_offset()).fill_(True)
        assert (whole[~inside] == 7.0).all()


def test_checkpointing_and_saved_tensor_hooks(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    want = truth(x, target)[1]

    want = want + 0.2 * x.detach().double()

    def head(leaf):
        logits = leaf * 1.0
        # hooked saved tensors are not checked for their version
        return call(logits, target, fast_place) + 0.1 * (logits * logits).sum()

    for run in (
        lambda leaf: torch.utils.checkpoint.checkpoint(head, leaf, use_reentrant=False).backward(),
        lambda leaf: _with_hooks(head, leaf),
    ):
        leaf = x.detach().clone().requires_grad_()
        run(leaf)
        torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-8)


def test_reentrant_checkpointing(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    leaf = x.detach().clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(
        lambda leaf: call(leaf * 1.0, target, fast_place), leaf, use_reentrant=True
    ).backward()
    torch.testing.assert_close(leaf.grad.double(), truth(x, target)[1], rtol=1e-5, atol=1e-8)


def _with_hooks(head, leaf):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = head(leaf)
    loss.backward()


def test_a_divisor_that_requires_grad_gets_one(fast_place):
    x, target = logits_and_ids(N, V, torch.float32, fast_place.device)
    divisor = torch.tensor(3.0, device=x.device, requires_grad=True)
    leaf, logits = produced(x)
    call(logits, target, fast_place, normalizer=divisor).backward()
    loss64, want = truth(x, target, reduction="sum")
    torch.testing.assert_close(leaf.grad.double(), want / 3, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(divisor.grad.double(), -loss64 / 9, rtol=1e-5, atol=1e-8)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(torch.stack([x, x]))[1],
    "grad of vmap": lambda f, x: (
        torch.func.grad(lambda t: torch.vmap(f)(torch.stack([t, t])).sum())(x) / 2
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_under_a_transform_nothing_is_written(name):
    x, target = logits_and_ids(N, V)
    held = x.detach().clone()
    got = TRANSFORMS[name](lambda t: lossfuse.cross_entropy(t * 1.0, target, inplace=True), held)
    torch.testing.assert_close(got.double(), truth(x, target)[1], rtol=1e-5, atol=1e-8)
    assert torch.equal(held, x.detach())


@pytest.mark.parametrize("backend", COMPILERS)
def test_a_compiled_call_is_right_and_whole(backend):
    x, target = logits_and_ids(N, V)
    torch.compiler.reset()

    def step(leaf):
        return lossfuse.cross_entropy(leaf * 1.0, target, inplace=True)

    leaf = x.detach().clone().requires_grad_()
    torch.compile(step, fullgraph=True, backend=backend)(leaf).backward()
    torch.testing.assert_close(leaf.grad.double(), truth(x, target)[1], rtol=1e-5, atol=1e-8)


# what a compiled model may return: made of (2, 3, V) logits, and what becomes of it ("consumed",
# "shared" with a warning, or "copied")
RETURNED = {
    "a view": (lambda y: y.view(-1, V), "consumed"),
    "a transpose": (lambda y: y.transpose(1, 2), "consumed"),
    "all but the last position": (lambda y: y[..., :-1, :].transpose(1, 2), "copied"),
    # a part of memory whose rest nobody has
    "rows but the last": (lambda y: y.view(-1, V)[:-1], "consumed"),
    "one of two views": (lambda y: (y.view(-1, V), y[..., :-1, :]), "shared"),
    "a view beside what was seen": (lambda y: (y.view(-1, V), y.detach()), "shared"),
    "a part": (lambda y: y.unbind(0), "shared"),
    "a view of what a backward needs": (lambda y: y.exp().view(-1, V), "shared"),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", RETURNED)
def test_what_a_compiled_model_returns(fast_place, name, reduction):
    """Compilers make a view again outside of their graph, from memory that they return, keep or
    hand to others as well."""
    torch.compiler.reset()
    make, becomes = RETURNED[name]
    x, _ = logits_and_ids(N, V, torch.float32, fast_place.device)

    def model(leaf):
        return make(leaf.view(2, 3, V) * 0.5)

    def outputs(model, leaf):
        made = model(leaf)
        return made if isinstance(made, tuple) else (made,)

    leaf = x.detach().clone().requires_grad_()
    logits, *others = outputs(torch.compile(model, backend="aot_eager", fullgraph=True), leaf)
    target = torch.arange(logits.numel() // V, device=x.device).view(
        logits.shape[:1] + logits.shape[2:]
    )
    target.view(-1)[0] = -100
    kept = others if becomes == "consumed" else [logits, *others]
    before = [t.detach().clone() for t in kept]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = call(logits, target, fast_place, reduction).sum()
    loss.backward()
    assert any("has no effect" in str(w.message) for w in caught) == (becomes == "shared")
    assert isinstance(logits, Consumed) == (becomes == "consumed")
    assert all(torch.equal(t.detach(), values) for t, values in zip(kept, before, strict=True))
    # torch's mean of losses of K dimensions is not deterministic on CUDA, and raises
    leaf64 = x.detach().double().cpu().requires_grad_()
    want_loss = F.cross_entropy(outputs(model, leaf64)[0], target.cpu(), reduction=reduction).sum()
    want_loss.backward()
    torch.testing.assert_close(loss.double().cpu(), want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double().cpu(), leaf64.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_second_tensor_of_the_logits_size(reduction):
    x, target = logits_and_ids(4096, 4000)
    leaf = x.detach().requires_grad_()
    logits = leaf * 1.0
    size = logits.numel() * 4
    with Largest() as largest:
        loss = lossfuse.cross_entropy(logits, target, reduction=reduction, inplace=True)
        torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert 0 < largest.bytes < size / 6


def test_nothing_is_kept_after_the_backward():
    x, target = logits_and_ids(N, V)
    leaf, logits = produced(x)
    storage = torch.multiprocessing.reductions.StorageWeakRef(logits.untyped_storage())
    loss = lossfuse.cross_entropy(logits, target, inplace=True)
    loss.backward()
    del logits, loss
    gc.collect()
    assert storage.expired() and leaf.grad is not None


def test_the_module_and_its_default():
    x, target = logits_and_ids(N, V)
    _, logits = produced(x)
    lossfuse.CrossEntropyLoss(inplace=True)(logits, target)
    assert isinstance(logits, Consumed)
    _, logits = produced(x)
    lossfuse.CrossEntropyLoss()(logits, target)
    assert type(logits) is torch.Tensor
