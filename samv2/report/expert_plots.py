"""Heat maps of which experts fire for which domain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from samv2.report.graph_data import Trace
from samv2.report.svg import Chart, Tips, chart, short
from samv2.report.words import share

BESIDE = 3
"""Panels in a row."""
SHARE_COLOURS, DIFFERENCE_COLOURS = "cividis", "PuOr_r"
"""Colour maps that are read with any kind of colour vision."""


def share_chart(trace: Trace, labels: Sequence[str], *, name: str) -> Chart:
    """Share of each domain's tokens that visit an expert.

    Args:
        trace: of a run.
        labels: of the layers.
        name: prefix of ids.
    """
    mean = float(trace.share_DLE.mean())
    return _maps(
        trace,
        trace.share_DLE,
        labels,
        limits=(0.0, 1.0),
        colours=SHARE_COLOURS,
        scale="share of tokens that visit",
        name=f"{name}-shares",
        title="How often each expert is visited",
        alt=f"A map of layers and experts for each of {', '.join(trace.domains)}; on "
        f"average {share(mean)} of the tokens visit an expert.",
    )


def difference_chart(trace: Trace, labels: Sequence[str], *, name: str) -> Chart:
    """The same less the mean over domains, in percentage points."""
    difference_DLE = 100 * trace.difference_DLE()
    limit = max(1.0, float(np.abs(difference_DLE).max()))
    return _maps(
        trace,
        difference_DLE,
        labels,
        limits=(-limit, limit),
        colours=DIFFERENCE_COLOURS,
        scale="percentage points from the mean",
        name=f"{name}-differences",
        title="What sets a domain apart",
        alt="A map of layers and experts for each domain: how much more or less an "
        f"expert is visited than on average over domains, up to {limit:.0f} percentage "
        "points.",
    )


def _maps(
    trace: Trace,
    values_DLE: np.ndarray,
    labels: Sequence[str],
    *,
    limits: tuple[float, float],
    colours: str,
    scale: str,
    name: str,
    title: str,
    alt: str,
) -> Chart:
    count, layers, experts = values_DLE.shape
    columns = min(BESIDE, count)
    rows = math.ceil(count / columns)

    def draw(figure: Figure, tips: Tips) -> None:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        step = max(1, math.ceil(layers / 8))
        image = None
        for place, axes in enumerate(panels.flat):
            axes.grid(False)
            if place >= count:
                axes.set_visible(False)
                continue
            image = axes.imshow(
                values_DLE[place],
                vmin=limits[0],
                vmax=limits[1],
                cmap=colours,
                aspect="auto",
                interpolation="none",
            )
            axes.set_title(short(trace.domains[place]))
            axes.set_yticks(range(0, layers, step), labels[::step])
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.tick_params(length=2)
        figure.supxlabel("expert", fontsize=10)
        figure.supylabel("layer", fontsize=10)
        bar = figure.colorbar(image, ax=panels, aspect=30, pad=0.02, label=scale)
        bar.outline.set_visible(False)

    height = min(3.2, 1.3 + 0.06 * layers)
    return chart(
        draw,
        name=name,
        title=title,
        alt=alt,
        inches=(2.5 * columns + 1.1, 0.5 + height * rows),
        wide=True,
    )
