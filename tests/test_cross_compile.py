"""Every kernel compiles for GPUs without register spills and with 16-byte accesses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STATISTICS = {"row_loss_kernel", "row_parts_kernel", "merge_parts_kernel", "soft_row_loss_kernel"}
GRADIENTS = {"row_grads_kernel", "soft_row_grads_kernel"}
SWEEPS = STATISTICS | GRADIENTS
TOTALS = {"prepare_rows_kernel", "total_kernel"}
FUSED = {"whole_row_kernel", "split_row_kernel", "scale_rows_kernel"} | TOTALS
LABELS = {"label_rows_kernel"}
LOG_SOFTMAX = {"log_softmax_kernel", "log_softmax_grad_kernel"}
# only for devices that copy tiles by descriptor, and in half precision
LINEAR = {"tile_stats_kernel", "merge_tiles_kernel"}
# most instructions an element of bf16 logits on sm_90, by kernel and options: the time of memory on
# an H100 is that of 22 for a read, and of 45 for a read and a write (Triton 3.7.1)
INSTRUCTIONS = {
    ("row_loss_kernel", "plain"): 12,
    ("row_loss_kernel", "entropy and argmax"): 16,
    ("row_grads_kernel", "plain"): 15,
}
# bytes that may be spilled to hold one more program an SM, and loads and stores of them: a dozen of
# each, once a row
SPILLED = 80
# what other versions of Triton may add: a tenth of the instructions, bytes that are spilled, also
# where registers are limited, and registers of a thread
MARGIN, FEW, MORE, REGISTERS_MORE = 1.1, 16, 80, 24
# programs an SM of rows that are split, by their slice, in bf16 without softcap and smoothing
PROGRAMS = {16384: 2, 8192: 4, 4096: 6}
# registers of an SM, and SMs of the smallest GPU that must be able to split the longest rows (A10)
REGISTERS, SMS = 65536, 72


ALL = [
    (target, dtype)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for dtype in ("bf16", "fp16", "fp32", "fp32 to bf16")
]
# up to a minute each: one of each vendor by default, the others are slow
FIRST = [("sm_90", "bf16"), ("sm_90", "fp32 to bf16"), ("gfx942", "bf16")]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [pytest.param(*case, marks=() if case in FIRST else pytest.mark.slow) for case in ALL],
)
def test_kernels_compile_without_spills(target, dtype):
    triton = pytest.importorskip("triton")
    from lossfuse.kernels import linear_rows

    counted = triton.__version__.startswith("3.7.")

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "tests" / "cross_compile.py"),
        target,
        dtype,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if "ROCm linker" in done.stderr:
        pytest.skip("this triton compiles for AMD where ROCm is installed")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = SWEEPS | LABELS | LOG_SOFTMAX | FUSED - {"split_row_kernel"}
    if dtype == "fp32 to bf16":
        expected = GRADIENTS | {"whole_row_kernel"}
    if target.startswith("sm"):
        expected |= {"split_row_kernel"}
    if target in ("sm_90", "sm_100") and not dtype.startswith("fp32"):
        expected |= LINEAR
    assert {row["kernel"] for row in rows} == expected
    assert {row["dtype"] for row in rows} == {dtype}
    launches = {
        (row["kernel"], row["options"], row.get("block_v"), row.get("slice"), row.get("edges"))
        for row in rows
    }
    assert len(launches) == len(rows)
    for row in rows:
        # the widest slice takes every register, and on sm_100 two more, which are a few bytes
        widest = row.get("slice") == 16384 and target == "sm_100"
        spilled = SPILLED if row["limited"] else 12 if widest else 0
        more = 0 if counted else MORE if row["limited"] else FEW
        assert row["spills"] <= spilled + more, row
        if target == "sm_90" and dtype == "bf16":
            most = INSTRUCTIONS.get((row["kernel"], row["options"]))
            elements = (row.get("block_v") or 1) / (32 * row["warps"])
            margin = 1 if counted else MARGIN
            assert most is None or row["instructions"] <= most * elements * margin, row
            if row["kernel"] == "split_row_kernel" and row["options"] == "plain":
                programs = REGISTERS // (row["registers"] * 32 * row["warps"])
                assert programs >= PROGRAMS[row["slice"]], row
        if row["kernel"] in SWEEPS | LABELS:
            # statistics of probabilities hold nine numbers per class: one program of 256 threads
            # an SM
            crowded = row["kernel"] == "soft_row_loss_kernel" and row["options"] in (
                "statistics",
                "shard, every option",
            )
            most = (144 if crowded else 128) + (0 if counted else REGISTERS_MORE)
            assert row["registers"] <= most, row
        if row["kernel"] == "tile_stats_kernel":
            assert row["tma"] > 0 and row["mma"] > 0, row
            assert row["shared"] <= linear_rows.TILE.shared_memory(2), row
        if target.startswith("sm") and row["kernel"] not in LINEAR | TOTALS:
            # 16 bytes a thread, except for the target's logit, which is loaded and stored, and for
            # the edges of a split row
            most_narrow = {
                "whole_row_kernel": 2,
                "split_row_kernel": 6,
                "scale_rows_kernel": 0,
                "row_loss_kernel": 3,
                "row_parts_kernel": 1,
                "merge_parts_kernel": 2,
                "row_grads_kernel": 4,
            }.get(row["kernel"], 0 if row["kernel"] in LABELS | LOG_SOFTMAX else 1)
            assert row["narrow"] <= most_narrow, row
            assert row["wide"] > 0 or row["kernel"] == "merge_parts_kernel", row
        if target.startswith("sm") and row["kernel"] not in LABELS | LOG_SOFTMAX:
            # scale * x - maximum must not be one instruction: the maximum was rounded
            assert row["fused"] == 0, row
        if row["kernel"] == "split_row_kernel":
            # programs of a row wait for one another: all of 300,000 classes must be resident
            programs = REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["warps"])
            assert programs >= 2 and programs * SMS > 300_000 // row["slice"], row


def test_every_kernel_is_cross_compiled():
    """A kernel added to the folder must be added to this file."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        found |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert found == SWEEPS | LABELS | LOG_SOFTMAX | FUSED | LINEAR
