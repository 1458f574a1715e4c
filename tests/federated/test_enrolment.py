"""Which node is which client, and what is said of those that are missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from samv2.common.errors import FederationError
from samv2.federated import enrolment
from samv2.federated.grid import EmbeddedGrid
from tests.federated.toy_federation import Federation


def answering(answers: list[Any]) -> EmbeddedGrid:
    """A grid whose nodes name these clients (None: an error)."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        answer = answers[int(context.node_config["client"])]
        if answer is None:
            raise ValueError("no shard here")
        content = RecordDict({"metrics": MetricRecord({"client": answer})})
        return Message(content, reply_to=message)

    nodes = [{"client": index} for index in range(len(answers))]
    return EmbeddedGrid(lambda: app, nodes, {})


def test_enrolment_finds_each_client_under_any_node(tmp_path: Path) -> None:
    strategy = Federation(tmp_path).strategy
    strategy.enrol(answering([2, 0, -1, 1, 7, 1.5]))
    assert strategy._clients == {100: 2, 101: 0, 103: 1}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([0, 1, 1, 2], "two nodes hold client 1"),
        ([0, 1, None], r"clients \[2\] are not there .*no shard here"),
        ([0, 1, 5], r"clients \[2\] are not there"),
    ],
)
def test_enrolment_says_what_is_missing(
    tmp_path: Path, answers: list[Any], words: str
) -> None:
    with pytest.raises(FederationError, match=words):
        Federation(tmp_path).strategy.enrol(answering(answers))


def test_enrolment_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ENROL_SECONDS", 0.2)
    with pytest.raises(FederationError, match="1 of 3 clients are connected"):
        Federation(tmp_path).strategy.enrol(answering([0]))


class ComingAndGoing(EmbeddedGrid):
    """A grid that says at every look which of its nodes are there."""

    looks: list[list[int]]
    asked: list[list[int]]

    def get_node_ids(self) -> list[int]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Replies of the nodes that are there; the others are silent."""
        asked = list(messages)
        self.asked.append([message.metadata.dst_node_id for message in asked])
        there = [m for m in asked if m.metadata.dst_node_id in self.looks[0]]
        return super().send_and_receive(there, timeout=timeout)


def coming_and_going(answers: list[Any], looks: list[list[int]]) -> ComingAndGoing:
    grid = answering(answers)
    grid.__class__ = ComingAndGoing
    grid.looks, grid.asked = looks, []
    return grid


def test_enrolment_waits_as_long_as_nodes_keep_arriving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ENROL_SECONDS", 0.7)  # a look takes 0.5 s
    nodes = [100, 101, 102, 103]
    grid = coming_and_going([0, 1, 2, 3], [nodes[:n] for n in range(5)])
    clients = enrolment.enrol_clients(grid, 4)
    assert clients == {100: 0, 101: 1, 102: 2, 103: 3}


def test_enrolment_asks_a_silent_client_again_while_others_answer() -> None:
    both, one = [100, 101], [100]
    grid = coming_and_going([0, 1], [both, one, both])
    grid.looks = [both, one, both]
    real, turns = grid.send_and_receive, iter([one, both])

    def answer(messages: Iterable[Message], *, timeout: float | None = None) -> Any:
        grid.looks = [next(turns)]
        replies = real(messages, timeout=timeout)
        grid.looks = [both]
        return replies

    grid.send_and_receive = answer
    assert enrolment.enrol_clients(grid, 2) == {100: 0, 101: 1}
    assert grid.asked == [both, [101]]


def test_a_client_is_found_under_its_new_node_and_nobody_else_is_asked() -> None:
    grid = coming_and_going([0, 1, 1, 7], [[100, 102, 103]])
    before = {100: 0, 101: 1}
    assert enrolment.renew_clients(grid, before) == {100: 0, 102: 1}
    assert grid.asked == [[102, 103]]
    grid.looks, grid.asked = [[100, 101, 102]], []
    assert enrolment.renew_clients(grid, before) == before
    grid.looks = [[100]]
    assert enrolment.renew_clients(grid, before) == before
    assert grid.asked == []
