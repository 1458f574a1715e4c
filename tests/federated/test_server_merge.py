"""The merge is pure, does not depend on arrival, and reports what it did."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from samv2.common.errors import FederationError
from samv2.federated import server_merge as module
from samv2.federated.server_merge import (
    Refusal,
    ServerState,
    ValidReply,
    broadcast_frame,
    server_merge,
)
from samv2.federated.server_optimizer import server_step
from samv2.federated.usage import pack_usage
from samv2.updates.aggregate import Contribution
from samv2.updates.packing import pack, unpack
from samv2.updates.stored import read_frame
from tests.federated.runs import (
    assert_same_bits,
    toy_counts,
    toy_manifest,
    toy_settings,
    toy_state,
    toy_update,
)


def reply_of(
    client: int, ids: tuple[int, ...] = (0, 3, 8), *, round: int = 1
) -> ValidReply:
    """A valid reply of one client."""
    frame = pack(toy_update(client, ids), toy_manifest(), round=round)
    return ValidReply(
        contribution=Contribution(
            client=client, data=frame, weight=float(client + 1), expert_ids=ids
        ),
        usage=pack_usage(toy_counts(client), round=round),
        edge_visits=int(toy_counts(client).usage_LEE.sum()),
        bytes_up=len(frame),
        train_loss=4.0,
        tokens=64,
    )


REFUSALS = [
    Refusal(client=5, reason="round", detail="b"),
    Refusal(client=-1, reason="unasked", detail="node 9"),
    Refusal(client=-1, reason="unasked", detail="node 8"),
]


def merge(
    replies: list[ValidReply], refusals: list[Refusal], *overrides: str
) -> tuple[ServerState, dict[str, object]]:
    """The toy state after a merge, and its report."""
    settings = toy_settings("edits.patience=1", *overrides)
    state, report = server_merge(
        toy_state(), replies, refusals, toy_manifest(), settings
    )
    return state, report.to_json()


def test_arrival_order_changes_neither_state_nor_report() -> None:
    replies = [reply_of(0), reply_of(1, (3,)), reply_of(2, (1, 8))]
    first, report = merge(replies, REFUSALS)
    assert first.graph.version == 1 and report["edits"]
    for order in permutations(replies):
        again, same_report = merge(list(order), REFUSALS[::-1])
        assert_same_bits(
            {str(k): v for k, v in again.blocks.items()},
            {str(k): v for k, v in first.blocks.items()},
        )
        assert again.last_edits == first.last_edits
        assert torch.equal(again.graph.edge_mask_LEE, first.graph.edge_mask_LEE)
        assert torch.equal(again.memory.usage_LEE, first.memory.usage_LEE)
        assert same_report == report


def test_inputs_are_not_changed() -> None:
    state, replies = toy_state(), [reply_of(0)]
    mask = state.graph.edge_mask_LEE.clone()
    server_merge(state, replies, [], toy_manifest(), toy_settings("edits.patience=1"))
    assert state.round == 0 and torch.equal(state.graph.edge_mask_LEE, mask)
    assert not any(bool(block.any()) for block in state.blocks.values())
    assert not bool(state.memory.usage_LEE.any())


def test_blocks_move_by_the_mean_and_others_keep_their_value() -> None:
    state, _ = merge([reply_of(1)], [])
    for key, block in state.blocks.items():
        expected = toy_update(1).get(key, torch.zeros_like(block))
        assert torch.allclose(block, expected, rtol=1e-6, atol=0)
    assert state.round == 1


@pytest.mark.parametrize("rho_max", [0, 2])
def test_edits_are_bounded_and_raise_the_version_only_if_there_are_any(
    rho_max: int,
) -> None:
    state, report = merge([reply_of(0)], [], f"edits.rho_max={rho_max}")
    edits = report["edits"]
    assert isinstance(edits, list) and len(edits) == rho_max
    assert state.graph.version == report["graph_version"] == int(rho_max > 0)
    assert len(state.last_edits) == rho_max


def test_report_names_contributors_and_refusals_without_nan() -> None:
    _, report = merge([reply_of(2, (1,)), reply_of(0)], REFUSALS)
    json.dumps(report, allow_nan=False)
    assert report["contributors"] == {"0": [0], "1": [2], "3": [0], "8": [0]}
    assert [item["detail"] for item in report["refused"]] == ["node 8", "node 9", "b"]
    assert report["clients"]["2"]["examples"] == 3.0
    assert report["usage_per_layer"] == [
        int(sum(toy_counts(c).usage_LEE[layer].sum() for c in (0, 2)))
        for layer in (0, 1)
    ]


def test_broadcast_is_bit_exact_and_leaves_untouched_blocks_out() -> None:
    state, _ = merge([reply_of(0)], [])
    sent = unpack(broadcast_frame(state, toy_manifest()), toy_manifest(), round=2)
    assert sorted(sent) == [0, 3, 8]
    assert all(torch.equal(sent[key], state.blocks[key]) for key in sent)


def test_frames_may_lie_in_files(tmp_path: Path) -> None:
    replies = [reply_of(0), reply_of(1, (3,)), reply_of(2, (1, 8))]
    stored = []
    for reply in replies:
        item = reply.contribution
        update, usage = tmp_path / f"{item.client}.bin", tmp_path / f"{item.client}.u"
        update.write_bytes(item.read())
        usage.write_bytes(read_frame(reply.usage))
        kept = replace(item, data=update)
        stored.append(replace(reply, contribution=kept, usage=usage))
    first, report = merge(replies, [])
    again, same_report = merge(stored, [])
    assert same_report == report
    assert all(
        torch.equal(again.blocks[key], first.blocks[key]) for key in first.blocks
    )


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_the_servers_optimiser_carries_on_from_the_state(optimizer: str) -> None:
    settings = toy_settings(f"aggregation.optimizer={optimizer}", "edits.rho_max=0")
    manifest = toy_manifest()
    first, _ = server_merge(toy_state(), [reply_of(0)], [], manifest, settings)
    assert sorted(first.moments.first) == [0, 3, 8]
    second, _ = server_merge(
        first, [reply_of(1, (3,), round=2)], [], manifest, settings
    )
    change = {3: toy_update(1, (3,))[3]}
    blocks, moments = server_step(
        first.blocks, change, first.moments, settings.aggregation
    )
    for key, block in blocks.items():
        assert torch.allclose(second.blocks[key], block, rtol=1e-5, atol=1e-7)
    assert torch.allclose(second.moments.first[3], moments.first[3], rtol=1e-5)
    assert torch.equal(second.moments.first[0], first.moments.first[0])


def test_a_capped_vote_is_in_the_report() -> None:
    replies = [reply_of(0), reply_of(1), reply_of(2)]
    _, free = merge(replies, [])
    _, capped = merge(replies, [], "edits.vote_cap=0.34")
    assert free["clients"] == capped["clients"]
    for name in ("usage_per_layer", "demand_per_layer"):
        assert capped[name] == pytest.approx(free[name], abs=16)


PRIVATE = ("privacy.noise=1.0", "edits.rho_max=0", "train.train_mix=true")


def test_privacy_counts_rounds_and_states_epsilon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def epsilon(rounds: int, *, noise: float, delta: float) -> float:
        return rounds + noise + delta

    monkeypatch.setattr(module, "epsilon_after", epsilon)
    settings, manifest = toy_settings(*PRIVATE), toy_manifest()
    state = toy_state()
    for round, clients in ((1, (0, 2)), (2, (2, 3))):
        replies = [reply_of(client, round=round) for client in clients]
        state, report = server_merge(
            state, replies, [], manifest, settings, key=bytes(32)
        )
        assert report.epsilon == pytest.approx(round + 1.0 + 1e-5)
        assert report.to_json()["epsilon"] == report.epsilon
    assert state.merged_rounds == {0: 1, 2: 2, 3: 1}
    assert all(bool(block.any()) for block in state.blocks.values())
    assert merge([reply_of(0)], [])[1]["epsilon"] is None
    assert merge([reply_of(0)], [])[0].merged_rounds == {}


def test_privacy_without_a_key_is_refused() -> None:
    with pytest.raises(FederationError, match="privacy.noise is 1.0.*noise_key"):
        merge([reply_of(0)], [], *PRIVATE)
