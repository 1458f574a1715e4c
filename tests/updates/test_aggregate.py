"""Sparse FedAvg against a plain formula, and the same bits in any order."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.common.settings import AggregationSettings
from samv2.updates.aggregate import (
    FRAMES_AT_ONCE,
    Contribution,
    aggregate,
    clip_shares,
)
from samv2.updates.packing import Manifest, accumulate, pack
from tests.helpers import assert_close, randn

SIZES = {0: 5, 1: 33, 2: 8, 9: 20}
MANIFEST = Manifest.of({key: torch.zeros(size) for key, size in SIZES.items()})


def contribution(
    client: int, ids: list[int], weight: float = 1.0, *, scale: float = 1.0
) -> tuple[Contribution, dict[int, Tensor]]:
    """One client's contribution and the update inside it."""
    update = {key: scale * randn(SIZES[key], seed=100 * client + key) for key in ids}
    frame = pack(update, MANIFEST, round=3)
    made = Contribution(
        client=client, data=frame, weight=weight, expert_ids=tuple(sorted(ids))
    )
    return made, update


def update_norm(update: dict[int, Tensor]) -> float:
    """L2 norm of a whole update, in float64."""
    return sum(float(block.double().square().sum()) for block in update.values()) ** 0.5


def plain_mean(
    items: list[tuple[Contribution, dict[int, Tensor]]], key: int, normalise: str
) -> Tensor:
    """The formula, in float64."""
    holders = [(item.weight, update[key]) for item, update in items if key in update]
    total = sum((w * value.double() for w, value in holders), torch.zeros(SIZES[key]))
    everyone = sum(item.weight for item, _ in items)
    return total / (everyone if normalise == "all" else sum(w for w, _ in holders))


@given(
    ids=st.lists(
        st.lists(st.sampled_from(sorted(SIZES)), min_size=1, unique=True),
        min_size=1,
        max_size=4,
    ),
    weights=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
    normalise=st.sampled_from(["contributors", "all"]),
)
def test_mean_is_the_formula(
    ids: list[list[int]], weights: list[int], normalise: str
) -> None:
    items = [contribution(c, own, float(weights[c])) for c, own in enumerate(ids)]
    found = aggregate(
        [item for item, _ in items], MANIFEST, round=3, normalise=normalise
    )
    assert set(found.mean) == {key for own in ids for key in own}
    for key, value in found.mean.items():
        assert_close(f"block {key}", value, plain_mean(items, key, normalise), "fp32")
        senders = tuple(c for c, own in enumerate(ids) if key in own)
        assert found.contributors[key] == senders


def test_arrival_order_does_not_change_a_bit() -> None:
    items = [
        contribution(client, [0, 1, 9], weight, scale=10.0**client)[0]
        for client, weight in enumerate([1.0, 7.0, 1e6, 3.0])
    ]
    first = aggregate(items, MANIFEST, round=3, clip_norm=2.0)
    for order in permutations(items):
        again = aggregate(order, MANIFEST, round=3, clip_norm=2.0)
        assert again.contributors == first.contributors
        assert all(torch.equal(again.mean[key], first.mean[key]) for key in first.mean)


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_blocks_of_zeros_do_not_count(rule: str) -> None:
    """Client 0 sends zeros for 1 and 2; somebody else sends 1 too, nobody 2."""
    (first, update), (second, _) = contribution(0, [0]), contribution(1, [1])
    update |= {key: torch.zeros(SIZES[key]) for key in (1, 2)}
    zeros = replace(first, data=pack(update, MANIFEST, round=3))
    rules = AggregationSettings(rule=rule)
    found = aggregate([zeros, second], MANIFEST, round=3, rules=rules)
    alone = aggregate([second], MANIFEST, round=3, rules=rules)
    assert list(found.mean) == [0, 1]
    assert torch.equal(found.mean[1], alone.mean[1])


def test_an_expert_that_nobody_sent_is_absent() -> None:
    item, _ = contribution(0, [1])
    assert list(aggregate([item], MANIFEST, round=3).mean) == [1]
    assert aggregate([], MANIFEST, round=3).mean == {}


@pytest.mark.parametrize("limit", [0.5, 3.0, 1e9])
def test_clip_norm_scales_a_whole_update_down(limit: float) -> None:
    item, update = contribution(0, [0, 2], scale=4.0)
    found = aggregate([item], MANIFEST, round=3, clip_norm=limit)
    norm = update_norm(update)
    assert norm == pytest.approx(float(torch.cat(list(update.values())).norm()))
    assert update_norm(found.mean) == pytest.approx(min(norm, limit), rel=1e-5)
    for key, value in found.mean.items():
        expected = update[key] * min(1.0, limit / norm)
        assert_close(f"block {key}", value, expected, "fp32")


def test_clipping_keeps_one_client_from_drowning_the_others() -> None:
    honest, _ = contribution(0, [0])
    loud, _ = contribution(1, [0], scale=1e4)
    clipped = aggregate([honest, loud], MANIFEST, round=3, clip_norm=1.0)
    assert update_norm(clipped.mean) <= 1.0


@pytest.mark.parametrize("clients", [1, 16, 17, 50])
def test_frames_in_files_give_the_bits_of_one_addition_after_the_other(
    tmp_path: Path, clients: int
) -> None:
    items, sums = [], {1: torch.zeros(SIZES[1])}
    for client in range(clients):
        item, _ = contribution(client, [1], 1.0 + client / 7)
        accumulate(item.read(), MANIFEST, item.weight, sums, round=3)
        path = tmp_path / f"{client}.bin"
        path.write_bytes(item.read())
        items.append(replace(item, data=path))
    found = aggregate(items[::-1], MANIFEST, round=3)
    assert torch.equal(found.mean[1], sums[1] / sum(item.weight for item in items))


@pytest.mark.parametrize("clients", [40, 400])
def test_few_frames_are_in_memory_at_once(
    monkeypatch: pytest.MonkeyPatch, clients: int
) -> None:
    frame = contribution(0, [0])[0].read()
    alive: set[int] = set()
    most = 0

    class Frame(bytes):
        """Bytes that say when they are gone."""

        def __new__(cls) -> Frame:
            nonlocal most
            made = super().__new__(cls, frame)
            alive.add(id(made))
            most = max(most, len(alive))
            return made

        def __del__(self) -> None:
            alive.discard(id(self))

    monkeypatch.setattr(Contribution, "read", lambda self: Frame())
    items = [contribution(0, [0])[0] for _ in range(clients)]
    items = [replace(item, client=client) for client, item in enumerate(items)]
    rules = AggregationSettings(clip_to_median=1.0)
    aggregate(items, MANIFEST, round=3, clip_norm=1.0, rules=rules)
    assert 0 < most <= 2 * FRAMES_AT_ONCE


def test_clip_to_median_brings_a_loud_update_down_and_spares_the_rest() -> None:
    made = [contribution(c, [0, 1]) for c in range(4)]
    made.append(contribution(4, [0, 1], scale=100.0))
    made.append(contribution(5, [0, 1], scale=0.0))
    items = [item for item, _ in made]
    norms = [update_norm(update) for _, update in made]
    limit = 1.5 * sorted(norms)[1:][2]
    shares = clip_shares(items, MANIFEST, round=3, clip_to_median=1.5)
    expected = [min(1.0, limit / norm) if norm else 1.0 for norm in norms]
    assert shares == pytest.approx(expected) and shares[4] < 0.1 < shares[0] == 1.0
    both = clip_shares(items, MANIFEST, round=3, clip_to_median=1.5, clip_norm=1.0)
    assert both == pytest.approx([1 / norm if norm else 1.0 for norm in norms])


def test_a_frame_of_another_round_is_refused() -> None:
    item, _ = contribution(0, [0])
    with pytest.raises(FrameError) as caught:
        aggregate([item], MANIFEST, round=4)
    assert caught.value.reason == "round"
