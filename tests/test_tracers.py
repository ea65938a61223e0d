"""Losses recorded for another place: torch.jit.trace, with which dashboards draw a model,
torch.export and torch.jit.script."""

import subprocess
import sys
import textwrap

import pytest
import torch
from functorch.compile import aot_function, nop
from torch.fx.experimental.proxy_tensor import make_fx

import lossfuse
from rows import class_weight, head_and_ids, logits_and_ids, probabilities

V, D = 11, 4


def rows(n, seed):
    x, ids = logits_and_ids(n, V, seed=seed)
    return (
        x.detach(),
        ids,
        probabilities(n, V, seed=seed).detach(),
        torch.randn(n, D, generator=torch.Generator().manual_seed(seed)),
    )


_, WEIGHT, BIAS, _ = (t.detach() for t in head_and_ids(2, D, V))
CLASSES = class_weight(V)
OPTIONS = {"label_smoothing": 0.1, "softcap": 3.0, "lse_square_scale": 0.1, "logit_scale": 0.7}


def statistics(function):
    return lambda *args: tuple(function(*args))


def head(function, **options):
    return lambda hidden, target: function(hidden, WEIGHT, target, linear_bias=BIAS, **options)


# loss, and its arguments of (logits, ids, probabilities, hidden states)
CASES = {
    "cross_entropy": (lossfuse.CrossEntropyLoss(), lambda x, y, q, h: (x, y)),
    "cross_entropy, reference": (
        lossfuse.CrossEntropyLoss(impl="reference"),
        lambda x, y, q, h: (x, y),
    ),
    "cross_entropy, every option": (
        lossfuse.CrossEntropyLoss(CLASSES, reduction="sum", **OPTIONS),
        lambda x, y, q, h: (x, y),
    ),
    "cross_entropy, weighted mean": (
        lossfuse.CrossEntropyLoss(CLASSES, inplace=True),
        lambda x, y, q, h: (x, y),
    ),
    "cross_entropy of probabilities": (
        lossfuse.CrossEntropyLoss(label_smoothing=0.1),
        lambda x, y, q, h: (x, q),
    ),
    "cross_entropy of many dimensions": (
        lossfuse.CrossEntropyLoss(reduction="none"),
        lambda x, y, q, h: (torch.stack([x, -x], 2), torch.stack([y, y], 1)),
    ),
    "statistics": (statistics(lossfuse.cross_entropy_stats), lambda x, y, q, h: (x, y)),
    "statistics of probabilities": (
        statistics(lossfuse.cross_entropy_stats),
        lambda x, y, q, h: (x, q),
    ),
    "head": (head(lossfuse.linear_cross_entropy), lambda x, y, q, h: (h, y)),
    "head, reference": (
        head(lossfuse.linear_cross_entropy, impl="reference"),
        lambda x, y, q, h: (h, y),
    ),
    "head of sequences": (
        head(lossfuse.linear_cross_entropy, reduction="none"),
        lambda x, y, q, h: (torch.stack([h, -h]), torch.stack([y, y])),
    ),
    "head of many dimensions": (
        lossfuse.LinearCrossEntropyLoss(D, 3, out_features=(2,)),
        lambda x, y, q, h: (h, torch.stack([y % 3, y % 2], 1)),
    ),
    "statistics of a head": (
        statistics(head(lossfuse.linear_cross_entropy_stats)),
        lambda x, y, q, h: (h, y),
    ),
    "log_softmax": (lossfuse.LogSoftmax(1), lambda x, y, q, h: (x,)),
    "log_softmax, reference": (lossfuse.LogSoftmax(1, impl="reference"), lambda x, y, q, h: (x,)),
    "nll_loss": (lossfuse.NLLLoss(CLASSES), lambda x, y, q, h: (x, y)),
    "binary": (lossfuse.BCELoss(), lambda x, y, q, h: (q, q)),
    "binary of logits": (
        lossfuse.BCEWithLogitsLoss(CLASSES, pos_weight=CLASSES + 1),
        lambda x, y, q, h: (x, q),
    ),
    "binary of ids": (
        lossfuse.BCEWithLogitsLoss(),
        lambda x, y, q, h: (x, torch.stack([y, (y + 3) % V], 1)),
    ),
}
CASE = pytest.mark.parametrize("case", CASES)


class Model(torch.nn.Module):
    """A parameter before the loss."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.factor = loss, torch.nn.Parameter(torch.full((), 0.9))

    def forward(self, first, *others):
        return self.loss(first * self.factor, *others)


def assert_same_for_any_number_of_rows(recorded, model, arguments):
    for n, seed in ((5, 0), (5, 1), (9, 2)):
        args = arguments(*rows(n, seed))
        got, want = (
            [r] if isinstance(r, torch.Tensor) else list(r) for r in (recorded(*args), model(*args))
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        grads = [
            torch.autograd.grad(r[0].sum(), list(m.parameters())[:1])
            for r, m in ((got, recorded), (want, model))
        ]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@CASE
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_trace_consists_of_operators_of_torch(case):
    """And passes the checks of the tracer, which traces again and compares."""
    loss, arguments = CASES[case]
    model = Model(loss)
    traced = torch.jit.trace(model, arguments(*rows(5, 0)))
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    assert "PythonOp" not in str(traced.inlined_graph)
    assert_same_for_any_number_of_rows(traced, model, arguments)


@CASE
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_export_consists_of_operators_of_torch(case, strict):
    loss, arguments = CASES[case]
    model, args = Model(loss), arguments(*rows(5, 0))
    first, *others = (
        {1 if case == "head of sequences" else 0: torch.export.Dim.AUTO} for _ in args
    )
    sizes = (first, tuple(others)) if others else (first,)
    exported = torch.export.export(model, args, dynamic_shapes=sizes, strict=strict)
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert {f.namespace for f in called if isinstance(f, torch._ops.OpOverload)} == {"aten"}
    assert_same_for_any_number_of_rows(exported.module(), model, arguments)


# these capture no tensor: aot_function takes tensors as arguments alone
ALONE = {
    name: CASES[name]
    for name in (
        "cross_entropy",
        "cross_entropy, reference",
        "cross_entropy of probabilities",
        "statistics",
        "log_softmax",
        "binary",
        "binary of ids",
    )
} | {
    "nll_loss": (lossfuse.nll_loss, lambda x, y, q, h: (x, y)),
    "head": (
        lambda h, y: lossfuse.linear_cross_entropy(h, torch.eye(V, D) * 2.0, y),
        lambda x, y, q, h: (h, y),
    ),
}


@pytest.mark.parametrize("case", ALONE)
def test_a_graph_traced_without_values_is_right_for_other_values(case):
    """``make_fx`` and ``aot_function``, forward and backward."""
    loss, arguments = ALONE[case]
    args, others = arguments(*rows(5, 0)), arguments(*rows(5, 1))

    def total(first, *rest):
        result = loss(first, *rest)
        return (result if isinstance(result, torch.Tensor) else result[0]).sum() * 3.0

    def step(first, *rest):
        leaf = first.detach().requires_grad_()
        return torch.autograd.grad(total(leaf, *rest), leaf)[0]

    want = step(*others)
    torch.testing.assert_close(make_fx(step)(*args)(*others), want)
    compiled = aot_function(total, fw_compiler=nop, bw_compiler=nop)
    for first, *rest in (args, others):
        leaf = first.clone().requires_grad_()
        compiled(leaf, *rest).backward()
    torch.testing.assert_close(leaf.grad, want)


def test_an_implementation_by_name_is_exported():
    model, args = Model(lossfuse.CrossEntropyLoss(impl="torch")), rows(5, 0)[:2]
    exported = torch.export.export(model, args, strict=False)
    assert torch.ops.lossfuse.row_loss.default in {node.target for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(*args), model(*args))


RECORD = """
    import sys, warnings
    import torch
    warnings.simplefilter("error", torch.jit.TracerWarning)
    import lossfuse

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.loss = torch.nn.Linear(4, 11), lossfuse.CrossEntropyLoss()

        def forward(self, x, y):
            return self.loss(self.head(x), y)

    torch.manual_seed(0)
    model, args = Model(), (torch.randn(5, 4), torch.tensor([0, 3, -100, 10, 7]))
    torch.jit.trace(model, args).save(sys.argv[1] + "/traced")
    torch.export.save(torch.export.export(model, args, strict=False), sys.argv[1] + "/exported.pt2")
    torch.save((args, model(*args).item()), sys.argv[1] + "/wanted")
"""
LOAD = """
    import sys
    sys.modules["lossfuse"] = None
    import torch
    args, wanted = torch.load(sys.argv[1] + "/wanted")
    exported = torch.export.load(sys.argv[1] + "/exported.pt2").module()
    for loaded in (torch.jit.load(sys.argv[1] + "/traced"), exported):
        assert abs(loaded(*args).item() - wanted) < 1e-6
"""


def test_a_recorded_loss_loads_without_this_package(tmp_path):
    """And no warning of the tracer points into this package."""
    for program in (RECORD, LOAD):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "CrossEntropyLoss",
        "NLLLoss",
        "BCELoss",
        "BCEWithLogitsLoss",
        "LogSoftmax",
        "LinearCrossEntropyLoss",
        "cross_entropy",
    ],
)
def test_torchscript_is_refused_by_a_sentence(name):
    of = getattr(lossfuse, name)
    of = of(D, V) if name == "LinearCrossEntropyLoss" else of() if isinstance(of, type) else of
    for scripted in (of, torch.nn.Sequential(of)) if isinstance(of, torch.nn.Module) else (of,):
        with pytest.raises(
            RuntimeError,
            match=f"torch.jit.script cannot compile {name}, .* use torch.jit.trace or torch.export",
        ):
            torch.jit.script(scripted)
