"""TRL 1.16 or newer: the per-token statistics of its trainers, from
``lossfuse.linear_cross_entropy_stats``."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..lm_head.deferred_call import LogitsReport
from ..lm_head.fuse import find_lm_head
from ..lm_head.lazy_logits import LazyLogits, frames_to_the_user
from ..ops.chunk_plan import chunk_rows
from ..spec import LinearOptions
from ..statistics import LossStats, cross_entropy_stats, linear_cross_entropy_stats

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
OWN_HEAD = (
    "the model calls its own head, a {head}, in training, which materializes its logits:"
    " fused_log_probs replaces the function of TRL's fused head, which is not used here (SFT with"
    " compute_loss_func or label smoothing). Call lossfuse.fuse_lm_head(model) too"
)
LogProbs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int | None = None,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = OUTPUTS,
    *,
    options: LinearOptions | None = None,
) -> LogProbs:
    """Per-token statistics of ``hidden @ weight.T`` as TRL's ``ChunkedLogProbFunction.apply``
    returns them.

    Results that ``outputs`` does not name are None. Equal to, with ``c`` the cap::

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = (z if c is None else c * torch.tanh(z / c)) / temperature
        logp = z.log_softmax(-1)
        log_probs = logp.gather(-1, targets[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)   # log_probs and entropy have gradients
        log_sum_sq_probs = (2 * logp).logsumexp(-1)  # for WPO, by a second pass
        mean_logits = z.mean(-1)
        is_top1 = z.argmax(-1) == targets
        return log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1

    Args:
        hidden: ``(N, D)``; weight ``(V, D)`` and bias ``(V)`` are cast to its dtype, or to that of
            autocast.
        targets: ``(N)``, int64, each in ``[0, V)``.
        chunk_size: ignored; the number of rows of a chunk is in ``options``.
        outputs: of "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".
        options: of the linear form.

    Returns:
        float32 (float64 for float64), ``is_top1`` bool; all ``(N)``.

    Raises:
        ValueError: for an output of another name, and as ``linear_cross_entropy_stats``.

    Memory, rounding: as ``linear_cross_entropy_stats``; ``log_sum_sq_probs`` and ``mean_logits``
    are differences of numbers of the size of a log-sum-exp, and have its absolute error."""
    if not torch.is_autocast_enabled(hidden.device.type):
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    stats = partial(
        linear_cross_entropy_stats, hidden, weight, targets, linear_bias=bias, options=options
    )
    return _log_probs(stats, targets, temperature, final_logit_softcapping, logit_scale, outputs)


@contextmanager
def fused_log_probs(
    *models: nn.Module, options: LinearOptions | None = None
) -> Iterator[LogitsReport]:
    """Replace the function of TRL's fused head by ``chunked_log_probs`` within the context::

        with fused_log_probs(trainer.model):
            trainer.train()

    Equal to TRL without it, up to rounding, except for heads with adapters: TRL multiplies by
    ``lm_head.weight`` and ignores the adapter. Such a head of one of ``models`` (LoRA, DoRA, any
    adapter of PEFT) is called for a chunk of rows at a time and again in the backward, so that the
    adapter is trained. The weights of other heads, such as a reference model's, are used as in TRL.

    Args:
        models: models whose heads may have adapters, with or without their ``PeftModel``.
        options: of the linear form.

    Returns:
        A report whose ``fused`` counts calls: "log_probs", and "log_probs of a head" for those that
        called one. ``made["forward"]`` counts calls of a model's own head in training, which
        materialize its logits; the first one warns. TRL calls it where its fused head is not used,
        as in SFT with ``compute_loss_func`` or label smoothing; ``lossfuse.fuse_lm_head(model)``
        beside this is for those.

    Raises:
        ImportError: if TRL has no such function.
    """
    from trl.trainer import utils

    original = getattr(utils, "_ChunkedLogProbFunction", None)
    if original is None:
        raise ImportError(
            "trl.trainer.utils has no _ChunkedLogProbFunction; expected TRL 1.16 or newer"
        )
    replacement = _FusedFunction(models, LinearOptions() if options is None else options)
    heads = {id(head): head for head in map(find_lm_head, models) if head is not None}
    handles = [head.register_forward_hook(replacement.count_own_head) for head in heads.values()]
    utils._ChunkedLogProbFunction = replacement
    try:
        yield replacement.report
    finally:
        utils._ChunkedLogProbFunction = original
        for handle in handles:
            handle.remove()


class _FusedFunction:
    """Replaces TRL's autograd function, of which only ``apply`` is called."""

    def __init__(self, models: Sequence[nn.Module], options: LinearOptions) -> None:
        self.models, self.options, self.report = models, options, LogitsReport()
        # True while apply calls a head
        self.calls_head = False

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = OUTPUTS,
    ) -> LogProbs:
        head = self.head_with_adapter(weight)
        if head is None:
            self.report.fused["log_probs"] += 1
            return chunked_log_probs(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
                options=self.options,
            )
        self.report.fused["log_probs of a head"] += 1
        rows = chunk_rows(
            len(hidden),
            hidden.shape[1],
            len(weight),
            hidden.dtype,
            self.options,
            cpu=hidden.device.type == "cpu",
        )

        def of_chunk(h: Tensor, t: Tensor) -> LogProbs:
            self.calls_head = True
            try:
                logits = head(h)
            finally:
                self.calls_head = False
            stats = partial(cross_entropy_stats, logits, t)
            return _log_probs(stats, t, temperature, final_logit_softcapping, logit_scale, outputs)

        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        parts = [checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in chunks]
        columns: Any = (
            None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
        )
        log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = columns
        return log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1

    def count_own_head(self, head: nn.Module, args: Any, logits: Any) -> None:
        """Count a call of a model's own head in training that materializes logits; warn once."""
        plain = isinstance(logits, Tensor) and not isinstance(logits, LazyLogits)
        if self.calls_head or not (plain and head.training and torch.is_grad_enabled()):
            return
        if not self.report.made["forward"]:
            warnings.warn(
                OWN_HEAD.format(head=type(head).__name__),
                UserWarning,
                stacklevel=frames_to_the_user(),
            )
        self.report.made["forward"] += 1

    def head_with_adapter(self, weight: Tensor) -> nn.Module | None:
        """Return the head of this weight if it has an adapter, or None."""
        heads = (find_lm_head(model) for model in self.models)
        return next(
            (
                h
                for h in heads
                if h is not None
                and type(h) is not nn.Linear
                and getattr(h, "weight", None) is weight
            ),
            None,
        )


def _log_probs(
    stats: Callable[..., LossStats],
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: Sequence[str],
) -> LogProbs:
    unknown = set(outputs) - {"log_probs", *OUTPUTS}
    if unknown:
        raise ValueError(
            f"outputs names {sorted(unknown)} but may name log_probs, {', '.join(OUTPUTS)}"
        )

    def times(factor: float) -> dict[str, Any]:
        """Options of the loss of ``factor`` times the logits. The temperature divides after the
        cap, so it divides both cap and scale."""
        factor = factor / temperature
        return {
            "logit_scale": factor * logit_scale,
            "softcap": None if softcap is None else factor * softcap,
            "reduction": "none",
        }

    # with label_smoothing=1 the loss is lse - mean(z)
    smoothing = 1.0 if "mean_logits" in outputs else 0.0
    result = stats(
        label_smoothing=smoothing,
        entropy="entropy" in outputs,
        argmax="is_top1" in outputs,
        **times(1.0),
    )
    mean_logits = (result.lse - result.loss).detach() if smoothing else None
    log_sum_sq_probs = None
    if "log_sum_sq_probs" in outputs:
        with torch.no_grad():
            log_sum_sq_probs = (
                stats(entropy=False, argmax=False, **times(2.0)).lse - 2.0 * result.lse
            )
    is_top1 = None if result.argmax is None else result.argmax == targets
    return result.target_logprob, result.entropy, log_sum_sq_probs, mean_logits, is_top1
