"""Losses whose classes are sharded across ranks, against the torch program on whole rows in fp64:
gloo, two and four ranks. A failure names the function below that ran, and its rank."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

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
    row_weights,
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
V = 37
TWO = ((0, 20), (20, V))
# in no order, one of them empty
FOUR = ((9, 30), (0, 9), (9, 9), (30, V))
cross_entropy, linear_cross_entropy = lossfuse.cross_entropy, lossfuse.linear_cross_entropy


def my_slice(cuts):
    """Classes of this rank, of (start, stop) by rank."""
    return slice(*cuts[dist.get_rank()])


def cut(t, classes, dim=-1):
    return t.movedim(dim, 0)[classes].movedim(0, dim)


def mine(t, classes, dim=-1):
    """The shard of a tensor on this rank: a leaf of its own where the whole is one."""
    if t is None:
        return None
    return cut(t.detach(), classes, dim).contiguous().requires_grad_(t.requires_grad)


def one_of_two():
    """(classes of this rank, the shard)."""
    classes = my_slice(TWO)
    return classes, VocabShard(classes.start, V)


def logits_of_two(n=6, **how):
    """(whole logits, local logits, ids, the shard)."""
    classes, shard = one_of_two()
    x, ids = logits_and_ids(n, V, **how)
    return x, mine(x, classes), ids, shard


def head_of_two(n=6, d=5, dtype=torch.float32):
    classes, shard = one_of_two()
    hidden, head, _, ids = head_and_ids(n, d, V, dtype)
    return hidden, mine(head, classes, 0), ids, shard


def close(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-6)


def check(
    form,
    cuts,
    soft,
    names,
    *,
    whole_weight=True,
    impl="torch",
    dtype=torch.float32,
    n=6,
    hidden_grad="reduced",
    compare=None,
):
    """A loss or statistics and all gradients; the oracle sees all classes, and its gradients are
    cut."""
    v, classes, is_head = max(stop for _, stop in cuts), my_slice(cuts), form.startswith("head")
    if is_head:
        *operands, ids = head_and_ids(n, 5, v, dtype)
        dims = (None, 0, 0)
    else:
        *operands, ids = logits_and_ids(n, v, dtype)
        dims = (1,)
    target = probabilities(n, v) if soft else ids
    weight, options = options_of(names, v, "cpu", n)
    wide, leaves = program.wide_leaves(*operands, target, weight)
    local = [t if d is None else mine(t, classes, d) for t, d in zip(operands, dims, strict=True)]
    local.append(mine(target, classes) if soft else target)
    given = {"weight": weight if whole_weight else mine(weight, classes), "impl": impl, **options}
    given["shard"] = VocabShard(classes.start, v, hidden_grad=hidden_grad)
    name = "cross_entropy" + "_stats" * form.endswith("statistics")
    if is_head:
        hidden, head, bias, t = local
        got = getattr(lossfuse, f"linear_{name}")(
            hidden, head, t, linear_bias=bias, options=CHUNKS, **given
        )
        hidden, head, bias, *rest = wide
        want = getattr(program, f"linear_{name}")(hidden, head, rest[0], bias, rest[1], **options)
    else:
        given |= {"inplace": True} if form == "inplace" else {}
        x = local[0] * 1.0 if form == "inplace" else local[0]
        got = getattr(lossfuse, name)(x, local[-1], **given)
        want = getattr(program, name)(*wide, **options)
    own = [t for t in local if t.requires_grad]
    if form.endswith("statistics"):
        assert_statistics_close(got, want)
        ups = upstreams(got)
        ours, theirs = differentiated(got, own, ups), differentiated(want, leaves, ups)
    else:
        close(got, want)
        up = upstream(operands[0], options)
        ours, theirs = (
            torch.autograd.grad(got, own, up),
            torch.autograd.grad(want, leaves, up.double()),
        )
    if hidden_grad == "partial":
        dist.all_reduce(ours[0])
    compare = compare or (assert_product_close if is_head else assert_formula_close)
    for g, w, d in zip(ours, theirs, (*dims, 1), strict=False):
        assert g.dtype in (dtype, torch.float32)
        compare(g, w if d is None else cut(w, classes, d))


def every_option(case):
    form, soft, combinations = case
    cuts = TWO if dist.get_world_size() == 2 else FOUR
    for names in combinations:
        check(form, cuts, soft, names)
        if "weight" in names:
            check(form, cuts, soft, names, whole_weight=False)


GRID = list(itertools.product(FORMS, (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_every_pair_of_options(n):
    cases = [(form, soft, (names,)) for form, soft in GRID for names in COMBINATIONS]
    cases_on_ranks(n, every_option, cases, timeout=5000.0)


def random_call(case):
    form, cuts, soft, names, n, whole_weight = case
    check(form, cuts, soft, names, n=n, whole_weight=whole_weight)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_random_cuts_of_random_rows(n):
    """Shards of any sizes, some empty, in any order of ranks."""
    draws = pytest.importorskip("draws", exc_type=ImportError)
    cases = draws.drawn(draws.calls_of_ranks(n, FORMS, COMBINATIONS), 150)
    cases_on_ranks(n, random_call, cases, timeout=5000.0)


# --- refusals: functions that run on each rank


def everyone_raises(expected, sentence, call, *args, **options):
    """Every rank raises, with the same words."""
    with pytest.raises(expected) as caught:
        call(*args, **options)
    assert sentence in str(caught.value), caught.value
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, str(caught.value))
    assert len(set(everyones)) == 1, everyones


def a_target_out_of_range():
    _, local, ids, shard = logits_of_two()
    bad = ids.clone()
    bad[3] = V
    for target, rank in ((bad, 0), (bad if dist.get_rank() else ids, 1)):
        words = f"target of row 3 is {V} on rank {rank}"
        everyone_raises(IndexError, words, cross_entropy, local, target, shard=shard)
    # nothing is left half done
    check("logits", TWO, False, ())


def a_target_out_of_range_of_a_head():
    hidden, head, ids, shard = head_of_two()
    other = ids.clamp(max=36) + V * dist.get_rank()
    everyone_raises(IndexError, "on rank 1", linear_cross_entropy, hidden, head, other, shard=shard)
    # a row of the call, not of its chunk, or of the rows that are left
    late = torch.where(ids == -100, -100, 0)
    late[0], late[5] = -100, V
    for options in (CHUNKS, LinearOptions(drop_ignored=True)):
        for form in (linear_cross_entropy, lossfuse.linear_cross_entropy_stats):
            args = (form, hidden, head, late)
            everyone_raises(IndexError, "row 5 is 37", *args, shard=shard, options=options)


def targets_that_differ():
    _, local, ids, shard = logits_of_two()
    rank, one_row = dist.get_rank(), ids.clone()
    one_row[0] = (ids[0] + 1) % V
    pairs = [(ids, one_row), (ids, ids.flip(0))]
    # alike in their sum, and in their sum with rows counted
    pairs += [(torch.tensor([1, 2, 2, 1]), torch.tensor([2, 1, 1, 2]))]
    pairs += [(torch.tensor([3, 7, 3]), torch.tensor([4, 5, 4]))]
    for pair in pairs:
        args, words = (local[: len(pair[0])], pair[rank]), "target differs between the ranks"
        everyone_raises(ValueError, words, cross_entropy, *args, shard=shard)
    hidden, head, ids, _ = head_of_two()
    args = (linear_cross_entropy, hidden, head, torch.full((6,), -100) if rank else ids)
    drop = LinearOptions(drop_ignored=True)
    everyone_raises(ValueError, "target differs", *args, shard=shard, options=drop)


# an option -> its values on two ranks
DIFFERING = {
    "label_smoothing": (0.1, 0.2),
    "softcap": (3.0, 4.0),
    "logit_scale": (None, 2.0),
    "lse_square_scale": (0.0, 0.1),
    "ignore_index": (-100, 3),
}


def options_that_differ():
    _, local, ids, shard = logits_of_two()
    rank, ids = dist.get_rank(), ids.clamp(min=0)
    for name, values in DIFFERING.items():
        args, given = (cross_entropy, local, ids), {name: values[rank]}
        words = "the ranks of shard.group differ in"
        everyone_raises(ValueError, words, *args, shard=shard, **given)
    soft, given = torch.rand(local.shape), {"softcap": 3.0 + rank}
    everyone_raises(ValueError, "differ in", cross_entropy, local, soft, shard=shard, **given)
    more = VocabShard(shard.start, V + rank)
    everyone_raises(ValueError, "differ in num_classes", cross_entropy, local, ids, shard=more)
    # a number is one of any type
    same = {"softcap": (3, 3.0)[rank], "ignore_index": (-100, np.int64(-100))[rank]}
    cross_entropy(local, ids, shard=shard, **same)


def shards_that_do_not_fit_together():
    _, local, ids, shard = logits_of_two()
    rank, words = dist.get_rank(), "expected each of [0, 38) once"
    for call in (lossfuse.cross_entropy_stats, cross_entropy):
        gap, said = VocabShard(21 * rank, 38), f"hold the classes [0, 20), [21, 38); {words}"
        everyone_raises(ValueError, said, call, local, ids, shard=gap)
    overlap, ids_of_36 = VocabShard(19 * rank, 36), ids.clamp(max=35)
    args = (cross_entropy, local, ids_of_36)
    everyone_raises(ValueError, "[0, 20), [19, 36)", *args, shard=overlap)
    missing = VocabShard(shard.start, 40)
    args = (cross_entropy, local, ids)
    everyone_raises(ValueError, "expected each of [0, 40) once", *args, shard=missing)


def numbers_of_rows_that_differ():
    _, local, ids, shard = logits_of_two()
    rank, (_, head, _, _) = dist.get_rank(), head_of_two()
    few, many = 6 - rank, 300 if rank else 256
    chunks = LinearOptions(chunk_bytes=128 * 32 * 4)
    args = (torch.ones(many, 5), head, torch.zeros(many, dtype=torch.int64))
    with lossfuse.debug_targets():
        pair = (cross_entropy, local[:few], ids[:few])
        everyone_raises(ValueError, "have [6, 5] rows", *pair, shard=shard)
        pair = (linear_cross_entropy, *args)
        everyone_raises(ValueError, "have [256, 300] rows", *pair, shard=shard, options=chunks)


def second_derivative_of(loss, leaf):
    (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return torch.autograd.grad(g.square().sum(), leaf)


def arguments_that_do_not_fit_a_shard():
    classes, _ = one_of_two()
    _, local, ids, shard = logits_of_two()
    hidden, head, head_ids, _ = head_of_two()
    expected = rf"expected \({classes.stop - classes.start},\) or, of all classes, \(37,\)"
    for error, words, call in (
        (
            TypeError,
            "must be a lossfuse.VocabShard",
            lambda: linear_cross_entropy(hidden, head, head_ids, shard=(0, V)),
        ),
        (
            ValueError,
            r"with shard it must be \(C, D\)",
            lambda: linear_cross_entropy(hidden, head[:, None], head_ids[:, None], shard=shard),
        ),
        (ValueError, expected, lambda: cross_entropy(local, ids, torch.ones(5), shard=shard)),
        (
            RuntimeError,
            "no second derivative",
            lambda: second_derivative_of(cross_entropy(local, ids, shard=shard), local),
        ),
        (
            ValueError,
            "transform is active; with shard there is no reference",
            lambda: torch.func.grad(lambda t: cross_entropy(t, ids, shard=shard))(local.detach()),
        ),
        (ValueError, "leaf", lambda: cross_entropy(local, ids, inplace=True, shard=shard)),
    ):
        with pytest.raises(error, match=words):
            call()


def bad_shards():
    for error, words, args in (
        (ValueError, "", (-1, 5)),
        (ValueError, "", (6, 5)),
        (ValueError, "", (0, 0)),
        (TypeError, "", (1.0, 5)),
        (TypeError, "", (0, True)),
        (ValueError, "", (0, 2**31)),
        (TypeError, "group is a str", (0, 5, "world")),
    ):
        with pytest.raises(error, match=words):
            VocabShard(*args)
    with pytest.raises(ValueError, match="hidden_grad"):
        VocabShard(0, 5, hidden_grad="some")


def even_shards():
    """As torch.chunk cuts."""
    for v in (V, 5, 4, 1, 1031):
        chunks = torch.arange(v).chunk(dist.get_world_size())
        shard, own = VocabShard.even(v), chunks[dist.get_rank() :][:1]
        assert (shard.num_classes, shard.start) == (v, int(own[0][0]) if own else v)


# --- numbers


def many_classes():
    """1031 classes in shards of different sizes, real dtypes, entries relative to themselves."""
    chunks = torch.arange(1031).chunk(dist.get_world_size())
    cuts = tuple((int(c[0]), int(c[-1]) + 1) for c in chunks)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for form in ("logits", "inplace"):
            for names in ((), ("none",), ("z-loss", "softcap", "weight")):
                how = {"dtype": dtype, "n": 70, "compare": assert_gradient_close}
                check(form, cuts, False, names, **how)
    x, ids = logits_and_ids(40, 1031, torch.float64)
    classes = my_slice(cuts)
    local = mine(x, classes)
    got = cross_entropy(local, ids, shard=VocabShard.even(1031), label_smoothing=0.1)
    want = program.cross_entropy(x, ids, label_smoothing=0.1)
    grad, whole = torch.autograd.grad(got, local)[0], torch.autograd.grad(want, x)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, whole[:, classes], rtol=1e-10, atol=1e-14)


def groups_of_one_and_no_rows():
    """There the gathered bytes lie as they were sent, integers among floats at any offset."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone = VocabShard(0, V, groups[dist.get_rank()])
    x, local, _, shard = logits_of_two(4)
    for n, weight in itertools.product((0, 1, 3, 4), (None, class_weight(V))):
        for target in (torch.arange(n), torch.softmax(x[:n].detach(), 1)):
            given = {"reduction": "none", "label_smoothing": 0.1}
            got = lossfuse.cross_entropy_stats(x[:n], target, weight, shard=alone, **given)
            want = lossfuse.cross_entropy_stats(x[:n], target, weight, **given)
            torch.testing.assert_close(tuple(got), tuple(want))
    for weight in (None, class_weight(V)):
        args = (local[:0], torch.arange(0), weight)
        none = lossfuse.cross_entropy_stats(*args, reduction="sum", shard=shard)
        assert none.loss == 0.0 and none.argmax.shape == (0,)


def shapes():
    """One row, and classes that are not last."""
    g, (classes, shard) = torch.Generator().manual_seed(3), one_of_two()
    # one row of which a rank has one class, so that its id looks like logits there
    x, alone = torch.randn(V, generator=g), my_slice(((36, V), (0, 36)))
    for ids in (torch.tensor([5]), torch.tensor([36])):
        got = cross_entropy(x[alone], ids, shard=VocabShard(alone.start, V))
        torch.testing.assert_close(got, F.cross_entropy(x, ids[0]))
    for lead, trail in (((), ()), ((2,), (3,)), ((2,), (3, 2))):
        dim = len(lead)
        x = torch.randn(*lead, V, *trail, generator=g).requires_grad_()
        ids = torch.randint(V, (*lead, *trail), generator=g)
        soft = torch.softmax(torch.randn(x.shape, generator=g), dim)
        for target, reduction in itertools.product((ids, soft), ("mean", "none")):
            local, wide_target = mine(x, classes, dim), target.double() if target is soft else ids
            local_target = mine(target, classes, dim) if target is soft else ids
            got = cross_entropy(local, local_target, reduction=reduction, shard=shard)
            want = F.cross_entropy(x.double(), wide_target, reduction=reduction)
            close(got, want)
            grad, whole = (
                torch.autograd.grad(t.sum(), leaf)[0] for t, leaf in ((got, local), (want, x))
            )
            assert_formula_close(grad, cut(whole, classes, dim))


def same_on_every_rank_and_every_time():
    classes, shard = one_of_two()
    x, ids = logits_and_ids(50, V)
    weight, options = options_of(EVERYTHING, V, "cpu")

    def once():
        local = mine(x, classes)
        made = lossfuse.cross_entropy_stats(local, ids, weight, shard=shard, **options)
        return [t.detach() for t in made] + [torch.autograd.grad(made.loss, local)[0]]

    first, again = once(), once()
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, first[:-1])
    assert all(map(torch.equal, first, again)) and all(map(torch.equal, *everyones))


def in_place_contract():
    _, whole, ids, shard = logits_of_two()
    for reduction in ("mean", "none"):
        local = whole * 1.0
        saved = (local * local).sum()
        loss = cross_entropy(local, ids, reduction=reduction, inplace=True, shard=shard).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace=True|consumed"):
            loss.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()
    # an error that comes before the write leaves the logits as they were
    local, other = whole * 1.0, ids.flip(0) if dist.get_rank() else ids
    with pytest.raises(ValueError, match="target differs"):
        cross_entropy(local, other, inplace=True, shard=shard)
    assert torch.equal(local, whole)


def partial_hidden():
    grid = itertools.product(((), ("none",), EVERYTHING), ("head", "head statistics"))
    for names, form in grid:
        check(form, TWO, False, names, hidden_grad="partial")


def the_reference():
    """It knows no shards: asked for by name, or because class weights require grad."""
    _, local, ids, shard = logits_of_two()
    hidden, head, _, _ = head_of_two()
    weight = torch.ones(V, requires_grad=True)
    named, needed = (
        "impl is 'reference' but with shard there is no",
        "weight requires grad, .* shard",
    )
    for function in (cross_entropy, lossfuse.cross_entropy_stats):
        with pytest.raises(ValueError, match=named):
            function(local, ids, shard=shard, impl="reference")
        with pytest.raises(ValueError, match=needed):
            function(local, ids, weight, shard=shard)
    for function in (linear_cross_entropy, lossfuse.linear_cross_entropy_stats):
        with pytest.raises(ValueError, match=named):
            function(hidden, head, ids, shard=shard, impl="reference")
        with pytest.raises(ValueError, match=needed):
            function(hidden, head, ids, weight=weight, shard=shard)


def values_that_cannot_be_checked():
    """As on a GPU: nothing raises, the host reads nothing, and disagreements are NaN."""
    _, local, ids, shard = logits_of_two(ignored=0.0)
    rank = dist.get_rank()

    def results(target, shard):
        made = lossfuse.cross_entropy_stats(local, target, reduction="none", shard=shard)
        (grad,) = torch.autograd.grad(made.loss.sum(), local)
        return made.loss, made.lse, made.target_logprob, made.entropy, grad

    with pytest.MonkeyPatch.context() as patch:
        for module in (shard_backend, targets):
            patch.setattr(module, "values_are_readable", lambda t: False)
        for form, soft in GRID:
            check(form, TWO, soft, EVERYTHING)
        bad = ids.clone()
        bad[3] = V
        for t in results(bad, shard):
            assert t[3].isnan().all() and t[[0, 1, 2, 4, 5]].isfinite().all()
        others, exchanged = ids if rank else (ids + 1) % V, ids if rank else ids.flip(0)
        gap = VocabShard(21 * rank, 38)
        for target, of in ((others, shard), (exchanged, shard), (ids, gap)):
            assert all(t.isnan().all() for t in results(target, of))


def kernels():
    """In the interpreter."""
    for form, names in (
        ("logits", EVERYTHING),
        ("inplace", ()),
        ("statistics", ("none", "weight")),
        ("head", ("smoothing",)),
    ):
        for soft in (False, True):
            check(form, TWO, soft, names, impl="triton", n=3)


def other_dtypes_of_heads():
    classes, shard = one_of_two()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        hidden, head, bias, ids = head_and_ids(64, 24, V, dtype)
        leaves = [hidden, mine(head, classes, 0), mine(bias, classes)]
        got = linear_cross_entropy(*leaves[:2], ids, linear_bias=leaves[2], shard=shard)
        wide = [t.detach().double().requires_grad_() for t in (hidden, head, bias)]
        want = program.linear_cross_entropy(wide[0], wide[1], ids, wide[2])
        close(got, want)
        worst = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
        dh, dw, db = torch.autograd.grad(want, wide)
        for g, t in zip(
            torch.autograd.grad(got, leaves), (dh, dw[classes], db[classes]), strict=True
        ):
            assert g.dtype == dtype and float((g.double() - t).norm() / t.norm()) < worst
    # autocast, which rounds operands first
    hidden, head, bias, ids = head_and_ids(64, 24, V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(hidden, mine(head, classes, 0), ids, shard=shard)
    close(got, linear_cross_entropy(hidden.bfloat16(), head.bfloat16(), ids))


def weights_of_other_ranks_in_float16():
    """As on a GPU, where gradients of float16 logits have a unit: a target's weight may be out of
    proportion to all weights of another rank."""
    weight = torch.ones(V)
    weight[20:] = 1e4
    hidden, head, _, ids = head_and_ids(64, 24, V, torch.float16)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    want = program.linear_cross_entropy(*wide, ids, None, weight.double())
    dhidden, dhead = torch.autograd.grad(want, wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_chunks, "mm_returns_fp32", lambda device: True)
        for cuts in (TWO, ((V, V), (0, V))):
            classes = my_slice(cuts)
            leaves = [hidden, mine(head, classes, 0)]
            shard = VocabShard(classes.start, V)
            loss = linear_cross_entropy(*leaves, ids, weight=weight, shard=shard)
            grads = torch.autograd.grad(loss, leaves)
            for g, t in zip(grads, (dhidden, dhead[classes]), strict=True):
                assert float((g.double() - t).norm()) <= 2e-3 * float(t.norm())


def subgroups():
    """Shards of a group that is not all ranks: two pairs that know nothing of one another."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    x, ids = logits_and_ids(6, V, seed=dist.get_rank() // 2)
    shard = VocabShard.even(V, pair)
    classes = slice(shard.start, min(shard.start + 19, V))
    local = mine(x, classes)
    got, want = cross_entropy(local, ids, shard=shard), F.cross_entropy(x.double(), ids)
    close(got, want)
    whole = torch.autograd.grad(want, x)[0]
    assert_formula_close(torch.autograd.grad(got, local)[0], whole[:, classes])


def modules():
    x, local, ids, shard = logits_of_two()
    loss = lossfuse.CrossEntropyLoss(label_smoothing=0.1, shard=shard)(local, ids)
    close(loss, F.cross_entropy(x.double(), ids, label_smoothing=0.1))
    # a copy, as an average of weights takes one, has the same group
    world = VocabShard(shard.start, V, dist.group.WORLD)
    module = lossfuse.CrossEntropyLoss(shard=world)
    torch.testing.assert_close(copy.deepcopy(module)(local, ids), module(local, ids))


# --- DTensors


def dtensor_logits():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = lambda t, placement: distribute_tensor(t.detach(), mesh, [placement])  # noqa: E731
    x, ids = logits_and_ids(6, V)
    weight, options = options_of(EVERYTHING, V, "cpu")
    wide = x.detach().double().requires_grad_()
    grid = itertools.product(
        (cross_entropy, lossfuse.cross_entropy_stats),
        (Shard(1), Replicate()),
        (ids, spread(ids, Replicate())),
        (weight, spread(weight, Replicate())),
    )
    for call, placement, target, given in grid:
        leaf = spread(x, placement).requires_grad_()
        got = call(leaf, target, given, **options)
        got = got if isinstance(got, torch.Tensor) else got.loss
        want = program.cross_entropy(wide, ids, weight.double(), **options)
        assert type(got) is torch.Tensor
        close(got, want)
        (grad,) = torch.autograd.grad(got, leaf)
        assert isinstance(grad, DTensor) and list(grad.placements) == [placement]
        assert_formula_close(grad.full_tensor(), torch.autograd.grad(want, wide)[0])
    soft, sharded = probabilities(6, V).detach(), spread(x, Shard(1))
    close(cross_entropy(sharded, spread(soft, Shard(1))), F.cross_entropy(wide, soft.double()))
    weights = row_weights(6, "cpu")
    for row_weight in (weights, spread(weights, Replicate())):
        want = program.cross_entropy(wide, ids, row_weight=weights)
        close(cross_entropy(sharded, ids, row_weight=row_weight), want)
    partial = DTensor.from_local(x.detach(), mesh, [Partial()])
    for words, args, given in (
        (r"expected Shard\(1\)", (spread(x, Shard(0)), ids), {}),
        ("Partial", (partial, ids), {}),
        ("knows its shard", (sharded, ids), {"shard": VocabShard.even(V)}),
        ("target is a DTensor", (x, spread(ids, Replicate())), {}),
        ("row_weight is a DTensor", (x, ids), {"row_weight": spread(weights, Replicate())}),
        (
            "row_weight is a DTensor placed",
            (sharded, ids),
            {"row_weight": spread(weights, Shard(0))},
        ),
    ):
        with pytest.raises(ValueError, match=words):
            cross_entropy(*args, **given)


def dtensor_heads():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = lambda t, placement: distribute_tensor(t.detach(), mesh, [placement]).requires_grad_()  # noqa: E731
    hidden, head, bias, ids = head_and_ids(6, 5, V)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head, bias)]
    weighted = class_weight(V)
    for placement, given, oracle in (
        (Shard(0), {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        (Replicate(), {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        (Shard(0), {"weight": weighted}, {"weight": weighted.double()}),
    ):
        h, w, b = spread(hidden, Replicate()), spread(head, placement), spread(bias, placement)
        got = linear_cross_entropy(h, w, ids, linear_bias=b, **given)
        want = program.linear_cross_entropy(wide[0], wide[1], ids, wide[2], **oracle)
        close(got, want)
        pairs = zip(
            torch.autograd.grad(got, [h, w, b]), torch.autograd.grad(want, wide), strict=True
        )
        for g, t in pairs:
            assert_product_close(g.full_tensor(), t)
    with pytest.raises(ValueError, match="unshard the weight first"):
        linear_cross_entropy(hidden, spread(head, Shard(0)), ids)
    with pytest.raises(ValueError, match="expected Replicate on its mesh"):
        linear_cross_entropy(spread(hidden, Shard(0)), spread(head, Shard(0)), ids)


# --- compilers


def assert_compiled_is_eager(f, leaves, backend):
    want, got = f(*leaves), torch.compile(f, fullgraph=True, backend=backend)(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t, leaves) for t in (got, want)))


def compiled_by_inductor():
    compiled("inductor")


def compiled(backend="aot_eager"):
    _, local, ids, shard = logits_of_two()
    hidden, head, head_ids, _ = head_of_two()
    weight = class_weight(V)

    def of_logits(t):
        options = {"label_smoothing": 0.1, "lse_square_scale": 0.01}
        return cross_entropy(t, ids, weight, shard=shard, **options)

    def of_head(h, w):
        made = lossfuse.linear_cross_entropy_stats(h, w, head_ids, reduction="none", shard=shard)
        loss = linear_cross_entropy(h, w, head_ids, shard=shard)
        return loss + (made.loss + made.entropy).sum()

    assert_compiled_is_eager(of_logits, [local], backend)
    assert_compiled_is_eager(of_head, [hidden, head], backend)


def several_in_one_graph():
    """Memory of the graph depends on the shard's size in one loss and not in the other: gathers
    keep one order all the same."""
    classes = my_slice(((0, 2000), (2000, 2037)))
    shard = VocabShard(classes.start, 2037)
    x, ids = logits_and_ids(6, 2037)
    hidden, head, _, head_ids = head_and_ids(50, 64, 2037)

    def losses(h, w, t):
        of_head = linear_cross_entropy(torch.tanh(h) * 2.0, w, head_ids, shard=shard)
        return of_head + cross_entropy(torch.tanh(t) * 5.0, ids, shard=shard)

    leaves = [hidden, mine(head, classes, 0), mine(x, classes)]
    assert_compiled_is_eager(losses, leaves, "inductor")
    assert not torch._inductor.config.reorder_for_peak_memory


# --- the tests


ON_TWO = (
    a_target_out_of_range,
    a_target_out_of_range_of_a_head,
    targets_that_differ,
    options_that_differ,
    shards_that_do_not_fit_together,
    numbers_of_rows_that_differ,
    arguments_that_do_not_fit_a_shard,
    bad_shards,
    even_shards,
    many_classes,
    groups_of_one_and_no_rows,
    shapes,
    same_on_every_rank_and_every_time,
    in_place_contract,
    partial_hidden,
    the_reference,
    values_that_cannot_be_checked,
    kernels,
    other_dtypes_of_heads,
    weights_of_other_ranks_in_float16,
    modules,
    dtensor_logits,
    dtensor_heads,
    compiled,
)
ON_FOUR = (even_shards, many_classes, subgroups)
PROMISES = promises_over_ranks(every=False)


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


@pytest.mark.slow
def test_compiled_by_inductor():
    cases_on_ranks(2, one_of_these, ["compiled_by_inductor", "several_in_one_graph"])


def test_a_shard_needs_a_group():
    with pytest.raises(ValueError, match="init_process_group"):
        VocabShard(0, 5)
