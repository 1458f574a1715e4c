"""Which node is which client, what clients can hold, and who is asked no more.

A node says itself which client it is. So that none can take another's place, a client
belongs to the node that was it first, its *home*: another that claims it is not believed
while that node is there, and gives way when it comes back and says so again. A node may
claim a client whose own node is gone, since nodes that nobody registered come back under
other ids. A node whose claim was not believed is not asked again while it and the client's
node are both connected; one in quarantine is never asked again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.serverapp import Grid

from samv2.common.errors import FederationError
from samv2.common.json_keys import number_keys, text_keys
from samv2.federated.questions import ANSWER_SECONDS, Claim, Who, ask_who
from samv2.federated.refusals import count_hostile, quarantined
from samv2.federated.server_merge import Refusal
from samv2.federated.subgraph import ClientBudget

log = logging.getLogger(__name__)

ENROL_SECONDS = 120.0
"""Without a new node, after which clients that are missing are given up."""
TRIES = 3
"""How often a node that is new in mid-run is asked who it is, and does not say."""
HOMES = 16
"""Nodes of a client that are remembered."""


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
        self._false: dict[int, int] = {}
        self._guest_hostile: Counter[int] = Counter()
        self._left_out: set[int] = set()
        self._in_vain: Counter[int] = Counter()

    def memory(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps: hostile replies and nodes by client, barred nodes."""
        return {
            "hostile": text_keys(self._hostile),
            "homes": text_keys(self._homes),
            "barred": {str(node): 1 for node in sorted(self._barred)},
        }

    def recall(self, memory: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up what an earlier start's :meth:`memory` was, before :meth:`enrol`."""
        self._hostile = number_keys(memory.get("hostile", {}))
        self._homes = number_keys(memory.get("homes", {}))
        self._barred = set(number_keys(memory.get("barred", {})))

    def enrol(self, grid: Grid) -> None:
        """Wait for the clients that are wanted and not away, and learn who is who.

        The wait is as long as somebody new comes: clients that are missing are given up
        when no other node connects for :data:`ENROL_SECONDS`, or when all were asked,
        for :data:`~samv2.federated.questions.ANSWER_SECONDS`, and no other client has
        answered. One that is silent or fails is asked again as long as others answer,
        and one whose node has just gone for :data:`ENROL_SECONDS`: it may be starting.

        Raises:
            FederationError: too few nodes, or two nodes claim a client that neither of
                them was before.
        """
        needed, first = self._needed(), not self.clients
        there: dict[int, int] | None = None
        deadline = time.monotonic() + ENROL_SECONDS
        while True:
            nodes = self._connected(grid, len(needed))
            if there is None:
                bound = self.clients.keys() - self._guests()
                there = {n: self.clients[n] for n in sorted(bound) if n in nodes}
            unknown = [node for node in nodes if node not in there]
            who = self._ask(grid, unknown, ANSWER_SECONDS)
            found = self._believed(who, there)
            self._settle(found, who.claims, homes=first)
            there |= found
            missing = sorted(needed - set(there.values()))
            if not missing:
                break
            now = time.monotonic()
            if found:
                deadline = now + ENROL_SECONDS
            elif who.away and now < deadline:
                time.sleep(1)
            else:
                raise FederationError(
                    f"clients {missing} are not there "
                    f"({'; '.join(who.failures) or 'no answer'}); "
                    "check that each node has its own partition-id and its shard"
                )
        self.clients = {n: c for n, c in sorted(there.items()) if c in needed}

    def renew(self, grid: Grid, timeout: float) -> None:
        """Follow clients whose nodes have come back, perhaps under other ids.

        Nobody is asked unless a client's node is gone and there is a node that is
        unknown, or a client's own node is back; nor who was asked in vain.

        Args:
            grid: to look on.
            timeout: seconds to wait for an answer.
        """
        nodes = set(self._nodes(grid))
        gone = self._needed() - {c for n, c in self.clients.items() if n in nodes}
        tried = {node for node, count in self._in_vain.items() if count >= TRIES}
        unknown = nodes - self.clients.keys() - tried
        asked = unknown if gone else unknown & self._homes_of_guests()
        if not asked:
            return
        claims = self._ask(grid, sorted(asked), timeout).claims
        for client in sorted({claim.client for claim in claims}):
            own = [claim.node for claim in claims if claim.client == client]
            homes = [n for n in self._homes.get(client, ()) if n in own]
            host = self.node_of(client)
            if homes and (client in gone or host in self._guests()):
                self._move(client, homes[0])
                if host is not None and client not in gone:
                    self._disbelieve(host, client, homes[0])
            elif client in gone and len(own) == 1:
                self._move(client, own[0])
            elif client in gone:
                log.warning("nodes %s all say that they are client %d", own, client)
        self._in_vain.update(asked - self.clients.keys())

    def _guests(self) -> set[int]:
        """Nodes that stand in for a client whose home they are not."""
        return {n for n, c in self.clients.items() if n not in self._homes.get(c, ())}

    def _homes_of_guests(self) -> set[int]:
        guests = {self.clients[node] for node in self._guests()}
        return {home for client in guests for home in self._homes.get(client, ())}

    def _disbelieve(self, node: int, client: int, home: int) -> str:
        """Ask a node no more while both are there; returns what is said of it."""
        self._false[node] = home
        why = f"node {node} says that it is client {client}, which is node {home}"
        log.warning("%s; it is not asked again while both are connected", why)
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
        self.clients = {n: c for n, c in self.clients.items() if c != client}

    def judge(self, server_round: int, refusals: Sequence[Refusal]) -> None:
        """Ask clients no more that have sent too many replies of a hostile kind.

        What a node does that stands in for a client whose own node is away counts
        against the node: the client's own is asked again when it is back.
        """
        guests = {self.clients[node]: node for node in self._guests()}
        blamed = [item for item in refusals if item.client not in guests]
        self._hostile = count_hostile(self._hostile, blamed)
        for client, count in count_hostile({}, refusals).items():
            if client in guests:
                self._guest_hostile[guests[client]] += count
        away = quarantined(self._hostile, self._quarantine)
        bad = quarantined(self._guest_hostile, self._quarantine)
        for node, client in list(self.clients.items()):
            if client not in away and node not in bad:
                continue
            log.warning(
                "round %d: client %d (node %d) has had %d hostile replies refused and is "
                "asked no more (federation.quarantine = %d)",
                server_round,
                client,
                node,
                self._guest_hostile[node] or self._hostile[client],
                self._quarantine,
            )
            self._barred.add(node)
            del self.clients[node]

    def _needed(self) -> set[int]:
        """Clients that are to take part."""
        away = quarantined(self._hostile, self._quarantine) | self._left_out
        return set(self._wanted) - away

    def _move(self, client: int, node: int) -> None:
        kept = {n: c for n, c in self.clients.items() if c != client}
        self.clients = dict(sorted((kept | {node: client}).items()))

    def _nodes(self, grid: Grid) -> list[int]:
        """Connected nodes that may be asked."""
        connected = set(grid.get_node_ids())
        self._false = {
            node: home
            for node, home in self._false.items()
            if node in connected and home in connected
        }
        for node in set(self._in_vain) - connected:
            del self._in_vain[node]
        return sorted(connected - self._barred - self._false.keys())

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

    def _ask(self, grid: Grid, nodes: Iterable[int], timeout: float) -> Who:
        """What nodes say, of clients that may take part."""
        who, wanted = ask_who(grid, nodes, timeout=timeout), self._needed()
        return replace(who, claims=[c for c in who.claims if c.client in wanted])

    def _believed(
        self,
        who: Who,
        there: Mapping[int, int],
    ) -> dict[int, int]:
        """{node: client} of claims that are believed: each is a client's own node then.

        Args:
            who: says what; nodes that are not in ``there``. What is said of those that
                are not believed is added to its failures.
            there: {node: client} as known.

        Raises:
            FederationError: two nodes claim a client that neither of them was before.
        """
        found: dict[int, int] = {}
        for client in sorted({claim.client for claim in who.claims}):
            own = [claim for claim in who.claims if claim.client == client]
            taken = next((n for n, c in there.items() if c == client), None)
            saying = {claim.node for claim in own}
            homes = [h for h in self._homes.get(client, ()) if h in saying]
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
                else:
                    who.failures.append(self._disbelieve(claim.node, client, holder))
        return found

    def _settle(
        self, found: Mapping[int, int], claims: Iterable[Claim], *, homes: bool
    ) -> None:
        """Remember what clients can hold, and, with ``homes``, whose node is whose."""
        for claim in claims:
            if claim.node not in found:
                continue
            self.budgets.setdefault(claim.client, claim.budget)
            known = self._homes.setdefault(claim.client, [])
            if claim.node not in known and (homes or not known):
                known.append(claim.node)
                del known[:-HOMES]
