"""Losses recorded for another place: torch.jit.trace, with which dashboards draw a model,
torch.export and torch.jit.script."""

import subprocess
import sys
import textwrap

import pytest
import torch

import lossfuse
from rows import class_weight, head_and_ids, logits_and_ids, probabilities

V, D = 11, 4
_, WEIGHT, BIAS, _ = (t.detach() for t in head_and_ids(2, D, V))
CLASSES = class_weight(V)
OPTIONS = {"label_smoothing": 0.1, "softcap": 3.0, "lse_square_scale": 0.1, "logit_scale": 0.7}
REFERENCE = {"impl": "reference"}


def arguments(names, n, seed):
    """Logits x, ids y, probabilities q, hidden states h, and what is made of them."""
    x, y = logits_and_ids(n, V, seed=seed)
    x, q = x.detach(), probabilities(n, V, seed=seed).detach()
    h = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    made = {
        "x": x, "y": y, "q": q, "h": h,
        "xx": torch.stack([x, -x], 2), "yy": torch.stack([y, y], 1),
        "hh": torch.stack([h, -h]), "y2": torch.stack([y, y]),
        "yk": torch.stack([y % 3, y % 2], 1), "labels": torch.stack([y, (y + 3) % V], 1),
    }  # fmt: skip
    return tuple(made[name] for name in names.split())


def statistics(function):
    return lambda *args: tuple(function(*args))


def head(function, **options):
    return lambda hidden, target: function(hidden, WEIGHT, target, linear_bias=BIAS, **options)


ce, linear = lossfuse.CrossEntropyLoss, lossfuse.linear_cross_entropy
# a loss and the names of its arguments
CASES = {
    "cross_entropy": (ce(), "x y"),
    "cross_entropy, reference": (ce(**REFERENCE), "x y"),
    "cross_entropy, every option": (ce(CLASSES, reduction="sum", **OPTIONS), "x y"),
    "cross_entropy, weighted mean": (ce(CLASSES, inplace=True), "x y"),
    "cross_entropy of probabilities": (ce(label_smoothing=0.1), "x q"),
    "cross_entropy of many dimensions": (ce(reduction="none"), "xx yy"),
    "statistics": (statistics(lossfuse.cross_entropy_stats), "x y"),
    "statistics of probabilities": (statistics(lossfuse.cross_entropy_stats), "x q"),
    "head": (head(linear), "h y"),
    "head, reference": (head(linear, **REFERENCE), "h y"),
    "head of sequences": (head(linear, reduction="none"), "hh y2"),
    "head of many dimensions": (lossfuse.LinearCrossEntropyLoss(D, 3, out_features=(2,)), "h yk"),
    "statistics of a head": (statistics(head(lossfuse.linear_cross_entropy_stats)), "h y"),
    "log_softmax": (lossfuse.LogSoftmax(1), "x"),
    "log_softmax, reference": (lossfuse.LogSoftmax(1, **REFERENCE), "x"),
    "nll_loss": (lossfuse.NLLLoss(CLASSES), "x y"),
    "binary": (lossfuse.BCELoss(), "q q"),
    "binary of logits": (lossfuse.BCEWithLogitsLoss(CLASSES, pos_weight=CLASSES + 1), "x q"),
    "binary of ids": (lossfuse.BCEWithLogitsLoss(), "x labels"),
}
CASE = pytest.mark.parametrize("case", CASES)


class Model(torch.nn.Module):
    """A parameter before the loss."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.factor = loss, torch.nn.Parameter(torch.full((), 0.9))

    def forward(self, first, *others):
        return self.loss(first * self.factor, *others)


def assert_same_for_any_number_of_rows(recorded, model, names):
    for n, seed in ((5, 0), (5, 1), (9, 2)):
        results = []
        for module in (recorded, model):
            made = module(*arguments(names, n, seed))
            made = [made] if isinstance(made, torch.Tensor) else list(made)
            grads = torch.autograd.grad(made[0].sum(), list(module.parameters())[:1])
            results.append([*made, *grads])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@CASE
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_trace_consists_of_operators_of_torch(case):
    """And passes the checks of the tracer, which traces again and compares."""
    loss, names = CASES[case]
    model = Model(loss)
    traced = torch.jit.trace(model, arguments(names, 5, 0))
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    assert "PythonOp" not in str(traced.inlined_graph)
    assert_same_for_any_number_of_rows(traced, model, names)


@CASE
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_export_consists_of_operators_of_torch(case, strict):
    loss, names = CASES[case]
    model, args = Model(loss), arguments(names, 5, 0)
    rows = {1 if case == "head of sequences" else 0: torch.export.Dim.AUTO}
    sizes = (rows, (rows,) * (len(args) - 1)) if len(args) > 1 else (rows,)
    exported = torch.export.export(model, args, dynamic_shapes=sizes, strict=strict)
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert {f.namespace for f in called if isinstance(f, torch._ops.OpOverload)} == {"aten"}
    assert_same_for_any_number_of_rows(exported.module(), model, names)


def test_an_implementation_by_name_is_exported():
    model, args = Model(ce(impl="torch")), arguments("x y", 5, 0)
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
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


MODULES = (
    "CrossEntropyLoss",
    "NLLLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "LogSoftmax",
    "LinearCrossEntropyLoss",
)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", [*MODULES, "cross_entropy"])
def test_torchscript_is_refused_by_a_sentence(name):
    of = getattr(lossfuse, name)
    of = of(D, V) if name == "LinearCrossEntropyLoss" else of() if isinstance(of, type) else of
    words = f"torch.jit.script cannot compile {name}, .* use torch.jit.trace or torch.export"
    for scripted in (of, torch.nn.Sequential(of)) if isinstance(of, torch.nn.Module) else (of,):
        with pytest.raises(RuntimeError, match=words):
            torch.jit.script(scripted)
