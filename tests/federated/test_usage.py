"""Usage and demand: counted in positions, packed, and refused where hostile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.federated.usage import (
    LARGEST_COUNT,
    EdgeCounts,
    UsageCounter,
    pack_usage,
    unpack_usage,
    usage_manifest,
    used_experts,
    zero_counts,
)
from samv2.updates.packing import pack
from samv2_kernels import walk
from tests.federated.runs import EXPERTS, LAYERS, toy_counts, toy_graph
from tests.helpers import randn


def read(frame: bytes, *, round: int = 5, most: int = 100) -> EdgeCounts:
    """Counts of a frame of the toy graph."""
    return unpack_usage(frame, LAYERS, EXPERTS, round=round, max_count=most)


def same(left: EdgeCounts, right: EdgeCounts) -> bool:
    """Equal counts."""
    return torch.equal(left.usage_LEE, right.usage_LEE) and torch.equal(
        left.demand_LEE, right.demand_LEE
    )


@given(seed=st.integers(0, 10_000), largest=st.sampled_from([0, 1, 100]))
def test_counts_survive_the_frame(seed: int, largest: int) -> None:
    counts = toy_counts(seed, largest)
    assert same(read(pack_usage(counts, round=5)), counts)


def test_counts_beyond_float32_are_cut() -> None:
    counts = zero_counts(LAYERS, EXPERTS)
    counts.usage_LEE[0, 0, 0] = 2**40
    found = read(pack_usage(counts, round=5), most=LARGEST_COUNT)
    assert found.usage_LEE[0, 0, 0] == LARGEST_COUNT


def raw_frame(values: list[float], *, round: int = 5) -> bytes:
    """A frame whose first layer starts with these numbers."""
    layer = torch.zeros(EXPERTS * (EXPERTS + 1))
    layer[: len(values)] = torch.tensor(values)
    return pack({0: layer}, usage_manifest(LAYERS, EXPERTS), round=round)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (raw_frame([-1.0]), "usage_range"),
        (raw_frame([0.5]), "usage_range"),
        (raw_frame([101.0]), "usage_range"),
        (raw_frame([3e38]), "usage_range"),
        (raw_frame([float("nan")]), "nonfinite"),
        (raw_frame([float("inf")]), "nonfinite"),
        (raw_frame([1.0], round=4), "round"),
        (raw_frame([1.0])[:-1], "frame_length"),
        (raw_frame([1.0]) + b"\0", "frame_length"),
        (b"", "truncated"),
    ],
)
def test_hostile_counts_are_refused(frame: bytes, reason: str) -> None:
    with pytest.raises(FrameError) as caught:
        read(frame)
    assert caught.value.reason == reason


def test_counts_of_another_graph_are_refused() -> None:
    frame = pack_usage(zero_counts(LAYERS, EXPERTS + 1), round=5)
    with pytest.raises(FrameError):
        read(frame)


def test_layers_that_are_absent_count_nothing() -> None:
    assert same(read(raw_frame([0.0])), zero_counts(LAYERS, EXPERTS))


def plain_counts(ids: Tensor, parents: Tensor, order: list[int]) -> Tensor:
    """Usage in positions by a plain loop."""
    usage = torch.zeros(EXPERTS, EXPERTS, dtype=torch.long)
    for row, parent_row in zip(ids.tolist(), parents.tolist()):
        for expert, slot in zip(row, parent_row):
            if expert >= 0:
                dst = order.index(expert)
                src = order.index(row[slot]) if slot >= 0 else dst
                usage[src, dst] += 1
    return usage


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_counter_counts_edges_in_positions(order: list[int]) -> None:
    graph = toy_graph(order=order)
    mask_EE = graph.edge_mask_LEE[1].clone()
    mask_EE[1, 1] = False
    graph.edge_mask_LEE[1] = mask_EE
    scores_by_position = randn(50, EXPERTS, seed=1)
    walked = walk(scores_by_position, mask_EE.unsqueeze(0), experts_per_token=3)
    stored = torch.tensor(order)
    ids = torch.where(
        walked.expert_ids_TK >= 0, stored[walked.expert_ids_TK.clamp(min=0)], -1
    )
    back = torch.argsort(stored)
    in_storage = type(walked)(
        expert_ids_TK=ids,
        parent_slot_TK=walked.parent_slot_TK,
        depth_TK=walked.depth_TK,
        reached_TE=walked.reached_TE[:, back],
        chosen_TE=walked.chosen_TE[:, back],
    )
    counter = UsageCounter(graph)
    counter(1, in_storage)
    expected = plain_counts(ids, walked.parent_slot_TK, order)
    assert torch.equal(counter.counts.usage_LEE[1], expected)
    assert counter.counts.usage_LEE[0].sum() == 0
    wanted = torch.zeros(EXPERTS, EXPERTS, dtype=torch.long)
    visited, chosen = walked.visited_TE, walked.chosen_TE
    for src in range(EXPERTS):
        for dst in range(src + 1, EXPERTS):
            if not mask_EE[src, dst]:
                wanted[src, dst] = (visited[:, src] & chosen[:, dst]).sum()
    assert torch.equal(counter.counts.demand_LEE[1].triu(1), wanted)
    counter(1, in_storage)
    assert torch.equal(counter.counts.usage_LEE[1], 2 * expected)


def test_used_experts_counts_those_visited() -> None:
    counts = zero_counts(LAYERS, EXPERTS)
    counts.usage_LEE[0, 0, 0] = counts.usage_LEE[0, 0, 1] = 5
    assert used_experts(counts).tolist() == [2, 0]
