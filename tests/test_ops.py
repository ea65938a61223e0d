"""Compilers and tracers: operators with schemas and shapes, one graph, the same numbers."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import lossfuse
from lossfuse.ops import library, rows
from lossfuse.spec import LossSpec
from options import COMPILERS
from rows import class_weight, logits_and_ids, probabilities

IMPLS = ["torch", "triton"]
OPERATORS = torch.ops.lossfuse
EVERYTHING = LossSpec(-100, 0.1, 20.0, 0.7, 1e-3)


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
def test_opcheck(thrifty_fast_place, soft):
    impl, device = thrifty_fast_place.impl, thrifty_fast_place.device
    x, target = logits_and_ids(4, 19, device=device)
    target = probabilities(4, 19, device=device) if soft else target
    for spec, weight in ((LossSpec(), None), (EVERYTHING, class_weight(19, device))):
        options = library.OpArgs.of(spec, impl)
        torch.library.opcheck(OPERATORS.row_loss.default, (x, target, weight, *options))
        _, stats = rows.row_loss(x, target, weight, *options)
        dloss = torch.randn(4, device=device, requires_grad=True)
        torch.library.opcheck(
            OPERATORS.row_grads.default,
            (x, target, weight, stats.detach(), dloss, True, soft, *options),
        )
        logits, target, dloss = x.detach(), target.detach(), dloss.detach()
        torch.library.opcheck(
            OPERATORS.row_loss_and_grads.default,
            (logits, target, weight, dloss, True, soft, *options),
        )
        torch.library.opcheck(
            OPERATORS.row_loss_and_grads_.default,
            (logits.clone(), target, weight, dloss, soft, *options),
        )
        torch.library.opcheck(
            OPERATORS.row_grads_.default,
            (logits.clone(), target, weight, stats.detach(), dloss, soft, *options),
        )
    torch.library.opcheck(
        OPERATORS.multiply_.default, (logits.clone(), torch.tensor(0.5, device=device), impl)
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_one_graph_with_the_numbers_of_eager(device, impl, backend, soft, reduction):
    """A peer's compiled loss is wrong on ignored rows, silently."""
    torch._dynamo.reset()
    x, target = logits_and_ids(6, 19, device=device)
    target = probabilities(6, 19, device=device) if soft else target

    def f(x, target):
        z = x * 1.5
        return (
            lossfuse.cross_entropy(
                z, target, label_smoothing=0.1, softcap=9.0, reduction=reduction, impl=impl
            ).sum()
            * 0.3
        )

    compiled = torch.compile(f, backend=backend, fullgraph=True)
    leaves = [x, target] if soft else [x]
    torch.testing.assert_close(compiled(x, target), f(x, target))
    got, want = (torch.autograd.grad(g(x, target), leaves) for g in (compiled, f))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_compiled_graph_copies_no_logits(device, impl, reduction, inplace):
    torch._dynamo.reset()
    x, target = logits_and_ids(6, 19, device=device)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)

    def f(x):
        return lossfuse.cross_entropy(
            x * 1.5, target, reduction=reduction, inplace=inplace, impl=impl
        ).sum()

    torch.compile(f, backend=backend, fullgraph=True)(x).backward()
    assert len(graphs) == 2
    made = [
        n
        for g in graphs
        for n in g.graph.nodes
        if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    # x * 1.5 and its derivative, and nothing else of that size but the gradient
    assert [
        n.target.__name__
        for n in made
        if n.meta["val"].shape == (6, 19) and "getitem" not in n.name
    ] == ["mul.Tensor", "mul.Tensor"]


def test_inductor_on_real_shapes_with_ignored_rows():
    torch._dynamo.reset()
    x, target = logits_and_ids(16, 1000, torch.bfloat16)
    compiled = torch.compile(lambda x, t: lossfuse.cross_entropy(x, t), fullgraph=True)
    torch.testing.assert_close(compiled(x, target), lossfuse.cross_entropy(x, target))
    got, want = (torch.autograd.grad(f(x, target), x) for f in (compiled, lossfuse.cross_entropy))
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


def test_a_float_option_that_changes_and_a_batch_that_grows():
    torch._dynamo.reset()

    def f(x, target, smoothing, normalizer):
        return lossfuse.cross_entropy(x, target, label_smoothing=smoothing, normalizer=normalizer)

    compiled = torch.compile(f, backend="eager", fullgraph=True, dynamic=True)
    for n, smoothing in ((4, 0.1), (6, 0.2), (9, 0.3)):
        x, target = logits_and_ids(n, 19)
        torch.testing.assert_close(compiled(x, target, smoothing, n), f(x, target, smoothing, n))


def compiles(function, backend, calls, device):
    """How often a function has been compiled after each of its calls, with logits of so many
    classes and a number."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    counts = []
    for v, number in calls:
        compiled(*logits_and_ids(6, v, device=device), number).sum().backward()
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("backend", COMPILERS)
def test_a_vocabulary_that_changes_compiles_once_more(device, backend, inplace, reduction):
    counts = compiles(
        lambda x, target, number: lossfuse.cross_entropy(
            x * 1.0, target, reduction=reduction, inplace=inplace
        ),
        backend,
        [(v, None) for v in (19, 50, 33, 1000)],
        device,
    )
    assert counts == [1, 2, 2, 2]


# what a schedule might do, and a value that has been
NUMBERS = [(19, number) for number in (0.1, 0.2, 0.3, 0.4, 0.2)]
FLOATS = ("label_smoothing", "softcap", "logit_scale", "lse_square_scale")


@pytest.fixture(scope="module")
def compiles_of_torch():
    """How torch treats a float that changes: its label_smoothing is an argument of an operator."""
    return {
        backend: compiles(
            lambda x, target, number: F.cross_entropy(x * 1.0, target, label_smoothing=number),
            backend,
            NUMBERS,
            "cpu",
        )
        for backend in ("eager", "aot_eager")
    }


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("backend", COMPILERS)
def test_numbers_that_change_compile_no_more_than_in_torch(
    device, compiles_of_torch, backend, inplace, reduction
):
    """A float of an operator is a constant of the graph, in torch's cross entropy as in ours: a
    graph for each value, none for one seen."""

    def f(x, target, number):
        return lossfuse.cross_entropy(
            x * 1.0, target, reduction=reduction, inplace=inplace, **dict.fromkeys(FLOATS, number)
        )

    counts = compiles(f, backend, NUMBERS, device)
    assert all(
        ours <= theirs for ours, theirs in zip(counts, compiles_of_torch[backend], strict=True)
    ), counts
    assert counts[-1] == counts[-2]


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("backend", COMPILERS)
def test_a_count_of_tokens_that_changes_compiles_once_more(device, backend, inplace):
    """As it does with every batch; as a tensor it never compiles again."""

    def f(x, target, normalizer):
        return lossfuse.cross_entropy(x * 1.0, target, normalizer=normalizer, inplace=inplace)

    tokens = (3, 5, 7, 11)
    for number in (int, float):
        assert compiles(f, backend, [(19, number(n)) for n in tokens], device) == [1, 2, 2, 2]
    assert compiles(
        f, backend, [(19, torch.tensor(float(n), device=device)) for n in tokens], device
    ) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "bad",
    [
        {"softcap": -1.0},
        {"label_smoothing": 2.0},
        {"normalizer": -3},
        {"lse_square_scale": float("inf")},
    ],
    ids=str,
)
def test_bad_numbers_are_refused_while_tracing(bad):
    torch._dynamo.reset()
    x, target = logits_and_ids(4, 19)
    # older Dynamo says no more than where it was
    said = f"{next(iter(bad))} is " + ("" if torch.__version__ >= "2.11" else "|Observed exception")
    with pytest.raises(Exception, match=said):
        torch.compile(
            lambda x: lossfuse.cross_entropy(x, target, **bad), backend="eager", fullgraph=True
        )(x)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_arguments_in_one_graph():
    torch._dynamo.reset()
    x, target = logits_and_ids(4, 19)
    compiled = torch.compile(
        lambda x, t: lossfuse.cross_entropy(x, t, size_average=False),
        backend="eager",
        fullgraph=True,
    )
    torch.testing.assert_close(
        compiled(x, target), lossfuse.cross_entropy(x, target, reduction="sum")
    )


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp"])
def test_torch_func_inside_a_compiled_function(transform):
    """Zeros without an error, once: the transform must be seen while tracing."""
    torch._dynamo.reset()
    x, target = torch.randn(3, 5), torch.tensor([0, 1, -100])

    def f(loss):
        def run(x):
            g = lambda x: loss(x, target)  # noqa: E731
            if transform == "jvp":
                return torch.func.jvp(g, (x,), (torch.ones_like(x),))[1]
            return getattr(torch.func, transform)(g)(x)

        return run

    torch.testing.assert_close(
        torch.compile(f(lossfuse.cross_entropy), backend="eager")(x), f(F.cross_entropy)(x)
    )


def test_create_graph_through_a_compiled_loss_is_right_or_raises():
    torch._dynamo.reset()
    x, target = logits_and_ids(4, 19)
    for backend in ("eager", "aot_eager"):
        loss = torch.compile(
            lambda x: lossfuse.cross_entropy(x, target, reduction="none").sum(), backend=backend
        )(x)
        try:
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            (got,) = torch.autograd.grad(g.pow(2).sum(), x)
        except RuntimeError as error:
            assert "double backward" in str(error) or "does not require grad" in str(error)
            continue
        (g,) = torch.autograd.grad(
            F.cross_entropy(x, target, reduction="sum"), x, create_graph=True
        )
        torch.testing.assert_close(got, torch.autograd.grad(g.pow(2).sum(), x)[0])


def without_values(device, dtype, soft, layout):
    """A leaf, the logits a layer made of it, and targets; where there are only shapes."""
    leaf = torch.empty(
        (2, 19, 3) if layout == "(N, C, d)" else (6, 19),
        dtype=dtype,
        device=device,
        requires_grad=True,
    )
    logits = leaf.view(2, 3, 19).mul(1.0).view(6, 19) if layout == "a view" else leaf * 1.0
    shape = logits.shape if soft else logits.shape[:1] + logits.shape[2:]
    return leaf, logits, torch.empty(shape, dtype=dtype if soft else torch.int64, device=device)


@pytest.mark.parametrize("layout", ["rows", "a view", "(N, C, d)"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_fake_tensors(impl, inplace, dtype, soft, layout):
    for reduction in ("none", "mean", "sum"):
        with FakeTensorMode(), contextlib.ExitStack() as stack:
            leaf, logits, target = without_values("cpu", dtype, soft, layout)
            if inplace and impl == "torch":
                stack.enter_context(pytest.warns(UserWarning, match="input is a FakeTensor"))
            loss = lossfuse.cross_entropy(
                logits, target, reduction=reduction, inplace=inplace, impl=impl
            )
            (grad,) = torch.autograd.grad(loss.sum() * 2.0, leaf)
            rows = logits.shape[:1] + logits.shape[2:]
            assert loss.shape == (rows if reduction == "none" else ())
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert grad.shape == leaf.shape and grad.dtype == dtype


GIVEN = {
    "": {},
    "weight": {"weight": lambda: torch.empty(19, device="meta")},
    "number": {"normalizer": lambda: 3.0},
    "normalizer of the host": {"normalizer": lambda: torch.tensor(3.0)},
    "normalizer": {"normalizer": lambda: torch.empty((), device="meta")},
    "every option": {
        "label_smoothing": lambda: 0.1,
        "softcap": lambda: 9.0,
        "logit_scale": lambda: 0.5,
        "lse_square_scale": lambda: 1e-3,
    },
}


@pytest.mark.parametrize("layout", ["rows", "a view", "(N, C, d)"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_meta_tensors_have_nothing_to_look_at(impl, inplace, reduction, soft, layout):
    """Nor has a graph that is being captured: whoever asks for a value raises here."""
    for options in GIVEN.values():
        if "normalizer" in options and reduction != "mean":
            continue
        leaf, logits, target = without_values("meta", torch.float32, soft, layout)
        given = {name: make() for name, make in options.items()}
        loss = lossfuse.cross_entropy(
            logits, target, reduction=reduction, inplace=inplace, impl=impl, **given
        )
        (grad,) = torch.autograd.grad(loss.sum() * 2.0, leaf)
        assert (
            loss.device.type == grad.device.type == "meta"
            and grad.shape == leaf.shape
            and loss.dim() == (logits.dim() - 1 if reduction == "none" else 0)
        )


def test_export():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 19)

        def forward(self, x, target):
            return lossfuse.cross_entropy(self.head(x), target)

    head, x, target = Head(), torch.randn(4, 8), torch.tensor([0, 1, -100, 18])
    exported = torch.export.export(head, (x, target))
    torch.testing.assert_close(exported.module()(x, target), head(x, target))
