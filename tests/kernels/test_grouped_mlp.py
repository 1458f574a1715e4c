"""Grouped experts and the masked dense FFN against one token at a time, in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samv2_kernels.reference import (
    ExpertAdapters,
    ExpertWeights,
    Surrogates,
    Walk,
    expert_rows,
    grouped_experts,
    masked_dense_experts,
    rows_by_expert,
    surrogate_sum,
    walk,
)
from tests.helpers import assert_close, generator, randn


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One layer, T tokens and their walk."""

    x_TD: Tensor
    walked: Walk
    combine_TE: Tensor
    weights: ExpertWeights
    adapters: ExpertAdapters | None
    surrogates: Surrogates | None
    edge_strength_EE: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        """Every float tensor that wants a gradient, by name."""
        found = {"x": self.x_TD, "combine": self.combine_TE}
        found["reached"] = self.walked.reached_TE
        if self.edge_strength_EE is not None:
            found["strength"] = self.edge_strength_EE
        for group in (self.weights, self.adapters, self.surrogates):
            if group is not None:
                names = (field.name for field in fields(group))
                found |= {n: getattr(group, n) for n in names if n != "scale"}
        return {n: v for n, v in found.items() if v is not None and v.requires_grad}

    def arguments(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "surrogates": self.surrogates}


def make_problem(
    tokens: int,
    experts: int,
    k: int,
    *,
    width: int = 3,
    model: int = 5,
    adapters: bool = True,
    surrogates: bool = True,
    chains: bool = False,
    dtype: torch.dtype = torch.double,
    scores_TE: Tensor | None = None,
) -> Problem:
    """A layer with random graph; every tensor has its own seed."""

    def leaf(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return (randn(*shape, seed=seed) * scale).to(dtype).requires_grad_()

    mask_EE = torch.rand(experts, experts, generator=generator(0)).triu() > 0.5
    mask_EE[0, 0] = True
    if scores_TE is None:
        scores_TE = randn(tokens, experts, seed=1)
    walked = walk(scores_TE, mask_EE.unsqueeze(0), experts_per_token=k)
    reached_TE = walked.reached_TE.to(torch.promote_types(dtype, torch.float32))
    return Problem(
        x_TD=leaf(tokens, model, seed=2),
        walked=replace(walked, reached_TE=reached_TE.requires_grad_()),
        combine_TE=(randn(tokens, experts, seed=3).to(reached_TE)).requires_grad_(),
        weights=ExpertWeights(
            gate_EFD=leaf(experts, width, model, seed=4),
            up_EFD=leaf(experts, width, model, seed=5),
            down_EFD=leaf(experts, width, model, seed=6),
        ),
        adapters=(
            ExpertAdapters(
                shared_gate_RD=leaf(2, model, seed=7),
                shared_up_RD=leaf(2, model, seed=8),
                shared_down_DR=leaf(model, 2, seed=9),
                gate_EFR=leaf(experts, width, 2, seed=10, scale=0.3),
                up_EFR=leaf(experts, width, 2, seed=11, scale=0.3),
                down_ERF=leaf(experts, 2, width, seed=12, scale=0.3),
                scale=1.5,
            )
            if adapters
            else None
        ),
        surrogates=(
            Surrogates(
                shared_QD=leaf(2, model, seed=13),
                out_EQD=leaf(experts, 2, model, seed=14),
                bias_ED=leaf(experts, model, seed=15),
            )
            if surrogates
            else None
        ),
        edge_strength_EE=(
            leaf(experts, experts, seed=16, scale=0.3) if chains else None
        ),
    )


def loop_expert(problem: Problem, x_D: Tensor, expert: int) -> Tensor:
    """FFN_e(x) of one token, from the equations."""
    weights, a = problem.weights, problem.adapters
    gate_FD, up_FD = weights.gate_EFD[expert], weights.up_EFD[expert]
    down_DF = weights.down_EFD[expert].T
    if a is not None:
        gate_FD = gate_FD + a.scale * a.gate_EFR[expert] @ a.shared_gate_RD
        up_FD = up_FD + a.scale * a.up_EFR[expert] @ a.shared_up_RD
        down_DF = down_DF + a.scale * a.shared_down_DR @ a.down_ERF[expert]
    return down_DF @ (F.silu(gate_FD @ x_D) * (up_FD @ x_D))


def loop_experts(problem: Problem) -> Tensor:
    """(T, D), visit by visit; r and c of experts that are not visited are constants."""
    walked, surrogates = problem.walked, problem.surrogates
    rows = []
    for t, x_D in enumerate(problem.x_TD):
        y_D = torch.zeros_like(x_D)
        outputs: list[Tensor] = []
        ids = [e for e in walked.expert_ids_TK[t].tolist() if e >= 0]
        for slot, expert in enumerate(ids):
            h_D = x_D
            parent = int(walked.parent_slot_TK[t, slot])
            if problem.edge_strength_EE is not None and parent >= 0:
                strength = problem.edge_strength_EE[ids[parent], expert]
                h_D = x_D + strength * outputs[parent]
            outputs.append(loop_expert(problem, h_D, expert))
            y_D = y_D + problem.combine_TE[t, expert] * outputs[-1]
        for expert in range(len(problem.weights.gate_EFD)):
            if surrogates is None:
                continue
            absent = 1.0 - walked.reached_TE[t, expert] * (expert in ids)
            stand_in_D = (surrogates.shared_QD @ x_D) @ surrogates.out_EQD[expert]
            y_D = y_D + absent * (stand_in_D + surrogates.bias_ED[expert])
        rows.append(y_D)
    return torch.stack(rows) if rows else torch.zeros_like(problem.x_TD)


def grouped(problem: Problem) -> Tensor:
    return grouped_experts(
        problem.x_TD,
        problem.walked,
        problem.combine_TE,
        problem.weights,
        edge_strength_EE=problem.edge_strength_EE,
        **problem.arguments(),
    )


def masked_dense(problem: Problem) -> Tensor:
    return masked_dense_experts(
        problem.x_TD,
        problem.walked.reached_TE,
        problem.combine_TE,
        problem.weights,
        **problem.arguments(),
    )


def widen(problem: Problem) -> Problem:
    """The same numbers in float64."""

    def wide(group: Any) -> Any:
        if isinstance(group, Tensor):
            if not group.is_floating_point():
                return group
            return group.detach().double().requires_grad_()
        if group is None or isinstance(group, float):
            return group
        names = [field.name for field in fields(group)]
        return replace(group, **{name: wide(getattr(group, name)) for name in names})

    return wide(problem)


def gradients(y_TD: Tensor, problem: Problem) -> dict[str, Tensor]:
    leaves = problem.leaves()
    probe_TD = randn(*y_TD.shape, seed=99).to(y_TD.dtype)
    found = torch.autograd.grad(
        (y_TD * probe_TD).sum(), list(leaves.values()), materialize_grads=True
    )
    return dict(zip(leaves, found))


def assert_same(problem: Problem, y_TD: Tensor, ratio: str = "fp64") -> None:
    """Values and every gradient against the loop."""
    expected_TD = loop_experts(problem)
    assert y_TD.dtype == problem.x_TD.dtype
    assert_close("y", y_TD, expected_TD, ratio)
    if not y_TD.numel():
        return
    expected = gradients(expected_TD, problem)
    for name, gradient in gradients(y_TD, problem).items():
        assert_close(f"gradient of {name}", gradient, expected[name], ratio)


SIZES = [(0, 4, 2), (1, 4, 2), (1, 1, 1), (7, 1, 1), (13, 5, 3), (13, 5, 5), (9, 7, 1)]


@pytest.mark.parametrize("surrogates", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_is_the_loop(
    sizes: tuple[int, int, int], adapters: bool, surrogates: bool
) -> None:
    problem = make_problem(*sizes, adapters=adapters, surrogates=surrogates)
    assert_same(problem, grouped(problem))


@pytest.mark.parametrize("surrogates", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_masked_dense_is_the_loop(
    sizes: tuple[int, int, int], adapters: bool, surrogates: bool
) -> None:
    problem = make_problem(*sizes, adapters=adapters, surrogates=surrogates)
    assert_same(problem, masked_dense(problem))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_chains_are_the_loop(sizes: tuple[int, int, int], adapters: bool) -> None:
    problem = make_problem(*sizes, adapters=adapters, chains=True)
    assert_same(problem, grouped(problem))


def test_the_chained_problem_has_chains() -> None:
    """Or the test above would compare nothing."""
    problem = make_problem(13, 5, 3, chains=True)
    assert int(problem.walked.depth_TK.max()) >= 2
    assert not torch.equal(grouped(problem), grouped(make_problem(13, 5, 3)))


def test_chains_of_zero_strength_carry_nothing() -> None:
    problem = make_problem(13, 5, 3, chains=True)
    still = replace(problem, edge_strength_EE=torch.zeros(5, 5, dtype=torch.double))
    flat = replace(problem, edge_strength_EE=None)
    assert_close("y", grouped(still), grouped(flat), "fp64")


def test_all_tokens_may_visit_one_expert() -> None:
    scores_TE = torch.zeros(11, 4).index_fill(1, torch.tensor(2), 1.0)
    problem = make_problem(11, 4, 1, scores_TE=scores_TE)
    mask = torch.ones(1, 4, 4, dtype=torch.bool).triu()
    walked = walk(scores_TE, mask, experts_per_token=1)
    walked = replace(walked, reached_TE=walked.reached_TE.double().requires_grad_())
    problem = replace(problem, walked=walked)
    assert rows_by_expert(walked, 4).expert_offsets.tolist() == [0, 0, 0, 11, 11]
    assert_same(problem, grouped(problem))
    assert_same(problem, masked_dense(problem))


def test_surrogate_sum_is_the_same_with_and_without_gradients() -> None:
    """It subtracts visited rows in one case and may add absent ones in the other."""
    problem = make_problem(13, 5, 5)
    assert problem.surrogates is not None
    reached_TE = problem.walked.reached_TE
    assert bool((reached_TE.detach().sum(1) > 2.5).any())
    found = surrogate_sum(problem.x_TD, reached_TE.detach(), problem.surrogates)
    expected = surrogate_sum(problem.x_TD, reached_TE, problem.surrogates)
    assert_close("sum", found, expected, "fp64")


def test_surrogates_vanish_where_everything_is_visited() -> None:
    problem = make_problem(6, 4, 4)
    everything = torch.ones(6, 4, dtype=torch.double)
    assert problem.surrogates is not None
    found = surrogate_sum(problem.x_TD, everything, problem.surrogates)
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("chains", [False, True])
def test_gradcheck_of_grouped(chains: bool) -> None:
    problem = make_problem(4, 3, 2, width=2, model=3, chains=chains)
    assert torch.autograd.gradcheck(
        lambda *_: grouped(problem), tuple(problem.leaves().values())
    )


def test_gradcheck_of_masked_dense() -> None:
    """r and c of experts that are not visited are left out: they get no gradient."""
    problem = make_problem(4, 3, 2, width=2, model=3)
    visited = problem.walked.visited_TE.double()
    held = replace(
        problem,
        walked=replace(problem.walked, reached_TE=visited),
        combine_TE=problem.combine_TE.detach(),
    )
    assert torch.autograd.gradcheck(
        lambda *_: masked_dense(held), tuple(held.leaves().values())
    )


@pytest.mark.parametrize("compute", [grouped, masked_dense])
def test_the_sum_of_all_experts_is_the_ffn(compute: Any) -> None:
    plain = make_problem(9, 4, 4, adapters=False)
    mask = torch.ones(1, 4, 4, dtype=torch.bool).triu()
    walked = walk(torch.zeros(9, 4).double(), mask, experts_per_token=4)
    problem = replace(
        plain, walked=walked, combine_TE=torch.ones_like(plain.combine_TE)
    )
    gate, up, down = (
        getattr(problem.weights, f"{name}_EFD").flatten(0, 1)
        for name in ("gate", "up", "down")
    )
    x_TD = problem.x_TD
    expected_TD = (F.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down
    assert_close("y", compute(problem), expected_TD, "fp64")


@pytest.mark.parametrize("compute", [grouped, masked_dense])
@pytest.mark.parametrize(
    "dtype, ratio", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]
)
def test_lower_precision_stays_near_float64(
    compute: Any, dtype: torch.dtype, ratio: str
) -> None:
    """Against the loop in float64 on the very same rounded inputs."""
    sizes = {"width": 16, "model": 32, "tokens": 29, "experts": 6, "k": 3}
    problem = make_problem(**sizes, dtype=dtype)
    y_TD = compute(problem)
    assert y_TD.dtype == dtype
    wide = widen(problem)
    expected_TD = loop_experts(wide)
    assert_close("y", y_TD, expected_TD, ratio)
    found = gradients(y_TD, problem)
    expected = gradients(expected_TD, wide)
    assert {n: g.dtype for n, g in found.items()} == {
        n: leaf.dtype for n, leaf in problem.leaves().items()
    }
    for name in expected:
        assert_close(f"gradient of {name}", found[name], expected[name], ratio)


def test_rows_of_no_expert_are_no_rows() -> None:
    problem = make_problem(3, 4, 2)
    empty_ND = problem.x_TD[:0]
    found = expert_rows(empty_ND, [0] * 5, problem.weights, problem.adapters)
    assert found.shape == (0, 5)


def test_rows_are_sorted_by_expert_then_token_then_slot() -> None:
    mask = torch.ones(1, 3, 3, dtype=torch.bool).triu()
    scores_TE = torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.0, 1.0]])
    walked = walk(scores_TE, mask, experts_per_token=2)
    assert walked.expert_ids_TK.tolist() == [[1, 0], [1, 2]]
    rows = rows_by_expert(walked, 3)
    assert rows.token_N.tolist() == [0, 0, 1, 1]
    assert rows.slot_N.tolist() == [1, 0, 0, 1]
    assert rows.expert_offsets.tolist() == [0, 1, 3, 4]
    entries = rows_by_expert(walked, 3, walked.depth_TK == 0)
    assert entries.token_N.tolist() == [0, 0, 1]
    assert entries.expert_offsets.tolist() == [0, 1, 3, 3]
