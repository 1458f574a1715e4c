"""Charts of a grid of settings: what each does, and what quality costs in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from samv2.report.axes import log_axis
from samv2.report.other_data import Ablation, csv_number
from samv2.report.svg import MUTED, SERIES, Chart, Tips, chart, short
from samv2.report.words import perplexity, size


def effect_charts(ablation: Ablation, *, name: str) -> list[Chart]:
    """Perplexity over the values of each setting that was varied, on one scale."""
    shown = {factor: shown_groups(ablation, factor) for factor in ablation.factors}
    every = [
        y for groups, _ in shown.values() for group in groups for _, y in group
    ] or [1.0]
    room = 0.06 * (max(every) - min(every)) or 0.01 * max(every)
    limits = (min(every) - room, max(every) + room)
    charts = [
        _effect(factor, groups, paired, limits, name=f"{name}-effect{index}")
        for index, (factor, (groups, paired)) in enumerate(shown.items())
    ]
    return [found for found in charts if found is not None]


def shown_groups(
    ablation: Ablation, factor: str
) -> tuple[list[list[tuple[str, float]]], bool]:
    """Groups of runs with a counterpart that differs in this setting alone.

    Returns:
        Those groups as :func:`comparable` has them and True; all of them and False where
        there are no such runs.
    """
    groups = comparable(ablation, factor)
    paired = [group for group in groups if len({value for value, _ in group}) > 1]
    return (paired, True) if paired else (groups, False)


def _effect(
    factor: str,
    shown: Sequence[Sequence[tuple[str, float]]],
    paired: bool,
    limits: tuple[float, float],
    *,
    name: str,
) -> Chart | None:
    values = ordered({value for group in shown for value, _ in group})
    if len(values) < 2:
        return None
    groups = {v: [y for group in shown for x, y in group if x == v] for v in values}
    means = {v: math.exp(sum(map(math.log, ys)) / len(ys)) for v, ys in groups.items()}

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        for group in shown if paired else ():
            line = sorted((values.index(value), y) for value, y in group)
            axes.plot(*zip(*line), color=MUTED, linewidth=0.7, alpha=0.5)
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
        axes.set_xticks(range(len(values)), [short(value) for value in values])
        axes.margins(x=0.15)
        axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        axes.set_ylabel("perplexity")
        axes.grid(axis="x", visible=False)

    told = [f"{value} {perplexity(means[value])}" for value in values]
    return chart(
        draw,
        name=name,
        title=factor,
        alt=f"Mean perplexity by {factor}: {'; '.join(told)}.",
        note="" if paired else "No two runs differ in this setting alone.",
        inches=(3.8, 2.5),
    )


def comparable(ablation: Ablation, factor: str) -> list[list[tuple[str, float]]]:
    """Runs in groups that differ in one setting at most.

    Returns:
        For each group (value of the setting, perplexity) of the runs that have one.
    """
    others = [ablation.column(name) for name in ablation.factors if name != factor]
    groups: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    cells = zip(ablation.column(factor), ablation.column("perplexity"))
    for row, (value, cell) in enumerate(cells):
        found = csv_number(cell)
        if found is not None and found > 0:
            same = tuple(column[row] for column in others)
            groups.setdefault(same, []).append((value, found))
    return list(groups.values())


def trade_chart(ablation: Ablation, *, name: str) -> Chart | None:
    """Perplexity over uploaded bytes, a mark a run; None where bytes are not known."""
    column = "bytes_up_per_client_round"
    if column not in ablation.columns:
        return None
    names = ablation.column(ablation.columns[0])
    cells = zip(names, ablation.column(column), ablation.column("perplexity"))
    runs = [(run, csv_number(x) or 0.0, csv_number(y) or 0.0) for run, x, y in cells]
    runs = [(run, x, y) for run, x, y in runs if x > 0 and y > 0]
    if len({(x, y) for _, x, y in runs}) < 2:
        return None

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        for run, x, y in runs:
            tip = tips(f"{run}: {perplexity(y)} with {size(x)}")
            axes.plot([x], [y], "o", color=SERIES[0], alpha=0.8, gid=tip)
        log_axis(axes, "x", [x for _, x, _ in runs])
        log_axis(axes, "y", [y for _, _, y in runs])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: size(v)))
        axes.set_xlabel("uploaded by a client in a round, logarithmic")
        axes.set_ylabel("perplexity, logarithmic")

    best = min(runs, key=lambda item: item[2])
    return chart(
        draw,
        name=f"{name}-trade",
        title="Perplexity against uploaded bytes",
        alt=f"{len(runs)} runs; the lowest perplexity, {perplexity(best[2])}, has "
        f"{best[0]} with {size(best[1])}.",
        note="A mark a run; further left and further down is better.",
    )


def ordered(values: set[str]) -> list[str]:
    """By size where all are numbers, else by name."""
    numbers = {value: csv_number(value) for value in values}
    if all(number is not None for number in numbers.values()):
        return sorted(values, key=lambda value: (numbers[value] or 0.0, value))
    return sorted(values)
