"""Server checkpoints: one folder a round, written whole or not at all.

    checkpoints/round_0003/state.safetensors   blocks, moments, graph and edge memory
    checkpoints/round_0003/state.json          round, versions, edits, fingerprints

A folder takes its name only after everything in it is on disk, so the newest folder is
always complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from samv2.common.errors import CheckpointError, GraphError
from samv2.common.files import replace_folder
from samv2.experts.graph import Edit, ExpertGraph
from samv2.federated.drift import SiblingMemory
from samv2.federated.drift_state import from_parts, to_parts
from samv2.federated.graph_edits import EdgeMemory
from samv2.federated.server_merge import ServerState
from samv2.federated.server_optimizer import Moments

FORMAT = 1
TENSORS = "state.safetensors"
FACTS = "state.json"
MEMORY = ("usage_LEE", "demand_LEE", "below_LEE", "above_LEE", "rest_LEE")
FOLDER = re.compile(r"round_(\d{4,})")
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    SafetensorError,
    GraphError,
)


def save_checkpoint(
    folder: Path,
    state: ServerState,
    *,
    model_fingerprint: str,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write the state after a round and drop older ones.

    Args:
        folder: the run's ``checkpoints`` folder.
        state: after a completed round (or before the first: round 0).
        model_fingerprint: of the bootstrapped model; a checkpoint of another model is
            refused on loading.
        extra: further facts for a JSON object, returned by :func:`load_checkpoint`.
        keep: how many of the newest checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    tensors = {f"block.{key}": value for key, value in state.blocks.items()}
    tensors |= {f"first.{key}": value for key, value in state.moments.first.items()}
    tensors |= {f"second.{key}": value for key, value in state.moments.second.items()}
    tensors |= {f"memory.{name}": getattr(state.memory, name) for name in MEMORY}
    siblings = None
    if state.siblings is not None:
        kept, siblings = to_parts(state.siblings)
        tensors |= {f"siblings.{name}": value for name, value in kept.items()}
    tensors["graph.edge_mask_LEE"] = state.graph.edge_mask_LEE
    tensors["graph.order_LE"] = state.graph.order_LE
    facts = {
        "format": FORMAT,
        "round": state.round,
        "graph_version": state.graph.version,
        "memory_rounds": state.memory.rounds,
        "last_edits": [asdict(edit) for edit in state.last_edits],
        "siblings": siblings,
        "merged_rounds": {str(k): v for k, v in state.merged_rounds.items()},
        "model_fingerprint": model_fingerprint,
        "extra": extra or {},
    }
    path = Path(folder) / f"round_{state.round:04d}"
    with replace_folder(path) as target:
        save_file({k: v.contiguous() for k, v in tensors.items()}, target / TENSORS)
        (target / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    drop_old(folder, keep=keep)
    return path


def drop_old(folder: Path, *, keep: int = 2) -> None:
    """Remove all but the newest checkpoints, also those that are half removed."""
    for _, old in _rounds(folder)[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    rounds = _rounds(folder)
    return rounds[-1][1] if rounds else None


def load_checkpoint(
    path: Path, *, model_fingerprint: str
) -> tuple[ServerState, dict[str, Any]]:
    """Read a checkpoint.

    Returns:
        The state and the ``extra`` facts.

    Raises:
        CheckpointError: damaged, of another format, or of another model.
    """
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(path / TENSORS)
        if facts["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {facts['format']}, this version reads "
                f"{FORMAT}"
            )
        _check_model(path, facts["model_fingerprint"], model_fingerprint)
        graph, memory = _graph_of(facts, tensors)
        state = ServerState(
            round=facts["round"],
            blocks=_by_expert(tensors, "block."),
            graph=graph,
            memory=memory,
            last_edits=tuple(Edit(**edit) for edit in facts["last_edits"]),
            siblings=_siblings_of(facts, tensors),
            moments=Moments(
                first=_by_expert(tensors, "first."),
                second=_by_expert(tensors, "second."),
            ),
            # Checkpoints of earlier versions have neither.
            merged_rounds={
                int(key): int(value)
                for key, value in facts.get("merged_rounds", {}).items()
            },
        )
        return state, facts["extra"]
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove the folder to "
            "resume from the checkpoint before it"
        ) from None


def load_graph(path: Path) -> tuple[ExpertGraph, EdgeMemory, dict[str, Any]]:
    """The graph of a checkpoint alone, of whichever model; its blocks are not read.

    Returns:
        The graph, what is remembered of its edges, and the ``extra`` facts.

    Raises:
        CheckpointError: damaged.
    """
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        with safe_open(path / TENSORS, framework="pt") as stored:
            names = [n for n in stored.keys() if n.startswith(("graph.", "memory."))]
            tensors = {name: stored.get_tensor(name) for name in names}
        return *_graph_of(facts, tensors), facts["extra"]
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error})"
        ) from None


def _graph_of(
    facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ExpertGraph, EdgeMemory]:
    graph = ExpertGraph(
        edge_mask_LEE=tensors["graph.edge_mask_LEE"],
        order_LE=tensors["graph.order_LE"],
        version=facts["graph_version"],
    )
    memory = EdgeMemory(
        rounds=facts["memory_rounds"],
        **{name: tensors[f"memory.{name}"] for name in MEMORY},
    )
    return graph, memory


def _siblings_of(
    facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> SiblingMemory | None:
    kept = facts.get("siblings")  # checkpoints from before drift was watched have none
    if kept is None:
        return None
    named = {
        name.removeprefix("siblings."): tensor
        for name, tensor in tensors.items()
        if name.startswith("siblings.")
    }
    return from_parts(named, kept)


def _block_order(item: tuple[str, Any]) -> int:
    name = item[0]
    return int(name.removeprefix("block.")) if name.startswith("block.") else -1


def _by_expert(tensors: Mapping[str, Tensor], prefix: str) -> dict[int, Tensor]:
    """{expert_id: tensor} of the names that start with a prefix, by rising id."""
    found = {
        int(name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return dict(sorted(found.items()))


def _check_model(path: Path, stored: str, current: str) -> None:
    if stored != current:
        raise CheckpointError(
            f"{path} belongs to model {stored}, but this run's model is {current}; "
            "resume with the model it was started with, or start a new --log-dir"
        )


def _rounds(folder: Path) -> list[tuple[int, Path]]:
    if not Path(folder).is_dir():
        return []
    found = []
    for path in Path(folder).iterdir():
        if match := FOLDER.fullmatch(path.name):
            found.append((int(match[1]), path))
    return sorted(found)
