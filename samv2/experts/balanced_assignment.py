"""Assignment of M rows to E clusters of exactly M / E rows at least total cost.

Semi-discrete optimal transport: row i goes to argmin_e(cost_ei - price_e). Coordinate
ascent on the dual finds the E prices up to a few rows; successive shortest paths on a
graph with one node a *cluster* (edge a -> b: the cheapest row to move from a to b) put
the rest right (Ahuja, Magnanti & Orlin 1993, 9.7).

Shapes: M rows, E clusters, S = M / E rows a cluster, A problems.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEP_WORTH = 0.25
"""Price ascent goes on while a sweep sets right more rows a cluster than this."""
TIE = 1e-6
"""Costs that differ by less than this share of their range are the same."""


def balanced_assignment(
    cost_EM: Tensor, prices_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Labels of least total cost with exactly M / E rows in each cluster.

    Args:
        cost_EM: (E, M) float32; E divides M, 2 <= E < M.
        prices_E: (E,) prices to begin from, say of similar costs; zeros if None.

    Returns:
        (M,) int64 labels, optimal if costs within a millionth of their range are equal,
        and (E,) float32 prices for which each row's label is its argmin(cost - price).
    """
    num_clusters, num_rows = cost_EM.shape
    size = num_rows // num_clusters
    prices_E = cost_EM.new_zeros(num_clusters) if prices_E is None else prices_E
    exact_EM = cost_EM.double()
    astray = saved = num_rows
    while min(astray, saved) > SWEEP_WORTH * num_clusters:
        prices_E = ascend(cost_EM, prices_E)
        labels_M = (exact_EM - prices_E.unsqueeze(1)).argmin(dim=0)
        excess = (labels_M.bincount(minlength=num_clusters) - size).tolist()
        before, astray = astray, sum(n for n in excess if n > 0)
        saved = before - astray
    if any(excess):
        labels_M, prices_E = repair(exact_EM, labels_M, excess)
    return labels_M, prices_E.float()


def ascend(cost_AEM: Tensor, prices_AE: Tensor) -> Tensor:
    """Give each cluster in turn the price at which S rows prefer it to all others.

    Args:
        cost_AEM: (E, M), or (A, E, M) for several problems at once.
        prices_AE: (E,) or (A, E) prices to begin from.

    Returns:
        Prices of the same shape, whose dual value is no lower.
    """
    num_clusters, num_rows = cost_AEM.shape[-2:]
    size, prices_AE = num_rows // num_clusters, prices_AE.clone()
    slack_AEM = cost_AEM - prices_AE.unsqueeze(-1)
    for e in range(num_clusters):
        cost_AM, slack_AM = cost_AEM[..., e, :], slack_AEM[..., e, :]
        slack_AM.fill_(torch.inf)
        need_AM = cost_AM - slack_AEM.amin(dim=-2)
        lowest = need_AM.topk(size + 1, largest=False).values
        price_A = lowest[..., -2:].mean(dim=-1)
        prices_AE[..., e] = price_A
        torch.sub(cost_AM, price_A.unsqueeze(-1), out=slack_AM)
    return prices_AE


def repair(
    cost_EM: Tensor, labels_M: Tensor, excess: list[int]
) -> tuple[Tensor, Tensor]:
    """Move rows along cheapest paths of clusters until no cluster has an excess.

    Labels that are optimal for their own counts stay so. The shortest distances left at
    the end are prices: no row of a is cheaper in b by more than dist_b - dist_a.
    """
    num_clusters, labels_M, excess = len(excess), labels_M.clone(), list(excess)
    tie = TIE * float(cost_EM.max() - cost_EM.min())
    extra_EM = cost_EM - cost_EM.gather(0, labels_M.unsqueeze(0))
    edges_EE = extra_EM.new_full((num_clusters, num_clusters), torch.inf)
    edges_EE.scatter_reduce_(1, labels_M.expand_as(extra_EM), extra_EM, "amin")
    edges_EE = edges_EE.T.cpu().contiguous()
    while any(excess):
        path = cheapest_path(edges_EE, excess)
        rows = min(excess[path[0]], -excess[path[-1]])
        rows = push(cost_EM, labels_M, path, rows, tie)
        excess[path[0]] -= rows
        excess[path[-1]] += rows
        for cluster in path:
            edges_EE[cluster] = cheapest_moves(cost_EM, labels_M, cluster)
    prices_E, _ = shortest(edges_EE, edges_EE.new_zeros(num_clusters))
    return labels_M, prices_E.to(cost_EM.device)


def cheapest_moves(cost_EM: Tensor, labels_M: Tensor, cluster: int) -> Tensor:
    """(E,) on the host: least cost of moving one of the cluster's rows to each."""
    rows = (labels_M == cluster).nonzero().squeeze(1)
    if not len(rows):
        return cost_EM.new_full((len(cost_EM),), torch.inf).cpu()
    cost = cost_EM[:, rows]
    return (cost - cost[cluster]).amin(dim=1).cpu()


def shortest(edges_EE: Tensor, reach_E: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Bellman-Ford: distances, and where each node was reached from, hop by hop."""
    nodes_E, hops = torch.arange(len(edges_EE)), []
    for _ in range(len(edges_EE)):
        best_E, origin_E = (reach_E.unsqueeze(1) + edges_EE).min(dim=0)
        nearer_E = best_E < reach_E
        if not bool(nearer_E.any()):
            break
        reach_E = torch.where(nearer_E, best_E, reach_E)
        hops.append(torch.where(nearer_E, origin_E, nodes_E))
    return reach_E, hops


def cheapest_path(edges_EE: Tensor, excess: list[int]) -> list[int]:
    """From the clusters with too many rows to the nearest with too few."""
    reach_E = torch.tensor([0.0 if n > 0 else torch.inf for n in excess]).to(edges_EE)
    reach_E, hops = shortest(edges_EE, reach_E)
    under = [e for e, n in enumerate(excess) if n < 0]
    path = [min(under, key=reach_E.tolist().__getitem__)]
    for origin_E in reversed(hops):
        node = int(origin_E[path[0]])
        # A walk that ties lead back to itself is cut short there.
        path = path[path.index(node) :] if node in path else [node, *path]
    return path


def push(
    cost_EM: Tensor, labels_M: Tensor, path: list[int], limit: int, tie: float
) -> int:
    """Move up to ``limit`` equally cheap rows along each edge of a path, in place."""
    moves = []
    for a, b in zip(path, path[1:]):
        rows = (labels_M == a).nonzero().squeeze(1)
        extra = cost_EM[b, rows] - cost_EM[a, rows]
        least = extra.topk(min(limit, len(rows)), largest=False)
        limit = int((least.values <= least.values[0] + tie).sum())
        moves.append((rows[least.indices], b))
    for rows, b in moves:
        labels_M[rows[:limit]] = b
    return limit
