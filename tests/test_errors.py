"""Each refusal by its words: the argument, its value and the expectation, before anything is
written."""

import importlib.metadata
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

import lossfuse
import program
from closeness import assert_loss_close
from lossfuse import LinearOptions
from lossfuse.call import dispatch
from lossfuse.inputs import flatten
from lossfuse.ops import head_chunks
from rows import class_weight

X, H, W, B = torch.randn(4, 7), torch.randn(4, 5), torch.randn(7, 5), torch.randn(7)
IDS = torch.tensor([0, 6, 3, 1])
Q = torch.softmax(torch.randn(4, 7), 1)
NAN, INF = float("nan"), float("inf")
ONES = torch.ones(7)
KD = (H, torch.randn(7, 2, 5), torch.zeros(4, 2, dtype=torch.long))
SEQUENCE = torch.randn(2, 4, 5)

# error, words, arguments
OF_LOGITS = [
    (TypeError, "input is a list but must be a Tensor", ([[1.0]], IDS)),
    (TypeError, "input has dtype torch.int64 but logits must be float64, float32, bfloat16 or",
        (IDS, IDS)),
    (TypeError, "input has dtype torch.complex64", (X.to(torch.complex64), IDS)),
    (ValueError, r"input has shape \(\) but logits must be", (torch.tensor(1.0), torch.tensor(0))),
    (ValueError, r"input has shape \(4, 0\): dimension 1 holds the classes", (X[:, :0], IDS)),
    (TypeError, "target is a list but must be a Tensor", (X, [0, 1, 2, 3])),
    (ValueError, r"target has shape \(3,\) but the logits have shape \(4, 7\); expected class ids "
        r"of shape \(4,\)", (X, IDS[:3])),
    (ValueError, r"target has shape \(\) but the logits have shape \(4, 7\)", (X, IDS[0])),
    (ValueError, r"expected class ids of shape \(2, 3\)",
        (torch.randn(2, 5, 3), torch.zeros(3, 2).long())),
    (TypeError, "target has dtype torch.float32 but class ids must be int64", (X, IDS.float())),
    (TypeError, "target has dtype torch.bool but class ids must be int64", (X, IDS > 1)),
    (TypeError, "so it holds class probabilities and must be floating point", (X, X.long())),
    (ValueError, r"target has shape \(4, 6\) but the logits have shape \(4, 7\)", (X, Q[:, :6])),
    (TypeError, "weight is a list but must be a Tensor", (X, IDS, [1.0] * 7)),
    (ValueError, r"weight has shape \(6,\) but input has 7 classes; expected \(7,\)",
        (X, IDS, ONES[:6])),
    (TypeError, "weight has dtype torch.int64", (X, IDS, ONES.long())),
    (ValueError, "weight is on meta but input is on cpu", (X, IDS, ONES.to("meta"))),
    (ValueError, "target is on meta but input is on cpu", (X, IDS.to("meta"))),
]  # fmt: skip
OF_HEADS = [
    (TypeError, "input is a list but must be a Tensor", ([[1.0]], W, IDS)),
    (TypeError, "input has dtype torch.int64 but must be float64", (H.long(), W, IDS)),
    (ValueError, r"input has shape \(\) but hidden states must be \(D\), \(N, D\)",
        (torch.tensor(1.0), W, IDS[0])),
    (TypeError, "linear_weight is a list but must be a Tensor", (H, [1.0], IDS)),
    (TypeError, "linear_weight is a NoneType but must be a Tensor", (H, None, IDS)),
    (ValueError, r"linear_weight has shape \(5,\) but must be \(C, D\)", (H, W[0], IDS)),
    (ValueError, r"linear_weight has shape \(5, 7\) but input has shape \(4, 5\); the last sizes "
        r"must agree", (H, W.t(), IDS)),
    (TypeError, "linear_weight has dtype torch.float32 but input has dtype torch.bfloat16; cast "
        "one of the two, or use autocast", (H.bfloat16(), W, IDS)),
    (ValueError, "linear_weight is on meta but input is on cpu", (H, W.to("meta"), IDS)),
    (ValueError, r"linear_weight has shape \(0, 5\): expected at least one class", (H, W[:0], IDS)),
    (ValueError, r"linear_bias has shape \(5,\) but linear_weight has shape \(7, 5\); expected "
        r"\(7,\)", (H, W, IDS, B[:5])),
    (TypeError, "linear_bias has dtype torch.float64 but input", (H, W, IDS, B.double())),
    (TypeError, "linear_bias is a float but must be a Tensor", (H, W, IDS, 1.0)),
    (TypeError, "target is a list but must be a Tensor", (H, W, [0, 1])),
    (ValueError, r"target has shape \(3,\) but the logits have shape \(4, 7\); expected class ids "
        r"of shape \(4,\)", (H, W, IDS[:3])),
    (ValueError, r"target has shape \(4, 1\)", (H, W, IDS[:, None])),
    (ValueError, r"target has shape \(2, 3\) but the logits have shape \(2, 4, 7\)",
        (SEQUENCE, W, torch.zeros(2, 3).long())),
    (ValueError, r"target has shape \(2, 7, 4\)", (SEQUENCE, W, torch.rand(2, 7, 4))),
    (TypeError, "target has dtype torch.float32 but class ids must be int64", (H, W, IDS.float())),
    (ValueError, r"linear_weight has shape \(7, 2, 5\), so input must be \(N, D\), but input has "
        r"shape \(2, 4, 5\)", (SEQUENCE, KD[1], IDS)),
    (ValueError, r"linear_bias has shape \(7,\) .* expected \(7, 2\)", (*KD, B)),
]  # fmt: skip
# error, words, option; of both
OPTIONS = [
    (ValueError, r"label_smoothing is -0.1 but must lie in \[0, 1\]", {"label_smoothing": -0.1}),
    (ValueError, r"label_smoothing is 1.5 but must lie in \[0, 1\]", {"label_smoothing": 1.5}),
    (ValueError, "label_smoothing is nan but must be finite", {"label_smoothing": NAN}),
    (TypeError, "label_smoothing is a str but must be a Python number", {"label_smoothing": "0.1"}),
    (ValueError, "softcap is 0.0 but must be positive", {"softcap": 0.0}),
    (ValueError, "softcap is -30 but must be positive", {"softcap": -30}),
    (ValueError, "softcap is inf but must be finite", {"softcap": INF}),
    (ValueError, "logit_scale is nan but must be finite", {"logit_scale": NAN}),
    (TypeError, "logit_scale is a Tensor but must be a Python number", {"logit_scale": ONES[0]}),
    (ValueError, "lse_square_scale is inf but must be finite", {"lse_square_scale": INF}),
    (TypeError, "ignore_index is 1.5 but must be an int", {"ignore_index": 1.5}),
    (ValueError, "reduction is 'avg' but must be one of 'none', 'mean', 'sum'",
        {"reduction": "avg"}),
    (ValueError, "normalizer divides reduction='mean' but reduction is 'sum'",
        {"reduction": "sum", "normalizer": 2}),
    (ValueError, "normalizer is 0 but must be positive", {"normalizer": 0}),
    (ValueError, r"normalizer has shape \(7,\) but must be a number or a 0-d tensor",
        {"normalizer": ONES}),
    (TypeError, "normalizer is a str", {"normalizer": "4"}),
    (ValueError, r"row_weight has shape \(7,\) but must have one number per row, \(4,\)",
        {"row_weight": ONES}),
    (TypeError, "row_weight has dtype torch.complex64 but must be real",
        {"row_weight": torch.ones(4, dtype=torch.complex64)}),
    (TypeError, "row_weight is a float but must be a Tensor", {"row_weight": 2.0}),
    (ValueError, r"weight has shape \(6,\) but input has 7 classes", {"weight": ONES[:6]}),
    (ValueError, "impl is 'cuda' but must be one of 'auto', 'triton', 'torch', 'reference'",
        {"impl": "cuda"}),
]  # fmt: skip
OF_THE_HEAD_ALONE = [
    (TypeError, "options is a dict but must be a lossfuse.LinearOptions", H, {"options": {}}),
    (ValueError, "logits_dtype is torch.bfloat16 but input has dtype torch.float32; expected "
        "torch.float32 or None", H, {"options": LinearOptions(logits_dtype=torch.bfloat16)}),
    (ValueError, "acc_dtype is torch.bfloat16 but input has dtype torch.float16", H.half(),
        {"options": LinearOptions(acc_dtype=torch.bfloat16)}),
    (ValueError, "impl='triton' cannot run here: .*float64", H.double(), {"impl": "triton"}),
]  # fmt: skip
ce, linear = lossfuse.cross_entropy, lossfuse.linear_cross_entropy
REFUSED = [
    *((ce, *case, {}) for case in OF_LOGITS),
    *((linear, *case, {}) for case in OF_HEADS),
    *((ce, error, words, (X, IDS), given) for error, words, given in OPTIONS),
    *((linear, error, words, (H, W, IDS), given) for error, words, given in OPTIONS),
    *((linear, error, words, (h, W.to(h.dtype), IDS), given) for error, words, h,
        given in OF_THE_HEAD_ALONE),
    (ce, ValueError, "ignore_index is 3 but class probabilities have no", (X, Q),
        {"ignore_index": 3}),
    (linear, ValueError, "ignore_index is 3 but class probabilities", (H, W, Q),
        {"ignore_index": 3}),
    (ce, TypeError, "inplace is 'no' but must be True or False", (X, IDS), {"inplace": "no"}),
    (linear, ValueError, "impl='torch' cannot run here: linear_weight has 3 dimensions", KD,
        {"impl": "torch"}),
]  # fmt: skip


@pytest.fixture
def nothing_computed(monkeypatch):
    def never(*args, **kwargs):
        raise RuntimeError("computed")

    monkeypatch.setattr(head_chunks, "product", never)
    monkeypatch.setattr(F, "linear", never)


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("function", "error", "words", "args", "options"),
    REFUSED,
    ids=lambda a: a if isinstance(a, str) else "",
)
def test_refused_before_anything_is_computed(function, error, words, args, options):
    if function is linear and len(args) == 4:
        args, options = args[:3], {**options, "linear_bias": args[3]}
    with pytest.raises(error, match=words):
        function(*args, **options)


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (TypeError, "chunk_bytes is 1.5 but must be an int", {"chunk_bytes": 1.5}),
        (TypeError, "chunk_bytes is True but must be an int", {"chunk_bytes": True}),
        (ValueError, "chunk_bytes is 0 but must be positive", {"chunk_bytes": 0}),
        (ValueError, "logits_dtype is torch.float16 but must be torch.float32, torch.bfloat16 or "
            "None", {"logits_dtype": torch.float16}),
        (ValueError, "acc_dtype is float32 but must be", {"acc_dtype": "float32"}),
        (TypeError, "drop_ignored is 1 but must be True or False", {"drop_ignored": 1}),
        (TypeError, "allow_retain_graph is None but must be True or False",
            {"allow_retain_graph": None}),
        (TypeError, "main_grad is 'yes' but must be", {"main_grad": "yes"}),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_a_head_are_refused_when_built(error, words, given):
    with pytest.raises(error, match=words):
        LinearOptions(**given)


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("drop", [None, True, False])
def test_a_target_out_of_range_is_refused_before_a_head_computes(place, drop):
    if place.device != "cpu":
        pytest.skip("values are not checked on a device: its row is NaN")
    target, given = torch.tensor([0, -100, 9, 9]), {"options": LinearOptions(drop_ignored=drop)}
    with pytest.raises(IndexError, match="target of row 2 is 9 but input has 7 classes"):
        linear(H.clone().requires_grad_(), W, target, impl=place.impl, **given)


N, T, V = 2, 3, 7
SEQUENCES, TOKENS = torch.randn(N, T, V), torch.arange(N * T).view(N, T)
HIDDEN, HEAD = torch.randn(N * T, 5), torch.randn(V, 5)
FLAT_IDS = TOKENS.flatten()
LAST = "; if classes are the last dimension, pass "
ORDER = "; are input and linear_weight exchanged? The order is (input, linear_weight, target)"


class Output:
    logits = X


SHIFTED = "; if row i predicts target i + 1, pass "
# arguments that do not fit, and the end of the sentence; of every function that takes them
REMEDIES = {
    "classes last": (LAST + "input.flatten(0, -2) and target.flatten(), or input.transpose(1, -1)",
        (SEQUENCES, TOKENS)),
    "classes last, flat ids": (LAST + "input.flatten(0, -2)", (SEQUENCES, FLAT_IDS)),
    "classes last, target short": ("; if classes are the last dimension and row i predicts target "
        "i + 1, pass input[:, :-1].flatten(0, -2) and target.flatten()", (SEQUENCES, TOKENS[:,
        1:])),
    "classes last, target long": ("; if classes are the last dimension and row i predicts target i "
        "+ 1, pass input.flatten(0, -2) and target[:, 1:].flatten()", (SEQUENCES[:, 1:], TOKENS)),
    "flat logits": ("; pass target.flatten()", (SEQUENCES.flatten(0, 1), TOKENS)),
    "a column of ids": ("; pass target.flatten()", (X, IDS[:, None])),
    "rows short": (SHIFTED + "target[1:]", (X[1:], IDS)),
    "rows long": (SHIFTED + "input[:-1]", (X, IDS[1:])),
    "classes first": ("; if classes are the first dimension, pass input.T", (X.T, IDS)),
    "exchanged": ("; the order is (input, target)", (IDS, X)),
    "ids as floats": ("; pass target.long()", (X, IDS.float())),
    "zeros and ones": ("; pass target.float(), or the ids of its classes", (X, F.one_hot(IDS, 7))),
    "a model's output": ("; pass its .logits", (Output(), IDS)),
}  # fmt: skip
HEAD_REMEDIES = [
    (ORDER, (HEAD, HIDDEN, FLAT_IDS)),
    (ORDER, (HEAD, HIDDEN.view(N, T, 5), TOKENS)),
    (ORDER, (HEAD, HIDDEN, torch.rand(N * T, V))),
    ("; pass linear_weight.T", (HIDDEN, HEAD.T, FLAT_IDS)),
    ("; pass linear_weight=head.weight and linear_bias=head.bias", (HIDDEN, torch.nn.Linear(5, V),
        FLAT_IDS)),
    ("; pass input.flatten(0, -2)", (HIDDEN.view(N, T, 5), HEAD, FLAT_IDS)),
    ("; pass target.flatten()", (HIDDEN, HEAD, TOKENS)),
    (SHIFTED + "input[:, :-1]", (HIDDEN.view(N, T, 5), HEAD, TOKENS[:, 1:])),
    (SHIFTED + "target[:, 1:]", (HIDDEN.view(N, T, 5)[:, 1:], HEAD, TOKENS)),
]  # fmt: skip
BINARY_REMEDIES = [
    ("; pass target.view_as(input)", (torch.rand(4, 1), torch.ones(4))),
    ("; pass target.view_as(input)", (torch.rand(4), torch.ones(4, 1))),
    ("; pass target.float()", (torch.rand(4, 2), torch.ones(4, 2, dtype=torch.int64))),
]
LOSSES_OF_LOGITS = (lossfuse.cross_entropy, lossfuse.cross_entropy_stats, lossfuse.nll_loss)
WITH_REMEDY = [
    *(
        (f, *case)
        for f in LOSSES_OF_LOGITS
        for name, case in REMEDIES.items()
        if name != "zeros and ones" or f is not lossfuse.nll_loss
    ),
    *(
        (f, *case)
        for f in (lossfuse.linear_cross_entropy, lossfuse.linear_cross_entropy_stats)
        for case in HEAD_REMEDIES
    ),
    *(
        (f, *case)
        for f in (lossfuse.binary_cross_entropy, lossfuse.binary_cross_entropy_with_logits)
        for case in BINARY_REMEDIES
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
        match=rf"{module}\(\.\.\.\) takes options and is then called with tensors: "
        rf"{module}\(\)\(input",
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
            match=rf"weight has shape \(4, 7\) but must be \(C\).*call "
            rf"{module.__name__}\(\)\(input, target\)",
        ):
            module(X)
    with pytest.raises(TypeError, match="makes a head and is then called with tensors"):
        lossfuse.LinearCrossEntropyLoss(HIDDEN, HEAD)


UNSTRIDED = {
    "torch.sparse_coo": torch.Tensor.to_sparse,
    "torch._mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.as_nested_tensor([t, t]),
}
# each argument that is a tensor, by a function that takes it
TAKEN = {
    "input": (lossfuse.cross_entropy, lambda t: (t(X), IDS), {}),
    "target": (lossfuse.cross_entropy, lambda t: (X, t(Q)), {}),
    "weight": (lossfuse.cross_entropy, lambda t: (X, IDS, t(torch.ones(7))), {}),
    "linear_weight": (lossfuse.linear_cross_entropy, lambda t: (X, t(torch.ones(7, 7)), IDS), {}),
    "pos_weight": (
        lossfuse.binary_cross_entropy_with_logits,
        lambda t: (X, X),
        {"pos_weight": lambda t: t(torch.ones(4, 7))},
    ),
    "row_weight": (
        lossfuse.cross_entropy,
        lambda t: (X, IDS),
        {"row_weight": lambda t: t(torch.ones(4))},
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
    """A class, or a number that is no class."""
    x, h, w, weight = (t.to(place.device) for t in (X, H, W, class_weight(7)))
    wide = [t.double() for t in (x, h, w, weight)]
    for ignored, ids in ((300, [0, 300, 6, 300]), (2, [0, 2, 6, 2])):
        target = torch.tensor(ids, device=place.device)
        given = {"ignore_index": ignored, "impl": place.impl}
        want = program.cross_entropy(wide[0], target, ignore_index=ignored)
        assert_loss_close(ce(x, target, **given), want)
        got = linear(h, w, target, weight=weight, **given)
        head = (wide[1], wide[2], target)
        want = program.linear_cross_entropy(*head, weight=wide[3], ignore_index=ignored)
        assert_loss_close(got, want)


# --- a chosen implementation: a name is obeyed or raises with the reason; only auto chooses


def obstacle(words, *args, **options):
    with pytest.raises(ValueError, match=f"impl='triton' cannot run here: .*{words}"):
        ce(*args, impl="triton", **options)


def test_triton_by_name_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    obstacle("the kernels compute in float32 and input is float64", X.double(), IDS)
    obstacle("target is float64", X, Q.double())
    x, ids = X.to("meta"), IDS.to("meta")
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "meta"))
        words = (
            "TRITON_INTERPRET=1 makes Triton an interpreter, which is for CPU tensors, and input is"
        )
        obstacle(words, x, ids)
        assert ce(x, ids).device.type == "meta"
    monkeypatch.delenv("TRITON_INTERPRET")
    obstacle("Triton does not run on cpu tensors .*TRITON_INTERPRET=1", X, IDS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    obstacle("Triton is not installed", X, IDS)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_the_reference_differentiates_these(impl, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="weight requires grad"):
        ce(X, IDS, torch.ones(7, requires_grad=True), impl=impl)
    with pytest.raises(ValueError, match=r"a torch.func transform is active"):
        torch.func.grad(lambda x: ce(x, IDS, impl=impl))(X)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(ValueError, match="forward-mode tangent"):
            ce(dual, IDS, impl=impl)


def test_auto_on_the_cpu_is_the_chunked_backend(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weight = torch.ones(7, requires_grad=True)
    assert dispatch.pick("auto", flatten(X, IDS, None, -100)).name == "torch"
    assert dispatch.pick("auto", flatten(X, IDS, weight, -100)).name == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu_is_triton():
    assert dispatch.pick("auto", flatten(X.cuda(), IDS.cuda(), None, -100)).name == "triton"
    assert dispatch.pick("auto", flatten(X.cuda().double(), IDS.cuda(), None, -100)).name == "torch"


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_nothing_is_written_before_a_refusal(place, inplace):
    x = X.clone().to(place.device).requires_grad_() * 1.0
    target, version = torch.tensor([0, 1, 99, 1], device=place.device), x._version
    for options in ({"softcap": -1.0}, {"reduction": "x"}, {}):
        if options or place.device == "cpu":
            with pytest.raises((ValueError, IndexError)):
                ce(x, target, impl=place.impl, inplace=inplace, **options)
    assert torch.equal(x, X.to(place.device)) and (inplace or x._version == version)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"weight": torch.ones(6)}, r"weight has shape \(6,\) but there are 7 classes"),
    ],
    ids=str,
)
def test_modules_refuse_when_built(given, words):
    with pytest.raises(ValueError, match=words):
        lossfuse.LinearCrossEntropyLoss(5, 7, **given)
    if "weight" not in given:
        with pytest.raises(ValueError, match=words):
            lossfuse.CrossEntropyLoss(**given)


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
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    found = dispatch._interpreter_obstacle()
    assert found is None if said is None else said in found
    if found:
        monkeypatch.setattr(dispatch, "INTERPRETER_OBSTACLE", found)
        monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        obstacle(said, X, IDS)
