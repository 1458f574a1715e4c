"""The lock on a run directory: one server, and none left behind by a killed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from samv2.common.errors import CheckpointError, ModelError
from samv2.federated.lora_run import run_lora
from samv2.federated.run_folder import open_run
from samv2.federated.run_lock import LOCK, sole_server
from samv2.federated.server_app import run_embedded
from tests.federated.runs import quiet, small_settings

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""

SERVE = """
import subprocess, sys, time
from pathlib import Path
from samv2.federated.run_lock import sole_server
with sole_server(Path(sys.argv[1]), wait=0.0):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
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


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("method", ["sam-v2", "fedit"])
def test_a_run_in_use_is_left_alone_at_once(
    tmp_path: Path, method: str, flags: dict[str, bool]
) -> None:
    settings = small_settings("no-model")
    run = open_run(tmp_path, settings, resume=False, overwrite=False)
    run.prepared.write_text("{}")
    run.spool.mkdir()
    (run.spool / "client_000000.bin").write_bytes(b"of the round that goes on")
    (tmp_path / ".metrics.jsonl-ab12cd34").write_text("half written")
    with holder(tmp_path) as other:
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(
            CheckpointError, match="in use by.*another folder"
        ) as caught:
            if method == "sam-v2":
                run_embedded(settings, tmp_path, console=quiet(), **flags)
            else:
                run_lora(settings, tmp_path, method=method, console=quiet(), **flags)
        other.kill()
    assert str(tmp_path) in str(caught.value)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before


def test_a_grids_run_waits_for_a_worker_that_is_ending(tmp_path: Path) -> None:
    settings = small_settings("no-model")
    with holder(tmp_path) as other:
        threading.Timer(0.5, other.kill).start()
        with pytest.raises(ModelError, match="no-model"):
            run_embedded(settings, tmp_path, wait=30.0, console=quiet())


def test_a_worker_does_not_keep_the_lock_of_a_killed_server(tmp_path: Path) -> None:
    """A process that the server started lives on for a while."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        child = int(server.stdout.readline())
        try:
            server.kill()
            server.wait()
            with sole_server(tmp_path, wait=0.0):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_the_directory_is_made_and_free_again_after_an_error(tmp_path: Path) -> None:
    root = tmp_path / "new" / "run"
    with pytest.raises(ValueError):
        with sole_server(root, wait=0.0):
            raise ValueError
    with sole_server(root, wait=0.0):
        pass
