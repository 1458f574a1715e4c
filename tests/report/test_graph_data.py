"""Call traces, usage of edges, and what is told where one of them is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samv2.federated.checkpoint import latest_checkpoint, load_graph
from samv2.report.graph_data import (
    MOST_EXPERTS,
    busiest_edges,
    parse_trace,
    parse_usage,
    read_graph,
)
from samv2.report.reading import DAMAGE, Missing
from samv2.report.run_data import read_run


def trace_of(*fired: dict[str, int], tokens: int = 10) -> list[dict[str, Any]]:
    """A trace of one layer, a domain each."""
    walk = [
        {"expert": 0, "parent": None, "depth": 0},
        {"expert": 2, "parent": 0, "depth": 1},
    ]
    return [
        {
            "sequence": f"domain{number}",
            "tokens": tokens,
            "layers": [{"layer": 0, "fired": counts, "walk_of_last_token": walk}],
        }
        for number, counts in enumerate(fired)
    ]


def test_a_trace() -> None:
    trace = parse_trace(trace_of({"0": 10, "2": 5}, {"0": 10, "1": 2}))
    assert trace.domains == ("domain0", "domain1") and trace.tokens == (10, 10)
    expected = np.array([[[1.0, 0.0, 0.5]], [[1.0, 0.2, 0.0]]])
    assert np.array_equal(trace.share_DLE, expected)
    difference = np.array([[[0.0, -0.1, 0.25]], [[0.0, 0.1, -0.25]]])
    assert np.allclose(trace.difference_DLE(), difference)
    assert [(v.expert, v.parent, v.depth) for v in trace.walks[0][0]] == [
        (0, None, 0),
        (2, 0, 1),
    ]


@pytest.mark.parametrize(
    "value",
    [
        [],
        [{"sequence": "a", "tokens": 1, "layers": []}],
        trace_of({"0": 1}) + [{"sequence": "a", "tokens": 1, "layers": []}],
        trace_of({str(MOST_EXPERTS): 1}),
        trace_of({"-1": 1, "2": 1}),
        trace_of({"x": 1}),
        {"0": 1},
    ],
    ids=["empty", "no layers", "ragged", "too many", "negative", "name", "object"],
)
def test_a_damaged_trace_raises_what_is_caught(value: Any) -> None:
    with pytest.raises(DAMAGE):
        parse_trace(value)


def usage_line(number: int, usage: list[list[int]], experts: int = 2) -> str:
    return json.dumps({"round": number, "experts": experts, "usage": usage})


def test_usage_is_summed_over_rounds() -> None:
    lines = [usage_line(1, [[1, 2, 3]]), usage_line(2, [[10, 20, 30]]), '{"rou']
    counts_LEE, rounds = parse_usage("\n".join(lines))
    assert rounds == 2
    assert np.array_equal(counts_LEE, [[[11, 22], [0, 33]]])


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["{"],
        [usage_line(1, [[1, 2]])],
        [usage_line(1, [[1, 2, -3]])],
        [usage_line(1, [[1, 2, 3]]), usage_line(2, [[1, 2, 3]] * 2)],
        [usage_line(1, [[1]], experts=10**9)],
        ["[]"],
    ],
)
def test_damaged_usage_raises_what_is_caught(lines: list[str]) -> None:
    with pytest.raises(DAMAGE):
        parse_usage("\n".join(lines))


def test_a_runs_graph(tiny_run: Path) -> None:
    found = read_graph(tiny_run, read_run(tiny_run))
    assert found.layers == (0, 1, 2) and found.shared == 1
    assert not isinstance(found.trace, Missing) and not isinstance(found.edges, Missing)
    assert found.trace.share_DLE.shape == (2, 3, 8)
    assert (found.trace.share_DLE[:, :, 0] == 1).all()  # the shared expert
    edges = found.edges
    merges = [
        json.loads((tiny_run / f"merge_round{n}.json").read_text()) for n in (1, 2)
    ]
    per_layer = np.sum([merge["usage_per_layer"] for merge in merges], axis=0)
    assert edges.count_LEE is not None and edges.kept_LEE is not None
    assert np.array_equal(edges.count_LEE.sum(axis=(1, 2)), per_layer)
    assert np.allclose(edges.walked_LEE.sum(axis=(1, 2)), 1)
    path = latest_checkpoint(tiny_run / "checkpoints")
    assert path is not None
    graph, _, _ = load_graph(path)
    assert np.array_equal(edges.kept_LEE, graph.edge_mask_LEE.numpy())
    assert np.array_equal(edges.order_LE, graph.order_LE.numpy())
    assert edges.origin == "counted over 2 rounds"


def test_usage_without_a_checkpoint_and_a_checkpoint_without_usage(
    broken_run: Path,
) -> None:
    facts = read_run(broken_run)
    (broken_run / "usage.jsonl").rename(broken_run / "aside")
    found = read_graph(broken_run, facts).edges
    assert not isinstance(found, Missing)
    assert found.count_LEE is None and "newest checkpoint" in found.origin
    assert np.allclose(found.walked_LEE.sum(axis=(1, 2)), 1)
    (broken_run / "aside").rename(broken_run / "usage.jsonl")
    shutil.rmtree(broken_run / "checkpoints")
    found = read_graph(broken_run, facts).edges
    assert not isinstance(found, Missing)
    assert found.kept_LEE is None and found.count_LEE is not None
    assert found.order_LE.tolist() == [list(range(8))] * 3
    (broken_run / "usage.jsonl").unlink()
    found = read_graph(broken_run, facts).edges
    assert isinstance(found, Missing) and "usage.jsonl" in found.what


def test_damage_to_the_graph_is_told(broken_run: Path) -> None:
    facts = read_run(broken_run)
    (broken_run / "usage.jsonl").write_text(usage_line(1, [[1, 2, 3]]))
    found = read_graph(broken_run, facts).edges
    assert isinstance(found, Missing) and "different graphs" in found.what
    path = latest_checkpoint(broken_run / "checkpoints")
    assert path is not None
    (path / "state.safetensors").write_bytes(b"no")
    (broken_run / "usage.jsonl").unlink()
    found = read_graph(broken_run, facts).edges
    assert isinstance(found, Missing) and "round_0002 is damaged" in found.what
    (broken_run / "expert_call_trace.json").write_text("[{}]")
    trace = read_graph(broken_run, facts).trace
    assert isinstance(trace, Missing) and "expert_call_trace.json" in trace.what
    shutil.rmtree(broken_run / "model")
    assert read_graph(broken_run, facts).layers == ()
    (broken_run / "config.toml").unlink()
    assert read_graph(broken_run, read_run(broken_run)).shared == 0


def test_busiest_edges() -> None:
    walked_EE = np.array([[0.9, 0.2, 0.0], [0.0, 0.1, 0.3], [0.0, 0.0, 0.4]])
    assert busiest_edges(walked_EE, 5) == [(1, 2), (0, 1)]
    assert busiest_edges(walked_EE, 1) == [(1, 2)]
