"""Who holds which part of the model: asked once a start, the same for the same budgets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from samv2.experts.sub_graph import SubGraph
from samv2.federated.grid import FLOPS_BUDGET, MEMORY_BUDGET, message_to
from samv2.federated.subgraph import ClientBudget, Planner, believed_budget

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


def ask_budgets(
    grid: Grid, clients: Mapping[int, int], timeout: float
) -> dict[int, ClientBudget]:
    """What clients say they can hold; one that does not say has no limit.

    Args:
        grid: to ask on.
        clients: {node id: client}.
        timeout: seconds to wait for answers.
    """
    messages = [
        message_to(grid, node, RecordDict(), MessageType.QUERY, "budgets")
        for node in clients
    ]
    budgets: dict[int, ClientBudget] = {}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        client = clients.get(reply.metadata.src_node_id)
        if client is None or not reply.has_content():
            continue
        metrics = reply.content.get("metrics") or {}
        budgets[client] = believed_budget(
            metrics.get(MEMORY_BUDGET), metrics.get(FLOPS_BUDGET)
        )
    return budgets


def plan_parts(planner: Planner, budgets: Mapping[int, ClientBudget]) -> Parts:
    """The part of every client, and a line in the log for each kind.

    Raises:
        ConfigError: a budget that not even the smallest part fits.
    """
    found = {client: planner.plan(budget) for client, budget in budgets.items()}
    of_client = {c: part for c, part in sorted(found.items()) if part is not None}
    for part, count in Counter(found.values()).items():
        log.info("%d clients hold %s", count, describe_part(planner, part))
    return Parts(of_client=of_client, siblings=planner.config.siblings)


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
