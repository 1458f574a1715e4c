"""Run the visited experts of every token: the public function over the op.

Shapes: T tokens, D model width, E experts, K slots, R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samv2_kernels import cpu, reference
from samv2_kernels.checks import check_experts
from samv2_kernels.dispatch import sort_visits
from samv2_kernels.expert_mlp import expert_mlp
from samv2_kernels.gradients import wants_gradient
from samv2_kernels.reference.walk import Visits, Walk
from samv2_kernels.weights import (
    Blocks,
    ExpertAdapters,
    ExpertWeights,
    Surrogates,
)


def grouped_experts(
    x_TD: Tensor,
    walked: Visits,
    combine_TE: Tensor,
    weights: Blocks,
    *,
    experts_per_token: int | None = None,
    adapters: ExpertAdapters | None = None,
    surrogates: Surrogates | None = None,
    edge_strength_EE: Tensor | None = None,
) -> Tensor:
    """Run the visited experts of every token and combine them.

    y = sum_e c_e FFN_e(h_e) + sum_e (1 - r_e) S_e(x), with r the walk's reached set and
    c the combine weights. An expert's input is h_e = x, or x + alpha[parent, e] times
    its parent's output where ``edge_strength_EE`` (alpha) is given.

    Base blocks and the surrogates' V_e are taken to be frozen; where one of them wants a
    gradient, the plain-torch reference runs instead of the op.

    Args:
        x_TD: (T, D) float64, float32 or bfloat16 inputs.
        walked: the visits of the T tokens; a walk where edges carry data.
        combine_TE: (T, E) weights c of visited experts (others are ignored); where they
            are r, that tensor itself costs least.
        weights: base blocks, in the dtype of ``x_TD``; or NF4, for float32 or bfloat16
            inputs; or in decoding order, for bfloat16 inputs without gradients.
        experts_per_token: K, the most visits of a token; only for visits without order.
        adapters: row-LoRA, or None.
        surrogates: stand-ins of the experts that are not visited, or None for zero.
        edge_strength_EE: (E, E) alpha; None means that edges carry no data and all
            visits run as one group; otherwise all visits of a slot do.

    Returns:
        (T, D) in the dtype of ``x_TD``; accumulated in float32 or wider, and rounded
        before surrogates of all experts are added. Of r and c, only the entries of
        visited experts get a gradient.

    Raises:
        ValueError: shapes or dtypes do not belong together; or visits without order
            come without ``experts_per_token``, or with ``edge_strength_EE``.
    """
    check_experts(
        x_TD,
        walked,
        combine_TE,
        weights,
        experts_per_token=experts_per_token,
        adapters=adapters,
        surrogates=surrogates,
        edge_strength_EE=edge_strength_EE,
    )
    if trained(weights, surrogates):
        if not isinstance(walked, Walk):
            walked = reference.flat_walk(walked, experts_per_token)
        return reference.grouped_experts(
            x_TD,
            walked,
            combine_TE,
            weights,
            adapters=adapters,
            surrogates=surrogates,
            edge_strength_EE=edge_strength_EE,
        )
    if edge_strength_EE is None:
        y_TD = _one_pass(
            x_TD,
            walked,
            combine_TE,
            weights,
            experts_per_token,
            adapters,
            surrogates,
        )
    else:
        y_TD = _by_slot(x_TD, walked, combine_TE, weights, adapters, edge_strength_EE)
        if surrogates is not None:
            y_TD = y_TD + reference.spread_surrogates(
                x_TD, walked.reached_TE, surrogates
            )
    return y_TD.to(x_TD.dtype)


def trained(weights: Blocks, surrogates: Surrogates | None) -> bool:
    """Whether something wants a gradient that the op takes to be frozen."""
    frozen = [] if surrogates is None else [surrogates.out_EQD]
    if isinstance(weights, ExpertWeights):
        frozen += [weights.gate_EFD, weights.up_EFD, weights.down_EFD]
    return wants_gradient(*frozen)


def _one_pass(
    x_TD: Tensor,
    walked: Visits,
    combine_TE: Tensor,
    weights: Blocks,
    experts_per_token: int | None,
    adapters: ExpertAdapters | None,
    surrogates: Surrogates | None,
) -> Tensor:
    """All visits as one group, (T, D); with surrogates in the dtype of x, else wider."""
    visited_TE = walked.visited_TE
    low_TQ = out_EQD = None
    if surrogates is not None:
        low_TQ = x_TD @ surrogates.shared_QD.to(x_TD.dtype).T
        out_EQD = surrogates.out_EQD.to(x_TD.dtype)
    if cpu.is_plain_eager(x_TD):
        reached_TE = None if surrogates is None else walked.reached_TE
        y_TD = add_down(
            x_TD,
            adapters,
            *cpu.direct_experts(
                x_TD,
                combine_TE,
                visited_TE,
                weights.tensors,
                weights.ffn_width,
                weights.base_E,
                rank_terms(x_TD, adapters),
                (low_TQ, out_EQD, reached_TE),
                unit=combine_TE is walked.reached_TE,
            ),
        )
    else:
        if not isinstance(walked, Walk):
            walked = reference.flat_walk(walked, experts_per_token)
        ids_TK = walked.expert_ids_TK
        reached_TK = None
        if surrogates is not None:
            reached_TK = _of_visits(walked.reached_TE, ids_TK)
        combine_TK = _of_visits(combine_TE, ids_TK)
        stand_ins = (low_TQ, out_EQD, reached_TK)
        y_TD = _run(x_TD, ids_TK, combine_TK, weights, adapters, stand_ins)
    if surrogates is not None:
        dtype = x_TD.dtype
        total_QD = surrogates.out_EQD.sum(dim=0, dtype=y_TD.dtype).to(dtype)
        absent_TE = (1 - walked.reached_TE * visited_TE).to(dtype)
        left = torch.cat([low_TQ, absent_TE], dim=1)
        right = torch.cat([total_QD, surrogates.bias_ED.to(dtype)])
        y_TD = torch.addmm(y_TD.to(dtype), left, right)
    return y_TD


def _by_slot(
    x_TD: Tensor,
    walked: Walk,
    combine_TE: Tensor,
    weights: Blocks,
    adapters: ExpertAdapters | None,
    edge_strength_EE: Tensor,
) -> Tensor:
    """Slot after slot, each with its parents' outputs at hand; (T, D) as above."""
    ids_TK, parent_slot_TK = walked.expert_ids_TK, walked.parent_slot_TK
    weight_TK = _of_visits(combine_TE, ids_TK)
    parent_TK = ids_TK.gather(1, parent_slot_TK.clamp(min=0)).clamp(min=0)
    strength_TK = edge_strength_EE[parent_TK, ids_TK.clamp(min=0)]
    strength_TK = torch.where(parent_slot_TK >= 0, strength_TK, 0).to(x_TD.dtype)
    one_T1 = torch.ones_like(weight_TK[:, :1])
    y_TD: Tensor | None = None
    outputs: list[Tensor] = []
    for slot in range(ids_TK.shape[1]):
        input_TD = x_TD
        if slot:
            carried_TD = _pick(outputs, parent_slot_TK[:, slot])
            input_TD = x_TD + strength_TK[:, slot : slot + 1] * carried_TD
        output_TD = _run(
            input_TD, ids_TK[:, slot : slot + 1], one_T1, weights, adapters
        )
        outputs.append(output_TD.to(x_TD.dtype))
        weighted_TD = output_TD * weight_TK[:, slot : slot + 1]
        y_TD = weighted_TD if y_TD is None else y_TD + weighted_TD
    return y_TD


def _pick(outputs: list[Tensor], slot_T: Tensor) -> Tensor:
    """Each token's row of the output of one slot; slot -1 reads slot 0."""
    stacked_TSD = torch.stack(outputs, dim=1)
    index_T11 = slot_T.clamp(min=0)[:, None, None]
    index_T1D = index_T11.expand(-1, 1, stacked_TSD.shape[2])
    return stacked_TSD.gather(1, index_T1D).squeeze(1)


def _run(
    x_TD: Tensor,
    ids_TK: Tensor,
    combine_TK: Tensor,
    weights: Blocks,
    adapters: ExpertAdapters | None,
    stand_ins: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:
    """The op on given visits, and the adapters' matmuls around it."""
    rank = rank_terms(x_TD, adapters)
    order = sort_visits(ids_TK, weights.num_experts)
    parts = (combine_TK, *rank, stand_ins[0], stand_ins[2], x_TD)
    y_TD, low_down_TR, _, _ = expert_mlp(
        x_TD,
        combine_TK,
        order.order_N,
        order.offsets,
        weights.tensors,
        weights.ffn_width,
        weights.base_E,
        *rank,
        *stand_ins,
        wants_gradient(*parts),
    )
    return add_down(x_TD, adapters, y_TD, low_down_TR)


def rank_terms(
    x_TD: Tensor, adapters: ExpertAdapters | None
) -> tuple[Tensor | None, ...]:
    """What the op is told of adapters."""
    if adapters is None:
        return (None,) * 5
    rows = (adapters.gate_EFR, adapters.up_EFR, adapters.down_ERF)
    return (*adapters.low_inputs(x_TD), *(part.to(x_TD.dtype) for part in rows))


def add_down(
    x_TD: Tensor,
    adapters: ExpertAdapters | None,
    y_TD: Tensor,
    low_down_TR: Tensor,
) -> Tensor:
    """y with the adapters' part of the down projection."""
    if adapters is None:
        return y_TD
    return y_TD.add_(adapters.down(low_down_TR, x_TD.dtype))


def _of_visits(values_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Each visit's entry; unused slots read expert 0's, which nobody looks at."""
    return values_TE.gather(1, ids_TK.clamp(min=0))
