"""What came of a grid: ``ablation.csv``, and each factor's effect."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from samv2.ablation.bounds import CHECKS, OK
from samv2.ablation.factors import Factor
from samv2.ablation.job import RESULT
from samv2.ablation.plan import PlannedRun
from samv2.common.config import to_flat
from samv2.common.files import write_bytes
from samv2.common.telemetry import number_table

CSV = "ablation.csv"
DONE, FAILED, VIOLATED = "done", "failed", "violated"
"""States of a run: finished, not finished, finished but outside a bound."""
EFFECT_COLUMNS = ("perplexity", "bytes_up_per_client_round", "flops_fraction")


def result_row(run: PlannedRun, folder: Path, error: str | None) -> dict[str, Any]:
    """The row of a run that has ended.

    Args:
        run: as planned.
        folder: its run directory.
        error: why it failed; None where it did not.
    """
    found: dict[str, Any] = {}
    if error is None:
        found = read_result(folder) or {}
    held = all(found.get(name) == OK for name in CHECKS)
    status = FAILED if error is not None else DONE if held else VIOLATED
    head = {"name": run.name, "status": status}
    head["error"] = " ".join((error or "").split())
    return head | to_flat(run.settings) | found


def read_result(folder: Path) -> dict[str, Any] | None:
    """The figures of a run that has finished, else None."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table; a value that is not known is empty.

    Columns are those of all rows: settings, then figures, then checks.
    """
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(name for name in row if name not in CHECKS)
    figures = ("perplexity.", "perplexity")
    columns = [n for n in names if not n.startswith(figures)]
    if any(name.startswith(figures) for name in names):
        # Domains differ where data.domains is varied; they stay together.
        place = columns.index("train_loss")
        shown = [name for name in names if name.startswith(figures)]
        shown.sort(key=lambda name: name.startswith("perplexity."))
        columns[place:place] = shown
    columns += list(CHECKS)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if x is None else x for key, x in row.items()})
    write_bytes(path, text.getvalue().encode())


def effects(
    factors: Sequence[Factor],
    runs: Sequence[PlannedRun],
    rows: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """What each level of each factor does, all else equal.

    A level is compared with the factor's first one, run by run with the same levels of
    all other factors; the geometric mean of the ratios is its effect. Where the base is
    in the grid, it comes first.

    Args:
        factors: of the grid.
        runs: of the grid.
        rows: by name of a run, of those that finished.

    Returns:
        One object a level: factor, level, pairs compared, and for each of
        :data:`EFFECT_COLUMNS` the mean and the ratio to the first level.
    """
    found = []
    for factor in factors:
        groups: dict[str, dict[tuple[Any, ...], Mapping[str, Any]]] = {}
        for run in runs:
            if run.name in rows:
                others = {k: v for k, v in run.levels.items() if k != factor.name}
                group = groups.setdefault(run.levels[factor.name], {})
                group[tuple(sorted(others.items()))] = rows[run.name]
        varied = {key for group in groups.values() for key in group}
        shared = {key for key in varied if sum(key in g for g in groups.values()) > 1}
        first = next(iter(groups), None)
        for level, group in groups.items():
            keys = shared & group.keys() & groups[first].keys()
            pairs = [(group[key], groups[first][key]) for key in sorted(keys)]
            effect = {"factor": factor.name, "level": level, "pairs": len(pairs)}
            for column in EFFECT_COLUMNS:
                values = [one[column] for one, _ in pairs]
                starts = [other[column] for _, other in pairs]
                effect[column] = _mean(values)
                effect[f"{column}_ratio"] = _ratio(values, starts)
            if pairs:
                found.append(effect)
    return found


def effects_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """:func:`effects` for a person."""
    rows, before = [], None
    for one in found:
        name = "" if one["factor"] == before else one["factor"].rpartition(".")[2]
        first = one["factor"] != before
        before = one["factor"]
        rows.append(
            [
                name,
                one["level"],
                str(one["pairs"]),
                _number(one["perplexity"]),
                "" if first else _change(one["perplexity_ratio"]),
                _kilobytes(one["bytes_up_per_client_round"]),
                _percent(one["flops_fraction"]),
            ]
        )
    return number_table(
        "Effects, all else equal",
        ["factor", "level", "runs", "perplexity", "change", "up/client", "FFN FLOPs"],
        rows,
        caption="geometric means over runs that differ in this factor alone; the change "
        "is against the factor's first row",
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value]
    if not known or len(known) < len(values):
        return None
    return math.exp(sum(math.log(value) for value in known) / len(known))


def _ratio(
    values: Sequence[float | None], starts: Sequence[float | None]
) -> float | None:
    one, other = _mean(values), _mean(starts)
    return one / other if one and other else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _change(value: float | None) -> str:
    return "-" if value is None else f"{value - 1:+.2%}"


def _kilobytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1000:.1f} kB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
