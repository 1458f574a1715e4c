"""The last words of a run: what was achieved, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from samv2.common.telemetry import number_table


def show_summary(summary: Mapping[str, Any], root: Path, console: Console) -> None:
    """Print a run's summary as a table and a few sentences."""
    rows = []
    for name, values in summary["domains"].items():
        cells = [_number(values[part]) for part in ("dense", "start", "final")]
        rows.append([name, *cells, _change(values)])
    console.print()
    console.print(
        number_table(
            "Held-out perplexity (lower is better)",
            [
                "domain",
                "dense model",
                "expert graph, start",
                "after training",
                "change",
            ],
            rows,
        )
    )
    up = summary["bytes_up_per_client_round"]
    fedit = summary["fedit_bytes_per_client_round"]
    seconds = sum(summary["seconds"].values())
    known = [v for v in summary["domains"].values() if v["start"] and v["final"]]
    improved = sum(values["final"] < values["start"] for values in known)
    dense, start, final = (
        _mean([v[part] for v in known if v[part]])
        for part in ("dense", "start", "final")
    )
    before = f" (the dense model had {dense:.2f})" if dense else ""
    console.print(
        f"\n[bold]What happened.[/bold] {summary['clients']} clients trained "
        f"{summary['model']} for {summary['rounds']} rounds without sharing a sentence "
        f"of text. Held-out perplexity fell on {improved} of {len(rows)} domains: "
        f"geometric mean {_number(start)} -> {_number(final)}{before}, with "
        f"{summary['ffn_flops_fraction']:.0%} of the dense model's FFN arithmetic."
    )
    console.print(
        f"A client uploaded at most {up / 1000:,.0f} kB a round: "
        f"1/{fedit / max(up, 1):.0f} of what rank-8 LoRA on the same layers (FedIT) sends "
        f"({fedit / 1e6:.2f} MB). {summary['edits']} graph edits, {summary['refused']} "
        f"refused replies, {seconds:.0f} s in all."
    )
    steps = {
        f"samv2 eval {root}": "score it again; --text NAME=FILE for your own text",
        f"samv2 report {root}": "figures and expert graph as one page for a browser",
        f"samv2 export {root} --output my-model": "a plain Hugging Face folder",
        "samv2 train --help": "your own model, text and clients",
        f"tensorboard --logdir {root}": f"curves; everything else is in {root}/",
    }
    width = max(map(len, steps))
    console.print("\n[bold]What next.[/bold]")
    for command, meaning in steps.items():
        console.print(f"  {command:<{width}}  {meaning}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _change(values: Mapping[str, float | None]) -> str:
    start, final = values["start"], values["final"]
    return f"{final / start - 1:+.1%}" if start and final else "-"


def _mean(values: list[float]) -> float | None:
    """Geometric mean; None of nothing."""
    if not values:
        return None
    return math.exp(sum(math.log(value) for value in values) / len(values))
