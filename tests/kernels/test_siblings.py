"""Siblings of adapter rows: every path is the loop over mixed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from samv2_kernels import (
    ExpertAdapters,
    grouped_experts,
    masked_dense_experts,
    reference,
)
from samv2_kernels.cpu import masked as cpu_masked
from tests.helpers import assert_close, randn
from tests.kernels.test_expert_mlp import freeze
from tests.kernels.test_grouped_mlp import Problem, gradients, make_problem

SIBLINGS = 3


def with_siblings(problem: Problem) -> Problem:
    """Three sets of rows in place of one, and shares that add up to 1."""
    a = problem.adapters
    assert a is not None

    def leaf(part: Tensor, dim: int, seed: int) -> Tensor:
        shape = list(part.shape)
        shape[dim] *= SIBLINGS
        return (0.3 * randn(*shape, seed=seed)).to(part.dtype).requires_grad_()

    share_TG = randn(len(problem.x_TD), SIBLINGS, seed=23).softmax(1)
    adapters = replace(
        a,
        gate_EFR=leaf(a.gate_EFR, 2, 20),
        up_EFR=leaf(a.up_EFR, 2, 21),
        down_ERF=leaf(a.down_ERF, 1, 22),
        share_TG=share_TG.to(problem.x_TD.dtype).requires_grad_(),
    )
    return replace(problem, adapters=adapters)


def mixed(a: ExpertAdapters, token: int) -> ExpertAdapters:
    """One sibling: the rows of all, weighted by a token's shares."""
    share_G = a.share_TG[token]
    return replace(
        a,
        gate_EFR=torch.einsum(
            "efgr,g->efr", a.gate_EFR.unflatten(2, (SIBLINGS, -1)), share_G
        ),
        up_EFR=torch.einsum(
            "efgr,g->efr", a.up_EFR.unflatten(2, (SIBLINGS, -1)), share_G
        ),
        down_ERF=torch.einsum(
            "egrf,g->erf", a.down_ERF.unflatten(1, (SIBLINGS, -1)), share_G
        ),
        share_TG=None,
    )


def token_by_token(problem: Problem) -> Tensor:
    """The reference on each token alone, with its own mixture of rows."""
    walked, rows = problem.walked, []
    for t in range(len(problem.x_TD)):
        one = slice(t, t + 1)
        alone = replace(
            walked,
            **{
                name: getattr(walked, name)[one]
                for name in (
                    "reached_TE",
                    "chosen_TE",
                    "expert_ids_TK",
                    "parent_slot_TK",
                    "depth_TK",
                )
            },
        )
        rows.append(
            reference.grouped_experts(
                problem.x_TD[one],
                alone,
                problem.combine_TE[one],
                problem.weights,
                adapters=mixed(problem.adapters, t),
                surrogates=problem.surrogates,
                edge_strength_EE=problem.edge_strength_EE,
            )
        )
    return torch.cat(rows)


def grouped(how: Callable[..., Tensor]) -> Callable[[Problem], Tensor]:
    return lambda problem: how(
        problem.x_TD,
        problem.walked,
        problem.combine_TE,
        problem.weights,
        edge_strength_EE=problem.edge_strength_EE,
        **problem.arguments(),
    )


def masked(how: Callable[..., Tensor]) -> Callable[[Problem], Tensor]:
    return lambda problem: how(
        problem.x_TD,
        problem.walked.reached_TE,
        problem.combine_TE,
        problem.weights,
        **problem.arguments(),
    )


PATHS: dict[str, Callable[[Problem], Tensor]] = {
    "op": grouped(grouped_experts),
    "reference": grouped(reference.grouped_experts),
    "masked": masked(masked_dense_experts),
    "masked reference": masked(reference.masked_dense_experts),
}


def assert_mixes(problem: Problem, path: Callable[[Problem], Tensor]) -> None:
    """Output and every gradient are those of the loop."""
    expected, found = token_by_token(problem), path(problem)
    assert_close("output", found, expected, "fp64")
    wanted = gradients(expected, problem)
    assert {"share_TG", "gate_EFR", "up_EFR", "down_ERF"} <= wanted.keys()
    for name, value in gradients(found, problem).items():
        assert_close(f"gradient of {name}", value, wanted[name], "fp64")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sizes", [(1, 4, 2), (13, 5, 3), (9, 4, 4)])
def test_every_path_mixes_rows_by_share(
    name: str, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_masked, "LEAST_ROWS", 0)
    assert_mixes(freeze(with_siblings(make_problem(*sizes))), PATHS[name])


@pytest.mark.parametrize("name", ["op", "reference"])
def test_chains_mix_rows_by_the_token(name: str) -> None:
    problem = make_problem(13, 5, 3, chains=True)
    assert_mixes(freeze(with_siblings(problem)), PATHS[name])


def test_a_share_of_one_is_that_sibling_alone() -> None:
    problem = with_siblings(make_problem(7, 4, 2))
    share_TG = torch.zeros(7, SIBLINGS, dtype=torch.double)
    share_TG[:, 1] = 1
    adapters = replace(problem.adapters, share_TG=share_TG)
    rank = problem.adapters.shared_gate_RD.shape[0]
    own = slice(rank, 2 * rank)
    alone = replace(
        adapters,
        gate_EFR=adapters.gate_EFR[:, :, own],
        up_EFR=adapters.up_EFR[:, :, own],
        down_ERF=adapters.down_ERF[:, own],
        share_TG=None,
    )
    path = PATHS["op"]
    assert_close(
        "output",
        path(freeze(replace(problem, adapters=adapters))),
        path(freeze(replace(problem, adapters=alone))),
        "fp64",
    )


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"share_TG": torch.ones(6, SIBLINGS)}, "share_TG has shape (6, 3)"),
        ({"share_TG": torch.ones(7, 2)}, "gate_EFR has shape"),
        ({"share_TG": None}, "gate_EFR has shape"),
    ],
)
def test_shares_that_do_not_fit_are_refused(
    change: dict[str, Any], wanted: str
) -> None:
    problem = with_siblings(make_problem(7, 4, 2))
    wrong = replace(problem, adapters=replace(problem.adapters, **change))
    with pytest.raises(ValueError) as caught:
        PATHS["op"](wrong)
    assert wanted in str(caught.value)
