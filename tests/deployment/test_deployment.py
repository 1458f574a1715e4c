"""TLS, known nodes, and a run that outlives its node and its SuperLink."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from samv2.common.config import to_flat
from samv2.common.telemetry import read_metrics
from samv2.federated.server_app import run_embedded
from tests.deployment.machines import Deployment, deployment, wait_for
from tests.federated.runs import (
    assert_same_bits,
    checkpoint_tensors,
    quiet,
    small_settings,
)
from tests.federated.test_flower_app import run_config

pytestmark = [pytest.mark.deployment, pytest.mark.faults, pytest.mark.slow]

ROUNDS = 3


def rounds(run_dir: Path) -> int:
    """How many rounds are logged."""
    return len(read_metrics(run_dir))


def start_nodes(here: Deployment) -> None:
    """Two registered nodes, and a third whose key nobody knows."""
    here.call("register", here.keys, here.homes / "user", here.address, 0, 1)
    for node in (0, 1):
        here.supernode(node, here.nodes / f"node_{node}")
    intruder = here.nodes / "node_2"
    shutil.copytree(here.nodes / "node_1", intruder)
    here.supernode(2, intruder)
    wait_for(
        lambda: list(here.known_nodes().values()) == ["online", "online"],
        lambda: here.log("node_0") + here.log("node_1"),
    )


def test_a_run_outlives_a_node_and_its_superlink(
    expert_folder: Path, tmp_path: Path
) -> None:
    settings = small_settings(
        expert_folder,
        f"federation.rounds={ROUNDS}",
        f"federation.eval_every={ROUNDS}",
        "federation.min_replies=2",
        "train.local_steps=4",
    )
    config, logs = run_config(to_flat(settings)), tmp_path / "run"
    with deployment(tmp_path / "deployment") as here:
        here.call("certificates", here.keys, 3)
        here.call("nodes", logs, 2, here.nodes, config)
        for node in (0, 1):
            held = (here.nodes / f"node_{node}" / "shards").iterdir()
            assert [p.name for p in held] == [f"client_{node:05d}.safetensors"]
        superlink = here.superlink()
        start_nodes(here)
        submit = ("run", here.keys, here.homes / "user", here.address, logs, 2, config)

        first = here.begin("run_1", *submit)
        said = lambda: here.log("run_1")
        wait_for(lambda: rounds(logs) >= 1, said, alive=first)
        (node,) = here.processes("node_1", "flower-supernode")
        node.send_signal(signal.SIGKILL)
        wait_for(lambda: rounds(logs) >= 2, said, alive=first)
        superlink.send_signal(signal.SIGKILL)
        superlink.wait()
        assert first.wait(300) == 3, here.log("run_1")
        assert "run goes on after its last finished round" in here.log("run_1")
        wait_for(lambda: not here.processes("superlink"), lambda: str(here.processes()))
        done = rounds(logs)
        assert done < ROUNDS

        here.superlink()
        output = here.call(*submit)
        assert "finished:completed" in output
        assert sorted(here.known_nodes().values()) == ["online", "online"]
        assert "node 1 ended" in here.log("node_1")
        assert "Failed to activate SuperNode" in here.log("node_2")
    rows = read_metrics(logs)
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert [row["clients"] for row in rows] == [2] * ROUNDS
    embedded = tmp_path / "embedded"
    run_embedded(settings, embedded, console=quiet())
    assert_same_bits(
        checkpoint_tensors(logs, ROUNDS), checkpoint_tensors(embedded, ROUNDS)
    )


def test_all_on_one_machine_goes_on_and_leaves_nothing_running(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with deployment(tmp_path / "deployment") as here:
        here.homes = tmp_path / "run" / "flower"
        for rounds in (1, 2):
            settings = small_settings(
                tiny_llama_folder,
                "federation.clients=1",
                f"federation.rounds={rounds}",
                "federation.eval_every=2",
                "train.local_steps=1",
            )
            config = run_config(to_flat(settings))
            output = here.call("all-on-one-machine", tmp_path / "run", 1, config)
            assert "finished:completed" in output
            assert here.processes() == []
    assert (tmp_path / "run" / "checkpoints" / "round_0002").is_dir()
