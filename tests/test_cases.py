"""Named shapes, and inputs with the statistics of a trained model."""

import math

import pytest
import torch
import torch.nn.functional as F

from lossfuse.perf.cases import (
    CASES,
    DTYPES,
    Case,
    head_like_a_model,
    labels_like_a_model,
    logits_like_a_model,
    named,
)
from lossfuse.perf.mistakes import Mistake

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_every_case_has_a_reason_and_sizes_for_cpu_and_gpu():
    widths = {"llama2": 32000, "gpt2": 50257, "llama3": 128256, "qwen": 151936, "gemma3": 262144}
    assert {name: CASES[name].v for name in widths} == widths
    assert len({case.reason for case in CASES.values()}) == len(CASES)
    for name in CASES:
        small, large = named(name, CPU), named(name, CUDA)
        assert small.n <= large.n and (small.v, small.p) == (large.v, large.p)
        prefix = name.split("-")[0]
        assert small.op == (prefix if prefix in ("head", "labels") else "logits")
        # a machine of 24 GiB has room for logits, a copy and torch's tensors, in fp32
        assert 6 * small.logits_bytes(4) + 3 * small.input_bytes(4) < 12 << 30


def test_any_shape_is_a_case():
    own = "a shape of your own"
    assert named("4096X128256", CPU) == Case("4096x128256", 4096, 128256, None, own)
    assert named("8X32P4", CPU) == Case("8x32p4", 8, 32, None, own, 4)
    sizes = {"8x1000": "8 x 1,000", "8x1000p4": "8 x 1,000, 4 of them 1", "8x4x9": "8 x 4 x 9"}
    assert {shape: named(shape, CPU).size for shape in sizes} == sizes
    assert [named(shape, CPU).op for shape in sizes] == ["logits", "labels", "head"]
    wrong = ["llama", "8", "8x", "0x5", "-1x5", "2x3x4x5", "", "8x1e3", "8x32p0", "8x32p32"]
    for shape in [*wrong, "8x16x32p4", "8p4"]:
        with pytest.raises(Mistake, match=r"expected one of llama2.*NxV"):
            named(shape, CPU)


def test_minimum_bytes_and_flops():
    logits, head = named("llama3", CUDA), named("head-llama3", CUDA)
    read = 8192 * 128256 * 2
    assert logits.moved_bytes("forward+backward", 2) == 2 * read
    assert logits.moved_bytes("no_grad", 2) == logits.moved_bytes("forward", 2) == read
    assert head.flops("forward+backward") == 6 * 8192 * 4096 * 128256 == 3 * head.flops("no_grad")
    assert head.input_bytes(2) == 2 * (8192 + 128256) * 4096 + 8 * 8192
    assert named("labels-amazon", CUDA).input_bytes(2) == 1024 * (670091 * 2 + 5 * 8)


def require_beta_draws(p):
    """Quantiles of Beta(0.4, 0.8)."""
    assert 0.04 < (p > 0.95).float().mean() < 0.09
    assert 0.10 < (p < 0.01).float().mean() < 0.16


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_are_peaked_like_those_of_a_trained_model(dtype):
    x, target = logits_like_a_model(6000, 3000, dtype, CPU)
    assert (target[::7] == -100).all() and (target[1:7] >= 0).all()
    loss = F.cross_entropy(x.float(), target, reduction="none")[target != -100]
    # digamma(1.2) - digamma(0.4)
    assert math.isclose(loss.mean(), 2.27, rel_tol=0.05)
    require_beta_draws(torch.exp(-loss))
    # a tenth of the classes has most of the probability
    assert x.float().softmax(1).mean(0).sort(descending=True).values[:300].sum() > 0.6
    # rows differ by an offset that softmax cancels
    assert 2.5 < x.float().median(1).values.std() < 3.5


def test_a_head_gives_such_logits():
    hidden, weight, target = head_like_a_model(3000, 128, 2000, torch.float32, CPU)
    logits = hidden @ weight.T
    assert 2.0 < F.cross_entropy(logits, target) < 2.6 and 1.8 < logits.std() < 2.3


def test_labels_are_predicted_like_those_of_a_trained_tagger():
    x, ids = labels_like_a_model(400, 3000, 8, torch.float32, CPU)
    positive = ids >= 0
    assert ids.shape == (400, 8) and positive[:, 0].all() and (ids[~positive] == -100).all()
    assert 3.5 < positive.sum(1).float().mean() < 5.5
    require_beta_draws(torch.sigmoid(x.gather(1, ids.clamp(min=0)))[positive])
    # the others are improbable; together they are as probable as the positives
    assert x.median() < -6 and 4 < torch.sigmoid(x).sum(1).mean() < 40


def test_inputs_repeat_with_their_seed_and_exist_for_one_class():
    a, b, c = (logits_like_a_model(20, 50, torch.bfloat16, CPU, seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, a, b)) and not torch.equal(a[0], c[0])
    x, target = logits_like_a_model(3, 1, torch.float32, CPU)
    assert x.isfinite().all() and target.tolist() == [-100, 0, 0]
