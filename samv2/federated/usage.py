"""Usage and demand of edges: counted on clients, packed, summed on the server.

Counts are integers, carried as float32 in the same frame format as updates (exact up to
2^24 a client and round). Only the upper triangle of each layer travels.

Shapes: L layers, E experts, P = E (E + 1) / 2 edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.experts.graph import ExpertGraph
from samv2.experts.moe_layers import to_positions
from samv2.updates.packing import Manifest, pack, unpack
from samv2_kernels import Walk, count_usage

LARGEST_COUNT = 2**24


@dataclass(frozen=True, kw_only=True)
class EdgeCounts:
    """Counts of all converted layers, in positions."""

    usage_LEE: Tensor
    """(L, E, E) int64; entries on the diagonal, tree edges above."""
    demand_LEE: Tensor
    """(L, E, E) int64; wanted while the edge was off."""

    def __add__(self, other: EdgeCounts) -> EdgeCounts:
        return EdgeCounts(
            usage_LEE=self.usage_LEE + other.usage_LEE,
            demand_LEE=self.demand_LEE + other.demand_LEE,
        )


def zero_counts(num_layers: int, num_experts: int) -> EdgeCounts:
    """Counts before anything was walked."""
    shape = (num_layers, num_experts, num_experts)
    return EdgeCounts(
        usage_LEE=torch.zeros(shape, dtype=torch.long),
        demand_LEE=torch.zeros(shape, dtype=torch.long),
    )


class UsageCounter:
    """A walk recorder that counts edges of the server graph.

    Args:
        graph: the server graph of the round.
        device: where walks are.
    """

    def __init__(self, graph: ExpertGraph, device: torch.device | str = "cpu") -> None:
        self._mask_LEE = graph.edge_mask_LEE.to(device)
        self._order_LE = graph.order_LE.to(device)
        self._usage_LEE = torch.zeros_like(self._mask_LEE, dtype=torch.long)
        self._demand_LEE = torch.zeros_like(self._usage_LEE)

    def __call__(self, layer: int, walked: Walk) -> None:
        """Add one layer's walk."""
        placed = to_positions(walked, self._order_LE[layer])
        counted = count_usage(placed, self._mask_LEE[layer])
        self._usage_LEE[layer] += counted.usage_EE
        self._demand_LEE[layer] += counted.demand_EE

    @property
    def counts(self) -> EdgeCounts:
        """What was counted so far, on the CPU."""
        return EdgeCounts(
            usage_LEE=self._usage_LEE.cpu(), demand_LEE=self._demand_LEE.cpu()
        )


def usage_manifest(num_layers: int, num_experts: int) -> Manifest:
    """Manifest of a usage frame: per layer, P usage counts and P demand counts."""
    width = num_experts * (num_experts + 1)
    return Manifest(
        ids=tuple(range(num_layers)),
        shapes=((width,),) * num_layers,
        dtypes=(torch.float32,) * num_layers,
    )


def pack_usage(counts: EdgeCounts, *, round: int) -> bytes:
    """Counts as a frame.

    Counts above 2^24 are cut to it (the largest that float32 holds exactly with all
    below); they are votes, and a client's vote is capped in any case.
    """
    layers, experts = counts.usage_LEE.shape[:2]
    rows, columns = torch.triu_indices(experts, experts)
    both_LP = torch.cat(
        [counts.usage_LEE[:, rows, columns], counts.demand_LEE[:, rows, columns]], dim=1
    )
    values = both_LP.clamp(max=LARGEST_COUNT).float()
    update = {layer: values[layer] for layer in range(layers)}
    return pack(update, usage_manifest(layers, experts), round=round)


def unpack_usage(
    frame: bytes,
    num_layers: int,
    num_experts: int,
    *,
    round: int,
    max_count: int,
    max_visits: Sequence[int] | None = None,
) -> EdgeCounts:
    """Counts of an untrusted frame.

    Args:
        frame: the received bytes.
        num_layers: L.
        num_experts: E.
        round: the round it must belong to.
        max_count: the most tokens the client can have walked.
        max_visits: the most visits they can have made in each layer; None sets no limit.

    Raises:
        FrameError: a malformed frame (its reason), or ``usage_range`` where a count is
            negative, fractional or above ``max_count``, or a layer has more visits than
            its ``max_visits``.
    """
    values_LW = usage_rows(frame, num_layers, num_experts, round=round)
    bad_LW = (values_LW != values_LW.round()) | (values_LW < 0)
    bad_L = (bad_LW | (values_LW > max_count)).any(dim=1)
    if bool(bad_L.any()):
        layer = int(bad_L.nonzero()[0])
        raise FrameError(
            "usage_range",
            f"usage counts of layer {layer} must be whole numbers in 0..{max_count}, "
            f"found {float(values_LW[layer].min()):g}..{float(values_LW[layer].max()):g}",
        )
    counts = counts_of(values_LW, num_experts)
    for layer, visits in enumerate(counts.usage_LEE.sum(dim=(1, 2)).tolist()):
        if max_visits is not None and visits > max_visits[layer]:
            raise FrameError(
                "usage_range",
                f"layer {layer} counts {visits} visits, its tokens can have made "
                f"{max_visits[layer]}",
            )
    return counts


def usage_rows(
    frame: bytes, num_layers: int, num_experts: int, *, round: int
) -> Tensor:
    """(L, 2 P) float32, as a frame has them: per layer P usage, then P demand counts.

    Raises:
        FrameError: a malformed frame.
    """
    manifest = usage_manifest(num_layers, num_experts)
    values_LW = torch.zeros(num_layers, manifest.shapes[0][0])
    unpack(frame, manifest, round=round, out=dict(enumerate(values_LW)))
    return values_LW


def counts_of(values_LW: Tensor, num_experts: int) -> EdgeCounts:
    """Whole numbers, laid out as :func:`usage_rows` has them, as counts of edges."""
    counts = zero_counts(len(values_LW), num_experts)
    rows, columns = torch.triu_indices(num_experts, num_experts)
    usage_LP, demand_LP = values_LW.long().chunk(2, dim=1)
    counts.usage_LEE[:, rows, columns] = usage_LP
    counts.demand_LEE[:, rows, columns] = demand_LP
    return counts


def used_experts(counts: EdgeCounts) -> Tensor:
    """(L,) int64: how many experts of each layer were visited at all."""
    return (counts.usage_LEE.sum(dim=1) > 0).sum(dim=1)
