"""Whole runs under other rules of aggregation: logs, and the same bits when resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from samv2.federated.privacy import KEY, LIBRARY, epsilon_after
from samv2.federated.server_app import run_embedded
from tests.federated.runs import (
    assert_same_bits,
    checkpoint_tensors,
    quiet,
    small_settings,
)

ROBUST = (
    "aggregation.rule=trimmed_mean",
    "aggregation.quorum=2",
    "aggregation.clip_to_median=2.0",
    "aggregation.optimizer=fedadam",
    "aggregation.learning_rate=0.02",
    "edits.vote_cap=0.6",
    "edits.min_voters=2",
)
PRIVATE = ("privacy.noise=0.5", "privacy.clip=0.5", "edits.rho_max=0")


def merge_report(root: Path, round: int) -> dict[str, object]:
    """``merge_round{N}.json``."""
    return json.loads((root / f"merge_round{round}.json").read_text())


@pytest.mark.parametrize("kind", ["robust", "private"])
def test_a_run_repeats_its_bits_when_a_round_is_lost(
    tmp_path: Path, expert_folder: Path, kind: str
) -> None:
    if kind == "private":
        pytest.importorskip(LIBRARY, reason="pip install 'samv2[dp]'")
    overrides = PRIVATE if kind == "private" else ROBUST
    settings = small_settings(expert_folder, "federation.rounds=2", *overrides)
    root, lost = tmp_path / "run", tmp_path / "lost"
    run_embedded(settings, root, console=quiet())
    shutil.copytree(root, lost)
    shutil.rmtree(lost / "checkpoints" / "round_0002")
    (lost / "summary.json").unlink()
    run_embedded(settings, lost, resume=True, console=quiet())
    found = checkpoint_tensors(lost, 2)
    assert_same_bits(found, checkpoint_tensors(root, 2))
    assert merge_report(lost, 2) == merge_report(root, 2)
    epsilons = [merge_report(root, round)["epsilon"] for round in (1, 2)]
    if kind == "private":
        assert (root / KEY).stat().st_mode & 0o077 == 0
        assert epsilons == [epsilon_after(n, noise=0.5, delta=1e-5) for n in (1, 2)]
        assert all(found[f"block.{key}"].any() for key in range(8))
    else:
        assert any(name.startswith("second.") for name in found)
        assert epsilons == [None, None]
