"""Closed-form surrogates and gates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samv2.experts.calibration import (
    RIDGE,
    Gate,
    average_gate,
    expert_hidden,
    fit_gate,
    fit_surrogates,
    input_moments,
)
from samv2_kernels import ExpertWeights, Surrogates
from tests.helpers import assert_close, randn

TOKENS, WIDTH, EXPERTS, ROWS = 200, 6, 3, 4


def expert_output(x_ND: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
    """FFN_e(x), (N, D)."""
    down_FD = weights.down_EFD[expert]
    return expert_hidden(x_ND, weights)[:, expert].to(down_FD.dtype) @ down_FD


def make_weights() -> ExpertWeights:
    return ExpertWeights(
        gate_EFD=randn(EXPERTS, ROWS, WIDTH, seed=1),
        up_EFD=randn(EXPERTS, ROWS, WIDTH, seed=2),
        down_EFD=randn(EXPERTS, ROWS, WIDTH, seed=3),
    )


def inputs() -> tuple[Tensor, Tensor]:
    """Inputs that are not centred, and target norms over two orders of magnitude."""
    x_ND = randn(TOKENS, WIDTH, seed=4) + torch.arange(WIDTH) / 3
    return x_ND, (2 * randn(TOKENS, seed=5)).exp()


def stand_in(x_ND: Tensor, surrogates: Surrogates, expert: int) -> Tensor:
    low_NQ = x_ND @ surrogates.shared_QD.T
    return low_NQ @ surrogates.out_EQD[expert] + surrogates.bias_ED[expert]


def ridge_solution(
    x_ND: Tensor, y_NK: Tensor, target_norm_N: Tensor
) -> tuple[Tensor, Tensor]:
    """argmin sum_n w_n |y_n - x_n B - b|^2 + lambda |B|^2, by augmented least squares."""
    x_ND, y_NK = x_ND.double(), y_NK.double()
    weight_N1 = target_norm_N.double().pow(-2).unsqueeze(1)
    weight_N1 = weight_N1 / weight_N1.mean()
    mean_D = (weight_N1 * x_ND).mean(dim=0)
    penalty = RIDGE * float((weight_N1 * (x_ND - mean_D).square()).sum()) / WIDTH
    design = torch.cat([torch.ones(len(x_ND), 1), x_ND], dim=1) * weight_N1.sqrt()
    ridge = torch.zeros(WIDTH, WIDTH + 1, dtype=torch.double)
    ridge[:, 1:] = torch.eye(WIDTH) * penalty**0.5
    zeros = torch.zeros(WIDTH, y_NK.shape[1], dtype=torch.double)
    solution = torch.linalg.lstsq(
        torch.cat([design, ridge]), torch.cat([y_NK * weight_N1.sqrt(), zeros])
    ).solution
    return solution[1:].float(), solution[0].float()


def weighted_error(surrogates: Surrogates, weights: ExpertWeights) -> float:
    x_ND, norm_N = inputs()
    total = torch.zeros(TOKENS)
    for expert in range(EXPERTS):
        y_ND = expert_output(x_ND, weights, expert)
        total += (y_ND - stand_in(x_ND, surrogates, expert)).square().sum(dim=1)
    return float((total / norm_N.square()).mean())


def test_hidden_units_are_those_of_every_expert() -> None:
    (x_ND, _), weights = inputs(), make_weights()
    hidden_NEF = expert_hidden(x_ND, weights)
    assert hidden_NEF.shape == (TOKENS, EXPERTS, ROWS)
    for expert in range(EXPERTS):
        gate_NF = x_ND @ weights.gate_EFD[expert].T
        expected = torch.nn.functional.silu(gate_NF) * (x_ND @ weights.up_EFD[expert].T)
        assert_close("hidden", hidden_NEF[:, expert], expected, "fp32")


def test_moments_are_those_of_the_weighted_inputs() -> None:
    """Their level undoes the scaling of the weights."""
    x_ND, norm_N = inputs()
    moments = input_moments(x_ND, norm_N)
    assert float(moments.weight_N.mean()) == pytest.approx(1, rel=1e-5)
    assert_close("weights", moments.weight_N * moments.level, norm_N.pow(-2), "fp32")
    weight_N1 = moments.weight_N.double().unsqueeze(1)
    mean_D = (weight_N1 * x_ND).mean(dim=0)
    assert_close("mean", moments.mean_D, mean_D, "fp32")
    centred_ND = x_ND.double() - mean_D
    second_DD = (weight_N1 * centred_ND).T @ centred_ND
    ridge = RIDGE * second_DD.diagonal().mean()
    inverse_DD = torch.linalg.inv(second_DD + ridge * torch.eye(WIDTH).double())
    found_DD = moments.whiten_DD.T @ moments.whiten_DD
    assert_close("whitening", found_DD, inverse_DD, "logits")


def test_full_rank_surrogates_are_the_ridge_solution() -> None:
    (x_ND, norm_N), weights = inputs(), make_weights()
    surrogates = fit_surrogates(x_ND, weights, input_moments(x_ND, norm_N), WIDTH)
    for expert in range(EXPERTS):
        y_ND = expert_output(x_ND, weights, expert)
        slope_DD, bias_D = ridge_solution(x_ND, y_ND, norm_N)
        found = surrogates.shared_QD.T @ surrogates.out_EQD[expert]
        assert_close("slope", found, slope_DD, "logits")
        assert_close("bias", surrogates.bias_ED[expert], bias_D, "logits")


def test_surrogates_of_higher_rank_fit_better() -> None:
    (x_ND, norm_N), weights = inputs(), make_weights()
    moments = input_moments(x_ND, norm_N)
    errors = []
    for rank in range(1, WIDTH + 1):
        surrogates = fit_surrogates(x_ND, weights, moments, rank)
        assert surrogates.shared_QD.shape == (rank, WIDTH)
        assert surrogates.out_EQD.shape == (EXPERTS, rank, WIDTH)
        errors.append(weighted_error(surrogates, weights))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]


def test_no_other_subspace_of_the_same_rank_fits_better() -> None:
    (x_ND, norm_N), weights = inputs(), make_weights()
    moments = input_moments(x_ND, norm_N)
    best = weighted_error(fit_surrogates(x_ND, weights, moments, 2), weights)
    full = fit_surrogates(x_ND, weights, moments, WIDTH)
    for seed in range(5):
        basis_DQ = torch.linalg.qr(randn(WIDTH, 2, seed=seed))[0]
        project = basis_DQ @ basis_DQ.T
        other = replace(
            full,
            out_EQD=torch.einsum("pq,eqd->epd", project, full.out_EQD),
        )
        shift = [
            (expert_output(x_ND, weights, e) - stand_in(x_ND, other, e))
            for e in range(3)
        ]
        weight = moments.weight_N.unsqueeze(1)
        bias = torch.stack([(weight * rest).mean(dim=0) for rest in shift])
        assert (
            weighted_error(replace(other, bias_ED=full.bias_ED + bias), weights) > best
        )


def test_surrogates_of_a_linear_expert_are_that_expert() -> None:
    """With every gate saturated, silu(g) u = g u and u constant: linear in x."""
    x_ND = randn(TOKENS, WIDTH, seed=0)
    x_ND[:, 0] = 1.0
    weights = make_weights()
    gate_EFD, up_EFD = weights.gate_EFD.clone(), torch.zeros_like(weights.up_EFD)
    gate_EFD[:, :, 0], up_EFD[:, :, 0] = 100.0, 1.0
    weights = replace(weights, gate_EFD=gate_EFD, up_EFD=up_EFD)
    surrogates = fit_surrogates(
        x_ND, weights, input_moments(x_ND, torch.ones(TOKENS)), WIDTH
    )
    for expert in range(EXPERTS):
        y_ND = expert_output(x_ND, weights, expert)
        varied = y_ND - y_ND.mean(dim=0)
        error = stand_in(x_ND, surrogates, expert) - y_ND
        assert float(error.norm() / varied.norm()) < 1.5 * RIDGE


def test_the_gate_finds_a_planted_linear_norm() -> None:
    """||FFN_e(x)|| = x . v_e exactly: one row, gate saturated, up constant, |down| = 1."""
    x_ND = randn(TOKENS, WIDTH, seed=0)
    x_ND[:, 0] = 1.0
    planted_ED = randn(EXPERTS, WIDTH, seed=6)
    planted_ED[:, 0] = 60.0
    down_E1D = torch.nn.functional.normalize(randn(EXPERTS, 1, WIDTH, seed=7), dim=2)
    up_E1D = torch.zeros(EXPERTS, 1, WIDTH)
    up_E1D[:, :, 0] = 1.0
    weights = ExpertWeights(
        gate_EFD=planted_ED.unsqueeze(1), up_EFD=up_E1D, down_EFD=down_E1D
    )
    gate = fit_gate(x_ND, weights, input_moments(x_ND, torch.ones(TOKENS)), None)
    shrunk = float((gate.weight_ED[:, 1:] / planted_ED[:, 1:] - 1).abs().max())
    assert shrunk < 0.15, "up to the ridge"
    scores_NE = x_ND @ gate.weight_ED.T + gate.bias_E
    expected_NE = x_ND @ planted_ED.T
    spread = float((expected_NE - expected_NE.mean(dim=0)).norm())
    assert float((scores_NE - expected_NE).norm()) < 1.5 * RIDGE * spread


def test_the_gate_predicts_the_gain_beyond_the_surrogate() -> None:
    (x_ND, norm_N), weights = inputs(), make_weights()
    moments = input_moments(x_ND, norm_N)
    surrogates = fit_surrogates(x_ND, weights, moments, 2)
    gate = fit_gate(x_ND, weights, moments, surrogates)
    gain_NE = torch.stack(
        [
            (expert_output(x_ND, weights, e) - stand_in(x_ND, surrogates, e)).norm(
                dim=1
            )
            for e in range(EXPERTS)
        ],
        dim=1,
    )
    slope_DE, bias_E = ridge_solution(x_ND, gain_NE, norm_N)
    assert_close("weight", gate.weight_ED, slope_DE.T, "logits")
    assert_close("bias", gate.bias_E, bias_E, "logits")


def test_the_average_gate_is_the_mean_row() -> None:
    weights = make_weights()
    gate = average_gate(weights)
    assert_close("mean", gate.weight_ED, weights.gate_EFD.mean(dim=1), "fp32")
    assert torch.equal(gate.bias_E, torch.zeros(EXPERTS))


@pytest.mark.parametrize("tokens", [1, 7])
def test_inputs_that_do_not_vary_give_constants(tokens: int) -> None:
    weights = make_weights()
    x_ND = torch.ones(tokens, WIDTH)
    moments = input_moments(x_ND, torch.ones(tokens))
    surrogates = fit_surrogates(x_ND, weights, moments, 2)
    for expert in range(EXPERTS):
        y_ND = expert_output(x_ND, weights, expert)
        assert_close("S", stand_in(x_ND, surrogates, expert), y_ND, "logits")
    gate = fit_gate(x_ND, weights, moments, None)
    assert isinstance(gate, Gate) and bool(gate.weight_ED.isfinite().all())


def test_bfloat16_experts_are_fitted_in_float32() -> None:
    (x_ND, norm_N), weights = inputs(), make_weights()
    half = ExpertWeights(
        **{
            name: part.bfloat16()
            for name, part in vars(weights).items()
            if part is not None
        }
    )
    x_ND = x_ND.bfloat16()
    moments = input_moments(x_ND, norm_N)
    surrogates = fit_surrogates(x_ND, half, moments, 2)
    gate = fit_gate(x_ND, half, moments, surrogates)
    for value in (*vars(surrogates).values(), *vars(gate).values()):
        assert value.dtype == torch.float32
    wide = fit_surrogates(
        x_ND.float(),
        ExpertWeights(**{n: v.float() for n, v in vars(half).items() if v is not None}),
        moments,
        WIDTH,
    )
    found = fit_surrogates(x_ND, half, moments, WIDTH)
    slopes = [s.shared_QD.T @ s.out_EQD[1] for s in (found, wide)]
    assert_close("slope", slopes[0], slopes[1], "bf16")
