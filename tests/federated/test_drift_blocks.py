"""What changes of siblings do to blocks and to the server optimiser's moments."""

from __future__ import annotations

import pytest
import torch
from flwr.clientapp import ClientApp
from torch import Tensor

from samv2.common.settings import AggregationSettings
from samv2.experts.block_ids import expert_block, gate_block
from samv2.experts.sibling_gate import BUCKETS, gate_for_kinds
from samv2.federated import drift_watch
from samv2.federated.drift import (
    SiblingChange,
    SiblingMemory,
    describe,
    respond,
)
from samv2.federated.drift_blocks import apply_changes
from samv2.federated.drift_watch import watch_drift
from samv2.federated.grid import EmbeddedGrid
from samv2.federated.server_merge import ServerState, initial_state
from samv2.federated.server_optimizer import Moments, server_step
from samv2.federated.siblings import unserved_rows, used_siblings
from tests.federated.runs import EXPERTS, LAYERS, toy_graph, toy_settings
from tests.federated.test_drift import SETTINGS, memory_of, text


def test_blocks_follow_the_changes() -> None:
    """Two experts and three siblings: blocks 0-1, the assembler's 2, 3-4, 5-6, gate 7."""
    ids = [expert_block(e, 2, g) for g in range(3) for e in (0, 1)]
    assert ids == [0, 1, 3, 4, 5, 6] and gate_block(2, 3) == 7
    sizes = {0: 3, 1: 3, 2: 5, 3: 2, 4: 2, 5: 2, 6: 2, 7: 3 * BUCKETS + 3}
    blocks = {key: torch.full((size,), float(key)) for key, size in sizes.items()}
    blocks[0] = torch.tensor([1.0, 2.0, 9.0])
    memory, changes = respond(
        memory_of(1, 2), {0: text(5)}, SETTINGS, siblings=3, round=4
    )
    spawn = SiblingChange(kind="spawn", sibling=2, parent=0, clients=(0,), reason="")
    after = apply_changes(blocks, memory, (spawn,), siblings=3, experts=2)
    assert after[5].tolist() == [1, 2] and after[6].tolist() == [1, 1]
    assert all(torch.equal(after[key], blocks[key]) for key in (0, 1, 2, 3, 4))
    assert torch.equal(after[7], gate_for_kinds(memory.kinds, 3))
    assert used_siblings(after[7], 3) == [0, 1, 2]
    gone = SiblingChange(kind="retire", sibling=2, parent=None, clients=(), reason="")
    kept = SiblingMemory(kinds={key: memory.kinds[key] for key in (0, 1)})
    after = apply_changes(after, kept, (gone,), siblings=3, experts=2)
    assert not after[5].any() and not after[6].any()
    assert used_siblings(after[7], 3) == [0, 1]
    reuse = SiblingChange(kind="reuse", sibling=1, parent=None, clients=(0,), reason="")
    same = apply_changes(blocks, memory, (reuse,), siblings=3, experts=2)
    assert all(torch.equal(same[key], blocks[key]) for key in blocks)
    assert "sibling 2 spawned from" in describe(changes[0])
    assert describe(gone) == "sibling 2 retired: "


def watched(siblings: int = 3) -> ServerState:
    """Two clients with two siblings, and one held back; every block has a moment."""
    experts = LAYERS * EXPERTS
    gate = gate_block(experts, siblings)
    blocks = {key: torch.ones(3 if key < experts else 2) for key in range(gate)}
    memory = memory_of(1, 2)
    state = initial_state(blocks | {gate: torch.zeros(1)}, toy_graph())
    blocks = state.blocks | {gate: gate_for_kinds(memory.kinds, siblings)}
    first = {key: torch.full_like(block, 100) for key, block in blocks.items()}
    moments = Moments(first=first, second=dict(first))
    return ServerState(
        round=3,
        blocks=blocks,
        graph=state.graph,
        memory=state.memory,
        siblings=memory,
        moments=moments,
    )


def test_blocks_that_are_rewritten_have_no_momentum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = toy_settings(
        "adapter.siblings=3", "drift.detect=true", "drift.patience=1"
    )
    told: dict[int, Tensor] = {0: text(5)}
    monkeypatch.setattr(drift_watch, "ask_counts", lambda *_, **__: (told, {}))
    grid, level = EmbeddedGrid(ClientApp, [{}, {}], {}), {0: 4.0, 1: 4.0}
    before = watched()
    state, report = watch_drift(
        before, settings, grid, {100: 0, 101: 1}, losses=level, moved={0: 0.9, 1: 0.0}
    )
    assert [change.kind for change in report.changes] == ["spawn"]
    own = {expert_block(key, LAYERS * EXPERTS, 2) for key in range(LAYERS * EXPERTS)}
    rewritten = own | {max(before.blocks)}
    for kept in (state.moments.first, state.moments.second):
        assert kept.keys() == before.blocks.keys() - rewritten
    rules = AggregationSettings(optimizer="fedavgm", momentum=0.9)
    one, start = min(own), state.blocks[min(own)]
    change = {one: torch.full_like(start, 0.01)}
    blocks, moments = server_step(state.blocks, change, state.moments, rules)
    assert torch.equal(blocks[one], start + change[one])
    # Its client is silent: the sibling is given up, and so is what it had learnt.
    state, report = watch_drift(
        ServerState(**(vars(state) | {"moments": moments})),
        settings,
        grid,
        {101: 1},
        losses={1: 4.0},
        moved={1: 0.0},
    )
    assert [change.kind for change in report.changes] == ["retire"]
    assert one not in state.moments.first


def test_rows_that_nobody_trains_are_those_of_siblings_without_text() -> None:
    gate = gate_for_kinds({1: text(1)}, 3)
    assert unserved_rows(gate, 3, 2) == {5, 6}, "sibling 0 has more than rows"
    assert unserved_rows(torch.zeros_like(gate), 3, 2) == frozenset()
