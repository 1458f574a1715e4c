"""Which node is which client, and who takes part in a round."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from samv2.common.errors import FederationError
from samv2.federated.exchange import first_line
from samv2.federated.grid import message_to

ENROL_SECONDS = 120.0
"""Without a new node, after which clients that are missing are given up."""
ANSWER_SECONDS = 600.0
"""For an answer to a question; the first one waits until a client's process is up, and
many start on few cores. A node that is gone does not take that long: its SuperLink says so.
"""


def enrol_clients(
    grid: Grid, wanted: int, *, without: Container[int] = ()
) -> dict[int, int]:
    """Wait for a run's clients and learn which node is which client.

    The wait is as long as somebody new comes: clients that are missing are given up
    when no other node connects for :data:`ENROL_SECONDS`, or when all were asked, for
    :data:`ANSWER_SECONDS`, and no other client has answered. One that is silent or fails
    is asked again as long as others answer.

    Args:
        grid: to look on.
        wanted: clients of the run, numbered from 0.
        without: clients that need not be there.

    Returns:
        {node id: client}, by node.

    Raises:
        FederationError: too few nodes, or two nodes claim the same client.
    """
    needed = {client for client in range(wanted) if client not in without}
    clients: dict[int, int] = {}
    while True:
        nodes = _connected(grid, len(needed))
        unknown = [node for node in nodes if node not in clients]
        found, failures = _ask_clients(grid, unknown)
        for node, client in found:
            if client in clients.values():
                raise FederationError(
                    f"two nodes hold client {client}; give each its own partition-id"
                )
            clients[node] = client
        missing = sorted(needed - set(clients.values()))
        if not missing:
            return {n: c for n, c in sorted(clients.items()) if c in needed}
        if not found:
            raise FederationError(
                f"clients {missing} are not there "
                f"({'; '.join(failures) or 'no answer'}); "
                "check that each node has its own partition-id and its shard"
            )


def renew_clients(grid: Grid, clients: Mapping[int, int]) -> dict[int, int]:
    """Which node is which client now that nodes may have come back under other ids.

    Nobody is asked unless a client's node is gone and there is a node that is unknown.

    Args:
        grid: to look on.
        clients: {node id: client} as last known.

    Returns:
        The same, with the new node of each client that moved.
    """
    nodes = set(grid.get_node_ids())
    gone = {client: node for node, client in clients.items() if node not in nodes}
    unknown = sorted(nodes - clients.keys())
    if not gone or not unknown:
        return dict(clients)
    found, _ = _ask_clients(grid, unknown)
    moved = {client: node for node, client in found if client in gone}
    kept = {n: c for n, c in clients.items() if c not in moved}
    return dict(sorted((kept | {n: c for c, n in moved.items()}).items()))


def _connected(grid: Grid, wanted: int) -> list[int]:
    """The nodes, once there are enough."""
    most, deadline = 0, time.monotonic() + ENROL_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
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


def _ask_clients(
    grid: Grid, nodes: Sequence[int]
) -> tuple[list[tuple[int, int]], list[str]]:
    """(node, client) of those that say which they are, and why others do not."""
    messages = [
        message_to(grid, node, RecordDict(), MessageType.QUERY, "enrol")
        for node in nodes
    ]
    found: list[tuple[int, int]] = []
    failures: list[str] = []
    for reply in grid.send_and_receive(messages, timeout=ANSWER_SECONDS):
        client = _client_of(reply)
        if client is None:
            failures.append(first_line(reply))
        else:
            found.append((reply.metadata.src_node_id, client))
    return found, failures


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


def _client_of(reply: Message) -> int | None:
    """The client that an enrolment reply names; None where it names none."""
    if reply.has_error() or "metrics" not in reply.content:
        return None
    client = reply.content["metrics"].get("client")
    return client if type(client) is int else None
