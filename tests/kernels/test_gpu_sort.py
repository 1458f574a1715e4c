"""The sorting kernels and the tile table, run by the interpreter, against their twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from samv2_kernels.audit import audit_specs
from samv2_kernels.gpu import sort
from samv2_kernels.gpu.sort import sort_visits_gpu, tile_table_gpu
from samv2_kernels.reference.dispatch import sort_visits, tile_table
from tests.kernels.guarded import guarded
from tests.kernels.test_dispatch import random_ids

RAGGED = (0, 1, 15, 16, 17, 63, 64, 65)
PATHS = {"ranked": {}, "chunked": {"ranked_visits": 0, "chunk_tokens": 32}}
"""One launch, or three with several chunks."""
LARGE_CHUNKS = {"ranked_visits": 0, "chunk_tokens": 64}
"""Above 64 experts, a chunk's tokens do not fit one block of (row, expert) pairs."""


def check_sort(
    ids_TK: Tensor, experts: int, path: str | None, poison: int = 7
) -> Tensor:
    """Compare with the twin; returns the offsets."""
    order_N, offsets = sort_visits(ids_TK, experts)
    how = LARGE_CHUNKS if path is None else PATHS[path]
    with guarded(poison):
        found = sort_visits_gpu(ids_TK, experts, **how)
    for actual, expected in zip(found, (order_N, offsets), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    return offsets


def check_tiles(
    offsets: Tensor, ids_TK: Tensor, experts: int, rows: int, by_slot: bool
) -> None:
    tokens, slots = ids_TK.shape
    shape = dict(num_experts=experts, slots=slots, tokens=tokens, rows_per_tile=rows)
    with guarded(7):
        found = tile_table_gpu(offsets, **shape, by_slot=by_slot)
    assert torch.equal(found, tile_table(offsets, **shape, by_slot=by_slot))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("experts", [1, 16, 64, 65])
def test_agrees_with_the_twin_at_ragged_sizes(experts: int, path: str) -> None:
    for number, tokens in enumerate(RAGGED):
        slots = 1 + number % 4
        ids_TK = random_ids(tokens, slots, experts, number, 0.8)
        offsets = check_sort(ids_TK, experts, path)
        for by_slot in (False, True):
            check_tiles(offsets, ids_TK, experts, (1, 16, 64)[number % 3], by_slot)


@pytest.mark.parametrize("path", PATHS)
def test_all_on_one_expert_and_none_at_all(path: str) -> None:
    for expert in (-1, 0, 6, 15):
        ids_TK = torch.full((65, 3), expert)
        offsets = check_sort(ids_TK, 16, path)
        for by_slot in (False, True):
            check_tiles(offsets, ids_TK, 16, 16, by_slot)


@pytest.mark.parametrize("path", PATHS)
def test_every_element_is_written(path: str) -> None:
    ids_TK = random_ids(65, 3, 17, 0, 0.6)
    for poison in (0, -1, 2**31 - 1):
        offsets = check_sort(ids_TK, 17, path, poison)
        with guarded(poison):
            shape = dict(num_experts=17, slots=3, tokens=65, rows_per_tile=16)
            tiles = tile_table_gpu(offsets, **shape, by_slot=True)
        assert torch.equal(tiles, tile_table(offsets, **shape, by_slot=True))


@pytest.mark.parametrize("tokens", [33, 65, 130])
def test_a_chunk_may_take_several_blocks(tokens: int) -> None:
    assert sort._pair_block(65, 64)[1] < LARGE_CHUNKS["chunk_tokens"]
    check_sort(random_ids(tokens, 2, 65, 0, 0.8), 65, None)
    check_sort(torch.full((tokens, 2), 64), 65, None)


def test_more_groups_than_a_scan_block() -> None:
    """E K = 3840 groups, as the largest walk that is compiled has."""
    ids_TK = random_ids(40, 30, 128, 0, 0.9)
    assert 128 * 30 > sort.SCAN_BLOCK and 40 * 30 > sort.RANKED_VISITS
    offsets = check_sort(ids_TK, 128, "chunked")
    check_tiles(offsets, ids_TK, 128, 16, False)


def test_many_visits_take_the_chunked_path_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    for name in ("_rank", "_chunked"):
        monkeypatch.setattr(
            sort, name, lambda *arguments, name=name: taken.append(name)
        )
    for visits in (sort.RANKED_VISITS, sort.RANKED_VISITS + 1):
        sort_visits_gpu(torch.zeros((visits, 1), dtype=torch.long), 4)
    assert taken == ["_rank", "_chunked"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_may_be_strided_and_of_any_integer_type(dtype: torch.dtype) -> None:
    ids_TK = random_ids(2, 33, 5, 0, 0.8).T.to(dtype)
    assert not ids_TK.is_contiguous()
    for path in PATHS:
        check_sort(ids_TK, 5, path)


def test_both_paths_agree_on_a_batch_and_on_its_halves() -> None:
    """The halves' groups, one after the other, are those of the batch."""
    ids_TK = random_ids(64, 2, 16, 1, 0.8)
    whole_N, bounds = sort_visits_gpu(ids_TK, 16)
    parts = [sort_visits_gpu(half, 16, **PATHS["chunked"]) for half in ids_TK.split(32)]
    for group in range(16 * 2):
        joined = [
            part_N[offsets[group] : offsets[group + 1]] + 64 * number
            for number, (part_N, offsets) in enumerate(parts)
        ]
        assert torch.equal(
            whole_N[bounds[group] : bounds[group + 1]], torch.cat(joined)
        )


def test_compiles_without_spills() -> None:
    for row in audit_specs(sort.audited("sm_86"), "sm_86", jobs=1):
        assert row.spill_bytes == 0, row.config
        assert row.shared_bytes <= 99 * 1024, row.config
        assert row.direction == "route" and row.weights == "none"
