"""Shared by all operators: the library, options by name, the backend.

Operators live in ``torch.ops.lossfuse``. They are opaque to compilers and have fake kernels for
tracing. The functions ``entry`` returns skip the dispatcher where nothing traces, records or
differentiates the call, because the dispatcher takes longer than a small kernel.

An operator returns the same number of tensors in every mode: a gradient that is not needed is an
empty tensor."""

import functools
import importlib
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import LossSpec, loss_spec
from ..targets import require_ids_in_range
from ..vocab_parallel.backend import Sharded, all_sum_over, disable_inductor_reordering

_BACKENDS = {"triton": "..backends.triton", "torch": "..backends.torch_rows"}
# for rows whose classes are sharded across ranks
_SHARD_BACKENDS = {"triton": "..backends.triton", "torch": "..backends.torch_shards"}
# the schema of ``OpArgs``
OPTIONS = (
    "int ignore_index, float label_smoothing, float? softcap, float? logit_scale,"
    " float lse_square_scale, int? first_class, int? num_classes, str? group, str impl"
)
WANTS = "bool entropy, bool argmax"
STATS = "Tensor lse, Tensor target_logprob, Tensor entropy, Tensor argmax"
UPSTREAM = "Tensor? dloss, Tensor? dlse, Tensor? dlogprob, Tensor? dentropy"

library = torch.library.Library("lossfuse", "DEF")
library.define("multiply_(Tensor(a!) t, Tensor factor, str impl) -> ()")
library.define("all_sum(Tensor t, str group) -> Tensor")


class OpArgs(NamedTuple):
    """The last arguments of every operator of rows: a ``LossSpec`` and the name of a backend."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    logit_scale: float | None
    lse_square_scale: float
    first_class: int | None
    num_classes: int | None
    group: str | None
    impl: str

    @classmethod
    def of(cls, spec: LossSpec, impl: str) -> "OpArgs":
        return cls(
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

    @property
    def spec(self) -> LossSpec:
        *options, _ = self
        return loss_spec(*options)

    @property
    def backend(self) -> Any:
        """The module that computes rows, or ``Sharded`` of it."""
        return backend(self.impl, self.group is not None)

    def checked_spec(self, num_classes: int, target: Tensor) -> LossSpec:
        """The spec, after a look at the ids where their values can be read."""
        spec = self.spec
        # with shards, all ranks raise together, in the backend
        if spec.group is None and not target.is_floating_point():
            require_ids_in_range(target, num_classes, spec.ignore_index)
        return spec


def grouped(args: Iterable[Any], *groups: Any) -> list[Any]:
    """Group the flat arguments of an operator by name: one NamedTuple after the other takes as many
    as it has fields."""
    flat = iter(args)
    return [group(*islice(flat, len(group._fields))) for group in groups]


def no_grads(*groups: Any) -> tuple[None, ...]:
    """The gradients of arguments that are no tensors."""
    return (None,) * sum(len(group._fields) for group in groups)


def register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the kernel of the operator ``name`` and a fake one, which returns tensors of the
    same shapes and dtypes without computing them.

    Where an operator has a group of ranks, it is the last argument but one, as in ``OpArgs``."""

    @functools.wraps(fake)
    def traced(*args: Any) -> Any:
        *_, group, _ = args
        if isinstance(group, str):
            disable_inductor_reordering()
        return fake(*args)

    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossfuse::{name}", traced, lib=library)


def _keys(*names: str) -> int:
    return functools.reduce(
        int.__or__,
        (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in names),
    )


# dispatch keys that do nothing to an operator of ours if nothing requires grad. The dispatcher has
# no public interface
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
    """Return a function that calls the kernel of the operator ``name`` without the dispatcher where
    that is possible. Its first ``tensors`` arguments are tensors or None."""
    operator = getattr(torch.ops.lossfuse, name).default

    def direct(*args: Any) -> Any:
        return kernel(*args) if _leads_to_kernel(args, tensors) else operator(*args)

    return direct


@functools.cache
def backend(impl: str, sharded: bool = False) -> Any:
    """Import the functions that compute rows, on first use; rows may be sharded across ranks."""
    modules = _SHARD_BACKENDS if sharded else _BACKENDS
    module = importlib.import_module(modules[impl], __package__)
    return Sharded(module) if sharded else module


def new_grad(t: Tensor, needed: bool) -> Tensor:
    return torch.empty(t.shape if needed else (0,), dtype=t.dtype, device=t.device)


def new_loss(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(logits.shape[0], dtype=dtype, device=logits.device)


def _multiply_(t: Tensor, factor: Tensor, impl: str) -> None:
    backend(impl).multiply_in_place(t, factor)


def _multiply_fake_(t: Tensor, factor: Tensor, impl: str) -> None:
    return None


def _all_sum_fake(t: Tensor, group: str) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


register("multiply_", _multiply_, _multiply_fake_)
register("all_sum", all_sum_over, _all_sum_fake)

multiply_ = entry("multiply_", _multiply_, 2)
all_sum = torch.ops.lossfuse.all_sum.default
