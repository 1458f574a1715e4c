"""Names of devices."""

from __future__ import annotations

import pytest
import torch

from samv2.common.config import load_settings
from samv2.common.devices import device_named, take_gpu
from samv2.common.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if there were two GPUs; returns those that became the current one."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_without_gpus_all_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto") == device_named("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match="sees 0 GPUs"):
            device_named(name)
    take_gpu(3)


def test_a_gpu_is_taken_where_there_is_one(gpus: list[int]) -> None:
    assert device_named("auto") == device_named("cuda") == torch.device("cuda")
    assert device_named("cuda:1") == torch.device("cuda:1")
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'cuda:2'.*sees 2 GPUs"):
        device_named("cuda:2")


def test_workers_take_turns(gpus: list[int]) -> None:
    for number in range(3):
        take_gpu(number)
    assert gpus == [0, 1, 0]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "CPU", "cuda:-1", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        device_named(name)
    with pytest.raises(ConfigError, match="train.device"):
        load_settings(None, [f"train.device={name}"])
