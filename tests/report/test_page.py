"""The page as text: complete, self-contained, and deaf to what strangers wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from samv2.common.errors import CheckpointError
from samv2.report.page import (
    GENERATOR,
    MOST_ROWS,
    code,
    heading,
    make_report,
    policy,
    read_template,
    render,
    title_of,
    write_report,
)
from samv2.report.sources import find_sources
from samv2.report.views import (
    view_ablation,
    view_comparison,
    view_frontier,
    view_report,
    view_run,
)

VOID = {"meta", "link", "br", "img", "input", "hr"}
PARTS = ("domains", "rounds", "cost", "clients", "experts", "graph") + (
    "edits",
    "refused",
    "frontier",
    "settings",
)
ATTACK = "</td><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} `a`"


class Page(HTMLParser):
    """A parsed page; unbalanced tags are errors."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.handle_startendtag(tag, attrs)
        self.tags[tag] -= 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.targets.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def everything(
    tiny_run: Path, methods_folder: Path, grid_folder: Path, frontier_folder: Path
) -> Page:
    """A page about one of each."""
    folders = (tiny_run, methods_folder, grid_folder, frontier_folder)
    return Page(make_report(find_sources(folders)))


def test_the_page_is_whole_and_carries_all_it_needs(everything: Page) -> None:
    assert everything.tags["title"] >= 1 and everything.tags["h1"] == 1
    assert everything.tags["link"] == 0 and everything.tags["script"] == 1
    for target in everything.targets:
        assert target.startswith(("#", "data:image/png;base64,")), target
    assert everything.handlers == []
    repeated = [id for id, count in Counter(everything.ids).items() if count > 1]
    assert repeated == []
    anchors = {t[1:] for t in everything.targets if t.startswith("#")}
    assert anchors <= set(everything.ids)
    sections = {f"run1-{part}" for part in PARTS} | {"run1", "words"}
    sections |= {"comparison1", "ablation1", "frontier1"}
    assert sections <= anchors


def test_the_page_tells_what_came_of_it(everything: Page, tiny_run: Path) -> None:
    summary = json.loads((tiny_run / "summary.json").read_text())
    for name, values in summary["domains"].items():
        shown = [f"{values[part]:.2f}" for part in ("dense", "start", "final")]
        assert f"{name} {' '.join(shown)}" in everything.text
    assert "Two clients trained" in everything.text
    assert "Not shown." in everything.text  # a run from a dense model has no frontier
    assert "19.00 ★" in everything.text  # the best method
    assert "92.50 ★" in everything.text  # the best of the grid
    assert "[federation]" in everything.text
    assert "dense model, untrained 24.00" in everything.text


def test_several_runs_stand_side_by_side(tiny_run: Path, broken_run: Path) -> None:
    view = view_report(find_sources([tiny_run, broken_run]))
    assert view.runs_chart is not None
    page = Page(render(view))
    assert {"runs", "run1", "run2", "run2-graph"} <= set(page.ids)
    assert title_of(view) == "SAM-v2 report: tiny and broken"
    assert len(page.ids) == len(set(page.ids))


def test_what_strangers_wrote_stays_text(
    broken_run: Path, methods_folder: Path, grid_folder: Path, tmp_path: Path
) -> None:
    path = broken_run / "merge_round1.json"
    merge = json.loads(path.read_text())
    merge["refused"] = [{"client": -1, "reason": ATTACK, "detail": ATTACK}]
    for edit in merge["edits"]:
        edit["reason"] = edit["kind"] = ATTACK
    path.write_text(json.dumps(merge))
    summary = json.loads((broken_run / "summary.json").read_text())
    summary["model"] = ATTACK
    summary["domains"][ATTACK] = {"dense": 1, "start": 2, "final": 3}
    summary["seconds"][ATTACK] = 1
    (broken_run / "summary.json").write_text(json.dumps(summary))
    lines = (broken_run / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["perplexity"][ATTACK] = 2.0
    (broken_run / "metrics.jsonl").write_text(json.dumps(row) + "\n" + lines[1])
    told = json.loads((broken_run / "clients.jsonl").read_text().splitlines()[0])
    told["clients"][0]["refused"] = [{"reason": ATTACK, "detail": ATTACK}]
    (broken_run / "clients.jsonl").write_text(json.dumps(told))
    trace = json.loads((broken_run / "expert_call_trace.json").read_text())
    trace[0]["sequence"] = ATTACK
    (broken_run / "expert_call_trace.json").write_text(json.dumps(trace))
    (broken_run / "config.toml").write_text(f"# {ATTACK}\n")
    methods = (methods_folder / "federation.json").read_text()
    (tmp_path / "federation.json").write_text(
        methods.replace('"FedIT"', json.dumps(ATTACK))
    )
    grid = (grid_folder / "ablation.csv").read_text().replace("int4", f'"{ATTACK}"')
    (tmp_path / "ablation.csv").write_text(grid.replace("federation.codec", "<b>x"))
    page = Page(make_report(find_sources([broken_run, tmp_path])))
    assert page.tags["script"] == 1 and page.tags["img"] == 0 and page.tags["b"] == 0
    assert page.handlers == []
    assert page.text.count("{{ 7 * 7 }}") >= 10 and "49" not in page.text.split()
    assert f"unknown {ATTACK}" in page.text
    assert f"0 1 1 1 {ATTACK}" in page.text  # client 0: asked, counted, refused, why


def test_long_lists_are_cut(broken_run: Path) -> None:
    path = broken_run / "merge_round2.json"
    merge = json.loads(path.read_text())
    reply = {"client": 1, "reason": "no_reply", "detail": "no reply in time"}
    merge["refused"] = [reply] * (MOST_ROWS + 3)
    path.write_text(json.dumps(merge))
    page = Page(make_report(find_sources([broken_run])))
    assert page.text.count("no reply in time") == MOST_ROWS
    assert "3 more are in the run's merge_round files" in page.text


FILES = (
    "config.toml",
    "metrics.jsonl",
    "summary.json",
    "prepared.json",
    "merge_round1.json",
    "merge_round2.json",
    "expert_call_trace.json",
    "usage.jsonl",
    "checkpoints/round_0002/state.json",
    "checkpoints/round_0002/state.safetensors",
    "model/expert_config.json",
    "frontier.json",
    "clients.jsonl",
)


DAMAGES = ("gone", "cut", "{}", "[]", "\ufffd")


def damage_file(path: Path, damage: str) -> None:
    """Remove, cut or replace a file."""
    if damage == "gone":
        path.unlink(missing_ok=True)
    elif damage == "cut":
        whole = path.read_bytes() if path.is_file() else b"[[]]"
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_text(damage, encoding="utf-8")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_never_breaks_the_page(broken_run: Path, damage: str) -> None:
    for name in FILES[::2]:
        damage_file(broken_run / name, damage)
    page = Page(make_report(find_sources([broken_run])))
    assert {f"run1-{part}" for part in PARTS} <= set(page.ids)
    for name in FILES[1::2]:
        damage_file(broken_run / name, damage)
    (broken_run / "config.toml").write_text("seed = 1\n")
    page = Page(make_report(find_sources([broken_run])))
    assert page.text.count("Not shown.") >= 6


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_one_file_never_breaks_the_page(
    broken_run: Path, name: str, damage: str
) -> None:
    damage_file(broken_run / name, damage)
    page = Page(make_report(find_sources([broken_run])))
    assert {f"run1-{part}" for part in PARTS} <= set(page.ids)


def test_a_run_of_nothing_says_what_makes_each_piece(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = 1\n")
    page = Page(make_report(find_sources([tmp_path])))
    assert "no finished round yet" in page.text
    assert page.text.count("Not shown.") >= 7
    for remedy in ("samv2 train", "--resume", "samv2 bootstrap"):
        assert remedy in page.text
    assert page.tags["svg"] == 0


@pytest.mark.parametrize(
    ("kind", "file", "view"),
    [
        ("comparison", "federation.json", view_comparison),
        ("ablation", "ablation.csv", view_ablation),
        ("frontier", "frontier.json", view_frontier),
    ],
)
def test_other_sources_may_be_damaged(
    tmp_path: Path, kind: str, file: str, view: Callable
) -> None:
    (tmp_path / file).write_text("{")
    (source,) = find_sources([tmp_path])
    assert source.kind == kind
    assert view(source, "x").id == "x"
    page = Page(make_report([source]))
    assert f"Not shown. {file} cannot be read" in page.text


def test_best_values_are_those_of_methods_that_send(methods_folder: Path) -> None:
    (source,) = find_sources([methods_folder])
    best = view_comparison(source, "c").best
    assert best["bytes_up"] == 10_000 and best["perplexity"] == 19.0
    assert best["domain python"] == 18.0


def test_the_view_of_a_run(tiny_run: Path) -> None:
    (source,) = find_sources([tiny_run])
    view = view_run(source, "r")
    assert view.layer_labels == ("layer 0", "layer 1", "layer 2")
    assert view.layer_label(9) == "converted layer 9"
    assert view.edges_origin == "counted over 2 rounds"


def test_the_policy_names_the_script() -> None:
    rules = policy("alert(1)")
    assert "default-src 'none'" in rules
    assert "'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='" in rules
    assert policy(read_template("page.js")) in unescape(make_report([]))


def test_code_and_headings() -> None:
    assert code("run `a < b` & c") == "run <code>a &lt; b</code> &amp; c"
    assert heading("bytes_up") == "bytes up"


def test_a_report_replaces_reports_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(path, f"<html>{GENERATOR} one")
    write_report(path, f"<html>{GENERATOR} two")
    assert path.read_text().endswith("two")
    path.write_text("my thesis")
    with pytest.raises(CheckpointError, match="exists and is no report.*--overwrite"):
        write_report(path, GENERATOR)
    write_report(path, GENERATOR, overwrite=True)
    with pytest.raises(CheckpointError, match="is a folder; name a file in it"):
        write_report(tmp_path, GENERATOR)
