"""Before the first round: text to shards, dense model to expert graph, both checked.

Everything that can be wrong with the settings is found before the long work starts.
What was measured is kept in ``prepared.json``, which is written last: a run that was
interrupted before it starts its preparation again, one that has it does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PretrainedConfig

from samv2.common.config import to_flat
from samv2.common.errors import CheckpointError, ConfigError
from samv2.common.files import write_bytes, write_json
from samv2.common.settings import Settings
from samv2.common.telemetry import progress_bar
from samv2.data.drift import parse_drifts
from samv2.data.shards import FederatedText
from samv2.data.sources import parse_domains
from samv2.experts.emoe_cluster import ClusterStats, format_stats
from samv2.experts.sibling_gate import BUCKETS
from samv2.federated.heldout import heldout_windows, score_domains
from samv2.federated.run_folder import RunFolder, refuse_baseline, run_model
from samv2.federated.run_logs import (
    perplexities,
    write_call_trace,
    write_mask_debug,
)
from samv2.federated.run_text import (
    calibration_windows,
    make_text,
    say_text,
    traced_sequences,
)
from samv2.federated.siblings import COUNTS_CODEC
from samv2.models.bootstrap import (
    Bootstrapped,
    bootstrap,
    check_convertible,
    parse_layers,
)
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.gradient_factors import GRADIENT, fit_factors
from samv2.models.llama_loader import (
    DTYPES,
    LoadedModel,
    load_llama,
    peek_config,
)
from samv2.models.perplexity import Score
from samv2.models.quantised_blocks import NF4, quantise_model
from samv2.models.save import (
    conversion_settings,
    expert_fingerprint,
    is_expert_model,
    load_expert_model,
    read_expert_config,
    save_expert_model,
)
from samv2.updates.sparsify import FRAME_BYTES, packed_bound

FREE_OF_THE_FOLDER = (
    "experts.experts_per_token",
    "experts.repair",
    "experts.repair_rank",
    "experts.other_k",
    "experts.allocate",
)
"""Conversion settings that a run on a bootstrapped folder need not repeat: K is free, and
the repairs are in the weights whatever the settings say."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the preparation found."""

    model_name: str
    fingerprint: str
    """Of the bootstrapped model."""
    dense_perplexity: dict[str, float | None]
    """By domain; empty where a bootstrapped folder was given."""
    flops_fraction: float
    model_width: int
    ffn_width: int
    num_layers: int
    """Converted layers."""
    visits: list[int]
    """Of a token in each of them."""
    heterogeneity: dict[str, float]
    seconds: dict[str, float]


def prepare(run: RunFolder, settings: Settings, console: Console) -> Prepared:
    """Prepare a run, or read what an earlier start of it prepared.

    Raises:
        ConfigError, DataError, ModelError, FetchError: what is wrong, before long work.
    """
    if run.prepared.is_file():
        refuse_baseline(run)
        return _read(run)
    parse_domains(settings.data.domains)
    parse_drifts(settings.data.drift, settings.federation.clients)
    given = Path(settings.model.path)
    if is_expert_model(given):
        prepared = _from_expert_model(run, given, settings, console)
    else:
        prepared = _from_dense(run, settings, console)
    write_json(run.prepared, prepared.__dict__)
    return prepared


def check_budget(config: PretrainedConfig, settings: Settings) -> None:
    """Refuse an upload budget that not even one expert fits into.

    Args:
        config: of the dense model; gives the size of an expert's block.
        settings: rank, number of experts, codec and budget.

    Raises:
        ConfigError: every update would be empty.
    """
    experts, federation = settings.experts.num_experts, settings.federation
    rows = config.intermediate_size // experts
    block = 3 * rows * settings.adapter.rank + config.hidden_size + 2 + experts
    needed = FRAME_BYTES + packed_bound(block, federation.codec)
    if settings.adapter.siblings > 1:  # round 1 has token counts too
        buckets = min(BUCKETS, config.vocab_size)
        needed += FRAME_BYTES + packed_bound(buckets, COUNTS_CODEC)
    if federation.update_budget_bytes < needed:
        raise ConfigError(
            [
                f"federation.update_budget_bytes is {federation.update_budget_bytes}, "
                f"but one expert's update takes {needed} with codec "
                f"{federation.codec!r}; raise it, or lower adapter.rank"
            ]
        )


def _from_dense(run: RunFolder, settings: Settings, console: Console) -> Prepared:
    clock = _Clock()
    config = peek_config(settings.model.path, progress=console.print)
    check_convertible(config, settings)
    check_budget(config, settings)
    loaded = load_llama(settings.model.path, dtype=DTYPES[settings.model.dtype])
    clock.lap("load")
    text = make_text(run, loaded.tokenizer, settings, console)
    say_text(text, console)
    calibration = calibration_windows(
        text.calibration,
        settings.experts.calibration_tokens,
        settings.train.sequence_length,
    )
    clock.lap("data")
    console.print("Scoring the dense model on held-out text ...")
    train = settings.train
    held = heldout_windows(
        text.clients, train.sequence_length, settings.federation.eval_windows
    )
    dense = score_domains(loaded.model, held, batch_size=train.batch_size)
    clock.lap("dense_evaluation")
    made = convert_and_save(loaded, calibration, settings, run.model, console)
    write_stats(run.root, made.cluster_stats, settings)
    clock.lap("bootstrap")
    return _prepared(run, loaded.name, text, settings, dense, clock)


def convert_and_save(
    loaded: LoadedModel,
    calibration_NS: Tensor,
    settings: Settings,
    folder: Path,
    console: Console,
) -> Bootstrapped:
    """Convert a dense model in place and write the expert graph to ``folder``."""
    with progress_bar(console, "Turning FFNs into experts (layers)", 1) as advance:
        made = bootstrap(
            loaded.model,
            calibration_NS,
            settings,
            fingerprint=loaded.fingerprint,
            progress=advance,
        )
    if settings.adapter.factors == GRADIENT:
        with progress_bar(console, "Aiming adapters (batches)", 1) as advance:
            fit_factors(made.model, calibration_NS, progress=advance)
    if settings.experts.quantise == NF4:
        quantise_model(made.model)
    save_expert_model(made.model, loaded.tokenizer, folder)
    return made


def write_stats(
    root: Path, cluster_stats: Sequence[ClusterStats], settings: Settings
) -> None:
    """``cluster_stats.txt``."""
    stats = format_stats(cluster_stats, feature=settings.experts.feature)
    write_bytes(Path(root) / "cluster_stats.txt", stats.encode())


def _from_expert_model(
    run: RunFolder, folder: Path, settings: Settings, console: Console
) -> Prepared:
    """Use a bootstrapped folder as it is; its conversion settings must be the run's."""
    clock = _Clock()
    check_conversion(folder, settings)
    model, tokenizer = load_expert_model(folder)
    if warning := unrepaired(folder, model.expert_config, settings):
        console.print(warning, style="yellow", markup=False)
    check_budget(model.config, settings)
    clock.lap("load")
    text = make_text(run, tokenizer, settings, console)
    say_text(text, console)
    clock.lap("data")
    return _prepared(run, folder.name, text, settings, {}, clock)


def check_conversion(
    folder: Path, settings: Settings, *, free: Collection[str] = ()
) -> None:
    """Refuse settings that contradict a bootstrapped folder; K and the repairs' may.

    Args:
        folder: a bootstrapped model.
        settings: of a run on it.
        free: more conversion settings that may differ.

    Raises:
        ConfigError: every setting that differs, and what the folder has.
    """
    asked, made = to_flat(settings), conversion_settings(folder)
    for key in (*FREE_OF_THE_FOLDER, *free):
        made.pop(key, None)
    config, dense = read_expert_config(folder)
    total = dense.num_hidden_layers
    if parse_layers(settings.experts.layers, total) == config.layers:
        made.pop("experts.layers")
    faults = [
        f"{key} is {asked[key]!r}, but {folder} was bootstrapped with {value!r}; use "
        f"{value!r}, leave it out, or bootstrap again"
        for key, value in made.items()
        if asked[key] != value
    ]
    if faults:
        raise ConfigError(faults)


def unrepaired(
    folder: Path, config: ExpertModelConfig, settings: Settings
) -> str | None:
    """A warning where a bootstrapped folder has no repair for the K that is asked for.

    Args:
        folder: for the message.
        config: of the model in the folder.
        settings: of the run.
    """
    k = settings.experts.experts_per_token
    if config.combine != "unit" or k in (*config.repaired, config.num_experts):
        return None
    known = ", ".join(map(str, (*config.repaired, config.num_experts)))
    return (
        f"experts.experts_per_token is {k}, but {folder} has no repair for it, so the run "
        f"starts from a worse model than it need. It is sound at K = {known}; use one of "
        f"those, or bootstrap again with experts.other_k={k}."
    )


def _prepared(
    run: RunFolder,
    name: str,
    text: FederatedText,
    settings: Settings,
    dense: Mapping[str, Score],
    clock: _Clock,
) -> Prepared:
    model, _ = load_expert_model(run_model(run, settings))
    model.set_experts_per_token(settings.experts.experts_per_token)
    sequences = traced_sequences(text, settings)
    first = torch.stack(list(sequences.values()))
    write_mask_debug(run.root, model, first)
    write_call_trace(run.root, model, sequences)
    clock.lap("trace")
    return Prepared(
        model_name=name,
        fingerprint=expert_fingerprint(model),
        dense_perplexity=perplexities(dict(sorted(dense.items()))),
        flops_fraction=model.flops_fraction(settings.experts.experts_per_token),
        model_width=model.config.hidden_size,
        ffn_width=model.config.intermediate_size,
        num_layers=len(model.expert_config.layers),
        visits=[
            layer.visits_at(settings.experts.experts_per_token)
            for layer in model.expert_layers
        ],
        heterogeneity={
            "domains": text.index.category_heterogeneity,
            "tokens": text.index.token_heterogeneity,
        },
        seconds=clock.laps,
    )


def _read(run: RunFolder) -> Prepared:
    try:
        return Prepared(**json.loads(run.prepared.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{run.prepared} is damaged ({error}); remove it to prepare the run again"
        ) from None


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
