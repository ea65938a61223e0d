"""Checks of the tensors of binary cross entropy, and their flattening to rows of labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import LOGIT_DTYPES, Rows, require_tensor

# contiguous tensors with shorter rows are flattened to one row, so that blocks are full
LEAST_LABELS = 1024
# one row has at most this many labels, which kernels count in 32 bits
MOST_LABELS = 2**30


@dataclass(frozen=True)
class LabelRows(Rows):
    """N rows of V logits, each a label. ``target`` is (N, V) numbers or (N, P) ids;
    ``class_weight`` is (N, V)."""

    pos_weight: Tensor | None  # (N, V)

    @property
    def weights(self) -> dict[str, Tensor | None]:
        return {"weight": self.class_weight, "pos_weight": self.pos_weight}


def flatten_labels(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
) -> LabelRows:
    """Rows of logits of any shape with a target of the same shape, or (N, V) with ids (N, P).

    Raises before anything is computed."""
    check_labels(input, target, "logits")
    if ignore_index != -100 and target.is_floating_point():
        raise ValueError(
            f"ignore_index is {ignore_index} but target is {target.dtype} of the shape of input,"
            " which has no ids to ignore"
        )
    if not target.is_floating_point():
        _check_ids(target, input)
    elif target.shape != input.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)} but input has shape {tuple(input.shape)};"
            " expected the same, or int64 ids of shape (N, P) for an input of (N, V); nothing is"
            f" broadcast{same_elements(target, input)}"
        )
    weight = check_broadcast("weight", weight, input)
    pos_weight = check_broadcast("pos_weight", pos_weight, input)
    operands = [t for t in (input, target, weight, pos_weight) if t is not None]
    # two dimensions stay as they are: a compiler sees through no view
    one_row = input.dim() != 2 and (input.dim() < 2 or input.shape[-1] < LEAST_LABELS)
    one_row = one_row and all(t.is_contiguous() for t in operands)
    one_row = one_row and input.numel() <= MOST_LABELS
    v = (input.numel() if one_row else input.shape[-1]) if input.dim() else 1
    n = input.numel() // v if v else 0

    def rows(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dim() == 2 else t.reshape(n, v)

    logits, labels = rows(input), rows(target)
    assert logits is not None and labels is not None
    return LabelRows(labels, rows(weight), input.shape, logits, rows(pos_weight))


def check_labels(input: Tensor, target: Tensor, kind: str) -> None:
    """Check types and devices; ``kind``, "logits" or "probabilities", is named in the error."""
    require_tensor("input", input)
    require_tensor("target", target)
    if input.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"input has dtype {input.dtype} but {kind} must be float64, float32, bfloat16 or"
            " float16"
        )
    if target.device != input.device:
        raise ValueError(f"target is on {target.device} but input is on {input.device}")
    if target.is_floating_point() and target.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"target has dtype {target.dtype} but must be float64, float32, bfloat16 or float16"
        )


def same_elements(target: Tensor, input: Tensor, cast: str = "") -> str:
    """The end of an error for a target that differs only in dimensions of size 1, such as (N,) for
    an input of (N, 1); else ""."""
    sizes = [[n for n in t.shape if n != 1] for t in (target, input)]
    if target.numel() == input.numel() and sizes[0] == sizes[1]:
        return f"; pass target.view_as(input){cast}"
    return ""


def check_broadcast(name: str, t: Tensor | None, input: Tensor) -> Tensor | None:
    """Check a weight and expand it to the shape of ``input``."""
    if t is None:
        return None
    require_tensor(name, t)
    if t.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} has dtype {t.dtype} but must be floating point")
    if t.device != input.device:
        raise ValueError(f"{name} is on {t.device} but input is on {input.device}")
    if t.shape == input.shape:
        return t
    sizes = zip(reversed(t.shape), reversed(input.shape), strict=False)
    if t.dim() > input.dim() or any(a not in (1, b) for a, b in sizes):
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}, which does not broadcast to the shape of input,"
            f" {tuple(input.shape)}; sizes are matched from the last dimension on"
        )
    return t.expand(input.shape)


def _check_ids(target: Tensor, input: Tensor) -> None:
    found = f"target has dtype {target.dtype} and shape {tuple(target.shape)}"
    if target.dtype != torch.int64 or target.shape == input.shape:
        raise TypeError(
            f"{found} but input has shape {tuple(input.shape)}; expected floating point of that"
            " shape, or int64 ids of shape (N, P), P other than V, for an input of (N, V)"
            + ("; pass target.float()" if target.shape == input.shape else "")
        )
    if input.dim() != 2 or target.dim() != 2 or target.shape[0] != input.shape[0]:
        raise ValueError(
            f"target has shape {tuple(target.shape)} but input has shape {tuple(input.shape)}; ids"
            " of the labels that are 1 must be (N, P), rows padded with ignore_index, for an input"
            f" of (N, V){same_elements(target, input, cast='.float()')}"
        )
