"""The thin Flower app: its keys, its bundle, and a run in Flower's simulation."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk

from samv2.common.config import (
    field_kinds,
    flatten,
    load_settings,
    settings_from_flat,
    to_flat,
)
from samv2.common.errors import ConfigError
from samv2.common.settings import Settings
from samv2.configs import config_path
from samv2.federated.client_app import (
    client_index,
    place_from_context,
)
from samv2.federated.run_config import settings_from_run_config
from samv2.federated.run_folder import open_run
from samv2.federated.server_app import run_embedded
from tests.federated.runs import (
    assert_same_bits,
    checkpoint_tensors,
    quiet,
    small_settings,
)

REPOSITORY = Path(__file__).resolve().parents[2]
APP = REPOSITORY / "flower_app"


def app_config() -> dict[str, Any]:
    """The app's run config as Flower flattens it."""
    tables = tomllib.loads((APP / "pyproject.toml").read_text())
    return flatten(tables["tool"]["flwr"]["app"]["config"])


def test_the_keys_are_the_settings_at_the_demos_values() -> None:
    config = app_config()
    assert set(config) == set(field_kinds()) | {"run-dir"}
    del config["run-dir"]
    assert settings_from_flat(config) == load_settings(config_path("demo"))
    assert config == to_flat(load_settings(config_path("demo")))


def test_the_app_needs_an_absolute_folder_and_valid_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run-dir is .*absolute"):
        settings_from_run_config(app_config())
    given = app_config() | {"run-dir": str(tmp_path), "federation.rounds": 9}
    settings, root = settings_from_run_config(given)
    assert root == tmp_path and settings.federation.rounds == 9
    with pytest.raises(ConfigError, match="did you mean federation.rounds"):
        settings_from_run_config(given | {"federation.round": 1})


def test_a_bootstrapped_model_brings_its_conversion_settings(
    tmp_path: Path, expert_folder: Path
) -> None:
    given = app_config() | {"run-dir": str(tmp_path), "model.path": str(expert_folder)}
    settings, _ = settings_from_run_config(given)
    assert (settings.experts.num_experts, settings.adapter.rank) == (8, 4)
    settings, _ = settings_from_run_config(given | {"experts.experts_per_token": 3})
    assert settings.experts.experts_per_token == 3
    # A node has the model in a folder of its own.
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model").symlink_to(expert_folder)
    elsewhere = given | {"model.path": "/only/on/the/server"}
    settings, root = settings_from_run_config(elsewhere, tmp_path / "own")
    assert settings.experts.num_experts == 8 and root == tmp_path / "own"


def test_a_run_is_found_as_it_was_started(tmp_path: Path, expert_folder: Path) -> None:
    given = app_config() | {"run-dir": str(tmp_path / "run")}
    settings, root = settings_from_run_config(given)
    open_run(root, settings, resume=False, overwrite=False)
    # The run has converted its model, and is started again.
    (root / "model").symlink_to(expert_folder)
    again, _ = settings_from_run_config(given)
    assert again == settings and again.experts.layers == "10-"
    open_run(root, again, resume=True, overwrite=False)


def context_of(tmp_path: Path, **node: Any) -> Context:
    """A Flower node's context."""
    return Context(
        run_id=1,
        node_id=5,
        node_config={key.replace("_", "-"): value for key, value in node.items()},
        state=RecordDict(),
        run_config=app_config() | {"run-dir": str(tmp_path)},
    )


def test_a_node_knows_its_client_and_its_folder(tmp_path: Path) -> None:
    assert client_index(context_of(tmp_path, partition_id=3)) == 3
    assert client_index(context_of(tmp_path, partition_id=3, client=1)) == 1
    with pytest.raises(ConfigError, match="--node-config"):
        client_index(context_of(tmp_path))
    assert place_from_context(context_of(tmp_path)).shards == tmp_path / "shards"
    own = place_from_context(context_of(tmp_path, run_dir="/data/own"))
    assert own.states == Path("/data/own/clients")
    assert own.settings.train.device == "auto"
    placed = place_from_context(context_of(tmp_path, device="cuda:1"))
    assert placed.settings.train.device == "cuda:1"


def test_the_bundle_is_small_and_cannot_hide_the_library() -> None:
    names = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(APP))).namelist()
    code = {name for name in names if not name.startswith(".")}
    tops = {name.split("/")[0] for name in code}
    assert tops == {"pyproject.toml", "sam_flower_app"}
    compiled = re.compile(r"\.(so|pyd|pyc|dll|dylib)$")
    assert not [name for name in code if compiled.search(name)]
    assert "sam_flower_app/server_app.py" in code


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def simulation_environment(home: Path) -> dict[str, str]:
    """For a script of this repository, with this interpreter and Flower's files apart."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def simulation_command(logs: Path, settings: Settings) -> list[str]:
    """Simulate two clients."""
    script = REPOSITORY / "scripts" / "flower_simulation.sh"
    return ["bash", str(script), str(logs), "2", run_config(to_flat(settings))]


def run_config(settings: dict[str, Any]) -> str:
    """Settings as ``flwr run --run-config`` reads them."""

    def written(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f"'{value}'" if isinstance(value, str) else str(value)

    skipped = ("federation.clients",)
    return " ".join(
        f"{key}={written(value)}"
        for key, value in settings.items()
        if key not in skipped
    )


def started_with(marker: str) -> list[str]:
    """Command lines of processes whose environment holds a text."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if marker in process.environ().values():
                found.append(" ".join(process.info["cmdline"] or []))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.slow
def test_flowers_simulation_ends_in_the_bits_of_the_embedded_engine(
    expert_folder: Path, tmp_path: Path
) -> None:
    settings = small_settings(
        expert_folder,
        "federation.rounds=2",
        "train.learning_rate=5e-3",
        "train.local_steps=8",
    )
    logs, home = tmp_path / "logs", tmp_path / "flwr"
    done = subprocess.run(
        simulation_command(logs, settings),
        env=simulation_environment(home),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished:completed" in done.stdout
    assert started_with(str(home)) == []
    summary = json.loads((logs / "summary.json").read_text())
    assert summary["rounds"] == 2 and summary["refused"] == 0
    scores = summary["domains"].values()
    assert sum(s["final"] for s in scores) < sum(s["start"] for s in scores)
    for number in (1, 2):
        merge = json.loads((logs / f"merge_round{number}.json").read_text())
        assert len(merge["edits"]) <= settings.edits.rho_max
    embedded = tmp_path / "embedded"
    run_embedded(settings, embedded, console=quiet())
    assert_same_bits(checkpoint_tensors(logs, 2), checkpoint_tensors(embedded, 2))


@pytest.mark.slow
def test_a_failed_simulation_has_another_status_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    home = tmp_path / "flwr"
    done = subprocess.run(
        [
            "bash",
            str(REPOSITORY / "scripts" / "flower_simulation.sh"),
            str(tmp_path / "logs"),
            "2",
            "data.domains='nosuch' model.path='no/such/model'",
        ],
        env=simulation_environment(home),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert started_with(str(home)) == []
