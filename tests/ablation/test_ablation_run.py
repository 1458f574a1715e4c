"""Whole grids: killed and continued, with runs that fail, from the command line."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from samv2.ablation.ablate import ablate
from samv2.ablation.bounds import CHECKS
from samv2.ablation.factors import parse_vary
from samv2.ablation.grid_file import read_grid
from samv2.ablation.job import RESULT, figures
from samv2.cli import main
from samv2.common.config import field_kinds, load_settings, settings_from_flat
from samv2.common.errors import CheckpointError, ConfigError
from samv2.common.files import write_json
from samv2.common.settings import Settings
from samv2.federated.server_app import run_embedded
from samv2.models.save import is_expert_model
from tests.federated.runs import (
    SMALL,
    assert_same_bits,
    checkpoint_tensors,
    quiet,
)

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_ROUND = [f"--set={item}" for item in (*SMALL, "federation.rounds=1")]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """``samv2 ablate`` in a process of its own."""
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-m", "samv2.cli", "ablate", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_after(process: subprocess.Popen[bytes], table: Path, rows: int) -> None:
    """SIGKILL when the table has so many rows; its workers must die with it."""
    deadline = time.monotonic() + 400
    while not table.is_file() or len(read(table)) < rows:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_a_killed_grid_goes_on_and_is_complete(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "grid"
    arguments = [
        *ONE_ROUND,
        f"--set=model.path={tiny_llama_folder}",
        "--vary=codec=int8,int4,bf16",
        "--vary=rank=4,2",
        "--jobs=2",
        f"--log-dir={root}",
    ]
    kill_after(start(arguments), root / "ablation.csv", 2)
    before = read(root / "ablation.csv")
    assert 2 <= len(before) < 6
    written = {
        row["name"]: (root / "runs" / row["name"] / "summary.json").stat().st_mtime_ns
        for row in before
    }
    models = [path.stat().st_mtime_ns for path in root.glob("models/*/prepared.json")]

    assert main(["ablate", *arguments]) == 0
    assert "6 runs, 0 of them failed" in capsys.readouterr().out
    rows = read(root / "ablation.csv")
    assert [(row["federation.codec"], row["adapter.rank"]) for row in rows] == [
        (codec, rank) for codec in ("int8", "int4", "bf16") for rank in ("4", "2")
    ]
    for row in rows:
        assert row["status"] == "done" and row["error"] == ""
        assert field_kinds().keys() <= row.keys()
        assert {row[name] for name in CHECKS} == {"ok"}
        figures = ("perplexity", "perplexity_start", "perplexity_dense", "train_loss")
        figures += ("perplexity.python", "bytes_up_total", "flops_fraction", "seconds")
        assert all(float(row[name]) > 0 for name in figures)
        assert row["model.path"] == str(tiny_llama_folder)
    # Finished runs were not run again, and there was one conversion for all.
    for name, stamp in written.items():
        summary = root / "runs" / name / "summary.json"
        assert summary.stat().st_mtime_ns == stamp
    again = [path.stat().st_mtime_ns for path in root.glob("models/*/prepared.json")]
    assert again == models and len(models) == 1
    variants = [path for path in root.glob("models/*/*") if is_expert_model(path)]
    assert len(variants) == 2
    assert len({row["perplexity_start"] for row in rows}) == 1
    # A killed run ended in the bits of one that was never stopped.
    last = next(row for row in rows if row["name"] not in written)
    settings = load_settings(root / "runs" / last["name"] / "config.toml")
    run_embedded(settings, tmp_path / "alone", console=quiet())
    assert_same_bits(
        checkpoint_tensors(root / "runs" / last["name"], 1),
        checkpoint_tensors(tmp_path / "alone", 1),
    )
    table = (root / "ablation.csv").read_bytes()
    # The grid that was written down is this grid: nothing is left of it.
    assert main(["ablate", f"--config={root / 'grid.toml'}", f"--log-dir={root}"]) == 0
    assert "6 of them done before" in capsys.readouterr().out
    assert (root / "ablation.csv").read_bytes() == table


def test_a_run_that_fails_is_a_row_and_a_broken_bound_a_status(
    expert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "grid"
    arguments = [
        "ablate",
        *ONE_ROUND,
        f"--set=model.path={expert_folder}",
        "--vary=federation.clients=60,2",
        "--jobs=1",
        f"--log-dir={root}",
    ]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    failed, done = read(root / "ablation.csv")
    assert failed["status"] == "failed" and "fewer clients" in failed["error"]
    assert "DataError" in failed["error"] and failed["perplexity"] == ""
    assert done["status"] == "done" and float(done["perplexity_dense"]) > 1
    assert f"{failed['name']}: failed" in shown
    assert "Traceback" in (root / "runs" / failed["name"] / "job.log").read_text()

    # The one that failed is out of the grid; the other one is tampered with.
    arguments[arguments.index("--vary=federation.clients=60,2")] = (
        "--vary=federation.clients=2"
    )
    assert main(arguments) == 0
    summary = root / "runs" / done["name"] / "summary.json"
    value = json.loads(summary.read_text())
    summary.write_text(json.dumps(value | {"ffn_flops_fraction": 0.1}))
    assert main([*arguments, "--recheck"]) == 1
    (row,) = read(root / "ablation.csv")
    assert row["status"] == "violated"
    assert "reports 0.1 of the dense" in row["check_reported_flops"]
    assert f"{row['name']}: violated" in capsys.readouterr().out


def test_impossible_grids_stop_before_anything_runs(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "grid"
    arguments = ["ablate", *ONE_ROUND, f"--set=model.path={tiny_llama_folder}"]
    arguments += ["--vary=K=2,9", "--vary=E=8,3", f"--log-dir={root}"]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    for words in ("K=9_E=8: ", "K=9_E=3: ", "K=2_E=3: ", "does not divide"):
        assert words in shown
    assert not root.exists()


def settings_grid(model: Path, *vary: str) -> Any:
    """A grid over :data:`SMALL`."""
    return read_grid(overrides=[*SMALL, f"model.path={model}"], vary=parse_vary(vary))


def test_a_directory_of_something_else(
    expert_folder: Path, kept_run: Path, tmp_path: Path
) -> None:
    grid = settings_grid(expert_folder, "codec=int8")
    with pytest.raises(CheckpointError, match="is a run; choose another --log-dir"):
        ablate(grid, kept_run, console=quiet())
    with pytest.raises(ConfigError, match="--jobs is -1"):
        ablate(grid, tmp_path, jobs=-1, console=quiet())
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another `samv2 ablate`"):
            ablate(grid, tmp_path, console=quiet())


def test_combinations_that_other_code_finds_wrong_become_rows(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that fails fails its runs, and no others."""

    class Refusing:
        """A pool whose conversions fail."""

        def __init__(self, size: int, folder: Path) -> None:
            self.jobs: list[dict[str, Any]] = []

        def __call__(self, job: dict[str, Any]) -> str | None:
            return "ModelError: no" if job["kind"] == "convert" else None

        def kill(self) -> None:
            pass

        close = kill

    monkeypatch.setattr("samv2.ablation.work.Pool", Refusing)
    found = ablate(
        settings_grid(tiny_llama_folder, "codec=int8,int4"), tmp_path, console=quiet()
    )
    assert not found.sound and found.effects == []
    assert [row["status"] for row in found.rows] == ["failed", "failed"]
    assert all("its conversion " in row["error"] for row in found.rows)


def test_settings_are_as_the_run_had_them(
    expert_folder: Path, kept_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job carries settings that a run folder accepts as its own."""
    seen: list[Settings] = []

    class Watching:
        def __init__(self, size: int, folder: Path) -> None:
            pass

        def __call__(self, job: dict[str, Any]) -> str | None:
            seen.append(settings_from_flat(job["settings"]))
            if one_has_a_result(job):
                write_json(Path(job["root"]) / RESULT, figures(kept_run, {}))
            return None

        def kill(self) -> None:
            pass

        close = kill

    monkeypatch.setattr("samv2.ablation.work.Pool", Watching)

    def one_has_a_result(job: dict[str, Any]) -> bool:
        return job["settings"]["federation.codec"] == "int8"

    grid = settings_grid(expert_folder, "codec=int8,int4")
    found = ablate(grid, tmp_path / "grid", console=quiet())
    assert [row["status"] for row in found.rows] == ["done", "failed"]
    assert "ended without ablation.json" in found.rows[1]["error"]
    assert sorted(one.federation.codec for one in seen) == ["int4", "int8"]
    for one in seen:
        assert one.model.path == str(expert_folder)
        assert one.federation.keep_frames and one.federation.workers == 1
