"""Scoring a run, an expert graph or a dense model on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from samv2.common.config import load_settings
from samv2.common.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
)
from samv2.common.settings import Settings
from samv2.data.shards import load_federated_text
from samv2.data.sources import parse_domain
from samv2.data.tokens import tokenize_documents, windows
from samv2.data.user_text import own_split, read_own_split, read_user_text
from samv2.federated.heldout import Held, heldout_windows, score_domains
from samv2.federated.run_folder import (
    RunFolder,
    is_run,
    load_model_or_run,
    stored_settings,
)
from samv2.federated.run_logs import perplexities
from samv2.federated.run_text import make_corpus
from samv2.models.export import rejoined_dense
from samv2.models.llama_loader import DTYPES, load_llama
from samv2.models.save import is_expert_model, load_expert_model


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
    if run and (config or overrides):
        raise ConfigError(
            [
                f"{target} is a run and is scored with its own settings; leave out "
                "--config and --set (--text, --experts and --windows may be given)"
            ]
        )
    settings = stored_settings(folder) if run else load_settings(config, overrides)
    limit = settings.federation.eval_windows if eval_windows is None else eval_windows
    if limit < 1:
        raise ConfigError([f"--windows is {limit}; give 1 or more"])
    own = read_own_texts(texts)
    models: dict[str, Any] = {}
    if run or is_expert_model(folder):
        expert, tokenizer, name = load_model_or_run(folder)
        if run:
            expert.set_experts_per_token(settings.experts.experts_per_token)
        if experts_per_token is not None:
            expert.set_experts_per_token(experts_per_token)
        start = settings if run else with_model(settings, folder)
        label, dense = dense_model(start, console)
        models |= {label: dense, "expert graph": expert}
    elif experts_per_token is not None:
        raise ModelError(
            f"--experts is {experts_per_token}, but {target} has no experts; leave it "
            "out, or name a run or a bootstrapped folder"
        )
    else:
        loaded = _dense(
            load_settings(config, [*overrides, f"model.path={target}"]), console
        )
        models["dense model"], tokenizer, name = loaded.model, loaded.tokenizer, target
    held = _heldout(run, settings, own, tokenizer, limit, console)
    return {
        "name": name,
        "domains": list(held),
        "models": {
            label: perplexities(score_domains(model, held))
            for label, model in models.items()
        },
        "windows": limit,
        "sequence_length": settings.train.sequence_length,
    }


def dense_model(settings: Settings, console: Console) -> tuple[str, Any]:
    """The dense model behind a run, and what to call it.

    Where the run began with a bootstrapped folder, its base experts are re-joined: the
    dense model up to the rounding of sums, or, where they are NF4, what is left of it.

    Args:
        settings: of the run; section ``model`` is used.
        console: where progress is shown.
    """
    folder = Path(settings.model.path)
    if not is_expert_model(folder):
        return "dense model", _dense(settings, console).model
    model, _ = load_expert_model(folder)
    packed = model.expert_config.quantise != "none"
    label = f"dense model, {model.expert_config.quantise}" if packed else "dense model"
    return label, rejoined_dense(model, dtype=model.llama.dtype)


def with_model(settings: Settings, path: Path) -> Settings:
    """The settings of another model."""
    return replace(settings, model=replace(settings.model, path=str(path)))


def _dense(settings: Settings, console: Console) -> Any:
    return load_llama(
        settings.model.path, dtype=DTYPES[settings.model.dtype], progress=console.print
    )


def read_own_texts(texts: Sequence[str]) -> dict[str, list[str]]:
    """Documents of every ``NAME=FILE``; held-out ones of a folder with its own split.

    Raises:
        DataError: not of that form, a name given twice, or a file without text.
    """
    own: dict[str, list[str]] = {}
    for item in texts:
        name, path = parse_domain(item)
        if path is None:
            raise DataError(f"--text is {item!r}; write NAME=FILE")
        if name in own:
            raise DataError(f"--text names {name!r} twice; give each its own name")
        if files := own_split(path):
            own[name] = list(read_own_split(files, 0)["heldout"])
        else:
            own[name] = read_user_text(path)
    return own


def _heldout(
    run: RunFolder | None,
    settings: Settings,
    own: Mapping[str, Sequence[str]],
    tokenizer: Any,
    limit: int,
    console: Console,
) -> Held:
    length = settings.train.sequence_length
    held: Held = {}
    if own:
        for name, documents in own.items():
            stream = tokenize_documents(tokenizer, documents)
            if len(stream) < length:
                raise DataError(
                    f"--text {name} has {len(stream)} tokens, fewer than one window of "
                    f"{length}; give more text"
                )
            held[name] = [windows(stream, length, limit)]
        return held
    if run is not None:
        if not run.shards.is_dir():
            raise CheckpointError(
                f"{run.root} has no shards yet; let `samv2 train --resume` prepare it"
            )
        return heldout_windows(load_federated_text(run.shards).clients, length, limit)
    for name, text in make_corpus(settings, console).domains.items():
        stream = tokenize_documents(tokenizer, text.heldout)
        held[name] = [windows(stream, length, limit)]
    return held
