"""Sparse FedAvg against a plain formula, and the same bits in any order."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.updates.aggregate import Contribution, aggregate
from samv2.updates.packing import Manifest, pack
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
        client=client, frame=frame, weight=weight, expert_ids=tuple(sorted(ids))
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


def test_a_frame_of_another_round_is_refused() -> None:
    item, _ = contribution(0, [0])
    with pytest.raises(FrameError) as caught:
        aggregate([item], MANIFEST, round=4)
    assert caught.value.reason == "round"
