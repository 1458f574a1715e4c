"""Grouped SwiGLU experts on a CPU, batch by batch, with a backward of its own.

Narrow experts with even loads are one padded batch; others run expert by expert, in
buffers that stay in the cache, their blocks read, or unpacked from NF4, once a pass and
one at a time. Combine weights multiply the hidden rows, which are narrower than the
outputs. With dh = dy W_d^T + dl A_d:

    d combine = <h, dh>    d g = c dh u silu'(g)    d u = c dh silu(g)
    d x = d g W_g + d u W_u,    d reached = -<U x, dy V_e^T>

so that no output is computed again; h is, from the saved g and u.

Shapes: T tokens, D model width, E experts, F rows an expert, K slots, N = T K visits, n
rows of a batch, R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from samv2_kernels.cpu.batches import Batch, Sums, runs
from samv2_kernels.cpu.blocks import DOWN, GATE, UP, Blocks, FloatBlocks, blocks_of
from samv2_kernels.cpu.padded import padded, padding_pays
from samv2_kernels.cpu.terms import (
    Rank,
    RankGradients,
    StandInGradients,
    StandIns,
)


def expert_mlp_forward(
    x_TD: Tensor,
    combine_TK: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    ffn_width: int,
    base_E: Tensor | None,
    low_gate_TR: Tensor | None,
    low_up_TR: Tensor | None,
    gate_EFR: Tensor | None,
    up_EFR: Tensor | None,
    down_ERF: Tensor | None,
    low_TQ: Tensor | None,
    out_EQD: Tensor | None,
    reached_TK: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CPU kernel of ``samv2::expert_mlp``; arguments and results are its."""
    tokens, width = x_TD.shape
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    blocks = blocks_of(weights, x_TD, ffn_width, base_E)
    work = _batches(x_TD, combine_TK, order_N, offsets, base_E, blocks)
    rank = _rank(low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF)
    stand_ins = _stand_ins(low_TQ, out_EQD, reached_TK)
    y = Sums(tokens, width, wide)
    low_down = Sums(tokens, 0 if rank is None else rank.down_ERF.shape[1], wide)
    gate_NF, up_NF = (_kept(x_TD, ffn_width, offsets, order_N, save) for _ in "gu")
    rows_nD = _buffer(x_TD, work, width)
    gate_nF, up_nF = (_buffer(x_TD, [] if save else work, ffn_width) for _ in "gu")

    for batch in work:
        rows = slice(0, len(batch))
        x = batch.of_tokens(x_TD, rows_nD)
        gate = batch.place(gate_NF) if save else gate_nF[rows]
        up = batch.place(up_NF) if save else up_nF[rows]
        blocks.enter(batch, x, gate, up)
        if rank is not None:
            rank.enter(batch, gate, up)
        if save:
            batch.save(gate, gate_NF)
            batch.save(up, up_NF)
        hidden = silu(gate).mul_(up).mul_(batch.of_visits(combine_TK, x_TD.dtype))
        output = x  # Its rows have been read.
        batch.multiply(hidden, blocks.part(DOWN), output)
        if stand_ins is not None:
            stand_ins.subtract(batch, output)
        batch.add(y, output)
        if rank is not None:
            rank.leave(batch, hidden, low_down)
    return y.complete(), low_down.complete(), gate_NF, up_NF


def expert_mlp_backward(
    grad_y_TD: Tensor,
    grad_low_down_TR: Tensor,
    x_TD: Tensor,
    combine_TK: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    ffn_width: int,
    base_E: Tensor | None,
    low_gate_TR: Tensor | None,
    low_up_TR: Tensor | None,
    gate_EFR: Tensor | None,
    up_EFR: Tensor | None,
    down_ERF: Tensor | None,
    low_TQ: Tensor | None,
    out_EQD: Tensor | None,
    reached_TK: Tensor | None,
    gate_NF: Tensor,
    up_NF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The CPU kernel of ``samv2::expert_mlp_backward``; arguments and results are its."""
    dtype, width = x_TD.dtype, x_TD.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    blocks = blocks_of(weights, x_TD, ffn_width, base_E)
    work = _batches(x_TD, combine_TK, order_N, offsets, base_E, blocks)
    rank = _rank(low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF)
    drank = None if rank is None else RankGradients(rank)
    stand_ins = _stand_ins(low_TQ, out_EQD, reached_TK)
    dstand_ins = None if stand_ins is None else StandInGradients(stand_ins, wide)
    grad_TD, grad_low_TR = grad_y_TD.to(dtype), grad_low_down_TR.to(dtype)
    dx = Sums(*x_TD.shape, dtype)
    dcombine_TK = torch.zeros_like(combine_TK, dtype=wide)
    rows_nD = _buffer(x_TD, work, width)
    dh_nF, hidden_nF = (_buffer(x_TD, work, ffn_width) for _ in "dh")

    for batch in work:
        rows = slice(0, len(batch))
        gate, up = batch.saved(gate_NF), batch.saved(up_NF)
        dy, dh = batch.of_tokens(grad_TD, rows_nD), dh_nF[rows]
        batch.multiply(dy, blocks.part(DOWN, transposed=True), dh)
        if dstand_ins is not None:
            dstand_ins.subtract(batch, dy)
        dup = silu(gate)
        hidden = torch.mul(dup, up, out=hidden_nF[rows])
        weight_n1 = batch.of_visits(combine_TK, x_TD.dtype)
        if drank is not None:
            drank.leave(batch, grad_low_TR, weight_n1, hidden, dh)
        batch.put(dcombine_TK, hidden.mul_(dh).sum(1, dtype=wide))
        dup.mul_(dh.mul_(weight_n1))
        dgate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
        dinput = dy  # Its rows have been read.
        batch.multiply(dgate, blocks.part(GATE), dinput)
        batch.multiply(dup, blocks.part(UP), dinput, add=True)
        batch.add(dx, dinput)
        if drank is not None:
            drank.enter(batch, dgate, dup)
    return (
        dx.complete(),
        dcombine_TK.to(combine_TK.dtype),
        *_rank_gradients(drank, x_TD),
        *_stand_in_gradients(dstand_ins, x_TD),
    )


def _batches(
    x_TD: Tensor,
    combine_TK: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    base_E: Tensor | None,
    blocks: Blocks,
) -> list[Batch]:
    """The visits as one padded batch, or as runs of experts."""
    slots = combine_TK.shape[1]
    bounds = offsets[::slots].tolist()
    weights = blocks.shape[0] * blocks.shape[1]
    if isinstance(blocks, FloatBlocks) and padding_pays(bounds, weights):
        return [padded(order_N, bounds, slots)]
    stored = range(len(bounds) - 1) if base_E is None else base_E.tolist()
    row_bytes = x_TD.shape[1] * x_TD.element_size()
    return runs(order_N, bounds, stored, slots, row_bytes)


def _buffer(like: Tensor, work: list[Batch], width: int) -> Tensor:
    """Uninitialised rows for the largest batch."""
    return like.new_empty((max(map(len, work), default=0), width))


def _kept(
    like: Tensor, width: int, offsets: Tensor, order_N: Tensor, save: bool
) -> Tensor:
    """(N, F) rows to save, or none; zeros where a visit is unused."""
    kept_NF = like.new_empty((len(order_N) if save else 0, width))
    kept_NF[int(offsets[-1]) :].zero_()
    return kept_NF


def _rank_gradients(found: RankGradients | None, like: Tensor) -> tuple[Tensor, ...]:
    if found is None:
        return tuple(like.new_empty(0) for _ in range(5))
    return (
        found.low_gate.complete(),
        found.low_up.complete(),
        found.gate_EFR,
        found.up_EFR,
        found.down_ERF,
    )


def _stand_in_gradients(
    found: StandInGradients | None, like: Tensor
) -> tuple[Tensor, ...]:
    if found is None:
        return tuple(like.new_empty(0) for _ in range(2))
    reached_TK = found.stand_ins.reached_TK
    return found.low.complete(), found.reached_TK.to(reached_TK.dtype)


def _rank(*parts: Tensor | None) -> Rank | None:
    low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF = parts
    if down_ERF is None:
        return None
    return Rank(
        low_gate_TR=low_gate_TR,
        low_up_TR=low_up_TR,
        gate_EFR=gate_EFR,
        up_EFR=up_EFR,
        down_ERF=down_ERF,
    )


def _stand_ins(*parts: Tensor | None) -> StandIns | None:
    low_TQ, out_EQD, reached_TK = parts
    if low_TQ is None:
        return None
    return StandIns(low_TQ=low_TQ, out_EQD=out_EQD, reached_TK=reached_TK)
