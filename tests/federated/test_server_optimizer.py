"""The server's optimisers against their formulas, block by block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samv2.common.settings import AggregationSettings
from samv2.federated.server_optimizer import Moments, server_step
from tests.helpers import randn

FEDAVG = AggregationSettings()
FEDAVGM = AggregationSettings(optimizer="fedavgm", learning_rate=0.5, momentum=0.8)
FEDADAM = AggregationSettings(
    optimizer="fedadam", learning_rate=0.1, momentum=0.8, beta2=0.9, epsilon=0.01
)
ALL = [FEDAVG, FEDAVGM, FEDADAM]


def blocks() -> dict[int, Tensor]:
    """Three blocks."""
    return {key: randn(size, seed=key) for key, size in ((0, 4), (3, 7), (8, 5))}


def change(round: int) -> dict[int, Tensor]:
    """What round 1, 2 and 3 send: block 3 always, block 0 in rounds 1 and 3."""
    sent = {0: randn(4, seed=10 + round), 3: randn(7, seed=20 + round)}
    return sent if round != 2 else {3: sent[3]}


def test_fedavg_adds_the_change_bit_for_bit() -> None:
    found, moments = server_step(blocks(), change(1), Moments(), FEDAVG)
    for key, block in blocks().items():
        expected = block + change(1)[key] if key in change(1) else block
        assert torch.equal(found[key], expected)
    assert moments == Moments()


def test_fedavgm_is_the_formula() -> None:
    found, moments = blocks(), Moments()
    for round in (1, 2, 3):
        found, moments = server_step(found, change(round), moments, FEDAVGM)
    a, b, c = (change(round)[3].double() for round in (1, 2, 3))
    m1, m2 = a, 0.8 * a + b
    m3 = 0.8 * m2 + c
    expected = blocks()[3].double() + 0.5 * (m1 + m2 + m3)
    assert torch.allclose(found[3].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(moments.first[3].double(), m3, rtol=1e-5, atol=1e-6)
    assert moments.second == {}


def test_fedadam_is_the_formula() -> None:
    found, moments = blocks(), Moments()
    expected, m, v = blocks()[3].double(), torch.zeros(7).double(), 0.01**2
    for round in (1, 2, 3):
        found, moments = server_step(found, change(round), moments, FEDADAM)
        d = change(round)[3].double()
        m = 0.8 * m + (1 - 0.8) * d
        v = 0.9 * v + (1 - 0.9) * d.square()
        expected = expected + 0.1 * m / (v.sqrt() + 0.01)
    assert torch.allclose(found[3].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(moments.second[3].double(), v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", ALL, ids=lambda item: item.optimizer)
def test_a_block_that_nobody_sent_keeps_value_and_moments(
    settings: AggregationSettings,
) -> None:
    found, moments = server_step(blocks(), change(1), Moments(), settings)
    again, later = server_step(found, change(2), moments, settings)
    assert torch.equal(again[0], found[0]) and torch.equal(again[8], blocks()[8])
    assert 8 not in later.first
    if settings.optimizer != "fedavg":
        assert torch.equal(later.first[0], moments.first[0])
        assert not torch.equal(later.first[3], moments.first[3])


@pytest.mark.parametrize("settings", ALL, ids=lambda item: item.optimizer)
def test_the_learning_rate_scales_the_step(settings: AggregationSettings) -> None:
    start = {key: torch.zeros_like(block) for key, block in blocks().items()}
    once, _ = server_step(start, change(1), Moments(), settings)
    twice = replace(settings, learning_rate=2 * settings.learning_rate)
    found, _ = server_step(start, change(1), Moments(), twice)
    for key in change(1):
        assert torch.equal(found[key], 2 * once[key]) and bool(found[key].any())


@pytest.mark.parametrize("settings", ALL, ids=lambda item: item.optimizer)
def test_arguments_are_not_changed(settings: AggregationSettings) -> None:
    start = blocks()
    new, moments = server_step(start, change(1), Moments(), settings)
    kept = {key: value.clone() for key, value in moments.first.items()}
    server_step(new, change(3), moments, settings)
    assert all(torch.equal(start[key], value) for key, value in blocks().items())
    assert all(torch.equal(moments.first[key], value) for key, value in kept.items())
