"""The CPU kernels of ``samv2::expert_mlp`` and its backward.

Shapes: T tokens, D model width, E experts, F rows an expert, K slots, N = T K visits, R
adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from samv2_kernels.cpu.blocks import blocks_of
from samv2_kernels.cpu.passes import Task, backward, forward, sorted_batches
from samv2_kernels.cpu.terms import rank_of, stand_ins_of


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
    task = _sorted_task(
        x_TD,
        combine_TK,
        order_N,
        offsets,
        weights,
        ffn_width,
        base_E,
        (low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF),
        (low_TQ, out_EQD, reached_TK),
    )
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD, low_down_TR, kept = forward(task, x_TD, wide, save=save)
    gate_NF, up_NF = (
        x_TD.new_zeros((len(order_N) if save else 0, ffn_width)) for _ in "gu"
    )
    used = int(offsets[-1])
    for batch, (gate_nF, up_nF, _) in zip(task.work, kept):
        batch.to_sorted(gate_nF, gate_NF[:used])
        batch.to_sorted(up_nF, up_NF[:used])
    return y_TD, low_down_TR, gate_NF, up_NF


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
    task = _sorted_task(
        x_TD,
        combine_TK,
        order_N,
        offsets,
        weights,
        ffn_width,
        base_E,
        (low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF),
        (low_TQ, out_EQD, reached_TK),
    )
    used, dtype = int(offsets[-1]), x_TD.dtype
    kept = []
    for batch in task.work:
        gate_nF, up_nF = (batch.from_sorted(part[:used]) for part in (gate_NF, up_NF))
        kept.append((gate_nF, up_nF, silu(gate_nF)))
    dx_TD, dcombine_TK, drank, dstand_ins = backward(
        task, kept, grad_y_TD.to(dtype), grad_low_down_TR.to(dtype)
    )
    return (
        dx_TD,
        dcombine_TK,
        *(_nothing(x_TD, 5) if drank is None else drank.complete()),
        *(_nothing(x_TD, 2) if dstand_ins is None else dstand_ins.complete()),
    )


def _nothing(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_empty(0) for _ in range(count)]


def _sorted_task(
    x_TD: Tensor,
    combine_TK: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    ffn_width: int,
    base_E: Tensor | None,
    rank: Sequence[Tensor | None],
    stand_ins: Sequence[Tensor | None],
) -> Task:
    bounds = offsets[:: combine_TK.shape[1]].tolist()
    visit_U = order_N[: bounds[-1]].long()
    blocks = blocks_of(weights, x_TD, ffn_width, base_E)
    return Task(
        combine_TK=combine_TK,
        unit=False,
        blocks=blocks,
        work=sorted_batches(visit_U, bounds, combine_TK.shape, blocks, base_E),
        rank=rank_of(*rank),
        stand_ins=stand_ins_of(*stand_ins),
    )
