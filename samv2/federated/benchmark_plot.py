"""A federation benchmark as a picture: quality against bytes sent and against time."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from samv2.common.files import write_bytes
from samv2.federated.benchmark_settings import DEFAULT_METHODS
from samv2.federated.lora_methods import METHODS

# Okabe and Ito's colours without yellow: told apart by all kinds of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GRID = "#333333", "#dddddd"
INCHES, DPI = (11.0, 4.4), 150


def draw_federation(path: Path, report: Mapping[str, Any]) -> None:
    """Write a PNG of two panels, one line a method.

    A method that sends nothing is a level line in the left panel, at its last value.

    Args:
        path: the file.
        report: the content of ``federation.json``.
    """
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    dense = report["protocol"]["dense"]["perplexity"]
    for axes in (by_bytes, by_time):
        if dense is not None:
            axes.axhline(dense, color=INK, linewidth=1, linestyle=":")
    sends = False
    names = [entry["method"] for entry in report["methods"]]
    order = list(dict.fromkeys([*DEFAULT_METHODS, *names]))
    for entry in report["methods"]:
        index = order.index(entry["method"])  # a method looks the same in all pictures
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4.5,
            "linewidth": 1.6,
        }
        sends |= _draw_method(by_bytes, by_time, entry, style)
    if sends:
        by_bytes.set_xscale("log")
        by_bytes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        by_bytes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        by_bytes.xaxis.set_minor_formatter(NullFormatter())
    by_bytes.set_xlabel("uploaded by all clients, MB (log scale)")
    by_time.set_xlabel("training and merging, seconds")
    by_bytes.set_ylabel("held-out perplexity, geometric mean")
    for axes in (by_bytes, by_time):
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    protocol = report["protocol"]
    figure.suptitle(
        f"{protocol['name']}: {protocol['model']} (dotted: the dense model)",
        color=INK,
        fontsize=11,
    )
    handles, labels = by_time.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, loc="outside right center")
    data = BytesIO()
    canvas.print_png(data, metadata={"Software": None})
    write_bytes(path, data.getvalue())


def _draw_method(
    by_bytes: Axes, by_time: Axes, entry: Mapping[str, Any], style: Mapping[str, Any]
) -> bool:
    """Draw one method in both panels; returns whether it sends anything."""
    points = [item for item in entry["rounds"] if item["perplexity"] is not None]
    heights = [item["perplexity"] for item in points]
    by_time.plot([p["seconds"] for p in points], heights, label=entry["title"], **style)
    if not points:
        return False
    if not entry["bytes_up_total"]:
        by_bytes.axhline(
            heights[-1], color=style["color"], linewidth=1.4, linestyle="--"
        )
        known = METHODS.get(entry["method"])
        why = "all text in one place" if known and known.pooled else "nothing sent"
        _name_level(by_bytes, heights[-1], f"{entry['title']} ({why})", style["color"])
        return False
    megabytes = [point["bytes_up_total"] / 1e6 for point in points]
    by_bytes.plot(megabytes, heights, **style)
    return True


def _name_level(axes: Axes, height: float, title: str, colour: str) -> None:
    axes.annotate(
        title,
        (0.99, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=colour,
    )
