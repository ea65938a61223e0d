"""GPUs as the launch tables see them: family, SMs and memory bandwidth. Plain Python."""

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """A device as the launch tables see it."""

    family: str  # "nvidia", "amd", or the type of the device
    multiprocessors: int  # SMs or compute units
    bandwidth: float  # of its memory, TB/s
    # of ``LaunchConfig.most_registers``: on Blackwell the limit spills four times as much
    limits_registers: bool = False

    @property
    def pressure(self) -> float:
        """Bandwidth of an SM in units of an H100's: bytes in flight must grow with it."""
        return self.bandwidth / self.multiprocessors / (H100.bandwidth / H100.multiprocessors)


A100 = Device("nvidia", 108, 2.04, limits_registers=True)
H100 = Device("nvidia", 132, 3.35, limits_registers=True)
H200 = Device("nvidia", 132, 4.8, limits_registers=True)
B200 = Device("nvidia", 148, 8.0)
RTX_5090 = Device("nvidia", 170, 1.79)
RTX_PRO_6000 = Device("nvidia", 188, 1.79)
RTX_4090 = Device("nvidia", 128, 1.01, limits_registers=True)
MI300X = Device("amd", 304, 5.3)
# by a part of the name that the driver reports. The choices for the H100 were measured with
# prototypes of the kernels; for all others they are predicted from it (``launch.predicted``)
NAMED = {
    "A100": A100,
    "H100": H100,
    "H200": H200,
    "B200": B200,
    "RTX 5090": RTX_5090,
    "RTX PRO 6000": RTX_PRO_6000,
    "RTX 4090": RTX_4090,
    "MI300X": MI300X,
}


@functools.cache
def device_of(device: torch.device) -> Device:
    """The entry of ``NAMED``; otherwise the SMs of the device, each with the bandwidth of one of an
    H100. The interpreter takes the tables of an H100."""
    if device.type == "cpu":
        return H100
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    name = str(getattr(properties, "name", ""))
    for part, known in NAMED.items():
        if part in name:
            return known
    family = device.type
    if family == "cuda":
        family = "amd" if torch.version.hip else "nvidia"
    count = multiprocessors(device)
    limits = family == "nvidia" and getattr(properties, "major", 0) < 10
    bandwidth = count * H100.bandwidth / H100.multiprocessors
    return Device(family, count, bandwidth, limits_registers=limits)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of SMs (or compute units) of the device, which may be a part of a GPU."""
    if device.type == "cpu":
        return 1
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 64))


@functools.cache
def warp_size(device: torch.device) -> int:
    """Lanes of a warp (a wavefront on AMD)."""
    if device.type == "cpu":
        return 32
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "warp_size", 32))
