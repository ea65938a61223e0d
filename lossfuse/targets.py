"""Class ids outside [0, C): who looks, and what is said."""

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
    """Within it, targets are checked on every device, at the price of one synchronisation a call.

    On the CPU they always are. On other devices a target outside ``[0, C)`` that is not
    ``ignore_index`` otherwise gives a NaN loss and gradient for its row, without synchronising.
    With ``shard`` ranks look together, so that all of them raise what one of them finds; within
    this they also compare how many rows they have, so enter it on all ranks or none. It holds for
    the thread or task that enters it, as a context variable does: threads that already run, or that
    it starts (before Python 3.14), enter it themselves.

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
    """Raise IndexError for the first bad row, where looking is free (CPU) or asked for; tensors
    without values are left alone."""
    if not values_are_at_hand(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    # a host read: free on the CPU, asked for by debug_targets elsewhere
    if bool(bad.any()):
        # of a list of ids, the first bad one
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise IndexError(
            f"target of row {at[0]} is {int(target[at])} but input has {num_classes} classes;"
            f" expected an id in [0, {num_classes}) or ignore_index={ignore_index}"
        )


def debugging() -> bool:
    """Whether ``debug_targets`` is active."""
    return _debug.get() and not torch.compiler.is_compiling()


# make_fx and AOTAutograd, without a compiler around them; not public, as everything about modes
_PROXY, _FUNCTIONAL = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
_mode_of, _is_tracing = torch._C._get_dispatch_mode, torch._C._is_tracing


def _traced() -> bool:
    return _is_tracing() or _mode_of(_PROXY) is not None or _mode_of(_FUNCTIONAL) is not None


def values_are_at_hand(t: Tensor) -> bool:
    """Whether its values may be looked at: there are some, and looking is free (CPU) or asked
    for."""
    if (
        torch.compiler.is_compiling()
        or torch_func_active()
        or isinstance(t, FakeTensor)
        or _traced()
    ):
        return False
    return t.device.type != "meta" and (t.device.type == "cpu" or _debug.get())
