"""Silencing other libraries, and letting them speak again."""

from __future__ import annotations

import logging

import pytest
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from samv2.common.quiet import no_progress_bars, quiet_logger


def test_a_logger_is_quiet_inside_the_block_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("some.library")
    with quiet_logger("some", logging.ERROR):
        logger.warning("hidden")
        logger.error("shown")
    logger.warning("shown again")
    assert [record.message for record in caplog.records] == ["shown", "shown again"]


def test_progress_bars_come_back() -> None:
    before = is_progress_bar_enabled()
    with no_progress_bars():
        assert not is_progress_bar_enabled()
    assert is_progress_bar_enabled() == before
    enable_progress_bar()
    with pytest.raises(ValueError, match="inside"), no_progress_bars():
        raise ValueError("inside")
    assert is_progress_bar_enabled()
