"""Each refusal, by its words: the argument, what came, what was expected; nothing is written before it."""

import contextlib
import importlib.metadata
import itertools

import pytest
import torch

import lossfuse
from lossfuse import dispatch

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
    "input complex": (TypeError, "input has dtype torch.complex64", (X.to(torch.complex64), IDS), {}),
    "input 0-d": (ValueError, r"input has shape \(\) but logits must be", (torch.tensor(1.0), torch.tensor(0)), {}),
    "no classes": (ValueError, r"input has shape \(4, 0\): dimension 1 holds the classes", (torch.empty(4, 0), IDS), {}),
    "target no tensor": (TypeError, "target is a list but must be a Tensor", (X, [0, 1, 2, 3]), {}),
    "target short": (
        ValueError,
        r"target has shape \(3,\) but the logits have shape \(4, 7\); expected class ids of shape \(4,\)",
        (X, IDS[:3]),
        {},
    ),
    "target scalar": (ValueError, r"target has shape \(\) but the logits have shape \(4, 7\)", (X, IDS[0]), {}),
    "target K-dim": (ValueError, r"expected class ids of shape \(2, 3\)", (torch.randn(2, 5, 3), torch.zeros(3, 2, dtype=torch.long)), {}),
    "ids as floats": (TypeError, "target has dtype torch.float32 but class ids must be int64", (X, IDS.float()), {}),
    "ids as bool": (TypeError, "target has dtype torch.bool but class ids must be int64", (X, IDS > 1), {}),
    "probabilities as integers": (TypeError, "so it holds class probabilities and must be floating point", (X, X.long()), {}),
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
    "weight no tensor": (TypeError, "weight is a list but must be a Tensor", (X, IDS, [1.0] * 7), {}),
    "weight short": (ValueError, r"weight has shape \(6,\) but input has 7 classes; expected \(7,\)", (X, IDS, torch.ones(6)), {}),
    "weight of integers": (TypeError, "weight has dtype torch.int64", (X, IDS, torch.ones(7, dtype=torch.long)), {}),
    "weight elsewhere": (ValueError, "weight is on meta but input is on cpu", (X, IDS, torch.ones(7, device="meta")), {}),
    "target elsewhere": (ValueError, "target is on meta but input is on cpu", (X, IDS.to("meta")), {}),
    "smoothing below": (ValueError, r"label_smoothing is -0.1 but must lie in \[0, 1\]", (X, IDS), {"label_smoothing": -0.1}),
    "smoothing above": (ValueError, r"label_smoothing is 1.5 but must lie in \[0, 1\]", (X, IDS), {"label_smoothing": 1.5}),
    "smoothing NaN": (ValueError, "label_smoothing is nan but must be finite", (X, IDS), {"label_smoothing": float("nan")}),
    "smoothing a string": (TypeError, "label_smoothing is a str but must be a Python number", (X, IDS), {"label_smoothing": "0.1"}),
    "inplace a string": (TypeError, "inplace is 'no' but must be True or False", (X, IDS), {"inplace": "no"}),
    "softcap zero": (ValueError, "softcap is 0.0 but must be positive", (X, IDS), {"softcap": 0.0}),
    "softcap negative": (ValueError, "softcap is -30 but must be positive", (X, IDS), {"softcap": -30}),
    "softcap infinite": (ValueError, "softcap is inf but must be finite", (X, IDS), {"softcap": float("inf")}),
    "scale NaN": (ValueError, "logit_scale is nan but must be finite", (X, IDS), {"logit_scale": float("nan")}),
    "scale a tensor": (TypeError, "logit_scale is a Tensor but must be a Python number", (X, IDS), {"logit_scale": torch.tensor(2.0)}),
    "z-loss infinite": (ValueError, "lse_square_scale is inf but must be finite", (X, IDS), {"lse_square_scale": float("inf")}),
    "ignore_index a float": (TypeError, "ignore_index is 1.5 but must be an int", (X, IDS), {"ignore_index": 1.5}),
    "reduction": (ValueError, "reduction is 'avg' but must be one of 'none', 'mean', 'sum'", (X, IDS), {"reduction": "avg"}),
    "normalizer of a sum": (
        ValueError,
        "normalizer divides reduction='mean' but reduction is 'sum'",
        (X, IDS),
        {"reduction": "sum", "normalizer": 2},
    ),
    "normalizer zero": (ValueError, "normalizer is 0 but must be positive", (X, IDS), {"normalizer": 0}),
    "normalizer of 4": (
        ValueError,
        r"normalizer has shape \(4,\) but must be a number or a 0-d tensor",
        (X, IDS),
        {"normalizer": torch.ones(4)},
    ),
    "normalizer a string": (TypeError, "normalizer is a str", (X, IDS), {"normalizer": "4"}),
    "impl": (ValueError, "impl is 'cuda' but must be one of 'auto', 'triton', 'torch', 'reference'", (X, IDS), {"impl": "cuda"}),
}


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
    "pos_weight": (lossfuse.binary_cross_entropy_with_logits, lambda t: (X, X), {"pos_weight": lambda t: t(torch.ones(4, 7))}),
    "normalizer": (lossfuse.cross_entropy, lambda t: (X, IDS), {"normalizer": lambda t: t(torch.tensor(3.0))}),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
# of no dimensions oneDNN has none
@pytest.mark.parametrize(
    ("argument", "layout"), [pair for pair in itertools.product(TAKEN, UNSTRIDED) if pair != ("normalizer", "torch._mkldnn")]
)
def test_tensors_without_strides_are_refused(argument, layout):
    function, args, options = TAKEN[argument]
    unstrided = UNSTRIDED[layout]
    with pytest.raises(TypeError, match=f"{argument} is a tensor that is {layout} but must be dense"):
        function(*args(unstrided), **{name: make(unstrided) for name, make in options.items()})


def test_ignore_index_may_be_any_id(place):
    x = X.to(place.device)
    target = torch.tensor([0, 300, 6, 300], device=place.device)
    want = torch.nn.functional.cross_entropy(x[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(lossfuse.cross_entropy(x, target, ignore_index=300, impl=place.impl), want)
    target = torch.tensor([0, 2, 6, 2], device=place.device)
    want = torch.nn.functional.cross_entropy(x, target, ignore_index=2)
    torch.testing.assert_close(lossfuse.cross_entropy(x, target, ignore_index=2, impl=place.impl), want)


class TestAChosenImplementation:
    """A name is obeyed or raises with the reason; only auto chooses."""

    def test_triton_does_not_do_fp64(self):
        with pytest.raises(ValueError, match="impl='triton' cannot run here: the kernels compute in float32 and input is float64"):
            lossfuse.cross_entropy(X.double(), IDS, impl="triton")
        with pytest.raises(ValueError, match="target is float64"):
            lossfuse.cross_entropy(X, PROBABILITIES.double(), impl="triton")

    def test_triton_needs_its_interpreter_on_the_cpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match="Triton does not run on cpu tensors .*TRITON_INTERPRET=1"):
            lossfuse.cross_entropy(X, IDS, impl="triton")

    def test_its_interpreter_is_for_the_cpu(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "meta"))
        x, ids = X.to("meta"), IDS.to("meta")
        with pytest.raises(
            ValueError, match="TRITON_INTERPRET=1 makes Triton an interpreter, which is for CPU tensors, and input is on meta"
        ):
            lossfuse.cross_entropy(x, ids, impl="triton")
        assert lossfuse.cross_entropy(x, ids).device.type == "meta"

    def test_triton_must_be_installed(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr("lossfuse.dispatch.TRITON_INSTALLED", False)
        with pytest.raises(ValueError, match="Triton is not installed"):
            lossfuse.cross_entropy(X, IDS, impl="triton")

    @pytest.mark.parametrize("impl", ["triton", "torch"])
    def test_what_only_the_reference_differentiates(self, impl, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(ValueError, match="weight requires grad"):
            lossfuse.cross_entropy(X, IDS, torch.ones(7, requires_grad=True), impl=impl)
        with pytest.raises(ValueError, match=r"a torch.func transform is active"):
            torch.func.grad(lambda x: lossfuse.cross_entropy(x, IDS, impl=impl))(X)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode tangent"):
            lossfuse.cross_entropy(torch.autograd.forward_ad.make_dual(X, X), IDS, impl=impl)

    def test_auto_on_the_cpu_is_the_chunked_backend(self, monkeypatch):
        from lossfuse import dispatch
        from lossfuse.inputs import flatten

        rows = flatten(X, IDS, None, -100)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert dispatch.pick("auto", rows) == "torch"
        assert dispatch.pick("auto", flatten(X, IDS, torch.ones(7, requires_grad=True), -100)) == "reference"

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_auto_on_a_gpu_is_triton(self):
        from lossfuse import dispatch
        from lossfuse.inputs import flatten

        assert dispatch.pick("auto", flatten(X.cuda(), IDS.cuda(), None, -100)) == "triton"
        assert dispatch.pick("auto", flatten(X.cuda().double(), IDS.cuda(), None, -100)) == "torch"


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
    [("3.6.0", "2.4.6", "triton 3.6.0 needs numpy < 2.4"), ("3.6.0", "2.3.5", None), ("3.7.1", "2.4.6", None), ("3.10.0", "2.10.0", None)],
)
def test_an_interpreter_that_numpy_has_left_behind_is_refused(monkeypatch, triton, numpy, said):
    """It raises, from its inside, that only 0-dimensional arrays can be converted."""
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    obstacle = dispatch._interpreter_obstacle()
    assert obstacle is None if said is None else said in obstacle
    if obstacle:
        monkeypatch.setattr(dispatch, "INTERPRETER_OBSTACLE", obstacle)
        monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(ValueError, match=f"impl='triton' cannot run here: .*{said}"):
            lossfuse.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), impl="triton")
