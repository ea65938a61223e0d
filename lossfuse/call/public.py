"""The decorator of public functions: overrides by ``__torch_function__``, and hints in errors."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function_variadic

P = ParamSpec("P")
R = TypeVar("R")

# our argument -> its names in torch, transformers, Liger-Kernel, flash-attn, cut-cross-entropy,
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
    "row_weight": ("sample_weight", "token_weights", "loss_weights"),
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


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` a public function of torch's kind.

    Tensor subclasses and modes take the call by ``__torch_function__``. A keyword argument of
    another library raises a TypeError that names the argument to use. ``torch.jit.script`` raises.
    """
    hints = _hints(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function_variadic(*args, *kwargs.values()):
            taken: R = handle_torch_function(call, (*args, *kwargs.values()), *args, **kwargs)
            return taken
        try:
            return function(*args, **kwargs)
        except TypeError:
            _raise_hint(function, hints, kwargs)
            raise

    call.__prepare_scriptable__ = functools.partial(refuse_script, call)  # type: ignore[attr-defined]
    return call


def public_init(init: Callable[P, R]) -> Callable[P, R]:
    """Let ``__init__`` of a module raise the hints of ``public``."""
    module, *_ = init.__qualname__.split(".")
    called = f"call the module: {module}(...)(input, target)"
    hints = _hints(init) | {"input": called, "target": called}

    @functools.wraps(init)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return init(*args, **kwargs)
        except TypeError:
            _raise_hint(init, hints, kwargs)
            raise

    return call


def _hints(function: Callable[..., Any]) -> dict[str, str]:
    """Keyword of another library -> the argument of ``function`` to use."""
    parameters = inspect.signature(function).parameters
    return {
        name: f"here it is {use}"
        for name, (ours, use) in _USES.items()
        if ours in parameters and name not in parameters
    }


def _raise_hint(
    function: Callable[..., Any], hints: Mapping[str, str], kwargs: Mapping[str, Any]
) -> None:
    for name in kwargs:
        if name in hints:
            raise TypeError(
                f"{function.__qualname__}() got an unexpected keyword argument {name!r};"
                f" {hints[name]}"
            ) from None


def refuse_script(of: Any) -> NoReturn:
    """Raise instead of being compiled: ``torch.jit.script`` first calls the method
    ``__prepare_scriptable__`` of an object."""
    name = getattr(of, "__name__", type(of).__name__)
    raise RuntimeError(
        f"torch.jit.script cannot compile {name}, which calls lossfuse; use torch.jit.trace or"
        " torch.export, or script torch's own loss"
    )
