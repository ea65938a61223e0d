"""``inplace=True``: the gradient takes the place of the logits, autograd knows, and a stale use
raises. Laws that hold for every loss are in test_promises."""

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lossfuse
from allocations import Largest
from closeness import assert_gradient_close
from lossfuse.ops.inplace import Consumed
from options import COMPILERS
from rows import logits_and_ids, probabilities

N, V = 6, 50
GONE = "consumed by a loss of lossfuse"
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "none"])
# the interpreter is numpy: it warns of the unused sides of its selections
pytestmark = [pytest.mark.not_reference, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def given(place, dtype=torch.float32):
    """(values, ids, a leaf, logits as a layer returns them)."""
    x, target = logits_and_ids(N, V, dtype, place.device)
    leaf = x.detach().clone().requires_grad_()
    return x.detach(), target, leaf, leaf * 1.0


def call(logits, target, place, reduction="mean", **options):
    options = {"inplace": True, "impl": place.impl, **options}
    return lossfuse.cross_entropy(logits, target, reduction=reduction, **options)


def truth(x, target, grad_output=None, **options):
    """[loss, gradient] of the reference in float64; of "none", of the sum."""
    x64 = x.detach().double().requires_grad_()
    t64 = target.double() if target.is_floating_point() else target
    loss = lossfuse.cross_entropy(x64, t64, impl="reference", **options)
    loss = loss.sum() if grad_output is None else loss
    (want,) = torch.autograd.grad(loss, x64, None if grad_output is None else grad_output.double())
    return loss.detach(), want


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-8)


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap, scale, z-loss": {"softcap": 3.0, "logit_scale": 0.7, "lse_square_scale": 1e-2},
    "all": {"label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 1.3, "lse_square_scale": 1e-3},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@REDUCTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_is_right_and_lies_in_the_logits(place, dtype, reduction, options, weighted):
    x, target, _, logits = given(place, dtype)
    wide = options | ({"weight": torch.rand(V, device=x.device).double() + 0.5} if weighted else {})
    options = {k: v.float() if k == "weight" else v for k, v in wide.items()}
    ups = torch.rand(N, device=x.device) + 0.3 if reduction == "none" else torch.tensor(2.0)
    ups, address, before = ups.to(x.device), logits.data_ptr(), ups.clone()
    loss64, want = truth(x, target, ups, reduction=reduction, **wide)
    loss = call(logits, target, place, reduction, **options)
    torch.testing.assert_close(loss.double(), loss64, rtol=2e-6, atol=1e-6)
    (got,) = torch.autograd.grad(loss, logits, ups)
    assert got.data_ptr() == address and type(got) is torch.Tensor
    assert torch.equal(ups.cpu(), before.cpu())
    # where a gradient is a difference, of numbers of its row's upstream gradient
    assert_gradient_close(got, want, terms=0.0 if options.keys() <= {"weight"} else 2.0)


@REDUCTION
def test_probabilities_keep_their_memory_and_get_a_gradient(place, reduction):
    x, _, leaf, logits = given(place)
    q = probabilities(N, V, torch.float32, place.device).detach().requires_grad_()
    before = q.detach().clone()
    call(logits, q, place, reduction).sum().backward()
    q64, x64 = q.detach().double().requires_grad_(), x.double().requires_grad_()
    F.cross_entropy(x64, q64, reduction=reduction).sum().backward()
    assert torch.equal(q.detach(), before)
    close(leaf.grad, x64.grad)
    close(q.grad, q64.grad)
    # a gradient for the probabilities alone leaves the logits
    logits = x.clone()
    call(logits, q, place, reduction).sum().backward()
    assert torch.equal(logits, x)


# --- after and before the write


READERS = {
    "another loss": lambda x, t: F.cross_entropy(x, t),
    "the loss again": lambda x, t: lossfuse.cross_entropy(x, t),
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


def test_a_use_of_consumed_logits_raises(place):
    _, target, _, logits = given(place)
    call(logits, target, place)
    for name, read in READERS.items():
        with pytest.raises(RuntimeError, match=GONE):
            read(logits, target)
            raise AssertionError(name)
    kept = logits.detach()
    assert isinstance(kept, Consumed) and kept.shape == (N, V) and dir(logits)
    with pytest.raises(RuntimeError, match=GONE):
        kept.argmax()


def test_consumed_logits_still_have_a_shape_a_graph_and_hooks(place):
    _, target, leaf, logits = given(place)
    loss = call(logits, target, place)
    assert isinstance(logits, Consumed) and isinstance(logits, torch.Tensor)
    assert logits.shape == (N, V) and logits.numel() == N * V and len(logits) == N
    assert logits.dtype == torch.float32 and logits.device == leaf.device
    assert logits.requires_grad and not logits.is_leaf and logits.grad_fn is not None
    assert GONE in repr(logits) and GONE in f"{logits}"
    seen = []
    logits.register_hook(seen.append)
    loss.backward()
    assert len(seen) == 1 and torch.equal(seen[0], leaf.grad)


def test_uses_before_the_loss_are_added(place):
    x, target, leaf, logits = given(place)
    before, guess = logits.sum() * 0.5, logits.argmax(-1)
    (call(logits, target, place) + before).backward()
    torch.testing.assert_close(leaf.grad.double(), truth(x, target)[1] + 0.5, rtol=1e-5, atol=1e-6)
    assert torch.equal(guess, x.argmax(-1))


def test_losses_of_rows_leave_the_logits_until_their_backward(place):
    """They may be read and saved before it; a saved tensor counts if its backward comes first."""
    x, target, leaf, logits = given(place)
    losses = call(logits, target, place, "none")
    guess, saver = logits.argmax(-1), (logits * logits).sum()
    (losses.sum() + saver).backward()
    assert torch.equal(guess, x.argmax(-1))
    want = truth(x, target, reduction="sum")[1] + 2 * x.double()
    torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=GONE):
        logits.argmax(-1)


@REDUCTION
def test_a_double_or_batched_backward_raises_before_anything_is_returned(place, reduction):
    x, target, leaf, logits = given(place)
    loss = call(logits, target, place, reduction).sum()
    with pytest.raises(RuntimeError, match=GONE):
        torch.autograd.grad(loss, leaf, create_graph=True)
    if reduction == "none":
        # nothing was written by the attempt
        assert torch.equal(logits, x)
    else:
        with pytest.raises(RuntimeError, match=GONE):
            torch.autograd.grad(loss, leaf, torch.ones(3, device=x.device), is_grads_batched=True)


def test_a_write_that_stops_half_way_marks_the_logits(place, monkeypatch):
    """The usual answer to out of memory is to try again, on logits that are half a gradient."""
    _, target, _, logits = given(place)
    saver = (logits * logits).sum()

    class Full:
        def __getattr__(self, name):
            def write(logits, *rest):
                logits[0] = 7.0
                raise MemoryError

            return write

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(lossfuse.ops.library, "backend", lambda impl, cut: Full())
        call(logits, target, place)
    with pytest.raises(RuntimeError, match=GONE):
        lossfuse.cross_entropy(logits, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saver.backward()


def test_inplace_is_off_by_default(place):
    x, target, _, logits = given(place)
    loss = lossfuse.cross_entropy(logits, target, impl=place.impl)
    (loss + lossfuse.CrossEntropyLoss(impl=place.impl)(logits, target)).backward()
    assert torch.equal(logits, x) and logits._version == 0 and type(logits) is torch.Tensor
    lossfuse.CrossEntropyLoss(inplace=True, impl=place.impl)(logits, target)
    assert isinstance(logits, Consumed)


# --- memory that other tensors see


def warned():
    return pytest.warns(UserWarning, match="inplace=True has no effect: ")


def aliases(x):
    """(logits, another tensor of their memory) by name."""
    linear, produced = (
        torch.nn.Linear(4, V, device=x.device),
        lambda t: t.clone().requires_grad_() * 1.0,
    )
    whole, longer, square = produced(x), produced(torch.cat([x, x])), produced(x[:, :N])
    # as F.linear of three dimensions is, in many releases of torch
    biased = linear(torch.randn(6, 4, device=x.device)).view(2, 3, V)
    return {
        "a detached alias": (whole, whole.detach()),
        "a slice of a longer tensor": (longer[:N], longer),
        "a layer's own view": (biased.view(-1, V), biased),
        "a transpose": (square, square.t()),
    }


@REDUCTION
@pytest.mark.parametrize("name", aliases(torch.zeros(N, V)))
def test_memory_that_others_see_is_not_written(place, name, reduction):
    """Other libraries write it, and gradients are read for logits."""
    x, target, _, _ = given(place)
    logits, other = aliases(x)[name]
    target = (target % logits.shape[1]).where(target >= 0, target)
    before = other.detach().clone()
    want_loss, want = truth(logits, target, reduction=reduction)
    with warned():
        loss = call(logits, target, place, reduction).sum()
    (got,) = torch.autograd.grad(loss, logits)
    assert torch.equal(other.detach(), before) and type(logits) is torch.Tensor
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=1e-6)
    close(got, want)


def test_an_alias_made_before_the_backward_is_not_written(place):
    x, target, leaf, logits = given(place)
    loss = call(logits, target, place, "none").sum()
    alias = logits.detach()
    loss.backward()
    assert torch.equal(alias, x) and type(logits) is torch.Tensor
    close(leaf.grad, truth(x, target, reduction="sum")[1])


PARTS = {
    "split": lambda x: x.split([2, 4]),
    "chunk": lambda x: x.chunk(2),
    "unbind": lambda x: x.view(2, 3, V).unbind(0),
    "unflatten": lambda x: tuple(x.unflatten(0, (2, 3))),
    "tensor_split": lambda x: x.tensor_split(2),
    # views that autograd does not know as views
    "unsafe_split": lambda x: x.unsafe_split(3),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2),
}


@REDUCTION
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_one_tensor_leave_each_other_alone(place, name, reduction):
    x, target, leaf, logits = given(place)
    parts = PARTS[name](logits)
    del logits
    # sums: a part may have no valid target
    reduction = "none" if reduction == "none" else "sum"
    pairs = zip(parts, target.split([len(part) for part in parts]), strict=True)
    with warned():
        losses = [call(part, t, place, reduction).sum() for part, t in pairs]
    assert torch.equal(torch.cat([part.detach() for part in parts]), x)
    sum(losses).backward()
    assert torch.equal(torch.cat([part.detach() for part in parts]), x)
    close(leaf.grad, truth(x, target, reduction="sum")[1])


WHOLE = {
    "chunk": lambda x: x.chunk(1)[0],
    "split": lambda x: x.split(N)[0],
    "unbind": lambda x: x[None].unbind(0)[0],
    "view": lambda x: x.view(2, 3, V).view(-1, V),
    "view of a view": lambda x: x.view(-1, V)[:],
}


@REDUCTION
@pytest.mark.parametrize("name", WHOLE)
def test_a_view_of_all_logits_takes_its_base_with_it(place, name, reduction):
    x, target, leaf, logits = given(place)
    view = WHOLE[name](logits)
    call(view, target, place, reduction).sum().backward()
    for t in (view, logits):
        with pytest.raises(RuntimeError, match=GONE):
            t.argmax(-1)
    close(leaf.grad, truth(x, target, reduction=reduction)[1])


def test_a_temporary_transpose_marks_its_base_in_the_backward(place):
    """(B, T, V) to (B, V, T): the tensor that the caller still has is the base."""
    _, target, _, logits = given(place)
    logits = logits.detach().clone().requires_grad_().view(2, 3, V) * 1.0
    call(logits.transpose(1, 2), target.view(2, 3), place, "none").sum().backward()
    with pytest.raises(RuntimeError, match=GONE):
        logits.argmax(-1)


def test_a_consumed_view_keeps_its_place_in_the_graph(place):
    x, target, leaf, _ = given(place)
    view = (leaf.view(2, 3, V) * 1.0).view(-1, V)
    node = view.grad_fn
    loss = call(view, target, place)
    assert view.grad_fn is node
    with pytest.raises(RuntimeError, match="on a view, register_hook before the loss"):
        view.register_hook(print)
    close(torch.autograd.grad(loss, view)[0], truth(x, target)[1])


@pytest.mark.parametrize(
    ("argument", "reduction"),
    [
        ("target", "mean"),
        ("normalizer", "mean"),
        *(("itself", r) for r in ("mean", "sum", "none")),
    ],
)
def test_arguments_in_the_memory_of_the_logits_are_not_written(place, argument, reduction):
    x = torch.rand(N, V, device=place.device)
    leaf = x.clone().requires_grad_()
    logits, q = leaf * 1.0, torch.arange(N, device=x.device)
    q = {"target": logits.detach(), "normalizer": q, "itself": logits}[argument]
    options = {"normalizer": logits[0, 0].detach()} if argument == "normalizer" else {}
    words = "has no effect" if argument != "itself" else "target lies in the memory of input"
    with pytest.warns(UserWarning, match=words):
        loss = call(logits, q, place, reduction, **options)
    loss.sum().backward()
    x64 = x.double().requires_grad_()
    q64 = {"target": x.double(), "normalizer": q, "itself": x64}[argument]
    want = F.cross_entropy(x64, q64, reduction="sum" if options else reduction)
    want = want / x[0, 0].double() if options else want
    want.sum().backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), x64.grad, rtol=1e-4, atol=1e-6)


def test_a_negative_view_is_not_written(place):
    """Its memory holds the negatives, as that of the imaginary part of a conjugate does."""
    x, target, leaf, _ = given(place)
    with pytest.warns(UserWarning, match="input is a negative view"):
        loss = call(torch._neg_view(leaf * -1.0), target, place)
    loss.backward()
    assert_gradient_close(leaf.grad, truth(x, target)[1])


# --- layouts


def strided(x, size, stride, offset=0):
    return torch.full((size,), 7.0).to(x).as_strided((N, V), (stride, 1), offset).copy_(x)


LAYOUTS = {
    "(N, C, d)": lambda x: x.view(2, 3, V).transpose(1, 2).contiguous(),
    "(N, C, d) of a transpose": lambda x: x.view(2, 3, V).clone().transpose(1, 2),
    "transposed": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: strided(x, 2 * N * V, 2 * V),
    "an odd offset": lambda x: strided(x, N * V + 9, V, 1),
}


class Layer(torch.autograd.Function):
    """Returns a tensor of any layout; records its gradient and the memory around that."""

    @staticmethod
    def forward(ctx, anchor, make, arrived):
        ctx.arrived = arrived
        return make().detach()

    @staticmethod
    def backward(ctx, grad):
        whole = grad.as_strided((grad.untyped_storage().nbytes() // grad.element_size(),), (1,), 0)
        ctx.arrived += [grad.clone(), whole.clone()]
        return None, None, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@REDUCTION
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_is_right_and_its_neighbours_untouched(place, name, reduction, dtype):
    x, target, _, _ = given(place, dtype)
    held, arrived = LAYOUTS[name](x), []
    target = target.view(2, 3) if held.dim() == 3 else target
    want = truth(held, target, reduction=reduction)[1]
    anchor = torch.zeros((), device=x.device, requires_grad=True)
    logits = Layer.apply(anchor, lambda: LAYOUTS[name](x), arrived)
    call(logits, target, place, reduction).sum().backward()
    assert isinstance(logits, Consumed) == (name != "(N, C, d)")
    got, whole = arrived
    assert_gradient_close(got, want)
    if whole.numel() > got.numel():
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside.as_strided(held.shape, held.stride(), held.storage_offset()).fill_(True)
        assert (whole[~inside] == 7.0).all()


# --- checkpoints, tracers, compilers, memory


def with_hooks(head, leaf):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return head(leaf)


RUNS = {
    "hooks": with_hooks,
    "checkpoint": lambda head, leaf: checkpoint(head, leaf, use_reentrant=False),
    "reentrant": lambda head, leaf: checkpoint(head, leaf, use_reentrant=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_checkpointing_and_saved_tensor_hooks(place, name):
    """Hooked saved tensors are not checked for their version, so nothing may be written there."""
    (x, target, leaf, _), reentrant = given(place), name == "reentrant"

    def head(leaf):
        logits = leaf * 1.0
        loss = call(logits, target, place)
        return loss if reentrant else loss + 0.1 * (logits * logits).sum()

    RUNS[name](head, leaf).backward()
    want = truth(x, target)[1]
    close(leaf.grad, want if reentrant else want + 0.2 * x.double())


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@REDUCTION
def test_a_traced_call_is_right_and_not_in_place(reduction):
    """TorchScript's tracer keeps the operator that writes, and differentiates the graph without
    the write."""
    (x, target), (other, ids) = (logits_and_ids(N, V, seed=seed) for seed in (0, 1))
    given = {"reduction": reduction, "inplace": True, "impl": "torch"}
    step = lambda x, target: lossfuse.cross_entropy(x * 1.0, target, **given).sum()  # noqa: E731
    traced = torch.jit.trace(step, (x.detach().requires_grad_(), target), check_trace=False)
    leaf = other.detach().requires_grad_()
    traced(leaf, ids).backward()
    assert_gradient_close(leaf.grad, truth(other, ids, reduction=reduction)[1])


@pytest.mark.parametrize("backend", COMPILERS)
def test_a_compiled_call_is_right(backend):
    torch.compiler.reset()
    x, target = logits_and_ids(N, V)
    step = lambda leaf: lossfuse.cross_entropy(leaf * 1.0, target, inplace=True)  # noqa: E731
    torch.compile(step, fullgraph=True, backend=backend)(x).backward()
    close(x.grad, truth(x, target)[1])


# outputs of a compiled model, of (2, 3, V) logits, and the fate of the first: "consumed", "shared"
# with a warning, or "copied"
RETURNED = {
    "a view": (lambda y: y.view(-1, V), "consumed"),
    "a transpose": (lambda y: y.transpose(1, 2), "consumed"),
    "all but the last position": (lambda y: y[..., :-1, :].transpose(1, 2), "copied"),
    # a part of memory whose rest no tensor has
    "rows but the last": (lambda y: y.view(-1, V)[:-1], "consumed"),
    "one of two views": (lambda y: (y.view(-1, V), y[..., :-1, :]), "shared"),
    "a view beside a detached one": (lambda y: (y.view(-1, V), y.detach()), "shared"),
    "a part": (lambda y: y.unbind(0), "shared"),
    "a view that a backward needs": (lambda y: y.exp().view(-1, V), "shared"),
}


@REDUCTION
@pytest.mark.parametrize("name", RETURNED)
def test_outputs_of_a_compiled_model(place, name, reduction):
    """Compilers make a view again outside of their graph, from memory that they return or save as
    well."""
    torch.compiler.reset()
    make, fate = RETURNED[name]
    x, _, leaf, _ = given(place)

    def model(leaf):
        made = make(leaf.view(2, 3, V) * 0.5)
        return made if isinstance(made, tuple) else (made,)

    logits, *others = torch.compile(model, backend="aot_eager", fullgraph=True)(leaf)
    rows = logits.shape[:1] + logits.shape[2:]
    target = torch.arange(rows.numel(), device=x.device).view(rows)
    target.view(-1)[0] = -100
    kept = others if fate == "consumed" else [logits, *others]
    before = [t.detach().clone() for t in kept]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = call(logits, target, place, reduction).sum()
    loss.backward()
    assert any("has no effect" in str(w.message) for w in caught) == (fate == "shared")
    assert isinstance(logits, Consumed) == (fate == "consumed")
    assert all(torch.equal(t.detach(), values) for t, values in zip(kept, before, strict=True))
    # torch's mean of losses of K dimensions is not deterministic on CUDA, and raises
    leaf64 = x.double().cpu().requires_grad_()
    want = F.cross_entropy(model(leaf64)[0], target.cpu(), reduction=reduction).sum()
    want.backward()
    torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-6, atol=1e-6)
    close(leaf.grad.cpu(), leaf64.grad)


@REDUCTION
def test_no_second_tensor_of_the_logits_size(reduction):
    x, target = logits_and_ids(4096, 4000)
    logits = x * 1.0
    with Largest() as largest:
        loss = lossfuse.cross_entropy(logits, target, reduction=reduction, inplace=True)
        torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert 0 < largest.bytes < 4 * x.numel() / 6


def test_no_memory_is_left_after_the_backward():
    x, target = logits_and_ids(N, V)
    logits = x * 1.0
    storage = torch.multiprocessing.reductions.StorageWeakRef(logits.untyped_storage())
    loss = lossfuse.cross_entropy(logits, target, inplace=True)
    loss.backward()
    x.grad = None
    del logits, loss
    gc.collect()
    assert storage.expired()
