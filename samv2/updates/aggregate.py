"""Sparse FedAvg: per expert, over the clients that sent it.

    theta_e += sum_{i in S_e} n_i Delta_{i,e} / sum_{i in S_e} n_i

An expert that nobody sent keeps its value; nothing is filled with zeros. Sums run in
float32 over contributions in rising client order, so the result does not depend on the
order in which replies arrive (McMahan et al. 2017 for FedAvg; per-block normalisation as
in HetLoRA, arXiv 2401.06432). Frames are read a few at a time, so memory does not grow
with the clients. The rules that a minority cannot bend are in
:mod:`samv2.updates.robust`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from samv2.common.settings import AggregationSettings
from samv2.updates.packing import Manifest, accumulate_all, squared_norm
from samv2.updates.robust import robust_means
from samv2.updates.stored import Stored, read_frame

FRAMES_AT_ONCE = 16
"""Frames in memory while they are added; a block of the sums stays in the cache."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One client's valid update."""

    client: int
    """The client's index; unique in a round."""
    data: Stored
    """Packed update, already validated against the manifest, or the file it is in."""
    weight: float
    """n_i, the (capped) number of examples; positive."""
    expert_ids: tuple[int, ...]
    """Ids of the blocks that the frame changes; others that it carries are zero."""

    def read(self) -> bytes:
        """The packed update."""
        return read_frame(self.data)


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """The means and who took part in each."""

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
    rules: AggregationSettings = AggregationSettings(),
) -> Aggregated:
    """One change of every expert, of all updates of it.

    Args:
        contributions: in any order; validated.
        manifest: the server's.
        round: the round the frames belong to.
        normalise: ``contributors`` divides an expert's sum by the weight of those who
            sent it, ``all`` by the weight of all contributions. A robust rule counts
            clients instead of weights: under ``all`` its result is scaled by the share
            of the clients that sent the expert.
        clip_norm: scale an update down to this L2 norm; 0 means no clipping.
        rules: ``rule``, ``trim``, ``quorum`` and ``clip_to_median`` are used.

    Raises:
        FrameError: a frame is invalid after all.
        OSError: a frame's file cannot be read.
    """
    ordered = sorted(contributions, key=lambda item: item.client)
    shares = clip_shares(
        ordered,
        manifest,
        round=round,
        clip_norm=clip_norm,
        clip_to_median=rules.clip_to_median,
    )
    contributors = contributors_of(ordered)
    if rules.rule == "mean":
        mean = _weighted_means(ordered, shares, manifest, round, normalise)
    else:
        mean = robust_means(
            [(item.data, item.expert_ids) for item in ordered],
            shares,
            manifest,
            round=round,
            rules=rules,
        )
        if normalise == "all":
            mean = {
                key: value * (len(contributors[key]) / len(ordered))
                for key, value in mean.items()
            }
    return Aggregated(mean=mean, contributors=contributors)


def contributors_of(ordered: Sequence[Contribution]) -> dict[int, tuple[int, ...]]:
    """{expert_id: clients that sent it}, in the order of the contributions."""
    found: dict[int, list[int]] = {}
    for item in ordered:
        for expert_id in item.expert_ids:
            found.setdefault(expert_id, []).append(item.client)
    return {key: tuple(value) for key, value in sorted(found.items())}


def weighted_sums(
    ordered: Sequence[Contribution],
    weights: Sequence[float],
    manifest: Manifest,
    *,
    round: int,
) -> dict[int, Tensor]:
    """{expert_id: float32 sum of weight times update}, added in the given order.

    Args:
        ordered: by rising client.
        weights: one a contribution.
        manifest: the server's.
        round: the round the frames belong to.

    Raises:
        FrameError: a frame is invalid after all.
    """
    ids = sorted({key for item in ordered for key in item.expert_ids})
    sums = {key: torch.zeros(manifest.shapes[manifest.position(key)]) for key in ids}
    for batch in _batches(ordered, weights):
        accumulate_all(
            [(item.read(), weight) for item, weight in batch],
            manifest,
            sums,
            round=round,
            only=ids,
        )
    return sums


def clip_shares(
    ordered: Sequence[Contribution],
    manifest: Manifest,
    *,
    round: int,
    clip_norm: float = 0.0,
    clip_to_median: float = 0.0,
) -> list[float]:
    """What each update is scaled by, 0 to 1, so that its L2 norm is in bounds.

    Args:
        ordered: the round's contributions.
        manifest: the server's.
        round: the round the frames belong to.
        clip_norm: the largest norm; 0 sets no limit.
        clip_to_median: the largest multiple of the median norm of the round's updates
            (the lower of two, those that are zero left out); 0 sets no limit.
    """
    if clip_norm == 0 and clip_to_median == 0:
        return [1.0] * len(ordered)
    norms = [
        squared_norm(item.read(), manifest, round=round) ** 0.5 for item in ordered
    ]
    limits = [clip_norm] if clip_norm else []
    if clip_to_median and (moved := sorted(norm for norm in norms if norm > 0)):
        limits.append(clip_to_median * moved[(len(moved) - 1) // 2])
    limit = min(limits, default=0.0)
    return [min(1.0, limit / norm) if norm > 0 else 1.0 for norm in norms]


def _weighted_means(
    ordered: Sequence[Contribution],
    shares: Sequence[float],
    manifest: Manifest,
    round: int,
    normalise: str,
) -> dict[int, Tensor]:
    weights = [item.weight * share for item, share in zip(ordered, shares)]
    sums = weighted_sums(ordered, weights, manifest, round=round)
    total = sum(item.weight for item in ordered)
    sent: dict[int, float] = {}
    for item in ordered:
        for expert_id in item.expert_ids:
            sent[expert_id] = sent.get(expert_id, 0.0) + item.weight
    return {
        expert_id: value / (total if normalise == "all" else sent[expert_id])
        for expert_id, value in sums.items()
    }


def _batches(
    ordered: Sequence[Contribution], weights: Sequence[float]
) -> Iterator[list[tuple[Contribution, float]]]:
    pairs = zip(ordered, weights, strict=True)
    while batch := list(islice(pairs, FRAMES_AT_ONCE)):
        yield batch
