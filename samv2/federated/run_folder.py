"""The run directory: where everything of a run is, and who may write there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from samv2.common.config import load_settings, to_flat, to_toml
from samv2.common.errors import CheckpointError
from samv2.common.files import write_bytes
from samv2.common.settings import Settings
from samv2.federated.checkpoint import latest_checkpoint, load_checkpoint
from samv2.models.expert_model import ExpertModel
from samv2.models.save import (
    expert_fingerprint,
    is_expert_model,
    load_expert_model,
)

CHANGEABLE = ("federation.rounds", "federation.workers", "federation.round_timeout")
"""Settings that may differ when a run is resumed."""
_OWN_FOLDERS = ("model", "shards", "clients", "checkpoints", "tensorboard", "flower")
_OWN_FILES = (
    "config.toml",
    "metrics.jsonl",
    "summary.json",
    "prepared.json",
    "mask_debug.npy",
    "expert_call_trace.json",
    "cluster_stats.txt",
    "pack_sizes.txt",
    "frontier.json",
)


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

    Args:
        root: the directory.
        settings: of the run.
        resume: go on with what is there.
        overwrite: remove what is there.

    Raises:
        CheckpointError: the directory is used and neither flag is given, both are, or a
            resumed run's settings differ in what may not change.
    """
    run = RunFolder(root=Path(root))
    if resume and overwrite:
        raise CheckpointError("--resume and --overwrite exclude each other; give one")
    used = run.config.exists()
    if used and overwrite:
        _clear(run)
    elif used and resume:
        _check_same(run, settings)
    elif used:
        raise CheckpointError(
            f"{run.root} already holds a run; continue it with --resume, replace it "
            "with --overwrite, or choose another --log-dir"
        )
    run.root.mkdir(parents=True, exist_ok=True)
    write_bytes(run.config, to_toml(settings).encode())
    return run


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


def _clear(run: RunFolder) -> None:
    """Remove a run's own files, and nothing else that may lie in the directory."""
    for path in list(run.root.iterdir()):
        if path.name == ".gitkeep":
            continue
        if path.is_dir() and path.name in _OWN_FOLDERS:
            shutil.rmtree(path)
        elif path.is_file() and (
            path.name in _OWN_FILES or path.name.startswith("merge_round")
        ):
            path.unlink()


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
