"""The client's half of a round: request in, reply out; no framework.

receive -> apply graph and parameters -> train -> update -> select -> pack -> reply

A client trains from the server's parameters *plus what it has not sent yet* (error
feedback in the model rather than in the update): its own model goes on as if everything
were sent, and the server's follows as the budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from samv2.common.callbacks import TrainerCallback
from samv2.common.devices import take_device
from samv2.common.errors import FederationError
from samv2.common.settings import Settings
from samv2.common.threads import small_onednn_cache
from samv2.data.shards import ClientShard, load_client
from samv2.data.tokens import windows
from samv2.experts.graph import ExpertGraph
from samv2.experts.sub_graph import SubGraph
from samv2.federated.client_state import (
    ClientState,
    load_client_state,
    save_client_state,
)
from samv2.federated.graph_message import GraphMessage, update_graph
from samv2.federated.heldout import heldout_windows, score_domains
from samv2.federated.local_step import LocalResult, local_step
from samv2.federated.siblings import pack_counts, unserved_rows
from samv2.federated.subgraph import whole_manifest
from samv2.federated.usage import EdgeCounts, pack_usage
from samv2.models.adapters import block_layers
from samv2.models.expert_model import ExpertModel
from samv2.models.perplexity import Score
from samv2.models.save import load_expert_model
from samv2.models.sub_model import PartAssembler, load_sub_model
from samv2.updates.packing import Manifest, pack, unpack
from samv2.updates.sparsify import next_residual, select_blocks

KNOWN_WINDOWS = 64
"""Of a client's text, to tell which siblings serve it."""
LAST_SHARE = 0.1
"""Of the learning rate that a cosine schedule tends to."""


@dataclass(frozen=True, kw_only=True)
class ClientRuntime:
    """What a client process holds; one runtime serves many clients in turn."""

    model: ExpertModel
    base_blocks: dict[int, Tensor]
    """The bootstrapped model's trainable blocks, of the part that is held."""
    manifest: Manifest
    """Of the whole model's blocks."""
    part: SubGraph | None = None
    """What is held; None: the whole model."""
    shards: Path
    """Folder of the clients' shards; a deployed client's holds its own only."""
    states: Path
    """Folder of the clients' states."""
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """Server to client."""

    round: int
    graph: GraphMessage
    parameters: bytes
    """Frame of the trained blocks, differences from the bootstrapped model."""
    part: SubGraph | None = None
    """What the client holds; None: the whole model."""
    temperature: float = 1.0
    told: int | None = None
    """To score only: round of the token counts that the server goes by, 0 where it has
    none; None: it does not watch for changed text."""


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """Client to server."""

    update: bytes
    """Frame of the selected blocks."""
    usage: bytes
    """Frame of usage and demand counts."""
    graph_version: int
    examples: int
    tokens: int
    train_loss: float
    seconds: float


def load_runtime(
    model_folder: Path,
    shards: Path,
    states: Path,
    settings: Settings,
    part: SubGraph | None = None,
) -> ClientRuntime:
    """Load the bootstrapped model, or a part of it, and remember its starting blocks.

    Raises:
        ConfigError: ``train.device`` names a GPU that is not there.
        ModelError: the folder is damaged.
    """
    device = take_device(settings.train.device)
    small_onednn_cache()
    if part is None:
        model, _ = load_expert_model(model_folder)
        model.set_experts_per_token(settings.experts.experts_per_token)
    else:
        model, _ = load_sub_model(model_folder, part)
    model.to(device)
    base_blocks = model.read_blocks()
    whole = part is None
    return ClientRuntime(
        model=model,
        base_blocks=base_blocks,
        manifest=(
            Manifest.of(base_blocks) if whole else whole_manifest(model_folder, model)
        ),
        part=part,
        shards=shards,
        states=states,
        settings=settings,
    )


def train_round(
    runtime: ClientRuntime,
    client: int,
    request: RoundRequest,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainReply:
    """One client's training round.

    Args:
        runtime: the process's model and folders.
        client: index of the client, from 0.
        request: what the server sent.
        callbacks: watch the local training.

    Raises:
        FrameError: the parameters' frame is damaged.
        GraphError: the graph cannot be brought to the server's version
            (the server then sends the full graph).
        FederationError: training failed.
    """
    settings = runtime.settings
    folder = state_folder(runtime.states, client)
    state = load_client_state(folder, before_round=request.round)
    graph = update_graph(state.graph, request.graph)
    received = _load_round(runtime, request, graph)
    unserved = _unserved(runtime, received)
    residual = _without(_inward(runtime, state.residual), unserved)
    moments = state.moments
    if moments is not None:
        first, second = (_without(m, unserved) for m in (moments.first, moments.second))
        moments = replace(moments, first=first, second=second)
    own = _with_own(received, residual)
    runtime.model.write_blocks(own)
    shard = load_client(runtime.shards, client).at(request.round)
    rate = learning_rate(settings, request.round)
    result = local_step(
        runtime.model,
        shard.train,
        replace(settings.train, learning_rate=rate),
        seed=round_seed(settings.seed, request.round, client),
        temperature=request.temperature,
        siblings=own_siblings(runtime, shard),
        count_usage=settings.edits.rho_max > 0,
        moments=moments,
        micro_batch=0 if runtime.part is None else runtime.part.micro_batch,
        callbacks=callbacks,
    )
    trained = runtime.model.read_blocks()
    update = _outward(runtime, {k: trained[k] - received[k] for k in trained})
    # What other text left over, once the text has changed, waits until there is room.
    untouched = {
        key: block
        for key, block in trained.items()
        if torch.equal(block, own.get(key, received[key]))
    }
    budget = round_budget(settings, shard, request.round)
    frame, residual = _pack_update(
        runtime,
        update,
        budget,
        request.round,
        client,
        last=_outward(runtime, untouched),
    )
    kept = ClientState(residual=residual, moments=result.moments, graph=graph)
    save_client_state(folder, kept, round=request.round)
    return _reply(runtime, frame, result, graph, request.round)


def evaluate_round(
    runtime: ClientRuntime, client: int, request: RoundRequest
) -> dict[str, Score]:
    """Score the client's held-out text by domain with the round's parameters.

    The graph must come in full: an evaluation does not touch the client's state.
    """
    graph = update_graph(None, request.graph)
    _load_round(runtime, request, graph)
    train = runtime.settings.train
    held = heldout_windows(
        [load_client(runtime.shards, client).at(request.round)],
        train.sequence_length,
        runtime.settings.federation.eval_windows,
    )
    return score_domains(runtime.model, held, batch_size=train.batch_size)


def own_siblings(runtime: ClientRuntime, shard: ClientShard) -> tuple[int, ...] | None:
    """The adapter siblings that serve a client's text; None where there is one."""
    if runtime.model.sibling_gate is None:
        return None
    length = runtime.settings.train.sequence_length
    tokens_NS = windows(shard.train, length, KNOWN_WINDOWS)
    return runtime.model.active_siblings(tokens_NS)


def round_budget(settings: Settings, shard: ClientShard, round: int) -> int:
    """Most bytes of a round's update; token counts are taken off the first round's."""
    budget = settings.federation.update_budget_bytes
    if round > 1 or settings.adapter.siblings == 1:
        return budget
    return budget - len(pack_counts(shard.train))


def learning_rate(settings: Settings, round: int) -> float:
    """The optimiser's learning rate in one round, from 1."""
    start, rounds = settings.train.learning_rate, settings.federation.rounds
    if settings.train.schedule == "constant":
        return start
    turn = math.cos(math.pi * (round - 1) / rounds)
    return start * (LAST_SHARE + (1 - LAST_SHARE) * (1 + turn) / 2)


def round_seed(seed: int, round: int, client: int) -> int:
    """A seed for one client's round, below 2^63; the same run repeats it."""
    return ((seed * 1_000_003 + round) * 1_000_003 + client * 2) % 2**63


def _load_round(
    runtime: ClientRuntime, request: RoundRequest, graph: ExpertGraph
) -> dict[int, Tensor]:
    """Write the round's parameters and graph into the model; returns the parameters."""
    sent = unpack(request.parameters, runtime.manifest, round=request.round)
    sent = _inward(runtime, sent)
    received = {
        key: base + sent[key] if key in sent else base
        for key, base in runtime.base_blocks.items()
    }
    runtime.model.write_blocks(received)
    part, assembler = runtime.part, runtime.model.assembler
    runtime.model.set_graph(graph if part is None else part.graph(graph))
    if isinstance(assembler, PartAssembler):
        assembler.set_graph(graph)
    return received


def _unserved(runtime: ClientRuntime, received: Mapping[int, Tensor]) -> frozenset[int]:
    """The model's blocks of siblings that serve no text now, and may have had some."""
    config = runtime.model.expert_config
    if config.siblings == 1:
        return frozenset()
    experts = len(config.layers) * config.num_experts
    return unserved_rows(received[max(received)], config.siblings, experts)


def _without(blocks: Mapping[int, Tensor], ids: Container[int]) -> dict[int, Tensor]:
    return {key: block for key, block in blocks.items() if key not in ids}


def _inward(
    runtime: ClientRuntime, blocks: Mapping[int, Tensor]
) -> Mapping[int, Tensor]:
    """Blocks of the whole as the runtime's model has them."""
    if runtime.part is None:
        return blocks
    return runtime.part.inward(blocks, runtime.model.expert_config.siblings)


def _outward(runtime: ClientRuntime, blocks: dict[int, Tensor]) -> dict[int, Tensor]:
    """The model's blocks as the whole has them."""
    if runtime.part is None:
        return blocks
    return runtime.part.outward(blocks, runtime.model.expert_config.siblings)


def _with_own(
    received: Mapping[int, Tensor], residual: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """The server's blocks with what this client could not send yet."""
    return {key: received[key] + value for key, value in residual.items()}


def _pack_update(
    runtime: ClientRuntime,
    update: dict[int, Tensor],
    budget: int,
    round: int,
    client: int,
    *,
    last: Iterable[int],
) -> tuple[bytes, dict[int, Tensor]]:
    """The frame to send and the residual to keep.

    Args:
        update: trained minus received, so it holds what earlier rounds did not send.
        budget: most bytes of the frame.
        last: ids that this round's training did not change.
    """
    federation = runtime.settings.federation
    config = runtime.model.expert_config
    experts = runtime.part.num_experts if runtime.part else config.num_experts
    assembler, layer_of = block_layers(len(config.layers), experts, config.siblings)
    chosen = select_blocks(
        update,
        codec=federation.codec,
        update_budget_bytes=budget,
        send_experts=federation.send_experts,
        layer_of=layer_of,
        always=[assembler],
        last=last,
    )
    if not chosen:
        raise FederationError(
            "nothing was trained: every block of the update is zero or larger than "
            f"the {budget} bytes that federation.update_budget_bytes leaves"
        )
    feedback = federation.error_feedback
    frame = pack(
        {key: update[key] for key in chosen},
        runtime.manifest,
        round=round,
        codec=federation.codec,
        stochastic_seed=(
            None
            if feedback or federation.codec == "raw"
            else round_seed(runtime.settings.seed, round, client)
        ),
        error_feedback=feedback > 0,
    )
    decoded = unpack(frame, runtime.manifest, round=round)
    return frame, next_residual(update, decoded, decay=feedback)


def _reply(
    runtime: ClientRuntime,
    frame: bytes,
    result: LocalResult,
    graph: ExpertGraph,
    round: int,
) -> TrainReply:
    counts, part = result.counts, runtime.part
    if part is not None:
        counts = EdgeCounts(
            usage_LEE=part.widen_counts(counts.usage_LEE, graph),
            demand_LEE=part.widen_counts(counts.demand_LEE, graph),
        )
    return TrainReply(
        update=frame,
        usage=pack_usage(counts, round=round),
        graph_version=graph.version,
        examples=result.examples,
        tokens=result.tokens,
        train_loss=result.mean_loss,
        seconds=result.seconds,
    )


def state_folder(states: Path, client: int) -> Path:
    """Where a client keeps its state."""
    return states / f"client_{client:04d}"
