"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


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
