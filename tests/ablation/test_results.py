"""Rows, the table, and effects with all else equal."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from samv2.ablation.bounds import CHECKS, OK
from samv2.ablation.factors import Factor
from samv2.ablation.job import figures
from samv2.ablation.plan import PlannedRun
from samv2.ablation.results import (
    effects,
    effects_table,
    read_result,
    result_row,
    write_csv,
)
from samv2.common.config import to_flat
from samv2.common.settings import Settings


def planned(name: str, **levels: str) -> PlannedRun:
    return PlannedRun(name=name, levels=levels, settings=Settings())


def figures_of(perplexity: float | None, up: int = 1000) -> dict[str, Any]:
    found = {"perplexity": perplexity, "bytes_up_per_client_round": up}
    return found | {"flops_fraction": 0.5, "train_loss": 1.0}


def test_a_row_has_settings_figures_and_checks(tmp_path: Path) -> None:
    run = planned("a")
    failed = result_row(run, tmp_path, "FrameError: two\n  lines")
    assert failed["status"] == "failed" and failed["error"] == "FrameError: two lines"
    assert to_flat(Settings()).items() <= failed.items()
    assert read_result(tmp_path) is None
    sound = figures_of(2.0) | dict.fromkeys(CHECKS, OK)
    (tmp_path / "ablation.json").write_text(json.dumps(sound))
    assert result_row(run, tmp_path, None)["status"] == "done"
    (tmp_path / "ablation.json").write_text(
        json.dumps(sound | {"check_edits": "too many"})
    )
    assert result_row(run, tmp_path, None)["status"] == "violated"
    (tmp_path / "ablation.json").write_text("[")
    assert result_row(run, tmp_path, None)["status"] == "violated"


def test_the_table_has_the_columns_of_all_rows(tmp_path: Path) -> None:
    ok = dict.fromkeys(CHECKS, OK)
    rows = [
        {
            "name": "a",
            "error": "",
            "seed": 0,
            "perplexity": None,
            "perplexity.x": 2.5,
            "train_loss": 1,
        }
        | ok,
        {"name": "b", "error": "x, y", "seed": 1},
        {
            "name": "c",
            "error": "",
            "seed": 2,
            "perplexity": 3.0,
            "perplexity.y": 1.5,
            "train_loss": 2,
        }
        | ok,
    ]
    write_csv(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [
        "name",
        "error",
        "seed",
        "perplexity",
        "perplexity.x",
        "perplexity.y",
        "train_loss",
        *CHECKS,
    ]
    assert found[0]["perplexity"] == "" and found[0]["perplexity.x"] == "2.5"
    assert found[1]["error"] == "x, y" and found[1]["check_masks"] == ""
    write_csv(tmp_path / "t.csv", [])
    assert (tmp_path / "t.csv").read_text().startswith("check_masks")


def test_effects_compare_what_differs_in_one_factor_alone() -> None:
    factors = [
        Factor(name="K", key="x", levels=(("4", 4), ("8", 8))),
        Factor(name="codec", key="y", levels=(("a", 0), ("b", 1))),
    ]
    runs = [planned(f"{k}{c}", K=k, codec=c) for k in "48" for c in "ab"]
    rows = {
        "4a": figures_of(10.0, 100),
        "4b": figures_of(12.0, 400),
        "8a": figures_of(5.0, 100),
    }
    found = {(one["factor"], one["level"]): one for one in effects(factors, runs, rows)}
    # Only 4a and 8a differ in K alone: 8b did not finish.
    assert found["K", "8"]["pairs"] == 1
    assert found["K", "8"]["perplexity_ratio"] == pytest.approx(0.5)
    assert found["K", "4"]["perplexity"] == pytest.approx(10.0)
    assert found["codec", "b"]["perplexity_ratio"] == pytest.approx(1.2)
    assert found["codec", "b"]["bytes_up_per_client_round_ratio"] == pytest.approx(4)
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))
    with console.file:
        console.print(effects_table(list(found.values())))
        shown = console.export_text()
    assert "-50.00%" in shown and "+20.00%" in shown and "0.4 kB" in shown


def test_an_effect_of_unknown_perplexity_is_unknown() -> None:
    factors = [Factor(name="K", key="x", levels=(("4", 4), ("8", 8)))]
    runs = [planned("4", K="4"), planned("8", K="8")]
    rows = {"4": figures_of(10.0), "8": figures_of(None)}
    found = effects(factors, runs, rows)
    assert found[1]["perplexity"] is None and found[1]["perplexity_ratio"] is None
    assert effects(factors, runs, {"4": figures_of(10.0)}) == []


def test_figures_of_a_run(kept_run: Path) -> None:
    found = figures(kept_run, {"python": 60.0, "pydoc": 90.0})
    summary = json.loads((kept_run / "summary.json").read_text())
    finals = [value["final"] for value in summary["domains"].values()]
    assert found["perplexity"] == pytest.approx((finals[0] * finals[1]) ** 0.5)
    assert found["perplexity_dense"] == pytest.approx((60 * 90) ** 0.5)
    assert found["perplexity.python"] == summary["domains"]["python"]["final"]
    assert 0 < found["flops_fraction_trained"] <= found["flops_fraction"]
    assert found["bytes_up_total"] > found["bytes_up_per_client_round"] > 0
    assert found["rounds"] == 2 and found["edits"] == 8 and found["seconds"] > 0
    assert figures(kept_run, {})["perplexity_dense"] is None
