"""Watching what operators allocate."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lossfuse.perf.protocol import Step, peak_extra_bytes


def least_peak(call, device):
    """The peak of a call's memory, the least of three, for what earlier tests left to be freed is
    part of one; None if unknown."""
    call()
    peaks = [peak_extra_bytes(Step(call), device) for _ in range(3)]
    return None if None in peaks else min(peaks)


class Largest(TorchDispatchMode):
    """The largest new storage among the results of every operator."""

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
    # wrappers of other tensors, such as DTensor, have none
    return [
        t
        for t in torch.utils._pytree.tree_leaves(tree)
        if type(t) in (torch.Tensor, torch.nn.Parameter)
    ]
