"""How rows look in a terminal: with Rich where it is installed, plain elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from samv2_kernels.audit.budgets import broken
from samv2_kernels.audit.row import Row

NOTE = (
    "Registers, spills, shared memory and instruction counts: read from the compiled code. "
    "Occupancy and the A40 bound: static models, not measurements."
)
ABSENT = "-"
BAR_WIDTH = 30


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A share in per cent, or a dash."""
    return ABSENT if value is None else f"{value:.0%}"


def bound(row: Row) -> str:
    """What binds on an A40 and its factor over the roofline."""
    return f"{row.bound} x{row.bound_factor:.2f}" if row.bound else ABSENT


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("kernel", lambda row: row.kernel),
    ("config", lambda row: row.config),
    ("weights", lambda row: row.weights),
    ("pass", lambda row: row.direction),
    ("rows", lambda row: str(row.rows_per_tile)),
    ("regs", lambda row: str(row.registers)),
    ("spill B", lambda row: str(row.spill_bytes)),
    ("smem KB", lambda row: number(row.shared_bytes / 1024)),
    ("blk/SM", lambda row: str(row.blocks_per_sm)),
    ("occup.", lambda row: share(row.occupancy)),
    ("HMMA", lambda row: share(row.tensor_share)),
    ("load B", lambda row: number(row.widest_weight_load_bytes, 0)),
    ("instr/w", lambda row: number(row.instructions_per_weight, 2)),
    ("LSU/w", lambda row: number(row.lsu_per_weight, 2)),
    ("A40 bound", bound),
    ("", lambda row: "over budget" if any(broken(row)) else "ok"),
)
TEXT_COLUMNS = 4


def rich(name: str) -> Any:
    """A module of Rich; None: Rich is not installed, as the package does not need it."""
    if importlib.util.find_spec("rich") is None:
        return None
    return importlib.import_module(f"rich.{name}")


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Text of every cell."""
    return [[show(row) for _, show in COLUMNS] for row in rows]


def plain(title: str, rows: Sequence[Row]) -> str:
    """A table of aligned columns."""
    lines = [[head for head, _ in COLUMNS], *cells(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [title]
    for line in lines:
        aligned = [
            cell.ljust(width) if index < TEXT_COLUMNS else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(aligned).rstrip())
    return "\n".join(text)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print one architecture's rows to standard output."""
    tables, consoles = rich("table"), rich("console")
    console = consoles.Console() if consoles else None
    if not console or not console.is_terminal:
        print(plain(title, rows))
        return
    table = tables.Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, (head, _) in enumerate(COLUMNS):
        justify = "left" if index < TEXT_COLUMNS else "right"
        table.add_column(head, justify=justify, overflow="fold")
    for row, line in zip(rows, cells(rows), strict=True):
        table.add_row(*line, style="red" if any(broken(row)) else None)
    console.print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; yields what advances it."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    if bars := rich("progress"):
        console = rich("console").Console(stderr=True)
        with bars.Progress(console=console, transient=True) as bar:
            task = bar.add_task("compiling", total=total)
            yield lambda: bar.advance(task)
        return
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        filled = BAR_WIDTH * done // total
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        print(f"\rcompiling [{bar}] {done}/{total}", end="", file=sys.stderr)

    yield advance
    print(file=sys.stderr)
