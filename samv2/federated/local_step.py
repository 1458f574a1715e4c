"""Local training on one client: pure PyTorch, no framework.

Shapes: B windows a step, S tokens a window.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from samv2.common.callbacks import (
    CallbackList,
    LossHistory,
    StepReport,
    StopOnNonFinite,
    TrainerCallback,
)
from samv2.common.errors import FederationError
from samv2.common.settings import TrainSettings
from samv2.data.tokens import sample_batch
from samv2.experts.moe_layers import WalkOptions
from samv2.federated.moments import Moments, give_moments, take_moments
from samv2.federated.usage import EdgeCounts, UsageCounter
from samv2.models.expert_model import ExpertModel
from samv2.models.perplexity import next_token_loss


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What a client's training found."""

    counts: EdgeCounts
    mean_loss: float
    """Mean training loss of the round, nats."""
    first_loss: float
    last_loss: float
    examples: int
    """Windows trained on."""
    tokens: int
    moments: Moments | None
    """The optimiser's, if they are kept."""
    seconds: float


def local_step(
    model: ExpertModel,
    train_stream: Tensor,
    settings: TrainSettings,
    *,
    seed: int,
    temperature: float,
    siblings: tuple[int, ...] | None = None,
    count_usage: bool = True,
    moments: Moments | None = None,
    micro_batch: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
) -> LocalResult:
    """Train the model's trainable parameters in place on one client's text.

    Args:
        model: with the round's parameters and graph.
        train_stream: (N,) token ids of the client.
        settings: steps, batch, learning rate and what is trained.
        seed: of the batches and of the assembler's noise; derive it from run, round and
            client, so that a round can be repeated.
        temperature: of the assembler's soft mask.
        siblings: adapter siblings that take part and are trained; None: all.
        count_usage: whether walks are recorded, which costs time.
        moments: the optimiser's, of the client's rounds before; None: it starts anew.
        micro_batch: windows that pass at once, whose gradients add up to the batch's; 0:
            all of them.
        callbacks: see every step; any of them may end the training early.

    Returns:
        Losses, counts of walked edges (zero where they are not counted), sizes, and the
        optimiser's moments where ``settings.keep_optimizer`` asks for them.

    Raises:
        FederationError: the loss became infinite or not a number.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + 1)
    usage = UsageCounter(model.graph, model.device)
    history, finite = LossHistory(), StopOnNonFinite()
    watchers = CallbackList([history, finite, *callbacks])
    parameters = _select_parameters(model, settings)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=0.0
    )
    if moments is not None:
        give_moments(optimizer, model, moments)
    options = WalkOptions(
        temperature=temperature,
        generator=noise,
        recorder=usage if count_usage else None,
        siblings=siblings,
    )
    watchers.on_train_begin(settings.local_steps)
    with _training_mode(model):
        for step in range(1, settings.local_steps + 1):
            begin = time.perf_counter()
            batch_BS = sample_batch(
                train_stream, settings.batch_size, settings.sequence_length, generator
            )
            optimizer.zero_grad()
            loss = _add_gradients(model, batch_BS, options, micro_batch)
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            report = StepReport(
                step=step,
                steps=settings.local_steps,
                loss=loss,
                learning_rate=settings.learning_rate,
                tokens=batch_BS.numel(),
                seconds=time.perf_counter() - begin,
            )
            if watchers.on_step_end(report):
                break
    watchers.on_train_end(history.reports[-1])
    if finite.stopped_at is not None:
        raise FederationError(
            f"the training loss is {history.losses[-1]} at step {finite.stopped_at}; "
            "lower train.learning_rate"
        )
    return LocalResult(
        counts=usage.counts,
        mean_loss=history.mean_loss,
        first_loss=history.losses[0],
        last_loss=history.losses[-1],
        examples=len(history.reports) * settings.batch_size,
        tokens=sum(report.tokens for report in history.reports),
        moments=take_moments(optimizer, model) if settings.keep_optimizer else None,
        seconds=time.perf_counter() - start,
    )


def _add_gradients(
    model: ExpertModel, batch_BS: Tensor, options: WalkOptions, micro_batch: int
) -> float:
    """Backward passes over a batch, so many windows at a time; returns its mean loss."""
    total = 0.0
    for part_BS in batch_BS.split(micro_batch or len(batch_BS)):
        share = len(part_BS) / len(batch_BS)
        loss = next_token_loss(model, part_BS, options) * share
        loss.backward()
        total += float(loss.detach())
    return total


@contextmanager
def _training_mode(model: ExpertModel) -> Iterator[None]:
    """Training mode inside, evaluation mode after, also where training fails."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def _select_parameters(
    model: ExpertModel, settings: TrainSettings
) -> list[torch.nn.Parameter]:
    """Turn gradients on for what the settings train, off for the rest."""
    model.freeze_base()
    for layer in model.expert_layers:
        layer.gate_weight_ED.requires_grad_(settings.train_gate)
        layer.gate_bias_E.requires_grad_(settings.train_gate)
        layer.mix_E.requires_grad_(settings.train_mix)
        layer.edge_strength_EE.requires_grad_(layer.chains)
    if model.assembler is not None:
        model.assembler.requires_grad_(settings.train_assembler)
    return [item for item in model.trainable_parameters() if item.requires_grad]
