"""Torch code over blocks of rows for a shard of the classes: what ``torch_rows`` is where all
classes are at hand.

A gradient waits for what other shards say of its row, so logits are read twice.
"""

import torch
from torch import Tensor

from ..row_types import ShardRows, Upstream, Wants
from ..spec import LossSpec
from .torch_rows import (
    FEATURE_BLOCKS,
    in_parts,
    largest,
    moments_of,
    multiply_in_place,
    prefer_huge_pages,
    shaped,
    times,
    zero_rows,
)

__all__ = ["multiply_in_place", "shard_grads", "shard_rows"]


def shard_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
    given: bool,
) -> ShardRows:
    """What (N, V) logits of a shard, V >= 1, say of their rows; ``given`` asks for what the
    log-probability of probabilities takes."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = None if class_weight is None else class_weight.to(dtype)
    soft = target.is_floating_point()
    n = len(logits)
    floats = {
        "row_max": True,
        "log_sum": True,
        "target_logit": not soft,
        "target_weight": not soft and weight is not None,
        "mass": soft,
        "shortfall": soft or bool(spec.label_smoothing),
        "given_mass": soft and given,
        "given_shortfall": soft and given,
        "mean_shortfall": wants.entropy,
    }
    made = ShardRows(
        **{
            name: logits.new_zeros(n, 1, dtype=dtype) if wanted else None
            for name, wanted in floats.items()
        },  # type: ignore[arg-type]
        argmax=logits.new_zeros(n, 1, dtype=torch.int64) if wants.argmax else None,
    )
    temporaries = (
        1
        + wants.entropy
        + (FEATURE_BLOCKS if soft or spec.label_smoothing or spec.shapes_logits else 0)
    )

    def part(rows: slice, block: int, count: int) -> None:
        scratch = torch.empty(min(block, n), logits.shape[1], dtype=dtype, device=logits.device)
        for start in range(rows.start, min(rows.stop, n), block):
            some = slice(start, min(start + block, rows.stop, n))
            into = ShardRows(*(None if t is None else t[some] for t in made))  # type: ignore[arg-type]
            fill = _soft_block if soft else _id_block
            fill(logits[some], target[some], weight, spec, scratch[: some.stop - start], into)

    in_parts(logits, dtype, temporaries, part)
    return ShardRows(*(None if t is None else t[:, 0] for t in made))  # type: ignore[arg-type]


def _id_block(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: LossSpec,
    p: Tensor,
    made: ShardRows,
) -> None:
    y, here = _local(target[:, None], logits.shape[1], spec)
    z, _ = shaped(logits, spec, p)
    top = _largest(z, made)
    assert made.target_logit is not None
    made.target_logit.copy_(torch.where(here, z.gather(1, y), 0.0))
    if made.target_weight is not None and weight is not None:
        made.target_weight.copy_(torch.where(here, weight[y], 0.0))
    d = torch.sub(z, top, out=p)
    if made.shortfall is not None:
        torch.sum(times(-d, weight), -1, keepdim=True, out=made.shortfall)
    e = torch.exp(d) if made.mean_shortfall is not None else d.exp_()
    spread = moments_of(e, d)[1] if made.mean_shortfall is not None else None
    # the target apart, as it may be nearly all there is
    e_y = e.gather(1, y)
    e.scatter_(1, y, torch.where(here, 0.0, e_y))
    _sum_up(e, torch.where(here, e_y, 0.0), spread, made)


def _soft_block(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: LossSpec,
    p: Tensor,
    made: ShardRows,
) -> None:
    t, q = _masses(target, weight, spec, p.dtype)
    z, _ = shaped(logits, spec, p)
    top = _largest(z, made)
    d = z - top
    assert made.mass is not None and made.shortfall is not None
    for mass, shortfall, of in (
        (made.mass, made.shortfall, q),
        (made.given_mass, made.given_shortfall, t),
    ):
        if mass is not None and shortfall is not None:
            torch.sum(of, -1, keepdim=True, out=mass)
            # a class of zero mass is out of the sum even where its logit is -inf
            torch.sum(
                torch.where((of == 0.0) & (d == -torch.inf), 0.0, of * -d),
                -1,
                keepdim=True,
                out=shortfall,
            )
    at = d.argmax(-1, keepdim=True)
    e = torch.exp(d, out=p)
    spread = moments_of(e, d)[1] if made.mean_shortfall is not None else None
    e_top = e.gather(1, at)
    e.scatter_(1, at, 0.0)
    _sum_up(e, e_top, spread, made)


def _largest(z: Tensor, made: ShardRows) -> Tensor:
    """The rows' maxima, as distances are taken from them: 0 where no logit is finite."""
    if made.argmax is None:
        torch.amax(z, -1, keepdim=True, out=made.row_max)
    else:
        row_max, top = largest(z)
        made.row_max.copy_(row_max)
        made.argmax.copy_(top)
    return torch.where(made.row_max == -torch.inf, 0.0, made.row_max)


def _sum_up(others: Tensor, one: Tensor, spread: Tensor | None, made: ShardRows) -> None:
    """From exponentials without one of them, that one, and the sum of all times their distances
    from the maximum."""
    rest = others.sum(-1, keepdim=True)
    made.log_sum.copy_(torch.log1p(rest + (one - 1.0)))
    if spread is not None and made.mean_shortfall is not None:
        whole = rest + one
        made.mean_shortfall.copy_(torch.where(whole == 0.0, 0.0, -spread / whole))


def _local(target: Tensor, v: int, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Global ids -> (ids of the shard, 0 elsewhere; which are the shard's)."""
    y = target - (spec.first_class or 0)
    here = (target != spec.ignore_index) & (y >= 0) & (y < v)
    return torch.where(here, y, 0), here


def _masses(
    target: Tensor, weight: Tensor | None, spec: LossSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Probabilities as given, and as the loss takes them."""
    t = target.to(dtype)
    q = t
    if spec.label_smoothing:
        assert spec.num_classes is not None
        q = q * (1.0 - spec.label_smoothing) + spec.label_smoothing / spec.num_classes
    return t, times(q, weight)


def shard_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    kept: Tensor,
    upstream: Upstream,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    """Fill the gradients that are given, from what ``merge.kept`` says of whole rows; ``dlogits``
    may be ``logits``."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = None if class_weight is None else class_weight.to(dtype)
    up = Upstream(*(None if t is None else t.to(dtype)[:, None] for t in upstream))
    columns = kept.to(dtype)[:, :, None]
    n = len(logits)
    soft = target.is_floating_point()
    for grad in (dlogits, dtarget):
        if grad is not None:
            prefer_huge_pages(grad)
    temporaries = (
        2
        + (up.entropy is not None)
        + (FEATURE_BLOCKS if soft or spec.label_smoothing or spec.shapes_logits else 0)
    )

    def part(rows: slice, block: int, count: int) -> None:
        for start in range(rows.start, min(rows.stop, n), block):
            some = slice(start, min(start + block, rows.stop, n))
            dx, dt = (None if g is None else g[some] for g in (dlogits, dtarget))
            if soft:
                _soft_grads(
                    logits[some],
                    target[some],
                    weight,
                    columns[:, some],
                    up.of(some),
                    spec,
                    dtype,
                    dx,
                    dt,
                )
            elif dx is not None:
                _id_grads(
                    logits[some],
                    target[some],
                    weight,
                    columns[:, some],
                    up.of(some),
                    spec,
                    dtype,
                    dx,
                )

    in_parts(logits, dtype, temporaries, part)


def _id_grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    columns: Tensor,
    up: Upstream,
    spec: LossSpec,
    dtype: torch.dtype,
    dlogits: Tensor,
) -> None:
    row_max, log_sum, mean_shortfall, w_y, w_sum = columns
    target = target[:, None]
    assert spec.num_classes is not None
    ignored = target == spec.ignore_index
    bad = ~ignored & ((target < 0) | (target >= spec.num_classes))
    y, here = _local(target, logits.shape[1], spec)
    dloss = torch.zeros_like(row_max) if up.loss is None else up.loss
    smooth = spec.label_smoothing / spec.num_classes
    dnll = dloss * (1.0 - spec.label_smoothing) * w_y
    if up.target_logprob is not None:
        dnll = dnll - up.target_logprob
    dnll = torch.where(bad, torch.nan, dnll)
    # what multiplies every p alike, the target's among them; weights that may be of nobody count
    # only if labels are smoothed
    flat = dloss * (
        (smooth * w_sum if smooth else 0.0) + 2.0 * spec.lse_square_scale * (row_max + log_sum)
    )
    if up.lse is not None:
        flat = flat + up.lse

    work = (
        dlogits
        if dlogits.dtype == dtype
        else torch.empty(logits.shape, dtype=dtype, device=logits.device)
    )
    z, slope = shaped(logits, spec, work)
    d = torch.sub(z, row_max, out=work)
    d_y = d.gather(1, y)
    logp_y = d_y - log_sum
    dy = dnll * torch.expm1(logp_y) + flat * logp_y.exp() - dloss * smooth * w_y
    per_sum = torch.exp(-log_sum)
    factor = dnll + flat
    if up.entropy is not None:
        p = d.exp()
        moments, _ = moments_of(p, d)
        dy = dy - up.entropy * per_sum * (moments.gather(1, y) + mean_shortfall * p.gather(1, y))
        p.mul_((factor - up.entropy * mean_shortfall) * per_sum).addcmul_(
            moments, up.entropy * per_sum, value=-1.0
        )
    else:
        p = d.exp_().mul_(factor * per_sum)
    if smooth:
        p.addcmul_(
            (torch.ones_like(row_max) if weight is None else weight).expand_as(p),
            dloss.expand_as(p),
            value=-smooth,
        )
    p.scatter_(1, y, torch.where(here, dy, p.gather(1, y)))
    if slope is not None:
        p.mul_(slope)
    if p is not dlogits:
        dlogits.copy_(p)
    zero_rows(dlogits, ignored)


def _soft_grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    columns: Tensor,
    up: Upstream,
    spec: LossSpec,
    dtype: torch.dtype,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    row_max, log_sum, mass, given_mass, mean_shortfall = columns
    t, q = _masses(target, weight, spec, dtype)
    z, slope = shaped(logits, spec, torch.empty(logits.shape, dtype=dtype, device=logits.device))
    below = z - row_max
    logp = below - log_sum
    dloss = torch.zeros_like(row_max) if up.loss is None else up.loss
    dlogprob = torch.zeros_like(row_max) if up.target_logprob is None else up.target_logprob
    if dtarget is not None:
        nowhere = logp == -torch.inf
        dt = times(-logp, weight) * ((1.0 - spec.label_smoothing) * dloss)
        dt.masked_fill_((q == 0.0) & nowhere, 0.0)
        if up.target_logprob is not None:
            dt += torch.where((t == 0.0) & nowhere, 0.0, logp * dlogprob)
        dtarget.copy_(dt)
    if dlogits is None:
        return
    flat = 2.0 * spec.lse_square_scale * (row_max + log_sum) * dloss
    if up.lse is not None:
        flat = flat + up.lse
    dmass = mass * dloss - given_mass * dlogprob
    dq = q * dloss - t * dlogprob
    p = below.exp() * torch.exp(-log_sum)
    # dmass * p - dq cancels where p is nearly 1
    dz = torch.where(p > 0.5, dmass * torch.expm1(logp) + (dmass - dq), dmass * p - dq) + flat * p
    if up.entropy is not None:
        dz -= up.entropy * p * (below.masked_fill_(p == 0.0, 0.0) + mean_shortfall)
    if slope is not None:
        dz *= slope
    dlogits.copy_(dz)
