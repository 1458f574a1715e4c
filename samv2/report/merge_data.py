"""What every merge did: edits of the graph, refusals, visits of each layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samv2.report.reading import (
    Missing,
    maybe_number,
    number,
    read_json,
    text,
    whole,
)

MERGE = re.compile(r"merge_round(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change of the expert graph."""

    round: int
    layer: int
    """Among the converted layers."""
    src: int
    """Position."""
    dst: int
    kind: str
    score: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class RefusedReply:
    """A reply that did not count; reason and detail may be a client's own words."""

    round: int
    client: int
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A ``merge_round{N}.json``."""

    round: int
    edits: tuple[Edit, ...]
    refused: tuple[RefusedReply, ...]
    usage_per_layer: tuple[float, ...]
    """Visits, all clients."""
    demand_per_layer: tuple[float, ...]
    """Visits that an absent edge prevented."""
    tokens: float
    """Trained on, all clients."""


def read_merges(
    root: Path, *, remedy: str
) -> tuple[tuple[Merge, ...] | Missing, tuple[str, ...]]:
    """Every ``merge_round{N}.json`` of a run, by round.

    Args:
        root: the run directory.
        remedy: how more of them come to be.

    Returns:
        What can be read, and what is wrong with the rest.
    """
    paths = [p for p in root.iterdir() if MERGE.fullmatch(p.name)]
    merges, unread = [], []
    for path in paths:
        found = read_json(path, parse_merge, remedy="")
        if isinstance(found, Missing):
            unread.append(found.what)
        else:
            merges.append(found)
    if merges:
        return tuple(sorted(merges, key=lambda item: item.round)), tuple(unread)
    what = " ".join(["There is no readable merge_round1.json.", *unread])
    remedy = f"Every round leaves such a file. {remedy}"
    return Missing(what=what, remedy=remedy), ()


def parse_merge(value: Any) -> Merge:
    """The content of a ``merge_round{N}.json``.

    Raises:
        ValueError, KeyError, ...: it is not of that form.
    """
    current = whole(value["round"])
    return Merge(
        round=current,
        edits=tuple(
            Edit(
                round=current,
                layer=whole(item["layer"]),
                src=whole(item["src"]),
                dst=whole(item["dst"]),
                kind=text(item["kind"]),
                score=maybe_number(item["score"]),
                reason=text(item["reason"]),
            )
            for item in value["edits"]
        ),
        refused=tuple(
            RefusedReply(
                round=current,
                client=whole(item["client"]),
                reason=text(item["reason"]),
                detail=text(item["detail"]),
            )
            for item in value["refused"]
        ),
        usage_per_layer=tuple(map(number, value["usage_per_layer"])),
        demand_per_layer=tuple(map(number, value["demand_per_layer"])),
        tokens=sum(number(client["tokens"]) for client in value["clients"].values()),
    )
