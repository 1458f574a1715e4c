"""Rules of aggregation that a minority of hostile clients cannot bend.

Per expert, over the clients that sent it, each counted once whatever weight it claims
(Yin et al. 2018, arXiv 1803.01498): per coordinate, ``trimmed_mean`` cuts off the largest
and the smallest values and takes the mean of the rest, ``median`` the middle. As long as
no more of an expert's senders are hostile than are cut off at one end (under ``median``:
fewer than half are), every coordinate of the result lies between two honest values.

An expert with fewer senders than the quorum has nothing to trim: it gets the mean of its
updates, each first scaled down to the median of their norms (the lower of two). A lone
sender's update is then taken as it is. Nothing is filled with zeros, or experts that few
clients use would never learn.

Frames are read again for every part of the model that fits :data:`STACK_BYTES`.
Shapes: N clients that sent an expert, W of its numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samv2.common.settings import AggregationSettings
from samv2.updates.packing import Manifest, accumulate
from samv2.updates.stored import Stored, read_frame

STACK_BYTES = 64 * 2**20
"""Most bytes of updates side by side; an expert below the quorum may need more."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class _Slice:
    """Some of an expert's numbers, which are aggregated together."""

    expert_id: int
    start: int
    stop: int


def robust_means(
    updates: Sequence[tuple[Stored, tuple[int, ...]]],
    shares: Sequence[float],
    manifest: Manifest,
    *,
    round: int,
    rules: AggregationSettings,
) -> dict[int, Tensor]:
    """The centre of every expert's updates.

    Args:
        updates: (frame, the ids it changes) by rising client; validated.
        shares: what each update is scaled by first.
        manifest: the server's.
        round: the round the frames belong to.
        rules: ``rule`` (``trimmed_mean`` or ``median``), ``trim`` and ``quorum``.

    Returns:
        {expert_id: float32}, only experts that somebody sent.

    Raises:
        FrameError: a frame is invalid after all.
        OSError: a frame's file cannot be read.
    """
    senders: dict[int, list[int]] = {}
    for index, (_, expert_ids) in enumerate(updates):
        for expert_id in expert_ids:
            senders.setdefault(expert_id, []).append(index)
    means = {
        key: torch.zeros(manifest.shapes[manifest.position(key)])
        for key in sorted(senders)
    }
    for part in _parts(senders, manifest, rules.quorum):
        for piece, stack_NW in _stacks(part, updates, shares, manifest, round).items():
            centre_W = _centre(stack_NW, rules)
            flat = means[piece.expert_id].view(-1)
            flat[piece.start : piece.stop] = torch.from_numpy(centre_W)
    return means


def trimmed_mean(stack_NW: Array, trim: float) -> Array:
    """Per coordinate, the mean without the ceil(trim N) largest and smallest values.

    At least one value (of an even N: two) is left. Never outside the values that are
    left, in spite of rounding.

    Args:
        stack_NW: (N, W) float32, finite.
        trim: share that is cut off at each end, in 0..0.5.
    """
    return _mean_of_middle(stack_NW, math.ceil(trim * len(stack_NW) - 1e-9))


def coordinate_median(stack_NW: Array) -> Array:
    """Per coordinate, the median; of an even N the mean of the two in the middle."""
    return _mean_of_middle(stack_NW, len(stack_NW))


def clipped_mean(stack_NW: Array) -> Array:
    """The mean of rows, each scaled down to the rows' median norm.

    Of two the lower; rows of zeros are left out of the median, not of the mean.
    """
    norms = [float(np.linalg.norm(row.astype(np.float64))) for row in stack_NW]
    moved = sorted(norm for norm in norms if norm > 0)
    limit = moved[(len(moved) - 1) // 2] if moved else 0.0
    total_W = np.zeros(stack_NW.shape[1])
    for row_W, norm in zip(stack_NW, norms, strict=True):
        total_W += (min(1.0, limit / norm) if norm > 0 else 1.0) * row_W
    return (total_W / len(stack_NW)).astype(np.float32)


def _centre(stack_NW: Array, rules: AggregationSettings) -> Array:
    if len(stack_NW) < rules.quorum:
        return clipped_mean(stack_NW)
    if rules.rule == "median":
        return coordinate_median(stack_NW)
    return trimmed_mean(stack_NW, rules.trim)


def _mean_of_middle(stack_NW: Array, cut: int) -> Array:
    cut = min(cut, (len(stack_NW) - 1) // 2)
    ranked_WN = np.sort(np.ascontiguousarray(stack_NW.T), axis=1)
    middle = ranked_WN[:, cut : len(stack_NW) - cut]
    return middle.mean(axis=1, dtype=np.float64).astype(np.float32)


def _parts(
    senders: dict[int, list[int]], manifest: Manifest, quorum: int
) -> Iterator[list[_Slice]]:
    """Slices of all experts, in groups whose stacks fit :data:`STACK_BYTES` together."""
    part: list[_Slice] = []
    room = STACK_BYTES
    for expert_id, clients in sorted(senders.items()):
        numel, row = manifest.numel(expert_id), 4 * len(clients)
        whole = len(clients) < quorum  # norms are of whole updates
        width = numel if whole else max(1, min(numel, STACK_BYTES // row))
        for start in range(0, numel, max(1, width)):
            piece = _Slice(expert_id, start, min(numel, start + width))
            need = row * (piece.stop - piece.start)
            if part and need > room:
                yield part
                part, room = [], STACK_BYTES
            part.append(piece)
            room -= need
    if part:
        yield part


def _stacks(
    part: Sequence[_Slice],
    updates: Sequence[tuple[Stored, tuple[int, ...]]],
    shares: Sequence[float],
    manifest: Manifest,
    round: int,
) -> dict[_Slice, Array]:
    """(N, W) of every slice, a row for each client that sent its expert."""
    ids = {piece.expert_id for piece in part}
    senders = [index for index, item in enumerate(updates) if ids.intersection(item[1])]
    count = Counter(key for index in senders for key in updates[index][1])
    stacks = {
        piece: np.empty(
            (count[piece.expert_id], piece.stop - piece.start), dtype=np.float32
        )
        for piece in part
    }
    scratch = {key: torch.zeros(manifest.shapes[manifest.position(key)]) for key in ids}
    filled: Counter[int] = Counter()
    for index in senders:
        frame, expert_ids = updates[index]
        values = {key: scratch[key].zero_() for key in ids.intersection(expert_ids)}
        accumulate(
            read_frame(frame),
            manifest,
            shares[index],
            values,
            round=round,
            only=sorted(values),
        )
        for piece in part:
            if piece.expert_id in values:
                flat = values[piece.expert_id].view(-1).numpy()
                row = stacks[piece][filled[piece.expert_id]]
                row[:] = flat[piece.start : piece.stop]
        filled.update(values.keys())
    return stacks
