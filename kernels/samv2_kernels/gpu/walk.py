"""The walk as one kernel: top-K choice, reachability sweep, completion and pre-order.

A program takes a few tokens through the definition in ``samv2_kernels.reference.walk``:

    r_j = q_j (1 - (1 - A_jj) prod_{i<j} (1 - r_i A_ij))

Sets are 0/1 vectors over the experts; a row of the edge mask is a bit set of 64 experts a
word, so that "continue from i" is one load. Edges only lead to higher indices, so taking
the lowest pending expert each time sweeps in index order, and K steps suffice.

The pre-order needs no stack. An expert remembers the last visited node that it is a child
of (its origin). A node leaves the branch only when all its children are visited, so the
origin of an unvisited expert is on the branch; the next expert is the best-scoring one of
the latest origin.

Shapes: T tokens, E experts, K visits a token, M masks, W words of 64 experts; in the
kernel a program's tokens are axis 0 and experts axis 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from samv2_kernels.gpu.device import on_its_device
from samv2_kernels.gpu.spec import KernelSpec

WORD_BITS = 64
"""Experts a word of a packed mask row."""
MOST_EXPERTS = 256
"""Keys of 8 bits an expert, 8 bits a rank and 9 bits an origin fit an int32."""
BLOCK_ELEMENTS = 32
"""(token, expert) pairs that a program holds at least: one a lane."""
RIVALS_TOGETHER = 4
"""Scores that are loaded at a time to rank an expert, to overlap their latency."""


class WalkTensors(NamedTuple):
    """What the kernel writes."""

    expert_ids_TK: Tensor
    """int64 visits in pre-order, -1 where unused."""
    parent_slot_TK: Tensor
    """int64 slot of the tree parent, -1 for an entry or an unused slot."""
    depth_TK: Tensor
    """int64, -1 where unused."""
    visited_TE: Tensor
    """bool; swept, or added to complete the walk."""
    swept_TE: Tensor
    """bool; r of the sweep."""
    chosen_TE: Tensor
    """bool; q."""


@triton.jit
def _pack_kernel(
    mask_ptr,
    words_ptr,
    experts,
    words,
    BITS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Pack one row of one mask, without what is below the diagonal."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK_W)
    bit = tl.arange(0, BITS)
    column = word[:, None] * BITS + bit[None, :]
    kept = (column < experts) & (column >= row % experts)
    edge = tl.load(mask_ptr + row * experts + column, mask=kept, other=0)
    bits = (edge.to(tl.float32) > 0.5).to(tl.int64) << bit[None, :].to(tl.int64)
    packed = tl.sum(bits, axis=1)
    tl.store(words_ptr + row * words + word, packed, mask=word < words)


@triton.jit
def _edges_from(words_ptr, mask_row, source, found, expert, words, BITS: tl.constexpr):
    """0/1 row of the edges that leave ``source``; zeros where nothing was found."""
    word_ptr = words_ptr + (mask_row + source) * words + expert // BITS
    word = tl.load(word_ptr, mask=found & (expert // BITS < words), other=0)
    return ((word >> (expert % BITS).to(tl.int64)) & 1).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "experts", "slots"])
def _walk_kernel(
    scores_ptr,
    words_ptr,
    mask_index_ptr,
    shared_ptr,
    choice_ptr,
    ids_ptr,
    parents_ptr,
    depths_ptr,
    visited_ptr,
    swept_ptr,
    chosen_ptr,
    tokens,
    experts,
    slots,
    words,
    HAS_INDEX: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_CHOICE: tl.constexpr,
    FILL: tl.constexpr,
    ORDER: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNROLL: tl.constexpr,
):
    token = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    in_batch = token < tokens
    inside = in_batch & (expert < experts)
    place_TE = token * experts + expert

    # Rank 0 is the best score; ties go to the lower index.
    score = tl.load(scores_ptr + place_TE, mask=inside, other=0)
    rank = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    shared_ahead = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    room = slots
    for other in tl.range(0, experts, loop_unroll_factor=UNROLL):
        rival = tl.load(scores_ptr + token * experts + other, mask=in_batch, other=0)
        ahead = (rival > score) | ((rival == score) & (other < expert))
        rank += ahead.to(tl.int32)
        if HAS_SHARED:
            is_shared = tl.load(shared_ptr + other).to(tl.int32)
            room -= is_shared
            shared_ahead += ahead.to(tl.int32) * is_shared

    mask_row = token * 0
    if HAS_INDEX:
        mask_index = tl.load(mask_index_ptr + token, mask=in_batch, other=0)
        mask_row = mask_index.to(tl.int64) * experts
    diagonal_ptr = words_ptr + (mask_row + expert) * words + expert // BITS
    diagonal = tl.load(diagonal_ptr, mask=inside, other=0)
    entry = ((diagonal >> (expert % BITS).to(tl.int64)) & 1) != 0
    if HAS_CHOICE:
        chosen = tl.load(choice_ptr + place_TE, mask=inside, other=0) != 0
    else:
        chosen = inside & (rank - shared_ahead < room)
    if HAS_SHARED:
        shared = tl.load(shared_ptr + expert, mask=expert < experts, other=0) != 0
        entry = inside & (entry | shared)
        chosen = inside & (chosen | shared)
    tl.store(chosen_ptr + place_TE, chosen, mask=inside)

    # Open experts may be visited next: entries, and children of visited experts.
    open_ = entry.to(tl.int32)
    visited = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for _ in range(slots):
        pending = chosen & (open_ > 0) & (visited == 0)
        lowest = tl.min(tl.where(pending, expert, BLOCK_E), axis=1, keep_dims=True)
        found = lowest < BLOCK_E
        visited |= (expert == lowest).to(tl.int32)
        open_ |= _edges_from(words_ptr, mask_row, lowest, found, expert, words, BITS)
    tl.store(swept_ptr + place_TE, visited != 0, mask=inside)

    # Best first, until K are visited, or just one where nothing was.
    code = rank * BLOCK_E + expert
    wanted = 1
    if FILL:
        wanted = slots
    for _ in range(wanted):
        short = tl.sum(visited, axis=1, keep_dims=True) < wanted
        free = short & inside & (open_ > 0) & (visited == 0)
        nobody: tl.constexpr = BLOCK_E * BLOCK_E
        best = tl.min(tl.where(free, code, nobody), axis=1, keep_dims=True)
        found = best < nobody
        node = best % BLOCK_E
        visited |= (found & (expert == node)).to(tl.int32)
        if FILL:
            open_ |= _edges_from(words_ptr, mask_row, node, found, expert, words, BITS)
    tl.store(visited_ptr + place_TE, visited != 0, mask=inside)

    if ORDER:
        # Origin: 1 for the source, slot + 2 for a visit, 0 for none yet.
        origin = entry.to(tl.int32)
        depth = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        waiting = visited
        # Of two origins the later wins, then the better rank.
        code = (BLOCK_E - 1 - rank) * BLOCK_E + expert
        for slot in range(slots):
            ready = (waiting > 0) & (origin > 0)
            key = tl.where(ready, origin * (BLOCK_E * BLOCK_E) + code, -1)
            best = tl.max(key, axis=1, keep_dims=True)
            found = best >= 0
            node = tl.where(found, best % BLOCK_E, -1)
            here = expert == node
            level = tl.sum(tl.where(here, depth, 0), axis=1, keep_dims=True)
            parent = tl.where(found, best // (BLOCK_E * BLOCK_E) - 2, -1)
            place_TK = token * slots + slot
            tl.store(ids_ptr + place_TK, node.to(tl.int64), mask=in_batch)
            tl.store(parents_ptr + place_TK, parent.to(tl.int64), mask=in_batch)
            level_or_none = tl.where(found, level, -1).to(tl.int64)
            tl.store(depths_ptr + place_TK, level_or_none, mask=in_batch)
            waiting = tl.where(here, 0, waiting)
            child = _edges_from(words_ptr, mask_row, node, found, expert, words, BITS)
            origin = tl.where(child > 0, slot + 2, origin)
            depth = tl.where(child > 0, level + 1, depth)


@on_its_device
def pack_masks_gpu(edge_mask_MEE: Tensor) -> Tensor:
    """Pack edge masks as bit sets: one kernel.

    Args:
        edge_mask_MEE: (M, E, E) bool, or float with 0/1 values, upper triangular.

    Returns:
        (M, E, W) int64; bit b of word w of a row is the edge to expert 64 w + b.
    """
    masks, experts, _ = edge_mask_MEE.shape
    words = triton.cdiv(experts, WORD_BITS)
    packed_MEW = edge_mask_MEE.new_empty((masks, experts, words), dtype=torch.int64)
    _pack_kernel[(masks * experts,)](
        edge_mask_MEE.detach().contiguous(),
        packed_MEW,
        experts,
        words,
        BITS=WORD_BITS,
        BLOCK_W=triton.next_power_of_2(words),
    )
    return packed_MEW


@on_its_device
def walk_gpu(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    *,
    experts_per_token: int,
    mask_index_T: Tensor | None = None,
    shared_E: Tensor | None = None,
    chosen_TE: Tensor | None = None,
    fill: bool = False,
    order: bool = True,
    block_tokens: int | None = None,
) -> WalkTensors:
    """Launch the walk: two kernels, the packing of the masks and the walk itself.

    Args:
        scores_TE: (T, E) float32 or float64 scores, finite; E is at most 256.
        edge_mask_MEE: (M, E, E) upper-triangular masks, bool or float with 0/1 values.
        experts_per_token: K, in 1..E and at least the number of shared experts.
        mask_index_T: (T,) int64, which mask a token uses; None means mask 0.
        shared_E: (E,) bool, experts that every token visits; None means none.
        chosen_TE: (T, E) bool with at most K ones a row, instead of the top-K choice.
        fill: complete smaller sets best-first.
        order: find the pre-order too; otherwise the three (T, K) results are (T, 0).
        block_tokens: tokens a program, a power of two; None means one warp's worth.

    Returns:
        What the reference finds. A token whose mask has no entry visits nothing.

    Raises:
        ValueError: E is above 256.
    """
    tokens, experts = scores_TE.shape
    if experts > MOST_EXPERTS:
        raise ValueError(f"{experts} experts; the kernel takes at most {MOST_EXPERTS}")
    words_MEW = pack_masks_gpu(edge_mask_MEE)
    slots = experts_per_token
    scores = scores_TE.detach().contiguous()
    shape_TK = (tokens, slots if order else 0)
    found = WalkTensors(
        *(scores.new_empty(shape_TK, dtype=torch.int64) for _ in range(3)),
        *(scores.new_empty((tokens, experts), dtype=torch.bool) for _ in range(3)),
    )
    if not tokens:
        return found
    block_e = triton.next_power_of_2(experts)
    block_t = block_tokens or max(1, BLOCK_ELEMENTS // block_e)
    _walk_kernel[(triton.cdiv(tokens, block_t),)](
        scores,
        words_MEW,
        mask_index_T if mask_index_T is None else mask_index_T.contiguous(),
        shared_E if shared_E is None else shared_E.contiguous(),
        chosen_TE if chosen_TE is None else chosen_TE.contiguous(),
        *found,
        tokens,
        experts,
        slots,
        words_MEW.shape[2],
        HAS_INDEX=mask_index_T is not None,
        HAS_SHARED=shared_E is not None,
        HAS_CHOICE=chosen_TE is not None,
        FILL=fill,
        ORDER=order,
        BITS=WORD_BITS,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        UNROLL=RIVALS_TOGETHER,
        num_warps=1,
        num_stages=1,
    )
    return found


AUDITED_SHAPES = ((16, 2), (16, 4), (64, 8), (65, 4), (128, 30), (256, 8))
"""(E, K); K is no constant of the kernel."""


def audited(arch: str) -> list[KernelSpec]:
    """What ships on ``arch``; the same everywhere."""
    del arch
    specs = [_pack_spec(words) for words in (1, 2)]
    for experts, slots in AUDITED_SHAPES:
        specs += [_walk_spec(experts, slots, fill) for fill in (False, True)]
    return specs


def _pack_spec(words: int) -> KernelSpec:
    return KernelSpec(
        kernel="pack_masks",
        config=f"{words} words w4",
        function=_pack_kernel,
        signature={
            "mask_ptr": "*i1",
            "words_ptr": "*i64",
            "experts": "i32",
            "words": "i32",
        },
        constexprs={"BITS": WORD_BITS, "BLOCK_W": words},
        rows_per_tile=1,
        weights="none",
        direction="route",
    )


def _walk_spec(experts: int, slots: int, fill: bool) -> KernelSpec:
    block_e = triton.next_power_of_2(experts)
    block_t = max(1, BLOCK_ELEMENTS // block_e)
    signature = {"scores_ptr": "*fp32", "words_ptr": "*i64", "shared_ptr": "*i1"}
    signature |= {"mask_index_ptr": "*i64", "choice_ptr": "*i1"}
    signature |= dict.fromkeys(("ids_ptr", "parents_ptr", "depths_ptr"), "*i64")
    signature |= dict.fromkeys(("visited_ptr", "swept_ptr", "chosen_ptr"), "*i1")
    signature |= dict.fromkeys(("tokens", "experts", "slots", "words"), "i32")
    flags = dict.fromkeys(("HAS_INDEX", "HAS_SHARED", "ORDER"), True)
    return KernelSpec(
        kernel="walk",
        config=f"E {experts} K {slots}{', chosen, fill' if fill else ''} w1",
        function=_walk_kernel,
        signature=signature,
        constexprs=flags
        | {"HAS_CHOICE": fill, "FILL": fill}
        | {"BITS": WORD_BITS, "BLOCK_T": block_t, "BLOCK_E": block_e}
        | {"UNROLL": RIVALS_TOGETHER},
        num_warps=1,
        num_stages=1,
        rows_per_tile=block_t,
        weights="none",
        direction="route",
    )
