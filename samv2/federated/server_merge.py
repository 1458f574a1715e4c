"""The server's half of a round as one pure function: state and replies in, state out.

The state holds the trained part of the model as *blocks*: differences from the
bootstrapped model, so that an expert nobody has trained yet is all zero and costs
nothing to broadcast.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from samv2.common.errors import FederationError
from samv2.common.settings import Settings
from samv2.experts.graph import Edit, ExpertGraph, apply_edits
from samv2.federated.drift import SiblingMemory
from samv2.federated.graph_edits import EdgeMemory, decide_edits
from samv2.federated.privacy import count_rounds, epsilon_after, private_mean
from samv2.federated.server_optimizer import Moments, server_step
from samv2.federated.siblings import share_update, used_siblings
from samv2.federated.usage import EdgeCounts
from samv2.federated.votes import sum_votes
from samv2.updates.aggregate import Aggregated, Contribution, aggregate
from samv2.updates.packing import Manifest, pack
from samv2.updates.stored import Stored


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """All that the server carries from round to round."""

    round: int
    """Rounds completed."""
    blocks: dict[int, Tensor]
    """{expert_id: flat float32}, difference from the bootstrapped model."""
    graph: ExpertGraph
    memory: EdgeMemory
    last_edits: tuple[Edit, ...] = ()
    """The batch that led to ``graph.version``."""
    siblings: SiblingMemory | None = None
    """Where drift is watched."""
    moments: Moments = field(default_factory=Moments)
    """Of the server's optimiser."""
    merged_rounds: dict[int, int] = field(default_factory=dict)
    """{client: rounds its update was merged in}; counted under privacy only."""


@dataclass(frozen=True, kw_only=True)
class ValidReply:
    """A reply that passed validation."""

    contribution: Contribution
    usage: Stored
    """The frame of its usage counts, or the file it is in."""
    edge_visits: int
    """Sum of the usage counts."""
    bytes_up: int
    """All payload bytes of the reply."""
    train_loss: float
    tokens: int
    seconds: float = 0.0
    """What the client says its training took."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A reply that did not, or a client that did not answer."""

    client: int
    reason: str
    """Machine-readable slug."""
    detail: str
    """The same for a person."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What one merge did; the content of ``merge_round{N}.json``."""

    round: int
    edits: tuple[Edit, ...]
    contributors: dict[int, tuple[int, ...]]
    counts: EdgeCounts
    replies: tuple[ValidReply, ...]
    refusals: tuple[Refusal, ...]
    graph_version: int
    epsilon: float | None = None
    """What the rounds so far have cost in privacy at most; None without it."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object without NaN."""
        return {
            "round": self.round,
            "graph_version": self.graph_version,
            "epsilon": self.epsilon,
            "edits": [
                {
                    "layer": edit.layer,
                    "src": edit.src,
                    "dst": edit.dst,
                    "kind": edit.kind,
                    "score": edit.score,
                    "reason": edit.reason,
                }
                for edit in self.edits
            ],
            "clients": {
                str(reply.contribution.client): {
                    "examples": reply.contribution.weight,
                    "tokens": reply.tokens,
                    "train_loss": reply.train_loss,
                    "bytes_up": reply.bytes_up,
                    "experts_sent": len(reply.contribution.expert_ids),
                    "edge_visits": reply.edge_visits,
                }
                for reply in self.replies
            },
            "refused": [
                {"client": item.client, "reason": item.reason, "detail": item.detail}
                for item in self.refusals
            ],
            "contributors": {
                str(expert_id): list(clients)
                for expert_id, clients in self.contributors.items()
            },
            "usage_per_layer": self.counts.usage_LEE.sum(dim=(1, 2)).tolist(),
            "demand_per_layer": self.counts.demand_LEE.sum(dim=(1, 2)).tolist(),
        }


def initial_state(blocks: dict[int, Tensor], graph: ExpertGraph) -> ServerState:
    """State before round 1.

    Args:
        blocks: the bootstrapped model's trainable blocks; only their sizes matter.
        graph: its graph.
    """
    layers, experts = graph.edge_mask_LEE.shape[:2]
    return ServerState(
        round=0,
        blocks={key: torch.zeros_like(value) for key, value in sorted(blocks.items())},
        graph=graph,
        memory=EdgeMemory.empty(layers, experts),
    )


def broadcast_frame(
    state: ServerState,
    manifest: Manifest,
    held: Container[int] | None = None,
    codec: str = "raw",
) -> bytes:
    """The trained blocks for the next round; untouched ones are absent.

    Args:
        state: after the round before.
        manifest: of the blocks.
        held: ids of the blocks that the receiver holds; None: all.
        codec: of values, a key of :data:`samv2.updates.packing.CODECS`.
    """
    trained = {
        key: value
        for key, value in state.blocks.items()
        if (held is None or key in held) and bool(value.any())
    }
    return pack(trained, manifest, round=state.round + 1, codec=codec)


def server_merge(
    state: ServerState,
    replies: Sequence[ValidReply],
    refusals: Sequence[Refusal],
    manifest: Manifest,
    settings: Settings,
    *,
    visits: Sequence[int] | None = None,
    key: bytes | None = None,
) -> tuple[ServerState, MergeReport]:
    """Aggregate a round's replies and edit the graph.

    Args:
        state: after the round before.
        replies: valid replies, in any order.
        refusals: for the report.
        manifest: of the blocks.
        settings: of the run.
        visits: of a token in each converted layer; None: K everywhere.
        key: of the noise, see :func:`samv2.federated.privacy.noise_key`; needed where
            ``privacy.noise`` is not 0.

    Returns:
        The state after this round, the same bits for any order of replies.

    Raises:
        FederationError: privacy is on and there is no key.
    """
    ordered = sorted(replies, key=lambda reply: reply.contribution.client)
    contributions = [reply.contribution for reply in ordered]
    averaged = _averaged(contributions, state, manifest, settings, key)
    blocks, moments = server_step(
        state.blocks,
        _shared(averaged.mean, state, settings),
        state.moments,
        settings.aggregation,
    )
    layers, experts = state.graph.edge_mask_LEE.shape[:2]
    votes = sum_votes(
        [reply.usage for reply in ordered],
        layers,
        experts,
        round=state.round + 1,
        vote_cap=settings.edits.vote_cap,
    )
    edits, memory = decide_edits(
        state.graph,
        state.memory,
        votes.counts,
        settings.edits,
        visits=visits or [settings.experts.experts_per_token] * layers,
        num_shared=settings.experts.num_shared,
        voters_LEE=votes.voters_LEE,
    )
    graph = state.graph
    if edits:
        graph = apply_edits(graph, edits, version=graph.version + 1)
    merged = replace(
        state,
        round=state.round + 1,
        blocks=blocks,
        graph=graph,
        memory=memory,
        last_edits=tuple(edits) if edits else state.last_edits,
        moments=moments,
        merged_rounds=(
            count_rounds(state.merged_rounds, contributions)
            if settings.privacy.noise
            else state.merged_rounds
        ),
    )
    report = MergeReport(
        round=merged.round,
        edits=tuple(edits),
        contributors=averaged.contributors,
        counts=votes.counts,
        replies=tuple(ordered),
        refusals=tuple(
            sorted(refusals, key=lambda item: (item.client, item.reason, item.detail))
        ),
        graph_version=graph.version,
        epsilon=_epsilon(merged, settings),
    )
    return merged, report


def _averaged(
    contributions: Sequence[Contribution],
    state: ServerState,
    manifest: Manifest,
    settings: Settings,
    key: bytes | None,
) -> Aggregated:
    if settings.privacy.noise == 0:
        return aggregate(
            contributions,
            manifest,
            round=state.round + 1,
            normalise=settings.federation.normalise,
            clip_norm=settings.federation.clip_update_norm,
            rules=settings.aggregation,
        )
    if key is None:
        raise FederationError(
            f"privacy.noise is {settings.privacy.noise}, but the server has no key to "
            "make the noise from; give server_merge the run's noise_key"
        )
    return private_mean(
        contributions,
        manifest,
        settings,
        round=state.round + 1,
        key=key,
        graph=(len(state.graph.order_LE), state.graph.order_LE.shape[1]),
    )


def _epsilon(state: ServerState, settings: Settings) -> float | None:
    """Of the client whose updates were merged most often."""
    privacy = settings.privacy
    if privacy.noise == 0:
        return None
    most = max(state.merged_rounds.values(), default=0)
    return epsilon_after(most, noise=privacy.noise, delta=privacy.delta)


def _shared(
    mean: dict[int, Tensor], state: ServerState, settings: Settings
) -> dict[int, Tensor]:
    """The round's change, with what siblings have of one another."""
    siblings = settings.adapter.siblings
    if siblings == 1:
        return mean
    layers, experts = state.graph.edge_mask_LEE.shape[:2]
    return share_update(
        mean,
        sizes={key: len(block) for key, block in state.blocks.items()},
        experts=layers * experts,
        used=used_siblings(state.blocks[max(state.blocks)], siblings),
        share=settings.federation.sibling_share,
    )
