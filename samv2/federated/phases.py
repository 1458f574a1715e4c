"""Long work as phases: a bar or lines for each, and their seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from samv2.common.telemetry import progress_bar

LINE_SECONDS = 30.0
"""Without a terminal, a line is printed so often."""


class Phases:
    """Shows one phase after another; a context manager that closes the last.

    Args:
        console: where they are shown.
        clock: seconds that only rise.
    """

    def __init__(
        self, console: Console, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = ""
        """The phase that is going on."""
        self.seconds: dict[str, float] = {}
        """By name, of the phases that ended."""
        self._console, self._clock = console, clock
        self._bar = ExitStack()
        self._advance: Any = None
        self._began = self._said = clock()
        self._first = 0

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def start(self, name: str, *, total: int = 1, done: int = 0) -> None:
        """End the phase before, and begin another.

        Args:
            name: what is done, for a person.
            total: its steps.
            done: those that were done by an earlier start of the work.
        """
        self._end()
        self.name, self._first = name, done
        self._began = self._said = self._clock()
        bar = progress_bar(self._console, name, total)
        self._advance = self._bar.enter_context(bar)
        self._advance(done, total)

    def advance(self, done: int, total: int) -> None:
        """Say that so many steps of the phase are done."""
        self._advance(done, total)
        now = self._clock()
        if self._console.is_terminal or now - self._said < LINE_SECONDS:
            return
        self._said = now
        each = (now - self._began) / max(1, done - self._first)
        self._console.print(
            f"  {done} of {total}, about {duration(each * (total - done))} left"
        )

    def say(self, text: str) -> None:
        """Print a sentence beside the bar."""
        self._console.print(text)

    def _end(self) -> None:
        self._bar.close()
        if self.name:
            spent = self._clock() - self._began
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent
        self.name = ""


def duration(seconds: float) -> str:
    """Seconds for a person: ``8 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
