"""Who gets which item: splits of labelled items over clients, and how unlike they are.

A split takes one category label per item and returns, per client, the indices of its
items: int64 arrays, sorted, disjoint, together complete. The two pathological splits
are those of Shepherd (arXiv 2305.05644). Shapes: C clients, K categories.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import rel_entr

from samv2.common.errors import DataError

Indices = NDArray[np.int64]
"""Indices of items, int64 (items of one client,)."""

MAX_TRIES = 1000
"""Draws of the Dirichlet split before it gives up."""


def split_by_domain(labels: Sequence[Hashable], num_clients: int) -> list[Indices]:
    """Give every client one category, in the order in which categories appear.

    With more clients than categories, client c has category c mod K and the items of a
    category are dealt in turn to its clients. With fewer clients than categories,
    category k goes to client k mod C.

    Args:
        labels: category of each item.
        num_clients: C.

    Returns:
        Item indices per client.

    Raises:
        DataError: no client, more clients than items, or a client without an item.
    """
    _check(labels, num_clients)
    groups = _items_by_category(labels)
    owned: list[list[Indices]] = [[] for _ in range(num_clients)]
    for k, items in enumerate(groups):
        owners = range(k, num_clients, len(groups)) or [k % num_clients]
        for place, client in enumerate(owners):
            owned[client].append(items[place :: len(owners)])
    return _finish(owned, "fewer clients or more documents per domain")


def split_shards(
    labels: Sequence[Hashable],
    num_clients: int,
    shards_per_client: int = 2,
    *,
    seed: int,
) -> list[Indices]:
    """Shepherd's split A: sort by category, cut into shards, deal them out at random.

    Args:
        labels: category of each item.
        num_clients: C.
        shards_per_client: S; the sorted items are cut into C·S contiguous shards of
            nearly equal size, and every client gets S of them.
        seed: seed of the shuffle of the shards.

    Returns:
        Item indices per client.

    Raises:
        DataError: fewer items than shards.
    """
    _check(labels, num_clients)
    if shards_per_client < 1:
        raise DataError(f"shards_per_client is {shards_per_client}: give 1 or more.")
    count = num_clients * shards_per_client
    if len(labels) < count:
        raise DataError(
            f"{len(labels)} items cannot be cut into {count} shards ({num_clients} "
            f"clients x {shards_per_client}): use fewer clients, fewer shards per "
            "client or more documents."
        )
    shards = np.array_split(np.concatenate(_items_by_category(labels)), count)
    order = np.random.default_rng(seed).permutation(count)
    owned = [
        [shards[i] for i in order[c * shards_per_client : (c + 1) * shards_per_client]]
        for c in range(num_clients)
    ]
    return _finish(owned, "fewer clients or more documents")


def split_dirichlet(
    labels: Sequence[Hashable],
    num_clients: int,
    alpha: float = 0.5,
    *,
    min_items: int = 1,
    seed: int,
) -> list[Indices]:
    """Shepherd's split B: each category is divided by a draw from a Dirichlet.

    A client that has reached the mean number of items gets nothing of the categories
    that follow. The whole draw is repeated until every client has ``min_items``.

    Args:
        labels: category of each item.
        num_clients: C.
        alpha: concentration; the smaller, the more unlike the clients.
        min_items: items that every client must have (Shepherd: 40 rows).
        seed: seed of the draws.

    Returns:
        Item indices per client.

    Raises:
        DataError: no draw of many gave every client enough items.
    """
    _check(labels, num_clients)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise DataError(f"alpha is {alpha}: give a positive number, for example 0.5.")
    if not 1 <= min_items <= len(labels) // num_clients:
        raise DataError(
            f"min_items is {min_items}, but {len(labels)} items over {num_clients} "
            f"clients leave room for 1 to {len(labels) // num_clients}: change "
            "min_items, use fewer clients or more documents."
        )
    generator = np.random.default_rng(seed)
    groups = _items_by_category(labels)
    smallest = 0
    for _ in range(MAX_TRIES):
        owned = _draw_dirichlet(groups, num_clients, alpha, generator)
        counts = [sum(map(len, parts)) for parts in owned]
        if min(counts) >= min_items:
            return _finish(owned, "fewer clients")
        smallest = max(smallest, min(counts))
    raise DataError(
        f"In {MAX_TRIES} Dirichlet draws with alpha = {alpha} over {num_clients} "
        f"clients the smallest client never had more than {smallest} items, but "
        f"min_items is {min_items}: raise alpha, lower min_items, use fewer clients "
        "or more documents."
    )


def heterogeneity(counts_CK: ArrayLike) -> float:
    """Mean pairwise Jensen-Shannon distance of the clients' distributions.

    Args:
        counts_CK: non-negative counts (C, K), of categories or of tokens; every client
            needs a positive sum.

    Returns:
        Mean over pairs of sqrt(JSD), base 2: 0 if all clients are alike or there is
        only one, 1 if no two clients share a category.

    Raises:
        DataError: a negative count, or a client whose counts are all zero.
    """
    counts = np.asarray(counts_CK, dtype=np.float64)
    if counts.ndim != 2 or counts.size == 0 or not (counts >= 0).all():
        raise DataError(
            f"Counts of shape {counts.shape} are not a table of clients by categories "
            "with non-negative entries."
        )
    totals = counts.sum(axis=1, keepdims=True)
    if not totals.all():
        client = int(np.flatnonzero(totals[:, 0] == 0)[0])
        raise DataError(f"Client {client} has no counts at all: give it some items.")
    shares = counts / totals
    distances = []
    for first in range(len(shares) - 1):
        p, q = shares[first], shares[first + 1 :]
        middle = (p + q) / 2
        nats = (rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=1) / 2
        # Rounding can take the divergence of equal clients a little below zero.
        distances.append(np.sqrt(np.clip(nats / np.log(2), 0.0, 1.0)))
    return float(np.concatenate(distances).mean()) if distances else 0.0


def _check(labels: Sequence[Hashable], num_clients: int) -> None:
    if num_clients < 1:
        raise DataError(f"The number of clients is {num_clients}: give 1 or more.")
    if len(labels) < num_clients:
        raise DataError(
            f"{len(labels)} items cannot be divided among {num_clients} clients: use "
            "fewer clients or more documents."
        )


def _items_by_category(labels: Sequence[Hashable]) -> list[Indices]:
    """Indices of the items of each category, categories in order of appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return [np.array(items, dtype=np.int64) for items in groups.values()]


def _draw_dirichlet(
    groups: Sequence[Indices],
    num_clients: int,
    alpha: float,
    generator: np.random.Generator,
) -> list[list[Indices]]:
    """Divide every category once; parts per client, possibly empty."""
    mean_items = sum(map(len, groups)) / num_clients
    counts = np.zeros(num_clients)
    owned: list[list[Indices]] = [[] for _ in range(num_clients)]
    for items in groups:
        shuffled = generator.permutation(items)
        is_open = counts < mean_items  # at least one is, as items are still left
        shares = generator.dirichlet(np.full(num_clients, alpha)) * is_open
        if not (np.isfinite(shares).all() and shares.sum() > 0):  # tiny alpha
            shares = is_open.astype(np.float64)
        ends = np.cumsum(shares / shares.sum()) * len(items)
        cuts = (ends + 1e-6).astype(int)[:-1]  # a closed client gets no rounding rest
        for client, part in enumerate(np.split(shuffled, cuts)):
            owned[client].append(part)
            counts[client] += len(part)
    return owned


def _finish(owned: Sequence[Sequence[Indices]], remedy: str) -> list[Indices]:
    """Join and sort each client's parts; DataError for a client without items."""
    clients = [
        np.sort(np.concatenate([np.empty(0, np.int64), *parts])) for parts in owned
    ]
    for client, items in enumerate(clients):
        if not len(items):
            raise DataError(f"Client {client} would get no items: use {remedy}.")
    return clients
