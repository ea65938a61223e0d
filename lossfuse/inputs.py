"""Checks of tensors, and flattening of every shape torch takes to rows of logits."""

import contextlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .spec import VocabShard, require_finite

LOGIT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Targets:
    """The targets of N rows, of logits or of a head."""

    target: Tensor  # (N,) int64 class ids, or (N, V) probabilities
    class_weight: Tensor | None  # (V,), or that of all classes with a shard
    batch_shape: torch.Size  # of the loss with reduction="none"
    # None if the V local classes are all classes
    shard: VocabShard | None = field(default=None, kw_only=True)
    # (N,) in the dtype of the loss; None for 1
    row_weight: Tensor | None = field(default=None, kw_only=True)

    @property
    def weights(self) -> dict[str, Tensor | None]:
        """Tensors that only the reference differentiates, by the names of their arguments."""
        return {"weight": self.class_weight}

    @property
    def local_classes(self) -> int:
        """V, the number of classes of this rank."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """The number of classes of all ranks."""
        return self.local_classes if self.shard is None else self.shard.num_classes

    @property
    def local_weight(self) -> Tensor | None:
        """(V,): the weights of the local classes."""
        weight, shard = self.class_weight, self.shard
        if weight is None or shard is None or len(weight) == self.local_classes:
            return weight
        return weight[shard.start : shard.start + self.local_classes]

    @property
    def soft(self) -> bool:
        """True if targets are class probabilities."""
        return self.target.is_floating_point()


@dataclass(frozen=True)
class Rows(Targets):
    """N rows of V logits with their targets: views of the caller's tensors where strides allow."""

    input: Tensor  # (N, V)

    @property
    def logits(self) -> Tensor:
        return self.input

    @property
    def local_classes(self) -> int:
        return self.input.shape[-1]

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """The tensors that the logits are computed from."""
        return (self.input,)


@dataclass(frozen=True)
class HeadRows(Targets):
    """N hidden states, the head that computes V logits of each, and their targets."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (V, D)
    linear_bias: Tensor | None  # (V,)

    @property
    def local_classes(self) -> int:
        return self.linear_weight.shape[0]

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """The tensors that the logits are computed from."""
        return self.input, self.linear_weight, self.linear_bias


def torch_func_active() -> bool:
    """Return True inside a ``torch.func`` transform, where a tensor may be a batch or a
    tangent."""
    # private: torch.autograd.Function uses this test, and there is no public one
    return bool(torch._C._are_functorch_transforms_active())


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def require_tensor(name: str, value: object) -> None:
    """Raise TypeError for an object that is not a tensor, and for a tensor without strides."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__} but must be a Tensor{_tensor_of(name, value)}"
        )
    if value.layout != torch.strided or value.is_nested:
        what = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} is a tensor that is {what} but must be dense")


def _tensor_of(name: str, value: object) -> str:
    """Return a hint for an object that has the tensor as an attribute, such as a model output."""
    if isinstance(value, torch.nn.Linear) and name == "linear_weight":
        return "; pass linear_weight=head.weight and linear_bias=head.bias"
    if isinstance(getattr(value, "logits", None), Tensor) and name == "input":
        return "; pass its .logits"
    return ""


def flatten(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    shard: VocabShard | None = None,
    row_weight: Tensor | None = None,
) -> Rows:
    """(C), (N, C) or (N, C, d1, ..., dK) logits with ids or probabilities -> checked rows."""
    require_tensor("input", input)
    require_tensor("target", target)
    if input.dtype not in LOGIT_DTYPES:
        exchanged = (
            "; the order is (input, target)"
            if input.dtype in ID_DTYPES and target.is_floating_point()
            else ""
        )
        raise TypeError(
            f"input has dtype {input.dtype} but logits must be float64, float32, bfloat16 or"
            f" float16{exchanged}"
        )
    if input.dim() == 0:
        raise ValueError("input has shape () but logits must be (C), (N, C) or (N, C, d1, ..., dK)")
    class_dim = 0 if input.dim() == 1 else 1
    num_classes = input.shape[class_dim]
    if shard is not None:
        _require_shard(shard)
    if num_classes == 0 and shard is None:
        raise ValueError(
            f"input has shape {_shape(input)}: dimension {class_dim} holds the classes and must not"
            " be empty"
        )
    batch_shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    _check_target(target, input.device, input.shape, batch_shape, ignore_index, shard is not None)
    if weight is not None:
        _check_weight(weight, input, num_classes, shard)
    return Rows(
        _target_rows(target, class_dim),
        weight,
        batch_shape,
        _rows(input, class_dim),
        shard=shard,
        row_weight=(
            None if row_weight is None else flatten_row_weight(row_weight, input, batch_shape)
        ),
    )


def flatten_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    shard: VocabShard | None = None,
    row_weight: Tensor | None = None,
) -> HeadRows:
    """Hidden states (..., D) and a head (V, D) with ids (...) or probabilities (..., V) -> checked
    rows."""
    if shard is not None:
        _require_shard(shard)
    check_head(input, linear_weight, linear_bias, empty=shard is not None)
    require_tensor("target", target)
    num_classes = linear_weight.shape[0]
    batch_shape = input.shape[:-1]
    _check_target(
        target,
        input.device,
        (*batch_shape, num_classes),
        batch_shape,
        ignore_index,
        shard is not None,
        hidden=tuple(input.shape),
    )
    if weight is not None:
        _check_weight(weight, input, num_classes, shard)
    hidden = _rows(input, input.dim() - 1)
    ids = _target_rows(target, target.dim() - 1)
    return HeadRows(
        ids,
        weight,
        batch_shape,
        hidden,
        linear_weight,
        linear_bias,
        shard=shard,
        row_weight=(
            None if row_weight is None else flatten_row_weight(row_weight, input, batch_shape)
        ),
    )


def _require_shard(shard: object) -> None:
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard is a {type(shard).__name__} but must be a lossfuse.VocabShard")


def check_head(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *, empty: bool = False
) -> None:
    """Check that hidden states and head can be multiplied. A weight (V, d1, ..., dK, D) has a bias
    (V, d1, ..., dK); with ``empty`` V may be 0."""
    named = [("input", input), ("linear_weight", linear_weight)]
    named += [] if linear_bias is None else [("linear_bias", linear_bias)]
    for name, t in named:
        require_tensor(name, t)
        if t.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{name} has dtype {t.dtype} but must be float64, float32, bfloat16 or float16"
            )
        if t.device != input.device:
            raise ValueError(f"{name} is on {t.device} but input is on {input.device}")
        if t.dtype != input.dtype:
            raise TypeError(
                f"{name} has dtype {t.dtype} but input has dtype {input.dtype}; cast one of the"
                " two, or use autocast"
            )
    if input.dim() == 0:
        raise ValueError("input has shape () but hidden states must be (D), (N, D) or (..., D)")
    if linear_weight.dim() < 2:
        raise ValueError(
            f"linear_weight has shape {_shape(linear_weight)} but must be (C, D) or (C, d1, ...,"
            " dK, D)"
        )
    if linear_weight.shape[-1] != input.shape[-1]:
        remedy = (
            "; pass linear_weight.T"
            if linear_weight.dim() == 2 and linear_weight.shape[0] == input.shape[-1]
            else ""
        )
        raise ValueError(
            f"linear_weight has shape {_shape(linear_weight)} but input has shape {_shape(input)};"
            f" the last sizes must agree{remedy}"
        )
    if linear_weight.shape[:-1].numel() == 0 and not empty:
        raise ValueError(
            f"linear_weight has shape {_shape(linear_weight)}: expected at least one class"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias has shape {_shape(linear_bias)} but linear_weight has shape"
            f" {_shape(linear_weight)};"
            f" expected {tuple(linear_weight.shape[:-1])}"
        )


# the order of LigerFusedLinearCrossEntropyLoss
EXCHANGED = "; are input and linear_weight exchanged? The order is (input, linear_weight, target)"


def main_grad_of(linear_weight: Tensor) -> Tensor:
    """Return ``linear_weight.main_grad``, Megatron's buffer in which the gradient of a weight is
    accumulated over the microbatches of a step."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "options.main_grad writes into linear_weight.main_grad, which a compiler does not see;"
            " call it uncompiled"
        )
    buffer = getattr(linear_weight, "main_grad", None)
    wide = torch.float64 if linear_weight.dtype == torch.float64 else torch.float32
    if not isinstance(buffer, Tensor):
        raise ValueError("options.main_grad is True but linear_weight has no tensor main_grad")
    if (
        buffer.shape != linear_weight.shape
        or buffer.dtype != wide
        or buffer.device != linear_weight.device
    ):
        raise ValueError(
            f"linear_weight.main_grad is {buffer.dtype} of shape {_shape(buffer)} on"
            f" {buffer.device}; expected {wide} of shape"
            f" {_shape(linear_weight)} on {linear_weight.device}"
        )
    return buffer


def autocast_operands(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the operands of a product to the dtype of autocast if it is on; float64 stays."""
    kind = input.device.type if isinstance(input, Tensor) else "meta"
    if not _autocast_is_on(kind):
        return input, linear_weight, linear_bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return (
            t.to(dtype)
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
            else t
        )

    return cast(input), cast(linear_weight), None if linear_bias is None else cast(linear_bias)


def without_autocast(t: Tensor) -> AbstractContextManager[object]:
    """Disable autocast: the operands have been cast, and products in float32 are meant to be."""
    if _autocast_is_on(t.device.type):
        return torch.autocast(t.device.type, enabled=False)
    return contextlib.nullcontext()


def _autocast_is_on(kind: str) -> bool:
    # the compiler of torch 2.8 cannot trace the question; of the devices it compiles for only
    # "meta" has no autocast
    available = (
        kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind)
    )
    return available and torch.is_autocast_enabled(kind)


def _target_rows(target: Tensor, class_dim: int) -> Tensor:
    """(N,) int64 ids, or (N, C) probabilities whose classes lie in ``class_dim``."""
    if target.is_floating_point():
        return _rows(target, class_dim)
    # these tests are faster than calls of torch that return their argument
    ids = target if target.dim() == 1 else target.reshape(-1)
    return ids if ids.dtype == torch.int64 else ids.to(torch.int64)


def _rows(t: Tensor, class_dim: int) -> Tensor:
    """(N, C) from a tensor with its classes in ``class_dim``; copies only if the other dimensions
    cannot be merged into one stride."""
    if t.dim() == 2:
        return t
    if t.dim() == 1:
        return t[None]
    # not reshape: a tracer records its sizes as constants
    return t.movedim(class_dim, -1).flatten(0, -2)


def _check_target(
    target: Tensor,
    device: torch.device,
    logits_shape: tuple[int, ...],
    batch_shape: torch.Size,
    ignore_index: int,
    sharded: bool,
    *,
    hidden: tuple[int, ...] | None = None,
) -> None:
    """Check a target against the shape of the logits; ``hidden`` is the shape of the hidden states
    they are computed from."""
    if target.device != device:
        raise ValueError(f"target is on {target.device} but input is on {device}")
    shape, of_logits = tuple(target.shape), tuple(logits_shape)
    # (1,) beside a row of one local class may be an id, as it is on ranks with more classes
    if shape == of_logits and not (sharded and shape == (1,) and not target.is_floating_point()):
        if not target.is_floating_point():
            raise TypeError(
                f"target has the shape of the logits, {shape}, so it holds class probabilities and"
                " must be floating point,"
                f" but has dtype {target.dtype}; pass target.float(), or the ids of its classes"
            )
        if target.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"target has dtype {target.dtype} but probabilities must be float64, float32,"
                " bfloat16 or float16"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index is {ignore_index} but class probabilities have no class id to"
                " ignore; leave it negative"
            )
        return
    # torch also takes (1,) as the id of one row (C)
    if target.shape != batch_shape and not (len(of_logits) == 1 and shape == (1,)):
        raise ValueError(
            f"target has shape {shape} but the logits have shape {of_logits}; expected class ids of"
            f" shape {tuple(batch_shape)}"
            f" or probabilities of shape {of_logits}{_remedy(shape, of_logits, hidden)}"
        )
    if target.dtype not in ID_DTYPES:
        remedy = "; pass target.long()" if target.is_floating_point() else ""
        raise TypeError(
            f"target has dtype {target.dtype} but class ids must be int64, int32, int16, int8 or"
            f" uint8{remedy}"
        )


def _remedy(
    target: tuple[int, ...], logits: tuple[int, ...], hidden: tuple[int, ...] | None
) -> str:
    """Return a hint how to make a target of this shape fit the input."""
    if hidden is not None and len(logits) == 2 and target in (logits[1:], logits[::-1]):
        return EXCHANGED
    rows, same_rank = logits[:-1], len(target) == len(logits) - 1
    last = len(logits) > 2 and hidden is None
    flat = "input.flatten(0, -2) and target.flatten()"
    ids = math.prod(target)
    if last and target == rows:
        return f"; if classes are the last dimension, pass {flat}, or input.transpose(1, -1)"
    if same_rank and rows and target[:-1] == rows[:-1] and abs(target[-1] - rows[-1]) == 1:
        # a language model's targets are the next tokens
        every = ":, " * (len(rows) - 1)
        cut = f"input[{every}:-1]" if target[-1] < rows[-1] else f"target[{every}1:]"
        if not last:
            return f"; if row i predicts target i + 1, pass {cut}"
        flat = flat.replace("input", cut) if target[-1] < rows[-1] else flat.replace("target", cut)
        return f"; if classes are the last dimension and row i predicts target i + 1, pass {flat}"
    if len(rows) > 1 and len(target) == 1 and ids == math.prod(rows):
        return (
            "; if classes are the last dimension, pass input.flatten(0, -2)"
            if last
            else "; pass input.flatten(0, -2)"
        )
    if len(rows) == 1 and len(target) > 1 and ids == rows[0]:
        return "; pass target.flatten()"
    if len(logits) == 2 and target == logits[1:]:
        return "; if classes are the first dimension, pass input.T"
    return ""


def _check_weight(
    weight: Tensor, input: Tensor, num_classes: int, shard: VocabShard | None
) -> None:
    require_tensor("weight", weight)
    if weight.dtype not in LOGIT_DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype} but class weights must be floating point")
    if tuple(weight.shape) != (num_classes,) and (
        shard is None or tuple(weight.shape) != (shard.num_classes,)
    ):
        of_all = "" if shard is None else f" or, of all classes, ({shard.num_classes},)"
        raise ValueError(
            f"weight has shape {_shape(weight)} but input has {num_classes} classes; expected"
            f" ({num_classes},){of_all}"
        )
    if weight.device != input.device:
        raise ValueError(f"weight is on {weight.device} but input is on {input.device}")


def flatten_row_weight(row_weight: Tensor, input: Tensor, batch_shape: torch.Size) -> Tensor:
    """(N,) weights of the rows in the dtype of the loss."""
    require_tensor("row_weight", row_weight)
    if row_weight.is_complex():
        raise TypeError(f"row_weight has dtype {row_weight.dtype} but must be real")
    if row_weight.device != input.device:
        raise ValueError(f"row_weight is on {row_weight.device} but input is on {input.device}")
    if row_weight.shape != batch_shape:
        raise ValueError(
            f"row_weight has shape {_shape(row_weight)} but must have one number per row,"
            f" {tuple(batch_shape)}"
        )
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    return row_weight.to(wide).flatten()


def check_normalizer(normalizer: float | Tensor | None, reduction: str, input: Tensor) -> None:
    """The divisor of a mean: a positive number, or a 0-d tensor whose value is never read by the
    host."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer divides reduction='mean' but reduction is {reduction!r}; drop one of the"
            " two"
        )
    if isinstance(normalizer, Tensor):
        require_tensor("normalizer", normalizer)
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer has shape {_shape(normalizer)} but must be a number or a 0-d tensor"
            )
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"normalizer has dtype {normalizer.dtype} but must be real")
        # torch divides by a 0-d CPU tensor on any device, without moving it
        if normalizer.device.type != "cpu" and normalizer.device != input.device:
            raise ValueError(f"normalizer is on {normalizer.device} but input is on {input.device}")
        return
    require_finite("normalizer", normalizer)
    if not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer} but must be positive")
