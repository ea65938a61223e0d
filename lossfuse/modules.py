"""Modules of the losses, which store options and call the functions.

``torch.jit.trace``, ``torch.export`` and ``torch.onnx.export`` record operators of torch;
``torch.jit.script`` raises RuntimeError.
"""

import math

import torch
from torch import Tensor

from . import family, functional
from .call.public import public_init, refuse_script
from .spec import LinearOptions, LossSpec, VocabShard, resolve_reduction


def _require_options(module: torch.nn.Module, *given: object) -> None:
    """Raise TypeError if the constructor gets the tensors of a call.

    Call it before code that reads the values of options.
    """
    if any(isinstance(value, Tensor) for value in given):
        name = type(module).__name__
        takes = "input" if isinstance(module, torch.nn.LogSoftmax) else "input, target"
        raise TypeError(
            f"{name}(...) takes options and is then called with tensors: {name}()({takes})"
        )


def _require_class_weight(module: torch.nn.Module, weight: Tensor | None) -> None:
    if isinstance(weight, Tensor) and weight.dim() != 1:
        name = type(module).__name__
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} but must be (C), the weight of each class; to"
            f" compute a loss of logits, call {name}()(input, target)"
        )


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``, computed by ``lossfuse.cross_entropy`` and with its keywords.

    It is a subclass with the same ``state_dict``, so ``isinstance`` and checkpoints work.
    ``row_weight`` and ``normalizer`` are arguments of the call.
    """

    __prepare_scriptable__ = refuse_script

    @public_init
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
        shard: VocabShard | None = None,
        impl: str = "auto",
    ) -> None:
        _require_options(self, size_average, ignore_index, reduce, reduction)
        _require_class_weight(self, weight)
        reduction = resolve_reduction(reduction, size_average, reduce)
        LossSpec(ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale)
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace = inplace
        self.shard = shard
        self.impl = impl

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
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
            row_weight=row_weight,
            normalizer=normalizer,
            inplace=self.inplace,
            shard=self.shard,
            impl=self.impl,
        )


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """A head and its loss: ``torch.nn.LinearCrossEntropyLoss`` of torch 2.13, computed by
    ``lossfuse.linear_cross_entropy``.

    The parameters are ``linear.weight`` of shape ``(num_classes * prod(out_features),
    in_features)`` and, with ``bias``, ``linear.bias``. Their names and initialization are torch's,
    so checkpoints are interchangeable. To tie the head to an embedding, assign
    ``loss.linear.weight``. ``row_weight`` and ``normalizer`` are arguments of the call.
    """

    __prepare_scriptable__ = refuse_script

    @public_init
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | None = None,
        lse_square_scale: float = 0.0,
        options: LinearOptions | None = None,
        impl: str = "auto",
    ) -> None:
        if isinstance(in_features, Tensor) or isinstance(num_classes, Tensor):
            raise TypeError(
                "LinearCrossEntropyLoss(in_features, num_classes, ...) makes a head and is then"
                " called with tensors: LinearCrossEntropyLoss(in_features, num_classes)(input,"
                " target); for a head of your own, call linear_cross_entropy"
            )
        reduction = resolve_reduction(reduction, None, None)
        LossSpec(
            -100 if ignore_index is None else ignore_index,
            label_smoothing,
            softcap,
            logit_scale,
            lse_square_scale,
        )
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} but there are {num_classes} classes;"
                f" expected ({num_classes},)"
            )
        super().__init__(weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.options = options
        self.impl = impl
        self.linear = torch.nn.Linear(
            in_features,
            math.prod(out_features, start=num_classes),
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        linear_weight, linear_bias = self.linear.weight, self.linear.bias
        if self.out_features:
            linear_weight = linear_weight.unflatten(0, (self.num_classes, *self.out_features))
            linear_bias = (
                None
                if linear_bias is None
                else linear_bias.unflatten(0, (self.num_classes, *self.out_features))
            )
        return functional.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            row_weight=row_weight,
            normalizer=normalizer,
            options=self.options,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features},"
            f" reduction={self.reduction!r}, options={self.options}"
        )


class LogSoftmax(torch.nn.LogSoftmax):
    """``torch.nn.LogSoftmax``, computed by ``lossfuse.log_softmax``."""

    __prepare_scriptable__ = refuse_script

    @public_init
    def __init__(self, dim: int | None = None, *, impl: str = "auto") -> None:
        _require_options(self, dim)
        super().__init__(dim)
        self.impl = impl

    def forward(self, input: Tensor) -> Tensor:
        return family.log_softmax(input, self.dim, _stacklevel=6, impl=self.impl)


class NLLLoss(torch.nn.NLLLoss):
    """``torch.nn.NLLLoss``, computed by ``lossfuse.nll_loss``.

    It is a subclass with the same ``state_dict``.
    """

    __prepare_scriptable__ = refuse_script

    @public_init
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        _require_options(self, size_average, ignore_index, reduce, reduction)
        _require_class_weight(self, weight)
        reduction = resolve_reduction(reduction, size_average, reduce)
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return family.nll_loss(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class BCELoss(torch.nn.BCELoss):
    """``torch.nn.BCELoss``, computed by ``lossfuse.binary_cross_entropy``.

    It is a subclass with the same ``state_dict``.
    """

    __prepare_scriptable__ = refuse_script

    @public_init
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        _require_options(self, size_average, reduce, reduction)
        super().__init__(weight, reduction=resolve_reduction(reduction, size_average, reduce))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return family.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """``torch.nn.BCEWithLogitsLoss``, computed by ``lossfuse.binary_cross_entropy_with_logits``.

    It is a subclass with the same ``state_dict``.
    """

    __prepare_scriptable__ = refuse_script

    @public_init
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        inplace: bool = False,
        impl: str = "auto",
    ) -> None:
        _require_options(self, size_average, reduce, reduction)
        super().__init__(
            weight,
            reduction=resolve_reduction(reduction, size_average, reduce),
            pos_weight=pos_weight,
        )
        self.ignore_index = ignore_index
        self.inplace = inplace
        self.impl = impl

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return family.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            inplace=self.inplace,
            impl=self.impl,
        )
