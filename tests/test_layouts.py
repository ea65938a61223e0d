"""What a loss costs over many ranks: calls and bytes of the formulas against what two and four
ranks hand to torch.distributed."""

import contextlib
import inspect
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

for name in ("pandas", "rich"):
    pytest.importorskip(name)

import lossfuse  # noqa: E402
from lossfuse import LinearOptions, VocabShard  # noqa: E402
from lossfuse.ops import head as head_ops  # noqa: E402
from lossfuse.perf.__main__ import main  # noqa: E402
from lossfuse.perf.cases import DTYPES, named  # noqa: E402
from lossfuse.perf.estimate import estimate  # noqa: E402
from lossfuse.perf.layouts import ASSUMPTIONS, Collective, Layout, Links, Loss, others, ours  # noqa: E402
from lossfuse.perf.mistakes import Mistake  # noqa: E402
from ranks import cases_on_ranks  # noqa: E402
from rows import class_weight, head_and_ids, logits_and_ids, probabilities  # noqa: E402

# more classes of a shard than there are numbers of anything else; of four shards the last is
# smaller
N, D, V = 13, 5, 4002
LOGITS = Loss(N, V, dtype="fp32")
# chunks of 5, 5 and 3 rows on two ranks
HEAD = Loss(N, V, D, dtype="fp32", options=LinearOptions(chunk_bytes=5 * 4 * 2016))

OF_LOGITS = {
    "plain": {},
    "no gradient": {"mode": "no_grad"},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "weights": {"class_weights": True},
    "weights, sum": {"class_weights": True, "reduction": "sum"},
    "weights and smoothing": {"class_weights": True, "smoothing": True},
    "weights, normalizer": {"class_weights": True, "normalizer": True},
    "probabilities": {"probabilities": True},
    "probabilities, weights, smoothing": {
        "probabilities": True,
        "class_weights": True,
        "smoothing": True,
    },
    "statistics": {"statistics": True},
    "statistics, no entropy": {"statistics": True, "entropy": False, "reduction": "none"},
    "statistics, everything": {"statistics": True, "class_weights": True, "smoothing": True},
    "statistics of probabilities": {"statistics": True, "probabilities": True},
    "bf16": {"dtype": "bf16"},
}
OF_A_HEAD = OF_LOGITS | {
    "partial": {"hidden_grad": "partial"},
    "one chunk": {"options": LinearOptions()},
    "statistics of probabilities, none": {
        "statistics": True,
        "probabilities": True,
        "reduction": "none",
    },
}
CASES = {f"logits, {name}": replace(LOGITS, **options) for name, options in OF_LOGITS.items()} | {
    f"head, {name}": replace(HEAD, **options) for name, options in OF_A_HEAD.items()
}
# operands in bf16, shards and their reduction in fp32
SHARDED = {
    name: replace(HEAD, dtype="bf16", reshard=name == "reshard") for name in ("fsdp", "reshard")
}
LAYOUTS = {
    2: [Layout(fsdp=2)],
    4: [Layout(tp=2, fsdp=2), Layout(sp=2, fsdp=2), Layout(fsdp=2, dp=2)],
}

INPUTS = (
    "input",
    "input_tensor",
    "tensor",
    "tensor_list",
    "object_list",
    "obj",
    "input_list",
    "input_tensor_list",
    "scatter_list",
)
KINDS = {
    "all_gather_single": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_reduce": "all-reduce",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
}
OTHERS = (
    "all_gather",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "irecv",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
)


@contextlib.contextmanager
def counting():
    """Calls of torch.distributed as they are made: (kind, ranks of the group, bytes handed over),
    and their elements."""
    calls, elements = Counter(), []
    plain = {name: getattr(dist, name) for name in (*KINDS, *OTHERS) if hasattr(dist, name)}

    def counted(name, call):
        parameters = inspect.signature(call)

        def count(*args, **kwargs):
            given = parameters.bind(*args, **kwargs).arguments
            handed = given[next(known for known in INPUTS if known in given)]
            calls[
                KINDS.get(name, name),
                dist.get_world_size(given.get("group")),
                handed.numel() * handed.element_size(),
            ] += 1
            elements.append(handed.numel())
            return call(*args, **kwargs)

        return count

    for name, call in plain.items():
        setattr(dist, name, counted(name, call))
    # as on an accelerator: on a CPU the ranks of a head first compare all their rows, in a gather
    # of its own
    look, head_ops.values_are_readable = head_ops.values_are_readable, lambda t: False
    try:
        yield calls, elements
    finally:
        head_ops.values_are_readable = look
        for name, call in plain.items():
            setattr(dist, name, call)


def predicted(loss, layout):
    """As ``counting``, of what lossfuse and FSDP call."""
    calls = Counter()
    for c in ours(loss, layout).collectives:
        if c.by != "trainer":
            calls.update((c.kind, c.ranks, payload) for payload in c.payloads)
    return calls


# what puts nothing more on the wire
FREE = {"softcap": 30.0, "logit_scale": 0.7, "lse_square_scale": 1e-4}


def call_of(loss, n, group=None, **free):
    """What the loss describes, on this rank: a function of the head's weight, and that weight; None
    for logits."""
    world = 1 if group is None else group.size()
    shard = None if world == 1 else VocabShard.even(loss.v, group, hidden_grad=loss.hidden_grad)
    mine = (
        slice(0, loss.v) if shard is None else slice(shard.start, shard.start + -(-loss.v // world))
    )
    dtype, grads = DTYPES[loss.dtype], loss.mode != "no_grad"
    hidden, head, _, ids = head_and_ids(n, D, loss.v, dtype, ignored=0.0)
    target = probabilities(n, loss.v)[:, mine].detach().contiguous() if loss.probabilities else ids
    options = {
        "weight": class_weight(loss.v) if loss.class_weights else None,
        "reduction": loss.reduction,
        "shard": shard,
        "impl": "torch",
        "label_smoothing": 0.1 * loss.smoothing,
        "normalizer": 7.5 if loss.normalizer else None,
        **free,
    }
    if loss.statistics:
        options |= {"entropy": loss.entropy, "argmax": loss.argmax}
    if loss.d is None:
        logits = (
            logits_and_ids(n, loss.v, dtype)[0].detach()[:, mine].contiguous().requires_grad_(grads)
        )
        of_logits = lossfuse.cross_entropy_stats if loss.statistics else lossfuse.cross_entropy
        return lambda weight: of_logits(logits, target, **options), None
    hidden.requires_grad_(grads)
    of_head = (
        lossfuse.linear_cross_entropy_stats if loss.statistics else lossfuse.linear_cross_entropy
    )
    weight = head.detach()[mine].contiguous().requires_grad_(grads)
    return lambda weight: of_head(hidden, weight, target, options=loss.options, **options), weight


def run(loss, call, *arguments):
    made = call(*arguments)
    value = made.loss if loss.statistics else made
    if loss.step:
        value.sum().backward()


def count_one(name):
    loss, ranks = CASES[name], dist.get_world_size()
    for free in ({}, FREE):
        call, weight = call_of(loss, N, dist.group.WORLD, **free)
        with counting() as (calls, elements):
            run(loss, call, weight)
        want = predicted(loss, Layout(tp=ranks))
        assert calls == want, f"counted {calls}, by formula {want}"
        # nothing of the size of a row of a shard, let alone of the logits
        assert max(elements) < V // ranks


class Head(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, call):
        return call(self.weight)


def count_sharded(case):
    """FSDP2 on a head, which tensor parallelism may have cut before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    name, layout = case
    # classes that must be padded, alike on every rank of tensor parallelism
    loss = replace(SHARDED[name], v=V - (layout.tp == 1))
    sizes = (layout.dp, layout.sharding, layout.tp)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "fsdp", "tp"))
    call, weight = call_of(loss, -(-N // layout.sp), mesh["tp"].get_group())
    head = fully_shard(
        Head(weight.detach().float()),
        mesh=mesh["dp", "fsdp"] if layout.dp > 1 else mesh["fsdp"],
        mp_policy=MixedPrecisionPolicy(
            param_dtype=DTYPES[loss.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        reshard_after_forward=loss.reshard,
    )
    # which gloo has, and an average not
    head.set_force_sum_reduction_for_comms(True)
    with counting() as (calls, _):
        run(loss, head, call)
    want = predicted(loss, layout)
    assert calls == want, f"counted {calls}, by formula {want}"


def count(case):
    count_one(case) if isinstance(case, str) else count_sharded(case)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_hand_over_what_the_formulas_say(n):
    cases_on_ranks(
        n, count, [*CASES, *((name, layout) for name in SHARDED for layout in LAYOUTS[n])]
    )


# --- memory


def count_memory(chunk_bytes):
    """A step of a head in float32, where a CPU and an accelerator do the same but for the CPU's
    blocks of a chunk."""
    from lossfuse.backends.torch_rows import block_rows
    from lossfuse.perf.memory import profile_memory

    torch.use_deterministic_algorithms(False)
    layout = Layout(tp=dist.get_world_size())
    n, d, v = 600, 640, 12000
    classes = v // layout.tp
    loss = Loss(n, v, d, dtype="fp32", options=LinearOptions(chunk_bytes=chunk_bytes))
    hidden, weight, ids = (
        torch.randn(n, d, requires_grad=True),
        torch.randn(classes, d, requires_grad=True),
        torch.randint(v, (n,)),
    )
    shard = VocabShard.even(v)

    def step():
        made = lossfuse.linear_cross_entropy(hidden, weight, ids, shard=shard, options=loss.options)
        return torch.autograd.grad(made, [hidden, weight])

    measured = profile_memory(step, device="cpu").peak_bytes
    predicted = ours(loss, layout).peak - weight.nbytes - hidden.nbytes
    block = block_rows(n, classes, 4, 4, True, 1) * classes * 4
    # a few numbers per row, which the formulas do not itemise
    assert abs(predicted + block - measured) <= 64 << 10, (
        f"{predicted + block} by formula, {measured} measured"
    )


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_ranks_hold_what_the_formulas_say(n):
    cases_on_ranks(n, count_memory, [4 << 20])


@pytest.mark.parametrize("mode", ["forward+backward", "no_grad"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["head-llama3", "head-gemma2"])
def test_one_rank_holds_what_the_estimate_of_one_device_says(name, dtype, mode):
    case = named(name, torch.device("cuda"))
    needs = {need.method: need.bytes for need in estimate(case, dtype, mode)}
    loss = Loss(case.n, case.v, case.d, dtype, mode=mode)
    inputs = (case.n + case.v) * case.d * DTYPES[dtype].itemsize
    found = {way.name: way.peak - inputs for way in (ours(loss, Layout()), *others(loss, Layout()))}
    assert found["lossfuse"] == pytest.approx(needs["lossfuse linear"], rel=0.05)
    assert found["gathered whole"] == pytest.approx(
        needs["linear + F.cross_entropy(x.float())"], rel=0.05
    )


# --- many ranks

LLAMA = Loss(8192, 128256, 4096)


def test_a_ring():
    sent = {
        kind: Collective("", "", kind, "tp", 3, (12, 6)).sent
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    assert sent == {"all-gather": 36, "reduce-scatter": 12, "all-reduce": 24}
    assert Collective("", "", "all-reduce", "tp", 3, (12, 6)).ring_steps == 8


def test_nothing_of_ours_grows_with_the_classes_or_the_replicas():
    def of_rows(loss, layout):
        return [c for c in ours(loss, layout).collectives if c.by == "lossfuse"]

    chunks = LinearOptions(chunk_bytes=1)
    for loss in (Loss(64, 128256, 4096, options=chunks), Loss(64, 128256, statistics=True)):
        few = of_rows(loss, Layout(tp=8))
        assert (
            few
            == of_rows(replace(loss, v=2 * loss.v), Layout(tp=8))
            == of_rows(loss, Layout(tp=8, fsdp=512, dp=4))
        )
    sizes = [ours(LLAMA, Layout(tp=8, fsdp=ranks)) for ranks in (64, 256, 1024)]
    assert all(way.calls == sizes[0].calls for way in sizes)
    # a ring over ever more ranks sends what it is given once, and no more, but for the padding of
    # classes
    assert sizes[-1].sent() < 1.05 * sizes[0].sent()
    assert sizes[-1].peak <= sizes[0].peak
    assert ours(LLAMA, Layout(sp=8)).sent("numbers of rows") == 0


def test_alternatives():
    ways = {way.name: way for way in (ours(LLAMA, Layout(tp=8)), *others(LLAMA, Layout(tp=8)))}
    assert ways["gathered whole"].sent("logits") == 7 * 8192 * 128256 // 8 * 2
    assert ways["Megatron"].sent("numbers of rows") == 3 * 2 * 7 * 8192 * 4 // 8
    # two chunks, each with a header of five int64
    assert ways["lossfuse"].sent("numbers of rows") == 7 * (3 * 4 * 8192 + 2 * 5 * 8)
    assert [way.name for way in others(replace(LLAMA, statistics=True), Layout(tp=8))] == [
        "gathered whole"
    ]


def test_the_command(capsys, monkeypatch):
    # a terminal's width
    monkeypatch.setenv("COLUMNS", "160")
    command = [
        "estimate",
        "head-llama3",
        "--link-gbps",
        "tp=3600,fsdp=400",
        "--fits",
        "1",
        "--layout",
    ]
    assert main([*command, "tp=8,fsdp=64"]) == 0
    printed = capsys.readouterr().out
    assert (
        "512: tp=8,fsdp=64" in printed
        and "reduce-scatter" in printed
        and "weight gradient, its 32-bit sum" in printed
    )
    assert "fits" in printed and "  no" in printed and "3600 Gbit/s over tp" in printed
    assert all(" ".join(sentence.split()) in " ".join(printed.split()) for sentence in ASSUMPTIONS)
    assert (
        main(
            [
                *command,
                "tp=8,fsdp=64",
                "tp=2",
                "--reduction",
                "none",
                "--statistics",
                "--class-weights",
            ]
        )
        == 0
    )
    assert "2: tp=2" in capsys.readouterr().out
    assert main(["estimate", "8192x128256", "--layout", "tp=8", "--mode", "no_grad"]) == 0
    assert "weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tp=0"], "must be positive"),
        (["tp=8,pp=2"], "with each of tp, sp, fsdp, dp once"),
        (["tp=1.5"], "whole numbers"),
        (["tp=8", "--device", "cpu"], "for accelerators"),
        (["tp=8", "--link-gbps", "fsdp=400"], "nothing of tp"),
        (["tp=8", "--link-gbps", "-1"], "positive numbers"),
    ],
)
def test_mistakes(arguments, sentence, capsys):
    assert main(["estimate", "head-llama3", "--layout", *arguments]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert main(["estimate", "16x1000p3", "--layout", "tp=8"]) == 2
    assert "16x1000p3 has labels" in capsys.readouterr().err


def test_a_mistake_of_a_function():
    with pytest.raises(Mistake, match="sp is 0"):
        Layout(sp=0)
    assert Links.parse("8", 0.0).seconds(Collective("", "", "all-gather", "dp", 2, (10**9,))) == 1.0
