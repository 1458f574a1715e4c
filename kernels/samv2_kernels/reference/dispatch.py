"""Twins of the dispatch kernels: visits sorted by (expert, slot), and the tile table.

Shapes: T tokens, E experts, K slots, N = T K visits, L tiles, S slots or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_visits(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort visits by expert, then slot, then token, without a host sync.

    Args:
        expert_ids_TK: (T, K) integer experts in 0..E - 1, or -1 for an unused visit.
        num_experts: E.

    Returns:
        (N,) int32 visits v = t K + slot in sorted order, unused ones last by v; and the
        (E K + 1,) int32 exclusive offsets of the (expert, slot) groups, whose last entry
        is the number of used visits.
    """
    slots = expert_ids_TK.shape[1]
    groups = num_experts * slots
    device = expert_ids_TK.device
    slot_K = torch.arange(slots, device=device)
    key_TK = torch.where(expert_ids_TK < 0, groups, expert_ids_TK * slots + slot_K)
    key_N, order_N = key_TK.to(torch.int32).flatten().sort(stable=True)
    bounds = torch.arange(groups + 1, dtype=torch.int32, device=device)
    return order_N.to(torch.int32), torch.searchsorted(key_N, bounds, out_int32=True)


def tile_table(
    offsets: Tensor,
    *,
    num_experts: int,
    slots: int,
    tokens: int,
    rows_per_tile: int,
    by_slot: bool,
) -> Tensor:
    """Cut every expert's sorted rows into tiles; see ``samv2_kernels.tile_table``."""
    scopes = slots if by_slot else 1
    length = num_tiles(num_experts, slots, tokens, rows_per_tile, by_slot)
    step = slots // scopes
    bounds = offsets.long()
    first_SE = bounds[:-1:step].view(num_experts, scopes).T
    stop_SE = bounds[step::step].view(num_experts, scopes).T
    tiles_SE = (stop_SE - first_SE + rows_per_tile - 1) // rows_per_tile
    end_SE = tiles_SE.cumsum(1)
    index_SL = torch.arange(length, device=offsets.device).repeat(scopes, 1)
    expert_SL = torch.searchsorted(end_SE.contiguous(), index_SL, right=True)
    used_SL = expert_SL < num_experts
    own_SL = expert_SL.clamp(max=num_experts - 1)
    inside_SL = index_SL - (end_SE - tiles_SE).gather(1, own_SL)
    start_SL = first_SE.gather(1, own_SL) + inside_SL * rows_per_tile
    stop_SL = torch.minimum(start_SL + rows_per_tile, stop_SE.gather(1, own_SL))
    entries_SL3 = torch.stack([own_SL, start_SL, stop_SL], dim=2)
    padding = torch.tensor([-1, 0, 0], device=offsets.device)
    return torch.where(used_SL.unsqueeze(2), entries_SL3, padding).to(torch.int32)


def num_tiles(
    num_experts: int, slots: int, tokens: int, rows_per_tile: int, by_slot: bool
) -> int:
    """L: enough tiles for any routing of T tokens, known without looking at it."""
    rows = tokens if by_slot else tokens * slots
    return -(-rows // rows_per_tile) + num_experts
