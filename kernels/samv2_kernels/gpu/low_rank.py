"""Small products of visits: rank-R projections of rows, and gradients of adapter rows.

    project:  out[t] += w_n (rows_n M_e)
    adapter gradients:  dB_g[e] = sum_n c_n dg_n a_t^T,  dB_u[e] likewise,
                        dA_d[e] = sum_n q_t (c_n h_n)^T

A program owns one row tile, or one column tile of one expert, so sums have a fixed order
and need no atomics.

Shapes: T tokens, K slots, N = T K visits, E experts, F rows an expert, R rank (of the
adapters or the surrogates), M rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from samv2_kernels.gpu.tiles import GRANULE, tile_of


@triton.jit(do_not_specialize_on_alignment=["tiles_ptr"])
def project_kernel(
    rows_ptr,
    order_ptr,
    tiles_ptr,
    matrix_ptr,
    weight_ptr,
    low_ptr,
    dots_ptr,
    out_ptr,
    LENGTH,
    stride_k,
    stride_r,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    NEGATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[token] += weight * (row M_e), M_e (LENGTH, R) by strides; one slot's tiles.

    With NEGATE the weight is negative, and dots[visit] = -low[token] . (row M_e).
    Grid: (row tiles of one slot,).
    """
    expert, first, stop = tile_of(tiles_ptr, tl.program_id(0))
    if expert < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    near_row = tl.minimum(row, stop - 1)
    visit = tl.load(order_ptr + near_row)
    token = visit // SLOTS
    source = token if BY_TOKEN else near_row
    k = tl.arange(0, GRANULE)
    r = tl.arange(0, RANK_BLOCK)
    rows = rows_ptr + source.to(tl.int64)[:, None] * LENGTH + k[None, :]
    matrix = matrix_ptr + expert.to(tl.int64) * LENGTH * R
    matrix += k[:, None] * stride_k + r[None, :] * stride_r
    acc = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    compute = low_ptr.dtype.element_ty
    for k0 in range(0, LENGTH, GRANULE):
        inside = k0 + k < LENGTH
        a = tl.load(rows, mask=inside[None, :], other=0.0)
        m = tl.load(matrix, mask=inside[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(a.to(compute), m.to(compute), acc, input_precision="ieee")
        rows += GRANULE
        matrix += GRANULE * stride_k
    live = row < stop
    place = token.to(tl.int64)[:, None] * R + r[None, :]
    inside = live[:, None] & (r < R)[None, :]
    if NEGATE:
        low = tl.load(low_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dots_ptr + visit, -tl.sum(low * acc, axis=1), mask=live)
        acc = -acc
    acc *= tl.load(weight_ptr + visit)[:, None]
    out = tl.load(out_ptr + place, mask=inside, other=0.0)
    tl.store(out_ptr + place, out + acc, mask=inside)


@triton.jit
def adapter_grad_kernel(
    gate_grad_ptr,
    up_grad_ptr,
    gate_ptr,
    up_ptr,
    combine_ptr,
    order_ptr,
    offsets_ptr,
    low_gate_ptr,
    low_up_ptr,
    low_down_ptr,
    gate_out_ptr,
    up_out_ptr,
    down_out_ptr,
    F,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid: (column tiles of BLOCK_F hidden units, experts)."""
    expert = tl.program_id(1)
    first = tl.load(offsets_ptr + expert * SLOTS)
    stop = tl.load(offsets_ptr + (expert + 1) * SLOTS)
    col = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (col < F)[None, :]
    r = tl.arange(0, RANK_BLOCK)
    gate_acc = tl.zeros((BLOCK_F, RANK_BLOCK), tl.float32)
    up_acc = tl.zeros((BLOCK_F, RANK_BLOCK), tl.float32)
    down_acc = tl.zeros((BLOCK_F, RANK_BLOCK), tl.float32)
    compute = low_gate_ptr.dtype.element_ty
    for start in range(first, stop, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        live = row < stop
        near_row = tl.minimum(row, stop - 1)
        visit = tl.load(order_ptr + near_row)
        place = near_row.to(tl.int64)[:, None] * F + col[None, :]
        mask = live[:, None] & inside
        gate_grad = tl.load(gate_grad_ptr + place, mask=mask, other=0.0)
        up_grad = tl.load(up_grad_ptr + place, mask=mask, other=0.0)
        gate = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(combine_ptr + visit, mask=live, other=0.0)[:, None]
        hidden = gate * tl.sigmoid(gate) * up * weight
        gate_grad = gate_grad.to(tl.float32) * weight
        up_grad = up_grad.to(tl.float32) * weight
        low = (visit // SLOTS).to(tl.int64)[:, None] * R + r[None, :]
        mask = live[:, None] & (r < R)[None, :]
        low_gate = tl.load(low_gate_ptr + low, mask=mask, other=0.0)
        low_up = tl.load(low_up_ptr + low, mask=mask, other=0.0)
        low_down = tl.load(low_down_ptr + low, mask=mask, other=0.0).to(compute)
        gate_acc = tl.dot(
            tl.trans(gate_grad.to(compute)), low_gate, gate_acc, input_precision="ieee"
        )
        up_acc = tl.dot(
            tl.trans(up_grad.to(compute)), low_up, up_acc, input_precision="ieee"
        )
        down_acc = tl.dot(
            tl.trans(hidden.to(compute)), low_down, down_acc, input_precision="ieee"
        )
    bank = expert.to(tl.int64) * F * R
    mask = (col < F)[:, None] & (r < R)[None, :]
    place = bank + col[:, None] * R + r[None, :]
    tl.store(gate_out_ptr + place, gate_acc, mask=mask)
    tl.store(up_out_ptr + place, up_acc, mask=mask)
    tl.store(down_out_ptr + bank + r[None, :] * F + col[:, None], down_acc, mask=mask)
