"""What arguments of the experts must look like; all faults are named at once.

Shapes: T tokens, D model width, E experts, B stored blocks, F rows an expert, K slots,
R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samv2_kernels.reference.walk import Visits, Walk
from samv2_kernels.weights import (
    Blocks,
    DecodingWeights,
    ExpertAdapters,
    ExpertWeights,
    Surrogates,
    WordWeights,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def check_experts(
    x_TD: Tensor,
    walked: Visits,
    combine_TE: Tensor,
    weights: Blocks,
    *,
    experts_per_token: int | None,
    adapters: ExpertAdapters | None,
    surrogates: Surrogates | None,
    edge_strength_EE: Tensor | None,
) -> None:
    """Refuse arguments of ``grouped_experts`` that do not belong together.

    Raises:
        ValueError: lists every fault.
    """
    faults: list[str] = []
    if x_TD.dim() != 2 or x_TD.dtype not in DTYPES:
        raise ValueError(
            f"x_TD has shape {tuple(x_TD.shape)} and dtype {x_TD.dtype}; it must be "
            f"(T, D), one of {', '.join(str(dtype) for dtype in DTYPES)}"
        )
    tokens, width = x_TD.shape
    experts = combine_TE.shape[-1]
    _expect(faults, "combine_TE", combine_TE, (tokens, experts))
    _expect(faults, "reached_TE", walked.reached_TE, (tokens, experts))
    _check_visits(faults, walked, tokens, experts, experts_per_token, edge_strength_EE)
    _check_weights(faults, weights, x_TD, experts)
    ffn_width = weights.ffn_width
    if adapters is not None:
        rank = adapters.shared_gate_RD.shape[0]
        _expect(faults, "shared_gate_RD", adapters.shared_gate_RD, (rank, width))
        _expect(faults, "shared_up_RD", adapters.shared_up_RD, (rank, width))
        _expect(faults, "shared_down_DR", adapters.shared_down_DR, (width, rank))
        if adapters.share_TG is not None:
            shares = (len(x_TD), adapters.siblings)
            _expect(faults, "share_TG", adapters.share_TG, shares)
        rank *= adapters.siblings
        _expect(faults, "gate_EFR", adapters.gate_EFR, (experts, ffn_width, rank))
        _expect(faults, "up_EFR", adapters.up_EFR, (experts, ffn_width, rank))
        _expect(faults, "down_ERF", adapters.down_ERF, (experts, rank, ffn_width))
    if surrogates is not None:
        rank = surrogates.shared_QD.shape[0]
        _expect(faults, "shared_QD", surrogates.shared_QD, (rank, width))
        _expect(faults, "out_EQD", surrogates.out_EQD, (experts, rank, width))
        _expect(faults, "bias_ED", surrogates.bias_ED, (experts, width))
        if isinstance(weights, DecodingWeights) and surrogates.out_EQD.requires_grad:
            faults.append(
                "out_EQD wants a gradient; blocks in decoding order are for inference: "
                "use Nf4Weights to train"
            )
    if faults:
        raise ValueError("; ".join(faults))


def _check_visits(
    faults: list[str],
    walked: Visits,
    tokens: int,
    experts: int,
    experts_per_token: int | None,
    edge_strength_EE: Tensor | None,
) -> None:
    if isinstance(walked, Walk):
        slots = walked.expert_ids_TK.shape[-1]
        _expect(faults, "expert_ids_TK", walked.expert_ids_TK, (tokens, slots))
        _expect(faults, "parent_slot_TK", walked.parent_slot_TK, (tokens, slots))
    elif edge_strength_EE is not None:
        faults.append(
            "edge_strength_EE needs the order of the visits: pass a Walk, as walk() "
            "returns it, in place of Visits"
        )
    elif experts_per_token is None or not 1 <= experts_per_token <= experts:
        faults.append(
            f"experts_per_token is {experts_per_token}; visits without order need it, "
            f"in 1..{experts}"
        )
    if edge_strength_EE is not None:
        _expect(faults, "edge_strength_EE", edge_strength_EE, (experts, experts))


def _check_weights(
    faults: list[str],
    weights: Blocks,
    x_TD: Tensor,
    experts: int,
) -> None:
    if isinstance(weights, ExpertWeights):
        parts = dict(gate=weights.gate_EFD, up=weights.up_EFD, down=weights.down_EFD)
        dtypes = {part.dtype for part in parts.values()}
        fits = dtypes == {x_TD.dtype}
    elif isinstance(weights, DecodingWeights):
        parts = dict(down=weights.down)
        dtypes = {torch.bfloat16}
        fits = x_TD.dtype in dtypes
    elif isinstance(weights, WordWeights):
        parts = dict(gate=weights.gate, up=weights.up, down=weights.down)
        dtypes = {torch.bfloat16}
        fits = x_TD.dtype in dtypes
        if not x_TD.is_cuda:
            faults.append(
                f"x_TD is on {x_TD.device}; NF4 words are for GPUs: use Nf4Weights here"
            )
    else:
        parts = dict(gate=weights.gate, up=weights.up, down=weights.down)
        dtypes = {torch.float32, torch.bfloat16}
        fits = x_TD.dtype in dtypes
    if not fits:
        names = " or ".join(sorted(map(str, dtypes)))
        faults.append(f"x_TD is {x_TD.dtype}; these weights need {names}")
    shape = tuple(next(iter(parts.values())).shape)
    wanted = (*shape[:2], x_TD.shape[1])
    for name, part in parts.items():
        if tuple(part.shape) != wanted:
            faults.append(
                f"{name} blocks have shape {tuple(part.shape)}; they must be {wanted}"
            )
    if weights.base_E is not None:
        _expect(faults, "base_E", weights.base_E, (experts,))
    elif shape[0] != experts:
        faults.append(
            f"there are {shape[0]} blocks for {experts} experts; base_E must say which "
            "block each expert has"
        )


def _expect(
    faults: list[str], name: str, found: Tensor, wanted: tuple[int, ...]
) -> None:
    if tuple(found.shape) != wanted:
        faults.append(f"{name} has shape {tuple(found.shape)}; it must be {wanted}")
