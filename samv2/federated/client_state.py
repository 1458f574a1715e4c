"""What a client keeps on its own disk between rounds: residual, moments and graph.

One safetensors file a round, ``client_0003/round_0007.safetensors``, written whole or
not at all. A round reads the newest file of an *earlier* round, so a round that is run
again after a crash starts from the same state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samv2.common.errors import CheckpointError, GraphError
from samv2.common.files import write_bytes
from samv2.experts.graph import ExpertGraph
from samv2.federated.moments import Moments

KEEP = 3
PARTS = ("residual", "first", "second")
FILE = re.compile(r"round_(\d{4,})\.safetensors")
_DAMAGE = (OSError, SafetensorError, KeyError, ValueError, IndexError, GraphError)


@dataclass(frozen=True, kw_only=True)
class ClientState:
    """A client's memory after a round."""

    residual: dict[int, Tensor] = field(default_factory=dict)
    """{expert_id: float32} kept back by error feedback."""
    moments: Moments | None = None
    """AdamW's, where the client keeps its optimiser."""
    graph: ExpertGraph | None = None
    """The server graph as this client last knew it; None before its first round."""


def load_client_state(folder: Path, *, before_round: int) -> ClientState:
    """The state after the newest round before ``before_round``; empty if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    earlier = [item for item in _files(folder) if item[0] < before_round]
    if not earlier:
        return ClientState()
    path = earlier[-1][1]
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            facts = file.metadata() or {}
        version = int(facts["graph_version"])
        graph = None
        if version >= 0:
            graph = ExpertGraph(
                edge_mask_LEE=tensors.pop("edge_mask_LEE"),
                order_LE=tensors.pop("order_LE"),
                version=version,
            )
        kept = {part: _under(tensors, f"{part}.") for part in PARTS}
        if sum(map(len, kept.values())) != len(tensors):
            raise ValueError(f"unknown tensors among {sorted(tensors)[:5]}")
        moments = None
        if "steps" in facts:
            steps = int(facts["steps"])
            moments = Moments(steps=steps, first=kept["first"], second=kept["second"])
    except _DAMAGE as error:
        raise CheckpointError(
            f"the client state {path} is damaged ({error}); remove it: the client then "
            "forgets its residual and asks for the full graph"
        ) from None
    return ClientState(residual=kept["residual"], moments=moments, graph=graph)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[int, Tensor]:
    return {
        int(name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def save_client_state(folder: Path, state: ClientState, *, round: int) -> None:
    """Write the state after ``round`` and drop all but the newest three.

    States of later rounds are dropped too: the server has gone back to run them again.
    """
    moments = state.moments or Moments()
    parts = (state.residual, moments.first, moments.second)
    tensors = {
        f"{name}.{key}": value
        for name, blocks in zip(PARTS, parts)
        for key, value in blocks.items()
    }
    facts = {} if state.moments is None else {"steps": str(moments.steps)}
    version = -1
    if state.graph is not None:
        tensors["edge_mask_LEE"] = state.graph.edge_mask_LEE
        tensors["order_LE"] = state.graph.order_LE
        version = state.graph.version
    data = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata=facts | {"graph_version": str(version)},
    )
    write_bytes(Path(folder) / f"round_{round:04d}.safetensors", data)
    files = _files(folder)
    until = [item for item in files if item[0] <= round]
    later = [item for item in files if item[0] > round]
    for _, old in [*until[:-KEEP], *later]:
        old.unlink(missing_ok=True)


def _files(folder: Path) -> list[tuple[int, Path]]:
    if not Path(folder).is_dir():
        return []
    found = []
    for path in Path(folder).iterdir():
        if match := FILE.fullmatch(path.name):
            found.append((int(match[1]), path))
    return sorted(found)
