"""Where tensors are computed with, by the name that settings give it."""

from __future__ import annotations

import torch

from samv2.common.errors import ConfigError
from samv2.common.settings_checks import DEVICES

_number = 0
"""Of this process among those that work side by side."""


def number_process(number: int) -> None:
    """Say which of several processes side by side this is, from 0: each has its GPU."""
    global _number
    _number = number


def device_named(name: str) -> torch.device:
    """The device that a setting means; ``auto``: a GPU where there is one, else the CPU.

    Of several GPUs, ``auto`` and ``cuda`` mean the process's own: see
    :func:`number_process`.

    Raises:
        ConfigError: no such name, or no such GPU in this process.
    """
    if not DEVICES.fullmatch(name):
        raise ConfigError(
            [f"the device is {name!r}; use one of auto, cpu, cuda, cuda:N"]
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            [
                f"the device is {name!r}, but this process sees {count} GPUs; use auto or "
                "cpu, or look at CUDA_VISIBLE_DEVICES and `samv2 doctor`"
            ]
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", _number % count)
    return device


def take_device(name: str) -> torch.device:
    """:func:`device_named`; a GPU also becomes the one that kernels are launched on.

    Raises:
        ConfigError: as there.
    """
    device = device_named(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
