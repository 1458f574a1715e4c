"""Processes that die, and how many fit."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from samv2.ablation.job import answer
from samv2.ablation.workers import (
    Pool,
    Worker,
    available_bytes,
    estimate_bytes,
    fitting_jobs,
)
from tests.federated.runs import small_settings
from tests.helpers import tiny_config


def stand_in(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the interpreter's place."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_process_that_dies_is_an_error_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(tmp_path / "log")
    stand_in(tmp_path / "dies", "read line; echo gone >&2; kill -9 $$", monkeypatch)
    found = worker({"kind": "run"})
    assert found is not None
    assert "status -9 (out of memory?)" in found and str(tmp_path / "log") in found
    assert (tmp_path / "log").read_text() == "gone\n"
    stand_in(tmp_path / "fails", "read line; exit 3", monkeypatch)
    assert "status 3; see" in str(worker({"kind": "run"}))
    echo = 'while read line; do echo "{}"; done'
    stand_in(tmp_path / "works", echo, monkeypatch)
    assert worker({"kind": "run"}) is None and worker({"kind": "run"}) is None
    worker.close()
    worker.close()


def test_a_pool_serves_and_can_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = 'while read line; do echo "{\\"error\\": \\"no\\"}"; done'
    stand_in(tmp_path / "refuses", loop, monkeypatch)
    pool = Pool(2, tmp_path)
    assert [pool({}), pool({})] == ["no", "no"]
    pool.kill()
    pool.close()


def test_a_job_that_fails_says_why_and_keeps_the_traceback(tmp_path: Path) -> None:
    found = answer({"kind": "nothing", "root": str(tmp_path / "run")})
    assert found == {"error": "KeyError: 'nothing'"}
    assert "Traceback" in (tmp_path / "run" / "job.log").read_text()
    (tmp_path / "file").write_text("")
    assert (
        "Error"
        in answer({"kind": "run", "root": str(tmp_path / "file" / "x")})["error"]
    )


def test_jobs_are_as_many_as_cores_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("samv2.ablation.workers.available_bytes", lambda: 10 * 10**9)
    assert fitting_jobs(0, 20, 10**9) == 8
    assert fitting_jobs(0, 20, 3 * 10**9) == 2
    assert fitting_jobs(0, 20, 10**12) == 1
    assert fitting_jobs(0, 3, 10**9) == 3
    assert fitting_jobs(5, 20, 10**12) == 5
    assert fitting_jobs(5, 2, 1) == 2 and fitting_jobs(5, 0, 1) == 1


def test_memory_of_machine_and_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  2000 kB\n")
    assert available_bytes(tmp_path, tmp_path) == 2_048_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes(tmp_path, tmp_path) == 2_048_000
    (tmp_path / "memory.max").write_text("51000\n")
    assert available_bytes(tmp_path, tmp_path) == 50_000
    assert available_bytes() > 0
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        available_bytes(tmp_path, tmp_path)


def test_the_estimate_grows_with_model_and_batch() -> None:
    small = small_settings("x")
    tiny = estimate_bytes(tiny_config(), small)
    assert 0.9e9 < tiny < 1e9
    big = tiny_config(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
    assert estimate_bytes(big, small) > 9 * 10**9
    wide = small_settings("x", "train.batch_size=64")
    assert estimate_bytes(tiny_config(), wide) > tiny
