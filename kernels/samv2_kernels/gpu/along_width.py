"""Rows times W^T: the reduction runs along the model width.

Forward: g = x W_g^T + a B_g^T, u = x W_u^T + b B_u^T, h = silu(g) u, with a, b the
tokens' low-rank inputs. Gate and up columns alternate in one tile, so that one product
feeds all warps and SwiGLU finds both in the same thread.

Backward through the down projection: r = dy W_d^T + q A_d, then dg = r u silu'(g),
du = r silu(g) and dc = h . r, which needs no output to be recomputed. The visit's combine
weight c is left out of dg and du, so that its size does not matter to float16; who reads
them multiplies by it.

Rows are read in place through the visit order. Weights are floats, or NF4 words that are
decoded in registers; of those, partial sums of a block of 64 are scaled in float32, so
weights are rounded once less than when they are dequantised to bfloat16. Rows and
columns past an edge repeat the last valid one and are not stored. The loops' bound is an
argument, though it is D: loops of a known few turns are unrolled, and spill.

Shapes: T tokens, K slots, N = T K visits, D model width, B stored experts, E experts,
F rows an expert, R adapter rank, W = D / 4 words a row, A = D / 64 blocks a row,
L row tiles, Y column tiles, M rows and G columns of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from samv2_kernels.gpu.decode import INVERSE_LIFT, block_scale, decode_lifted
from samv2_kernels.gpu.tiles import HIDDEN_SHARE, tile_of, to_half

BLOCK = tl.constexpr(64)
QUARTER = tl.constexpr(16)


@triton.jit
def _nf4_products(
    row_ptr,
    word_ptr,
    absmax_ptr,
    second_ptr,
    table_ptr,
    offset,
    place,
    length,
    NESTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(M, G) float32 products of rows with NF4 columns, given by pointers to both."""
    q = tl.arange(0, QUARTER)
    words = word_ptr[None, :] + q[:, None]
    rows = row_ptr[:, None] + q[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, length, BLOCK):
        packed = tl.load(words)
        a0 = tl.load(rows)
        a1 = tl.load(rows + QUARTER)
        a2 = tl.load(rows + 2 * QUARTER)
        a3 = tl.load(rows + 3 * QUARTER)
        scale = block_scale(
            absmax_ptr, second_ptr, table_ptr, offset, place, 0, NESTED, False
        )
        w0, w1, w2, w3 = decode_lifted(packed)
        part = tl.dot(a1, w1, tl.dot(a0, w0))
        part = tl.dot(a3, w3, tl.dot(a2, w2, part))
        acc += part * scale[None, :]
        words += QUARTER
        rows += BLOCK
        place += 1
    return acc * INVERSE_LIFT


@triton.jit
def _float_products(
    row_ptr,
    weight_ptr,
    length,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same for float columns."""
    k = tl.arange(0, BLOCK_K)
    weights = weight_ptr[None, :] + k[:, None]
    rows = row_ptr[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, length, BLOCK_K):
        if D % BLOCK_K == 0:
            a = tl.load(rows)
            w = tl.load(weights)
        else:
            a = tl.load(rows, mask=(k0 + k < D)[None, :], other=0.0)
            w = tl.load(weights, mask=(k0 + k < D)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
        weights += BLOCK_K
        rows += BLOCK_K
    return acc


@triton.jit
def _low_rank(
    acc,
    low_ptr,
    matrix_ptr,
    token,
    matrix_row,
    rank_stride,
    R: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """acc + low[token] M[matrix_row]^T, the rank-R term of a tile."""
    r = tl.arange(0, RANK_BLOCK)
    low = tl.load(
        low_ptr + token.to(tl.int64)[:, None] * R + r[None, :],
        mask=(r < R)[None, :],
        other=0.0,
    )
    matrix = tl.load(
        matrix_ptr + matrix_row[None, :] + r[:, None] * rank_stride,
        mask=(r < R)[:, None],
        other=0.0,
    )
    return tl.dot(low, matrix.to(low.dtype), acc, input_precision="ieee")


@triton.jit(do_not_specialize_on_alignment=["tiles_ptr"])
def gate_up_kernel(
    x_ptr,
    order_ptr,
    tiles_ptr,
    base_ptr,
    gate_ptr,
    up_ptr,
    gate_absmax_ptr,
    up_absmax_ptr,
    gate_second_ptr,
    up_second_ptr,
    gate_offset_ptr,
    up_offset_ptr,
    table_ptr,
    low_gate_ptr,
    low_up_ptr,
    rows_gate_ptr,
    rows_up_ptr,
    hidden_ptr,
    gate_out_ptr,
    up_out_ptr,
    F,
    length,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    SECONDS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: row tiles, and in each the column tiles of BLOCK_N / 2 hidden units."""
    HALF: tl.constexpr = BLOCK_N // 2
    columns = tl.cdiv(F, HALF)
    number = tl.program_id(0) % columns
    expert, first, stop = tile_of(tiles_ptr, tl.program_id(0) // columns)
    if expert < 0:
        return
    block = expert.to(tl.int64)
    if HAS_BASE:
        block = tl.load(base_ptr + expert).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    is_up = lane % 2 == 1
    near = tl.minimum(number * HALF + lane // 2, F - 1)
    token = tl.load(order_ptr + tl.minimum(row, stop - 1)) // SLOTS
    x_row = x_ptr + token.to(tl.int64) * D
    if NF4:
        W: tl.constexpr = D // 4
        A: tl.constexpr = D // 64
        start = block * F
        words = tl.where(is_up, up_ptr + start * W, gate_ptr + start * W) + near * W
        absmax = tl.where(is_up, up_absmax_ptr + start * A, gate_absmax_ptr + start * A)
        second = gate_second_ptr
        offset = 0.0
        if NESTED:
            start = block * SECONDS
            second = tl.where(is_up, up_second_ptr + start, gate_second_ptr + start)
            offset = tl.where(
                is_up, tl.load(up_offset_ptr + block), tl.load(gate_offset_ptr + block)
            )
        acc = _nf4_products(
            x_row,
            tl.multiple_of(words, 16),
            absmax,
            second,
            table_ptr,
            offset,
            near * A,
            length,
            NESTED,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        start = block * F * D
        weights = tl.where(is_up, up_ptr + start, gate_ptr + start) + near * D
        if D % 16 == 0:
            weights = tl.multiple_of(weights, 16)
        acc = _float_products(x_row, weights, length, D, BLOCK_M, BLOCK_N, BLOCK_K)
    gate, up = tl.split(tl.reshape(acc, (BLOCK_M, HALF, 2)))
    col = number * HALF + tl.arange(0, HALF)
    if R > 0:
        matrix_row = (expert.to(tl.int64) * F + tl.minimum(col, F - 1)) * R
        gate = _low_rank(
            gate, low_gate_ptr, rows_gate_ptr, token, matrix_row, 1, R, RANK_BLOCK
        )
        up = _low_rank(up, low_up_ptr, rows_up_ptr, token, matrix_row, 1, R, RANK_BLOCK)
    hidden = gate * tl.sigmoid(gate) * up
    start = first.to(tl.int64) * F
    place = (row - first)[:, None] * F + col[None, :]
    live = (row < stop)[:, None] & (col < F)[None, :]
    if SAVE:
        tl.store(gate_out_ptr + start + place, gate, mask=live)
        tl.store(up_out_ptr + start + place, up, mask=live)
    if NF4:
        hidden = to_half(hidden * HIDDEN_SHARE)
    tl.store(hidden_ptr + start + place, hidden, mask=live)


@triton.jit(do_not_specialize_on_alignment=["tiles_ptr"])
def hidden_grad_kernel(
    dy_ptr,
    order_ptr,
    tiles_ptr,
    base_ptr,
    down_ptr,
    absmax_ptr,
    second_ptr,
    offset_ptr,
    table_ptr,
    low_ptr,
    rows_ptr,
    gate_ptr,
    up_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    combine_part_ptr,
    F,
    length,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    SECONDS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: row tiles, and in each the column tiles of BLOCK_N hidden units."""
    columns = tl.cdiv(F, BLOCK_N)
    number = tl.program_id(0) % columns
    expert, first, stop = tile_of(tiles_ptr, tl.program_id(0) // columns)
    if expert < 0:
        return
    block = expert.to(tl.int64)
    if HAS_BASE:
        block = tl.load(base_ptr + expert).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    near_row = tl.minimum(row, stop - 1)
    col = number * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(col, F - 1)
    token = tl.load(order_ptr + near_row) // SLOTS
    dy_row = dy_ptr + token.to(tl.int64) * D
    if NF4:
        W: tl.constexpr = D // 4
        A: tl.constexpr = D // 64
        offset = 0.0
        second = second_ptr
        if NESTED:
            offset = tl.load(offset_ptr + block)
            second = second_ptr + block * SECONDS
        raw = _nf4_products(
            dy_row,
            down_ptr + block * F * W + near * W,
            absmax_ptr + block * F * A,
            second,
            table_ptr,
            offset,
            near * A,
            length,
            NESTED,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        weights = down_ptr + block * F * D + near * D
        raw = _float_products(dy_row, weights, length, D, BLOCK_M, BLOCK_N, BLOCK_K)
    if R > 0:
        matrix_row = expert.to(tl.int64) * R * F + near
        raw = _low_rank(raw, low_ptr, rows_ptr, token, matrix_row, F, R, RANK_BLOCK)
    start = first.to(tl.int64) * F
    place = (row - first)[:, None] * F + col[None, :]
    live = (row < stop)[:, None] & (col < F)[None, :]
    gate = tl.load(gate_ptr + start + place, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + start + place, mask=live, other=0.0).to(tl.float32)
    part = row.to(tl.int64) * columns + number
    open_gate = tl.sigmoid(gate)
    share = tl.sum(gate * open_gate * up * raw, axis=1)
    tl.store(combine_part_ptr + part, share, mask=row < stop)
    up_grad = raw * gate * open_gate
    gate_grad = raw * up * open_gate * (1 + gate * (1 - open_gate))
    if NF4:
        up_grad = to_half(up_grad)
        gate_grad = to_half(gate_grad)
    tl.store(up_grad_ptr + start + place, up_grad, mask=live)
    tl.store(gate_grad_ptr + start + place, gate_grad, mask=live)
