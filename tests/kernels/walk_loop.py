"""The walk of one token as plain loops, written from its definition; slow and obvious."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LoopWalk:
    """Visits of one token in walk order."""

    chosen: set[int]
    reached: set[int]
    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)


def best_first(scores: list[float], experts: set[int]) -> list[int]:
    """Experts by falling score; ties go to the lower index."""
    return sorted(experts, key=lambda e: (-scores[e], e))


def loop_walk(
    scores: list[float],
    mask: list[list[bool]],
    *,
    experts_per_token: int,
    shared: set[int],
    fill: bool,
) -> LoopWalk:
    """Walk one token."""
    everyone = range(len(scores))
    entries = {e for e in everyone if mask[e][e] or e in shared}

    def children(visited: set[int]) -> set[int]:
        return {d for s in visited for d in everyone if d > s and mask[s][d]}

    routed = best_first(scores, set(everyone) - shared)
    chosen = set(routed[: experts_per_token - len(shared)]) | shared
    reached = chosen & entries
    while grown := (children(reached) & chosen) - reached:
        reached |= grown

    wanted = experts_per_token if fill else 1
    while len(reached) < wanted:
        if not (reachable := (entries | children(reached)) - reached):
            break
        reached |= {best_first(scores, reachable)[0]}

    found = LoopWalk(chosen=chosen, reached=reached)

    def visit(expert: int, parent: int, depth: int) -> None:
        slot = len(found.ids)
        found.ids.append(expert)
        found.parents.append(parent)
        found.depths.append(depth)
        for child in best_first(scores, children({expert}) & reached):
            if child not in found.ids:
                visit(child, slot, depth + 1)

    for entry in best_first(scores, entries & reached):
        if entry not in found.ids:
            visit(entry, -1, 0)
    return found


def loop_usage(
    walks: list[LoopWalk], server_mask: list[list[bool]]
) -> tuple[Tensor, Tensor]:
    """(E, E) usage and demand of many tokens' walks."""
    size = len(server_mask)
    usage = torch.zeros(size, size, dtype=torch.long)
    demand = torch.zeros(size, size, dtype=torch.long)
    for walked in walks:
        for expert, parent in zip(walked.ids, walked.parents):
            usage[walked.ids[parent] if parent >= 0 else expert, expert] += 1
        for dst in walked.chosen:
            if not server_mask[dst][dst]:
                demand[dst, dst] += 1
            for src in walked.reached:
                if src < dst and not server_mask[src][dst]:
                    demand[src, dst] += 1
    return usage, demand
