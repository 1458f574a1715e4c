"""A node's folder: the model, its own shard, and nothing of another client."""

from __future__ import annotations

from pathlib import Path

import pytest

from samv2.common.config import to_flat
from samv2.common.errors import DataError
from samv2.data.shards import load_client
from tests.deployment.machines import deployment
from tests.federated.runs import small_settings
from tests.federated.test_flower_app import run_config

pytestmark = pytest.mark.deployment


def test_a_node_gets_the_model_and_its_own_text_only(
    expert_folder: Path, tmp_path: Path
) -> None:
    config = run_config(to_flat(small_settings(expert_folder)))
    with deployment(tmp_path / "deployment") as here:
        here.call("nodes", tmp_path / "run", 2, here.nodes, config)
        memory = here.nodes / "node_1" / "clients" / "client_0001" / "kept"
        memory.parent.mkdir(parents=True)
        memory.touch()
        here.call("nodes", tmp_path / "run", 2, here.nodes, config)
        output = here.call(
            "nodes", tmp_path / "run", 2, here.nodes, "federation.round=3", expect=1
        )
    assert "did you mean federation.rounds" in output
    assert memory.exists(), "a client's memory of earlier rounds stays"
    whole = load_client(tmp_path / "run" / "shards", 1)
    node = here.nodes / "node_1"
    assert load_client(node / "shards", 1).train.equal(whole.train)
    with pytest.raises(DataError):
        load_client(node / "shards", 0)
    for path in expert_folder.iterdir():
        assert (node / "model" / path.name).read_bytes() == path.read_bytes()
