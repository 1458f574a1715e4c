"""A round's clients in few words, for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from samv2.federated.client_rows import UNKNOWN, one_line

FEW_CLIENTS = 8
"""Of a round, up to which each may have a line; more are summed up."""
MOST_NAMES = 12
"""Clients that are named for one reason of refusal."""
REFUSED = "yellow"
LABELS = ("loss", "up", "refused", "time")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A client, or all of them; cells that are empty are not known."""

    name: str
    loss: str = ""
    size: str = ""
    refused: str = ""
    seconds: str = ""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Loss, bytes up, refusals, seconds."""
        return self.loss, self.size, self.refused, self.seconds

    @property
    def style(self) -> str:
        """A Rich style; what was refused stands out."""
        return REFUSED if self.refused else "dim"

    def __str__(self) -> str:
        told = zip(LABELS, self.cells)
        return "  ".join(
            [f"{self.name}:", *(f"{label} {cell}" for label, cell in told if cell)]
        )


def client_lines(
    clients: Sequence[Mapping[str, Any]], *, verbose: bool = False
) -> list[Line]:
    """Lines on a round's clients.

    Few clients have a line each with ``verbose``, or where one was refused; many are
    summed up in a line or two, refusals by reason.

    Args:
        clients: of a round, as in ``clients.jsonl``.
        verbose: also where nothing was refused.

    Seconds are those of training, as clients say.
    """
    if len(clients) > FEW_CLIENTS:
        return _summed(clients)
    if verbose or any(client["refused"] for client in clients):
        return [_one(client) for client in clients]
    return []


def _one(client: Mapping[str, Any]) -> Line:
    reasons = "; ".join(
        f"{item['reason']} ({item['detail']})" for item in client["refused"]
    )
    loss, up = client["train_loss"], client["bytes_up"]
    return Line(
        name=_name(client["client"]),
        loss="" if loss is None else f"{loss:.3f}",
        size="" if up is None else f"{up / 1000:.1f} kB",
        refused=one_line(reasons),
        seconds=_seconds(client["seconds"]),
    )


def _name(client: int) -> str:
    return "unasked" if client == UNKNOWN else f"client {client}"


def _summed(clients: Sequence[Mapping[str, Any]]) -> list[Line]:
    asked = [client for client in clients if client["client"] != UNKNOWN]
    replied = [client for client in asked if client["replied"]]
    times = [client["seconds"] for client in replied]
    seconds = f"{median(times):.3g} s, at most {max(times):.3g} s" if times else ""
    lines = [Line(name=f"{len(replied)} of {len(asked)} replied", seconds=seconds)]
    by_reason: dict[str, list[str]] = {}
    for client in clients:
        for item in client["refused"]:
            name = "unasked" if client["client"] == UNKNOWN else str(client["client"])
            by_reason.setdefault(item["reason"], []).append(name)
    if by_reason:
        told = "; ".join(f"{key} {_some(names)}" for key, names in by_reason.items())
        lines.append(Line(name="clients", refused=told))
    return lines


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    more = len(names) - MOST_NAMES
    rest = f" and {more} more" if more > 0 else ""
    return ", ".join(names[:MOST_NAMES]) + rest


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"
