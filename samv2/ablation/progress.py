"""How a grid goes on: a bar that counts rounds, and a line for each run that ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from samv2.ablation.bounds import CHECKS, OK
from samv2.common.telemetry import read_metrics
from samv2.federated.phases import duration


class GridProgress:
    """A context manager that shows rounds done, what goes on, and the time left.

    Args:
        console: a terminal shows a bar; elsewhere a line is printed as each run ends.
        rounds: of every run that is left, by name.
        runs: the folder of the run directories.
    """

    def __init__(self, console: Console, rounds: Mapping[str, int], runs: Path) -> None:
        self._console, self._rounds, self._runs = console, rounds, runs
        self._going: set[str] = set()
        self._lock = threading.Lock()
        self._done = 0
        self._total = sum(rounds.values())
        self._start = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=self._total)

    def __enter__(self) -> GridProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """A job has begun; called from any thread."""
        with self._lock:
            self._going.add(name)

    def end(self, name: str) -> None:
        """A job has ended."""
        with self._lock:
            self._going.discard(name)
        self._done += self._rounds.get(name, 0)

    def refresh(self) -> None:
        """Look at the runs that go on, and show their rounds."""
        if not self._console.is_terminal:
            return
        with self._lock:
            going = sorted(self._going)
        rounds = sum(len(read_metrics(self._runs / name)) for name in going)
        words = ", ".join(name.rpartition("-")[0] or name for name in going)
        self._bar.update(
            self._task,
            completed=self._done + rounds,
            description=words[:60] or "waiting",
        )

    def tell(self, row: Mapping[str, Any], ended: int, of: int) -> None:
        """A run has ended: one line of what came of it, and of the time left.

        Args:
            row: of ``ablation.csv``.
            ended: runs that have a row.
            of: runs of the grid.
        """
        parts = [f"[{ended}/{of}] {row['name']}: {row['status']}"]
        if row["error"]:
            parts.append(row["error"][:300])
        else:
            value, start = row["perplexity"], row["perplexity_start"]
            shown = "-" if value is None else f"{value:.2f}"
            before = "-" if start is None else f"{start:.2f}"
            parts.append(
                f"perplexity {shown} (start {before}), "
                f"{row['bytes_up_per_client_round'] / 1000:.1f} kB up, "
                f"{duration(row['seconds'])}"
            )
            parts += [f"{name}: {row[name]}" for name in CHECKS if row.get(name) != OK]
        if self._done and self._done < self._total:
            spent = time.monotonic() - self._start
            left = spent / self._done * (self._total - self._done)
            parts.append(f"about {duration(left)} left")
        self._console.print("; ".join(parts), markup=False, soft_wrap=True)
