"""A run's rounds, result, edits and refusals, as its directory holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samv2.common.config import load_settings
from samv2.common.errors import SamError
from samv2.common.settings import Settings
from samv2.common.telemetry import METRICS, read_metrics
from samv2.federated.checkpoint import latest_checkpoint, load_graph
from samv2.federated.run_folder import RunFolder
from samv2.federated.run_logs import fedit_bytes
from samv2.report.client_data import ClientFacts, read_clients
from samv2.report.merge_data import Merge, read_merges
from samv2.report.reading import (
    DAMAGE,
    Missing,
    geometric_mean,
    maybe_number,
    number,
    numbers_by_name,
    read_json,
    read_piece,
    said,
    text,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Held-out perplexity of one kind of text; None where it is not known."""

    name: str
    dense: float | None
    start: float | None
    final: float | None

    @property
    def change(self) -> float | None:
        """Relative, from start to end."""
        return self.final / self.start - 1 if self.start and self.final else None


@dataclass(frozen=True, kw_only=True)
class Round:
    """A line of ``metrics.jsonl``."""

    round: int
    clients: int
    refused: int
    train_loss: float | None
    perplexity: Mapping[str, float | None]
    """By domain."""
    bytes_up_per_client: float
    """Of the client that sent most."""
    bytes_down_per_client: float
    edits: int
    seconds: Mapping[str, float | None]
    """By phase."""
    server_seconds: float | None
    """Of all phases, the time that was not spent waiting for clients."""

    @property
    def mean(self) -> float | None:
        """Geometric mean of the perplexities."""
        return geometric_mean(self.perplexity)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to, from ``summary.json`` or, before it is there, from the rest."""

    finished: bool
    model: str
    domains: tuple[Domain, ...]
    flops_fraction: float | None
    bytes_up: float
    """Of a client and round, the most."""
    bytes_down: float
    fedit_bytes: float | None
    """What rank-8 LoRA on the same layers uploads."""
    rounds: int
    seconds: Mapping[str, float | None]
    """By phase."""
    heterogeneity: Mapping[str, float | None]

    def mean(self, part: str) -> float | None:
        """Geometric mean of the domains' ``dense``, ``start`` or ``final``."""
        return geometric_mean({d.name: getattr(d, part) for d in self.domains})

    @property
    def total_seconds(self) -> float:
        """All phases."""
        return sum(value or 0.0 for value in self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run without its experts."""

    settings: Settings | Missing
    settings_text: str | Missing
    """``config.toml``."""
    rounds: tuple[Round, ...] | Missing
    merges: tuple[Merge, ...] | Missing
    unread_merges: tuple[str, ...]
    """What is wrong with others of them."""
    start: Mapping[str, float | None] | Missing
    """Perplexity by domain before the first round."""
    result: Result | Missing
    clients: tuple[ClientFacts, ...] | Missing


def read_run(root: Path) -> RunFacts:
    """Everything about a run but its experts."""
    run = RunFolder(root=Path(root))
    settings = _settings(run)
    rounds = _rounds(run)
    merges, unread = read_merges(run.root, remedy=_again(run))
    start = _start(run)
    return RunFacts(
        settings=settings,
        settings_text=read_piece(run.config, str, remedy="`samv2 train` writes it."),
        rounds=rounds,
        merges=merges,
        unread_merges=unread,
        start=start,
        result=_result(run, rounds, start),
        clients=read_clients(run.root, remedy=_again(run)),
    )


def _again(run: RunFolder) -> str:
    return f"`samv2 train --log-dir {run.root} --resume` goes on with the run."


def _settings(run: RunFolder) -> Settings | Missing:
    try:
        return load_settings(run.config)
    except SamError as error:
        what = f"config.toml does not hold settings of this version: {said(error)}."
        return Missing(what=what, remedy="Compare it with `samv2 train --help`.")


def _rounds(run: RunFolder) -> tuple[Round, ...] | Missing:
    remedy = f"A run writes a line a round. {_again(run)}"
    try:
        found = tuple(map(_round, read_metrics(run.root)))
    except DAMAGE as error:
        return Missing(what=f"{METRICS} cannot be read: {said(error)}.", remedy=remedy)
    if not found:
        return Missing(what=f"{METRICS} holds no finished round.", remedy=remedy)
    return found


def _round(row: Any) -> Round:
    seconds = numbers_by_name(row["seconds"])
    server_seconds = seconds.pop("server", None)
    return Round(
        round=whole(row["round"]),
        clients=whole(row["clients"]),
        refused=whole(row["refused"]),
        train_loss=maybe_number(row["train_loss"]),
        perplexity=numbers_by_name(row["perplexity"]),
        bytes_up_per_client=number(row["bytes_up_per_client"]),
        bytes_down_per_client=number(row["bytes_down_per_client"]),
        edits=whole(row["edits"]),
        seconds=seconds,
        server_seconds=server_seconds,
    )


def _start(run: RunFolder) -> Mapping[str, float | None] | Missing:
    """From ``summary.json``, or else from the newest checkpoint."""
    found = read_json(
        run.summary,
        lambda value: {
            text(name): maybe_number(parts["start"])
            for name, parts in value["domains"].items()
        },
        remedy=_again(run),
    )
    path = latest_checkpoint(run.checkpoints)
    if not isinstance(found, Missing) or path is None:
        return found
    try:
        return numbers_by_name(load_graph(path)[2]["start"])
    except DAMAGE:
        return found


def _result(
    run: RunFolder,
    rounds: tuple[Round, ...] | Missing,
    start: Mapping[str, float | None] | Missing,
) -> Result | Missing:
    found = read_json(run.summary, _from_summary, remedy=_again(run))
    if not isinstance(found, Missing):
        return found
    prepared = read_json(run.prepared, _object, remedy=_again(run))
    if isinstance(prepared, Missing) or isinstance(rounds, Missing):
        return found
    try:
        return _from_pieces(
            prepared, rounds, {} if isinstance(start, Missing) else start
        )
    except DAMAGE:
        return found


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{json.dumps(value)[:40]} stands where an object should")
    return value


def _from_summary(value: Any) -> Result:
    return Result(
        finished=True,
        model=text(value["model"]),
        domains=tuple(
            Domain(
                name=text(name),
                dense=maybe_number(parts["dense"]),
                start=maybe_number(parts["start"]),
                final=maybe_number(parts["final"]),
            )
            for name, parts in value["domains"].items()
        ),
        flops_fraction=maybe_number(value["ffn_flops_fraction"]),
        bytes_up=number(value["bytes_up_per_client_round"]),
        bytes_down=number(value["bytes_down_per_client_round"]),
        fedit_bytes=maybe_number(value["fedit_bytes_per_client_round"]),
        rounds=whole(value["rounds"]),
        seconds=numbers_by_name(value["seconds"]),
        heterogeneity=numbers_by_name(value["heterogeneity"]),
    )


def _from_pieces(
    prepared: Mapping[str, Any],
    rounds: tuple[Round, ...],
    start: Mapping[str, float | None],
) -> Result:
    dense = numbers_by_name(prepared["dense_perplexity"])
    final = rounds[-1].perplexity
    spent = [sum(v or 0.0 for v in item.seconds.values()) for item in rounds]
    return Result(
        finished=False,
        model=text(prepared["model_name"]),
        domains=tuple(
            Domain(
                name=name,
                dense=dense.get(name),
                start=start.get(name),
                final=final.get(name),
            )
            for name in sorted(start.keys() | final.keys())
        ),
        flops_fraction=maybe_number(prepared["flops_fraction"]),
        bytes_up=max(item.bytes_up_per_client for item in rounds),
        bytes_down=max(item.bytes_down_per_client for item in rounds),
        fedit_bytes=fedit_bytes(
            model_width=whole(prepared["model_width"]),
            ffn_width=whole(prepared["ffn_width"]),
            num_layers=whole(prepared["num_layers"]),
        ),
        rounds=len(rounds),
        seconds=numbers_by_name(prepared["seconds"]) | {"federation": sum(spent)},
        heterogeneity=numbers_by_name(prepared["heterogeneity"]),
    )
