"""Class ids outside [0, C): where they raise, and ``debug_targets``."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .inputs import torch_func_active

_debug: ContextVar[bool] = ContextVar("lossfuse_debug_targets", default=False)


@contextmanager
def debug_targets() -> Iterator[None]:
    """Check targets on every device, at the cost of one synchronization per call.

    On a CPU they are always checked. On other devices a target outside ``[0, C)`` that is not
    ``ignore_index`` otherwise gives a NaN loss and gradient for its row, without synchronizing.
    With ``shard`` the ranks compare their calls, so that all of them raise the same error; they
    also compare their numbers of rows, so enter it on all ranks or on none. It applies to the
    thread or task that enters it, as a context variable does: other threads, even those it starts
    (before Python 3.14), enter it themselves.

    Raises:
        IndexError: inside, naming the first bad row.
    """
    before = _debug.get()
    try:
        _debug.set(True)
        yield
    finally:
        _debug.set(before)


def require_ids_in_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise IndexError for the first bad row, if ``values_are_readable``."""
    if not values_are_readable(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if bool(bad.any()):
        # ids of labels are (N, P): two indices
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise IndexError(
            f"target of row {at[0]} is {int(target[at])} but input has {num_classes} classes;"
            f" expected an id in [0, {num_classes}) or ignore_index={ignore_index}"
        )


def debugging() -> bool:
    """True within ``debug_targets``, unless a compiler traces."""
    return _debug.get() and not torch.compiler.is_compiling()


# make_fx and AOTAutograd without a compiler around them; private API
_PROXY, _FUNCTIONAL = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
_mode_of, _is_tracing = torch._C._get_dispatch_mode, torch._C._is_tracing


def _traced() -> bool:
    return _is_tracing() or _mode_of(_PROXY) is not None or _mode_of(_FUNCTIONAL) is not None


def values_are_readable(t: Tensor) -> bool:
    """True if ``t`` has values, and reading them needs no synchronization (CPU) or
    ``debug_targets`` allows it."""
    if (
        torch.compiler.is_compiling()
        or torch_func_active()
        or isinstance(t, FakeTensor)
        or _traced()
    ):
        return False
    return t.device.type != "meta" and (t.device.type == "cpu" or _debug.get())
