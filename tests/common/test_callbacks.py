"""Callbacks: what they record and when they ask to stop."""

from __future__ import annotations

import math

import pytest
from rich.progress import Progress

from samv2.common.callbacks import (
    CallbackList,
    EarlyStopping,
    LossHistory,
    StepProgress,
    StepReport,
    StopOnNonFinite,
    TrainerCallback,
)
from samv2.common.errors import DataError


def report(step: int, loss: float, tokens: int = 8) -> StepReport:
    return StepReport(
        step=step, steps=10, loss=loss, learning_rate=0.1, tokens=tokens, seconds=0.5
    )


def run(callback: TrainerCallback, losses: list[float]) -> int:
    """Feed losses like a trainer; the number of steps made."""
    callback.on_train_begin(len(losses))
    last = None
    for step, loss in enumerate(losses, start=1):
        last = report(step, loss)
        if callback.on_step_end(last):
            break
    callback.on_train_end(last)
    return 0 if last is None else last.step


def test_the_base_never_stops() -> None:
    assert run(TrainerCallback(), [1.0, math.nan, 2.0]) == 3


def test_history_keeps_losses_of_the_last_training_only() -> None:
    history = LossHistory()
    run(history, [9.0])
    assert run(history, [2.0, 1.0]) == 2
    assert history.losses == [2.0, 1.0]


def test_mean_loss_is_weighted_by_tokens() -> None:
    history = LossHistory()
    assert math.isnan(history.mean_loss)
    history.on_step_end(report(1, 1.0, tokens=30))
    history.on_step_end(report(2, 5.0, tokens=10))
    assert history.mean_loss == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops(bad: float) -> None:
    callback = StopOnNonFinite()
    assert run(callback, [1.0, 2.0, bad, 1.0]) == 3
    assert callback.stopped_at == 3
    assert run(callback, [1.0, 2.0]) == 2
    assert callback.stopped_at is None


def test_early_stopping_waits_for_its_patience() -> None:
    assert run(EarlyStopping(2), [3.0, 2.0, 2.0, 1.0, 1.5, 1.0, 0.5]) == 6
    assert run(EarlyStopping(2), [3.0, 2.0, 1.0, 0.5]) == 4


def test_early_stopping_ignores_gains_within_min_delta() -> None:
    assert run(EarlyStopping(2, min_delta=0.5), [3.0, 2.6, 2.5, 0.0]) == 3
    assert run(EarlyStopping(2, min_delta=0.5), [3.0, 2.4, 1.8]) == 3


def test_early_stopping_counts_nan_as_no_gain_and_starts_afresh() -> None:
    callback = EarlyStopping(1)
    assert run(callback, [1.0, math.nan, 0.5]) == 2
    assert run(callback, [5.0, 4.0]) == 2


@pytest.mark.parametrize(("patience", "delta"), [(0, 0.0), (1, -1.0), (1, math.nan)])
def test_early_stopping_refuses_wrong_settings(patience: int, delta: float) -> None:
    with pytest.raises(DataError, match="patience of 1 or more"):
        EarlyStopping(patience, delta)


def test_all_callbacks_see_a_report_even_if_the_first_stops() -> None:
    history = LossHistory()
    callbacks = CallbackList([StopOnNonFinite(), history])
    assert run(callbacks, [1.0, math.inf, 3.0]) == 2
    assert history.losses == [1.0, math.inf]
    assert run(CallbackList(), [1.0]) == 1


def test_progress_shows_steps_and_loss() -> None:
    progress = Progress(disable=True)
    run(StepProgress(progress, "client 3"), [2.0, 1.25])
    (task,) = progress.tasks
    assert (task.completed, task.total) == (2, 2)
    assert task.description == "client 3 loss 1.250"
    assert task.stop_time is not None
