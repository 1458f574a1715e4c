"""A schedule of change: which clients' text becomes another domain's, and when.

An entry is ``ROUND:CLIENTS=DOMAIN``: from that round on the clients hold text of the
domain and no other. Clients are numbers and spans (``0``, ``0-3``, ``0+4-6``), the domain
a built-in one or ``NAME=PATH``; it may be one that other clients hold from the start,
whose text the drifted ones then hold as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samv2.common.errors import DataError
from samv2.data.division import DomainText
from samv2.data.shard_types import ClientShard, LaterText
from samv2.data.sources import parse_domain
from samv2.data.tokens import tokenize_documents

_ENTRY = re.compile(r"(\d+):([\d+-]+)=(.+)", re.DOTALL)
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One change of text."""

    round: int
    """The first round of the new text, from 2."""
    clients: tuple[int, ...]
    domain: str
    """Specification of the domain: its name, or ``NAME=PATH``."""

    @property
    def name(self) -> str:
        """Name of the domain."""
        return parse_domain(self.domain)[0]


def parse_drifts(entries: Sequence[str], num_clients: int) -> tuple[Drift, ...]:
    """Read a schedule, in order of rounds.

    Args:
        entries: ``ROUND:CLIENTS=DOMAIN``, see above.
        num_clients: C; clients are 0 to C - 1.

    Raises:
        DataError: an entry that cannot be read, an unknown domain or client, or two
            changes of a client in one round.
    """
    drifts = tuple(sorted((_parse(entry) for entry in entries), key=lambda d: d.round))
    seen: set[tuple[int, int]] = set()
    for drift in drifts:
        for client in drift.clients:
            if client >= num_clients:
                raise DataError(
                    f"data.drift names client {client}, but there are {num_clients}; "
                    f"use 0 to {num_clients - 1}, or raise federation.clients"
                )
            if (drift.round, client) in seen:
                raise DataError(
                    f"data.drift changes client {client} twice in round {drift.round}; "
                    "leave one of them out"
                )
            seen.add((drift.round, client))
    return drifts


def drift_specs(domains: Sequence[str], drifts: Sequence[Drift]) -> list[str]:
    """Specifications of the domains that only come by drift, each once."""
    known = {parse_domain(spec)[0] for spec in domains}
    new: dict[str, str] = {}
    for drift in drifts:
        if drift.name not in known:
            new.setdefault(drift.name, drift.domain)
    return list(new.values())


def give_later(
    clients: Sequence[ClientShard],
    domains: Mapping[str, DomainText],
    tokenizer: Any,
    drifts: Sequence[Drift],
    *,
    heldout_window: int,
    min_train_tokens: int,
) -> tuple[ClientShard, ...]:
    """The clients with the text that a schedule brings them.

    A domain's train text is cut into as many pieces as clients get it, its held-out text
    at multiples of the window.

    Args:
        clients: as they are at the start, in order.
        domains: texts by name, those of the schedule among them.
        tokenizer: a Hugging Face tokenizer.
        drifts: the schedule.
        heldout_window: evaluation window in tokens.
        min_train_tokens: train tokens that every client must have.

    Raises:
        DataError: a piece is shorter than that.
    """
    later: list[dict[int, LaterText]] = [dict(client.later) for client in clients]
    for drift in drifts:
        if drift.name not in domains:
            raise DataError(
                f"data.drift brings the domain {drift.name!r}, whose text could not be "
                "had: leave the entry out or give the text as NAME=PATH."
            )
        text = domains[drift.name]
        train = tokenize_documents(tokenizer, text.train)
        heldout = tokenize_documents(tokenizer, text.heldout)
        count = len(drift.clients)
        if len(train) // count < min_train_tokens:
            raise DataError(
                f"The domain {drift.name!r} has {len(train)} train tokens for the "
                f"{count} clients that drift to it, who need {min_train_tokens} each: "
                "raise data.train_bytes or let fewer clients drift."
            )
        pieces = zip(
            drift.clients,
            train.tensor_split(count),
            _cut(heldout, count, heldout_window),
        )
        for client, train_N, heldout_N in pieces:
            held = {drift.name: heldout_N.clone()}
            later[client][drift.round] = LaterText(train=train_N.clone(), heldout=held)
    return tuple(
        replace(client, later=dict(sorted(texts.items())))
        for client, texts in zip(clients, later)
    )


def _cut(stream: Tensor, parts: int, window: int) -> tuple[Tensor, ...]:
    """A held-out stream in pieces of whole windows; the last has the rest."""
    count = max(1, len(stream) // window)
    ends = torch.arange(1, parts) * count // parts * window
    return stream.tensor_split(ends)


def _parse(entry: str) -> Drift:
    match = _ENTRY.fullmatch(entry.strip())
    spans = [_SPAN.fullmatch(part) for part in match[2].split("+")] if match else []
    if match is None or None in spans:
        raise DataError(
            f"data.drift holds {entry!r}; write ROUND:CLIENTS=DOMAIN, e.g. 6:0=chat or "
            "6:0-3+5=chat"
        )
    clients: set[int] = set()
    for span in spans:
        first, last = int(span[1]), int(span[2] or span[1])
        clients |= set(range(first, last + 1))
        if int(match[1]) < 2 or last < first:
            raise DataError(
                f"data.drift holds {entry!r}; text can change from round 2 on, and a span "
                "of clients must rise"
            )
    parse_domain(match[3])
    return Drift(
        round=int(match[1]), clients=tuple(sorted(clients)), domain=match[3].strip()
    )
