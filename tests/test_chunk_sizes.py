"""How many rows a chunk has: as few equal chunks as the bytes allow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossfuse import LinearOptions
from lossfuse.ops.head_chunks import ROW_ALIGNMENT, chunk_rows, padded

GiB = 1 << 30
BF16, FP32 = torch.bfloat16, torch.float32
# the bfloat16 sum of gradients needs fewer rows to hide
LEAN = LinearOptions(logits_dtype=BF16, acc_dtype=BF16)

CASES = {
    "Llama 3, 1 GiB of logits": ((8192, 4096, 128256, BF16, LinearOptions()), 2048),
    "Llama 3, lean": ((8192, 4096, 128256, BF16, LEAN), 4096),
    "Gemma 2, what the sums need": ((8192, 2304, 256000, BF16, LinearOptions()), 2048),
    "a narrow head needs rows for its tiles": ((16384, 512, 256000, BF16, LinearOptions()), 4096),
    "a small vocabulary has enough": ((16384, 4096, 32000, BF16, LinearOptions()), 4096),
    "one chunk of all": ((300, 4096, 128256, BF16, LinearOptions()), 300),
    "equal chunks, not one of 4096 and one of 8": (
        (4104, 4096, 32000, BF16, LinearOptions()),
        2176,
    ),
    "a single row": ((8192, 4096, 128256, BF16, LinearOptions(chunk_bytes=1)), 1),
    "as many bytes as asked": (
        (8192, 4096, 128256, BF16, LinearOptions(chunk_bytes=GiB // 4)),
        512,
    ),
    "more than there is": ((100, 8, 32, FP32, LinearOptions(chunk_bytes=GiB)), 100),
}


@pytest.mark.parametrize("name", CASES)
def test_on_an_accelerator(name):
    arguments, rows = CASES[name]
    assert chunk_rows(*arguments, cpu=False) == rows


@pytest.mark.parametrize(
    ("n", "v", "dtype", "rows"),
    [
        (8192, 128256, FP32, 512),
        (8192, 1_000_000, FP32, 256),
        (8192, 100, FP32, 512),
        (10, 100, FP32, 10),
        (0, 100, FP32, 1),
    ],
)
def test_on_a_cpu(n, v, dtype, rows):
    assert chunk_rows(n, 64, v, dtype, LinearOptions(), cpu=True) == rows


@pytest.mark.parametrize(
    ("v", "stride"), [(1, 16), (16, 16), (17, 32), (128256, 128256), (50257, 50272)]
)
def test_rows_start_where_accesses_are_wide(v, stride):
    assert padded(v) == stride and stride % ROW_ALIGNMENT == 0


@given(
    n=st.integers(0, 100_000),
    d=st.sampled_from([0, 1, 64, 4096, 20_000]),
    v=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float64, FP32, BF16, torch.float16]),
    chunk_bytes=st.none() | st.integers(1, 4 * GiB),
    lean=st.booleans(),
    cpu=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_of_any_sizes(n, d, v, dtype, chunk_bytes, lean, cpu):
    narrow = BF16 if lean and dtype == BF16 else None
    options = LinearOptions(chunk_bytes=chunk_bytes, logits_dtype=narrow, acc_dtype=narrow)
    rows = chunk_rows(n, d, v, dtype, options, cpu=cpu)
    row_bytes = padded(v) * (2 if narrow else 8 if dtype == torch.float64 else 4)
    assert 1 <= rows <= max(n, 1)
    most = max(1, chunk_bytes // row_bytes) if chunk_bytes else 1024 if cpu else 4096
    # narrow heads alone may need more than 4096
    assert rows <= most
    if chunk_bytes:
        # no more chunks than the bytes make necessary, and none of a few rows beside large ones
        assert math.ceil(n / rows) == math.ceil(n / most)
        assert n == 0 or rows < math.ceil(n / math.ceil(n / most)) + 128
    elif n >= 4096:
        assert rows >= (128 if cpu else 512)
