"""What changes of siblings do to the server's blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from samv2.experts.block_ids import expert_block
from samv2.experts.sibling_gate import gate_for_kinds
from samv2.federated.drift import SiblingChange, SiblingMemory


def apply_changes(
    blocks: Mapping[int, Tensor],
    memory: SiblingMemory,
    changes: tuple[SiblingChange, ...],
    *,
    siblings: int,
    experts: int,
) -> dict[int, Tensor]:
    """The server's blocks after changes; the layout is :mod:`samv2.models.adapters`'.

    Args:
        blocks: {id: flat float32}, differences from the bootstrapped model.
        memory: after the changes.
        changes: what was decided.
        siblings: G.
        experts: L E.

    Returns:
        New blocks: a spawned sibling's are its parent's rows, a retired one's zero, and
        the gate knows the kinds that are there now.
    """
    after = dict(blocks)
    for change in changes:
        if change.kind not in ("spawn", "retire"):
            continue
        for expert in range(experts):
            own = expert_block(expert, experts, change.sibling)
            rows = len(after[own])
            if change.parent is None:
                after[own] = torch.zeros(rows)
            else:
                parent = after[expert_block(expert, experts, change.parent)]
                after[own] = parent[:rows].clone()
    if any(change.kind in ("spawn", "retire") for change in changes):
        after[max(after)] = gate_for_kinds(memory.kinds, siblings)
    return after
