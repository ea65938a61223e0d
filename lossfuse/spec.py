"""The options of a loss: frozen objects that check their own values."""

import functools
import warnings
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class LossSpec:
    """The options of a cross entropy over one row of logits.

    The loss of a row with logits ``x``, class weights ``w`` and C classes is, with ``z = softcap *
    tanh(logit_scale * x / softcap)``, ``lse = logsumexp(z)`` and ``e = label_smoothing``,

    - for a class id ``y``: ``(1 - e) * w[y] * (lse - z[y]) + e / C * sum(w * (lse - z)) +
        lse_square_scale * lse**2``;
    - for probabilities ``t``: ``sum(w * ((1 - e) * t + e / C) * (lse - z)) + lse_square_scale *
        lse**2``.

    An ignored row is 0. A class whose logit is -inf and whose factor in the sum is 0 is left out of
    the sum.

    With ``group`` rows are sharded over the ranks of the group: the local logits are those of the
    classes from ``first_class`` on, of ``num_classes`` in all."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float | None = None
    lse_square_scale: float = 0.0
    first_class: int | None = None
    num_classes: int | None = None
    group: str | None = None  # its name in torch.distributed

    def __post_init__(self) -> None:
        if not isinstance(self.ignore_index, Integral) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index is {self.ignore_index!r} but must be an int")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index is {self.ignore_index} but must fit into 64 bits")
        require_finite("label_smoothing", self.label_smoothing)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing} but must lie in [0, 1]")
        if self.softcap is not None:
            require_finite("softcap", self.softcap)
            if not self.softcap > 0.0:
                raise ValueError(
                    f"softcap is {self.softcap} but must be positive, or None for no cap"
                )
        if self.logit_scale is not None:
            require_finite("logit_scale", self.logit_scale)
        require_finite("lse_square_scale", self.lse_square_scale)
        if not torch.compiler.is_compiling():
            self._convert_numbers()

    def _convert_numbers(self) -> None:
        """Convert numpy's numbers: they compute in their own precision, and kernels refuse
        them."""
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None and type(value) not in (int, float):
                object.__setattr__(self, name, kind(value))

    @property
    def transforms_logits(self) -> bool:
        """True if scale or cap apply to the logits."""
        return self.softcap is not None or self.logit_scale is not None


def loss_spec(*options: Any) -> LossSpec:
    """``LossSpec(*options)``, cached: most calls of a program have the same options."""
    if torch.compiler.is_compiling():
        return LossSpec(*options)
    try:
        return _known_spec(*options)
    except TypeError:
        # an option is unhashable or invalid; the constructor says which
        return LossSpec(*options)


# typed: 1 == True, but True is refused as a number
@functools.lru_cache(256, typed=True)
def _known_spec(*options: Any) -> LossSpec:
    return LossSpec(*options)


_NUMBERS: dict[str, type] = {
    "ignore_index": int,
    "label_smoothing": float,
    "softcap": float,
    "logit_scale": float,
    "lse_square_scale": float,
}
LARGEST = 3.4028234663852886e38


def require_bool(name: str, value: Any) -> None:
    """Raise TypeError for an object that is not a bool, even if it can be used as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} but must be True or False")


def require_finite(name: str, value: Any) -> None:
    """Raise for an object that is not a Python or numpy number in the range of float32."""
    # a symbolic number of a compiler has no __float__ but can be compared
    if not torch.compiler.is_compiling():
        if isinstance(value, bool | str | Tensor) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} is a {type(value).__name__} but must be a Python number")
        # a numpy number would be compared in its own precision
        value = value if isinstance(value, int) else float(value)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} is {value} but must be finite in float32")


@dataclass(frozen=True)
class LinearOptions:
    """How ``linear_cross_entropy`` computes: memory, precision and speed, not the result.

    Args:
        chunk_bytes: upper bound of the bytes of logits at a time; a chunk has at least one row.
            None is the rule of ``lossfuse.ops.chunk_plan.chunk_rows``: 1 GiB on an accelerator and
            256 MiB on a CPU, or more if the matrix products need it. With ``shard`` it counts for
            an even shard, so that all ranks have the same number of chunks; a larger shard takes
            proportionally more.
        logits_dtype: dtype of the logits of a chunk: float32, which is None (float64 for float64),
            or bfloat16 for bfloat16 operands, with half the bytes and 2 to 5 times the error in the
            gradient of the hidden states. A CPU multiplies in float32, block by block of the
            classes, and rounds; a CPU with AMX multiplies in bfloat16 if ``acc_dtype`` is bfloat16
            too and D and V are multiples of 32.
        acc_dtype: dtype in which gradients are accumulated, and stored until the backward
            multiplies and rounds them once: float32 (float64 for float64), or bfloat16 for bfloat16
            operands, which rounds them once per chunk. None is float32, but on CUDA and ROCm the
            gradient of a bfloat16 weight is accumulated in bfloat16 if that takes at most three
            roundings, and rounded in the forward otherwise; see
            ``lossfuse.ops.chunk_plan.chunk_plan``.
        drop_ignored: leave rows with ``ignore_index`` out of the products. None does so on a CPU,
            where finding them is free; True synchronizes on other devices. With ``shard`` None does
            not, and True relies on all ranks having the same targets.
        keep_dlogits: keep the gradient of all logits, in the dtype of the operands, until one
            product computes the gradient of the weight from it. Faster than a product for each
            chunk, and rounded once; takes ``N * V`` elements.
        allow_retain_graph: keep the gradients for a second backward. Every backward then allocates
            a copy of them.
        main_grad: add the gradient of the weight to ``linear_weight.main_grad`` in float32, without
            rounding, and leave ``linear_weight.grad`` alone.
    """

    chunk_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    acc_dtype: torch.dtype | None = None
    drop_ignored: bool | None = None
    keep_dlogits: bool = False
    allow_retain_graph: bool = False
    main_grad: bool = False

    def __post_init__(self) -> None:
        if self.chunk_bytes is not None:
            if not isinstance(self.chunk_bytes, Integral) or isinstance(self.chunk_bytes, bool):
                raise TypeError(
                    f"chunk_bytes is {self.chunk_bytes!r} but must be an int, or None for the"
                    " default"
                )
            if self.chunk_bytes < 1:
                raise ValueError(f"chunk_bytes is {self.chunk_bytes} but must be positive")
        for name in ("logits_dtype", "acc_dtype"):
            value = getattr(self, name)
            if value not in (None, torch.float32, torch.bfloat16):
                raise ValueError(
                    f"{name} is {value} but must be torch.float32, torch.bfloat16 or None"
                )
        for name in ("drop_ignored", "keep_dlogits", "allow_retain_graph", "main_grad"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "drop_ignored" and value is None):
                raise TypeError(f"{name} is {value!r} but must be True or False")

    def dtype(self, name: str, operands: torch.dtype) -> torch.dtype:
        """Return ``logits_dtype`` or ``acc_dtype`` for operands of a dtype, with None resolved."""
        chosen: torch.dtype | None = getattr(self, name)
        wide = torch.float64 if operands == torch.float64 else torch.float32
        if chosen not in (None, wide) and chosen != operands:
            raise ValueError(
                f"{name} is {chosen} but input has dtype {operands}; expected {wide} or None"
            )
        return chosen or wide


@dataclass(frozen=True)
class VocabShard:
    """The classes of this rank, if logits or a head are sharded over the vocabulary: those from
    ``start`` on, of ``num_classes``.

    All ranks of ``group`` call the same function with the same rows and targets (class ids in ``[0,
    num_classes)``, or the columns of probabilities of their own classes). Shards may have any size,
    also 0; together they cover every class once.

    Args:
        start: the first class of this rank.
        num_classes: the number of classes of all ranks together.
        group: a process group of torch.distributed; None for all ranks.
        hidden_grad: the gradient of ``input`` in the linear forms. "reduced" sums it over the group
            in the backward, for hidden states that every rank has alike. "partial" leaves each rank
            its own part, for code that reduces it itself (sequence parallelism).

    Raises:
        TypeError, ValueError: with the name of the argument; also if torch.distributed is not
            initialized, or this rank is not in the group.
    """

    start: int
    num_classes: int
    group: Any = None
    hidden_grad: str = "reduced"
    group_name: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("start", "num_classes"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r} but must be an int")
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes} but must be positive")
        if self.num_classes >= 2**31:
            raise ValueError(f"num_classes is {self.num_classes} but must be less than 2**31")
        if not 0 <= self.start <= self.num_classes:
            raise ValueError(
                f"start is {self.start} but must lie in [0, {self.num_classes}], as there are"
                f" {self.num_classes} classes"
            )
        if self.hidden_grad not in ("reduced", "partial"):
            raise ValueError(
                f"hidden_grad is {self.hidden_grad!r} but must be 'reduced' or 'partial'"
            )
        # a string, because operators take one
        object.__setattr__(self, "group_name", _group(self.group).group_name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VocabShard":
        # a process group cannot be copied, and a copy of a module has the same ranks
        return self

    @classmethod
    def even(
        cls, num_classes: int, group: Any = None, hidden_grad: str = "reduced"
    ) -> "VocabShard":
        """Return the shard of this rank for classes split as by ``torch.chunk`` and DTensor's
        ``Shard``: all shards equal but the last."""
        ranks = _group(group)
        size = -(-num_classes // ranks.size())
        return cls(min(ranks.rank() * size, num_classes), num_classes, group, hidden_grad)

    @property
    def options(self) -> tuple[int, int, str]:
        """The last fields of a ``LossSpec``."""
        return self.start, self.num_classes, self.group_name


def _group(group: Any) -> Any:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "a VocabShard needs torch.distributed; call torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__} but must be a process group that this rank is in"
        )
    return group


def resolve_reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """Return the reduction that torch's two deprecated arguments ask for, or ``reduction``."""
    if size_average is not None or reduce is not None:
        average = size_average is None or size_average
        reduction = "none" if reduce is not None and not reduce else "mean" if average else "sum"
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"size_average and reduce are deprecated, use reduction={reduction!r} instead",
                UserWarning,
                stacklevel=4,
            )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r} but must be one of 'none', 'mean', 'sum'")
    return reduction
