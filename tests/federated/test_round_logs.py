"""What a round leaves on disk and on the board, read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (
    HISTOGRAMS,
    IMAGES,
    EventAccumulator,
)
from torch import Tensor

from samv2.common.event_log import event_log
from samv2.common.settings import Settings
from samv2.common.telemetry import read_metrics, read_rows
from samv2.federated.graph_image import HEIGHT, WIDTH
from samv2.federated.round_board import (
    MOST_CLIENTS,
    block_norms,
    gate_biases,
    visit_shares,
)
from samv2.federated.round_logs import RoundLogs, read_rounds
from samv2.federated.server_merge import (
    Refusal,
    ServerState,
    initial_state,
    server_merge,
)
from samv2.federated.strategy import RoundReport
from samv2.federated.usage import pack_usage
from samv2.federated.validate import validate_reply
from samv2.updates.packing import pack
from tests.federated.runs import (
    EXPERTS,
    LAYERS,
    toy_counts,
    toy_graph,
    toy_manifest,
    toy_reply,
    toy_settings,
    toy_state,
    toy_update,
)

SETTINGS = toy_settings("federation.clients=3", "edits.patience=1", "edits.cooldown=0")
BIASES_LE = torch.arange(LAYERS * EXPERTS).view(LAYERS, EXPERTS) / 8


def one_round(
    state: ServerState, *, counted: bool = True
) -> tuple[ServerState, RoundReport]:
    """A round of two replies and a client that stays silent."""
    manifest, number = toy_manifest(), state.round + 1
    replies = []
    for client in (0, 1):
        update = toy_update(10 * number + client, (0, 5, 8))
        usage = pack_usage(toy_counts(client, 12 if counted else 0), round=number)
        reply = toy_reply(
            update=pack(update, manifest, round=number),
            usage=usage,
            graph_version=state.graph.version,
            train_loss=4.0 - client,
            seconds=1.0 + client,
        )
        replies.append(validate_reply(reply, client, state, manifest, SETTINGS))
    silent = Refusal(client=2, reason="no_reply", detail="no reply in time")
    state, merge = server_merge(state, replies, [silent], manifest, SETTINGS)
    report = RoundReport(
        merge=merge,
        scores={},
        bytes_down=90,
        bytes_down_all=240,
        seconds={"train": 3.0, "merge": 0.5, "evaluate": 1.0, "server": 0.25},
        asked={0: 80, 1: 90, 2: 70},
        waited={0: 1.5},
    )
    return state, report


def write_rounds(
    root: Path,
    state: ServerState,
    until: int,
    *,
    counted: bool = True,
    settings: Settings = SETTINGS,
) -> ServerState:
    """Rounds from a state on, all logged."""
    with event_log(root) as events:
        logs = RoundLogs(
            root,
            settings,
            toy_manifest(),
            events,
            first_biases_LE=BIASES_LE,
            keep_rounds=state.round,
        )
        while state.round < until:
            state, report = one_round(state, counted=counted)
            logs.write(state, report)
        logs.close()
    return state


def board(root: Path) -> EventAccumulator:
    """All that TensorBoard shows."""
    everything = {IMAGES: 0, HISTOGRAMS: 0}
    found = EventAccumulator(str(root / "tensorboard"), size_guidance=everything)
    found.Reload()
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two rounds."""
    root = tmp_path_factory.mktemp("logged")
    write_rounds(root, toy_state(), 2)
    return root


def test_scalars_of_rounds_and_clients(logged: Path) -> None:
    found = board(logged)

    def curve(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in found.Scalars(name)]

    assert curve("train_loss") == [(1, 3.5), (2, 3.5)]
    assert curve("client_loss/0000") == [(1, 4.0), (2, 4.0)]
    assert curve("client_seconds/0001") == [(1, 2.0), (2, 2.0)]
    assert curve("client_waited/0000") == [(1, 1.5), (2, 1.5)]
    assert curve("refused_by_reason/no_reply") == [(1, 1.0), (2, 1.0)]
    rows = read_metrics(logged)
    assert [v for _, v in curve("seconds/server")] == [
        pytest.approx(row["seconds"]["server"]) for row in rows
    ]
    sizes = [
        row["clients"][1]["bytes_up"] for row in read_rows(logged / "clients.jsonl")
    ]
    assert [value for _, value in curve("client_bytes_up/0001")] == sizes
    tags = set(found.Tags()["scalars"])
    assert not tags & {"client_loss/0002", "client_waited/0001"}  # not known


def test_histograms_of_layers_and_clients(logged: Path) -> None:
    found = board(logged)
    names = set(found.Tags()["histograms"])
    kinds = ("block_norm", "gate_bias", "usage")
    assert names >= {f"{kind}/layer_{n:02d}" for kind in kinds for n in range(LAYERS)}
    losses = found.Histograms("clients/loss")[0].histogram_value
    assert (losses.num, losses.min, losses.max) == (2, 3.0, 4.0)
    norms = found.Histograms("clients/update_norm")[1].histogram_value
    rows = read_rows(logged / "clients.jsonl")
    expected = [c["update_norm"] for c in rows[1]["clients"] if c["replied"]]
    assert norms.sum == pytest.approx(sum(expected))
    usage = found.Histograms("usage/layer_00")[0].histogram_value
    assert usage.num == EXPERTS and usage.sum == pytest.approx(1.0)
    state, _ = one_round(toy_state())
    biases = found.Histograms("gate_bias/layer_01")[0].histogram_value
    assert biases.num == EXPERTS
    trained = gate_biases(state.blocks, LAYERS, EXPERTS) + BIASES_LE
    assert biases.sum == pytest.approx(float(trained[1].sum()), abs=1e-5)
    block = found.Histograms("block_norm/layer_00")[0].histogram_value
    assert block.sum == pytest.approx(sum(block_norms(state)[0]))


def test_a_picture_a_round(logged: Path) -> None:
    images = board(logged).Images("graph")
    assert [image.step for image in images] == [1, 2]
    assert {(image.height, image.width) for image in images} == {(HEIGHT, WIDTH)}
    assert images[0].encoded_image_string.startswith(b"\x89PNG")


def test_where_usage_is_not_counted_there_is_none(tmp_path: Path) -> None:
    write_rounds(tmp_path, toy_state(), 1, counted=False)
    tags = board(tmp_path).Tags()
    assert tags["images"] == []
    assert not any(name.startswith("usage") for name in tags["histograms"])
    assert "gate_bias/layer_00" in tags["histograms"]


def test_rows_of_rounds_and_clients(logged: Path) -> None:
    (first, clients), (second, _) = read_rounds(logged)
    assert (first["round"], second["round"]) == (1, 2)
    assert first["refused_by_reason"] == {"no_reply": 1}
    assert first["seconds"]["train"] == 3.0
    assert 0.25 < first["seconds"]["server"] < 60.25  # and the time to write it down
    assert [(row["client"], row["replied"]) for row in clients] == [
        (0, True),
        (1, True),
        (2, False),
    ]
    assert [row["bytes_down"] for row in clients] == [80, 90, 70]


def test_events_of_rounds(logged: Path) -> None:
    lines = [json.loads(x) for x in (logged / "log.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["event"] == "round_finished"]
    assert [line["fields"]["round"] for line in done] == [1, 2]
    edits = [line["fields"] for line in lines if line["event"] == "edits"]
    merge = json.loads((logged / "merge_round1.json").read_text())
    told = [[e["layer"], e["src"], e["dst"], e["kind"]] for e in merge["edits"]]
    assert told and edits[0] == {"round": 1, "edits": told}


def test_rounds_that_run_again_are_dropped(tmp_path: Path) -> None:
    first = write_rounds(tmp_path, toy_state(), 1)
    write_rounds(tmp_path, first, 3)
    events = (tmp_path / "log.jsonl").read_text().splitlines()
    write_rounds(tmp_path, first, 2)
    for name in ("clients.jsonl", "metrics.jsonl"):
        assert [row["round"] for row in read_rows(tmp_path / name)] == [1, 2]
    assert [event.step for event in board(tmp_path).Scalars("train_loss")] == [1, 2]
    assert [event.step for event in board(tmp_path).Images("graph")] == [1, 2]
    assert (tmp_path / "log.jsonl").read_text().splitlines()[: len(events)] == events


def test_with_many_clients_there_are_no_curves_of_each(tmp_path: Path) -> None:
    settings = toy_settings(f"federation.clients={MOST_CLIENTS + 1}")
    write_rounds(tmp_path, toy_state(), 1, settings=settings)
    tags = board(tmp_path).Tags()
    assert not any(name.startswith("client_") for name in tags["scalars"])
    assert "clients/loss" in tags["histograms"]


def sibling_state() -> tuple[ServerState, dict[int, Tensor]]:
    """One layer of two experts with three siblings; ids as in models/adapters.py."""
    sizes = {0: 5, 1: 5, 2: 3, 3: 2, 4: 2, 5: 2, 6: 2, 7: 4}
    blocks = {key: torch.zeros(size) for key, size in sizes.items()}
    graph = replace(
        toy_graph(),
        edge_mask_LEE=torch.eye(2, dtype=torch.bool)[None],
        order_LE=torch.arange(2)[None],
    )
    return initial_state(blocks, graph), blocks


def test_norms_are_of_trained_blocks_siblings_included() -> None:
    state, blocks = sibling_state()
    assert block_norms(state) == [[]]
    filled = {
        key: torch.full_like(block, key + 1.0) * (key != 1)
        for key, block in blocks.items()
    }
    (norms,) = block_norms(replace(state, blocks=filled))
    expected = [(key + 1) * len(blocks[key]) ** 0.5 for key in (0, 3, 4, 5, 6)]
    assert norms == pytest.approx(expected)


def test_norms_find_the_layer_of_a_block() -> None:
    state = toy_state()
    blocks = dict(state.blocks)
    blocks[EXPERTS] = torch.ones(6)  # the first of layer 1
    blocks[LAYERS * EXPERTS] = torch.ones(10)  # the assembler: of no layer
    assert block_norms(replace(state, blocks=blocks)) == [[], [pytest.approx(6**0.5)]]


def test_gate_biases_stand_before_mix_and_edges() -> None:
    block = torch.arange(float(5 + EXPERTS + 2))
    blocks = {key: block + 100 * key for key in range(LAYERS * EXPERTS)}
    found = gate_biases(blocks, LAYERS, EXPERTS)
    assert found[0, 0] == 5.0 and found[1, 2] == 605.0
    assert found.shape == (LAYERS, EXPERTS)


def test_shares_of_visits() -> None:
    usage = torch.zeros(2, 3, 3, dtype=torch.long)
    usage[0, 0, 0], usage[0, 0, 2] = 3, 1
    assert visit_shares(usage).tolist() == [[0.75, 0.0, 0.25], [0.0, 0.0, 0.0]]
