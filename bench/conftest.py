"""Tables that benches leave, printed when all is done."""

from __future__ import annotations

import io
import shutil
import sys

import pytest
from rich.console import Console, RenderableType

TABLES = pytest.StashKey[list[RenderableType]]()


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest) -> list[RenderableType]:
    """Whatever is put here is printed at the end."""
    return request.config.stash.setdefault(TABLES, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for table in config.stash.get(TABLES, []):
        text = io.StringIO()
        console = Console(
            file=text,
            width=max(shutil.get_terminal_size().columns, 110),
            force_terminal=sys.stdout.isatty(),
            highlight=False,
        )
        console.print(table)
        terminalreporter.write_line("\n" + text.getvalue().rstrip())
