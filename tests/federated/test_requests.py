"""What the server sends: full graph or edits, the same bytes for the same part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import MessageType
from flwr.clientapp import ClientApp

from samv2.experts.graph import Edit
from samv2.federated.grid import EmbeddedGrid, request_from_record
from samv2.federated.parts import Parts
from samv2.federated.rehearsal import ATTEMPT
from samv2.federated.requests import (
    Requests,
    full_graph,
    request_bytes,
    to_message,
)
from samv2.federated.server_merge import ServerState
from samv2.updates.packing import Manifest, unpack
from tests.federated.runs import toy_graph, toy_manifest, toy_settings, toy_state

CLIENTS = {10: 0, 11: 1, 12: 2, 13: 3}
EDIT = Edit(layer=0, src=1, dst=3, kind="prune", score=0.1, reason="idle")


def state_at(version: int) -> ServerState:
    """A state whose last round made one edit."""
    return replace(toy_state(), graph=toy_graph(version), last_edits=(EDIT,))


def requests(*overrides: str) -> Requests:
    """Of the toy model."""
    return Requests(toy_settings(*overrides), toy_manifest())


def test_a_client_gets_no_more_of_the_graph_than_it_lacks() -> None:
    made = requests()
    for node, version in ((10, 5), (11, 4), (12, 3)):
        made.note([node], version)
    sent = made.training(state_at(5), Parts(), CLIENTS, 6)
    assert [sent[node].graph.full is None for node in CLIENTS] == [
        True,
        True,
        False,
        False,
    ]
    assert [sent[node].graph.edits for node in (10, 11)] == [(), (EDIT,)]
    assert all(request.graph.version == 5 for request in sent.values())
    # Scores are of the graph as it is, whatever the client holds.
    scored = made.scoring(state_at(5), Parts(), CLIENTS)
    assert all(request.graph == full_graph(state_at(5)) for request in scored.values())
    assert all(request.told is None for request in scored.values())


def test_a_request_that_failed_goes_out_with_the_full_graph() -> None:
    made, state = requests(), state_at(5)
    made.note([10], 5)
    sent = made.training(state, Parts(), {10: 0}, 6)[10]
    assert made.repeated(sent, 10, state) == replace(sent, graph=full_graph(state))
    assert made.memory(CLIENTS) == {}


def test_what_clients_hold_survives_a_restart() -> None:
    made = requests()
    made.note([10, 12], 5)
    kept = made.memory(CLIENTS)
    assert kept == {"0": 5, "2": 5}
    again = requests()
    again.recall(kept)
    again.meet({20: 0, 21: 1})
    assert again.memory({20: 0, 21: 1}) == {"0": 5}


def test_clients_of_the_same_part_get_the_same_bytes() -> None:
    sent = requests().training(toy_state(), Parts(), CLIENTS, 1)
    assert len({id(request.parameters) for request in sent.values()}) == 1


@pytest.mark.parametrize(("codec", "share"), [("raw", 1.0), ("bf16", 0.6)])
def test_parameters_are_sent_as_the_setting_says(codec: str, share: float) -> None:
    blocks = {
        key: torch.randn(1000, generator=torch.Generator().manual_seed(key))
        for key in range(9)
    }
    state, manifest = replace(toy_state(), blocks=blocks), Manifest.of(blocks)
    made = Requests(toy_settings(f"federation.down_codec={codec}"), manifest)
    frame = made.training(state, Parts(), {10: 0}, 1)[10].parameters
    assert len(frame) < share * 9 * 4000 + 1000
    sent = unpack(frame, manifest, round=1)
    for key, block in blocks.items():
        expected = block if codec == "raw" else block.bfloat16().float()
        assert torch.equal(sent[key], expected)


def test_the_temperature_falls_over_the_rounds() -> None:
    made = requests(
        "assembler.temperature_start=2.0",
        "assembler.temperature_end=0.5",
        "federation.rounds=3",
    )
    temperatures = [
        made.training(toy_state(), Parts(), {10: 0}, round)[10].temperature
        for round in (1, 2, 3, 4)
    ]
    assert temperatures == pytest.approx([2.0, 1.25, 0.5, 0.5])


def test_messages_carry_requests() -> None:
    request = requests().training(toy_state(), Parts(), {10: 0}, 1)[10]
    grid = EmbeddedGrid(ClientApp, [], {})
    message = to_message(grid, 10, request, MessageType.TRAIN, 1)
    assert (message.metadata.dst_node_id, message.metadata.group_id) == (10, "1")
    assert request_from_record(message.content) == request
    assert ATTEMPT not in message.content
    again = to_message(grid, 10, request, MessageType.TRAIN, 1, attempt=2)
    assert again.content[ATTEMPT]["number"] == 2
    assert request_bytes(request) == (
        len(request.parameters) + len(request.graph.full or b"") + len("[]") + 24
    )
