"""Binary cross entropy, ``log_softmax`` and ``nll_loss``, with torch's arguments in its order."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .call.dispatch import (
    forms_gradient_in_forward,
    may_write_in_place,
    pick,
    pick_log_softmax,
)
from .call.implementations import differentiates
from .call.public import public
from .call.reduction import denominator, reduce_rows
from .inputs import LOGIT_DTYPES, flatten, require_tensor
from .label_inputs import check_broadcast, check_labels, flatten_labels, same_elements
from .ops import labels
from .ops import log_softmax as log_softmax_ops
from .ops.inplace import Owner, may_consume
from .spec import loss_spec, require_bool, resolve_reduction
from .targets import require_ids_in_range, values_are_readable


@public
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
    """Binary cross entropy of logits, each a label of its own. The labels that are 1 may be listed
    by their ids.

    Equal to::

        if target.dtype == torch.int64:  # ids (N, P) for an input of (N, V)
            # without the ids that are ignore_index
            target = torch.zeros_like(input).scatter(1, target, 1)
        return F.binary_cross_entropy_with_logits(
            input.float(), target.float(), weight, reduction=reduction, pos_weight=pos_weight
        )

    Args:
        input: logits of any shape; float64, float32, bfloat16 or float16, any strides. Written to
            only if ``inplace``.
        target: the shape of ``input``, floating point, usually in ``[0, 1]``; may require grad. Or,
            for ``input`` of ``(N, V)``, the ids of the labels of each row that are 1: int64
            ``(N, P)``, in any order. Shorter rows are padded with ``ignore_index``, and an id given
            twice counts once. P must not be V: zeros and ones of the wrong dtype have that shape.
        weight: factor of each loss, broadcast to the shape of ``input``. If it requires grad, the
            reference computes the call.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        reduction: "none", "mean" over all elements of ``input``, or "sum"; the same for ids.
        pos_weight: factor of the target's part of each loss, broadcast to the shape of ``input``:
            ``(V)`` for one factor per label.
        ignore_index: the padding of rows of ids.
        inplace: consume the logits: their memory receives the gradient. "mean" and "sum" write it
            in the forward, except for float16; "none" and float16 in the backward. The contract is
            that of ``cross_entropy``.
        impl: "triton" (CUDA, ROCm, XPU; the CPU in Triton's interpreter), "torch" (blocks of rows,
            any device), "reference" (eager), or "auto". A name is obeyed or raises.

    Returns:
        ``()``, or the shape of ``input`` for "none". float32, **also for bfloat16 and float16
        input, where torch rounds the loss to the input's dtype**; float64 for float64 input alone.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. Only the
            weights are broadcast.
        IndexError: on the CPU, for an id outside ``[0, V)`` that is not ``ignore_index``. On other
            devices the loss and gradient of its row are NaN, nothing is read out of bounds and
            nothing synchronises; see ``debug_targets``.

    Autograd: gradients of ``input`` and of a floating-point ``target``, any number of times. Double
    backward, forward mode, ``torch.func`` transforms and gradients of ``weight`` and ``pos_weight``
    run in the eager reference and take its memory.

    Rounding: float32 from load to store (float64 for float64). For targets of 0 and 1 neither loss
    nor gradient is a difference, so both stay accurate for confident predictions: the loss of a
    logit of -20 against 0 is 2.06e-9, where torch's is 0. An infinite logit has torch's loss, inf
    or NaN, and torch's gradient.

    Memory: one tensor like ``input`` for the gradient unless ``inplace``, and for "none" the
    losses; never a tensor of zeros and ones. On the CPU "mean" and "sum" form the gradient in the
    forward, except for float16. In place, Triton reads and writes the logits once for that.
    Layouts of other than two dimensions without a common stride, and weights broadcast across them,
    are copied once."""
    reduction = resolve_reduction(reduction, size_average, reduce)
    rows = flatten_labels(input, target, weight, pos_weight, ignore_index)
    require_bool("inplace", inplace)
    implementation = pick(impl, rows)
    owner = None
    if inplace and may_write_in_place(implementation, input) and may_consume(input, rows):
        owner = Owner(input, rows)
    operands = (rows.logits, rows.target, rows.class_weight, rows.pos_weight, ignore_index)
    count = input.numel() if reduction == "mean" else 1
    backend, consume = implementation.name, owner is not None
    if forms_gradient_in_forward(implementation, rows, reduction, None, consume) and count:
        total: Tensor = labels.ReducedLoss.apply(*operands, backend, count, owner)
        return total
    elementwise = reduction == "none"
    if backend == "reference":
        labels.require_ids(rows.target, rows.logits, ignore_index)
        loss = reference.label_loss(*operands)
    elif differentiates(rows):
        loss = labels.Loss.apply(*operands, backend, elementwise, owner)
    else:
        loss = labels.label_loss(elementwise, *operands, backend)
    if elementwise:
        return loss.reshape(input.shape)
    return loss.sum() / input.numel() if reduction == "mean" else loss.sum()


@public
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross entropy of probabilities, by torch's own operator. For logits,
    ``binary_cross_entropy_with_logits`` is faster and more accurate.

    Equal to ``F.binary_cross_entropy(input.float(), target.float(), weight, reduction=reduction)``,
    with torch's clamps: logarithms are at least -100, and the gradient is
    ``(input - target) / max(input * (1 - input), 1e-12)``.

    Args:
        input: probabilities of any shape; float64, float32, bfloat16 or float16, any strides.
        target: the shape of ``input``, floating point; may require grad.
        weight: factor of each loss, broadcast to the shape of ``input``; may require grad.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        reduction: "none", "mean" or "sum".

    Returns:
        ``()``, or the shape of ``input`` for "none". float32, also for half precision, where torch
        rounds; float64 for float64 input.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. An input
            outside ``[0, 1]`` raises on the CPU, and on other devices within ``debug_targets``;
            without it, torch's operator asserts on the device on CUDA.

    Autograd: torch's; the gradient of a target is infinite where the input is 0 or 1.

    Memory: that of torch's operator, and a float32 copy of half-precision input."""
    reduction = resolve_reduction(reduction, size_average, reduce)
    check_labels(input, target, "probabilities")
    if not target.is_floating_point():
        raise TypeError(
            f"target has dtype {target.dtype} but must be floating point, of the shape of input;"
            " pass target.float()"
        )
    if target.shape != input.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)} but input has shape {tuple(input.shape)};"
            f" expected the same{same_elements(target, input)}"
        )
    weight = check_broadcast("weight", weight, input)
    if values_are_readable(input):
        outside = ~((input >= 0) & (input <= 1))
        if bool(outside.any()):
            at = tuple(int(i) for i in outside.nonzero()[0])
            raise ValueError(
                f"input at {at} is {float(input[at])} but probabilities must lie in [0, 1];"
                " for logits, call binary_cross_entropy_with_logits"
            )
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    weight = None if weight is None else weight.to(dtype)
    # torch's operator has no gradient of its weight
    factor = weight if weight is not None and weight.requires_grad else None
    loss = F.binary_cross_entropy(
        input.to(dtype),
        target.to(dtype),
        weight if factor is None else None,
        reduction="none",
    )
    if factor is not None:
        loss = loss * factor
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


@public
def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Logarithm of the softmax along a dimension, a tensor of the shape of ``input``. A loss does
    not need it: see ``cross_entropy``.

    Equal to ``F.log_softmax(input, dim, dtype=dtype)``.

    Args:
        input: logits of any shape and strides; float64, float32, bfloat16 or float16.
        dim: the dimension of the classes. None is torch's old guess, with a warning.
        _stacklevel: as in torch, for that warning.
        dtype: ``input`` is cast to it first.
        impl: "torch" (torch's operator; on a CPU in float32 for half precision), "triton" (a
            kernel: CUDA, ROCm, XPU; the CPU in Triton's interpreter), "reference" (eager), or
            "auto". "auto" is "triton" on a GPU for bfloat16 or float16 input that requires grad,
            and "torch" for everything else: float32, float64 and calls without a gradient, under
            autocast, ``torch.func``, forward mode and export, and for tensor subclasses.

    Returns:
        The shape of ``input``, in ``dtype`` or the dtype of ``input``; computed in float32 at least
        and rounded once.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; IndexError for
            a dimension out of range.

    Rounding of the gradient: torch saves the rounded result and computes the probabilities from it.
    A bfloat16 log-probability near -12 is a multiple of 1/16, so its probability, and with it its
    entry of the gradient, is up to 3.2 % off (0.4 % in float16). "triton" computes them from the
    logits, and "torch" on a CPU from float32 log-probabilities: the entry is off by its own
    rounding, at most 0.4 % in bfloat16. "triton" also computes ``softmax - 1`` without cancellation
    for confident predictions.

    Autograd: "triton" saves ``input`` and two numbers per row, where torch saves the result:
    ``input`` must not be changed in place before the backward. Double backward runs in the
    reference. Forward mode and ``torch.func`` raise with ``impl="triton"``.

    Memory: the result, and the gradient; two float32 copies for half precision on a CPU. "triton"
    reads a row once where it fits one program (``kernels/launch.py``), otherwise twice, and copies
    an input that is not contiguous along ``dim`` once."""
    require_tensor("input", input)
    if dtype is not None:
        input = input.to(dtype)
    if input.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"input has dtype {input.dtype} but logits must be float64, float32, bfloat16 or"
            " float16"
        )
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"log_softmax without dim takes dim={dim}; pass it",
                UserWarning,
                stacklevel=_stacklevel,
            )
    backend = pick_log_softmax(impl, input)
    if backend == "torch":
        # on a CPU torch's operator rounds the log-sum to the dtype: a bfloat16 entry of -0.08 is
        # off by 28 %
        if input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16):
            return torch.log_softmax(input.float(), dim).to(input.dtype)
        return torch.log_softmax(input, dim)
    if backend == "reference":
        return reference.log_softmax(input, dim)
    classes_last = input.movedim(dim, -1)
    v = classes_last.shape[-1] if classes_last.dim() else 1
    rows = classes_last.reshape(classes_last.numel() // v if v else 0, v)
    logp, _ = log_softmax_ops.log_softmax(rows)
    return logp.reshape(classes_last.shape).movedim(-1, dim)


@public
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of class ids under log-probabilities, by torch's ``gather``.
    ``nll_loss(log_softmax(x, 1), y)`` is ``cross_entropy(x, y)``.

    Equal to ``F.nll_loss(input.float(), target, weight, ignore_index=ignore_index,
    reduction=reduction)``, which asserts on the device for an id out of range.

    Args:
        input: log-probabilities ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``; float64, float32,
            bfloat16 or float16, any strides.
        target: class ids, integers of the shape of ``input`` without C, each in ``[0, C)`` or
            ``ignore_index``.
        weight: ``(C)``: the weight of each class; may require grad.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        ignore_index: the id of positions without a loss.
        reduction: "none", "mean" (over the weights of the valid targets; NaN without any) or "sum".

    Returns:
        ``()``, or the shape of the ids for "none". float32, also for half precision, where torch
        rounds; float64 for float64 input.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        IndexError: on the CPU, for a target outside ``[0, C)``. On other devices its row is NaN;
            see ``debug_targets``.

    Memory: O(N), and the gradient.
    """
    reduction = resolve_reduction(reduction, size_average, reduce)
    require_tensor("input", input)
    require_tensor("target", target)
    if target.is_floating_point() and input.is_floating_point():
        remedy = (
            "; for probabilities, call cross_entropy"
            if target.shape == input.shape
            else "; pass target.long()"
        )
        raise TypeError(
            f"target has dtype {target.dtype} but class ids must be int64, int32, int16, int8 or"
            f" uint8{remedy}"
        )
    rows = flatten(input, target, weight, ignore_index)
    require_ids_in_range(rows.target, rows.num_classes, ignore_index)
    loss = reference.nll_row_loss(rows.input, rows.target, rows.class_weight, ignore_index)
    divisor = denominator(rows, loss_spec(ignore_index), reduction, None)
    return reduce_rows(loss, rows, reduction, divisor)
