"""From the statistics of shards to those of whole rows, without communication.

Shards are merged relative to the largest of their maxima, each shifted by its distance from it. An
offset common to a row therefore cancels exactly, and ``log_sum`` stays accurate near 0. Shards are
summed in the order of the ranks, so that all ranks compute the same numbers."""

import torch
from torch import Tensor

from ..row_types import RowStats, ShardRows, Wants, log_sum_exp, mask_row, no_class
from ..spec import LossSpec

# numbers that ``saved_rows`` has of each row
SAVED_ROWS = 5


def empty_shard(
    n: int, like: Tensor, soft: bool, weighted: bool, spec: LossSpec, wants: Wants, given: bool
) -> ShardRows:
    """Statistics of N rows over no class, in the dtype of ``like``."""
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
    """(P, N) of P shards -> (N,) of all their classes together.

    ``argmax`` counts from the first class of the row; ``weight_sums`` (P,) are the sums of each
    shard's class weights."""
    # the maximum of a shard without a finite logit is below all others, even if it is LOWEST
    tops = torch.where(shards.log_sum == -torch.inf, -torch.inf, shards.row_max)
    row_max = tops.amax(0)
    below = torch.where(row_max == -torch.inf, 0.0, row_max - tops)
    log_masses = shards.log_sum - below
    # the shard with the row's maximum is left out of the sum, as the others may add next to nothing
    first = tops.argmax(0, keepdim=True)
    others = log_masses.exp().scatter(0, first, 0.0).sum(0)
    log_sum = torch.log1p(others + torch.expm1(shards.log_sum.gather(0, first)[0]))

    def total(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.sum(0)

    def total_shortfall(shortfall: Tensor | None, mass: Tensor | None) -> Tensor | None:
        if shortfall is None or mass is None:
            return None
        # a shard without mass may be infinitely far below
        return (shortfall + torch.where(mass == 0.0, 0.0, mass * below)).sum(0)

    mean_shortfall = argmax = None
    if shards.mean_shortfall is not None:
        share = (log_masses - log_sum).exp()
        terms = torch.where(share == 0.0, 0.0, share * (shards.mean_shortfall + below))
        mean_shortfall = terms.sum(0)
    if shards.argmax is not None:
        # the first class of all shards with the row's maximum; for a NaN row, some class
        argmax = torch.where(below == 0.0, shards.argmax, shards.argmax.gather(0, first)).amin(0)
    return ShardRows(
        row_max=row_max,
        log_sum=log_sum,
        target_logit=total(shards.target_logit),
        target_weight=total(shards.target_weight),
        mass=total(shards.mass),
        shortfall=total_shortfall(
            shards.shortfall, weight_sums[:, None] if shards.mass is None else shards.mass
        ),
        given_mass=total(shards.given_mass),
        given_shortfall=total_shortfall(shards.given_shortfall, shards.given_mass),
        mean_shortfall=mean_shortfall,
        argmax=argmax,
    )


def row_loss(
    row: ShardRows, target: Tensor, weight_sum: Tensor, spec: LossSpec, num_classes: int
) -> Tensor:
    """(N,) losses of merged rows, as ``LossSpec`` defines them."""
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
    return loss if row.mass is not None else mask_row(loss, *_status(target, spec, num_classes))


def row_stats(
    row: ShardRows, target: Tensor, weight_sum: Tensor, spec: LossSpec, num_classes: int
) -> RowStats:
    """Statistics of merged rows; ``saved`` is ``saved_rows``."""
    loss = row_loss(row, target, weight_sum, spec, num_classes)
    lse = log_sum_exp(row.row_max, row.log_sum)
    entropy = None if row.mean_shortfall is None else row.log_sum + row.mean_shortfall
    argmax = row.argmax
    if row.mass is not None:
        assert row.given_mass is not None and row.given_shortfall is not None
        logprob = -(row.given_mass * row.log_sum + row.given_shortfall)
    else:
        valid, ignored = _status(target, spec, num_classes)
        lse, logprob = (mask_row(t, valid, ignored) for t in (lse, -_nll(row)))
        entropy = None if entropy is None else mask_row(entropy, valid, ignored)
        argmax = None if argmax is None else torch.where(valid, argmax, no_class(spec))
    return RowStats(loss, lse, logprob, entropy, argmax, saved_rows(row, weight_sum))


def _nll(row: ShardRows) -> Tensor:
    assert row.target_logit is not None
    return (row.row_max - row.target_logit) + row.log_sum


def _status(target: Tensor, spec: LossSpec, num_classes: int) -> tuple[Tensor, Tensor]:
    """(valid, ignored) of rows against ids; neither if the target is out of range."""
    ignored = target == spec.ignore_index
    return ~ignored & (target >= 0) & (target < num_classes), ignored


def saved_rows(row: ShardRows, weight_sum: Tensor) -> Tensor:
    """(5, N) that the gradients of shards need: maximum and log-sum, then

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
