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
    start, final = (_mean([v[part] for v in known]) for part in ("start", "final"))
    console.print(
        f"\n[bold]What happened.[/bold] {summary['clients']} clients trained "
        f"{summary['model']} for {summary['rounds']} rounds without sharing a sentence of "
        f"text. Held-out perplexity fell on {improved} of {len(rows)} domains (geometric "
        f"mean {_number(start)} -> {_number(final)}), with {summary['ffn_flops_fraction']:.0%} of "
        "the dense model's FFN arithmetic."
    )
    console.print(
        f"A client uploaded at most {up / 1000:,.0f} kB a round: 1/{fedit / max(up, 1):.0f} of "
        f"what rank-8 LoRA on the same layers (FedIT) sends ({fedit / 1e6:.2f} MB). "
        f"{summary['edits']} graph edits, {summary['refused']} refused replies, "
        f"{seconds:.0f} s in all."
    )
    console.print(
        f"\n[bold]What next.[/bold]\n"
        f"  samv2 eval {root}                     score it again, or on your own text "
        "(--text NAME=FILE)\n"
        f"  samv2 export {root} --output my-model   a plain Hugging Face folder\n"
        f"  samv2 train --help                  your own model, text, clients\n"
        f"  tensorboard --logdir {root}           curves; everything else is in {root}/"
    )


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
