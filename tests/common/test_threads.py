"""Threads and caches of libraries."""

from __future__ import annotations

import os

import pytest

from samv2.common.threads import ONEDNN_CACHE, small_onednn_cache


def test_a_cache_that_somebody_sized_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ONEDNN_CACHE, "7")
    small_onednn_cache()
    assert os.environ[ONEDNN_CACHE] == "7"
    monkeypatch.delenv(ONEDNN_CACHE)
    small_onednn_cache()
    assert os.environ[ONEDNN_CACHE] == "32"
