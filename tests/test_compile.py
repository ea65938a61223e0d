"""Under compilers and tracers: operators with schemas and shapes, one graph, the numbers of eager,
no more compilations than torch's own losses need."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import lossfuse
import public
from lossfuse import LinearOptions
from lossfuse.ops import head as head_ops
from lossfuse.ops import library, rows
from lossfuse.spec import LossSpec
from options import COMPILERS, row_weights
from rows import class_weight, head_and_ids, logits_and_ids, probabilities

REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
SOFT = pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
BACKENDS = pytest.mark.parametrize("backend", COMPILERS)
OPERATORS = torch.ops.lossfuse
PLAIN, EVERYTHING = LossSpec(), LossSpec(-100, 0.1, 20.0, 0.7, 1e-3)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def row_operators(impl, device, soft, spec):
    """(operator, arguments) of losses of logits."""
    x, target = logits_and_ids(4, 19, device=device)
    target = probabilities(4, 19, device=device) if soft else target
    weight = None if spec is PLAIN else class_weight(19, device)
    options = library.OpArgs.of(spec, impl)
    _, stats = rows.row_loss(x, target, weight, *options)
    stats, dloss = stats.detach(), torch.randn(4, device=device, requires_grad=True)
    yield OPERATORS.row_loss, (x, target, weight, *options)
    yield OPERATORS.row_grads, (x, target, weight, stats, dloss, True, soft, *options)
    z, t, up = x.detach(), target.detach(), dloss.detach()
    half = torch.tensor(0.5, device=device)
    yield OPERATORS.row_total_and_grads, (z, t, weight, half, True, None, True, soft, *options)
    yield OPERATORS.row_total_and_grads_, (z.clone(), t, weight, None, not soft, up, soft, *options)
    if impl == "triton" and not soft:
        yield OPERATORS.mean_over_valid, (up, t, spec.ignore_index)
    yield OPERATORS.row_grads_, (z.clone(), t, weight, stats, up, soft, *options)
    yield OPERATORS.multiply_, (z.clone(), torch.tensor(0.5, device=device), impl)


def head_operators(impl, device, soft, spec):
    hidden, weight, bias, target = head_and_ids(4, 5, 19, device=device)
    target = probabilities(4, 19, device=device) if soft else target
    retain = spec is not PLAIN
    b, classes = (bias, class_weight(19, device)) if retain else (None, None)
    chunks = LinearOptions(chunk_bytes=2 * 32 * 4, allow_retain_graph=retain)
    settings = (*head_ops.ChunkArgs.of(chunks), *library.OpArgs.of(spec, impl))
    operands, needs = (hidden, weight, b, target, classes), (True, True, b is not None, soft)
    plain = tuple(None if t is None else t.detach() for t in operands)
    divisor, up = torch.tensor(3.0, device=device), torch.randn(4, device=device)
    yield head_ops.linear_row_loss, (*operands, None, *settings)
    yield head_ops.linear_total, (*plain, divisor, up, None, *needs, *settings)
    if retain:
        # without it the gradients are returned once, and opcheck asks twice
        yield head_ops.linear_total, (*operands, divisor, None, None, *needs, *settings)
    yield head_ops.linear_grads, (*plain, up, None, None, None, *needs, *settings)


@SOFT
@pytest.mark.parametrize("spec", [PLAIN, EVERYTHING], ids=["plain", "every option"])
@pytest.mark.parametrize("operators", [row_operators, head_operators])
@pytest.mark.not_reference
@pytest.mark.slow_interpreted
def test_operators_pass_opcheck(place, operators, spec, soft):
    for operator, args in operators(place.impl, place.device, soft, spec):
        torch.library.opcheck(getattr(operator, "default", operator), args)


def assert_compiled_is_eager(f, leaves, backend="aot_eager", rtol=1e-5, atol=1e-7):
    """Outputs and gradients of ``f()``, compiled to one graph."""
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    got, want = (
        [o for o in (r if isinstance(r, tuple) else (r,)) if o is not None]
        for r in (compiled(), f())
    )
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    got, want = ([o for o in outputs if o.requires_grad] for outputs in (got, want))
    grads = [
        torch.autograd.grad(o, leaves, [0.3 * torch.ones_like(t) for t in o]) for o in (got, want)
    ]
    torch.testing.assert_close(*grads, rtol=rtol, atol=atol)


ONE_GRAPH = [
    (impl, backend)
    for impl in ("torch", "triton", "reference")
    for backend in ("eager", "aot_eager")
]


@pytest.mark.parametrize("name", public.LOSSES)
@pytest.mark.parametrize(
    ("impl", "backend"),
    [pytest.param(*c, marks=[pytest.mark.slow] * (c[1] == "eager")) for c in ONE_GRAPH],
)
def test_one_graph_with_the_numbers_of_eager(device, impl, backend, name):
    """Some rows are ignored: compiled, other libraries' losses are silently wrong on them."""
    if impl == "triton":
        pytest.importorskip("triton")
    t, (loss, leaves) = public.tensors(device, n=6, d=5, v=19), public.LOSSES[name]
    t.logits, t.hidden = t.logits.detach().requires_grad_(), t.hidden.detach().requires_grad_()
    own = [getattr(t, leaf) for leaf in leaves.split()]
    assert_compiled_is_eager(lambda: loss(t, impl=impl), own, backend)


GIVEN = {
    "options of rows": lambda device: {"softcap": 9.0, "logit_scale": 0.5, "lse_square_scale": 0.1},
    "normalizer, a number": lambda device: {"normalizer": 3.0},
    "normalizer, a tensor": lambda device: {"normalizer": torch.tensor(3.0, device=device)},
    "weight": lambda device: {"weight": class_weight(19, device)},
    "row_weight": lambda device: {"row_weight": row_weights(6, device)},
    "sum": lambda device: {"reduction": "sum"},
}  # fmt: skip
CHUNKS = {
    "": LinearOptions(),
    "retain": LinearOptions(allow_retain_graph=True, drop_ignored=True),
    "wide": LinearOptions(logits_dtype=torch.float32, acc_dtype=torch.float32, drop_ignored=False),
}


@pytest.mark.parametrize("options", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", GIVEN)
def test_every_option_in_one_graph(device, name, options):
    given, (h, w, b, ids) = GIVEN[name](device), head_and_ids(6, 5, 19, device=device)
    if options == LinearOptions():
        x, _ = logits_and_ids(6, 19, device=device)
        assert_compiled_is_eager(lambda: lossfuse.cross_entropy(x * 1.5, ids, **given), [x])
    assert_compiled_is_eager(
        lambda: lossfuse.linear_cross_entropy(h, w, ids, linear_bias=b, options=options, **given),
        [h, w, b],
    )


def test_autocast_and_weights_of_k_dimensions_in_one_graph(device):
    h, w, b, ids = head_and_ids(6, 5, 19, device=device)

    def autocast():
        with torch.autocast(device, torch.bfloat16):
            return lossfuse.linear_cross_entropy(h, w, ids, linear_bias=b)

    assert_compiled_is_eager(autocast, [h, w, b])
    many = torch.randn(7, 3, 5, device=device, requires_grad=True)
    ids = torch.randint(0, 7, (6, 3), device=device)
    assert_compiled_is_eager(lambda: lossfuse.linear_cross_entropy(h, many, ids), [h, many])


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_arguments_in_one_graph():
    x, target = logits_and_ids(4, 19)
    f = lambda: lossfuse.cross_entropy(x, target, size_average=False)  # noqa: E731
    got = torch.compile(f, backend="eager", fullgraph=True)()
    torch.testing.assert_close(got, lossfuse.cross_entropy(x, target, reduction="sum"))


@pytest.mark.parametrize("form", ["logits", "head"])
def test_inductor_on_real_shapes_with_ignored_rows(form, device):
    x, ids = logits_and_ids(16, 1000, torch.bfloat16, device)
    h, w, b, _ = head_and_ids(16, 8, 1000, torch.bfloat16, device)
    if form == "logits":
        assert_compiled_is_eager(lambda: lossfuse.cross_entropy(x, ids), [x], "inductor", 2**-7, 0)
    else:
        f = lambda: lossfuse.linear_cross_entropy(h * 2.0, w, ids, linear_bias=b)  # noqa: E731
        assert_compiled_is_eager(f, [h, w, b], "inductor", 2**-6, 1e-6)


def nodes_of(f, *args):
    """Calls of functions in the graphs of a compiled loss and its backward."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(f, backend=backend, fullgraph=True)(*args).backward()
    assert len(graphs) == 2
    return [n for g in graphs for n in g.graph.nodes if n.op == "call_function"]


def of_logits_size(nodes):
    made = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return [
        n.target.__name__
        for n in made
        if n.meta["val"].shape == (6, 19) and "getitem" not in n.name
    ]


@INPLACE
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_compiled_graph_copies_no_logits(device, impl, reduction, inplace):
    x, target = logits_and_ids(6, 19, device=device)
    given = {"reduction": reduction, "inplace": inplace, "impl": impl}
    nodes = nodes_of(lambda x: lossfuse.cross_entropy(x * 1.5, target, **given).sum(), x)
    # x * 1.5 and its derivative, and nothing else of that size but the gradient
    assert of_logits_size(nodes) == ["mul.Tensor", "mul.Tensor"]


@pytest.mark.parametrize(
    ("reduction", "operators"),
    [
        ("mean", ["linear_total"]),
        ("sum", ["linear_total"]),
        ("none", ["linear_row_loss", "linear_grads"]),
    ],
)
def test_a_compiled_head_is_one_operator_and_no_logits(device, reduction, operators):
    h, w, _, target = head_and_ids(6, 5, 19, device=device)
    f = lambda h, w: lossfuse.linear_cross_entropy(h, w, target, reduction=reduction).sum()  # noqa: E731
    nodes = nodes_of(f, h, w)
    ours = [n.target for n in nodes if getattr(n.target, "namespace", "") == "lossfuse"]
    assert [f.__name__.split(".")[0] for f in ours] == operators and of_logits_size(nodes) == []


# --- how often a loss is compiled


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


@REDUCTIONS
@pytest.mark.parametrize("form", ["logits", "in place", "head"])
@BACKENDS
def test_a_vocabulary_that_changes_compiles_once_more(device, backend, form, reduction):
    row = torch.randn(1, 5, device=device)

    def f(x, target, number):
        if form != "head":
            given = {"reduction": reduction, "inplace": form == "in place"}
            return lossfuse.cross_entropy(x * 1.0, target, **given)
        weight = torch.cat([row, x[:, :5]])
        ids = target.clamp(max=3)
        return lossfuse.linear_cross_entropy(x[:, :5], weight, ids, reduction=reduction)

    assert compiles(f, backend, [(v, None) for v in (19, 50, 33, 1000)], device)[-1] <= 2


# as a schedule changes them, one of them twice
NUMBERS = [(19, number) for number in (0.1, 0.2, 0.3, 0.4, 0.2)]
FLOATS = ("label_smoothing", "softcap", "logit_scale", "lse_square_scale")


@INPLACE
@REDUCTIONS
@BACKENDS
def test_numbers_that_change_compile_no_more_than_in_torch(device, backend, inplace, reduction):
    """A float of an operator is a constant of the graph, in torch's cross entropy as in ours: a
    graph for each value, none for one seen."""

    def ours(x, target, number):
        given = {"reduction": reduction, "inplace": inplace, **dict.fromkeys(FLOATS, number)}
        return lossfuse.cross_entropy(x * 1.0, target, **given)

    def theirs(x, target, number):
        return F.cross_entropy(x * 1.0, target, label_smoothing=number)

    got, most = (compiles(f, backend, NUMBERS, device) for f in (ours, theirs))
    assert all(a <= b for a, b in zip(got, most, strict=True)) and got[-1] == got[-2], got


@INPLACE
@BACKENDS
def test_a_count_of_tokens_that_changes_compiles_once_more(device, backend, inplace):
    """A number, with every batch; as a tensor it never compiles again."""

    def f(x, target, normalizer):
        return lossfuse.cross_entropy(x * 1.0, target, normalizer=normalizer, inplace=inplace)

    tensor = lambda n: torch.tensor(float(n), device=device)  # noqa: E731
    for number, want in ((int, 2), (float, 2), (tensor, 1)):
        counts = compiles(f, backend, [(19, number(n)) for n in (3, 5, 7, 11)], device)
        assert counts == [1, want, want, want]


def test_a_batch_that_grows_and_numbers_that_change(device):
    def of_logits(x, h, w, target, normalizer, smoothing):
        return lossfuse.cross_entropy(x, target, label_smoothing=smoothing, normalizer=normalizer)

    def of_head(x, h, w, target, normalizer, smoothing):
        return lossfuse.linear_cross_entropy(h, w, target, normalizer=normalizer)

    for f, backend in ((of_logits, "eager"), (of_head, "aot_eager")):
        compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=True)
        for n, smoothing in ((4, 0.1), (6, 0.2), (9, 0.3)):
            x, target = logits_and_ids(n, 19, device=device)
            h, w, _, _ = head_and_ids(n, 5, 19, device=device)
            leaves = [x] if f is of_logits else [h, w]
            got, want = (g(x, h, w, target, n, smoothing) for g in (compiled, f))
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(*(torch.autograd.grad(o, leaves) for o in (got, want)))


# --- refusals and autograd of compiled losses


BAD = [
    {"softcap": -1.0},
    {"label_smoothing": 2.0},
    {"normalizer": -3},
    {"lse_square_scale": float("inf")},
]


@pytest.mark.parametrize("bad", [*BAD, {"options": LinearOptions(main_grad=True)}], ids=str)
def test_bad_arguments_are_refused_while_tracing(bad):
    hidden, weight, _, target = head_and_ids(6, 5, 19)
    weight.main_grad = torch.zeros(19, 5)
    said = (
        "which a compiler does not see; call it uncompiled"
        if "options" in bad
        else f"{next(iter(bad))} is "
    )
    # older Dynamo says no more than where it was
    said += "" if torch.__version__ >= "2.11" or "options" in bad else "|Observed exception"
    calls = [lambda: lossfuse.linear_cross_entropy(hidden, weight, target, **bad)]
    if "options" not in bad:
        calls.append(lambda: lossfuse.cross_entropy(hidden, target.clamp(max=4), **bad))
    for call in calls:
        with pytest.raises(Exception, match=said):
            torch.compile(call, backend="eager", fullgraph=True)()


@pytest.mark.parametrize("form", ["logits", "head"])
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp"])
def test_torch_func_inside_a_compiled_function(transform, form):
    """A transform that is not seen while tracing gives zeros."""
    x, w, target = torch.randn(3, 5), torch.randn(5, 5), torch.tensor([0, 1, -100])

    def ours(x):
        if form == "logits":
            return lossfuse.cross_entropy(x, target)
        return lossfuse.linear_cross_entropy(x, w, target)

    def theirs(x):
        return F.cross_entropy(x if form == "logits" else x @ w.T, target)

    def run(loss, x):
        if transform == "jvp":
            return torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
        return getattr(torch.func, transform)(loss)(x)

    got = torch.compile(lambda x: run(ours, x), backend="eager")(x)
    torch.testing.assert_close(got, run(theirs, x))


@pytest.mark.parametrize("form", ["logits", "head"])
@REDUCTIONS
@BACKENDS
def test_create_graph_through_a_compiled_loss_is_right_or_raises(backend, reduction, form):
    h, w, _, target = head_and_ids(6, 5, 19)

    def ours(h):
        if form == "logits":
            return lossfuse.cross_entropy(h @ w.T, target, reduction=reduction).sum()
        return lossfuse.linear_cross_entropy(h, w, target, reduction=reduction).sum()

    def second(loss):
        (g,) = torch.autograd.grad(loss, h, create_graph=True)
        h.grad = None
        g.pow(2).sum().backward()
        return h.grad

    loss = torch.compile(ours, backend=backend)(h)
    refused = "no second derivative|double backward|does not require grad"
    try:
        got = second(loss)
    except RuntimeError as error:
        assert any(words in str(error) for words in refused.split("|"))
    else:
        assert form == "logits"
        torch.testing.assert_close(
            got, second(F.cross_entropy(h @ w.T, target, reduction=reduction).sum())
        )


@BACKENDS
def test_a_second_backward_of_a_compiled_head_is_right_or_raises(backend):
    h, w, _, target = head_and_ids(6, 5, 19)
    (want,) = torch.autograd.grad(F.cross_entropy(F.linear(h, w), target), h)
    loss = torch.compile(lambda h: lossfuse.linear_cross_entropy(h, w, target), backend=backend)(h)
    (first,) = torch.autograd.grad(loss * 2.0, h, retain_graph=True)
    torch.testing.assert_close(first, want * 2.0)
    try:
        (got,) = torch.autograd.grad(loss * 0.5, h)
    except RuntimeError as error:
        assert "a second backward needs the gradients" in str(error)
    else:
        torch.testing.assert_close(got, want * 0.5)


# --- tensors without values


LAYOUTS = {
    "rows": ((6, 19), lambda t: t * 1.0),
    "a view": ((6, 19), lambda t: t.view(2, 3, 19).mul(1.0).view(6, 19)),
    "(N, C, d)": ((2, 19, 3), lambda t: t * 1.0),
}
OPTIONS = {
    "": dict,
    "weight": lambda: {"weight": torch.empty(19, device="meta")},
    "normalizer, a number": lambda: {"normalizer": 3.0},
    "normalizer on the host": lambda: {"normalizer": torch.tensor(3.0)},
    "normalizer, a tensor": lambda: {"normalizer": torch.empty((), device="meta")},
    "options of rows": lambda: {"label_smoothing": 0.1, "softcap": 9.0, "lse_square_scale": 1e-3},
}  # fmt: skip


def assert_shapes_and_dtypes(loss, leaves, shape, dtype, reduction):
    grads = torch.autograd.grad(loss.sum() * 2.0, leaves)
    assert loss.shape == (shape if reduction == "none" else ())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, dtype) for t in leaves]


@pytest.mark.parametrize("layout", LAYOUTS)
@SOFT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@INPLACE
@pytest.mark.parametrize("mode", ["fake", "meta"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_losses_of_logits_without_values(impl, mode, inplace, dtype, soft, layout):
    """Reading a value raises here, as it does in a graph that is being captured."""
    shape, logits_of = LAYOUTS[layout]
    for reduction in ("none", "mean", "sum"):
        for name, options in OPTIONS.items() if mode == "meta" else [("", dict)]:
            if "normalizer" in name and reduction != "mean":
                continue
            with contextlib.ExitStack() as stack:
                if mode == "fake":
                    stack.enter_context(FakeTensorMode())
                    if inplace and impl == "torch":
                        stack.enter_context(pytest.warns(UserWarning, match="is a FakeTensor"))
                device = "cpu" if mode == "fake" else "meta"
                leaf = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
                rows = shape[:1] + shape[2:]
                kind = {"dtype": dtype if soft else torch.int64, "device": device}
                target = torch.empty(shape if soft else rows, **kind)
                given = {"reduction": reduction, "inplace": inplace, "impl": impl, **options()}
                loss = lossfuse.cross_entropy(logits_of(leaf), target, **given)
                assert_shapes_and_dtypes(loss, [leaf], rows, dtype, reduction)


@SOFT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["fake", "meta"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_losses_of_heads_without_values(impl, mode, dtype, soft):
    device = "cpu" if mode == "fake" else "meta"
    empty = lambda *s, dtype=dtype: torch.empty(s, dtype=dtype, device=device)  # noqa: E731
    cases = [
        (reduction, frozen, given)
        for reduction in ("none", "mean", "sum")
        for frozen in (False, True)
        for given in (
            {"weight": 19},
            {"softcap": 9.0, "label_smoothing": 0.1},
            {"options": LinearOptions(drop_ignored=False)},
        )
    ]
    for reduction, frozen, given in cases:
        with FakeTensorMode() if mode == "fake" else contextlib.nullcontext():
            hidden, weight, bias = (empty(*s).requires_grad_() for s in ((2, 3, 5), (19, 5), (19,)))
            weight.requires_grad_(not frozen)
            target = empty(2, 3, 19) if soft else empty(2, 3, dtype=torch.int64)
            given = {
                k: empty(v, dtype=torch.float32) if k == "weight" else v for k, v in given.items()
            }
            loss = lossfuse.linear_cross_entropy(
                hidden, weight, target, linear_bias=bias, reduction=reduction, impl=impl, **given
            )
            leaves = [t for t in (hidden, weight, bias) if t.requires_grad]
            assert_shapes_and_dtypes(loss, leaves, (2, 3), dtype, reduction)
