"""Sparse FedAvg: per expert, over the clients that sent it.

    theta_e += sum_{i in S_e} n_i Delta_{i,e} / sum_{i in S_e} n_i

An expert that nobody sent keeps its value; nothing is filled with zeros. Sums run in
float32 over contributions in rising client order, so the result does not depend on the
order in which replies arrive (McMahan et al. 2017 for FedAvg; per-block normalisation as
in HetLoRA, arXiv 2401.06432).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samv2.updates.packing import Manifest, accumulate_all, squared_norm


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One client's valid update."""

    client: int
    """The client's index; unique in a round."""
    frame: bytes
    """Packed update, already validated against the manifest."""
    weight: float
    """n_i, the (capped) number of examples; positive."""
    expert_ids: tuple[int, ...]
    """Ids that the frame carries."""


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """The weighted means and who took part in each."""

    mean: dict[int, Tensor]
    """{expert_id: float32}, only experts that somebody sent."""
    contributors: dict[int, tuple[int, ...]]
    """{expert_id: client indices, rising}."""


def aggregate(
    contributions: Sequence[Contribution],
    manifest: Manifest,
    *,
    round: int,
    normalise: str = "contributors",
    clip_norm: float = 0.0,
) -> Aggregated:
    """Average updates per expert.

    Args:
        contributions: in any order; validated.
        manifest: the server's.
        round: the round the frames belong to.
        normalise: ``contributors`` divides an expert's sum by the weight of those who
            sent it, ``all`` by the weight of all contributions.
        clip_norm: scale an update down to this L2 norm; 0 means no clipping.

    Raises:
        FrameError: a frame is invalid after all.
    """
    ordered = sorted(contributions, key=lambda item: item.client)
    total = sum(item.weight for item in ordered)
    sums: dict[int, Tensor] = {}
    weights: dict[int, float] = {}
    contributors: dict[int, list[int]] = {}
    for item in ordered:
        for expert_id in item.expert_ids:
            if expert_id not in sums:
                shape = manifest.shapes[manifest.position(expert_id)]
                sums[expert_id] = torch.zeros(shape, dtype=torch.float32)
            weights[expert_id] = weights.get(expert_id, 0.0) + item.weight
            contributors.setdefault(expert_id, []).append(item.client)
    accumulate_all(
        (
            (item.frame, item.weight * _clip_share(item, manifest, round, clip_norm))
            for item in ordered
        ),
        manifest,
        sums,
        round=round,
    )
    mean = {
        expert_id: value / (total if normalise == "all" else weights[expert_id])
        for expert_id, value in sorted(sums.items())
    }
    return Aggregated(
        mean=mean,
        contributors={key: tuple(value) for key, value in sorted(contributors.items())},
    )


def _clip_share(
    item: Contribution, manifest: Manifest, round: int, clip_norm: float
) -> float:
    if clip_norm == 0:
        return 1.0
    norm = squared_norm(item.frame, manifest, round=round) ** 0.5
    return min(1.0, clip_norm / norm) if norm > 0 else 1.0
