"""What a call costs the host beside its launches: no way through an operator's registration, unless
somebody is there to see it."""

import gc
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lossfuse
from lossfuse.ops import library
from rows import logits_and_ids

GRAD = pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])


@pytest.fixture
def no_launches(monkeypatch):
    """All but the kernels, and the look at the ids, which only the CPU takes; of CPU tensors,
    whether or not there is a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    null = SimpleNamespace(
        row_loss=lambda logits, *_: (torch.empty(len(logits)), torch.empty(2, len(logits)))
    )
    monkeypatch.setattr(library, "backend", lambda impl, cut: null)
    monkeypatch.setattr(library, "require_ids_in_range", lambda *_: None)


def functions_called(call):
    """How many functions, of Python and of C, a call runs: what the host does, on whatever
    processor and however busy."""
    called = 0

    def count(frame, event, arg):
        nonlocal called
        called += event in ("call", "c_call")

    # what is done once is done
    call()
    gc.collect()
    gc.disable()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return called


@pytest.mark.parametrize(("grad", "most"), [(False, 110), (True, 135)], ids=["no grad", "grad"])
def test_a_call_runs_few_functions(no_launches, grad, most):
    """97 and 121 with torch 2.13 and Python 3.11, most of them checks of the arguments."""
    x, target = logits_and_ids(4, 19)
    x = x if grad else x.detach()
    assert functions_called(lambda: lossfuse.cross_entropy(x, target, impl="triton")) <= most


@GRAD
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_eager_call_goes_through_no_operator(fast_place, reduction, inplace, grad):
    x, target = logits_and_ids(4, 19, device=fast_place.device)
    passed = set()

    def watch(frame, event, arg):
        if frame.f_code.co_filename.endswith(("torch/_ops.py", "torch/_library/autograd.py")):
            passed.add(frame.f_code.co_name)

    def call():
        z = x * 1.0 if grad else x.detach()
        loss = lossfuse.cross_entropy(
            z, target, reduction=reduction, inplace=inplace, impl=fast_place.impl
        ).sum()
        if grad:
            loss.backward()

    call()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert passed == set()


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@GRAD
@pytest.mark.parametrize("mode", [Dispatched, Called])
def test_a_mode_sees_the_operators(mode, grad):
    x, target = logits_and_ids(4, 19)
    with mode() as seen, torch.set_grad_enabled(grad):
        loss = lossfuse.cross_entropy(x, target, reduction="none", impl="torch").sum()
    # a mode of functions sees what was called, as it sees F.cross_entropy and nothing in it
    assert (
        "lossfuse.row_loss.default" if mode is Dispatched else str(lossfuse.cross_entropy)
    ) in seen.names
    if grad and mode is Dispatched:
        with Dispatched() as seen:
            loss.backward()
        assert "lossfuse.row_grads.default" in seen.names


def test_a_profile_names_the_operators():
    x, target = logits_and_ids(4, 19)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        lossfuse.cross_entropy(x, target, reduction="none")
    assert "lossfuse::row_loss" in {event.name for event in profile.events()}


def test_memory_that_holds_the_negatives(fast_place):
    """The dispatcher makes the numbers of such a view; a kernel would read their negatives."""
    x, target = logits_and_ids(4, 19, device=fast_place.device)
    negative = torch._neg_view(x.detach())
    got = lossfuse.cross_entropy(negative, target, impl=fast_place.impl)
    torch.testing.assert_close(got, F.cross_entropy(-x.detach(), target))
