"""The host's part of a call beside its launches: it goes through a registered operator only under a
mode or a profiler."""

import gc
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lossfuse
from lossfuse.ops import library, rows
from rows import logits_and_ids

GRAD = pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])


@pytest.fixture
def no_launches(monkeypatch):
    """Everything but the kernels and the check of ids, which only the CPU has; of CPU tensors,
    with or without a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    null = SimpleNamespace(
        row_loss=lambda logits, *_: (torch.empty(len(logits)), torch.empty(2, len(logits))),
        row_total_and_grads=lambda *_: (torch.empty(()), torch.empty(())),
        mean_over_valid=lambda *_: torch.empty(()),
    )
    for module in (library, rows):
        monkeypatch.setattr(module, "backend", lambda *_: null)
    monkeypatch.setattr(library, "require_ids_in_range", lambda *_: None)


def functions_called(call):
    """The number of functions of Python and of C that a call runs, which depends on no processor
    and no load."""
    called = 0

    def count(frame, event, arg):
        nonlocal called
        called += event in ("call", "c_call")

    # one-time work comes first
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


@pytest.mark.parametrize(("grad", "most"), [(False, 125), (True, 150)], ids=["no grad", "grad"])
def test_a_call_runs_few_functions(no_launches, grad, most):
    """124 and 147 with torch 2.13 and Python 3.11, most of them checks of the arguments. With grad
    the forward also forms the gradient."""
    x, target = logits_and_ids(4, 19)
    x = x if grad else x.detach()
    assert functions_called(lambda: lossfuse.cross_entropy(x, target, impl="triton")) <= most


@GRAD
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.not_reference
def test_an_eager_call_goes_through_no_operator(place, reduction, inplace, grad):
    x, target = logits_and_ids(4, 19, device=place.device)
    given, passed = {"reduction": reduction, "inplace": inplace, "impl": place.impl}, set()

    def watch(frame, event, arg):
        if frame.f_code.co_filename.endswith(("torch/_ops.py", "torch/_library/autograd.py")):
            passed.add(frame.f_code.co_name)

    def call():
        loss = lossfuse.cross_entropy(x * 1.0 if grad else x.detach(), target, **given).sum()
        if grad:
            loss.backward()

    call()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert passed == set()


class Recorded:
    def __init__(self):
        super().__init__()
        self.names = set()

    def record(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class Dispatched(Recorded, TorchDispatchMode):
    __torch_dispatch__ = Recorded.record


class Called(Recorded, TorchFunctionMode):
    __torch_function__ = Recorded.record


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
        lossfuse.cross_entropy(x, target, reduction="none", impl="torch")
    assert "lossfuse::row_loss" in {event.name for event in profile.events()}


@pytest.mark.not_reference
def test_memory_that_holds_the_negatives(place):
    """The dispatcher makes the numbers of such a view; a kernel would read their negatives."""
    x, target = logits_and_ids(4, 19, device=place.device)
    negative = torch._neg_view(x.detach())
    got = lossfuse.cross_entropy(negative, target, impl=place.impl)
    torch.testing.assert_close(got, F.cross_entropy(-x.detach(), target))
