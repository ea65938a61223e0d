"""The sanitizer's part of the one call for a GPU, rehearsed with a command that says what the real
one would."""

import os
import stat
import sys
import time

import pytest
import torch

for name in ("filelock", "pandas", "rich"):
    pytest.importorskip(name)
pytest.importorskip("triton")

from conftest import GPU  # noqa: E402
from guarded import Interpreter  # noqa: E402
from lossfuse.perf import gpu, sanitizer  # noqa: E402

OURS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at row_loss_kernel+0x110
=========     by thread (0,0,0) in block (3,0,0)
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x90 in label_rows_kernel
========= ERROR SUMMARY: 2 errors
"""
THEIRS = "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at cutlass_gemm+0x90\n========= ERROR SUMMARY: 1 error\n"
ENDED = "torch.float32, 40000 classes: done\n"
SAID = {
    "passes": (
        f"========= COMPUTE-SANITIZER\n{ENDED}========= ERROR SUMMARY: 0 errors\n",
        0,
        "passed",
        "nothing found",
    ),
    "no race": (
        f"{ENDED}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
        0,
        "passed",
        "nothing found",
    ),
    "it went away": (
        "bf16, 9 classes: head\n========= ERROR SUMMARY: 0 errors\n",
        0,
        "not run",
        "exit 0; ========= ERROR SUMMARY",
    ),
    "a race": (
        "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n",
        86,
        "failed",
        "3 found, in nothing it names",
    ),
    "ours": (OURS, 86, "failed", "2 found, in label_rows_kernel, row_loss_kernel"),
    "and the program failed": (
        OURS,
        1,
        "failed",
        "2 found, in label_rows_kernel, row_loss_kernel",
    ),
    "theirs": (ENDED + THEIRS, 86, "passed", "1 found, in cutlass_gemm"),
    "theirs, and the program died": (
        THEIRS,
        86,
        "not run",
        "1 found, in cutlass_gemm, and it did not end",
    ),
    "refuses": (
        "========= Error: Device not supported\n=========\n",
        255,
        "not run",
        "exit 255; ========= Error: Device not supported",
    ),
    "the program dies": (
        "RuntimeError: no GPU\n========= ERROR SUMMARY: 0 errors\n",
        1,
        "not run",
        "exit 1; ========= ERROR SUMMARY",
    ),
    "says nothing": ("", 0, "not run", "exit 0; it said nothing"),
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a command of this text on the path."""

    def fake(text):
        (tmp_path / "bin").mkdir(exist_ok=True)
        path = tmp_path / "bin" / sanitizer.COMMAND
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent))
        return str(path)

    return fake


@pytest.mark.parametrize("name", SAID)
def test_what_a_tool_says_is_judged(name):
    said, status, verdict, why = SAID[name]
    got = sanitizer._judged(said, status)
    assert got[0] == verdict and got[1].startswith(why)


def test_the_command_is_found_on_the_path_or_in_a_toolkit(fake, monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    found = fake("")
    assert sanitizer.find() == found
    monkeypatch.setenv("PATH", str(tmp_path))
    if not os.path.exists("/usr/local/cuda"):
        assert sanitizer.find() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer.find() == found


TELLS = """
import os, sys, time
tool, program = sys.argv[2], sys.argv[-2:]
assert sys.argv[1] == "--tool" and program == ["-m", "lossfuse.perf.sanitizer"] and os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
if tool == "synccheck":
    print("half a line", end="", flush=True)
    if os.fork() == 0:
        # the program is a child of the tool
        open(os.environ["CHILD"] + ".new", "w").write(str(os.getpid()))
        os.rename(os.environ["CHILD"] + ".new", os.environ["CHILD"])
    time.sleep(1000)
print("torch.float32, 40000 classes: done")
print(f"========= ERROR SUMMARY: {int(tool == 'initcheck')} errors")
sys.exit(86 if tool == "initcheck" else 0)
"""


def test_a_tool_that_hangs_is_stopped_with_what_it_has_started(
    fake, tmp_path, monkeypatch, time_is_up_when
):
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    time_is_up_when(tmp_path / "child")
    outcome = sanitizer.run(fake(TELLS), "synccheck", 2.0)
    assert outcome == sanitizer.Outcome("synccheck", "not run", "stopped after 2 s", "half a line")
    with pytest.raises(ProcessLookupError):
        # nor is the child there any more, once its new parent has noticed
        while True:
            os.kill(int((tmp_path / "child").read_text()), 0)
            time.sleep(0.01)


@pytest.mark.skipif(GPU, reason="it would run")
def test_the_program_runs_without_a_tool_first(monkeypatch):
    # here it ends because there is no device
    assert "exit 1; " in sanitizer.compile_first(600.0)
    assert sanitizer.compile_first(0.01) == "stopped after 0 s"


def test_what_tools_find_is_logged_and_summed_up(fake, tmp_path, monkeypatch):
    from rich.console import Console

    command = fake(TELLS)
    monkeypatch.setattr(sanitizer, "compile_first", lambda limit_seconds: "")
    outcomes = gpu._sanitize(command, tmp_path, time.monotonic() + 300, Console(quiet=True))
    assert [(o.tool, o.verdict) for o in outcomes] == [
        ("memcheck", "passed"),
        ("racecheck", "passed"),
        ("initcheck", "failed"),
    ]
    log = (tmp_path / "log.txt").read_text()
    assert all(f"$ compute-sanitizer --tool {tool}" in log for tool in sanitizer.TOOLS)
    where = {
        "device": "a",
        "torch": "2",
        "triton": "",
        "lossfuse": "0",
        "commit": "",
        "dirty": True,
        "date": "today",
    }
    summary, _ = gpu.summarize([], tmp_path / "absent.csv", where, "passed", "", outcomes, [])
    assert (
        "- memcheck passed: nothing found" in summary and "- initcheck failed: 1 found" in summary
    )
    late = gpu._sanitize(command, tmp_path, time.monotonic() + 1, Console(quiet=True))
    assert [o.why for o in late] == ["no time left"] * 3


def test_without_the_command_there_is_a_line(tmp_path, capsys):
    from rich.console import Console

    assert gpu._sanitize(None, tmp_path, time.monotonic() + 100, Console(width=200)) == []
    assert "compute-sanitizer: not looked for" in capsys.readouterr().out


@pytest.mark.skipif(GPU, reason="counts what the interpreter launches")
@pytest.mark.parametrize(
    ("v", "missing"),
    [(48, "split_row_kernel"), pytest.param(2051, "whole_row_kernel", marks=pytest.mark.slow)],
)
def test_the_program_launches_every_kernel(v, missing):
    with Interpreter() as watch:
        sanitizer.every_kernel(torch.device("cpu"), torch.float32, v, str)
    assert set(watch.launches) == sanitizer.kernel_names() - {missing}
