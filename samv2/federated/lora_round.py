"""One round of a LoRA baseline on a client: adapters in, adapters out; no framework.

A client draws the batches that it would draw in a SAM-v2 run with the same settings:
same seeds, same windows, same order.

Shapes: B windows a step, S tokens a window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from samv2.common.devices import take_device
from samv2.common.errors import FederationError
from samv2.common.quiet import no_progress_bars
from samv2.common.settings import Settings, TrainSettings
from samv2.data.shards import load_client
from samv2.data.tokens import sample_batch
from samv2.federated.client_round import round_seed
from samv2.federated.heldout import heldout_windows, score_domains
from samv2.federated.lora_memory import load_memory, save_memory
from samv2.federated.lora_methods import METHODS, LoraMethod
from samv2.models.llama_loader import DTYPES, load_llama
from samv2.models.lora import add_lora, lora_parameters, read_lora, write_lora
from samv2.models.perplexity import Score, next_token_loss

POOLED = "pooled"
"""Folder of the one adapter of a pooled method."""


@dataclass(frozen=True, kw_only=True)
class LoraPlace:
    """Where a client process finds its text and keeps its memory."""

    shards: Path
    """Folder with the clients' shards."""
    states: Path
    """Folder for adapters and optimisers that stay with the clients."""
    settings: Settings
    method: str
    """A key of :data:`METHODS`."""


@dataclass(frozen=True, kw_only=True)
class LoraRuntime:
    """What a client process holds; one runtime serves many clients in turn."""

    place: LoraPlace
    model: PreTrainedModel
    start: dict[str, Tensor]
    """The adapters before any training."""

    @property
    def method(self) -> LoraMethod:
        """How adapters are trained."""
        return METHODS[self.place.method]


@dataclass(frozen=True, kw_only=True)
class LoraResult:
    """What a client's round gave."""

    adapters: dict[str, Tensor]
    """Trained adapters to send; empty where they stay."""
    mean_loss: float
    """Nats."""
    examples: int
    """Windows trained on."""
    tokens: int
    seconds: float


def load_lora_runtime(place: LoraPlace) -> LoraRuntime:
    """Load the dense model and put the method's adapters on it.

    Raises:
        ConfigError: ``train.device`` names a GPU that is not there.
    """
    settings = place.settings
    device = take_device(settings.train.device)
    with no_progress_bars():
        loaded = load_llama(settings.model.path, dtype=DTYPES[settings.model.dtype])
    add_lora(
        loaded.model,
        rank=settings.adapter.rank,
        scale=settings.adapter.scale,
        seed=settings.seed,
        train_a=METHODS[place.method].train_a,
    )
    loaded.model.to(device)
    return LoraRuntime(place=place, model=loaded.model, start=read_lora(loaded.model))


def train_lora_round(
    runtime: LoraRuntime,
    clients: Sequence[int],
    round: int,
    adapters: Mapping[str, Tensor],
) -> LoraResult:
    """Train for one round.

    Args:
        runtime: the process's model and folders.
        clients: whose text is used; more than one for a pooled method only.
        round: from 1.
        adapters: the server's; not used where adapters stay with the clients.

    Raises:
        FederationError: the loss became infinite or not a number.
        CheckpointError: what the client kept is missing or damaged.
    """
    begin = time.perf_counter()
    place, method, model = runtime.place, runtime.method, runtime.model
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=place.settings.train.learning_rate, weight_decay=0.0
    )
    folder = memory_folder(place, clients[0])
    if method.averaged:
        write_lora(model, adapters)
    elif round > 1:
        write_lora(model, load_memory(folder, round - 1, parameters, optimizer))
    else:
        write_lora(model, runtime.start)
    losses = train_on(
        model,
        _batches(place, clients, round),
        list(parameters.values()),
        optimizer,
        place.settings.train,
    )
    if not method.averaged:
        save_memory(folder, round, parameters, optimizer)
    train = place.settings.train
    return LoraResult(
        adapters=read_lora(model) if method.averaged else {},
        mean_loss=sum(losses) / len(losses),
        examples=len(losses) * train.batch_size,
        tokens=len(losses) * train.batch_size * train.sequence_length,
        seconds=time.perf_counter() - begin,
    )


def evaluate_lora_round(
    runtime: LoraRuntime, client: int, round: int, adapters: Mapping[str, Tensor]
) -> dict[str, Score]:
    """Score the client's held-out text after ``round``, by domain.

    Args:
        runtime: the process's model and folders.
        client: from 0.
        round: 0 scores the dense model.
        adapters: the server's; not used where adapters stay with the clients.
    """
    place = runtime.place
    if not runtime.method.averaged:
        adapters = kept_adapters(runtime, client, round)
    write_lora(runtime.model, adapters)
    train = place.settings.train
    held = heldout_windows(
        [load_client(place.shards, client)],
        train.sequence_length,
        place.settings.federation.eval_windows,
    )
    return score_domains(runtime.model, held, batch_size=train.batch_size)


def kept_adapters(runtime: LoraRuntime, client: int, round: int) -> dict[str, Tensor]:
    """The adapters that stayed with a client after ``round``."""
    if round == 0:
        return runtime.start
    return load_memory(memory_folder(runtime.place, client), round, runtime.start)


def memory_folder(place: LoraPlace, client: int) -> Path:
    """Where the adapters that serve a client are kept."""
    pooled = METHODS[place.method].pooled
    return place.states / (POOLED if pooled else f"client_{client:04d}")


def train_on(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
) -> list[float]:
    """Train on (B, S) batches in place; returns the loss of every step, in nats.

    Raises:
        FederationError: a loss is infinite or not a number.
    """
    losses: list[float] = []
    model.train()
    try:
        for batch_BS in batches:
            loss = next_token_loss(model, batch_BS)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise FederationError(
                    f"the training loss is {losses[-1]} at step {len(losses)}; lower "
                    "train.learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
    finally:
        model.eval()
    return losses


def _batches(place: LoraPlace, clients: Sequence[int], round: int) -> Iterator[Tensor]:
    """Each client's batches of a round; several clients take turns, a step each."""
    settings = place.settings
    streams = [load_client(place.shards, client).train for client in clients]
    generators = [
        torch.Generator().manual_seed(round_seed(settings.seed, round, client))
        for client in clients
    ]
    train = settings.train
    for _ in range(train.local_steps):
        for stream, generator in zip(streams, generators):
            yield sample_batch(
                stream, train.batch_size, train.sequence_length, generator
            )
