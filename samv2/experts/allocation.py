"""How many visits each layer makes under one budget of FFN arithmetic.

A survey of the dense model gives, for each converted layer and each number of visits k,
the error that the layer would add to the residual stream. What a squared relative error
of that kind costs in the output was measured to be much the same for all layers, so the
allocation minimises the plain sum under the budget: Lagrange's multiplier on the lower
convex hulls of the curves (Everett 1963), taken step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from samv2.common.errors import ModelError

SPAN = 2


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a layer loses at each number of visits."""

    visits: tuple[int, ...]
    """k, rising."""
    errors: tuple[float, ...]
    """Mean squared error that the layer adds to the stream, as a share of the stream."""

    def at(self, k: int) -> float:
        """The error at any k between the first and the last, interpolated."""
        return float(np.interp(k, self.visits, self.errors))


def survey_points(num_experts: int, num_shared: int) -> tuple[int, ...]:
    """The k that curves are measured at: a dozen, closer together where k is small."""
    least = max(1, num_shared)
    wanted = {least, num_experts}
    for share in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28):
        wanted.add(round(share * num_experts / 32))
    return tuple(sorted(k for k in wanted if least <= k <= num_experts))


def allocate(
    curves: Sequence[Curve],
    cost_of: Callable[[int], float],
    budget: float,
    *,
    around: int | None = None,
) -> tuple[int, ...]:
    """Visits of each layer that add the least error within a mean cost.

    Args:
        curves: one a converted layer.
        cost_of: multiply-adds of a layer at k visits, as a share of its dense FFN's.
        budget: mean of the layers' costs that may not be exceeded.
        around: K; layers make K / SPAN to K * SPAN visits, because the curves of a
            survey are too uncertain to empty a layer on. None sets no bounds.

    Returns:
        k of each layer.

    Raises:
        ModelError: not even the fewest visits fit.
    """
    least, most = (1, 1 << 30) if around is None else (around // SPAN, around * SPAN)
    hulls = [_hull(curve, cost_of, least, most) for curve in curves]
    allowed = budget * len(hulls) + 1e-9
    spent = sum(hull[0][1] for hull in hulls)
    if spent > allowed:
        raise ModelError(
            f"a budget of {budget:.3f} of the dense FFN arithmetic was asked for the "
            f"converted layers, but the fewest visits cost {spent / len(hulls):.3f}; "
            "raise the budget, or lower experts.num_shared or experts.repair_rank"
        )
    steps = sorted(
        (_slope(*pair), layer, place)
        for layer, hull in enumerate(hulls)
        for place, pair in enumerate(zip(hull, hull[1:]))
    )
    places = [0] * len(hulls)
    for _, layer, place in steps:
        step = hulls[layer][place + 1][1] - hulls[layer][place][1]
        # A layer whose step did not fit stays where it is; others may still move.
        if places[layer] == place and spent + step <= allowed:
            places[layer], spent = place + 1, spent + step
    return tuple(hull[place][0] for hull, place in zip(hulls, places))


Point = tuple[int, float, float]
"""Visits, cost, error."""


def _hull(
    curve: Curve, cost_of: Callable[[int], float], least: int, most: int
) -> list[Point]:
    """The lower convex hull of error over cost, by rising cost and falling error."""
    hull: list[Point] = []
    first, last = max(curve.visits[0], least), min(curve.visits[-1], most)
    counts = range(first, last + 1)
    points = sorted((cost_of(k), curve.at(k), k) for k in counts)
    for cost, error, k in points:
        if hull and error >= hull[-1][2]:
            continue
        point = (k, cost, error)
        while len(hull) >= 2 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: Point, right: Point) -> float:
    """Change of the error per cost (negative where it pays)."""
    return (right[2] - left[2]) / max(right[1] - left[1], 1e-12)
