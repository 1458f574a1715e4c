"""Rows times W: the reduction runs along an expert's rows, the result goes to tokens.

Forward: y[t] += c (h W_d) - r (z V), with z V the surrogate of the visited expert.
Backward: dx[t] += c (dg W_g + du W_u). All visits of one launch belong to one slot, so no
two of them touch the same token: a plain read-modify-write in float32, no atomics, the
same bits on every run.

Of NF4 weights, magnitudes vary along the reduction, so they are multiplied into the
hidden units, in float16 (:mod:`samv2_kernels.gpu.tiles`): a product of a hidden unit and
a magnitude overflows, visibly, from 32,752 on, one of a gradient from 8,188. One warp
owns 64 columns: of several, each would decode all weights.

Shapes: T tokens, K slots, N = T K visits, D model width, B stored experts, F rows an
expert, Q surrogate rank, W = D / 4 words a row, A = D / 64 blocks a row, M rows of a
tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from samv2_kernels.gpu.decode import block_scale, decode_half
from samv2_kernels.gpu.tiles import GRANULE, tile_of

BLOCK = tl.constexpr(64)
QUARTER = tl.constexpr(16)
SCALE_UP = tl.constexpr(8.0)
"""Magnitudes times this are float16: normal numbers from 7.6e-6 to 8,188."""


@triton.jit
def _fold(
    a0,
    a1,
    a2,
    a3,
    rows_ptr,
    word_ptr,
    absmax_ptr,
    second_ptr,
    table_ptr,
    offset,
    place,
    f,
    F: tl.constexpr,
    W: tl.constexpr,
    A: tl.constexpr,
    NESTED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One granule of one matrix: four accumulators of (M, 16) columns each."""
    if EDGE:
        rows = tl.load(rows_ptr, mask=(f < F)[None, :], other=0.0)
        words = tl.load(word_ptr, mask=(f < F)[:, None], other=0)
        scale = block_scale(
            absmax_ptr, second_ptr, table_ptr, offset, place, f < F, NESTED, True
        )
    else:
        rows = tl.load(rows_ptr)
        words = tl.load(word_ptr)
        scale = block_scale(
            absmax_ptr, second_ptr, table_ptr, offset, place, 0, NESTED, False
        )
    rows = rows * (scale * SCALE_UP).to(tl.float16)[None, :]
    w0, w1, w2, w3 = decode_half(words)
    return (
        tl.dot(rows, w0, a0),
        tl.dot(rows, w1, a1),
        tl.dot(rows, w2, a2),
        tl.dot(rows, w3, a3),
    )


@triton.jit
def _nf4_sum(
    rows_ptr,
    word_ptr,
    absmax_ptr,
    second_ptr,
    offset_ptr,
    table_ptr,
    rows2_ptr,
    word2_ptr,
    absmax2_ptr,
    second2_ptr,
    offset2_ptr,
    block,
    near_row,
    number,
    length,
    F: tl.constexpr,
    D: tl.constexpr,
    NESTED: tl.constexpr,
    SECONDS: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows times one or two NF4 matrices, 64 columns: four (M, 16) float32 tiles."""
    W: tl.constexpr = D // 4
    A: tl.constexpr = D // 64
    f = tl.arange(0, GRANULE)
    q = tl.arange(0, QUARTER)
    row_place = near_row.to(tl.int64)[:, None] * F + f[None, :]
    word_place = block * F * W + number * QUARTER + f[:, None] * W + q[None, :]
    place = f * A + number
    absmax_ptr += block * F * A
    offset = 0.0
    offset2 = 0.0
    if NESTED:
        second_ptr += block * SECONDS
        offset = tl.load(offset_ptr + block)
    if TWO:
        absmax2_ptr += block * F * A
        if NESTED:
            second2_ptr += block * SECONDS
            offset2 = tl.load(offset2_ptr + block)
    a0 = tl.zeros((BLOCK_M, QUARTER), tl.float32)
    a1 = tl.zeros((BLOCK_M, QUARTER), tl.float32)
    a2 = tl.zeros((BLOCK_M, QUARTER), tl.float32)
    a3 = tl.zeros((BLOCK_M, QUARTER), tl.float32)
    rows_ptr += row_place
    word_ptr += word_place
    if TWO:
        rows2_ptr += row_place
        word2_ptr += word_place
    for _ in range(0, length // GRANULE * GRANULE, GRANULE):
        a0, a1, a2, a3 = _fold(
            a0,
            a1,
            a2,
            a3,
            rows_ptr,
            word_ptr,
            absmax_ptr,
            second_ptr,
            table_ptr,
            offset,
            place,
            f,
            F,
            W,
            A,
            NESTED,
            False,
        )
        rows_ptr += GRANULE
        word_ptr += GRANULE * W
        if TWO:
            a0, a1, a2, a3 = _fold(
                a0,
                a1,
                a2,
                a3,
                rows2_ptr,
                word2_ptr,
                absmax2_ptr,
                second2_ptr,
                table_ptr,
                offset2,
                place,
                f,
                F,
                W,
                A,
                NESTED,
                False,
            )
            rows2_ptr += GRANULE
            word2_ptr += GRANULE * W
        place += GRANULE * A
    if F % 32 != 0:
        f += F // 32 * 32
        a0, a1, a2, a3 = _fold(
            a0,
            a1,
            a2,
            a3,
            rows_ptr,
            word_ptr,
            absmax_ptr,
            second_ptr,
            table_ptr,
            offset,
            place,
            f,
            F,
            W,
            A,
            NESTED,
            True,
        )
        if TWO:
            a0, a1, a2, a3 = _fold(
                a0,
                a1,
                a2,
                a3,
                rows2_ptr,
                word2_ptr,
                absmax2_ptr,
                second2_ptr,
                table_ptr,
                offset2,
                place,
                f,
                F,
                W,
                A,
                NESTED,
                True,
            )
    return a0 / SCALE_UP, a1 / SCALE_UP, a2 / SCALE_UP, a3 / SCALE_UP


@triton.jit
def _float_sum(
    acc,
    rows_ptr,
    weight_ptr,
    block,
    near_row,
    col,
    length,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """acc + rows times columns of one float matrix."""
    f = tl.arange(0, BLOCK_F)
    rows_ptr += near_row.to(tl.int64)[:, None] * F + f[None, :]
    weight_ptr += block * F * D + f[:, None] * D + col[None, :]
    for f0 in range(0, length, BLOCK_F):
        if F % BLOCK_F == 0 and D % BLOCK_N == 0:
            rows = tl.load(rows_ptr)
            weights = tl.load(weight_ptr)
        else:
            inside = f0 + f < F
            live = inside[:, None] & (col < D)[None, :]
            rows = tl.load(rows_ptr, mask=inside[None, :], other=0.0)
            weights = tl.load(weight_ptr, mask=live, other=0.0)
        acc = tl.dot(rows, weights, acc, input_precision="ieee")
        rows_ptr += BLOCK_F
        weight_ptr += BLOCK_F * D
    return acc


@triton.jit
def _add_rows(
    out_ptr,
    acc,
    token,
    col,
    live_row,
    weight,
    low,
    matrix_ptr,
    bank,
    D: tl.constexpr,
    Q: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """out[token] += weight * acc + low times a (Q, columns) tile."""
    live = live_row[:, None] & (col < D)[None, :]
    acc = acc * weight[:, None]
    if Q > 0:
        q = tl.arange(0, RANK_BLOCK)
        matrix = tl.load(
            matrix_ptr + bank * Q * D + q[:, None] * D + col[None, :],
            mask=(q < Q)[:, None] & (col < D)[None, :],
            other=0.0,
        )
        acc = tl.dot(low, matrix.to(low.dtype), acc, input_precision="ieee")
    place = out_ptr + token.to(tl.int64)[:, None] * D + col[None, :]
    tl.store(place, tl.load(place, mask=live, other=0.0) + acc, mask=live)


@triton.jit(do_not_specialize_on_alignment=["tiles_ptr"])
def to_tokens_kernel(
    rows_ptr,
    order_ptr,
    tiles_ptr,
    base_ptr,
    weight_ptr,
    absmax_ptr,
    second_ptr,
    offset_ptr,
    table_ptr,
    rows2_ptr,
    weight2_ptr,
    absmax2_ptr,
    second2_ptr,
    offset2_ptr,
    combine_ptr,
    reached_ptr,
    low_ptr,
    matrix_ptr,
    out_ptr,
    length,
    SLOTS: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    SECONDS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid: row tiles of one slot, and in each the column tiles of BLOCK_N (NF4: 64)."""
    columns = tl.cdiv(D, BLOCK_N)
    number = tl.program_id(0) % columns
    expert, first, stop = tile_of(tiles_ptr, tl.program_id(0) // columns)
    if expert < 0:
        return
    bank = expert.to(tl.int64)
    block = bank
    if HAS_BASE:
        block = tl.load(base_ptr + expert).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    near_row = tl.minimum(row, stop - 1)
    visit = tl.load(order_ptr + near_row)
    token = visit // SLOTS
    weight = tl.load(combine_ptr + visit)
    low = weight
    if Q > 0:
        q = tl.arange(0, RANK_BLOCK)
        low = tl.load(
            low_ptr + token.to(tl.int64)[:, None] * Q + q[None, :],
            mask=(q < Q)[None, :],
            other=0.0,
        )
        low = (low * -tl.load(reached_ptr + visit)[:, None]).to(low.dtype)
    if NF4:
        a0, a1, a2, a3 = _nf4_sum(
            rows_ptr,
            weight_ptr,
            absmax_ptr,
            second_ptr,
            offset_ptr,
            table_ptr,
            rows2_ptr,
            weight2_ptr,
            absmax2_ptr,
            second2_ptr,
            offset2_ptr,
            block,
            near_row,
            number,
            length,
            F,
            D,
            NESTED,
            SECONDS,
            TWO,
            BLOCK_M,
        )
        col = number * BLOCK + tl.arange(0, QUARTER)
        live = row < stop
        _add_rows(
            out_ptr,
            a0,
            token,
            col,
            live,
            weight,
            low,
            matrix_ptr,
            bank,
            D,
            Q,
            RANK_BLOCK,
        )
        _add_rows(
            out_ptr,
            a1,
            token,
            col + QUARTER,
            live,
            weight,
            low,
            matrix_ptr,
            bank,
            D,
            Q,
            RANK_BLOCK,
        )
        _add_rows(
            out_ptr,
            a2,
            token,
            col + 2 * QUARTER,
            live,
            weight,
            low,
            matrix_ptr,
            bank,
            D,
            Q,
            RANK_BLOCK,
        )
        _add_rows(
            out_ptr,
            a3,
            token,
            col + 3 * QUARTER,
            live,
            weight,
            low,
            matrix_ptr,
            bank,
            D,
            Q,
            RANK_BLOCK,
        )
    else:
        col = number * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _float_sum(
            acc,
            rows_ptr,
            weight_ptr,
            block,
            near_row,
            col,
            length,
            F,
            D,
            BLOCK_N,
            BLOCK_F,
        )
        if TWO:
            acc = _float_sum(
                acc,
                rows2_ptr,
                weight2_ptr,
                block,
                near_row,
                col,
                length,
                F,
                D,
                BLOCK_N,
                BLOCK_F,
            )
        _add_rows(
            out_ptr,
            acc,
            token,
            col,
            row < stop,
            weight,
            low,
            matrix_ptr,
            bank,
            D,
            Q,
            RANK_BLOCK,
        )
