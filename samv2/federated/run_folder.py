"""The run directory: where everything of a run is, and who may write there."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from samv2.common.config import load_settings, to_flat, to_toml
from samv2.common.errors import CheckpointError, ConfigError
from samv2.common.files import sweep, write_bytes
from samv2.common.settings import Settings
from samv2.federated.checkpoint import drop_old, latest_checkpoint, load_checkpoint
from samv2.models.expert_model import ExpertModel
from samv2.models.save import (
    expert_fingerprint,
    is_expert_model,
    load_expert_model,
)

CHANGEABLE = (
    "federation.rounds",
    "federation.workers",
    "federation.round_timeout",
    "federation.retries",
    "federation.keep_frames",
    "train.device",
)
"""Settings that may differ when a run is resumed."""
_OWN_FOLDERS = (
    "adapter",
    "model",
    "shards",
    "clients",
    "checkpoints",
    "frames",
    "spool",
    "tensorboard",
    "flower",
)
_OWN_FILES = (
    "config.toml",
    "metrics.jsonl",
    "clients.jsonl",
    "log.jsonl",
    "summary.json",
    "prepared.json",
    "mask_debug.npy",
    "expert_call_trace.json",
    "cluster_stats.txt",
    "pack_sizes.txt",
    "usage.jsonl",
    "siblings.json",
    "frontier.json",
    "privacy.key",
)
_MERGE = re.compile(r"merge_round\d+\.json")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Paths inside a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        """Settings as resolved."""
        return self.root / "config.toml"

    @property
    def model(self) -> Path:
        """The bootstrapped model, before any training."""
        return self.root / "model"

    @property
    def shards(self) -> Path:
        """The clients' text, tokenised."""
        return self.root / "shards"

    @property
    def states(self) -> Path:
        """What clients keep between rounds."""
        return self.root / "clients"

    @property
    def checkpoints(self) -> Path:
        """Server states."""
        return self.root / "checkpoints"

    @property
    def spool(self) -> Path:
        """Frames of the round that goes on; empty between rounds."""
        return self.root / "spool"

    @property
    def siblings(self) -> Path:
        """Which sibling of the adapters serves which client's text."""
        return self.root / "siblings.json"

    @property
    def summary(self) -> Path:
        """The run's result, for machines."""
        return self.root / "summary.json"

    @property
    def prepared(self) -> Path:
        """What the preparation measured; written last, so it marks it as complete."""
        return self.root / "prepared.json"


def open_run(
    root: Path, settings: Settings, *, resume: bool, overwrite: bool
) -> RunFolder:
    """Take a run directory, and write its ``config.toml``.

    A run that was not prepared to the end holds nothing to lose: its directory is taken
    as if it were new.

    Args:
        root: the directory.
        settings: of the run.
        resume: go on with what is there.
        overwrite: remove what is there.

    Raises:
        CheckpointError: the directory is used and neither flag is given, both are,
            there is nothing to resume, or a resumed run's settings differ in what may
            not change.
    """
    run = RunFolder(root=Path(root))
    check_flags(root, resume=resume, overwrite=overwrite)
    if run.config.exists():
        _refuse_foreign(run)
    used = run.config.exists() and _has_results(run)
    if used and resume:
        _check_same(run, settings)
        _sweep(run)
    elif used and not overwrite:
        raise CheckpointError(
            f"{run.root} already holds a run; continue it with --resume, replace it "
            "with --overwrite, or choose another --log-dir"
        )
    elif used:
        _clear(run)
    run.root.mkdir(parents=True, exist_ok=True)
    write_bytes(run.config, to_toml(settings).encode())
    return run


def check_flags(root: Path, *, resume: bool, overwrite: bool) -> None:
    """What can be told of flags before a directory is taken.

    Raises:
        CheckpointError: both are given, or there is nothing to resume.
    """
    if resume and overwrite:
        raise CheckpointError("--resume and --overwrite exclude each other; give one")
    if resume and not RunFolder(root=Path(root)).config.exists():
        raise CheckpointError(
            f"{root} holds no run to resume (no config.toml); check --log-dir, or "
            "leave out --resume to start one"
        )


def refuse_baseline(run: RunFolder) -> None:
    """Refuse the directory of a LoRA baseline, which has no expert graph.

    Raises:
        CheckpointError: it is one.
    """
    try:
        method = json.loads(run.prepared.read_text(encoding="utf-8"))["method"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise CheckpointError(
        f"{run.root} holds a run of the baseline {method!r}, which has no expert graph; "
        "its scores are in summary.json, its adapter in adapter/"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return RunFolder(root=Path(folder)).config.is_file()


def stored_settings(folder: Path) -> Settings:
    """The settings that a run was started with.

    Raises:
        CheckpointError: the folder is no run directory.
    """
    run = RunFolder(root=Path(folder))
    if not run.config.is_file():
        raise CheckpointError(
            f"{folder} holds no run (no config.toml); start one with "
            f"`samv2 train --log-dir {folder}`"
        )
    return load_settings(run.config)


def load_model_or_run(
    folder: Path,
) -> tuple[ExpertModel, PreTrainedTokenizerBase, str]:
    """A bootstrapped model, or a run's model with its newest checkpoint applied.

    Returns:
        The model, its tokenizer, and a description for a person.

    Raises:
        CheckpointError: neither a model nor a run, or a run without a model yet.
    """
    folder = Path(folder)
    if is_expert_model(folder):
        model, tokenizer = load_expert_model(folder)
        return model, tokenizer, f"expert graph {folder}"
    if not is_run(folder):
        raise CheckpointError(
            f"{folder} is neither a run directory nor a bootstrapped model; make one "
            "with `samv2 train` or `samv2 bootstrap`"
        )
    run = RunFolder(root=folder)
    refuse_baseline(run)
    source = run_model(run, stored_settings(folder))
    model, tokenizer = load_expert_model(source)
    path = latest_checkpoint(run.checkpoints)
    if path is None:
        return model, tokenizer, f"run {folder} before its first round"
    state, _ = load_checkpoint(path, model_fingerprint=expert_fingerprint(model))
    base = model.read_blocks()
    model.write_blocks({key: base[key] + state.blocks[key] for key in base})
    model.set_graph(state.graph)
    return model, tokenizer, f"run {folder} after round {state.round}"


def run_model(run: RunFolder, settings: Settings) -> Path:
    """The bootstrapped model of a run: its own, or the folder it was started from."""
    given = Path(settings.model.path)
    return given if is_expert_model(given) else run.model


def check_output(folder: Path, *, overwrite: bool, expert: bool) -> None:
    """Refuse to write a model where something else would be lost.

    Args:
        folder: where the model shall be written.
        overwrite: whether a model there may be replaced.
        expert: whether an expert graph may be (else a plain model).

    Raises:
        CheckpointError: the folder exists and may not be replaced, or holds other
            things than such a model.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder} exists; choose another --output, or give --overwrite"
        )
    kind = "an expert graph" if expert else "a plain model"
    empty = folder.is_dir() and not any(folder.iterdir())
    if not empty and not (is_expert_model(folder) if expert else _is_plain(folder)):
        raise CheckpointError(
            f"{folder} holds other things than {kind}, so --overwrite does not replace "
            "it; choose another --output"
        )


def _is_plain(folder: Path) -> bool:
    if is_expert_model(folder):
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _has_results(run: RunFolder) -> bool:
    return run.prepared.exists() or latest_checkpoint(run.checkpoints) is not None


def _sweep(run: RunFolder) -> None:
    """Remove what a killed server left half written; clients' folders are theirs."""
    known = {*_OWN_FILES, *_OWN_FOLDERS}
    sweep(run.root, lambda name: name in known or bool(_MERGE.fullmatch(name)))
    for folder in (run.checkpoints, run.root / "frames"):
        sweep(folder)
    drop_old(run.checkpoints)


def _refuse_foreign(run: RunFolder) -> None:
    """A ``config.toml`` of something else stays as it is."""
    try:
        load_settings(run.config)
    except ConfigError as error:
        raise CheckpointError(
            f"{run.config} is not the config of a run of this version; choose another "
            f"--log-dir ({error})"
        ) from None


def _clear(run: RunFolder) -> None:
    """Remove a run's own files, and nothing else that may lie in the directory."""
    run.prepared.unlink(missing_ok=True)
    for path in list(run.root.iterdir()):
        if path.name in _OWN_FOLDERS and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif (
            path.name in (*_OWN_FOLDERS, *_OWN_FILES) or _MERGE.fullmatch(path.name)
        ) and not path.is_dir():
            path.unlink()
        elif path.name in _OWN_FOLDERS:
            path.unlink()  # a link to a folder elsewhere


def _check_same(run: RunFolder, settings: Settings) -> None:
    before, now = to_flat(stored_settings(run.root)), to_flat(settings)
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in now
        if before.get(key) != now[key] and key not in CHANGEABLE
    ]
    if changed:
        raise CheckpointError(
            f"{run.root} was started with other settings ({'; '.join(changed)}); resume "
            "with the same, or start a new --log-dir. May change: "
            f"{', '.join(CHANGEABLE)}"
        )
