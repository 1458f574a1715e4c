"""Edits: hysteresis, limits, and a graph that always stays walkable."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samv2.common.settings import EditSettings
from samv2.experts.graph import Edit, ExpertGraph, apply_edits, reachable_experts
from samv2.federated.graph_edits import EdgeMemory, decide_edits
from samv2.federated.usage import EdgeCounts, zero_counts
from tests.federated.runs import EXPERTS, LAYERS, toy_graph

EDGES = (LAYERS, EXPERTS, EXPERTS)
CALM = EditSettings(patience=1, cooldown=0, momentum=0.0)


def counts_of(
    usage: dict[tuple[int, int, int], int] | None = None,
    demand: dict[tuple[int, int, int], int] | None = None,
    *,
    even: int = 10,
) -> EdgeCounts:
    """Every kept edge of the toy graph used ``even`` times, but for those given."""
    counts = zero_counts(LAYERS, EXPERTS)
    counts.usage_LEE[toy_graph().edge_mask_LEE] = even
    for edge, value in (usage or {}).items():
        counts.usage_LEE[edge] = value
    for edge, value in (demand or {}).items():
        counts.demand_LEE[edge] = value
    return counts


def decide(
    counts: EdgeCounts,
    settings: EditSettings = CALM,
    *,
    graph: ExpertGraph | None = None,
    memory: EdgeMemory | None = None,
    k: int = 1,
    shared: int = 0,
    voters: int | None = None,
) -> tuple[list[Edit], EdgeMemory]:
    """One round's edits of the toy graph."""
    return decide_edits(
        graph or toy_graph(),
        memory or EdgeMemory.empty(LAYERS, EXPERTS),
        counts,
        settings,
        visits=[k] * LAYERS,
        num_shared=shared,
        voters_LEE=None if voters is None else torch.full(EDGES, voters),
    )


def edges(edits: list[Edit]) -> list[tuple[str, int, int, int]]:
    """What the edits do, without scores."""
    return [(edit.kind, edit.layer, edit.src, edit.dst) for edit in edits]


def test_even_usage_edits_nothing() -> None:
    assert decide(counts_of())[0] == []


def test_an_unused_edge_is_pruned_and_a_wanted_one_promoted() -> None:
    edits, _ = decide(counts_of({(0, 1, 3): 0}, {(1, 0, 2): 40, (1, 0, 3): 3}))
    assert set(edges(edits)) == {("prune", 0, 1, 3), ("promote", 1, 0, 2)}
    by_kind = {edit.kind: edit for edit in edits}
    assert by_kind["prune"].score == 0 and "below 0.2" in by_kind["prune"].reason
    assert by_kind["promote"].score == pytest.approx(4.0)


@pytest.mark.parametrize(
    "min_voters, voters, promoted",
    [(1, None, True), (1, 0, True), (3, 3, True), (3, 2, False), (3, None, True)],
)
def test_an_edge_that_too_few_want_is_not_promoted_but_others_are_pruned(
    min_voters: int, voters: int | None, promoted: bool
) -> None:
    settings = replace(CALM, min_voters=min_voters)
    counts = counts_of({(0, 1, 3): 0}, {(1, 0, 2): 40})
    edits, memory = decide(counts, settings, voters=voters)
    kinds = {edit.kind for edit in edits}
    assert kinds == ({"prune", "promote"} if promoted else {"prune"})
    assert int(memory.above_LEE[1, 0, 2]) == (0 if promoted else 1)


def test_demand_on_a_kept_edge_and_usage_below_the_diagonal_change_nothing() -> None:
    counts = counts_of(demand={(0, 0, 1): 10**6})
    counts.demand_LEE[0, 3, 0] = 10**6
    assert decide(counts)[0] == []


def test_between_the_thresholds_nothing_happens() -> None:
    quarter = counts_of({(0, 1, 3): 3}, {(0, 0, 2): 3})
    assert decide(quarter)[0] == []


def test_patience_counts_rounds_in_a_row() -> None:
    settings = replace(CALM, patience=3)
    unused, used = counts_of({(0, 1, 3): 0}), counts_of()
    memory = EdgeMemory.empty(LAYERS, EXPERTS)
    found = []
    for counts in (unused, unused, used, unused, unused, unused):
        edits, memory = decide(counts, settings, memory=memory)
        found.append(len(edits))
    assert found == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("cooldown", [0, 1, 3])
def test_an_edited_edge_rests_for_the_cooldown(cooldown: int) -> None:
    settings = replace(CALM, cooldown=cooldown)
    graph, memory = toy_graph(), EdgeMemory.empty(LAYERS, EXPERTS)
    rounds = []
    for number in range(cooldown + 2):
        # The edge is unused while it is on and wanted while it is off.
        counts = counts_of({(0, 1, 3): 0}, {(0, 1, 3): 100})
        edits, memory = decide(counts, settings, graph=graph, memory=memory)
        if edits:
            rounds.append(number)
            graph = apply_edits(graph, edits, version=graph.version + 1)
    assert rounds == [0, cooldown + 1]


@pytest.mark.parametrize("rho_max", [0, 1, 3, 100])
def test_rho_max_bounds_all_layers_and_the_most_urgent_go_first(rho_max: int) -> None:
    demand = {(layer, 0, dst): 10 * dst + layer for layer in (0, 1) for dst in (2, 3)}
    demand |= {(1, 2, 3): 500}
    edits, _ = decide(counts_of(demand=demand), replace(CALM, rho_max=rho_max))
    ordered = [(1, 2, 3), (1, 0, 3), (0, 0, 3), (1, 0, 2), (0, 0, 2)]
    assert [(e.layer, e.src, e.dst) for e in edits] == ordered[:rho_max]


def test_ties_go_to_the_lower_edge() -> None:
    demand = {(1, 0, 2): 50, (0, 2, 3): 50, (0, 0, 2): 50}
    edits, _ = decide(counts_of(demand=demand), replace(CALM, rho_max=2))
    assert [(e.layer, e.src, e.dst) for e in edits] == [(0, 0, 2), (0, 2, 3)]


def test_the_last_entry_is_never_closed() -> None:
    mask_LEE = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask_LEE[0, 0, 0] = mask_LEE[0, 0, 1] = True
    graph = ExpertGraph(edge_mask_LEE=mask_LEE, order_LE=torch.arange(2).view(1, 2))
    counts = zero_counts(1, 2)
    counts.usage_LEE[0, 0, 1] = 10
    edits, _ = decide_edits(
        graph,
        EdgeMemory.empty(1, 2),
        counts,
        CALM,
        visits=[1] * graph.edge_mask_LEE.shape[0],
        num_shared=2,
    )
    assert edits == []


@given(
    k=st.integers(1, EXPERTS),
    shared=st.integers(0, EXPERTS - 1),
    rho_max=st.integers(0, 12),
    seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=6),
    order=st.permutations(range(EXPERTS)),
)
def test_k_experts_stay_reachable_whatever_is_counted(
    k: int, shared: int, rho_max: int, seeds: list[int], order: list[int]
) -> None:
    settings = EditSettings(
        rho_max=rho_max, tau_prune=1.5, tau_promote=0.5, patience=1, cooldown=0
    )
    graph = toy_graph(order=order)
    memory = EdgeMemory.empty(LAYERS, EXPERTS)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        counts = zero_counts(LAYERS, EXPERTS)
        shape = counts.usage_LEE.shape
        rare = torch.rand(shape, generator=generator) < 0.3
        counts.usage_LEE[:] = torch.randint(1000, shape, generator=generator) * rare
        counts.demand_LEE[:] = torch.randint(50, shape, generator=generator)
        edits, memory = decide(
            counts, settings, graph=graph, memory=memory, k=k, shared=shared
        )
        assert len(edits) <= rho_max
        assert len({(e.layer, e.src, e.dst) for e in edits}) == len(edits)
        for edit in edits:
            on = bool(graph.edge_mask_LEE[edit.layer, edit.src, edit.dst])
            assert on == (edit.kind == "prune") and edit.src <= edit.dst
        graph = apply_edits(graph, edits, version=graph.version + 1)
        for layer in range(LAYERS):
            always = graph.order_LE[layer] < shared
            opened = graph.edge_mask_LEE[layer] | torch.diag(always)
            assert reachable_experts(opened).sum() >= k


def test_momentum_averages_and_corrects_its_start() -> None:
    settings = replace(CALM, momentum=0.75)
    first, memory = decide(counts_of(even=8), settings)
    assert first == [] and memory.usage_LEE[0, 0, 0] == 2.0
    _, memory = decide(counts_of(even=16), settings, memory=memory)
    assert memory.usage_LEE[0, 0, 0] == 0.75 * 2 + 0.25 * 16
    assert memory.rounds == 2


def test_momentum_lets_one_quiet_round_pass() -> None:
    settings = replace(CALM, momentum=0.8)
    memory = EdgeMemory.empty(LAYERS, EXPERTS)
    _, memory = decide(counts_of(), settings, memory=memory)
    assert decide(counts_of({(0, 1, 3): 0}), settings, memory=memory)[0] == []
    quick = replace(CALM, momentum=0.0)
    assert len(decide(counts_of({(0, 1, 3): 0}), quick, memory=memory)[0]) == 1


def test_a_layer_without_any_visit_does_not_fail() -> None:
    edits, _ = decide(zero_counts(LAYERS, EXPERTS), replace(CALM, rho_max=100), k=4)
    graph = apply_edits(toy_graph(), edits, version=1)
    assert int(reachable_experts(graph.edge_mask_LEE[0]).sum()) == EXPERTS


def frozen_copy(value: Any) -> list[Any]:
    """The fields of a dataclass, tensors copied."""
    parts = [getattr(value, field.name) for field in fields(value)]
    return [part.clone() if torch.is_tensor(part) else part for part in parts]


def test_decisions_repeat_and_change_no_input() -> None:
    graph, memory = toy_graph(), EdgeMemory.empty(LAYERS, EXPERTS)
    counts = counts_of({(0, 1, 3): 0, (1, 0, 1): 0}, {(1, 0, 2): 40})
    before = [frozen_copy(item) for item in (graph, memory, counts)]
    first = decide(counts, graph=graph, memory=memory)
    again = decide(counts, graph=graph, memory=memory)
    assert first[0] == again[0]
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(frozen_copy(first[1]), frozen_copy(again[1]))
    )
    for old, item in zip(before, (graph, memory, counts)):
        for a, b in zip(old, frozen_copy(item)):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
