"""What each part of the conversion is worth: a grid of settings to one CSV, resumable.

    python bench/ablate_conversion.py --output ablation_conversion.csv

Every row converts the given layers of a model with one setting changed from the base,
and scores held-out text of domains that were calibrated on and of others; the dense
model's perplexity is the base of both ratios. A row that is in the CSV already is not
run again. Layers 1-8 of SmolLM2 take a minute a row on two cores; ``--layers 1-`` is the
whole model.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from samv2.common.config import load_settings
from samv2.common.fetch import cache_dir
from samv2.common.settings import Settings
from samv2.data.corpus import PartSizes, build_corpus
from samv2.data.tokens import tokenize_documents, windows
from samv2.federated.run_text import calibration_windows
from samv2.models.dense_layers import DenseLayers
from samv2.models.llama_loader import model_folder, resolve_model
from samv2.models.model_files import (
    model_fingerprint,
    read_config,
    read_tokenizer,
)
from samv2.models.perplexity import Score
from samv2.models.streamed_bootstrap import StreamedBootstrap, bootstrap_to_folder

CALIBRATED = ("legal", "bible", "biomed", "chat", "python", "wiki")
OTHERS = ("factbook", "politics", "math")
LENGTH = 256

BASE = (
    "experts.num_experts=16",
    "experts.experts_per_token=4",
    "experts.other_k=8",
    "experts.num_shared=1",
    "experts.surrogate_rank=32",
    "experts.repair_rank=64",
)
GRID: dict[str, tuple[str, ...]] = {
    "base": (),
    "feature gate rows": ("experts.feature=gate",),
    "feature gate+up+down": ("experts.feature=gate_up_down",),
    "gate target log norm": ("experts.gate=ridge_log",),
    "gate avg-k (EMoE)": ("experts.gate=avg_k",),
    "no shared expert": ("experts.num_shared=0",),
    "2 shared experts": ("experts.num_shared=2",),
    "4 shared experts": ("experts.num_shared=4",),
    "stand-in rank 0": ("experts.repair_rank=0",),
    "stand-in rank 16": ("experts.repair_rank=16",),
    "stand-in rank 256": ("experts.repair_rank=256",),
    "same visits in all layers": ("experts.allocate=false",),
    "no repair, surrogates of rank 32": ("experts.repair=false",),
    "no repair, surrogates of rank 64": (
        "experts.repair=false",
        "experts.surrogate_rank=64",
    ),
    "no repair, no surrogates": ("experts.repair=false", "experts.surrogate_rank=0"),
    "EMoE: gate rows, avg-k, nothing else": (
        "experts.repair=false",
        "experts.surrogate_rank=0",
        "experts.feature=gate",
        "experts.gate=avg_k",
        "experts.num_shared=0",
    ),
    "half the calibration text": ("experts.calibration_tokens=6144",),
    "32 experts": (
        "experts.num_experts=32",
        "experts.experts_per_token=8",
        "experts.other_k=16",
        "experts.num_shared=2",
    ),
    "64 experts": (
        "experts.num_experts=64",
        "experts.experts_per_token=16",
        "experts.other_k=32",
        "experts.num_shared=4",
    ),
}
COLUMNS = (
    "row",
    "experts_per_token",
    "num_experts",
    "ffn_flops_fraction",
    "ratio_calibrated",
    "ratio_others",
    "seconds",
    "settings",
)


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", default="1-8", help="decoder layers to convert")
    parser.add_argument("--tokens", type=int, default=12_288, help="of calibration")
    parser.add_argument("--windows", type=int, default=4, help="held out, a domain")
    parser.add_argument("--output", type=Path, required=True, metavar="CSV")
    parser.add_argument("--rows", nargs="*", choices=list(GRID), help="only these")
    arguments = parser.parse_args()
    console = Console()
    done = read_rows(arguments.output)
    folder = model_folder(resolve_model(arguments.model, progress=console.print))
    calibration, heldout = text(folder, arguments.windows, console)
    for row, changes in GRID.items():
        if row in done or (arguments.rows and row not in arguments.rows):
            continue
        settings = load_settings(
            None,
            [
                *BASE,
                f"experts.layers={arguments.layers}",
                f"experts.calibration_tokens={arguments.tokens}",
                *changes,
            ],
        )
        start = time.perf_counter()
        windows_BS = calibration_windows(
            calibration, settings.experts.calibration_tokens, LENGTH
        )
        made = convert(folder, windows_BS, heldout, settings)
        for values in results(row, made, settings, folder, time.perf_counter() - start):
            append(arguments.output, values | {"settings": " ".join(changes)})
            console.print({k: v for k, v in values.items() if k != "settings"})


def text(
    folder: Path, count: int, console: Console
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Calibration streams of some domains, held-out windows of these and others."""
    corpus = build_corpus(
        CALIBRATED + OTHERS,
        cache=cache_dir(),
        seed=0,
        sizes=PartSizes(
            heldout_bytes=65_536,
            calibration_bytes=131_072,
            train_bytes=65_536,
            min_train_bytes=16_384,
        ),
        on_skip=lambda name, reason: console.print(f"left out: {name}: {reason}"),
        progress=console.print,
    )
    tokenizer = read_tokenizer(folder)
    calibration, heldout = {}, {}
    for name, domain in corpus.domains.items():
        stream = tokenize_documents(tokenizer, domain.heldout)
        heldout[name] = windows(stream, LENGTH, count)
        if name in CALIBRATED:
            calibration[name] = tokenize_documents(tokenizer, domain.calibration)
    return calibration, heldout


def convert(
    folder: Path,
    calibration_BS: Tensor,
    heldout: Mapping[str, Tensor],
    settings: Settings,
) -> StreamedBootstrap:
    """One conversion, thrown away when it is scored."""
    with tempfile.TemporaryDirectory() as scratch:
        return bootstrap_to_folder(
            DenseLayers.open(folder, dtype=torch.bfloat16),
            read_tokenizer(folder),
            calibration_BS,
            heldout,
            settings,
            Path(scratch) / "model",
            fingerprint=model_fingerprint(folder),
        )


def results(
    row: str,
    made: StreamedBootstrap,
    settings: Settings,
    folder: Path,
    seconds: float,
) -> list[dict[str, object]]:
    """One line a K below E."""
    dense = read_config(folder)
    return [
        {
            "row": row,
            "experts_per_token": k,
            "num_experts": settings.experts.num_experts,
            "ffn_flops_fraction": round(made.config.flops_fraction(dense, k), 4),
            "ratio_calibrated": round(ratio(made.dense_scores, scores, CALIBRATED), 4),
            "ratio_others": round(ratio(made.dense_scores, scores, OTHERS), 4),
            "seconds": round(seconds, 1),
        }
        for k, scores in made.scores.items()
        if k < settings.experts.num_experts
    ]


def ratio(
    dense: Mapping[str, Score], scores: Mapping[str, Score], names: tuple[str, ...]
) -> float:
    """Geometric mean over domains of perplexity over the dense model's."""
    logs = [
        math.log(scores[name].perplexity / dense[name].perplexity)
        for name in names
        if name in scores
    ]
    return math.exp(sum(logs) / max(1, len(logs)))


def read_rows(path: Path) -> set[str]:
    """Rows that a CSV holds already."""
    if not path.is_file():
        return set()
    with path.open(newline="") as file:
        return {line["row"] for line in csv.DictReader(file)}


def append(path: Path, values: Mapping[str, object]) -> None:
    """Add a line, with a header where the file is new."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(values)


if __name__ == "__main__":
    main()
