"""Scoring a run, an expert graph or a dense model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from samv2.common.config import load_settings
from samv2.common.errors import CheckpointError, DataError, ModelError
from samv2.common.settings import Settings
from samv2.data.shards import load_federated_text
from samv2.data.sources import parse_domain
from samv2.data.tokens import tokenize_documents, windows
from samv2.data.user_text import read_user_text
from samv2.experts.moe_layers import WalkOptions
from samv2.federated.prepare import DTYPES, make_corpus
from samv2.federated.run_folder import (
    RunFolder,
    is_run,
    load_model_or_run,
    stored_settings,
)
from samv2.models.expert_model import ExpertModel
from samv2.models.llama_loader import load_llama
from samv2.models.perplexity import Score, score_windows
from samv2.models.save import is_expert_model

Held = dict[str, list[Tensor]]
"""{domain: (N, S) windows, one tensor a client}."""


def evaluate(
    target: str,
    *,
    texts: Sequence[str] = (),
    experts_per_token: int | None = None,
    eval_windows: int | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    console: Console,
) -> dict[str, Any]:
    """Perplexity per domain of everything that ``target`` names.

    Args:
        target: run directory, bootstrapped folder, or a dense model.
        texts: ``NAME=FILE`` of own text to score instead of the run's or the settings'.
        experts_per_token: K; None keeps the model's.
        eval_windows: windows a client and domain; None takes the settings'.
        config: TOML file of settings (domains, window length) for targets but runs.
        overrides: ``key=value`` settings.
        console: where progress is shown.

    Returns:
        {"name", "domains", "models": {name: {domain: perplexity or None}}, "windows",
        "sequence_length"}.

    Raises:
        SamError: the target, its files or the text cannot be used.
    """
    folder = Path(target)
    run = RunFolder(root=folder) if is_run(folder) else None
    settings = stored_settings(folder) if run else load_settings(config, overrides)
    models: dict[str, Any] = {}
    if run or is_expert_model(folder):
        expert, tokenizer, name = load_model_or_run(folder)
        if run:
            expert.set_experts_per_token(settings.experts.experts_per_token)
        if run and not is_expert_model(Path(settings.model.path)):
            models["dense model"] = _dense(settings, console).model
        models["expert graph"] = expert
    else:
        loaded = _dense(
            load_settings(config, [*overrides, f"model.path={target}"]), console
        )
        models["dense model"], tokenizer, name = loaded.model, loaded.tokenizer, target
    if experts_per_token is not None and "expert graph" not in models:
        raise ModelError(
            f"--experts is {experts_per_token}, but {target} has no experts"
        )
    limit = eval_windows or settings.federation.eval_windows
    held = _heldout(run, settings, texts, tokenizer, limit, console)
    options = WalkOptions(experts_per_token=experts_per_token)
    return {
        "name": name,
        "domains": list(held),
        "models": {
            label: _score(model, held, options) for label, model in models.items()
        },
        "windows": limit,
        "sequence_length": settings.train.sequence_length,
    }


def _dense(settings: Settings, console: Console) -> Any:
    return load_llama(
        settings.model.path, dtype=DTYPES[settings.model.dtype], progress=console.print
    )


def _score(model: Any, held: Held, options: WalkOptions) -> dict[str, float | None]:
    chosen = options if isinstance(model, ExpertModel) else None
    found = {}
    for name, parts in held.items():
        score = Score(nll=0.0, tokens=0)
        for windows_NS in parts:
            score = score + score_windows(model, windows_NS, walk_options=chosen)
        value = score.perplexity
        found[name] = value if math.isfinite(value) else None
    return found


def _heldout(
    run: RunFolder | None,
    settings: Settings,
    texts: Sequence[str],
    tokenizer: Any,
    limit: int,
    console: Console,
) -> Held:
    length = settings.train.sequence_length
    held: Held = {}
    if texts:
        for item in texts:
            name, path = parse_domain(item)
            if path is None:
                raise DataError(f"--text is {item!r}; write NAME=FILE")
            stream = tokenize_documents(tokenizer, read_user_text(path))
            held[name] = [windows(stream, length, limit)]
        return held
    if run is not None:
        if not run.shards.is_dir():
            raise CheckpointError(
                f"{run.root} has no shards yet; let `samv2 train --resume` prepare it"
            )
        for client in load_federated_text(run.shards).clients:
            for name, stream in client.heldout.items():
                if len(stream) >= length:
                    held.setdefault(name, []).append(windows(stream, length, limit))
        return held
    for name, text in make_corpus(settings, console).domains.items():
        stream = tokenize_documents(tokenizer, text.heldout)
        held[name] = [windows(stream, length, limit)]
    return held
