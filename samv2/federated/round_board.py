"""What TensorBoard shows of a round beside the numbers of ``metrics.jsonl``.

    client_loss/0003 ...     a curve a client, where there are not too many
    clients/loss ...         the same as histograms over the round's clients
    block_norm/layer_03      of trained blocks, the difference from the bootstrapped model
    gate_bias/layer_03       of the layer's experts
    usage/layer_03           share of the layer's visits that each expert has
    graph                    a picture of the edges that were walked

Shapes: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from samv2.federated.graph_image import draw_graph
from samv2.federated.server_merge import MergeReport, ServerState

MOST_CLIENTS = 64
"""Clients of a run that get curves of their own."""
CLIENT_NUMBERS = {
    "loss": "train_loss",
    "seconds": "seconds",
    "waited": "waited",
    "bytes_up": "bytes_up",
    "update_norm": "update_norm",
}
"""What is shown of a client: name on the board, key in ``clients.jsonl``."""


def write_board(
    writer: SummaryWriter,
    state: ServerState,
    report: MergeReport,
    clients: Sequence[Mapping[str, Any]],
    *,
    first_biases_LE: Tensor,
    all_clients: int,
) -> None:
    """Write a round's curves, histograms and picture; the writer is not flushed.

    Args:
        writer: of the run.
        state: after the merge.
        report: of the merge.
        clients: of the round, as in ``clients.jsonl``.
        first_biases_LE: (L, E) gate biases of the bootstrapped model.
        all_clients: of the run.
    """
    step = report.round
    for name, key in CLIENT_NUMBERS.items():
        known = {c["client"]: c[key] for c in clients if _finite(c[key])}
        if all_clients <= MOST_CLIENTS:
            for client, value in known.items():
                writer.add_scalar(f"client_{name}/{client:04d}", value, step)
        _histogram(writer, f"clients/{name}", known.values(), step)
    layers, experts = state.graph.edge_mask_LEE.shape[:2]
    for layer, norms in enumerate(block_norms(state)):
        _histogram(writer, f"block_norm/layer_{layer:02d}", norms, step)
    biases_LE = first_biases_LE + gate_biases(state.blocks, layers, experts)
    for layer, biases_E in enumerate(biases_LE.tolist()):
        _histogram(writer, f"gate_bias/layer_{layer:02d}", biases_E, step)
    usage_LEE = report.counts.usage_LEE
    if not bool(usage_LEE.any()):
        return
    for layer, shares_E in enumerate(visit_shares(usage_LEE).tolist()):
        _histogram(writer, f"usage/layer_{layer:02d}", shares_E, step)
    picture = draw_graph(usage_LEE, state.graph, report.edits, round=step)
    writer.add_image("graph", picture, step, dataformats="HWC")


def block_norms(state: ServerState) -> list[list[float]]:
    """L2 norms of each layer's trained blocks, siblings' included."""
    layers, experts = state.graph.edge_mask_LEE.shape[:2]
    found: list[list[float]] = [[] for _ in range(layers)]
    for layer, block in _of_layers(state.blocks, layers, experts):
        if bool(block.any()):
            found[layer].append(float(block.norm()))
    return found


def _of_layers(
    blocks: Mapping[int, Tensor], layers: int, experts: int
) -> Iterator[tuple[int, Tensor]]:
    """Layer and block of every expert's block; see samv2/models/adapters.py for ids."""
    every = layers * experts
    gate = max(blocks) if max(blocks) > every else None
    for expert_id, block in blocks.items():
        if expert_id < every:
            yield expert_id // experts, block
        elif expert_id not in (every, gate):
            yield (expert_id - every - 1) % every // experts, block


def gate_biases(blocks: Mapping[int, Tensor], layers: int, experts: int) -> Tensor:
    """(L, E) gate biases in blocks of the form that samv2/models/adapters.py gives."""
    biases = [blocks[key][-experts - 2] for key in range(layers * experts)]
    return torch.stack(biases).view(layers, experts)


def visit_shares(usage_LEE: Tensor) -> Tensor:
    """(L, E) share of a layer's visits that the expert at each position has."""
    visits_LE = usage_LEE.sum(dim=1).double()
    return visits_LE / visits_LE.sum(dim=1, keepdim=True).clamp(min=1.0)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _histogram(
    writer: SummaryWriter, name: str, values: Iterable[float], step: int
) -> None:
    """Of values that are finite, where there are any."""
    known = np.array([value for value in values if math.isfinite(value)])
    if known.size:
        writer.add_histogram(name, known, step)
