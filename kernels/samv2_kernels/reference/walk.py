"""The walk: which experts a token visits, in which order, and under which parent.

Scores g select the K best experts of a token (q = 1). An expert of that set is visited
iff it can be reached through kept edges inside the set; the diagonal of the edge mask
says "may enter here". The mask is upper triangular, so one sweep in index order decides
reachability, and no cycle can be expressed:

    r_j = q_j (1 - (1 - A_jj) prod_{i<j} (1 - r_i A_ij))

With straight-through q and A the sweep is differentiable in every edge. On the complete
graph the visited set is the top-K set.

Shapes: T tokens, E experts, K visits a token, M masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1


@dataclass(frozen=True, kw_only=True)
class Visits:
    """The experts that a batch of tokens visits, without their order."""

    reached_TE: Tensor
    """The sweep's r: 0/1 in value, in the scores' dtype, differentiable in q and A."""
    chosen_TE: Tensor
    """bool; q: the experts the scores ask for (shared experts included)."""

    @property
    def visited_TE(self) -> Tensor:
        """bool; the experts that are visited."""
        return self.reached_TE > 0.5


@dataclass(frozen=True, kw_only=True)
class Walk(Visits):
    """The visits of a batch of tokens, in pre-order (children by falling score)."""

    expert_ids_TK: Tensor
    """int64; the visited expert of each slot, -1 where the token visits fewer than K."""
    parent_slot_TK: Tensor
    """int64; the slot of the tree parent, -1 for an entry or an unused slot."""
    depth_TK: Tensor
    """int64; 0 for an entry, parent's depth + 1 below it, -1 for an unused slot."""


def choose_topk(scores_TE: Tensor, k: int) -> Tensor:
    """Mark the k highest scores of each row; ties go to the lower index.

    Args:
        scores_TE: (T, E) float; NaN is not allowed.
        k: how many experts to mark, 0 <= k <= E.

    Returns:
        (T, E) bool with exactly k ones a row.

    Raises:
        ValueError: k is outside 0..E.
    """
    num_experts = scores_TE.shape[1]
    if not 0 <= k <= num_experts:
        raise ValueError(f"k is {k}, it must lie in 0..{num_experts} (experts)")
    order_TE = torch.sort(scores_TE.detach(), dim=1, descending=True, stable=True)[1]
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    return chosen_TE.scatter_(1, order_TE[:, :k], True)


def reach(chosen_TE: Tensor, edge_mask_TEE: Tensor) -> Tensor:
    """Sweep in index order: which chosen experts can be reached from an entry.

    Args:
        chosen_TE: (T, E) float, 0/1 in value (q).
        edge_mask_TEE: (T or 1, E, E) float, 0/1 in value, upper triangular (A).

    Returns:
        (T, E) float, 0/1 in value (r); differentiable in both arguments.
    """
    reached: list[Tensor] = []
    for j in range(chosen_TE.shape[1]):
        closed = 1 - edge_mask_TEE[:, j, j]
        if reached:
            arriving = 1 - torch.stack(reached, dim=1) * edge_mask_TEE[:, :j, j]
            closed = closed * arriving.prod(dim=1)
        reached.append(chosen_TE[:, j] * (1 - closed))
    return torch.stack(reached, dim=1)


def visit(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    *,
    experts_per_token: int,
    mask_index_T: Tensor | None = None,
    shared_E: Tensor | None = None,
    chosen_TE: Tensor | None = None,
    fill: bool = False,
) -> Visits:
    """Find out which experts every token visits, for callers that need no order.

    Arguments, errors and visited sets are those of :func:`walk`, whose traversal costs
    far more than this at large E.
    """
    return _visit(
        scores_TE,
        edge_mask_MEE,
        experts_per_token=experts_per_token,
        mask_index_T=mask_index_T,
        shared_E=shared_E,
        chosen_TE=chosen_TE,
        fill=fill,
    )[0]


def walk(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    *,
    experts_per_token: int,
    mask_index_T: Tensor | None = None,
    shared_E: Tensor | None = None,
    chosen_TE: Tensor | None = None,
    fill: bool = False,
) -> Walk:
    """Walk every token through the expert graph.

    Args:
        scores_TE: (T, E) float32 scores g, finite.
        edge_mask_MEE: (M, E, E) upper-triangular masks: bool, or float with 0/1 values
            where gradients of the edges are wanted.
        experts_per_token: K, the most experts a token visits, shared ones included.
        mask_index_T: (T,) int64, which of the M masks a token uses; None means mask 0.
        shared_E: (E,) bool, experts that every token visits; None means none.
        chosen_TE: (T, E) straight-through q to use in place of the hard top-K choice
            (same values, with a gradient).
        fill: complete smaller sets best-first: repeatedly the best-scoring unvisited
            entry or child of a visited expert, until K are visited.

    Returns:
        The walk. Every token visits at least one expert: where nothing of its set can
        be entered, its best-scoring entry expert is visited.

    Raises:
        ValueError: K is below 1, leaves no room for the shared experts or exceeds E;
            or a mask has no entry at all.
    """
    visits, hard_TEE = _visit(
        scores_TE,
        edge_mask_MEE,
        experts_per_token=experts_per_token,
        mask_index_T=mask_index_T,
        shared_E=shared_E,
        chosen_TE=chosen_TE,
        fill=fill,
    )
    ids, parents, depths = _preorder(
        visits.visited_TE, scores_TE.detach(), hard_TEE, experts_per_token
    )
    return Walk(
        expert_ids_TK=ids,
        parent_slot_TK=parents,
        depth_TK=depths,
        reached_TE=visits.reached_TE,
        chosen_TE=visits.chosen_TE,
    )


def _visit(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    *,
    experts_per_token: int,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    chosen_TE: Tensor | None,
    fill: bool,
) -> tuple[Visits, Tensor]:
    """The visits, and each token's (T or 1, E, E) bool edges."""
    num_tokens, num_experts = scores_TE.shape
    if shared_E is None:
        shared_E = torch.zeros(num_experts, dtype=torch.bool, device=scores_TE.device)
    num_shared = int(shared_E.sum())
    least = max(1, num_shared)
    if not least <= experts_per_token <= num_experts:
        raise ValueError(
            f"experts_per_token is {experts_per_token}; with {num_shared} shared experts "
            f"of {num_experts} it must lie in {least}..{num_experts}"
        )
    edges_MEE = edge_mask_MEE.to(scores_TE.dtype)
    edges_MEE = edges_MEE.masked_fill(torch.diag(shared_E), 1.0)
    entries_ME = edges_MEE.detach().diagonal(dim1=1, dim2=2) > 0.5
    if not bool(entries_ME.any(dim=1).all()):
        raise ValueError(
            "an edge mask has no entry: its diagonal is all false and no expert is "
            "shared, so no expert can be reached; keep at least one diagonal edge"
        )
    if mask_index_T is None:
        edges_TEE = edges_MEE[:1]
    else:
        edges_TEE = edges_MEE[mask_index_T]

    if chosen_TE is None:
        routed_TE = scores_TE.detach().masked_fill(shared_E, -torch.inf)
        chosen_TE = choose_topk(routed_TE, experts_per_token - num_shared)
    q_TE = chosen_TE.to(scores_TE.dtype).masked_fill(shared_E, 1.0)
    # Where every expert may be entered, the sweep's product vanishes and r is q.
    all_entries = not edges_MEE.requires_grad and bool(entries_ME.all())
    reached_TE = q_TE if all_entries else reach(q_TE, edges_TEE)

    hard_TEE = edges_TEE.detach() > 0.5
    visited_TE = reached_TE.detach() > 0.5
    wanted_T = (
        torch.full((num_tokens,), experts_per_token, device=scores_TE.device)
        if fill
        else torch.ones(num_tokens, dtype=torch.long, device=scores_TE.device)
    )
    completed_TE = _complete(visited_TE, scores_TE.detach(), hard_TEE, wanted_T)
    added_TE = (completed_TE & ~visited_TE).to(scores_TE.dtype)
    visits = Visits(reached_TE=reached_TE + added_TE, chosen_TE=q_TE.detach() > 0.5)
    return visits, hard_TEE


def _complete(
    visited_TE: Tensor, scores_TE: Tensor, hard_TEE: Tensor, wanted_T: Tensor
) -> Tensor:
    """Add best-first experts until each token visits ``wanted_T`` or none is open."""
    entries_TE = hard_TEE.diagonal(dim1=1, dim2=2)
    while True:
        short_T = visited_TE.sum(dim=1) < wanted_T
        if not bool(short_T.any()):
            return visited_TE
        children_TE = (visited_TE.unsqueeze(2) & hard_TEE).any(dim=1)
        open_TE = (entries_TE | children_TE) & ~visited_TE & short_T.unsqueeze(1)
        has_T = open_TE.any(dim=1)
        if not bool(has_T.any()):
            return visited_TE
        best_T = scores_TE.masked_fill(~open_TE, -torch.inf).argmax(dim=1)
        rows_T = has_T.nonzero().squeeze(1)
        visited_TE = visited_TE.clone()
        visited_TE[rows_T, best_T[rows_T]] = True


def _preorder(
    visited_TE: Tensor, scores_TE: Tensor, hard_TEE: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Depth-first pre-order of the visited set, all tokens at once.

    Row d of ``path`` is the node at depth d - 1 of the current branch; row 0 is the
    source, whose children are the entries. The next node is the best-scoring unvisited
    child of the deepest branch node that has one.
    """
    num_tokens, num_experts = visited_TE.shape
    device = visited_TE.device
    tokens_T = torch.arange(num_tokens, device=device)
    shape = (num_tokens, slots)
    ids_TK = torch.full(shape, NONE, device=device)
    parents_TK = torch.full(shape, NONE, device=device)
    depths_TK = torch.full(shape, NONE, device=device)

    path_slot_TP = torch.full((num_tokens, slots + 1), NONE, device=device)
    children_TPE = torch.zeros(
        (num_tokens, slots + 1, num_experts), dtype=torch.bool, device=device
    )
    children_TPE[:, 0] = hard_TEE.diagonal(dim1=1, dim2=2)
    rows_TEE = hard_TEE & ~torch.eye(num_experts, dtype=torch.bool, device=device)
    height = torch.arange(slots + 1, device=device)
    remaining_TE = visited_TE.clone()
    length_T = torch.zeros(num_tokens, dtype=torch.long, device=device)

    for slot in range(slots):
        open_TPE = children_TPE & remaining_TE.unsqueeze(1)
        usable_TP = open_TPE.any(dim=2) & (height <= length_T.unsqueeze(1))
        level_T = torch.where(usable_TP, height, NONE).amax(dim=1)
        live_T = level_T >= 0
        if not bool(live_T.any()):
            break
        level_T = level_T.clamp(min=0)
        open_TE = open_TPE[tokens_T, level_T]
        node_T = scores_TE.masked_fill(~open_TE, -torch.inf).argmax(dim=1)

        ids_TK[:, slot] = torch.where(live_T, node_T, NONE)
        depths_TK[:, slot] = torch.where(live_T, level_T, NONE)
        parent_T = path_slot_TP[tokens_T, level_T]
        parents_TK[:, slot] = torch.where(live_T, parent_T, NONE)

        remaining_TE[tokens_T[live_T], node_T[live_T]] = False
        length_T = torch.where(live_T, level_T + 1, length_T)
        path_slot_TP[tokens_T, length_T] = slot
        source_T = tokens_T if rows_TEE.shape[0] > 1 else torch.zeros_like(tokens_T)
        children_TPE[tokens_T, length_T] = rows_TEE[source_T, node_T]
    return ids_TK, parents_TK, depths_TK


@dataclass(frozen=True, kw_only=True)
class UsageCounts:
    """Integer counts that the graph's edits are decided from."""

    usage_EE: Tensor
    """int64; entries on the diagonal, tree edges above it."""
    demand_EE: Tensor
    """int64; tokens where src was visited and dst chosen while the edge was off."""


def count_usage(walked: Walk, edge_mask_EE: Tensor) -> UsageCounts:
    """Count entries, tree edges and unmet demand of a walk.

    Args:
        walked: the walk of T tokens, in the rows of the mask.
        edge_mask_EE: (E, E) bool, the server's graph; demand counts its off edges
            (an off diagonal counts tokens that chose an expert that may not be entered).

    Returns:
        The counts, both (E, E) int64 and upper triangular.
    """
    num_experts = edge_mask_EE.shape[0]
    used_TK = walked.expert_ids_TK >= 0
    parent_slot_TK = walked.parent_slot_TK
    parent_TK = walked.expert_ids_TK.gather(1, parent_slot_TK.clamp(min=0))
    source_TK = torch.where(parent_slot_TK >= 0, parent_TK, walked.expert_ids_TK)
    flat = (source_TK * num_experts + walked.expert_ids_TK)[used_TK]
    usage_EE = torch.bincount(flat, minlength=num_experts**2)
    usage_EE = usage_EE.view(num_experts, num_experts)

    visited_TE = walked.visited_TE.double()
    chosen_TE = walked.chosen_TE.double()
    pairs_EE = visited_TE.T @ chosen_TE
    pairs_EE.fill_diagonal_(0)
    pairs_EE += torch.diag(chosen_TE.sum(dim=0))
    demand_EE = pairs_EE.round().long().triu() * ~edge_mask_EE
    return UsageCounts(usage_EE=usage_EE, demand_EE=demand_EE)
