"""Charts of frontiers, comparisons of methods and grids of settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from samv2.report.axes import log_axis
from samv2.report.other_data import (
    Comparison,
    FrontierPoint,
    Method,
    MethodRound,
)
from samv2.report.svg import (
    INK,
    MUTED,
    Chart,
    Tips,
    chart,
    series_style,
    short,
)
from samv2.report.words import duration, perplexity, share, size


def frontier_chart(points: Sequence[FrontierPoint], *, name: str) -> Chart:
    """Perplexity ratio over the share of FFN arithmetic."""
    lines = {
        "text it was calibrated on": [(p, p.ratio) for p in points],
        "other text": [(p, p.unseen_ratio) for p in points],
    }
    shown = {
        label: [(p, y) for p, y in line if y is not None and y > 0]
        for label, line in lines.items()
    }
    shown = {label: line for label, line in shown.items() if line}

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        axes.axhline(1.0, color=MUTED, linestyle=":", label="dense model")
        for index, (label, line) in enumerate(shown.items()):
            style = series_style(index)
            x = [100 * p.flops_fraction for p, _ in line]
            axes.plot(x, [y for _, y in line], **(style | {"marker": ""}))
            axes.plot([], [], **style, label=label)
            for at, (point, y) in zip(x, line):
                tip = tips(f"K = {point.experts_per_token}, {label}: {y:.3f} times")
                axes.plot([at], [y], **style, gid=tip)
        highest = {}
        for line in shown.values():
            for point, y in line:
                at = 100 * point.flops_fraction
                highest[at] = max((y, point.experts_per_token), highest.get(at, (0, 0)))
        for at, (y, k) in highest.items():
            axes.annotate(
                f"K = {k}",
                (at, y),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=9,
                color=INK,
            )
        log_axis(
            axes, "y", [1.0, *(y * 1.05 for line in shown.values() for _, y in line)]
        )
        axes.margins(x=0.12)
        axes.set_xlabel("FFN arithmetic, % of the dense model's")
        axes.set_ylabel("times the dense perplexity")
        figure.legend(loc="outside upper left", ncols=3)

    told = [
        f"K = {p.experts_per_token}: {share(p.flops_fraction)} of the arithmetic, "
        f"{p.ratio:.3f} times the perplexity"
        for p in points
        if p.ratio is not None
    ]
    return chart(
        draw,
        name=f"{name}-frontier",
        title="Quality against arithmetic",
        alt=f"Before any training: {'; '.join(told)}.",
        note="The expert graph before training, at several numbers K of experts that a "
        "token visits. Lower is better, further left is cheaper.",
    )


def method_charts(comparison: Comparison, *, name: str) -> list[Chart]:
    """Perplexity against uploaded bytes, and against seconds."""
    return [
        _methods_against(
            comparison,
            name=f"{name}-by-bytes",
            title="Perplexity against uploaded bytes",
            x="uploaded by all clients, logarithmic",
            value=lambda item: item.bytes_up_total,
            show=size,
            logarithmic=True,
        ),
        _methods_against(
            comparison,
            name=f"{name}-by-seconds",
            title="Perplexity against time",
            x="seconds",
            value=lambda item: item.seconds,
            show=duration,
        ),
    ]


def _methods_against(
    comparison: Comparison,
    *,
    name: str,
    title: str,
    x: str,
    value: Callable[[MethodRound], float],
    show: Callable[[float | None], str],
    logarithmic: bool = False,
) -> Chart:
    lines = {m.name: _line(m, value, logarithmic) for m in comparison.methods}
    silent = {
        m.name: m.perplexity
        for m in comparison.methods
        if not lines[m.name] and m.rounds and m.perplexity
    }
    dense = comparison.dense_perplexity

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        if dense:
            axes.axhline(dense, color=MUTED, linestyle=":", linewidth=1.4)
            axes.plot([], [], color=MUTED, linestyle=":", label="dense model")
        for index, (key, line) in enumerate(lines.items()):
            style = series_style(index)
            if key in silent:
                axes.axhline(silent[key], color=style["color"], linewidth=1.2)
                axes.plot(
                    [], [], color=style["color"], label=f"{short(key)}, uploads nothing"
                )
            if not line:
                continue
            axes.plot(
                [at for at, _, _ in line],
                [y for _, y, _ in line],
                **(style | {"marker": ""}),
            )
            for at, y, number in line:
                tip = f"{key}, round {number}: {perplexity(y)} after {show(at)}"
                axes.plot([at], [y], **style, gid=tips(tip))
            axes.plot([], [], **style, label=short(key))
        every = [y for line in lines.values() for _, y, _ in line]
        log_axis(axes, "y", [*every, *silent.values(), *([dense] if dense else [])])
        if logarithmic:
            log_axis(axes, "x", [at for line in lines.values() for at, _, _ in line])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: size(v)))
            axes.tick_params(axis="x", labelsize=9)
        axes.set_xlabel(x)
        axes.set_ylabel("perplexity, geometric mean")
        figure.legend(loc="outside upper left", ncols=2)

    told = [
        f"{key} reaches {perplexity(line[-1][1])} after {show(line[-1][0])}"
        for key, line in lines.items()
        if line
    ]
    rows = math.ceil((len(lines) + bool(dense)) / 2)
    return chart(
        draw,
        name=name,
        title=title,
        alt=f"{title}: {'; '.join(told) or 'no rounds are recorded'}.",
        note="A mark a round; further left and further down is better.",
        inches=(5.2, 3.1 + 0.2 * rows),
    )


def _line(
    method: Method, value: Callable[[MethodRound], float], positive: bool
) -> list[tuple[float, float, int]]:
    return [
        (value(item), item.perplexity, item.round)
        for item in method.rounds
        if item.perplexity is not None and (value(item) > 0 or not positive)
    ]
