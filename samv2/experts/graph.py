"""The expert graph of a model: which experts a walk may enter and continue to.

``edge_mask_LEE[l, src, dst]`` is bool and upper triangular, in *positions*: index order
is topological order, so no cycle can be expressed. The diagonal says "may enter here",
an off-diagonal edge says "dst may continue from src". ``order_LE[l, position]`` is the
*storage id* of the expert at a position: its row in every tensor, never reused.

Shapes: L converted layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from samv2.common.errors import GraphError

EditKind = Literal["prune", "promote"]
KINDS: tuple[str, ...] = get_args(EditKind)


@dataclass(frozen=True, kw_only=True, order=True)
class Edit:
    """One change of the graph."""

    layer: int
    """Index among the converted layers."""
    src: int
    """Position of the source; equal to ``dst`` for an entry."""
    dst: int
    """Position of the destination."""
    kind: EditKind
    """``prune`` switches the edge off, ``promote`` switches it on."""
    score: float = 0.0
    """What it was decided on: relative usage (prune) or demand (promote)."""
    reason: str = ""
    """The same for a person."""


@dataclass(frozen=True, kw_only=True)
class ExpertGraph:
    """Edge masks of all converted layers, with a version that counts edit batches."""

    edge_mask_LEE: Tensor
    """(L, E, E) bool, upper triangular, at least one entry a layer."""
    order_LE: Tensor
    """(L, E) int64, a permutation of the storage ids per layer."""
    version: int = 0

    def __post_init__(self) -> None:
        check_edge_mask(self.edge_mask_LEE)
        layers, experts = self.edge_mask_LEE.shape[:2]
        expected = torch.arange(experts).expand(layers, experts)
        if not torch.equal(self.order_LE.sort(dim=1)[0], expected):
            raise GraphError(
                "order_LE must hold every storage id 0..E-1 once a layer; it has shape "
                f"{tuple(self.order_LE.shape)} for {layers} layers of {experts} experts"
            )


def check_edge_mask(edge_mask_LEE: Tensor) -> None:
    """Refuse a mask that is not bool, not square, not upper triangular, or closed.

    Raises:
        GraphError: naming the layer and the edge.
    """
    if edge_mask_LEE.dtype != torch.bool:
        raise GraphError(
            f"an edge mask must be bool, this one is {edge_mask_LEE.dtype}"
        )
    if edge_mask_LEE.ndim != 3 or edge_mask_LEE.shape[1] != edge_mask_LEE.shape[2]:
        raise GraphError(
            f"edge masks must have shape (L, E, E), got {tuple(edge_mask_LEE.shape)}"
        )
    below = (edge_mask_LEE & ~edge_mask_LEE.triu()).nonzero()
    if len(below):
        layer, src, dst = below[0].tolist()
        raise GraphError(
            f"edge {src} -> {dst} of layer {layer} points backwards: a mask must be upper "
            "triangular, so that index order is topological order"
        )
    closed = (~edge_mask_LEE.diagonal(dim1=1, dim2=2).any(dim=1)).nonzero()
    if len(closed):
        raise GraphError(
            f"layer {int(closed[0])} has no entry: keep at least one diagonal edge"
        )


def initial_graph(coactivation_LEE: Tensor, *, chain_degree: int) -> ExpertGraph:
    """All entries, and the strongest co-activation edges into each expert.

    Args:
        coactivation_LEE: (L, E, E) counts of tokens on which two experts were chosen
            together (symmetric; only the upper triangle is read).
        chain_degree: how many predecessors each expert gets at most.

    Returns:
        Version 0, positions equal to storage ids.
    """
    layers, experts = coactivation_LEE.shape[:2]
    counts_LEE = coactivation_LEE.float().triu(diagonal=1)
    degree = min(chain_degree, experts)
    order = torch.sort(counts_LEE, dim=1, descending=True, stable=True)[1][:, :degree]
    chains_LEE = torch.zeros_like(counts_LEE, dtype=torch.bool)
    chains_LEE.scatter_(1, order, True)
    chains_LEE &= counts_LEE > 0
    return ExpertGraph(
        edge_mask_LEE=chains_LEE | torch.eye(experts, dtype=torch.bool),
        order_LE=torch.arange(experts).repeat(layers, 1),
    )


def apply_edits(
    graph: ExpertGraph, edits: Iterable[Edit], *, version: int
) -> ExpertGraph:
    """Switch edges on and off; applying the same edits twice changes nothing more.

    Args:
        graph: the graph before.
        edits: changes; each sets its edge to a value, so order does not matter as long
            as an edge occurs once.
        version: the graph version that the edits lead to.

    Raises:
        GraphError: an edit is outside the graph, points backwards, repeats an edge, is
            of an unknown kind, or leaves a layer without entry; or ``version`` is not
            this or the next one.
    """
    if version not in (graph.version, graph.version + 1):
        raise GraphError(
            f"the graph is at version {graph.version}, these edits lead to version "
            f"{version}; ask the server for the full graph"
        )
    mask_LEE = graph.edge_mask_LEE.clone()
    layers, experts = mask_LEE.shape[:2]
    seen: set[tuple[int, int, int]] = set()
    for edit in edits:
        edge = (edit.layer, edit.src, edit.dst)
        if not (0 <= edit.layer < layers and 0 <= edit.src <= edit.dst < experts):
            raise GraphError(
                f"edit {edit.kind} {edit.src} -> {edit.dst} of layer {edit.layer} is not "
                f"an edge of {layers} layers with {experts} experts (src <= dst)"
            )
        if edge in seen:
            raise GraphError(f"edge {edge} occurs twice in one batch of edits")
        if edit.kind not in KINDS:
            raise GraphError(
                f"edit of edge {edge} is {edit.kind!r}; use one of {KINDS}"
            )
        seen.add(edge)
        mask_LEE[edge] = edit.kind == "promote"
    return replace(graph, edge_mask_LEE=mask_LEE, version=version)


def reachable_experts(edge_mask_EE: Tensor) -> Tensor:
    """(E,) bool: experts that some walk can reach through kept edges."""
    reached = edge_mask_EE.diagonal().clone()
    for dst in range(edge_mask_EE.shape[0]):
        arrives = (reached[:dst] & edge_mask_EE[:dst, dst]).any()
        reached[dst] = reached[dst] | arrives
    return reached
