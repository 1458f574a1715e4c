"""A round's usage counts as votes: summed over clients, none of whom outvotes the rest.

Clients say themselves how often an edge was walked or wanted, and the server edits the
graph by it: a client that claims much could have edges made that lead its text to
experts it poisons (BadMoE, arXiv 2504.18598). What a claim can hold is bounded by
validation; :func:`sum_votes` can also bound a client's share of a layer's counts, and
says how many clients wanted an edge.

Shapes: C clients, L layers, E experts, P = E (E + 1) / 2 edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samv2.federated.usage import EdgeCounts, counts_of, usage_rows
from samv2.updates.stored import Stored, read_frame


@dataclass(frozen=True, kw_only=True)
class Votes:
    """What the clients of a round say of the edges."""

    counts: EdgeCounts
    """Summed over clients."""
    voters_LEE: Tensor
    """(L, E, E) int64, clients that wanted the edge while it was off."""


def sum_votes(
    frames: Sequence[Stored],
    num_layers: int,
    num_experts: int,
    *,
    round: int,
    vote_cap: float = 1.0,
) -> Votes:
    """Counts of validated usage frames, read one after the other.

    Args:
        frames: one a client, or the files they are in; in an order that repeats.
        num_layers: L.
        num_experts: E.
        round: the round they belong to.
        vote_cap: see :func:`vote_factors`; it holds for usage and for demand, up to
            rounding to whole counts. 1: sums are exact.

    Raises:
        FrameError: a frame is invalid after all.
        OSError: a frame's file cannot be read.
    """
    width = num_experts * (num_experts + 1)
    total_LW = torch.zeros(num_layers, width, dtype=torch.double)
    voters_LP = torch.zeros(num_layers, width // 2, dtype=torch.long)
    factors_CL2 = _factors(frames, num_layers, num_experts, round, vote_cap)
    for index, frame in enumerate(frames):
        values_LW = usage_rows(read_frame(frame), num_layers, num_experts, round=round)
        voters_LP += values_LW[:, width // 2 :] > 0
        if factors_CL2 is None:
            total_LW += values_LW
            continue
        scaled_L2P = values_LW.double().view(num_layers, 2, -1)
        scaled_L2P = (scaled_L2P * factors_CL2[index].unsqueeze(-1)).round()
        total_LW += scaled_L2P.view(num_layers, -1)
    both_LW = torch.cat([torch.zeros_like(voters_LP), voters_LP], dim=1)
    return Votes(
        counts=counts_of(total_LW, num_experts),
        voters_LEE=counts_of(both_LW, num_experts).demand_LEE,
    )


def vote_factors(totals: Sequence[int], vote_cap: float) -> list[float]:
    """What each client's counts are multiplied by, so that none outvotes the rest.

    The largest totals are cut to one limit, at which the largest is ``vote_cap`` of the
    sum; then all are scaled so that the sum is what it was. With 1 / ``vote_cap`` voters
    or fewer, nobody can hold less than an equal share, and all hold that.

    Args:
        totals: counts of every client, at least 0; those with none have no vote.
        vote_cap: above 0, at most 1.

    Returns:
        A factor a client; exactly 1 each if no total exceeds the cap.
    """
    voters = sorted((total for total in totals if total > 0), reverse=True)
    if not voters:
        return [1.0] * len(totals)
    limit, rest = float(voters[-1]), sum(voters)
    if len(voters) * vote_cap > 1:
        for above, total in enumerate(voters):
            limit = vote_cap * rest / (1 - above * vote_cap)
            if total <= limit:
                break
            rest -= total
    kept = sum(min(total, limit) for total in voters)
    scale = sum(voters) / kept
    return [min(1.0, limit / total) * scale if total > 0 else 1.0 for total in totals]


def _factors(
    frames: Sequence[Stored],
    num_layers: int,
    num_experts: int,
    round: int,
    vote_cap: float,
) -> Tensor | None:
    """(C, L, 2) for usage and demand; None where nobody is capped."""
    if vote_cap == 1 or not frames:
        return None
    totals_CL2 = torch.stack(
        [
            usage_rows(read_frame(frame), num_layers, num_experts, round=round)
            .double()
            .view(num_layers, 2, -1)
            .sum(dim=2)
            for frame in frames
        ]
    )
    factors_CL2 = torch.ones_like(totals_CL2)
    for layer in range(num_layers):
        for kind in range(2):
            totals = totals_CL2[:, layer, kind].long().tolist()
            factors = vote_factors(totals, vote_cap)
            factors_CL2[:, layer, kind] = torch.tensor(factors, dtype=torch.double)
    return factors_CL2
