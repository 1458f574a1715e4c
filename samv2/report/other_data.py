"""What is not a run: comparisons of methods, grids of settings, frontiers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samv2.report.reading import (
    Missing,
    maybe_number,
    number,
    numbers_by_name,
    read_json,
    read_piece,
    text,
    whole,
)

RESULTS = ("perplexity", "bytes_up_per_client_round", "flops_fraction", "seconds")
"""Columns of ``ablation.csv`` that are measured; lower is better in each."""
FIRST = ("name", "status")
ERROR = "error"
"""Column of what a run failed on; long, so it comes last."""


@dataclass(frozen=True, kw_only=True)
class MethodRound:
    """A method after one round."""

    round: int
    perplexity: float | None
    bytes_up_total: float
    """Of all clients, from the start."""
    seconds: float
    """From the start."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of a comparison."""

    name: str
    perplexity: float | None
    """Geometric mean of the domains, at the end."""
    domains: Mapping[str, float | None]
    bytes_up: float
    """Of a client and round."""
    seconds: float
    settings: Mapping[str, str]
    """That it has alone."""
    rounds: tuple[MethodRound, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``federation.json``: methods under one protocol."""

    protocol: Mapping[str, str]
    """What all methods had in common; settings by dotted keys."""
    dense_perplexity: float | None
    """Of the model before any training; None where it was not measured."""
    dense_domains: Mapping[str, float | None]
    methods: tuple[Method, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """Of all methods, in order of appearance."""
        return tuple(dict.fromkeys(name for m in self.methods for name in m.domains))


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """``ablation.csv``: one row a run."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    factors: tuple[str, ...]
    """Columns of settings that have more than one value."""
    same: Mapping[str, str]
    """Other columns with one value in all rows."""

    def named(self, row: tuple[str, ...]) -> list[tuple[str, str]]:
        """A row's cells with their columns' names."""
        return list(zip(self.columns, row))

    def numeric(self, name: str) -> bool:
        """Whether every filled cell of a column is a number."""
        cells = [cell for cell in self.column(name) if cell]
        return bool(cells) and all(csv_number(cell) is not None for cell in cells)

    def column(self, name: str) -> list[str]:
        """All cells of a column."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """A bootstrapped model at one K."""

    experts_per_token: int
    flops_fraction: float
    ratio: float | None
    """Perplexity over the dense model's: geometric mean, text as it was calibrated on."""
    unseen_ratio: float | None
    """The same of other text."""


def read_comparison(path: Path) -> Comparison | Missing:
    """A ``federation.json``."""
    remedy = "`samv2 bench-federation` writes it."
    return read_json(path, _comparison, remedy=remedy)


def read_ablation(path: Path) -> Ablation | Missing:
    """An ``ablation.csv``."""
    return read_piece(path, parse_ablation, remedy="`samv2 ablate` writes it.")


def read_frontier(path: Path) -> tuple[FrontierPoint, ...] | Missing:
    """A ``frontier.json``."""
    remedy = (
        "`samv2 bootstrap MODEL --output FOLDER` measures and writes it; a run that is "
        "started from that folder shows it here."
    )
    return read_json(path, _frontier, remedy=remedy)


def _comparison(value: Any) -> Comparison:
    methods = tuple(map(_method, value["methods"]))
    if not methods:
        raise ValueError("it holds no method")
    protocol = dict(value["protocol"])
    dense = protocol.pop("dense", None) or {}
    return Comparison(
        protocol=flattened(protocol),
        dense_perplexity=maybe_number(dense.get("perplexity")),
        dense_domains=numbers_by_name(dense.get("domains", {})),
        methods=methods,
    )


def flattened(value: Mapping[str, Any]) -> dict[str, str]:
    """Nested objects as one, with dotted keys and text as values."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            inside = flattened(item)
            found |= {
                k if key == "settings" else f"{key}.{k}": inside[k] for k in inside
            }
        elif isinstance(item, list):
            found[key] = ", ".join(map(str, item))
        else:
            found[key] = str(item)
    return found


def _method(value: Any) -> Method:
    return Method(
        name=text(value.get("title", value["method"])),
        perplexity=maybe_number(value["perplexity"]),
        domains=numbers_by_name(value["domains"]),
        bytes_up=number(value["bytes_up_per_client_round"]),
        seconds=number(value["seconds"]),
        settings=flattened(value.get("settings") or {}),
        rounds=tuple(
            MethodRound(
                round=whole(item["round"]),
                perplexity=maybe_number(item["perplexity"]),
                bytes_up_total=number(item["bytes_up_total"]),
                seconds=number(item["seconds"]),
            )
            for item in value.get("rounds") or ()
        ),
    )


def parse_ablation(content: str) -> Ablation:
    """The content of an ``ablation.csv``.

    Raises:
        ValueError: no header with a ``perplexity`` column, or no row.
    """
    lines = [row for row in csv.reader(content.splitlines()) if any(row)]
    if not lines or "perplexity" not in lines[0]:
        raise ValueError("its first line names no column perplexity")
    columns = tuple(name.strip() for name in lines[0])
    width = len(columns)
    rows = tuple(tuple((row + [""] * width)[:width]) for row in lines[1:])
    if not rows:
        raise ValueError("it holds no row")
    levels = {name: {row[index] for row in rows} for index, name in enumerate(columns)}
    settings = columns[: min(columns.index(n) for n in RESULTS if n in columns)]
    order = sorted(range(width), key=lambda index: columns[index] == ERROR)
    return Ablation(
        columns=tuple(columns[index] for index in order),
        rows=tuple(tuple(row[index] for index in order) for row in rows),
        factors=tuple(
            n for n in settings if n not in (*FIRST, ERROR) and len(levels[n]) > 1
        ),
        same={
            name: next(iter(found))
            for name, found in levels.items()
            if len(rows) > 1 and len(found) == 1 and name not in (*FIRST, "perplexity")
        },
    )


def csv_number(cell: str) -> float | None:
    """A cell as a finite number, or None."""
    try:
        return maybe_number(float(cell))
    except ValueError:
        return None


def _frontier(value: Any) -> tuple[FrontierPoint, ...]:
    points = tuple(
        FrontierPoint(
            experts_per_token=whole(item["experts_per_token"]),
            flops_fraction=number(item["ffn_flops_fraction"]),
            ratio=maybe_number(item["ratio"]),
            unseen_ratio=maybe_number(item.get("unseen_ratio")),
        )
        for item in value
    )
    if not points:
        raise ValueError("it holds no point")
    return points
