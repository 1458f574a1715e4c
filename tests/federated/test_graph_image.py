"""The picture of a round's graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samv2.experts.graph import Edit
from samv2.federated.graph_image import (
    HEIGHT,
    KEPT,
    MAPS,
    PROMOTED,
    PRUNED,
    WIDTH,
    draw_graph,
    edge_colours,
    grid_of,
)
from tests.federated.runs import EXPERTS, LAYERS, toy_counts, toy_graph


@pytest.mark.parametrize("layers", [1, 2, 30, 80])
@pytest.mark.parametrize("experts", [2, 16, 100, 300])
def test_maps_fit_the_picture(layers: int, experts: int) -> None:
    columns, side = grid_of(layers, experts)
    assert side > 0 and columns * side <= MAPS[2]
    assert -(-layers // columns) * side <= MAPS[3]
    assert side < experts or side % experts == 0


def test_a_colour_says_what_became_of_an_edge() -> None:
    kept_LEE = toy_graph().edge_mask_LEE.numpy()
    used_LEE = np.zeros((LAYERS, EXPERTS, EXPERTS))
    used_LEE[0, 0, 1], used_LEE[0, 1, 3], used_LEE[1, 0, 0] = 1, 1000, 5
    edits = [
        Edit(layer=1, src=0, dst=1, kind="prune"),
        Edit(layer=1, src=2, dst=3, kind="promote"),
    ]
    colours = edge_colours(used_LEE, kept_LEE, edits)
    assert colours[0, 1, 3].sum() < colours[0, 0, 1].sum()  # walked more: darker
    assert np.array_equal(colours[0, 1, 3], colours[1, 0, 0])  # each layer by itself
    assert np.array_equal(colours[0, 2, 2], KEPT)
    assert np.array_equal(colours[1, 0, 1], PRUNED)
    assert np.array_equal(colours[1, 2, 3], PROMOTED)
    assert (colours[:, 3, 0] == 1).all()


def test_the_picture_has_its_size_and_changes_with_the_walks() -> None:
    graph = toy_graph()
    usage_LEE = toy_counts(1).usage_LEE
    first = draw_graph(usage_LEE, graph, [], round=1)
    assert first.shape == (HEIGHT, WIDTH, 3) and first.dtype == np.uint8
    assert np.array_equal(first, draw_graph(usage_LEE, graph, [], round=1))
    usage_LEE = usage_LEE.clone()
    usage_LEE[1, 0, 3] += 500
    second = draw_graph(usage_LEE, graph, [], round=1)
    left, right = np.split((first != second).any(axis=2), [MAPS[0] + MAPS[2]], axis=1)
    assert left.any() and right.any()


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (3, 40), (12, 200)])
def test_odd_sizes_are_drawn(layers: int, experts: int) -> None:
    mask_EE = torch.eye(experts, dtype=torch.bool)
    graph = type(toy_graph())(
        edge_mask_LEE=mask_EE.repeat(layers, 1, 1),
        order_LE=torch.arange(experts).repeat(layers, 1),
    )
    usage_LEE = torch.ones(layers, experts, experts, dtype=torch.long).triu()
    pixels = draw_graph(usage_LEE, graph, [], round=2)
    assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.std() > 10
    entries_LEE = torch.eye(experts, dtype=torch.long).repeat(layers, 1, 1)
    assert draw_graph(entries_LEE, graph, [], round=2).std() > 1
