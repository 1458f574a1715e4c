"""The live table of a run: one row a round while it goes on, clients where it matters."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from samv2.federated.client_lines import Line, client_lines

PHASES = ("train", "merge", "evaluate")
"""Of a round, one after the other; ``seconds`` of ``metrics.jsonl`` holds more."""


class RoundTable:
    """A context manager that shows rounds as they finish.

    On a terminal the table grows in place; elsewhere each round is one line.

    Args:
        console: where to.
        rounds: rounds of the run, for the title.
        verbose: show every client of every round; None: where debug messages are shown.
    """

    def __init__(
        self, console: Console, rounds: int, *, verbose: bool | None = None
    ) -> None:
        if verbose is None:
            verbose = logging.getLogger("samv2").isEnabledFor(logging.DEBUG)
        self._console = console
        self._rounds = rounds
        self._verbose = verbose
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

    def add(
        self, row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Show one finished round.

        Args:
            row: of ``metrics.jsonl``.
            clients: the round's of ``clients.jsonl``; refused ones are always named.
        """
        cells = [
            f"{row['train_loss']:.3f}",
            f"{row['bytes_up_per_client'] / 1000:.1f} kB",
            str(row.get("edits", "-")),
            str(row["refused"]) if row["refused"] else "-",
            f"{sum(row['seconds'][phase] for phase in PHASES):.0f} s",
        ]
        lines = client_lines(clients, verbose=self._verbose)
        name = f"{row['round']}/{self._rounds}"
        self._add(name, row["perplexity"], cells, lines)

    def _add(
        self,
        name: str,
        perplexity: Mapping[str, float | None],
        cells: list[str],
        lines: Sequence[Line] = (),
    ) -> None:
        if self._table is None:
            self._domains = list(perplexity)
            self._table = _empty(self._domains)
        shown = [_number(perplexity.get(domain)) for domain in self._domains]
        self._table.add_row(name, *shown, *cells)
        blank = [""] * len(self._domains)
        for line in lines:
            loss, size, refused, seconds = map(Text, line.cells)
            who = Text(f"  {line.name}")
            row = (who, *blank, loss, size, "", refused, seconds)
            self._table.add_row(*row, style=line.style)
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
        for line in lines:
            self._console.print(Text(f"    {line}", style=line.style), soft_wrap=True)


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
