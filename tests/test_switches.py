"""torch's switches for a whole process, or a stretch of it: what they do not speak of stays the
same to the bit."""

import contextlib

import pytest
import torch

import public


@contextlib.contextmanager
def switched(switch, on, off):
    switch(on)
    try:
        yield
    finally:
        switch(off)


SWITCHES = {
    "default dtype float64": lambda: switched(
        torch.set_default_dtype, torch.float64, torch.float32
    ),
    "default dtype float16": lambda: switched(
        torch.set_default_dtype, torch.float16, torch.float32
    ),
    "default dtype bfloat16": lambda: switched(
        torch.set_default_dtype, torch.bfloat16, torch.float32
    ),
    "default device": lambda: switched(torch.set_default_device, "meta", None),
    "a device as context": lambda: torch.device("meta"),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "backward in the caller's thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "views replayed": lambda: torch.autograd._force_original_view_tracking(True),
    "parameters swapped": lambda: switched(
        torch.__future__.set_swap_module_params_on_conversion, True, False
    ),
    "memory as it comes": lambda: switched(torch.use_deterministic_algorithms, False, True),
    "autocast, off": lambda: torch.autocast("cpu", enabled=False),
}
# what is saved is somebody else's then, and gradients are formed in the backward, with other
# roundings
HOOKS = {
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "saved tensors may be written": torch.autograd.graph.allow_mutation_on_saved_tensors,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_nothing(switch, thrifty_place):
    there = public.tensors(thrifty_place.device, torch.bfloat16)
    for name, call in public.CALLS.items():
        want = call(there, thrifty_place.impl)
        with SWITCHES[switch]():
            got = call(there, thrifty_place.impl)
        assert [(t.dtype, t.device, t.shape) for t in got] == [
            (t.dtype, t.device, t.shape) for t in want
        ], name
        assert all(map(torch.equal, got, want)), name


@pytest.mark.parametrize("hooks", HOOKS)
def test_saved_elsewhere(hooks, thrifty_place):
    there = public.tensors(thrifty_place.device)
    for name, call in public.CALLS.items():
        want = call(there, thrifty_place.impl)
        with HOOKS[hooks]():
            got = call(there, thrifty_place.impl)
        torch.testing.assert_close(
            got, want, rtol=1e-5, atol=1e-7, msg=lambda said, name=name: f"{name}: {said}"
        )
