"""Fixtures of grids: the federation's, and one run with its frames kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from samv2.federated.server_app import run_embedded
from tests.federated.conftest import expert_folder, private_cache  # noqa: F401
from tests.federated.runs import quiet, small_settings


@pytest.fixture(scope="session")
def kept_run(tmp_path_factory: pytest.TempPathFactory, expert_folder: Path) -> Path:
    """The directory of a run of two rounds that edited its graph."""
    root = tmp_path_factory.mktemp("kept") / "run"
    settings = small_settings(
        expert_folder,
        "federation.rounds=2",
        "federation.keep_frames=true",
        "edits.rho_max=4",
    )
    run_embedded(settings, root, console=quiet())
    return root
