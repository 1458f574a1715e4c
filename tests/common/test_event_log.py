"""``log.jsonl``: one line an event, whatever is in it."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from samv2.common.errors import FederationError
from samv2.common.event_log import (
    EVENT_LOG,
    LONGEST_TEXT,
    EventLog,
    JsonFormatter,
    event_log,
    json_value,
)

HOSTILE = '\n\r\x1b[2J\x1b]0;owned\x07 \x7f\x9b31m \u2028\u202e"}\ud800\x00'


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """The product's logger as the command line sets it."""
    logger = logging.getLogger("samv2")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


def lines(folder: Path) -> list[dict[str, Any]]:
    """All lines of a log; each must parse by itself."""
    text = (folder / EVENT_LOG).read_bytes().decode("ascii")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_records_and_events_are_written_as_they_come(tmp_path: Path) -> None:
    with event_log(tmp_path) as events:
        logging.getLogger("samv2.federated").warning("round %d is late", 3)
        events.event("round_started", round=3, clients=[0, 2])
        record, event = lines(tmp_path)  # before the log is closed
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "warning",
        "event": "log",
        "logger": "samv2.federated",
        "message": "round 3 is late",
    }
    del event["time"]
    assert event == {
        "level": "info",
        "event": "round_started",
        "fields": {"round": 3, "clients": [0, 2]},
    }


def test_the_time_is_utc() -> None:
    record = logging.LogRecord("samv2", logging.INFO, "", 0, "x", None, None)
    record.created = 0.25
    line = json.loads(JsonFormatter().format(record))
    assert line["time"] == "1970-01-01T00:00:00.250Z"


@pytest.mark.hostile
def test_a_hostile_string_stays_in_one_printable_line(tmp_path: Path) -> None:
    with event_log(tmp_path) as events:
        events.event("refused", client=1, detail=HOSTILE)
        logging.getLogger("samv2").warning("client %d: %s", 1, HOSTILE)
    data = (tmp_path / EVENT_LOG).read_bytes()
    assert data.count(b"\n") == 2 and set(data) <= {10, *range(32, 127)}
    event, record = lines(tmp_path)
    assert event["fields"]["detail"] == HOSTILE
    assert record["message"] == f"client 1: {HOSTILE}"


@pytest.mark.hostile
def test_long_text_is_cut() -> None:
    assert len(json_value("x" * (LONGEST_TEXT + 5))) == LONGEST_TEXT


def test_values_that_json_lacks() -> None:
    values = {"a": math.nan, 1: (math.inf, True, None), "p": Path("x")}
    assert json_value(values) == {"a": None, "1": [None, True, None], "p": "x"}


def test_a_later_start_goes_on_and_leaves_a_torn_line_alone(tmp_path: Path) -> None:
    with event_log(tmp_path) as events:
        events.event("started")
    path = tmp_path / EVENT_LOG
    with path.open("ab") as file:
        file.write(b'{"time": "2026-')
    with event_log(tmp_path) as events:
        events.event("resumed")
    first, torn, last = path.read_text().splitlines()
    assert json.loads(first)["event"] == "started"
    assert torn == '{"time": "2026-'
    assert json.loads(last)["event"] == "resumed"


def test_what_stops_a_run_is_written_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="too few"):
        with event_log(tmp_path):
            raise FederationError("too few replies")
    (line,) = lines(tmp_path)
    assert (line["level"], line["event"]) == ("error", "stopped")
    assert line["fields"] == {"error": "FederationError", "detail": "too few replies"}


def test_a_traceback_is_kept(tmp_path: Path) -> None:
    with event_log(tmp_path):
        try:
            raise ValueError("here")
        except ValueError:
            logging.getLogger("samv2").exception("failed")
    (line,) = lines(tmp_path)
    assert line["traceback"].endswith("ValueError: here")


def test_the_logger_is_left_as_it_was(tmp_path: Path) -> None:
    logger = logging.getLogger("samv2")
    before = list(logger.handlers)
    with event_log(tmp_path):
        assert len(logger.handlers) == len(before) + 1
    assert logger.handlers == before


def test_events_need_no_logger_level(tmp_path: Path) -> None:
    logging.getLogger("samv2").setLevel(logging.CRITICAL)
    log = EventLog(tmp_path)
    log.event("round_started", level=logging.DEBUG)
    log.close()
    assert [line["level"] for line in lines(tmp_path)] == ["debug"]
