"""The expert graph, its invariants and its edits."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2.common.errors import GraphError
from samv2.experts.graph import (
    Edit,
    ExpertGraph,
    apply_edits,
    check_edge_mask,
    initial_graph,
    reachable_experts,
)
from tests.helpers import generator


def make_graph(*, layers: int = 2, experts: int = 4, version: int = 3) -> ExpertGraph:
    """All entries and the chain 0 -> 1 -> 2 -> ..."""
    mask_EE = torch.eye(experts, dtype=torch.bool)
    mask_EE |= torch.diag(torch.ones(experts - 1, dtype=torch.bool), 1)
    return ExpertGraph(
        edge_mask_LEE=mask_EE.repeat(layers, 1, 1),
        order_LE=torch.arange(experts).repeat(layers, 1),
        version=version,
    )


EDITS = (
    Edit(layer=0, src=0, dst=2, kind="promote", score=0.7),
    Edit(layer=0, src=1, dst=2, kind="prune"),
    Edit(layer=1, src=3, dst=3, kind="prune"),
)


def test_edits_switch_exactly_their_edges() -> None:
    graph = make_graph()
    edited = apply_edits(graph, EDITS, version=4)
    changed = (graph.edge_mask_LEE != edited.edge_mask_LEE).nonzero().tolist()
    assert changed == [[0, 0, 2], [0, 1, 2], [1, 3, 3]]
    assert edited.edge_mask_LEE[0, 0, 2] and not edited.edge_mask_LEE[1, 3, 3]
    assert edited.version == 4 and graph.version == 3
    assert torch.equal(graph.edge_mask_LEE, make_graph().edge_mask_LEE)


def test_edits_are_idempotent_and_their_order_does_not_matter() -> None:
    once = apply_edits(make_graph(), EDITS, version=4)
    assert torch.equal(
        apply_edits(once, EDITS, version=4).edge_mask_LEE, once.edge_mask_LEE
    )
    for order in permutations(EDITS):
        found = apply_edits(make_graph(), order, version=4)
        assert torch.equal(found.edge_mask_LEE, once.edge_mask_LEE)


def test_no_edits_still_count_a_version() -> None:
    edited = apply_edits(make_graph(), (), version=4)
    assert edited.version == 4
    assert torch.equal(edited.edge_mask_LEE, make_graph().edge_mask_LEE)


@pytest.mark.parametrize("version", [2, 5])
def test_a_version_gap_is_refused(version: int) -> None:
    with pytest.raises(GraphError, match=f"at version 3, .* {version}; ask the server"):
        apply_edits(make_graph(), EDITS, version=version)


@pytest.mark.parametrize(
    "edits, message",
    [
        (
            (Edit(layer=0, src=2, dst=1, kind="prune"),),
            "2 -> 1 of layer 0 is not an edge",
        ),
        (
            (Edit(layer=2, src=0, dst=1, kind="prune"),),
            "of layer 2 is not an edge of 2",
        ),
        ((Edit(layer=-1, src=0, dst=1, kind="prune"),), "of layer -1 is not"),
        ((Edit(layer=0, src=0, dst=4, kind="promote"),), "0 -> 4 of layer 0 is not"),
        ((EDITS[0], replace(EDITS[0], kind="prune")), r"\(0, 0, 2\) occurs twice"),
        ((replace(EDITS[0], kind="spawn"),), "is 'spawn'; use one of"),
        (
            tuple(Edit(layer=1, src=e, dst=e, kind="prune") for e in range(4)),
            "layer 1 has no entry",
        ),
    ],
)
def test_edits_that_break_the_graph_are_refused(
    edits: tuple[Edit, ...], message: str
) -> None:
    graph = make_graph()
    with pytest.raises(GraphError, match=message):
        apply_edits(graph, edits, version=4)
    assert torch.equal(graph.edge_mask_LEE, make_graph().edge_mask_LEE)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(1, 3, 3), "must be bool, this one is torch.float32"),
        (torch.ones(3, 3, dtype=torch.bool), r"shape \(L, E, E\), got \(3, 3\)"),
        (torch.ones(1, 3, 4, dtype=torch.bool), r"got \(1, 3, 4\)"),
        (
            torch.ones(1, 3, 3, dtype=torch.bool),
            "edge 1 -> 0 of layer 0 points backwards",
        ),
        (torch.ones(2, 3, 3, dtype=torch.bool).triu(1), "layer 0 has no entry"),
    ],
)
def test_masks_that_are_no_graph_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        check_edge_mask(mask)


def test_an_order_that_is_no_permutation_is_refused() -> None:
    with pytest.raises(GraphError, match="every storage id"):
        replace(make_graph(), order_LE=torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]]))


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 10))
def test_the_initial_graph_has_entries_and_few_predecessors(
    seed: int, experts: int, degree: int
) -> None:
    source = generator(seed)
    counts = torch.randint(0, 4, (3, experts, experts), generator=source)
    counts = counts + counts.transpose(1, 2)
    graph = initial_graph(counts, chain_degree=degree)
    mask = graph.edge_mask_LEE
    assert graph.version == 0
    assert torch.equal(mask, mask.triu())
    assert bool(mask.diagonal(dim1=1, dim2=2).all())
    assert torch.equal(graph.order_LE, torch.arange(experts).repeat(3, 1))
    for counted, edges in zip(counts.triu(1), mask.triu(1)):
        for dst in range(experts):
            sources = edges[:, dst].nonzero().flatten().tolist()
            together = counted[:, dst].tolist()
            wanted = sorted(range(dst), key=lambda src: (-together[src], src))[:degree]
            assert set(sources) == {src for src in wanted if together[src] > 0}


def test_reachable_experts_follow_kept_edges() -> None:
    mask_EE = torch.zeros(5, 5, dtype=torch.bool)
    for src, dst in ((1, 1), (1, 3), (3, 4), (0, 2)):
        mask_EE[src, dst] = True
    assert reachable_experts(mask_EE).tolist() == [False, True, False, True, True]
    assert mask_EE[3, 3].item() is False, "the mask itself is not changed"
