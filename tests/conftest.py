"""Where tests run: every implementation on the CPU (Triton in its interpreter), or all of them on a
GPU when there is one."""

import os
import tempfile

import torch

# read when a kernel module is imported, so it is set before any test can import one
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Inductor's code is for one instruction set, which is no part of its cache's key: another
# capability would run this one's (torch 2.13)
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/lossfuse-inductor-{os.getuid() if hasattr(os, 'getuid') else ''}"
    f"-{torch.backends.cpu.get_cpu_capability()}",
)
# read when CUDA starts; without it torch before 2.11 has no products where algorithms must be
# deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import contextlib
import importlib.util
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def patch_once() -> None:
    """Keep Triton's interpreter from looking for what to patch at every call of a helper within a
    kernel: half of its time (3.7)."""
    from triton.runtime import interpreter

    real, core = interpreter._patch_lang, interpreter.tl.core

    def patch(fn: Any) -> Any:
        langs = [
            lang
            for lang in (interpreter.tl, core)
            if any(value is lang for value in fn.__globals__.values())
        ]
        # a member that has been patched is no builtin any more
        done = len(langs) > 0 and not any(core.is_builtin(lang.load) for lang in langs)
        return interpreter._LangPatchScope() if done else real(fn)

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    patch_once()


@dataclass(frozen=True)
class Place:
    """An implementation and the device it runs on."""

    impl: str
    device: str

    def __str__(self) -> str:
        return f"{self.impl}-{self.device}"


GPU = torch.cuda.is_available()
PLACES = [
    Place("reference", "cpu"),
    Place("torch", "cpu"),
    *([] if GPU else [Place("triton", "cpu")]),
]
if GPU:
    PLACES += [Place("reference", "cuda"), Place("torch", "cuda"), Place("triton", "cuda")]


interpreted_only = pytest.mark.skipif(
    GPU, reason="of Triton's interpreter, and where there is a GPU kernels run on that"
)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if GPU else "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """The device of kernels that are called by name."""
    return request.param


def places(reference: bool = True, thrifty: bool = False) -> list[Any]:
    """Parameters of a test that runs everywhere, or everywhere but in the reference; with
    ``thrifty`` in Triton's interpreter only among slow tests."""
    made = []
    for place in PLACES:
        interpreted = (place.impl, place.device) == ("triton", "cpu")
        marks = [pytest.mark.slow] if thrifty and interpreted else []
        marks += [pytest.mark.gpu] if place.device != "cpu" else []
        if reference or place.impl != "reference":
            made.append(pytest.param(place, marks=marks, id=str(place)))
    return made


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "not_reference: the fixture `place` leaves out the reference",
        "slow_interpreted: Triton's interpreter takes seconds here, so it runs with slow tests",
    ):
        config.addinivalue_line("markers", line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker
    given = {name for m in metafunc.definition.iter_markers("parametrize") for name in m.args[:1]}
    if "place" in metafunc.fixturenames and "place" not in given:
        some = places(mark("not_reference") is None, mark("slow_interpreted") is not None)
        metafunc.parametrize("place", some, indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    """An implementation and a device, one after the other; see the two marks above."""
    return request.param


@pytest.fixture(params=places(reference=False))
def fast_place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture(params=places(thrifty=True))
def thrifty_place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture(params=places(reference=False, thrifty=True))
def thrifty_fast_place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty holds NaN in tests: a result that is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """A wait for the device raises."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def time_is_up_when(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """The first time limit of every process started from here on ends once a file exists, on a
    machine of any speed."""

    def when(path: Path) -> None:
        real, expired = subprocess.Popen.communicate, set()

        def communicate(process: Any, input: Any = None, timeout: float | None = None) -> Any:
            if timeout is None or process in expired:
                return real(process, input, timeout)
            expired.add(process)
            while not path.exists() and process.poll() is None:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(process.args, timeout)

        monkeypatch.setattr(subprocess.Popen, "communicate", communicate)

    return when


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not GPU:
        said = "no GPU: Triton kernels ran in the interpreter and were cross-compiled, none ran"
        terminalreporter.write_line(f"{said} on a device")
