"""``impl`` -> implementation. A name is obeyed or raises; only "auto" chooses."""

import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..inputs import HeadRows, Rows, torch_func_active

IMPLS = ("auto", "triton", "torch", "reference")
# device types Triton compiles for; ROCm calls itself cuda
TRITON_DEVICES = ("cuda", "xpu")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# torch.jit.trace warns about each comparison of shapes; in this package they decide whether to
# raise, not what is computed
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"lossfuse\.")  # type: ignore[attr-defined]


def _interpreter_obstacle() -> str | None:
    """Triton's interpreter made numbers of arrays, until 3.7, in a way that numpy has given up in
    2.4."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        # builds of other names, of versions of their own
        return None
    old = tuple(map(int, triton.split(".")[:2])) < (3, 7) and tuple(
        map(int, numpy.split(".")[:2])
    ) >= (2, 4)
    return (
        f"the interpreter of triton {triton} needs numpy < 2.4, and numpy is {numpy}"
        if old
        else None
    )


# a compiler cannot ask
INTERPRETER_OBSTACLE = _interpreter_obstacle()


def pick(impl: str, rows: Rows | HeadRows) -> str:
    """The implementation for these rows: triton, torch or reference."""
    _require_known(impl)
    if impl == "reference":
        return impl
    beyond = _beyond_the_fast_paths(rows.weights, *rows.operands, rows.target)
    if impl == "auto":
        # the interpreter is for those who ask for it by name
        compiled = rows.input.device.type in TRITON_DEVICES and not _triton_obstacle(
            rows.input, rows.target
        )
        # what is recorded is run where this package need not be installed
        recorded = rows.shard is None and (torch.compiler.is_exporting() or is_jit_tracing())
        return "reference" if beyond or recorded else "triton" if compiled else "torch"
    _require_none(
        impl, beyond or (_triton_obstacle(rows.input, rows.target) if impl == "triton" else None)
    )
    return impl


def pick_log_softmax(impl: str, input: Tensor) -> str:
    """The implementation of ``log_softmax``.

    "auto" takes the kernel where its gradient is more accurate: on a GPU, for half-precision input
    that requires grad. torch's backward computes the probabilities from the rounded
    log-probabilities, the kernel's from the logits. Under autocast torch returns float32, which is
    accurate too, and elsewhere torch's operator supports more: tensor subclasses, ``torch.func``,
    forward mode, export.
    """
    _require_known(impl)
    if impl == "auto":
        device = input.device.type
        rounded = input.dtype in (torch.bfloat16, torch.float16)
        differentiated = input.requires_grad and torch.is_grad_enabled()
        if not (rounded and differentiated and device in TRITON_DEVICES):
            return "torch"
        plain = not (
            is_traceable_wrapper_subclass(input)
            or torch.is_autocast_enabled(device)
            or torch.compiler.is_exporting()
            or is_jit_tracing()
        )
        supported = not (_beyond_the_fast_paths({}, input) or _triton_obstacle(input, None))
        return "triton" if plain and supported else "torch"
    if impl == "triton":
        _require_none(impl, _beyond_the_fast_paths({}, input) or _triton_obstacle(input, None))
    return impl


def _require_known(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(
            f"impl is {impl!r} but must be one of 'auto', 'triton', 'torch', 'reference'"
        )


def _require_none(impl: str, obstacle: str | None) -> None:
    if obstacle:
        raise ValueError(
            f"impl={impl!r} cannot run here: {obstacle}; impl='auto' picks one that can"
        )


def forms_gradient_in_forward(
    backend: str, rows: Rows, reduction: str, divisor: Tensor | None, consume: bool
) -> bool:
    """Whether loss and gradient are made in one eager pass: where one number scales all rows and is
    known in the forward.

    On a CPU, where a block is still in cache; elsewhere for logits that are consumed, so that no
    gradient waits for its backward."""
    if reduction == "none" or not (
        consume or (backend == "torch" and rows.logits.device.type == "cpu")
    ):
        return False
    if not makes_graph(rows):
        return False
    # an fp16 gradient must see a loss scaler's factor before it is rounded, or it underflows
    if rows.logits.dtype == torch.float16 or (rows.soft and rows.target.dtype == torch.float16):
        return False
    # somebody decides what is kept until the backward (checkpointing, offloading), and a formed
    # gradient would escape them
    if _saved_tensors_hooks_active():
        return False
    return divisor is None or not (divisor.requires_grad or _has_tangent(divisor))


def makes_graph(rows: Rows) -> bool:
    """Whether an eager call is to be differentiated."""
    wanted = rows.logits.requires_grad or rows.target.requires_grad
    return wanted and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def wanted_of_head(rows: HeadRows) -> tuple[bool, bool, bool, bool]:
    """Which of hidden states, weight, bias and probabilities get a gradient."""
    if not torch.is_grad_enabled():
        return False, False, False, False
    bias = rows.linear_bias is not None and rows.linear_bias.requires_grad
    return (
        rows.input.requires_grad,
        rows.linear_weight.requires_grad,
        bias,
        rows.target.requires_grad,
    )


def known_in_forward(rows: HeadRows, divisor: Tensor | None) -> bool:
    """Whether one number, known in the forward, scales all rows, and no gradient is rounded before
    it has seen a loss scaler's."""
    if rows.target.requires_grad and rows.target.dtype == torch.float16:
        return False
    return divisor is None or not (divisor.requires_grad or _has_tangent(divisor))


def writes_in_place(backend: str) -> bool:
    """Whether a call may write over its logits here: nobody plans memory around it or keeps what it
    saved."""
    traced = torch.compiler.is_compiling() or is_jit_tracing()
    return backend != "reference" and not traced and not _saved_tensors_hooks_active()


def _beyond_the_fast_paths(
    weights: Mapping[str, Tensor | None], *operands: Tensor | None
) -> str | None:
    """Why only the reference, which is made of torch's own operators, can differentiate this
    call."""
    for name, weight in weights.items():
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
            return f"{name} requires grad, and its gradient is only in the reference"
    if torch_func_active():
        return "a torch.func transform is active"
    if tangents_possible() and any(
        t is not None and _has_tangent(t) for t in (*operands, *weights.values())
    ):
        return "an argument carries a forward-mode tangent"
    return None


def is_jit_tracing() -> bool:
    """Return True if ``torch.jit.trace`` records the call, as the exporter to ONNX that builds on
    it does."""
    return not torch.compiler.is_compiling() and bool(torch._C._is_tracing())


def tangents_possible() -> bool:
    # a compiler, which cannot look at a tensor, knows this much
    return torch.autograd.forward_ad._current_level >= 0


def _has_tangent(t: Tensor) -> bool:
    if not tangents_possible():
        return False
    return (
        torch.compiler.is_compiling()
        or torch.autograd.forward_ad.unpack_dual(t).tangent is not None
    )


def _saved_tensors_hooks_active() -> bool:
    # not public; came with torch 2.8
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _triton_obstacle(input: Tensor, target: Tensor | None) -> str | None:
    device = input.device.type
    if input.dtype == torch.float64:
        return "the kernels compute in float32 and input is float64"
    if target is not None and target.dtype == torch.float64:
        return "the kernels compute in float32 and target is float64"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device in TRITON_DEVICES and interpreted:
        return f"TRITON_INTERPRET=1 makes Triton an interpreter, which is for CPU tensors, and input is on {device}"
    if device not in TRITON_DEVICES and not (device == "cpu" and interpreted):
        hint = (
            " (for Triton's interpreter set TRITON_INTERPRET=1 before the first import)"
            if device == "cpu"
            else ""
        )
        return f"Triton does not run on {device} tensors{hint}"
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    return INTERPRETER_OBSTACLE if device == "cpu" else None
