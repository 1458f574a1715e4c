"""How a client's graph keeps up with the server's: messages, and their bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from samv2.common.errors import GraphError
from samv2.experts.graph import Edit, ExpertGraph, apply_edits

_NOT_A_GRAPH = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    RuntimeError,  # torch's for a number beyond int64
)


@dataclass(frozen=True, kw_only=True)
class GraphMessage:
    """How a client brings its graph to the server's version."""

    version: int
    full: bytes | None
    """Packed full graph (see :func:`pack_graph`), or None where edits suffice."""
    edits: tuple[Edit, ...]
    """The batch from ``version - 1`` to ``version``."""


def update_graph(known: ExpertGraph | None, message: GraphMessage) -> ExpertGraph:
    """Bring a client's graph to the server's version.

    Raises:
        GraphError: edits do not follow on what the client knows.
    """
    if message.full is not None:
        return unpack_graph(message.full, version=message.version)
    if known is None:
        raise GraphError(
            f"the server sent edits to graph version {message.version}, but this client "
            "knows no graph; ask for the full graph"
        )
    if known.version == message.version:
        return known
    if not message.edits:
        raise GraphError(
            f"the server sent no edits, but this client's graph is at version "
            f"{known.version} and the round's at {message.version}; ask for the full "
            "graph"
        )
    return apply_edits(known, message.edits, version=message.version)


def pack_graph(graph: ExpertGraph) -> bytes:
    """A graph as JSON: order and upper-triangular rows as hexadecimal bit strings."""
    rows = [
        [f"{sum(int(on) << dst for dst, on in enumerate(row)):x}" for row in layer]
        for layer in graph.edge_mask_LEE.tolist()
    ]
    return json.dumps({"order": graph.order_LE.tolist(), "rows": rows}).encode()


def unpack_graph(data: bytes, *, version: int) -> ExpertGraph:
    """The inverse of :func:`pack_graph`.

    Raises:
        GraphError: the bytes are no graph.
    """
    try:
        value = json.loads(data)
        order_LE = torch.tensor(value["order"], dtype=torch.long)
        experts = order_LE.shape[1]
        masks = [
            [[bool(int(row, 16) >> dst & 1) for dst in range(experts)] for row in layer]
            for layer in value["rows"]
        ]
        return ExpertGraph(
            edge_mask_LEE=torch.tensor(masks, dtype=torch.bool),
            order_LE=order_LE,
            version=version,
        )
    except _NOT_A_GRAPH as error:
        raise GraphError(f"the graph that was sent cannot be read: {error}") from None


def edits_to_json(edits: Sequence[Edit]) -> str:
    """Edits as a JSON list."""
    return json.dumps([asdict(edit) for edit in edits])


def edits_from_json(text: str) -> tuple[Edit, ...]:
    """The inverse of :func:`edits_to_json`.

    Raises:
        GraphError: the text is no list of edits.
    """
    try:
        edits = tuple(Edit(**item) for item in json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise GraphError(f"the edits that were sent cannot be read: {error}") from None
    for edit in edits:
        if not all(type(value) is int for value in (edit.layer, edit.src, edit.dst)):
            raise GraphError(f"the edits that were sent name no edge: {edit}")
    return edits
