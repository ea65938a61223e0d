"""torch's switches, for a process or a block: results that they do not speak of stay the same, bit
for bit."""

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


swap = torch.__future__.set_swap_module_params_on_conversion
SWITCHES = {
    **{
        f"default {dtype}": lambda dtype=dtype: switched(
            torch.set_default_dtype, dtype, torch.float32
        )
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    },
    "default device": lambda: switched(torch.set_default_device, "meta", None),
    "a device as context": lambda: torch.device("meta"),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "backward in the caller's thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "views replayed": lambda: torch.autograd._force_original_view_tracking(True),
    "parameters swapped": lambda: switched(swap, True, False),
    "uninitialized memory": lambda: switched(torch.use_deterministic_algorithms, False, True),
    "autocast, off": lambda: torch.autocast("cpu", enabled=False),
}
# they take saved tensors, and gradients are computed in the backward, with other roundings
HOOKS = {
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "saved tensors may be written": torch.autograd.graph.allow_mutation_on_saved_tensors,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.slow_interpreted
def test_a_switch_changes_nothing(switch, place):
    there = public.tensors(place.device, torch.bfloat16)
    for name, call in public.CALLS.items():
        want = call(there, place.impl)
        with SWITCHES[switch]():
            got = call(there, place.impl)
        kinds = [[(t.dtype, t.device, t.shape) for t in made] for made in (got, want)]
        assert kinds[0] == kinds[1] and all(map(torch.equal, got, want)), name


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.slow_interpreted
def test_saved_elsewhere(hooks, place):
    there = public.tensors(place.device)
    for name, call in public.CALLS.items():
        want = call(there, place.impl)
        with HOOKS[hooks]():
            got = call(there, place.impl)
        say = lambda said, name=name: f"{name}: {said}"  # noqa: E731
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, msg=say)
