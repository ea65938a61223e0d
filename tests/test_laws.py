"""Laws that hold without an oracle: what moves a loss, what does not, and how losses are made of
one another."""

import itertools

import pytest
import torch
from torch.nn.functional import one_hot

pytest.importorskip("hypothesis")

from hypothesis import strategies as st

import lossfuse
import sharded_rows
from draws import cuts, holds_for, loss_options, seeds
from rows import class_weight, logits_and_ids, probabilities

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def logits(n, v, seed, device="cpu", spread=4.0):
    torch.manual_seed(seed)
    return (torch.randn(n, v) * spread).to(device).requires_grad_(), torch.randint(0, v, (n,)).to(
        device
    )


def ignoring(target, share):
    """Some ignored, never the first."""
    out = torch.rand(target.shape) < share
    out[:1] = False
    return target.masked_fill(out.to(target.device), -100)


def grad(loss, *leaves, up=None):
    made = torch.autograd.grad(
        loss, leaves, torch.ones_like(loss) if up is None else up, retain_graph=True
    )
    return made[0] if len(leaves) == 1 else made


rows, classes = st.integers(1, 6), st.integers(2, 200)
row_options = loss_options("none").map(
    lambda options: {k: v for k, v in options.items() if k != "reduction"}
)


@holds_for(rows, classes, st.integers(-10000, 10000), seeds)
def test_an_offset_common_to_a_row_cancels(thrifty_fast_place, n, v, offset, seed):
    torch.manual_seed(seed)
    x = torch.randint(-20, 20, (n, v)).float().to(thrifty_fast_place.device).requires_grad_()
    target = torch.randint(0, v, (n,), device=thrifty_fast_place.device)
    # exact in float32
    pair = [
        lossfuse.cross_entropy_stats(z, target, reduction="none", impl=thrifty_fast_place.impl)
        for z in (x, x + offset)
    ]
    for name in ("loss", "target_logprob", "entropy"):
        here, there = (getattr(stats, name) for stats in pair)
        torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad(there, x), grad(here, x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pair[1].lse, pair[0].lse + offset)
    assert torch.equal(pair[1].argmax, pair[0].argmax)


@holds_for(rows, classes, row_options, st.booleans(), seeds)
def test_permuting_classes_permutes_gradients(thrifty_place, n, v, options, soft, seed):
    x, target = logits(n, v, seed, thrifty_place.device)
    order = torch.randperm(v, device=x.device)
    w = class_weight(v, x.device)
    if soft:
        target = torch.softmax(torch.randn(n, v), 1).to(x.device).requires_grad_()
    moved_target = target[:, order] if soft else torch.argsort(order)[target]
    leaves = [x, target] if soft else [x]
    here = lossfuse.cross_entropy_stats(
        x, target, w, reduction="none", impl=thrifty_place.impl, **options
    )
    there = lossfuse.cross_entropy_stats(
        x[:, order], moved_target, w[order], reduction="none", impl=thrifty_place.impl, **options
    )
    for name in ("loss", "lse", "target_logprob", "entropy"):
        a, b = getattr(here, name), getattr(there, name)
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-5)
        ga, gb = (
            torch.autograd.grad(
                t.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for t in (a, b)
        )
        torch.testing.assert_close(gb, ga, rtol=1e-4, atol=2e-5)


@holds_for(st.integers(2, 12), classes, row_options, st.integers(1, 7), seeds)
def test_rows_do_not_know_each_other(thrifty_place, n, v, options, size, seed):
    """Splitting a batch changes nothing, and "none" summed is "sum"."""
    x, target = logits(n, v, seed, thrifty_place.device)
    target = ignoring(target, 0.3)
    w = class_weight(v, x.device)
    whole = lossfuse.cross_entropy(
        x, target, w, reduction="none", impl=thrifty_place.impl, **options
    )
    parts = [
        lossfuse.cross_entropy(a, t, w, reduction="none", impl=thrifty_place.impl, **options)
        for a, t in zip(x.split(size), target.split(size), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    total = lossfuse.cross_entropy(
        x, target, w, reduction="sum", impl=thrifty_place.impl, **options
    )
    torch.testing.assert_close(whole.sum(), total, **CLOSE)
    want = grad(whole.sum(), x)
    torch.testing.assert_close(grad(torch.cat(parts).sum(), x), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad(total, x), want, rtol=1e-5, atol=1e-6)


@holds_for(st.integers(1, 6), classes, row_options, st.booleans(), seeds)
def test_the_mean_of_a_batch_given_twice_is_its_mean(
    thrifty_fast_place, n, v, options, weighted, seed
):
    x, target = logits(n, v, seed, thrifty_fast_place.device)
    target = ignoring(target, 0.3)
    w = class_weight(v, x.device) if weighted else None
    once = lossfuse.cross_entropy(x, target, w, impl=thrifty_fast_place.impl, **options)
    twice = lossfuse.cross_entropy(
        torch.cat([x, x]), torch.cat([target, target]), w, impl=thrifty_fast_place.impl, **options
    )
    torch.testing.assert_close(twice, once, **CLOSE)
    torch.testing.assert_close(grad(twice, x), grad(once, x), rtol=1e-5, atol=1e-6)


@holds_for(st.integers(1, 6), classes, row_options, st.floats(0.01, 100.0), seeds)
def test_class_weights_have_no_unit_under_mean(thrifty_fast_place, n, v, options, c, seed):
    # a z-loss has no weights, and is divided by them
    options.pop("lse_square_scale", None)
    x, target = logits(n, v, seed, thrifty_fast_place.device)
    target, w = ignoring(target, 0.3), class_weight(v, x.device)
    here, there = (
        lossfuse.cross_entropy(x, target, u, impl=thrifty_fast_place.impl, **options)
        for u in (w, c * w)
    )
    torch.testing.assert_close(there, here, **CLOSE)
    torch.testing.assert_close(grad(there, x), grad(here, x), rtol=1e-5, atol=1e-6)


@holds_for(rows, classes, row_options, st.booleans(), seeds)
def test_an_id_is_all_of_the_probability(thrifty_place, n, v, options, weighted, seed):
    x, target = logits(n, v, seed, thrifty_place.device)
    w = class_weight(v, x.device) if weighted else None
    losses = [
        lossfuse.cross_entropy_stats(x, t, w, reduction="none", impl=thrifty_place.impl, **options)
        for t in (target, one_hot(target, v).to(x.dtype))
    ]
    for name in ("loss", "lse", "target_logprob", "entropy", "z_loss"):
        here, there = (getattr(stats, name) for stats in losses)
        torch.testing.assert_close(there, here, rtol=2e-5, atol=1e-5)
        if here.requires_grad:
            torch.testing.assert_close(
                grad(there.sum(), x), grad(here.sum(), x), rtol=1e-4, atol=2e-5
            )


@holds_for(rows, classes, seeds)
def test_a_cap_far_away_is_none(thrifty_place, n, v, seed):
    x, target = logits(n, v, seed, thrifty_place.device)
    here, there = (
        lossfuse.cross_entropy(x, target, softcap=cap, impl=thrifty_place.impl)
        for cap in (None, 1e6)
    )
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad(there, x), grad(here, x), rtol=1e-4, atol=1e-6)


@holds_for(rows, classes, st.sampled_from([0.25, 0.5, 2.0, -1.0]), row_options, seeds)
def test_a_scale_is_of_the_logits(thrifty_place, n, v, scale, options, seed):
    # a power of two is exact
    options.pop("logit_scale", None)
    x, target = logits(n, v, seed, thrifty_place.device)
    here = lossfuse.cross_entropy(
        x, target, reduction="none", logit_scale=scale, impl=thrifty_place.impl, **options
    )
    there = lossfuse.cross_entropy(
        scale * x, target, reduction="none", impl=thrifty_place.impl, **options
    )
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad(here, x), grad(there, x), rtol=1e-5, atol=1e-6)


def differentiable_calls(place, seed, inplace):
    """{name: (a loss of a call, its leaf)}, of each public loss and reduction."""
    x, target = logits(4, 30, seed, place.device)
    hidden, weight = (
        torch.randn(4, 8, device=place.device).requires_grad_(),
        torch.randn(30, 8, device=place.device),
    )
    yes = torch.rand(4, 30, device=place.device)
    ids = target[:, None].repeat(1, 2)
    made = {}
    for reduction in ("none", "mean", "sum"):
        given = {"reduction": reduction, "impl": place.impl}
        where = x * 1.0 if inplace else x
        made["cross_entropy", reduction] = (
            lossfuse.cross_entropy(where, target, inplace=inplace, **given),
            x,
        )
        soft = torch.softmax(yes, 1)
        made["cross_entropy of probabilities", reduction] = (
            lossfuse.cross_entropy(x * 1.0 if inplace else x, soft, inplace=inplace, **given),
            x,
        )
        made["statistics", reduction] = lossfuse.cross_entropy_stats(x, target, **given).loss, x
        keep = lossfuse.LinearOptions(allow_retain_graph=True)
        made["head", reduction] = (
            lossfuse.linear_cross_entropy(hidden, weight, target, options=keep, **given),
            hidden,
        )
        made["statistics of a head", reduction] = (
            lossfuse.linear_cross_entropy_stats(hidden, weight, target, options=keep, **given).loss,
            hidden,
        )
        made["labels", reduction] = (
            lossfuse.binary_cross_entropy_with_logits(
                x * 1.0 if inplace else x, yes, inplace=inplace, **given
            ),
            x,
        )
        made["listed labels", reduction] = (
            lossfuse.binary_cross_entropy_with_logits(
                x * 1.0 if inplace else x, ids, inplace=inplace, **given
            ),
            x,
        )
        p = torch.sigmoid(x.detach()).requires_grad_()
        made["probabilities of labels", reduction] = (
            lossfuse.binary_cross_entropy(p, yes, **given),
            p,
        )
        logp = torch.log_softmax(x.detach(), 1).requires_grad_()
        made["nll", reduction] = lossfuse.nll_loss(logp, target, **given), logp
    made["log_softmax", "none"] = lossfuse.log_softmax(x, 1, impl=place.impl), x
    return made


@holds_for(seeds, st.integers(-20, 20), st.booleans(), few=3, many=200)
def test_powers_of_two_from_above_are_exact(thrifty_fast_place, seed, exponent, inplace):
    def grads(factor):
        made = differentiable_calls(thrifty_fast_place, seed, inplace)
        return {
            name: grad(loss, leaf, up=torch.full_like(loss, factor))
            for name, (loss, leaf) in made.items()
        }

    once, scaled = grads(1.0), grads(2.0**exponent)
    for name in once:
        want = once[name] * 2.0**exponent
        # what has gone below the normal numbers has lost bits
        whole = want.abs() > torch.finfo(torch.float32).smallest_normal * 2.0**24
        torch.testing.assert_close(
            scaled[name][whole],
            want[whole],
            rtol=0.0,
            atol=0.0,
            msg=lambda said, name=name: f"{name}: {said}",
        )


@holds_for(seeds, st.floats(-10.0, 10.0), few=3, many=200)
def test_gradients_are_linear_in_what_comes_from_above(thrifty_fast_place, seed, factor):
    first = differentiable_calls(thrifty_fast_place, seed, False)
    for name, (loss, leaf) in first.items():
        a, b = torch.randn_like(loss), torch.randn_like(loss)
        ga, gb, both = (
            torch.autograd.grad(loss, leaf, up, retain_graph=True)[0]
            for up in (a, b, a + factor * b)
        )
        size = ga.abs().amax() + abs(factor) * gb.abs().amax()
        off = (both - (ga + factor * gb)).abs().amax()
        assert off <= 1e-5 * size, (name, float(off), float(size))


@st.composite
def head_calls(draw):
    n, v, d = draw(st.integers(1, 12)), draw(st.integers(2, 90)), draw(st.integers(1, 12))
    torch.manual_seed(draw(seeds))
    hidden, weight, bias = torch.randn(n, d), torch.randn(v, d), torch.randn(v)
    target = ignoring(torch.randint(0, v, (n,)), draw(st.sampled_from([0.0, 0.4])))
    options = draw(loss_options())
    sizes = draw(st.lists(st.integers(1, n), min_size=1, max_size=2))
    return (
        (hidden, weight, bias),
        target,
        options,
        [row * 4 * lossfuse.ops.head_chunks.padded(v) for row in sizes],
    )


@holds_for(head_calls(), st.booleans())
def test_chunks_change_nothing(thrifty_fast_place, call, drop_ignored):
    operands, target, options, sizes = call
    leaves = [t.to(thrifty_fast_place.device).requires_grad_() for t in operands]
    target = target.to(leaves[0].device)

    def result(how):
        loss = lossfuse.linear_cross_entropy(
            *leaves[:2],
            target,
            linear_bias=leaves[2],
            options=how,
            impl=thrifty_fast_place.impl,
            **options,
        )
        up = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape)
        return loss.detach(), *grad(loss, *leaves, up=up)

    want = result(None)
    scale = 1.0 + max(float(t.abs().max()) for t in want)
    for size in sizes:
        got = result(lossfuse.LinearOptions(chunk_bytes=size, drop_ignored=drop_ignored))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=2e-6 * scale)


@holds_for(head_calls(), st.integers(-100, 100), seeds)
def test_an_offset_and_an_order_of_a_heads_classes(thrifty_fast_place, call, offset, seed):
    operands, target, options, _ = call
    # a cap and a z-loss see the offset
    options = {
        name: value
        for name, value in options.items()
        if name not in ("softcap", "lse_square_scale")
    }
    torch.manual_seed(seed)
    hidden, weight, bias = (t.to(thrifty_fast_place.device) for t in operands)
    target = target.to(hidden.device)
    order = torch.randperm(len(weight), device=hidden.device)
    moved = torch.argsort(order)[target.clamp(min=0)].where(target >= 0, -100)

    def result(hidden, weight, bias, target):
        hidden, weight = hidden.requires_grad_(), weight.detach().requires_grad_()
        loss = lossfuse.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, impl=thrifty_fast_place.impl, **options
        )
        return loss.detach(), *grad(loss.sum(), hidden, weight)

    want = result(hidden, weight, bias, target)
    scale = 1.0 + max(float(t.abs().max()) for t in want)
    got = result(hidden, weight[order], bias[order] + offset, moved)
    for g, w in zip(got, (want[0], want[1], want[2][order]), strict=True):
        # the offset rounds the logits
        torch.testing.assert_close(g, w, rtol=1e-4, atol=5e-5 * scale)


@st.composite
def labelled(draw):
    n, v = draw(rows), draw(st.integers(2, 60))
    torch.manual_seed(draw(seeds))
    x = torch.randn(n, v) * 5.0
    ids = torch.randint(0, v, (n, draw(st.integers(1, 5).filter(lambda p: p != v))))
    return (
        x,
        ids.masked_fill(torch.rand(ids.shape) < 0.3, -100),
        torch.rand(v) + 0.1,
        torch.rand(n, v) * 3.0,
    )


@holds_for(labelled(), st.integers(1, 4), seeds)
def test_labels_do_not_know_each_other(thrifty_place, call, size, seed):
    """Lists stand for zeros and ones; rows, columns and order change nothing, "none" summed is
    "sum"; pos_weight of one is none."""
    x, ids, weight, pos_weight = (t.to(thrifty_place.device) for t in call)
    x.requires_grad_()
    v = x.shape[1]
    ones = torch.zeros(len(x), v + 1, device=x.device).scatter(1, ids.where(ids >= 0, v), 1.0)[
        :, :v
    ]

    def bce(z, t, reduction="none", w=weight, pw=pos_weight):
        return lossfuse.binary_cross_entropy_with_logits(
            z, t, w, pos_weight=pw, reduction=reduction, impl=thrifty_place.impl
        )

    want = bce(x, ones)
    dx = grad(want.sum(), x)
    order = torch.randperm(v, device=x.device)
    alike = {
        "lists": bce(x, ids),
        "lists in another order": bce(x, ids.flip(1)),
        "in parts": torch.cat(
            [
                bce(a, t, pw=w)
                for a, t, w in zip(
                    x.split(size), ones.split(size), pos_weight.split(size), strict=True
                )
            ]
        ),
        "moved": bce(x[:, order], ones[:, order], w=weight[order], pw=pos_weight[:, order])[
            :, torch.argsort(order)
        ],
        "from the other side": bce(
            -x, 1.0 - ones, w=weight * (1.0 + (pos_weight - 1.0) * ones), pw=None
        ),
    }
    for name, loss in alike.items():
        torch.testing.assert_close(
            loss, want, rtol=1e-5, atol=1e-7, msg=lambda said, name=name: f"{name}: {said}"
        )
        torch.testing.assert_close(
            grad(loss.sum(), x),
            dx,
            rtol=1e-5,
            atol=1e-6,
            msg=lambda said, name=name: f"{name}: {said}",
        )
    for target in (ones, ids):
        for reduction, count in (("sum", 1), ("mean", x.numel())):
            total = bce(x, target, reduction)
            torch.testing.assert_close(total, want.sum() / count, **CLOSE)
            torch.testing.assert_close(grad(total, x), dx / count, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        bce(x, ids, pw=torch.ones(v, device=x.device)), bce(x, ids, pw=None), rtol=1e-6, atol=1e-7
    )


@holds_for(rows, classes, st.sampled_from(["none", "mean", "sum"]), st.booleans(), seeds)
def test_losses_are_made_of_one_another(thrifty_place, n, v, reduction, weighted, seed):
    x, target = logits(n, v, seed, thrifty_place.device)
    target = ignoring(target, 0.3)
    w = class_weight(v, x.device) if weighted else None
    given = {"reduction": reduction, "impl": thrifty_place.impl}
    yes = torch.rand(n, v, device=x.device)
    # so sure that a probability is not 1
    z = x.clamp(-8.0, 8.0)
    pairs = {
        "nll of log_softmax": (
            lossfuse.cross_entropy(x, target, w, **given),
            lossfuse.nll_loss(
                lossfuse.log_softmax(x, 1, impl=thrifty_place.impl), target, w, **given
            ),
        ),
        "bce of sigmoid": (
            lossfuse.binary_cross_entropy_with_logits(z, yes, w, **given),
            lossfuse.binary_cross_entropy(torch.sigmoid(z), yes, w, **given),
        ),
        "softmax of two classes": (
            lossfuse.cross_entropy(
                torch.stack([torch.zeros_like(z[:, 0]), z[:, 0]], 1),
                (target % 2).clamp(min=0),
                **given,
            ),
            lossfuse.binary_cross_entropy_with_logits(
                z[:, 0], (target % 2).clamp(min=0).to(z.dtype), **given
            ),
        ),
        "a head of the identity": (
            lossfuse.cross_entropy(x, target, w, **given),
            lossfuse.linear_cross_entropy(
                x, torch.eye(v, device=x.device), target, weight=w, **given
            ),
        ),
    }
    for name, (a, b) in pairs.items():
        torch.testing.assert_close(
            b, a, rtol=1e-4, atol=2e-5, msg=lambda said, name=name: f"{name}: {said}"
        )
        torch.testing.assert_close(
            grad(b.sum(), x),
            grad(a.sum(), x),
            rtol=1e-3,
            atol=2e-5,
            msg=lambda said, name=name: f"{name}: {said}",
        )


@st.composite
def random_cuts(draw):
    """(probabilities or ids, rows, sizes of shards, options, whether classes have weights, a
    seed)."""
    options = {
        name: value for name, value in draw(loss_options("none")).items() if name != "reduction"
    }
    return (
        draw(st.booleans()),
        draw(st.integers(1, 4)),
        draw(cuts(draw(st.integers(1, 90)), most=6)),
        options,
        draw(st.booleans()),
        draw(seeds),
    )


@holds_for(random_cuts(), st.sets(st.sampled_from(sharded_rows.NAMES), min_size=1))
def test_rows_that_are_cut_are_what_they_were(thrifty_fast_place, call, names):
    """Merged, and then their gradients."""
    soft, n, sizes, options, weighted, seed = call
    device = thrifty_fast_place.device
    x, ids = (t.detach() for t in logits_and_ids(n, sum(sizes), device=device, seed=seed))
    target = probabilities(n, sum(sizes), device=device, seed=seed).detach() if soft else ids
    w = class_weight(sum(sizes), device) if weighted else None
    sharded_rows.check(
        thrifty_fast_place, x, target, w, options, tuple(sizes), tuple(sorted(names)), over=True
    )


@st.composite
def shards_of_rows(draw):
    v = draw(st.integers(2, 60))
    return v, draw(cuts(v, most=6)), draw(st.integers(1, 5)), draw(seeds)


@holds_for(shards_of_rows())
def test_merging_merged_shards_is_merging_them_all(call):
    """Whichever neighbours are merged first."""
    from lossfuse.row_types import ShardRows
    from lossfuse.vocab_parallel import merge

    v, sizes, n, seed = call
    torch.manual_seed(seed)
    z = torch.randn(n, v, dtype=torch.float64) * 5.0
    z = z.masked_fill(torch.rand(n, v) < 0.2, -torch.inf)
    q, t = torch.rand(n, v, dtype=torch.float64), torch.rand(n, v, dtype=torch.float64)
    q, t = (a.masked_fill(z == -torch.inf, 0.0) for a in (q, t))
    sums = torch.ones(len(sizes), dtype=torch.float64)

    def say(start, stop):
        part = slice(start, stop)
        top = z[:, part].amax(1)
        at = torch.where(top == -torch.inf, 0.0, top)[:, None]
        d = at - z[:, part]
        e = torch.exp(-d)
        whole = e.sum(1)

        def short(of):
            return torch.where(of[:, part] == 0.0, 0.0, of[:, part] * d).sum(1)

        mean = torch.where(e == 0.0, 0.0, e * d).sum(1) / whole.clamp(min=1e-300)
        return ShardRows(
            top,
            torch.log(whole),
            None,
            None,
            q[:, part].sum(1),
            short(q),
            t[:, part].sum(1),
            short(t),
            mean,
            z[:, part].argmax(1) + start,
        )

    def merged(parts, weights):
        return merge.merge(
            ShardRows(
                *(None if c[0] is None else torch.stack(c) for c in zip(*parts, strict=True))
            ),
            weights,
        )

    starts = [0, *itertools.accumulate(sizes)]
    made = [say(a, b) for a, b in itertools.pairwise(starts)]
    whole, flat = say(0, v), merged(made, sums)
    at = 1 + seed % len(sizes)
    nested = merged([merged(made[:at], sums[:at]), *made[at:]], sums[at - 1 :])
    # a row without a finite logit has no softmax
    some = whole.log_sum > -torch.inf
    for name, want in whole._asdict().items():
        for got in (flat, nested):
            if want is not None:
                torch.testing.assert_close(
                    getattr(got, name)[some],
                    want[some],
                    rtol=1e-12,
                    atol=1e-12,
                    msg=lambda said, name=name: f"{name}: {said}",
                )
