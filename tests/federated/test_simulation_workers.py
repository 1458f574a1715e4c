"""Workers of Flower's simulation: restarted where the engine is the known one."""

from __future__ import annotations

import importlib
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from samv2.common.telemetry import read_metrics
from samv2.federated import simulation_workers
from samv2.federated.server_app import run_embedded
from samv2.federated.simulation_workers import ENGINE, revive_workers
from tests.federated.runs import (
    assert_same_bits,
    checkpoint_tensors,
    quiet,
    small_settings,
)
from tests.federated.test_flower_app import (
    simulation_command,
    simulation_environment,
    started_with,
)

ROUNDS = 4


def test_outside_a_simulation_nothing_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(__import__("sys").modules, ENGINE, raising=False)
    assert not revive_workers()


def test_workers_restart_and_another_flwr_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    importlib.import_module(ENGINE)
    backend = importlib.import_module(
        "flwr.server.superlink.fleet.vce.backend.raybackend"
    )
    flowers_own = backend.ClientAppActor
    monkeypatch.setattr(backend, "ClientAppActor", flowers_own)
    monkeypatch.setattr(simulation_workers, "version", lambda name: "1.42.0")
    assert not revive_workers()
    assert backend.ClientAppActor is flowers_own
    assert "flwr is 1.42.0, known is 1.41.x" in caplog.text
    monkeypatch.setattr(simulation_workers, "version", lambda name: "1.41.0")
    assert revive_workers()
    options = backend.ClientAppActor._default_options
    assert options["max_restarts"] == -1 and options["max_task_retries"] == 1
    monkeypatch.delattr(backend, "ClientAppActor")
    assert not revive_workers()


def workers_of(home: Path) -> list[psutil.Process]:
    """Ray's processes that hold a worker of the simulation in ``home``."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            name = " ".join(process.info["cmdline"] or [])
            ours = process.environ().get("FLWR_HOME") == str(home)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if ours and name.startswith("ray::RevivedActor"):
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.faults
def test_rounds_stay_whole_when_a_worker_is_killed(
    expert_folder: Path, tmp_path: Path
) -> None:
    settings = small_settings(
        expert_folder, f"federation.rounds={ROUNDS}", "federation.min_replies=2"
    )
    logs, home = tmp_path / "logs", tmp_path / "flwr"
    running = subprocess.Popen(
        simulation_command(logs, settings),
        env=simulation_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 900
        while not read_metrics(logs):
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        victim = workers_of(home)[0]
        victim.send_signal(signal.SIGKILL)
        output, _ = running.communicate(timeout=900)
    finally:
        running.terminate()
        running.wait(90)
    assert running.returncode == 0, output
    rows = read_metrics(logs)
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert [row["clients"] for row in rows] == [2] * ROUNDS
    assert started_with(str(home)) == []
    embedded = tmp_path / "embedded"
    run_embedded(settings, embedded, console=quiet())
    assert_same_bits(
        checkpoint_tensors(logs, ROUNDS), checkpoint_tensors(embedded, ROUNDS)
    )
