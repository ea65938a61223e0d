"""Rows of a benchmark with invented numbers, for tests of the dashboard."""

import itertools
import random
from typing import Any

from lossfuse.perf import rows

SPEED = {
    "lossfuse": 0.92,
    "lossfuse linear": 0.85,
    "lossfuse reference": 0.22,
    "lossfuse in place": 0.95,
    "F.cross_entropy": 0.31,
    "linear + F.cross_entropy": 0.66,
    "F.cross_entropy(x.float())": 0.19,
    "linear + F.cross_entropy(x.float())": 0.51,
    "torch.compile": 0.57,
    "F.linear_cross_entropy": 0.7,
    "Liger": 0.63,
    "quack": 0.88,
    "flash-attention": 0.6,
    "fla": 0.55,
    "CCE": 0.8,
}
LOGITS = (
    "lossfuse",
    "lossfuse reference",
    "F.cross_entropy",
    "F.cross_entropy(x.float())",
    "torch.compile",
    "Liger",
    "quack",
)
HEAD = (
    "lossfuse linear",
    "linear + F.cross_entropy",
    "linear + F.cross_entropy(x.float())",
    "torch.compile",
    "Liger",
    "CCE",
)
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def row(**fields: Any) -> dict[str, Any]:
    """A row of the case llama2 without errors, with ``fields`` replaced."""
    default = {
        "schema": rows.VERSION,
        "case": "llama2",
        "op": "logits",
        "mode": "forward+backward",
        "dtype": "bf16",
        "n": 8192,
        "v": 32000,
        "d": None,
        "method": "lossfuse",
        "status": "ok",
        "note": "",
        "ms_p50": 1.0,
        "ms_p20": 0.98,
        "ms_p80": 1.05,
        "repeats": 30.0,
        "ideal_ms": 0.9,
        "peak_extra_bytes": 8192.0 * 32000 * 2,
        "loss_error": 3e-7,
        "grad_error": 4e-3,
        "copy_gbps": 2900.0,
        "matmul_tflops": None,
        "device": "NVIDIA H100 80GB HBM3",
        "settings": "",
        "python": "3.12.3",
        "torch": "2.9.0+cu128",
        "triton": "3.5.0",
        "lossfuse": "0.1.0",
        "package": "",
        "commit": "a1b2c3d",
        "dirty": False,
        "tests": "passed",
        "date": "2026-11-20T10:00:00+00:00",
    }
    assert set(fields) <= set(default), set(fields) - set(default)
    return default | fields


def bounds_row(**known: Any) -> dict[str, Any]:
    """One row of errors against bounds."""
    about = {"case": "all equal", "op": "logits", "dtype": "fp32", "n": 4, "v": 2053, "d": None}
    found = {"method": "torch", "output": "loss", "ratio": 0.3, "error": 3e-6, "bound": 1e-5}
    where = {"torch": "2", "commit": "abc", "dirty": False, "date": "2026-01-01"}
    return about | found | {"place": "2"} | where | known


MACHINES = [
    ("NVIDIA H100 80GB HBM3", "", 2.9e9, 6e11),
    ("Intel Xeon Platinum 8488C, 16 threads", "THP_MEM_ALLOC_ENABLE=1", 1.2e7, 9e8),
]
FAILURES = {
    ("gemma3", "Liger"): ("wrong", "gradient differs: worst entry 0.31 of itself, at row 12"),
    ("unaligned", "quack"): ("failed", "AssertionError: V must be a multiple of 8"),
}
# peak memory in units of the logits; 3 for the others
LEAN = {"lossfuse": 1, "lossfuse linear": 0.12, "CCE": 0.05, "quack": 1, "Liger": 1}


def many(
    cases: dict[str, tuple[int, int | None, int]] | None = None,
    runs: int = 6,
    devices: int = 2,
    methods: int = 7,
) -> list[dict[str, Any]]:
    """Rows of several devices, runs, ops, dtypes and modes; some report errors."""
    from lossfuse.perf.cases import CASES

    rng = random.Random(0)
    cases = cases or {name: (case.rows["cuda"], case.d, case.v) for name, case in CASES.items()}
    result = []
    for device, run in itertools.product(range(devices), range(runs)):
        name_and_settings = (
            ("NVIDIA H100 80GB HBM3", ""),
            ("Intel Xeon Platinum 8488C, 16 threads", "THP_MEM_ALLOC_ENABLE=1"),
        )[device % 2]
        for name, (n, d, v) in cases.items():
            for dtype, mode in (
                ("fp32", "forward+backward"),
                ("bf16", "forward+backward"),
                ("bf16", "forward"),
                ("bf16", "no_grad"),
            ):
                size, passes = n * v * ITEMSIZE[dtype], 2 if mode == "forward+backward" else 1
                ideal = (
                    passes * size / (2.9e9, 1.2e7)[device % 2]
                    if d is None
                    else 2 * n * v * d * (2 * passes - 1) / (6e11, 9e8)[device % 2]
                )
                for method in (
                    (LOGITS if d is None else HEAD) + tuple(f"peer {i}" for i in range(9))
                )[:methods]:
                    share = (
                        SPEED.get(method, 0.4)
                        * rng.uniform(0.93, 1.03)
                        * (0.85 + 0.03 * run if "lossfuse" in method else 1)
                    )
                    ms = ideal / share
                    lean = {
                        "lossfuse": 1,
                        "lossfuse linear": 0.12,
                        "CCE": 0.05,
                        "quack": 1,
                        "Liger": 1 if d is None else 0.3,
                    }.get(method, 3)
                    broken: dict[str, Any] = {}
                    if (name, method) == ("gemma3", "Liger"):
                        broken = {
                            "status": "wrong",
                            "note": "gradient differs: worst entry 0.31 of itself, at row 12",
                        }
                    if method.endswith("(x.float())") and n * v > 2e9:
                        broken = {"status": "out of memory", "note": "tried to allocate 8.0 GiB"}
                    if (name, method) == ("unaligned", "quack"):
                        broken = {
                            "status": "failed",
                            "note": "AssertionError: V must be a multiple of 8",
                        }
                    numbers = {
                        "ms_p50": ms,
                        "ms_p20": ms * 0.97,
                        "ms_p80": ms * rng.uniform(1.02, 1.1),
                        "peak_extra_bytes": lean * size * passes / 2,
                        "loss_error": rng.uniform(1, 9) * 1e-7,
                        "grad_error": rng.uniform(1, 9) * (1e-6 if dtype == "fp32" else 1e-3),
                    }
                    result.append(
                        row(
                            case=name,
                            op="logits" if d is None else "head",
                            mode=mode,
                            dtype=dtype,
                            n=n,
                            v=v,
                            d=d,
                            method=method,
                            ideal_ms=ideal,
                            device=name_and_settings[0],
                            settings=name_and_settings[1],
                            commit=f"{0xA1B2C30 + 4919 * run:07x}",
                            date=f"2026-11-{10 + run:02d}T1{device}:00:00+00:00",
                            **(dict.fromkeys(numbers) | broken if broken else numbers),
                        )
                    )
    return result
