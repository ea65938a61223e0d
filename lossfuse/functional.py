"""Cross entropy of logits and of a linear head. Arguments have torch's names and order, then come
those torch does not have."""

from torch import Tensor

from .call.dispatch import forms_gradient_in_forward, may_write_in_place, pick
from .call.dtensor import local_head, local_logits, local_row_weight, shard_options
from .call.head_call import head_call, is_k_dimensional, k_dimensional_logits
from .call.implementations import Operators
from .call.public import public
from .call.reduction import (
    denominator,
    divides_by_valid_rows,
    ignore_rows_of_weight_0,
    reduce_rows,
)
from .call.small_calls import is_plain, small_loss
from .inputs import Rows, check_normalizer, flatten
from .ops.inplace import Owner, may_consume
from .spec import LinearOptions, LossSpec, VocabShard, loss_spec, require_bool, resolve_reduction


@public
def cross_entropy(
    input: Tensor,
    target: Tensor,
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
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross entropy of logits against class ids or class probabilities, without a tensor of
    probabilities.

    Equal to::

        x = input.float()                          # float64 stays float64
        x = x * logit_scale                        # if logit_scale is given
        x = softcap * torch.tanh(x / softcap)      # if softcap is given
        loss = F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction="none",
                               label_smoothing=label_smoothing)
        z_loss = lse_square_scale * x.logsumexp(dim=1) ** 2
        loss = loss + z_loss.where(target != ignore_index, 0)
        loss = loss * row_weight                   # if row_weight is given
        return loss, loss.sum() or loss.sum() / n  # for "none", "sum", "mean"

    where ``n`` is torch's: the sum of the class weights of the valid targets, their number without
    ``weight``, or the number of rows for probabilities. ``normalizer`` replaces it.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``; float64, float32, bfloat16 or
            float16, any strides. Not modified unless ``inplace`` is True.
        target: class ids, integers of the shape of ``input`` without C, each in ``[0, C)`` or
            ``ignore_index``; or class probabilities, floating point of the shape of ``input``.
            Probabilities may require grad.
        weight: ``(C)``, floating point: the weight of each class. If it requires grad, the
            reference computes the call.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        ignore_index: rows with this id have loss 0 and gradient 0, even if their logits are NaN.
        reduction: "none", "mean" or "sum".
        label_smoothing: in ``[0, 1]``, the share of the target that is spread evenly over all
            classes.
        softcap: positive, in units of a logit.
        logit_scale: factor of the logits (the inverse of a temperature), applied before the cap.
        lse_square_scale: factor of the squared log-sum-exp of a row ("z-loss"); not multiplied by
            ``weight``.
        row_weight: the weight of each row's loss, of the shape of the ids: a mask, advantages, the
            weights of sequences. Any sign; None is 1. The divisor of "mean" does not depend on it.
            Against ids, loss and gradient of a row of weight 0 are those of an ignored row. If it
            requires grad it gets one, and the backward forms that of ``input``.
        normalizer: divisor of "mean", such as the number of tokens of the global batch: a positive
            number, or a 0-d tensor on the CPU or on the device of ``input``. Does not synchronize.
            Cheaper than a division of the loss, whose gradient is then multiplied once more.
        inplace: overwrite the logits with their gradient, in the forward for "mean" and "sum"; in
            the backward for "none", for float16, and if the upstream gradient is not one number.
            See below.
        shard: the classes of this rank, if the logits are sharded over the vocabulary; see
            ``VocabShard``. Not needed for a DTensor placed ``Shard`` on its class dimension.
            ``weight`` is that of the local classes or of all ``num_classes``.
        impl: "triton" (CUDA, ROCm, XPU; on a CPU in Triton's interpreter), "torch" (blocks of rows,
            any device), "reference" (eager), or "auto". An implementation asked for by name runs or
            raises.

    Returns:
        ``()`` for "mean" and "sum", the shape of the ids for "none". float32, **also for bfloat16
        and float16 input, where torch rounds the loss to the dtype of the input**; float64 for
        float64 input. "mean" over no valid target is NaN with zero gradient, as in torch; with
        ``normalizer`` it is 0.

    Raises:
        TypeError, ValueError: with the name of the argument, what was passed and what was expected.
        IndexError: on the CPU, for a target outside ``[0, C)``. On other devices, and for tensors
            without values (under a compiler or ``torch.func``), loss and gradient of that row are
            NaN; nothing is read out of bounds and nothing synchronizes. See ``debug_targets``. With
            ``shard``, all ranks raise what one of them finds.

    Autograd: gradients for ``input`` and probabilities, any number of times. The derivative of a
    gradient, forward mode, ``torch.func`` transforms and a gradient for ``weight`` run the eager
    reference, with its memory.

    In place: ``inplace=True`` allocates no gradient. Afterwards, any use of the values of ``input``
    (or of the tensor it is a view of) raises. A graph that saved the logits raises in its backward,
    as does a second backward of this loss or one with ``create_graph``. The logits are not
    overwritten, and the result is the same, if no gradient is required, a compiler traces the call,
    ``saved_tensors_hooks`` are active (checkpointing) or the reference computes; nor, with a
    warning, if another tensor shares the memory of ``input``. Layouts that have to be copied keep
    their values; the copy is overwritten. Raises ValueError for a leaf that requires grad, a view
    of one, and logits whose elements share memory. Code that bypasses ``__torch_function__``, such
    as TorchScript, can still read the overwritten values.

    Shards: the forward gathers 3 to 5 numbers per row from every rank in one collective, and one
    more for "mean" with ``weight``. The backward communicates only when it is called a second time
    after a forward that formed the gradient. The loss has the same bits on every rank. A second
    derivative, a gradient for ``weight`` and ``impl="reference"`` raise.

    Tracers: with ``impl="auto"``, ``torch.jit.trace``, ``torch.export`` and ``torch.onnx.export``
    record the reference, which consists of operators of torch, so that the result loads where this
    package is not installed. With another ``impl``, and under ``torch.compile``, the operators of
    this package are recorded. ``torch.jit.script`` raises RuntimeError.

    Rounding: float32 from load to store (float64 for float64). The row maximum and the logarithm of
    the sum are stored apart, so that an offset common to a row cancels exactly. The gradient
    ``p - 1`` at the target is computed before rounding and stays accurate for confident
    predictions. With ``impl="auto"``, a plain call of at most 65536 logits on a CPU is computed by
    operators of torch if no prediction is so confident that they lose precision.

    Memory: O(N), and one tensor like ``input`` for the gradient unless ``inplace``. For "mean" and
    "sum" the forward forms the gradient, from the same read of the logits (on a GPU against class
    ids), except for float16, whose gradient must be multiplied by the loss scale before it is
    rounded. The backward then returns it; an upstream gradient other than 1, such as that of a loss
    that is divided afterwards, costs one more pass over it, which ``normalizer`` avoids. On a CPU
    temporaries take at most 3 MiB or 4 % of the logits, whichever is more, if a row is below
    512 KiB. Layouts whose rows have no single stride, such as ``(N, C, d)``, are copied once.

    Source: the running log-sum-exp is Milakov and Gimelshein, "Online normalizer calculation for
    softmax", arXiv:1805.02867; z-loss is de Brebisson and Vincent, arXiv:1604.08859.
    """
    options = (weight, size_average, reduce, softcap, logit_scale, row_weight, normalizer, shard)
    numbers = (label_smoothing, lse_square_scale)
    if impl == "auto" and inplace is False and is_plain(options, numbers):
        loss = small_loss(input, target, ignore_index, reduction)
        if loss is not None:
            return loss
    if row_weight is not None:
        row_weight = local_row_weight(row_weight, input)
    input, target, weight, shard = local_logits(input, target, weight, shard)
    reduction = resolve_reduction(reduction, size_average, reduce)
    spec = loss_spec(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, *shard_options(shard)
    )
    rows = flatten(input, target, weight, ignore_index, shard, row_weight)
    check_normalizer(normalizer, reduction, input)
    require_bool("inplace", inplace)
    implementation = pick(impl, rows)
    owner = None
    if inplace and may_write_in_place(implementation, input) and may_consume(input, rows):
        owner = Owner(input, rows)
    return _loss(implementation, rows, spec, reduction, normalizer, owner)


def _loss(
    implementation: Operators,
    rows: Rows,
    spec: LossSpec,
    reduction: str,
    normalizer: float | Tensor | None,
    owner: Owner | None,
) -> Tensor:
    mean = reduction == "mean"
    # counted with the losses, in a launch less
    counted = mean and divides_by_valid_rows(rows, normalizer)
    divisor = None if counted else denominator(rows, spec, reduction, normalizer)
    if rows.row_weight is not None:
        rows = ignore_rows_of_weight_0(rows, spec.ignore_index)
    if forms_gradient_in_forward(implementation, rows, reduction, divisor, owner is not None):
        return implementation.total(rows, spec, divisor, mean, owner)
    loss = implementation.row_loss(rows, spec, owner)
    if counted:
        return implementation.mean_over_valid(loss, rows, spec)
    return reduce_rows(loss, rows, reduction, divisor)


@public
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    lse_square_scale: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shard: VocabShard | None = None,
    options: LinearOptions | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross entropy of the logits of a linear head, which are computed and freed a chunk of rows at
    a time: the N x C logits are never materialized.

    Equal to::

        logits = F.linear(input.float(), linear_weight.float(), linear_bias)
        return lossfuse.cross_entropy(logits, target, weight, ...)

    with the other arguments passed on (float64 stays float64), and, for the arguments it has, to
    ``torch.nn.functional.linear_cross_entropy`` (torch 2.13).

    Args:
        input: hidden states ``(D)``, ``(N, D)`` or ``(..., D)``; float64, float32, bfloat16 or
            float16, any strides.
        linear_weight: ``(C, D)``, in the dtype of ``input`` unless autocast is on. Also ``(C, d1,
            ..., dK, D)``, for ``input`` of ``(N, D)`` and logits ``(N, C, d1, ..., dK)``, which are
            then materialized.
        target: class ids of the shape of ``input`` without D, or probabilities with C in place of
            D; with a K-dimensional weight ``(N, d1, ..., dK)`` or ``(N, C, d1, ..., dK)``. As in
            ``cross_entropy``.
        linear_bias: ``(C)``, or ``(C, d1, ..., dK)``, in the dtype of ``linear_weight``.
        weight: ``(C)``: the weight of each class.
        reduction, label_smoothing, softcap, logit_scale, lse_square_scale, row_weight, normalizer,
            impl: as in ``cross_entropy``.
        shard: the classes of ``linear_weight`` and ``linear_bias`` on this rank, if the head is
            sharded over the vocabulary and all ranks have the same ``input``; see ``VocabShard``.
            None for DTensors: a weight placed ``Shard(0)`` and an ``input`` placed ``Replicate``.
        ignore_index: rows with this id have loss 0 and gradient 0, even if their hidden states are
            NaN. None is -100, as in torch.
        options: size of a chunk, dtypes, accumulation; see ``LinearOptions``. The default size of a
            chunk follows from ``lossfuse.ops.chunk_plan.chunk_rows``.

    Returns:
        As ``cross_entropy``: float32 (float64 for float64), ``()`` or the shape of the ids.

    Raises:
        TypeError, ValueError: with the name of the argument, what was passed and what was expected.
        IndexError: on the CPU, for a target outside ``[0, C)``. On other devices loss and gradient
            of that row are NaN, and, through the product, the gradient of the weight; see
            ``debug_targets``.

    Autograd: gradients for ``input``, ``linear_weight``, ``linear_bias`` and probabilities; only
    the products of tensors that require grad run. For "mean" and "sum" the forward forms the
    gradients (6 N D C operations in all) and the backward returns them: a second backward raises
    unless ``options.allow_retain_graph`` is set. For "none" the backward computes the logits again
    (8 N D C). A second derivative raises. Forward mode, ``torch.func`` transforms, a gradient for
    ``weight`` and ``impl="reference"`` materialize the logits.

    Shards: one gather as in ``cross_entropy`` for each chunk of rows, and again if the logits are
    computed again. The gradient of ``input`` is summed over the group in the backward unless
    ``shard.hidden_grad`` is "partial".

    Rounding: logits in float32 (see ``LinearOptions``). Their gradient is rounded to the dtype of
    the operands for the products, except on a CPU, where products are in float32. Gradients are
    accumulated in float32 over all chunks, multiplied by the upstream gradient and rounded once;
    that of a bfloat16 weight on CUDA and ROCm is rounded up to three times before it is multiplied
    (see ``options.acc_dtype``).
    The loss is summed in float32. Products of float32 obey torch's settings (TF32).

    Memory: a chunk of logits, ``chunk_rows * C`` elements (none if nothing requires grad, in
    bfloat16 and float16 on NVIDIA GPUs from Hopper on, for ids without label smoothing); the
    gradients, and for half precision their sums in float32, 4 D (N + C) bytes, without the 4 D C
    for a bfloat16 weight on CUDA and ROCm where ``lossfuse.ops.chunk_plan.chunk_plan`` rounds its
    sum. On a CPU with
    half-precision operands also 16 MiB of weight in float32. With probabilities Triton takes half a
    chunk more.

    Source: chunks of logits whose gradient is formed in the forward are Liger-Kernel's (Hsu et al.,
    arXiv:2410.10989); dropping ignored rows before the products is Wijmans et al., "Cut your losses
    in large-vocabulary language models", arXiv:2411.09009.
    """
    reduction = resolve_reduction(reduction, None, None)
    ignore_index = -100 if ignore_index is None else ignore_index
    if row_weight is not None:
        row_weight = local_row_weight(row_weight, linear_weight)
    input, linear_weight, linear_bias, target, weight, shard = local_head(
        input, linear_weight, linear_bias, target, weight, shard
    )
    spec = loss_spec(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, *shard_options(shard)
    )
    operands = input, linear_weight, linear_bias, target
    if is_k_dimensional(linear_weight):
        logits = k_dimensional_logits(*operands, shard, options, impl)
        rows = flatten(logits, target, weight, ignore_index, None, row_weight)
        check_normalizer(normalizer, reduction, logits)
        return _loss(pick(impl, rows), rows, spec, reduction, normalizer, None)
    implementation, head = head_call(
        *operands, weight, row_weight, spec, reduction, normalizer, shard, options, impl
    )
    if head.forms_gradients:
        return implementation.head_total(head)
    return reduce_rows(
        implementation.head_row_loss(head), head.rows, reduction, head.reduction.divisor
    )
