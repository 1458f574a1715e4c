"""Checkpoints: bit-exact, bounded in number, and refused where damaged or foreign."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samv2.common.errors import CheckpointError
from samv2.experts.graph import Edit
from samv2.federated import checkpoint
from samv2.federated.checkpoint import (
    MEMORY,
    latest_checkpoint,
    load_checkpoint,
    load_graph,
    save_checkpoint,
)
from samv2.federated.server_merge import ServerState
from samv2.federated.server_optimizer import Moments
from tests.federated.runs import toy_graph, toy_state, toy_update

EDIT = Edit(layer=1, src=0, dst=2, kind="promote", score=0.5, reason="wanted")


def state_at(round: int) -> ServerState:
    """A state with odd values everywhere."""
    start = toy_state()
    blocks = start.blocks | toy_update(round)
    blocks[1] = torch.tensor([-0.0, 1e-40, 3e38, 1 / 3, -1.0, 0.0])
    memory = replace(
        start.memory,
        rounds=round,
        usage_LEE=start.memory.usage_LEE + 1 / 3,
        rest_LEE=start.memory.rest_LEE + 2,
    )
    return ServerState(
        round=round,
        blocks=blocks,
        graph=toy_graph(version=4, order=[1, 0, 2, 3]),
        memory=memory,
        last_edits=(EDIT,),
        moments=Moments(
            first={3: torch.full((6,), 1 / 3)},
            second={3: torch.full((6,), 1e-40)},
        ),
        merged_rounds={0: round, 11: 1},
    )


def save(folder: Path, round: int, *, keep: int = 2) -> Path:
    """A checkpoint of the toy model."""
    return save_checkpoint(
        folder,
        state_at(round),
        model_fingerprint="abc",
        extra={"start": {"x": 1.5}},
        keep=keep,
    )


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = state_at(3)
    found, extra = load_checkpoint(save(tmp_path, 3), model_fingerprint="abc")
    assert extra == {"start": {"x": 1.5}}
    assert (found.round, found.last_edits) == (3, (EDIT,))
    assert list(found.blocks) == sorted(state.blocks)
    for key, block in state.blocks.items():
        assert torch.equal(found.blocks[key].view(torch.int32), block.view(torch.int32))
    assert torch.equal(found.graph.edge_mask_LEE, state.graph.edge_mask_LEE)
    assert torch.equal(found.graph.order_LE, state.graph.order_LE)
    assert found.graph.version == 4 and found.memory.rounds == 3
    for name in MEMORY:
        left, right = getattr(found.memory, name), getattr(state.memory, name)
        assert left.dtype == right.dtype and torch.equal(left, right)
    for name in ("first", "second"):
        left, right = getattr(found.moments, name), getattr(state.moments, name)
        assert left.keys() == right.keys() and torch.equal(left[3], right[3])
    assert found.merged_rounds == {0: 3, 11: 1}


def test_a_checkpoint_without_moments_and_counted_rounds_is_read(
    tmp_path: Path,
) -> None:
    path = save_checkpoint(tmp_path, toy_state(), model_fingerprint="abc")
    facts = json.loads((path / "state.json").read_text())
    del facts["merged_rounds"]
    (path / "state.json").write_text(json.dumps(facts))
    found, _ = load_checkpoint(path, model_fingerprint="abc")
    assert found.moments == Moments() and found.merged_rounds == {}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for round in (1, 2, 9, 10, 10_000):
        save(tmp_path, round)
    (tmp_path / "notes.txt").write_text("mine")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "round_0010", "round_10000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "round_10000"


def test_writing_a_round_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save_checkpoint(tmp_path, toy_state(), model_fingerprint="x")
    assert path.name == "round_0000"
    again = save_checkpoint(
        tmp_path, replace(state_at(1), blocks={}), model_fingerprint="abc"
    )
    found, extra = load_checkpoint(again, model_fingerprint="abc")
    assert found.blocks == {} and extra == {}


def break_facts(path: Path, **changes: object) -> None:
    """Change the JSON of a checkpoint."""
    file = path / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def damage(path: Path, kind: str) -> None:
    """Damage a checkpoint in one way."""
    tensors, facts = path / "state.safetensors", path / "state.json"
    if kind == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif kind == "no tensors":
        tensors.unlink()
    elif kind == "no facts":
        facts.unlink()
    elif kind == "half the facts":
        facts.write_text(facts.read_text()[:40])
    elif kind == "a list":
        facts.write_text("[]")
    elif kind == "lacks a key":
        facts.write_text(json.dumps({"format": 1, "model_fingerprint": "abc"}))
    elif kind == "bad edits":
        break_facts(path, last_edits=[{"boss": 1}])
    else:
        break_facts(path, last_edits=5)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "no tensors",
        "no facts",
        "half the facts",
        "a list",
        "lacks a key",
        "bad edits",
        "edits of another kind",
    ],
)
def test_a_damaged_checkpoint_names_itself_and_the_remedy(
    tmp_path: Path, kind: str
) -> None:
    path = save(tmp_path, 1)
    damage(path, kind)
    with pytest.raises(CheckpointError, match="damaged.*remove the folder") as caught:
        load_checkpoint(path, model_fingerprint="abc")
    assert str(path) in str(caught.value)


def test_a_checkpoint_of_another_model_or_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="belongs to model abc.*is xyz"):
        load_checkpoint(path, model_fingerprint="xyz")
    break_facts(path, format=9)
    with pytest.raises(CheckpointError, match="format 9"):
        load_checkpoint(path, model_fingerprint="abc")


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_an_interrupted_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old = save(tmp_path, 1)

    def fails(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if moment == "write":
        monkeypatch.setattr(checkpoint.json, "dumps", fails)
    else:
        monkeypatch.setattr("samv2.common.files.os.replace", fails)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["round_0001"]
    assert latest_checkpoint(tmp_path) == old
    assert load_checkpoint(old, model_fingerprint="abc")[0].round == 1


def test_what_a_killed_write_left_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    old = save(tmp_path, 1)
    (tmp_path / ".round_0002-k3j4").mkdir()
    assert latest_checkpoint(tmp_path) == old
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "round_0002"


def test_the_graph_is_read_alone_and_of_any_model(tmp_path: Path) -> None:
    state = state_at(2)
    extra = {"start": {"python": 9.5}}
    path = save_checkpoint(tmp_path, state, model_fingerprint="abc", extra=extra)
    graph, memory, facts = load_graph(path)
    assert torch.equal(graph.edge_mask_LEE, state.graph.edge_mask_LEE)
    assert torch.equal(graph.order_LE, state.graph.order_LE)
    assert graph.version == state.graph.version and memory.rounds == 2
    for name in MEMORY:
        assert torch.equal(getattr(memory, name), getattr(state.memory, name))
    assert facts == extra
    (path / "state.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="round_0002 is damaged"):
        load_graph(path)
