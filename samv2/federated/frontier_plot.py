"""The frontier as a picture: perplexity ratio over FFN arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from samv2.common.files import write_bytes

Line = Sequence[tuple[int, float, float | None]]
"""(K, share of the FFN arithmetic, perplexity ratio) by rising K; None is left out."""

STYLES = (("#1f5fa8", "o", "-"), ("#d1661c", "s", "--"))
"""Colour, marker and dashes of the lines, told apart in grey as well."""
INK, GRID = "#333333", "#dddddd"
FACTORS = (2.0, 5.0, 3.0, 1.5, 1.2, 1.1, 1.05, 1.3, 1.4, 1.75, 2.5, 4.0, 1.02, 0.9, 0.8)
"""Ratios below ten that the axis may name, the rounder first."""
TICK_GAP = 1 / 12
"""Least distance of two ticks, as a share of the axis."""
INCHES, DPI = (6.4, 4.2), 150


def draw_frontier(path: Path, lines: Mapping[str, Line]) -> None:
    """Write a PNG; points without a finite ratio are left out.

    Args:
        path: the file.
        lines: by label, at most two.
    """
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = {label: _finite(line) for label, line in lines.items()}
    axes.axhline(1.0, color=INK, linewidth=1.0, linestyle=":", label="dense model")
    for (label, line), (colour, marker, dashes) in zip(shown.items(), STYLES):
        axes.plot(
            [100 * share for _, share, _ in line],
            [ratio for _, _, ratio in line],
            color=colour,
            marker=marker,
            linestyle=dashes,
            markersize=5,
            label=label,
        )
    _label_points(axes, shown)
    _scale(axes, [ratio for line in shown.values() for _, _, ratio in line])
    axes.set_xlabel("FFN arithmetic, % of the dense model's")
    axes.set_ylabel("perplexity / dense perplexity (geometric mean)")
    axes.set_title("Held-out quality against arithmetic", loc="left", color=INK)
    axes.legend(frameon=False, loc="upper right")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    data = BytesIO()
    canvas.print_png(data, metadata={"Software": None})
    write_bytes(path, data.getvalue())


def _finite(line: Line) -> list[tuple[int, float, float]]:
    return [
        (k, share, ratio)
        for k, share, ratio in line
        if ratio is not None and math.isfinite(ratio) and ratio > 0
    ]


def _label_points(axes: Axes, lines: Mapping[str, Sequence]) -> None:
    """Name K once, above the highest of the points that share it."""
    highest: dict[int, tuple[float, float]] = {}
    for line in lines.values():
        for k, share, ratio in line:
            best = highest.get(k, (share, ratio))
            highest[k] = (share, max(ratio, best[1]))
    for k, (share, ratio) in highest.items():
        axes.annotate(
            f"K = {k}",
            (100 * share, ratio),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )


def _scale(axes: Axes, ratios: Sequence[float]) -> None:
    """A log axis with room around the points, and ticks that a person reads."""
    low, high = min([*ratios, 1.0]), max([*ratios, 1.05])
    room = max((high / low) ** 0.12, 1.01)
    low, high = low / room, high * room**1.6
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.1)
    if not ratios:
        axes.set_xlim(0, 105)
        axes.text(50, (low * high) ** 0.5, "no finite perplexity to show", ha="center")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a log axis, 1 first, and none too close to a rounder one."""
    powers = range(1, max(1, math.ceil(math.log10(high))) + 1)
    tens = [10.0**power for power in powers]
    wanted = [1.0, *tens, *FACTORS, *(f * ten for f in (2, 5) for ten in tens)]
    gap = TICK_GAP * math.log(high / low)
    kept: list[float] = []
    for tick in wanted:
        if low <= tick <= high and all(abs(math.log(tick / k)) >= gap for k in kept):
            kept.append(tick)
    return sorted(kept)
