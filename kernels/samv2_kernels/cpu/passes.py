"""Forward and backward pass of grouped SwiGLU experts on a CPU, batch by batch.

Float blocks make one padded batch; NF4 blocks run expert by expert, in buffers that stay
in the cache, and are unpacked once a pass and one part at a time. Combine weights multiply
the hidden rows, which are narrower than the outputs. With dh = dy W_d^T + dl A_d:

    d combine = <h, dh>    d g = c dh u silu'(g)    d u = c dh silu(g)
    d x = d g W_g + d u W_u,    d reached = -<U x, dy V_e^T>

so that no output is computed again; h is, from the saved g and u.

Shapes: T tokens, D model width, E experts, F rows an expert, K slots, U visits, n rows of
a batch, R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import silu

from samv2_kernels.cpu.batches import Batch, Sums, runs
from samv2_kernels.cpu.blocks import DOWN, GATE, UP, Blocks, FloatBlocks, blocks_of
from samv2_kernels.cpu.padded import pad_sorted, pad_visited, shares
from samv2_kernels.cpu.terms import (
    Rank,
    RankGradients,
    StandInGradients,
    StandIns,
)

Kept = list[tuple[Tensor, Tensor, Tensor]]
"""(n, F) g, u and silu(g) of every batch, which the backward pass needs."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both passes work on."""

    combine_TK: Tensor
    unit: bool
    """The combine weights of visits are 1."""
    blocks: Blocks
    work: list[Batch]
    rank: Rank | None
    stand_ins: StandIns | None


def sorted_batches(
    visit_U: Tensor,
    bounds: Sequence[int],
    shape_TK: Sequence[int],
    blocks: Blocks,
    base_E: Tensor | None,
) -> list[Batch]:
    """Put visits that are sorted by expert in batches.

    Args:
        visit_U: (U,) int64 visits v = t K + slot.
        bounds: E + 1 exclusive offsets of the experts among them.
        shape_TK: (T, K).
        blocks: the layer's.
        base_E: (E,) int64 block of each expert; None: expert e has block e.
    """
    stored = range(len(bounds) - 1) if base_E is None else base_E.tolist()
    if not bounds[-1]:
        return []
    if isinstance(blocks, FloatBlocks):
        groups = shares(bounds, prod(blocks.shape), stored)
        return [pad_sorted(visit_U, bounds, shape_TK, groups)]
    return runs(visit_U, bounds, stored, shape_TK[1], blocks.shape[1])


def visited_batches(
    visited_TE: Tensor, blocks: Blocks, base_E: Tensor | None
) -> list[Batch]:
    """Put visits v = t E + e in batches.

    Args:
        visited_TE: (T, E) bool.
        blocks: the layer's.
        base_E: (E,) int64 block of each expert; None: expert e has block e.
    """
    bounds = [0, *accumulate(visited_TE.sum(0).tolist())]
    if bounds[-1] and isinstance(blocks, FloatBlocks):
        stored = range(len(bounds) - 1) if base_E is None else base_E.tolist()
        groups = shares(bounds, prod(blocks.shape), stored)
        return [pad_visited(visited_TE, bounds, groups)]
    expert_U, token_U = visited_TE.T.nonzero(as_tuple=True)
    visit_U = token_U.mul_(visited_TE.shape[1]).add_(expert_U)
    return sorted_batches(visit_U, bounds, visited_TE.shape, blocks, base_E)


def forward(
    task: Task, x_TD: Tensor, dtype: torch.dtype, *, save: bool
) -> tuple[Tensor, Tensor, Kept]:
    """Run all visits and add them up by token.

    Args:
        task: what to run.
        x_TD: (T, D) inputs.
        dtype: of y, which is summed in float32 or wider.
        save: keep g, u and silu(g).

    Returns:
        (T, D) y; (T, R) l, or (T, 0), in float32 or wider; and what is kept.
    """
    tokens, width = x_TD.shape
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    blocks, rank, work = task.blocks, task.rank, task.work
    y = Sums(tokens, width, dtype)
    low_down = Sums(tokens, 0 if rank is None else rank.down_ERF.shape[1], wide)
    rows_nD = _buffer(x_TD, work, width)
    gate_nF, up_nF = (
        _buffer(x_TD, [] if save else work, blocks.shape[0]) for _ in "gu"
    )
    kept: Kept = []
    for batch in work:
        rows = slice(0, len(batch))
        x = batch.of_tokens(x_TD, rows_nD[rows])
        gate, up = gate_nF[rows], up_nF[rows]
        if save:
            gate, up = (x_TD.new_empty(len(batch), blocks.shape[0]) for _ in "gu")
        blocks.enter(batch, x, gate, up)
        if rank is not None:
            rank.enter(batch, gate, up)
        active = silu(gate)
        hidden = torch.mul(active, up) if save else active.mul_(up)
        if save:
            kept.append((gate, up, active))
        if not task.unit:
            hidden.mul_(batch.of_visits(task.combine_TK, x_TD.dtype))
        # The rows of x have been read: outputs take their place.
        batch.multiply(hidden, blocks.part(DOWN), x)
        if task.stand_ins is not None:
            task.stand_ins.subtract(batch, x)
        batch.add(y, x)
        if rank is not None:
            rank.leave(batch, hidden, low_down)
    return y.complete(), low_down.complete(), kept


def backward(
    task: Task, kept: Kept, grad_y_TD: Tensor, grad_low_TR: Tensor | None
) -> tuple[Tensor, Tensor, RankGradients | None, StandInGradients | None]:
    """Gradients of x, of the combine weights, and of what adapters and surrogates add.

    Args:
        task: what has run.
        kept: of its forward pass.
        grad_y_TD: of y, in x's dtype.
        grad_low_TR: of l, in x's dtype; None if there are no adapters.
    """
    dtype, width = grad_y_TD.dtype, grad_y_TD.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    blocks, work, combine_TK = task.blocks, task.work, task.combine_TK
    drank = None if task.rank is None else RankGradients(task.rank)
    stand_ins = task.stand_ins
    dstand_ins = None if stand_ins is None else StandInGradients(stand_ins, wide)
    dx = Sums(*grad_y_TD.shape, dtype)
    dcombine_TK = torch.zeros_like(combine_TK, dtype=wide)
    rows_nD = _buffer(grad_y_TD, work, width)
    dh_nF, product_nF = (_buffer(grad_y_TD, work, blocks.shape[0]) for _ in "dp")
    for batch, (gate, up, active) in zip(work, kept):
        rows = slice(0, len(batch))
        dy, dh = batch.of_tokens(grad_y_TD, rows_nD[rows]), dh_nF[rows]
        batch.multiply(dy, blocks.part(DOWN, transposed=True), dh)
        if dstand_ins is not None:
            dstand_ins.subtract(batch, dy)
        weight_n1 = None
        # Padding has no part in what adapters sum over rows.
        if not task.unit or drank is not None:
            weight_n1 = batch.of_visits(combine_TK, dtype)
        if drank is not None:
            hidden = torch.mul(active, up, out=product_nF[rows])
            drank.leave(batch, grad_low_TR, weight_n1, hidden, dh)
        dup = torch.mul(active, dh)
        product = torch.mul(dup, up, out=product_nF[rows])
        batch.put(dcombine_TK, product.sum(1, dtype=wide))
        dh.mul_(up)
        if weight_n1 is not None:
            dup.mul_(weight_n1)
            dh.mul_(weight_n1)
        dgate = torch.ops.aten.silu_backward(dh, gate)
        dinput = dy  # Its rows have been read.
        batch.multiply(dgate, blocks.part(GATE), dinput)
        batch.multiply(dup, blocks.part(UP), dinput, add=True)
        batch.add(dx, dinput)
        if drank is not None:
            drank.enter(batch, dgate, dup)
    return dx.complete(), dcombine_TK.to(combine_TK.dtype), drank, dstand_ins


def _buffer(like: Tensor, work: list[Batch], width: int) -> Tensor:
    """Uninitialised rows for the largest batch."""
    return like.new_empty((max(map(len, work), default=0), width))
