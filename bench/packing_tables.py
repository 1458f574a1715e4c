"""The tables that the packing bench prints: figures, bars, and whether they are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packing_cases import CASES, COMPARED, SHARE_OF_BARS
from packing_speed import Row
from rich.table import Table

from samv2.common.telemetry import number_table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number with the bar that it is held to."""

    name: str
    value: float
    unit: str = ""
    most: float | None = None

    @property
    def miss(self) -> str | None:
        """What is wrong with it."""
        if self.most is None or self.value <= self.most:
            return None
        return f"{self.name}: {self.value:.4g} {self.unit}, needed {self.most:g}"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Another way of packing on one case; as :class:`packing_speed.Row`."""

    name: str
    case: str
    encode: float
    decode: float
    size: float


def speed_table(rows: Sequence[Row], path: str | None) -> Table:
    """Every case on one code path."""
    share = SHARE_OF_BARS.get(path, 1.0)
    cells = []
    for row in rows:
        case = CASES[row.case]
        cells.append(
            [
                row.case,
                *_least(row.encode, case.encode, share),
                *_least(row.decode, case.decode, share),
                f"{row.accumulate:.2f}",
                *_most(row.size, case.size, digits=4),
                f"{row.of_dense:.4f}",
                f"{row.memcpy_ms:.2f}",
            ]
        )
    columns = ["64 MiB float32", "encode", "≥", "decode", "≥", "add", "size", "≤"]
    return number_table(
        f"Packing, code path: {path or 'the only one'}",
        [*columns, "of dense", "memcpy ms"],
        cells,
        caption="encode, decode, add: memcpy's time over ours (more is faster); size: "
        "bytes over values + entropy of the index",
    )


def baseline_table(found: Sequence[Compared], ours: Mapping[str, Row]) -> Table:
    """Everything else, beside ours where that was measured too."""
    here = {(item.name, item.case): item for item in found}
    names = list(dict.fromkeys(item.name for item in found))
    cells = [["samv2", *(_triple(ours.get(case)) for case in COMPARED)]]
    cells += [
        [name, *(_triple(here.get((name, case))) for case in COMPARED)]
        for name in names
    ]
    return number_table(
        "Against other ways of packing",
        ["", *COMPARED],
        cells,
        caption="encode / decode, x memcpy, and size over values + entropy; below 1, "
        "the values themselves were compressed",
    )


def figure_table(title: str, figures: Sequence[Figure]) -> Table:
    """One number a row."""
    rows = [
        [item.name, *_most(item.value, item.most, digits=3), item.unit]
        for item in figures
    ]
    return number_table(title, ["", "found", "≤", "unit"], rows)


def _least(value: float, bar: float | None, share: float) -> list[str]:
    if bar is None or not share:
        return [f"{value:.2f}", "-"]
    needed = share * bar
    return [_marked(f"{value:.2f}", value >= needed), f"{needed:.2f}"]


def _most(value: float, bar: float | None, *, digits: int) -> list[str]:
    text = f"{value:.{digits}f}"
    return [text, "-"] if bar is None else [_marked(text, value <= bar), f"{bar:g}"]


def _marked(text: str, met: bool) -> str:
    return f"[green]{text} ✓[/green]" if met else f"[red]{text} ✗[/red]"


def _triple(item: Row | Compared | None) -> str:
    if item is None:
        return "-"
    return f"{item.encode:.2f} / {item.decode:.2f}\n{item.size:.3f}"
