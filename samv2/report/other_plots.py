"""Charts of frontiers, comparisons of methods and grids of settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from samv2.report.other_data import (
    Ablation,
    Comparison,
    FrontierPoint,
    Method,
    MethodRound,
    csv_number,
)
from samv2.report.run_plots import log_axis
from samv2.report.svg import (
    INK,
    MUTED,
    SERIES,
    Chart,
    Tips,
    chart,
    label_ends,
    series_style,
)
from samv2.report.words import duration, perplexity, share, size

LONGEST_VALUE = 22
"""Characters of a setting's value on an axis."""


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
    lines = {key: line for key, line in lines.items() if line}

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        ends = {}
        for index, (key, line) in enumerate(lines.items()):
            style = series_style(index)
            axes.plot(
                [at for at, _, _ in line],
                [y for _, y, _ in line],
                **(style | {"marker": ""}),
            )
            for at, y, number in line:
                tip = f"{key}, round {number}: {perplexity(y)} after {show(at)}"
                axes.plot([at], [y], **style, gid=tips(tip))
            axes.plot([], [], **style, label=key)
            ends[key] = (line[-1][0], line[-1][1], style["color"])
        log_axis(axes, "y", [y for line in lines.values() for _, y, _ in line])
        if logarithmic:
            log_axis(axes, "x", [at for line in lines.values() for at, _, _ in line])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: size(v)))
            axes.tick_params(axis="x", labelsize=9)
        axes.set_xlabel(x)
        axes.set_ylabel("perplexity, geometric mean")
        if len(lines) > 4:
            label_ends(axes, ends, gap=0.06)
        else:
            figure.legend(loc="outside upper left", ncols=2)

    told = [
        f"{key} reaches {perplexity(line[-1][1])} after {show(line[-1][0])}"
        for key, line in lines.items()
    ]
    return chart(
        draw,
        name=name,
        title=title,
        alt=f"{title}: {'; '.join(told) or 'no rounds are recorded'}.",
        note="A mark a round; further left and further down is better.",
    )


def _line(
    method: Method, value: Callable[[MethodRound], float], positive: bool
) -> list[tuple[float, float, int]]:
    return [
        (value(item), item.perplexity, item.round)
        for item in method.rounds
        if item.perplexity is not None and (value(item) > 0 or not positive)
    ]


def effect_charts(ablation: Ablation, *, name: str) -> list[Chart]:
    """Perplexity over the values of each setting that was varied."""
    return [
        found
        for index, factor in enumerate(ablation.factors)
        if (found := _effect(ablation, factor, name=f"{name}-effect{index}"))
    ]


def _effect(ablation: Ablation, factor: str, *, name: str) -> Chart | None:
    pairs = [
        (value, found)
        for value, cell in zip(ablation.column(factor), ablation.column("perplexity"))
        if (found := csv_number(cell)) is not None and found > 0
    ]
    values = ordered({value for value, _ in pairs})
    if not values:
        return None
    groups = {v: [y for value, y in pairs if value == v] for v in values}
    means = {v: math.exp(sum(map(math.log, ys)) / len(ys)) for v, ys in groups.items()}

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        axes.plot(range(len(values)), [means[v] for v in values], color=SERIES[0])
        for place, value in enumerate(values):
            for y in groups[value]:
                axes.plot(
                    [place],
                    [y],
                    linestyle="",
                    marker="o",
                    color=MUTED,
                    markersize=4,
                    alpha=0.7,
                    gid=tips(f"{factor} = {value}: {perplexity(y)}"),
                )
            tip = tips(f"{factor} = {value}, mean: {perplexity(means[value])}")
            axes.plot(
                [place], [means[value]], marker="D", color=SERIES[0], gid=tip, zorder=3
            )
        axes.set_xticks(range(len(values)), [_short(value) for value in values])
        axes.margins(x=0.15, y=0.15)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_ylabel("perplexity")
        axes.grid(axis="x", visible=False)

    told = [f"{value} {perplexity(means[value])}" for value in values]
    return chart(
        draw,
        name=name,
        title=factor,
        alt=f"Mean perplexity by {factor}: {'; '.join(told)}.",
        inches=(3.8, 2.5),
    )


def ordered(values: set[str]) -> list[str]:
    """By size where all are numbers, else by name."""
    numbers = {value: csv_number(value) for value in values}
    if all(number is not None for number in numbers.values()):
        return sorted(values, key=lambda value: (numbers[value] or 0.0, value))
    return sorted(values)


def _short(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE - 1]}…"
