"""Runs whose client changes its text: its sibling, kills, and answers that are lost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from samv2.common.settings import Settings
from samv2.common.telemetry import read_metrics
from samv2.federated import drift_watch
from samv2.federated.checkpoint import latest_checkpoint, load_checkpoint
from samv2.federated.run_folder import RunFolder
from samv2.federated.scores import domain_names
from samv2.federated.server_app import run_embedded
from tests.federated.runs import (
    Interrupted,
    assert_same_bits,
    checkpoint_tensors,
    interrupt,
    quiet,
    small_settings,
)

DRIFTING = (
    "adapter.siblings=3",
    "assembler.width=0",
    "train.train_gate=false",
    "train.learning_rate=0.02",
    "edits.rho_max=0",
    "federation.rounds=5",
    "drift.detect=true",
    "drift.threshold=0.2",
)


def drifting(model: Path, folder: Path, *overrides: str) -> Settings:
    """Settings of a run whose client 0 turns to another text in round 3."""
    strange = folder / "strange.txt"
    letters = random.Random(0).choices("QXZJKVW 0123456789\n", k=200_000)
    strange.write_text("".join(letters))
    drift = f"data.drift=3:0=strange={strange}"
    return small_settings(model, *DRIFTING, drift, *overrides)


def spawned(root: Path) -> list[tuple[int, dict[str, Any]]]:
    """(round, change) of every spawn in a run."""
    return [
        (int(path.stem.removeprefix("merge_round")), change)
        for path in sorted(root.glob("merge_round*.json"))
        for change in json.loads(path.read_text())["siblings"]
        if change["kind"] == "spawn"
    ]


def test_a_client_that_changes_its_text_gets_a_sibling_and_a_resumed_run_its_bits(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    settings = drifting(tiny_llama_folder, tmp_path)
    assert domain_names(settings) == {"python", "pydoc", "strange"}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_embedded(settings, whole, console=quiet())
    rows = read_metrics(whole)
    assert "strange" not in rows[0]["perplexity"]
    assert "strange" in rows[1]["perplexity"]
    spawns = spawned(whole)
    assert len(spawns) == 1
    number, change = spawns[0]
    assert 2 <= number <= 4 and change["clients"] == [0] and change["sibling"] == 2
    members = json.loads((whole / "siblings.json").read_text())["clients"]
    assert members == {"0": 2, "1": 1}

    interrupt(settings, parted, in_round=4)
    run_embedded(settings, parted, resume=True, console=quiet())
    assert_same_bits(checkpoint_tensors(whole, 5), checkpoint_tensors(parted, 5))
    path = latest_checkpoint(RunFolder(root=parted).checkpoints)
    assert path is not None
    fingerprint = json.loads((path / "state.json").read_text())["model_fingerprint"]
    state, _ = load_checkpoint(path, model_fingerprint=fingerprint)
    assert state.siblings is not None and state.siblings.members == {0: 2, 1: 1}


SILENT = (
    "drift.threshold=1000",
    "federation.rounds=3",
    "train.local_steps=2",
    "federation.eval_windows=2",
)
"""A short run in which no loss alarms."""


@pytest.fixture(scope="module")
def silent(
    tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, Path]:
    """An uninterrupted run, whose drift the clients' own comparison finds."""
    folder = tmp_path_factory.mktemp("silent")
    settings = drifting(tiny_llama_folder, folder, *SILENT)
    run_embedded(settings, folder / "whole", console=quiet())
    assert [number for number, _ in spawned(folder / "whole")] == [2]
    return settings, folder / "whole"


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["counts are told", "round is merged"])
def test_a_run_killed_once_counts_are_told_ends_in_the_same_bits(
    silent: tuple[Settings, Path], tmp_path: Path, moment: str
) -> None:
    settings, whole = silent
    if moment == "round is merged":
        interrupt(settings, tmp_path, in_round=2)
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            real = drift_watch.ask_counts

            def stop(*args: Any, **kwargs: Any) -> None:
                real(*args, **kwargs)
                raise Interrupted

            patch.setattr(drift_watch, "ask_counts", stop)
            run_embedded(settings, tmp_path, console=quiet())
    run_embedded(settings, tmp_path, resume=True, console=quiet())
    assert spawned(tmp_path) == spawned(whole)
    assert_same_bits(checkpoint_tensors(tmp_path, 3), checkpoint_tensors(whole, 3))


@pytest.mark.faults
def test_a_change_whose_counts_were_lost_is_found_after_the_next_round(
    silent: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = drift_watch.ask_counts, []

    def lose_first(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        answers = real(*args, **kwargs)
        return ({}, {}) if len(asked) == 1 else answers

    monkeypatch.setattr(drift_watch, "ask_counts", lose_first)
    run_embedded(silent[0], tmp_path, console=quiet())
    assert [(n, change["clients"]) for n, change in spawned(tmp_path)] == [(3, [0])]
