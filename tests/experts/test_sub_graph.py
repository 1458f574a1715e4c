"""Parts of an expert graph: ids, blocks, graphs and counts, inward and outward."""

from __future__ import annotations

import pytest
import torch

from samv2.common.errors import GraphError
from samv2.experts.graph import ExpertGraph
from samv2.experts.sub_graph import SubGraph

PART = SubGraph(kept=((0, 2, 3), (0, 1, 4)), num_experts=5, experts_per_token=2)
L, E, P = 2, 5, 3


def graph(order: list[int] | None = None) -> ExpertGraph:
    mask = torch.eye(E, dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = mask[2, 4] = True
    placed = torch.tensor(order or list(range(E)))
    return ExpertGraph(
        edge_mask_LEE=mask.repeat(L, 1, 1), order_LE=placed.repeat(L, 1), version=3
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"kept": ((0, 1), (0,))},
        {"kept": ((1, 0), (0, 1))},
        {"kept": ((0, 5), (0, 1))},
        {"kept": ((-1, 0), (0, 1))},
        {"kept": ((), ())},
        {"experts_per_token": 4},
        {"experts_per_token": 0},
        {"micro_batch": -1},
    ],
)
def test_a_part_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    values = {"kept": PART.kept, "num_experts": E, "experts_per_token": 2}
    with pytest.raises(GraphError):
        SubGraph(**(values | changes))


def test_a_part_travels_as_text() -> None:
    assert SubGraph.from_json(PART.to_json()) == PART
    assert not PART.whole and PART.size == P
    for text in ("", "[]", "{}", '{"kept": 3}', PART.to_json().replace("kept", "x")):
        with pytest.raises(GraphError):
            SubGraph.from_json(text)
    with pytest.raises(GraphError, match="cannot be read"):
        SubGraph.from_json("[" * 100_000)


def test_ids_of_blocks_are_the_wholes() -> None:
    ids = PART.block_ids(2)
    assert [ids[i] for i in range(6)] == [0, 2, 3, 5, 6, 9]
    assert ids[6] == 10  # the assembler
    assert [ids[i] for i in range(7, 13)] == [11, 13, 14, 16, 17, 20]
    assert ids[13] == 21  # the siblings' gate
    assert len(ids) == 14 and set(PART.block_ids(1)) == set(range(7))


def test_blocks_come_back_as_they_went() -> None:
    """Blocks of 2 numbers and E strengths; sibling 1's of 2 numbers."""
    generator = torch.Generator().manual_seed(0)
    sizes = {i: 2 + E for i in range(10)} | {10: 4} | {i: 2 for i in range(11, 21)}
    blocks = {
        key: torch.randn(size, generator=generator) for key, size in sizes.items()
    }
    blocks[21] = torch.randn(7, generator=generator)
    inside = PART.inward(blocks, 2)
    assert inside.keys() == PART.block_ids(2).keys()
    assert torch.equal(inside[1][:2], blocks[2][:2])
    assert torch.equal(inside[1][2:], blocks[2][2:][[0, 2, 3]])
    assert torch.equal(inside[5][2:], blocks[9][2:][[0, 1, 4]])
    outside = PART.outward(inside, 2)
    assert outside.keys() == set(PART.block_ids(2).values())
    for key, block in outside.items():
        expected = blocks[key].clone()
        if key < 10:
            dropped = [e for e in range(E) if e not in PART.kept[key // E]]
            expected[[2 + e for e in dropped]] = 0
        assert torch.equal(block, expected)
    assert PART.inward({1: blocks[1]}, 2) == {}


def test_the_graph_is_that_between_kept_experts() -> None:
    inner = PART.graph(graph())
    assert inner.version == 3
    assert inner.order_LE.tolist() == [[0, 1, 2], [0, 1, 2]]
    first, second = inner.edge_mask_LEE
    assert first.tolist() == torch.eye(3, dtype=torch.bool).tolist()
    assert second[0, 1] and not second[1, 2]
    moved = PART.graph(graph([4, 0, 3, 1, 2]))
    assert moved.order_LE.tolist() == [[0, 2, 1], [2, 0, 1]]
    assert PART.positions(graph([4, 0, 3, 1, 2]), 0).tolist() == [1, 2, 4]


def test_a_layer_without_an_entry_opens_all() -> None:
    closed = graph()
    closed.edge_mask_LEE[0].fill_diagonal_(False)[1, 1] = True
    inner = PART.graph(closed)
    assert bool(inner.edge_mask_LEE[0].diagonal().all())


def test_counts_stand_in_the_positions_of_the_whole() -> None:
    counts = torch.arange(1, 1 + L * P * P).view(L, P, P).triu()
    whole = graph([4, 0, 3, 1, 2])
    wide = PART.widen_counts(counts, whole)
    assert wide.shape == (L, E, E) and int(wide.sum()) == int(counts.sum())
    assert wide[0, 1, 2] == counts[0, 0, 1] and wide[1, 0, 3] == counts[1, 0, 2]
    assert torch.equal(wide, wide.triu())
