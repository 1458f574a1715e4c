"""Processes that run the jobs of a grid, and how many of them fit this machine."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from samv2.common.settings import Settings

PROCESS_BYTES = 900_000_000
"""Interpreter and libraries of one worker."""
SHARE_OF_FREE = 0.8
"""Of the memory that is available, what a grid may take."""


class Worker:
    """A process that serves jobs; started anew when it died.

    Args:
        log: file that its output is appended to.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, job: Mapping[str, Any]) -> str | None:
        """Do one job and wait for it; returns the error, or None."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line).get("error")
        status = process.wait()
        self.close()
        cause = " (out of memory?)" if status == -9 else ""
        return f"the process ended with status {status}{cause}; see {self._log}"

    def kill(self) -> None:
        """End the process, also in the middle of a job, which then has failed."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Let go of a process that does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(OSError):  # a line that nobody reads any more
                stream.close()

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "samv2.ablation.job"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, **_environment()},
            )


def _environment() -> dict[str, str]:
    """One thread everywhere, and this process's import path."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    paths = os.pathsep.join(path for path in sys.path if path)
    return {"PYTHONPATH": paths, **dict.fromkeys(threads, "1")}


class Pool:
    """Some workers, each taken for one job at a time.

    Args:
        size: how many.
        folder: where their logs go.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._all = [Worker(folder / f"worker-{n + 1}.log") for n in range(size)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._all:
            self._idle.put(worker)

    def __call__(self, job: Mapping[str, Any]) -> str | None:
        """Do one job on an idle worker; returns the error, or None."""
        worker = self._idle.get()
        try:
            return worker(job)
        finally:
            self._idle.put(worker)

    def kill(self) -> None:
        """End all processes; jobs that they were at fail."""
        for worker in self._all:
            worker.kill()

    def close(self) -> None:
        """Let go of all processes, when no job is left."""
        for worker in self._all:
            worker.close()


def estimate_bytes(dense: PretrainedConfig, settings: Settings) -> int:
    """About the most memory that one run takes, its conversion included.

    Process, weights twice (the model, and a layer's products while it is converted),
    logits and their gradients, and what a training step or the calibration keeps of
    every token.

    Args:
        dense: config of the dense model.
        settings: of the run.
    """
    size = 2 if settings.model.dtype == "bfloat16" else 4
    width, rows = dense.hidden_size, dense.intermediate_size
    layers, vocabulary = dense.num_hidden_layers, dense.vocab_size
    weights = layers * (3 * width * rows + 4 * width * width) + vocabulary * width
    tokens = settings.train.batch_size * settings.train.sequence_length
    training = tokens * (3 * 4 * vocabulary + size * layers * (8 * width + 4 * rows))
    streams = 2 + len({settings.experts.experts_per_token, *settings.experts.other_k})
    calibration = settings.experts.calibration_tokens * 4 * (streams * width + 3 * rows)
    return int(PROCESS_BYTES + 2 * size * weights + max(training, calibration))


def fitting_jobs(asked: int, tasks: int, each_bytes: int) -> int:
    """How many jobs to run side by side.

    Args:
        asked: what the user wants; 0 takes as many as cores and memory allow.
        tasks: runs of the grid.
        each_bytes: memory of one.
    """
    if asked:
        return min(asked, max(1, tasks))
    cores = len(os.sched_getaffinity(0))
    room = int(SHARE_OF_FREE * available_bytes() / each_bytes)
    return max(1, min(cores, tasks, room))


def available_bytes(
    proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Memory that can be taken without swapping, by the kernel and the container."""
    free = _meminfo(proc / "meminfo")
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return free  # no container, or no limit ("max")
    return max(0, min(free, limit - used))


def _meminfo(path: Path) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError(f"{path} has no MemAvailable")
