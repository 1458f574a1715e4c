"""Replies one by one from a grid as Flower's are: pushed, pulled, late, unreadable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from samv2.federated import exchange
from samv2.federated.exchange import Exchange, error_refusal, sort_replies
from samv2.federated.grid import EmbeddedGrid
from samv2.federated.workers import LATE, NO_REPLY, UNREADABLE

pytestmark = pytest.mark.faults


class PostOffice(Grid):
    """A grid of nodes that answer when told to, and say who they are as they like."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.unsent: set[int] = set()
        self.ready: dict[str, Callable[[], Message]] = {}
        self.pulled: list[str] = []
        self.nodes: list[int] = []

    def set_run(self, run: Any) -> None:
        """Not needed."""

    @property
    def run(self) -> Any:
        """Not needed."""
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        """As any grid."""
        return EmbeddedGrid(ClientApp, [], {}).create_message(*arguments, **named)

    def get_node_ids(self) -> list[int]:
        """Those that are there."""
        return self.nodes

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        """Not to be used: it returns when all is there."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        """Messages get rising numbers; some cannot be sent."""
        numbers: list[str | None] = []
        for message in messages:
            self.sent.append(message)
            missing = message.metadata.dst_node_id in self.unsent
            number = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = number
            numbers.append(None if missing else number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The one reply that is asked for, if it is there."""
        (number,) = message_ids
        self.pulled.append(number)
        made = self.ready.pop(number, None)
        return [] if made is None else [made()]

    def stall(self, number: str, seconds: float) -> None:
        """A reply is announced, and its bytes do not come."""

        def made() -> Message:
            time.sleep(seconds)
            raise ValueError("the upload was broken off")

        self.ready[number] = made

    def reply(self, number: str, **metrics: int) -> None:
        """A reply arrives (or will, once it is asked for), as if from node 999."""
        content = RecordDict({"metrics": MetricRecord(metrics)})  # type: ignore[arg-type]
        self._arrives(number, content, 999)

    def error(self, number: str, code: int, reason: str) -> None:
        """An error arrives, as Flower makes them: from the server's own node."""
        self._arrives(number, Error(code, reason), 1)

    def poison(self, number: str, error: Exception) -> None:
        """Something arrives that cannot be read."""

        def made() -> Message:
            raise error

        self.ready[number] = made

    def _arrives(self, number: str, what: RecordDict | Error, source: int) -> None:
        def made() -> Message:
            message = Message(what, reply_to=self.sent[int(number[1:]) - 1])
            message.metadata.__dict__["_src_node_id"] = source
            return message

        self.ready[number] = made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for replies often."""
    monkeypatch.setattr(exchange, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(exchange, "LONGEST_PAUSE", 0.02)


def asked(*nodes: int, round: int = 1, kind: str = "train") -> list[Message]:
    """Requests to nodes."""
    maker = EmbeddedGrid(ClientApp, [], {})
    return [
        maker.create_message(RecordDict(), kind, node, str(round)) for node in nodes
    ]


def shown(message: Message) -> tuple[int, Any]:
    """(node, its numbers or its error)."""
    node = message.metadata.src_node_id
    if message.has_error():
        return node, (message.error.code, message.error.reason)
    return node, dict(message.content["metrics"])


def test_replies_are_handed_over_while_others_are_still_waited_for() -> None:
    grid, post = PostOffice(), Exchange()
    stream = post.stream(grid, asked(7, 8, 9), timeout=5)
    grid.reply("m2", x=8)
    assert shown(next(stream)) == (8, {"x": 8})
    grid.reply("m3", x=9)
    assert shown(next(stream)) == (9, {"x": 9})
    grid.reply("m1", x=7)
    assert [shown(item) for item in stream] == [(7, {"x": 7})]
    assert post.late_refusals({}) == []


def test_a_broken_upload_keeps_nobody_elses_reply_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "PULL_SECONDS", 0.05)
    grid, post = PostOffice(), Exchange()
    grid.stall("m1", 1.0)
    grid.reply("m2", x=8)
    begin = time.monotonic()
    stream = post.stream(grid, asked(7, 8), timeout=0.3)
    assert shown(next(stream)) == (8, {"x": 8})
    assert list(stream) == [] and time.monotonic() - begin < 0.8
    time.sleep(1.0)
    grid.reply("m3", x=9)
    # What became of it shows in a later exchange, and is nobody's reply there.
    assert [shown(m) for m in post.stream(grid, asked(9, round=2), timeout=5)] == [
        (9, {"x": 9})
    ]
    assert grid.pulled.count("m1") == 1


def test_a_link_that_is_down_is_no_clients_doing() -> None:
    grid, post = PostOffice(), Exchange()
    grid.poison("m1", TimeoutError("no route"))
    with pytest.raises(TimeoutError, match="no route"):
        list(post.stream(grid, asked(7), timeout=0.5))
    grid.reply("m1", x=7)
    assert list(post.stream(grid, [], timeout=0.5)) == []
    assert grid.pulled.count("m1") == 1


def test_the_deadline_holds_where_many_uploads_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "PULL_SECONDS", 0.2)
    grid = PostOffice()
    for number in range(1, 21):
        grid.stall(f"m{number}", 3.0)
    begin = time.monotonic()
    assert list(Exchange().stream(grid, asked(*range(20)), timeout=0.5)) == []
    assert time.monotonic() - begin < 1.5


def test_no_more_replies_are_fetched_at_once_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "PULL_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "PULLS", 2)
    grid = PostOffice()
    for number in ("m1", "m2", "m3"):
        grid.stall(number, 0.5)
    assert list(Exchange().stream(grid, asked(7, 8, 9), timeout=0.2)) == []
    assert sorted(grid.pulled) == ["m1", "m2"]


def test_what_does_not_come_in_time_is_late_and_named_by_round() -> None:
    grid, post = PostOffice(), Exchange()
    begin = time.monotonic()
    assert list(post.stream(grid, asked(7, 8), timeout=0.05)) == []
    assert 0.05 <= time.monotonic() - begin < 2
    grid.reply("m1", x=1)
    grid.error("m2", 5, "unavailable")
    grid.reply("m3", x=3)
    grid.reply("m4", x=4)
    second = post.stream(grid, asked(7, 8, round=2), timeout=5)
    assert [shown(item) for item in second] == [(7, {"x": 3}), (8, {"x": 4})]
    (late,) = post.late_refusals({7: 0, 8: 1})
    assert (late.client, late.reason) == (0, "late")
    assert "a reply to round 1 came after its deadline" in late.detail
    assert post.late_refusals({7: 0, 8: 1}) == []


def test_late_scores_are_no_refusals() -> None:
    grid, post = PostOffice(), Exchange()
    assert list(post.stream(grid, asked(7, kind="evaluate"), timeout=0.01)) == []
    grid.reply("m1", x=1)
    assert list(post.stream(grid, asked(8), timeout=0.01)) == []
    assert post.late_refusals({7: 0, 8: 1}) == []


def test_one_reply_that_cannot_be_read_costs_nobody_elses() -> None:
    grid = PostOffice()
    grid.poison("m1", ValueError("not a proto"))
    grid.error("m2", 5, "away")
    found = [shown(item) for item in Exchange().stream(grid, asked(7, 8), timeout=5)]
    detail = "the reply cannot be read (ValueError: not a proto)"
    assert found == [(7, (UNREADABLE, detail)), (8, (5, "away"))]


def test_a_broken_link_is_no_clients_doing() -> None:
    grid = PostOffice()
    grid.poison("m1", ConnectionError("gone"))
    with pytest.raises(ConnectionError):
        list(Exchange().stream(grid, asked(7), timeout=5))


def test_a_message_that_cannot_be_sent_is_an_error_at_once() -> None:
    grid = PostOffice()
    grid.unsent = {8}
    stream = Exchange().stream(grid, asked(7, 8), timeout=5)
    assert shown(next(stream)) == (8, (NO_REPLY, "the request could not be sent"))
    grid.reply("m1", x=1)
    assert [shown(item) for item in stream] == [(7, {"x": 1})]


def test_a_failed_client_is_asked_again_while_others_are_waited_for() -> None:
    grid = PostOffice()

    def again(reply: Message) -> Message | None:
        if reply.has_error() and len(grid.sent) < 3:
            return asked(reply.metadata.src_node_id)[0]
        return None

    stream = Exchange().stream(grid, asked(7, 8), timeout=5, again=again)
    grid.error("m1", 2, "boom")
    grid.reply("m3", x=3)
    assert shown(next(stream)) == (7, {"x": 3})
    grid.error("m2", 5, "away")
    assert [shown(item) for item in stream] == [(8, (5, "away"))]
    assert [item.metadata.dst_node_id for item in grid.sent] == [7, 8, 7]


def test_errors_of_this_side_have_reasons_of_their_own() -> None:
    (message,) = asked(7)
    codes = {LATE: "late", NO_REPLY: "no_reply", UNREADABLE: "unreadable"}
    for code, reason in (codes | {2: "client_error"}).items():
        found = error_refusal(3, Message(Error(code, "why"), reply_to=message))
        assert (found.client, found.reason, found.detail) == (3, reason, "why")


def test_every_client_that_was_asked_is_accounted_for_once() -> None:
    replies = [
        Message(Error(2, "boom"), reply_to=asked(8)[0]),
        Message(RecordDict(), reply_to=asked(9)[0]),
        Message(RecordDict(), reply_to=asked(9)[0]),
        Message(RecordDict(), reply_to=asked(5)[0]),
    ]
    valid, refusals = sort_replies(
        replies,
        {7: 0, 8: 1, 9: 2},
        lambda client, message: (client, message),  # type: ignore[arg-type, return-value]
    )
    assert valid == [(2, replies[1])]  # type: ignore[comparison-overlap]
    found = {(item.client, item.reason) for item in refusals}
    assert found == {
        (0, "no_reply"),
        (1, "client_error"),
        (2, "duplicate"),
        (-1, "unasked"),
    }
