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


def _blocks(v: int, widest: int, lanes_per_warp: int) -> LaunchConfig:
    block_v = min(max(128, 1 << (v - 1).bit_length()), widest)
    return LaunchConfig(block_v, max(1, min(8, block_v // lanes_per_warp)))


def statistics_config(v: int) -> LaunchConfig:
    """For a loop over a row: 16 classes a thread, enough bytes in flight with the state of five numbers a lane."""
    return _blocks(v, widest=4096, lanes_per_warp=512)


def gradient_config(v: int) -> LaunchConfig:
    """For one block of a row."""
    return _blocks(v, widest=2048, lanes_per_warp=256)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, which is where triton launches; nothing to do for the interpreter's CPU tensors."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)  # type: ignore[no-any-return]
