"""Which experts a client sends, and what it keeps for later (error feedback).

Blocks are ranked by the L2 norm of their update, ties by id; at most ``send_experts`` of
a layer and at most ``update_budget_bytes`` in all are sent. What was not sent, and what
the codec lost of what was, is kept and decayed: e' = decay (update - decoded)
(memory of Stich et al., arXiv 1809.07599; the residual subtracts what the server will
decode, not what the client meant).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from samv2 import _rle

VALUE_BITS: Mapping[str, float] = {
    "raw": 32,
    "bf16": 16,
    "f16": 16,
    "int8": 8 + 32 / 256,
    "nf4": 4 + 32 / 64,
    "int4": 4 + 32 / 64,
}
"""Bits a stored value takes by codec, scales included."""
FRAME_BYTES = 72
"""Header and trailer of a frame."""
TENSOR_BYTES = 32 + 1 + 8 + 63 + 8
"""Directory entry, presence, descriptor, padding and last scale of one small tensor."""


def packed_bound(numel: int, codec: str) -> int:
    """Most bytes one dense block adds to a frame."""
    descriptors = 9 * (numel // 65536)
    return int(numel * VALUE_BITS[codec] / 8) + 1 + TENSOR_BYTES + descriptors


def select_blocks(
    update: Mapping[int, Tensor],
    *,
    codec: str,
    update_budget_bytes: int,
    send_experts: int = 0,
    layer_of: Mapping[int, int] | None = None,
    always: Iterable[int] = (),
    last: Iterable[int] = (),
) -> tuple[int, ...]:
    """Ids of the blocks to send.

    Args:
        update: {expert_id: tensor}.
        codec: value codec that the blocks will be packed with.
        update_budget_bytes: the packed frame will not exceed this.
        send_experts: most blocks a layer; 0 means no such limit.
        layer_of: the layer of each id; those without one are not counted against
            ``send_experts``.
        always: ids that go first and are not counted either.
        last: ids that get what room the others leave.

    Returns:
        Ids in rising order; blocks whose update is all zero are left out.
    """
    first, behind, layers = set(always), set(last), layer_of or {}
    norms = {
        expert_id: float(block.double().norm()) for expert_id, block in update.items()
    }
    ranked = sorted(
        (expert_id for expert_id, norm in norms.items() if norm > 0),
        key=lambda expert_id: (
            expert_id not in first,
            expert_id in behind,
            -norms[expert_id],
            expert_id,
        ),
    )
    room = update_budget_bytes - FRAME_BYTES
    sent_of_layer: Counter[int | None] = Counter()
    chosen = []
    for expert_id in ranked:
        size = packed_bound(update[expert_id].numel(), codec)
        layer = None if expert_id in first else layers.get(expert_id)
        counted = send_experts > 0 and layer is not None
        if size > room or (counted and sent_of_layer[layer] >= send_experts):
            continue
        room -= size
        sent_of_layer[layer] += counted
        chosen.append(expert_id)
    return tuple(sorted(chosen))


def top_k(update: Mapping[int, Tensor], keep: int) -> dict[int, Tensor]:
    """The update with zeros but for the ``keep`` values of largest magnitude in it all.

    Exact, by two passes of a radix histogram over the bits of |x|, whatever the
    distribution; of equal magnitudes the first by id and element stay. NaN counts as
    larger than infinity, so it is not lost but refused when the update is packed.

    Args:
        update: {id: float32 CPU tensor}, at most 2^32 - 1 values.
        keep: 0 to the number of values.

    Raises:
        ValueError: ``keep`` is out of range.
        TypeError: a tensor is not float32.
    """
    if keep < 0:
        raise ValueError(f"keep is {keep}, it must be from 0 to the number of values")
    ids = sorted(update)
    kept = {id_: torch.empty(update[id_].shape, dtype=torch.float32) for id_ in ids}
    _rle.keep_largest(
        [_bits(update[id_]) for id_ in ids], keep, [_bits(kept[id_]) for id_ in ids]
    )
    return kept


def kth_magnitude(update: Mapping[int, Tensor], k: int) -> float:
    """The k-th largest magnitude in the whole update; k counts from 1.

    See :func:`top_k`, which also settles ties.
    """
    bits = _rle.kth_magnitude([_bits(update[id_]) for id_ in sorted(update)], k)
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _bits(tensor: Tensor) -> np.ndarray:
    if tensor.dtype != torch.float32:
        raise TypeError(f"a tensor is {tensor.dtype}, it must be float32")
    return tensor.detach().contiguous().view(-1).view(torch.int32).numpy()


def next_residual(
    update: Mapping[int, Tensor], decoded: Mapping[int, Tensor], *, decay: float
) -> dict[int, Tensor]:
    """What is kept for later rounds.

    Args:
        update: what should have arrived, with what earlier rounds kept.
        decoded: what the server will decode, of the blocks that were sent.
        decay: share that is kept; 0 keeps nothing.

    Returns:
        {expert_id: decay (update - decoded)}, all-zero blocks left out.
    """
    if decay == 0:
        return {}
    kept = {}
    for expert_id, block in update.items():
        left = block - decoded[expert_id] if expert_id in decoded else block
        if bool(left.any()):
            kept[expert_id] = left * decay
    return kept
