"""nn.Module shells over the functions."""

import torch
from torch import Tensor

from . import functional
from .spec import LossSpec, resolve_reduction


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` computed by ``lossfuse.cross_entropy``, with its keywords; isinstance and checkpoints agree."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        softcap: float | None = None,
        logit_scale: float | None = None,
        lse_square_scale: float = 0.0,
        inplace: bool = False,
        impl: str = "auto",
    ) -> None:
        reduction = resolve_reduction(reduction, size_average, reduce)
        LossSpec(ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale)
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace = inplace
        self.impl = impl

    def forward(self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            normalizer=normalizer,
            inplace=self.inplace,
            impl=self.impl,
        )
