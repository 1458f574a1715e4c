"""How long a server waits for its clients, and when each reply came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Waiting:
    """Counts the seconds spent waiting since the last :meth:`restart`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self.seconds = 0.0
        self.arrivals: dict[int, float] = {}
        """Seconds from asking to the first reply, by sender; of the last ``sender``."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what happens inside as waiting: questions to clients and their answers."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin

    def __call__(
        self,
        ask: Callable[[], Iterable[T]],
        *,
        sender: Callable[[T], int] | None = None,
    ) -> Iterator[T]:
        """Ask now, and yield the replies.

        Args:
            ask: sends the messages. Replies of a sequence have come at once, and when
                each came is not known.
            sender: who a reply is from; None leaves ``arrivals`` as they are.
        """
        begin = time.perf_counter()
        replies = ask()
        self.seconds += time.perf_counter() - begin
        if sender is not None:
            self.arrivals = {}
        if isinstance(replies, Sequence):
            return iter(replies)
        return self._each(iter(replies), begin, sender)

    def _each(
        self, replies: Iterator[T], begin: float, sender: Callable[[T], int] | None
    ) -> Iterator[T]:
        while True:
            idle = time.perf_counter()
            try:
                reply = next(replies)
            except StopIteration:
                return
            finally:
                now = time.perf_counter()
                self.seconds += now - idle
            if sender is not None:
                self.arrivals.setdefault(sender(reply), now - begin)
            yield reply
