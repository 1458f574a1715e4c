"""Where tensors are computed with, by the name that settings give it."""

from __future__ import annotations

import torch

from samv2.common.errors import ConfigError
from samv2.common.settings_checks import DEVICES


def device_named(name: str) -> torch.device:
    """The device that a setting means; ``auto``: a GPU where there is one, else the CPU.

    ``cuda`` without a number is the process's current GPU.

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
    return device


def take_gpu(number: int) -> None:
    """Make a GPU the process's current one: the ``number``-th, counted round and round."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
