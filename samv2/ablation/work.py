"""What a grid still has to do: conversions, the runs that wait for them, their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from samv2.ablation.job import LOG, RESULT
from samv2.ablation.plan import TRAINABLE, PlannedRun, as_job, short_hash
from samv2.ablation.progress import GridProgress
from samv2.ablation.results import CSV, read_result, result_row, write_csv
from samv2.ablation.workers import Pool
from samv2.common.config import to_flat
from samv2.federated.run_folder import RunFolder
from samv2.models.save import conversion_settings, is_expert_model


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job of a worker."""

    name: str
    job: dict[str, Any]
    runs: tuple[PlannedRun, ...]
    """The run itself, or those that wait for this conversion."""

    @property
    def converts(self) -> bool:
        """Whether it makes a model rather than running one."""
        return self.job["kind"] == "convert"


class GridWork:
    """The jobs of a grid.

    Args:
        root: its directory, absolute.
        runs: all of them.
        recheck: look at finished ones again.
    """

    def __init__(
        self, root: Path, runs: Sequence[PlannedRun], *, recheck: bool
    ) -> None:
        self.root, self.runs = root, runs
        self.left = [
            run for run in runs if recheck or read_result(self.folder(run)) is None
        ]
        left = {run.name for run in self.left}
        self._ended: dict[str, str | None] = {
            run.name: None for run in runs if run.name not in left
        }
        """By run: the error, or None where it finished."""

    def folder(self, run: PlannedRun) -> Path:
        """A run's directory."""
        return self.root / "runs" / run.name

    def run(self, size: int, console: Console) -> list[dict[str, Any]]:
        """Do what is left, ``size`` jobs at a time; returns the rows of all runs."""
        self._write()
        if not self.left:
            return self._rows()
        pool, executor = Pool(size, self.root), ThreadPoolExecutor(size)
        rounds = {run.name: run.settings.federation.rounds for run in self.left}
        progress = GridProgress(console, rounds, self.root / "runs")
        going: dict[Future[str | None], Task] = {}

        def do(task: Task) -> str | None:
            progress.begin(task.name)
            return pool(task.job)

        def submit(task: Task) -> None:
            going[executor.submit(do, task)] = task

        try:
            with progress:
                for task in self._first():
                    submit(task)
                while going:
                    done, _ = wait(going, timeout=1.0, return_when=FIRST_COMPLETED)
                    progress.refresh()
                    for future in done:
                        task = going.pop(future)
                        for follower in self._after(task, future.result(), progress):
                            submit(follower)
        finally:
            pool.kill()
            executor.shutdown(cancel_futures=True)
            pool.close()
        return self._rows()

    def _first(self) -> Iterator[Task]:
        """Conversions that are missing, then runs that need none."""
        waiting: dict[str, list[PlannedRun]] = {}
        for run in self.left:
            if not self._is_ready(run):
                waiting.setdefault(run.conversion, []).append(run)
        for runs in waiting.values():
            yield self._conversion(runs)
        held = {run.name for runs in waiting.values() for run in runs}
        yield from (self._task(run) for run in self.left if run.name not in held)

    def _after(
        self, task: Task, error: str | None, progress: GridProgress
    ) -> Iterator[Task]:
        """Note what came of a task; what can begin now."""
        progress.end(task.name)
        if task.converts and error is None:
            yield from (self._task(run) for run in task.runs)
            return
        for run in task.runs:
            text = f"its {task.name} failed: {error}" if task.converts else error
            if text is None and read_result(self.folder(run)) is None:
                text = f"the run ended without {RESULT}; see {LOG} in its folder"
            self._ended[run.name] = text
            row = result_row(run, self.folder(run), text)
            progress.tell(row, len(self._ended), len(self.runs))
        self._write()

    def _conversion(self, runs: Sequence[PlannedRun]) -> Task:
        """The conversion that these runs share, with a folder for each's trainables."""
        first = runs[0]
        home = self._home(first)
        base = self._base(first)
        settings, trainables = None, first.trainables
        if base is None:
            base = home.model
            settings = to_flat(first.settings)
        else:
            trainables = _stored_trainables(base)
        variants = {
            str(self._variant(run)): {
                TRAINABLE[key]: value for key, value in run.trainables.items()
            }
            for run in runs
            if run.trainables != trainables
        }
        job = {
            "kind": "convert",
            "root": str(home.root),
            "model": str(base),
            "settings": settings,
            "variants": variants,
            "dense": str(self._dense(first)),
        }
        name = f"conversion {first.conversion}"
        return Task(name=name, job=job, runs=tuple(runs))

    def _task(self, run: PlannedRun) -> Task:
        """The run itself, once its model is there."""
        folder, model = self.folder(run), self._model(run)
        (folder / RESULT).unlink(missing_ok=True)
        settings = to_flat(as_job(run.settings, model=str(model)))
        # Only the function-preserving combine has surrogates, whatever was asked for.
        stored = conversion_settings(model)
        settings["experts.surrogate_rank"] = stored["experts.surrogate_rank"]
        job = {
            "kind": "run",
            "root": str(folder),
            "settings": settings,
            "source": to_flat(run.settings),
            "dense": str(self._dense(run)),
        }
        return Task(name=run.name, job=job, runs=(run,))

    def _is_ready(self, run: PlannedRun) -> bool:
        return self._base(run) is not None and is_expert_model(self._model(run))

    def _model(self, run: PlannedRun) -> Path:
        """The folder that a run starts from."""
        base = self._base(run)
        if base is not None and _stored_trainables(base) == run.trainables:
            return base
        return self._variant(run)

    def _base(self, run: PlannedRun) -> Path | None:
        """The conversion that a run shares, once it is there."""
        given = Path(run.settings.model.path)
        if is_expert_model(given):
            return given
        home = self._home(run)
        return home.model if home.prepared.is_file() else None

    def _home(self, run: PlannedRun) -> RunFolder:
        return RunFolder(root=self.root / "models" / run.conversion)

    def _variant(self, run: PlannedRun) -> Path:
        return self._home(run).root / f"variant-{short_hash(run.trainables)}"

    def _dense(self, run: PlannedRun) -> Path:
        return self.root / "dense" / f"{run.text}.json"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            result_row(run, self.folder(run), self._ended[run.name])
            for run in self.runs
            if run.name in self._ended
        ]

    def _write(self) -> None:
        write_csv(self.root / CSV, self._rows())


def _stored_trainables(folder: Path) -> dict[str, Any]:
    stored = conversion_settings(folder)
    return {key: stored[key] for key in TRAINABLE}
