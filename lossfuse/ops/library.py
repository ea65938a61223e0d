"""What the operators of the package share: the library, pieces of schemas, backends by name. Torch
only.

Operators live in ``torch.ops.lossfuse``, opaque to compilers, with shapes for tracing. The
functions that lead to them go straight to their kernels where an operator would do nothing but cost
time.

``impl`` names a backend module, imported when it is first called. A gradient that is not needed is
an empty tensor, so that every mode returns as many results."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..spec import LossSpec, loss_spec
from ..targets import require_ids_in_range
from ..vocab_parallel.backend import Sharded, all_sum_over, disable_inductor_reordering

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
library.define("multiply_(Tensor(a!) t, Tensor factor, str impl) -> ()")
library.define("all_sum(Tensor t, str group) -> Tensor")


def options(spec: LossSpec, impl: str) -> tuple[Any, ...]:
    """A spec and a backend's name as the schemas take them."""
    return (
        spec.ignore_index,
        spec.label_smoothing,
        spec.softcap,
        spec.logit_scale,
        spec.lse_square_scale,
        spec.first_class,
        spec.num_classes,
        spec.group,
        impl,
    )


def register(name: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Register the kernel of the operator ``name``, and its results' shapes and dtypes for
    tracing."""

    @functools.wraps(shapes)
    def traced(*args: Any) -> Any:
        # the group, where rows are cut
        if isinstance(args[-2], str):
            disable_inductor_reordering()
        return shapes(*args)

    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossfuse::{name}", traced, lib=library)


def _keys(*names: str) -> int:
    return functools.reduce(
        int.__or__,
        (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in names),
    )


# what an operator of ours passes through unchanged if nothing requires grad; not public, as
# everything about the dispatcher
_PASSED = _keys("BackendSelect", "ADInplaceOrView")
_PASSED |= _keys(
    *(
        prefix + device
        for device in ("CPU", "CUDA", "XPU")
        for prefix in ("", "Autograd", "Autocast")
    )
)


def _leads_to_kernel(args: tuple[Any, ...], tensors: int) -> bool:
    """Return True if no compiler, autograd, tracer, functorch, mode, profiler or subclass needs the
    dispatcher for this call."""
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    ):
        return False
    operands = args[:tensors]
    if torch._C._has_torch_function(operands) or torch._C._autograd._profiler_enabled():
        return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for t in operands:
        if t is not None:
            keys |= torch._C._dispatch_keys(t).raw_repr()
    return not keys & ~_PASSED


def entry(name: str, kernel: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The operator ``name``, whose first ``tensors`` arguments are tensors or None, or its
    kernel."""
    operator = getattr(torch.ops.lossfuse, name).default

    def direct(*args: Any) -> Any:
        return kernel(*args) if _leads_to_kernel(args, tensors) else operator(*args)

    return direct


@functools.cache
def backend(impl: str, cut: bool = False) -> Any:
    """The functions of an implementation, for whole rows or for rows that are cut among the ranks
    of a group."""
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


def new_loss(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(logits.shape[0], dtype=dtype, device=logits.device)


def _multiply_(t: Tensor, factor: Tensor, impl: str) -> None:
    backend(impl).multiply_in_place(t, factor)


def _multiply_shapes_(t: Tensor, factor: Tensor, impl: str) -> None:
    return None


def _all_sum_shapes(t: Tensor, group: str) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


register("multiply_", _multiply_, _multiply_shapes_)
register("all_sum", all_sum_over, _all_sum_shapes)

multiply_ = entry("multiply_", _multiply_, 2)
all_sum = torch.ops.lossfuse.all_sum.default
