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
from typing import NamedTuple

import torch
from torch import Tensor

from samv2_kernels.reference.preorder import NONE, preorder, visited_ids

__all__ = [
    "NONE",
    "Found",
    "UsageCounts",
    "Visits",
    "Walk",
    "choose_topk",
    "count_usage",
    "find_visits",
    "hard",
    "hard_edges",
    "preorder",
    "reach",
    "topk_threshold",
    "visit",
    "visited_ids",
    "walk",
]


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


def topk_threshold(scores_TE: Tensor, k: int) -> Tensor:
    """(T, 1): the k-th highest score of each row, 1 <= k <= E."""
    return scores_TE.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


def choose_topk(
    scores_TE: Tensor, k: int, *, threshold_T1: Tensor | None = None
) -> Tensor:
    """Mark the k highest scores of each row; ties go to the lower index.

    Args:
        scores_TE: (T, E) float; NaN is not allowed.
        k: how many experts to mark, 0 <= k <= E.
        threshold_T1: what :func:`topk_threshold` says of them, if that is at hand.

    Returns:
        (T, E) bool with exactly k ones a row.

    Raises:
        ValueError: k is outside 0..E.
    """
    num_experts = scores_TE.shape[1]
    if not 0 <= k <= num_experts:
        raise ValueError(f"k is {k}, it must lie in 0..{num_experts} (experts)")
    scores_TE = scores_TE.detach()
    if k == 0:
        return torch.zeros_like(scores_TE, dtype=torch.bool)
    if threshold_T1 is None:
        threshold_T1 = topk_threshold(scores_TE, k)
    least_TE = scores_TE >= threshold_T1
    # Ties are rare; where asking is free, their handling is skipped.
    may_ask = scores_TE.device.type == "cpu" and not torch.compiler.is_compiling()
    if may_ask and int(least_TE.sum()) == k * len(scores_TE):
        return least_TE
    above_TE = scores_TE > threshold_T1
    room_T1 = k - above_TE.sum(dim=1, keepdim=True)
    tied_TE = least_TE & ~above_TE
    return above_TE | (tied_TE & (tied_TE.cumsum(dim=1) <= room_T1))


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
    found = find_visits(
        scores_TE,
        edge_mask_MEE,
        experts_per_token=experts_per_token,
        mask_index_T=mask_index_T,
        shared_E=shared_E,
        chosen_TE=chosen_TE,
        fill=fill,
    )
    return Visits(reached_TE=found.reached_TE, chosen_TE=found.chosen_TE)


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
    found = find_visits(
        scores_TE,
        edge_mask_MEE,
        experts_per_token=experts_per_token,
        mask_index_T=mask_index_T,
        shared_E=shared_E,
        chosen_TE=chosen_TE,
        fill=fill,
    )
    ids, parents, depths = preorder(
        found.visited_TE,
        scores_TE.detach(),
        hard_edges(edge_mask_MEE, shared_E),
        mask_index_T,
        experts_per_token,
    )
    return Walk(
        expert_ids_TK=ids,
        parent_slot_TK=parents,
        depth_TK=depths,
        reached_TE=found.reached_TE,
        chosen_TE=found.chosen_TE,
    )


class Found(NamedTuple):
    """The sets of a walk."""

    reached_TE: Tensor
    """Of :class:`Visits`."""
    visited_TE: Tensor
    """bool."""
    swept_TE: Tensor
    """bool; what the sweep reached, without what completes the walk."""
    chosen_TE: Tensor
    """Of :class:`Visits`."""


def find_visits(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    *,
    experts_per_token: int,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    chosen_TE: Tensor | None,
    fill: bool,
) -> Found:
    """The sets of :func:`walk`, from the same arguments."""
    num_experts = scores_TE.shape[1]
    num_shared = 0 if shared_E is None else int(shared_E.sum())
    least = max(1, num_shared)
    if not least <= experts_per_token <= num_experts:
        raise ValueError(
            f"experts_per_token is {experts_per_token}; with {num_shared} shared experts "
            f"of {num_experts} it must lie in {least}..{num_experts}"
        )
    entries_ME = hard(edge_mask_MEE.diagonal(dim1=1, dim2=2))
    if num_shared:
        entries_ME = entries_ME | shared_E
    every_entry = bool(entries_ME.all())
    if not every_entry and not bool(entries_ME.any(dim=1).all()):
        raise ValueError(
            "an edge mask has no entry: its diagonal is all false and no expert is "
            "shared, so no expert can be reached; keep at least one diagonal edge"
        )

    if chosen_TE is None:
        routed_TE = scores_TE.detach()
        if num_shared:
            routed_TE = routed_TE.masked_fill(shared_E, -torch.inf)
        chosen_TE = choose_topk(routed_TE, experts_per_token - num_shared)
    if num_shared:
        chosen_TE = chosen_TE.masked_fill(shared_E, 1)
    q_TE = chosen_TE.to(scores_TE.dtype)
    hard_TE = hard(chosen_TE)
    # Where every expert may be entered, the sweep's product vanishes and r is q.
    if every_entry and not edge_mask_MEE.requires_grad:
        reached_TE, swept_TE = q_TE, hard_TE
    else:
        edges_MEE = edge_mask_MEE.to(scores_TE.dtype)
        if num_shared:
            edges_MEE = edges_MEE.masked_fill(torch.diag(shared_E), 1.0)
        edges_TEE = edges_MEE[:1] if mask_index_T is None else edges_MEE[mask_index_T]
        reached_TE = reach(q_TE, edges_TEE)
        swept_TE = hard(reached_TE)

    wanted = experts_per_token if fill else 1
    visited_TE = swept_TE
    if bool((swept_TE.sum(dim=1) < wanted).any()):
        edges_MEE = hard_edges(edge_mask_MEE, shared_E)
        edges_TEE = edges_MEE[:1] if mask_index_T is None else edges_MEE[mask_index_T]
        visited_TE = _complete(swept_TE, scores_TE.detach(), edges_TEE, wanted)
        reached_TE = reached_TE + (visited_TE & ~swept_TE).to(scores_TE.dtype)
    return Found(reached_TE, visited_TE, swept_TE, hard_TE)


def hard(value: Tensor) -> Tensor:
    """0/1 values as bool, without their gradient; a bool tensor as it is."""
    return value if value.dtype == torch.bool else value.detach() > 0.5


def hard_edges(edge_mask_MEE: Tensor, shared_E: Tensor | None) -> Tensor:
    """(M, E, E) bool; shared experts may be entered."""
    hard_MEE = hard(edge_mask_MEE)
    return hard_MEE if shared_E is None else hard_MEE | torch.diag(shared_E)


def _complete(
    visited_TE: Tensor, scores_TE: Tensor, hard_TEE: Tensor, wanted: int
) -> Tensor:
    """Add best-first experts until each token visits ``wanted`` or none is open."""
    entries_TE = hard_TEE.diagonal(dim1=1, dim2=2)
    while True:
        short_T = visited_TE.sum(dim=1) < wanted
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
