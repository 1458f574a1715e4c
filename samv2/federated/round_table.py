"""The live table of a run: one row a round while it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text


class RoundTable:
    """A context manager that shows rounds as they finish.

    On a terminal the table grows in place; elsewhere each round is one line.

    Args:
        console: where to.
        rounds: rounds of the run, for the title.
    """

    def __init__(self, console: Console, rounds: int) -> None:
        self._console = console
        self._rounds = rounds
        self._table: Table | None = None
        self._domains: list[str] = []
        self._live = Live(console=console, auto_refresh=False)
        self._terminal = console.is_terminal

    def __enter__(self) -> RoundTable:
        if self._terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._live.stop()

    def working(self, what: str, done: int, of: int) -> None:
        """Say below the table what goes on; only a terminal shows it."""
        if self._terminal:
            doing = {"train": "training", "evaluate": "scoring"}.get(what, what)
            text = Text(f"{doing}: {done} of {of} clients are done", style="dim")
            self._live.update(self._shown(text), refresh=True)

    def _shown(self, text: Text) -> Group:
        return Group(text) if self._table is None else Group(self._table, text)

    def start(self, perplexity: Mapping[str, float | None]) -> None:
        """Show the held-out perplexities before the first round."""
        if self._table is None:
            self._add("start", perplexity, ["", "", "", "", ""])

    def add(self, row: Mapping[str, Any]) -> None:
        """Show one finished round, an object of ``metrics.jsonl``."""
        cells = [
            f"{row['train_loss']:.3f}",
            f"{row['bytes_up_per_client'] / 1000:.1f} kB",
            str(row.get("edits", "-")),
            str(row["refused"]) if row["refused"] else "-",
            f"{sum(row['seconds'].values()):.0f} s",
        ]
        self._add(f"{row['round']}/{self._rounds}", row["perplexity"], cells)

    def _add(
        self, name: str, perplexity: Mapping[str, float | None], cells: list[str]
    ) -> None:
        if self._table is None:
            self._domains = list(perplexity)
            self._table = _empty(self._domains)
        shown = [_number(perplexity.get(domain)) for domain in self._domains]
        self._table.add_row(name, *shown, *cells)
        if self._terminal:
            self._live.update(self._table, refresh=True)
            return
        domains = "  ".join(f"{key} {_number(v)}" for key, v in perplexity.items())
        scored = f"perplexity {domains}  " if domains else ""
        labels = ("loss", "up/client", "edits", "refused", "time")
        rest = "  ".join(
            f"{label} {cell}" for label, cell in zip(labels, cells) if cell
        )
        self._console.print(f"  round {name}: {scored}{rest}".rstrip())


def _empty(domains: list[str]) -> Table:
    table = Table(title="Held-out perplexity by round", title_justify="left")
    table.add_column("round")
    for name in domains:
        table.add_column(name, justify="right")
    for name in ("train loss", "up/client", "edits", "refused", "time"):
        table.add_column(name, justify="right")
    return table


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"
