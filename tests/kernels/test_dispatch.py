"""Visits sorted by (expert, slot) and their tiles, against their definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2_kernels.dispatch import VisitOrder, sort_visits, tile_table
from samv2_kernels.reference.dispatch import num_tiles
from tests.helpers import generator


def random_ids(tokens: int, slots: int, experts: int, seed: int, used: float) -> Tensor:
    """(T, K) ids; a share of visits is unused, anywhere."""
    source = generator(seed)
    ids_TK = torch.randint(experts, (tokens, slots), generator=source)
    unused_TK = torch.rand(tokens, slots, generator=source) >= used
    return ids_TK.masked_fill(unused_TK, -1)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Ids and E, from empty to all on one expert."""
    tokens = draw(st.sampled_from((0, 1, 2, 15, 16, 17, 33)))
    slots = draw(st.integers(1, 4))
    experts = draw(st.sampled_from((1, 2, 5, 16, 65)))
    used = draw(st.sampled_from((0.0, 0.5, 1.0)))
    top = draw(st.sampled_from((1, experts)))
    return random_ids(tokens, slots, top, draw(st.integers(0, 2**31)), used), experts


def rows_of(order: VisitOrder, first: int, stop: int) -> list[int]:
    """Visits of the groups ``first`` to ``stop``, exclusive."""
    bounds = order.offsets.tolist()
    return order.order_N[bounds[first] : bounds[stop]].tolist()


@given(routings())
def test_order_is_by_expert_then_slot_then_token(routing: tuple[Tensor, int]) -> None:
    ids_TK, experts = routing
    slots = ids_TK.shape[1]
    order = sort_visits(ids_TK, experts)
    assert order.order_N.dtype == order.offsets.dtype == torch.int32
    assert len(order.offsets) == experts * slots + 1 and order.offsets[0] == 0
    flat = ids_TK.flatten().tolist()
    for expert in range(experts):
        for slot in range(slots):
            group = expert * slots + slot
            expected = [
                visit
                for visit, owner in enumerate(flat)
                if owner == expert and visit % slots == slot
            ]
            assert rows_of(order, group, group + 1) == expected
    used = int(order.offsets[-1])
    unused = [visit for visit, owner in enumerate(flat) if owner < 0]
    assert order.order_N[used:].tolist() == unused
    assert used == len(flat) - len(unused)


@given(routings(), st.sampled_from((1, 3, 16, 64)), st.booleans())
def test_tiles_cover_every_visit_once_and_cross_nothing(
    routing: tuple[Tensor, int], rows_per_tile: int, by_slot: bool
) -> None:
    ids_TK, experts = routing
    tokens, slots = ids_TK.shape
    order = sort_visits(ids_TK, experts)
    shape = dict(num_experts=experts, slots=slots, tokens=tokens)
    tiles = tile_table(
        order.offsets, **shape, rows_per_tile=rows_per_tile, by_slot=by_slot
    )
    rows = tokens if by_slot else tokens * slots
    assert tiles.dtype == torch.int32
    assert tiles.shape == (
        slots if by_slot else 1,
        -(-rows // rows_per_tile) + experts,
        3,
    )
    for scope, entries in enumerate(tiles.tolist()):
        used = [entry for entry in entries if entry[0] >= 0]
        assert entries[: len(used)] == used, "padding is last"
        assert all(entry[0] == -1 for entry in entries[len(used) :])
        covered: dict[int, list[int]] = {expert: [] for expert in range(experts)}
        for expert, first, stop in used:
            assert 0 < stop - first <= rows_per_tile
            covered[expert] += order.order_N[first:stop].tolist()
        assert [entry[0] for entry in used] == sorted(entry[0] for entry in used)
        for expert, visits in covered.items():
            group = expert * slots
            stop = group + slots
            if by_slot:
                group, stop = group + scope, group + scope + 1
            assert visits == rows_of(order, group, stop)
            assert sum(entry[0] == expert for entry in used) == (
                -(-len(visits) // rows_per_tile)
            )


def test_every_routing_fits_the_table() -> None:
    """One row too many in every expert is the worst case."""
    for experts, rows_per_tile in ((1, 1), (3, 4), (16, 16)):
        counts = [rows_per_tile + 1] * experts
        tokens = sum(counts)
        needed = sum(-(-count // rows_per_tile) for count in counts)
        assert num_tiles(experts, 1, tokens, rows_per_tile, True) >= needed


@given(routings(), st.integers(0, 2**31))
def test_the_set_of_a_group_does_not_depend_on_the_order_of_tokens(
    routing: tuple[Tensor, int], seed: int
) -> None:
    ids_TK, experts = routing
    tokens, slots = ids_TK.shape
    moved_T = torch.randperm(tokens, generator=generator(seed))
    whole = sort_visits(ids_TK, experts)
    other = sort_visits(ids_TK[moved_T], experts)
    assert torch.equal(whole.offsets, other.offsets)
    for group in range(experts * slots):
        found = {
            (int(moved_T[visit // slots]), visit % slots)
            for visit in rows_of(other, group, group + 1)
        }
        expected = {
            (visit // slots, visit % slots)
            for visit in rows_of(whole, group, group + 1)
        }
        assert found == expected


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1)])
def test_refuses_ids_that_are_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(.*\); it must be \(T, K\)"):
        sort_visits(torch.zeros(shape, dtype=torch.long), 4)


def test_refuses_no_experts() -> None:
    with pytest.raises(ValueError, match="num_experts is 0"):
        sort_visits(torch.zeros((2, 1), dtype=torch.long), 0)


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_the_op_passes_opcheck(tokens: int) -> None:
    ids_TK = random_ids(tokens, 2, 5, 0, 0.7)
    torch.library.opcheck(torch.ops.samv2.sort_visits.default, (ids_TK, 5))


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


def test_dispatch_compiles_as_one_graph_for_every_number_of_tokens() -> None:
    def both(ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        order = sort_visits(ids_TK, 5)
        return order.order_N, tile_table(
            order.offsets,
            num_experts=5,
            slots=2,
            tokens=len(ids_TK),
            rows_per_tile=4,
            by_slot=True,
        )

    graph = compiled(both)
    for tokens in (17, 9):
        ids_TK = random_ids(tokens, 2, 5, tokens, 0.7)
        for found, expected in zip(graph(ids_TK), both(ids_TK), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("by_slot", [False, True])
def test_nothing_waits_for_the_device(by_slot: bool) -> None:
    """Tensors without data: whatever asks for a value raises."""
    from samv2_kernels.reference.dispatch import sort_visits as twin

    ids_TK = torch.empty((9, 2), dtype=torch.long, device="meta")
    order_N, offsets = twin(ids_TK, 4)
    shape = dict(num_experts=4, slots=2, tokens=9, rows_per_tile=4, by_slot=by_slot)
    tiles = tile_table(offsets, **shape)
    assert order_N.shape == (18,) and tiles.device.type == "meta"


@pytest.mark.parametrize(
    "ids_TK, complaint",
    [
        (torch.zeros(3, 2), "is torch.float32; it must hold integers"),
        (
            torch.tensor([[0, 4]]),
            r"has ids 0..4; with 4 experts they must lie in -1..3",
        ),
        (torch.tensor([[-2, 1]]), r"has ids -2..1; with 4 experts"),
    ],
)
def test_ids_that_are_no_experts_are_refused(ids_TK: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        sort_visits(ids_TK, 4)


def test_tables_of_impossible_tiles_are_refused() -> None:
    shape = dict(num_experts=4, slots=2, tokens=3, by_slot=True)
    offsets = sort_visits(torch.zeros(3, 2, dtype=torch.long), 4).offsets
    with pytest.raises(ValueError, match="rows_per_tile is 0, it must be at least 1"):
        tile_table(offsets, rows_per_tile=0, **shape)
    with pytest.raises(ValueError, match=r"offsets has shape \(8,\); 4 experts and 2"):
        tile_table(offsets[1:], rows_per_tile=4, **shape)
