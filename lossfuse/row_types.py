"""What is read off rows of logits beside their loss, and what comes back to them: plain groups of
tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from .spec import LossSpec


class Wants(NamedTuple):
    """The statistics that cost something. What is not wanted is not computed."""

    entropy: bool
    argmax: bool


class RowStats(NamedTuple):
    """Statistics of N rows; of rows that are ignored 0, and no class, of rows with a bad target
    NaN, and no class."""

    loss: Tensor  # (N,)
    lse: Tensor  # (N,)
    target_logprob: Tensor  # (N,)
    entropy: Tensor | None  # (N,)
    argmax: Tensor | None  # (N,) int64
    kept: Tensor  # what the backend wants back for a gradient


class Upstream(NamedTuple):
    """The gradients of something with respect to the statistics of N rows; None for 0."""

    loss: Tensor | None = None  # (N,)
    lse: Tensor | None = None
    target_logprob: Tensor | None = None
    entropy: Tensor | None = None

    def of(self, rows: slice | Tensor) -> "Upstream":
        return Upstream(*(None if t is None else t[rows] for t in self))

    def over(self, unit: Tensor) -> "Upstream":
        return Upstream(*(None if t is None else t / unit for t in self))

    @property
    def only_loss(self) -> bool:
        return self.loss is not None and all(t is None for t in self[1:])


class ShardRows(NamedTuple):
    """What a shard's classes say of N rows: everything is about the shard's own maximum, so that
    shards can be merged.

    None for what the loss does not need. Rows that are ignored, or whose target is bad, may hold
    anything."""

    # (N,) of the logits as the loss sees them; without a finite one, -inf or the lowest number
    row_max: Tensor
    # (N,) log of the sum of exp(z - row_max), which keeps its digits near 0 where the target is the
    # largest; then -inf
    log_sum: Tensor
    target_logit: (
        Tensor | None
    )  # (N,) against ids, of the class where the shard holds it, otherwise 0
    target_weight: Tensor | None  # (N,) against ids with class weights, as target_logit
    mass: Tensor | None  # (N,) against probabilities, the sum of q = class weight * smoothed target
    shortfall: (
        Tensor | None
    )  # (N,) sum of q * (row_max - z); against ids, for smoothing, with the class weight for q
    given_mass: (
        Tensor | None
    )  # (N,) the two sums for the probabilities as given, for their log-probability
    given_shortfall: Tensor | None
    mean_shortfall: (
        Tensor | None
    )  # (N,) of row_max - z over the shard's own softmax, for the entropy
    argmax: (
        Tensor | None
    )  # (N,) int64, the first of the shard's classes with row_max, counted from its own first


def log_sum_exp(row_max: Tensor, log_sum: Tensor) -> Tensor:
    """The log-sum-exp of rows: +inf for a +inf logit, as in torch.logsumexp, although its
    ``log_sum`` is NaN."""
    return torch.where(row_max == torch.inf, row_max, row_max + log_sum)


def no_class(spec: LossSpec) -> int:
    """The argmax of a row that has none: neither an id nor what a target may be."""
    return -2 if spec.ignore_index == -1 else -1
