"""Votes: exact sums, in a client's bounds, from memory or from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samv2.federated.usage import LARGEST_COUNT, EdgeCounts, pack_usage, zero_counts
from samv2.federated.votes import Votes, sum_votes, vote_factors
from tests.federated.runs import EXPERTS, LAYERS, toy_counts


def votes_of(counts: list[EdgeCounts], vote_cap: float = 1.0) -> Votes:
    """Votes of clients with these counts."""
    frames = [pack_usage(item, round=5) for item in counts]
    return sum_votes(frames, LAYERS, EXPERTS, round=5, vote_cap=vote_cap)


@given(seeds=st.lists(st.integers(0, 1000), max_size=5))
def test_sums_and_voters_are_the_plain_ones(seeds: list[int]) -> None:
    counts = [toy_counts(seed, largest=2) for seed in seeds]
    found = votes_of(counts)
    zeros = zero_counts(LAYERS, EXPERTS).usage_LEE
    usage = sum((item.usage_LEE for item in counts), zeros)
    demand = sum((item.demand_LEE for item in counts), zeros)
    voters = sum(((item.demand_LEE > 0).long() for item in counts), zeros)
    assert torch.equal(found.counts.usage_LEE, usage)
    assert torch.equal(found.counts.demand_LEE, demand)
    assert torch.equal(found.voters_LEE, voters)


def test_sums_beyond_float32_are_exact() -> None:
    counts = zero_counts(LAYERS, EXPERTS)
    counts.usage_LEE[0, 0, 1] = LARGEST_COUNT - 1
    assert votes_of([counts] * 5).counts.usage_LEE[0, 0, 1] == 5 * LARGEST_COUNT - 5


def test_frames_may_lie_in_files(tmp_path: Path) -> None:
    frames = [pack_usage(toy_counts(seed), round=5) for seed in range(3)]
    paths = [tmp_path / str(index) for index in range(3)]
    for path, frame in zip(paths, frames):
        path.write_bytes(frame)
    for cap in (0.4, 1.0):
        left = sum_votes(frames, LAYERS, EXPERTS, round=5, vote_cap=cap)
        right = sum_votes(paths, LAYERS, EXPERTS, round=5, vote_cap=cap)
        assert torch.equal(left.counts.usage_LEE, right.counts.usage_LEE)
        assert torch.equal(left.counts.demand_LEE, right.counts.demand_LEE)


@given(
    totals=st.lists(st.integers(0, 10**9), max_size=12),
    cap=st.floats(0.01, 1.0),
)
def test_no_client_holds_more_than_the_cap_and_the_sum_stays(
    totals: list[int], cap: float
) -> None:
    factors = vote_factors(totals, cap)
    held = [total * factor for total, factor in zip(totals, factors)]
    voters = sum(total > 0 for total in totals)
    assert sum(held) == pytest.approx(sum(totals))
    largest = max(cap, 1 / voters) if voters else 0
    assert all(share <= largest * sum(totals) * (1 + 1e-9) for share in held)
    assert [share > 0 for share in held] == [total > 0 for total in totals]
    order = sorted(range(len(totals)), key=totals.__getitem__)
    assert all(
        held[a] <= held[b] * (1 + 1e-9) for a, b in zip(order, order[1:])
    ), "a client with fewer counts has more votes"


def test_factors_are_one_where_nobody_exceeds_the_cap() -> None:
    assert vote_factors([30, 30, 40], 0.4) == [1.0] * 3
    assert vote_factors([0, 0], 0.1) == [1.0, 1.0]
    assert vote_factors([], 0.1) == []


def test_a_loud_client_is_cut_in_its_layer_alone() -> None:
    quiet = [toy_counts(seed) for seed in range(3)]
    loud = zero_counts(LAYERS, EXPERTS)
    loud.demand_LEE[0, 0, 2] = 10**6
    free, capped = votes_of([*quiet, loud]), votes_of([*quiet, loud], 0.4)
    total = free.counts.demand_LEE[0].sum()
    held = capped.counts.demand_LEE[0, 0, 2] / total
    assert free.counts.demand_LEE[0, 0, 2] / total > 0.99
    assert 0.4 <= held < 0.6, "the cap, and what the others want of this edge"
    assert abs(capped.counts.demand_LEE[0].sum() - total) < EXPERTS**2
    assert torch.equal(capped.counts.usage_LEE, votes_of(quiet).counts.usage_LEE)
    assert torch.equal(capped.counts.demand_LEE[1], free.counts.demand_LEE[1])
    assert torch.equal(capped.voters_LEE, free.voters_LEE)
