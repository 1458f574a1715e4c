"""The order of a walk: its visited set, depth first, children by falling score.

Shapes: T tokens, E experts, K visits a token, M masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = -1
"""No expert, no parent, no depth."""


def visited_ids(visited_TE: Tensor, k: int) -> Tensor:
    """The visited experts by rising id, for callers that need no order.

    Args:
        visited_TE: (T, E) bool with at most ``k`` ones a row.
        k: K.

    Returns:
        (T, K) int64, padded with -1 at the end; made without a host sync.
    """
    tokens, num_experts = visited_TE.shape
    # Asking is free on a CPU: where every token makes k visits, they are listed in order.
    if visited_TE.device.type == "cpu" and not torch.compiler.is_compiling():
        expert_N = visited_TE.nonzero()[:, 1]
        if len(expert_N) == tokens * k:
            return expert_N.reshape(tokens, k)
    count_TE = visited_TE.cumsum(dim=1, dtype=torch.int32)
    nth_K = torch.arange(1, k + 1, dtype=torch.int32, device=visited_TE.device)
    # The n-th visited expert is the first one at which n were counted.
    ids_TK = torch.searchsorted(count_TE, nth_K.repeat(tokens, 1))
    return ids_TK.masked_fill(ids_TK == num_experts, NONE)


def preorder(
    visited_TE: Tensor,
    scores_TE: Tensor,
    hard_MEE: Tensor,
    mask_index_T: Tensor | None,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depth-first pre-order of the visited set, all tokens at once.

    No stack is needed: an expert that waits remembers the last visited node that it is
    a child of, its origin (1 for the source, whose children are the entries, slot + 2
    for a visit, 0 for none yet, -1 once visited). A node leaves the branch only when
    all its children are visited, so the next expert is the best-scoring one of the
    latest origin: the first one, in columns that are sorted by falling score.
    """
    rising_TK = visited_ids(visited_TE, slots)
    used_TK = rising_TK >= 0
    expert_TK = rising_TK.clamp(min=0)
    score_TK = scores_TE.gather(1, expert_TK).masked_fill(~used_TK, -torch.inf)
    falling_TK = score_TK.sort(dim=1, descending=True, stable=True)[1]
    expert_TK = expert_TK.gather(1, falling_TK)

    mask_T = torch.zeros_like(expert_TK[:, 0]) if mask_index_T is None else mask_index_T
    source_TKK, child_TKK = expert_TK.unsqueeze(2), expert_TK.unsqueeze(1)
    edges_TKK = hard_MEE[mask_T[:, None, None], source_TKK, child_TKK]
    edges_TKK = edges_TKK & used_TK.unsqueeze(1)
    tokens_T = torch.arange(len(expert_TK), device=expert_TK.device)
    origin_TK = edges_TKK.diagonal(dim1=1, dim2=2).long()
    depth_TK = torch.zeros_like(origin_TK)
    found: list[tuple[Tensor, ...]] = []
    for slot in range(slots):
        latest_T1, node_T1 = origin_TK.max(dim=1, keepdim=True)
        level_T1 = depth_TK.gather(1, node_T1)
        none_T1 = latest_T1 <= 0
        values = (expert_TK.gather(1, node_T1), latest_T1 - 2, level_T1)
        found.append(tuple(value.masked_fill(none_T1, NONE) for value in values))
        if slot + 1 == slots:
            break
        origin_TK = origin_TK.scatter(1, node_T1, -1)
        waiting_TK = origin_TK >= 0
        next_TK = edges_TKK[tokens_T, node_T1.squeeze(1)] & waiting_TK
        origin_TK = origin_TK.masked_fill(next_TK, slot + 2)
        depth_TK = torch.where(next_TK, level_T1 + 1, depth_TK)
    ids, parents, depths = (torch.cat(column, dim=1) for column in zip(*found))
    return ids, parents, depths
