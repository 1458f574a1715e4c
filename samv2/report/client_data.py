"""What every client did over a run's rounds, from ``clients.jsonl``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from samv2.common.telemetry import read_rows
from samv2.federated.client_rows import CLIENTS
from samv2.report.reading import (
    DAMAGE,
    Missing,
    maybe_number,
    said,
    text,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class ClientFacts:
    """A client over all rounds; numbers that nobody knows are None."""

    client: int
    """-1: replies that nobody was asked for."""
    asked: int
    """Rounds."""
    replied: int
    """Rounds in which its reply counted."""
    refused: Mapping[str, int]
    """By reason; the reason may be in a stranger's words where the file was edited."""
    bytes_up: float
    bytes_down: float
    seconds: float | None
    """Median of its training, as the client says."""
    longest: float | None
    """Of it."""
    waited: float | None
    """Median time to its reply, as the server saw it."""
    first_loss: float | None
    last_loss: float | None


def read_clients(root: Path, *, remedy: str) -> tuple[ClientFacts, ...] | Missing:
    """Every client of a run, by its index.

    Args:
        root: the run directory.
        remedy: how more rounds come to be.
    """
    remedy = f"A run writes a line a round. {remedy}"
    path = Path(root) / CLIENTS
    if not path.is_file():
        what = f"There is no {CLIENTS}; runs of earlier versions have none."
        return Missing(what=what, remedy=remedy)
    try:
        found = gather(read_rows(path))
    except DAMAGE as error:
        return Missing(what=f"{CLIENTS} cannot be read: {said(error)}.", remedy=remedy)
    if not found:
        return Missing(what=f"{CLIENTS} holds no finished round.", remedy=remedy)
    return found


def gather(rows: Iterable[Mapping[str, Any]]) -> tuple[ClientFacts, ...]:
    """Clients of rounds.

    Args:
        rows: of ``clients.jsonl``.

    Raises:
        ValueError, KeyError, ...: they are not of that form.
    """
    by_client: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        for item in row["clients"]:
            by_client.setdefault(whole(item["client"]), []).append(item)
    return tuple(_client(key, by_client[key]) for key in sorted(by_client))


def _client(client: int, rounds: Sequence[Mapping[str, Any]]) -> ClientFacts:
    def known(name: str) -> list[float]:
        values = (maybe_number(item[name]) for item in rounds)
        return [value for value in values if value is not None]

    seconds, losses, waited = known("seconds"), known("train_loss"), known("waited")
    refused = Counter(text(x["reason"]) for item in rounds for x in item["refused"])
    return ClientFacts(
        client=client,
        asked=len(known("bytes_down")),
        replied=sum(item["replied"] is True for item in rounds),
        refused=dict(sorted(refused.items())),
        bytes_up=sum(known("bytes_up")),
        bytes_down=sum(known("bytes_down")),
        seconds=median(seconds) if seconds else None,
        longest=max(seconds, default=None),
        waited=median(waited) if waited else None,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
    )
