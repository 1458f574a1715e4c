"""What a run writes down: console, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from transformers.utils.logging import disable_progress_bar

from samv2.common.event_log import json_value
from samv2.common.files import write_bytes

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"


def make_console(*, stderr: bool = False) -> Console:
    """The console that a command talks through."""
    return Console(stderr=stderr, highlight=False)


def log_to(console: Console, *, verbose: bool = False) -> None:
    """Send the product's log records to the console, warnings of libraries too.

    Unless ``verbose``, transformers' own progress bars are off: the product shows its.
    """
    handler = RichHandler(console=console, show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    logging.getLogger("samv2").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        disable_progress_bar()


@contextmanager
def progress_bar(console: Console, text: str, total: int) -> Iterator[Any]:
    """A bar with count, elapsed and remaining time; yields ``advance(done, total)``.

    Where there is no terminal, one line says what has begun.
    """
    if not console.is_terminal:
        console.print(f"{text} ...")
        yield lambda done, of: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done, of: progress.update(task, completed=done, total=of)


class RowsFile:
    """Appends one JSON object a round to a file.

    Args:
        path: the file.
        keep_rounds: rounds up to this one are kept from an earlier start of the run;
            later ones will be run again and are dropped.
    """

    def __init__(self, path: Path, *, keep_rounds: int = -1) -> None:
        self.path = Path(path)
        kept = [row for row in read_rows(path) if row["round"] <= keep_rounds]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_bytes(self.path, text.encode())

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Add a round's object; it must hold ``round``.

        Returns:
            What was written: NaN and infinity are null.
        """
        clean = json_value(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return clean


class MetricsLog:
    """Appends one JSON object a round, and mirrors its numbers to TensorBoard.

    Args:
        folder: the run directory.
        keep_rounds: as for :class:`RowsFile`.
    """

    def __init__(self, folder: Path, *, keep_rounds: int = -1) -> None:
        self._file = RowsFile(Path(folder) / METRICS, keep_rounds=keep_rounds)
        self.path = self._file.path
        self.writer = SummaryWriter(
            str(Path(folder) / EVENTS), purge_step=keep_rounds + 1
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a round's object; it must hold ``round``; NaN and infinity become null.

        What ``writer`` was given before is flushed with it.
        """
        clean = self._file.write(row)
        for name, value in _scalars(clean):
            self.writer.add_scalar(name, value, row["round"])
        self.writer.flush()

    def close(self) -> None:
        """Close the TensorBoard file."""
        self.writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, see :func:`read_rows`."""
    return read_rows(Path(folder) / METRICS)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a :class:`RowsFile`, up to the first line that is damaged."""
    if not Path(path).is_file():
        return []
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("round"), int):
            break
        rows.append(row)
    return rows


def _scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value


def number_table(
    title: str, columns: list[str], rows: list[list[str]], *, caption: str = ""
) -> Table:
    """A Rich table whose first column is text and whose others are numbers."""
    table = Table(title=title, caption=caption or None, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
