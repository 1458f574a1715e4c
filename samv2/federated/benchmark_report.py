"""The result of a federation benchmark: for machines and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from samv2.common.config import to_flat
from samv2.common.settings import Settings
from samv2.common.telemetry import number_table
from samv2.federated.benchmark_settings import Benchmark, common_settings
from samv2.federated.lora_methods import METHODS

TRAINING = ("train", "merge")
"""Phases whose wall time is a method's cost; all methods score the same windows."""


def build_report(
    benchmark: Benchmark,
    shared: Mapping[str, Any],
    entries: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The content of ``federation.json``.

    Args:
        benchmark: protocol and methods.
        shared: what was found when the text was made: model, checksums, dense scores.
        entries: of the methods that are finished, see :func:`method_entry`.
    """
    dense = dict(shared["dense"])
    return {
        "protocol": {
            "name": benchmark.name,
            "settings": common_settings(benchmark),
            "model": shared["model"],
            "model_fingerprint": shared["model_fingerprint"],
            "corpus_sha256": shared["corpus_sha256"],
            "dense": {"perplexity": geometric_mean(dense.values()), "domains": dense},
        },
        "methods": list(entries),
    }


def method_entry(
    name: str,
    settings: Settings,
    benchmark: Benchmark,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """One method's object of ``federation.json``.

    ``seconds`` is the wall time of training and merging; ``seconds_by_phase`` has the
    preparation (a model's conversion, for instance) and the evaluations beside it.

    Args:
        name: of the method.
        settings: the method's.
        benchmark: it is a part of.
        rows: of its ``metrics.jsonl``, one a round.
        summary: its ``summary.json``.
    """
    rounds = []
    bytes_up, seconds = 0, 0.0
    for row in rows:
        bytes_up += row["bytes_up"]
        seconds += sum(row["seconds"][phase] for phase in TRAINING)
        rounds.append(
            {
                "round": row["round"],
                "perplexity": geometric_mean(row["perplexity"].values()),
                "domains": row["perplexity"],
                "bytes_up_total": bytes_up,
                "seconds": round(seconds, 3),
            }
        )
    common = common_settings(benchmark)
    return {
        "method": name,
        "title": title_of(name),
        "perplexity": rounds[-1]["perplexity"],
        "domains": rounds[-1]["domains"],
        "bytes_up_per_client_round": max(row["bytes_up_per_client"] for row in rows),
        "bytes_up_total": bytes_up,
        "seconds": round(seconds, 3),
        "seconds_by_phase": _phases(rows, summary),
        "settings": {
            key: value for key, value in to_flat(settings).items() if key not in common
        },
        "rounds": rounds,
    }


def _phases(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, float]:
    phases = {
        phase: round(sum(row["seconds"][phase] for row in rows), 3)
        for phase in ("train", "merge", "evaluate")
    }
    rest = {
        name: seconds
        for name, seconds in summary["seconds"].items()
        if name not in phases and name != "federation"
    }
    return {"prepare": round(sum(rest.values()), 3), **phases}


def title_of(name: str) -> str:
    """A method as tables and pictures name it."""
    if name in METHODS:
        return METHODS[name].title
    return name.replace("samv2", "SAM-v2", 1).replace("-sparse", ", sparse")


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of perplexities; None if one of them is not known, or there is none."""
    known = list(values)
    if not known or any(value is None or value <= 0 for value in known):
        return None
    return math.exp(sum(math.log(value) for value in known if value) / len(known))


def report_table(report: Mapping[str, Any]) -> Table:
    """The benchmark as a table, one method a row, the dense model first."""
    protocol = report["protocol"]
    dense = protocol["dense"]
    domains = list(dense["domains"])
    columns = ["method", "geo-mean", *domains, "up kB", "total MB", "seconds"]
    rows = [["dense model", *_numbers(dense, domains), "-", "-", "-"]]
    for entry in report["methods"]:
        rows.append(
            [
                entry["title"],
                *_numbers(entry, domains),
                f"{entry['bytes_up_per_client_round'] / 1000:,.1f}",
                f"{entry['bytes_up_total'] / 1e6:,.2f}",
                _seconds(entry["seconds"]),
            ]
        )
    settings = protocol["settings"]
    return number_table(
        f"{protocol['name']}: held-out perplexity of {protocol['model']}",
        columns,
        rows,
        caption=f"{settings['federation.rounds']} rounds of "
        f"{settings['train.local_steps']} steps, {settings['federation.clients']} "
        "clients. up kB: most that a client uploaded in a round; total MB: uploaded by "
        "all; seconds: training and merging.",
    )


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def _numbers(entry: Mapping[str, Any], domains: Sequence[str]) -> list[str]:
    values = [entry["perplexity"], *(entry["domains"].get(name) for name in domains)]
    return ["-" if value is None else f"{value:.2f}" for value in values]
