"""Rows and lines on a round's clients."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from samv2.federated.client_lines import FEW_CLIENTS, MOST_NAMES, client_lines
from samv2.federated.client_rows import (
    LONGEST_DETAIL,
    client_rows,
    one_line,
    refusal_totals,
    refused_by_reason,
    tell_replies,
)
from samv2.federated.server_merge import MergeReport, Refusal, server_merge
from samv2.federated.validate import validate_reply
from samv2.updates.packing import pack
from tests.federated.runs import (
    toy_manifest,
    toy_reply,
    toy_settings,
    toy_state,
    toy_update,
)

HOSTILE = "a\nb\x1b[2J\x9b[bold]"
REFUSALS = (
    Refusal(client=1, reason="duplicate", detail="again"),
    Refusal(client=2, reason="no_reply", detail=HOSTILE),
    Refusal(client=-1, reason="unasked", detail="node 9 was not asked"),
)


def merged(refusals: tuple[Refusal, ...] = REFUSALS) -> MergeReport:
    """A toy round with replies of clients 0 and 1."""
    state, manifest, settings = toy_state(), toy_manifest(), toy_settings()
    replies = []
    for client in (1, 0):
        frame = pack(toy_update(client), manifest, round=1, codec="raw")
        reply = toy_reply(update=frame, seconds=1.5 + client)
        replies.append(validate_reply(reply, client, state, manifest, settings))
    return server_merge(state, replies, refusals, manifest, settings)[1]


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Its rows, three clients asked."""
    values = {"asked": {2: 30, 1: 20, 0: 10}, "waited": {0: 2.5}} | changes
    return client_rows(merged(), toy_manifest(), **values)


def test_every_client_has_a_row() -> None:
    unasked, first, second, silent = rows()
    assert [row["client"] for row in (unasked, first, second, silent)] == [-1, 0, 1, 2]
    norm = sum(float(block.square().sum()) for block in toy_update(0).values()) ** 0.5
    assert first.pop("update_norm") == pytest.approx(norm)
    assert first.pop("bytes_up") > 100
    assert first == {
        "client": 0,
        "replied": True,
        "bytes_down": 10,
        "waited": 2.5,
        "seconds": 1.5,
        "train_loss": 4.5,
        "tokens": 64,
        "refused": [],
    }
    assert second["waited"] is None and second["seconds"] == 2.5
    assert second["replied"] and second["refused"][0]["reason"] == "duplicate"
    assert not silent["replied"] and silent["bytes_up"] is None
    assert unasked["bytes_down"] is None
    json.dumps(rows(), allow_nan=False)


@pytest.mark.hostile
def test_a_clients_words_are_one_printable_line() -> None:
    detail = rows()[3]["refused"][0]["detail"]
    assert detail == "a b?[2J?[bold]"
    assert len(one_line("x " * LONGEST_DETAIL)) == LONGEST_DETAIL


def test_refusals_are_counted() -> None:
    assert refused_by_reason([*REFUSALS, REFUSALS[1]]) == {
        "duplicate": 1,
        "no_reply": 2,
        "unasked": 1,
    }
    told = [{"round": number, "clients": rows()} for number in (1, 2)]
    assert refusal_totals(told) == {
        "-1": {"unasked": 2},
        "1": {"duplicate": 2},
        "2": {"no_reply": 2},
    }
    assert refusal_totals([]) == {}


def test_replies_and_refusals_are_told() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    tell_replies(
        lambda name, **fields: events.append((name, fields)),
        7,
        merged().replies,
        REFUSALS[1:2],
    )
    assert events == [
        ("replies", {"round": 7, "clients": [0, 1]}),
        (
            "refused",
            {
                "level": logging.WARNING,
                "round": 7,
                "client": 2,
                "reason": "no_reply",
                "detail": HOSTILE,
            },
        ),
    ]


def many(count: int) -> list[dict[str, Any]]:
    """A round of many clients; all but one of three replied."""
    row = rows()[1]
    silent = rows()[3]
    return [
        (silent if index % 3 == 2 else row) | {"client": index, "seconds": float(index)}
        for index in range(count)
    ]


def test_few_clients_have_lines_where_one_was_refused() -> None:
    lines = client_lines(rows())
    assert [str(line).split(":")[0] for line in lines] == [
        "unasked",
        "client 0",
        "client 1",
        "client 2",
    ]
    assert [line.style for line in lines] == ["yellow", "dim", "yellow", "yellow"]
    assert str(lines[1]) == "client 0:  loss 4.500  up 0.7 kB  time 1.5 s"
    assert str(lines[3]) == "client 2:  refused no_reply (a b?[2J?[bold])"


def test_few_clients_have_none_where_all_is_well() -> None:
    well = [row | {"refused": []} for row in rows()[1:3]]
    assert client_lines(well) == []
    assert len(client_lines(well, verbose=True)) == 2
    assert client_lines([]) == client_lines([], verbose=True) == []


def test_many_clients_are_summed_up() -> None:
    found = many(FEW_CLIENTS + 1)
    summed, refused = client_lines(found)
    assert str(summed) == "6 of 9 replied:  time 3.5 s, at most 7 s"
    assert str(refused) == "clients:  refused no_reply 2, 5, 8"
    assert refused.style == "yellow" and summed.style == "dim"
    well = [row for row in many(40) if row["replied"]]
    assert len(client_lines(well)) == 1


def test_many_refused_clients_are_cut() -> None:
    line = str(client_lines(many(3 * MOST_NAMES + 6))[1])
    assert line.endswith(" and 2 more") and line.count(",") == MOST_NAMES - 1
