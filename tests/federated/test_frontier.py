"""Choosing K, drawing the frontier, phases of long work, and calibration windows."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from samv2.common.config import load_settings
from samv2.common.errors import ConfigError, DataError
from samv2.common.settings import Settings
from samv2.configs import config_path
from samv2.federated.frontier_choice import (
    FrontierOptions,
    check_options,
    plan_experts,
    smallest_k_within,
)
from samv2.federated.frontier_plot import _ticks, draw_frontier
from samv2.federated.phases import Phases, duration
from samv2.federated.prepare import unrepaired
from samv2.federated.run_text import calibration_windows
from samv2.models.bootstrap import check_convertible, initial_config
from tests.federated.runs import small_settings
from tests.helpers import tiny_config, tiny_settings


@dataclass(frozen=True)
class Rated:
    experts_per_token: int
    ratio: float | None


@pytest.mark.parametrize(
    "target, expected", [(5.0, 3), (1.5, 3), (1.2, 4), (1.15, 4), (1.01, 8), (1.001, 8)]
)
def test_the_smallest_k_within_a_target(target: float, expected: int) -> None:
    pairs = [(1, None), (2, 9.0), (3, 1.4), (4, 1.15), (8, 1.002)]
    assert smallest_k_within(target, [Rated(*pair) for pair in pairs]) == expected


def planned(flops: float, *overrides: str) -> tuple[int, float]:
    settings = tiny_settings(*overrides)
    found = plan_experts(FrontierOptions(flops=flops), tiny_config(), settings)
    k = found.experts.experts_per_token
    config = initial_config((0, 1, 2), found)
    return k, config.flops_fraction(tiny_config(), k)


def test_flops_give_the_largest_k_that_fits() -> None:
    """D = 64, M = 128, E = 8: an expert is 1/8, the gate 1/48, a repair of rank 4 1/48."""
    for k in range(1, 8):
        cost = k / 8 + 1 / 48 + 1 / 48
        chosen, found = planned(cost + 1e-9)
        assert (chosen, found) == (k, pytest.approx(cost))
        if k > 1:
            assert planned(cost - 1e-9)[0] == k - 1
    assert planned(1.021)[0] == 8


def test_flops_count_dense_layers_and_say_the_least() -> None:
    with pytest.raises(ConfigError, match=r"had is 0\.723 \(K = 1 in 1 of 3 layers\)"):
        planned(0.7, "experts.layers=1")
    settings = tiny_settings("experts.layers=1")
    options = FrontierOptions(flops=0.723)
    assert plan_experts(options, tiny_config(), settings).experts.experts_per_token == 1


def test_a_target_tries_several_k_once_each() -> None:
    options = FrontierOptions(target_ppl_ratio=1.3)

    def tried(*overrides: str) -> tuple[int, ...]:
        settings = tiny_settings("experts.num_experts=16", *overrides)
        return plan_experts(options, tiny_config(), settings).experts.other_k

    assert tried() == (2, 8, 12)
    assert tried("experts.other_k=3,8") == (2, 3, 8, 12)
    assert tried("experts.num_shared=4") == (8, 12)
    assert tried("experts.experts_per_token=16") == (2, 4, 8, 12)


def test_without_options_settings_stay() -> None:
    settings = tiny_settings()
    assert plan_experts(FrontierOptions(), tiny_config(), settings) is settings


def test_all_faults_of_the_options_are_named() -> None:
    options = FrontierOptions(flops=0.5, target_ppl_ratio=1.0)
    with pytest.raises(ConfigError) as caught:
        check_options(options, tiny_settings("experts.repair=false"))
    assert len(caught.value.faults) == 3


def test_the_shipped_frontier_config_fits_smollm2() -> None:
    settings = load_settings(config_path("frontier"))
    config = tiny_config(hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    layers = check_convertible(config, settings)
    assert layers == tuple(range(1, 30))
    made = initial_config(layers, settings)
    assert made.repaired == (14, 30, 61) and made.num_experts == 128
    needed = settings.experts.calibration_tokens / len(settings.data.domains)
    assert settings.data.calibration_bytes > 4 * needed


def test_the_default_calibration_text_is_long_enough() -> None:
    """About four bytes a token, and half of the text to spare for spreading."""
    settings = Settings()
    tokens = settings.experts.calibration_tokens / len(settings.data.domains)
    assert settings.data.calibration_bytes >= 2 * 4 * tokens


def test_a_k_without_repair_is_named() -> None:
    config = initial_config((0, 1, 2), tiny_settings("experts.other_k=6"))
    folder = Path("graph")

    def warning(k: int) -> str | None:
        asked = small_settings("graph", f"experts.experts_per_token={k}")
        return unrepaired(folder, config, asked)

    assert [k for k in range(1, 9) if warning(k) is None] == [4, 6, 8]
    assert "sound at K = 4, 6, 8" in (warning(5) or "")
    softmax = initial_config((0,), tiny_settings("experts.combine=softmax"))
    assert unrepaired(folder, softmax, small_settings("graph")) is None


def drawn(path: Path) -> set[tuple[int, ...]]:
    pixels = (imread(path)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape == (630, 960, 3)
    return set(map(tuple, pixels.reshape(-1, 3)))


def test_the_picture_shows_both_lines(tmp_path: Path) -> None:
    points = [(2, 0.3, 3.0), (4, 0.5, 1.4), (8, 1.02, 1.0)]
    lines = {"one": points, "other": [(k, x, y * 1.2) for k, x, y in points]}
    draw_frontier(tmp_path / "both.png", lines)
    colours = drawn(tmp_path / "both.png")
    assert {(0x1F, 0x5F, 0xA8), (0xD1, 0x66, 0x1C), (255, 255, 255)} <= colours
    draw_frontier(tmp_path / "again.png", lines)
    same = (tmp_path / "again.png").read_bytes()
    assert same == (tmp_path / "both.png").read_bytes()


@pytest.mark.parametrize(
    "ratios",
    [(None, None), (math.inf, math.nan), (1.0, 1.0), (1e30, 1.0), (0.2, None)],
)
def test_a_picture_of_odd_values_does_not_fail(
    ratios: tuple[float | None, float | None], tmp_path: Path
) -> None:
    line = [(k, k / 8, ratio) for k, ratio in zip((4, 8), ratios)]
    draw_frontier(tmp_path / "odd.png", {"one": line})
    assert len(drawn(tmp_path / "odd.png")) > 10


@given(st.floats(0.5, 1.0), st.floats(1.02, 1e12))
def test_ticks_are_apart_and_hold_one(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 1.0 in ticks and ticks == sorted(ticks) and len(ticks) <= 13
    gaps = [right / left for left, right in zip(ticks, ticks[1:])]
    assert all(gap >= (high / low) ** (1 / 12) * (1 - 1e-9) for gap in gaps)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_are_timed_and_told_where_there_is_no_terminal() -> None:
    clock, text = Clock(), io.StringIO()
    with Phases(Console(file=text, width=80), clock=clock) as phases:
        phases.start("Reading")
        clock.now = 5
        phases.start("Converting layers", total=30, done=10)
        for done in range(11, 31):
            clock.now += 12
            phases.advance(done, 30)
    assert phases.seconds == {"Reading": 5, "Converting layers": 240}
    lines = text.getvalue().splitlines()
    assert lines[:3] == [
        "Reading ...",
        "Converting layers ...",
        "  13 of 30, about 3 min left",
    ]
    assert len(lines) == 2 + 6


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_calibration_windows_are_spread_over_each_domain() -> None:
    streams = {"a": torch.arange(1005), "b": 5000 + torch.arange(100)}
    found = calibration_windows(streams, total_tokens=100, length=10)
    assert found.shape == (10, 10) and found.dtype == torch.int64
    assert found[:5, 0].tolist() == [0, 240, 490, 740, 990]
    assert found[5:, 0].tolist() == [5000, 5020, 5040, 5060, 5090]
    assert torch.equal(found, found[:, :1] + torch.arange(10))
    again = calibration_windows(streams, total_tokens=100, length=10)
    assert torch.equal(found, again)


def test_a_domain_with_less_text_gives_all_it_has() -> None:
    streams = {"a": torch.arange(1000), "b": torch.arange(35), "c": torch.arange(9)}
    found = calibration_windows(streams, total_tokens=150, length=10)
    assert len(found) == 5 + 3
    assert found[5:, 0].tolist() == [0, 10, 20]
    with pytest.raises(DataError, match="no domain has 10 tokens of calibration text"):
        calibration_windows({"c": torch.arange(9)}, 150, 10)
