"""Methods of the benchmark: ours, torch's and installed packages, each with a mean reduction."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lossfuse

from ..ops.chunk_plan import padded
from .cases import DTYPES
from .environment import version
from .mistakes import Mistake

# logits: (logits, target); head: (hidden, weight, target); labels: (logits, dense target, ids)
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """A way to compute the loss; ``make`` imports what it needs."""

    name: str
    op: str
    make: Callable[[], Loss]
    module: str | None = None  # must be importable
    package: str | None = None  # distribution whose version is in the row
    devices: tuple[str, ...] = ("cpu", "cuda")
    consumes: bool = False  # overwrites its logits
    dtypes: tuple[str, ...] = tuple(DTYPES)  # no row in the others

    @property
    def release(self) -> str:
        return f"{self.package} {version(self.package)}" if self.package else ""

    def obstacle(self, device: torch.device) -> str | None:
        """The reason why it cannot run here, or None."""
        if device.type not in self.devices:
            return f"does not run on {device.type}"
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if self.name == "F.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has none"
        return None


def _from(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _upcast_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def _cross_entropy_then_stats(logits: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, target)
    with torch.no_grad():
        logits.logsumexp(1)
        logp = logits.log_softmax(1)
        logp.gather(1, target.clamp(min=0)[:, None])
        (logp.exp() * logp).sum(1)
        logits.argmax(1)
    return loss


def _linear_then_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _linear_then_upcast(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _ours(impl: str, inplace: bool = False) -> Loss:
    return lambda logits, target: lossfuse.cross_entropy(logits, target, inplace=inplace, impl=impl)


def _our_stats(lean: bool = False) -> Loss:
    return lambda logits, target: (
        lossfuse.cross_entropy_stats(logits, target, entropy=not lean, argmax=not lean).loss
    )


def _our_linear(impl: str = "auto", options: lossfuse.LinearOptions | None = None) -> Loss:
    return lambda hidden, weight, target: lossfuse.linear_cross_entropy(
        hidden, weight, target, options=options, impl=impl
    )


def _our_linear_stats(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return lossfuse.linear_cross_entropy_stats(hidden, weight, target).loss


def _swept(rows: int, logits: str, sums: str) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        size = rows * padded(len(weight)) * DTYPES[logits].itemsize
        options = lossfuse.LinearOptions(
            chunk_bytes=size, logits_dtype=DTYPES[logits], acc_dtype=DTYPES[sums]
        )
        return lossfuse.linear_cross_entropy(hidden, weight, target, options=options)

    return loss


def _labels(logits: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target)


def _upcast_labels(logits: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), target.float())


def _scattered_labels(logits: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    ones = torch.zeros_like(logits).scatter_reduce_(
        1, ids.clamp(min=0), (ids >= 0).to(logits.dtype), "amax"
    )
    return F.binary_cross_entropy_with_logits(logits, ones)


def _our_labels(listed: bool = False, inplace: bool = False, impl: str = "auto") -> Loss:
    return lambda logits, target, ids: lossfuse.binary_cross_entropy_with_logits(
        logits, ids if listed else target, inplace=inplace, impl=impl
    )


def _torch_chunked_head() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: F.linear_cross_entropy(
        hidden, weight, target, options=options
    )


def _quack() -> Loss:
    cross_entropy = _from("quack.cross_entropy", "cross_entropy")
    return lambda logits, target: cross_entropy(logits, target, inplace_backward=True)


def _fla_head() -> Loss:
    loss = _from("fla.modules", "FusedLinearCrossEntropyLoss")()
    return lambda hidden, weight, target: loss(hidden, target, weight)


def _cut() -> Loss:
    cut = _from("cut_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, target: cut(hidden, weight, target)


def _liger(name: str) -> Loss:
    return _from("liger_kernel.transformers.functional", name)


GPU = ("cuda",)
# bfloat16 throughout, chunks of 1 GiB and of 256 MiB
LEAN = lossfuse.LinearOptions(
    logits_dtype=torch.bfloat16, acc_dtype=torch.bfloat16, chunk_bytes=1 << 30
)
LEANEST = replace(LEAN, chunk_bytes=256 << 20)
# the gradient of all logits is kept for one product
KEPT = lossfuse.LinearOptions(keep_dlogits=True)
OURS = {"logits": "lossfuse", "head": "lossfuse linear", "labels": "lossfuse"}
BASELINE = {
    "logits": "F.cross_entropy",
    "head": "linear + F.cross_entropy",
    "labels": "F.binary_cross_entropy_with_logits",
}
# in fp16 the gradient of a mean over so many labels underflows
OF_LABELS = ("fp32", "bf16")
METHODS = [
    Method("F.cross_entropy", "logits", lambda: F.cross_entropy),
    Method("F.cross_entropy(x.float())", "logits", lambda: _upcast_cross_entropy),
    Method("torch.compile", "logits", lambda: torch.compile(F.cross_entropy, dynamic=False)),
    Method("lossfuse", "logits", lambda: _ours("auto")),
    Method("lossfuse in place", "logits", lambda: _ours("auto", inplace=True), consumes=True),
    # on a CPU this is "lossfuse"
    Method("lossfuse torch", "logits", lambda: _ours("torch"), devices=GPU),
    Method("lossfuse reference", "logits", lambda: _ours("reference")),
    # the loss with all statistics of rows; lean: without entropy and argmax
    Method("lossfuse stats", "logits", _our_stats),
    Method("lossfuse stats lean", "logits", lambda: _our_stats(lean=True)),
    Method("F.cross_entropy + stats", "logits", lambda: _cross_entropy_then_stats),
    Method(
        "Liger",
        "logits",
        lambda: _liger("liger_cross_entropy"),
        "liger_kernel",
        "liger_kernel",
        GPU,
        consumes=True,
    ),
    Method("quack", "logits", _quack, "quack", "quack-kernels", GPU, consumes=True),
    Method(
        "flash-attention",
        "logits",
        lambda: _from("flash_attn.losses.cross_entropy", "CrossEntropyLoss")(inplace_backward=True),
        "flash_attn",
        "flash_attn",
        GPU,
        consumes=True,
    ),
    Method(
        "fla",
        "logits",
        lambda: _from("fla.modules", "FusedCrossEntropyLoss")(inplace_backward=True),
        "fla",
        "fla-core",
        GPU,
        True,
    ),
    Method("linear + F.cross_entropy", "head", lambda: _linear_then_cross_entropy),
    Method("linear + F.cross_entropy(x.float())", "head", lambda: _linear_then_upcast),
    Method(
        "torch.compile", "head", lambda: torch.compile(_linear_then_cross_entropy, dynamic=False)
    ),
    Method("F.linear_cross_entropy", "head", _torch_chunked_head),
    Method("lossfuse linear", "head", _our_linear),
    Method("lossfuse linear stats", "head", lambda: _our_linear_stats),
    # most CPUs multiply in fp32 and round, which saves less
    Method(
        "lossfuse linear lean",
        "head",
        lambda: _our_linear(options=LEAN),
        devices=GPU,
        dtypes=("bf16",),
    ),
    Method(
        "lossfuse linear leanest",
        "head",
        lambda: _our_linear(options=LEANEST),
        devices=GPU,
        dtypes=("bf16",),
    ),
    Method("lossfuse linear kept", "head", lambda: _our_linear(options=KEPT), devices=GPU),
    # takes 25 times the logits
    Method("lossfuse linear reference", "head", lambda: _our_linear("reference"), devices=("cpu",)),
    Method(
        "Liger",
        "head",
        lambda: _liger("liger_fused_linear_cross_entropy"),
        "liger_kernel",
        "liger_kernel",
        GPU,
    ),
    Method("CCE", "head", _cut, "cut_cross_entropy", "cut-cross-entropy", GPU),
    Method("fla", "head", _fla_head, "fla", "fla-core", GPU),
    Method("F.binary_cross_entropy_with_logits", "labels", lambda: _labels, dtypes=OF_LABELS),
    Method(
        "F.binary_cross_entropy_with_logits(x.float())",
        "labels",
        lambda: _upcast_labels,
        dtypes=OF_LABELS,
    ),
    # for ids that must become a dense target first
    Method(
        "scatter + F.binary_cross_entropy_with_logits",
        "labels",
        lambda: _scattered_labels,
        dtypes=OF_LABELS,
    ),
    Method(
        "torch.compile", "labels", lambda: torch.compile(_labels, dynamic=False), dtypes=OF_LABELS
    ),
    Method("lossfuse", "labels", lambda: _our_labels(), dtypes=OF_LABELS),
    Method(
        "lossfuse in place",
        "labels",
        lambda: _our_labels(inplace=True),
        consumes=True,
        dtypes=OF_LABELS,
    ),
    Method("lossfuse ids", "labels", lambda: _our_labels(listed=True), dtypes=OF_LABELS),
    Method(
        "lossfuse ids in place",
        "labels",
        lambda: _our_labels(listed=True, inplace=True),
        consumes=True,
        dtypes=OF_LABELS,
    ),
    Method("lossfuse reference", "labels", lambda: _our_labels(impl="reference"), dtypes=OF_LABELS),
]

# time against memory of the linear form; only if named
SWEEP = [
    Method(
        f"sweep {rows} rows, logits {logits}, sums {sums}",
        "head",
        partial(_swept, rows, logits, sums),
        dtypes=("bf16",),
    )
    for rows in (1024, 2048, 4096, 8192)
    for logits in ("fp32", "bf16")
    for sums in ("fp32", "bf16")
]


def require(ops: Iterable[str], named: str) -> None:
    """Raise Mistake if no method name contains ``named``."""
    there = {op: list(dict.fromkeys(m.name for m in METHODS if m.op == op)) for op in ops}
    if not any(named.lower() in m.name.lower() for m in METHODS + SWEEP if m.op in there):
        known = "; ".join(f"of {op}: {', '.join(names)}" for op, names in there.items())
        raise Mistake(f"--methods is {named!r} but no method name contains it; there are, {known}")


def of(op: str, device: torch.device, named: str | None = None) -> tuple[list[Method], list[str]]:
    """The methods that can run here, and a line for each that cannot.

    ``named`` selects methods with this in their name, and the baseline."""
    methods, lines = [], []
    for method in METHODS if named is None else METHODS + SWEEP:
        if method.op != op or (
            named is not None
            and named.lower() not in method.name.lower()
            and method.name != BASELINE[op]
        ):
            continue
        obstacle = method.obstacle(device)
        if obstacle is None:
            methods.append(method)
        else:
            lines.append(f"{method.name} ({op}) is skipped: {obstacle}")
    return methods, lines
