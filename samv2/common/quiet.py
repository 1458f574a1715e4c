"""Silencing what other libraries print, for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)


@contextmanager
def quiet_logger(name: str, level: int) -> Iterator[None]:
    """Inside the block, a logger and those below it drop records under ``level``."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside the block, transformers shows no bars of its own."""
    before = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if before:
            enable_progress_bar()
