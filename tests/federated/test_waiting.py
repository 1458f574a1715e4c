"""Time spent waiting, and when replies came."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from samv2.federated.waiting import Waiting

PAUSE = 0.05


def slow(*senders: int) -> Iterator[int]:
    """Replies that take their time."""
    for sender in senders:
        time.sleep(PAUSE)
        yield sender


def test_only_waiting_counts() -> None:
    waiting = Waiting()
    begin = time.perf_counter()
    for _ in waiting(lambda: slow(1, 2)):
        time.sleep(4 * PAUSE)  # what the server does with a reply
    total = time.perf_counter() - begin
    assert 2 * PAUSE <= waiting.seconds <= total - 8 * PAUSE
    waiting.restart()
    assert waiting.seconds == 0.0 and waiting.arrivals == {}


def test_arrivals_are_those_of_first_replies() -> None:
    waiting = Waiting()
    replies = waiting(lambda: slow(7, 8, 7), sender=lambda reply: reply)
    assert list(replies) == [7, 8, 7]
    assert list(waiting.arrivals) == [7, 8]
    assert PAUSE <= waiting.arrivals[7] <= waiting.arrivals[8] - PAUSE
    list(waiting(lambda: slow(9)))
    assert list(waiting.arrivals) == [7, 8]
    list(waiting(lambda: slow(9), sender=lambda reply: reply))
    assert list(waiting.arrivals) == [9]


def test_replies_that_come_at_once_are_asked_for_at_once() -> None:
    waiting = Waiting()
    replies = waiting(lambda: list(slow(1, 2)), sender=lambda reply: reply)
    assert waiting.seconds >= 2 * PAUSE and waiting.arrivals == {}
    assert list(replies) == [1, 2]


def test_what_fails_while_waiting_goes_on() -> None:
    def broken() -> Iterator[int]:
        yield from slow(1)
        raise OSError("gone")

    waiting = Waiting()
    with pytest.raises(OSError, match="gone"):
        list(waiting(broken))
    assert waiting.seconds >= PAUSE


def test_questions_count_as_waiting_also_where_they_fail() -> None:
    waiting = Waiting()
    with pytest.raises(OSError), waiting.counted():
        time.sleep(PAUSE)
        raise OSError("gone")
    assert PAUSE <= waiting.seconds < 20 * PAUSE
