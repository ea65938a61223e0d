"""Every kernel compiles for GPUs that are not here, without spills and with full-width accesses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SWEEPS = {"row_loss_kernel", "row_grads_kernel", "soft_row_loss_kernel", "soft_row_grads_kernel"}
FUSED = {"whole_row_kernel", "split_row_kernel", "scale_rows_kernel"}
SIGMOID = {"sigmoid_rows_kernel"}
LOG_SOFTMAX = {"log_softmax_kernel", "log_softmax_grad_kernel", "nll_kernel", "nll_grad_kernel"}
# only where tiles are copied by descriptor, and of half precision
LINEAR = {"tile_stats_kernel", "merge_tiles_kernel"}
# registers of a multiprocessor; the fewest multiprocessors of a GPU whose longest rows are to be
# split (A10: 72)
REGISTERS, MULTIPROCESSORS = 65536, 72


ALL = [
    (target, dtype)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for dtype in ("bf16", "fp16", "fp32", "fp32 to bf16")
]
# up to a minute each: the quickest of each vendor by default, all the others with -m slow
FIRST = [("sm_90", "fp32 to bf16"), ("gfx942", "bf16")]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [pytest.param(*case, marks=() if case in FIRST else pytest.mark.slow) for case in ALL],
)
def test_kernels_compile_without_spills(target, dtype):
    pytest.importorskip("triton")
    from lossfuse.kernels import linear_rows

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
    expected = SWEEPS | SIGMOID | LOG_SOFTMAX | FUSED - {"split_row_kernel"}
    if dtype == "fp32 to bf16":
        expected = {"row_grads_kernel", "soft_row_grads_kernel", "whole_row_kernel"}
    if target.startswith("sm"):
        expected |= {"split_row_kernel"}
    if target in ("sm_90", "sm_100") and not dtype.startswith("fp32"):
        expected |= LINEAR
    assert {row["kernel"] for row in rows} == expected
    # every width of the tables, plain and with every option
    assert {row["dtype"] for row in rows} == {dtype}
    assert len(
        {(row["kernel"], row["options"], row.get("block_v"), row.get("slice")) for row in rows}
    ) == len(rows)
    for row in rows:
        assert row["spills"] == 0, row
        if row["kernel"] in SWEEPS | SIGMOID:
            # statistics of probabilities with every option hold nine numbers a class: one program
            # of 256 threads a multiprocessor
            crowded = row["kernel"] == "soft_row_loss_kernel" and row["options"] in (
                "statistics",
                "shard, every option",
            )
            assert row["registers"] <= (144 if crowded else 128), row
        if row["kernel"] == "tile_stats_kernel":
            assert row["tma"] > 0 and row["mma"] > 0, row
            # what linear_rows.runs_on asks of a device
            assert row["shared"] <= linear_rows.TILE.shared_memory(2), row
        if target.startswith("sm") and row["kernel"] not in LINEAR | {"nll_kernel"}:
            # 16 bytes a thread, but for the one logit of the target, read and written, and the
            # edges of a split row
            most_narrow = {
                "whole_row_kernel": 2,
                "split_row_kernel": 6,
                "scale_rows_kernel": 0,
            }.get(row["kernel"], 0 if row["kernel"] in SIGMOID | LOG_SOFTMAX else 1)
            assert row["wide"] > 0 and row["narrow"] <= most_narrow, row
        if target.startswith("sm") and row["kernel"] not in SIGMOID | LOG_SOFTMAX:
            # scale * x - maximum must not be one instruction: the maximum was rounded
            assert row["fused"] == 0, row
        if row["kernel"] == "split_row_kernel":
            # programs of a row wait for one another: all of 300 000 classes must fit at once
            per_multiprocessor = REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["warps"])
            assert (
                per_multiprocessor >= 2
                and per_multiprocessor * MULTIPROCESSORS > 300_000 // row["slice"]
            ), row


def test_every_kernel_is_compiled_here():
    """A kernel added to the folder must be added to this file."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        found |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert found == SWEEPS | SIGMOID | LOG_SOFTMAX | FUSED | LINEAR
