"""Replies from the network are hostile until proven otherwise.

Every check runs before anything of a reply reaches the server's state. A reply that
fails is refused with a machine-readable reason, and the round goes on.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from samv2.common.errors import FrameError
from samv2.common.settings import Settings
from samv2.experts.graph import ExpertGraph
from samv2.federated.client_round import TrainReply
from samv2.federated.server_merge import ServerState, ValidReply
from samv2.federated.siblings import unserved_rows
from samv2.federated.usage import EdgeCounts, unpack_usage
from samv2.updates.aggregate import Contribution
from samv2.updates.packing import Manifest, unpack

LARGEST_VALUE = 1e4
"""Largest absolute change of a parameter in one round that is believed."""
LARGEST_LOSS = 50.0
"""Largest mean loss, in nats a token, that is believed. To guess evenly among 256,000
tokens costs 12.5, so a model at 50 is broken; and exp(50) is still a number."""
LARGEST_SECONDS = 1e6
"""Longest training of a round that is believed."""


def validate_reply(
    reply: TrainReply,
    client: int,
    state: ServerState,
    manifest: Manifest,
    settings: Settings,
    *,
    visits: Sequence[int] | None = None,
    held: Container[int] | None = None,
) -> ValidReply:
    """Check one reply against what the server asked for.

    Args:
        reply: as received.
        client: index of the client it came from, by the server's own records.
        state: the server's state before the merge.
        manifest: of the blocks.
        settings: limits; an update weighs as much as its examples, at most as many as a
            round's windows and ``federation.max_examples``.
        visits: most visits a token makes in each converted layer; None: K everywhere.
        held: ids of the blocks that the client holds; None: all.

    Returns:
        The reply, ready to merge.

    Raises:
        FrameError: the reason; one of the frame format's, or ``budget`` (update larger
            than allowed), ``examples``, ``tokens``, ``train_loss``, ``seconds``,
            ``graph_version``, ``usage_range``, ``empty_update``, ``not_held``,
            ``fixed_block``, ``update_range``.
    """
    current = state.round + 1
    budget = settings.federation.update_budget_bytes
    if len(reply.update) > budget:
        raise FrameError(
            "budget", f"the update has {len(reply.update)} bytes, allowed are {budget}"
        )
    _check_number("examples", reply.examples, 1, None)
    windows = settings.train.local_steps * settings.train.batch_size
    limit = windows * settings.train.sequence_length
    _check_number("tokens", reply.tokens, 1, limit)
    if not 0 <= reply.train_loss <= LARGEST_LOSS:
        raise FrameError(
            "train_loss",
            f"the training loss is {reply.train_loss}, it must be in 0..{LARGEST_LOSS:g}; "
            "training that diverges needs a lower train.learning_rate",
        )
    if not 0 <= reply.seconds <= LARGEST_SECONDS:
        raise FrameError(
            "seconds",
            f"training took {reply.seconds} s, it must be in 0..{LARGEST_SECONDS:g}",
        )
    if reply.graph_version != state.graph.version:
        raise FrameError(
            "graph_version",
            f"the client walked graph version {reply.graph_version}, the round's is "
            f"{state.graph.version}",
        )
    layers, experts = state.graph.edge_mask_LEE.shape[:2]
    if visits is None:
        visits = [settings.experts.experts_per_token] * layers
    counts = unpack_usage(
        reply.usage,
        layers,
        experts,
        round=current,
        max_count=reply.tokens,
        max_visits=[reply.tokens * each for each in visits],
    )
    if held is not None:
        _check_walked(counts, state.graph, held)
    update = unpack(reply.update, manifest, round=current)
    largest = {key: float(block.abs().max()) for key, block in update.items()}
    # A small change may round to zeros in its codec; such a block counts as not sent.
    changed = tuple(key for key, value in largest.items() if value > 0)
    if not changed:
        raise FrameError("empty_update", "the update changes no expert")
    strange = [key for key in update if held is not None and key not in held]
    if strange:
        raise FrameError(
            "not_held", f"the update changes block {strange[0]}, which its client lacks"
        )
    if settings.adapter.siblings > 1:
        _check_siblings(update, state, settings.adapter.siblings)
    most = max(largest.values())
    if most > LARGEST_VALUE:
        raise FrameError(
            "update_range",
            f"the update holds a value of {most:g}; allowed are {LARGEST_VALUE:g}",
        )
    return ValidReply(
        contribution=Contribution(
            client=client,
            data=reply.update,
            weight=float(
                min(reply.examples, windows, settings.federation.max_examples)
            ),
            expert_ids=changed,
        ),
        usage=reply.usage,
        edge_visits=int(counts.usage_LEE.sum()),
        bytes_up=reply_bytes(reply),
        train_loss=reply.train_loss,
        tokens=reply.tokens,
        seconds=reply.seconds,
    )


def _check_siblings(update: Container[int], state: ServerState, siblings: int) -> None:
    """Refuse a change of the gate, or of a sibling that serves no text."""
    gate = max(state.blocks)
    if gate in update:
        raise FrameError("fixed_block", "the update changes the gate, which is fixed")
    experts = state.graph.order_LE.numel()
    unserved = unserved_rows(state.blocks[gate], siblings, experts)
    strange = sorted(key for key in unserved if key in update)
    if strange:
        raise FrameError(
            "not_held",
            f"the update changes block {strange[0]}, of a sibling that serves no text",
        )


def _check_walked(counts: EdgeCounts, graph: ExpertGraph, held: Container[int]) -> None:
    """Refuse counts of edges from or to experts that the client lacks."""
    layers, experts = graph.order_LE.shape
    first_L1 = torch.arange(layers).unsqueeze(1) * experts
    lacks_LE = torch.tensor(
        [
            [key not in held for key in row]
            for row in (first_L1 + graph.order_LE).tolist()
        ]
    )
    lacks_LEE = lacks_LE.unsqueeze(1) | lacks_LE.unsqueeze(2)
    if bool(((counts.usage_LEE + counts.demand_LEE) * lacks_LEE).any()):
        raise FrameError(
            "not_held", "the usage counts name edges of experts that the client lacks"
        )


def reply_bytes(reply: TrainReply) -> int:
    """Payload bytes of a reply: both frames and five numbers of eight bytes."""
    return len(reply.update) + len(reply.usage) + 5 * 8


def _check_number(name: str, value: int, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise FrameError(name, f"{name} is {value!r}, not a whole number")
    if value < least or (most is not None and value > most):
        span = f"at least {least}" if most is None else f"{least}..{most}"
        raise FrameError(name, f"{name} is {value}, it must be {span}")
