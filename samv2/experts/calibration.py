"""Closed-form calibration of one converted layer: surrogates and gate.

Both are fitted on the FFN inputs x of calibration tokens, on the stream of the layers
already converted, with every token weighted by 1 / ||target||^2 (a few tokens carry
norms above 1e4 and would rule a plain least-squares fit).

Surrogates S_e(x) = V_e U x + b_e, one U (Q x D) a layer: reduced-rank ridge regression
of all experts' outputs on x (Izenman 1975). With C = X'X + lambda I and
M_e = X'Y_e, the columns of C^(1/2) U' are the leading eigenvectors of
sum_e C^(-1/2) M_e M_e' C^(-1/2), and V_e = U M_e.

Gate g = G x + c: ridge regression on what a visit gains, ||FFN_e(x) - S_e(x)||
(the norm-predicting router of D2DMoE, arXiv 2310.04361).

Shapes: N calibration tokens, D model width, E experts, F rows an expert, Q rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from samv2.experts.linear_algebra import leading_eigenvectors
from samv2_kernels import ExpertWeights, Surrogates

RIDGE = 1e-2
"""lambda as a fraction of the mean diagonal of X'X."""
LEAST_GAIN = 1e-4
"""Norms below this count as this much where their logarithm is taken."""
LEAST_RIDGE = 1e-6
"""lambda where the inputs do not vary, e.g. a single token."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The router's linear layer: scores g = weight x + bias."""

    weight_ED: Tensor
    """(E, D) float32."""
    bias_E: Tensor
    """(E,) float32."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Centred, weighted second moments of the inputs, and their factorisation."""

    mean_D: Tensor
    whiten_DD: Tensor
    """W with W'W = (X'X + lambda I)^(-1): the inverse of its Cholesky factor."""
    weight_N: Tensor
    """Token weights, mean 1."""
    level: float
    """Mean of 1 / ||target||^2, which the weights were divided by."""


def expert_hidden(x_ND: Tensor, weights: ExpertWeights) -> Tensor:
    """silu(W_g x) * (W_u x) of all experts, (N, E, F), computed in the weights' dtype."""
    x_ND = x_ND.to(weights.gate_EFD.dtype)
    gate_NM = x_ND @ weights.gate_EFD.flatten(0, 1).T
    up_NM = x_ND @ weights.up_EFD.flatten(0, 1).T
    return (silu(gate_NM) * up_NM).unflatten(1, weights.gate_EFD.shape[:2])


def input_moments(x_ND: Tensor, target_norm_N: Tensor) -> Moments:
    """Weighted moments of the inputs.

    Args:
        x_ND: (N, D) FFN inputs.
        target_norm_N: (N,) norms of what the layer should produce; tokens are weighted
            by their inverse squares.
    """
    weight_N = target_norm_N.float().clamp(min=1e-6).pow(-2)
    level = weight_N.mean()
    weight_N = weight_N / level
    x_ND = x_ND.float()
    mean_D = (weight_N.unsqueeze(1) * x_ND).mean(dim=0)
    centred_ND = x_ND - mean_D
    second_DD = (centred_ND * weight_N.unsqueeze(1)).T @ centred_ND
    ridge = RIDGE * second_DD.diagonal().double().mean()
    identity_DD = torch.eye(len(second_DD), dtype=torch.double)
    regular_DD = second_DD.double() + ridge.clamp(min=LEAST_RIDGE) * identity_DD
    factor_DD = torch.linalg.cholesky(regular_DD)
    whiten_DD = torch.linalg.solve_triangular(factor_DD, identity_DD, upper=False)
    return Moments(
        mean_D=mean_D,
        whiten_DD=whiten_DD.float(),
        weight_N=weight_N,
        level=float(level),
    )


def fit_surrogates(
    x_ND: Tensor, weights: ExpertWeights, moments: Moments, rank: int
) -> Surrogates:
    """Reduced-rank ridge regression of every expert's output on the layer's input.

    Args:
        x_ND: (N, D) FFN inputs.
        weights: the layer's E experts.
        moments: of the same inputs.
        rank: Q, 1 <= Q <= D.
    """
    num_experts, _, width = weights.gate_EFD.shape
    weight_N1 = moments.weight_N.unsqueeze(1)
    centred_ND = (x_ND.float() - moments.mean_D) * weight_N1
    hidden_NEF = expert_hidden(x_ND, weights).float()
    cross_DM = moments.whiten_DD @ (centred_ND.T @ hidden_NEF.flatten(1))
    cross_EDF = cross_DM.unflatten(1, hidden_NEF.shape[1:]).movedim(1, 0)
    gram_DD = torch.zeros_like(moments.whiten_DD)
    means = []
    for expert in range(num_experts):
        down_FD = weights.down_EFD[expert].float()
        means.append((weight_N1 * hidden_NEF[:, expert]).mean(dim=0) @ down_FD)
        gram_DD += cross_EDF[expert] @ (down_FD @ down_FD.T) @ cross_EDF[expert].T
    leading_DQ = leading_eigenvectors(gram_DD, min(rank, width))[1]
    shared_QD = leading_DQ.T @ moments.whiten_DD
    out_EQD = torch.stack(
        [
            (leading_DQ.T @ cross_DF) @ weights.down_EFD[expert].float()
            for expert, cross_DF in enumerate(cross_EDF)
        ]
    )
    bias_ED = torch.stack(means) - (shared_QD @ moments.mean_D) @ out_EQD
    return Surrogates(shared_QD=shared_QD, out_EQD=out_EQD, bias_ED=bias_ED)


def fit_gate(
    x_ND: Tensor,
    weights: ExpertWeights,
    moments: Moments,
    surrogates: Surrogates | None,
    *,
    logarithm: bool = False,
) -> Gate:
    """Ridge regression of ||FFN_e(x) - S_e(x)|| on x (S = 0 without surrogates).

    Args:
        x_ND: (N, D) FFN inputs.
        weights: the layer's E experts.
        moments: of the same inputs.
        surrogates: S.
        logarithm: regress the logarithm of the norms instead; scores then tell ratios
            of gains, and large ones weigh less.
    """
    if surrogates is not None:
        one_N1 = torch.ones(len(x_ND), 1)
        low_NQ1 = torch.cat([x_ND.float() @ surrogates.shared_QD.T, one_N1], dim=1)
    hidden_NEF, gains = expert_hidden(x_ND, weights).float(), []
    for expert in range(weights.gate_EFD.shape[0]):
        features = [hidden_NEF[:, expert]]
        rows = [weights.down_EFD[expert].float()]
        if surrogates is not None:
            features.append(low_NQ1)
            rows += [
                -surrogates.out_EQD[expert],
                -surrogates.bias_ED[expert : expert + 1],
            ]
        gains.append(_row_norms(torch.cat(features, dim=1), torch.cat(rows)))
    gain_NE = torch.stack(gains, dim=1)
    if logarithm:
        gain_NE = gain_NE.clamp(min=LEAST_GAIN).log()
    weight_N1 = moments.weight_N.unsqueeze(1)
    mean_E = (weight_N1 * gain_NE).mean(dim=0)
    centred_ND = (x_ND.float() - moments.mean_D) * weight_N1
    cross_DE = moments.whiten_DD @ (centred_ND.T @ (gain_NE - mean_E))
    weight_ED = (moments.whiten_DD.T @ cross_DE).T.contiguous()
    return Gate(weight_ED=weight_ED, bias_E=mean_E - weight_ED @ moments.mean_D)


def _row_norms(left_NK: Tensor, right_KD: Tensor) -> Tensor:
    """Norms of the rows of left @ right, through right's K x K Gram matrix."""
    gram_KK = right_KD @ right_KD.T
    return ((left_NK @ gram_KK) * left_NK).sum(dim=1).clamp(min=0).sqrt()


def average_gate(weights: ExpertWeights) -> Gate:
    """EMoE's avg-k gate: the mean gate-projection row of each expert, no bias.

    It needs no text. On a converted SwiGLU model it ranks experts badly, far worse than
    the calibrated gate; it is here as the published method.
    """
    weight_ED = weights.gate_EFD.float().mean(dim=1)
    return Gate(weight_ED=weight_ED, bias_E=weight_ED.new_zeros(weight_ED.shape[0]))
