"""What the console says of rounds and clients."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from samv2.federated.round_table import RoundTable

YELLOW = "\x1b[33m"


def row(number: int = 1) -> dict[str, Any]:
    """An object of ``metrics.jsonl``."""
    return {
        "round": number,
        "train_loss": 3.25,
        "perplexity": {"a": 20.0, "b": None},
        "bytes_up_per_client": 12_300,
        "edits": 4,
        "refused": 1,
        "seconds": {"train": 5.0, "merge": 1.0, "evaluate": 2.0, "server": 1.5},
    }


def client(number: int, *reasons: str, detail: str = "no reply in time") -> dict:
    """An object of ``clients.jsonl``; with reasons it did not reply."""
    known = not reasons
    return {
        "client": number,
        "replied": known,
        "bytes_up": 12_300 if known else None,
        "seconds": 4.0 if known else None,
        "train_loss": 3.25 if known else None,
        "refused": [{"reason": name, "detail": detail} for name in reasons],
    }


def shown(
    *rounds: list[dict], terminal: bool = False, verbose: bool | None = False
) -> str:
    """All that the table writes."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=160,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        highlight=False,
        legacy_windows=False,
    )
    with RoundTable(console, 3, verbose=verbose) as table:
        table.start({"a": 30.0, "b": 40.0})
        for number, clients in enumerate(rounds, 1):
            table.working("train", 1, 2)
            table.add(row(number), clients)
    return out.getvalue()


def test_a_round_is_one_line_where_all_is_well() -> None:
    assert shown([client(0), client(1)]).splitlines() == [
        "  round start: perplexity a 30.00  b 40.00",
        "  round 1/3: perplexity a 20.00  b -  loss 3.250  up/client 12.3 kB  edits 4  "
        "refused 1  time 8 s",
    ]


def test_verbose_shows_each_client() -> None:
    lines = shown([client(0), client(1)], verbose=True).splitlines()
    assert lines[2:] == [
        "    client 0:  loss 3.250  up 12.3 kB  time 4 s",
        "    client 1:  loss 3.250  up 12.3 kB  time 4 s",
    ]


def test_debug_messages_make_it_verbose() -> None:
    logger = logging.getLogger("samv2")
    before = logger.level
    try:
        logger.setLevel(logging.DEBUG)
        assert "client 0" in shown([client(0)], verbose=None)
        logger.setLevel(logging.INFO)
        assert "client 0" not in shown([client(0)], verbose=None)
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_refused_client_is_named_with_its_reason(terminal: bool) -> None:
    text = shown([client(0), client(1, "no_reply")], terminal=terminal)
    named = [line for line in text.splitlines() if "  client 1" in line]
    assert named and all("no_reply" in line for line in named)
    if terminal:
        assert all(YELLOW in line for line in named)


@pytest.mark.parametrize("terminal", [False, True])
def test_many_clients_are_summed_up(terminal: bool) -> None:
    clients = [client(index) for index in range(40)]
    clients[3], clients[7] = client(3, "no_reply"), client(7, "client_error")
    text = " ".join(shown(clients, terminal=terminal).split())
    assert "38 of 40 replied" in text
    for part in ("no_reply 3", "client_error 7", "4 s, at most 4 s"):
        assert part in text


@pytest.mark.hostile
@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_client_says_is_neither_markup_nor_control(terminal: bool) -> None:
    detail = "a\nb \x1b[2J [bold red]x[/] \x9b31m \u202e"
    text = shown([client(0, "client_error", detail=detail)], terminal=terminal)
    assert "\x1b[2J" not in text and "\x9b" not in text and "\u202e" not in text
    assert "[bold red]x[/]" in text
    if not terminal:
        (line,) = [line for line in text.splitlines() if "client_error" in line]
        assert "a b ?[2J" in line


def test_rows_of_baselines_have_no_clients() -> None:
    out = io.StringIO()
    table = RoundTable(Console(file=out, width=160), 3, verbose=True)
    found = row()
    del found["edits"], found["seconds"]["server"]
    table.add(found)
    assert "edits -" in out.getvalue() and len(out.getvalue().splitlines()) == 1
