"""``log.jsonl``: one JSON object a line for every log record and event of a run.

A line is printable ASCII whatever a string in it holds, so that what a client sent can
neither break a line nor steer a terminal.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

EVENT_LOG = "log.jsonl"
PRODUCT = "samv2"
LONGEST_TEXT = 4000
"""Characters of a string that are kept."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, event, message, fields.

    A plain record's event is ``log``; :class:`EventLog` sets ``event`` and ``fields``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        row: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
        }
        if message := record.getMessage():
            row |= {"logger": record.name, "message": message}
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        if fields := getattr(record, "fields", None):
            row["fields"] = fields
        line = json.dumps(json_value(row), allow_nan=False)
        return line.replace("\x7f", "\\u007f")


class EventLog:
    """Appends to ``log.jsonl``; every line is handed to the system as it is written.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / EVENT_LOG
        torn = _ends_within_a_line(self.path)
        self.handler = logging.FileHandler(self.path, mode="a", encoding="utf-8")
        self.handler.setFormatter(JsonFormatter())
        if torn:
            self.handler.stream.write("\n")

    def event(self, name: str, *, level: int = logging.INFO, **fields: Any) -> None:
        """Write one event; it goes to this file only, whatever level loggers have.

        Args:
            name: of the event, in snake_case.
            level: of ``logging``.
            **fields: JSON values; NaN and infinity become null, long strings are cut.
        """
        record = logging.LogRecord(PRODUCT, level, "", 0, "", None, None)
        record.event, record.fields = name, fields
        self.handler.handle(record)

    def close(self) -> None:
        """Close the file."""
        self.handler.close()


@contextmanager
def event_log(folder: Path) -> Iterator[EventLog]:
    """An open event log that the product's log records go to as well.

    An exception that leaves the block is written down as event ``stopped``.
    """
    log = EventLog(folder)
    logger = logging.getLogger(PRODUCT)
    logger.addHandler(log.handler)
    try:
        yield log
    except BaseException as error:
        reason = {"error": type(error).__name__, "detail": str(error)}
        log.event("stopped", level=logging.ERROR, **reason)
        raise
    finally:
        logger.removeHandler(log.handler)
        log.close()


def json_value(value: Any) -> Any:
    """The same as JSON can hold it: no NaN or infinity, no endless text."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value)[:LONGEST_TEXT]


def _ends_within_a_line(path: Path) -> bool:
    """Whether an earlier start was stopped while it wrote."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
