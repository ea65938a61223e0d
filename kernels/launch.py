"""How kernels are launched: block widths as data, and the device guard. Plain Python."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LaunchConfig:
    """Classes per block and warps per program."""

    block_v: int
    num_warps: int


def row_blocks(v: int) -> LaunchConfig:
    """8 classes a thread, 16 bytes of bf16: wider blocks spill in the statistics loops on sm_80 to sm_100 (triton 3.7.1)."""
    block_v = min(max(128, 1 << (v - 1).bit_length()), 2048)
    return LaunchConfig(block_v, max(1, block_v // 256))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, which is where triton launches; nothing to do for the interpreter's CPU tensors."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
