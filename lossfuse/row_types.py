"""Groups of row-wise tensors: statistics, their upstream gradients, statistics of a shard."""

from typing import NamedTuple

import torch
from torch import Tensor

from .spec import LossSpec


class Wants(NamedTuple):
    """The optional statistics that are computed."""

    entropy: bool
    argmax: bool


class RowStats(NamedTuple):
    """Statistics of N rows. Ignored rows are 0 and rows with a bad target NaN; their argmax is
    ``no_class``."""

    loss: Tensor  # (N,)
    lse: Tensor  # (N,)
    target_logprob: Tensor  # (N,)
    entropy: Tensor | None  # (N,)
    argmax: Tensor | None  # (N,) int64
    saved: Tensor  # for the backward; its shape is the backend's


class Upstream(NamedTuple):
    """The upstream gradients of the statistics of N rows, each (N,); None for 0."""

    loss: Tensor | None = None
    lse: Tensor | None = None
    target_logprob: Tensor | None = None
    entropy: Tensor | None = None

    def of(self, rows: slice | Tensor) -> "Upstream":
        return Upstream(*(None if t is None else t[rows] for t in self))

    def over(self, divisor: Tensor) -> "Upstream":
        return Upstream(*(None if t is None else t / divisor for t in self))

    def columns(self, dtype: torch.dtype) -> "Upstream":
        """(N, 1) of a dtype."""
        return Upstream(*(None if t is None else t.to(dtype)[:, None] for t in self))

    @property
    def only_loss(self) -> bool:
        return self.loss is not None and all(t is None for t in self[1:])


class ShardRows(NamedTuple):
    """Statistics of N rows over the classes of one shard, from which shards are merged.

    Each is (N,), relative to the shard's own maximum, and None if the loss does not need it.
    Entries of ignored rows and of rows with a bad target are undefined.
    """

    # of the logits after scale and softcap; -inf or the lowest number if no logit is finite
    row_max: Tensor
    # log of the sum of exp(z - row_max), accurate near 0 if the target is the largest class; -inf
    # if no logit is finite
    log_sum: Tensor
    # against ids, 0 if another shard has the target's class; the weight only with class weights
    target_logit: Tensor | None
    target_weight: Tensor | None
    # against probabilities, the sum of q = class weight * smoothed probability
    mass: Tensor | None
    # sum of q * (row_max - z); against ids, for smoothing, q is the class weight
    shortfall: Tensor | None
    # mass and shortfall of the probabilities as given, for their log-probability
    given_mass: Tensor | None
    given_shortfall: Tensor | None
    # row_max - z averaged over the shard's own softmax, for the entropy
    mean_shortfall: Tensor | None
    # int64, the first class with row_max, relative to the shard
    argmax: Tensor | None


def log_sum_exp(row_max: Tensor, log_sum: Tensor) -> Tensor:
    """row_max + log_sum; +inf for a +inf logit, as in torch.logsumexp, although its ``log_sum`` is
    NaN."""
    return torch.where(row_max == torch.inf, row_max, row_max + log_sum)


def mask_row(value: Tensor, valid: Tensor, ignored: Tensor) -> Tensor:
    """``value``, a number of each row; 0 if the row is ignored, NaN if its target is bad."""
    return torch.where(ignored, 0.0, torch.where(valid, value, torch.nan))


def no_class(spec: LossSpec) -> int:
    """The argmax of rows that are not valid: neither a class nor ``ignore_index``."""
    return -2 if spec.ignore_index == -1 else -1
