"""Which node is which client, and who takes part in a round."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from samv2.common.errors import FederationError
from samv2.federated.exchange import first_line
from samv2.federated.grid import message_to

ENROL_SECONDS = 120.0
"""How long clients may take to connect."""
ANSWER_SECONDS = 600.0
"""How long they may take to answer; on a busy machine a process starts slowly."""


def enrol_clients(
    grid: Grid, wanted: int, *, without: Container[int] = ()
) -> dict[int, int]:
    """Wait for a run's clients and learn which node is which client.

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
    deadline = time.monotonic() + ENROL_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < len(needed):
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} of {len(needed)} clients are connected after "
                f"{ENROL_SECONDS:g} s; start the missing ones or lower "
                "federation.clients"
            )
        time.sleep(0.5)
    messages = [
        message_to(grid, node, RecordDict(), MessageType.QUERY, "enrol")
        for node in nodes
    ]
    clients: dict[int, int] = {}
    failures: list[str] = []
    for reply in grid.send_and_receive(messages, timeout=ANSWER_SECONDS):
        client = _client_of(reply)
        if client is None:
            failures.append(first_line(reply))
            continue
        if client in clients.values():
            raise FederationError(
                f"two nodes hold client {client}; give each its own partition-id"
            )
        clients[reply.metadata.src_node_id] = client
    missing = sorted(needed - set(clients.values()))
    if missing:
        raise FederationError(
            f"clients {missing} are not there ({'; '.join(failures) or 'no answer'}); "
            "check that each node has its own partition-id and its shard"
        )
    return {n: c for n, c in sorted(clients.items()) if c in needed}


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
