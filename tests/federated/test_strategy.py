"""The real strategy on a toy federation: rounds, retries, sampling, what is told."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from samv2.federated.checkpoint import latest_checkpoint, load_checkpoint
from samv2.federated.exchange import reported_scores
from samv2.federated.grid import FIRST_NODE, EmbeddedGrid
from samv2.federated.refusals import TooFewReplies
from samv2.federated.rehearsal import ATTEMPT
from samv2.federated.run_logs import metrics_row
from samv2.federated.strategy import SamStrategy
from tests.federated.runs import assert_same_bits, toy_manifest
from tests.federated.toy_federation import (
    ATTACKER,
    CLIENTS,
    FOREIGN,
    Federation,
    Tamper,
    fails_times,
    failure,
    silence,
)


def test_later_rounds_go_on_with_the_client_that_was_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "federation.rounds=4")
    federation.run(silence, rounds=(2,))
    assert [bool(federation.refused(n)) for n in (1, 2, 3, 4)] == [False, True] + [
        False
    ] * 2
    assert federation.states[-1].graph.version > 1
    for number, client, mask_LEE in federation.masks:
        expected = federation.states[number - 1].graph.edge_mask_LEE
        assert torch.equal(mask_LEE, expected), (number, client)


def test_a_client_that_kept_up_gets_edits_and_others_the_full_graph(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, "federation.rounds=3")
    sizes = []
    tamper: Tamper = lambda request, reply: sizes.append(
        "graph" in request.content["payload"]
    ) or [reply]
    federation.run(tamper, rounds=(1, 2, 3))
    assert sizes == [True, False, False]
    rows = [metrics_row(report) for report in federation.reports]
    assert rows[0]["bytes_down"] == CLIENTS * rows[0]["bytes_down_per_client"]


def test_a_round_with_too_few_replies_is_tried_once_more(tmp_path: Path) -> None:
    options = ("federation.rounds=3", f"federation.min_replies={CLIENTS}")
    honest = Federation(tmp_path / "a", *options)
    honest.run()
    federation = Federation(tmp_path / "b", *options)
    federation.run(fails_times(1), rounds=(2,))
    assert (honest.grid.calls, federation.grid.calls) == (3, 4)
    assert_same_bits(federation.tensors(), honest.tensors())
    assert federation.refused(2) == []
    for number, client, mask_LEE in federation.masks:
        expected = federation.states[number - 1].graph.edge_mask_LEE
        assert torch.equal(mask_LEE, expected), (number, client)


def test_a_second_failure_stops_with_the_checkpoint_before_intact(
    tmp_path: Path,
) -> None:
    federation = Federation(
        tmp_path, "federation.rounds=3", f"federation.min_replies={CLIENTS}"
    )
    with pytest.raises(TooFewReplies) as caught:
        federation.run(failure("ValueError: boom\nlines"), rounds=(2,))
    message = str(caught.value)
    for part in ("round 2", "2 valid", "needed are 3", "client 1: ValueError: boom"):
        assert part in message
    assert "--resume" in message and "lines" not in message
    assert federation.grid.calls == 3
    assert federation.grid.asked == 3 + 2 * (3 + 1)
    assert federation.strategy.state is federation.states[1]
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    state, _ = load_checkpoint(path, model_fingerprint="toy")
    assert state.round == 1
    assert all(
        torch.equal(state.blocks[key], value)
        for key, value in federation.states[1].blocks.items()
    )
    assert not (tmp_path / "merge_round2.json").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_sampled_clients_depend_on_seed_and_round_alone(
    tmp_path: Path, count: int
) -> None:
    asked = []
    for name in "ab":
        federation = Federation(
            tmp_path / name,
            "federation.rounds=6",
            f"federation.clients_per_round={count}",
        )
        federation.run()
        asked.append([(number, client) for number, client, _ in federation.masks])
        for number, client, mask_LEE in federation.masks:
            expected = federation.states[number - 1].graph.edge_mask_LEE
            assert torch.equal(mask_LEE, expected), (number, client)
    assert asked[0] == asked[1] and len(asked[0]) == 6 * count
    assert len({client for _, client in asked[0]}) > 1


def test_a_client_that_cannot_score_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = EmbeddedGrid(ClientApp, [{}], {})
    request = grid.create_message(RecordDict(), "evaluate", FIRST_NODE, "1")
    failed = Message(Error(2, "ValueError: no text\nlines"), reply_to=request)
    strategy = Federation(tmp_path).strategy
    assert dict(strategy.aggregate_evaluate(4, [failed])) == {}
    (record,) = caplog.records
    assert record.getMessage().startswith("round 4: node 100 has not scored")
    assert record.getMessage().endswith("ValueError: no text")


def test_the_first_score_of_every_node_counts() -> None:
    grid = EmbeddedGrid(ClientApp, [{}] * 4, {})

    def reply_from(node: int, content: RecordDict) -> Message:
        request = grid.create_message(RecordDict(), "evaluate", node, "1")
        return Message(content, reply_to=request)

    def content(nll: float) -> RecordDict:
        return RecordDict({"metrics": MetricRecord({"nll.python": nll})})

    replies = [
        reply_from(102, content(1.0)),
        reply_from(100, content(2.0)),
        reply_from(102, content(40.0)),
        reply_from(101, RecordDict()),
        reply_from(103, RecordDict({"metrics": ArrayRecord({"nll.python": FOREIGN})})),
    ]
    found = reported_scores(1, replies)
    assert found.pop(103).keys() == {"nll.python"}
    assert found == {102: {"nll.python": 1.0}, 100: {"nll.python": 2.0}, 101: {}}


def broken(*attempts: int) -> Tamper:
    """Errors at these attempts (from 0) of every request, honest at others."""

    def tamper(request: Message, reply: Message) -> list[Message]:
        content = request.content
        attempt = int(content[ATTEMPT]["number"]) if ATTEMPT in content else 0
        if attempt in attempts:
            return failure("RuntimeError: out of memory")(request, reply)
        return [reply]

    return tamper


@pytest.mark.faults
def test_a_client_that_failed_is_asked_again_within_its_round(tmp_path: Path) -> None:
    options = ("federation.rounds=3", "federation.retries=2")
    honest = Federation(tmp_path / "a", *options)
    honest.run()
    federation = Federation(tmp_path / "b", *options)
    federation.run(broken(0, 1), rounds=(2,))
    assert federation.grid.asked == honest.grid.asked + 2
    assert federation.refused(2) == []
    assert_same_bits(federation.tensors(), honest.tensors())
    before, after = metrics_row(honest.reports[1]), metrics_row(federation.reports[1])
    assert after["bytes_down"] > before["bytes_down"]
    assert after["bytes_down_per_client"] == before["bytes_down_per_client"]


@pytest.mark.faults
@pytest.mark.parametrize("retries", [0, 1])
def test_a_client_that_fails_once_too_often_is_refused(
    tmp_path: Path, retries: int
) -> None:
    federation = Federation(tmp_path, f"federation.retries={retries}")
    federation.run(broken(*range(retries + 1)))
    (item,) = federation.refused()
    assert (item["client"], item["reason"]) == (1, "client_error")
    assert federation.grid.asked == CLIENTS + retries


@pytest.mark.faults
def test_a_client_that_lost_its_disk_gets_the_graph_when_asked_again(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, "federation.rounds=3")
    federation.run(
        lambda request, reply: shutil.rmtree(tmp_path / "clients" / "client_1")
        or [reply],
        rounds=(2,),
    )
    assert federation.grid.asked == 3 * CLIENTS + 1
    assert [federation.refused(number) for number in (1, 2, 3)] == [[], [], []]


def test_what_is_known_of_clients_goes_on_after_a_resume(tmp_path: Path) -> None:
    whole = Federation(tmp_path / "a", "federation.rounds=4")
    whole.run()
    first = Federation(tmp_path / "b", "federation.rounds=4")
    first.strategy.start(first.grid, num_rounds=2)
    second = Federation(tmp_path / "b", "federation.rounds=4")
    second.strategy.state = first.states[-1]
    second.strategy.recall(json.loads(json.dumps(first.strategy.memory())))
    second.run()
    rows = [metrics_row(item) for item in first.reports + second.reports]
    sent = [row["bytes_down"] for row in rows]
    assert sent == [metrics_row(item)["bytes_down"] for item in whole.reports]
    assert_same_bits(second.tensors(), whole.tensors())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_arrival_changes_no_bit(tmp_path: Path, seed: int) -> None:
    options = ("federation.rounds=3", "aggregation.rule=mean")
    ordered = Federation(tmp_path / "a", *options, clients=12)
    ordered.run()
    shuffled = Federation(tmp_path / "b", *options, clients=12)
    draws = random.Random(seed)
    shuffled.grid.order = lambda items: draws.sample(items, len(items))
    shuffled.run()
    assert [c for _, c, _ in shuffled.masks] != [c for _, c, _ in ordered.masks]
    assert_same_bits(shuffled.tensors(), ordered.tensors())
    for number in (1, 2, 3):
        name = f"merge_round{number}.json"
        assert (tmp_path / "b" / name).read_text() == (
            tmp_path / "a" / name
        ).read_text()


@pytest.mark.faults
def test_fifty_clients_some_of_which_fail(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "federation.rounds=2", clients=50)
    federation.grid.attackers = tuple(range(0, 50, 7))
    federation.run(broken(0, 1), rounds=(1, 2))
    assert len(federation.refused(2)) == 8
    assert federation.grid.asked == 2 * (50 + 8)
    assert not (tmp_path / "spool").exists()


def test_a_round_tells_whom_it_asked_and_what_came(tmp_path: Path) -> None:
    found = Federation(tmp_path, "federation.retries=0")
    events: list[tuple[str, dict[str, Any]]] = []
    found.strategy = SamStrategy(
        found.states[0],
        toy_manifest(),
        found.settings,
        on_round=found._on_round,
        on_event=lambda name, **fields: events.append((name, fields)),
    )
    found.run(failure("out of memory"))
    assert [name for name, _ in events] == ["round_started", "replies", "refused"]
    asked = {"round": 1, "clients": list(range(CLIENTS))}
    assert events[0][1] == asked
    assert events[1][1]["clients"] == [0, 2]
    assert events[2][1]["client"] == ATTACKER
    (report,) = found.reports
    assert list(report.asked) == asked["clients"]
    assert sum(report.asked.values()) == report.bytes_down_all
    assert max(report.asked.values()) == report.bytes_down
    phases = sum(report.seconds[name] for name in ("train", "merge", "evaluate"))
    assert 0 < report.seconds["server"] < phases
    assert [reply.seconds for reply in report.merge.replies] == [0.1, 0.1]
