"""What every client did, gathered over rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samv2.report.client_data import ClientFacts, gather, read_clients
from samv2.report.reading import Missing


def told(client: int, **changes: Any) -> dict[str, Any]:
    """A client's object of ``clients.jsonl``."""
    return {
        "client": client,
        "replied": True,
        "bytes_up": 100,
        "bytes_down": 50,
        "seconds": 2.0,
        "waited": None,
        "train_loss": 4.0,
        "tokens": 64,
        "update_norm": 1.0,
        "refused": [],
    } | changes


SILENT = {"replied": False, "bytes_up": None, "seconds": None, "train_loss": None}
NO_REPLY = {"reason": "no_reply", "detail": "no reply in time"}
ROWS = [
    {"round": 1, "clients": [told(0), told(3, seconds=9.0, waited=10.0)]},
    {
        "round": 2,
        "clients": [
            told(-1, replied=False, bytes_down=None, refused=[{"reason": "unasked"}]),
            told(3, **SILENT, refused=[NO_REPLY]),
        ],
    },
    {
        "round": 3,
        "clients": [told(0, train_loss=3.0), told(3, seconds=1.0, refused=[NO_REPLY])],
    },
]


def test_clients_are_gathered_over_rounds() -> None:
    unasked, first, third = gather(ROWS)
    assert unasked.client == -1 and unasked.asked == unasked.replied == 0
    assert unasked.refused == {"unasked": 1}
    assert (first.asked, first.replied, first.refused) == (2, 2, {})
    assert (first.first_loss, first.last_loss) == (4.0, 3.0)
    assert (first.bytes_up, first.bytes_down, first.waited) == (200, 100, None)
    assert third == ClientFacts(
        client=3,
        asked=3,
        replied=2,
        refused={"no_reply": 2},
        bytes_up=200,
        bytes_down=150,
        seconds=5.0,
        longest=9.0,
        waited=10.0,
        first_loss=4.0,
        last_loss=4.0,
    )


def test_a_run_has_them(tiny_run: Path) -> None:
    found = read_clients(tiny_run, remedy="")
    assert not isinstance(found, Missing)
    assert [(item.client, item.asked, item.replied) for item in found] == [
        (0, 2, 2),
        (1, 2, 2),
    ]
    assert all(item.bytes_up > 0 and (item.seconds or 0) > 0 for item in found)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "There is no clients.jsonl"),
        ("", "holds no finished round"),
        ('{"round": 1}\n', "it lacks 'clients'"),
        ('{"round": 1, "clients": 3}\n', "cannot be read"),
        (json.dumps({"round": 1, "clients": [{"client": "x"}]}), "cannot be read"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, content: str | None, word: str
) -> None:
    if content is not None:
        (tmp_path / "clients.jsonl").write_text(content)
    found = read_clients(tmp_path, remedy="Go on.")
    assert isinstance(found, Missing)
    assert word in found.what and found.remedy.endswith("Go on.")
