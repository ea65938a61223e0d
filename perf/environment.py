"""Columns that make a row repeatable: device, versions, commit."""

import datetime
import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import lossfuse

# variables of allocators and threads change times by factors
SETTINGS = (
    "THP_MEM_ALLOC_ENABLE",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_INTERPRET",
)
# time for pytest's summary after an interrupt
LAST_WORDS_SECONDS = 15.0
# a process started in the background may ignore SIGINT, and pytest with it
INTERRUPTIBLE = (
    "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " sys.exit(pytest.main(sys.argv[1:]))"
)
CHECKOUT = Path(__file__).resolve().parent.parent


def stamp(device: torch.device, tests: str = "not run") -> dict[str, Any]:
    """The columns that are equal in all rows of a run."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    )
    return {
        "device": name,
        "settings": " ".join(f"{key}={os.environ[key]}" for key in SETTINGS if key in os.environ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "lossfuse": lossfuse.__version__,
        "commit": _git("rev-parse", "--short=10", "HEAD"),
        # new rows do not change the code
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!perf/results")
        ),
        "tests": tests,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def version(package: str) -> str:
    """The installed version, or ''."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def run_tests(*arguments: str, limit_seconds: float | None = None) -> tuple[str, str]:
    """Run pytest in the checkout: 'passed', 'failed' or 'not run', and its output.

    After ``limit_seconds`` it is interrupted and reports the failures so far."""
    if not (CHECKOUT / "tests").is_dir():
        return "not run", "an installed package has no tests"
    command = [sys.executable, "-c", INTERRUPTIBLE, "-q", *arguments]
    with subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                said, _ = process.communicate(timeout=LAST_WORDS_SECONDS)
            except subprocess.TimeoutExpired:
                kill_all(process)
                said, _ = process.communicate()
            broken = re.search(r"^(FAILED|ERROR) ", said, re.MULTILINE) is not None
            return "failed" if broken else "not run", f"{said}\nstopped after {limit_seconds:.0f} s"
        except BaseException:
            kill_all(process)
            raise
    # 5: no test was collected
    return {0: "passed", 5: "not run"}.get(process.returncode, "failed"), said


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill the leader of a session and its children, which would stay on the device."""
    os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()


def _git(*arguments: str) -> str:
    # an installed package may lie inside another repository
    if not (CHECKOUT / ".git").exists():
        return ""
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "CPU",
    )
