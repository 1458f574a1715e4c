"""A client's memory between rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from samv2.common.errors import CheckpointError
from samv2.federated.client_state import (
    ClientState,
    load_client_state,
    save_client_state,
)
from tests.federated.runs import toy_graph, toy_update


def write(folder: Path, round: int) -> ClientState:
    """A state that tells its round."""
    graph = toy_graph(version=round, order=[2, 0, 1, 3])
    state = ClientState(residual=toy_update(round), graph=graph)
    save_client_state(folder, state, round=round)
    return state


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = write(tmp_path, 1)
    found = load_client_state(tmp_path, before_round=2)
    assert found.graph is not None and state.graph is not None
    assert found.graph.version == 1
    assert torch.equal(found.graph.order_LE, state.graph.order_LE)
    assert torch.equal(found.graph.edge_mask_LEE, state.graph.edge_mask_LEE)
    assert found.residual.keys() == state.residual.keys()
    assert all(torch.equal(found.residual[k], v) for k, v in state.residual.items())


def test_a_round_reads_the_newest_earlier_one(tmp_path: Path) -> None:
    assert load_client_state(tmp_path / "new", before_round=9).graph is None
    for round in (1, 2, 4):
        write(tmp_path, round)
    versions = {}
    for before in (1, 2, 3, 4, 5, 100):
        graph = load_client_state(tmp_path, before_round=before).graph
        versions[before] = None if graph is None else graph.version
    assert versions == {1: None, 2: 1, 3: 2, 4: 2, 5: 4, 100: 4}


def test_only_the_newest_files_stay(tmp_path: Path) -> None:
    for round in (8, 9, 10, 11, 12):
        write(tmp_path, round)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"round_{round:04d}.safetensors" for round in (10, 11, 12)
    ]


def test_a_state_without_graph_or_residual(tmp_path: Path) -> None:
    save_client_state(tmp_path, ClientState(), round=1)
    found = load_client_state(tmp_path, before_round=2)
    assert found.graph is None and found.residual == {}


def valid_tensors() -> dict[str, torch.Tensor]:
    """What a file of the toy graph holds."""
    graph = toy_graph()
    return {"edge_mask_LEE": graph.edge_mask_LEE, "order_LE": graph.order_LE}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage" * 10,
        save({"0": torch.ones(1)}),
        save({"0": torch.ones(1)}, metadata={"graph_version": "one"}),
        save({"0": torch.ones(1)}, metadata={"graph_version": "1"}),
        save(valid_tensors() | {"x": torch.ones(1)}, metadata={"graph_version": "1"}),
        save(
            valid_tensors() | {"order_LE": torch.zeros(2, 4, dtype=torch.long)},
            metadata={"graph_version": "1"},
        ),
        save(
            valid_tensors() | {"edge_mask_LEE": torch.ones(3)},
            metadata={"graph_version": "1"},
        ),
    ],
)
def test_a_damaged_file_names_itself_and_the_remedy(
    tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "round_0001.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged.*remove it") as caught:
        load_client_state(tmp_path, before_round=2)
    assert str(path) in str(caught.value)


def test_going_back_drops_the_rounds_that_are_run_again(tmp_path: Path) -> None:
    for number in (3, 4, 5, 2):
        save_client_state(tmp_path, ClientState(), round=number)
    assert [path.name for path in tmp_path.iterdir()] == ["round_0002.safetensors"]
