"""Rows of a shard's logits by torch code, a block of rows at a time, as in ``torch_rows``.

A gradient waits for the merged statistics of all shards, so the logits are read twice.
"""

import torch
from torch import Tensor

from ..row_types import ShardRows, Upstream, Wants
from ..spec import LossSpec
from .torch_rows import (
    FEATURE_BLOCKS,
    compute_dtype,
    id_grad_elsewhere,
    largest,
    map_row_ranges,
    multiply_in_place,
    soft_target_grad,
    softmax_coef_of,
    target_masses,
    times_distance,
    transform_logits,
    weighted,
    zero_rows,
)

__all__ = ["multiply_in_place", "shard_grads", "shard_rows"]


def shard_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
    given: bool = False,
) -> ShardRows:
    """Statistics of (N, V) logits of a shard, V >= 1; ``given`` adds those that the
    log-probability of probabilities needs."""
    dtype = compute_dtype(logits)
    weight = None if class_weight is None else class_weight.to(dtype)
    soft = target.is_floating_point()
    n = len(logits)
    stats = _new_stats(logits, spec, wants, soft, weight is not None, given)
    temporaries = 1 + wants.entropy
    if soft or spec.label_smoothing or spec.transforms_logits:
        temporaries += FEATURE_BLOCKS
    read = _read_soft_block if soft else _read_id_block

    def part(rows: slice, block: int, count: int) -> None:
        scratch = torch.empty(min(block, n), logits.shape[1], dtype=dtype, device=logits.device)
        for start in range(rows.start, min(rows.stop, n), block):
            some = slice(start, min(start + block, rows.stop, n))
            out = ShardRows(*(None if t is None else t[some] for t in stats))  # type: ignore[arg-type]
            read(logits[some], target[some], weight, spec, scratch[: some.stop - start], out)

    map_row_ranges(logits, dtype, temporaries, part)
    return ShardRows(*(None if t is None else t[:, 0] for t in stats))  # type: ignore[arg-type]


def _new_stats(
    logits: Tensor, spec: LossSpec, wants: Wants, soft: bool, weighted: bool, given: bool
) -> ShardRows:
    """(N, 1) of what the loss and ``wants`` need."""

    def zeros(needed: bool, dtype: torch.dtype) -> Tensor | None:
        return logits.new_zeros(len(logits), 1, dtype=dtype) if needed else None

    dtype = compute_dtype(logits)
    return ShardRows(
        row_max=logits.new_zeros(len(logits), 1, dtype=dtype),
        log_sum=logits.new_zeros(len(logits), 1, dtype=dtype),
        target_logit=zeros(not soft, dtype),
        target_weight=zeros(not soft and weighted, dtype),
        mass=zeros(soft, dtype),
        shortfall=zeros(soft or bool(spec.label_smoothing), dtype),
        given_mass=zeros(soft and given, dtype),
        given_shortfall=zeros(soft and given, dtype),
        mean_shortfall=zeros(wants.entropy, dtype),
        argmax=zeros(wants.argmax, torch.int64),
    )


def _read_id_block(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: LossSpec,
    scratch: Tensor,
    out: ShardRows,
) -> None:
    y, local = _local_classes(target[:, None], logits.shape[1], spec)
    z, _ = transform_logits(logits, spec, scratch)
    row_max = _store_largest(z, out)
    assert out.target_logit is not None
    out.target_logit.copy_(torch.where(local, z.gather(1, y), 0.0))
    if out.target_weight is not None and weight is not None:
        out.target_weight.copy_(torch.where(local, weight[y], 0.0))
    d = torch.sub(z, row_max, out=scratch)
    if out.shortfall is not None:
        torch.sum(weighted(-d, weight), -1, keepdim=True, out=out.shortfall)
    e = torch.exp(d) if out.mean_shortfall is not None else d.exp_()
    distance_sum = times_distance(e, d) if out.mean_shortfall is not None else None
    # the target is left out of the sum, as it may be nearly all of it
    e_y = e.gather(1, y)
    e.scatter_(1, y, torch.where(local, 0.0, e_y))
    _store_sums(e, torch.where(local, e_y, 0.0), distance_sum, out)


def _read_soft_block(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: LossSpec,
    scratch: Tensor,
    out: ShardRows,
) -> None:
    assert spec.num_classes is not None
    t, q = target_masses(target, weight, spec, spec.num_classes, scratch.dtype)
    z, _ = transform_logits(logits, spec, scratch)
    d = z - _store_largest(z, out)
    assert out.mass is not None and out.shortfall is not None
    for mass, shortfall, of in (
        (out.mass, out.shortfall, q),
        (out.given_mass, out.given_shortfall, t),
    ):
        if mass is not None and shortfall is not None:
            torch.sum(of, -1, keepdim=True, out=mass)
            # a class of zero mass is left out of the sum even where its logit is -inf
            terms = torch.where((of == 0.0) & (d == -torch.inf), 0.0, of * -d)
            torch.sum(terms, -1, keepdim=True, out=shortfall)
            del terms
    top = d.argmax(-1, keepdim=True)
    e = torch.exp(d, out=scratch)
    distance_sum = times_distance(e, d) if out.mean_shortfall is not None else None
    e_top = e.gather(1, top)
    e.scatter_(1, top, 0.0)
    _store_sums(e, e_top, distance_sum, out)


def _store_largest(z: Tensor, out: ShardRows) -> Tensor:
    """Store maxima and their classes; return the maxima, 0 for rows without a finite logit."""
    if out.argmax is None:
        torch.amax(z, -1, keepdim=True, out=out.row_max)
    else:
        row_max, argmax = largest(z)
        out.row_max.copy_(row_max)
        out.argmax.copy_(argmax)
    return torch.where(out.row_max == -torch.inf, 0.0, out.row_max)


def _store_sums(others: Tensor, e_y: Tensor, distance_sum: Tensor | None, out: ShardRows) -> None:
    """Store log-sum and mean shortfall: ``others`` are all exponentials but ``e_y``."""
    rest = others.sum(-1, keepdim=True)
    out.log_sum.copy_(torch.log1p(rest + (e_y - 1.0)))
    if distance_sum is not None and out.mean_shortfall is not None:
        total = rest + e_y
        out.mean_shortfall.copy_(torch.where(total == 0.0, 0.0, -distance_sum / total))


def _local_classes(target: Tensor, v: int, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Global ids -> (classes of the shard, 0 for others; True where the class is local)."""
    y = target - (spec.first_class or 0)
    local = (target != spec.ignore_index) & (y >= 0) & (y < v)
    return torch.where(local, y, 0), local


def shard_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    saved: Tensor,
    upstream: Upstream,
    spec: LossSpec,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> None:
    """Fill the gradients that are given, from ``merge.saved_rows`` of the merged rows; ``dlogits``
    may be ``logits``."""
    dtype = compute_dtype(logits)
    weight = None if class_weight is None else class_weight.to(dtype)
    up = upstream.columns(dtype)
    columns = saved.to(dtype)[:, :, None]
    n = len(logits)
    soft = target.is_floating_point()
    temporaries = 2 + (up.entropy is not None)
    if soft or spec.label_smoothing or spec.transforms_logits:
        temporaries += FEATURE_BLOCKS

    def part(rows: slice, block: int, count: int) -> None:
        for start in range(rows.start, min(rows.stop, n), block):
            some = slice(start, min(start + block, rows.stop, n))
            dx, dt = (None if g is None else g[some] for g in (dlogits, dtarget))
            operands = logits[some], target[some], weight, columns[:, some], up.of(some), spec
            if soft:
                _soft_grads(*operands, dlogits=dx, dtarget=dt)
            elif dx is not None:
                _id_grads(*operands, dlogits=dx)

    map_row_ranges(logits, dtype, temporaries, part)


def _id_coefs(
    target: Tensor, columns: Tensor, up: Upstream, spec: LossSpec, smoothing_coef: float
) -> tuple[Tensor, Tensor]:
    """(target_coef, softmax_coef) with their upstream gradients; NaN for bad targets."""
    row_max, log_sum, _, w_y, w_sum = columns
    assert spec.num_classes is not None
    out_of_range = (target < 0) | (target >= spec.num_classes)
    bad = (target != spec.ignore_index) & out_of_range
    dloss = torch.zeros_like(row_max) if up.loss is None else up.loss
    target_coef = dloss * (1.0 - spec.label_smoothing) * w_y
    if up.target_logprob is not None:
        target_coef = target_coef - up.target_logprob
    # only with smoothing: a NaN weight of a class that is no target must not reach the gradient
    smoothing_sum = smoothing_coef * w_sum if smoothing_coef else 0.0
    softmax_coef = softmax_coef_of(dloss, row_max + log_sum, spec, up.lse, smoothing_sum)
    return torch.where(bad, torch.nan, target_coef), softmax_coef


def _id_grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    columns: Tensor,
    up: Upstream,
    spec: LossSpec,
    *,
    dlogits: Tensor,
) -> None:
    row_max, log_sum, mean_shortfall, w_y, _ = columns
    target = target[:, None]
    assert spec.num_classes is not None
    smoothing_coef = spec.label_smoothing / spec.num_classes
    target_coef, softmax_coef = _id_coefs(target, columns, up, spec, smoothing_coef)
    y, local = _local_classes(target, logits.shape[1], spec)
    dloss = torch.zeros_like(row_max) if up.loss is None else up.loss
    work = dlogits
    if dlogits.dtype != row_max.dtype:
        work = torch.empty(logits.shape, dtype=row_max.dtype, device=logits.device)
    z, derivative = transform_logits(logits, spec, work)
    d = torch.sub(z, row_max, out=work)
    logp_y = d.gather(1, y) - log_sum
    inv_sum = torch.exp(-log_sum)
    dz_y = target_coef * torch.expm1(logp_y) + softmax_coef * logp_y.exp()
    dz_y = dz_y - dloss * smoothing_coef * w_y
    p_coef = target_coef + softmax_coef
    if up.entropy is None:
        e, distances = d.exp_(), None
    else:
        e, distances = d.exp(), d
        times_distance(e, distances)
        below = distances.gather(1, y) + mean_shortfall * e.gather(1, y)
        dz_y = dz_y - up.entropy * inv_sum * below
        p_coef = p_coef - up.entropy * mean_shortfall
    id_grad_elsewhere(
        e,
        p_coef,
        inv_sum,
        dloss,
        smoothing_coef,
        weight,
        distances=distances,
        dentropy=up.entropy,
    )
    e.scatter_(1, y, torch.where(local, dz_y, e.gather(1, y)))
    if derivative is not None:
        e.mul_(derivative)
    if e is not dlogits:
        dlogits.copy_(e)
    zero_rows(dlogits, target == spec.ignore_index)


def _soft_grads(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    columns: Tensor,
    up: Upstream,
    spec: LossSpec,
    *,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    row_max, log_sum, mass, given_mass, mean_shortfall = columns
    assert spec.num_classes is not None
    t, q = target_masses(target, weight, spec, spec.num_classes, row_max.dtype)
    scratch = torch.empty(logits.shape, dtype=row_max.dtype, device=logits.device)
    z, derivative = transform_logits(logits, spec, scratch)
    d = z - row_max
    logp = d - log_sum
    dloss = torch.zeros_like(row_max) if up.loss is None else up.loss
    if dtarget is not None:
        absent = (q == 0.0) & (logp == -torch.inf)
        dtarget.copy_(soft_target_grad(-logp, t, absent, weight, dloss, up.target_logprob, spec))
    if dlogits is None:
        return
    dlogprob = torch.zeros_like(row_max) if up.target_logprob is None else up.target_logprob
    softmax_coef = softmax_coef_of(dloss, row_max + log_sum, spec, up.lse)
    dmass = mass * dloss - given_mass * dlogprob
    dq = q * dloss - t * dlogprob
    p = d.exp() * torch.exp(-log_sum)
    # dmass * p - dq cancels where p is nearly 1
    dz = torch.where(p > 0.5, dmass * torch.expm1(logp) + (dmass - dq), dmass * p - dq)
    dz = dz + softmax_coef * p
    if up.entropy is not None:
        dz -= up.entropy * p * (d.masked_fill_(p == 0.0, 0.0) + mean_shortfall)
    if derivative is not None:
        dz *= derivative
    dlogits.copy_(dz)
