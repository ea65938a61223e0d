"""Named shapes: each with a reason, and numbers that look like a trained model's."""

import math

import pytest
import torch
import torch.nn.functional as F

from lossfuse.perf.cases import (
    CASES,
    DTYPES,
    MODES,
    Case,
    head_like_a_model,
    labels_like_a_model,
    logits_like_a_model,
    named,
)
from lossfuse.perf.mistakes import Mistake

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_every_case_has_a_reason_and_rows_for_both_kinds_of_device():
    assert {CASES[name].v for name in ("gpt2", "llama2", "llama3", "qwen", "gemma2", "gemma3")} == {
        50257,
        32000,
        128256,
        151936,
        256000,
        262144,
    }
    assert len({case.reason for case in CASES.values()}) == len(CASES)
    for name in CASES:
        small, large = named(name, CPU), named(name, CUDA)
        assert small.n <= large.n and small.v == large.v and small.p == large.p
        assert small.op == (
            name.split("-")[0] if name.startswith(("head-", "labels-")) else "logits"
        )
        # a machine of 24 GiB holds logits, a copy and what torch makes of them, in fp32
        assert 6 * small.logits_bytes(4) + 3 * small.input_bytes(4) < 12 << 30


def test_shapes_of_your_own():
    assert named("4096X128256", CPU) == Case(
        "4096x128256", 4096, 128256, None, "a shape of your own"
    )
    assert named("8x16x32", CPU).op == "head" and named("8x16x32", CPU).d == 16
    assert (
        named("8X32P4", CPU) == Case("8x32p4", 8, 32, None, "a shape of your own", 4)
        and named("8x32p4", CPU).op == "labels"
    )
    assert (
        named("8x1000", CPU).size == "8 x 1,000"
        and named("8x1000p4", CPU).size == "8 x 1,000, 4 of them 1"
    )
    for wrong in (
        "llama",
        "8",
        "8x",
        "0x5",
        "-1x5",
        "2x3x4x5",
        "",
        "8x1e3",
        "8x32p0",
        "8x32p32",
        "8x16x32p4",
        "8p4",
    ):
        with pytest.raises(Mistake, match="must be one of llama2.*NxV"):
            named(wrong, CPU)


def test_least_work():
    logits, head = named("llama3", CUDA), named("head-llama3", CUDA)
    assert logits.moved_bytes("forward+backward", 2) == 2 * 8192 * 128256 * 2
    assert logits.moved_bytes("no_grad", 2) == logits.moved_bytes("forward", 2) == 8192 * 128256 * 2
    assert head.flops("forward+backward") == 6 * 8192 * 4096 * 128256 == 3 * head.flops("no_grad")
    labels = named("labels-amazon", CUDA)
    assert labels.moved_bytes(
        "forward+backward", 2
    ) == 2 * 1024 * 670091 * 2 and labels.input_bytes(2) == 1024 * (670091 * 2 + 5 * 8)
    assert head.input_bytes(2) == 2 * (8192 + 128256) * 4096 + 8 * 8192


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_are_peaked_as_a_trained_models(dtype):
    x, target = logits_like_a_model(6000, 3000, dtype, CPU)
    assert (target[::7] == -100).all() and (target.reshape(-1)[1:7] >= 0).all()
    loss = F.cross_entropy(x.float(), target, reduction="none")[target != -100]
    # digamma(1.2) - digamma(0.4), and the quantiles of Beta(0.4, 0.8)
    assert math.isclose(loss.mean(), 2.27, rel_tol=0.05)
    p = torch.exp(-loss)
    assert 0.04 < (p > 0.95).float().mean() < 0.09 and 0.10 < (p < 0.01).float().mean() < 0.16
    others = x.float().softmax(1).mean(0).sort(descending=True).values
    # frequent classes and a long tail: a tenth of the classes has most of the mass
    assert others[:300].sum() > 0.6
    # rows differ by an offset that a softmax does not see
    assert 2.5 < x.float().median(1).values.std() < 3.5


def test_the_head_gives_such_logits():
    hidden, weight, target = head_like_a_model(3000, 128, 2000, torch.float32, CPU)
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, target)
    assert 2.0 < loss < 2.6 and 1.8 < logits.std() < 2.3


def test_labels_are_what_a_tagger_says():
    x, ids = labels_like_a_model(400, 3000, 8, torch.float32, CPU)
    given = ids >= 0
    assert (
        ids.shape == (400, 8)
        and given[:, 0].all()
        and (ids[~given] == -100).all()
        and 3.5 < given.sum(1).float().mean() < 5.5
    )
    p = torch.sigmoid(x.gather(1, ids.clamp(min=0)))[given]
    # the quantiles of Beta(0.4, 0.8)
    assert 0.04 < (p > 0.95).float().mean() < 0.09 and 0.10 < (p < 0.01).float().mean() < 0.16
    # next to nothing each, as much as those that are 1 in all
    assert x.median() < -6 and 4 < torch.sigmoid(x).sum(1).mean() < 40


def test_draws_repeat_and_differ_by_seed():
    a, b, c = (logits_like_a_model(20, 50, torch.bfloat16, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])


def test_one_class_and_few_rows():
    x, target = logits_like_a_model(3, 1, torch.float32, CPU)
    assert x.isfinite().all() and target.tolist() == [-100, 0, 0]
    assert MODES == ("no_grad", "forward", "forward+backward")
