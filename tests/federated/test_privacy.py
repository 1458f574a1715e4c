"""Privacy: what is published, how much noise it has, and what it is worth."""

from __future__ import annotations

import math
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from samv2.common.errors import CheckpointError, FederationError
from samv2.common.settings import Settings
from samv2.federated import privacy
from samv2.federated.privacy import (
    count_rounds,
    epsilon_after,
    gaussian,
    noise_key,
    private_mean,
    trained_numbers,
)
from samv2.updates.aggregate import Contribution
from samv2.updates.packing import Manifest, pack
from tests.federated.runs import EXPERTS, LAYERS, toy_manifest, toy_settings

KEY = bytes(range(32))
GRAPH = (LAYERS, EXPERTS)
QUIET = 1e-12
"""A noise multiplier so small that the mean can be seen."""


def settings_of(*overrides: str, noise: float = QUIET) -> Settings:
    """Private settings of the toy state: eight clients, each asked."""
    return toy_settings(
        f"privacy.noise={noise}",
        "privacy.clip=2.0",
        "edits.rho_max=0",
        "federation.clients=8",
        "train.train_mix=true",
        "experts.chains=true",
        *overrides,
    )


def sent(
    client: int, update: dict[int, Tensor], manifest: Manifest | None = None
) -> Contribution:
    """An update of the first round."""
    frame = pack(update, manifest or toy_manifest(), round=1)
    return Contribution(
        client=client, data=frame, weight=1.0 + client, expert_ids=tuple(update)
    )


def mean_of(
    items: list[Contribution], settings: Settings, key: bytes = KEY, round: int = 1
) -> dict[int, Tensor]:
    """The private mean of the toy state's blocks."""
    return private_mean(
        items, toy_manifest(), settings, round=round, key=key, graph=GRAPH
    ).mean


def test_whole_updates_are_clipped_and_divided_by_the_clients_asked() -> None:
    small, large = torch.full((6,), 0.1), torch.full((6,), 50.0)
    items = [sent(0, {0: small}), sent(5, {0: large, 3: -large})]
    norm = float(torch.cat([large, large]).norm())
    for sampled in (8, 4):
        asked = settings_of(f"federation.clients_per_round={sampled}")
        found = mean_of(items, asked)
        assert torch.allclose(found[0], (small + large * 2 / norm) / sampled)
        assert torch.allclose(found[3], -large * 2 / norm / sampled)
        tighter = mean_of(
            items,
            replace(asked, federation=replace(asked.federation, clip_update_norm=1)),
        )
        assert torch.allclose(tighter[3], -large / norm / sampled)


def test_one_client_moves_the_sum_by_the_clip_norm_at_most() -> None:
    rows = [{0: torch.randn(6) * 10**c, 8: torch.randn(10) * 10**c} for c in range(4)]
    items = [sent(c, row) for c, row in enumerate(rows)]
    with_all, without = mean_of(items, settings_of()), mean_of(
        items[:-1], settings_of()
    )
    moved = torch.cat([with_all[key] - without[key] for key in with_all])
    assert float(moved.norm()) * 8 == pytest.approx(2.0, rel=1e-5)


def test_every_block_gets_noise_whether_or_not_it_was_sent() -> None:
    manifest = Manifest.of({key: torch.zeros(20_000) for key in range(9)})
    item = sent(0, {2: torch.full((20_000,), 1e-4)}, manifest)
    settings = settings_of(noise=1.5)
    made = private_mean([item], manifest, settings, round=1, key=KEY, graph=GRAPH)
    assert sorted(made.mean) == list(range(9)) and made.contributors == {2: (0,)}
    for value in made.mean.values():
        assert value.dtype == torch.float32 and len(set(value.tolist())) > 19_000
        assert float(value.std()) == pytest.approx(1.5 * 2.0 / 8, rel=0.03)
        assert abs(float(value.mean())) < 0.01


def test_nobody_at_all_gives_noise_alone() -> None:
    found = mean_of([], settings_of(noise=1.0))
    assert sorted(found) == list(range(9)) and bool(found[4].all())


def test_noise_is_gaussian_and_independent_between_blocks() -> None:
    values = gaussian(KEY, 3, 200_001).numpy()
    assert values.dtype == np.float64 and len(values) == 200_001
    assert stats.kstest(values, "norm").pvalue > 0.001
    halves = values[:-1].reshape(2, -1)
    other = gaussian(KEY, 4, 200_001).numpy()
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.02
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.02
    assert np.array_equal(values, gaussian(KEY, 3, 200_001).numpy())


def test_noise_repeats_for_the_same_replies_and_for_nothing_else() -> None:
    settings = settings_of(noise=1.0)
    items = [sent(c, {0: torch.full((6,), 0.1 * c)}) for c in range(3)]
    first = mean_of(items, settings)
    again = mean_of(items[::-1], settings)
    assert all(torch.equal(first[key], again[key]) for key in first)
    for other in (
        mean_of(items[:-1], settings),
        mean_of(items, settings, key=KEY[::-1]),
    ):
        assert not any(bool((first[key] == other[key]).any()) for key in first)
    frame = pack({0: torch.full((6,), 0.1)}, toy_manifest(), round=2)
    late = replace(items[0], data=frame)
    early = mean_of([sent(0, {0: torch.full((6,), 0.1)})], settings)
    next_round = mean_of([late], settings, round=2)
    assert not any(bool((early[key] == next_round[key]).any()) for key in early)


@pytest.mark.parametrize(
    "overrides, fixed, assembler",
    [
        ((), [], True),
        (("train.train_mix=false",), [1], True),
        (("experts.chains=false",), [2, 3, 4, 5], True),
        (("experts.chains=false", "train.train_assembler=false"), [2, 3, 4, 5], False),
    ],
)
def test_numbers_that_nobody_trains_are_neither_noised_nor_changed(
    overrides: tuple[str, ...], fixed: list[int], assembler: bool
) -> None:
    settings = settings_of(*overrides, noise=1.0)
    kept = trained_numbers(toy_manifest(), settings, GRAPH)
    found = mean_of([sent(0, {3: torch.ones(6), 8: torch.ones(10)})], settings)
    assert (8 in kept) == (8 in found) == assembler
    for key in range(LAYERS * EXPERTS):
        assert kept[key].logical_not().nonzero().flatten().tolist() == fixed
        assert torch.equal(found[key] != 0, kept[key])
    if assembler:
        assert bool(kept[8].all())


def exact_epsilon(sigma: float, delta: float) -> float:
    """Balle and Wang's Theorem 8, solved for epsilon."""

    def excess(epsilon: float) -> float:
        upper = stats.norm.cdf(0.5 / sigma - epsilon * sigma)
        lower = stats.norm.cdf(-0.5 / sigma - epsilon * sigma)
        return upper - math.exp(epsilon) * lower - delta

    return optimize.brentq(excess, 0, 50)


def test_epsilon_is_the_composed_gaussian_mechanisms() -> None:
    pytest.importorskip("dp_accounting", reason="pip install 'samv2[dp]'")
    for rounds, noise in ((1, 1.0), (10, 4.0), (100, 20.0)):
        expected = exact_epsilon(noise / math.sqrt(rounds), 1e-5)
        found = epsilon_after(rounds, noise=noise, delta=1e-5)
        assert found == pytest.approx(expected, rel=1e-4)
    assert epsilon_after(0, noise=1.0, delta=1e-5) == 0.0
    grows = [epsilon_after(rounds, noise=1.0, delta=1e-5) for rounds in (1, 2, 9)]
    assert grows == sorted(grows) and grows[0] < grows[-1]


def test_rounds_are_counted_by_client() -> None:
    items = [sent(c, {0: torch.ones(6)}) for c in (7, 2)]
    once = count_rounds({2: 4, 5: 1}, items)
    assert once == {2: 5, 5: 1, 7: 1} and list(once) == [2, 5, 7]


@pytest.fixture
def accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has installed the accountant, or so it seems."""
    if privacy.importlib.util.find_spec(privacy.LIBRARY) is None:
        fake = ModuleType(privacy.LIBRARY)
        fake.__spec__ = privacy.importlib.machinery.ModuleSpec(privacy.LIBRARY, None)
        monkeypatch.setitem(sys.modules, privacy.LIBRARY, fake)


@pytest.mark.usefixtures("accountant")
def test_the_key_is_made_once_and_read_by_its_owner_alone(tmp_path: Path) -> None:
    settings = settings_of(noise=1.0)
    key = noise_key(tmp_path, settings, resumed=False)
    assert key is not None and len(set(key)) > 8
    assert stat.S_IMODE((tmp_path / "privacy.key").stat().st_mode) == 0o600
    assert noise_key(tmp_path, settings, resumed=True) == key
    assert noise_key(tmp_path, settings, resumed=False) == key
    other = noise_key(tmp_path / "other", settings, resumed=False)
    assert other != key


@pytest.mark.usefixtures("accountant")
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_run_is_not_resumed_without_its_key(tmp_path: Path, damage: str) -> None:
    if damage == "short":
        (tmp_path / "privacy.key").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="privacy.key holds . bytes.*put it back"):
        noise_key(tmp_path, settings_of(noise=1.0), resumed=True)


def test_without_privacy_there_is_no_key(tmp_path: Path) -> None:
    assert noise_key(tmp_path, toy_settings(), resumed=True) is None
    assert list(tmp_path.iterdir()) == []


def test_without_the_accountant_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "LIBRARY", "no_such_library")
    with pytest.raises(FederationError, match=r"pip install 'samv2\[dp\]'"):
        noise_key(tmp_path, settings_of(noise=1.0), resumed=False)
    assert list(tmp_path.iterdir()) == []
