"""Memory that operators allocate."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lossfuse.perf.protocol import Step, peak_extra_bytes


def least_peak(call, device):
    """Peak of a call, the least of three because garbage of earlier tests counts, or None."""
    call()
    peaks = [peak_extra_bytes(Step(call), device) for _ in range(3)]
    return None if None in peaks else min(peaks)


class Largest(TorchDispatchMode):
    """The largest storage that an operator allocates for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in _with_memory((args, kwargs))}
        for t in _with_memory(result):
            if t.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


def _with_memory(tree):
    # wrapper tensors such as DTensor have no storage
    return [
        t
        for t in torch.utils._pytree.tree_leaves(tree)
        if type(t) in (torch.Tensor, torch.nn.Parameter)
    ]
