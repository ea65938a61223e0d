"""Forked and spawned processes compute the numbers of their parent, and a process ends quietly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import atexit, multiprocessing, os, sys, threading, time, warnings

import torch
import torch.multiprocessing
import torch.nn.functional as F

import lossfuse
from lossfuse.backends import threads, torch_rows

# so that a small call is shared out
torch_rows.THREAD_LEAST_BYTES, torch_rows.CPU_BLOCK_BYTES = 1 << 10, 1 << 13
threads.workers = lambda: 3
# Python 3.12 knows what this does
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


def check(where):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=g).requires_grad_() for rows in (60, 40))
    ids, leaves = torch.randint(0, 40, (60,), generator=g), (hidden, weight)
    want = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, ids), leaves)
    losses = [lossfuse.cross_entropy(hidden @ weight.T, ids, inplace=i) for i in (False, True)]
    for loss in (*losses, lossfuse.linear_cross_entropy(hidden, weight, ids)):
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), want)
    print(where, flush=True)


def check_alone(where):
    # as a DataLoader's workers do: a forked process has none of OpenMP's threads, for which torch's
    # own operators would wait
    torch.set_num_threads(1)
    check(where)


def child(context, how, when):
    process = context.Process(target=check_alone, args=(f"{how} {when}",))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        print("hangs:", how, when)


def children(when):
    if hasattr(os, "fork"):
        child(multiprocessing.get_context("fork"), "fork", when)
        child(torch.multiprocessing.get_context("fork"), "torch's fork", when)


def after_main():
    threading.main_thread().join()
    check("a thread after the main one")


if __name__ == "__main__":
    children("after import")
    atexit.register(check, "at exit")
    check("here")
    assert threads._pool is not None
    children("after first use")
    for how in sys.argv[1:]:
        of = torch.multiprocessing if how.startswith("torch") else multiprocessing
        child(of.get_context("spawn"), how, "after first use")
    threading.Thread(target=after_main).start()
"""


def run(tmp_path, *arguments):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # a backward starts autograd's thread for every GPU, and with those torch's backward refuses to
    # run after a fork
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2000)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def expected(*spawned):
    whens = ("after import", "after first use") if hasattr(os, "fork") else ()
    forked = [f"{how} {when}" for when in whens for how in ("fork", "torch's fork")]
    spawned = [f"{how} after first use" for how in spawned]
    return sorted([*forked, *spawned, "here", "a thread after the main one", "at exit"])


def test_forks_and_the_end_of_a_process(tmp_path):
    assert sorted(run(tmp_path)) == expected()


@pytest.mark.slow
def test_spawned_processes(tmp_path):
    assert sorted(run(tmp_path, "spawn", "torch's spawn")) == expected("spawn", "torch's spawn")
