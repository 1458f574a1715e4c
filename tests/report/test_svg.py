"""Figures as SVG for a page: themed, escaped, with ids of their own."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from samv2.report import axes as shared
from samv2.report.svg import (
    INK,
    SERIES,
    VARIABLES,
    Chart,
    Tips,
    chart,
    inlined,
    series_style,
)

HOSTILE = "</text><script>alert('$x$')</script> & \" id=\"x"


def drawn(name: str = "one", text: str = "plain") -> Chart:
    """A line with a tip and a named axis."""

    def draw(figure: Figure, tips: Tips) -> None:
        plot = figure.add_subplot()
        plot.plot([1, 2], [3, 4], color=SERIES[0], marker="o", gid=tips(text))
        plot.set_xlabel(text)
        plot.legend(["a"])

    return chart(draw, name=name, title="T", alt=text)


def test_colours_come_from_the_page() -> None:
    svg = str(drawn().svg)
    assert "var(--s0)" in svg and "var(--ink)" in svg and "var(--rule)" in svg
    assert not any(colour in svg for colour in VARIABLES)
    assert "<style" not in svg and "<metadata" not in svg and "<!--" not in svg


def test_text_is_text_and_tips_are_titles() -> None:
    svg = str(drawn(text="five % of $2").svg)
    root = ElementTree.fromstring(svg)
    texts = ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")]
    assert "five % of $2" in texts
    titles = [e.text for e in root.iter() if e.tag.endswith("title")]
    assert titles == ["five % of $2"]
    assert root.get("role") == "img" and root.get("aria-label") == "five % of $2"


def test_hostile_text_stays_text() -> None:
    root = ElementTree.fromstring(str(drawn(text=HOSTILE).svg))
    assert not [e for e in root.iter() if e.tag.endswith("script")]
    assert root.get("aria-label") == HOSTILE
    assert HOSTILE in [e.text for e in root.iter() if e.tag.endswith("title")]


def test_ids_are_prefixed_and_references_follow() -> None:
    first, second = str(drawn("one").svg), str(drawn("two").svg)
    ids = [set(re.findall(r'<[^>]* id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', first)
    assert {a or b for a, b in used} <= ids[0]
    assert first.replace("one-", "two-") == second


def test_letters_that_matplotlib_lacks_do_not_warn() -> None:
    assert "漢字 🙂" in str(drawn(text="漢字 🙂").svg)


def test_an_inlined_document_keeps_its_box() -> None:
    source = '<?xml?><svg viewBox="0 0 30 20"><g id="tip0"><path/></g></svg>'
    found = str(inlined(source, name="n", alt="<a>", tips={"tip0": "<b>"}))
    assert 'viewBox="0 0 30 20"' in found and "max-width:45px" in found
    assert '<g id="n-tip0"><title>&lt;b&gt;</title>' in found
    assert 'aria-label="&lt;a&gt;"' in found


def test_series_differ_in_more_than_colour() -> None:
    styles = [series_style(index) for index in range(32)]
    looks = {(s["color"], s["marker"], str(s["linestyle"])) for s in styles}
    assert len(looks) == 32
    assert len({s["marker"] for s in styles[:8]}) == 8


@pytest.fixture
def axes() -> Axes:
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure.add_subplot()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (20.0, 26.0, [20, 21, 22, 23, 24, 25, 26]),
        (77.0, 81.0, [77, 78, 79, 80, 81]),
        (0.9, 110.0, [1, 2, 4, 8, 20, 40, 80]),
    ],
)
def test_round_ticks(low: float, high: float, expected: list[float]) -> None:
    found = shared.round_ticks(low, high)
    assert all(low <= tick <= high for tick in found)
    assert 3 <= len(found) <= 8
    assert all(float(f"{tick:.2g}") == tick for tick in found)
    if len(found) == len(expected):
        assert found == pytest.approx(expected)


def test_decades() -> None:
    assert shared.decades([3000.0, 2e6]) == [10.0**p for p in range(2, 8)]
    assert shared.decades([])


def test_log_axis(axes: Axes) -> None:
    shared.log_axis(axes, "y", [8.0, 32.0, 0.0])
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log" and low < 8 and high > 32
    shared.log_axis(axes, "x", [])
    assert axes.get_xlim()[0] > 0
    shared.log_axis(axes, "y", [5.0])
    assert axes.get_ylim()[0] < 5 < axes.get_ylim()[1]


def test_lines_over_rounds(axes: Axes) -> None:
    tips = Tips()
    line = [(1, 5.0), (2, 4.0)]
    colour = shared.draw_line(axes, line, 2, "a", tips, show=str)
    assert colour == SERIES[2]
    assert list(tips.texts.values()) == ["a, round 1: 5.0", "a, round 2: 4.0"]
    long = [(x, 1.0) for x in range(shared.MOST_MARKS + 1)]
    shared.draw_line(axes, long, 0, "b", tips, show=str)
    shared.draw_line(axes, [], 1, "c", tips, show=str)
    assert len(tips.texts) == 2
    assert axes.get_legend_handles_labels()[1] == ["a", "b", "c"]
    shared.round_axis(axes)
    assert axes.get_xlabel() == "round"
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_names_at_the_ends_keep_apart(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    ends = {"a": (3.0, 0.5, INK), "b": (3.0, 0.51, INK), "c": (3.0, 0.9, INK)}
    shared.label_ends(axes, ends, gap=0.1)
    placed = {text.get_text(): text.xy[1] for text in axes.texts}
    assert placed["b"] - placed["a"] == pytest.approx(0.1)
    assert placed["a"] < placed["b"] < placed["c"]


def test_spread() -> None:
    found = shared.spread({"low": 0.5, "high": 0.52}, gap=0.1)
    assert found["high"] - found["low"] == pytest.approx(0.1)
    assert (found["high"] + found["low"]) / 2 == pytest.approx(0.51)
    assert shared.spread({"a": 0.1, "b": 0.9}, gap=0.1) == {"a": 0.1, "b": 0.9}
    assert shared.spread({}, gap=0.1) == {}
