"""Who holds which part of the model: asked once a start, the same for the same budgets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from samv2.common.errors import ConfigError
from samv2.experts.sub_graph import SubGraph
from samv2.federated.subgraph import ClientBudget, Planner

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of clients that do not hold the whole model."""

    of_client: dict[int, SubGraph] = field(default_factory=dict)
    siblings: int = 1

    def part(self, client: int) -> SubGraph | None:
        """What a client holds; None: the whole model."""
        return self.of_client.get(client)

    def held(self, client: int) -> frozenset[int] | None:
        """Ids of the blocks that a client holds; None: all."""
        part = self.part(client)
        if part is None or part.whole:
            return None
        return frozenset(part.block_ids(self.siblings).values())


def plan_parts(
    planner: Planner, budgets: Mapping[int, ClientBudget]
) -> tuple[Parts, dict[int, str]]:
    """The part of every client, and a line in the log for each kind.

    Returns:
        The parts; and why of each client that not even the smallest part fits.
    """
    found: dict[int, SubGraph | None] = {}
    unfit: dict[int, str] = {}
    for client, budget in sorted(budgets.items()):
        try:
            found[client] = planner.plan(budget)
        except ConfigError as error:
            unfit[client] = "; ".join(error.faults)
    of_client = {client: part for client, part in found.items() if part is not None}
    for part, count in Counter(found.values()).items():
        log.info("%d clients hold %s", count, describe_part(planner, part))
    return Parts(of_client=of_client, siblings=planner.config.siblings), unfit


def describe_part(planner: Planner, part: SubGraph | None) -> str:
    """A part for a person, in one line."""
    whole = planner.config.num_experts
    need = f"about {planner.memory(part).total / 1e6:,.0f} MB in training"
    if part is None:
        return f"the whole model: {whole} experts a layer, {need}"
    micro = part.micro_batch or planner.batch_size
    return (
        f"{part.size} of {whole} experts a layer, K = {part.experts_per_token}, "
        f"{micro} of {planner.batch_size} windows at once, {need}"
    )
