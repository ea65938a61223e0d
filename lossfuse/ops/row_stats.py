"""The operators of statistics and their derivatives: what ``ops.rows`` is for a loss alone.

``row_stats`` keeps what ``row_stats_grads`` wants back. ``ReducedStats`` is for a loss that is
reduced to a number: its gradient is formed with the statistics, and serves if it turns out that
nothing else gets one."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..row_types import RowStats, Upstream, Wants
from ..spec import LossSpec, loss_spec
from ..vocab_parallel.merge import SAVED_ROWS
from .gradients import (
    NO_OPTIONS_GRAD,
    is_plain,
    multiply,
    refuse_second_derivative,
    second_derivative,
)
from .library import (
    OPTIONS,
    STATS,
    UPSTREAM,
    WANTS,
    backend_of,
    checked_spec,
    library,
    new_grad,
    new_loss,
    options,
    register,
)

_LOGITS = "Tensor logits, Tensor target, Tensor? class_weight"

library.define(f"row_stats({_LOGITS}, {WANTS}, {OPTIONS}) -> (Tensor loss, {STATS}, Tensor kept)")
library.define(
    f"row_stats_grads({_LOGITS}, Tensor kept, {UPSTREAM}, bool need_dlogits, bool need_dtarget, {OPTIONS})"
    " -> (Tensor dlogits, Tensor dtarget)"
)
library.define(
    f"row_stats_and_grads({_LOGITS}, Tensor dloss, bool need_dlogits, bool need_dtarget, {WANTS}, {OPTIONS})"
    f" -> (Tensor loss, {STATS}, Tensor kept, Tensor dlogits, Tensor dtarget)"
)

row_stats = torch.ops.lossfuse.row_stats.default
row_stats_grads = torch.ops.lossfuse.row_stats_grads.default
row_stats_and_grads = torch.ops.lossfuse.row_stats_and_grads.default


def as_tensors(made: RowStats) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the schemas return them: what is not wanted is empty."""
    loss = made.loss
    entropy = loss.new_empty(0) if made.entropy is None else made.entropy
    argmax = loss.new_empty(0, dtype=torch.int64) if made.argmax is None else made.argmax
    return loss, made.lse, made.target_logprob, entropy, argmax, made.saved


def new_stats(like: Tensor, wants: Wants) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of loss, lse, target's log-probability, entropy and argmax of as many rows as ``like``
    has."""
    loss = new_loss(like)
    n = len(loss)
    entropy = loss.new_empty(n if wants.entropy else 0)
    return (
        loss,
        loss.new_empty(n),
        loss.new_empty(n),
        entropy,
        loss.new_empty(n if wants.argmax else 0, dtype=torch.int64),
    )


def without_gradient(has_entropy: bool, entropy: Tensor, argmax: Tensor) -> tuple[Tensor, ...]:
    """Classes, and what was not wanted."""
    return (argmax,) if has_entropy else (entropy, argmax)


def _kept(logits: Tensor, target: Tensor, wants: Wants, group: str | None, impl: str) -> Tensor:
    n_kept = (
        SAVED_ROWS
        if group
        else 0
        if impl == "torch"
        else (4 if target.is_floating_point() else 2) + wants.entropy
    )
    return new_loss(logits).new_empty(n_kept, len(logits))


def _row_stats(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    entropy: bool,
    argmax: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    spec = checked_spec(logits.shape[1], target, options)
    made = backend_of(options).row_stats(
        logits, target, class_weight, spec, Wants(entropy, argmax), None, None, None
    )
    return as_tensors(made)


def _row_stats_shapes(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    entropy: bool,
    argmax: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    wants = Wants(entropy, argmax)
    return *new_stats(logits, wants), _kept(logits, target, wants, *options[-2:])


def _row_stats_grads(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, kept: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    upstream, (need_dlogits, need_dtarget), options = Upstream(*rest[:4]), rest[4:6], rest[6:]
    dlogits, dtarget = new_grad(logits, need_dlogits), new_grad(target, need_dtarget)
    backend_of(options).row_grads(
        logits,
        target,
        class_weight,
        kept,
        upstream,
        loss_spec(*options[:-1]),
        dlogits if need_dlogits else None,
        dtarget if need_dtarget else None,
    )
    return dlogits, dtarget


def _row_stats_grads_shapes(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, kept: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    need_dlogits, need_dtarget = rest[4:6]
    return new_grad(logits, need_dlogits), new_grad(target, need_dtarget)


def _row_stats_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    entropy: bool,
    argmax: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    spec = checked_spec(logits.shape[1], target, options)
    dlogits, dtarget = new_grad(logits, need_dlogits), new_grad(target, need_dtarget)
    wanted = dlogits if need_dlogits else None, dtarget if need_dtarget else None
    made = backend_of(options).row_stats(
        logits, target, class_weight, spec, Wants(entropy, argmax), Upstream(dloss), *wanted
    )
    return *as_tensors(made), dlogits, dtarget


def _row_stats_and_grads_shapes(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    entropy: bool,
    argmax: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    made = _row_stats_shapes(logits, target, class_weight, entropy, argmax, *options)
    return *made, new_grad(logits, need_dlogits), new_grad(target, need_dtarget)


for _name, _impl, _shapes in (
    ("row_stats", _row_stats, _row_stats_shapes),
    ("row_stats_grads", _row_stats_grads, _row_stats_grads_shapes),
    ("row_stats_and_grads", _row_stats_and_grads, _row_stats_and_grads_shapes),
):
    register(_name, _impl, _shapes)


def _save_row_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, class_weight, has_entropy, _, *ctx.options = inputs
    *_, entropy, argmax, kept = output
    ctx.save_for_backward(logits, target, class_weight, kept)
    ctx.mark_non_differentiable(*without_gradient(has_entropy, entropy, argmax), kept)
    ctx.set_materialize_grads(False)


def _row_stats_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None, None)
    needed = ctx.needs_input_grad[:2]
    if any(t is not None for t in upstream[:4]):
        made = row_stats_grads(*ctx.saved_tensors, *upstream[:4], *needed, *ctx.options)
        grads = tuple(g if need else None for g, need in zip(made, needed, strict=True))
    return *grads, None, None, None, *NO_OPTIONS_GRAD


def _save_row_stats_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *inputs[4:8])
    ctx.set_materialize_grads(False)
    ctx.spec = LossSpec(*inputs[10:-1])


def _row_stats_grads_backward(
    ctx: Any, v_dlogits: Tensor | None, v_dtarget: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, target, class_weight, *upstream = ctx.saved_tensors
    refuse_second_derivative(ctx.spec)
    given = [i for i, t in enumerate(upstream) if t is not None]

    def values(x: Tensor, t: Tensor) -> list[Tensor]:
        made = reference.row_stats(x, t, class_weight, ctx.spec)
        return [t for i, t in enumerate(made[:4]) if i in given and t is not None]

    made = second_derivative(
        values, logits, target, [upstream[i] for i in given], (v_dlogits, v_dtarget)
    )
    ddlogits, ddtarget, some = made
    ddupstream: list[Tensor | None] = [None] * 4
    for i, t in zip(given, some, strict=True):
        ddupstream[i] = t
    return ddlogits, ddtarget, None, None, *ddupstream, None, None, *NO_OPTIONS_GRAD


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
    """(N, V) logits -> the sum of the row losses over ``divisor``, and statistics of rows; the
    gradient of the sum formed in the forward.

    The first backward hands that gradient over if it is asked for no other. Any other backward
    makes its own."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        divisor: Tensor | None,
        wants: Wants,
        spec: LossSpec,
        impl: str,
    ) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[:2]
        one = torch.ones((), dtype=new_loss(logits[:0]).dtype, device=logits.device)
        dloss = (one if divisor is None else one / divisor).expand(len(logits))
        ctx.options = options(spec, impl)
        loss, *stats, kept, dlogits, dtarget = row_stats_and_grads(
            logits, target, class_weight, dloss, *needed, *wants, *ctx.options
        )
        ctx.save_for_backward(logits, target, class_weight, kept, dloss)
        ctx.formed = dlogits if needed[0] else None, dtarget if needed[1] else None
        ctx.mark_non_differentiable(*without_gradient(wants.entropy, *stats[2:]))
        ctx.set_materialize_grads(False)
        total = loss.sum()
        return total if divisor is None else total / divisor, *stats

    @staticmethod
    def backward(
        ctx: Any, dtotal: Tensor | None, *dstats: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads, ctx.formed = ctx.formed, None
        alone = dtotal is not None and all(t is None for t in dstats)
        if (
            grads is not None
            and dtotal is not None
            and alone
            and not torch.is_grad_enabled()
            and is_plain(dtotal)
        ):
            for g in grads:
                if g is not None:
                    multiply(g, dtotal, ctx.options[-1])
        else:
            *saved, dloss = ctx.saved_tensors
            needed = ctx.needs_input_grad[:2]
            # the memory of what was formed serves what is made
            grads = None
            made = row_stats_grads(
                *saved,
                None if dtotal is None else dloss * dtotal,
                *dstats[:3],
                *needed,
                *ctx.options,
            )
            grads = tuple(g if need else None for g, need in zip(made, needed, strict=True))
        return *grads, None, None, None, None, None
