"""Siblings in a federation: counts, the gate, whose rows each client trains, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from samv2.common.errors import FrameError
from samv2.common.telemetry import read_metrics
from samv2.experts.sibling_gate import BUCKETS, count_tokens
from samv2.federated.client_round import learning_rate
from samv2.federated.grid import (
    asked_round,
    counts_from_record,
    counts_request,
    counts_to_record,
    wants_counts,
)
from samv2.federated.run_folder import load_model_or_run
from samv2.federated.scores import is_scored
from samv2.federated.server_app import run_embedded
from samv2.federated.server_merge import initial_state
from samv2.federated.siblings import (
    COUNTS,
    fit_siblings,
    pack_counts,
    share_update,
    unpack_counts,
    used_siblings,
)
from samv2.models.adapters import gate_id
from samv2.updates.packing import pack
from tests.federated.runs import (
    assert_same_bits,
    checkpoint_tensors,
    interrupt,
    quiet,
    small_settings,
    toy_graph,
)

TOKENS = torch.tensor([1, 1, 5, 200, 9000])
SIBLINGS = (
    "adapter.siblings=3",
    "assembler.width=0",
    "train.train_gate=false",
    "train.learning_rate=0.02",
    "train.schedule=cosine",
    "federation.eval_every=2",
)


def test_counts_survive_their_frame() -> None:
    frame = pack_counts(TOKENS)
    assert torch.equal(unpack_counts(frame), count_tokens(TOKENS))
    assert len(frame) < 300
    assert len(pack_counts(torch.arange(60_000))) < 2 * BUCKETS + 300


@pytest.mark.parametrize(
    "counts, reason",
    [
        (torch.zeros(BUCKETS), "counts"),
        (-count_tokens(TOKENS), "counts"),
        (count_tokens(TOKENS) * 2.0**50, "counts"),
    ],
)
def test_counts_that_are_none_are_refused(counts: torch.Tensor, reason: str) -> None:
    with pytest.raises(FrameError) as caught:
        unpack_counts(pack({0: counts}, COUNTS, round=0))
    assert caught.value.reason == reason


def test_a_damaged_or_missing_frame_is_refused() -> None:
    with pytest.raises(FrameError):
        unpack_counts(pack_counts(TOKENS)[:-1])
    with pytest.raises(FrameError) as caught:
        counts_from_record({})
    assert caught.value.reason == "reply_shape"


def test_counts_travel_as_records() -> None:
    assert wants_counts(counts_request(4)) and asked_round(counts_request(4)) == 4
    nothing = type(counts_request(1))()
    assert not wants_counts(nothing) and asked_round(nothing) == 1
    record = {"counts": counts_to_record(b"frame")}
    assert counts_from_record(record) == b"frame"


def test_clients_of_other_text_have_other_siblings() -> None:
    counts = {3: count_tokens(TOKENS), 1: count_tokens(TOKENS + 50)}
    gate, members = fit_siblings(counts, 4)
    assert members == {1: 0, 3: 1}
    assert gate.shape == (4 * BUCKETS + 4,)
    assert used_siblings(gate, 4) == [0, 1]


def test_siblings_take_a_part_of_what_others_learnt() -> None:
    """Two experts of three siblings, the last unused; rows of 2, then one number."""
    sizes = {0: 3, 1: 3, 3: 2, 4: 2, 5: 2, 6: 2, 7: 9}
    update = {
        0: torch.tensor([1.0, 2.0, 7.0]),
        3: torch.tensor([10.0, 20.0]),
        4: torch.tensor([4.0, 8.0]),
    }
    before = {key: block.clone() for key, block in update.items()}
    found = share_update(update, sizes=sizes, experts=2, used=[0, 1], share=0.5)
    assert {key: block.tolist() for key, block in found.items()} == {
        0: [1 + 2.5, 2 + 5, 7],
        1: [1, 2, 0],
        3: [10.25, 20.5],
        4: [4, 8],
    }
    assert all(torch.equal(update[key], before[key]) for key in before)
    alone = share_update(update, sizes=sizes, experts=2, used=[0, 1], share=0)
    assert all(torch.equal(alone[key], before[key]) for key in before)


def test_the_learning_rate_follows_its_schedule() -> None:
    constant = small_settings("-", "federation.rounds=4", "train.learning_rate=1.0")
    assert [learning_rate(constant, r) for r in (1, 4)] == [1.0, 1.0]
    cosine = small_settings(
        "-", "federation.rounds=4", "train.learning_rate=1.0", "train.schedule=cosine"
    )
    rates = [learning_rate(cosine, round) for round in (1, 2, 3, 4)]
    assert rates[0] == 1.0 and rates[2] == pytest.approx(0.55)
    assert rates == sorted(rates, reverse=True) and 0.1 < rates[3] < 0.25


def test_the_last_round_is_always_scored() -> None:
    settings = small_settings("-", "federation.rounds=5", "federation.eval_every=3")
    assert [is_scored(settings, r) for r in range(1, 6)] == [0, 0, 1, 0, 1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Three rounds of two clients with two kinds of text, and a sibling to spare."""
    root = tmp_path_factory.mktemp("siblings")
    settings = small_settings(tiny_llama_folder, *SIBLINGS)
    run_embedded(settings, root, console=quiet())
    return root


def test_each_client_trains_its_own_sibling(finished: Path) -> None:
    model, _, _ = load_model_or_run(finished)
    experts = len(model.expert_layers) * 8
    pairs: set[tuple[int, int]] = set()
    for number in (1, 2, 3):
        merge = json.loads((finished / f"merge_round{number}.json").read_text())
        assert not merge["refused"]
        for expert_id, clients in merge["contributors"].items():
            own = (int(expert_id) - (int(expert_id) > experts)) // experts
            assert own < 2
            pairs |= {(own, client) for client in clients}
    assert pairs >= {(0, 0), (1, 1)}
    rows = model.expert_layers[0].adapter_up_EFR
    assert bool(rows[:, :, :4].any()) and bool(rows[:, :, 4:8].any())
    assert not bool(rows[:, :, 8:].any())


def test_the_gate_is_in_the_checkpoint_and_tells_text_apart(finished: Path) -> None:
    model, _, _ = load_model_or_run(finished)
    block = model.read_blocks()[gate_id(model.expert_layers)]
    assert bool(block.any()) and block.shape == (3 * BUCKETS + 3,)
    from samv2.data.shards import load_client

    for client in (0, 1):
        text = load_client(finished / "shards", client).train[:2048].view(-1, 64)
        assert model.active_siblings(text, least=0.5) == (client,)


def test_counts_are_part_of_the_first_upload(finished: Path) -> None:
    rows = read_metrics(finished)
    budget = 16384 + 2000  # the usage frame and numbers come on top
    assert all(row["bytes_up_per_client"] <= budget for row in rows)
    assert rows[0]["perplexity"] == {} and rows[1]["perplexity"]
    summary = json.loads((finished / "summary.json").read_text())
    for values in summary["domains"].values():
        assert values["final"] < values["start"]


def test_resuming_ends_in_the_same_bits(
    finished: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    settings = small_settings(tiny_llama_folder, *SIBLINGS)
    interrupt(settings, tmp_path, in_round=2)
    run_embedded(settings, tmp_path, resume=True, console=quiet())
    assert_same_bits(checkpoint_tensors(tmp_path, 3), checkpoint_tensors(finished, 3))
    for left, right in zip(read_metrics(finished), read_metrics(tmp_path), strict=True):
        assert left["bytes_up"] == right["bytes_up"]


def test_a_gate_that_a_client_changes_is_refused(finished: Path) -> None:
    from samv2.federated.validate import validate_reply
    from tests.federated.runs import toy_reply

    settings = small_settings("-", "adapter.siblings=2")
    from samv2.updates.packing import Manifest

    blocks = {0: torch.ones(3), 9: torch.ones(2)}
    manifest = Manifest.of(blocks)
    state = initial_state(blocks, toy_graph())
    with pytest.raises(FrameError) as caught:
        validate_reply(
            toy_reply(update=pack(blocks, manifest, round=1)),
            0,
            state,
            manifest,
            settings,
        )
    assert caught.value.reason == "fixed_block"
