"""A corpus → what every client holds: train tokens, held-out tokens, who has what.

The items that a split allocates are train documents, their category is the domain.
Short documents of a domain are bundled into one item, so that the amount of text counts
in a split and not the number of documents (200 bytes in one domain, 50 KB in another).
The held-out stream of a domain is cut into pieces, one for each client that holds
train text of the domain, so that all clients together evaluate every held-out token
exactly once. Calibration text stays with the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samv2.common.errors import DataError
from samv2.data.allocation import (
    Indices,
    heterogeneity,
    split_by_domain,
    split_dirichlet,
    split_shards,
)
from samv2.data.corpus import Corpus
from samv2.data.division import DomainText
from samv2.data.drift import Drift, give_later
from samv2.data.shard_files import (
    load_calibration,
    load_client,
    load_federated_text,
    load_index,
    save_federated_text,
)
from samv2.data.shard_types import (
    ClientShard,
    FederatedIndex,
    FederatedText,
    LaterText,
)
from samv2.data.tokens import (
    token_histogram,
    tokenize_documents,
    tokenizer_fingerprint,
)

__all__ = [
    "ClientShard",
    "FederatedIndex",
    "FederatedText",
    "LaterText",
    "build_federated_text",
    "load_calibration",
    "load_client",
    "load_federated_text",
    "load_index",
    "save_federated_text",
]

_ITEMS_OF_LARGEST_DOMAIN = 64

SPLITS = ("domain", "shards", "dirichlet")
"""Known splits, see :mod:`samv2.data.allocation`."""


def build_federated_text(
    corpus: Corpus,
    tokenizer: Any,
    *,
    num_clients: int,
    split: str = "domain",
    alpha: float = 0.5,
    shards_per_client: int = 2,
    item_bytes: int | None = None,
    min_items: int = 1,
    min_train_tokens: int = 256,
    heldout_window: int = 256,
    drifts: Sequence[Drift] = (),
    coming: Mapping[str, DomainText] = MappingProxyType({}),
    seed: int,
) -> FederatedText:
    """Divide a corpus among clients and tokenize it.

    Args:
        corpus: domains with their parts.
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        num_clients: C.
        split: ``"domain"`` (one domain a client), ``"shards"`` (sorted by domain, cut,
            dealt out) or ``"dirichlet"``.
        alpha: concentration of the Dirichlet split.
        shards_per_client: shards that each client gets in the shard split.
        item_bytes: consecutive documents of a domain are bundled up to this size, in
            UTF-8 bytes; 0 makes every document an item, None means a 64th of the
            largest domain's train text.
        min_items: items that each client must have in the Dirichlet split.
        min_train_tokens: train tokens that every client must have, e.g. the length of
            a training window.
        heldout_window: evaluation window in tokens. Held-out streams are cut at its
            multiples, so that the clients' windows are those of the whole stream; with
            more holders than windows, those with the most train text get them.
        drifts: changes of clients' text in later rounds.
        coming: domains of those changes that nobody holds at the start, by name.
        seed: seed of the split.

    Raises:
        DataError: an unknown split, too few documents for the clients, a client with
            too few tokens.
    """
    bundles, labels = _bundles(corpus, item_bytes)
    items = _allocate(
        labels, num_clients, split, alpha, shards_per_client, min_items, seed
    )
    bytes_CK = _train_bytes(items, bundles, labels, corpus.names)
    heldout = _divide_heldout(corpus, tokenizer, bytes_CK, heldout_window)
    fingerprint = tokenizer_fingerprint(tokenizer)
    clients = []
    for client, indices in enumerate(items):
        documents = [text for i in indices for text in bundles[i]]
        train = tokenize_documents(tokenizer, documents)
        _check_train(client, train, min_train_tokens)
        counts = _document_counts(indices, bundles, labels)
        shard = ClientShard(
            index=client,
            train=train,
            heldout=heldout[client],
            category_counts=counts,
            description=_describe(client, counts),
            tokenizer_fingerprint=fingerprint,
        )
        clients.append(shard)
    calibration = {
        name: tokenize_documents(tokenizer, domain.calibration)
        for name, domain in corpus.domains.items()
        if domain.calibration
    }
    histograms_CV = [token_histogram(c.train, len(tokenizer)) for c in clients]
    index = FederatedIndex(
        domains=corpus.names,
        split=split,
        seed=seed,
        category_counts=tuple(c.category_counts for c in clients),
        train_tokens=tuple(len(c.train) for c in clients),
        category_heterogeneity=heterogeneity(bytes_CK),
        token_heterogeneity=heterogeneity(np.stack(histograms_CV)),
        tokenizer_fingerprint=fingerprint,
        corpus_sha256=corpus.sha256,
    )
    changing = give_later(
        clients,
        corpus.domains | dict(coming),
        tokenizer,
        drifts,
        heldout_window=heldout_window,
        min_train_tokens=min_train_tokens,
    )
    return FederatedText(clients=changing, calibration=calibration, index=index)


def _allocate(
    labels: Sequence[str],
    num_clients: int,
    split: str,
    alpha: float,
    shards_per_client: int,
    min_items: int,
    seed: int,
) -> list[Indices]:
    """Item indices per client after the named split."""
    if split == "domain":
        return split_by_domain(labels, num_clients)
    if split == "shards":
        return split_shards(labels, num_clients, shards_per_client, seed=seed)
    if split == "dirichlet":
        return split_dirichlet(
            labels, num_clients, alpha, min_items=min_items, seed=seed
        )
    raise DataError(f"There is no split {split!r}: use one of {', '.join(SPLITS)}.")


def _bundles(
    corpus: Corpus, item_bytes: int | None
) -> tuple[list[list[str]], list[str]]:
    """Items (the documents of each) and their labels, domain after domain."""
    if item_bytes is None:
        totals = [sum(map(_size, d.train)) for d in corpus.domains.values()]
        item_bytes = max(totals) // _ITEMS_OF_LARGEST_DOMAIN
    if item_bytes < 0:
        raise DataError(f"item_bytes is {item_bytes}: give 0 or more, or None.")
    bundles: list[list[str]] = []
    labels: list[str] = []
    for name, domain in corpus.domains.items():
        room = -1  # the first document of a domain opens an item
        for text in domain.train:
            room -= _size(text)
            if room < 0:
                bundles.append([])
                labels.append(name)
                room = item_bytes - _size(text)
            bundles[-1].append(text)
    return bundles, labels


def _size(text: str) -> int:
    return len(text.encode())


def _train_bytes(
    items: Sequence[Indices],
    bundles: Sequence[Sequence[str]],
    labels: Sequence[str],
    names: Sequence[str],
) -> NDArray[np.int64]:
    """Train text of each domain per client in UTF-8 bytes, int64 (C, K)."""
    table = np.zeros((len(items), len(names)), np.int64)
    for client, indices in enumerate(items):
        for i in indices:
            table[client, names.index(labels[i])] += sum(map(_size, bundles[i]))
    return table


def _document_counts(
    indices: Indices, bundles: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, int]:
    """Documents of one client by domain, domains in the order of the items."""
    counts: dict[str, int] = {}
    for i in indices:
        counts[labels[i]] = counts.get(labels[i], 0) + len(bundles[i])
    return counts


def _divide_heldout(
    corpus: Corpus, tokenizer: Any, bytes_CK: NDArray[np.int64], window: int
) -> list[dict[str, Tensor]]:
    """Cut each domain's held-out stream into pieces for the clients that hold it."""
    if window < 1:
        raise DataError(f"heldout_window is {window}: give 1 or more tokens.")
    pieces: list[dict[str, Tensor]] = [{} for _ in range(len(bytes_CK))]
    for k, (name, domain) in enumerate(corpus.domains.items()):
        stream = tokenize_documents(tokenizer, domain.heldout)
        num_windows = max(1, len(stream) // window)
        holders = np.flatnonzero(bytes_CK[:, k])
        by_size = holders[np.argsort(-bytes_CK[holders, k], kind="stable")]
        chosen = np.sort(by_size[:num_windows])
        ends = np.arange(1, len(chosen)) * num_windows // len(chosen) * window
        for client, piece in zip(chosen, torch.tensor_split(stream, ends.tolist())):
            pieces[client][name] = piece.clone()
    return pieces


def _check_train(client: int, train: Tensor, min_train_tokens: int) -> None:
    if len(train) < min_train_tokens:
        raise DataError(
            f"Client {client} has {len(train)} train tokens, fewer than the "
            f"{min_train_tokens} it needs: use fewer clients, a larger min_items, more "
            "text, or lower min_train_tokens."
        )


def _describe(client: int, counts: dict[str, int]) -> str:
    held = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"client {client}: {held} documents"
