"""Rows that are cut by classes: from what each shard says of a row to what the row is. No
communication here.

Shards are merged about the largest of their maxima, each moved by its distance from it, so that an
offset common to a row cancels exactly and ``log_sum`` keeps its digits near 0. Shards are summed in
the order they come, so that every rank has the same numbers."""

import torch
from torch import Tensor

from ..row_types import RowStats, ShardRows, Wants, log_sum_exp, no_class
from ..spec import LossSpec

# rows of numbers that a gradient of a shard is made from
KEPT_ROWS = 5


def nothing(
    n: int, like: Tensor, soft: bool, weighted: bool, spec: LossSpec, wants: Wants, given: bool
) -> ShardRows:
    """What a shard without classes says of N rows, in the dtype of ``like``."""
    zero = like.new_zeros(n)

    def only_if(condition: bool) -> Tensor | None:
        return zero if condition else None

    return ShardRows(
        row_max=like.new_full((n,), -torch.inf),
        log_sum=like.new_full((n,), -torch.inf),
        target_logit=only_if(not soft),
        target_weight=only_if(not soft and weighted),
        mass=only_if(soft),
        shortfall=only_if(soft or bool(spec.label_smoothing)),
        given_mass=only_if(soft and given),
        given_shortfall=only_if(soft and given),
        mean_shortfall=only_if(wants.entropy),
        argmax=zero.to(torch.int64) if wants.argmax else None,
    )


def merge(shards: ShardRows, weight_sums: Tensor) -> ShardRows:
    """(P, N) of P shards -> (N,) of the row they make up, which is a shard in its turn.

    ``argmax`` is counted from the first class of the row; ``weight_sums`` (P,) are the class
    weights of each shard, summed."""
    # a shard without a finite logit is below all others, whatever stands for its maximum
    tops = torch.where(shards.log_sum == -torch.inf, -torch.inf, shards.row_max)
    row_max = tops.amax(0)
    below = torch.where(row_max == -torch.inf, 0.0, row_max - tops)
    log_masses = shards.log_sum - below
    # one shard's own maximum is the row's, and what it has beyond that may be next to nothing
    first = tops.argmax(0, keepdim=True)
    others = log_masses.exp().scatter(0, first, 0.0).sum(0)
    log_sum = torch.log1p(others + torch.expm1(shards.log_sum.gather(0, first)[0]))

    def summed(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.sum(0)

    def lowered(shortfall: Tensor | None, mass: Tensor) -> Tensor | None:
        # a shard without mass may lie infinitely far below
        return (
            None
            if shortfall is None
            else (shortfall + torch.where(mass == 0.0, 0.0, mass * below)).sum(0)
        )

    mean_shortfall = argmax = None
    if shards.mean_shortfall is not None:
        share = (log_masses - log_sum).exp()
        mean_shortfall = torch.where(
            share == 0.0, 0.0, share * (shards.mean_shortfall + below)
        ).sum(0)
    if shards.argmax is not None:
        # of shards with the row's maximum the first class; of a row with a NaN, some class
        argmax = torch.where(below == 0.0, shards.argmax, shards.argmax.gather(0, first)).amin(0)
    given = shards.given_mass is not None
    return ShardRows(
        row_max=row_max,
        log_sum=log_sum,
        target_logit=summed(shards.target_logit),
        target_weight=summed(shards.target_weight),
        mass=summed(shards.mass),
        shortfall=lowered(
            shards.shortfall, weight_sums[:, None] if shards.mass is None else shards.mass
        ),
        given_mass=summed(shards.given_mass),
        given_shortfall=lowered(shards.given_shortfall, shards.given_mass)
        if given and shards.given_mass is not None
        else None,
        mean_shortfall=mean_shortfall,
        argmax=argmax,
    )


def row_loss(
    row: ShardRows, target: Tensor, weight_sum: Tensor, spec: LossSpec, num_classes: int
) -> Tensor:
    """(N,) losses of whole rows, as ``LossSpec`` states them; against ids ``target`` (N,) says
    which rows count."""
    if row.mass is not None:
        assert row.shortfall is not None
        loss = row.mass * row.log_sum + row.shortfall
    else:
        loss = _nll(row)
        if row.target_weight is not None:
            loss = loss * row.target_weight
        if row.shortfall is not None:
            loss = (1.0 - spec.label_smoothing) * loss
            loss = loss + spec.label_smoothing / num_classes * (
                weight_sum * row.log_sum + row.shortfall
            )
    if spec.lse_square_scale:
        lse = row.row_max + row.log_sum
        loss = loss + spec.lse_square_scale * lse * lse
    return loss if row.mass is not None else _unless_unread(loss, target, spec, num_classes)


def row_stats(
    row: ShardRows, target: Tensor, weight_sum: Tensor, spec: LossSpec, num_classes: int
) -> RowStats:
    """``row_loss`` and the statistics of N whole rows; what their gradients take is ``kept``."""
    loss = row_loss(row, target, weight_sum, spec, num_classes)
    lse = log_sum_exp(row.row_max, row.log_sum)
    if row.mass is not None:
        assert row.given_mass is not None and row.given_shortfall is not None
        logprob = -(row.given_mass * row.log_sum + row.given_shortfall)
    else:
        logprob = -_nll(row)
    entropy = None if row.mean_shortfall is None else row.log_sum + row.mean_shortfall
    argmax = row.argmax
    if row.mass is None:
        lse, logprob = (_unless_unread(t, target, spec, num_classes) for t in (lse, logprob))
        entropy = None if entropy is None else _unless_unread(entropy, target, spec, num_classes)
        argmax = (
            None
            if argmax is None
            else torch.where(_counts(target, spec, num_classes), argmax, no_class(spec))
        )
    return RowStats(loss, lse, logprob, entropy, argmax, kept(row, weight_sum))


def _nll(row: ShardRows) -> Tensor:
    assert row.target_logit is not None
    return (row.row_max - row.target_logit) + row.log_sum


def _counts(target: Tensor, spec: LossSpec, num_classes: int) -> Tensor:
    return (target != spec.ignore_index) & (target >= 0) & (target < num_classes)


def _unless_unread(t: Tensor, target: Tensor, spec: LossSpec, num_classes: int) -> Tensor:
    """A number of each row; 0 if the row is ignored, NaN if its target is bad."""
    return torch.where(
        target == spec.ignore_index,
        0.0,
        torch.where(_counts(target, spec, num_classes), t, torch.nan),
    )


def kept(row: ShardRows, weight_sum: Tensor) -> Tensor:
    """(5, N), what gradients of shards are made from: maximum and log-sum, and

    - against ids the mean shortfall, the weight of the target, the sum of all class weights;
    - against probabilities the mass, the given mass, the mean shortfall.
    """
    zero = torch.zeros_like(row.row_max)
    mean_shortfall = zero if row.mean_shortfall is None else row.mean_shortfall
    if row.mass is None:
        weight = torch.ones_like(zero) if row.target_weight is None else row.target_weight
        rest = [mean_shortfall, weight, weight_sum.expand_as(zero)]
    else:
        rest = [row.mass, zero if row.given_mass is None else row.given_mass, mean_shortfall]
    return torch.stack([row.row_max, row.log_sum, *rest])
