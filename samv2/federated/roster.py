"""Which node is which client, what clients can hold, and who is asked no more.

A node says itself which client it is. So that none can take another's place, a client
belongs to the node that was it first: another that claims it is not believed while that
node is there, and gives way when it comes back. A node may claim a client whose own node
is gone, since nodes that nobody registered come back under other ids. A node whose claim
was not believed is asked no more while it is connected; one of a client in quarantine,
never again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from samv2.common.errors import FederationError
from samv2.federated.exchange import first_line
from samv2.federated.grid import FLOPS_BUDGET, MEMORY_BUDGET
from samv2.federated.questions import ANSWER_SECONDS, ask
from samv2.federated.refusals import count_hostile, quarantined
from samv2.federated.server_merge import Refusal
from samv2.federated.subgraph import ClientBudget, believed_budget

log = logging.getLogger(__name__)

ENROL_SECONDS = 120.0
"""Without a new node, after which clients that are missing are given up."""
TRIES = 3
"""How often a node that is new in mid-run is asked who it is, and does not say."""
HOMES = 16
"""Nodes of a client that are remembered."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a node says of itself."""

    node: int
    client: int
    budget: ClientBudget


class Roster:
    """The clients of a run.

    Args:
        wanted: clients of the run, numbered from 0.
        quarantine: hostile replies after which a client is asked no more; 0: never.
    """

    def __init__(self, wanted: int, quarantine: int = 0) -> None:
        self._wanted = range(wanted)
        self._quarantine = quarantine
        self.clients: dict[int, int] = {}
        """{node id: client} of those that may be asked, by node."""
        self.budgets: dict[int, ClientBudget] = {}
        """What each client said it can hold, when it was asked who it is."""
        self._homes: dict[int, list[int]] = {}
        self._hostile: dict[int, int] = {}
        self._barred: set[int] = set()
        self._false: set[int] = set()
        self._left_out: set[int] = set()
        self._in_vain: Counter[int] = Counter()

    def memory(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps: hostile replies and nodes by client, barred nodes."""
        return {
            "hostile": _named(self._hostile),
            "homes": _named(self._homes),
            "barred": {str(node): 1 for node in sorted(self._barred)},
        }

    def recall(self, memory: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up what an earlier start's :meth:`memory` was, before :meth:`enrol`."""
        self._hostile = _numbered(memory.get("hostile", {}))
        self._homes = _numbered(memory.get("homes", {}))
        self._barred = set(_numbered(memory.get("barred", {})))

    def enrol(self, grid: Grid) -> None:
        """Wait for the clients that are wanted and not away, and learn who is who.

        The wait is as long as somebody new comes: clients that are missing are given up
        when no other node connects for :data:`ENROL_SECONDS`, or when all were asked,
        for :data:`~samv2.federated.questions.ANSWER_SECONDS`, and no other client has
        answered. One that is silent or fails is asked again as long as others answer.

        Raises:
            FederationError: too few nodes, or two nodes claim a client that no node had
                before.
        """
        needed = set(self._wanted) - self._away()
        there: dict[int, int] | None = None
        while True:
            nodes = self._connected(grid, len(needed))
            if there is None:
                there = {n: c for n, c in self.clients.items() if n in nodes}
            unknown = [node for node in nodes if node not in there]
            claims, failures = self._claims(grid, unknown, ANSWER_SECONDS)
            found = self._believed(claims, there, nodes, failures)
            there |= found
            missing = sorted(needed - set(there.values()))
            if not missing:
                break
            if not found:
                raise FederationError(
                    f"clients {missing} are not there "
                    f"({'; '.join(failures) or 'no answer'}); "
                    "check that each node has its own partition-id and its shard"
                )
        self.clients = {n: c for n, c in sorted(there.items()) if c in needed}

    def renew(self, grid: Grid, timeout: float) -> None:
        """Follow clients whose nodes have come back, perhaps under other ids.

        Nobody is asked unless a client's node is gone and there is a node that is
        unknown and has not been asked in vain.

        Args:
            grid: to look on.
            timeout: seconds to wait for an answer.
        """
        nodes = set(self._nodes(grid))
        for client, homes in self._homes.items():
            self._come_home(client, [home for home in homes if home in nodes])
        gone = {client for node, client in self.clients.items() if node not in nodes}
        tried = {node for node, count in self._in_vain.items() if count >= TRIES}
        unknown = sorted(nodes - self.clients.keys() - self._false - tried)
        if not gone or not unknown:
            return
        claims, _ = self._claims(grid, unknown, timeout)
        self._in_vain.update(set(unknown) - {claim.node for claim in claims})
        for client in sorted(gone):
            own = [claim.node for claim in claims if claim.client == client]
            if len(own) == 1:
                self._move(client, own[0])
            elif own:
                log.warning("nodes %s all say that they are client %d", own, client)

    def _come_home(self, client: int, homes: Sequence[int]) -> None:
        """Take the client's own node again, if it is there, in another's place."""
        tenant = self.node_of(client)
        if tenant is None or not homes or tenant == homes[0]:
            return
        self._move(client, homes[0])
        if tenant not in self._homes[client]:
            self._disbelieve(tenant, client, homes[0])

    def _disbelieve(self, node: int, client: int, home: int) -> str:
        """Ask a node no more while it is connected; returns what is said of it."""
        self._false.add(node)
        why = f"node {node} says that it is client {client}, which is node {home}"
        log.warning("%s; it is not asked again before it has left and come back", why)
        return why

    def node_of(self, client: int) -> int | None:
        """The node of a client that may be asked."""
        return next((n for n, c in self.clients.items() if c == client), None)

    def missing(self, grid: Grid) -> bool:
        """Whether a client's node is gone."""
        return bool(set(self.clients) - set(grid.get_node_ids()))

    def leave_out(self, client: int, why: str) -> None:
        """Do without a client for the rest of this start."""
        log.warning("client %d is left out: %s", client, why)
        self._left_out.add(client)
        self._drop({client})

    def judge(self, server_round: int, refusals: Iterable[Refusal]) -> None:
        """Ask clients no more that have sent too many replies of a hostile kind."""
        self._hostile = count_hostile(self._hostile, refusals)
        away = quarantined(self._hostile, self._quarantine)
        for node, client in self.clients.items():
            if client in away:
                self._barred.add(node)
                log.warning(
                    "round %d: client %d has had %d hostile replies refused and is asked "
                    "no more (federation.quarantine = %d)",
                    server_round,
                    client,
                    self._hostile[client],
                    self._quarantine,
                )
        self._drop(away)

    def _away(self) -> set[int]:
        return quarantined(self._hostile, self._quarantine) | self._left_out

    def _drop(self, away: set[int]) -> None:
        self.clients = {n: c for n, c in self.clients.items() if c not in away}

    def _move(self, client: int, node: int) -> None:
        kept = {n: c for n, c in self.clients.items() if c != client}
        self.clients = dict(sorted((kept | {node: client}).items()))

    def _nodes(self, grid: Grid) -> list[int]:
        """Connected nodes that may be asked."""
        connected = set(grid.get_node_ids())
        self._false &= connected
        return sorted(connected - self._barred - self._false)

    def _connected(self, grid: Grid, wanted: int) -> list[int]:
        """The nodes that may be asked, once there are enough.

        Raises:
            FederationError: there are not, and none came for :data:`ENROL_SECONDS`.
        """
        most, deadline = 0, time.monotonic() + ENROL_SECONDS
        while len(nodes := self._nodes(grid)) < wanted:
            if len(nodes) > most:
                most, deadline = len(nodes), time.monotonic() + ENROL_SECONDS
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{len(nodes)} of {wanted} clients are connected, and in "
                    f"{ENROL_SECONDS:g} s no other came; start the missing ones or lower "
                    "federation.clients"
                )
            time.sleep(0.5)
        return nodes

    def _claims(
        self, grid: Grid, nodes: Sequence[int], timeout: float
    ) -> tuple[list[Claim], list[str]]:
        """Of nodes that say which client they are, and why others do not."""
        claims: list[Claim] = []
        failures: list[str] = []
        questions = {node: RecordDict() for node in nodes}
        for node, reply in ask(grid, questions, "enrol", timeout=timeout):
            claim = _claim_of(node, reply)
            if claim is None:
                failures.append(first_line(reply))
            elif claim.client in self._wanted and claim.client not in self._away():
                claims.append(claim)
        return sorted(claims, key=lambda claim: claim.node), failures

    def _believed(
        self,
        claims: Sequence[Claim],
        there: Mapping[int, int],
        nodes: Sequence[int],
        failures: list[str],
    ) -> dict[int, int]:
        """{node: client} of claims that are believed: each is a client's own node then.

        Args:
            claims: of nodes that are not in ``there``.
            there: {node: client} as known.
            nodes: that are connected.
            failures: what is said of those that are not believed is added.

        Raises:
            FederationError: two nodes claim a client that no node had before.
        """
        found: dict[int, int] = {}
        for client in sorted({claim.client for claim in claims}):
            own = [claim for claim in claims if claim.client == client]
            taken = next((n for n, c in there.items() if c == client), None)
            homes = [h for h in self._homes.get(client, ()) if h in nodes]
            holder = taken if taken is not None else next(iter(homes), None)
            if holder is None and len(own) > 1:
                raise FederationError(
                    f"two nodes hold client {client}: "
                    f"{[claim.node for claim in own]}; give each its own partition-id, "
                    "or unregister the one that is not yours"
                )
            for claim in own:
                if holder in (None, claim.node):
                    found[claim.node] = client
                    self.budgets.setdefault(client, claim.budget)
                    remembered = self._homes.setdefault(client, [])
                    if claim.node not in remembered:
                        remembered.append(claim.node)
                        del remembered[:-HOMES]
                else:
                    failures.append(self._disbelieve(claim.node, client, holder))
        return found


def sample_nodes(
    clients: Mapping[int, int], count: int, seed: int, server_round: int
) -> dict[int, int]:
    """A round's clients, which depend on seed, round and who is there.

    Args:
        clients: {node id: client} of those that may be asked.
        count: how many to take; where there are fewer, all.
        seed: of the run.
        server_round: from 1.
    """
    if not clients:
        return {}
    by_client = {client: node for node, client in clients.items()}
    generator = np.random.default_rng([seed, server_round])
    size = min(count, len(by_client))
    chosen = generator.choice(sorted(by_client), size=size, replace=False)
    return {by_client[int(client)]: int(client) for client in sorted(chosen)}


def _claim_of(node: int, reply: Message) -> Claim | None:
    """What an enrolment reply claims; None where it names no client."""
    if reply.has_error() or "metrics" not in reply.content:
        return None
    metrics = reply.content["metrics"]
    client = metrics.get("client")
    if type(client) is not int:
        return None
    budget = believed_budget(metrics.get(MEMORY_BUDGET), metrics.get(FLOPS_BUDGET))
    return Claim(node=node, client=client, budget=budget)


def _named(numbers: Mapping[int, Any]) -> dict[str, Any]:
    return {str(key): number for key, number in sorted(numbers.items())}


def _numbered(names: Mapping[str, Any]) -> dict[int, Any]:
    return {int(key): number for key, number in names.items()}
