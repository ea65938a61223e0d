"""A head's loss under compilers and tracers: operators with schemas and shapes, one in a graph, the
numbers of eager."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

import lossfuse
from lossfuse import LinearOptions
from lossfuse.ops import head as head_ops
from lossfuse.ops import library
from lossfuse.spec import LossSpec
from options import COMPILERS
from rows import class_weight, head_and_ids, probabilities
from test_ops import compiles

IMPLS = ["torch", "triton"]
REDUCTIONS = ["none", "mean", "sum"]
CHUNKED = LinearOptions(chunk_bytes=2 * 32 * 4)
EVERYTHING = LossSpec(-100, 0.1, 20.0, 0.7, 1e-3)


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
def test_opcheck(thrifty_fast_place, soft):
    impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
    hidden, weight, bias, target = head_and_ids(4, 5, 19, device=device)
    target = probabilities(4, 19, device=device) if soft else target
    cases = [(LossSpec(), None, None, False), (EVERYTHING, bias, class_weight(19, device), True)]
    # an interpreter is slow, and shapes do not depend on it
    for spec, b, classes, keep in cases[(impl, device) == ("triton", "cpu") :]:
        chunks = LinearOptions(chunk_bytes=2 * 32 * 4, allow_retain_graph=keep)
        settings = (*head_ops.ChunkArgs.of(chunks), *library.OpArgs.of(spec, impl))
        head, needs = (hidden, weight, b, target, classes), (True, True, b is not None, soft)
        torch.library.opcheck(head_ops.linear_row_loss, (*head, None, *settings))
        divisor = torch.tensor(3.0, device=device)
        plain = tuple(None if t is None else t.detach() for t in head)
        torch.library.opcheck(head_ops.linear_total, (*plain, divisor, None, *needs, *settings))
        if keep:
            # the others hand their gradients over once
            torch.library.opcheck(head_ops.linear_total, (*head, divisor, None, *needs, *settings))
        torch.library.opcheck(
            head_ops.linear_grads,
            (*plain, torch.randn(4, device=device), None, None, None, *needs, *settings),
        )


def compiled_and_not(f, backend, operands, leaves):
    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*operands), f(*operands))
    got, want = (torch.autograd.grad(g(*operands), leaves) for g in (compiled, f))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize(
    ("impl", "backend"),
    [("torch", "eager"), ("torch", "aot_eager"), ("triton", "aot_eager"), ("reference", "eager")],
)
def test_one_graph_with_the_numbers_of_eager(device, impl, backend, soft, reduction):
    hidden, weight, bias, target = head_and_ids(6, 5, 19, device=device)
    target = probabilities(6, 19, device=device) if soft else target

    def f(hidden, weight, bias, target):
        loss = lossfuse.linear_cross_entropy(
            hidden * 1.5,
            weight,
            target,
            linear_bias=bias,
            label_smoothing=0.1,
            reduction=reduction,
            impl=impl,
            options=CHUNKED,
        )
        return loss.sum() * 0.3

    operands = (hidden, weight, bias, target)
    compiled_and_not(f, backend, operands, operands if soft else operands[:3])


GIVEN = {
    "options of rows": lambda device: {
        "softcap": 9.0,
        "logit_scale": 0.5,
        "lse_square_scale": 1e-3,
    },
    "number": lambda device: {"normalizer": 3.0},
    "normalizer": lambda device: {"normalizer": torch.tensor(3.0, device=device)},
    "weight": lambda device: {"weight": class_weight(19, device), "ignore_index": None},
    "kept": lambda device: {"options": LinearOptions(allow_retain_graph=True, drop_ignored=True)},
    "wide": lambda device: {
        "options": LinearOptions(
            logits_dtype=torch.float32, acc_dtype=torch.float32, drop_ignored=False
        )
    },
}


@pytest.mark.parametrize("name", GIVEN)
def test_options_in_one_graph(device, name):
    given = GIVEN[name](device)
    operands = head_and_ids(6, 5, 19, device=device)
    compiled_and_not(
        lambda h, w, b, t: lossfuse.linear_cross_entropy(h, w, t, linear_bias=b, **given),
        "aot_eager",
        operands,
        operands[:3],
    )


def test_autocast_in_one_graph(device):
    operands = head_and_ids(6, 5, 19, device=device)

    def f(h, w, b, t):
        with torch.autocast(device, torch.bfloat16):
            return lossfuse.linear_cross_entropy(h, w, t, linear_bias=b)

    compiled_and_not(f, "aot_eager", operands, operands[:3])


def test_weights_of_k_dimensions_in_one_graph():
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 3, 5, requires_grad=True)
    target = torch.randint(0, 7, (4, 3))
    compiled_and_not(
        lambda h, w: lossfuse.linear_cross_entropy(h, w, target),
        "aot_eager",
        (hidden, weight),
        (hidden, weight),
    )


def test_inductor(device):
    torch._dynamo.reset()
    hidden, weight, bias, target = head_and_ids(16, 8, 100, torch.bfloat16, device=device)

    def f(hidden):
        return lossfuse.linear_cross_entropy(hidden * 2.0, weight, target, linear_bias=bias)

    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), f(hidden))
    got, want = (torch.autograd.grad(g(hidden), [hidden, weight, bias]) for g in (compiled, f))
    torch.testing.assert_close(got, want, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize(
    ("reduction", "needed"),
    [
        ("mean", ["linear_total"]),
        ("sum", ["linear_total"]),
        ("none", ["linear_row_loss", "linear_grads"]),
    ],
)
def test_operators_in_the_graphs(device, reduction, needed):
    """One for a scalar loss, whose backward multiplies; nothing of the logits' size anywhere."""
    torch._dynamo.reset()
    hidden, weight, _, target = head_and_ids(6, 5, 19, device=device)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def f(hidden, weight):
        return lossfuse.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()

    torch.compile(f, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)(
        hidden, weight
    ).backward()
    nodes = [n for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    assert [
        n.target.__name__.split(".")[0]
        for n in nodes
        if getattr(n.target, "namespace", "") == "lossfuse"
    ] == needed
    assert not [
        n
        for n in nodes
        if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].shape == (6, 19)
    ]


def test_a_batch_that_grows_and_numbers_that_change(device):
    torch._dynamo.reset()

    def f(hidden, weight, target, normalizer):
        return lossfuse.linear_cross_entropy(hidden, weight, target, normalizer=normalizer)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (4, 6, 9):
        hidden, weight, _, target = head_and_ids(n, 5, 19, device=device)
        torch.testing.assert_close(
            compiled(hidden, weight, target, n), f(hidden, weight, target, n)
        )
        got, want = (
            torch.autograd.grad(g(hidden, weight, target, n), [hidden, weight])
            for g in (compiled, f)
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", COMPILERS)
def test_sizes_that_change_compile_once_more(device, backend, reduction):
    weight = torch.randn(1, 5, device=device)

    def f(logits, target, number):
        head = torch.cat([weight, logits[:, :5]])
        return lossfuse.linear_cross_entropy(
            logits[:, :5], head, target.clamp(max=3), reduction=reduction, ignore_index=-100
        )

    assert compiles(f, backend, [(v, None) for v in (19, 50, 33)], device)[-1] <= 2


def test_what_is_refused_while_tracing():
    torch._dynamo.reset()
    hidden, weight, _, target = head_and_ids(6, 5, 19)
    weight.main_grad = torch.zeros(19, 5)
    for options, words in (
        (
            {"options": LinearOptions(main_grad=True)},
            "which a compiler does not see; call it uncompiled",
        ),
        ({"softcap": -1.0}, "softcap is"),
        ({"normalizer": -3}, "normalizer is"),
    ):
        with pytest.raises(Exception, match=words):
            torch.compile(
                lambda h, options=options: lossfuse.linear_cross_entropy(
                    h, weight, target, **options
                ),
                backend="eager",
                fullgraph=True,
            )(hidden)


@pytest.mark.parametrize("backend", COMPILERS)
def test_a_second_backward_of_a_compiled_loss_is_right_or_raises(backend):
    torch._dynamo.reset()
    hidden, weight, _, target = head_and_ids(6, 5, 19)
    (want,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), target), hidden)
    loss = torch.compile(
        lambda h: lossfuse.linear_cross_entropy(h, weight, target), backend=backend
    )(hidden)
    torch.testing.assert_close(
        torch.autograd.grad(loss * 2.0, hidden, retain_graph=True)[0], want * 2.0
    )
    try:
        (got,) = torch.autograd.grad(loss * 0.5, hidden)
    except RuntimeError as error:
        assert "a second backward needs the gradients" in str(error)
    else:
        torch.testing.assert_close(got, want * 0.5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", COMPILERS)
def test_create_graph_through_a_compiled_loss_raises(backend, reduction):
    torch._dynamo.reset()
    hidden, weight, _, target = head_and_ids(6, 5, 19)
    loss = torch.compile(
        lambda h: lossfuse.linear_cross_entropy(h, weight, target, reduction=reduction).sum(),
        backend=backend,
    )(hidden)

    def second():
        (g,) = torch.autograd.grad(loss, hidden, create_graph=True)
        g.pow(2).sum().backward()

    with pytest.raises(
        RuntimeError, match="no second derivative|does not currently support double backward"
    ):
        second()


def without_values(device, dtype, soft, frozen):
    hidden, weight, bias = (
        torch.empty(s, dtype=dtype, device=device, requires_grad=True)
        for s in ((2, 3, 5), (19, 5), (19,))
    )
    weight.requires_grad_(not frozen)
    target = torch.empty(
        (2, 3, 19) if soft else (2, 3), dtype=dtype if soft else torch.int64, device=device
    )
    return hidden, weight, bias, target


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("place", ["fake", "meta"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_without_values(impl, place, dtype, soft):
    """Whoever asks for a value raises here, as in a graph that is being captured."""
    for reduction in REDUCTIONS:
        for frozen in (False, True):
            # a divisor, a number and an option may each be looked at
            for given in (
                {"weight": 19},
                {"softcap": 9.0, "label_smoothing": 0.1},
                {"options": LinearOptions(drop_ignored=False)},
            ):
                with FakeTensorMode() if place == "fake" else contextlib.nullcontext():
                    device = "cpu" if place == "fake" else "meta"
                    hidden, weight, bias, target = without_values(device, dtype, soft, frozen)
                    given = {
                        k: torch.empty(v, device=device) if k == "weight" else v
                        for k, v in given.items()
                    }
                    loss = lossfuse.linear_cross_entropy(
                        hidden,
                        weight,
                        target,
                        linear_bias=bias,
                        reduction=reduction,
                        impl=impl,
                        **given,
                    )
                    leaves = [t for t in (hidden, weight, bias) if t.requires_grad]
                    grads = torch.autograd.grad(loss.sum() * 2.0, leaves)
                assert loss.shape == ((2, 3) if reduction == "none" else ())
                assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert all(
                    g.shape == leaf.shape and g.dtype == dtype
                    for g, leaf in zip(grads, leaves, strict=True)
                )


def test_export():
    module = lossfuse.LinearCrossEntropyLoss(5, 19, bias=True)
    hidden, target = torch.randn(4, 5), torch.tensor([0, 1, -100, 18])
    exported = torch.export.export(module, (hidden, target))
    torch.testing.assert_close(exported.module()(hidden, target), module(hidden, target))


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp"])
def test_torch_func_inside_a_compiled_function(transform):
    torch._dynamo.reset()
    hidden, weight, target = torch.randn(3, 5), torch.randn(7, 5), torch.tensor([0, 1, -100])

    def f(loss):
        def run(hidden):
            g = lambda h: loss(h)  # noqa: E731
            if transform == "jvp":
                return torch.func.jvp(g, (hidden,), (torch.ones_like(hidden),))[1]
            return getattr(torch.func, transform)(g)(hidden)

        return run

    got = torch.compile(
        f(lambda h: lossfuse.linear_cross_entropy(h, weight, target)), backend="eager"
    )(hidden)
    torch.testing.assert_close(
        got, f(lambda h: F.cross_entropy(F.linear(h, weight), target))(hidden)
    )
