"""Statistics of rows in the pass of their loss, and gradients of them, by their
launchers."""

import pytest
import torch

import program
from closeness import assert_formula_close, assert_gradient_close, gradient_terms
from options import EVERYTHING, options_of
from rows import logits_and_ids, probabilities

pytest.importorskip("triton")

from lossfuse.kernels import soft_target_rows, softmax_rows

GPU = torch.cuda.is_available()
INF, NAN = float("inf"), float("nan")
LOWEST = torch.finfo(torch.float32).min
NAMES = ("loss", "lse", "logprob", "entropy")
SIZES = [1, 127, 2048, 5000]


@pytest.fixture(params=["ids", "ids, rows in parts", "probabilities"])
def soft(request, monkeypatch):
    """True for targets of probabilities. Rows against ids are also split, as few rows are on a GPU:
    a part may be empty, or have only the last block."""
    if "parts" in request.param:
        monkeypatch.setattr(softmax_rows, "row_parts", lambda n, v, config, device: 4)
    return request.param == "probabilities"


def launchers(target, ignore_index=-100):
    """The module whose launchers take this target, and what only those take."""
    return (
        (soft_target_rows, {})
        if target.is_floating_point()
        else (softmax_rows, {"ignore_index": ignore_index})
    )


def numbers(options):
    """Options as the launchers take them."""
    return {
        "scale": options.get("logit_scale"),
        "softcap": options.get("softcap"),
        "smoothing": options.get("label_smoothing"),
        "lse_square_scale": options.get("lse_square_scale"),
    }


def oracle(x, target, w=None, options=None, ignore_index=-100):
    """The statistics of each row in float64, and its argmax; of ids that are no class NaN."""
    soft = target.is_floating_point()
    if soft:
        # to torch a probability of 0 is NaN on a class of -inf, so that class is only very low
        x, bad = x.masked_fill(x == -INF, -1e30), torch.zeros_like(target[:, 0], dtype=torch.bool)
    else:
        bad = ((target < 0) | (target >= x.shape[1])) & (target != ignore_index)
        target = target.where(~bad, ignore_index)
    given = {"ignore_index": ignore_index, "reduction": "none", **(options or {})}
    stats = program.cross_entropy_stats(x, target, None if w is None else w.double(), **given)
    rows = zip(NAMES, (stats.loss, *stats[1:4]), strict=True)
    return {name: torch.where(bad, NAN, row) for name, row in rows} | {"argmax": stats.argmax}


def ours(x, target, w=None, options=None, ignore_index=-100, **asked):
    keywords = {"entropy": True, "argmax": True} | asked
    rows, only = launchers(target, ignore_index)
    found = rows.row_stats(x, target, w, **keywords, **only, **numbers(options or {}))
    return dict(zip((*NAMES, "argmax", "stats"), found, strict=True))


def grads(
    x, target, w, stats, upstream, options, ignore_index=-100, dlogits=None, need_dtarget=False
):
    dlogits = torch.empty_like(x) if dlogits is None else dlogits
    dtarget = torch.empty_like(target) if need_dtarget else None
    of_stats = {f"d{name}": upstream[name] for name in NAMES[1:] if name in upstream}
    rows, only = launchers(target, ignore_index)
    if target.is_floating_point():
        only["dtarget"] = dtarget
    rows.row_grads(
        x,
        target,
        w,
        stats,
        upstream.get("loss"),
        dlogits=dlogits,
        **only,
        **numbers(options),
        **of_stats,
    )
    return dlogits, dtarget


def upstreams(n, names, device):
    """A number of its own for each row and statistic."""
    table = torch.randn(len(NAMES), n, generator=torch.Generator().manual_seed(5)).to(device)
    return {name: table[i].contiguous() for i, name in enumerate(NAMES) if name in names}


def case(soft, n, v, device, dtype=torch.float32, ignored=0.25):
    x, target = (t.detach() for t in logits_and_ids(n, v, dtype, device, ignored=ignored))
    return x, (probabilities(n, v, torch.float32, device).detach() if soft else target)


def check(x, target, w=None, options=None, ignore_index=-100, names=NAMES):
    """Values, and gradients of ``names`` at once; returns the values."""
    options = options or {}
    soft = target.is_floating_point()
    got = ours(x, target, w, options, ignore_index)
    leaves = [x.double().requires_grad_(), *([target.double().requires_grad_()] if soft else [])]
    want = oracle(leaves[0], leaves[1] if soft else target, w, options, ignore_index)
    for name in NAMES:
        assert got[name].dtype == torch.float32 and got[name].is_contiguous()
        assert_formula_close(got[name], want[name].detach())
    assert got["argmax"].dtype == torch.int64 and torch.equal(got["argmax"], want["argmax"])
    upstream = upstreams(len(x), names, x.device)
    dx, dt = grads(x, target, w, got["stats"], upstream, options, ignore_index, need_dtarget=soft)
    total = sum((upstream[name].double() * want[name]).sum() for name in names)
    wanted = torch.autograd.grad(total, leaves, allow_unused=True)
    unread = (
        torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if soft
        else got["lse"].isnan() & (target != ignore_index)
    )
    want_dx = torch.where(unread[:, None], NAN, wanted[0])
    terms = gradient_terms(x.double(), target, w, options, list(upstream.values()))
    assert_gradient_close(dx, want_dx, terms=terms)
    if soft:
        row = sum(value.abs() for value in upstream.values()).double()[:, None]
        of_target = torch.zeros_like(leaves[1]) if wanted[1] is None else wanted[1]
        # a class that is out has no gradient
        of_target = of_target.masked_fill((x == -INF) & (target == 0.0), 0.0)
        assert_gradient_close(dt, of_target, terms=row)
    return got


@pytest.mark.parametrize("v", SIZES)
def test_sizes(device, v, soft):
    check(*case(soft, 2, v, device))


def test_each_statistic_has_a_gradient_alone(device, soft):
    w, options = options_of(EVERYTHING, 300, device)
    for name in NAMES:
        check(*case(soft, 2, 300, device), w, options, names=(name,))


def test_every_option_over_several_blocks(device, soft):
    w, options = options_of(EVERYTHING, 5000, device)
    check(*case(soft, 2, 5000, device), w, options)


def test_what_is_not_asked_for_is_none_and_changes_nothing(device, soft):
    x, target = case(soft, 2, 300, device)
    both = ours(x, target)
    rows, only = launchers(target)
    loss, stats = rows.row_loss(x, target, None, **only, **numbers({}))
    assert torch.equal(loss, both["loss"]) and torch.equal(stats, both["stats"][: len(stats)])
    for entropy in (False, True):
        for argmax in (False, True):
            some = ours(x, target, entropy=entropy, argmax=argmax)
            assert (some["entropy"] is not None, some["argmax"] is not None) == (entropy, argmax)
            for name, value in some.items():
                if value is not None:
                    assert torch.equal(value, both[name][: len(value)]), name
    # statistics of a loss without entropy are enough for all but its gradient
    few = ours(x, target, entropy=False)["stats"]
    upstream = upstreams(2, NAMES[:3], device)
    assert torch.equal(
        grads(x, target, None, few, upstream, {})[0],
        grads(x, target, None, both["stats"], upstream, {})[0],
    )


@pytest.mark.parametrize("v", [127, 2500])
def test_rows_apart(device, v, soft):
    x, target = case(soft, 2, v, device, ignored=0.0)
    memory = torch.full((2, v + 9), NAN, device=device)
    memory[:, 3 : v + 3] = x
    apart = memory[:, 3 : v + 3]
    close, far = ours(x, target), ours(apart, target)
    for name in close:
        torch.testing.assert_close(far[name], close[name], rtol=1e-6, atol=1e-6)
    upstream = upstreams(2, NAMES, device)
    want, _ = grads(x, target, None, close["stats"], upstream, {})
    # in place, and nothing beside it is written
    got, _ = grads(apart, target, None, far["stats"], upstream, {}, dlogits=apart)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert memory[:, :3].isnan().all() and memory[:, v + 3 :].isnan().all()


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_and_bad_ids(device, ignore_index):
    x, _ = case(False, 7, 300, device)
    target = torch.tensor([5, ignore_index, 300, -7, -2, 299, 2**40], device=device)
    # of no row that is not read
    x[1] = NAN
    got = check(x.nan_to_num(0.0), target, ignore_index=ignore_index)
    undefined = [False, False, True, True, True, False, True]
    again = ours(x, target, ignore_index=ignore_index)
    for name in NAMES:
        assert got[name].isnan().tolist() == undefined and got[name][1] == 0.0
        assert torch.equal(again[name].nan_to_num(9.0), got[name].nan_to_num(9.0))
    assert torch.equal(again["argmax"], got["argmax"])
    dx, _ = grads(x, target, None, again["stats"], upstreams(7, NAMES, device), {}, ignore_index)
    assert torch.equal(dx[1], torch.zeros_like(dx[1]))
    assert dx.isnan().all(1).tolist() == undefined and dx.isnan().any(1).tolist() == undefined


@pytest.mark.parametrize("where", [slice(0, 100), slice(1, None), slice(0, 2499)], ids=str)
def test_classes_that_cannot_be(device, where, soft):
    """p log p of them is 0, and so is every gradient."""
    x, target = case(soft, 3, 2500, device, ignored=0.0)
    x[:, where] = -INF
    possible = x[0].isfinite().nonzero()[:, 0]
    if soft:
        target[:, where] = 0.0
    else:
        target = possible[[0, len(possible) // 2, -1]]
    got = check(x, target)
    dx, _ = grads(x, target, None, got["stats"], upstreams(3, NAMES, device), {})
    assert (dx[:, where] == 0.0).all()


@pytest.mark.parametrize("v", [130, 2500])
def test_rows_filled_with_the_lowest_number(device, v, soft):
    """As masks fill them. The lanes start there."""
    x, target = case(soft, 3, v, device, ignored=0.0)
    x[:] = LOWEST
    x[1, : v // 2] = -INF
    x[2, v - 1] = 0.0
    if soft:
        target = torch.zeros_like(target)
        target[:, v - 1] = 1.0
    else:
        target[:] = v - 1
    got = ours(x, target)
    assert got["argmax"].tolist() == [0, v // 2, v - 1]
    want = torch.tensor([v, v - v // 2, 1], dtype=torch.float64, device=device).log()
    assert_formula_close(got["entropy"], want)
    assert_formula_close(-got["logprob"], want)
    dx, _ = grads(x, target, None, got["stats"], upstreams(3, ("entropy",), device), {})
    assert (dx == 0.0).all()


@pytest.mark.parametrize("at", [(0, 1), (2047, 4096)], ids=str)
def test_several_infinite_logits(device, at, soft):
    """In several lanes and blocks, or everywhere; a NaN beside them is a NaN."""
    x, target = case(soft, 4, 5001, device, ignored=0.0)
    x[:2, at] = INF
    x[1, 2048] = NAN
    x[3] = INF
    got = ours(x, target)
    assert got["lse"][0] == INF and got["lse"][1].isnan() and got["lse"][2].isfinite()
    assert got["argmax"][0] == at[0] and got["argmax"][3] == 0


@pytest.mark.parametrize(
    ("soft", "scale"),
    [(False, None), (True, None), (False, -0.5)],
    ids=["ids", "probabilities", "negative scale"],
)
@pytest.mark.parametrize("at", [(0, 1), (7, 2055), (4095, 4096)], ids=str)
def test_the_first_of_ties(device, at, scale, soft):
    """In one lane, in several, and in several blocks of a lane."""
    options = {} if scale is None else {"logit_scale": scale}
    x, target = case(soft, 1, 5000, device, ignored=0.0)
    x = x.clamp(-8.0, 8.0)
    x[:, at] = 9.0 if scale is None else -9.0
    got = ours(x, target, options=options)
    assert got["argmax"].tolist() == [at[0]]
    assert_formula_close(got["entropy"], oracle(x.double(), target, None, options)["entropy"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [127, 5000])
def test_a_narrower_gradient_over_the_logits(device, dtype, v, soft):
    """A program goes up its row: 2 bytes of gradient over 4 of logits that it has read."""
    x, target = case(soft, 2, v, device)
    w, options = options_of(EVERYTHING, v, device)
    memory = torch.full((2, v + 16), NAN, device=device)
    memory[:, :v] = x
    over = memory.view(dtype)[:, :v]
    got = ours(memory[:, :v], target, w, options)
    upstream = upstreams(2, NAMES, device)
    want, want_dt = grads(x, target, w, got["stats"], upstream, options, need_dtarget=soft)
    dx, dt = grads(
        memory[:, :v], target, w, got["stats"], upstream, options, dlogits=over, need_dtarget=soft
    )
    assert_gradient_close(dx, want)
    assert memory[:, v:].isnan().all()
    if soft:
        assert torch.equal(dt, want_dt)


def test_one_upstream_for_all_rows(device, soft):
    """An expanded scalar, as from .sum()."""
    x, target = case(soft, 4, 300, device)
    stats = ours(x, target)["stats"]
    one = torch.tensor(0.3, device=device)
    got, _ = grads(x, target, None, stats, {"loss": one.expand(4)}, {})
    want, _ = grads(x, target, None, stats, {"loss": one.repeat(4)}, {})
    assert torch.equal(got, want)


def test_rows_beyond_two_to_the_31_elements(device):
    # pages that are never touched cost nothing
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty(2 * 1200_000_000 + 64, dtype=torch.float16, device=device)
    x, target = case(False, 3, 40, device, torch.float16, ignored=0.0)
    rows = memory.as_strided((3, 40), (1200_000_000, 1))
    rows.copy_(x)
    far, near = ours(rows, target), ours(x, target)
    assert all(torch.equal(far[name], near[name]) for name in NAMES)
