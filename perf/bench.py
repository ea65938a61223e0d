"""Loss and gradient of logits, ours beside torch's: time interleaved, memory apart, error against fp64, one row each."""

import datetime
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lossfuse

from .protocol import peak_extra_bytes, time_interleaved

if TYPE_CHECKING:
    from rich.console import Console

Loss = Callable[[Tensor, Tensor], Tensor]
VARIANTS: dict[str, Loss] = {
    "F.cross_entropy": F.cross_entropy,
    "F.cross_entropy(x.float())": lambda x, target: F.cross_entropy(x.float(), target),
    "lossfuse": lossfuse.cross_entropy,
}
BASELINE = "F.cross_entropy"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inputs(n: int, v: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits drawn from N(0, 2) whose target leads by 6 in every other row; a seventh of the rows is ignored."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, v, generator=g).mul_(2.0)
    target = torch.randint(0, v, (n,), generator=g)
    x[torch.arange(0, n, 2), target[::2]] += 6.0
    target[::7] = -100
    return x.to(dtype).to(device).requires_grad_(), target.to(device)


def gradient(loss_fn: Loss, x: Tensor, target: Tensor) -> Tensor:
    """Forward and backward of the loss alone; the gradient is handed out and not accumulated, as a matrix product would take it."""
    return torch.autograd.grad(loss_fn(x, target), x)[0]


def worst_error(loss_fn: Loss, x: Tensor, target: Tensor, rows: int = 64) -> float:
    """Largest error of an entry of the gradient relative to itself, on the first rows, against fp64 of the same numbers."""
    x, target = x[:rows].detach().requires_grad_(), target[:rows]
    got = gradient(loss_fn, x, target).double()
    want = gradient(F.cross_entropy, x.detach().double().requires_grad_(), target)
    return float(((got - want).abs() / want.abs().clamp(min=1e-30)).where(want != 0, got.abs()).max())


def environment(device: torch.device) -> dict[str, Any]:
    """What a row must say so that it can be repeated."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "torch": torch.__version__,
        "lossfuse": lossfuse.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "thp": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")


def measure(n: int, v: int, dtype_name: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per variant."""
    x, target = inputs(n, v, DTYPES[dtype_name], device)
    calls = {name: partial(gradient, f, x, target) for name, f in VARIANTS.items()}
    times = time_interleaved(calls, device, repeats)
    size = x.numel() * x.element_size()
    rows = []
    for name, f in VARIANTS.items():
        peak = peak_extra_bytes(calls[name], device)
        rows.append(
            {
                "case": f"{n}x{v}", "dtype": dtype_name, "variant": name, "n": n, "v": v,
                "ms_p50": times[name].p50, "ms_p20": times[name].p20, "ms_p80": times[name].p80,
                "speedup": times[BASELINE].p50 / times[name].p50,
                "peak_extra_bytes": peak, "peak_in_logits": None if peak is None else peak / size,
                "worst_relative_error": worst_error(f, x, target),
            }
        )  # fmt: skip
    return rows


def main(shapes: list[tuple[int, int]], dtypes: list[str], repeats: int, out: Path | None) -> None:
    """Measure every shape in every dtype; print a table, and append the rows to a CSV if asked."""
    import pandas as pd
    from rich.console import Console

    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stamp = environment(device)
    rows: list[dict[str, Any]] = []
    for n, v in shapes:
        for dtype in dtypes:
            with console.status(f"{n} x {v} {dtype}"):
                rows += measure(n, v, dtype, device, repeats)
    show(rows, stamp, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame([row | stamp for row in rows])
        frame.to_csv(out, mode="a", header=not out.exists(), index=False)
        console.print(f"rows: {out}")


def show(rows: list[dict[str, Any]], stamp: dict[str, Any], console: "Console") -> None:
    """A line per variant."""
    from rich.table import Table

    title = f"Loss and gradient, {stamp['device']}, torch {stamp['torch']}, THP_MEM_ALLOC_ENABLE={stamp['thp']}"
    caption = "memory beyond the logits in units of them; error of the worst entry of the gradient relative to itself"
    table = Table("case", "variant", "ms", "p20-p80", "faster", "memory", "error", title=title, caption=caption)
    for row in rows:
        memory = "-" if row["peak_in_logits"] is None else f"{row['peak_in_logits']:.2f}"
        spread = f"{row['ms_p20']:.0f}-{row['ms_p80']:.0f}"
        name = row["variant"].replace("cross_entropy", "ce")
        cells = [f"{row['case']} {row['dtype']}", name, f"{row['ms_p50']:.1f}", spread, f"{row['speedup']:.2f}", memory]
        cells.append(f"{row['worst_relative_error']:.1e}")
        table.add_row(*cells, end_section=row["variant"] == list(VARIANTS)[-1])
    console.print(table)
