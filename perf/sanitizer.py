"""``compute-sanitizer`` over every kernel; as a program (``python -m lossfuse.perf.sanitizer``)
what it watches, each kernel once or more.

It watches memory of the driver, so torch must ask that for every tensor
(PYTORCH_NO_CUDA_MEMORY_CACHING): in a block of torch's own cache, what lies beside a tensor is
nobody's in particular, and what another tensor has left is initialized."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lossfuse

from ..ops.library import backend
from ..row_types import Upstream, Wants
from ..spec import LossSpec
from .environment import CHECKOUT, kill_all

TOOLS = ("memcheck", "racecheck", "initcheck")
COMMAND = "compute-sanitizer"
# the last word of the program
DONE = "done"
KERNELS = (
    "fused_rows",
    "label_rows",
    "linear_rows",
    "log_softmax_rows",
    "scale_rows",
    "soft_target_rows",
    "softmax_rows",
)


@dataclass(frozen=True)
class Outcome:
    """Of one tool: 'passed', 'failed' or 'not run', and why."""

    tool: str
    verdict: str
    why: str
    said: str


def find() -> str | None:
    """The command, on the path or in a CUDA toolkit."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{root}/{folder}" for root in roots if root for folder in ("bin", COMMAND)]
    return shutil.which(COMMAND) or next(
        (found for folder in folders if (found := shutil.which(COMMAND, path=folder))), None
    )


def run(command: str, tool: str, limit_seconds: float) -> Outcome:
    """One tool over the program of this module, stopped with everything it has started when its
    time is up."""
    program = [sys.executable, "-m", __name__]
    asked = [command, "--tool", tool, "--error-exitcode", "86", "--print-limit", "10000", *program]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        asked,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            # the program is not the tool
            kill_all(process)
            said, _ = process.communicate()
            return Outcome(tool, "not run", f"stopped after {limit_seconds:.0f} s", said)
        except BaseException:
            kill_all(process)
            raise
    return Outcome(tool, *_judged(said, process.returncode), said)


def compile_first(limit_seconds: float) -> str:
    """The program without a tool, so that tools find everything compiled; '' or what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit_seconds,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_seconds:.0f} s"
    return (
        ""
        if done.returncode == 0
        else f"exit {done.returncode}; {(done.stdout.strip().splitlines() or [''])[-1]}"
    )


def _judged(said: str, status: int) -> tuple[str, str]:
    """(verdict, why) of what a tool said."""
    summaries = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", said, re.MULTILINE)
    found = int(summaries[-1]) if summaries else 0
    ended = re.search(rf": {DONE}$", said, re.MULTILINE) is not None
    if found:
        kernels = sorted(
            set(re.findall(r"^=+ +at (?:0x[0-9a-f]+ in )?([A-Za-z_]\w*)", said, re.MULTILINE))
        )
        ours = [name for name in kernels if name in kernel_names()]
        # of kernels of torch or of cuBLAS it is not ours to answer for
        verdict = "failed" if ours or not kernels else "passed" if ended else "not run"
        return (
            verdict,
            f"{found} found, in {', '.join(ours or kernels) or 'nothing it names'}{', and it did not end' * (not ended)}",
        )
    if not summaries or status != 0 or not ended:
        last = [line for line in said.splitlines() if line.strip("= ")]
        return "not run", f"exit {status}; {last[-1].strip() if last else 'it said nothing'}"
    return "passed", "nothing found"


def kernel_names() -> set[str]:
    """Of everything that is launched."""
    modules = [importlib.import_module(f"lossfuse.kernels.{name}") for name in KERNELS]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def every_kernel(
    device: torch.device, dtype: torch.dtype, v: int, say: Callable[[str], None]
) -> None:
    """Calls over rows of ``v`` classes that together launch every kernel; ``say`` is told before
    each."""
    n, d = 5, 64
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * 3).to(dtype).to(device)

    def differentiated(losses: Sequence[Tensor], *leaves: Tensor) -> None:
        torch.autograd.grad(losses, leaves, [torch.full_like(loss, 3.0) for loss in losses])

    x = random(n, v).requires_grad_()
    ids, weight = (
        torch.tensor([0, v - 1, -100, v // 2, 1], device=device),
        torch.rand(v, generator=g).to(device),
    )
    soft = torch.softmax(random(n, v), 1)
    every: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 9.0, "weight": weight}
    for reduction in ("mean", "none"):
        for options in ({}, every):
            for inplace in (False, True):
                say(
                    f"cross entropy, {' '.join([reduction, *options, *(['in place'] if inplace else [])])}"
                )
                loss = lossfuse.cross_entropy(
                    x * 1.0, ids, reduction=reduction, inplace=inplace, impl="triton", **options
                )
                differentiated([loss], x)
    backend("triton").multiply_in_place(random(n, v), torch.tensor(3.0, device=device))
    cut, up = (
        LossSpec(label_smoothing=0.1, first_class=7, num_classes=v + 9),
        Upstream(*torch.ones(4, n, device=device)),
    )
    for target in (ids, soft):
        say("statistics")
        made = lossfuse.cross_entropy_stats(x, target, impl="triton")
        differentiated([t for t in (made.loss, made.lse, made.entropy) if t is not None], x)
        say("shard")
        backend("triton").shard_rows(
            x.detach(),
            target,
            weight,
            cut,
            Wants(entropy=True, argmax=True),
            target.is_floating_point(),
        )
        kept, dlogits = torch.ones(5, n, device=device), torch.empty_like(x)
        backend("triton").shard_grads(x.detach(), target, weight, kept, up, cut, dlogits, None)
    say("probabilities")
    differentiated([lossfuse.cross_entropy(x, soft, impl="triton")], x)
    say("labels")
    differentiated([lossfuse.binary_cross_entropy_with_logits(x, soft, impl="triton")], x)
    differentiated(
        [
            lossfuse.binary_cross_entropy_with_logits(
                x * 1.0, ids[:, None], inplace=True, impl="triton"
            )
        ],
        x,
    )
    say("log-probabilities")
    differentiated([lossfuse.log_softmax(x, 1, impl="triton")], x)
    say("head")
    hidden, head = random(n, d).requires_grad_(), random(v, d).requires_grad_()
    differentiated([lossfuse.linear_cross_entropy(hidden, head, ids, impl="triton")], hidden, head)
    lossfuse.linear_cross_entropy(hidden.detach(), head.detach(), ids, impl="triton")
    lossfuse.linear_cross_entropy_stats(hidden.detach(), head.detach(), ids, impl="triton")


def main() -> None:
    """Whole rows, and rows cut into slices on and between boundaries of 16 bytes."""

    def say(what: str) -> None:
        torch.cuda.synchronize()
        print(f"{dtype}, {v} classes: {what}", flush=True)

    for dtype in (torch.bfloat16, torch.float32):
        for v in (1000, 2051, 40_000):
            every_kernel(torch.device("cuda"), dtype, v, say)
    say(DONE)


if __name__ == "__main__":
    main()
