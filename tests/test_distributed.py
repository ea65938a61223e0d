"""Losses whose classes are cut among ranks, against the torch program on whole rows in fp64; gloo, two and four ranks, started once each."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist

import lossfuse
import program
from closeness import assert_formula_close, assert_gradient_close, assert_product_close, assert_statistics_close
from lossfuse import LinearOptions, VocabShard
from options import COMBINATIONS, DIFFERENTIABLE, EVERYTHING, OPTIONS, differentiated, options_of, upstream, upstreams
from ranks import cases_on_ranks
from rows import class_weight, head_and_ids, logits_and_ids, probabilities

SINGLE = [(), *((name,) for name in OPTIONS), EVERYTHING, (*EVERYTHING, "none"), (*EVERYTHING, "normalizer")]
FORMS = ("logits", "inplace", "statistics", "head", "head statistics")
# three chunks of rows
CHUNKS = LinearOptions(chunk_bytes=2 * 32 * 4)


def my_slice(cuts):
    """Classes of this rank, from (start, stop) of each."""
    start, stop = cuts[dist.get_rank()]
    return slice(start, stop)


def mine(t, classes, dim=-1):
    """The part of a tensor that this rank holds: a leaf of its own where the whole is one."""
    return t if t is None else t.detach().movedim(dim, 0)[classes].movedim(0, dim).contiguous().requires_grad_(t.requires_grad)


@contextlib.contextmanager
def saying(what):
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {error}") from error


def check_logits(form, cuts, soft, names, *, whole_weight=True, impl="torch", dtype=torch.float32, n=6, compare=assert_formula_close):
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
        got = lossfuse.cross_entropy(local * 1.0 if inplace else local, local_target, inplace=inplace, **given)
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


def check_head(form, cuts, soft, names, *, whole_weight=True, impl="torch", n=6, hidden_grad="reduced"):
    v = cuts_end(cuts)
    classes = my_slice(cuts)
    shard = VocabShard(classes.start, v, hidden_grad=hidden_grad)
    hidden, head, bias, ids = head_and_ids(n, 5, v)
    target = probabilities(n, v) if soft else ids
    weight, options = options_of(names, v, "cpu")
    (wide, wide_head, wide_bias, wide_target, wide_weight), leaves = program.wide_leaves(hidden, head, bias, target, weight)
    local_head, local_bias, local_target = mine(head, classes, 0), mine(bias, classes), mine(target, classes) if soft else target
    given = {
        "linear_bias": local_bias, "weight": weight if whole_weight else mine(weight, classes), "shard": shard, "impl": impl,
        "options": CHUNKS, **options,
    }  # fmt: skip
    own = [t for t in (hidden, local_head, local_bias, local_target) if t.requires_grad]
    if form == "head statistics":
        got = lossfuse.linear_cross_entropy_stats(hidden, local_head, local_target, **given)
        want = program.linear_cross_entropy_stats(wide, wide_head, wide_target, wide_bias, wide_weight, **options)
        assert_statistics_close(got, want)
        ups = upstreams(got)
        ours, theirs = differentiated(got, own, ups), differentiated(want, leaves, ups)
    else:
        got = lossfuse.linear_cross_entropy(hidden, local_head, local_target, **given)
        want = program.linear_cross_entropy(wide, wide_head, wide_target, wide_bias, wide_weight, **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        up = upstream(hidden, options)
        ours, theirs = torch.autograd.grad(got, own, up), torch.autograd.grad(want, leaves, up.double())
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


@pytest.mark.parametrize("n", [2, 4])
def test_every_option(n):
    cases_on_ranks(n, every_option, [(form, soft, tuple(SINGLE)) for form, soft in GRID], timeout=120.0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_every_pair_of_options(n):
    cases_on_ranks(n, every_option, [(form, soft, tuple(COMBINATIONS)) for form, soft in GRID], timeout=500.0)
