"""Cross entropy for large vocabularies: the loss and its gradient without a tensor of
probabilities."""

from .family import binary_cross_entropy, binary_cross_entropy_with_logits, log_softmax, nll_loss
from .functional import cross_entropy, linear_cross_entropy
from .lm_head.deferred_call import LogitsReport
from .lm_head.fuse import fuse_lm_head, unfuse_lm_head
from .modules import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LogSoftmax,
    NLLLoss,
)
from .spec import LinearOptions, VocabShard
from .statistics import LossStats, cross_entropy_stats, linear_cross_entropy_stats
from .targets import debug_targets

__version__ = "0.1.0"
__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LinearOptions",
    "LogSoftmax",
    "LogitsReport",
    "LossStats",
    "NLLLoss",
    "VocabShard",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "cross_entropy_stats",
    "debug_targets",
    "fuse_lm_head",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
    "log_softmax",
    "nll_loss",
    "unfuse_lm_head",
]
