"""Costs over many ranks: formulas against the calls and bytes of two and four ranks."""

import contextlib
import inspect
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from perf_commands import perf, words  # isort: skip
import lossfuse
from lossfuse import LinearOptions, VocabShard
from lossfuse.ops import head as head_ops
from lossfuse.perf.cases import DTYPES, named
from lossfuse.perf.estimate import estimate
from lossfuse.perf.layout_tables import ASSUMPTIONS, Links
from lossfuse.perf.layouts import Collective, Layout, LossStep, lossfuse_plan, other_plans
from ranks import cases_on_ranks
from rows import class_weight, head_and_ids, logits_and_ids, probabilities

# a shard has more classes than any other size; of four shards the last is smaller
N, D, V = 13, 5, 4002
LOGITS = LossStep(N, V, dtype="fp32")
# chunks of 5, 5 and 3 rows on two ranks
HEAD = LossStep(N, V, D, dtype="fp32", options=LinearOptions(chunk_bytes=5 * 4 * 2016))
EVERYTHING = ("class_weights", "smoothing", "statistics")
OF_LOGITS = [
    {},
    {"mode": "no_grad"},
    {"reduction": "none"},
    {"reduction": "sum"},
    {"class_weights": True, "reduction": "sum"},
    {"class_weights": True, "smoothing": True},
    {"class_weights": True, "normalizer": True},
    {"probabilities": True, "class_weights": True, "smoothing": True},
    {"statistics": True, "entropy": False, "reduction": "none"},
    dict.fromkeys(EVERYTHING, True),
    {"statistics": True, "probabilities": True},
    {"dtype": "bf16"},
]
OF_A_HEAD = [
    *OF_LOGITS,
    {"hidden_grad": "partial"},
    {"options": LinearOptions()},
    {"statistics": True, "probabilities": True, "reduction": "none"},
]
STEPS = [replace(LOGITS, **o) for o in OF_LOGITS] + [replace(HEAD, **o) for o in OF_A_HEAD]
# operands in bf16, shards and their reduction in fp32
SHARDED = [replace(HEAD, dtype="bf16", reshard=reshard) for reshard in (False, True)]
LAYOUTS = {
    2: [Layout(fsdp=2)],
    4: [Layout(tp=2, fsdp=2), Layout(sp=2, fsdp=2), Layout(fsdp=2, dp=2)],
}
KINDS = {
    "all_gather_single": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_reduce": "all-reduce",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
}
# any other call is counted under its own name, which no formula predicts
COLLECTIVE = re.compile("all_|batch_|broadcast|gather|i?recv|i?send|reduce|scatter")
# options that add nothing to the payload
FREE = {"softcap": 30.0, "logit_scale": 0.7, "lse_square_scale": 1e-4}


@contextlib.contextmanager
def counting():
    """Count calls of torch.distributed by kind, ranks and payload; list their elements."""
    calls, elements = Counter(), []
    functions = dict(inspect.getmembers(dist, inspect.isfunction))
    real = {name: call for name, call in functions.items() if COLLECTIVE.match(name)}

    def counted(name, call):
        def count(*args, **kwargs):
            given = inspect.signature(call).bind(*args, **kwargs).arguments
            inputs = [given[key] for key in ("input", "input_tensor", "tensor") if key in given]
            size = dist.get_world_size(given.get("group"))
            calls[KINDS.get(name, name), size, sum(t.nbytes for t in inputs)] += 1
            elements.extend(t.numel() for t in inputs)
            return call(*args, **kwargs)

        return count

    for name, call in real.items():
        setattr(dist, name, counted(name, call))
    # on a CPU the ranks of a head compare all their rows first, in a gather of its own
    compares, head_ops.values_are_readable = head_ops.values_are_readable, lambda t: False
    try:
        yield calls, elements
    finally:
        head_ops.values_are_readable = compares
        for name, call in real.items():
            setattr(dist, name, call)


def predicted(step, layout):
    """The same counts by formula, for calls of lossfuse and FSDP."""
    collectives = lossfuse_plan(step, layout).collectives
    ours = [c for c in collectives if c.caller != "trainer"]
    return Counter((c.kind, c.ranks, payload) for c in ours for payload in c.payloads)


def call_of(step, n, group, **free):
    """A function of the head's weight that computes the step, and that weight (None for logits)."""
    world = group.size()
    shard = None if world == 1 else VocabShard.even(step.v, group, hidden_grad=step.hidden_grad)
    start = 0 if shard is None else shard.start
    local = slice(start, start + -(-step.v // world))
    dtype, grads = DTYPES[step.dtype], step.mode != "no_grad"
    hidden, head, _, ids = head_and_ids(n, D, step.v, dtype, ignored=0.0)
    soft = probabilities(n, step.v)[:, local].detach().contiguous()
    target = soft if step.probabilities else ids
    options = {
        "weight": class_weight(step.v) if step.class_weights else None,
        "reduction": step.reduction,
        "shard": shard,
        "impl": "torch",
        "label_smoothing": 0.1 * step.smoothing,
        "normalizer": 7.5 if step.normalizer else None,
        **free,
    }
    name = "cross_entropy" if step.d is None else "linear_cross_entropy"
    if step.statistics:
        options |= {"entropy": step.entropy, "argmax": step.argmax}
    loss_fn = getattr(lossfuse, f"{name}_stats" if step.statistics else name)
    if step.d is None:
        logits = logits_and_ids(n, step.v, dtype)[0].detach()[:, local].contiguous()
        return lambda weight: loss_fn(logits.requires_grad_(grads), target, **options), None
    hidden.requires_grad_(grads)
    weight = head.detach()[local].contiguous().requires_grad_(grads)
    return lambda w: loss_fn(hidden, w, target, options=step.options, **options), weight


def run(step, call, *arguments):
    result = call(*arguments)
    value = result.loss if step.statistics else result
    if step.has_backward:
        value.sum().backward()


def count_unsharded_weight(step):
    ranks = dist.get_world_size()
    for free in ({}, FREE):
        call, weight = call_of(step, N, dist.group.WORLD, **free)
        with counting() as (calls, elements):
            run(step, call, weight)
        assert calls == predicted(step, Layout(tp=ranks))
        # nothing as large as one row of a shard
        assert max(elements) < V // ranks


class Head(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, call):
        return call(self.weight)


def count_with_fsdp(step, layout):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # classes that FSDP must pad, the same on every rank of tensor parallelism
    step = replace(step, v=V - (layout.tp == 1))
    sizes = (layout.dp, layout.weight_shards, layout.tp)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "fsdp", "tp"))
    call, weight = call_of(step, -(-N // layout.sp), mesh["tp"].get_group())
    policy = MixedPrecisionPolicy(DTYPES[step.dtype], torch.float32, cast_forward_inputs=False)
    head = fully_shard(
        Head(weight.detach().float()),
        mesh=mesh["dp", "fsdp"] if layout.dp > 1 else mesh["fsdp"],
        mp_policy=policy,
        reshard_after_forward=step.reshard,
    )
    # gloo cannot average
    head.set_force_sum_reduction_for_comms(True)
    with counting() as (calls, _):
        run(step, head, call)
    assert calls == predicted(step, layout)


def count(case):
    count_with_fsdp(*case) if isinstance(case, tuple) else count_unsharded_weight(case)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_pass_what_the_formulas_predict(n):
    cases_on_ranks(
        n, count, [*STEPS, *((step, layout) for step in SHARDED for layout in LAYOUTS[n])]
    )


def compare_memory(chunk_bytes):
    """Profile a step of a head in float32, where only a CPU's blocks differ from an accelerator."""
    from lossfuse.backends.torch_rows import block_rows
    from lossfuse.perf.memory import profile_memory

    torch.use_deterministic_algorithms(False)
    layout = Layout(tp=dist.get_world_size())
    n, d, v = 600, 640, 12000
    step = LossStep(n, v, d, dtype="fp32", options=LinearOptions(chunk_bytes=chunk_bytes))
    hidden, weight = (torch.randn(k, d, requires_grad=True) for k in (n, v // layout.tp))
    options = {"shard": VocabShard.even(v), "options": step.options}
    ids = torch.randint(v, (n,))

    def call():
        loss = lossfuse.linear_cross_entropy(hidden, weight, ids, **options)
        return torch.autograd.grad(loss, [hidden, weight])

    measured = profile_memory(call, device="cpu").peak_bytes
    formula = lossfuse_plan(step, layout).peak - weight.nbytes - hidden.nbytes
    block = block_rows(n, len(weight), 4, 4, True, 1) * len(weight) * 4
    # the formulas leave out a few numbers per row
    assert abs(formula + block - measured) <= 64 << 10, (formula + block, measured)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_ranks_allocate_what_the_formulas_predict(n):
    cases_on_ranks(n, compare_memory, [4 << 20])


@pytest.mark.parametrize("mode", ["forward+backward", "no_grad"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["head-llama3", "head-gemma2"])
def test_one_rank_needs_what_the_estimate_of_one_device_says(name, dtype, mode):
    case = named(name, torch.device("cuda"))
    needs = {need.method: need.bytes for need in estimate(case, dtype, mode)}
    step = LossStep(case.n, case.v, case.d, dtype, mode=mode)
    inputs = (case.n + case.v) * case.d * DTYPES[dtype].itemsize
    ours, eager, *_ = lossfuse_plan(step, Layout()), *other_plans(step, Layout())
    assert ours.peak - inputs == pytest.approx(needs["lossfuse linear"], rel=0.05)
    upcast = needs["linear + F.cross_entropy(x.float())"]
    assert eager.peak - inputs == pytest.approx(upcast, rel=0.05)


LLAMA = LossStep(8192, 128256, 4096)


def test_bytes_sent_are_those_of_a_ring():
    kinds = {"all-gather": 36, "reduce-scatter": 12, "all-reduce": 24}
    assert {k: Collective("", "", k, "tp", 3, (12, 6)).sent for k in kinds} == kinds
    reduce = Collective("", "", "all-reduce", "tp", 3, (12, 6))
    assert Links({"tp": 1e9}, 1.0).seconds(reduce) == pytest.approx(8)
    assert Links.parse("8", 0.0).seconds(Collective("", "", "all-gather", "dp", 2, (10**9,))) == 1.0


def test_our_traffic_grows_neither_with_classes_nor_with_replicas():
    for step in (
        LossStep(64, 128256, 4096, options=LinearOptions(chunk_bytes=1)),
        LossStep(64, 128256, statistics=True),
    ):
        few, more_classes, more_ranks = (
            [c for c in lossfuse_plan(*plan).collectives if c.caller == "lossfuse"]
            for plan in (
                (step, Layout(tp=8)),
                (replace(step, v=2 * step.v), Layout(tp=8)),
                (step, Layout(tp=8, fsdp=512, dp=4)),
            )
        )
        assert few == more_classes == more_ranks
    small, *_, large = (lossfuse_plan(LLAMA, Layout(tp=8, fsdp=n)) for n in (64, 256, 1024))
    # a ring sends its input once, plus the padding of classes
    assert large.sent() < 1.05 * small.sent() and large.peak <= small.peak
    assert lossfuse_plan(LLAMA, Layout(sp=8)).sent("numbers of rows") == 0


def test_alternatives_send_logits_or_three_numbers_per_row():
    layout = Layout(tp=8)
    plans = {
        plan.name: plan for plan in (lossfuse_plan(LLAMA, layout), *other_plans(LLAMA, layout))
    }
    assert plans["gathered whole"].sent("logits") == 7 * 8192 * 128256 // 8 * 2
    assert plans["Megatron"].sent("numbers of rows") == 3 * 2 * 7 * 8192 * 4 // 8
    # two chunks, each with a header of five int64
    assert plans["lossfuse"].sent("numbers of rows") == 7 * (3 * 4 * 8192 + 2 * 5 * 8)
    statistics = other_plans(replace(LLAMA, statistics=True), layout)
    assert [plan.name for plan in statistics] == ["gathered whole"]


def test_the_command_itemizes_one_layout_and_compares_several(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = "estimate head-llama3 --link-gbps tp=3600,fsdp=400 --fits 1 --layout tp=8,fsdp=64"
    assert perf(command) == 0
    printed = words(capsys.readouterr().out)
    for text in ("512: tp=8,fsdp=64", "reduce-scatter", "weight gradient, its 16-bit sum"):
        assert text in printed
    assert " fits" in printed and " no " in printed and "3600 Gbit/s over tp" in printed
    assert all(words(sentence) in printed for sentence in ASSUMPTIONS)
    assert perf(f"{command} tp=2 --reduction none --statistics --class-weights") == 0
    printed = capsys.readouterr().out
    assert "2: tp=2" in printed and "weight gradient, its" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tp=0", "tp is 0, expected a positive degree"),
        ("tp=8,pp=2", "with each of tp, sp, fsdp, dp at most once"),
        ("tp=1.5", "whole numbers"),
        ("tp=8 --device cpu", "for accelerators"),
        ("tp=8 --link-gbps fsdp=400", "no rate for tp"),
        ("tp=8 --link-gbps -1", "positive numbers"),
    ],
)
def test_an_impossible_layout_is_refused(arguments, message, capsys):
    assert perf(f"estimate head-llama3 --layout {arguments}") == 2
    assert message in words(capsys.readouterr().err)
    assert perf("estimate 16x1000p3 --layout tp=8") == 2
    assert "16x1000p3 has labels" in capsys.readouterr().err
