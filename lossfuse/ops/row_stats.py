"""The operators of statistics of rows, and their autograd: ``ops.rows`` with more outputs.

``row_stats`` saves what ``row_stats_grads`` needs. ``ReducedStats`` is for a loss that is reduced
to a number: the forward forms the gradient of that number with the statistics, and the backward
returns it if no other statistic has an upstream gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..row_types import RowStats, Upstream, Wants
from ..spec import LossSpec
from ..vocab_parallel.merge import SAVED_ROWS
from .gradients import (
    is_plain,
    multiply,
    only_needed,
    refuse_second_derivative,
    second_derivative,
)
from .library import (
    OPTIONS,
    STATS,
    UPSTREAM,
    WANTS,
    OpArgs,
    grouped,
    library,
    new_loss,
    no_grads,
    register,
)
from .rows import new_grads, row_gradient_of_total, total_of_rows

_ROWS = "Tensor logits, Tensor target, Tensor? class_weight"
_NEEDS = "bool need_dlogits, bool need_dtarget"

library.define(f"row_stats({_ROWS}, {WANTS}, {OPTIONS}) -> (Tensor loss, {STATS}, Tensor saved)")
library.define(
    f"row_stats_grads({_ROWS}, Tensor saved, {UPSTREAM}, {_NEEDS}, {OPTIONS})"
    " -> (Tensor dlogits, Tensor dtarget)"
)
library.define(
    f"row_stats_and_grads({_ROWS}, Tensor dloss, {_NEEDS}, {WANTS}, {OPTIONS})"
    f" -> (Tensor loss, {STATS}, Tensor saved, Tensor dlogits, Tensor dtarget)"
)

row_stats = torch.ops.lossfuse.row_stats.default
row_stats_grads = torch.ops.lossfuse.row_stats_grads.default
row_stats_and_grads = torch.ops.lossfuse.row_stats_and_grads.default


class RowNeeds(NamedTuple):
    """The gradients that a row operator computes."""

    dlogits: bool
    dtarget: bool


def as_tensors(stats: RowStats) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of the schema: statistics that were not computed are empty."""
    loss = stats.loss
    entropy = loss.new_empty(0) if stats.entropy is None else stats.entropy
    argmax = loss.new_empty(0, dtype=torch.int64) if stats.argmax is None else stats.argmax
    return loss, stats.lse, stats.target_logprob, entropy, argmax, stats.saved


def new_stats(rows: Tensor, wants: Wants) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate loss, lse, target_logprob, entropy and argmax of as many rows as ``rows`` has."""
    loss = new_loss(rows)
    n = len(loss)
    entropy = loss.new_empty(n if wants.entropy else 0)
    argmax = loss.new_empty(n if wants.argmax else 0, dtype=torch.int64)
    return loss, loss.new_empty(n), loss.new_empty(n), entropy, argmax


def mark_stats(ctx: Any, wants: Wants, entropy: Tensor, argmax: Tensor, *others: Tensor) -> None:
    """Tell autograd which outputs have no gradient: ``argmax``, an entropy that was not asked for
    and ``others``. Upstream gradients of unused outputs are None."""
    without = (argmax,) if wants.entropy else (entropy, argmax)
    ctx.mark_non_differentiable(*without, *others)
    ctx.set_materialize_grads(False)


def _new_saved(logits: Tensor, target: Tensor, wants: Wants, args: OpArgs) -> Tensor:
    """Allocate the numbers per row that the backend of ``args`` saves for a gradient."""
    if args.group is not None:
        n_saved = SAVED_ROWS
    elif args.impl == "torch":
        n_saved = 0
    else:
        n_saved = (4 if target.is_floating_point() else 2) + wants.entropy
    return new_loss(logits).new_empty(n_saved, len(logits))


def _row_stats(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    wants, args = grouped(options, Wants, OpArgs)
    spec = args.checked_spec(logits.shape[1], target)
    stats = args.backend.row_stats(logits, target, class_weight, spec, wants, None, None, None)
    return as_tensors(stats)


def _row_stats_fake(
    logits: Tensor, target: Tensor, _: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    wants, args = grouped(options, Wants, OpArgs)
    return *new_stats(logits, wants), _new_saved(logits, target, wants, args)


def _row_stats_grads(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, saved: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    upstream, needs, args = grouped(options, Upstream, RowNeeds, OpArgs)
    grads = new_grads(logits, target, *needs)
    args.backend.row_grads(
        logits, target, class_weight, saved, upstream, args.spec, *only_needed(grads, *needs)
    )
    return grads


def _row_stats_grads_fake(
    logits: Tensor, target: Tensor, _weight: Tensor | None, _saved: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    _, needs, _ = grouped(options, Upstream, RowNeeds, OpArgs)
    return new_grads(logits, target, *needs)


def _row_stats_and_grads(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, dloss: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    needs, wants, args = grouped(options, RowNeeds, Wants, OpArgs)
    spec = args.checked_spec(logits.shape[1], target)
    grads = new_grads(logits, target, *needs)
    stats = args.backend.row_stats(
        logits,
        target,
        class_weight,
        spec,
        wants,
        Upstream(dloss),
        *only_needed(grads, *needs),
    )
    return *as_tensors(stats), *grads


def _row_stats_and_grads_fake(
    logits: Tensor, target: Tensor, _weight: Tensor | None, _dloss: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    needs, wants, args = grouped(options, RowNeeds, Wants, OpArgs)
    saved = _new_saved(logits, target, wants, args)
    return *new_stats(logits, wants), saved, *new_grads(logits, target, *needs)


register("row_stats", _row_stats, _row_stats_fake)
register("row_stats_grads", _row_stats_grads, _row_stats_grads_fake)
register("row_stats_and_grads", _row_stats_and_grads, _row_stats_and_grads_fake)


def _save_row_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, class_weight, *options = inputs
    wants, ctx.options = grouped(options, Wants, OpArgs)
    *_, entropy, argmax, saved = output
    ctx.save_for_backward(logits, target, class_weight, saved)
    mark_stats(ctx, wants, entropy, argmax, saved)


def _row_stats_backward(
    ctx: Any,
    dloss: Tensor | None,
    dlse: Tensor | None,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    upstream = Upstream(dloss, dlse, dlogprob, dentropy)
    grads: tuple[Tensor | None, Tensor | None] = (None, None)
    if any(t is not None for t in upstream):
        grads = _row_stats_gradients(ctx, ctx.saved_tensors, upstream)
    return *grads, None, *no_grads(Wants, OpArgs)


def _row_stats_gradients(
    ctx: Any, saved: Any, upstream: Upstream
) -> tuple[Tensor | None, Tensor | None]:
    needs = RowNeeds(*ctx.needs_input_grad[:2])
    return only_needed(row_stats_grads(*saved, *upstream, *needs, *ctx.options), *needs)


def _save_row_stats_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, _, *options = inputs
    upstream, _, args = grouped(options, Upstream, RowNeeds, OpArgs)
    ctx.save_for_backward(logits, target, class_weight, *upstream)
    ctx.set_materialize_grads(False)
    ctx.spec = args.spec


def _row_stats_grads_backward(
    ctx: Any, v_dlogits: Tensor | None, v_dtarget: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, target, class_weight, *upstream = ctx.saved_tensors
    refuse_second_derivative(ctx.spec)
    given = [i for i, t in enumerate(upstream) if t is not None]

    def values(x: Tensor, t: Tensor) -> list[Tensor]:
        stats = reference.row_stats(x, t, class_weight, ctx.spec)
        outputs = (stats.loss, stats.lse, stats.target_logprob, stats.entropy)
        return [t for i, t in enumerate(outputs) if i in given and t is not None]

    ddlogits, ddtarget, ddgiven = second_derivative(
        values, logits, target, [upstream[i] for i in given], (v_dlogits, v_dtarget)
    )
    ddupstream: list[Tensor | None] = [None] * len(upstream)
    for i, t in zip(given, ddgiven, strict=True):
        ddupstream[i] = t
    return ddlogits, ddtarget, None, None, *ddupstream, *no_grads(RowNeeds, OpArgs)


torch.library.register_autograd(
    "lossfuse::row_stats", _row_stats_backward, setup_context=_save_row_stats, lib=library
)
torch.library.register_autograd(
    "lossfuse::row_stats_grads",
    _row_stats_grads_backward,
    setup_context=_save_row_stats_grads,
    lib=library,
)


class ReducedStats(torch.autograd.Function):
    """(N, V) logits -> the sum of the row losses, times ``row_weight``, over ``divisor``, and the
    statistics of rows; the gradient of the sum is formed in the forward.

    The first backward returns that gradient if the sum alone has an upstream gradient. Any other
    backward computes its own."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        divisor: Tensor | None,
        row_weight: Tensor | None,
        wants: Wants,
        spec: LossSpec,
        impl: str,
    ) -> tuple[Tensor, ...]:
        needs = RowNeeds(*ctx.needs_input_grad[:2])
        dloss = row_gradient_of_total(logits, divisor, row_weight)
        ctx.options, ctx.impl = OpArgs.of(spec, impl), impl
        loss, *stats, saved, dlogits, dtarget = row_stats_and_grads(
            logits, target, class_weight, dloss, *needs, *wants, *ctx.options
        )
        ctx.save_for_backward(logits, target, class_weight, saved, dloss)
        ctx.formed = only_needed((dlogits, dtarget), *needs)
        _, _, entropy, argmax = stats
        mark_stats(ctx, wants, entropy, argmax)
        return total_of_rows(loss, divisor, row_weight), *stats

    @staticmethod
    def backward(
        ctx: Any,
        dtotal: Tensor | None,
        dlse: Tensor | None,
        dlogprob: Tensor | None,
        dentropy: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, ...]:
        formed, ctx.formed = ctx.formed, None
        total_alone = dtotal is not None and dlse is dlogprob is dentropy is None
        if (
            formed is not None
            and dtotal is not None
            and total_alone
            and not torch.is_grad_enabled()
            and is_plain(dtotal)
        ):
            for g in formed:
                if g is not None:
                    multiply(g, dtotal, ctx.impl)
            return *formed, None, None, None, None, None, None
        *saved, dloss = ctx.saved_tensors
        # free the formed gradient before another is allocated
        formed = None
        upstream = Upstream(None if dtotal is None else dloss * dtotal, dlse, dlogprob, dentropy)
        grads = _row_stats_gradients(ctx, saved, upstream)
        return *grads, None, None, None, None, None, None
