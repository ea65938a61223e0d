"""What a loss is, apart from its tensors: one frozen object that checks its own values."""

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

    With ``group`` the row is cut: the logits at hand are those of the classes from ``first_class``
    on, of ``num_classes`` in all, and the ranks of the group hold the others."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float | None = None
    lse_square_scale: float = 0.0
    first_class: int | None = None
    num_classes: int | None = None
    group: str | None = None  # the name torch.distributed knows it by

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
            self._of_python()

    def _of_python(self) -> None:
        """Arithmetic with numpy's numbers is in their own precision, and kernels do not take
        them."""
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None and type(value) not in (int, float):
                object.__setattr__(self, name, kind(value))

    @property
    def transforms_logits(self) -> bool:
        """Whether the loss sees other numbers than the logits it is given."""
        return self.softcap is not None or self.logit_scale is not None


def loss_spec(*options: Any) -> LossSpec:
    """``LossSpec(*options)``, checked once for options that come again with every step."""
    if torch.compiler.is_compiling():
        return LossSpec(*options)
    try:
        return _known_spec(*options)
    except TypeError:
        # unhashable, or refused: the check says why
        return LossSpec(*options)


# 1 and True are one key unless typed, and True is no number here
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
    """True or False, and nothing that is taken for one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} but must be True or False")


def require_finite(name: str, value: Any) -> None:
    """A Python or numpy number that float32 can hold."""
    # a compiler's symbolic number has no __float__, but compares
    if not torch.compiler.is_compiling():
        if isinstance(value, bool | str | Tensor) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} is a {type(value).__name__} but must be a Python number")
        # numpy's would be compared in their own precision
        value = value if isinstance(value, int) else float(value)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} is {value} but must be finite in float32")


@dataclass(frozen=True)
class LinearOptions:
    """How ``linear_cross_entropy`` goes about its work; what it computes stays the same.

    Args:
        chunk_bytes: at most so many bytes of logits at a time; at least a row. None: the rule of
            ``lossfuse.ops.head_chunks.chunk_rows``, 1 GiB on an accelerator and 256 MiB on a CPU,
            or more where that is less than the matrix products need. With ``shard`` of shards that
            are even, so that all ranks make as many chunks: a larger one takes as much more as it
            is larger.
        logits_dtype: of the logits of a chunk: float32, which is None (float64 for float64), or
            bfloat16 for bfloat16 operands. Half the bytes, and 2 to 5 times the error in the
            gradient of the hidden states. A CPU multiplies in float32, block by block of the
            classes, and rounds; one with AMX multiplies in bfloat16 where ``acc_dtype`` is bfloat16
            too and D and V are multiples of 32.
        acc_dtype: what gradients are summed in, and kept in until the backward multiplies and
            rounds them once: float32, which is None (float64 for float64), or bfloat16 for bfloat16
            operands, which rounds them once for each chunk.
        drop_ignored: leave rows with ``ignore_index`` out of the products. None does where looking
            is free, on the CPU; True synchronises elsewhere. With ``shard`` None does not, and True
            takes it that all ranks have the same targets.
        allow_retain_graph: keep the gradients for a second backward, at the price of another copy
            of them in each.
        main_grad: add the gradient of the weight to ``linear_weight.main_grad``, in float32 and
            without rounding, and leave its ``grad`` alone.
    """

    chunk_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    acc_dtype: torch.dtype | None = None
    drop_ignored: bool | None = None
    allow_retain_graph: bool = False
    main_grad: bool = False

    def __post_init__(self) -> None:
        if self.chunk_bytes is not None:
            if not isinstance(self.chunk_bytes, Integral) or isinstance(self.chunk_bytes, bool):
                raise TypeError(
                    f"chunk_bytes is {self.chunk_bytes!r} but must be an int, or None for the default"
                )
            if self.chunk_bytes < 1:
                raise ValueError(f"chunk_bytes is {self.chunk_bytes} but must be positive")
        for name in ("logits_dtype", "acc_dtype"):
            value = getattr(self, name)
            if value not in (None, torch.float32, torch.bfloat16):
                raise ValueError(
                    f"{name} is {value} but must be torch.float32, torch.bfloat16 or None"
                )
        for name in ("drop_ignored", "allow_retain_graph", "main_grad"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "drop_ignored" and value is None):
                raise TypeError(f"{name} is {value!r} but must be True or False")

    def dtype(self, name: str, operands: torch.dtype) -> torch.dtype:
        """What ``logits_dtype`` or ``acc_dtype`` comes to for operands of a dtype."""
        chosen: torch.dtype | None = getattr(self, name)
        wide = torch.float64 if operands == torch.float64 else torch.float32
        if chosen not in (None, wide) and chosen != operands:
            raise ValueError(
                f"{name} is {chosen} but input has dtype {operands}; expected {wide} or None"
            )
        return chosen or wide


@dataclass(frozen=True)
class VocabShard:
    """Which classes the logits, or the head, of this rank are: from ``start`` on, of
    ``num_classes``, the others being with other ranks.

    All ranks of ``group`` call the same function with the same rows and targets (class ids in ``[0,
    num_classes)``, or this shard's columns of probabilities), each with its own classes. Shards may
    be of any sizes, also empty; together they are all classes once.

    Args:
        start: the first class of this rank.
        num_classes: of all ranks together.
        group: a process group of torch.distributed; None for all ranks.
        hidden_grad: of ``input`` in the linear forms. "reduced", summed over the group in the
            backward, is right for hidden states that every rank holds alike; "partial" leaves each
            rank its own part, for those who sum it themselves (sequence parallelism).

    Raises:
        TypeError, ValueError: naming the argument; also where torch.distributed is not initialized,
            or this rank is not in the group.
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
                f"start is {self.start} but must lie in [0, {self.num_classes}], as there are {self.num_classes} classes"
            )
        if self.hidden_grad not in ("reduced", "partial"):
            raise ValueError(
                f"hidden_grad is {self.hidden_grad!r} but must be 'reduced' or 'partial'"
            )
        # a string, for what is compiled
        object.__setattr__(self, "group_name", _group(self.group).group_name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VocabShard":
        # a group is not copied, and a copy of a module has the same ranks
        return self

    @classmethod
    def even(
        cls, num_classes: int, group: Any = None, hidden_grad: str = "reduced"
    ) -> "VocabShard":
        """The shard of this rank where classes are cut as ``torch.chunk`` and DTensor's ``Shard``
        cut them: equal but for the last."""
        of = _group(group)
        return cls(
            min(of.rank() * -(-num_classes // of.size()), num_classes),
            num_classes,
            group,
            hidden_grad,
        )

    @property
    def options(self) -> tuple[int, int, str]:
        """As ``LossSpec`` takes them."""
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
    """``reduction`` after torch's two deprecated arguments, which win when given."""
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
