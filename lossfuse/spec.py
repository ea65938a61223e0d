"""What a loss is, apart from its tensors: one frozen object that checks its own values."""

import math
import warnings
from dataclasses import dataclass
from numbers import Integral, Real

REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class LossSpec:
    """The options of a cross entropy over one row of logits.

    The loss of a row with logits ``x``, class weights ``w`` and C classes is, with ``z = softcap * tanh(logit_scale * x / softcap)``,
    ``lse = logsumexp(z)`` and ``e = label_smoothing``,

    - for a class id ``y``: ``(1 - e) * w[y] * (lse - z[y]) + e / C * sum(w * (lse - z)) + lse_square_scale * lse**2``;
    - for probabilities ``t``: ``sum(w * ((1 - e) * t + e / C) * (lse - z)) + lse_square_scale * lse**2``.

    An ignored row is 0. A class whose logit is -inf and whose factor in the sum is 0 is left out of the sum.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float | None = None
    lse_square_scale: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.ignore_index, Integral) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index is {self.ignore_index!r} but must be an int")
        smoothing = _finite("label_smoothing", self.label_smoothing)
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {smoothing} but must lie in [0, 1]")
        if self.softcap is not None and _finite("softcap", self.softcap) <= 0.0:
            raise ValueError(f"softcap is {self.softcap} but must be positive, or None for no cap")
        if self.logit_scale is not None:
            _finite("logit_scale", self.logit_scale)
        _finite("lse_square_scale", self.lse_square_scale)

    @property
    def shapes_logits(self) -> bool:
        """Whether the loss sees other numbers than the logits it is given."""
        return self.softcap is not None or self.logit_scale is not None


def _finite(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__} but must be a Python number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value} but must be finite")
    return float(value)


def resolve_reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """``reduction`` after torch's two deprecated arguments, which win when given."""
    if size_average is not None or reduce is not None:
        average = size_average is None or size_average
        reduction = "none" if reduce is False else "mean" if average else "sum"
        warnings.warn(f"size_average and reduce are deprecated, use reduction={reduction!r} instead", UserWarning, stacklevel=3)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r} but must be one of 'none', 'mean', 'sum'")
    return reduction
