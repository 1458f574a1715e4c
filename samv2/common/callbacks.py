"""What may watch and stop local training: one report a step, callbacks that read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samv2.common.errors import DataError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What is known after one optimiser step."""

    step: int
    """Number of the step, from 1."""
    steps: int
    """Steps planned in all."""
    loss: float
    """Mean loss of the step's tokens, in nats."""
    learning_rate: float
    """Learning rate of the step."""
    tokens: int
    """Tokens of the step's batch."""
    seconds: float
    """Wall time of the step."""


class TrainerCallback:
    """Base of all callbacks; every method may be overridden, none needs to be."""

    def on_train_begin(self, steps: int) -> None:
        """Called before the first step; ``steps`` are planned."""

    def on_step_end(self, report: StepReport) -> bool:
        """Called after every step; True asks the trainer to stop."""
        return False

    def on_train_end(self, last: StepReport | None) -> None:
        """Called once at the end, also after a stop; None if no step was made."""


class CallbackList(TrainerCallback):
    """Several callbacks as one; all of them see every report.

    Args:
        callbacks: called in this order.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback] = ()) -> None:
        self.callbacks = tuple(callbacks)

    def on_train_begin(self, steps: int) -> None:
        """Tell all callbacks."""
        for callback in self.callbacks:
            callback.on_train_begin(steps)

    def on_step_end(self, report: StepReport) -> bool:
        """Tell all callbacks; True if any of them asks to stop."""
        return any([callback.on_step_end(report) for callback in self.callbacks])

    def on_train_end(self, last: StepReport | None) -> None:
        """Tell all callbacks."""
        for callback in self.callbacks:
            callback.on_train_end(last)


class LossHistory(TrainerCallback):
    """Keeps every report of the current training."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_train_begin(self, steps: int) -> None:
        """Forget the training before."""
        self.reports = []

    def on_step_end(self, report: StepReport) -> bool:
        """Keep the report; never stop."""
        self.reports.append(report)
        return False

    @property
    def losses(self) -> list[float]:
        """Loss of every step, in nats."""
        return [report.loss for report in self.reports]

    @property
    def mean_loss(self) -> float:
        """Mean loss weighted by tokens, in nats; NaN before the first step."""
        tokens = sum(report.tokens for report in self.reports)
        if not tokens:
            return math.nan
        return sum(report.loss * report.tokens for report in self.reports) / tokens


class StopOnNonFinite(TrainerCallback):
    """Stops when a loss is infinite or not a number; ``stopped_at`` is that step."""

    def __init__(self) -> None:
        self.stopped_at: int | None = None

    def on_train_begin(self, steps: int) -> None:
        """Forget the training before."""
        self.stopped_at = None

    def on_step_end(self, report: StepReport) -> bool:
        """Ask to stop at a loss that is not finite."""
        if math.isfinite(report.loss):
            return False
        self.stopped_at = self.stopped_at or report.step
        return True


class EarlyStopping(TrainerCallback):
    """Stops when the loss has not improved for some steps.

    Args:
        patience: steps without an improvement after which to stop, at least 1.
        min_delta: an improvement is a loss below the best one by more than this, in
            nats.

    Raises:
        DataError: ``patience`` below 1 or a negative ``min_delta``.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1 or not min_delta >= 0:
            raise DataError(
                f"Early stopping has patience {patience} and min_delta {min_delta}: "
                "give a patience of 1 or more and a min_delta of 0 or more."
            )
        self.patience = patience
        self.min_delta = min_delta
        self.on_train_begin(0)

    def on_train_begin(self, steps: int) -> None:
        """Forget the training before."""
        self.best = math.inf
        self.steps_without_gain = 0

    def on_step_end(self, report: StepReport) -> bool:
        """Ask to stop once the patience is used up; NaN never improves."""
        if report.loss < self.best - self.min_delta:
            self.best = report.loss
            self.steps_without_gain = 0
        else:
            self.steps_without_gain += 1
        return self.steps_without_gain >= self.patience


class StepProgress(TrainerCallback):
    """Shows the steps as one task of a Rich progress display.

    Args:
        progress: a display that the caller starts and stops.
        description: text before the bar; the loss is added to it.
    """

    def __init__(self, progress: Progress, description: str = "training") -> None:
        self.progress = progress
        self.description = description
        self._task: TaskID | None = None

    def on_train_begin(self, steps: int) -> None:
        """Add the task."""
        self._task = self.progress.add_task(self.description, total=steps)

    def on_step_end(self, report: StepReport) -> bool:
        """Advance the task; never stop."""
        if self._task is not None:
            text = f"{self.description} loss {report.loss:.3f}"
            self.progress.update(self._task, completed=report.step, description=text)
        return False

    def on_train_end(self, last: StepReport | None) -> None:
        """Close the task."""
        if self._task is not None:
            self.progress.stop_task(self._task)
            self._task = None
