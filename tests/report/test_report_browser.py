"""The page in a real browser, offline: it draws, it answers, and nobody's script runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samv2.report.page import make_report
from samv2.report.sources import find_sources
from tests.report.browser import Browser, chromium, find_chromium

REQUIRED = "SAMV2_REQUIRE_CHROMIUM"
"""Set where a missing browser is a fault rather than a reason to skip."""
pytestmark = pytest.mark.skipif(
    find_chromium() is None and not os.environ.get(REQUIRED),
    reason="no Chromium on this machine; as root: apt-get install chromium",
)
DRAWN = ("run1", "run1-domains", "run1-rounds", "run1-cost", "run1-experts") + (
    "run1-graph",
    "run1-edits",
    "comparison1",
    "ablation1",
    "frontier1",
)
WORDS = ("run1-clients", "run1-refused", "run1-frontier", "run1-settings", "words")
ATTACK = "<script>document.title = 'owned'</script><img src=x onerror=stolen()>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def page(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_run: Path,
    methods_folder: Path,
    grid_folder: Path,
    frontier_folder: Path,
) -> Path:
    """A report on one of each."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    folders = (tiny_run, methods_folder, grid_folder, frontier_folder)
    path.write_text(make_report(find_sources(folders)), encoding="utf-8")
    return path


def counts(pixels: np.ndarray) -> np.ndarray:
    """How often each colour of a picture occurs."""
    codes = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    return np.unique(codes, return_counts=True)[1]


def ink(pixels: np.ndarray) -> float:
    """Share of pixels that are not of the commonest colour."""
    return 1 - counts(pixels).max() / counts(pixels).sum()


@pytest.mark.parametrize(
    ("width", "scheme"), [(1400, "light"), (1400, "dark"), (390, "light")]
)
def test_every_section_is_drawn(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.resize(width)
    browser.media(scheme=scheme)
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for name in (*DRAWN, *WORDS):
        pixels = browser.picture(f"#{name}")
        height, wide = pixels.shape[:2]
        assert wide >= 0.6 * min(width, 1000) and height >= 40, name
        assert len(counts(pixels)) >= 8, name
        assert 0.005 < ink(pixels) < 0.9, name
        bright = pixels.mean() > 127
        assert bright == (scheme == "light"), name
    for name in DRAWN:
        svgs = browser.evaluate(
            f"[...document.querySelectorAll('#{name} svg')].map(svg => "
            "[svg.getBoundingClientRect().width, svg.getBBox().width, "
            "svg.querySelectorAll('path, text').length])"
        )
        shown = [sizes for sizes in svgs if sizes[0] > 0]
        assert shown, name
        for wide, drawn, parts in shown:
            assert wide >= 200 and drawn > 50 and parts >= 8, name


def test_charts_are_not_blank(browser: Browser, page: Path) -> None:
    browser.resize(1400)
    browser.media()
    browser.open(page)
    count = browser.evaluate(
        "(() => { const shown = [...document.querySelectorAll('svg')].filter("
        "svg => svg.getBoundingClientRect().width); "
        "shown.forEach((svg, index) => { svg.id = `chart${index}`; }); "
        "return shown.length; })()"
    )
    assert count >= 14
    for index in range(count):
        pixels = browser.picture(f"#chart{index}")
        assert len(counts(pixels)) >= 8 and ink(pixels) > 0.005, index


def test_layers_and_walks_are_chosen(browser: Browser, page: Path) -> None:
    browser.open(page)
    shown = "[...document.querySelectorAll('.layer')].map(layer => layer.hidden)"
    first = browser.evaluate("Number(document.querySelector('.layers').dataset.shown)")
    assert browser.evaluate(shown).index(False) == first
    before = browser.picture(".layers")
    browser.evaluate(
        "(() => { const s = document.querySelector('[data-layer-choice]'); "
        f"s.value = '{(first + 1) % 3}'; s.dispatchEvent(new Event('change')); }})()"
    )
    assert browser.evaluate(shown).index(False) == (first + 1) % 3
    after = browser.picture(".layers")
    assert before.shape != after.shape or (before != after).any()
    browser.evaluate("document.querySelector('[data-layer-step=\"1\"]').click()")
    assert browser.evaluate(shown).index(False) == (first + 2) % 3
    walks = (
        "[...document.querySelectorAll('.layer:not([hidden]) .walk')].map("
        "walk => getComputedStyle(walk).display !== 'none')"
    )
    assert browser.evaluate(walks) == [True, False]
    browser.evaluate(
        "(() => { const s = document.querySelector('[data-walk-choice]'); "
        "s.value = '1'; s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.evaluate(walks) == [False, True]
    assert browser.complaints() == []


def test_tables_are_sorted(browser: Browser, page: Path) -> None:
    browser.open(page)

    def click(table: str, column: str) -> list[str]:
        return browser.evaluate(
            f"(() => {{ const table = document.querySelector('#{table} table'); "
            "const index = [...table.tHead.rows[0].cells].findIndex("
            f"cell => cell.textContent === {json.dumps(column)}); "
            "table.tHead.rows[0].cells[index].querySelector('button').click(); "
            "return [...table.tBodies[0].rows].map(row => "
            "row.cells[index].textContent.replace(' ★', '')); })()"
        )

    assert click("comparison1", "uploaded, client and round") == [
        "0 bytes",
        "10 kB",
        "400 kB",
        "–",
    ]
    assert click("comparison1", "uploaded, client and round")[0] == "400 kB"
    assert click("ablation1", "perplexity") == ["92.50"] * 2 + ["96.50"] * 2 + [""]
    assert click("ablation1", "name")[0] == "4-int4"
    sorted_by = "document.querySelectorAll('#ablation1 [aria-sort]').length"
    assert browser.evaluate(sorted_by) == 1


def test_a_printed_page_is_light_and_needs_no_mouse(
    browser: Browser, page: Path
) -> None:
    browser.resize(800)
    browser.media(scheme="dark", kind="print")
    browser.open(page)
    assert browser.picture("#run1-domains").mean() > 200
    hidden = (
        "['.contents', '.controls'].every(name => "
        "getComputedStyle(document.querySelector(name)).display === 'none')"
    )
    assert browser.evaluate(hidden)
    browser.media()


def test_what_a_client_says_is_never_run(
    browser: Browser, broken_run: Path, tmp_path: Path
) -> None:
    path = broken_run / "merge_round1.json"
    merge = json.loads(path.read_text())
    merge["refused"] = [{"client": 0, "reason": ATTACK, "detail": ATTACK}]
    path.write_text(json.dumps(merge))
    text = make_report(find_sources([broken_run]))
    (tmp_path / "safe.html").write_text(text, encoding="utf-8")
    browser.open(tmp_path / "safe.html")
    assert browser.complaints() == []
    title = browser.evaluate("document.title")
    assert title == "SAM-v2 report: broken"
    assert ATTACK in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0

    # Even a page that failed to escape would not run it: the policy forbids.
    (tmp_path / "worse.html").write_text(text.replace("</main>", ATTACK + "</main>"))
    browser.open(tmp_path / "worse.html")
    assert browser.evaluate("document.querySelectorAll('img').length") == 1
    assert browser.evaluate("document.title") == title
    assert any("Content Security Policy" in said for said in browser.complaints())
