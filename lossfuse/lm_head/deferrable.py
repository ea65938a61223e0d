"""Which heads may be deferred, why that is safe, and the state of a head at the call that is
deferred.

The forward of a deferred head runs later than the model called it: when its logits are read, and
again in the backward; on chunks of flattened rows; any number of times. The result is the model's
own only if each row is computed alone, if running the forward leaves no trace, and if everything
its output depends on is what it was at the call. So a head is deferred if it consists of modules
listed here, for which that holds, or if the caller of ``fuse_lm_head`` vouches for it
(``row_wise=True``). Every other head runs as the model calls it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm

from .fsdp import is_fsdp2, is_plain_linear

# --- modules whose forward computes each row alone, keeps no state and draws no numbers

_ACTIVATIONS = {
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
}
_CONTAINERS = {
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    nn.Identity,
}
_NORMS = {nn.LayerNorm, nn.RMSNorm}
_PARAMETRIZATIONS = {"_WeightNorm", "_Orthogonal"}
_OTHERS = {
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper"),
    ("transformers.models.idefics.modeling_idefics", "IdeficsDecoupledLinear"),
}
# packages of peft.tuners whose layers add to, scale, rotate or replace the product of a Linear
_TUNERS = {
    "adalora",
    "adamss",
    "beft",
    "boft",
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "loha",
    "lokr",
    "lora",
    "lycoris_utils",
    "miss",
    "oft",
    "osf",
    "peanut",
    "psoft",
    "randlora",
    "road",
    "shira",
    "supertuning",
    "tinylora",
    "trainable_tokens",
    "tuners_utils",
    "unilora",
    "vblora",
    "vera",
    "waveft",
    "_buffer_dict",
}
# of peft.tuners.lora; aLoRA, Arrow, MonteCLoRA and VeLoRA look at other rows, draw numbers or keep
# state
_LORA_VARIANTS = {
    "DoraLinearVariant",
    "QALoraLinearVariant",
    "BdLoraLinearVariant",
    "MiCALinearVariant",
    "KasaLinearVariant",
}
_AO_WEIGHTS = {
    "AffineQuantizedTensor",
    "Float8Tensor",
    "Int4PlainInt32Tensor",
    "Int4PreshuffledTensor",
    "Int4Tensor",
    "Int4TilePackedTo4dTensor",
    "Int8Tensor",
    "IntxUnpackedToInt8Tensor",
}
# granularities at which an activation is quantized row by row
_ROW_GRANULARITIES = {"PerRow", "PerToken"}

HINT_ROW_WISE = "; if it computes every row alone, keeps no state and has no side effects, say so with fuse_lm_head(model, row_wise=True)"


def obstacle(head: nn.Module, forward: Callable[..., Any] | None, *, row_wise: bool) -> str | None:
    """Why a call of ``head`` may not be deferred, or None. ``forward``, the one of the instance if
    it has its own."""
    for name, m in head.named_modules():
        if _is_fetched(m) and not (m is head and is_plain_linear(head)):
            return f"accelerate fetches the weights of {_named(m, name)} for each call"
    if row_wise:
        return None
    if forward is not None and not is_own_forward(head, forward):
        return f"the forward of its {type(head).__name__} has been replaced by {getattr(forward, '__qualname__', forward)}{HINT_ROW_WISE}"
    if isinstance(head, nn.ParameterList | nn.ParameterDict | nn.ModuleList | nn.ModuleDict):
        return f"a {type(head).__name__} has no forward"
    first = True
    for name, m in head.named_modules():
        why = _obstacle_of(m, first) or (None if m is head else _outside_changes(m))
        if why is not None:
            return f"{_named(m, name)} {why}{HINT_ROW_WISE}"
        first = first and not isinstance(m, nn.Linear | nn.LayerNorm | nn.RMSNorm)
    return None


def _named(m: nn.Module, name: str) -> str:
    return f"{type(m).__name__} ({name})" if name else f"its {type(m).__name__}"


def is_own_forward(head: nn.Module, forward: Any) -> bool:
    """Return True if ``forward`` is the method of the head's class, as accelerate stores it."""
    return getattr(forward, "__func__", None) is type(head).forward and forward.__self__ is head


def _outside_changes(m: nn.Module) -> str | None:
    """Hooks and replaced forwards of a module in a head would run again with it."""
    hooks = (
        *m._forward_pre_hooks.values(),
        *m._forward_hooks.values(),
        *m._backward_hooks.values(),
        *m._backward_pre_hooks.values(),
    )
    if any(type(hook) is not WeightNorm for hook in hooks):
        return "has hooks, which would run again"
    forward = m.__dict__.get("forward")
    if forward is not None and not is_own_forward(m, forward) and not hasattr(m, "_hf_hook"):
        return "has a forward that has been replaced"
    return None


def _is_fetched(m: nn.Module) -> bool:
    """Return True if accelerate loads the weights of a module before each call and drops them after
    it."""
    hook = m.__dict__.get("_hf_hook")
    return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


def class_of(m: nn.Module) -> type:
    """The class of a module before FSDP2 or a parametrization gave it one of its own."""
    kind = type(m)
    if parametrize.is_parametrized(m):
        kind = kind.__bases__[0]
    return next(c for c in kind.__mro__[1:] if issubclass(c, nn.Module)) if is_fsdp2(m) else kind


def _obstacle_of(m: Any, first: bool) -> str | None:
    kind = class_of(m)
    place, name = kind.__module__, kind.__name__
    if kind is nn.Linear:
        return _obstacle_of_weight(m)
    if kind in _NORMS:
        return None if len(m.normalized_shape) == 1 else "normalizes over several dimensions"
    if kind in _CONTAINERS:
        return None
    if kind in _ACTIVATIONS:
        return "writes over the hidden states" if first and getattr(m, "inplace", False) else None
    if kind is nn.PReLU:
        return (
            None if m.num_parameters == 1 else "has a slope for each entry of the second dimension"
        )
    if kind in (nn.GLU, nn.Softmax, nn.LogSoftmax):
        return None if m.dim == -1 else "works along a dimension that may be one of rows"
    if kind is nn.Dropout:
        return "draws one mask for all rows" if m.training and m.p > 0.0 else None
    if kind is parametrize.ParametrizationList or (
        place == parametrizations.__name__ and name in _PARAMETRIZATIONS
    ):
        return None
    if (place, name) in _OTHERS:
        return None
    known = {
        "peft": _obstacle_of_peft,
        "bitsandbytes": _obstacle_of_bitsandbytes,
        "torchao": _obstacle_of_torchao,
    }.get(place.split(".")[0])
    return "is not known to compute each row alone" if known is None else known(m, place, name)


def _obstacle_of_weight(m: Any) -> str | None:
    weights = [p for p in m._parameters.values() if p is not None]
    for w in weights:
        kind = type(w)
        if kind in (Tensor, nn.Parameter) or _is_dtensor(w):
            continue
        if not (kind.__module__.startswith("torchao.") and kind.__name__ in _AO_WEIGHTS):
            return f"has a parameter of class {kind.__name__}, whose functions are not known to compute each row alone"
        # int8_asym_per_token is one
        named = getattr(w, "activation_quantization", None)
        if not _by_rows(getattr(w, "act_quant_kwargs", None)) or (
            named is not None and not str(named).lower().endswith("per_token")
        ):
            return f"has a {kind.__name__}, which quantizes all rows together"
    return None


def _by_rows(quantized: Any) -> bool:
    """Return True if activations are not quantized, or each row by its own scale."""
    granularity = getattr(quantized, "granularity", quantized)
    return quantized is None or type(granularity).__name__ in _ROW_GRANULARITIES


def _is_dtensor(t: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def _obstacle_of_peft(m: Any, place: str, name: str) -> str | None:
    parts = place.split(".")
    if place != "peft.utils.other" and not (
        parts[1] == "tuners" and len(parts) > 2 and parts[2] in _TUNERS
    ):
        return "is not known to compute each row alone"
    variants = [type(v).__name__ for v in m.__dict__.get("lora_variant", {}).values()]
    unknown = [kind for kind in variants if kind not in _LORA_VARIANTS]
    if unknown:
        return f"is a LoRA layer of kind {unknown[0]}, which is not known to compute each row alone"
    rates = [
        value
        for key, value in m.__dict__.items()
        if "dropout" in key or (key == "p" and "Dropout" in name)
    ]
    if m.training and any(map(_positive, rates)):
        return "draws random numbers for all rows"
    if getattr(m, "merged", False) is True and getattr(m, "disable_adapters", False) is True:
        return "unmerges its adapters when it is called"
    return None


def _positive(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_positive, value.values()))
    return isinstance(value, int | float) and value > 0.0


def _obstacle_of_bitsandbytes(m: Any, place: str, name: str) -> str | None:
    if name in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return None
    if name == "Linear8bitLt":
        # which columns are outliers depends on every row
        return (
            None if not m.state.threshold else "looks for outliers in all rows together (threshold)"
        )
    return "is not known to compute each row alone"


def _obstacle_of_torchao(m: Any, place: str, name: str) -> str | None:
    if name == "Float8Linear":
        granularity = m.config.cast_config_input.scaling_granularity
        return None if granularity.name == "AXISWISE" else "scales all rows together (tensorwise)"
    if not place.startswith("torchao.quantization.qat."):
        return "is not known to compute each row alone"
    if "Linear" in name:
        activation = m.activation_fake_quantizer
        return (
            None
            if activation is None or _by_rows(activation.config)
            else "quantizes all rows together"
        )
    # an observer's scale is a parameter once it learns its range
    fixed = "FakeQuantizer" in name and not getattr(m.config, "range_learning", False)
    return (
        None
        if fixed and getattr(m.config, "is_dynamic", True)
        else "keeps the range of what it has seen"
    )


# --- the state of a head at a call

# what torch keeps in a module beside its mode; and the hooks of accelerate
_TORCHS = {*nn.Module().__dict__, "forward", "_hf_hook", "_old_forward"} - {"training"}
# state whose change goes along with a change of weights, so that it cannot be put back alone
_WITH_WEIGHTS = {"merged_adapters"}
_ABSENT = object()


class HeadState:
    """The state of a head, beside its parameters, that its output depends on: modes, flags, buffers
    and random numbers."""

    def __init__(self, head: nn.Module, *, draws: bool) -> None:
        self.modules = list(head.modules())
        self.attributes = [
            _copied({k: v for k, v in m.__dict__.items() if k not in _TORCHS}) for m in self.modules
        ]
        self.buffers = [(f"the buffer {name} of the head", b) for name, b in head.named_buffers()]
        # drawn from the numbers of the model, so that each call has its own
        self.seed = (
            int(torch.empty((), dtype=torch.int64, device="cpu").random_())
            if draws and head.training
            else None
        )

    def flags(self) -> Any:
        """The part of the state that decides which modules of the head are called, for
        comparison."""
        return _flags(self.attributes)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.buffers
        for m, attributes in zip(self.modules, self.attributes, strict=True):
            for name, value in attributes.items():
                for t in _tensors_in(value):
                    yield f"the attribute {name} of {type(m).__name__}", t

    def changed(self, head: nn.Module) -> str | None:
        """The name of state that has changed since the call and cannot be restored, or None."""
        modules = list(head.modules())
        if len(modules) != len(self.modules) or any(
            a is not b for a, b in zip(modules, self.modules, strict=True)
        ):
            return "a module of the head"
        buffers = dict(head.named_buffers())
        for (what, b), now in zip(self.buffers, buffers.values(), strict=False):
            if b is not now:
                return what
        if len(buffers) != len(self.buffers):
            return "the buffers of the head"
        for m, attributes in zip(self.modules, self.attributes, strict=True):
            for name in _WITH_WEIGHTS & attributes.keys():
                if not _same(m.__dict__.get(name), attributes[name]):
                    return f"{name} of {type(m).__name__}"
        return None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """With the modes and plain attributes of every module as they were, and afterwards as they
        are now."""
        changed: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for m, attributes in zip(self.modules, self.attributes, strict=True):
                now = m.__dict__
                for name in [
                    name for name in now if name not in attributes and name not in _TORCHS
                ]:
                    changed.append((now, name, now[name]))
                    del now[name]
                for name, value in attributes.items():
                    if not _same(now.get(name, _ABSENT), value):
                        changed.append((now, name, now.get(name, _ABSENT)))
                        now[name] = _copied(value)
            yield
        finally:
            for now, name, value in reversed(changed):
                if value is _ABSENT:
                    now.pop(name, None)
                else:
                    now[name] = value

    @contextmanager
    def random(self, device: torch.device) -> Iterator[None]:
        """With the random numbers of this call, which leaves those of the model where they are."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng(
            [] if device.type == "cpu" else [device], device_type=device.type
        ):
            torch.default_generator.manual_seed(self.seed)
            if device.type != "cpu":
                torch.get_device_module(device).manual_seed(self.seed)
            yield


def _copied(value: Any) -> Any:
    """Plain containers copied, so that what they hold is what it was; anything else by identity."""
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple, set) else value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is dict:
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) in (set, bool, int, float, str, bytes, torch.dtype, torch.device) and bool(
        a == b
    )


def _flags(value: Any) -> Any:
    if type(value) is dict:
        return {k: _flags(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return [_flags(v) for v in value]
    return value if type(value) in (bool, int, float, str) else type(value).__name__


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (dict, list, tuple, set):
        for one in value.values() if type(value) is dict else value:
            yield from _tensors_in(one)
