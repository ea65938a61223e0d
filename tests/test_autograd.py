"""Autograd and autocast, of losses of logits and of heads: once, twice, batched, recomputed; right
or an error."""

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
from rows import class_weight, head_and_ids, logits_and_ids, probabilities

FORM = pytest.mark.parametrize("form", ["logits", "head"])
REDUCTIONS = ["none", "mean", "sum"]
REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
RETAIN = {"options": LinearOptions(allow_retain_graph=True)}
MAIN_GRAD = {"options": LinearOptions(main_grad=True)}


def given(form, device="cpu", dtype=torch.float32):
    """(leaves, ids): logits, or hidden states, a weight and a bias."""
    made = (
        logits_and_ids(6, 11, dtype, device)
        if form == "logits"
        else head_and_ids(6, 5, 11, dtype, device)
    )
    return list(made[:-1]), made[-1]


def ours(leaves, target, **options):
    if len(leaves) == 1:
        return lossfuse.cross_entropy(*leaves, target, **options)
    hidden, weight, bias = leaves
    return lossfuse.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)


def eager(leaves, target, **options):
    logits = leaves[0] if len(leaves) == 1 else F.linear(*leaves)
    return F.cross_entropy(logits, target, **options)


def retaining(form):
    """Options with which a backward can be repeated."""
    return RETAIN if form == "head" else {}


def gradients(loss, leaves, **how):
    return torch.autograd.grad(loss.sum(), leaves, **how)


@pytest.fixture
def head():
    return given("head")


# --- once


@pytest.mark.parametrize("value", [0.0, 2.0, -0.5, 1e-30, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_probabilities_get_the_upstream_gradient_once(place, value, reduction):
    x, _ = logits_and_ids(6, 40, device=place.device)
    leaves = [x, probabilities(6, 40, device=place.device)]
    once, loss = (
        lossfuse.cross_entropy(*leaves, reduction=reduction, impl=place.impl) for _ in range(2)
    )
    got = torch.autograd.grad(loss, leaves, torch.full_like(loss, value))
    want = [g * value for g in torch.autograd.grad(once, leaves)]
    # entries of 1e-8 times 1e-30 are subnormal
    torch.testing.assert_close(list(got), want, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("shape", ["expanded", "strided", "transposed"])
def test_an_upstream_gradient_of_any_stride_in_k_dimensions(place, shape):
    # a move to the device would make it dense
    with torch.device(place.device):
        x, target = torch.randn(3, 7, 4, requires_grad=True), torch.randint(0, 7, (3, 4))
        dloss = {
            "expanded": torch.tensor(0.3).expand(3, 4),
            "strided": torch.randn(6, 8)[::2, ::2],
            "transposed": torch.randn(4, 3).t(),
        }[shape]
    losses = [
        lossfuse.cross_entropy(x, target, reduction="none", impl=place.impl),
        F.cross_entropy(x, target, reduction="none"),
    ]
    torch.testing.assert_close(*(torch.autograd.grad(loss, x, dloss) for loss in losses))


@FORM
def test_gradients_accumulate(place, form):
    leaves, target = given(form, place.device)
    count = float((target != -100).sum())
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        rows = [leaves[0][part], *leaves[1:]]
        ours(rows, target[part], normalizer=count, impl=place.impl).backward()
    want = gradients(eager(leaves, target), leaves)
    torch.testing.assert_close([t.grad for t in leaves], list(want))


@REDUCTION
def test_a_head_between_other_uses_of_its_operands(place, reduction):
    """Hidden states of a layer, used before and after; the weight is the embedding's too."""
    leaves, target = given("head", place.device)
    ids = torch.tensor([1, 3, 10, 0, 3, 7], device=place.device)

    def total(f, **options):
        hidden, weight, bias = leaves
        h = (F.embedding(ids, weight) + hidden) * 2.0
        loss = f([h, weight, bias], target, reduction=reduction, **options).sum()
        return loss * 0.3 + (h.square().sum() + weight.sum()) * 1e-2

    got, want = (gradients(t, leaves) for t in (total(ours, impl=place.impl), total(eager)))
    torch.testing.assert_close(got, want)


def test_two_losses_of_one_weight(head):
    (hidden, weight, bias), target = head

    def total(f):
        other = f([hidden * 0.5, weight, None], target, reduction="sum")
        return f([hidden, weight, bias], target) * 2.0 - other

    torch.testing.assert_close(*(gradients(total(f), head[0]) for f in (ours, eager)))


@FORM
@REDUCTION
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_recomputes_the_loss(place, form, reduction, reentrant):
    leaves, target = given(form, place.device)
    f = lambda *leaves: ours(leaves, target, reduction=reduction, impl=place.impl)  # noqa: E731
    checkpoint(f, *leaves, use_reentrant=reentrant).sum().backward()
    want = gradients(eager(leaves, target, reduction=reduction), leaves)
    torch.testing.assert_close([t.grad for t in leaves], list(want))


@FORM
@REDUCTION
def test_everything_saved_goes_through_saved_tensors_hooks(form, reduction):
    leaves, target = given(form)
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        loss = ours(leaves, target, reduction=reduction)
    want = gradients(eager(leaves, target, reduction=reduction), leaves)
    torch.testing.assert_close(gradients(loss, leaves), want)
    if reduction == "mean":
        # a checkpoint drops the gradient that was computed with the loss
        with hooks(lambda t: t.shape, lambda shape: torch.zeros(shape)):
            loss = ours(leaves, target)
        assert form == "logits" or not any(g.any() for g in gradients(loss, leaves))
        assert not [t for t in held_by(loss.grad_fn) if t.numel() >= leaves[0].numel()]


def held_by(node):
    """Tensors in attributes of a graph's nodes."""
    found = []
    while node is not None:
        for value in getattr(node, "__dict__", {}).values():
            found += [t for t in torch.utils._pytree.tree_leaves(value) if torch.is_tensor(t)]
        node = node.next_functions[0][0] if node.next_functions else None
    return found


def saved_by(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = call()
    return saved, result


@FORM
def test_nothing_is_saved_without_grad(place, form):
    leaves, target = given(form, place.device)
    with torch.no_grad():
        saved, loss = saved_by(lambda: ours(leaves, target, impl=place.impl))
    assert saved == [] and not loss.requires_grad


@FORM
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.not_reference
def test_saved_tensors_are_arguments_gradients_or_a_few_numbers_per_row(place, form, reduction):
    x, ids = logits_and_ids(60, 1000, device=place.device)
    h, w, b, _ = head_and_ids(60, 5, 1000, device=place.device)
    leaves = [x] if form == "logits" else [h, w, b]
    saved, _ = saved_by(lambda: ours(leaves, ids, reduction=reduction, impl=place.impl))
    arguments = {t.data_ptr() for t in (*leaves, ids)}
    most = sum(t.numel() for t in leaves) if reduction == "mean" else 4 * len(x)
    assert sum(t.numel() for t in saved if t.data_ptr() not in arguments) <= most


@FORM
@REDUCTION
@pytest.mark.parametrize("changed", [0, 1])
def test_operands_changed_before_the_backward(form, reduction, changed):
    """Scalar losses do not need them again; "none" does, and torch says so."""
    leaves, target = given(form)
    changed = min(changed, len(leaves) - 1)
    want = gradients(eager(leaves, target, reduction=reduction), leaves)
    loss = ours(leaves, target, reduction=reduction, impl="torch")
    with torch.no_grad():
        leaves[changed].zero_()
    if reduction == "none":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(loss, leaves)
    else:
        torch.testing.assert_close(gradients(loss, leaves), want)


def test_hooks_of_a_weight_run_once(head):
    calls, (leaves, target) = [], head
    leaves[1].register_hook(lambda g: calls.append(g.shape) or g * 2.0)
    leaves[1].register_post_accumulate_grad_hook(lambda w: calls.append("after"))
    ours(leaves, target).backward()
    assert calls == [(11, 5), "after"]
    # the hook doubles this one, too
    torch.testing.assert_close(leaves[1].grad, gradients(eager(leaves, target), leaves[1:2])[0])


@FORM
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@REDUCTION
def test_batched_upstream_gradients(place, form, reduction):
    leaves, target = given(form, place.device)
    got = ours(leaves, target, reduction=reduction, impl=place.impl)
    want = eager(leaves, target, reduction=reduction)
    dlosses = torch.randn(4, *got.shape, device=place.device)
    torch.testing.assert_close(
        *(torch.autograd.grad(t, leaves, dlosses, is_grads_batched=True) for t in (got, want))
    )


# --- twice


@FORM
@REDUCTION
def test_a_backward_can_be_repeated_and_taken_in_parts(place, form, reduction):
    leaves, target = given(form, place.device)
    loss = ours(leaves, target, reduction=reduction, impl=place.impl, **retaining(form))
    want = eager(leaves, target, reduction=reduction)
    first = gradients(loss, leaves, retain_graph=True)
    before = [g.clone() for g in first]
    for factor in (0.3, -2.0, 1.0):
        got, theirs = (gradients(t * factor, leaves, retain_graph=True) for t in (loss, want))
        torch.testing.assert_close(got, theirs)
    parts = [gradients(loss, [t], retain_graph=True)[0] for t in leaves]
    torch.testing.assert_close(parts, list(gradients(want, leaves, retain_graph=True)))
    # gradients that were returned are the caller's
    torch.testing.assert_close(list(first), before, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("retain", [False, True], ids=["", "retain_graph"])
def test_a_second_backward_of_a_head_raises(head, reduction, retain):
    leaves, target = head
    loss = ours(leaves, target, reduction=reduction)
    loss.backward(retain_graph=retain)
    before = [t.grad.clone() for t in leaves]
    words = r"a second backward needs the gradients .*LinearOptions\(allow_retain_graph=True\)"
    with pytest.raises(RuntimeError, match=words):
        loss.backward()
    assert all(torch.equal(t.grad, b) for t, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("batched", [False, True], ids=["", "batched"])
@pytest.mark.parametrize("options", [{}, RETAIN], ids=["", "retain"])
@REDUCTION
@pytest.mark.not_reference
def test_a_second_derivative_of_a_head_raises(place, reduction, options, batched):
    leaves, target = given("head", place.device)
    loss = ours(leaves, target, reduction=reduction, impl=place.impl, **options)
    dloss = torch.ones((2,) * batched + loss.shape, device=loss.device)
    words = r"no second derivative \(create_graph=True\) except with impl='reference'"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(loss, leaves, dloss, create_graph=True, is_grads_batched=batched)


@FORM
@REDUCTION
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck_and_gradgradcheck_in_fp64(impl, form, soft, reduction):
    if form == "logits":
        leaves = [torch.randn(3, 5, dtype=torch.float64)]
    else:
        leaves = [t.detach() for t in head_and_ids(3, 2, 5, torch.float64)[:3]]
    leaves += [torch.softmax(torch.randn(3, 5, dtype=torch.float64), 1)] * soft
    options = {"softcap": 4.0, "logit_scale": 1.5, "lse_square_scale": 0.1, "impl": impl}
    options |= {"label_smoothing": 0.2, "weight": torch.rand(5, dtype=torch.float64)}
    options |= {"reduction": reduction, **retaining(form)}

    def f(*leaves):
        *operands, target = leaves if soft else (*leaves, torch.tensor([1, -100, 4]))
        return ours(operands, target, **options)

    leaves = [t.requires_grad_() for t in leaves]
    assert gradcheck(f, leaves)
    if form == "logits" or impl == "reference":
        assert gradgradcheck(f, leaves)


def test_double_backward_in_half_precision_has_the_dtypes(place):
    (x,), target = given("logits", place.device, torch.bfloat16)
    (g,) = gradients(ours([x], target, impl=place.impl), [x], create_graph=True)
    second = gradients(g.float().pow(2), [x])[0]
    assert g.dtype == second.dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_create_graph_where_target_comes_from_the_logits(place, reduction):
    """Self-entropy with a penalty on its gradient: each path once."""

    def first(f):
        g = torch.Generator().manual_seed(1)
        x = torch.randn(3, 5, generator=g).to(place.device).requires_grad_()
        (slope,) = gradients(f(x, x.softmax(1), reduction=reduction), [x], create_graph=True)
        return slope, *gradients(slope.pow(2), [x])

    got = first(lambda *a, **k: lossfuse.cross_entropy(*a, **k, impl=place.impl))
    torch.testing.assert_close(got, first(F.cross_entropy), rtol=1e-4, atol=1e-6)


def test_hooks_run_once_under_create_graph(place):
    (x,), target = given("logits", place.device)
    z, calls = x * 1, []
    z.register_hook(lambda g: calls.append(1) or g * 2)
    (got,) = gradients(ours([z], target, impl=place.impl), [x], create_graph=True)
    assert calls == [1]
    torch.testing.assert_close(got, 2 * gradients(eager([x], target), [x])[0])


# --- torch.func and forward mode, which "auto" sends to the reference


@FORM
def test_torch_func_of_every_operand(form):
    leaves, target = given(form)
    leaves = [t.detach() for t in leaves]
    tangents = tuple(torch.randn_like(t) for t in leaves)
    for run in (
        lambda f: torch.func.grad(f, argnums=tuple(range(len(leaves))))(*leaves),
        lambda f: torch.func.jvp(f, tuple(leaves), tangents),
        lambda f: torch.func.jacrev(f)(*leaves),
        lambda f: torch.func.jacfwd(f)(*leaves),
        lambda f: torch.func.hessian(f)(*leaves),
    ):
        torch.testing.assert_close(
            *(run(lambda *t, f=f: f(t, target)) for f in (ours, eager)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_and_gradients_per_sample(in_dims):
    x, target = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    args = [a if d == 0 else a[0] for a, d in zip((x, target), in_dims, strict=True)]
    for transform in (lambda f: f, torch.func.grad):
        got, want = (
            torch.func.vmap(transform(f), in_dims=in_dims)(*args)
            for f in (lossfuse.cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(got, want)


def test_gradients_of_a_weight_per_sample(head):
    (hidden, weight, bias), target = [t.detach() for t in head[0]], head[1]

    def of(f):
        one = lambda w, h, t: f([h[None], w, bias], t[None], reduction="sum")  # noqa: E731
        return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(weight, hidden, target)

    torch.testing.assert_close(of(ours), of(eager))


def test_jvp_of_probabilities():
    x, q = torch.randn(3, 5), torch.softmax(torch.randn(3, 5), 1)
    tangents = (torch.randn(3, 5), torch.randn(3, 5))
    got, want = (
        torch.func.jvp(f, (x, q), tangents) for f in (lossfuse.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(got, want)


@FORM
def test_forward_mode(form):
    leaves, target = given(form)
    at = len(leaves) // 2
    tangent, (grad,) = torch.randn_like(leaves[at]), gradients(ours(leaves, target), [leaves[at]])
    with forward_ad.dual_level():
        duals = [t.detach() for t in leaves]
        duals[at] = forward_ad.make_dual(duals[at], tangent)
        got = forward_ad.unpack_dual(ours(duals, target)).tangent
        torch.testing.assert_close(got, (grad * tangent).sum())
        normalizer = forward_ad.make_dual(torch.tensor(4.0), torch.tensor(1.0))
        loss = forward_ad.unpack_dual(ours(leaves, target, normalizer=normalizer))
        torch.testing.assert_close(loss.tangent, -loss.primal / 4)
        row_weight = forward_ad.make_dual(torch.ones(len(target)), torch.ones(len(target)))
        loss = forward_ad.unpack_dual(ours(leaves, target, row_weight=row_weight))
        torch.testing.assert_close(loss.tangent, loss.primal)


@FORM
def test_a_bad_target_under_torch_func_is_nan_not_zero(form):
    """A value cannot be checked there, and a zero gradient would be wrong without a sign."""
    x, w, b = torch.randn(3, 5), torch.randn(5, 5), torch.zeros(5)
    f = lambda x: ours([x] if form == "logits" else [x, w, b], torch.tensor([0, 1, 7]))  # noqa: E731
    grad = torch.func.grad(f)(x)
    assert grad[2].isnan().all() and grad[:2].isfinite().all()


@FORM
def test_a_class_weight_that_requires_grad_gets_one(form):
    """torch raises for class ids; the reference has the derivative."""
    leaves, target = given(form)
    weight = class_weight(11).requires_grad_()
    (got,) = gradients(ours(leaves, target, weight=weight, reduction="sum"), [weight])
    rows = eager(leaves, target, reduction="none").detach()
    torch.testing.assert_close(got, torch.zeros(11).index_add(0, target.clamp(min=0), rows))
    q = probabilities(6, 11)
    got, want = (gradients(f(leaves, q, weight=weight), [weight]) for f in (ours, eager))
    torch.testing.assert_close(got, want)


# --- main_grad, which the package writes by itself


@REDUCTION
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_main_grad_accumulates_without_rounding(reduction, dtype):
    (hidden, weight, bias), target = given("head", dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight.main_grad = torch.full((11, 5), 3.0, dtype=wide)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    want = gradients(eager(exact, target, reduction=reduction) * 0.3, exact)[1]
    for times in (1, 2):
        loss = ours([hidden, weight, bias], target, reduction=reduction, **MAIN_GRAD)
        (loss.sum() * 0.3).backward()
        assert weight.grad is None and hidden.grad is not None and bias.grad is not None
        total = 3.0 + times * want.to(wide)
        torch.testing.assert_close(weight.main_grad, total, rtol=1e-6, atol=1e-6)


def test_main_grad_under_autocast_is_the_parameters(head):
    leaves, target = head
    leaves[1].main_grad = torch.zeros(11, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(leaves, target, **MAIN_GRAD)
    loss.backward()
    assert leaves[1].grad is None
    want = gradients(eager(leaves, target), leaves)[1]
    torch.testing.assert_close(leaves[1].main_grad, want, rtol=0.05, atol=2e-3)


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
def test_a_main_grad_that_does_not_fit_is_refused(head, buffer, words):
    if buffer is not None:
        head[0][1].main_grad = buffer
    with pytest.raises(ValueError, match=words):
        ours(*head, **MAIN_GRAD)


def test_main_grad_is_written_only_for_a_matrix_that_requires_grad(head):
    leaves, target = head
    leaves[1].main_grad = torch.zeros(11, 5)
    with pytest.raises(ValueError, match="main_grad needs another implementation than the refer"):
        ours(leaves, target, impl="reference", **MAIN_GRAD)
    many = torch.randn(11, 2, 5, requires_grad=True)
    many.main_grad, ids = torch.zeros_like(many), torch.zeros(6, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="options.main_grad .* linear_weight has 3 dimensions"):
        lossfuse.linear_cross_entropy(leaves[0], many, ids, **MAIN_GRAD)
    leaves[1].requires_grad_(False)
    ours(leaves, target, **MAIN_GRAD).backward()
    assert not leaves[1].main_grad.any()


# --- autocast


@REDUCTION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_operands_and_leaves_logits_in_float32(place, dtype, reduction):
    leaves, target = given("head", place.device)
    with torch.autocast(place.device, dtype):
        got = ours(leaves, target, reduction=reduction, impl=place.impl)
        grads = gradients(got, leaves)
        theirs = eager(leaves, target, reduction=reduction)
    assert got.dtype == torch.float32
    rounded = [t.detach().to(dtype).double() for t in leaves]
    assert_loss_close(got, eager(rounded, target, reduction=reduction))
    for g, w in zip(grads, gradients(theirs, leaves), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w, rtol=0.05, atol=0.03)


def test_autocast_of_k_dimensions_of_mixed_dtypes_and_of_float64(head):
    (hidden, weight, bias), target = head
    h, w, ids = torch.randn(4, 5), torch.randn(7, 3, 5), torch.randint(0, 7, (4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        got = lossfuse.linear_cross_entropy(h, w, ids)
        ours([hidden.bfloat16(), weight, bias], target).backward()
        exact = ours([t.detach().double() for t in head[0]], target)
    logits = torch.einsum("nd,vkd->nvk", h.bfloat16().double(), w.bfloat16().double())
    assert_loss_close(got, F.cross_entropy(logits, ids))
    assert weight.grad.dtype == torch.float32 and exact.dtype == torch.float64


# --- the module of a head


@pytest.mark.parametrize(
    "given", [{}, {"bias": True}, {"bias": True, "out_features": (2, 3), "weight": True}], ids=str
)
def test_the_module_is_that_of_torch(given):
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    given = given | ({"weight": class_weight(7)} if "weight" in given else {})
    given |= {"label_smoothing": 0.1, "reduction": "sum"}
    modules = []
    for of in (torch.nn, lossfuse):
        torch.manual_seed(5)
        modules.append(of.LinearCrossEntropyLoss(5, 7, **given))
    theirs, module = modules
    torch.testing.assert_close(dict(module.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    other = lossfuse.LinearCrossEntropyLoss(5, 7, **given)
    other.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(other.state_dict())
    hidden, target = torch.randn(4, 5), torch.randint(0, 7, (4, *given.get("out_features", ())))
    torch.testing.assert_close(module(hidden, target), theirs(hidden, target))
    got, want = (gradients(m(hidden, target), list(m.parameters())) for m in (other, theirs))
    torch.testing.assert_close(got, want)


def test_copies_of_the_module_compute_the_same():
    given = {"softcap": 9.0, "lse_square_scale": 1e-3, "logit_scale": 0.5, "impl": "torch"}
    options = LinearOptions(acc_dtype=torch.float32, chunk_bytes=64)
    module = lossfuse.LinearCrossEntropyLoss(
        5, 7, bias=True, ignore_index=None, options=options, **given
    )
    hidden, target = torch.randn(4, 5), torch.tensor([0, -100, 6, 3])
    want, stored = module(hidden, target, normalizer=3.0), io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    saved = torch.load(stored, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved):
        assert torch.equal(other(hidden, target, normalizer=3.0), want)
        assert other.options == module.options
    assert "num_classes=7" in repr(module) and "in_features=5" in repr(module)


def test_the_module_with_a_tied_weight():
    embedding, module = torch.nn.Embedding(7, 5), lossfuse.LinearCrossEntropyLoss(5, 7)
    module.linear.weight = embedding.weight
    ids, target = torch.tensor([1, 2, 3, 3]), torch.tensor([0, -100, 6, 3])
    logits = F.linear(embedding(ids), embedding.weight)
    got = gradients(module(embedding(ids), target), [embedding.weight])
    want = gradients(F.cross_entropy(logits, target), [embedding.weight])
    torch.testing.assert_close(got, want)
