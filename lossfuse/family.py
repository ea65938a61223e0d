"""The losses around cross entropy: torch's names and order, then what torch does not have."""

import torch
from torch import Tensor

from . import reference, sigmoid_ops
from .consumed import Owner, may_consume
from .dispatch import forms_gradient_in_forward, makes_graph, pick, writes_in_place
from .sigmoid_inputs import flatten_labels
from .spec import resolve_reduction


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
    """Binary cross entropy of logits, each label a yes or no of its own; the labels that are 1 may be listed by their ids.

    Equal to::

        if target holds ids:                                     # (N, P) int64 for an input of (N, V)
            target = torch.zeros_like(input).scatter(1, ids, 1)  # without those that are ignore_index
        return F.binary_cross_entropy_with_logits(input.float(), target.float(), weight, reduction=reduction, pos_weight=pos_weight)

    Args:
        input: logits of any shape; float64, float32, bfloat16 or float16, any strides. Written to only if ``inplace``.
        target: the shape of ``input``, floating point, usually in ``[0, 1]``; may require grad. Or, for ``input`` of ``(N, V)``, the ids of
            the labels of each row that are 1: int64 ``(N, P)``, rows with fewer padded with ``ignore_index``, in any order, an id given
            twice counting once. P must not be V, as a tensor of zeros and ones with the wrong dtype would have that shape.
        weight: factor of each loss, broadcast to the shape of ``input``. If it requires grad, the reference computes the call.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        reduction: "none", "mean" over all elements of ``input``, or "sum"; for ids too, as for the tensor they stand for.
        pos_weight: factor of the target's part of each loss, broadcast to the shape of ``input``: ``(V)`` for one for each label.
        ignore_index: what rows of ids are padded with.
        inplace: consume the logits: their memory receives the gradient, in the forward for "mean" and "sum" but of float16, otherwise in
            the backward. The contract is that of ``cross_entropy``.
        impl: "triton" (CUDA, ROCm, XPU; the CPU in Triton's interpreter), "torch" (blocks of rows, any device), "reference" (eager),
            or "auto". A name is obeyed or raises.

    Returns:
        ``()``, or the shape of ``input`` for "none". float32, **also for bfloat16 and float16 input, where torch rounds the loss to the
        input's dtype**; float64 for float64 input alone.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; nothing is broadcast to but ``input``.
        IndexError: on the CPU, for an id outside ``[0, V)`` that is not ``ignore_index``. Elsewhere the loss and gradient of its row are
            NaN, nothing is read out of bounds and nothing synchronises; see ``debug_targets``.

    Autograd: gradients for ``input`` and a target of numbers, any number of times; the derivative of a gradient, forward mode,
    ``torch.func`` transforms and gradients for ``weight`` and ``pos_weight`` go through the eager reference and take its memory.

    Rounding: float32 from load to store (float64 for float64). For targets of 0 and 1 neither loss nor gradient is a difference, so both
    keep their digits however sure the model is: the loss of a logit of -20 against 0 is 2.06e-9, where torch's is 0. An infinite logit
    has torch's loss, inf or NaN, and torch's gradient.

    Memory: one tensor like ``input`` for the gradient unless ``inplace``, and for "none" the losses; never a tensor of zeros and ones. On
    the CPU "mean" and "sum" form the gradient in the forward, but for float16. Triton reads and writes the logits once for that, where it
    is in place. Other than two-dimensional layouts without a single stride, and weights broadcast across them, are copied once.
    """
    reduction = resolve_reduction(reduction, size_average, reduce)
    rows = flatten_labels(input, target, weight, pos_weight, ignore_index)
    backend = pick(impl, rows)
    wanted = inplace and torch.is_grad_enabled() and input.requires_grad
    consume = wanted and writes_in_place(backend) and may_consume(input, rows)
    owner = Owner(input, rows) if consume else None
    operands = (rows.logits, rows.target, rows.class_weight, rows.pos_weight)
    count = input.numel() if reduction == "mean" else 1
    if forms_gradient_in_forward(backend, rows, reduction, None, consume) and count:
        total: Tensor = sigmoid_ops.ReducedLoss.apply(*operands, count, ignore_index, backend, owner)
        return total
    elementwise = reduction == "none"
    if backend == "reference":
        sigmoid_ops.require_ids(rows.target, rows.logits, ignore_index)
        loss = reference.sigmoid_loss(*operands, ignore_index)
    elif makes_graph(rows):
        loss = sigmoid_ops.Loss.apply(*operands, elementwise, ignore_index, backend, owner)
    else:
        loss = sigmoid_ops.sigmoid_loss(*operands, elementwise, ignore_index, backend)
    if elementwise:
        return loss.reshape(input.shape)
    return loss.sum() / input.numel() if reduction == "mean" else loss.sum()
