"""Names of devices."""

from __future__ import annotations

import pytest
import torch

from samv2.common.config import load_settings
from samv2.common.devices import device_named, number_process, take_device
from samv2.common.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """As if there were two GPUs; returns those that became the current one."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_without_gpus_all_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto") == take_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match="sees 0 GPUs"):
            device_named(name)


def test_a_gpu_is_taken_where_there_is_one(gpus: list[torch.device]) -> None:
    assert device_named("auto") == device_named("cuda") == torch.device("cuda:0")
    assert device_named("cpu") == torch.device("cpu") and gpus == []
    assert take_device("cuda:1") == torch.device("cuda:1")
    assert gpus == [torch.device("cuda:1")]
    with pytest.raises(ConfigError, match="'cuda:2'.*sees 2 GPUs"):
        device_named("cuda:2")


def test_processes_side_by_side_take_gpus_in_turn(gpus: list[torch.device]) -> None:
    found = []
    for number in (1, 2, 0):
        number_process(number)
        found.append(str(device_named("auto")))
        assert str(device_named("cuda:0")) == "cuda:0"
    assert found == ["cuda:1", "cuda:0", "cuda:0"]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "CPU", "cuda:-1", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        device_named(name)
    with pytest.raises(ConfigError, match="train.device"):
        load_settings(None, [f"train.device={name}"])
