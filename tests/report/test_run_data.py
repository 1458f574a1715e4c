"""A run's directory as data: finished, unfinished and damaged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from samv2.common.telemetry import read_metrics
from samv2.federated.run_logs import read_summary
from samv2.report.merge_data import parse_merge, read_merges
from samv2.report.reading import Missing
from samv2.report.run_data import Domain, read_run


def test_a_finished_run(tiny_run: Path) -> None:
    facts, summary = read_run(tiny_run), read_summary(tiny_run)
    result = facts.result
    assert not isinstance(result, Missing) and result.finished
    assert result.model == summary["model"] and result.rounds == 2
    for domain in result.domains:
        assert vars(domain) == {"name": domain.name, **summary["domains"][domain.name]}
    finals = [values["final"] for values in summary["domains"].values()]
    assert result.mean("final") == pytest.approx(math.prod(finals) ** 0.5)
    assert result.total_seconds == pytest.approx(sum(summary["seconds"].values()))
    assert result.bytes_up == summary["bytes_up_per_client_round"]
    assert result.fedit_bytes == summary["fedit_bytes_per_client_round"]
    rows = read_metrics(tiny_run)
    assert not isinstance(facts.rounds, Missing)
    assert [row.round for row in facts.rounds] == [1, 2]
    for found, row in zip(facts.rounds, rows):
        assert found.train_loss == row["train_loss"]
        assert found.perplexity == row["perplexity"]
        assert found.bytes_down_per_client == row["bytes_down_per_client"]
    assert facts.rounds[-1].mean == result.mean("final")
    assert facts.settings_text == (tiny_run / "config.toml").read_text()
    assert not isinstance(facts.settings, Missing)
    assert facts.settings.federation.clients == 2
    assert facts.unread_merges == ()


def test_domain_change() -> None:
    assert Domain(name="a", dense=None, start=8.0, final=6.0).change == -0.25
    assert Domain(name="a", dense=1.0, start=None, final=6.0).change is None


def test_an_unfinished_run_has_the_figures_so_far(broken_run: Path) -> None:
    whole = read_run(broken_run)
    (broken_run / "summary.json").unlink()
    facts = read_run(broken_run)
    assert not isinstance(facts.result, Missing) and not facts.result.finished
    assert not isinstance(whole.result, Missing)
    for name in ("model", "domains", "flops_fraction", "bytes_up", "fedit_bytes"):
        assert getattr(facts.result, name) == getattr(whole.result, name)
    assert facts.start == whole.start
    shutil.rmtree(broken_run / "checkpoints")
    facts = read_run(broken_run)
    assert isinstance(facts.start, Missing)
    assert not isinstance(facts.result, Missing)
    assert facts.result.domains[0].start is None


def test_a_run_before_its_first_round(broken_run: Path) -> None:
    for path in broken_run.iterdir():
        if path.is_file() and path.name != "config.toml":
            path.unlink()
    facts = read_run(broken_run)
    for part in (facts.rounds, facts.merges, facts.result):
        assert isinstance(part, Missing)
        assert f"`samv2 train --log-dir {broken_run} --resume`" in part.remedy


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"round": 1}', "\0"])
@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "summary.json"])
def test_a_damaged_file_is_named(broken_run: Path, name: str, content: str) -> None:
    for path in ("summary.json", "prepared.json", name):
        (broken_run / path).write_text(content)
    facts = read_run(broken_run)
    if name == "config.toml" and content not in ("",):
        assert isinstance(facts.settings, Missing) and name in facts.settings.what
    if name == "metrics.jsonl":
        assert isinstance(facts.rounds, Missing) and name in facts.rounds.what
    assert isinstance(facts.result, Missing) and "summary.json" in facts.result.what


def test_merges(tiny_run: Path) -> None:
    merges, unread = read_merges(tiny_run, remedy="")
    assert not isinstance(merges, Missing) and unread == ()
    assert [merge.round for merge in merges] == [1, 2]
    for merge in merges:
        file = tiny_run / f"merge_round{merge.round}.json"
        value = json.loads(file.read_text())
        assert merge == parse_merge(value)
        assert list(merge.usage_per_layer) == value["usage_per_layer"]
        assert merge.tokens == sum(c["tokens"] for c in value["clients"].values())
        for edit, told in zip(merge.edits, value["edits"], strict=True):
            assert vars(edit) == {"round": merge.round, **told}


def test_a_damaged_merge_leaves_the_others(broken_run: Path) -> None:
    (broken_run / "merge_round1.json").write_text('{"round": 1, "edits": ')
    merges, unread = read_merges(broken_run, remedy="")
    assert not isinstance(merges, Missing)
    assert [merge.round for merge in merges] == [2]
    assert len(unread) == 1 and "merge_round1.json cannot be read" in unread[0]
    (broken_run / "merge_round2.json").write_text('{"round": 2}')
    merges, _ = read_merges(broken_run, remedy="Again.")
    assert isinstance(merges, Missing) and "it lacks 'edits'" in merges.what
    assert merges.remedy == "Every round leaves such a file. Again."
