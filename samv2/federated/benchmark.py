"""Several methods on the same text, clients and windows: one folder each, one report.

    text and dense scores (once) -> each method that is not finished -> report

Every method goes on where it was stopped, and a finished one is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from samv2.common.config import to_flat
from samv2.common.errors import CheckpointError, DataError
from samv2.common.files import write_json
from samv2.common.settings import Settings
from samv2.common.telemetry import read_metrics
from samv2.common.threads import one_thread
from samv2.data.shards import (
    load_federated_text,
    load_index,
)
from samv2.data.sources import parse_domains
from samv2.federated.benchmark_plot import draw_federation
from samv2.federated.benchmark_report import build_report, method_entry
from samv2.federated.benchmark_settings import Benchmark, is_shared
from samv2.federated.heldout import heldout_windows, score_domains
from samv2.federated.lora_methods import METHODS
from samv2.federated.lora_run import run_lora
from samv2.federated.prepare import prepare
from samv2.federated.run_folder import (
    RunFolder,
    is_run,
    stored_settings,
)
from samv2.federated.run_lock import sole_run
from samv2.federated.run_logs import perplexities
from samv2.federated.run_text import make_text, say_text
from samv2.federated.server_app import run_embedded
from samv2.models.llama_loader import DTYPES, load_llama

TEXT = "text"
"""Folder of the shared text."""
REPORT, PICTURE = "federation.json", "federation.png"
MAY_CHANGE = (
    "federation.workers",
    "federation.round_timeout",
    "federation.keep_frames",
)
"""Settings that may differ from those that a method's folder was made with."""


def run_benchmark(
    benchmark: Benchmark, root: Path, *, overwrite: bool = False, console: Console
) -> dict[str, Any]:
    """Run the methods that are not finished, and write the report after each.

    Args:
        benchmark: protocol and methods.
        root: folder of the benchmark.
        overwrite: replace text and methods that were made with other settings, and run
            finished methods again.
        console: where progress is shown.

    Returns:
        The content of ``federation.json``.

    Raises:
        CheckpointError: a folder was made with other settings; nothing is run.
        SamError: with all methods that are finished on disk.
    """
    root = Path(root)
    if not overwrite:
        _check_settings(benchmark, root)
    shared = _share_text(benchmark.base, root / TEXT, overwrite, console)
    report: dict[str, Any] = {}
    for name, settings in benchmark.methods.items():
        folder = root / name
        if overwrite or not is_finished(folder):
            console.rule(f"[bold]{name}[/bold]", align="left")
            _run_method(name, settings, folder, root / TEXT, shared, overwrite, console)
        else:
            console.print(f"{name} is finished; its result is taken from {folder}")
        report = write_report(benchmark, root, shared)
    return report


def is_finished(folder: Path) -> bool:
    """Whether a method has run all its rounds."""
    run = RunFolder(root=folder)
    if not run.summary.is_file() or not is_run(folder):
        return False
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    return summary["rounds"] == stored_settings(folder).federation.rounds


def write_report(
    benchmark: Benchmark, root: Path, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """``federation.json`` and ``federation.png`` of the methods that are finished."""
    entries = [
        method_entry(
            name,
            settings,
            benchmark,
            read_metrics(root / name),
            json.loads((root / name / "summary.json").read_text(encoding="utf-8")),
        )
        for name, settings in benchmark.methods.items()
        if is_finished(root / name)
    ]
    report = build_report(benchmark, shared, entries)
    write_json(root / REPORT, report)
    draw_federation(root / PICTURE, report)
    return report


def _check_settings(benchmark: Benchmark, root: Path) -> None:
    """Refuse folders that were made with other settings, all at once."""
    faults = []
    wanted = {TEXT: benchmark.base, **benchmark.methods}
    for name, settings in wanted.items():
        if not is_run(root / name):
            continue
        before, now = to_flat(stored_settings(root / name)), to_flat(settings)
        changed = [
            f"{key}: {before.get(key)!r} -> {now[key]!r}"
            for key in now
            if before.get(key) != now[key]
            and key not in MAY_CHANGE
            and (name != TEXT or is_shared(key))
        ]
        if changed:
            faults.append(f"{root / name} ({'; '.join(changed)})")
    if faults:
        raise CheckpointError(
            f"made with other settings: {', '.join(faults)}; use the same, choose "
            "another --log-dir, or replace them with --overwrite"
        )


def _share_text(
    settings: Settings, root: Path, overwrite: bool, console: Console
) -> dict[str, Any]:
    """The clients' shards and the dense model's scores, made once."""
    run = RunFolder(root=root)
    if run.prepared.is_file() and not overwrite:
        return json.loads(run.prepared.read_text(encoding="utf-8"))
    with sole_run(root, settings, resume=False, overwrite=overwrite) as run:
        return _make_shared(run, settings, console)


def _make_shared(
    run: RunFolder, settings: Settings, console: Console
) -> dict[str, Any]:
    begin = time.perf_counter()
    loaded = load_llama(
        settings.model.path,
        dtype=DTYPES[settings.model.dtype],
        progress=console.print,
    )
    text = make_text(run, loaded.tokenizer, settings, console)
    say_text(text, console)
    missing = set(parse_domains(settings.data.domains)) - set(text.index.domains)
    if missing:
        raise DataError(
            f"the domains {', '.join(sorted(missing))} could not be loaded, so the "
            "benchmark would be another one; see the messages above"
        )
    console.print("Scoring the dense model on held-out text ...")
    held = heldout_windows(
        text.clients,
        settings.train.sequence_length,
        settings.federation.eval_windows,
    )
    with one_thread():  # as the clients score, whose untrained adapters add nothing
        dense = score_domains(loaded.model, held, batch_size=settings.train.batch_size)
    shared = {
        "model": loaded.name,
        "model_fingerprint": loaded.fingerprint,
        "corpus_sha256": text.index.corpus_sha256,
        "dense": perplexities(dict(sorted(dense.items()))),
        "seconds": time.perf_counter() - begin,
    }
    write_json(run.prepared, shared)
    return shared


def _run_method(
    name: str,
    settings: Settings,
    folder: Path,
    text: Path,
    shared: Mapping[str, Any],
    overwrite: bool,
    console: Console,
) -> None:
    resume = is_run(folder) and not overwrite
    shards = RunFolder(root=text).shards
    if name in METHODS:
        run_lora(
            settings,
            folder,
            method=name,
            text=shards,
            start=shared["dense"],
            resume=resume,
            overwrite=overwrite,
            console=console,
        )
        return
    with sole_run(folder, settings, resume=resume, overwrite=overwrite) as run:
        prepare(run, settings, console)
        check_same_text(run.shards, shards)
    run_embedded(settings, folder, resume=True, console=console)


def check_same_text(shards: Path, shared: Path) -> None:
    """Refuse a run whose clients hold other tokens than the benchmark's.

    Raises:
        DataError: they differ.
    """
    ours, theirs = load_index(shards), load_index(shared)
    if ours == theirs:
        pairs = zip(
            load_federated_text(shards).clients, load_federated_text(shared).clients
        )
        if all(_same_tokens(*pair) for pair in pairs):
            return
    raise DataError(
        f"the text in {shards} is not the benchmark's in {shared}; a source has changed "
        "since: start again with --overwrite"
    )


def _same_tokens(ours: Any, theirs: Any) -> bool:
    return (
        ours.train.equal(theirs.train)
        and ours.heldout.keys() == theirs.heldout.keys()
        and all(ours.heldout[name].equal(theirs.heldout[name]) for name in ours.heldout)
    )
