"""Fixtures of the command line's tests: the federation's, and one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from samv2.cli import main
from tests.federated.conftest import private_cache  # noqa: F401
from tests.federated.runs import SMALL


@pytest.fixture(scope="session")
def run_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_bootstrapped: Path
) -> Path:
    """A run of one round that ``samv2 train`` made."""
    root = tmp_path_factory.mktemp("cli-run") / "logs"
    status = main(
        [
            "train",
            "--log-dir",
            str(root),
            *(f"--set={item}" for item in SMALL),
            f"--set=model.path={tiny_bootstrapped}",
            "--set=federation.rounds=1",
            "--set=federation.keep_frames=true",
        ]
    )
    assert status == 0
    return root


@pytest.fixture(scope="session")
def tiny_bootstrapped(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path
) -> Path:
    """A folder that ``samv2 bootstrap`` made of the tiny model."""
    folder = tmp_path_factory.mktemp("cli-bootstrap") / "experts"
    options = [f"--set={item}" for item in SMALL]
    status = main(
        ["bootstrap", str(tiny_llama_folder), "--output", str(folder), *options]
    )
    assert status == 0
    return folder
