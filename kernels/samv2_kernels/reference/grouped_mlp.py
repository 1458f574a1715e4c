"""Grouped SwiGLU experts with row-LoRA adapters and linear surrogates, in plain torch.

An expert e owns F rows of the gate and up projections and F columns of the down
projection of a SwiGLU FFN (EMoE, arXiv 2310.10908); the experts' sum is the FFN. Its
adapter is a set of rows against factors A_g, A_u, B_d that all experts share:

    g = W_g[e] h + s B_g[e] (A_g h)        u likewise
    FFN_e(h) = W_d[e] m + s B_d (A_d[e] m),   m = silu(g) * u

A visit contributes w FFN_e(h_e), minus its surrogate S_e(x) = V_e (U x) + b_e; the sum
of all surrogates is added once a token, so experts that are not visited are replaced by
theirs.

Shapes: T tokens, D model width, E experts, F rows an expert, R adapter rank, Q surrogate
rank, K visits a token, N visits in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from samv2_kernels.reference.walk import NONE, Visits, Walk, visited_ids
from samv2_kernels.weights import (
    ExpertAdapters,
    ExpertWeights,
    Nf4Weights,
    Surrogates,
)


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """Visits sorted by expert (stable in token, then slot)."""

    token_N: Tensor
    """int64; the token of each row."""
    slot_N: Tensor
    """int64; the slot of each row in its token's walk."""
    expert_offsets: Tensor
    """int64, length E + 1, exclusive: expert e owns rows offsets[e]:offsets[e + 1]."""


def rows_by_expert(
    walked: Walk, num_experts: int, select_TK: Tensor | None = None
) -> ExpertRows:
    """Sort visits by expert.

    Args:
        walked: the walk of T tokens.
        num_experts: E.
        select_TK: (T, K) bool, which visits to take; None means all.

    Returns:
        The sorted rows; order within an expert is by token, then slot.
    """
    used_TK = walked.expert_ids_TK >= 0
    if select_TK is not None:
        used_TK = used_TK & select_TK
    token_N, slot_N = used_TK.nonzero(as_tuple=True)
    expert_N = walked.expert_ids_TK[token_N, slot_N]
    order_N = torch.sort(expert_N, stable=True)[1]
    counts_E = torch.bincount(expert_N, minlength=num_experts)
    return ExpertRows(
        token_N=token_N[order_N],
        slot_N=slot_N[order_N],
        expert_offsets=F.pad(counts_E.cumsum(0), (1, 0)),
    )


def expert_rows(
    x_ND: Tensor,
    offsets: list[int],
    weights: ExpertWeights,
    adapters: ExpertAdapters | None,
) -> Tensor:
    """FFN_e of rows that are grouped by expert.

    Args:
        x_ND: (N, D) inputs, grouped.
        offsets: E + 1 exclusive row offsets.
        weights: base blocks in the dtype of ``x_ND``.
        adapters: the rows (shares are those of these N), or None for the base experts
            alone.

    Returns:
        (N, D) outputs in the dtype of ``x_ND``.
    """
    outputs: list[Tensor] = []
    if adapters is not None:
        dtype = x_ND.dtype
        low_gate_NR, low_up_NR = adapters.low_inputs(x_ND)
        gate_EFR = adapters.gate_EFR.to(dtype)
        up_EFR = adapters.up_EFR.to(dtype)
        down_ERF = adapters.down_ERF.to(dtype)
    lows: list[Tensor] = []
    for e, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        if start == stop:
            continue
        rows = slice(start, stop)
        block = e if weights.base_E is None else int(weights.base_E[e])
        gate = x_ND[rows] @ weights.gate_EFD[block].T
        up = x_ND[rows] @ weights.up_EFD[block].T
        if adapters is not None:
            gate = gate + low_gate_NR[rows] @ gate_EFR[e].T
            up = up + low_up_NR[rows] @ up_EFR[e].T
        hidden = F.silu(gate) * up
        outputs.append(hidden @ weights.down_EFD[block])
        if adapters is not None:
            lows.append(hidden @ down_ERF[e].T)
    if not outputs:
        return x_ND.new_zeros(x_ND.shape)
    y_ND = torch.cat(outputs)
    if adapters is not None:
        y_ND = y_ND + adapters.down(torch.cat(lows), dtype)
    return y_ND


def grouped_experts(
    x_TD: Tensor,
    walked: Walk,
    combine_TE: Tensor,
    weights: ExpertWeights | Nf4Weights,
    *,
    adapters: ExpertAdapters | None = None,
    surrogates: Surrogates | None = None,
    edge_strength_EE: Tensor | None = None,
) -> Tensor:
    """Run the visited experts of every token and combine them.

    y = sum_e c_e FFN_e(h_e) + sum_e (1 - r_e) S_e(x), with r the walk's reached set and
    c the combine weights. An expert's input is h_e = x, or x + alpha[parent, e] times
    its parent's output where ``edge_strength_EE`` (alpha) is given.

    Args:
        x_TD: (T, D) inputs.
        walked: the walk of the T tokens.
        combine_TE: (T, E) weights c of visited experts (others are ignored).
        weights: base blocks, in the dtype of ``x_TD``; or NF4, unpacked as a whole.
        adapters: row-LoRA, or None.
        surrogates: stand-ins of the experts that are not visited, or None for zero.
        edge_strength_EE: (E, E) alpha; None means that edges carry no data and all
            visits run as one group; otherwise all visits of a depth do.

    Returns:
        (T, D) in the dtype of ``x_TD``; accumulated in float32 or wider. Of r and c,
        only the entries of visited experts get a gradient.
    """
    if isinstance(weights, Nf4Weights):
        weights = weights.unpack(x_TD.dtype)
    if edge_strength_EE is None:
        y_TD = _one_pass(x_TD, walked, combine_TE, weights, adapters)
    else:
        y_TD = _by_depth(x_TD, walked, combine_TE, weights, adapters, edge_strength_EE)
    if surrogates is not None:
        y_TD = y_TD + surrogate_sum(x_TD, walked.reached_TE, surrogates)
    return y_TD.to(x_TD.dtype)


def surrogate_sum(x_TD: Tensor, reached_TE: Tensor, surrogates: Surrogates) -> Tensor:
    """sum_e (1 - r_e) S_e(x): the stand-ins of the experts that are not visited.

    Either the sum over all experts minus the visited ones, or the absent ones alone,
    whichever touches fewer rows. Where r wants gradients it is the first, so that they
    reach visited experts only, as those of the combine weights do.

    Args:
        x_TD: (T, D) inputs.
        reached_TE: (T, E) the walk's r, 0/1 in value.
        surrogates: the layer's stand-ins.

    Returns:
        (T, D), in the accumulator dtype (float32, or wider where x is).
    """
    dtype = _accumulator_dtype(x_TD)
    low_TQ = x_TD @ surrogates.shared_QD.to(x_TD.dtype).T
    visited_TE = reached_TE.detach() > 0.5
    subtract = reached_TE.requires_grad or 2 * int(visited_TE.sum()) <= (
        visited_TE.numel()
    )
    if subtract:
        total_QD = surrogates.out_EQD.to(dtype).sum(dim=0).to(x_TD.dtype)
        y_TD = (low_TQ @ total_QD).to(dtype)
        y_TD = y_TD + surrogates.bias_ED.to(dtype).sum(dim=0)
        part_TE, weight_TE = visited_TE, -reached_TE
    else:
        y_TD = x_TD.new_zeros(x_TD.shape, dtype=dtype)
        part_TE, weight_TE = ~visited_TE, 1 - reached_TE
    expert_N, token_N = part_TE.T.nonzero(as_tuple=True)
    sizes = part_TE.sum(dim=0).tolist()
    blocks = [
        block @ surrogates.out_EQD[e].to(x_TD.dtype)
        for e, block in enumerate(low_TQ[token_N].split(sizes))
    ]
    rows_ND = torch.cat(blocks).to(dtype) + surrogates.bias_ED.to(dtype)[expert_N]
    weight_N = weight_TE[token_N, expert_N].to(dtype)
    return y_TD.index_add(0, token_N, rows_ND * weight_N.unsqueeze(1))


def _accumulator_dtype(x_TD: Tensor) -> torch.dtype:
    return torch.promote_types(x_TD.dtype, torch.float32)


def _one_pass(
    x_TD: Tensor,
    walked: Walk,
    combine_TE: Tensor,
    weights: ExpertWeights,
    adapters: ExpertAdapters | None,
) -> Tensor:
    num_experts = combine_TE.shape[1]
    rows = rows_by_expert(walked, num_experts)
    offsets = rows.expert_offsets.tolist()
    own = adapters and adapters.for_rows(rows.token_N)
    y_ND = expert_rows(x_TD[rows.token_N], offsets, weights, own)
    expert_N = walked.expert_ids_TK[rows.token_N, rows.slot_N]
    weight_N = combine_TE[rows.token_N, expert_N]
    dtype = _accumulator_dtype(x_TD)
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=dtype)
    return y_TD.index_add(0, rows.token_N, y_ND.to(dtype) * weight_N.unsqueeze(1))


def _by_depth(
    x_TD: Tensor,
    walked: Walk,
    combine_TE: Tensor,
    weights: ExpertWeights,
    adapters: ExpertAdapters | None,
    edge_strength_EE: Tensor,
) -> Tensor:
    num_experts = combine_TE.shape[1]
    num_tokens, slots = walked.expert_ids_TK.shape
    dtype = _accumulator_dtype(x_TD)
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=dtype)
    visits_VD = x_TD.new_zeros((num_tokens * slots, x_TD.shape[1]))
    deepest = int(walked.depth_TK.max()) if num_tokens else -1
    for depth in range(deepest + 1):
        rows = rows_by_expert(walked, num_experts, walked.depth_TK == depth)
        expert_N = walked.expert_ids_TK[rows.token_N, rows.slot_N]
        input_ND = x_TD[rows.token_N]
        if depth:
            parent_slot_N = walked.parent_slot_TK[rows.token_N, rows.slot_N]
            parent_N = walked.expert_ids_TK[rows.token_N, parent_slot_N]
            strength_N = edge_strength_EE[parent_N, expert_N].to(x_TD.dtype)
            carried_ND = visits_VD[rows.token_N * slots + parent_slot_N]
            input_ND = input_ND + strength_N.unsqueeze(1) * carried_ND
        own = adapters and adapters.for_rows(rows.token_N)
        output_ND = expert_rows(input_ND, rows.expert_offsets.tolist(), weights, own)
        visits_VD = visits_VD.index_copy(
            0, rows.token_N * slots + rows.slot_N, output_ND
        )
        weight_N = combine_TE[rows.token_N, expert_N]
        y_TD = y_TD.index_add(
            0, rows.token_N, output_ND.to(dtype) * weight_N.unsqueeze(1)
        )
    return y_TD


def masked_dense_experts(
    x_TD: Tensor,
    reached_TE: Tensor,
    combine_TE: Tensor,
    weights: ExpertWeights,
    *,
    adapters: ExpertAdapters | None = None,
    surrogates: Surrogates | None = None,
) -> Tensor:
    """The sum of :func:`grouped_experts` (no chains), computed as one dense FFN.

    Every expert is computed and the hidden units of unvisited ones are multiplied by
    zero: at K = E this is the FFN itself, and on a CPU it also beats grouping while a
    token visits more than a small share of narrow experts.

    Args:
        x_TD: (T, D) inputs.
        reached_TE: (T, E) the walk's r, 0/1 in value.
        combine_TE: (T, E) combine weights; ignored where r is 0.
        weights: base blocks, in the dtype of ``x_TD``.
        adapters: row-LoRA, or None.
        surrogates: stand-ins of the experts that are not visited, or None for zero.

    Returns:
        (T, D) in the dtype of ``x_TD``; gradients as of :func:`grouped_experts`.
    """
    weights = weights.per_expert
    dtype = x_TD.dtype
    gate_TM = x_TD @ weights.gate_EFD.flatten(0, 1).T
    up_TM = x_TD @ weights.up_EFD.flatten(0, 1).T
    if adapters is not None:
        low_gate_TR, low_up_TR = adapters.low_inputs(x_TD)
        gate_TM = gate_TM + low_gate_TR @ adapters.gate_EFR.to(dtype).flatten(0, 1).T
        up_TM = up_TM + low_up_TR @ adapters.up_EFR.to(dtype).flatten(0, 1).T
    weight_TE = combine_TE * (reached_TE.detach() > 0.5)
    hidden_TEF = (F.silu(gate_TM) * up_TM).unflatten(1, (weight_TE.shape[1], -1))
    hidden_TM = (hidden_TEF * weight_TE.to(dtype).unsqueeze(2)).flatten(1)
    y_TD = hidden_TM @ weights.down_EFD.flatten(0, 1)
    if adapters is not None:
        down_MR = adapters.down_ERF.to(dtype).transpose(1, 2).flatten(0, 1)
        y_TD = y_TD + adapters.down(hidden_TM @ down_MR, dtype)
    if surrogates is not None:
        y_TD = y_TD + spread_surrogates(x_TD, reached_TE, surrogates)
    return y_TD


def spread_surrogates(
    x_TD: Tensor, reached_TE: Tensor, surrogates: Surrogates
) -> Tensor:
    """:func:`surrogate_sum` as one product over all experts, in the dtype of x.

    Its cost depends on E and not on what is visited.
    """
    dtype = x_TD.dtype
    absent_TE = 1 - reached_TE * (reached_TE.detach() > 0.5)
    absent_TE = absent_TE.to(dtype)
    low_TQ = x_TD @ surrogates.shared_QD.to(dtype).T
    spread_TEQ = absent_TE.unsqueeze(2) * low_TQ.unsqueeze(1)
    y_TD = spread_TEQ.flatten(1) @ surrogates.out_EQD.to(dtype).flatten(0, 1)
    return y_TD + absent_TE @ surrogates.bias_ED.to(dtype)


def flat_walk(visits: Visits, slots: int) -> Walk:
    """Visits as a walk of entries only, by rising index.

    Args:
        visits: at most ``slots`` experts a token.
        slots: K of the walk.
    """
    ids_TK = visited_ids(visits.visited_TE, slots)
    return Walk(
        expert_ids_TK=ids_TK,
        parent_slot_TK=torch.full_like(ids_TK, NONE),
        depth_TK=torch.where(ids_TK >= 0, 0, NONE),
        reached_TE=visits.reached_TE,
        chosen_TE=visits.chosen_TE,
    )
