"""What it costs a server to write a round down: files, TensorBoard and its picture.

Run with ``pytest bench/bench_round_logs.py --benchmark-enable -s``. A round of a model
of SmolLM2's depth (30 layers of 16 experts) with 50 clients, each sending as much as
the default budget allows; CPU seconds of one thread, since a machine's other work is not
the logs'. The picture is drawn alone as well, for 16 to 128 experts.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import RenderableType

from samv2.common.config import load_settings
from samv2.common.event_log import event_log
from samv2.common.telemetry import number_table, read_rows
from samv2.experts.graph import ExpertGraph, initial_graph
from samv2.federated.graph_image import draw_graph
from samv2.federated.round_logs import RoundLogs
from samv2.federated.server_merge import (
    ServerState,
    ValidReply,
    initial_state,
    server_merge,
)
from samv2.federated.strategy import RoundReport
from samv2.federated.usage import EdgeCounts
from samv2.updates.aggregate import Contribution
from samv2.updates.packing import Manifest, inspect, pack

LAYERS, EXPERTS, CLIENTS = 30, 16, 50
BLOCK = 3 * 96 * 8 + 576 + 2 + EXPERTS
"""Numbers of an expert's block: 96 rows of rank 8, width 576."""
SENT = 84
"""Blocks a client sends, as many as fit the default budget in int8."""
MOST_SECONDS, MOST_FOR_PICTURE = 1.0, 0.3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def walked(experts: int, seed: int = 0) -> tuple[EdgeCounts, ExpertGraph]:
    """Counts of a round with few busy edges, and a graph."""
    source = torch.Generator().manual_seed(seed)
    shape = (LAYERS, experts, experts)
    usage = (torch.rand(shape, generator=source) ** 8 * 3000).long().triu()
    graph = initial_graph(torch.rand(shape, generator=source), chain_degree=2)
    return EdgeCounts(usage_LEE=usage, demand_LEE=usage // 3), graph


def finished_round() -> tuple[ServerState, RoundReport, Manifest]:
    """A merged round of all clients."""
    settings = load_settings(None, [f"federation.clients={CLIENTS}"])
    counts, graph = walked(EXPERTS)
    blocks = {key: torch.zeros(BLOCK) for key in range(LAYERS * EXPERTS)}
    manifest = Manifest.of(blocks)
    source = torch.Generator().manual_seed(1)
    replies = []
    for client in range(CLIENTS):
        ids = torch.randperm(len(blocks), generator=source)[:SENT].sort()[0].tolist()
        update = {key: torch.randn(BLOCK, generator=source) for key in ids}
        frame = pack(update, manifest, round=1, codec="int8")
        reply = ValidReply(
            contribution=Contribution(
                client=client, frame=frame, weight=1.0, expert_ids=tuple(ids)
            ),
            counts=counts,
            bytes_up=len(frame),
            train_loss=4.0,
            tokens=4096,
            seconds=2.0,
        )
        replies.append(reply)
    state, merge = server_merge(
        initial_state(blocks, graph), replies, [], manifest, settings
    )
    report = RoundReport(
        merge=merge,
        scores={},
        bytes_down=1,
        bytes_down_all=CLIENTS,
        seconds={"train": 1.0, "merge": 1.0, "evaluate": 1.0, "server": 1.0},
        asked={client: 1 for client in range(CLIENTS)},
    )
    return state, report, manifest


def test_a_round_is_written_down_in_less_than_a_second(
    benchmark: BenchmarkFixture, tmp_path: Path, tables: list[RenderableType]
) -> None:
    state, report, manifest = finished_round()
    settings = load_settings(None, [f"federation.clients={CLIENTS}"])
    size = len(report.merge.replies[0].contribution.frame)
    assert size <= settings.federation.update_budget_bytes
    assert len(inspect(report.merge.replies[0].contribution.frame).tensors) == SENT
    biases = torch.zeros(LAYERS, EXPERTS)
    seconds: list[float] = []
    with event_log(tmp_path) as events:
        logs = RoundLogs(
            tmp_path,
            settings,
            manifest,
            events,
            first_biases_LE=biases,
            keep_rounds=0,
        )

        def write() -> None:
            begin = time.process_time()
            logs.write(state, report)
            seconds.append(time.process_time() - begin)

        benchmark.pedantic(write, rounds=5, warmup_rounds=1)
        logs.close()
    rows = read_rows(tmp_path / "clients.jsonl")
    assert len(rows[0]["clients"]) == CLIENTS
    assert all(client["update_norm"] > 0 for client in rows[0]["clients"])
    median = sorted(seconds)[len(seconds) // 2]
    row = [f"{CLIENTS} clients, {size / 1000:.0f} kB each", f"{median:.3f}"]
    tables.append(number_table("Logs of a round", ["round", "CPU s"], [row]))
    assert median < MOST_SECONDS


@pytest.mark.parametrize("experts", [16, 64, 128])
def test_the_picture_is_cheap(
    benchmark: BenchmarkFixture, experts: int, tables: list[RenderableType]
) -> None:
    counts, graph = walked(experts)
    seconds: list[float] = []

    def draw() -> None:
        begin = time.process_time()
        draw_graph(counts.usage_LEE, graph, [], round=1)
        seconds.append(time.process_time() - begin)

    benchmark.pedantic(draw, rounds=5, warmup_rounds=1)
    median = sorted(seconds)[len(seconds) // 2]
    row = [f"{LAYERS} layers of {experts} experts", f"{median:.3f}"]
    tables.append(number_table("Picture of a graph", ["graph", "CPU s"], [row]))
    assert median < MOST_FOR_PICTURE
