"""``impl`` -> implementation, and whether its forward forms the gradient. Only "auto" chooses; an
implementation asked for by name runs or raises."""

import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..inputs import HeadRows, Rows, Targets, torch_func_active
from ..ops.head_chunks import Needs
from .implementations import REFERENCE, TORCH, TRITON, Operators, differentiates

IMPLS = ("auto", "triton", "torch", "reference")
# device types Triton compiles for; ROCm calls itself cuda
TRITON_DEVICES = ("cuda", "xpu")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# torch.jit.trace warns about each comparison of shapes; in this package they decide whether to
# raise, not what is computed
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"lossfuse\.")  # type: ignore[attr-defined]


def _interpreter_obstacle() -> str | None:
    """Before triton 3.7 the interpreter converts arrays to scalars in a way that numpy 2.4
    refuses."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        # a build of Triton under another name, with versions of its own
        return None
    old = tuple(map(int, triton.split(".")[:2])) < (3, 7) and tuple(
        map(int, numpy.split(".")[:2])
    ) >= (2, 4)
    return (
        f"the interpreter of triton {triton} needs numpy < 2.4, and numpy is {numpy}"
        if old
        else None
    )


# computed here, because a compiler cannot trace the question
INTERPRETER_OBSTACLE = _interpreter_obstacle()


def pick(impl: str, rows: Rows | HeadRows) -> Operators:
    """Return the implementation for these rows."""
    _require_known(impl)
    reference_only = _reason_for_reference(rows.weights, *rows.operands, rows.target)
    if impl == "reference" or (impl == "auto" and reference_only):
        _refuse_shard(rows, reference_only)
        return REFERENCE
    if impl == "auto":
        # a recorded program runs where this package need not be installed
        if rows.shard is None and (torch.compiler.is_exporting() or is_jit_tracing()):
            return REFERENCE
        # Triton's interpreter is for those who ask for it by name
        on_device = rows.input.device.type in TRITON_DEVICES
        return TRITON if on_device and not _triton_obstacle(rows.input, rows.target) else TORCH
    obstacle = _triton_obstacle(rows.input, rows.target) if impl == "triton" else None
    _raise_if_obstacle(impl, reference_only or obstacle)
    return TRITON if impl == "triton" else TORCH


def _refuse_shard(rows: Rows | HeadRows, reason: str | None) -> None:
    if rows.shard is not None:
        needs = f"{reason}; with" if reason else "impl is 'reference' but with"
        raise ValueError(
            f"{needs} shard there is no reference: pass the logits or the head of all classes"
        )


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
        supported = not (_reason_for_reference({}, input) or _triton_obstacle(input, None))
        return "triton" if plain and supported else "torch"
    if impl == "triton":
        _raise_if_obstacle(impl, _reason_for_reference({}, input) or _triton_obstacle(input, None))
    return impl


def _require_known(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(
            f"impl is {impl!r} but must be one of 'auto', 'triton', 'torch', 'reference'"
        )


def _raise_if_obstacle(impl: str, obstacle: str | None) -> None:
    if obstacle:
        raise ValueError(
            f"impl={impl!r} cannot run here: {obstacle}; impl='auto' picks one that can"
        )


def forms_gradient_in_forward(
    implementation: Operators,
    rows: Rows,
    reduction: str,
    divisor: Tensor | None,
    consume: bool,
    *,
    statistics: bool = False,
) -> bool:
    """Return True if the forward computes loss and gradient in one pass: one number that is known
    there scales all rows.

    With Triton against class ids, one read and one write of the logits instead of two reads and a
    write; with torch on a CPU, where a block of rows is still in cache; and for logits that are
    consumed. The kernels of ``statistics`` and of probabilities have no such pass."""
    one_pass = implementation is TRITON and not statistics and not rows.soft
    one_pass |= implementation is TORCH and rows.logits.device.type == "cpu"
    if reduction == "none" or not (consume or one_pass) or not differentiates(rows):
        return False
    # the gradient of fp16 must be multiplied by the loss scale before it is rounded, or it
    # underflows
    if rows.logits.dtype == torch.float16 or (rows.soft and rows.target.dtype == torch.float16):
        return False
    # checkpointing and offloading decide what is saved until the backward, and would not see a
    # gradient that is already there
    if _saved_tensors_hooks_active() or differentiates_row_weight(rows):
        return False
    return divisor is None or not (divisor.requires_grad or _has_tangent(divisor))


def head_needs(rows: HeadRows) -> Needs:
    """Return which tensors of a head require grad."""
    if not torch.is_grad_enabled():
        return Needs(False, False, False, False)
    return Needs(
        hidden=rows.input.requires_grad,
        weight=rows.linear_weight.requires_grad,
        bias=rows.linear_bias is not None and rows.linear_bias.requires_grad,
        target=rows.target.requires_grad,
    )


def scale_is_known(rows: HeadRows, divisor: Tensor | None) -> bool:
    """Return True if the forward knows the number that scales all rows, and no gradient would be
    rounded to fp16 before it is multiplied by a loss scale."""
    if rows.target.requires_grad and rows.target.dtype == torch.float16:
        return False
    if differentiates_row_weight(rows):
        return False
    return divisor is None or not (divisor.requires_grad or _has_tangent(divisor))


def differentiates_row_weight(rows: Targets) -> bool:
    """Return True if autograd needs the loss of each row, the derivative with respect to its
    weight."""
    row_weight = rows.row_weight
    if row_weight is None:
        return False
    return (row_weight.requires_grad and torch.is_grad_enabled()) or _has_tangent(row_weight)


def may_write_in_place(implementation: Operators, input: Tensor) -> bool:
    """Return True if this call may overwrite its logits by their gradient: there is one, no
    compiler plans memory around the call, and no hook keeps what it saves."""
    differentiated = input.requires_grad and torch.is_grad_enabled()
    if not differentiated or implementation is REFERENCE:
        return False
    traced = torch.compiler.is_compiling() or is_jit_tracing()
    return not traced and not _saved_tensors_hooks_active()


def _reason_for_reference(
    weights: Mapping[str, Tensor | None], *operands: Tensor | None
) -> str | None:
    """Return why only torch's own operators can differentiate this call, or None."""
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
    # a compiler cannot look at a tensor, but it knows this
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
        return (
            "TRITON_INTERPRET=1 makes Triton an interpreter, which is for CPU tensors, and input is"
            f" on {device}"
        )
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
