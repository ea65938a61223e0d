"""The losses around cross entropy: torch's names and order, then what torch does not have."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from . import reference
from .call.dispatch import (
    forms_gradient_in_forward,
    makes_graph,
    pick,
    pick_or_torch,
    writes_in_place,
)
from .call.reduction import denominator, reduce_rows
from .call.synonyms import hints_at_names
from .inputs import LOGIT_DTYPES, flatten, require_tensor
from .label_inputs import check_broadcast, check_labels, flatten_labels, same_elements
from .ops import labels
from .ops import log_softmax as log_softmax_ops
from .ops.inplace import Owner, may_consume
from .spec import loss_spec, require_bool, resolve_reduction
from .targets import require_ids_in_range, values_are_readable


@hints_at_names
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Binary cross entropy of logits, each label a yes or no of its own; the labels that are 1 may
    be listed by their ids.

    Equal to::

        if target holds ids:                                     # (N, P) int64 for an input of (N, V)
            target = torch.zeros_like(input).scatter(1, ids, 1)  # without those that are ignore_index
        return F.binary_cross_entropy_with_logits(input.float(), target.float(), weight, reduction=reduction, pos_weight=pos_weight)

    Args:
        input: logits of any shape; float64, float32, bfloat16 or float16, any strides. Written to
            only if ``inplace``.
        target: the shape of ``input``, floating point, usually in ``[0, 1]``; may require grad. Or,
            for ``input`` of ``(N, V)``, the ids of the labels of each row that are 1: int64 ``(N,
            P)``, rows with fewer padded with ``ignore_index``, in any order, an id given twice
            counting once. P must not be V, as a tensor of zeros and ones with the wrong dtype would
            have that shape.
        weight: factor of each loss, broadcast to the shape of ``input``. If it requires grad, the
            reference computes the call.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        reduction: "none", "mean" over all elements of ``input``, or "sum"; for ids too, as for the
            tensor they stand for.
        pos_weight: factor of the target's part of each loss, broadcast to the shape of ``input``:
            ``(V)`` for one for each label.
        ignore_index: what rows of ids are padded with.
        inplace: consume the logits: their memory receives the gradient, in the forward for "mean"
            and "sum" but of float16, otherwise in the backward. The contract is that of
            ``cross_entropy``.
        impl: "triton" (CUDA, ROCm, XPU; the CPU in Triton's interpreter), "torch" (blocks of rows,
            any device), "reference" (eager), or "auto". A name is obeyed or raises.

    Returns:
        ``()``, or the shape of ``input`` for "none". float32, **also for bfloat16 and float16
        input, where torch rounds the loss to the input's dtype**; float64 for float64 input alone.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; nothing is
            broadcast to but ``input``.
        IndexError: on the CPU, for an id outside ``[0, V)`` that is not ``ignore_index``. Elsewhere
            the loss and gradient of its row are NaN, nothing is read out of bounds and nothing
            synchronises; see ``debug_targets``.

    Autograd: gradients for ``input`` and a target of numbers, any number of times; the derivative
    of a gradient, forward mode, ``torch.func`` transforms and gradients for ``weight`` and
    ``pos_weight`` go through the eager reference and take its memory.

    Rounding: float32 from load to store (float64 for float64). For targets of 0 and 1 neither loss
        nor gradient is a difference, so both
    keep their digits however sure the model is: the loss of a logit of -20 against 0 is 2.06e-9,
    where torch's is 0. An infinite logit has torch's loss, inf or NaN, and torch's gradient.

    Memory: one tensor like ``input`` for the gradient unless ``inplace``, and for "none" the
    losses; never a tensor of zeros and ones. On the CPU "mean" and "sum" form the gradient in the
    forward, but for float16. Triton reads and writes the logits once for that, where it is in
    place. Other than two-dimensional layouts without a single stride, and weights broadcast across
    them, are copied once."""
    if has_torch_function_variadic(input, target, weight, pos_weight):
        made: Tensor = handle_torch_function(
            binary_cross_entropy_with_logits,
            (input, target, weight, pos_weight),
            input,
            target,
            weight,
            size_average,
            reduce,
            reduction,
            pos_weight,
            ignore_index=ignore_index,
            inplace=inplace,
            impl=impl,
        )
        return made
    reduction = resolve_reduction(reduction, size_average, reduce)
    rows = flatten_labels(input, target, weight, pos_weight, ignore_index)
    require_bool("inplace", inplace)
    backend = pick(impl, rows)
    wanted = inplace and torch.is_grad_enabled() and input.requires_grad
    consume = wanted and writes_in_place(backend) and may_consume(input, rows)
    owner = Owner(input, rows) if consume else None
    operands = (rows.logits, rows.target, rows.class_weight, rows.pos_weight)
    count = input.numel() if reduction == "mean" else 1
    if forms_gradient_in_forward(backend, rows, reduction, None, consume) and count:
        total: Tensor = labels.ReducedLoss.apply(*operands, count, ignore_index, backend, owner)
        return total
    elementwise = reduction == "none"
    if backend == "reference":
        labels.require_ids(rows.target, rows.logits, ignore_index)
        loss = reference.sigmoid_loss(*operands, ignore_index)
    elif makes_graph(rows):
        loss = labels.Loss.apply(*operands, elementwise, ignore_index, backend, owner)
    else:
        loss = labels.sigmoid_loss(*operands, elementwise, ignore_index, backend)
    if elementwise:
        return loss.reshape(input.shape)
    return loss.sum() / input.numel() if reduction == "mean" else loss.sum()


@hints_at_names
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    impl: str = "auto",
) -> Tensor:
    """Binary cross entropy of probabilities. Of logits, ``binary_cross_entropy_with_logits`` is
    faster and keeps digits this one has lost.

    Equal to ``F.binary_cross_entropy(input.float(), target.float(), weight, reduction=reduction)``,
    with torch's clamps: logarithms are not below -100, and the gradient is ``(input - target) /
    max(input * (1 - input), 1e-12)``.

    Args:
        input: probabilities of any shape; float64, float32, bfloat16 or float16, any strides.
        target: the shape of ``input``, floating point; may require grad.
        weight: factor of each loss, broadcast to the shape of ``input``.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        reduction: "none", "mean" or "sum".
        impl: "torch" is torch's own operator, in float32 for half precision; "triton" a kernel,
            where ``binary_cross_entropy_with_logits`` has one; "reference" is eager; "auto" is
            "torch", or "reference" where ``weight`` requires grad.

    Returns:
        ``()``, or the shape of ``input`` for "none". float32, also for half precision, where torch
        rounds; float64 for float64 input.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; on the CPU, and
            within ``debug_targets`` elsewhere, for an input outside ``[0, 1]`` too. On CUDA,
            torch's operator asserts that on the device; with "triton" loss and gradient of that
            element are NaN.

    Autograd: the gradient of a target is bounded like the loss, ``clamp(log(1 - input)) -
    clamp(log(input))`` by "triton" and "reference"; torch's is infinite at 0 and 1. The derivative
    of a gradient, forward mode and ``torch.func`` are torch's, or with "triton" the reference's,
    and an error for the last two.

    Memory: that of torch's operator, and a copy in float32 of half-precision input; with "triton"
    the gradients alone, and for "none" the losses."""
    if has_torch_function_variadic(input, target, weight):
        made: Tensor = handle_torch_function(
            binary_cross_entropy,
            (input, target, weight),
            input,
            target,
            weight,
            size_average,
            reduce,
            reduction,
            impl=impl,
        )
        return made
    reduction = resolve_reduction(reduction, size_average, reduce)
    check_labels(input, target, "probabilities")
    if not target.is_floating_point():
        raise TypeError(
            f"target has dtype {target.dtype} but must be floating point, of the shape of input; pass target.float()"
        )
    if target.shape != input.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)} but input has shape {tuple(input.shape)}; expected the same"
            + same_elements(target, input)
        )
    weight = check_broadcast("weight", weight, input)
    backend = pick_or_torch(impl, input, target, weight)
    if values_are_readable(input):
        outside = ~((input >= 0) & (input <= 1))
        if bool(outside.any()):
            at = tuple(int(i) for i in outside.nonzero()[0])
            raise ValueError(
                f"input at {at} is {float(input[at])} but probabilities must lie in [0, 1]; logits go to another function"
            )
    weight_wants = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    if weight_wants and impl == "torch":
        raise ValueError(
            "impl='torch' cannot run here: weight requires grad, and its gradient is only in the reference"
        )
    if backend == "reference" or weight_wants:
        loss = reference.probability_loss(input, target, weight)
    elif backend == "triton":
        rows = flatten_labels(input, target, weight, None, -100)
        loss = log_softmax_ops.probability_loss(
            rows.input, rows.target, rows.class_weight, reduction == "none"
        )
        if reduction != "none":
            return loss.sum() if reduction == "sum" else loss.sum() / input.numel()
        return loss.reshape(input.shape)
    else:
        x = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
        loss = F.binary_cross_entropy(
            x, target.to(x.dtype), None if weight is None else weight.to(x.dtype), reduction="none"
        )
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


@hints_at_names
def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Logarithm of the softmax along a dimension, a tensor of the shape of ``input``. A loss does
    without it: see ``cross_entropy``.

    Equal to ``F.log_softmax(input, dim, dtype=dtype)``.

    Args:
        input: logits of any shape and strides; float64, float32, bfloat16 or float16.
        dim: the dimension of the classes. None is torch's old guess, with a warning.
        _stacklevel: as in torch, for that warning.
        dtype: ``input`` is cast to it first.
        impl: "torch" and "auto" are torch's own operator, on a CPU in float32 for half precision;
            "triton" a kernel (CUDA, ROCm, XPU; the CPU in Triton's interpreter); "reference" is
            eager.

    Returns:
        The shape of ``input``, in ``dtype`` or the dtype of ``input``; computed in float32 at least
        and rounded once.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; IndexError for
            a dimension that is not there.

    Autograd: "triton" keeps ``input`` and two numbers of a row for its backward, where torch keeps
    the result: gradients are those of the logarithms before they were rounded (so they are on a
    CPU), and with a sure model keep the digits of ``softmax - 1``. It may not change in place
    meanwhile. The derivative of the gradient goes through the reference; forward mode and
    ``torch.func`` are errors.

    Memory: the result, and the gradient; two copies in float32 for half precision on a CPU.
    "triton" reads a row once where it fits one program (``kernels/launch.py``), otherwise twice,
    and copies once what is not contiguous along ``dim``."""
    if has_torch_function_unary(input):
        made: Tensor = handle_torch_function(
            log_softmax, (input,), input, dim, _stacklevel, dtype, impl=impl
        )
        return made
    require_tensor("input", input)
    if dtype is not None:
        input = input.to(dtype)
    if input.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"input has dtype {input.dtype} but logits must be float64, float32, bfloat16 or float16"
        )
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"log_softmax without dim takes dim={dim}; pass it",
                UserWarning,
                stacklevel=_stacklevel,
            )
    backend = pick_or_torch(impl, input)
    if backend == "torch":
        # torch's on a CPU rounds the log-sum to the dtype too: entries near 0 are off by a third of
        # themselves in bfloat16
        narrow = input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16)
        return (
            torch.log_softmax(input.float(), dim).to(input.dtype)
            if narrow
            else torch.log_softmax(input, dim)
        )
    if backend == "reference":
        return reference.log_softmax(input, dim)
    moved = input.movedim(dim, -1)
    v = moved.shape[-1] if moved.dim() else 1
    logp, _ = log_softmax_ops.log_softmax(moved.reshape(moved.numel() // v if v else 0, v))
    return logp.reshape(moved.shape).movedim(-1, dim)


@hints_at_names
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    impl: str = "auto",
) -> Tensor:
    """Negative log-likelihood of class ids under log-probabilities: ``nll_loss(log_softmax(x, 1),
    y)`` is ``cross_entropy(x, y)``.

    Equal to ``F.nll_loss(input.float(), target, weight, ignore_index=ignore_index,
    reduction=reduction)``.

    Args:
        input: log-probabilities ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``; float64, float32,
            bfloat16 or float16, any strides.
        target: class ids, integers of the shape of ``input`` without C, each in ``[0, C)`` or
            ``ignore_index``.
        weight: ``(C)``: the weight of each class; may require grad.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        ignore_index: the id of positions that count for nothing.
        reduction: "none", "mean" (over the weights of the valid targets; NaN without any) or "sum".
        impl: "torch", "reference" and "auto" are one gather by torch's operators: one number a row
            is all there is to compute. Not torch's own ``nll_loss``, which asserts on the device
            for a bad id. "triton" is a kernel that picks the numbers, and one that writes their
            gradient in a single pass; it does not differentiate ``weight``.

    Returns:
        ``()``, or the shape of the ids for "none". float32, also for half precision, where torch
        rounds; float64 for float64 input.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        IndexError: on the CPU, for a target outside ``[0, C)``; elsewhere its row is NaN, see
            ``debug_targets``.

    Memory: O(N), and the gradient.
    """
    if has_torch_function_variadic(input, target, weight):
        made: Tensor = handle_torch_function(
            nll_loss,
            (input, target, weight),
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            impl=impl,
        )
        return made
    reduction = resolve_reduction(reduction, size_average, reduce)
    require_tensor("input", input)
    require_tensor("target", target)
    if target.is_floating_point() and input.is_floating_point():
        remedy = (
            "; of probabilities there is only cross_entropy"
            if target.shape == input.shape
            else "; pass target.long()"
        )
        raise TypeError(
            f"target has dtype {target.dtype} but class ids must be int64, int32, int16, int8 or uint8{remedy}"
        )
    rows = flatten(input, target, weight, ignore_index)
    if pick_or_torch(impl, rows.input, rows.target, rows.class_weight) == "triton":
        loss = log_softmax_ops.nll(rows.input, rows.target, rows.class_weight, ignore_index)
    else:
        require_ids_in_range(rows.target, rows.num_classes, ignore_index)
        loss = reference.nll_row_loss(rows.input, rows.target, rows.class_weight, ignore_index)
    return reduce_rows(
        loss, rows, reduction, denominator(rows, loss_spec(ignore_index), reduction, None)
    )
