"""Every chart says what its data says, and bears data with holes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from samv2.report.ablation_plots import (
    comparable,
    effect_charts,
    ordered,
    shown_groups,
    trade_chart,
)
from samv2.report.expert_plots import difference_chart, share_chart
from samv2.report.graph_data import Trace
from samv2.report.merge_data import Edit, Merge
from samv2.report.merge_plots import edits_chart, visits_chart
from samv2.report.other_data import (
    FrontierPoint,
    parse_ablation,
    read_ablation,
    read_comparison,
)
from samv2.report.other_plots import frontier_chart, method_charts
from samv2.report.reading import Missing
from samv2.report.run_data import Domain, Result, Round
from samv2.report.run_plots import (
    bytes_chart,
    loss_chart,
    perplexity_chart,
    result_chart,
    runs_chart,
    seconds_chart,
)
from samv2.report.svg import Chart


def tips(chart: Chart) -> list[str]:
    """What a pointer over the marks shows."""
    return [unescape(t) for t in re.findall(r"<title>(.*?)</title>", str(chart.svg))]


def labels(chart: Chart) -> str:
    """All text in the drawing."""
    return unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)<", str(chart.svg))))


def rounds(count: int = 2) -> tuple[Round, ...]:
    return tuple(
        Round(
            round=number,
            clients=2,
            refused=0,
            train_loss=3.0 / number,
            perplexity={"a": 30.0 / number, "b": None if number == 1 else 8.0},
            bytes_up_per_client=2000.0 * number,
            bytes_down_per_client=0.0 if number == 1 else 5e6,
            edits=1,
            seconds={"train": 10.0, "merge": 0.5, "evaluate": None},
            server_seconds=0.75,
        )
        for number in range(1, count + 1)
    )


RESULT = Result(
    finished=True,
    model="tiny",
    domains=(
        Domain(name="a", dense=10.0, start=20.0, final=15.0),
        Domain(name="b", dense=None, start=None, final=8.0),
        Domain(name="c", dense=None, start=None, final=None),
    ),
    flops_fraction=0.5,
    bytes_up=4000.0,
    bytes_down=5e6,
    fedit_bytes=1e5,
    rounds=2,
    seconds={"load": 1.0, "federation": 21.0, "other": None},
    heterogeneity={},
)


def test_the_result() -> None:
    chart = result_chart(RESULT, name="r")
    assert tips(chart) == [
        "a, dense model: 10.00",
        "a, start: 20.00",
        "a, end: 15.00 (−25.0 %)",
        "b, end: 8.00 (–)",
    ]
    assert "a 20.00 to 15.00 (dense 10.00)" in chart.alt and " c " not in labels(chart)
    assert result_chart(replace(RESULT, domains=()), name="r").svg


def test_perplexity_and_loss() -> None:
    chart = perplexity_chart(rounds(), {"a": 40.0}, name="r")
    assert tips(chart) == [
        "a, round 0: 40.00",
        "a, round 1: 30.00",
        "a, round 2: 15.00",
        "b, round 2: 8.00",
    ]
    assert "a ends at 15.00" in chart.alt
    assert tips(loss_chart(rounds(), name="r")) == [
        "clients, round 1: 3.000",
        "clients, round 2: 1.500",
    ]
    empty = tuple(replace(r, train_loss=None, perplexity={}) for r in rounds())
    assert "no figures" in loss_chart(empty, name="r").alt
    assert perplexity_chart(empty, {}, name="r").svg


def test_runs_together() -> None:
    known = tuple(replace(r, perplexity={"a": 9.0}) for r in rounds())
    chart = runs_chart({"x": (known, 12.0), "y": (rounds(), None)}, name="all")
    assert tips(chart)[:2] == ["x, round 0: 12.00", "x, round 1: 9.00"]
    assert "x" in labels(chart) and "y, round 2: 10.95" in tips(chart)


def test_bytes_and_seconds() -> None:
    chart = bytes_chart(rounds(), 1e5, name="r")
    assert tips(chart) == [
        "uploaded, round 1: 2 kB",
        "uploaded, round 2: 4 kB",
        "downloaded, round 2: 5 MB",
    ]
    assert "FedIT would need 100 kB" in chart.alt and "FedIT" in labels(chart)
    assert "FedIT" not in labels(bytes_chart(rounds(), None, name="r"))
    nothing = tuple(replace(r, bytes_up_per_client=0.0) for r in rounds(1))
    assert "0 bytes" in bytes_chart(nothing, None, name="r").alt
    chart = seconds_chart(RESULT, rounds(), name="r")
    assert "federated rounds: 21 s" in tips(chart)
    assert "of it training: 20 s" in tips(chart) and "other: 0 s" in tips(chart)
    assert seconds_chart(replace(RESULT, seconds={}), (), name="r").svg


def merge(number: int, kinds: Sequence[str] = ()) -> Merge:
    edits = tuple(
        Edit(round=number, layer=0, src=i, dst=i + 1, kind=k, score=1.0, reason="r")
        for i, k in enumerate(kinds)
    )
    return Merge(
        round=number,
        edits=edits,
        refused=(),
        usage_per_layer=(40.0, 38.0),
        demand_per_layer=(10.0, 0.0),
        tokens=10.0,
    )


def test_merges() -> None:
    merges = (merge(1, ["prune", "promote", "prune"]), merge(2))
    chart = edits_chart(merges, name="r")
    assert chart.alt == "1 edges were added and 2 removed."
    assert "round 1, removed (prune): 2" in tips(chart)
    chart = visits_chart(merges, ["5", "6"], name="r")
    assert "3.90 experts a layer" in chart.alt and "0.50 wanted steps" in chart.alt
    assert "round 2" in labels(chart)
    still = replace(merge(1), tokens=0.0, usage_per_layer=(), demand_per_layer=())
    assert visits_chart((still,), [], name="r").svg


@pytest.mark.parametrize("domains", [1, 2, 7])
def test_heat_maps(domains: int) -> None:
    share_DLE = np.linspace(0, 1, domains * 2 * 3).reshape(domains, 2, 3)
    trace = Trace(
        domains=tuple(f"d{n}" for n in range(domains)),
        tokens=(9,) * domains,
        share_DLE=share_DLE,
        walks=((),) * domains,
    )
    chart = share_chart(trace, ["4", "5"], name="r")
    assert str(chart.svg).count("<image") == domains + 1  # and the scale
    assert all(f"d{n}" in labels(chart) for n in range(domains))
    assert "50 % of the tokens" in chart.alt
    assert "percentage points" in difference_chart(trace, ["4", "5"], name="r").alt


def test_frontiers() -> None:
    points = [
        FrontierPoint(
            experts_per_token=k, flops_fraction=k / 8, ratio=r, unseen_ratio=u
        )
        for k, r, u in ((2, None, None), (4, 2.0, 3.0), (8, 1.0, None))
    ]
    chart = frontier_chart(points, name="r")
    assert tips(chart) == [
        "K = 4, text it was calibrated on: 2.000 times",
        "K = 8, text it was calibrated on: 1.000 times",
        "K = 4, other text: 3.000 times",
    ]
    assert "K = 4" in labels(chart) and "K = 2" not in labels(chart)
    assert frontier_chart(points[:1], name="r").svg


def test_methods(methods_folder: Path) -> None:
    comparison = read_comparison(methods_folder / "federation.json")
    assert not isinstance(comparison, Missing)
    by_bytes, by_time = method_charts(comparison, name="r")
    assert "SAM-v2, round 2: 20.00 after 40 kB" in tips(by_bytes)
    assert not [tip for tip in tips(by_bytes) if tip.startswith("local")]
    assert "local, uploads nothing" in labels(by_bytes)
    assert "dense model" in labels(by_bytes)
    assert "local, round 2: 21.00 after 3 s" in tips(by_time)
    assert "FedIT reaches 19.00 after 3 s" in by_time.alt
    methods = tuple(replace(m, rounds=()) for m in comparison.methods)
    for chart in method_charts(replace(comparison, methods=methods), name="r"):
        assert "no rounds are recorded" in chart.alt


def test_effects(grid_folder: Path) -> None:
    ablation = read_ablation(grid_folder / "ablation.csv")
    assert not isinstance(ablation, Missing)
    codec, k = "federation.codec", "experts.experts_per_token"
    assert comparable(ablation, codec) == [
        [("int8", 96.5), ("int4", 96.5)],
        [("int8", 92.5), ("int4", 92.5)],
    ]
    groups, paired = shown_groups(ablation, k)
    assert paired and groups[0] == [("4", 96.5), ("8", 92.5)]
    first, second = effect_charts(ablation, name="a")
    assert first.title == k and second.title == codec
    assert first.alt.endswith("4 96.50; 8 92.50.")
    assert f"{k} = 8, mean: 92.50" in tips(first)
    trade = trade_chart(ablation, name="a")
    assert trade is not None and "4-int4: 96.50 with 1 kB" in tips(trade)
    assert "the lowest perplexity, 92.50" in trade.alt


def test_effects_of_unpaired_runs() -> None:
    table = "name,x,y,perplexity\na,1,1,5\nb,2,2,6\nc,3,3,nan\n"
    ablation = parse_ablation(table)
    groups, paired = shown_groups(ablation, "x")
    assert not paired and groups == [[("1", 5.0)], [("2", 6.0)]]
    charts = effect_charts(ablation, name="a")
    assert all("No two runs" in chart.note for chart in charts) and len(charts) == 2
    assert trade_chart(ablation, name="a") is None
    alone = parse_ablation("name,x,perplexity\na,1,\nb,2,\n")
    assert effect_charts(alone, name="a") == []


def test_values_in_order() -> None:
    assert ordered({"16", "4", "1e1"}) == ["4", "1e1", "16"]
    assert ordered({"none", "4"}) == ["4", "none"]
