"""Losses whose classes are cut among ranks, against the torch program on whole rows in fp64: gloo,
two and four ranks."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

import lossfuse
import program
from closeness import (
    assert_formula_close,
    assert_gradient_close,
    assert_product_close,
    assert_statistics_close,
)
from lossfuse import LinearOptions, VocabShard, targets
from lossfuse.ops import head_chunks
from lossfuse.vocab_parallel import backend as shard_backend
from options import (
    COMBINATIONS,
    EVERYTHING,
    OPTIONS,
    differentiated,
    options_of,
    upstream,
    upstreams,
)
from ranks import cases_on_ranks
from rows import class_weight, head_and_ids, logits_and_ids, probabilities
from test_promises import holds_over_ranks, promises_over_ranks

SINGLE = [
    (),
    *((name,) for name in OPTIONS),
    EVERYTHING,
    (*EVERYTHING, "none"),
    (*EVERYTHING, "normalizer"),
]
FORMS = ("logits", "inplace", "statistics", "head", "head statistics")
# three chunks of rows
CHUNKS = LinearOptions(chunk_bytes=2 * 32 * 4)
# what two ranks pass for one option
DIFFERING = {
    "label_smoothing": (0.1, 0.2),
    "softcap": (3.0, 4.0),
    "logit_scale": (None, 2.0),
    "lse_square_scale": (0.0, 0.1),
    "ignore_index": (-100, 3),
}


def my_slice(cuts):
    """Classes of this rank, from (start, stop) of each."""
    start, stop = cuts[dist.get_rank()]
    return slice(start, stop)


def mine(t, classes, dim=-1):
    """The part of a tensor that this rank holds: a leaf of its own where the whole is one."""
    return (
        t
        if t is None
        else t.detach()
        .movedim(dim, 0)[classes]
        .movedim(0, dim)
        .contiguous()
        .requires_grad_(t.requires_grad)
    )


@contextlib.contextmanager
def saying(what):
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {error}") from error


def check_logits(
    form,
    cuts,
    soft,
    names,
    *,
    whole_weight=True,
    impl="torch",
    dtype=torch.float32,
    n=6,
    compare=assert_formula_close,
):
    v = cuts_end(cuts)
    classes = my_slice(cuts)
    shard = VocabShard(classes.start, v)
    x, ids = logits_and_ids(n, v, dtype)
    target = probabilities(n, v) if soft else ids
    weight, options = options_of(names, v, "cpu")
    local, local_target = mine(x, classes), mine(target, classes) if soft else target
    local_weight = weight if whole_weight else mine(weight, classes)
    given = {"weight": local_weight, "shard": shard, "impl": impl, **options}
    # the oracle sees all classes, and its gradient is cut
    (wide, wide_target, wide_weight), leaves = program.wide_leaves(x, target, weight)
    if form == "statistics":
        got = lossfuse.cross_entropy_stats(local, local_target, **given)
        want = program.cross_entropy_stats(wide, wide_target, wide_weight, **options)
        assert_statistics_close(got, want)
        ups = upstreams(got)
        ours = differentiated(got, [t for t in (local, local_target) if t.requires_grad], ups)
        theirs = differentiated(want, leaves, ups)
    else:
        inplace = form == "inplace"
        got = lossfuse.cross_entropy(
            local * 1.0 if inplace else local, local_target, inplace=inplace, **given
        )
        want = program.cross_entropy(wide, wide_target, wide_weight, **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        up = upstream(x, options)
        ours = torch.autograd.grad(got, [t for t in (local, local_target) if t.requires_grad], up)
        theirs = torch.autograd.grad(want, leaves, up.double())
    for g, w in zip(ours, theirs, strict=True):
        assert g.dtype in (dtype, torch.float32)
        compare(g, w[:, classes])


def cuts_end(cuts):
    return max(stop for _, stop in cuts)


def check_head(
    form, cuts, soft, names, *, whole_weight=True, impl="torch", n=6, hidden_grad="reduced"
):
    v = cuts_end(cuts)
    classes = my_slice(cuts)
    shard = VocabShard(classes.start, v, hidden_grad=hidden_grad)
    hidden, head, bias, ids = head_and_ids(n, 5, v)
    target = probabilities(n, v) if soft else ids
    weight, options = options_of(names, v, "cpu")
    (wide, wide_head, wide_bias, wide_target, wide_weight), leaves = program.wide_leaves(
        hidden, head, bias, target, weight
    )
    local_head, local_bias, local_target = (
        mine(head, classes, 0),
        mine(bias, classes),
        mine(target, classes) if soft else target,
    )
    given = {
        "linear_bias": local_bias,
        "weight": weight if whole_weight else mine(weight, classes),
        "shard": shard,
        "impl": impl,
        "options": CHUNKS,
        **options,
    }
    own = [t for t in (hidden, local_head, local_bias, local_target) if t.requires_grad]
    if form == "head statistics":
        got = lossfuse.linear_cross_entropy_stats(hidden, local_head, local_target, **given)
        want = program.linear_cross_entropy_stats(
            wide, wide_head, wide_target, wide_bias, wide_weight, **options
        )
        assert_statistics_close(got, want)
        ups = upstreams(got)
        ours, theirs = differentiated(got, own, ups), differentiated(want, leaves, ups)
    else:
        got = lossfuse.linear_cross_entropy(hidden, local_head, local_target, **given)
        want = program.linear_cross_entropy(
            wide, wide_head, wide_target, wide_bias, wide_weight, **options
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        up = upstream(hidden, options)
        ours, theirs = (
            torch.autograd.grad(got, own, up),
            torch.autograd.grad(want, leaves, up.double()),
        )
    dhidden, *rest = ours
    if hidden_grad == "partial":
        dist.all_reduce(dhidden)
    assert_product_close(dhidden, theirs[0])
    for g, w, dim in zip(rest, theirs[1:], (0, 0, 1), strict=False):
        assert_product_close(g, w.movedim(dim, 0)[classes].movedim(0, dim))


def check(form, cuts, soft, names, **how):
    (check_head if form.startswith("head") else check_logits)(form, cuts, soft, names, **how)


TWO = ((0, 20), (20, 37))
# in no order, one of them empty
FOUR = ((9, 30), (0, 9), (9, 9), (30, 37))


def every_option(case):
    form, soft, combinations = case
    cuts = TWO if dist.get_world_size() == 2 else FOUR
    for names in combinations:
        with saying((form, soft, names)):
            check(form, cuts, soft, names)
            if "weight" in names:
                check(form, cuts, soft, names, whole_weight=False)


GRID = list(itertools.product(FORMS, (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_every_pair_of_options(n):
    cases_on_ranks(
        n, every_option, [(form, soft, tuple(COMBINATIONS)) for form, soft in GRID], timeout=5000.0
    )


def random_call(case):
    form, cuts, soft, names, n, whole_weight = case
    with saying(case):
        check(form, cuts, soft, names, n=n, whole_weight=whole_weight)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_random_cuts_of_random_rows(n):
    """Shards of any sizes, some empty, in any order of ranks."""
    draws = pytest.importorskip("draws", exc_type=ImportError)
    cases_on_ranks(
        n,
        random_call,
        draws.drawn(draws.calls_of_ranks(n, FORMS, COMBINATIONS), 150),
        timeout=5000.0,
    )


# --- what is not a grid: (name, of a function here) on two ranks or four


def raised(expected, call, *args, **options):
    """The message of the error that a call must raise."""
    with pytest.raises(expected) as caught:
        call(*args, **options)
    return str(caught.value)


def errors():
    rank = dist.get_rank()
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    x, ids = logits_and_ids(6, 37)
    local = mine(x, classes)

    def agreed(expected, sentence, call=lossfuse.cross_entropy, *args, **options):
        said = raised(expected, call, *args, **options)
        assert sentence in said, said
        # every rank says the same
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, said)
        assert len(set(everyones)) == 1

    bad = ids.clone()
    bad[3] = 37
    agreed(
        IndexError,
        "target of row 3 is 37 on rank 0",
        lossfuse.cross_entropy,
        local,
        bad,
        shard=shard,
    )
    # found by one rank alone
    agreed(
        IndexError,
        "target of row 3 is 37 on rank 1",
        lossfuse.cross_entropy,
        local,
        bad if rank else ids,
        shard=shard,
    )
    other = ids.clone()
    other[0] = (ids[0] + 1) % 37
    agreed(
        ValueError,
        "target differs between the ranks",
        lossfuse.cross_entropy,
        local,
        other if rank else ids,
        shard=shard,
    )
    agreed(
        ValueError,
        "target differs",
        lossfuse.cross_entropy,
        local,
        ids.flip(0) if rank else ids,
        shard=shard,
    )
    # alike in their sum, and in their sum with rows counted
    for mine_of, other in (((1, 2, 2, 1), (2, 1, 1, 2)), ((3, 7, 3), (4, 5, 4))):
        given = torch.tensor(other if rank else mine_of)
        agreed(
            ValueError,
            "target differs",
            lossfuse.cross_entropy,
            local[: len(given)],
            given,
            shard=shard,
        )
    # each of them would change the loss, or what is ignored
    for name, values in DIFFERING.items():
        options = {name: values[rank]}
        agreed(
            ValueError,
            "the ranks of shard.group differ in",
            lossfuse.cross_entropy,
            local,
            ids.clamp(min=0),
            shard=shard,
            **options,
        )
    soft = torch.rand(6, local.shape[1])
    agreed(
        ValueError,
        "differ in",
        lossfuse.cross_entropy,
        local,
        soft,
        shard=shard,
        softcap=3.0 + rank,
    )
    of_more = VocabShard(classes.start, 37 + rank)
    agreed(ValueError, "differ in num_classes", lossfuse.cross_entropy, local, ids, shard=of_more)
    # a number is one, whatever its type
    lossfuse.cross_entropy(
        local, ids, shard=shard, softcap=(3, 3.0)[rank], ignore_index=(-100, np.int64(-100))[rank]
    )
    for stats in (lossfuse.cross_entropy_stats, lossfuse.cross_entropy):
        with_gap = VocabShard(0 if rank == 0 else 21, 38)
        agreed(
            ValueError,
            "hold the classes [0, 20), [21, 38); expected each of [0, 38) once",
            stats,
            local,
            ids,
            shard=with_gap,
        )
    overlapping = VocabShard(0 if rank == 0 else 19, 36)
    agreed(
        ValueError,
        "[0, 20), [19, 36)",
        lossfuse.cross_entropy,
        local,
        ids.clamp(max=35),
        shard=overlapping,
    )
    agreed(
        ValueError,
        "expected each of [0, 40) once",
        lossfuse.cross_entropy,
        local,
        ids,
        shard=VocabShard(classes.start, 40),
    )
    with lossfuse.debug_targets():
        few = 6 - rank
        agreed(
            ValueError,
            "have [6, 5] rows",
            lossfuse.cross_entropy,
            local[:few],
            ids[:few],
            shard=shard,
        )
    # nothing was left half done
    check_logits("logits", TWO, False, ())

    hidden, head, _, ids = head_and_ids(6, 5, 37)
    call, local_head = lossfuse.linear_cross_entropy, mine(head, classes, 0)
    agreed(
        IndexError,
        "on rank 1",
        call,
        hidden,
        local_head,
        ids.clamp(max=36) + 37 * rank,
        shard=shard,
    )
    # a row of the call, not of its chunk, or of the rows that are left
    late = torch.where(ids == -100, -100, 0)
    late[0], late[5] = -100, 37
    for how in (CHUNKS, LinearOptions(drop_ignored=True)):
        for form in (call, lossfuse.linear_cross_entropy_stats):
            agreed(
                IndexError,
                "target of row 5 is 37",
                form,
                hidden,
                local_head,
                late,
                shard=shard,
                options=how,
            )
    fewer = torch.full((6,), -100) if rank else ids
    agreed(
        ValueError,
        "target differs",
        call,
        hidden,
        local_head,
        fewer,
        shard=shard,
        options=LinearOptions(drop_ignored=True),
    )
    # 256 and 300 rows in chunks of 128
    n = 300 if rank else 256
    many, zeros, some = (
        torch.ones(n, 5),
        torch.zeros(n, dtype=torch.int64),
        LinearOptions(chunk_bytes=128 * 32 * 4),
    )
    with lossfuse.debug_targets():
        agreed(
            ValueError,
            "have [256, 300] rows",
            call,
            many,
            local_head,
            zeros,
            shard=shard,
            options=some,
        )
    # the reference, which auto is for a weight that has a gradient
    x_ids = logits_and_ids(6, 37)[1]
    for given in ({"impl": "reference"}, {"weight": torch.ones(37, requires_grad=True)}):
        agreed(
            IndexError,
            "target of row 3 is 37 on rank 1",
            lossfuse.cross_entropy,
            local,
            bad if rank else x_ids,
            shard=shard,
            **given,
        )
        agreed(
            ValueError,
            "target differs",
            lossfuse.cross_entropy_stats,
            local,
            x_ids.flip(0) if rank else x_ids,
            shard=shard,
            **given,
        )
        agreed(
            IndexError,
            "row 5 is 37 on rank 1",
            call,
            hidden,
            local_head,
            late.clamp(max=36) + rank * (late == 37),
            shard=shard,
            **given,
        )
    assert "must be a lossfuse.VocabShard" in raised(
        TypeError, call, hidden, local_head, ids, shard=(0, 37)
    )
    assert "with shard it must be (C, D)" in raised(
        ValueError, call, hidden, local_head[:, None], ids[:, None], shard=shard
    )
    said = raised(ValueError, lossfuse.cross_entropy, local, ids, torch.ones(5), shard=shard)
    assert f"expected ({classes.stop - classes.start},) or, of all classes, (37,)" in said
    made = lossfuse.cross_entropy(local, ids, shard=shard)
    assert "no second derivative" in raised(RuntimeError, second_derivative_of, made, local)
    with pytest.raises(ValueError, match="know no ranks"):
        torch.func.grad(lambda t: lossfuse.cross_entropy(t, ids, shard=shard))(local.detach())


def second_derivative_of(loss, leaf):
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), leaf)


def shards_that_are_none():
    for start, num_classes, expected in (
        (-1, 5, ValueError),
        (6, 5, ValueError),
        (0, 0, ValueError),
        (1.0, 5, TypeError),
        (0, True, TypeError),
        (0, 2**31, ValueError),
    ):
        raised(expected, VocabShard, start, num_classes)
    assert "hidden_grad" in raised(ValueError, VocabShard, 0, 5, hidden_grad="some")
    assert "group is a str" in raised(TypeError, VocabShard, 0, 5, "world")
    # as torch.chunk cuts
    for v in (37, 5, 4, 1, 1031):
        cut = torch.arange(v).chunk(dist.get_world_size())
        mine_of = cut[dist.get_rank()] if dist.get_rank() < len(cut) else torch.arange(0)
        shard = VocabShard.even(v)
        assert shard.num_classes == v and (
            shard.start == int(mine_of[0]) if len(mine_of) else shard.start == v
        )


def many_classes():
    """1031 classes of which no rank has as many as another, real dtypes, entries relative to
    themselves."""
    cuts = tuple(
        (int(c[0]), int(c[-1]) + 1) for c in torch.arange(1031).chunk(dist.get_world_size())
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for form, soft in itertools.product(("logits", "inplace"), (False,)):
            for names in ((), ("none",), ("z-loss", "softcap", "weight")):
                check_logits(
                    form, cuts, soft, names, dtype=dtype, n=70, compare=assert_gradient_close
                )
    x, ids = logits_and_ids(40, 1031, torch.float64)
    classes = my_slice(cuts)
    local = mine(x, classes)
    got = lossfuse.cross_entropy(local, ids, shard=VocabShard.even(1031), label_smoothing=0.1)
    want = program.cross_entropy(x, ids, label_smoothing=0.1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(got, local)[0],
        torch.autograd.grad(want, x)[0][:, classes],
        rtol=1e-10,
        atol=1e-14,
    )


def groups_of_one_and_no_rows():
    """Where what is gathered lies as it was sent, with integers among floats at any offset."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone = VocabShard(0, 37, groups[dist.get_rank()])
    x, _ = logits_and_ids(4, 37)
    for n, weighted in itertools.product((0, 1, 3, 4), (False, True)):
        weight = class_weight(37) if weighted else None
        for target in (torch.arange(n), torch.softmax(x[:n].detach(), 1)):
            given = {"reduction": "none", "label_smoothing": 0.1}
            got = lossfuse.cross_entropy_stats(x[:n], target, weight, shard=alone, **given)
            want = lossfuse.cross_entropy_stats(x[:n], target, weight, **given)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w)
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    for weight in (None, class_weight(37)):
        none = lossfuse.cross_entropy_stats(
            mine(x, classes)[:0], torch.arange(0), weight, reduction="sum", shard=shard
        )
        assert none.loss == 0.0 and none.argmax.shape == (0,)


def shapes():
    """One row, and classes that are not last."""
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    g = torch.Generator().manual_seed(3)
    # one row of which a rank has one class, so that its id looks like logits there
    x, alone = torch.randn(37, generator=g), my_slice(((36, 37), (0, 36)))
    for ids in (torch.tensor([5]), torch.tensor([36])):
        got = lossfuse.cross_entropy(x[alone], ids, shard=VocabShard(alone.start, 37))
        torch.testing.assert_close(got, torch.nn.functional.cross_entropy(x, ids[0]))
    for lead, trail in (((), ()), ((2,), (3,)), ((2,), (3, 2))):
        x = torch.randn(*lead, 37, *trail, generator=g).requires_grad_()
        ids = torch.randint(37, (*lead, *trail), generator=g)
        soft = torch.softmax(torch.randn(x.shape, generator=g), len(lead))
        for target in (ids, soft):
            local = mine(x, classes, len(lead))
            local_target = target if target is ids else mine(target, classes, len(lead))
            for reduction in ("mean", "none"):
                got = lossfuse.cross_entropy(local, local_target, reduction=reduction, shard=shard)
                want = torch.nn.functional.cross_entropy(
                    x.double(), target if target is ids else target.double(), reduction=reduction
                )
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
                ours, theirs = (
                    torch.autograd.grad(got.sum(), local)[0],
                    torch.autograd.grad(want.sum(), x)[0],
                )
                assert_formula_close(
                    ours, theirs.movedim(len(lead), 0)[classes].movedim(0, len(lead))
                )


def same_on_every_rank_and_every_time():
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    x, ids = logits_and_ids(50, 37)
    weight, options = options_of(EVERYTHING, 37, "cpu")

    def once():
        local = mine(x, classes)
        made = lossfuse.cross_entropy_stats(local, ids, weight, shard=shard, **options)
        return [t.detach() for t in made] + [torch.autograd.grad(made.loss, local)[0]]

    first, again = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, first[:-1])
    assert all(torch.equal(a, b) for a, b in zip(*everyones, strict=True))


def in_place_contract():
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    x, ids = logits_and_ids(6, 37)
    for reduction in ("mean", "none"):
        local = mine(x, classes) * 1.0
        saved = (local * local).sum()
        where = local.data_ptr()
        loss = lossfuse.cross_entropy(local, ids, reduction=reduction, inplace=True, shard=shard)
        slopes = []
        local.register_hook(
            lambda g, slopes=slopes: slopes.append(g)
        ) if reduction == "none" else None
        loss.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace=True|consumed"):
            loss.sum().backward()
        with pytest.raises(RuntimeError):
            saved.backward()
        assert where
    with pytest.raises(ValueError, match="leaf"):
        lossfuse.cross_entropy(mine(x, classes), ids, inplace=True, shard=shard)
    # what is raised before anything is written leaves the logits as they were
    local = mine(x, classes) * 1.0
    with pytest.raises(ValueError, match="target differs"):
        lossfuse.cross_entropy(
            local, ids.flip(0) if dist.get_rank() else ids, inplace=True, shard=shard
        )
    assert torch.equal(local, x[:, classes])


def partial_hidden():
    for names in ((), ("none",), EVERYTHING):
        for form in ("head", "head statistics"):
            for impl in ("torch", "reference"):
                check_head(form, TWO, False, names, hidden_grad="partial", impl=impl)


def the_reference():
    for soft in (False, True):
        for names in ((), ("none",), EVERYTHING):
            for form in ("logits", "statistics", "head", "head statistics"):
                check(form, TWO, soft, names, impl="reference")
            check("logits", TWO, soft, names, impl="reference", whole_weight=False)
    # twice differentiable, across ranks
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    x, ids = logits_and_ids(6, 37)
    local = mine(x, classes)
    (ours,) = second_derivative_of(
        lossfuse.cross_entropy(local, ids, shard=shard, impl="reference"), local
    )
    wide = x.detach().double().requires_grad_()
    (theirs,) = second_derivative_of(torch.nn.functional.cross_entropy(wide, ids), wide)
    assert_formula_close(ours, theirs[:, classes])
    none = lossfuse.cross_entropy(
        local[:0], ids[:0], reduction="sum", shard=shard, impl="reference"
    )
    assert none == 0.0 and not torch.autograd.grad(none, local)[0].any()
    # which auto is for a weight that has a gradient, of its classes or of all
    for whole in (False, True):
        weight = class_weight(37).requires_grad_()
        given = weight if whole else mine(weight, classes)
        loss = lossfuse.cross_entropy(local, ids, given, shard=shard)
        wide_weight = weight.detach().double().requires_grad_()
        logp = wide.detach().log_softmax(1).gather(1, ids.clamp(min=0)[:, None])[:, 0]
        kept = wide_weight[ids.clamp(min=0)] * (ids >= 0)
        (theirs,) = torch.autograd.grad(-(kept * logp).sum() / kept.sum(), wide_weight)
        assert_formula_close(
            torch.autograd.grad(loss, given)[0], theirs if whole else theirs[classes]
        )


def where_nobody_looks():
    """As on a GPU: nothing is raised, nothing is read by the host, and what does not fit is NaN."""
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    x, ids = logits_and_ids(6, 37, ignored=0.0)
    local = mine(x, classes)
    with pytest.MonkeyPatch.context() as patch:
        for module in (shard_backend, targets):
            patch.setattr(module, "values_are_at_hand", lambda t: False)
        for form in FORMS:
            check(form, TWO, False, EVERYTHING)
            check(form, TWO, True, EVERYTHING)
        bad = ids.clone()
        bad[3] = 37
        made = lossfuse.cross_entropy_stats(local, bad, reduction="none", shard=shard)
        (slope,) = torch.autograd.grad(made.loss.sum(), local)
        for t in (made.loss, made.lse, made.target_logprob, made.entropy, slope):
            assert t[3].isnan().all() and t[[0, 1, 2, 4, 5]].isfinite().all()
        with_gap = VocabShard(0 if dist.get_rank() == 0 else 21, 38)
        others = ids if dist.get_rank() else (ids + 1) % 37
        exchanged = ids if dist.get_rank() else ids.flip(0)
        for target, of in ((others, shard), (exchanged, shard), (ids, with_gap)):
            made = lossfuse.cross_entropy_stats(local, target, reduction="none", shard=of)
            (slope,) = torch.autograd.grad(made.loss.sum(), local)
            for t in (made.loss, made.lse, made.target_logprob, made.entropy, slope):
                assert t.isnan().all()


def kernels():
    """Ours, in the interpreter."""
    for soft in (False, True):
        for form, names in (
            ("logits", EVERYTHING),
            ("inplace", ()),
            ("statistics", ("none", "weight")),
            ("head", ("smoothing",)),
        ):
            check(form, TWO, soft, names, impl="triton", n=3)


def compiled_by_inductor():
    compiled("inductor")


def compiled(backend="aot_eager"):
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    x, ids = logits_and_ids(6, 37)
    hidden, head, _, head_ids = head_and_ids(6, 5, 37)
    weight = class_weight(37)

    def of_logits(t):
        return lossfuse.cross_entropy(
            t, ids, weight, shard=shard, label_smoothing=0.1, lse_square_scale=0.01
        )

    def of_head(h, w):
        made = lossfuse.linear_cross_entropy_stats(h, w, head_ids, reduction="none", shard=shard)
        return (
            lossfuse.linear_cross_entropy(h, w, head_ids, shard=shard)
            + (made.loss + made.entropy).sum()
        )

    for fn, leaves in (
        (of_logits, [mine(x, classes)]),
        (of_head, [hidden, mine(head, classes, 0)]),
    ):
        want = fn(*leaves)
        got = torch.compile(fn, fullgraph=True, backend=backend)(*leaves)
        torch.testing.assert_close(got, want)
        for g, w in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
        ):
            torch.testing.assert_close(g, w)


def dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, ids = logits_and_ids(6, 37)
    weight, options = options_of(EVERYTHING, 37, "cpu")
    wide = x.detach().double().requires_grad_()
    for call, placements in itertools.product(
        (lossfuse.cross_entropy, lossfuse.cross_entropy_stats), ([Shard(1)], [Replicate()])
    ):
        for target in (ids, distribute_tensor(ids, mesh, [Replicate()])):
            for given in (weight, distribute_tensor(weight, mesh, [Replicate()])):
                leaf = distribute_tensor(x.detach(), mesh, placements).requires_grad_()
                got = call(leaf, target, given, **options)
                got = got if isinstance(got, torch.Tensor) else got.loss
                want = program.cross_entropy(wide, ids, weight.double(), **options)
                assert type(got) is torch.Tensor
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
                (slope,) = torch.autograd.grad(got, leaf)
                assert isinstance(slope, DTensor) and list(slope.placements) == placements
                assert_formula_close(slope.full_tensor(), torch.autograd.grad(want, wide)[0])
    soft = probabilities(6, 37).detach()
    cut = distribute_tensor(x.detach(), mesh, [Shard(1)])
    got = lossfuse.cross_entropy(cut, distribute_tensor(soft, mesh, [Shard(1)]))
    torch.testing.assert_close(
        got.double(), torch.nn.functional.cross_entropy(wide, soft.double()), rtol=1e-5, atol=1e-6
    )
    assert "expected Shard(1)" in raised(
        ValueError, lossfuse.cross_entropy, distribute_tensor(x.detach(), mesh, [Shard(0)]), ids
    )
    partial = DTensor.from_local(x.detach(), mesh, [Partial()])
    assert "Partial" in raised(ValueError, lossfuse.cross_entropy, partial, ids)
    assert "knows its shard" in raised(
        ValueError, lossfuse.cross_entropy, cut, ids, shard=VocabShard.even(37)
    )
    assert "target is a DTensor" in raised(
        ValueError, lossfuse.cross_entropy, x, distribute_tensor(ids, mesh, [Replicate()])
    )

    hidden, head, bias, ids = head_and_ids(6, 5, 37)
    leaves = [t.detach().double().requires_grad_() for t in (hidden, head, bias)]
    for placements in ([Shard(0)], [Replicate()]):
        h = distribute_tensor(hidden.detach(), mesh, [Replicate()]).requires_grad_()
        w, b = (
            distribute_tensor(t.detach(), mesh, placements).requires_grad_() for t in (head, bias)
        )
        got = lossfuse.linear_cross_entropy(h, w, ids, linear_bias=b, label_smoothing=0.1)
        want = program.linear_cross_entropy(
            leaves[0], leaves[1], ids, leaves[2], label_smoothing=0.1
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        for g, t in zip(
            torch.autograd.grad(got, [h, w, b]), torch.autograd.grad(want, leaves), strict=True
        ):
            assert_product_close(g.full_tensor(), t)
    # through the reference, which auto is for a class weight that has a gradient
    h, w, class_weights = hidden.detach(), head.detach(), class_weight(37)
    cut_h = distribute_tensor(h, mesh, [Replicate()]).requires_grad_()
    cut_w = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
    got = lossfuse.linear_cross_entropy(
        cut_h, cut_w, ids, weight=class_weights.clone().requires_grad_()
    )
    want = program.linear_cross_entropy(leaves[0], leaves[1], ids, None, class_weights.double())
    for g, t in zip(
        torch.autograd.grad(got, [cut_h, cut_w]), torch.autograd.grad(want, leaves[:2]), strict=True
    ):
        assert_product_close(g.full_tensor(), t)
    w = cut_w
    assert "unshard the weight first" in raised(
        ValueError, lossfuse.linear_cross_entropy, hidden, w, ids
    )
    rows, classes = (distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in (hidden, head))
    assert "expected Replicate on its mesh" in raised(
        ValueError, lossfuse.linear_cross_entropy, rows, classes, ids
    )


def other_dtypes_of_heads():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        hidden, head, bias, ids = head_and_ids(64, 24, 37, dtype)
        classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
        leaves = [hidden, mine(head, classes, 0), mine(bias, classes)]
        got = lossfuse.linear_cross_entropy(*leaves[:2], ids, linear_bias=leaves[2], shard=shard)
        wide = [t.detach().double().requires_grad_() for t in (hidden, head, bias)]
        want = program.linear_cross_entropy(wide[0], wide[1], ids, wide[2])
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        slopes = torch.autograd.grad(got, leaves)
        theirs = torch.autograd.grad(want, wide)
        worst = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
        for g, t in zip(slopes, (theirs[0], theirs[1][classes], theirs[2][classes]), strict=True):
            assert g.dtype == dtype
            assert float((g.double() - t).norm() / t.norm()) < worst
    # autocast, whose operands are rounded first
    hidden, head, bias, ids = head_and_ids(64, 24, 37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lossfuse.linear_cross_entropy(hidden, mine(head, classes, 0), ids, shard=shard)
    want = lossfuse.linear_cross_entropy(hidden.bfloat16(), head.bfloat16(), ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def weights_of_other_ranks_in_float16():
    """As on a GPU, where gradients of float16 logits have a unit: a target's weight may be out of
    proportion to all of another rank."""
    weight = torch.ones(37)
    weight[20:] = 1e4
    hidden, head, _, ids = head_and_ids(64, 24, 37, torch.float16)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    theirs = torch.autograd.grad(
        program.linear_cross_entropy(*wide, ids, None, weight.double()), wide
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_chunks, "mixes", lambda device: True)
        for cuts in (TWO, ((37, 37), (0, 37))):
            classes = my_slice(cuts)
            leaves = [hidden, mine(head, classes, 0)]
            loss = lossfuse.linear_cross_entropy(
                *leaves, ids, weight=weight, shard=VocabShard(classes.start, 37)
            )
            slopes = torch.autograd.grad(loss, leaves)
            for g, t in zip(slopes, (theirs[0], theirs[1][classes]), strict=True):
                assert float((g.double() - t).norm()) <= 2e-3 * float(t.norm())


def subgroups():
    """A shard of a group that is not all ranks: two pairs that know nothing of one another."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[dist.get_rank() // 2]
    x, ids = logits_and_ids(6, 37, seed=dist.get_rank() // 2)
    shard = VocabShard.even(37, pair)
    classes = slice(shard.start, min(shard.start + 19, 37))
    local = mine(x, classes)
    got = lossfuse.cross_entropy(local, ids, shard=shard)
    want = torch.nn.functional.cross_entropy(x.double(), ids)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert_formula_close(
        torch.autograd.grad(got, local)[0], torch.autograd.grad(want, x)[0][:, classes]
    )


def by_modules():
    classes, shard = my_slice(TWO), VocabShard(my_slice(TWO).start, 37)
    x, ids = logits_and_ids(6, 37)
    loss = lossfuse.CrossEntropyLoss(label_smoothing=0.1, shard=shard)(mine(x, classes), ids)
    torch.testing.assert_close(
        loss.double(), torch.nn.functional.cross_entropy(x.double(), ids, label_smoothing=0.1)
    )
    # a copy, as an average of weights takes one, is of the same group
    module = lossfuse.CrossEntropyLoss(shard=VocabShard(classes.start, 37, dist.group.WORLD))
    torch.testing.assert_close(
        copy.deepcopy(module)(mine(x, classes), ids), module(mine(x, classes), ids)
    )


ON_TWO = (
    errors,
    shards_that_are_none,
    many_classes,
    groups_of_one_and_no_rows,
    shapes,
    same_on_every_rank_and_every_time,
    in_place_contract,
    partial_hidden,
    the_reference,
    dtensors,
    other_dtypes_of_heads,
    weights_of_other_ranks_in_float16,
    by_modules,
    compiled,
    kernels,
    where_nobody_looks,
)
# those of test_promises, of slices of the classes
PROMISES = promises_over_ranks(every=False)
ON_FOUR = (shards_that_are_none, many_classes, subgroups)


def one_of_these(case):
    if isinstance(case, str):
        globals()[case]()
    elif case in PROMISES:
        holds_over_ranks(case)
    else:
        every_option(case)


def test_two_ranks():
    cases = [(form, soft, tuple(SINGLE)) for form, soft in GRID]
    cases_on_ranks(2, one_of_these, [*cases, *(f.__name__ for f in ON_TWO), *PROMISES])


def test_four_ranks():
    cases = [(form, soft, (EVERYTHING,)) for form, soft in GRID if form not in ("inplace", "head")]
    cases_on_ranks(4, one_of_these, [*cases, *(f.__name__ for f in ON_FOUR)])


def several_in_one_graph():
    """What the graph makes takes memory by the shard's size in one loss and not in the other:
    gathers go by in one order all the same."""
    cuts = ((0, 2000), (2000, 2037))
    classes, shard = my_slice(cuts), VocabShard(my_slice(cuts).start, 2037)
    x, ids = logits_and_ids(6, 2037)
    hidden, head, _, head_ids = head_and_ids(50, 64, 2037)
    leaves = [hidden, mine(head, classes, 0), mine(x, classes)]

    def losses(h, w, t):
        of_head = lossfuse.linear_cross_entropy(torch.tanh(h) * 2.0, w, head_ids, shard=shard)
        return of_head + lossfuse.cross_entropy(torch.tanh(t) * 5.0, ids, shard=shard)

    want = losses(*leaves)
    got = torch.compile(losses, fullgraph=True)(*leaves)
    assert not torch._inductor.config.reorder_for_peak_memory
    torch.testing.assert_close(got, want)
    for g, w in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(g, w)


@pytest.mark.slow
def test_compiled_by_inductor():
    cases_on_ranks(2, one_of_these, ["compiled_by_inductor", "several_in_one_graph"])


def test_a_shard_needs_a_group():
    with pytest.raises(ValueError, match="init_process_group"):
        VocabShard(0, 5)
