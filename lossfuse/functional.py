"""The public functions: torch's names and order, then what torch does not have."""

from torch import Tensor

from .call.dispatch import forms_gradient_in_forward, may_write_in_place, pick
from .call.dtensor import local_head, local_logits, shard_options
from .call.head_call import head_call, is_k_dimensional, k_dimensional_logits
from .call.implementations import Operators
from .call.public import public
from .call.reduction import denominator, reduce_rows
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
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross entropy of logits against class ids or class probabilities, without a tensor of
    probabilities.

    Equal to::

        x = input.float()                                        # float64 stays float64
        x = x * logit_scale                                      # if logit_scale is given
        x = softcap * torch.tanh(x / softcap)                    # if softcap is given
        loss = F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
        loss = loss + lse_square_scale * (x.logsumexp(dim=1) ** 2).where(target != ignore_index, 0)      # z-loss, if asked for
        return loss, loss.sum() or loss.sum() / n                # for "none", "sum", "mean"

    where ``n`` is torch's: the class weights of the valid targets summed, their number without
    ``weight``, or the number of rows for probabilities; ``normalizer`` replaces it.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``; float64, float32, bfloat16 or
            float16, any strides. Written to only if ``inplace``.
        target: class ids, integers of the shape of ``input`` without C, each in ``[0, C)`` or
            ``ignore_index``; or class probabilities, floating point of the shape of ``input``.
            Probabilities may require grad.
        weight: ``(C)``, floating point: the weight of each class. If it requires grad, the
            reference computes the call.
        size_average, reduce: deprecated by torch, in favour of ``reduction``.
        ignore_index: the id of positions that count for nothing: loss 0, gradient 0, whatever their
            logits hold.
        reduction: "none", "mean" or "sum".
        label_smoothing: in ``[0, 1]``, the share of the target that is spread evenly over all
            classes.
        softcap: positive, in units of a logit.
        logit_scale: factor of the logits (the inverse of a temperature), applied before the cap.
        lse_square_scale: factor of the squared log-sum-exp of a row ("z-loss"); not multiplied by
            ``weight``.
        normalizer: divisor of "mean", such as the tokens of the global batch: a positive number, or
            a 0-d tensor on the device of ``input`` (nothing synchronises) or on the CPU.
        inplace: consume the logits: their memory receives the gradient, in the forward for "mean"
            and "sum", in the backward for "none", for float16 and where a backward needs more than
            one number. See below.
        shard: which classes these are, where the ranks of a group of torch.distributed have a slice
            of the logits each; see ``VocabShard``. A DTensor placed ``Shard`` on its classes needs
            none. ``weight`` is that of these classes or of all, ``num_classes``.
        impl: "triton" (CUDA, ROCm, XPU; the CPU in Triton's interpreter), "torch" (blocks of rows,
            any device), "reference" (eager), or "auto". A name is obeyed or raises.

    Returns:
        ``()`` for "mean" and "sum", the shape of the ids for "none". float32, **also for bfloat16
        and float16 input, where torch rounds the loss to the input's dtype**; float64 for float64
        input alone. "mean" over no valid target is NaN with zero gradient, as in torch; with
        ``normalizer`` it is 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        IndexError: on the CPU, for a target outside ``[0, C)``. Elsewhere, and where a tensor has
            no values to look at (compilers, ``torch.func``), the loss and gradient of its row are
            NaN, nothing is read out of bounds and nothing synchronises; see ``debug_targets``. With
            ``shard`` all ranks raise what one of them finds.

    Autograd: gradients for ``input`` and probabilities, any number of times; the derivative of a
    gradient, forward mode, ``torch.func`` transforms and a gradient for ``weight`` go through the
    eager reference and take its memory.

    In place: with ``inplace=True`` no gradient is allocated. Afterwards ``input`` (and the tensor
    it is a view of) raises on any use of its values. A graph that saved the logits raises in its
    backward, and so does a second backward, or one with ``create_graph``, of this loss. Nothing is
    written, and the call is right without, where no gradient is wanted, a compiler traces the call
    (it plans memory itself), ``saved_tensors_hooks`` are active (checkpointing) or the reference
    computes; and, with a warning, where another tensor shares the memory of ``input``. Layouts that
    are copied to rows keep their values; the copy is consumed. ValueError for a leaf that requires
    grad, a view of one, and logits whose elements share memory. Unseen: readers that bypass
    ``__torch_function__``, such as TorchScript.

    Shards: the forward gathers 3 to 5 numbers a row from every rank in one collective, the backward
    needs none (but a second one, where the forward formed the gradient, the same again); with
    ``weight`` one number more for "mean". Losses have the same bits on every rank. A second
    derivative raises but with ``impl="reference"``, which makes the logits whole on every rank, as
    does a gradient for ``weight``.

    Tracers: for ``impl="auto"``, ``torch.jit.trace``, ``torch.export`` and ``torch.onnx.export``
    record the reference, which consists of operators of torch, so that the result loads where this
    package is not installed. With another ``impl`` they record the operators of this package, and
    so does ``torch.compile`` always. ``torch.jit.script`` raises RuntimeError.

    Rounding: float32 from load to store (float64 for float64). The row maximum and the log-sum are
    kept apart, so that an offset common to a row cancels exactly; the target's ``p - 1`` is formed
    before rounding and keeps its digits however confident the model is.

    Memory: O(N), and one tensor like ``input`` for the gradient unless ``inplace``. On the CPU, for
    "mean" and "sum", the gradient is formed in the forward, but for float16, whose gradient must
    see a loss scaler's factor before it is rounded; temporaries there take at most 3 MiB or 4 % of
    the logits, whichever is more, if a row is below 512 KiB. Layouts whose rows have no single
    stride, such as ``(N, C, d)``, are copied once.

    Source: the running log-sum-exp is Milakov and Gimelshein, "Online normalizer calculation for
    softmax", arXiv:1805.02867; z-loss is de Brebisson and Vincent, arXiv:1604.08859."""
    input, target, weight, shard = local_logits(input, target, weight, shard)
    reduction = resolve_reduction(reduction, size_average, reduce)
    spec = loss_spec(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, *shard_options(shard)
    )
    rows = flatten(input, target, weight, ignore_index, shard)
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
    divisor = denominator(rows, spec, reduction, normalizer)
    if forms_gradient_in_forward(implementation, rows, reduction, divisor, owner is not None):
        return implementation.total(rows, spec, divisor, owner)
    return reduce_rows(implementation.row_loss(rows, spec, owner), rows, reduction, divisor)


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
    normalizer: float | Tensor | None = None,
    shard: VocabShard | None = None,
    options: LinearOptions | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross entropy of a linear head's logits, which are made and used up a chunk of rows at a
    time: never N x C of them.

    Equal to::

        logits = F.linear(input.float(), linear_weight.float(), linear_bias)        # float64 stays float64
        return lossfuse.cross_entropy(logits, target, weight, ...)                  # everything else

    and, in its arguments, to ``torch.nn.functional.linear_cross_entropy`` (torch 2.13) and more.

    Args:
        input: hidden states ``(D)``, ``(N, D)`` or ``(..., D)``; float64, float32, bfloat16 or
            float16, any strides.
        linear_weight: ``(C, D)``, in the dtype of ``input`` but under autocast; or ``(C, d1, ...,
            dK, D)``, for ``input`` of ``(N, D)`` and logits ``(N, C, d1, ..., dK)``, which are then
            made whole.
        target: class ids of the shape of ``input`` without D, or probabilities with C in place of
            D; with a K-dimensional weight ``(N, d1, ..., dK)`` or ``(N, C, d1, ..., dK)``. As in
            ``cross_entropy``.
        linear_bias: ``(C)``, or ``(C, d1, ..., dK)``, in the dtype of ``linear_weight``.
        weight: ``(C)``: the weight of each class.
        reduction, label_smoothing, softcap, logit_scale, lse_square_scale, normalizer, impl: as in
            ``cross_entropy``.
        shard: which classes ``linear_weight`` and ``linear_bias`` are, where the ranks of a group
            have some each and all the same ``input``; see ``VocabShard``. None for DTensors, a
            weight placed ``Shard(0)`` and an ``input`` placed ``Replicate``.
        ignore_index: the id of positions that count for nothing, whatever their hidden states hold.
            None is -100, as in torch.
        options: chunks, dtypes, what is kept; see ``LinearOptions``. The chunk's size follows from
            ``lossfuse.ops.head_chunks.chunk_rows``.

    Returns:
        As ``cross_entropy``: float32 (float64 for float64), ``()`` or the shape of the ids.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        IndexError: on the CPU, for a target outside ``[0, C)``. Elsewhere its row's loss and
            gradient are NaN, and with them, through the product, the gradient of the weight; see
            ``debug_targets``.

    Autograd: gradients for ``input``, ``linear_weight``, ``linear_bias`` and probabilities; only
    products that somebody wants run. For "mean" and "sum" they are formed in the forward (6 N D C
    operations in all) and handed over by the backward: a second one raises unless
    ``options.allow_retain_graph``. For "none" the backward makes the logits again (8 N D C). A
    second derivative raises; forward mode, ``torch.func`` transforms and a gradient for ``weight``
    go through the reference, which makes the logits whole, as does ``impl="reference"``.

    Shards: one gather as in ``cross_entropy`` for each chunk of rows, again where logits are made
    again; and the gradient of ``input``, summed over the group in the backward unless
    ``shard.hidden_grad`` is "partial".

    Rounding: logits in float32 (see ``LinearOptions``); their gradient is rounded to the operands'
    dtype for the products, but on a CPU, where products are in float32; gradients are summed in
    float32 over all chunks, multiplied and rounded once. The loss is summed in float32. float32
    products obey torch's settings (TF32).

    Memory: a chunk of logits, ``chunk_rows * C`` elements (none without a gradient, in bfloat16 and
    float16 on NVIDIA GPUs from Hopper on, unless labels are smoothed or probabilities); the
    gradients, and for half precision their sums in float32, 4 D (N + C) bytes. On a CPU with
    half-precision operands also 16 MiB of weight in float32; with probabilities, Triton takes half
    a chunk more for them.

    Source: chunks of logits whose gradient is formed in the forward are Liger-Kernel's (Hsu et al.,
    arXiv:2410.10989); dropping ignored rows before the products is Wijmans et al., "Cut your losses
    in large-vocabulary language models", arXiv:2411.09009."""
    reduction = resolve_reduction(reduction, None, None)
    ignore_index = -100 if ignore_index is None else ignore_index
    input, linear_weight, linear_bias, target, weight, shard = local_head(
        input, linear_weight, linear_bias, target, weight, shard
    )
    spec = loss_spec(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, *shard_options(shard)
    )
    operands = input, linear_weight, linear_bias, target
    if is_k_dimensional(linear_weight):
        logits = k_dimensional_logits(*operands, shard, options, impl)
        rows = flatten(logits, target, weight, ignore_index)
        check_normalizer(normalizer, reduction, logits)
        return _loss(pick(impl, rows), rows, spec, reduction, normalizer, None)
    implementation, head = head_call(
        *operands, weight, spec, reduction, normalizer, shard, options, impl
    )
    if head.forms_gradients:
        return implementation.head_total(head)
    return reduce_rows(implementation.head_row_loss(head), head.rows, reduction, head.divisor)
