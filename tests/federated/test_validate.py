"""One test per reason for which a reply is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from samv2.common.errors import FrameError
from samv2.experts.block_ids import expert_block, gate_block
from samv2.experts.sibling_gate import BUCKETS, gate_for_kinds
from samv2.federated.client_round import TrainReply
from samv2.federated.server_merge import ValidReply, initial_state
from samv2.federated.usage import pack_usage, zero_counts
from samv2.federated.validate import LARGEST_VALUE, reply_bytes, validate_reply
from samv2.updates.packing import Manifest, pack
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


def check(reply: TrainReply, *overrides: str) -> ValidReply:
    """Validate a reply to round 1 of the toy state."""
    settings = toy_settings(*overrides)
    return validate_reply(reply, 7, toy_state(), toy_manifest(), settings)


def frame_of(blocks: dict[int, torch.Tensor], *, round: int = 1) -> bytes:
    """An update frame."""
    return pack(blocks, toy_manifest(), round=round)


def usage_of(largest: int, *, round: int = 1) -> bytes:
    """A usage frame whose largest count is ``largest``."""
    counts = toy_counts(1, largest // 10)
    counts.usage_LEE[0, 0, 0] = largest
    return pack_usage(counts, round=round)


def test_a_valid_reply_passes_with_what_the_server_knows() -> None:
    reply = toy_reply(usage=usage_of(64))
    valid = check(reply)
    assert valid.contribution.client == 7
    assert valid.contribution.expert_ids == (0, 3, 8)
    assert valid.contribution.weight == 8.0
    assert valid.bytes_up == reply_bytes(reply) == len(reply.update + reply.usage) + 40
    expected = toy_counts(1, 6)
    expected.usage_LEE[0, 0, 0] = 64
    assert valid.edge_visits == int(expected.usage_LEE.sum())
    assert valid.usage == reply.usage and valid.contribution.read() == reply.update


@pytest.mark.parametrize(
    ("examples", "cap", "weight"),
    [
        (2**62, 1_000_000, 8.0),
        (9, 1_000_000, 8.0),
        (2**62, 5, 5.0),
        (6, 1_000_000, 6.0),
    ],
)
def test_examples_weigh_no_more_than_a_round_can_hold(
    examples: int, cap: int, weight: float
) -> None:
    """Four steps of two windows; training that ended early has fewer."""
    valid = check(toy_reply(examples=examples), f"federation.max_examples={cap}")
    assert valid.contribution.weight == weight


FOREIGN = Manifest.of({key: torch.zeros(5) for key in range(9)})
LARGE = {0: torch.full((6,), 2 * LARGEST_VALUE)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"update": bytes(4097)}, "budget"),
        ({"examples": 0}, "examples"),
        ({"examples": -1}, "examples"),
        ({"examples": True}, "examples"),
        ({"examples": 1.5}, "examples"),
        ({"examples": float("nan")}, "examples"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 65}, "tokens"),
        ({"tokens": -(2**62)}, "tokens"),
        ({"train_loss": float("nan")}, "train_loss"),
        ({"train_loss": float("inf")}, "train_loss"),
        ({"train_loss": -0.1}, "train_loss"),
        ({"train_loss": 1e300}, "train_loss"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": float("inf")}, "seconds"),
        ({"seconds": -0.1}, "seconds"),
        ({"seconds": 1e300}, "seconds"),
        ({"graph_version": 1}, "graph_version"),
        ({"graph_version": -1}, "graph_version"),
        ({"usage": usage_of(65)}, "usage_range"),
        ({"usage": usage_of(5, round=2)}, "round"),
        ({"usage": b""}, "truncated"),
        ({"update": frame_of({})}, "empty_update"),
        ({"update": frame_of({0: torch.zeros(6)})}, "empty_update"),
        ({"update": frame_of(LARGE)}, "update_range"),
        ({"update": frame_of(toy_update(), round=2)}, "round"),
        ({"update": frame_of(toy_update(), round=0)}, "round"),
        ({"update": frame_of(toy_update())[:-1]}, "frame_length"),
        ({"update": frame_of(toy_update())[:-8] + bytes(8)}, "body_hash"),
        ({"update": pack({0: torch.ones(5)}, FOREIGN, round=1)}, "fingerprint"),
        ({"update": frame_of({0: torch.full((6,), torch.nan)})}, "nonfinite"),
        ({"update": frame_of({0: torch.full((6,), -torch.inf)})}, "nonfinite"),
    ],
)
def test_each_fault_has_its_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(FrameError) as caught:
        check(replace(toy_reply(), **changes))  # type: ignore[arg-type]
    assert caught.value.reason == reason


@pytest.mark.parametrize("block, codec", [(0.0, "raw"), (1e-8, "f16")])
def test_a_block_of_zeros_counts_as_not_sent(block: float, codec: str) -> None:
    blocks = toy_update() | {5: torch.full((6,), block)}
    update = pack(blocks, toy_manifest(), round=1, codec=codec)
    assert check(toy_reply(update=update)).contribution.expert_ids == (0, 3, 8)


def test_counts_may_not_exceed_the_tokens_of_the_reply_itself() -> None:
    check(toy_reply(tokens=30, usage=usage_of(30)))
    with pytest.raises(FrameError, match="0..20"):
        check(toy_reply(tokens=20, usage=usage_of(30)))


def test_a_layer_has_no_more_visits_than_its_tokens_can_have_made() -> None:
    counts = zero_counts(LAYERS, EXPERTS)
    counts.usage_LEE[1, 0, :2] = 64
    check(toy_reply(usage=pack_usage(counts, round=1)))
    counts.usage_LEE[1, 2, 2] = 1
    with pytest.raises(FrameError, match="129 visits.*128") as caught:
        check(toy_reply(usage=pack_usage(counts, round=1)))
    assert caught.value.reason == "usage_range"


def test_no_visits_at_all_are_believed() -> None:
    valid = check(toy_reply(usage=pack_usage(zero_counts(LAYERS, EXPERTS), round=1)))
    assert valid.edge_visits == 0


def test_a_sibling_that_serves_no_text_cannot_be_changed() -> None:
    """It would start with what a stranger has left in it once it serves some."""
    experts, siblings = LAYERS * EXPERTS, 3
    idle, gate = expert_block(1, experts, 2), gate_block(experts, siblings)
    blocks = {key: torch.zeros(6) for key in range(gate)}
    kinds = {sibling: torch.rand(BUCKETS) for sibling in (0, 1)}
    fitted = gate_for_kinds(kinds, siblings)
    state = initial_state(blocks | {gate: fitted}, toy_graph())
    manifest, settings = Manifest.of(state.blocks), toy_settings("adapter.siblings=3")

    def checked(key: int) -> ValidReply:
        update = pack({key: torch.ones(6)}, manifest, round=1)
        reply = toy_reply(update=update)
        return validate_reply(reply, 7, state, manifest, settings)

    assert checked(idle).contribution.expert_ids == (idle,), "no gate is fitted"
    state = replace(state, blocks=state.blocks | {gate: fitted})
    for key in (0, experts, expert_block(1, experts, 1)):
        assert checked(key).contribution.expert_ids == (key,)
    with pytest.raises(FrameError, match=f"block {idle}.*no text") as caught:
        checked(idle)
    assert caught.value.reason == "not_held"
