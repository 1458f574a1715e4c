"""Graphs and edits as bytes, and a client's round on the tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.callbacks import StepReport, TrainerCallback
from samv2.common.errors import FrameError, GraphError
from samv2.experts.block_ids import expert_block
from samv2.experts.graph import Edit, ExpertGraph
from samv2.experts.sibling_gate import count_tokens, gate_for_kinds
from samv2.federated.client_round import (
    ClientRuntime,
    RoundRequest,
    evaluate_round,
    load_runtime,
    round_seed,
    train_round,
)
from samv2.federated.client_state import (
    ClientState,
    load_client_state,
    save_client_state,
)
from samv2.federated.graph_message import (
    GraphMessage,
    edits_from_json,
    edits_to_json,
    pack_graph,
    unpack_graph,
    update_graph,
)
from samv2.federated.moments import Moments
from samv2.federated.usage import unpack_usage
from samv2.models.save import save_expert_model
from samv2.updates.packing import pack, unpack
from tests.federated.runs import SMALL, save_one_client, small_settings, toy_graph
from tests.helpers import convert

PRUNE = Edit(layer=0, src=1, dst=3, kind="prune", score=0.1, reason="idle")


def same_graph(left: ExpertGraph, right: ExpertGraph) -> bool:
    """Equal masks, orders and versions."""
    return (
        torch.equal(left.edge_mask_LEE, right.edge_mask_LEE)
        and torch.equal(left.order_LE, right.order_LE)
        and left.version == right.version
    )


@given(
    experts=st.integers(1, 70), layers=st.integers(1, 3), seed=st.integers(0, 10_000)
)
def test_graphs_survive_their_bytes(experts: int, layers: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    mask = torch.rand(layers, experts, experts, generator=source).triu() > 0.5
    mask[:, 0, 0] = True
    order = [torch.randperm(experts, generator=source) for _ in range(layers)]
    graph = ExpertGraph(edge_mask_LEE=mask, order_LE=torch.stack(order), version=7)
    assert same_graph(unpack_graph(pack_graph(graph), version=7), graph)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"5",
        b"[]",
        b"{}",
        b'{"order": [], "rows": []}',
        b'{"order": [0, 1], "rows": [["1"]]}',
        b'{"order": [[0, 1]], "rows": [["zz", "2"]]}',
        b'{"order": [[0, 1]], "rows": [[1, 2]]}',
        b'{"order": [[0, 1]], "rows": [["3"]]}',
        b'{"order": [[0, 1]], "rows": [["1", "1"]]}',
        b'{"order": [[0, 0]], "rows": [["1", "2"]]}',
        b'{"order": [[0, 1180591620717411303424]], "rows": [["1", "2"]]}',
        b'{"order": [[0, 1], [0, 1]], "rows": [["1", "2"]]}',
        b'{"order": [[0, 1]], "rows": [["0", "0"]]}',
    ],
)
def test_bytes_that_are_no_graph_are_refused(data: bytes) -> None:
    with pytest.raises(GraphError):
        unpack_graph(data, version=1)


def test_edits_survive_their_json() -> None:
    edits = (PRUNE, Edit(layer=1, src=0, dst=0, kind="promote"))
    assert edits_from_json(edits_to_json(edits)) == edits
    assert edits_from_json("[]") == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "null",
        "[1]",
        '{"layer": 0}',
        '[{"layer": 0}]',
        '[{"layer": 0, "src": 0, "dst": 1, "kind": "prune", "boss": 1}]',
        '[{"layer": "0", "src": 0, "dst": 1, "kind": "prune"}]',
        '[{"layer": 0, "src": 0.5, "dst": 1, "kind": "prune"}]',
        '[{"layer": 0, "src": true, "dst": 1, "kind": "prune"}]',
        '[{"layer": 0, "src": 0, "dst": null, "kind": "prune"}]',
        "[" * 100_000,
    ],
)
def test_text_that_is_no_list_of_edits_is_refused(text: str) -> None:
    with pytest.raises(GraphError):
        edits_from_json(text)


def test_edits_bring_a_client_one_version_on() -> None:
    message = GraphMessage(version=1, full=None, edits=(PRUNE,))
    found = update_graph(toy_graph(), message)
    assert found.version == 1 and not found.edge_mask_LEE[0, 1, 3]
    assert same_graph(update_graph(found, message), found)


@pytest.mark.parametrize(
    ("known", "version", "edits"),
    [(None, 1, (PRUNE,)), (0, 2, (PRUNE,)), (3, 2, (PRUNE,)), (0, 1, ())],
)
def test_a_gap_in_the_versions_is_an_error(
    known: int | None, version: int, edits: tuple[Edit, ...]
) -> None:
    graph = None if known is None else toy_graph(known)
    message = GraphMessage(version=version, full=None, edits=edits)
    with pytest.raises(GraphError, match="full graph"):
        update_graph(graph, message)


def test_an_edit_outside_the_graph_is_an_error() -> None:
    far = replace(PRUNE, layer=9)
    with pytest.raises(GraphError):
        update_graph(toy_graph(), GraphMessage(version=1, full=None, edits=(far,)))


def test_a_full_graph_replaces_what_is_known() -> None:
    graph = toy_graph(order=[1, 0, 3, 2])
    message = GraphMessage(version=4, full=pack_graph(graph), edits=())
    expected = replace(graph, version=4)
    assert same_graph(update_graph(toy_graph(9), message), expected)


def test_seeds_differ_and_fit_a_generator() -> None:
    seeds = {
        round_seed(seed, round, client)
        for seed in (0, 1, 2**32 - 1)
        for round in (1, 2, 1000)
        for client in (0, 1, 99)
    }
    assert len(seeds) == 27
    assert all(torch.Generator().manual_seed(seed + 1) for seed in seeds)
    assert max(seeds) < 2**63


@pytest.fixture
def runtime(expert_folder: Path, tiny_tokens: Tensor, tmp_path: Path) -> ClientRuntime:
    """A runtime with one client that holds 2,000 tokens."""
    save_one_client(tiny_tokens, tmp_path / "shards")
    settings = small_settings(expert_folder)
    return load_runtime(
        expert_folder, tmp_path / "shards", tmp_path / "states", settings
    )


@pytest.fixture
def siblings_runtime(
    runtime: ClientRuntime,
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_calibration: Tensor,
    tmp_path: Path,
) -> ClientRuntime:
    """The same client with a model of two siblings, and a budget for some experts."""
    overrides = ("adapter.siblings=2", "assembler.width=0", "train.train_gate=false")
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()
    made = convert(llama, tiny_calibration, (*SMALL, *overrides))
    save_expert_model(made.model, tiny_tokenizer, tmp_path / "siblings")
    budget = "federation.update_budget_bytes=6000"
    settings = small_settings(tmp_path / "siblings", *overrides, budget)
    return load_runtime(
        tmp_path / "siblings", runtime.shards, tmp_path / "states", settings
    )


def sibling_ids(runtime: ClientRuntime, sibling: int) -> set[int]:
    """Ids of a sibling's blocks."""
    config = runtime.model.expert_config
    experts = len(config.layers) * config.num_experts
    return {expert_block(number, experts, sibling) for number in range(experts)}


def request_of(runtime: ClientRuntime, round: int = 1) -> RoundRequest:
    """A request with the bootstrapped model's own graph and parameters."""
    full = pack_graph(runtime.model.graph)
    return RoundRequest(
        round=round,
        graph=GraphMessage(version=0, full=full, edits=()),
        parameters=pack({}, runtime.manifest, round=round),
    )


def test_a_round_sends_trained_minus_received(runtime: ClientRuntime) -> None:
    received = runtime.model.read_blocks()
    reply = train_round(runtime, 0, request_of(runtime))
    update = unpack(reply.update, runtime.manifest, round=1)
    trained = runtime.model.read_blocks()
    assert update and len(reply.update) <= 16384
    for key, block in update.items():
        delta = trained[key] - received[key]
        assert bool(block.any())
        # int8 by blocks of 256: half a step of the block's largest value.
        assert float((block - delta).abs().max()) <= float(delta.abs().max()) / 253
    counts = unpack_usage(reply.usage, 3, 8, round=1, max_count=reply.tokens)
    assert counts.usage_LEE.sum(dim=(1, 2)).min() >= reply.tokens
    assert (reply.examples, reply.tokens) == (12, 12 * 64)
    state = load_client_state(runtime.states / "client_0000", before_round=2)
    assert state.graph is not None and state.graph.version == 0
    changed = {key for key in trained if not torch.equal(trained[key], received[key])}
    assert changed == set(update) | set(state.residual)


def test_a_round_that_is_run_again_gives_the_same_reply(
    runtime: ClientRuntime,
) -> None:
    first = train_round(runtime, 0, request_of(runtime))
    second = train_round(runtime, 0, request_of(runtime, 2))
    again = train_round(runtime, 0, request_of(runtime))
    assert again.update == first.update and again.usage == first.usage
    assert second.update != first.update
    assert train_round(runtime, 0, request_of(runtime, 2)).update == second.update


def test_what_a_text_left_over_waits_once_the_text_has_changed(
    siblings_runtime: ClientRuntime,
) -> None:
    runtime = siblings_runtime
    gate = max(runtime.base_blocks)
    old, new = sibling_ids(runtime, 0), sibling_ids(runtime, 1)
    # What other text has left over of sibling 0, far larger than a round's training.
    residual = {key: torch.ones_like(runtime.base_blocks[key]) for key in old}
    folder = runtime.states / "client_0000"
    save_client_state(folder, ClientState(residual=residual), round=1)
    served = gate_for_kinds({1: count_tokens(torch.arange(512))}, 2)
    change = {gate: served - runtime.base_blocks[gate]}
    request = replace(
        request_of(runtime, 2), parameters=pack(change, runtime.manifest, round=2)
    )
    reply = train_round(runtime, 0, request)
    sent = set(unpack(reply.update, runtime.manifest, round=2))
    assert sent & new and not sent & old
    kept = load_client_state(folder, before_round=3).residual
    assert old <= set(kept)
    assert all(float((kept[key] - 1).abs().max()) < 1e-5 for key in old)


def test_what_a_client_kept_of_a_sibling_that_was_given_up_is_forgotten(
    siblings_runtime: ClientRuntime,
) -> None:
    runtime = siblings_runtime
    gate = max(runtime.base_blocks)
    gone = {key: runtime.base_blocks[key] for key in sibling_ids(runtime, 1)}
    residual, first, second = (
        {key: torch.ones_like(block) for key, block in gone.items()} for _ in range(3)
    )
    folder = runtime.states / "client_0000"
    moments = Moments(steps=9, first=first, second=second)
    kept = ClientState(residual=residual, moments=moments)
    save_client_state(folder, kept, round=1)
    served = gate_for_kinds({0: count_tokens(torch.arange(512))}, 2)
    change = {gate: served - runtime.base_blocks[gate]}
    request = replace(
        request_of(runtime, 2), parameters=pack(change, runtime.manifest, round=2)
    )
    reply = train_round(runtime, 0, request)
    sent = unpack(reply.update, runtime.manifest, round=2)
    assert sent and not sent.keys() & gone.keys()
    residual = load_client_state(folder, before_round=3).residual
    assert not residual.keys() & gone.keys()


def test_an_evaluation_scores_domains_with_a_whole_window(
    runtime: ClientRuntime,
) -> None:
    scores = evaluate_round(runtime, 0, request_of(runtime))
    assert list(scores) == ["python"]
    assert scores["python"].tokens == 8 * 63
    assert 1 < scores["python"].perplexity < 512
    assert not runtime.states.exists()


def test_parameters_of_another_round_are_refused(runtime: ClientRuntime) -> None:
    stale = replace(request_of(runtime, 2), round=1)
    with pytest.raises(FrameError) as caught:
        train_round(runtime, 0, stale)
    assert caught.value.reason == "round"


class Fails(TrainerCallback):
    """Raises at the first step."""

    def on_step_end(self, report: StepReport) -> bool:
        raise RuntimeError("stopped from outside")


def test_a_round_that_fails_leaves_no_state(runtime: ClientRuntime) -> None:
    with pytest.raises(RuntimeError):
        train_round(runtime, 0, request_of(runtime), [Fails()])
    assert not list(runtime.states.rglob("*.safetensors"))
    assert not runtime.model.training
    json.dumps(list(evaluate_round(runtime, 0, request_of(runtime))))
