"""Hints at the end of an error: arguments by their names in other libraries, and what to use
instead of TorchScript."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# our argument -> names of it in torch, transformers, Liger-Kernel, flash-attn, cut-cross-entropy,
# Megatron and T5's z-loss
_NAMES = {
    "input": ("logits", "hidden", "hidden_states", "_input", "e"),
    "linear_weight": ("lin_weight", "lm_head_weight", "classifier", "c"),
    "linear_bias": ("bias", "lm_head_bias"),
    "target": ("targets", "label", "labels"),
    "weight": ("ce_weight", "class_weight", "class_weights", "weights"),
    "ignore_index": ("ignored_index", "ignore_id"),
    "label_smoothing": ("smoothing", "label_smoothing_factor"),
    "softcap": (
        "logit_softcap",
        "logit_softcapping",
        "logits_soft_cap",
        "softcapping",
        "final_logit_softcapping",
        "soft_cap",
    ),
    "lse_square_scale": (
        "z_loss",
        "z_loss_multiplier",
        "z_loss_scale",
        "z_loss_weight",
        "z_loss_coef",
    ),
    "normalizer": ("num_items_in_batch", "num_items", "n_items"),
    "inplace": ("inplace_backward",),
}
# name there -> our argument, and how it is used
_USES = {
    "temperature": ("logit_scale", "logit_scale=1 / temperature"),
    "logits_scaling": ("logit_scale", "logit_scale=1 / logits_scaling"),
    "process_group": ("shard", "shard=lossfuse.VocabShard(start, num_classes, group)"),
    "accum_dtype": ("options", "options=lossfuse.LinearOptions(acc_dtype=...)"),
    "accum_e_fp32": (
        "options",
        "options=lossfuse.LinearOptions(acc_dtype=torch.float32), the default",
    ),
    "accum_c_fp32": (
        "options",
        "options=lossfuse.LinearOptions(acc_dtype=torch.float32), the default",
    ),
    "return_z_loss": (
        "lse_square_scale",
        "the z_loss of cross_entropy_stats or linear_cross_entropy_stats",
    ),
    "return_lse": (
        "lse_square_scale",
        "the lse of cross_entropy_stats or linear_cross_entropy_stats",
    ),
    "shift": ("target", "input[..., :-1, :] and target[..., 1:]: shift both before the call"),
    **{name: (ours, ours) for ours, names in _NAMES.items() for name in names},
}


def hints_at_names(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` with a TypeError for another library's keyword argument that names the
    argument to use.

    Python refuses the call before ``function`` runs, so it takes a frame around it: 0.1 to 0.2 us a
    call."""
    parameters = inspect.signature(function).parameters
    hints = {
        name: f"here it is {use}"
        for name, (ours, use) in _USES.items()
        if ours in parameters and name not in parameters
    }
    if function.__name__ == "__init__":
        module = function.__qualname__.split(".")[0]
        hints |= dict.fromkeys(
            ("input", "target"), f"call the module: {module}(...)(input, target)"
        )

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            for name in kwargs:
                if name in hints:
                    said = f"{function.__qualname__}() got an unexpected keyword argument {name!r}; {hints[name]}"
                    raise TypeError(said) from None
            raise

    call.__prepare_scriptable__ = functools.partial(refuse_script, call)  # type: ignore[attr-defined]
    return call


def refuse_script(of: Any) -> NoReturn:
    """Raise instead of being compiled: ``torch.jit.script`` calls the method
    ``__prepare_scriptable__`` of an object first."""
    name = getattr(of, "__name__", type(of).__name__)
    raise RuntimeError(
        f"torch.jit.script cannot compile {name}, which calls lossfuse; use torch.jit.trace or torch.export, or script torch's own loss"
    )
