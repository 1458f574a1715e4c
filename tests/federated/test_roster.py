"""Which node is which client, and what is said of those that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from samv2.common.errors import FederationError
from samv2.federated import exchange, roster
from samv2.federated.ask_counts import ask_counts
from samv2.federated.grid import EmbeddedGrid, counts_to_record
from samv2.federated.questions import (
    ANSWER_SECONDS,
    NODE_UNAVAILABLE,
    answer_seconds,
)
from samv2.federated.roster import Roster
from samv2.federated.server_merge import Refusal
from samv2.federated.siblings import pack_counts
from tests.federated.test_exchange import PostOffice
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
    assert strategy.roster.clients == {100: 2, 101: 0, 103: 1}


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
    monkeypatch.setattr(roster, "ENROL_SECONDS", 0.2)
    with pytest.raises(FederationError, match="1 of 3 clients are connected"):
        Federation(tmp_path).strategy.enrol(answering([0]))


class ComingAndGoing(EmbeddedGrid):
    """A grid that says at every look which of its nodes are there."""

    looks: list[list[int]]
    asked: list[list[int]]

    def get_node_ids(self) -> list[int]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def stream(self, messages: Iterable[Message], **options: Any) -> Iterator[Message]:
        """Replies of the nodes that are there; the others are silent."""
        asked = list(messages)
        self.asked.append([message.metadata.dst_node_id for message in asked])
        there = [m for m in asked if m.metadata.dst_node_id in self.looks[0]]
        yield from super().stream(there, **options)


def coming_and_going(answers: list[Any], looks: list[list[int]]) -> ComingAndGoing:
    """Such a grid; its nodes are 100, 101 and so on."""
    grid = answering(answers)
    grid.__class__ = ComingAndGoing
    grid.looks, grid.asked = looks, []
    return grid


def enrolled(grid: ComingAndGoing, wanted: int, quarantine: int = 0) -> Roster:
    """A roster that has met who is there."""
    found = Roster(wanted, quarantine)
    found.enrol(grid)
    grid.asked = []
    return found


def test_enrolment_waits_as_long_as_nodes_keep_arriving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "ENROL_SECONDS", 0.7)  # a look takes 0.5 s
    nodes = [100, 101, 102, 103]
    grid = coming_and_going([0, 1, 2, 3], [nodes[:n] for n in range(5)])
    assert enrolled(grid, 4).clients == {100: 0, 101: 1, 102: 2, 103: 3}


def test_enrolment_asks_a_silent_client_again_while_others_answer() -> None:
    both, one = [100, 101], [100]
    grid = coming_and_going([0, 1], [both, one, both])
    real, turns = grid.stream, iter([one, both])

    def answer(messages: Iterable[Message], **options: Any) -> Any:
        grid.looks = [next(turns)]
        replies = list(real(messages, **options))
        grid.looks = [both]
        return replies

    grid.stream = answer  # type: ignore[method-assign]
    found = Roster(2)
    found.enrol(grid)
    assert found.clients == {100: 0, 101: 1}
    assert grid.asked == [both, [101]]


def test_a_client_is_found_under_its_new_node_and_nobody_else_is_asked() -> None:
    grid = coming_and_going([0, 1, 1, 7], [[100, 101]])
    found = enrolled(grid, 2)
    grid.looks = [[100]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 101: 1} and grid.asked == []
    grid.looks = [[100, 102, 103]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 102: 1} and grid.asked == [[102, 103]]
    # Once all are there, those that are left over are not asked.
    found.renew(grid, 5.0)
    assert grid.asked == [[102, 103]]


def test_a_client_belongs_to_its_own_node_when_that_comes_back() -> None:
    grid = coming_and_going([0, 1, 1], [[100, 101]])
    found = enrolled(grid, 2)
    grid.looks = [[100, 102]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 102: 1}
    grid.looks = [[100, 101, 102]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 101: 1}
    # Who had taken its place is not asked again while both are there.
    grid.looks, grid.asked = [[101, 102]], []
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 101: 1} and grid.asked == []
    # It is once the client's own node is gone: it may be an honest node under a new id.
    grid.looks = [[100, 102]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 102: 1} and grid.asked == [[102]]


def test_a_node_that_comes_back_while_its_old_id_is_still_listed() -> None:
    grid = coming_and_going([0, 1, 1], [[100, 101]])
    found = enrolled(grid, 2)
    grid.looks = [[100, 101, 102]]  # 101 died a moment ago; 102 is the same machine
    found.enrol(grid)
    assert found.clients == {100: 0, 101: 1}
    grid.looks = [[100, 102]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 102: 1}
    # The same at a resume, where the dead id does not answer.
    again = Roster(2)
    again.recall({"homes": {"0": [100], "1": [103]}})
    silent = coming_and_going([0, 1, 1, None], [[100, 102, 103]])
    again.enrol(silent)
    assert again.clients == {100: 0, 102: 1}


def test_nodes_may_change_their_numbers_between_starts() -> None:
    found = Roster(2)
    found.recall({"homes": {"0": [100], "1": [101]}})
    found.enrol(coming_and_going([1, 0], [[100, 101]]))
    assert found.clients == {100: 1, 101: 0}


def test_a_home_that_says_otherwise_is_not_made_its_client() -> None:
    answers: list[Any] = [0, 1, 1]
    grid = coming_and_going(answers, [[100, 101]])
    found = enrolled(grid, 2)
    grid.looks = [[100, 102]]
    found.renew(grid, 5.0)
    answers[1] = 0
    grid.looks = [[100, 101, 102]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 102: 1}


def test_a_client_is_not_blamed_for_who_stood_in_for_it() -> None:
    grid = coming_and_going([0, 1, 1], [[100, 101]])
    found = enrolled(grid, 2, quarantine=1)
    grid.looks = [[100, 102]]
    found.renew(grid, 5.0)
    found.judge(2, [Refusal(client=1, reason="examples", detail="-1")])
    assert found.clients == {100: 0}
    grid.looks = [[100, 101, 102]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 101: 1}
    assert found.memory()["hostile"] == {} and found.memory()["barred"] == {"102": 1}


def test_a_stand_in_gives_way_when_the_run_enrols_again() -> None:
    grid = coming_and_going([0, 1, 1], [[100, 101]])
    found = enrolled(grid, 2)
    grid.looks = [[100, 102]]
    found.renew(grid, 5.0)
    found.enrol(grid)
    assert found.clients == {100: 0, 102: 1}
    grid.looks = [[100, 101, 102]]
    found.enrol(grid)
    assert found.clients == {100: 0, 101: 1}


def test_a_false_claim_ends_no_run() -> None:
    grid = coming_and_going([0, 1, 0], [[100, 101]])
    found = enrolled(grid, 2)
    grid.looks = [[100, 101, 102]]
    found.enrol(grid)
    assert found.clients == {100: 0, 101: 1}
    # A start that goes on knows whose client is whose, also where all claim at once.
    again = Roster(2)
    again.recall(found.memory())
    again.enrol(grid)
    assert again.clients == {100: 0, 101: 1}


def test_a_claim_that_was_a_mistake_can_be_mended_by_connecting_anew() -> None:
    grid = coming_and_going([0, 0], [[100], [100, 101]])
    found = Roster(1)
    found.enrol(grid)
    grid.looks = [[100, 101]]
    found.enrol(grid)
    assert grid.asked == [[100], [101]]
    found.enrol(grid)
    assert grid.asked == [[100], [101], []]
    grid.looks = [[100]]
    found.enrol(grid)
    grid.looks = [[100, 101]]
    found.enrol(grid)
    assert grid.asked[-1] == [101]


def test_a_node_in_quarantine_takes_no_other_place() -> None:
    grid = coming_and_going([0, 0, 2], [[100, 101, 102]])
    found = Roster(3, quarantine=1)
    found.recall({"homes": {"0": [100], "1": [101]}})
    # It was client 1, and now says that it is client 0.
    found.clients = {100: 0, 101: 1, 102: 2}
    found.judge(1, [Refusal(client=1, reason="examples", detail="-1")])
    assert found.clients == {100: 0, 102: 2}
    grid.looks = [[101, 102]]
    found.renew(grid, 5.0)
    assert found.clients == {100: 0, 102: 2} and grid.asked == []
    again = Roster(3, quarantine=1)
    again.recall(found.memory())
    grid.looks = [[100, 101, 102]]
    again.enrol(grid)
    assert again.clients == {100: 0, 102: 2} and grid.asked == [[100, 102]]


def test_a_node_that_does_not_say_who_it_is_is_not_asked_for_ever() -> None:
    grid = coming_and_going([0, 1, None], [[100, 101]])
    found = enrolled(grid, 2)
    grid.looks = [[100, 102]]
    for _ in range(roster.TRIES + 2):
        found.renew(grid, 5.0)
    assert grid.asked == [[102]] * roster.TRIES


def test_a_client_that_is_left_out_stays_out(caplog: pytest.LogCaptureFixture) -> None:
    grid = coming_and_going([0, 1], [[100, 101]])
    found = enrolled(grid, 2)
    found.leave_out(1, "too little memory")
    assert "client 1 is left out: too little memory" in caplog.text
    found.enrol(grid)
    assert found.clients == {100: 0}


def questioned(grid: PostOffice, wanted: int) -> Roster:
    """Enrol on a grid on which all answers are there already."""
    found = Roster(wanted)
    found.enrol(grid)
    return found


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> PostOffice:
    """A grid as Flower's are, with nodes 10, 11 and 12; replies say they are from 999."""
    monkeypatch.setattr(exchange, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)  # as Flower's server process has it
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    grid = PostOffice()
    grid.nodes = [10, 11, 12]
    return grid


def test_an_answer_is_that_of_the_node_that_was_asked(office: PostOffice) -> None:
    for number, client in (("m1", 1), ("m2", 0), ("m3", 2)):
        office.reply(number, client=client)
    assert questioned(office, 3).clients == {10: 1, 11: 0, 12: 2}


def test_a_node_that_is_just_starting_is_waited_for(
    office: PostOffice, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.nodes = [10]
    office.error("m1", NODE_UNAVAILABLE, "no heartbeat")
    office.reply("m2", client=0)
    assert questioned(office, 1).clients == {10: 0}
    monkeypatch.setattr(roster, "ENROL_SECONDS", 0.0)
    office.error("m3", NODE_UNAVAILABLE, "no heartbeat")
    with pytest.raises(FederationError, match=r"clients \[0\] .*no heartbeat"):
        questioned(office, 1)


def test_an_answer_that_cannot_be_read_costs_nobody_elses(office: PostOffice) -> None:
    office.reply("m1", client=0)
    office.poison("m2", ValueError("no such field"))
    office.reply("m3", client=1)
    assert questioned(office, 2).clients == {10: 0, 12: 1}


def test_counts_are_those_of_the_node_that_was_asked(office: PostOffice) -> None:
    frames = [pack_counts(torch.full((100,), token)) for token in (3, 4)]
    for number, frame in zip(("m1", "m2"), frames):
        content = RecordDict({"counts": counts_to_record(frame)})
        office._arrives(number, content, 10)
    office.poison("m3", ValueError("no such field"))
    counts, found = ask_counts(office, {10: 0, 11: 1, 12: 2}, {0, 1, 2}, 1)
    assert found == dict(enumerate(frames))
    assert float(counts[0][3]) > 0 and float(counts[1][3]) == 0


def test_budgets_come_with_the_answer(office: PostOffice) -> None:
    office.nodes = [10]
    content = {"client": 0, "memory-budget-bytes": 5_000_000, "flops-budget": 0.5}
    office.reply("m1", **content)  # type: ignore[arg-type]
    budget = questioned(office, 1).budgets[0]
    assert (budget.memory_bytes, budget.flops) == (5_000_000, 0.5)


def test_answers_are_not_waited_for_longer_than_replies() -> None:
    assert answer_seconds(5.0) == 5.0
    assert answer_seconds(1e6) == ANSWER_SECONDS
