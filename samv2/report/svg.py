"""Matplotlib figures as SVG that takes its colours from the page.

A figure is drawn in placeholder colours that become CSS variables, so the same SVG is
right in light, dark and print; text stays text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0b1{index}" for index in range(8))
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "rule", PAPER: "card"} | {
    colour: f"s{index}" for index, colour in enumerate(SERIES)
}
"""CSS variable of each placeholder colour."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
LONGEST_NAME = 24
"""Characters of a name inside a drawing."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "samv2",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its words."""

    svg: Markup
    title: str
    note: str
    """How to read it."""
    alt: str
    """What it shows, for those who do not see it."""
    wide: bool = False
    """Whether it takes the width of the page."""


class Tips:
    """Names artists, so that a pointer over them shows a text."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """A ``gid`` for an artist that shall show ``text``."""
        name = f"tip{len(self.texts)}"
        self.texts[name] = text
        return name


Draw = Callable[[Figure, Tips], None]


def chart(
    draw: Draw,
    *,
    name: str,
    title: str,
    alt: str,
    note: str = "",
    inches: tuple[float, float] = (5.2, 3.2),
    wide: bool = False,
) -> Chart:
    """Draw a chart.

    Args:
        draw: fills the figure.
        name: prefix of the ids inside, its own on the page.
        title: above it.
        alt: what it shows, in a sentence.
        note: how to read it.
        inches: size; a small one is readable on a telephone.
        wide: whether it takes the width of the page.
    """
    tips = Tips()
    with _styled():
        figure = Figure(figsize=inches, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure, tips)
        out = StringIO()
        canvas.print_svg(out, metadata={"Date": None, "Creator": None})
    svg = inlined(out.getvalue(), name=name, alt=alt, tips=tips.texts)
    return Chart(svg=svg, title=title, note=note, alt=alt, wide=wide)


def short(name: str) -> str:
    """A name that leaves room for the drawing; tables and tips have all of it."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME - 1]}…"


def series_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series, told apart without colour as well."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(SERIES) % len(DASHES)],
    }


def inlined(source: str, *, name: str, alt: str, tips: Mapping[str, str]) -> Markup:
    """A matplotlib SVG document as an element for a page.

    Args:
        source: the document; matplotlib has escaped the text in it.
        name: prefix for its ids, of letters, digits and hyphens.
        alt: its description.
        tips: {gid: text shown over the artist}.
    """
    body = source[source.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box is not None, "matplotlib writes a viewBox"
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.S)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)
    for gid, text in tips.items():
        body = body.replace(
            f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(text)}</title>', 1
        )
    body = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    width = float(box[1].split()[2])
    head = (
        f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="{box[1]}" '
        f'style="max-width:{width * 1.5:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(head + body)


@contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Names may hold letters that matplotlib's own font lacks; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
