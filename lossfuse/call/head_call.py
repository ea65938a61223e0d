"""A call of a head: its arguments checked, and how it is computed."""

from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..inputs import (
    EXCHANGED,
    autocast_operands,
    check_head,
    check_normalizer,
    flatten_head,
    main_grad_of,
    require_tensor,
)
from ..ops.head import HeadOperands, Reduction
from ..spec import LinearOptions, LossSpec, VocabShard
from .dispatch import head_needs, pick, scale_is_known
from .dtensor import shared
from .implementations import REFERENCE, HeadCall, Operators
from .reduction import denominator, ignore_rows_of_weight_0


def head_call(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    spec: LossSpec,
    reduction: str,
    normalizer: float | Tensor | None,
    shard: VocabShard | None,
    options: LinearOptions | None,
    impl: str,
    *,
    statistics: bool = False,
) -> tuple[Operators, HeadCall]:
    """Check the arguments of a head (C, D) and decide how the call is computed."""
    options = _checked_options(options)
    parameter = linear_weight
    input, linear_weight, linear_bias = autocast_operands(input, linear_weight, linear_bias)
    rows = flatten_head(
        input, linear_weight, linear_bias, target, weight, spec.ignore_index, shard, row_weight
    )
    check_normalizer(normalizer, reduction, input)
    for name in ("logits_dtype", "acc_dtype"):
        options.dtype(name, input.dtype)
    implementation = pick(impl, rows)
    main_grad, options = _main_grad(parameter, options, implementation, input.dtype)
    divisor = denominator(rows, spec, reduction, normalizer)
    if not statistics:
        rows = ignore_rows_of_weight_0(rows, spec.ignore_index)
    needs = head_needs(rows)
    hidden = rows.input if shard is None else shared(rows.input, shard)
    call = HeadCall(
        rows=rows,
        operands=HeadOperands(
            hidden, rows.linear_weight, rows.linear_bias, rows.target, rows.local_weight
        ),
        reduction=Reduction(divisor, rows.row_weight, main_grad),
        needs=needs,
        forms_gradients=implementation is not REFERENCE
        and reduction != "none"
        and any(needs)
        and scale_is_known(rows, divisor),
        spec=spec,
        options=options,
    )
    return implementation, call


def _main_grad(
    linear_weight: Tensor,
    options: LinearOptions,
    implementation: Operators,
    dtype: torch.dtype,
) -> tuple[Tensor | None, LinearOptions]:
    """Return ``linear_weight.main_grad`` if the options ask for it, and the options with which the
    gradient of the weight is accumulated."""
    if not options.main_grad:
        return None, options
    main_grad = main_grad_of(linear_weight)
    if implementation is REFERENCE:
        raise ValueError(
            "options.main_grad needs another implementation than the reference, which this call"
            " must take"
        )
    if options.acc_dtype is None and dtype == torch.bfloat16:
        # what is added to main_grad is not rounded before
        options = replace(options, acc_dtype=torch.float32)
    return main_grad, options


def is_k_dimensional(linear_weight: object) -> bool:
    """Return True for a weight (C, d1, ..., dK, D), whose logits are materialized."""
    return isinstance(linear_weight, Tensor) and linear_weight.dim() > 2


def k_dimensional_logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    shard: VocabShard | None,
    options: LinearOptions | None,
    impl: str,
) -> Tensor:
    """(N, D) and (C, d1, ..., dK, D) -> logits (N, C, d1, ..., dK)."""
    options = _checked_options(options)
    input, linear_weight, linear_bias = autocast_operands(input, linear_weight, linear_bias)
    check_head(input, linear_weight, linear_bias)
    require_tensor("target", target)
    shape = tuple(linear_weight.shape)
    if shard is not None:
        raise ValueError(f"linear_weight has shape {shape} but with shard it must be (C, D)")
    rows = linear_weight.shape[:-1]
    if (
        input.dim() == 2
        and rows[0] != input.shape[0]
        and target.shape in (rows, (*rows, input.shape[0]))
    ):
        raise ValueError(
            f"target has shape {tuple(target.shape)} but linear_weight has shape {shape} and input"
            f" {tuple(input.shape)}{EXCHANGED}"
        )
    if input.dim() != 2:
        raise ValueError(
            f"linear_weight has shape {shape}, so input must be (N, D), but input has shape"
            f" {tuple(input.shape)}"
        )
    if impl not in ("auto", "reference"):
        raise ValueError(
            f"impl={impl!r} cannot run here: linear_weight has {linear_weight.dim()} dimensions;"
            " impl='auto' materializes the logits"
        )
    if options.main_grad:
        raise ValueError(
            "options.main_grad needs a linear_weight (C, D), but linear_weight has"
            f" {linear_weight.dim()} dimensions"
        )
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = reference.linear(input, linear_weight.flatten(0, -2), bias)
    return logits.unflatten(1, rows)


def _checked_options(options: LinearOptions | None) -> LinearOptions:
    options = LinearOptions() if options is None else options
    if not isinstance(options, LinearOptions):
        raise TypeError(
            f"options is a {type(options).__name__} but must be a lossfuse.LinearOptions"
        )
    return options
