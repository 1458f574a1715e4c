"""Metrics on disk and in TensorBoard."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samv2.common.telemetry import (
    MetricsLog,
    log_to,
    number_table,
    progress_bar,
    read_metrics,
)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricsLog]:
    """An open log with three rounds."""
    made = MetricsLog(tmp_path)
    for round in (1, 2, 3):
        made.write({"round": round, "loss": 4.0 / round, "by": {"x": round}})
    yield made
    made.close()


def test_rows_come_back(log: MetricsLog, tmp_path: Path) -> None:
    rows = read_metrics(tmp_path)
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert rows[1] == {"round": 2, "loss": 2.0, "by": {"x": 2}}


def test_a_resumed_run_drops_rounds_that_run_again(
    log: MetricsLog, tmp_path: Path
) -> None:
    log.close()
    resumed = MetricsLog(tmp_path, keep_rounds=1)
    assert [row["round"] for row in read_metrics(tmp_path)] == [1]
    resumed.write({"round": 2, "loss": 9.0})
    resumed.close()
    assert [row.get("loss") for row in read_metrics(tmp_path)] == [4.0, 9.0]


def test_a_new_run_starts_empty(log: MetricsLog, tmp_path: Path) -> None:
    log.close()
    MetricsLog(tmp_path).close()
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    "tail", [b'{"round": 4, "lo', b"5\n", b'{"loss": 1}\n', b"\xff\xfe\n", b"null\n"]
)
def test_what_follows_a_damaged_line_is_left_out(
    log: MetricsLog, tmp_path: Path, tail: bytes
) -> None:
    with log.path.open("ab") as file:
        file.write(tail)
    assert [row["round"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_numbers_that_are_not_finite_become_null(
    log: MetricsLog, tmp_path: Path
) -> None:
    values = {"a": math.nan, "b": [math.inf, 1.0], "c": (-math.inf,)}
    log.write({"round": 4, "loss": math.nan, "by": values})
    line = log.path.read_text().splitlines()[-1]
    expected = {"a": None, "b": [None, 1.0], "c": [None]}
    assert json.loads(line) == {"round": 4, "loss": None, "by": expected}


def test_tensorboard_holds_the_numbers(log: MetricsLog, tmp_path: Path) -> None:
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("by/x")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert events.Scalars("loss")[1].value == 2.0


def test_a_number_table_shows_every_cell() -> None:
    console = Console(record=True, width=60)
    console.print(number_table("Title", ["a", "b"], [["x", "1.25"]], caption="note"))
    shown = console.export_text()
    assert all(word in shown for word in ("Title", "a", "b", "x", "1.25", "note"))


def test_a_progress_bar_advances_without_a_terminal() -> None:
    console = Console(record=True, width=60, force_terminal=False)
    with progress_bar(console, "working", 4) as advance:
        advance(2, 4)
        advance(5, 5)


def test_verbose_shows_debug_messages() -> None:
    level = logging.getLogger("samv2").level
    root = logging.getLogger()
    handlers, root_level = list(root.handlers), root.level
    try:
        log_to(Console(quiet=True), verbose=True)
        assert logging.getLogger("samv2").level == logging.DEBUG
        log_to(Console(quiet=True))
        assert logging.getLogger("samv2").level == logging.INFO
    finally:
        logging.getLogger("samv2").setLevel(level)
        root.handlers[:], root.level = handlers, root_level
