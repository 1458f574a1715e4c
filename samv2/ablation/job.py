"""A worker of a grid: one process, one torch thread, one job after another.

Jobs are JSON lines on standard input, results JSON lines on what was standard output:
``{}`` where a job is done, ``{"error": text}`` where it failed. A worker whose input
ends stops at once, so that none outlives its grid, however that ended.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from samv2.ablation.bounds import check_bounds
from samv2.ablation.multiply_adds import counted_fraction, trained_visits
from samv2.ablation.run_files import RunFiles
from samv2.common.config import settings_from_flat
from samv2.common.errors import CheckpointError
from samv2.common.files import write_json
from samv2.common.settings import Settings
from samv2.data.shards import load_federated_text
from samv2.federated.evaluation import dense_model
from samv2.federated.heldout import heldout_windows, score_domains
from samv2.federated.prepare import prepare
from samv2.federated.run_folder import is_run
from samv2.federated.run_lock import WAIT_SECONDS, sole_run
from samv2.federated.run_logs import perplexities
from samv2.federated.server_app import run_embedded
from samv2.models.save import (
    is_expert_model,
    load_expert_model,
    save_expert_model,
)
from samv2.models.trainables import with_trainables

RESULT = "ablation.json"
"""In the folder of a finished run: its figures and checks."""
LOG = "job.log"


def convert(job: Mapping[str, Any], console: Console) -> None:
    """Prepare a conversion, and a folder of it for each set of trainables.

    Args:
        job: ``root`` and ``settings`` of the run directory that is prepared (without
            settings, ``model`` is a bootstrapped folder), ``variants`` as {folder:
            arguments of :func:`with_trainables`}, ``dense`` for its perplexities.
        console: where progress goes.
    """
    model = Path(job["model"])
    if job["settings"] is not None:
        root, settings = Path(job["root"]), settings_from_flat(job["settings"])
        started = is_run(root)
        with sole_run(
            root, settings, resume=started, overwrite=False, wait=WAIT_SECONDS
        ) as run:
            prepared = prepare(run, settings, console)
        dense = Path(job["dense"])
        if not dense.is_file():
            write_json(dense, prepared.dense_perplexity)
    for folder, trainables in job["variants"].items():
        if not is_expert_model(Path(folder)):
            made, tokenizer = load_expert_model(model)
            save_expert_model(
                with_trainables(made, **trainables), tokenizer, Path(folder)
            )


def run(job: Mapping[str, Any], console: Console) -> None:
    """Run, or go on with, a federation; then write its figures and checks.

    Args:
        job: ``root`` and ``settings`` of the run, ``dense`` for the dense model's
            perplexities and ``source`` for the flat settings that the grid planned.
        console: where progress goes.
    """
    root, settings = Path(job["root"]), settings_from_flat(job["settings"])
    if not (root / "summary.json").is_file():
        run_embedded(
            settings, root, resume=is_run(root), wait=WAIT_SECONDS, console=console
        )
    path = Path(job["dense"])
    if not path.is_file():
        write_json(path, _dense_perplexity(settings, root, job["source"], console))
    dense = json.loads(path.read_text(encoding="utf-8"))
    write_json(root / RESULT, figures(root, dense))


def figures(root: Path, dense: Mapping[str, float | None]) -> dict[str, Any]:
    """What a finished run is compared by: results and the state of every bound.

    Args:
        root: its directory.
        dense: perplexity of the dense model by domain.
    """
    files = RunFiles(root=root)
    summary, rows = files.summary, [row for _, row in sorted(files.metrics.items())]
    if not rows:
        raise CheckpointError(f"{root} has no round in metrics.jsonl")
    domains = summary["domains"]
    last = max(files.merges)
    return {
        "perplexity": _mean([value["final"] for value in domains.values()]),
        "perplexity_start": _mean([value["start"] for value in domains.values()]),
        "perplexity_dense": _mean([dense.get(name) for name in domains]),
        **{f"perplexity.{name}": value["final"] for name, value in domains.items()},
        "train_loss": rows[-1]["train_loss"],
        "bytes_up_per_client_round": summary["bytes_up_per_client_round"],
        "bytes_up_total": sum(row["bytes_up"] for row in rows),
        "flops_fraction": summary["ffn_flops_fraction"],
        "flops_fraction_trained": counted_fraction(files, trained_visits(files)[last]),
        "edits": summary["edits"],
        "refused": summary["refused"],
        "rounds": summary["rounds"],
        "seconds": round(sum(summary["seconds"].values()), 2),
        **check_bounds(root),
    }


def _dense_perplexity(
    settings: Settings, root: Path, source: Mapping[str, Any], console: Console
) -> dict[str, float | None]:
    """Of the model that the grid started from, on this run's held-out text."""
    train = settings.train
    _, dense = dense_model(settings_from_flat(source), console)
    held = heldout_windows(
        load_federated_text(root / "shards").clients,
        train.sequence_length,
        settings.federation.eval_windows,
    )
    return perplexities(score_domains(dense, held, batch_size=train.batch_size))


def _mean(values: list[float | None]) -> float | None:
    """Geometric mean; None where one is not known."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return math.exp(sum(math.log(value) for value in known) / len(known))


KINDS: dict[str, Callable[[Mapping[str, Any], Console], None]] = {
    "convert": convert,
    "run": run,
}


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do one job; what went wrong is in its log and in the answer."""
    root = Path(job["root"])
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / LOG).open("a", encoding="utf-8") as file:
            try:
                KINDS[job["kind"]](job, Console(file=file, width=100))
            except Exception:
                traceback.print_exc(file=file)
                raise
    except Exception as error:  # the grid goes on, whatever a run dies of
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def main() -> None:
    """Serve jobs until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the grid decides when to stop
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    jobs: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        reply = answer(json.loads(jobs.get()))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
