"""The lock on a run directory: one server, and none left behind by a killed one."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from samv2.common.errors import CheckpointError
from samv2.federated.run_lock import LOCK, sole_server

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def holder(root: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    started = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, str(root / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None and started.stdout.readline() == "held\n"
    return started


def test_a_second_server_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        with pytest.raises(CheckpointError, match="in use by another server"):
            with sole_server(tmp_path, wait=0.0):
                raise AssertionError("two servers in one directory")
        other.kill()
        other.wait()
        with sole_server(tmp_path, wait=0.0):
            pass


def test_a_server_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        threading.Timer(0.2, other.kill).start()
        with sole_server(tmp_path, wait=30.0):
            assert other.wait(1) != 0


def test_the_directory_is_made_and_free_again_after_an_error(tmp_path: Path) -> None:
    root = tmp_path / "new" / "run"
    with pytest.raises(ValueError):
        with sole_server(root, wait=0.0):
            raise ValueError
    with sole_server(root, wait=0.0):
        pass
