"""Statistics of logits and of a linear head beside their cross entropy, from the same pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call.dispatch import forms_gradient_in_forward, pick
from .call.dtensor import local_head, local_logits, local_row_weight, shard_options
from .call.head_call import head_call, is_k_dimensional, k_dimensional_logits
from .call.implementations import Operators, Stats
from .call.public import public
from .call.reduction import denominator, reduce_rows
from .inputs import Rows, Targets, check_normalizer, flatten
from .row_types import Wants
from .spec import LinearOptions, LossSpec, VocabShard, loss_spec, require_bool, resolve_reduction


class LossStats(NamedTuple):
    """A loss and the statistics of its rows; see ``cross_entropy_stats``."""

    loss: Tensor
    lse: Tensor
    target_logprob: Tensor
    entropy: Tensor | None
    z_loss: Tensor
    argmax: Tensor | None
    n_valid: Tensor


_new = LossStats.__new__


def _of_fields_or_iterable(cls: type[LossStats], *values: Any, **named: Any) -> LossStats:
    # Tensor.__torch_function__ converts the tensors in a tuple and rebuilds every tuple from one
    # iterable, also a NamedTuple
    if len(values) == 1 and not named and not isinstance(values[0], Tensor):
        return cls._make(values[0])
    return _new(cls, *values, **named)


# assigned: a NamedTuple cannot define __new__ in its body, and torch.compile does not know a
# subclass that does
LossStats.__new__ = _of_fields_or_iterable  # type: ignore[method-assign, assignment]


@public
def cross_entropy_stats(
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
    entropy: bool = True,
    argmax: bool = True,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> LossStats:
    """``cross_entropy`` and statistics of the same logits, in one pass over them.

    Equal to, for ids, with ``x`` the logits after scale and cap as in ``cross_entropy``::

        logp = x.log_softmax(dim=1)
        valid = target != ignore_index
        LossStats(
            loss=lossfuse.cross_entropy(input, target, ...),
            lse=x.logsumexp(dim=1),
            target_logprob=logp.gather(1, target.unsqueeze(1)).squeeze(1),
            entropy=-(logp.exp() * logp).sum(dim=1),
            z_loss=lse_square_scale * lse ** 2,   # reduced as the loss, of which it is a part
            argmax=x.argmax(dim=1),
            n_valid=valid.sum(),
        )

    In ignored rows ``lse``, ``target_logprob``, ``entropy`` and ``z_loss`` are 0 and ``argmax`` is
    -1 (-2 if ``ignore_index`` is -1). For probabilities ``target_logprob`` is ``(target *
    logp).sum(dim=1)`` and every row is valid. Class weights and label smoothing change only the
    loss, ``row_weight`` the loss and ``z_loss``: the statistics of a row of weight 0 are computed.

    Args:
        entropy, argmax: whether to compute them. If False the field is None and costs neither
            memory nor time.
        input, target, weight, reduction, shard and the others: as in ``cross_entropy``. A
            temperature is ``logit_scale=1 / temperature``.

    Returns:
        ``LossStats``. ``loss`` and ``z_loss`` as ``cross_entropy`` returns its loss. The statistics
        of rows have the shape of the ids for every reduction, in float32 (float64 for float64),
        natural logarithms. ``argmax`` is int64: the first of equal maxima; unspecified for a row
        with NaN. ``n_valid`` is int64, ``()``.

    Raises:
        As ``cross_entropy``. Where a target outside ``[0, C)`` does not raise, the floating-point
        statistics of its row are NaN.

    Autograd: ``loss``, ``lse``, ``target_logprob``, ``entropy`` and ``z_loss`` are differentiable,
    alone and together, for ``input`` and probabilities, any number of times, as in
    ``cross_entropy``. If the forward forms a gradient ("mean" and "sum" on a CPU), it is that of
    ``loss`` alone, and a backward from another statistic computes its own: use
    ``reduction="none"`` for an objective that contains statistics.

    Rounding: as ``cross_entropy``. The entropy is a sum of non-negative terms, so that a small
    entropy is accurate: relatively, for ids on a CPU if the target is the largest class; to 1e-7
    otherwise.

    Memory: as ``cross_entropy`` without ``inplace``, and O(N).

    Source: an entropy beside the loss of a policy is Williams and Peng, "Function optimization
    using connectionist reinforcement learning algorithms", Connection Science 3 (1991).
    """
    if row_weight is not None:
        row_weight = local_row_weight(row_weight, input)
    input, target, weight, shard = local_logits(input, target, weight, shard)
    reduction = resolve_reduction(reduction, size_average, reduce)
    spec = loss_spec(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, *shard_options(shard)
    )
    wants = _checked_wants(entropy, argmax)
    rows = flatten(input, target, weight, ignore_index, shard, row_weight)
    check_normalizer(normalizer, reduction, input)
    return _stats(pick(impl, rows), rows, spec, wants, reduction, normalizer)


def _stats(
    implementation: Operators,
    rows: Rows,
    spec: LossSpec,
    wants: Wants,
    reduction: str,
    normalizer: float | Tensor | None,
) -> LossStats:
    divisor = denominator(rows, spec, reduction, normalizer)
    if forms_gradient_in_forward(
        implementation, rows, reduction, divisor, consume=False, statistics=True
    ):
        total, *stats = implementation.stats_total(rows, spec, wants, divisor)
    else:
        loss, *stats = implementation.row_stats(rows, spec, wants)
        total = reduce_rows(loss, rows, reduction, divisor)
    return _loss_stats(total, stats, rows, spec, reduction, divisor, wants)


@public
def linear_cross_entropy_stats(
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
    entropy: bool = True,
    argmax: bool = True,
    shard: VocabShard | None = None,
    options: LinearOptions | None = None,
    impl: str = "auto",
) -> LossStats:
    """``linear_cross_entropy`` and statistics of the same logits, which are computed and freed a
    chunk of rows at a time.

    Equal to::

        logits = F.linear(input.float(), linear_weight.float(), linear_bias)
        return lossfuse.cross_entropy_stats(logits, target, weight, ...)

    with the other arguments passed on (float64 stays float64).

    Args:
        entropy, argmax: as in ``cross_entropy_stats``.
        input, linear_weight, target, options and the others: as in ``linear_cross_entropy``.

    Returns:
        ``LossStats``, as ``cross_entropy_stats`` for logits of shape ``(..., C)``: statistics of
        rows have the shape of the ids.

    Raises:
        As ``linear_cross_entropy``.

    Autograd: as ``cross_entropy_stats``, for ``input``, ``linear_weight``, ``linear_bias`` and
    probabilities, except for a second derivative, which raises. For "mean" and "sum" the forward
    forms the gradients of ``loss`` (6 N D C operations in all); a backward from another statistic,
    or a second one, computes the logits again (6 N D C more). For ``reduction="none"`` every
    backward does (8 N D C in all).

    Rounding, memory: as ``linear_cross_entropy``, and O(N). On a GPU the statistics take one more
    read of the logits.

    Source: as ``linear_cross_entropy`` and ``cross_entropy_stats``.
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
    wants = _checked_wants(entropy, argmax)
    operands = input, linear_weight, linear_bias, target
    if is_k_dimensional(linear_weight):
        logits = k_dimensional_logits(*operands, shard, options, impl)
        rows = flatten(logits, target, weight, ignore_index, None, row_weight)
        check_normalizer(normalizer, reduction, logits)
        return _stats(pick(impl, rows), rows, spec, wants, reduction, normalizer)
    implementation, head = head_call(
        *operands,
        weight,
        row_weight,
        spec,
        reduction,
        normalizer,
        shard,
        options,
        impl,
        statistics=True,
    )
    divisor = head.reduction.divisor
    if head.forms_gradients:
        total, *stats = implementation.head_stats_total(head, wants)
    else:
        loss, *stats = implementation.head_row_stats(head, wants)
        total = reduce_rows(loss, head.rows, reduction, divisor)
    return _loss_stats(total, stats, head.rows, spec, reduction, divisor, wants)


def _checked_wants(entropy: bool, argmax: bool) -> Wants:
    require_bool("entropy", entropy)
    require_bool("argmax", argmax)
    return Wants(entropy, argmax)


def _loss_stats(
    loss: Tensor,
    stats: Stats,
    rows: Targets,
    spec: LossSpec,
    reduction: str,
    divisor: Tensor | None,
    wants: Wants,
) -> LossStats:
    """Return a reduced loss and statistics of (N,) rows in the shapes of the caller."""
    lse, target_logprob, entropy, argmax = stats
    z_loss = spec.lse_square_scale * lse**2 if spec.lse_square_scale else torch.zeros_like(lse)
    n_valid = (
        torch.full((), rows.target.shape[0], device=loss.device)
        if rows.soft
        else (rows.target != spec.ignore_index).sum()
    )
    return LossStats(
        loss=loss,
        lse=lse.reshape(rows.batch_shape),
        target_logprob=target_logprob.reshape(rows.batch_shape),
        entropy=entropy.reshape(rows.batch_shape) if wants.entropy else None,
        z_loss=reduce_rows(z_loss, rows, reduction, divisor),
        argmax=argmax.reshape(rows.batch_shape) if wants.argmax else None,
        n_valid=n_valid,
    )
