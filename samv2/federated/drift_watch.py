"""The server's watch over its clients' text, from one scoring to the next.

Asks and applies; what is decided, and why, is in :mod:`samv2.federated.drift`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from flwr.serverapp import Grid

from samv2.common.settings import Settings
from samv2.federated.ask_counts import ask_counts
from samv2.federated.drift import (
    SiblingChange,
    describe,
    observe,
    respond,
    retire,
)
from samv2.federated.drift_blocks import apply_changes
from samv2.federated.questions import answer_seconds
from samv2.federated.server_merge import ServerState
from samv2.federated.server_optimizer import forget

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """What a round's watch came to."""

    changes: tuple[SiblingChange, ...] = ()
    """What was done about clients whose text has changed."""
    frames: dict[int, bytes] = field(default_factory=dict)
    """Token counts that clients sent for it, as they came."""

    @property
    def bytes_up(self) -> dict[int, int]:
        """Bytes of these by client."""
        return {client: len(frame) for client, frame in self.frames.items()}


def watch_drift(
    state: ServerState,
    settings: Settings,
    grid: Grid,
    clients: Mapping[int, int],
    *,
    losses: Mapping[int, float],
    moved: Mapping[int, float],
    asking: AbstractContextManager[None] = nullcontext(),
) -> tuple[ServerState, DriftReport]:
    """After a scoring: see whose text has changed, and find it a sibling.

    Args:
        state: after the round's merge; where it watches no siblings, nothing is done.
        settings: of the run.
        grid: to ask alarmed clients for token counts on.
        clients: {node id: client}.
        losses: {client: mean held-out loss, nats} of those that were scored.
        moved: {client: distance of its text from what it was} of those that said so.
        asking: entered while clients are asked.

    Returns:
        The state after, and what was done.
    """
    memory, siblings = state.siblings, settings.adapter.siblings
    if memory is None:
        return state, DriftReport()
    memory, alarmed = observe(memory, losses, moved, settings.drift)
    memory, changes = retire(memory, losses.keys() | moved.keys(), settings.drift)
    frames: dict[int, bytes] = {}
    if alarmed:
        with asking:
            counts, frames = ask_counts(
                grid,
                clients,
                alarmed,
                state.round + 1,
                timeout=answer_seconds(settings.federation.round_timeout),
            )
        memory, found = respond(
            memory, counts, settings.drift, siblings=siblings, round=state.round
        )
        changes += found
    for change in changes:
        log.info("round %d: %s", state.round, describe(change))
    blocks = apply_changes(
        state.blocks,
        memory,
        changes,
        siblings=siblings,
        experts=state.graph.order_LE.numel(),
    )
    rewritten = {key for key in blocks if blocks[key] is not state.blocks[key]}
    watched = replace(
        state,
        blocks=blocks,
        siblings=memory,
        moments=forget(state.moments, rewritten),
    )
    return watched, DriftReport(changes=changes, frames=frames)
