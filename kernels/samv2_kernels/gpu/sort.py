"""Dispatch on the device: visits sorted by (expert, slot), and the padded tile table.

A stable counting sort. A visit's place is the number of visits with a smaller key plus
the number of earlier visits with its own, so no atomics are needed and the order is the
same on every run. Few visits are ranked in one launch by comparing all pairs. More are
cut into chunks of tokens: count every chunk's visits of every (expert, slot), scan the
counts in sorted order, place. As a chunk of one slot holds E different keys at most,
memory stays O(N) however many groups there are.

Shapes: T tokens, E experts, K slots, N = T K visits, G = E K groups, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from samv2_kernels.gpu.device import on_its_device
from samv2_kernels.gpu.spec import KernelSpec
from samv2_kernels.reference.dispatch import num_tiles

RANKED_VISITS = 1024
"""Up to so many visits are sorted in one launch."""
CHUNK_TOKENS = 256
"""Tokens a chunk."""
RANK_BLOCK = 64
"""Visits, and groups, that one program of the ranking kernel places."""
COMPARE_BLOCK = 64
"""Visits that it compares them with at a time."""
SCAN_BLOCK = 1024
"""Counts that the scan reads at a time."""
PAIRS = 4096
"""Largest block of (row, expert) pairs that a program of 4 warps holds."""


@triton.jit
def _keys(ids_ptr, visit, visits, groups, slots):
    """Keys of a block of visits; ``groups`` if unused, one more past the end."""
    expert = tl.load(ids_ptr + visit, mask=visit < visits, other=-1).to(tl.int32)
    key = tl.where(expert < 0, groups, expert * slots + visit % slots)
    return tl.where(visit < visits, key, groups + 1)


@triton.jit(do_not_specialize=["visits", "groups", "slots"])
def _rank_kernel(
    ids_ptr,
    order_ptr,
    offsets_ptr,
    visits,
    groups,
    slots,
    BLOCK: tl.constexpr,
    COMPARE: tl.constexpr,
):
    """Place a block of visits, and count the visits below a block of groups."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own_key = _keys(ids_ptr, own, visits, groups, slots)
    place = tl.zeros([BLOCK], tl.int32)
    below = tl.zeros([BLOCK], tl.int32)
    for first in range(0, visits, COMPARE):
        other = first + tl.arange(0, COMPARE)
        key = _keys(ids_ptr, other, visits, groups, slots)
        tied = (key[None, :] == own_key[:, None]) & (other[None, :] < own[:, None])
        before = tied | (key[None, :] < own_key[:, None])
        place += tl.sum(before.to(tl.int32), axis=1)
        below += tl.sum((key[None, :] < own[:, None]).to(tl.int32), axis=1)
    tl.store(order_ptr + place, own, mask=own < visits)
    tl.store(offsets_ptr + own, below, mask=own <= groups)


@triton.jit(do_not_specialize=["tokens", "experts", "slots", "chunks"])
def _count_kernel(
    ids_ptr,
    counts_ptr,
    tokens,
    experts,
    slots,
    chunks,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Count a chunk's visits of one slot by expert; the last program row, unused ones."""
    chunk = tl.program_id(0)
    slot = tl.program_id(1)
    if slot < slots:
        expert = tl.arange(0, BLOCK_E)
        count = tl.zeros([BLOCK_E], tl.int32)
        for first in range(0, CHUNK, ROWS):
            token = chunk * CHUNK + first + tl.arange(0, ROWS)
            ids = tl.load(
                ids_ptr + token * slots + slot, mask=token < tokens, other=-1
            ).to(tl.int32)
            hits = (ids[:, None] == expert[None, :]).to(tl.int32)
            count += tl.sum(hits, axis=0)
        group = expert * slots + slot
        tl.store(counts_ptr + group * chunks + chunk, count, mask=expert < experts)
    else:
        unused = 0
        stop = tl.minimum((chunk + 1) * CHUNK, tokens) * slots
        for first in range(chunk * CHUNK * slots, stop, CHUNK):
            visit = first + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + visit, mask=visit < stop, other=0)
            unused += tl.sum((ids < 0).to(tl.int32), axis=0)
        tl.store(counts_ptr + experts * slots * chunks + chunk, unused)


@triton.jit(do_not_specialize=["groups", "chunks"])
def _scan_kernel(counts_ptr, offsets_ptr, groups, chunks, BLOCK: tl.constexpr):
    """Turn counts into first places, in place, and keep those of each group's chunk 0."""
    size = (groups + 1) * chunks
    total = 0
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + index, mask=index < size, other=0)
        place = total + tl.cumsum(count, axis=0) - count
        total += tl.sum(count, axis=0)
        tl.store(counts_ptr + index, place, mask=index < size)
        leads = (index < size) & (index % chunks == 0)
        tl.store(offsets_ptr + index // chunks, place, mask=leads)


@triton.jit(do_not_specialize=["tokens", "experts", "slots", "chunks"])
def _place_kernel(
    ids_ptr,
    places_ptr,
    order_ptr,
    tokens,
    experts,
    slots,
    chunks,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write the visits that :func:`_count_kernel` counted to their places."""
    chunk = tl.program_id(0)
    slot = tl.program_id(1)
    if slot < slots:
        expert = tl.arange(0, BLOCK_E)
        group = expert * slots + slot
        place_E = tl.load(
            places_ptr + group * chunks + chunk, mask=expert < experts, other=0
        )
        for first in range(0, CHUNK, ROWS):
            token = chunk * CHUNK + first + tl.arange(0, ROWS)
            visit = token * slots + slot
            ids = tl.load(ids_ptr + visit, mask=token < tokens, other=-1).to(tl.int32)
            hits = (ids[:, None] == expert[None, :]).to(tl.int32)
            before = place_E[None, :] + tl.cumsum(hits, axis=0) - hits
            place = tl.sum(before * hits, axis=1)
            tl.store(order_ptr + place, visit, mask=ids >= 0)
            place_E += tl.sum(hits, axis=0)
    else:
        place = tl.load(places_ptr + experts * slots * chunks + chunk)
        stop = tl.minimum((chunk + 1) * CHUNK, tokens) * slots
        for first in range(chunk * CHUNK * slots, stop, CHUNK):
            visit = first + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + visit, mask=visit < stop, other=0)
            unused = (ids < 0).to(tl.int32)
            at = place + tl.cumsum(unused, axis=0) - unused
            tl.store(order_ptr + at, visit, mask=unused > 0)
            place += tl.sum(unused, axis=0)


@triton.jit(do_not_specialize=["length", "experts", "group_step"])
def _tile_kernel(
    offsets_ptr,
    tiles_ptr,
    length,
    experts,
    slots,
    group_step,
    rows_per_tile,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Entries of a block of tiles, found by comparing with every expert's last tile."""
    scope = tl.program_id(0)
    index = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    expert = tl.arange(0, BLOCK_E)
    group = expert * slots + scope
    real = expert < experts
    first_E = tl.load(offsets_ptr + group, mask=real, other=0)
    stop_E = tl.load(offsets_ptr + group + group_step, mask=real, other=0)
    tiles_E = (stop_E - first_E + rows_per_tile - 1) // rows_per_tile
    end_E = tl.cumsum(tiles_E, axis=0)

    done = (end_E[None, :] <= index[:, None]) & real[None, :]
    owner = tl.sum(done.to(tl.int32), axis=1)
    mine = (expert[None, :] == owner[:, None]).to(tl.int32)
    inside = index - tl.sum(mine * (end_E - tiles_E)[None, :], axis=1)
    start = tl.sum(mine * first_E[None, :], axis=1) + inside * rows_per_tile
    stop = tl.sum(mine * stop_E[None, :], axis=1)
    stop = tl.minimum(start + rows_per_tile, stop)

    used = owner < experts
    entry_ptr = tiles_ptr + (scope * length + index) * 3
    inside_table = index < length
    tl.store(entry_ptr, tl.where(used, owner, -1), mask=inside_table)
    tl.store(entry_ptr + 1, tl.where(used, start, 0), mask=inside_table)
    tl.store(entry_ptr + 2, tl.where(used, stop, 0), mask=inside_table)


@on_its_device
def sort_visits_gpu(
    expert_ids_TK: Tensor,
    num_experts: int,
    *,
    ranked_visits: int = RANKED_VISITS,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Launch the sort: one kernel for few visits, three for many.

    Args:
        expert_ids_TK: (T, K) integer experts, or -1 for an unused visit.
        num_experts: E.
        ranked_visits: up to so many visits take one launch.
        chunk_tokens: tokens a chunk otherwise, a power of two.

    Returns:
        (N,) int32 order and (E K + 1,) int32 offsets, as
        ``samv2_kernels.reference.dispatch.sort_visits``.
    """
    tokens, slots = expert_ids_TK.shape
    ids = expert_ids_TK.contiguous()
    order_N = ids.new_empty(tokens * slots, dtype=torch.int32)
    offsets = ids.new_empty(num_experts * slots + 1, dtype=torch.int32)
    if tokens * slots <= ranked_visits:
        _rank(ids, order_N, offsets)
    else:
        _chunked(ids, order_N, offsets, num_experts, chunk_tokens)
    return order_N, offsets


def _rank(ids_TK: Tensor, order_N: Tensor, offsets: Tensor) -> None:
    groups = len(offsets) - 1
    programs = triton.cdiv(max(len(order_N), groups + 1), RANK_BLOCK)
    _rank_kernel[(programs,)](
        ids_TK,
        order_N,
        offsets,
        len(order_N),
        groups,
        ids_TK.shape[1],
        BLOCK=RANK_BLOCK,
        COMPARE=COMPARE_BLOCK,
    )


def _chunked(
    ids_TK: Tensor, order_N: Tensor, offsets: Tensor, num_experts: int, chunk: int
) -> None:
    tokens, slots = ids_TK.shape
    chunks = triton.cdiv(tokens, chunk)
    places = offsets.new_empty(len(offsets) * chunks)
    block_e, rows = _pair_block(num_experts, chunk)
    sizes = (tokens, num_experts, slots, chunks)
    grid = (chunks, slots + 1)
    blocks = {"CHUNK": chunk, "ROWS": rows, "BLOCK_E": block_e}
    _count_kernel[grid](ids_TK, places, *sizes, **blocks)
    _scan_kernel[(1,)](places, offsets, len(offsets) - 1, chunks, BLOCK=SCAN_BLOCK)
    _place_kernel[grid](ids_TK, places, order_N, *sizes, **blocks)


@on_its_device
def tile_table_gpu(
    offsets: Tensor,
    *,
    num_experts: int,
    slots: int,
    tokens: int,
    rows_per_tile: int,
    by_slot: bool,
) -> Tensor:
    """Launch the tile table: one kernel; see ``samv2_kernels.tile_table``."""
    scopes = slots if by_slot else 1
    length = num_tiles(num_experts, slots, tokens, rows_per_tile, by_slot)
    tiles_SL3 = offsets.new_empty((scopes, length, 3), dtype=torch.int32)
    block_e, block_l = _pair_block(num_experts, 128)
    _tile_kernel[(scopes, triton.cdiv(length, block_l))](
        offsets,
        tiles_SL3,
        length,
        num_experts,
        slots,
        slots // scopes,
        rows_per_tile,
        BLOCK_L=block_l,
        BLOCK_E=block_e,
    )
    return tiles_SL3


def _pair_block(num_experts: int, most_rows: int) -> tuple[int, int]:
    """Powers of two: experts, and rows to compare with them at a time."""
    block_e = triton.next_power_of_2(num_experts)
    return block_e, min(most_rows, max(1, PAIRS // block_e))


AUDITED_EXPERTS = (16, 64, 128)


def audited(arch: str) -> list[KernelSpec]:
    """What ships on ``arch``; the same everywhere."""
    del arch
    specs = [
        _spec(
            "sort_rank",
            f"{RANK_BLOCK} visits x {COMPARE_BLOCK}",
            _rank_kernel,
            {"ids_ptr": "*i64", "order_ptr": "*i32", "offsets_ptr": "*i32"},
            {"BLOCK": RANK_BLOCK, "COMPARE": COMPARE_BLOCK},
            RANK_BLOCK,
        ),
        _spec(
            "sort_scan",
            f"{SCAN_BLOCK} counts",
            _scan_kernel,
            {"counts_ptr": "*i32", "offsets_ptr": "*i32"},
            {"BLOCK": SCAN_BLOCK},
            1,
        ),
    ]
    for experts in AUDITED_EXPERTS:
        block_e, rows = _pair_block(experts, CHUNK_TOKENS)
        blocks = {"CHUNK": CHUNK_TOKENS, "ROWS": rows, "BLOCK_E": block_e}
        config = f"{CHUNK_TOKENS} tokens, E {block_e}"
        pointers = {"ids_ptr": "*i64", "counts_ptr": "*i32"}
        specs.append(
            _spec("sort_count", config, _count_kernel, pointers, blocks, CHUNK_TOKENS)
        )
        pointers = {"ids_ptr": "*i64", "places_ptr": "*i32", "order_ptr": "*i32"}
        specs.append(
            _spec("sort_place", config, _place_kernel, pointers, blocks, CHUNK_TOKENS)
        )
        block_e, block_l = _pair_block(experts, 128)
        specs.append(
            _spec(
                "tile_table",
                f"{block_l} tiles, E {block_e}",
                _tile_kernel,
                {"offsets_ptr": "*i32", "tiles_ptr": "*i32"},
                {"BLOCK_L": block_l, "BLOCK_E": block_e},
                block_l,
            )
        )
    return specs


def _spec(
    kernel: str,
    config: str,
    function: triton.JITFunction,
    pointers: dict[str, str],
    constexprs: dict[str, int],
    rows: int,
) -> KernelSpec:
    """A spec with Triton's own launch defaults, whose scalars are all int32."""
    scalars = [
        name
        for name in function.arg_names
        if name not in pointers and name not in constexprs
    ]
    return KernelSpec(
        kernel=kernel,
        config=f"{config} w4",
        function=function,
        signature=pointers | dict.fromkeys(scalars, "i32"),
        constexprs=constexprs,
        rows_per_tile=rows,
        weights="none",
        direction="route",
    )
