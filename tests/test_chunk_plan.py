"""How many rows of logits a head computes at a time, and how it adds up the gradient of its
weight."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lossfuse
import program
from closeness import assert_loss_close, assert_product_close
from lossfuse import LinearOptions
from lossfuse.ops import head_chunks
from lossfuse.ops.chunk_plan import (
    HELD_ROWS,
    MOST_ROUNDINGS,
    ROW_ALIGNMENT,
    ChunkPlan,
    chunk_plan,
    chunk_rows,
    padded,
)
from rows import head_and_ids, probabilities

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


WIDE, KEPT = LinearOptions(acc_dtype=FP32), LinearOptions(keep_dlogits=True)
PLANS = {
    "Llama 3: a third of the rows is held": (
        (8192, 4096, 128256, BF16, LinearOptions()),
        ChunkPlan(HELD_ROWS, 2816, BF16),
    ),
    "three chunks, over their logits": (
        (6144, 4096, 128256, BF16, LinearOptions()),
        ChunkPlan(2048, 2048, BF16),
    ),
    "more rows than a sum in float32 takes": (
        (32768, 4096, 128256, BF16, LinearOptions()),
        ChunkPlan(2048, 2048, FP32),
    ),
    "float32 as asked": ((8192, 4096, 128256, BF16, WIDE), ChunkPlan(2048, 2048, FP32)),
    "bfloat16 as asked": ((65536, 4096, 128256, BF16, LEAN), ChunkPlan(4096, 4096, BF16)),
    "one product": ((8192, 4096, 128256, BF16, KEPT), ChunkPlan(HELD_ROWS, 8192, BF16)),
    "few bytes, many roundings": (
        (8192, 4096, 128256, BF16, LinearOptions(chunk_bytes=GiB // 4)),
        ChunkPlan(512, 512, FP32),
    ),
    "float16 has no bfloat16 sums": (
        (300, 4096, 128256, torch.float16, LinearOptions()),
        ChunkPlan(300, 300, FP32),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_on_cuda(name):
    arguments, plan = PLANS[name]
    assert chunk_plan(*arguments, narrow_sums=True, cpu=False) == plan


def test_without_products_that_return_float32_sums_are_in_float32():
    arguments = 300, 4096, 128256, BF16, LinearOptions()
    for cpu in (False, True):
        assert chunk_plan(*arguments, narrow_sums=False, cpu=cpu).sum_dtype == FP32


@pytest.mark.parametrize("rows", [(2, 5), (3, 6), (2, 11)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_of_several_chunks_are_multiplied_together(monkeypatch, impl, soft, dtype, rows):
    monkeypatch.setattr(head_chunks, "chunk_plan", lambda *_, **__: ChunkPlan(*rows, FP32))
    *operands, target = head_and_ids(11, 8, 19, dtype)
    target = probabilities(11, 19) if soft else target
    hidden, weight, bias = operands
    want = program.head_value_and_grads(operands, target, None, None)
    given = {"options": LinearOptions(drop_ignored=False), "impl": impl}
    loss = lossfuse.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **given)
    assert_loss_close(loss, want[0])
    for got, expected in zip(torch.autograd.grad(loss, operands), want[1:4], strict=True):
        assert_product_close(got, expected)


@pytest.mark.parametrize("targets", ["all classes", "one class", "few classes"])
def test_three_roundings_are_at_most_one_and_a_half_times_the_error_of_one(monkeypatch, targets):
    n, d, v = 768, 64, 256
    hidden, weight, _, target = head_and_ids(n, d, v, BF16, ignored=0.0)
    target = {"all classes": target, "one class": target * 0, "few classes": target % 5}[targets]
    want = program.head_value_and_grads((hidden, weight, None), target)[2]

    def error(plan):
        monkeypatch.setattr(head_chunks, "chunk_plan", lambda *_, **__: plan)
        loss = lossfuse.linear_cross_entropy(hidden, weight, target)
        (got,) = torch.autograd.grad(loss, weight)
        return torch.linalg.vector_norm(got.double() - want)

    rows = n // MOST_ROUNDINGS
    once = error(ChunkPlan(n, n, FP32))
    assert error(ChunkPlan(rows, rows, BF16)) <= 1.5 * once
    assert error(ChunkPlan(rows // 4, rows // 4, BF16)) > 1.5 * once
