"""Records there and back, and workers that time out, die or cannot start."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from samv2.common.errors import FederationError, FrameError
from samv2.experts.graph import Edit
from samv2.federated import grid as grid_module
from samv2.federated.client_round import RoundRequest
from samv2.federated.graph_message import GraphMessage, pack_graph
from samv2.federated.grid import (
    EmbeddedGrid,
    message_to,
    reply_from_record,
    reply_to_record,
    request_from_record,
    request_to_record,
)
from samv2.federated.workers import LATE, NO_REPLY
from tests.federated.runs import toy_graph, toy_reply

EDIT = Edit(layer=0, src=0, dst=2, kind="promote", score=0.5, reason="wanted")


@pytest.mark.parametrize(
    "graph",
    [
        GraphMessage(version=3, full=pack_graph(toy_graph()), edits=()),
        GraphMessage(version=1, full=None, edits=(EDIT,)),
        GraphMessage(version=0, full=None, edits=()),
    ],
)
def test_requests_survive_their_record(graph: GraphMessage) -> None:
    request = RoundRequest(
        round=7, graph=graph, parameters=b"\0\1\2", temperature=0.625
    )
    for each in (request, replace(request, told=0), replace(request, told=3)):
        assert request_from_record(request_to_record(each)) == each


def test_replies_survive_their_record() -> None:
    assert reply_from_record(reply_to_record(toy_reply())) == toy_reply()


def with_metric(name: str, value: object) -> RecordDict:
    """A reply's record with one number changed, or left out for None."""
    record = reply_to_record(toy_reply())
    metrics = dict(record["metrics"])
    if value is None:
        del metrics[name]
    else:
        metrics[name] = value
    kind = MetricRecord if not isinstance(value, (str, bool)) else ConfigRecord
    record["metrics"] = kind(metrics)
    return record


def with_array(name: str, array: Array | None) -> RecordDict:
    """A reply's record with one array changed, or left out for None."""
    record = reply_to_record(toy_reply())
    arrays = dict(record["payload"])
    if array is None:
        del arrays[name]
    else:
        arrays[name] = array
    record["payload"] = ArrayRecord(arrays)
    return record


def without(name: str, other: object = None) -> RecordDict:
    """A reply's record without a part, or with another kind of record there."""
    record = reply_to_record(toy_reply())
    del record[name]
    if other is not None:
        record[name] = other  # type: ignore[assignment]
    return record


FOREIGN = Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=b"x")


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        without("payload"),
        without("metrics"),
        without("payload", MetricRecord({"update": 1, "usage": 2})),
        without("payload", ConfigRecord({"update": b"x", "usage": b"y"})),
        without("metrics", ArrayRecord({"examples": FOREIGN})),
        with_array("update", None),
        with_array("usage", None),
        with_array("update", FOREIGN),
        with_metric("examples", None),
        with_metric("examples", 1.5),
        with_metric("examples", float("nan")),
        with_metric("examples", [1, 2]),
        with_metric("examples", "8"),
        with_metric("examples", True),
        with_metric("examples", 10**5000),
        with_metric("tokens", -(10**400)),
        with_metric("train-loss", 10**400),
        with_metric("train-loss", [1.0]),
        with_metric("train-loss", "1.0"),
        with_metric("seconds", None),
        with_metric("graph-version", 0.0),
    ],
)
def test_a_record_of_another_shape_is_refused(record: RecordDict) -> None:
    with pytest.raises(FrameError) as caught:
        reply_from_record(record)
    assert caught.value.reason == "reply_shape"


def echo_app() -> ClientApp:
    """Replies who it is, where it runs and on how many threads; may also misbehave."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = message.content["order"]
        client = int(context.node_config["client"])
        if client in list(order["die"]):
            os._exit(3)
        if client in list(order["fail"]):
            raise ValueError(f"client {client} fails")
        if client in list(order["sleep"]):
            time.sleep(60)
        facts = {
            "client": client,
            "process": os.getpid(),
            "threads": torch.get_num_threads(),
        }
        return Message(RecordDict({"metrics": MetricRecord(facts)}), reply_to=message)

    return app


def cannot_start() -> ClientApp:
    """An app whose making fails."""
    raise RuntimeError("no app here")


def order_of(**clients: list[int]) -> RecordDict:
    """Which clients misbehave, and how; client 99 stands for none."""
    chosen = {kind: clients.get(kind, [99]) for kind in ("die", "fail", "sleep")}
    return RecordDict({"order": ConfigRecord(chosen)})  # type: ignore[arg-type]


def ask(
    grid: EmbeddedGrid, timeout: float | None = None, **clients: list[int]
) -> dict[int, Any]:
    """{client: reply's facts, or its error}."""
    messages = [
        message_to(grid, node, order_of(**clients), "train", "1")
        for node in grid.get_node_ids()
    ]
    found: dict[int, Any] = {}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node = reply.metadata.src_node_id - 100
        assert node not in found
        if reply.has_error():
            found[node] = reply.error.reason
        else:
            found[node] = dict(reply.content["metrics"])
    assert sorted(found) == list(range(len(messages)))
    return found


CLIENTS = [{"client": index} for index in range(4)]


def test_one_worker_is_this_process_on_one_thread() -> None:
    torch.set_num_threads(2)
    try:
        with EmbeddedGrid(echo_app, CLIENTS, {}) as grid:
            found = ask(grid, fail=[2])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert "ValueError: client 2 fails" in found.pop(2)
    assert found == {
        client: {"client": client, "process": os.getpid(), "threads": 1}
        for client in (0, 1, 3)
    }


def test_workers_survive_failures_deaths_and_timeouts() -> None:
    before = set(psutil.Process().children(recursive=True))
    files = psutil.Process().num_fds()
    with EmbeddedGrid(echo_app, CLIENTS, {}, workers=2) as grid:
        found = ask(grid)
        assert {facts["threads"] for facts in found.values()} == {1}
        assert len({facts["process"] for facts in found.values()}) == 2
        found = ask(grid, fail=[0], die=[3])
        assert "client 0 fails" in found[0]
        assert "worker process died (exit code 3)" in found[3]
        assert found[1]["client"] == 1 and found[2]["client"] == 2
        begin = time.monotonic()
        found = ask(grid, 0.5, sleep=[0, 1])
        assert time.monotonic() - begin < 20
        assert "no reply within 0.5 s" in found[0]
        assert "no reply within 0.5 s" in found[1]
        assert "not started in time" in found[2]
    assert set(psutil.Process().children(recursive=True)) <= before | tracker()
    assert psutil.Process().num_fds() <= files + 2


def tracker() -> set[psutil.Process]:
    """The helper that multiprocessing keeps for the life of the process."""
    return {
        child
        for child in psutil.Process().children()
        if "resource_tracker" in " ".join(child.cmdline())
    }


@pytest.mark.slow
def test_an_app_that_cannot_start_is_an_error_of_every_client(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with EmbeddedGrid(cannot_start, CLIENTS[:2], {}, workers=2) as grid:
        found = ask(grid)
    assert all("worker process died" in str(reason) for reason in found.values())
    assert "no app here" in capfd.readouterr().err


def test_the_grid_refuses_what_it_does_not_offer() -> None:
    grid = EmbeddedGrid(echo_app, CLIENTS, {})
    with pytest.raises(FederationError):
        grid.push_messages([])
    with pytest.raises(FederationError):
        grid.pull_messages([])
    with pytest.raises(FederationError):
        grid.run
    assert grid.get_node_ids() == [100, 101, 102, 103]


def requests(grid: EmbeddedGrid, **clients: list[int]) -> list[Message]:
    """One message to each client, some of which shall misbehave."""
    return [
        message_to(grid, node, order_of(**clients), "train", "1")
        for node in grid.get_node_ids()
    ]


def test_a_late_client_of_this_process_is_heard_and_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(grid_module.time, "monotonic", lambda: now[0])

    def slow_app() -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            now[0] += 10
            return Message(RecordDict(), reply_to=message)

        return app

    grid = EmbeddedGrid(slow_app, CLIENTS, {})
    repeated: list[Message] = []
    found = list(
        grid.stream(
            requests(grid), timeout=15, again=lambda reply: repeated.append(reply)
        )
    )
    codes = [reply.error.code if reply.has_error() else 0 for reply in found]
    assert codes == [0, LATE, NO_REPLY, NO_REPLY]
    assert repeated == [found[0]]
    assert now[0] == 20
    assert "after the 15 s" in str(found[1].error.reason)
    assert "not started in time" in str(found[2].error.reason)
    patient = grid.stream(requests(grid), timeout=grid_module.PATIENCE)
    now[0] += grid_module.PATIENCE
    assert not any(reply.has_error() for reply in patient)


def test_an_app_that_returns_nothing_is_an_error_at_once() -> None:
    def silent_app() -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return None  # type: ignore[return-value]

        return app

    grid = EmbeddedGrid(silent_app, CLIENTS[:1], {})
    (reply,) = grid.stream(requests(grid))
    assert (reply.error.code, reply.error.reason) == (
        NO_REPLY,
        "the client gave no reply",
    )


@pytest.mark.faults
def test_workers_that_die_or_are_left_early_serve_the_next_message() -> None:
    with EmbeddedGrid(echo_app, CLIENTS, {}, workers=2) as grid:
        healthy = requests(grid)
        tried: list[str] = []

        def again(reply: Message) -> Message | None:
            if not reply.has_error():
                return None
            tried.append(str(reply.error.reason))
            return healthy[3]

        found = list(grid.stream(requests(grid, die=[3]), again=again))
        assert len(tried) == 1 and "worker process died (exit code 3)" in tried[0]
        clients = [reply.content["metrics"]["client"] for reply in found]
        assert sorted(clients) == [0, 1, 2, 3]
        left = grid.stream(requests(grid, sleep=[1, 2, 3]))
        assert next(left).content["metrics"]["client"] == 0
        left.close()
        assert all(reply.has_content() for reply in grid.stream(requests(grid)))
