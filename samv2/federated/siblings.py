"""Before round 1: which kind of text each sibling of the adapters serves.

Clients send how often tokens occur in their text, in buckets; the server fits the gate
that all share (:mod:`samv2.experts.sibling_gate`) and keeps it as one more block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.experts.block_ids import expert_block
from samv2.experts.sibling_gate import (
    BUCKETS,
    NEVER,
    count_tokens,
    fit_sibling_gate,
)
from samv2.updates.packing import Manifest, pack, unpack

COUNTS = Manifest.of({0: torch.zeros(BUCKETS)})
COUNTS_CODEC = "bf16"
ROUND = 0
"""Frames of counts belong to no round of training."""


def pack_counts(tokens_N: Tensor) -> bytes:
    """A client's token counts as a frame: 8,192 bfloat16 numbers at most, once a run."""
    return pack({0: count_tokens(tokens_N)}, COUNTS, round=ROUND, codec=COUNTS_CODEC)


def unpack_counts(frame: bytes) -> Tensor:
    """(BUCKETS,) float32 counts of an untrusted frame.

    Raises:
        FrameError: damaged, or ``counts`` where numbers are negative, beyond 2^40 or
            all zero.
    """
    counts_N = unpack(frame, COUNTS, round=ROUND).get(0)
    if counts_N is None or not bool(counts_N.any()):
        raise FrameError("counts", "the token counts are all zero")
    least, most = float(counts_N.min()), float(counts_N.max())
    if not 0 <= least <= most <= 2**40:
        raise FrameError(
            "counts", f"token counts lie in {least:g}..{most:g}, allowed are 0..2^40"
        )
    return counts_N


def fit_siblings(
    counts: Mapping[int, Tensor], siblings: int, *, reserve: int = 0
) -> tuple[Tensor, dict[int, int]]:
    """A gate for the clients' text.

    Args:
        counts: {client: (BUCKETS,) counts}, at least one.
        siblings: G.
        reserve: siblings that are held back for text that comes later.

    Returns:
        The gate's block, and {client: sibling}.
    """
    clients = sorted(counts)
    stacked_CN = torch.stack([counts[client] for client in clients])
    gate, members = fit_sibling_gate(stacked_CN, siblings, reserve=reserve)
    return gate, dict(zip(clients, members))


def used_siblings(gate: Tensor, siblings: int) -> list[int]:
    """The siblings that some text is for, by a gate's flat parameters."""
    return (gate[-siblings:] > NEVER / 2).nonzero().flatten().tolist()


def unserved_rows(gate: Tensor, siblings: int, experts: int) -> frozenset[int]:
    """Blocks of the siblings that serve no text: nobody trains them.

    Sibling 0's are never among them, for they hold more than its rows.

    Args:
        gate: its flat parameters; one that is not fitted serves everybody.
        siblings: G.
        experts: L E.
    """
    idle = set(range(1, siblings)) - set(used_siblings(gate, siblings))
    return frozenset(
        expert_block(expert, experts, sibling)
        for sibling in idle
        for expert in range(experts)
    )


def share_update(
    update: Mapping[int, Tensor],
    *,
    sizes: Mapping[int, int],
    experts: int,
    used: Sequence[int],
    share: float,
) -> dict[int, Tensor]:
    """Let every sibling have a part of what the others learnt.

    Sibling g's rows change by d_g + share (sum of the others' d) / G. Rows of all
    siblings are against the same factors, so this is a sum of weight changes.

    Args:
        update: {id: flat change} of a round, in the blocks' layout
            (:mod:`samv2.models.adapters`).
        sizes: numbers in each block, by id.
        experts: L E.
        used: the siblings that serve some text; G is their number.
        share: 0 changes nothing; at 1 the others count together as much as they would
            in a mean over all.

    Returns:
        The update with the others' parts.
    """
    if share == 0:
        return dict(update)
    rows = sizes[experts + 1]  # of sibling 1, whose blocks are rows alone
    shared = dict(update)
    for expert in range(experts):
        ids = {sibling: expert_block(expert, experts, sibling) for sibling in used}
        changed = {g: update[id_][:rows] for g, id_ in ids.items() if id_ in update}
        if not changed:
            continue
        total = torch.stack(list(changed.values())).sum(dim=0)
        for sibling, id_ in ids.items():
            others = total - changed[sibling] if sibling in changed else total
            whole = update[id_].clone() if id_ in update else torch.zeros(sizes[id_])
            whole[:rows] += share / len(used) * others
            shared[id_] = whole
    return shared
