"""Charts of what merges did to the graph, and of the walks behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from samv2.report.axes import round_axis
from samv2.report.merge_data import Merge
from samv2.report.svg import MUTED, SERIES, Chart, Tips, chart, series_style


def edits_chart(merges: Sequence[Merge], *, name: str) -> Chart:
    """How many edges each round pruned and promoted."""
    kinds = ("promote", "prune")
    x = [merge.round for merge in merges]
    counts = {
        kind: [sum(edit.kind == kind for edit in merge.edits) for merge in merges]
        for kind in kinds
    }

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        for kind, colour, sign in zip(kinds, (SERIES[2], SERIES[1]), (1, -1)):
            label = EDIT_WORDS[kind]
            heights = [sign * count for count in counts[kind]]
            bars = axes.bar(x, heights, width=0.6, color=colour, label=label)
            for at, count, bar in zip(x, counts[kind], bars):
                bar.set_gid(tips(f"round {at}, {label}: {count}"))
        axes.axhline(0, color=MUTED, linewidth=0.8)
        round_axis(axes)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.set_ylabel("edges")
        figure.legend(loc="outside upper left", ncols=2)

    total = {kind: sum(values) for kind, values in counts.items()}
    return chart(
        draw,
        name=f"{name}-edits",
        title="Edits of the graph",
        alt=f"{total['promote']} edges were added and {total['prune']} removed.",
        note="Above the line: edges that were added; below: removed.",
        inches=(5.2, 2.6),
    )


EDIT_WORDS = {"promote": "added (promote)", "prune": "removed (prune)"}


def visits_chart(merges: Sequence[Merge], labels: Sequence[str], *, name: str) -> Chart:
    """Visits and unmet demand a token, over layers; first and last round."""
    chosen = [m for m in ({m.round: m for m in (merges[0], merges[-1])}).values()]

    def draw(figure: Figure, tips: Tips) -> None:
        panels = figure.subplots(2, 1, sharex=True)
        for index, merge in enumerate(chosen):
            tokens = max(merge.tokens, 1.0)
            pairs = zip(panels, (merge.usage_per_layer, merge.demand_per_layer))
            for axes, values in pairs:
                style = series_style(index)
                y = [value / tokens for value in values]
                axes.plot(range(len(y)), y, **style, label=f"round {merge.round}")
                axes.lines[-1].set_markersize(3.5)
        panels[0].set_title("experts that a token visits")
        panels[1].set_title("visits prevented by an absent edge")
        step = max(1, math.ceil(len(labels) / 10))
        panels[1].set_xticks(range(0, len(labels), step), labels[::step])
        panels[1].set_xlabel("layer")
        for axes in panels:
            axes.margins(y=0.2)
        if len(chosen) > 1:
            panels[0].legend(loc="lower right", ncols=2)

    last = merges[-1]
    tokens = max(last.tokens, 1.0) * max(1, len(last.usage_per_layer))
    return chart(
        draw,
        name=f"{name}-visits",
        title="Visits in each layer",
        alt=f"In round {last.round} a token visits "
        f"{sum(last.usage_per_layer) / tokens:.2f} experts a layer on average; "
        f"{sum(last.demand_per_layer) / tokens:.2f} wanted steps had no edge.",
        note="Counted while clients trained. A wanted step is one to an expert that was "
        "chosen, had the edge been there; edges that are wanted much get promoted.",
        inches=(5.2, 3.8),
    )
