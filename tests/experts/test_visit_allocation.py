"""Visits of layers under one budget, against every possible allocation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise, product

import pytest

from samv2.common.errors import ModelError
from samv2.experts.allocation import SPAN, Curve, allocate, survey_points
from samv2.experts.costs import ffn_flops_fraction

EXPERTS = 8
Cost = Callable[[int], float]


def linear(k: int) -> float:
    """A gate and k experts."""
    return 0.05 + k / EXPERTS


def with_stand_in(k: int) -> float:
    """A repaired layer: below E it also pays for its stand-in, which K = E does not."""
    return ffn_flops_fraction(
        model_width=64,
        ffn_width=128,
        num_experts=EXPERTS,
        experts_per_token=k,
        surrogate_rank=4,
        repair_rank=32,
    )


def curves_of(rng: random.Random, layers: int, *, convex: bool) -> list[Curve]:
    """Falling curves of layers that differ in how much they lose."""
    made = []
    for _ in range(layers):
        drops = [rng.random() ** 2 * rng.random() for _ in range(EXPERTS - 1)]
        if convex:
            drops.sort(reverse=True)
        errors = tuple(sum(drops[k:]) for k in range(EXPERTS))
        made.append(Curve(visits=tuple(range(1, EXPERTS + 1)), errors=errors))
    return made


def error_of(curves: list[Curve], visits: tuple[int, ...]) -> float:
    return sum(curve.at(k) for curve, k in zip(curves, visits, strict=True))


def affordable(cost_of: Cost, layers: int, budget: float) -> Iterator[tuple[int, ...]]:
    for visits in product(range(1, EXPERTS + 1), repeat=layers):
        if sum(map(cost_of, visits)) <= budget * layers + 1e-9:
            yield visits


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_convex_curves_get_the_best_of_all_allocations(layers: int) -> None:
    rng = random.Random(layers)
    for _ in range(6):
        curves = curves_of(rng, layers, convex=True)
        budget = rng.uniform(linear(1), linear(EXPERTS))
        found = allocate(curves, linear, budget)
        best = min(error_of(curves, v) for v in affordable(linear, layers, budget))
        assert error_of(curves, found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("cost_of", [linear, with_stand_in])
@pytest.mark.parametrize("convex", [True, False])
def test_budgets_are_kept_and_more_never_costs_error(
    cost_of: Cost, convex: bool
) -> None:
    """Also with bumps in the curves and a K = E that costs less than its neighbour."""
    rng = random.Random(7)
    for layers in (1, 3, 5):
        curves = curves_of(rng, layers, convex=convex)
        errors = []
        for step in range(41):
            budget = cost_of(1) + step / 40 * (cost_of(EXPERTS) - cost_of(1))
            visits = allocate(curves, cost_of, budget)
            assert sum(map(cost_of, visits)) <= budget * layers + 1e-8
            errors.append(error_of(curves, visits))
        assert all(after <= before + 1e-12 for before, after in pairwise(errors))
        assert errors[0] == pytest.approx(error_of(curves, (1,) * layers))
        assert errors[-1] == 0


@pytest.mark.parametrize("cost_of", [linear, with_stand_in])
def test_bumpy_curves_miss_the_best_by_one_step_at_most(cost_of: Cost) -> None:
    rng = random.Random(3)
    for _ in range(8):
        curves = curves_of(rng, 3, convex=False)
        budget = rng.uniform(cost_of(1), cost_of(EXPERTS))
        found = error_of(curves, allocate(curves, cost_of, budget))
        best = min(error_of(curves, v) for v in affordable(cost_of, 3, budget))
        step = max(curve.errors[0] - curve.errors[-1] for curve in curves)
        assert best - 1e-12 <= found <= best + step


def test_a_bump_is_stepped_over() -> None:
    """Visits 2 to 4 alone gain nothing, so the budget goes straight to 5."""
    flat = Curve(visits=(1, 4, 5, 8), errors=(1.0, 0.99, 0.1, 0.0))
    steady = Curve(visits=(1, 8), errors=(0.7, 0.0))
    assert allocate([flat, steady], linear, linear(3)) == (5, 1)
    rising = Curve(visits=(1, 2, 8), errors=(0.2, 0.5, 0.1))
    assert allocate([rising], linear, linear(4)) == (1,)


def test_layers_that_lose_more_get_more() -> None:
    weak = Curve(visits=(1, 2, 4, 8), errors=(0.4, 0.2, 0.1, 0.0))
    strong = Curve(visits=(1, 2, 4, 8), errors=(3.2, 1.6, 0.8, 0.0))
    visits = allocate([weak, strong, weak], linear, linear(4))
    assert visits[1] > 4 > visits[0] == visits[2]
    nothing = Curve(visits=(1, 8), errors=(0.0, 0.0))
    assert allocate([nothing, weak], linear, linear(4)) == (1, 7)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_layers_stay_around_k(k: int) -> None:
    """And get the best allocation among those that do."""
    rng = random.Random(k)
    for _ in range(4):
        curves = curves_of(rng, 3, convex=True)
        found = allocate(curves, linear, linear(k), around=k)
        near = [
            visits
            for visits in affordable(linear, 3, linear(k))
            if all(k // SPAN <= v <= k * SPAN for v in visits)
        ]
        assert found in near
        best = min(error_of(curves, visits) for visits in near)
        assert error_of(curves, found) == pytest.approx(best, abs=1e-12)


def test_equal_layers_and_no_layers() -> None:
    convex = Curve(visits=(1, 2, 4, 8), errors=(0.4, 0.2, 0.1, 0.0))
    assert allocate([convex] * 3, linear, linear(4)) == (4, 4, 4)
    assert allocate([], linear, 0.5) == ()


def test_a_budget_below_the_least_is_refused_with_both_numbers() -> None:
    curve = Curve(visits=(2, 8), errors=(1.0, 0.0))
    message = "budget of 0.200 .* the fewest visits cost 0.300; raise .*num_shared"
    with pytest.raises(ModelError, match=message):
        allocate([curve, curve], linear, 0.2)
    assert allocate([curve, curve], linear, 0.3) == (2, 2)


def test_curves_are_read_between_their_points() -> None:
    curve = Curve(visits=(2, 4, 8), errors=(1.0, 0.5, 0.1))
    assert [curve.at(k) for k in (2, 3, 4, 6, 8)] == pytest.approx(
        [1.0, 0.75, 0.5, 0.3, 0.1]
    )


@pytest.mark.parametrize("experts", [1, 2, 7, 8, 16, 32, 64, 100])
def test_curves_are_measured_from_the_fewest_visits_to_all(experts: int) -> None:
    for shared in {0, 1, experts // 3, experts - 1}:
        points = survey_points(experts, shared)
        assert points == tuple(sorted(set(points))) and len(points) <= 14
        assert points[0] == max(1, shared) and points[-1] == experts
    assert survey_points(8, 0) == (1, 2, 3, 4, 5, 6, 7, 8)
