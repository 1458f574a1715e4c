"""A LoRA baseline from start to summary, in this process and its workers.

    text -> clients (embedded grid) -> FedAvg -> checkpoint, log -> summary

The files are those of a SAM-v2 run where they mean the same; a run that was stopped goes
on after its last whole round and ends in the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from samv2.common.config import to_flat
from samv2.common.errors import CheckpointError, ConfigError
from samv2.common.files import write_json
from samv2.common.settings import Settings
from samv2.common.telemetry import MetricsLog, read_metrics
from samv2.data.shards import load_index
from samv2.federated.grid import EmbeddedGrid
from samv2.federated.lora_app import make_lora_app
from samv2.federated.lora_checkpoint import load_adapters, save_adapters
from samv2.federated.lora_methods import LoraMethod, lora_method
from samv2.federated.lora_round import (
    LoraPlace,
    LoraRuntime,
    kept_adapters,
    load_lora_runtime,
)
from samv2.federated.lora_strategy import LoraFedAvg, LoraRound, start_arrays
from samv2.federated.round_table import RoundTable
from samv2.federated.run_folder import RunFolder
from samv2.federated.run_lock import sole_run
from samv2.federated.run_logs import perplexities
from samv2.federated.run_text import make_text, say_text
from samv2.federated.workers import worker_count
from samv2.models.llama_loader import model_folder, resolve_model
from samv2.models.lora import save_adapter, write_lora
from samv2.models.model_files import model_fingerprint, read_tokenizer
from samv2.models.perplexity import Score

ADAPTER = "adapter"
"""Folder of the trained adapter, for peft."""


def run_lora(
    settings: Settings,
    root: Path,
    *,
    method: str,
    text: Path | None = None,
    start: Mapping[str, float | None] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Train LoRA adapters on the clients' text by a baseline's rules.

    Adapters have rank ``adapter.rank`` and scale ``adapter.scale`` and sit on all FFNs;
    expert, assembler and edit settings, codecs and budgets are not used. A ``central``
    run takes clients * local_steps sequential steps a round, as many tokens as the
    others together.

    Args:
        settings: of the run; ``model.path`` names a dense model.
        root: the run directory.
        method: ``fedit``, ``ffa-lora``, ``local`` or ``central``.
        text: folder of shards made before; None makes the run's own.
        start: held-out perplexities of the dense model where they are known; None
            scores it.
        resume: continue what is there.
        overwrite: replace what is there.
        console: where progress is shown.

    Returns:
        The content of ``summary.json``.

    Raises:
        SamError: with everything up to the last completed round on disk.
    """
    chosen = lora_method(method)
    if settings.federation.clients_per_round and not chosen.averaged:
        raise ConfigError(
            [
                f"federation.clients_per_round is "
                f"{settings.federation.clients_per_round}, but method {method!r} trains "
                "all clients each round; set it to 0"
            ]
        )
    with sole_run(root, settings, resume=resume, overwrite=overwrite) as run:
        return _run_method(run, settings, chosen, text, start, console)


def _run_method(
    run: RunFolder,
    settings: Settings,
    method: LoraMethod,
    text: Path | None,
    start: Mapping[str, float | None] | None,
    console: Console,
) -> dict[str, Any]:
    prepared = _prepare(run, settings, method, text, console)
    place = LoraPlace(
        shards=(text or run.shards).resolve(),
        states=run.states.resolve(),
        settings=settings,
        method=method.name,
    )
    table = RoundTable(console, settings.federation.rounds)
    grid = EmbeddedGrid(
        partial(make_lora_app, place),
        [{"client": index} for index in range(settings.federation.clients)],
        to_flat(settings),
        workers=worker_count(settings),
        on_reply=table.working,
    )
    with grid:
        return _federate(run, settings, method, prepared, place, start, grid, table)


def _prepare(
    run: RunFolder,
    settings: Settings,
    method: LoraMethod,
    text: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Make the shards, unless they are given, and hold the run to what it began with."""
    begin = time.perf_counter()
    source = resolve_model(settings.model.path, progress=console.print)
    folder = model_folder(source, progress=console.print)
    found: dict[str, Any] = {
        "method": method.name,
        "model": source.name,
        "fingerprint": model_fingerprint(folder),
    }
    if text is None and not run.prepared.is_file():
        made = make_text(run, read_tokenizer(folder), settings, console)
        say_text(made, console)
    found["corpus_sha256"] = load_index(text or run.shards).corpus_sha256
    if run.prepared.is_file():
        stored = json.loads(run.prepared.read_text(encoding="utf-8"))
        for key, value in found.items():
            if stored.get(key) != value:
                raise CheckpointError(
                    f"{run.root} was started with {key} {stored.get(key)!r}, not "
                    f"{value!r}; use another --log-dir, or --overwrite"
                )
        return stored
    found["seconds"] = {"prepare": time.perf_counter() - begin}
    write_json(run.prepared, found)
    return found


def _federate(
    run: RunFolder,
    settings: Settings,
    method: LoraMethod,
    prepared: Mapping[str, Any],
    place: LoraPlace,
    start: Mapping[str, float | None] | None,
    grid: EmbeddedGrid,
    table: RoundTable,
) -> dict[str, Any]:
    """Run the rounds that are left, log each, and write the summary."""
    runtime = load_lora_runtime(place)
    done, adapters, known = load_adapters(run.checkpoints, method.name)
    facts: dict[str, Any] = {"start": known or (dict(start) if start else None)}
    log = MetricsLog(run.root, keep_rounds=done)
    with closing(log) as metrics, table:
        if facts["start"] is not None:
            table.start(facts["start"])
        for row in read_metrics(run.root):
            table.add(row)

        def on_start(scores: dict[str, Score]) -> None:
            facts["start"] = perplexities(scores)
            table.start(facts["start"])

        def on_round(report: LoraRound) -> None:
            metrics.write(_row(report))
            save_adapters(
                run.checkpoints,
                report.round,
                report.adapters,
                method=method.name,
                start=facts["start"],
            )
            table.add(_row(report))

        strategy = LoraFedAvg(
            settings,
            method,
            first_round=done + 1,
            on_start=on_start if facts["start"] is None else None,
            on_round=on_round,
        )
        strategy.start(grid, start_arrays(adapters or runtime.start, method))
    _keep_adapter(run, settings, runtime)
    summary = _summary(
        settings, method, prepared, facts["start"], read_metrics(run.root)
    )
    write_json(run.summary, summary)
    return summary


def _keep_adapter(run: RunFolder, settings: Settings, runtime: LoraRuntime) -> None:
    """The trained adapter as peft reads it, where there is one for all clients."""
    done, adapters, _ = load_adapters(run.checkpoints, runtime.method.name)
    if runtime.method.pooled:
        adapters = kept_adapters(runtime, 0, done)
    if not adapters:
        return
    write_lora(runtime.model, adapters)
    save_adapter(
        runtime.model,
        run.root / ADAPTER,
        rank=settings.adapter.rank,
        scale=settings.adapter.scale,
    )


def _row(report: LoraRound) -> dict[str, Any]:
    """A round's object of ``metrics.jsonl``."""
    return {
        "round": report.round,
        "clients": report.clients,
        "refused": report.failed,
        "train_loss": report.train_loss,
        "perplexity": perplexities(report.scores),
        "bytes_up": sum(report.bytes_up),
        "bytes_up_per_client": max(report.bytes_up, default=0),
        "bytes_down": sum(report.bytes_down),
        "bytes_down_per_client": max(report.bytes_down, default=0),
        "seconds": report.seconds,
    }


def _summary(
    settings: Settings,
    method: LoraMethod,
    prepared: Mapping[str, Any],
    start: Mapping[str, float | None],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    final = rows[-1]["perplexity"] if rows else start
    phases = ("train", "merge", "evaluate")
    seconds = {name: sum(row["seconds"][name] for row in rows) for name in phases}
    return {
        "method": method.name,
        "model": prepared["model"],
        "domains": {
            name: {"start": start.get(name), "final": final.get(name)}
            for name in sorted(start.keys() | final.keys())
        },
        "bytes_up_per_client_round": max(
            (row["bytes_up_per_client"] for row in rows), default=0
        ),
        "bytes_down_per_client_round": max(
            (row["bytes_down_per_client"] for row in rows), default=0
        ),
        "rounds": len(rows),
        "clients": settings.federation.clients,
        "corpus_sha256": prepared["corpus_sha256"],
        "seconds": {
            name: round(value, 2)
            for name, value in (prepared["seconds"] | seconds).items()
        },
    }
