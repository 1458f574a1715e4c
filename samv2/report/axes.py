"""Axes that charts share: rounds along x, logarithms with round ticks, named lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from samv2.report.svg import Tips, series_style, short

MOST_MARKS = 60
"""Rounds of a line whose points are marked."""
TICKS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


def draw_line(
    axes: Axes,
    line: Sequence[tuple[int, float]],
    index: int,
    label: str,
    tips: Tips,
    *,
    show: Callable[[float | None], str],
) -> str:
    """A series over rounds; where they are not too many, a mark and a tip for each.

    Returns:
        Its colour.
    """
    style = series_style(index)
    marked = style if len(line) <= MOST_MARKS else style | {"marker": ""}
    if line:
        axes.plot(*zip(*line), **(style | {"marker": ""}))
    axes.plot([], [], **marked, label=short(label))
    for x, value in line if len(line) <= MOST_MARKS else ():
        tip = tips(f"{label}, round {x}: {show(value)}")
        axes.plot([x], [value], **(style | {"linestyle": ""}), gid=tip)
    return style["color"]


def round_axis(axes: Axes) -> None:
    """Whole rounds along x."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("round")


def log_axis(axes: Axes, side: str, values: Sequence[float]) -> None:
    """A logarithmic axis with round ticks and room around the values."""
    found = [value for value in values if value > 0]
    low, high = min(found, default=1.0), max(found, default=10.0)
    room = max((high / low) ** 0.08, 1.02)
    low, high = low / room, high * room
    getattr(axes, f"set_{side}scale")("log")
    getattr(axes, f"set_{side}lim")(low, high)
    axis = getattr(axes, f"{side}axis")
    axis.set_major_locator(FixedLocator(round_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def round_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers between two positive ones, for a logarithmic axis.

    A range below three is all but linear and is divided evenly; a wider one in steps
    that are even on the axis.
    """
    if high < 3 * low:
        even = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [float(tick) for tick in even if low <= tick <= high]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [tick * 10.0**power for power in powers for tick in TICKS]
    inside = [tick for tick in every if low <= tick <= high]
    gap = math.log(high / low) / most
    kept: list[float] = []
    for tick in inside:
        if not kept or math.log(tick / kept[-1]) >= gap:
            kept.append(tick)
    return kept


def decades(values: Sequence[float]) -> list[float]:
    """Powers of ten around positive numbers."""
    low, high = min(values, default=1.0), max(values, default=10.0)
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high))
    return [10.0**power for power in range(first, last + 1)]


def label_ends(
    axes: Axes, ends: Mapping[str, tuple[float, float, str]], *, gap: float
) -> None:
    """Name lines at their right ends, moved apart where they would overlap.

    Args:
        axes: y is linear or logarithmic already, and its limits are final.
        ends: {name: (x, y, colour)}.
        gap: least distance, as a share of the axis.
    """
    place = axes.transData + axes.transAxes.inverted()
    at = {key: place.transform((x, y))[1] for key, (x, y, _) in ends.items()}
    heights = spread(at, gap=gap)
    right = max((x for x, _, _ in ends.values()), default=0.0)
    for key, (_, _, colour) in ends.items():
        axes.annotate(
            short(key),
            (right, heights[key]),
            xycoords=("data", "axes fraction"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )


def spread(heights: Mapping[str, float], *, gap: float) -> dict[str, float]:
    """Heights moved apart to a least distance, order kept, as a whole where they were."""
    order = sorted(heights, key=lambda key: heights[key])
    placed: list[float] = []
    for key in order:
        least = placed[-1] + gap if placed else heights[key]
        placed.append(max(heights[key], least))
    moved = [place - heights[key] for key, place in zip(order, placed)]
    back = sum(moved) / max(1, len(moved))
    return {key: place - back for key, place in zip(order, placed)}
