"""Where tests run: every implementation on the CPU (Triton in its interpreter), or all of them on a GPU when there is one."""

import os

import torch

# read when a kernel module is imported, so it is set before any test can import one
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Place:
    """An implementation and the device it runs on."""

    impl: str
    device: str

    def __str__(self) -> str:
        return f"{self.impl}-{self.device}"


GPU = torch.cuda.is_available()
PLACES = [Place("reference", "cpu"), Place("torch", "cpu"), *([] if GPU else [Place("triton", "cpu")])]
if GPU:
    PLACES += [Place("reference", "cuda"), Place("torch", "cuda"), Place("triton", "cuda")]


def _marked(place: Place) -> object:
    return pytest.param(place, marks=pytest.mark.gpu if place.device != "cpu" else ())


@pytest.fixture(params=map(_marked, PLACES), ids=str)
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture(params=[_marked(p) for p in PLACES if p.impl != "reference"], ids=str)
def fast_place(request: pytest.FixtureRequest) -> Place:
    """The implementations with kernels and blocks of their own."""
    return request.param


def _thrifty(place: Place) -> object:
    """Triton's interpreter takes seconds where the others take milliseconds."""
    return pytest.param(place, marks=pytest.mark.slow) if (place.impl, place.device) == ("triton", "cpu") else _marked(place)


@pytest.fixture(params=map(_thrifty, PLACES), ids=str)
def thrifty_place(request: pytest.FixtureRequest) -> Place:
    """``place``, but in the interpreter only if slow tests are asked for."""
    return request.param


@pytest.fixture(params=[_thrifty(p) for p in PLACES if p.impl != "reference"], ids=str)
def thrifty_fast_place(request: pytest.FixtureRequest) -> Place:
    """``fast_place``, but in the interpreter only if slow tests are asked for."""
    return request.param


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty holds NaN in tests: a result that is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not GPU:
        terminalreporter.write_line("no GPU: Triton kernels ran in the interpreter and were cross-compiled, none ran on a device")
