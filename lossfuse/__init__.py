"""Cross entropy for large vocabularies: the loss and its gradient without a tensor of probabilities."""

from .family import binary_cross_entropy_with_logits
from .functional import cross_entropy, linear_cross_entropy
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss
from .spec import LinearOptions
from .targets import debug_targets

__version__ = "0.1.0"
__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LinearOptions",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "debug_targets",
    "linear_cross_entropy",
]
