"""Rows and a spec -> launches of our Triton kernels. The only importer of ``lossfuse.kernels``."""

from typing import TypedDict

import torch
from torch import Tensor

from ..kernels import softmax_rows
from ..spec import LossSpec


class _Options(TypedDict):
    ignore_index: int
    scale: float | None
    softcap: float | None
    smoothing: float | None
    lse_square_scale: float | None


def _options(spec: LossSpec) -> _Options:
    """What is not asked for is None, so that no code is made for it."""
    return {
        "ignore_index": spec.ignore_index,
        "scale": spec.logit_scale,
        "softcap": spec.softcap,
        "smoothing": spec.label_smoothing or None,
        "lse_square_scale": spec.lse_square_scale or None,
    }


def _unit_stride(t: Tensor) -> Tensor:
    """Kernels step through a row one element at a time; other layouts are copied once."""
    return t if t.dim() < 2 or t.stride(-1) == 1 else t.contiguous()


def _operands(logits: Tensor, target: Tensor, class_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = None if class_weight is None else class_weight.to(torch.float32).contiguous()
    return _unit_stride(logits), _unit_stride(target) if target.is_floating_point() else target.contiguous(), weight


def row_loss(logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    return softmax_rows.row_loss(*_operands(logits, target, class_weight), **_options(spec))


def row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    softmax_rows.row_grads(*_operands(logits, target, class_weight), stats, dloss, dlogits=dlogits, dtarget=dtarget, **_options(spec))
