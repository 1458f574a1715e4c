"""Before round 1: which kind of text each sibling of the adapters serves.

Clients send how often tokens occur in their text, in buckets; the server fits the gate
that all share (:mod:`samv2.experts.sibling_gate`) and keeps it as one more block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.experts.sibling_gate import BUCKETS, count_tokens, fit_sibling_gate
from samv2.federated.server_merge import ServerState
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
    state: ServerState, counts: Mapping[int, Tensor], siblings: int, gate_block: int
) -> tuple[ServerState, dict[int, int]]:
    """The state with a fitted gate.

    Args:
        state: before round 1, with a gate of zeros.
        counts: {client: (BUCKETS,) counts}, at least one.
        siblings: G.
        gate_block: id of the gate's block.

    Returns:
        The state, and {client: sibling}.
    """
    clients = sorted(counts)
    stacked_CN = torch.stack([counts[client] for client in clients])
    gate, members = fit_sibling_gate(stacked_CN, siblings)
    blocks = state.blocks | {gate_block: gate}
    return replace(state, blocks=blocks), dict(zip(clients, members))
