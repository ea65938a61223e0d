"""The operators of the package: opaque to compilers, with shapes for tracing. Torch only.

They live in ``torch.ops.lossfuse``; those of a head are in ``ops.head``. The functions of this module lead to them, or straight to
their kernels where an operator would do nothing but cost time.

``impl`` names a backend module, imported when it is first called. ``stats`` is what that backend wants back in ``row_grads``. A
gradient nobody needs is an empty tensor, so that every mode returns as many results. An operator whose name ends in ``_`` writes the
gradient over the logits.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..row_types import Upstream
from ..spec import LossSpec, loss_spec
from ..targets import require_ids_in_range
from ..vocab_parallel.backend import Sharded, all_sum_over, keep_order
from ..vocab_parallel.merge import KEPT_ROWS

_BACKENDS = {"triton": "..backends.triton", "torch": "..backends.torch_rows"}
# where rows are cut by classes
_SHARD_BACKENDS = {"triton": "..backends.triton", "torch": "..backends.torch_shards"}
OPTIONS = (
    "int ignore_index, float label_smoothing, float? softcap, float? logit_scale, float lse_square_scale,"
    " int? first_class, int? num_classes, str? group, str impl"
)
N_OPTIONS = 9
WANTS = "bool entropy, bool argmax"
STATS = "Tensor lse, Tensor target_logprob, Tensor entropy, Tensor argmax"
UPSTREAM = "Tensor? dloss, Tensor? dlse, Tensor? dlogprob, Tensor? dentropy"

library = torch.library.Library("lossfuse", "DEF")
library.define(f"row_loss(Tensor logits, Tensor target, Tensor? class_weight, {OPTIONS}) -> (Tensor loss, Tensor stats)")
library.define(
    "row_grads(Tensor logits, Tensor target, Tensor? class_weight, Tensor stats, Tensor dloss, bool need_dlogits, bool need_dtarget,"
    f" {OPTIONS}) -> (Tensor dlogits, Tensor dtarget)"
)
library.define(
    "row_loss_and_grads(Tensor logits, Tensor target, Tensor? class_weight, Tensor dloss, bool need_dlogits, bool need_dtarget,"
    f" {OPTIONS}) -> (Tensor loss, Tensor dlogits, Tensor dtarget)"
)

library.define(
    f"row_loss_and_grads_(Tensor(a!) logits, Tensor target, Tensor? class_weight, Tensor dloss, bool need_dtarget, {OPTIONS})"
    " -> (Tensor loss, Tensor dtarget)"
)
library.define(
    "row_grads_(Tensor(a!) logits, Tensor target, Tensor? class_weight, Tensor stats, Tensor dloss, bool need_dtarget,"
    f" {OPTIONS}) -> Tensor dtarget"
)
library.define("multiply_(Tensor(a!) t, Tensor factor, str impl) -> ()")
library.define("all_sum(Tensor t, str group) -> Tensor")


def options(spec: LossSpec, impl: str) -> tuple[Any, ...]:
    """A spec and a backend's name as the schemas take them."""
    return (
        spec.ignore_index, spec.label_smoothing, spec.softcap, spec.logit_scale, spec.lse_square_scale,
        spec.first_class, spec.num_classes, spec.group, impl,
    )  # fmt: skip


def register(name: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """What the operator ``name`` computes, and of what shapes and dtypes."""

    @functools.wraps(shapes)
    def traced(*args: Any) -> Any:
        # the group, where rows are cut
        if isinstance(args[-2], str):
            keep_order()
        return shapes(*args)

    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossfuse::{name}", traced, lib=library)


def _keys(*names: str) -> int:
    return functools.reduce(int.__or__, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in names))


# what an operator of ours passes through unchanged if nothing requires grad; not public, as everything about the dispatcher
_PASSED = _keys("BackendSelect", "ADInplaceOrView")
_PASSED |= _keys(*(prefix + device for device in ("CPU", "CUDA", "XPU") for prefix in ("", "Autograd", "Autocast")))


def _leads_to_kernel(args: tuple[Any, ...], tensors: int) -> bool:
    """Whether a call of an operator is a call of its kernel: nobody compiles, differentiates, traces, transforms, watches or wraps."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return False
    operands = args[:tensors]
    if torch._C._has_torch_function(operands) or torch._C._autograd._profiler_enabled():
        return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for t in operands:
        if t is not None:
            keys |= torch._C._dispatch_keys(t).raw_repr()
    return not keys & ~_PASSED


def _entry(name: str, kernel: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The operator ``name``, whose first ``tensors`` arguments are tensors or None, or its kernel."""
    operator = getattr(torch.ops.lossfuse, name).default

    def entry(*args: Any) -> Any:
        return kernel(*args) if _leads_to_kernel(args, tensors) else operator(*args)

    return entry


@functools.cache
def backend(impl: str, cut: bool = False) -> Any:
    """The functions of an implementation, for whole rows or for rows that are cut among the ranks of a group."""
    module = importlib.import_module((_SHARD_BACKENDS if cut else _BACKENDS)[impl], __package__)
    return Sharded(module) if cut else module


def backend_of(options: tuple[Any, ...]) -> Any:
    """As ``options`` name it."""
    return backend(options[-1], options[-2] is not None)


def checked_spec(num_classes: int, target: Tensor, options: tuple[Any, ...]) -> LossSpec:
    spec = loss_spec(*options[:-1])
    # where rows are cut, ranks look together
    if spec.group is None and not target.is_floating_point():
        require_ids_in_range(target, num_classes, spec.ignore_index)
    return spec


def new_grad(t: Tensor, needed: bool) -> Tensor:
    return torch.empty(t.shape if needed else (0,), dtype=t.dtype, device=t.device)


def _new_grads(logits: Tensor, target: Tensor, need_dlogits: bool, need_dtarget: bool) -> tuple[Tensor, Tensor]:
    return new_grad(logits, need_dlogits), new_grad(target, need_dtarget)


def new_loss(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(logits.shape[0], dtype=dtype, device=logits.device)


def _row_loss(logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    spec = checked_spec(logits.shape[1], target, options)
    loss, stats = backend_of(options).row_loss(logits, target, class_weight, spec)
    return loss, stats


def _row_loss_shapes(logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    loss = new_loss(logits)
    n_stats = KEPT_ROWS if options[-2] else 0 if options[-1] == "torch" else 3 if target.is_floating_point() else 2
    return loss, loss.new_empty(n_stats, logits.shape[0])


def _row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    dlogits, dtarget = _new_grads(logits, target, need_dlogits, need_dtarget)
    backend_of(options).row_grads(
        logits,
        target,
        class_weight,
        stats,
        Upstream(dloss),
        loss_spec(*options[:-1]),
        dlogits if need_dlogits else None,
        dtarget if need_dtarget else None,
    )
    return dlogits, dtarget


def _row_grads_shapes(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return _new_grads(logits, target, need_dlogits, need_dtarget)


def _row_loss_and_grads(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, dloss: Tensor, need_dlogits: bool, need_dtarget: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    spec = checked_spec(logits.shape[1], target, options)
    dlogits, dtarget = _new_grads(logits, target, need_dlogits, need_dtarget)
    loss: Tensor = backend_of(options).row_loss_and_grads(
        logits, target, class_weight, dloss, spec, dlogits if need_dlogits else None, dtarget if need_dtarget else None
    )
    return loss, dlogits, dtarget


def _row_loss_and_grads_shapes(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, dloss: Tensor, need_dlogits: bool, need_dtarget: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return new_loss(logits), *_new_grads(logits, target, need_dlogits, need_dtarget)


def _row_loss_and_grads_(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, dloss: Tensor, need_dtarget: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    spec = checked_spec(logits.shape[1], target, options)
    dtarget = new_grad(target, need_dtarget)
    loss: Tensor = backend_of(options).row_loss_and_grads(
        logits, target, class_weight, dloss, spec, logits, dtarget if need_dtarget else None
    )
    return loss, dtarget


def _row_loss_and_grads_shapes_(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, dloss: Tensor, need_dtarget: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    return new_loss(logits), new_grad(target, need_dtarget)


def _row_grads_(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, stats: Tensor, dloss: Tensor, need_dtarget: bool, *options: Any
) -> Tensor:
    dtarget = new_grad(target, need_dtarget)
    spec, wanted = loss_spec(*options[:-1]), dtarget if need_dtarget else None
    backend_of(options).row_grads(logits, target, class_weight, stats, Upstream(dloss), spec, logits, wanted)
    return dtarget


def _row_grads_shapes_(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, stats: Tensor, dloss: Tensor, need_dtarget: bool, *options: Any
) -> Tensor:
    return new_grad(target, need_dtarget)


def _multiply_(t: Tensor, factor: Tensor, impl: str) -> None:
    backend(impl).multiply_in_place(t, factor)


def _multiply_shapes_(t: Tensor, factor: Tensor, impl: str) -> None:
    return None


def _all_sum_shapes(t: Tensor, group: str) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


for _name, _impl, _shapes in (
    ("row_loss", _row_loss, _row_loss_shapes),
    ("row_grads", _row_grads, _row_grads_shapes),
    ("row_loss_and_grads", _row_loss_and_grads, _row_loss_and_grads_shapes),
    ("row_loss_and_grads_", _row_loss_and_grads_, _row_loss_and_grads_shapes_),
    ("row_grads_", _row_grads_, _row_grads_shapes_),
    ("multiply_", _multiply_, _multiply_shapes_),
    ("all_sum", all_sum_over, _all_sum_shapes),
):
    register(_name, _impl, _shapes)

row_loss = _entry("row_loss", _row_loss, 3)
row_grads = _entry("row_grads", _row_grads, 5)
row_loss_and_grads = _entry("row_loss_and_grads", _row_loss_and_grads, 4)
row_loss_and_grads_ = _entry("row_loss_and_grads_", _row_loss_and_grads_, 4)
row_grads_ = _entry("row_grads_", _row_grads_, 5)
multiply_ = _entry("multiply_", _multiply_, 2)
all_sum = torch.ops.lossfuse.all_sum.default
