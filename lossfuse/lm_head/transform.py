"""The transform between a head and its loss: scale, bias, soft cap, cast, a slice of the first
classes."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """What becomes of a row of the head's output ``x``: ``z = scale * x + bias``, or ``cap *
    tanh(z)``, of the first classes.

    ``kind`` says what of it a lazy tensor holds: "logits" z, or ``factor`` times one of "logp",
    "p", "p logp", "p z"; or "other", what only the program of the lazy tensor says."""

    num_classes: int
    dtype: torch.dtype
    scale: float = 1.0
    bias: Tensor | None = None
    cap: float | None = None
    kind: str = "logits"
    factor: float = 1.0
    # where the model would have a DTensor
    placements: tuple[Any, ...] | None = None

    def times(self, c: float) -> "LogitTransform | None":
        if c == 0.0 or not math.isfinite(c) or self.kind == "other":
            return None
        if self.kind != "logits":
            return replace(self, factor=self.factor * c)
        if self.cap is not None:
            return replace(self, cap=self.cap * c)
        return replace(
            self, scale=self.scale * c, bias=None if self.bias is None else self.bias * c
        )

    def plus(self, bias: Tensor) -> "LogitTransform | None":
        if self.kind != "logits" or self.cap is not None:
            return None
        bias = bias.flatten()
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    def first_classes(self, num_classes: int) -> "LogitTransform | None":
        if self.kind != "logits":
            return None
        return replace(
            self,
            num_classes=num_classes,
            bias=None if self.bias is None else self.bias[:num_classes],
        )

    @property
    def options(self) -> dict[str, float | None]:
        """As the losses take them."""
        scale = self.scale if self.cap is None else self.scale * self.cap
        return {
            "logit_scale": None if scale == 1.0 else scale,
            "softcap": None if self.cap is None else abs(self.cap),
        }

    def same_logits(self, other: "LogitTransform") -> bool:
        mine, others = (
            replace(s, kind="logits", factor=1.0, bias=None, dtype=torch.float32)
            for s in (self, other)
        )
        return mine == others and self.bias is other.bias
