"""torchtitan 0.3: a loss for its configuration, ``config.loss =
FusedCrossEntropyLoss.Config()``."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper

from ..functional import linear_cross_entropy


class FusedCrossEntropyLoss(ChunkedLossWrapper):  # type: ignore[misc]
    """torchtitan's ``CrossEntropyLoss`` without materialized logits: the trainer passes hidden
    states and head.

    Equal, in loss and gradients, to ``ChunkedLossWrapper`` around ``CrossEntropyLoss``; sequences
    of any length, ``num_chunks`` and ``loss_fn`` are not read. ValueError if the head is sharded
    (FSDP, tensor parallelism)."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):  # type: ignore[misc]
        pass

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weight, bias = self.lm_head.weight, getattr(self.lm_head, "bias", None)
        if isinstance(weight, DTensor) or isinstance(pred, DTensor):
            raise ValueError(
                "lm_head is sharded, but FusedCrossEntropyLoss expects a weight with all classes;"
                " use ChunkedLossWrapper"
            )
        loss = linear_cross_entropy(
            pred, weight, labels, linear_bias=bias, reduction="sum", ignore_index=IGNORE_INDEX
        )
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}
