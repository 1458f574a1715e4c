"""A :class:`SiblingMemory` as tensors and JSON facts, for the server's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from samv2.common.json_keys import number_keys, text_keys
from samv2.federated.drift import LossWatch, SiblingMemory

COUNTS, KINDS = "counts_CN", "kinds_GN"


def to_parts(memory: SiblingMemory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and facts for a JSON object."""
    tensors = {
        name: torch.stack([rows[key] for key in sorted(rows)])
        for name, rows in ((COUNTS, memory.counts), (KINDS, memory.kinds))
        if rows
    }
    facts = {
        "clients": sorted(memory.counts),
        "told": text_keys(memory.told),
        "used": sorted(memory.kinds),
        "members": text_keys(memory.members),
        "spawned": text_keys(memory.spawned),
        "idle": text_keys(memory.idle),
        "resting": text_keys(memory.resting),
        "watches": {str(c): asdict(watch) for c, watch in memory.watches.items()},
    }
    return tensors, facts


def from_parts(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> SiblingMemory:
    """The inverse of :func:`to_parts`.

    Raises:
        KeyError, TypeError, ValueError: they are not of this form.
    """

    def rows(name: str, keys: list[int]) -> dict[int, Tensor]:
        if not keys:
            return {}
        if len(tensors[name]) != len(keys):
            raise ValueError(f"{name} has {len(tensors[name])} rows for {len(keys)}")
        return {key: row.clone() for key, row in zip(keys, tensors[name])}

    return SiblingMemory(
        counts=rows(COUNTS, facts["clients"]),
        kinds=rows(KINDS, facts["used"]),
        members=_number_keys(facts["members"]),
        spawned=_number_keys(facts["spawned"]),
        idle=_number_keys(facts["idle"]),
        # Checkpoints of earlier versions have neither.
        told=_number_keys(facts.get("told", {})),
        resting=_number_keys(facts.get("resting", {})),
        watches={int(c): LossWatch(**w) for c, w in facts["watches"].items()},
    )


def _number_keys(values: Mapping[str, int]) -> dict[int, int]:
    return {key: int(value) for key, value in number_keys(values).items()}
