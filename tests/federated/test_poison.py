"""Well-formed poison under the robust rules: how far it can carry the model.

The bound, per coordinate: as long as no more updates of an expert are poison than the
rule cuts off at one end, its change lies between the least and the largest honest one.
So does the change without the poison, and the two differ by that range at most. Under
the mean there is no such bound, which the last test shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samv2.federated.server_merge import ServerState, ValidReply, server_merge
from samv2.federated.usage import pack_usage, zero_counts
from samv2.updates.aggregate import Contribution
from samv2.updates.packing import pack
from tests.federated.runs import (
    EXPERTS,
    LAYERS,
    toy_graph,
    toy_manifest,
    toy_settings,
    toy_state,
    toy_update,
)

pytestmark = pytest.mark.hostile

Update = dict[int, Tensor]
ALL = tuple(range(LAYERS * EXPERTS + 1))
DIRECTION = toy_update(999, ALL)
POISON: dict[str, Callable[[int], Update]] = {
    "sign-flipped": lambda client: scaled(honest(client), -1.0),
    "flipped and large": lambda client: scaled(honest(client), -100.0),
    "scaled x100": lambda client: scaled(honest(client), 100.0),
    "random": lambda client: scaled(toy_update(500 + client, ALL), 30.0),
    "all alike": lambda client: scaled(toy_update(998, ALL), 5000.0),
    "a little beyond": lambda client: scaled(DIRECTION, 1.6),
    "zero but one expert": lambda client: {3: torch.full((6,), 9999.0)},
}
GROUPS = [(1, 5), (2, 10)]


def honest(client: int, ids: Sequence[int] = ALL) -> Update:
    """A common direction, and what the client's own text adds."""
    own = toy_update(client, ids)
    return {key: DIRECTION[key] + 0.3 * own[key] for key in ids}


def scaled(update: Update, factor: float) -> Update:
    return {key: factor * block for key, block in update.items()}


def usage_of(demand: int = 0) -> bytes:
    """Every edge used alike, and a missing one wanted so often."""
    counts = zero_counts(LAYERS, EXPERTS)
    counts.usage_LEE[toy_graph().edge_mask_LEE] = 10
    counts.demand_LEE[0, 0, 2] = demand
    return pack_usage(counts, round=1)


def reply(client: int, update: Update, weight: float = 1.0) -> ValidReply:
    """A reply that has passed validation."""
    return ValidReply(
        contribution=Contribution(
            client=client,
            data=pack(update, toy_manifest(), round=1),
            weight=weight,
            expert_ids=tuple(sorted(update)),
        ),
        usage=usage_of(),
        edge_visits=120,
        bytes_up=1,
        train_loss=4.0,
        tokens=64,
    )


def merged(replies: list[ValidReply], *overrides: str) -> ServerState:
    """The toy model after a round."""
    settings = toy_settings("edits.rho_max=0", *overrides)
    state, _ = server_merge(toy_state(), replies, [], toy_manifest(), settings)
    return state


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("bad, clients", GROUPS)
@pytest.mark.parametrize("rule", ["trimmed_mean", "median"])
def test_poison_leaves_every_coordinate_between_honest_ones(
    rule: str, bad: int, clients: int, poison: str
) -> None:
    good = {client: honest(client) for client in range(bad, clients)}
    replies = [reply(client, update) for client, update in good.items()]
    hostile = [reply(client, POISON[poison](client), 1e6) for client in range(bad)]
    chosen = f"aggregation.rule={rule}"
    with_poison = merged(replies + hostile, chosen)
    without = merged(replies, chosen)
    for key, block in with_poison.blocks.items():
        rows = torch.stack([update[key] for update in good.values()])
        least, most = rows.amin(dim=0), rows.amax(dim=0)
        assert bool((block >= least).all()) and bool((block <= most).all())
        moved = (block - without.blocks[key]).abs()
        assert bool((moved <= most - least).all())


@pytest.mark.parametrize("rule", ["trimmed_mean", "median"])
def test_the_bound_holds_for_experts_that_a_quorum_sent(rule: str) -> None:
    """Honest clients send two thirds of the experts; nothing is lost to zeros."""
    good = {
        client: honest(client, [key for key in ALL if (key + client) % 3])
        for client in range(1, 10)
    }
    replies = [reply(client, update) for client, update in good.items()]
    hostile = reply(0, scaled(honest(0), -100.0))
    state = merged([*replies, hostile], f"aggregation.rule={rule}")
    for key, block in state.blocks.items():
        rows = torch.stack([update[key] for update in good.values() if key in update])
        assert len(rows) == 6
        assert bool((block >= rows.amin(dim=0)).all())
        assert bool((block <= rows.amax(dim=0)).all())


def test_below_the_quorum_poison_is_no_longer_than_an_honest_update() -> None:
    update, poison = honest(0, [3]), scaled(honest(1, [3]), -100.0)
    replies = [reply(0, update), reply(1, poison)]
    state = merged(replies, "aggregation.rule=median")
    assert float(state.blocks[3].norm()) <= float(update[3].norm())


def test_a_lone_sender_is_held_by_the_median_norm_of_whole_updates() -> None:
    replies = [reply(client, honest(client, [0, 1])) for client in range(4)]
    hostile = reply(4, {7: torch.full((6,), 9999.0)})
    settings = ("aggregation.rule=median", "aggregation.clip_to_median=1.0")
    state = merged([*replies, hostile], *settings)
    norms = sorted(
        float(torch.cat([honest(client)[key] for key in (0, 1)]).norm())
        for client in range(4)
    )
    assert float(state.blocks[7].norm()) <= norms[2] * (1 + 1e-5)


def test_the_mean_has_no_such_bound() -> None:
    replies = [reply(client, honest(client)) for client in range(1, 5)]
    state = merged([*replies, reply(0, scaled(honest(0), -100.0))])
    assert float(state.blocks[0].norm()) > 10 * float(honest(1)[0].norm())


def test_one_liar_has_no_edge_made_that_two_must_want() -> None:
    liar = replace(reply(0, honest(0)), usage=usage_of(demand=60))
    replies = [liar, reply(1, honest(1)), reply(2, honest(2))]

    def edges(*overrides: str) -> list[tuple[str, int, int, int]]:
        settings = toy_settings("edits.patience=1", "edits.momentum=0", *overrides)
        _, report = server_merge(toy_state(), replies, [], toy_manifest(), settings)
        return [(e.kind, e.layer, e.src, e.dst) for e in report.edits]

    assert edges() == [("promote", 0, 0, 2)]
    assert edges("edits.min_voters=2") == []
