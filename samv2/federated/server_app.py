"""Starting a federation: in this process, or as a Flower server app.

    prepare -> clients (embedded grid or Flower's) -> strategy -> logs -> summary

Both ways run the same strategy and the same client app.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console
from torch import Tensor

from samv2.common.config import to_flat
from samv2.common.event_log import EventLog, event_log
from samv2.common.files import sweep, write_json
from samv2.common.json_keys import number_keys, text_keys
from samv2.common.settings import Settings
from samv2.common.telemetry import read_metrics, read_rows
from samv2.federated.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from samv2.federated.client_app import (
    ClientPlace,
    make_client_app,
)
from samv2.federated.client_rows import CLIENTS, refusal_totals
from samv2.federated.grid import EmbeddedGrid
from samv2.federated.prepare import Prepared, prepare
from samv2.federated.privacy import noise_key
from samv2.federated.rehearsal import warning as rehearsal_warning
from samv2.federated.round_board import gate_biases
from samv2.federated.round_logs import RoundLogs, read_rounds
from samv2.federated.round_table import RoundTable
from samv2.federated.run_config import settings_from_run_config
from samv2.federated.run_folder import RunFolder, open_run, run_model
from samv2.federated.run_lock import sole_run, sole_server
from samv2.federated.run_logs import (
    build_summary,
    fedit_bytes,
    keep_counts,
    perplexities,
)
from samv2.federated.server_merge import ServerState, initial_state
from samv2.federated.spool import Spool
from samv2.federated.strategy import RoundReport, SamStrategy
from samv2.federated.subgraph import planner_of
from samv2.federated.workers import worker_count
from samv2.models.expert_model import ExpertModel
from samv2.models.perplexity import Score
from samv2.models.save import load_expert_model
from samv2.updates.packing import Manifest

log = logging.getLogger(__name__)


def run_embedded(
    settings: Settings,
    root: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    wait: float = 0.0,
    console: Console,
) -> dict[str, Any]:
    """Run a federation in this process (and its workers) from start to summary.

    Args:
        settings: of the run.
        root: the run directory.
        resume: continue what is there.
        overwrite: replace what is there.
        wait: seconds that another server in the directory is waited for.
        console: where progress is shown.

    Returns:
        The content of ``summary.json``.

    Raises:
        SamError: with everything up to the last completed round on disk.
    """
    with sole_run(root, settings, resume=resume, overwrite=overwrite, wait=wait) as run:
        return _run_embedded(run, settings, console)


def _run_embedded(
    run: RunFolder, settings: Settings, console: Console
) -> dict[str, Any]:
    workers = worker_count(settings)
    for states in run.states.glob("client_*"):
        sweep(states)
    with event_log(run.root):
        prepared = prepare(run, settings, console)
    place = client_place(run, settings)
    configs = [{"client": index} for index in range(settings.federation.clients)]
    table = RoundTable(console, settings.federation.rounds)
    grid = EmbeddedGrid(
        partial(make_client_app, place),
        configs,
        to_flat(settings),
        workers=workers,
        on_reply=table.working,
    )
    with grid:
        return federate(run, settings, prepared, grid, table)


def client_place(run: RunFolder, settings: Settings) -> ClientPlace:
    """Where clients on this machine find what they need."""
    return ClientPlace(
        model=run_model(run, settings).resolve(),
        shards=run.shards.resolve(),
        states=run.states.resolve(),
        settings=settings,
    )


def federate(
    run: RunFolder,
    settings: Settings,
    prepared: Prepared,
    grid: Grid,
    table: RoundTable,
) -> dict[str, Any]:
    """Run the rounds that are left on a grid, log each, and write the summary."""
    with event_log(run.root) as events:
        return _federate(run, settings, prepared, grid, table, events)


def _federate(
    run: RunFolder,
    settings: Settings,
    prepared: Prepared,
    grid: Grid,
    table: RoundTable,
    events: EventLog,
) -> dict[str, Any]:
    begin = time.perf_counter()
    if (words := rehearsal_warning(settings)) is not None:
        log.warning(words)
    model, _ = load_expert_model(run_model(run, settings))
    state, manifest, facts, first_biases_LE = _restore(run, model, prepared)
    planner = planner_of(model, run.shards, settings)
    del model  # the server trains none
    start_scores, spent = facts["start"], facts["seconds"]
    logs = RoundLogs(
        run.root,
        settings,
        manifest,
        events,
        first_biases_LE=first_biases_LE,
        keep_rounds=state.round,
    )
    events.event("resumed" if state.round else "started", round=state.round)
    with closing(logs), table:
        if start_scores is not None:
            table.start(start_scores)
        for row, clients in read_rounds(run.root):
            table.add(row, clients)

        def checkpoint(current: ServerState) -> None:
            began = time.perf_counter()
            extra = facts | {
                "seconds": _add(spent, time.perf_counter() - begin),
                "clients": strategy.memory(),
            }
            save_checkpoint(
                run.checkpoints,
                current,
                model_fingerprint=prepared.fingerprint,
                extra=extra,
            )
            took = time.perf_counter() - began
            events.event("checkpoint_written", round=current.round, seconds=took)

        def on_start(scores: dict[str, Score]) -> None:
            facts["start"] = perplexities(scores) or None
            facts["gate_bytes"] = text_keys(strategy.gate_bytes)
            if strategy.siblings:
                write_json(run.siblings, {"clients": strategy.siblings})
            checkpoint(strategy.state)
            if settings.federation.keep_frames:
                keep_counts(run.root, strategy.count_frames)
            table.start(facts["start"] or {})

        def on_round(current: ServerState, report: RoundReport) -> None:
            row, clients = logs.write(current, report)
            if report.drift.changes and current.siblings is not None:
                write_json(run.siblings, {"clients": current.siblings.members})
            checkpoint(current)
            table.add(row, clients)

        strategy = SamStrategy(
            state,
            manifest,
            settings,
            visits=prepared.visits,
            planner=planner,
            key=noise_key(run.root, settings, resumed=state.round > 0),
            on_start=on_start if start_scores is None else None,
            on_round=on_round,
            spool=Spool(run.spool),
            on_event=events.event,
        )
        strategy.recall(facts["clients"])
        strategy.gate_bytes = number_keys(facts["gate_bytes"])
        strategy.start(grid)
    return _summarise(
        run,
        settings,
        prepared,
        facts["start"] or {},
        _add(spent, time.perf_counter() - begin),
    )


def make_server_app() -> ServerApp:
    """A Flower server app; settings and ``run-dir`` come with Flower's run config.

    A run directory that holds an earlier start of the run is continued, by one server
    at a time.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings, root = settings_from_run_config(context.run_config)
        console = Console(highlight=False, width=100)
        with sole_server(root):
            resume = RunFolder(root=root).config.exists()
            run = open_run(root, settings, resume=resume, overwrite=False)
            prepared = prepare(run, settings, console)
            table = RoundTable(console, settings.federation.rounds)
            federate(run, settings, prepared, grid, table)

    return app


def _restore(
    run: RunFolder, model: ExpertModel, prepared: Prepared
) -> tuple[ServerState, Manifest, dict[str, Any], Tensor]:
    """State, manifest, and what is known of earlier starts: ``start`` perplexities
    (None before they are scored), ``seconds`` spent, ``gate_bytes`` by client, and what
    the strategy remembers of ``clients``; and the (L, E) gate biases of the bootstrapped
    model."""
    blocks = model.read_blocks()
    manifest = Manifest.of(blocks)
    biases_LE = gate_biases(blocks, *model.graph.edge_mask_LEE.shape[:2])
    facts: dict[str, Any] = {
        "start": None,
        "seconds": {},
        "gate_bytes": {},
        "clients": {},
    }
    path = latest_checkpoint(run.checkpoints)
    if path is None:
        return initial_state(blocks, model.graph), manifest, facts, biases_LE
    state, extra = load_checkpoint(path, model_fingerprint=prepared.fingerprint)
    return state, manifest, facts | extra, biases_LE


def _add(spent: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {"federation": spent.get("federation", 0.0) + seconds}


def _summarise(
    run: RunFolder,
    settings: Settings,
    prepared: Prepared,
    start: dict[str, float | None],
    spent: Mapping[str, float],
) -> dict[str, Any]:
    rows = read_metrics(run.root)
    final = rows[-1]["perplexity"] if rows else start
    summary = build_summary(
        model=prepared.model_name,
        dense=prepared.dense_perplexity,
        start=start,
        final=final,
        flops_fraction=prepared.flops_fraction,
        rows=rows,
        refusals=refusal_totals(read_rows(run.root / CLIENTS)),
        fedit=fedit_bytes(
            model_width=prepared.model_width,
            ffn_width=prepared.ffn_width,
            num_layers=prepared.num_layers,
        ),
        settings=settings,
        seconds=prepared.seconds | dict(spent),
        heterogeneity=prepared.heterogeneity,
    )
    write_json(run.summary, summary)
    return summary
