"""The picture of a layer: places, weights and words."""

from __future__ import annotations

import numpy as np
import pytest

from samv2.report.graph_data import EdgeUse, GraphFacts, Trace, Visit
from samv2.report.layer_drawing import (
    HIGHEST,
    MOST_EDGES,
    curve,
    draw_layers,
    first_layer,
    places,
    walk_in_words,
)
from samv2.report.merge_data import Edit
from samv2.report.reading import Missing

ABSENT = Missing(what="", remedy="")
WALK = (
    Visit(expert=0, parent=None, depth=0),
    Visit(expert=2, parent=0, depth=1),
)


def facts(*, order: tuple[int, ...] = (0, 1, 2)) -> GraphFacts:
    """One layer of three experts, of which the first is shared."""
    count_LEE = np.array([[[6, 1, 2], [0, 1, 0], [0, 0, 0]]], dtype=float)
    kept_LEE = np.array([[[1, 0, 1], [0, 1, 1], [0, 0, 1]]], dtype=bool)
    return GraphFacts(
        layers=(12,),
        shared=1,
        trace=Trace(
            domains=("a", "b"),
            tokens=(4, 4),
            share_DLE=np.array([[[1.0, 0.25, 0.5]], [[1.0, 0.0, 1.0]]]),
            walks=((WALK,), (WALK[:1],)),
        ),
        edges=EdgeUse(
            walked_LEE=count_LEE / 10,
            count_LEE=count_LEE,
            kept_LEE=kept_LEE,
            order_LE=np.array([order]),
            origin="counted",
        ),
    )


def edit(src: int, dst: int, kind: str) -> Edit:
    return Edit(
        round=2, layer=0, src=src, dst=dst, kind=kind, score=1.0, reason="because"
    )


def test_nodes_and_arcs() -> None:
    edits = [edit(0, 1, "prune"), edit(0, 2, "promote"), edit(1, 2, "promote")]
    (layer,) = draw_layers(facts(), edits)
    assert layer.label == "layer 12" and layer.left_out == 0
    assert [node.label for node in layer.nodes] == ["0", "1", "2"]
    assert [node.shared for node in layer.nodes] == [True, False, False]
    radii = [node.radius for node in layer.nodes]
    assert radii[0] > radii[1] == radii[2]
    assert layer.nodes[1].tip == (
        "expert 1: 20.0 % of the visits, 10.0 % as the start of a walk"
    )
    assert "every token visits it" in layer.nodes[0].tip
    arcs = {arc.tip.partition(":")[0]: arc for arc in layer.arcs}
    assert list(arcs) == ["expert 1 → 2", "expert 0 → 1", "expert 0 → 2"]
    assert [arc.kind for arc in layer.arcs] == ["unused", "removed", "added"]
    assert arcs["expert 0 → 2"].tip.endswith(
        "20.0 % of the visits (2); added in round 2"
    )
    assert arcs["expert 0 → 1"].tip.endswith("removed in round 2")
    assert "never walked; added in round 2" in arcs["expert 1 → 2"].tip
    assert arcs["expert 0 → 2"].width > arcs["expert 0 → 1"].width
    assert arcs["expert 0 → 2"].top == -24 - HIGHEST
    assert layer.top < arcs["expert 0 → 2"].top and layer.bottom >= 45
    assert "2 walked edges; the busiest: expert 0 → 2, expert 0 → 1" in layer.alt


def test_walks_and_shares() -> None:
    (layer,) = draw_layers(facts(), [])
    first, second = layer.walks
    assert first.domain == "a" and first.words == "0, 0→2" and second.arcs == ()
    assert first.order == ((layer.nodes[0].x, 1), (layer.nodes[2].x, 2))
    assert first.arcs[0].tip == "expert 0 → 2, depth 1"
    assert layer.shares == (("a", (1.0, 0.25, 0.5)), ("b", (1.0, 0.0, 1.0)))
    assert walk_in_words(()) == ""


def test_experts_stand_at_their_positions() -> None:
    (layer,) = draw_layers(facts(order=(2, 0, 1)), [])
    assert [node.label for node in layer.nodes] == ["2", "0", "1"]
    assert layer.shares[0][1] == (0.5, 1.0, 0.25)
    assert layer.walks[0].order[0] == (layer.nodes[1].x, 1)
    assert {arc.tip.partition(":")[0] for arc in layer.arcs} == {
        "expert 2 → 0",
        "expert 2 → 1",
        "expert 0 → 1",
    }


def test_either_half_is_enough() -> None:
    whole = facts()
    only_trace = GraphFacts(layers=(), shared=0, trace=whole.trace, edges=ABSENT)
    (layer,) = draw_layers(only_trace, [])
    assert layer.label == "converted layer 0" and layer.arcs == ()
    assert len(layer.walks) == 2 and "not known" in layer.alt
    assert layer.nodes[0].radius > layer.nodes[1].radius
    only_edges = GraphFacts(layers=(), shared=0, trace=ABSENT, edges=whole.edges)
    (layer,) = draw_layers(only_edges, [])
    assert layer.walks == () and layer.shares == () and len(layer.arcs) == 3
    nothing = GraphFacts(layers=(), shared=0, trace=ABSENT, edges=ABSENT)
    assert draw_layers(nothing, []) == ()


@pytest.mark.parametrize("experts", [1, 64])
def test_few_and_many_experts(experts: int) -> None:
    walked_EE = np.triu(np.ones((experts, experts)))
    edges = EdgeUse(
        walked_LEE=walked_EE[None] / walked_EE.sum(),
        count_LEE=None,
        kept_LEE=None,
        order_LE=np.arange(experts)[None],
        origin="",
    )
    found = GraphFacts(layers=(0,), shared=0, trace=ABSENT, edges=edges)
    (layer,) = draw_layers(found, [])
    all_edges = experts * (experts - 1) // 2
    assert len(layer.arcs) == min(all_edges, MOST_EDGES)
    assert layer.left_out == all_edges - len(layer.arcs)
    gaps = np.diff(places(experts))
    assert all(24 <= gap <= 56 for gap in gaps)
    assert all(2 * node.radius < 56 for node in layer.nodes)


def test_a_curve_is_highest_in_its_middle() -> None:
    numbers = [float(x) for x in curve(0, 60, -30).replace("C", " ").split()[1:]]
    assert numbers == [0.0, 10.0, -40.0, 50.0, -40.0, 60.0, 0.0]
    middle = 0.75 * -40  # of a cubic whose ends are at 0
    assert middle == -30


def test_the_layer_shown_first() -> None:
    layers = draw_layers(facts(), []) * 1
    assert first_layer(layers, []) == 0
    assert first_layer(layers, [edit(0, 1, "prune")]) == 0
