"""Which node is which client, and what is said of those that are missing."""

from __future__ import annotations

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
