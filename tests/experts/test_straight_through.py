"""Scores and choice have the values and gradients of plain autograd."""

from __future__ import annotations

import pytest
import torch

from samv2.experts.straight_through import Choice, GateScores
from samv2_kernels.reference import choose_topk, topk_threshold
from tests.helpers import assert_close, randn

TOKENS, WIDTH, EXPERTS = 11, 24, 5


@pytest.mark.parametrize(
    "dtype, ratio", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]
)
def test_scores_are_those_of_a_linear_layer(dtype: torch.dtype, ratio: str) -> None:
    x_TD = randn(TOKENS, WIDTH, seed=1).to(dtype).requires_grad_()
    weight_ED = randn(EXPERTS, WIDTH, seed=2).requires_grad_()
    bias_E = randn(EXPERTS, seed=3).requires_grad_()
    leaves = {"x": x_TD, "weight": weight_ED, "bias": bias_E}
    probe_TE = randn(TOKENS, EXPERTS, seed=4)
    found_TE = GateScores.apply(x_TD, weight_ED, bias_E)
    wanted_TE = x_TD.float() @ weight_ED.T + bias_E
    assert found_TE.dtype == torch.float32
    assert_close("scores", found_TE, wanted_TE.detach(), "fp32")
    found = torch.autograd.grad((found_TE * probe_TE).sum(), list(leaves.values()))
    wanted = torch.autograd.grad((wanted_TE * probe_TE).sum(), list(leaves.values()))
    for name, one, other in zip(leaves, found, wanted):
        assert one.dtype == other.dtype
        assert_close(name, one, other, ratio if name == "x" else "fp32")


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_is_wanted_gets_a_gradient(wanted: int) -> None:
    given = [randn(3, 4, seed=1), randn(2, 4, seed=2), randn(2, seed=3)]
    given[wanted].requires_grad_()
    GateScores.apply(*given).sum().backward()
    assert [part.grad is not None for part in given] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_choice_is_hard_with_the_gradient_of_a_sigmoid(k: int) -> None:
    scores_TE = randn(TOKENS, EXPERTS, seed=5).requires_grad_()
    threshold_T1 = topk_threshold(scores_TE.detach(), k)
    chosen_TE = choose_topk(scores_TE, k, threshold_T1=threshold_T1)
    probe_TE = randn(TOKENS, EXPERTS, seed=6)
    q_TE = Choice.apply(scores_TE, chosen_TE, threshold_T1)
    assert torch.equal(q_TE, chosen_TE.float())
    (found_TE,) = torch.autograd.grad((q_TE * probe_TE).sum(), scores_TE)
    soft_TE = torch.sigmoid(scores_TE - threshold_T1)
    (wanted_TE,) = torch.autograd.grad((soft_TE * probe_TE).sum(), scores_TE)
    assert_close("scores", found_TE, wanted_TE, "fp32")
