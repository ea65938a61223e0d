"""torch's functions by what they need of lazy logits: metadata, a layout, a gradient, a write.

Handlers of functions that are recorded or fused register in ``HANDLERS``."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

T = Tensor
# answered by the wrapper, which has no storage
_ATTRIBUTES = """
    shape dtype device ndim layout itemsize nbytes requires_grad is_leaf grad_fn grad retains_grad
    _version _base output_nr name names is_cuda is_cpu is_mps is_xpu is_xla is_mtia is_ipu is_maia
    is_vulkan is_meta is_nested is_quantized is_sparse is_sparse_csr is_mkldnn
"""
_METHODS = """
    size dim numel nelement ndimension element_size get_device __len__ is_floating_point is_complex
    is_inference has_names
"""
# also of logits that were materialized
IDENTITY = {T.__hash__}
METADATA = {
    # which attributes there are depends on the version of torch
    *(getattr(T, name).__get__ for name in _ATTRIBUTES.split() if hasattr(T, name)),
    *(getattr(o, name) for name in _METHODS.split() for o in (T, torch) if hasattr(o, name)),
    *IDENTITY,
}
# need the strides that the logits would have
LAYOUT = {T.stride, T.is_contiguous, T.storage_offset, T._is_view, T.dim_order}
# need only dtype and device of their first argument
DTYPE_AND_DEVICE = {
    *(
        getattr(T, f"new_{name}")
        for name in ["zeros", "ones", "empty", "full", "tensor", "empty_strided"]
    ),
    *(T.is_conj, T.is_neg, T.is_signed, T.is_shared, T.is_pinned),
    *(torch.is_conj, torch.is_neg, torch.is_signed),
}
# need everything but values
SHAPE_AND_LAYOUT = {
    *(
        getattr(torch, f"{name}_like")
        for name in ["zeros", "ones", "empty", "full", "rand", "randn", "randint"]
    ),
    *(torch.result_type, torch.is_same_size, T.is_same_size),
}
GRADIENTS = {torch.autograd.grad, torch.autograd.backward}
GRADIENT_HOOKS = {T.register_hook, T.retain_grad, T.register_post_accumulate_grad_hook}
# names of functions that write or return a handle to memory, besides those that end with one
# underscore
WRITES = {
    *(
        f"__i{name}__"
        for name in [
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "and",
            "or",
            "xor",
            "lshift",
            "rshift",
        ]
    ),
    *["__setitem__", "__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__"],
    *["data", "data_ptr", "numpy", "storage", "untyped_storage", "_typed_storage"],
}
# function -> (handler, signature of the handler). A handler returns lazy logits, a result, or
# NotImplemented
HANDLERS: dict[Any, tuple[Callable[..., Any], inspect.Signature]] = {}


def handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler of functions of torch."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(handler)
        for function in functions:
            HANDLERS[function] = handler, signature
        return handler

    return register


def handler_of(func: Any, args: Any, kwargs: Any) -> Callable[..., Any] | None:
    """Return the handler of a call, or None if there is none with such arguments."""
    handler, signature = HANDLERS.get(func, (None, None))
    if handler is None or signature is None:
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return None
    return handler


def name_of(func: Any) -> str:
    """Return the name of a function, or of the attribute that it reads or sets."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return str(name)
