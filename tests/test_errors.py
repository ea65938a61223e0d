"""Each refusal, by its words: the argument, what came, what was expected; nothing is written before
it."""

import contextlib
import importlib.metadata
import inspect
import itertools

import pytest
import torch

import lossfuse
from lossfuse.call import dispatch

X = torch.randn(4, 7)
IDS = torch.tensor([0, 6, 3, 1])
PROBABILITIES = torch.softmax(torch.randn(4, 7), 1)

REFUSED = {
    "input no tensor": (TypeError, "input is a list but must be a Tensor", ([[1.0]], IDS), {}),
    "input of integers": (
        TypeError,
        "input has dtype torch.int64 but logits must be float64, float32, bfloat16 or float16",
        (IDS, IDS),
        {},
    ),
    "input complex": (
        TypeError,
        "input has dtype torch.complex64",
        (X.to(torch.complex64), IDS),
        {},
    ),
    "input 0-d": (
        ValueError,
        r"input has shape \(\) but logits must be",
        (torch.tensor(1.0), torch.tensor(0)),
        {},
    ),
    "no classes": (
        ValueError,
        r"input has shape \(4, 0\): dimension 1 holds the classes",
        (torch.empty(4, 0), IDS),
        {},
    ),
    "target no tensor": (TypeError, "target is a list but must be a Tensor", (X, [0, 1, 2, 3]), {}),
    "target short": (
        ValueError,
        r"target has shape \(3,\) but the logits have shape \(4, 7\); expected class ids of shape \(4,\)",
        (X, IDS[:3]),
        {},
    ),
    "target scalar": (
        ValueError,
        r"target has shape \(\) but the logits have shape \(4, 7\)",
        (X, IDS[0]),
        {},
    ),
    "target K-dim": (
        ValueError,
        r"expected class ids of shape \(2, 3\)",
        (torch.randn(2, 5, 3), torch.zeros(3, 2, dtype=torch.long)),
        {},
    ),
    "ids as floats": (
        TypeError,
        "target has dtype torch.float32 but class ids must be int64",
        (X, IDS.float()),
        {},
    ),
    "ids as bool": (
        TypeError,
        "target has dtype torch.bool but class ids must be int64",
        (X, IDS > 1),
        {},
    ),
    "probabilities as integers": (
        TypeError,
        "so it holds class probabilities and must be floating point",
        (X, X.long()),
        {},
    ),
    "probabilities of fewer classes": (
        ValueError,
        r"target has shape \(4, 6\) but the logits have shape \(4, 7\)",
        (X, PROBABILITIES[:, :6]),
        {},
    ),
    "ignoring probabilities": (
        ValueError,
        "ignore_index is 3 but class probabilities have no class id",
        (X, PROBABILITIES),
        {"ignore_index": 3},
    ),
    "weight no tensor": (
        TypeError,
        "weight is a list but must be a Tensor",
        (X, IDS, [1.0] * 7),
        {},
    ),
    "weight short": (
        ValueError,
        r"weight has shape \(6,\) but input has 7 classes; expected \(7,\)",
        (X, IDS, torch.ones(6)),
        {},
    ),
    "weight of integers": (
        TypeError,
        "weight has dtype torch.int64",
        (X, IDS, torch.ones(7, dtype=torch.long)),
        {},
    ),
    "weight elsewhere": (
        ValueError,
        "weight is on meta but input is on cpu",
        (X, IDS, torch.ones(7, device="meta")),
        {},
    ),
    "target elsewhere": (
        ValueError,
        "target is on meta but input is on cpu",
        (X, IDS.to("meta")),
        {},
    ),
    "smoothing below": (
        ValueError,
        r"label_smoothing is -0.1 but must lie in \[0, 1\]",
        (X, IDS),
        {"label_smoothing": -0.1},
    ),
    "smoothing above": (
        ValueError,
        r"label_smoothing is 1.5 but must lie in \[0, 1\]",
        (X, IDS),
        {"label_smoothing": 1.5},
    ),
    "smoothing NaN": (
        ValueError,
        "label_smoothing is nan but must be finite",
        (X, IDS),
        {"label_smoothing": float("nan")},
    ),
    "smoothing a string": (
        TypeError,
        "label_smoothing is a str but must be a Python number",
        (X, IDS),
        {"label_smoothing": "0.1"},
    ),
    "inplace a string": (
        TypeError,
        "inplace is 'no' but must be True or False",
        (X, IDS),
        {"inplace": "no"},
    ),
    "softcap zero": (ValueError, "softcap is 0.0 but must be positive", (X, IDS), {"softcap": 0.0}),
    "softcap negative": (
        ValueError,
        "softcap is -30 but must be positive",
        (X, IDS),
        {"softcap": -30},
    ),
    "softcap infinite": (
        ValueError,
        "softcap is inf but must be finite",
        (X, IDS),
        {"softcap": float("inf")},
    ),
    "scale NaN": (
        ValueError,
        "logit_scale is nan but must be finite",
        (X, IDS),
        {"logit_scale": float("nan")},
    ),
    "scale a tensor": (
        TypeError,
        "logit_scale is a Tensor but must be a Python number",
        (X, IDS),
        {"logit_scale": torch.tensor(2.0)},
    ),
    "z-loss infinite": (
        ValueError,
        "lse_square_scale is inf but must be finite",
        (X, IDS),
        {"lse_square_scale": float("inf")},
    ),
    "ignore_index a float": (
        TypeError,
        "ignore_index is 1.5 but must be an int",
        (X, IDS),
        {"ignore_index": 1.5},
    ),
    "reduction": (
        ValueError,
        "reduction is 'avg' but must be one of 'none', 'mean', 'sum'",
        (X, IDS),
        {"reduction": "avg"},
    ),
    "normalizer of a sum": (
        ValueError,
        "normalizer divides reduction='mean' but reduction is 'sum'",
        (X, IDS),
        {"reduction": "sum", "normalizer": 2},
    ),
    "normalizer zero": (
        ValueError,
        "normalizer is 0 but must be positive",
        (X, IDS),
        {"normalizer": 0},
    ),
    "normalizer of 4": (
        ValueError,
        r"normalizer has shape \(4,\) but must be a number or a 0-d tensor",
        (X, IDS),
        {"normalizer": torch.ones(4)},
    ),
    "normalizer a string": (TypeError, "normalizer is a str", (X, IDS), {"normalizer": "4"}),
    "impl": (
        ValueError,
        "impl is 'cuda' but must be one of 'auto', 'triton', 'torch', 'reference'",
        (X, IDS),
        {"impl": "cuda"},
    ),
}


B, T, V = 2, 3, 7
SEQUENCES, TOKENS = torch.randn(B, T, V), torch.arange(B * T).view(B, T)
HIDDEN, HEAD = torch.randn(B * T, 5), torch.randn(V, 5)
FLAT_IDS = TOKENS.flatten()
LAST = "; if classes are the last dimension, pass "
ORDER = "; are input and linear_weight exchanged? The order is (input, linear_weight, target)"


class Output:
    logits = X


# arguments that do not fit -> how the sentence ends; of every function that takes them
REMEDIES = {
    "classes last": (
        LAST + "input.flatten(0, -2) and target.flatten(), or input.transpose(1, -1)",
        (SEQUENCES, TOKENS),
    ),
    "classes last, flat ids": (LAST + "input.flatten(0, -2)", (SEQUENCES, FLAT_IDS)),
    "classes last, target short": (
        "; if classes are the last dimension and row i predicts target i + 1, pass input[:, :-1].flatten(0, -2) and target.flatten()",
        (SEQUENCES, TOKENS[:, 1:]),
    ),
    "classes last, target long": (
        "; if classes are the last dimension and row i predicts target i + 1, pass input.flatten(0, -2) and target[:, 1:].flatten()",
        (SEQUENCES[:, 1:], TOKENS),
    ),
    "flat logits": ("; pass target.flatten()", (SEQUENCES.flatten(0, 1), TOKENS)),
    "a column of ids": ("; pass target.flatten()", (X, IDS[:, None])),
    "rows short": ("; if row i predicts target i + 1, pass target[1:]", (X[1:], IDS)),
    "rows long": ("; if row i predicts target i + 1, pass input[:-1]", (X, IDS[1:])),
    "classes first": ("; if classes are the first dimension, pass input.T", (X.T, IDS)),
    "exchanged": ("; the order is (input, target)", (IDS, X)),
    "ids as floats": ("; pass target.long()", (X, IDS.float())),
    "zeros and ones": (
        "; pass target.float(), or the ids of its classes",
        (X, torch.nn.functional.one_hot(IDS, 7)),
    ),
    "a model's output": ("; pass its .logits", (Output(), IDS)),
}
HEAD_REMEDIES = {
    "exchanged": (ORDER, (HEAD, HIDDEN, FLAT_IDS)),
    "exchanged, of sequences": (ORDER, (HEAD, HIDDEN.view(B, T, 5), TOKENS)),
    "exchanged, of probabilities": (ORDER, (HEAD, HIDDEN, torch.rand(B * T, V))),
    "transposed": ("; pass linear_weight.T", (HIDDEN, HEAD.T, FLAT_IDS)),
    "a module": (
        "; pass linear_weight=head.weight and linear_bias=head.bias",
        (HIDDEN, torch.nn.Linear(5, V), FLAT_IDS),
    ),
    "flat ids": ("; pass input.flatten(0, -2)", (HIDDEN.view(B, T, 5), HEAD, FLAT_IDS)),
    "flat rows": ("; pass target.flatten()", (HIDDEN, HEAD, TOKENS)),
    "target short": (
        "; if row i predicts target i + 1, pass input[:, :-1]",
        (HIDDEN.view(B, T, 5), HEAD, TOKENS[:, 1:]),
    ),
    "target long": (
        "; if row i predicts target i + 1, pass target[:, 1:]",
        (HIDDEN.view(B, T, 5)[:, 1:], HEAD, TOKENS),
    ),
}
BINARY_REMEDIES = {
    "a column of outputs": ("; pass target.view_as(input)", (torch.rand(4, 1), torch.ones(4))),
    "a column of targets": ("; pass target.view_as(input)", (torch.rand(4), torch.ones(4, 1))),
    "integers": ("; pass target.float()", (torch.rand(4, 2), torch.ones(4, 2, dtype=torch.int64))),
}
OF_LOGITS = (lossfuse.cross_entropy, lossfuse.cross_entropy_stats, lossfuse.nll_loss)
WITH_REMEDY = [
    *(
        (f, *case)
        for f in OF_LOGITS
        for name, case in REMEDIES.items()
        if name != "zeros and ones" or f is not lossfuse.nll_loss
    ),
    *(
        (f, *case)
        for f in (lossfuse.linear_cross_entropy, lossfuse.linear_cross_entropy_stats)
        for case in HEAD_REMEDIES.values()
    ),
    *(
        (f, *case)
        for f in (lossfuse.binary_cross_entropy, lossfuse.binary_cross_entropy_with_logits)
        for case in BINARY_REMEDIES.values()
    ),
    (
        lossfuse.binary_cross_entropy_with_logits,
        "; pass target.view_as(input).float()",
        (torch.rand(4, 1), torch.ones(4, dtype=torch.int64)),
    ),
]


@pytest.mark.parametrize(
    ("function", "remedy", "args"), WITH_REMEDY, ids=lambda a: getattr(a, "__name__", None)
)
def test_a_common_mistake_is_answered_by_its_remedy(function, remedy, args):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*args)
    assert str(caught.value).endswith(remedy)


@pytest.mark.parametrize(
    ("input", "target"),
    [(SEQUENCES.flatten(0, -2), FLAT_IDS), (SEQUENCES.transpose(1, -1), TOKENS)],
    ids=["flat", "transposed"],
)
def test_the_remedies_of_sequences_are_the_loss(input, target):
    want = torch.nn.functional.cross_entropy(SEQUENCES.reshape(-1, V), FLAT_IDS)
    torch.testing.assert_close(lossfuse.cross_entropy(input, target), want)


FOREIGN = {
    "z_loss": (lossfuse.cross_entropy, "lse_square_scale"),
    "logit_softcapping": (lossfuse.cross_entropy_stats, "softcap"),
    "temperature": (lossfuse.cross_entropy, "logit_scale=1 / temperature"),
    "bias": (lossfuse.linear_cross_entropy, "linear_bias"),
    "shift": (
        lossfuse.linear_cross_entropy,
        "input[..., :-1, :] and target[..., 1:]: shift both before the call",
    ),
    "accum_e_fp32": (
        lossfuse.linear_cross_entropy_stats,
        "options=lossfuse.LinearOptions(acc_dtype=torch.float32), the default",
    ),
    "ignored_index": (lossfuse.nll_loss, "ignore_index"),
    "inplace_backward": (lossfuse.cross_entropy, "inplace"),
    "labels": (lossfuse.binary_cross_entropy, "target"),
    "logits": (lossfuse.log_softmax, "input"),
    "logits_scaling": (lossfuse.CrossEntropyLoss, "logit_scale=1 / logits_scaling"),
    "class_weights": (lossfuse.NLLLoss, "weight"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_keyword_of_another_library_is_answered_by_ours(name):
    function, ours = FOREIGN[name]
    with pytest.raises(TypeError) as caught:
        function(**{name: 1})
    called = f"{function.__name__}.__init__" if isinstance(function, type) else function.__name__
    assert (
        str(caught.value)
        == f"{called}() got an unexpected keyword argument {name!r}; here it is {ours}"
    )


def test_every_hint_is_at_an_argument_of_some_function():
    from lossfuse.call.public import _USES

    public = [getattr(lossfuse, name) for name in lossfuse.__all__ if name[0].islower()]
    known = {p for function in public for p in inspect.signature(function).parameters}
    assert {ours for ours, _ in _USES.values()} <= known


def test_other_refusals_of_arguments_are_pythons():
    with pytest.raises(
        TypeError, match=r"^cross_entropy\(\) got an unexpected keyword argument 'bias'$"
    ):
        lossfuse.cross_entropy(X, IDS, bias=None)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'target'"):
        lossfuse.cross_entropy(X)


def test_signatures_are_those_of_the_source():
    parameters = inspect.signature(lossfuse.cross_entropy).parameters
    assert [*parameters][:3] == ["input", "target", "weight"] and parameters[
        "impl"
    ].kind is inspect.Parameter.KEYWORD_ONLY
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(
    "module", ["CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss", "LogSoftmax"]
)
def test_tensors_given_to_a_constructor_are_answered_by_the_call(module):
    args = (X,) if module == "LogSoftmax" else (X, IDS)
    with pytest.raises(
        TypeError,
        match=rf"{module}\(\.\.\.\) takes options and is then called with tensors: {module}\(\)\(input",
    ):
        getattr(lossfuse, module)(*args)
    with pytest.raises(
        TypeError, match=rf"argument 'input'; call the module: {module}\(\.\.\.\)\(input, target\)"
    ):
        getattr(lossfuse, module)(input=X)


def test_logits_are_no_class_weights():
    for module in (lossfuse.CrossEntropyLoss, lossfuse.NLLLoss):
        with pytest.raises(
            ValueError,
            match=rf"weight has shape \(4, 7\) but must be \(C\).*call {module.__name__}\(\)\(input, target\)",
        ):
            module(X)
    with pytest.raises(TypeError, match="makes a head and is then called with tensors"):
        lossfuse.LinearCrossEntropyLoss(HIDDEN, HEAD)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    error, words, args, options = REFUSED[name]
    with pytest.raises(error, match=words):
        lossfuse.cross_entropy(*args, **options)


UNSTRIDED = {
    "torch.sparse_coo": torch.Tensor.to_sparse,
    "torch._mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.as_nested_tensor([t, t]),
}
# each argument that is a tensor, by a function that takes it
TAKEN = {
    "input": (lossfuse.cross_entropy, lambda t: (t(X), IDS), {}),
    "target": (lossfuse.cross_entropy, lambda t: (X, t(PROBABILITIES)), {}),
    "weight": (lossfuse.cross_entropy, lambda t: (X, IDS, t(torch.ones(7))), {}),
    "linear_weight": (lossfuse.linear_cross_entropy, lambda t: (X, t(torch.ones(7, 7)), IDS), {}),
    "pos_weight": (
        lossfuse.binary_cross_entropy_with_logits,
        lambda t: (X, X),
        {"pos_weight": lambda t: t(torch.ones(4, 7))},
    ),
    "normalizer": (
        lossfuse.cross_entropy,
        lambda t: (X, IDS),
        {"normalizer": lambda t: t(torch.tensor(3.0))},
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
# of no dimensions oneDNN has none
@pytest.mark.parametrize(
    ("argument", "layout"),
    [
        pair
        for pair in itertools.product(TAKEN, UNSTRIDED)
        if pair != ("normalizer", "torch._mkldnn")
    ],
)
def test_tensors_without_strides_are_refused(argument, layout):
    function, args, options = TAKEN[argument]
    unstrided = UNSTRIDED[layout]
    with pytest.raises(
        TypeError, match=f"{argument} is a tensor that is {layout} but must be dense"
    ):
        function(*args(unstrided), **{name: make(unstrided) for name, make in options.items()})


def test_ignore_index_may_be_any_id(place):
    x = X.to(place.device)
    target = torch.tensor([0, 300, 6, 300], device=place.device)
    want = torch.nn.functional.cross_entropy(x[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(
        lossfuse.cross_entropy(x, target, ignore_index=300, impl=place.impl), want
    )
    target = torch.tensor([0, 2, 6, 2], device=place.device)
    want = torch.nn.functional.cross_entropy(x, target, ignore_index=2)
    torch.testing.assert_close(
        lossfuse.cross_entropy(x, target, ignore_index=2, impl=place.impl), want
    )


class TestAChosenImplementation:
    """A name is obeyed or raises with the reason; only auto chooses."""

    def test_triton_does_not_do_fp64(self):
        with pytest.raises(
            ValueError,
            match="impl='triton' cannot run here: the kernels compute in float32 and input is float64",
        ):
            lossfuse.cross_entropy(X.double(), IDS, impl="triton")
        with pytest.raises(ValueError, match="target is float64"):
            lossfuse.cross_entropy(X, PROBABILITIES.double(), impl="triton")

    def test_triton_needs_its_interpreter_on_the_cpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(
            ValueError, match="Triton does not run on cpu tensors .*TRITON_INTERPRET=1"
        ):
            lossfuse.cross_entropy(X, IDS, impl="triton")

    def test_its_interpreter_is_for_the_cpu(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "meta"))
        x, ids = X.to("meta"), IDS.to("meta")
        with pytest.raises(
            ValueError,
            match="TRITON_INTERPRET=1 makes Triton an interpreter, which is for CPU tensors, and input is on meta",
        ):
            lossfuse.cross_entropy(x, ids, impl="triton")
        assert lossfuse.cross_entropy(x, ids).device.type == "meta"

    def test_triton_must_be_installed(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr("lossfuse.call.dispatch.TRITON_INSTALLED", False)
        with pytest.raises(ValueError, match="Triton is not installed"):
            lossfuse.cross_entropy(X, IDS, impl="triton")

    @pytest.mark.parametrize("impl", ["triton", "torch"])
    def test_what_only_the_reference_differentiates(self, impl, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(ValueError, match="weight requires grad"):
            lossfuse.cross_entropy(X, IDS, torch.ones(7, requires_grad=True), impl=impl)
        with pytest.raises(ValueError, match=r"a torch.func transform is active"):
            torch.func.grad(lambda x: lossfuse.cross_entropy(x, IDS, impl=impl))(X)
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(ValueError, match="forward-mode tangent"),
        ):
            lossfuse.cross_entropy(torch.autograd.forward_ad.make_dual(X, X), IDS, impl=impl)

    def test_auto_on_the_cpu_is_the_chunked_backend(self, monkeypatch):
        from lossfuse.call import dispatch
        from lossfuse.inputs import flatten

        rows = flatten(X, IDS, None, -100)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert dispatch.pick("auto", rows).name == "torch"
        assert (
            dispatch.pick("auto", flatten(X, IDS, torch.ones(7, requires_grad=True), -100)).name
            == "reference"
        )

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_auto_on_a_gpu_is_triton(self):
        from lossfuse.call import dispatch
        from lossfuse.inputs import flatten

        assert dispatch.pick("auto", flatten(X.cuda(), IDS.cuda(), None, -100)).name == "triton"
        assert (
            dispatch.pick("auto", flatten(X.cuda().double(), IDS.cuda(), None, -100)).name
            == "torch"
        )


def test_nothing_is_written_before_a_refusal(place):
    x, target = X.clone().to(place.device), torch.tensor([0, 1, 99, 1], device=place.device)
    before, version = x.clone(), x._version
    for options in ({"softcap": -1.0}, {"reduction": "x"}, {}):
        with contextlib.suppress(ValueError, IndexError):
            lossfuse.cross_entropy(x, target, impl=place.impl, **options)
    assert torch.equal(x, before) and x._version == version


def test_modules_refuse_when_built():
    with pytest.raises(ValueError, match="label_smoothing is 2.0"):
        lossfuse.CrossEntropyLoss(label_smoothing=2.0)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        lossfuse.CrossEntropyLoss(reduction="avg")


@pytest.mark.parametrize(
    ("triton", "numpy", "said"),
    [
        ("3.6.0", "2.4.6", "triton 3.6.0 needs numpy < 2.4"),
        ("3.6.0", "2.3.5", None),
        ("3.7.1", "2.4.6", None),
        ("3.10.0", "2.10.0", None),
    ],
)
def test_an_interpreter_that_numpy_has_left_behind_is_refused(monkeypatch, triton, numpy, said):
    """It raises, from its inside, that only 0-dimensional arrays can be converted."""
    monkeypatch.setattr(
        importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__
    )
    obstacle = dispatch._interpreter_obstacle()
    assert obstacle is None if said is None else said in obstacle
    if obstacle:
        monkeypatch.setattr(dispatch, "INTERPRETER_OBSTACLE", obstacle)
        monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(ValueError, match=f"impl='triton' cannot run here: .*{said}"):
            lossfuse.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), impl="triton")
