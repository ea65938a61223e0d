"""Checks of tensors, and the flattening of any shape torch takes to rows of logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import require_finite

LOGIT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Rows:
    """N rows of V logits with their targets: views of what the caller gave, wherever strides allow."""

    logits: Tensor  # (N, V)
    target: Tensor  # (N,) int64 class ids, or (N, V) probabilities
    class_weight: Tensor | None  # (V,)
    batch_shape: torch.Size  # of the loss with reduction="none"

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1]

    @property
    def soft(self) -> bool:
        """Whether targets are class probabilities."""
        return self.target.is_floating_point()


def torch_func_active() -> bool:
    """Whether a torch.func transform is running, so that tensors may stand for batches or tangents."""
    # the test torch.autograd.Function makes itself; there is no public one
    return bool(torch._C._are_functorch_transforms_active())


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__} but must be a Tensor")


def flatten(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Rows:
    """(C), (N, C) or (N, C, d1, ..., dK) logits with ids or probabilities -> rows; raises before anything is computed."""
    _require_tensor("input", input)
    _require_tensor("target", target)
    if input.dtype not in LOGIT_DTYPES:
        raise TypeError(f"input has dtype {input.dtype} but logits must be float64, float32, bfloat16 or float16")
    if input.dim() == 0:
        raise ValueError("input has shape () but logits must be (C), (N, C) or (N, C, d1, ..., dK)")
    class_dim = 0 if input.dim() == 1 else 1
    num_classes = input.shape[class_dim]
    if num_classes == 0:
        raise ValueError(f"input has shape {_shape(input)}: dimension {class_dim} holds the classes and must not be empty")
    batch_shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    _check_target(input, target, batch_shape, ignore_index)
    if weight is not None:
        _check_weight(weight, input, num_classes)

    logits = _rows(input, class_dim)
    if target.is_floating_point():
        return Rows(logits, _rows(target, class_dim), weight, batch_shape)
    # asked first: torch takes longer to find that it has nothing to do
    ids = target if target.dim() == 1 else target.reshape(-1)
    return Rows(logits, ids if ids.dtype == torch.int64 else ids.to(torch.int64), weight, batch_shape)


def _rows(t: Tensor, class_dim: int) -> Tensor:
    """(N, C) from a tensor whose classes lie in ``class_dim``; copies only when the other dimensions cannot be one stride."""
    if t.dim() == 2:
        return t
    n = t.numel() // t.shape[class_dim]
    return t.movedim(class_dim, -1).reshape(n, t.shape[class_dim])


def _check_target(input: Tensor, target: Tensor, batch_shape: torch.Size, ignore_index: int) -> None:
    if target.device != input.device:
        raise ValueError(f"target is on {target.device} but input is on {input.device}")
    if target.shape == input.shape:
        if not target.is_floating_point():
            raise TypeError(
                f"target has the shape of input, {_shape(input)}, so it holds class probabilities and must be floating point,"
                f" but has dtype {target.dtype}"
            )
        if target.dtype not in LOGIT_DTYPES:
            raise TypeError(f"target has dtype {target.dtype} but probabilities must be float64, float32, bfloat16 or float16")
        if ignore_index >= 0:
            raise ValueError(f"ignore_index is {ignore_index} but class probabilities have no class id to ignore; leave it negative")
        return
    # torch takes one row's id as (1,) too
    if target.shape != batch_shape and not (input.dim() == 1 and target.shape == (1,)):
        raise ValueError(
            f"target has shape {_shape(target)} but input has shape {_shape(input)}; expected class ids of shape {tuple(batch_shape)}"
            f" or probabilities of shape {_shape(input)}"
        )
    if target.dtype not in ID_DTYPES:
        raise TypeError(f"target has dtype {target.dtype} but class ids must be int64, int32, int16, int8 or uint8")


def _check_weight(weight: Tensor, input: Tensor, num_classes: int) -> None:
    _require_tensor("weight", weight)
    if weight.dtype not in LOGIT_DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype} but class weights must be floating point")
    if tuple(weight.shape) != (num_classes,):
        raise ValueError(f"weight has shape {_shape(weight)} but input has {num_classes} classes; expected ({num_classes},)")
    if weight.device != input.device:
        raise ValueError(f"weight is on {weight.device} but input is on {input.device}")


def check_normalizer(normalizer: float | Tensor | None, reduction: str, input: Tensor) -> None:
    """The divisor of a mean: a positive number, or a 0-d tensor whose value is never read by the host."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer divides reduction='mean' but reduction is {reduction!r}; drop one of the two")
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer has shape {_shape(normalizer)} but must be a number or a 0-d tensor")
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"normalizer has dtype {normalizer.dtype} but must be real")
        # torch divides by a 0-d CPU tensor on any device, without moving it
        if normalizer.device.type != "cpu" and normalizer.device != input.device:
            raise ValueError(f"normalizer is on {normalizer.device} but input is on {input.device}")
        return
    require_finite("normalizer", normalizer)
    if not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer} but must be positive")
