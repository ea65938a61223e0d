"""``__torch_function__`` sees every public function, as it sees those of torch: subclasses of
Tensor, function modes, torch.fx."""

import inspect
import warnings
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

import lossfuse
from rows import head_and_ids, logits_and_ids

X, IDS = (t.detach() for t in logits_and_ids(5, 11, ignored=0.0))
HIDDEN, WEIGHT, _, _ = (t.detach() for t in head_and_ids(5, 4, 11))
LABELS = (IDS[:, None] == torch.arange(11)).float()

# public function -> its tensors
CALLS = {
    lossfuse.cross_entropy: (X, IDS),
    lossfuse.cross_entropy_stats: (X, IDS),
    lossfuse.linear_cross_entropy: (HIDDEN, WEIGHT, IDS),
    lossfuse.linear_cross_entropy_stats: (HIDDEN, WEIGHT, IDS),
    lossfuse.log_softmax: (X, 1),
    lossfuse.nll_loss: (X, IDS),
    lossfuse.binary_cross_entropy: (X.sigmoid(), LABELS),
    lossfuse.binary_cross_entropy_with_logits: (X, LABELS),
}
EACH = pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)


class Plain(torch.Tensor):
    pass


class Seen(torch.Tensor):
    functions: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.functions.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def tensors_of(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


@EACH
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_results_of_a_subclass_are_of_that_subclass(function, impl):
    first, *others = CALLS[function]
    has_impl = "impl" in inspect.signature(function).parameters
    options = {"impl": impl} if has_impl else {}
    want = function(first, *others, **options)
    got = function(first.as_subclass(Plain), *others, **options)
    assert type(got) is (type(want) if isinstance(want, tuple) else Plain)
    for w, g in zip(tensors_of(want), tensors_of(got), strict=True):
        assert type(g) is Plain
        torch.testing.assert_close(g.as_subclass(torch.Tensor), w, rtol=0, atol=0)


def test_statistics_that_are_not_computed_are_none_of_a_subclass_too():
    got = lossfuse.cross_entropy_stats(X.as_subclass(Plain), IDS, entropy=False, argmax=False)
    assert (
        isinstance(got, lossfuse.LossStats)
        and got.entropy is got.argmax is None
        and type(got.lse) is Plain
    )


def test_statistics_are_built_from_their_fields_alone():
    fields = range(7)
    assert (
        lossfuse.LossStats(*fields)
        == lossfuse.LossStats._make(fields)
        == lossfuse.LossStats(fields)
    )
    with pytest.raises(TypeError, match="missing 6 required positional arguments"):
        lossfuse.LossStats(X)


@EACH
@pytest.mark.parametrize("place", [0, 1])
def test_a_subclass_is_asked(function, place):
    args = [*CALLS[function]]
    if not isinstance(args[place], torch.Tensor):
        pytest.skip("no tensor")
    args[place] = args[place].as_subclass(Seen)
    Seen.functions.clear()
    function(*args)
    assert Seen.functions[0] is function


@EACH
def test_a_function_mode_sees_the_call(function):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with Mode():
        got = function(*CALLS[function])
    assert seen == [function]
    torch.testing.assert_close(
        tuple(tensors_of(got)), tuple(tensors_of(function(*CALLS[function]))), rtol=0, atol=0
    )


@EACH
def test_fx_traces_it(function):
    first, *others = CALLS[function]

    class Module(torch.nn.Module):
        def forward(self, first):
            return function(first, *others)

    traced = torch.fx.symbolic_trace(Module())
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
    torch.testing.assert_close(
        tuple(tensors_of(traced(first))),
        tuple(tensors_of(function(first, *others))),
        rtol=0,
        atol=0,
    )


def test_every_public_function_of_tensors_is_here():
    others = {"debug_targets", "fuse_lm_head", "unfuse_lm_head"}
    public = {name for name in lossfuse.__all__ if name[0].islower()} - others
    assert {f.__name__ for f in CALLS} == public


@pytest.mark.parametrize("inplace", [False, True])
def test_warnings_point_at_the_caller(inplace):
    x = X.clone().requires_grad_()
    z = (x * 1.0)[:3]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lossfuse.cross_entropy(z, IDS[:3], size_average=True, inplace=inplace)
        lossfuse.CrossEntropyLoss(size_average=True)
        lossfuse.log_softmax(X)
        lossfuse.LogSoftmax()(X)
    assert len(caught) == 4 + inplace and {w.filename for w in caught} == {__file__}
