"""Comparisons, grids and frontiers as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samv2.report.other_data import (
    csv_number,
    flattened,
    parse_ablation,
    read_ablation,
    read_comparison,
    read_frontier,
)
from samv2.report.reading import Missing


def test_a_comparison(methods_folder: Path) -> None:
    found = read_comparison(methods_folder / "federation.json")
    assert not isinstance(found, Missing)
    assert [method.name for method in found.methods] == ["SAM-v2", "FedIT", "local"]
    assert found.domains == ("python", "pydoc")
    assert found.dense_perplexity == 24.0 and found.dense_domains["pydoc"] == 25.0
    assert found.protocol["federation.clients"] == "2"
    first = found.methods[0]
    assert first.domains == {"python": 19.0, "pydoc": 21.0}
    assert [r.bytes_up_total for r in first.rounds] == [20_000, 40_000]
    assert first.settings == {"adapter.rank": "8"}


def test_a_comparison_in_its_smallest_form(tmp_path: Path) -> None:
    path = tmp_path / "federation.json"
    method = {
        "method": "a",
        "perplexity": None,
        "domains": {},
        "bytes_up_per_client_round": 0,
        "seconds": 0,
    }
    path.write_text(json.dumps({"protocol": {}, "methods": [method]}))
    found = read_comparison(path)
    assert not isinstance(found, Missing)
    assert found.methods[0].rounds == () and found.dense_perplexity is None
    for broken in ({"protocol": {}, "methods": []}, {"methods": [method]}, [], 7):
        path.write_text(json.dumps(broken))
        missing = read_comparison(path)
        assert isinstance(missing, Missing)
        assert "`samv2 bench-federation`" in missing.remedy


def test_flattened() -> None:
    value = {"a": 1, "settings": {"b.c": True}, "d": {"e": [1, 2]}, "f": None}
    assert flattened(value) == {"a": "1", "b.c": "True", "d.e": "1, 2", "f": "None"}


def test_a_grid(grid_folder: Path) -> None:
    found = read_ablation(grid_folder / "ablation.csv")
    assert not isinstance(found, Missing)
    assert found.factors == ("experts.experts_per_token", "federation.codec")
    assert found.same == {"seed": "0"}
    assert found.columns[-1] == "error" and found.rows[-1][-1] == "<b>no memory</b>"
    assert found.column("perplexity") == ["96.5", "92.5", "96.5", "92.5", ""]
    assert found.numeric("perplexity") and not found.numeric("federation.codec")
    assert not found.numeric("error")
    assert found.named(found.rows[0])[:2] == [("name", "4-int8"), ("status", "done")]


def test_a_grid_that_is_none() -> None:
    for content in ("", "name,status\na,done\n", "name,perplexity\n", "\n\n"):
        with pytest.raises(ValueError, match="perplexity|no row"):
            parse_ablation(content)
    ragged = parse_ablation("name,perplexity,seconds\na,1\nb,2,3,4\n")
    assert ragged.rows == (("a", "1", ""), ("b", "2", "3"))


def test_numbers_in_cells() -> None:
    assert csv_number("2.5") == 2.5 and csv_number("1e3") == 1000
    assert csv_number("") is None and csv_number("nan") is None
    assert csv_number("int8") is None


def test_a_frontier(frontier_folder: Path, tmp_path: Path) -> None:
    found = read_frontier(frontier_folder / "frontier.json")
    assert not isinstance(found, Missing)
    assert [point.experts_per_token for point in found] == [2, 4, 8]
    assert [point.ratio for point in found] == [4, 2, 1]
    assert found[0].unseen_ratio is None and found[1].unseen_ratio == 2.5
    missing = read_frontier(tmp_path / "frontier.json")
    assert isinstance(missing, Missing) and "samv2 bootstrap" in missing.remedy
    (tmp_path / "frontier.json").write_text("[]")
    assert isinstance(read_frontier(tmp_path / "frontier.json"), Missing)
