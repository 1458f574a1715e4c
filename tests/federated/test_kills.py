"""A server killed at any moment: resumed, it ends in the bits of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save

from samv2.common.settings import Settings
from samv2.common.telemetry import read_metrics
from samv2.federated.server_app import run_embedded
from tests.federated.runs import quiet, small_settings

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ROUNDS = 5
KILLS = 24
SEED = 20
PREPARING, GOING = 600_000, 300_000
"""Calls and returns of functions within which a start is killed: in a new directory, and
in one that is prepared (a resume takes about 140,000, a round about 70,000 more)."""
OPTIONS = (
    f"federation.rounds={ROUNDS}",
    "federation.eval_windows=1",
    "federation.update_budget_bytes=8192",
    "train.local_steps=1",
    "train.batch_size=2",
    "train.sequence_length=32",
    "train.learning_rate=3e-3",
    "edits.cooldown=0",
    "federation.keep_frames=true",
)


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, expert_folder: Path
) -> tuple[Settings, Path]:
    """An uninterrupted run."""
    root = tmp_path_factory.mktemp("uninterrupted")
    settings = small_settings(expert_folder, *OPTIONS)
    run_embedded(settings, root, console=quiet())
    rows = read_metrics(root)
    assert sum(row["edits"] for row in rows) > 0
    return settings, root


def forked(work: Callable[[], Any]) -> int:
    """Do something in a copy of this process; returns its process id."""
    process = os.fork()
    if process:
        return process
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def outcome(process: int) -> int:
    """0 for work that ended, -9 for one that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def go_on(settings: Settings, root: Path) -> None:
    """Start or resume the run."""
    resume = (root / "config.toml").exists()
    run_embedded(settings, root, console=quiet(), resume=resume)


def killed_at_event(moment: int, work: Callable[[], Any]) -> Callable[[], Any]:
    """Work that SIGKILL ends after so many calls and returns of functions.

    Counting events, not seconds, makes a moment the same on a busy machine.
    """

    def run() -> None:
        left = [moment]

        def count(frame: Any, event: str, argument: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                die()

        sys.setprofile(count)
        work()

    return run


def killed_at_call(
    name: str, number: int, after: bool, work: Callable[[], Any]
) -> Callable[[], Any]:
    """Work that SIGKILL ends before or after a call of a function of ``os``."""

    def run() -> None:
        real, left = getattr(os, name), [number]

        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                die()
            found = real(*args, **kwargs)
            if left[0] == 0:
                die()
            return found

        setattr(os, name, counted)
        work()

    return run


def die() -> None:
    """What a killed server does."""
    os.kill(os.getpid(), signal.SIGKILL)


def without_seconds(value: Any) -> Any:
    """JSON without what time it took."""
    if isinstance(value, dict):
        kept = value.keys() - {"seconds", "waited"}
        return {key: without_seconds(value[key]) for key in sorted(kept)}
    if isinstance(value, list):
        return [without_seconds(item) for item in value]
    return value


def contents(root: Path) -> dict[str, Any]:
    """Everything a run left that must not depend on kills."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or name.startswith("tensorboard/"):
            continue
        if name == "log.jsonl":  # a log tells of every start
            continue
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [without_seconds(row) for row in rows]
        elif path.suffix == ".safetensors":  # its header has no order of its own
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
                found[name] = (save(tensors), file.metadata())
        elif path.suffix == ".json":
            found[name] = without_seconds(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


class Killer:
    """Kills starts of a run in directories of a folder until enough were killed."""

    def __init__(self, reference: tuple[Settings, Path], folder: Path) -> None:
        self.settings, self.uninterrupted = reference
        self.folder = folder
        self.killed = self.ended = 0

    @property
    def root(self) -> Path:
        """The directory in use; a new one after each run that has ended."""
        return self.folder / f"run{self.ended}"

    def start(self, kill: Callable[[Callable[[], Any]], Callable[[], Any]]) -> None:
        """Start or resume the run with a kill to come."""
        settings, root = self.settings, self.root
        code = outcome(forked(kill(lambda: go_on(settings, root))))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            self.compare()
        else:
            self.killed += 1

    def compare(self) -> None:
        """The run that has ended is the one that was not interrupted."""
        ours, theirs = contents(self.root), contents(self.uninterrupted)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
        self.ended += 1

    def finish(self) -> None:
        """Let the run end."""
        if self.root.exists():
            go_on(self.settings, self.root)
            self.compare()


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(
    reference: tuple[Settings, Path], tmp_path: Path
) -> None:
    draws = np.random.default_rng(SEED)
    killer = Killer(reference, tmp_path)
    while killer.killed < KILLS:
        prepared = (killer.root / "prepared.json").exists()
        moment = int(draws.integers(GOING if prepared else PREPARING))
        killer.start(partial(killed_at_event, 1 + moment))
    killer.finish()
    assert killer.ended >= 1


def test_a_run_killed_while_it_writes_ends_in_the_same_bits(
    reference: tuple[Settings, Path], tmp_path: Path
) -> None:
    """Around renames, flushes and removals: in checkpoints, states and logs."""
    draws = np.random.default_rng(SEED)
    killer = Killer(reference, tmp_path)
    shutil.copytree(reference[1], killer.root)
    for path in (killer.root / "checkpoints").iterdir():
        shutil.rmtree(path)
    for name in ("replace", "fsync", "unlink", "rmdir"):
        for after in (False, True):
            number = int(draws.integers(1, 14))
            killer.start(partial(killed_at_call, name, number, after))
    assert killer.killed >= 6
    killer.finish()
