"""Selecting blocks: the budget bounds the frame, and nothing is lost from sight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2.common.settings_checks import CODECS
from samv2.updates.packing import Manifest, pack, unpack
from samv2.updates.sparsify import (
    FRAME_BYTES,
    kth_magnitude,
    next_residual,
    packed_bound,
    select_blocks,
    top_k,
)
from tests.helpers import randn


def dense_update(sizes: list[int], seed: int) -> dict[int, Tensor]:
    """Blocks without a zero, of these sizes."""
    return {key: randn(size, seed=seed + key) for key, size in enumerate(sizes)}


@given(
    sizes=st.lists(
        st.one_of(
            st.integers(1, 700),
            st.sampled_from([255, 256, 257, 65536, 66_000, 140_000]),
        ),
        min_size=1,
        max_size=6,
    ),
    codec=st.sampled_from(CODECS),
    share=st.floats(0.0, 1.2),
    density=st.sampled_from([1.0, 0.97, 0.5, 0.02]),
    seed=st.integers(0, 100),
)
def test_budget_bounds_the_packed_frame_for_every_codec(
    sizes: list[int], codec: str, share: float, density: float, seed: int
) -> None:
    update = dense_update(sizes, seed)
    for key, block in update.items():
        kept = torch.rand(len(block), generator=torch.Generator().manual_seed(key))
        block[kept > density] = 0.0
    budget = int(share * sum(packed_bound(size, codec) for size in sizes)) + 72
    chosen = select_blocks(update, codec=codec, update_budget_bytes=budget)
    sent = {key: update[key] for key in chosen}
    frame = pack(sent, Manifest.of(update), round=1, codec=codec)
    assert len(frame) <= budget


@pytest.mark.parametrize("codec", CODECS)
def test_bound_is_not_wasteful(codec: str) -> None:
    update = dense_update([5000], 0)
    frame = pack(update, Manifest.of(update), round=1, codec=codec)
    assert (
        len(frame) <= packed_bound(5000, codec) + FRAME_BYTES <= 1.1 * len(frame) + 50
    )


LAYER_OF = {key: key // 4 for key in range(8)}


def select(update: dict[int, Tensor], **options: object) -> tuple[int, ...]:
    """Selection with a budget that holds everything."""
    values: dict[str, object] = {"codec": "raw", "update_budget_bytes": 10**6}
    return select_blocks(update, **(values | options))  # type: ignore[arg-type]


def test_largest_norms_go_first_and_ties_go_to_the_lower_id() -> None:
    update = {key: torch.full((8,), value) for key, value in enumerate([1.0, 3, 3, 2])}
    room = FRAME_BYTES + packed_bound(8, "raw")
    assert select(update, update_budget_bytes=room) == (1,)
    assert select(update, update_budget_bytes=room + packed_bound(8, "raw")) == (1, 2)


def test_a_block_that_does_not_fit_makes_room_for_a_smaller_one() -> None:
    update = {0: torch.full((5000,), 9.0), 1: torch.ones(4)}
    assert select(update, update_budget_bytes=1000) == (1,)


def test_zero_and_nan_blocks_are_left_out() -> None:
    update = {0: torch.zeros(4), 1: torch.ones(4), 2: torch.tensor([torch.nan, 1.0])}
    assert select(update) == (1,)
    assert select({0: torch.zeros(4)}) == ()


def test_negative_zero_is_zero() -> None:
    assert select({0: torch.tensor([-0.0, 0.0])}) == ()


def test_send_experts_limits_each_layer() -> None:
    update = {key: torch.full((4,), float(key + 1)) for key in range(9)}
    chosen = select(update, send_experts=2, layer_of=LAYER_OF)
    assert chosen == (2, 3, 6, 7, 8)
    chosen = select(update, send_experts=1, layer_of=LAYER_OF, always=[8])
    assert chosen == (3, 7, 8)


def test_always_ids_go_first_whatever_their_norm() -> None:
    update = {0: torch.full((8,), 9.0), 1: torch.full((8,), 0.1)}
    room = FRAME_BYTES + packed_bound(8, "raw")
    assert select(update, update_budget_bytes=room, always=[1]) == (1,)
    zero = {0: torch.ones(8), 1: torch.zeros(8)}
    assert select(zero, always=[1, 77]) == (0,)


@given(
    codec=st.sampled_from(CODECS),
    keep=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_decoded_and_kept_add_up_to_the_update(
    codec: str, keep: list[bool], seed: int
) -> None:
    update = dense_update([40, 300, 7, 64], seed)
    sent = {key: update[key] for key in update if keep[key]}
    manifest = Manifest.of(update)
    decoded = unpack(pack(sent, manifest, round=1, codec=codec), manifest, round=1)
    kept = next_residual(update, decoded, decay=1.0)
    for key, block in update.items():
        arrived = decoded.get(key, torch.zeros_like(block))
        left = kept.get(key, torch.zeros_like(block))
        # One subtraction and one addition in float32.
        assert torch.allclose(arrived + left, block, rtol=3e-7, atol=0)


def test_residual_is_decayed_and_sparse() -> None:
    update = {0: torch.ones(2), 1: torch.ones(2)}
    kept = next_residual(update, {0: torch.ones(2)}, decay=0.5)
    assert list(kept) == [1] and kept[1].tolist() == [0.5, 0.5]
    assert next_residual(update, {}, decay=0) == {}


def test_inputs_are_not_changed() -> None:
    update, decoded = {0: torch.ones(2)}, {0: torch.full((2,), 0.25)}
    next_residual(update, decoded, decay=0.5)
    assert update[0].tolist() == [1, 1] and decoded[0].tolist() == [0.25, 0.25]


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    levels=st.sampled_from([2, 9, 10**6]),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_top_k_is_a_stable_sort_by_magnitude(
    sizes: list[int], levels: int, share: float, seed: int
) -> None:
    update = {
        3 * key: (randn(size, seed=seed + key) * levels).round() / levels
        for key, size in enumerate(sizes)
    }
    everything = torch.cat([update[id_] for id_ in sorted(update)])
    keep = round(share * len(everything))
    order = everything.abs().argsort(descending=True, stable=True)
    expected = torch.zeros_like(everything)
    expected[order[:keep]] = everything[order[:keep]]
    found = top_k(update, keep)
    assert torch.equal(torch.cat([found[id_] for id_ in sorted(found)]), expected)
    if keep:
        assert kth_magnitude(update, keep) == float(everything.abs()[order[keep - 1]])


def test_top_k_keeps_what_is_not_finite_and_shapes() -> None:
    update = {0: torch.tensor([[1.0, -torch.inf], [torch.nan, -2.0]])}
    kept = top_k(update, 2)[0]
    assert kept.shape == (2, 2) and kept.isnan()[1, 0] and kept[0, 1] == -torch.inf
    assert kept[0, 0] == 0 and kept[1, 1] == 0


def test_top_k_names_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="keep 5 of 4"):
        top_k({0: torch.ones(4)}, 5)
    with pytest.raises(ValueError, match="number 0 among 4"):
        kth_magnitude({0: torch.ones(4)}, 0)
    with pytest.raises(TypeError, match="float32"):
        top_k({0: torch.ones(4).half()}, 1)
