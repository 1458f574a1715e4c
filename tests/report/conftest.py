"""Fixtures of reports: a real tiny run, and a folder of each other kind."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from samv2.federated.server_app import run_embedded
from tests.federated.conftest import private_cache  # noqa: F401
from tests.federated.runs import quiet, small_settings

FRONTIER = [
    {
        "experts_per_token": k,
        "ffn_flops_fraction": k / 8,
        "perplexity": {"python": 30.0 / k, "pydoc": 40.0 / k},
        "dense_perplexity": {"python": 3.75, "pydoc": 5.0},
        "ratio": 8 / k,
        "unseen_ratio": None if k == 2 else 10 / k,
    }
    for k in (2, 4, 8)
]


def method(name: str, final: float, up: int) -> dict:
    """A method's object of ``federation.json``, two rounds long."""
    return {
        "method": name.lower(),
        "title": name,
        "perplexity": final,
        "domains": {"python": final - 1, "pydoc": final + 1},
        "bytes_up_per_client_round": up,
        "seconds": 3.5 * final,
        "settings": {"adapter.rank": 8},
        "rounds": [
            {
                "round": number,
                "perplexity": final + 4 - 2 * number,
                "bytes_up_total": 2 * up * number,
                "seconds": 1.5 * number,
            }
            for number in (1, 2)
        ],
    }


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A finished run of two rounds from the dense tiny model; not to be changed."""
    root = tmp_path_factory.mktemp("report") / "tiny"
    rounds = ("federation.rounds=2", "train.learning_rate=3e-3")
    run_embedded(small_settings(tiny_llama_folder, *rounds), root, console=quiet())
    return root


@pytest.fixture
def broken_run(tiny_run: Path, tmp_path: Path) -> Path:
    """The same for a test to break; without what no report reads."""
    skipped = shutil.ignore_patterns("clients", "shards", "tensorboard", "model.safe*")
    return Path(shutil.copytree(tiny_run, tmp_path / "broken", ignore=skipped))


@pytest.fixture(scope="session")
def methods_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``federation.json`` of three methods; one sends nothing."""
    folder = tmp_path_factory.mktemp("methods")
    dense = {"perplexity": 24.0, "domains": {"python": 23.0, "pydoc": 25.0}}
    value = {
        "protocol": {
            "name": "toy",
            "model": "tiny",
            "settings": {"federation.clients": 2, "data.domains": "python,pydoc"},
            "dense": dense,
        },
        "methods": [
            method("SAM-v2", 20.0, 10_000),
            method("FedIT", 19.0, 400_000),
            method("local", 21.0, 0),
        ],
    }
    (folder / "federation.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="session")
def grid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ``ablation.csv``: a grid of 2 x 2 runs, and one that failed."""
    folder = tmp_path_factory.mktemp("grid")
    with (folder / "ablation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["name", "status", "error", "seed", "experts.experts_per_token"]
            + ["federation.codec", "perplexity", "bytes_up_per_client_round"]
            + ["flops_fraction", "seconds"]
        )
        for k, codec in ((4, "int8"), (8, "int8"), (4, "int4"), (8, "int4")):
            size = 2000 if codec == "int8" else 1000
            values = [100.5 - k, size, k / 8, 10 * k]
            writer.writerow([f"{k}-{codec}", "done", "", 0, k, codec, *values])
        writer.writerow(["bad", "failed", "<b>no memory</b>", 0, 16, "int8"])
    return folder


@pytest.fixture(scope="session")
def frontier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``frontier.json``."""
    folder = tmp_path_factory.mktemp("frontier")
    (folder / "frontier.json").write_text(json.dumps(FRONTIER))
    return folder
