"""The masked dense FFN with its own backward, against the loop and its plain twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from samv2_kernels import cpu, masked_dense_experts, reference
from samv2_kernels.cpu import masked as cpu_masked
from tests.helpers import assert_close
from tests.kernels.test_expert_mlp import freeze, shared_blocks
from tests.kernels.test_grouped_mlp import (
    Problem,
    assert_same,
    gradients,
    make_problem,
    widen,
)

SIZES = [(0, 4, 2), (1, 4, 2), (1, 1, 1), (13, 5, 3), (13, 5, 5), (9, 7, 1)]


def compute(problem: Problem, how: Any = masked_dense_experts) -> Tensor:
    return how(
        problem.x_TD,
        problem.walked.reached_TE,
        problem.combine_TE,
        problem.weights,
        **problem.arguments(),
    )


@pytest.fixture(autouse=True)
def any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are enough."""
    monkeypatch.setattr(cpu_masked, "LEAST_ROWS", 0)


@pytest.fixture(params=[4, 10**6])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many pass at a time."""
    monkeypatch.setattr(cpu_masked, "ROWS", request.param)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("surrogates", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_the_loop(
    sizes: tuple[int, int, int], adapters: bool, surrogates: bool
) -> None:
    problem = freeze(make_problem(*sizes, adapters=adapters, surrogates=surrogates))
    assert_same(problem, compute(problem))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("adapters", [False, True])
def test_weights_that_are_the_visited_set_give_the_same(adapters: bool) -> None:
    problem = freeze(make_problem(13, 5, 3, adapters=adapters))
    problem = replace(problem, combine_TE=problem.walked.reached_TE)
    assert_same(problem, compute(problem))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    "dtype, ratio", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]
)
def test_lower_precision_stays_near_float64(dtype: torch.dtype, ratio: str) -> None:
    problem = make_problem(29, 6, 3, width=16, model=32, dtype=dtype)
    scaled = {
        name: (getattr(problem.weights, name) * 32**-0.5).detach()
        for name in ("gate_EFD", "up_EFD", "down_EFD")
    }
    problem = freeze(replace(problem, weights=replace(problem.weights, **scaled)))
    wide = freeze(widen(problem))
    expected_TD = compute(wide, reference.masked_dense_experts)
    found_TD = compute(problem)
    assert_close("y", found_TD, expected_TD, ratio)
    expected = gradients(expected_TD, wide)
    for name, gradient in gradients(found_TD, problem).items():
        assert gradient.dtype == problem.leaves()[name].dtype
        assert_close(f"gradient of {name}", gradient, expected[name], ratio)


def test_experts_may_share_blocks() -> None:
    shared, copies = shared_blocks(freeze(make_problem(23, 5, 3)))
    expected_TD = compute(copies, reference.masked_dense_experts)
    found_TD = compute(shared)
    assert_close("y", found_TD, expected_TD.detach(), "fp64")
    expected = gradients(expected_TD, copies)
    for name, gradient in gradients(found_TD, shared).items():
        assert_close(f"gradient of {name}", gradient, expected[name], "fp64")


def test_blocks_that_learn_few_rows_and_observers_get_the_twin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the op was called")

    monkeypatch.setattr(cpu, "masked_experts", refuse)
    problem = make_problem(13, 5, 3)
    assert_same(problem, compute(problem))
    frozen = freeze(problem)
    with pytest.raises(AssertionError, match="was called"):
        compute(frozen)
    with monkeypatch.context() as few:
        few.setattr(cpu_masked, "LEAST_ROWS", 14)
        assert_close("y", compute(frozen), compute(problem).detach(), "fp64")
    with FlopCounterMode(display=False):
        assert_close("y", compute(frozen), compute(problem).detach(), "fp64")
