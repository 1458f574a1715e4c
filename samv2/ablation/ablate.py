"""A grid from start to end: plan -> conversions -> runs -> rows -> effects.

DIR/grid.toml          the grid, as a file that `samv2 ablate --config` reads
DIR/ablation.csv       one row a run, replaced whole after each
DIR/models/ID/         a conversion, as a prepared run directory; its variants
DIR/dense/ID.json      the dense model's perplexity on one division of the text
DIR/runs/NAME/         a run directory each, with its figures in ablation.json
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from samv2.ablation.factors import Factor, read_factors
from samv2.ablation.grid_file import GridFile, to_grid_toml
from samv2.ablation.plan import PlannedRun, dense_config, plan_runs
from samv2.ablation.results import DONE, FAILED, effects
from samv2.ablation.work import GridWork
from samv2.ablation.workers import estimate_bytes, fitting_jobs
from samv2.common.errors import CheckpointError, ConfigError
from samv2.common.files import write_bytes
from samv2.federated.run_folder import is_run


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What a grid left."""

    factors: list[Factor]
    runs: list[PlannedRun]
    rows: list[dict[str, Any]]
    """Of ``ablation.csv``, in the order of ``runs``."""
    effects: list[dict[str, Any]]

    @property
    def sound(self) -> bool:
        """Whether every run finished and kept every bound."""
        return all(row["status"] == DONE for row in self.rows)


def ablate(
    grid: GridFile,
    root: Path,
    *,
    jobs: int = 0,
    recheck: bool = False,
    console: Console,
) -> Ablation:
    """Run what is left of a grid, and write its table.

    Args:
        grid: what to run.
        root: directory of the grid; runs that finished there are not run again.
        jobs: runs side by side, one thread each; 0 takes what cores and memory allow.
        recheck: check the bounds of finished runs again, on the files they have now.
        console: where progress is shown.

    Raises:
        ConfigError: combinations that cannot run, all of them, before any starts.
        CheckpointError: the directory is a run's, or another process works in it.
    """
    if jobs < 0:
        raise ConfigError([f"--jobs is {jobs}; use 1 or more, or 0 to let it choose"])
    grid = _anywhere(grid)
    factors = read_factors(grid.vary, grid.values)
    runs = plan_runs(grid.values, factors, one_at_a_time=grid.one_at_a_time)
    root = root.resolve()
    if is_run(root):
        raise CheckpointError(f"{root} is a run; choose another --log-dir for the grid")
    with _alone(root):
        write_bytes(root / "grid.toml", to_grid_toml(grid).encode())
        work = GridWork(root, runs, recheck=recheck)
        each = max(estimate_bytes(dense_config(r.settings), r.settings) for r in runs)
        size = fitting_jobs(jobs, len(work.left), each)
        console.print(
            f"{len(runs)} runs, {len(runs) - len(work.left)} of them done before; "
            f"{size} at a time, about {each / 1e9:.1f} GB each at most."
        )
        rows = work.run(size, console)
    finished = {row["name"]: row for row in rows if row["status"] != FAILED}
    return Ablation(
        factors=factors,
        runs=runs,
        rows=rows,
        effects=effects(factors, runs, finished),
    )


def _anywhere(grid: GridFile) -> GridFile:
    """The grid with a model's path that holds from any working directory."""
    given = str(grid.values.get("model.path", "smollm2"))
    folder = Path(given).expanduser()
    if given == "smollm2" or not folder.exists():
        return grid
    return replace(grid, values=grid.values | {"model.path": str(folder.resolve())})


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold a grid's directory against a second process.

    Raises:
        CheckpointError: another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"another `samv2 ablate` works in {root}; wait for it, or choose another "
                "--log-dir"
            ) from None
        yield
