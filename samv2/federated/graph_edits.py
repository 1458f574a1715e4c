"""When the server prunes and promotes edges.

Usage and demand are averaged over rounds (exponential, bias-corrected) and made relative
to a layer: 1 is the mean usage of its kept edges between experts that are not shared. An edge whose relative usage stays
below ``tau_prune`` for ``patience`` rounds is pruned; a missing one whose relative demand
stays above ``tau_promote`` is promoted. The gap between the thresholds, the patience and
the cooldown are the hysteresis; at most ``rho_max`` edits a round keep the graph calm
(SparsyFed, arXiv 2504.05153, finds little regrowth enough).

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samv2.common.settings import EditSettings
from samv2.experts.graph import Edit, ExpertGraph, reachable_experts
from samv2.federated.usage import EdgeCounts


@dataclass(frozen=True, kw_only=True)
class EdgeMemory:
    """What the server remembers of every edge between rounds; all (L, E, E)."""

    usage_LEE: Tensor
    """float64 running average of usage."""
    demand_LEE: Tensor
    """float64 running average of demand."""
    below_LEE: Tensor
    """int64 rounds in a row below ``tau_prune``."""
    above_LEE: Tensor
    """int64 rounds in a row above ``tau_promote``."""
    rest_LEE: Tensor
    """int64 rounds that an edited edge still rests."""
    rounds: int
    """How many rounds were averaged."""

    @classmethod
    def empty(cls, num_layers: int, num_experts: int) -> EdgeMemory:
        """Memory before the first round."""
        shape = (num_layers, num_experts, num_experts)

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=torch.long)

        return cls(
            usage_LEE=zeros().double(),
            demand_LEE=zeros().double(),
            below_LEE=zeros(),
            above_LEE=zeros(),
            rest_LEE=zeros(),
            rounds=0,
        )


def decide_edits(
    graph: ExpertGraph,
    memory: EdgeMemory,
    counts: EdgeCounts,
    settings: EditSettings,
    *,
    visits: Sequence[int],
    num_shared: int,
    voters_LEE: Tensor | None = None,
) -> tuple[list[Edit], EdgeMemory]:
    """One round's edits.

    Args:
        graph: the graph the round walked.
        memory: of the rounds before.
        counts: this round's, summed over clients.
        settings: thresholds and limits.
        visits: of a token in each layer; none is left with fewer reachable experts.
        num_shared: storage ids below this are always visited, thus always reachable.
        voters_LEE: (L, E, E) int64, clients of the round that wanted the edge; with
            ``min_voters`` above 1 no edge is promoted that fewer wanted.

    Returns:
        At most ``rho_max`` edits in order of falling urgency (how far past the
        threshold, on a log scale; ties by layer, src, dst), and the new memory.
    """
    routed_LEE = routed_edges(graph, num_shared)
    memory = _observe(graph, routed_LEE, memory, counts, settings)
    usage_LEE, demand_LEE = _relative(graph, routed_LEE, memory, settings)
    candidates = _candidates(memory, usage_LEE, demand_LEE, voters_LEE, settings)
    mask_LEE = graph.edge_mask_LEE.clone()
    rest_LEE = (memory.rest_LEE - 1).clamp(min=0)
    below_LEE, above_LEE = memory.below_LEE.clone(), memory.above_LEE.clone()
    edits: list[Edit] = []
    for _, edit in sorted(candidates, key=lambda item: (-item[0], item[1])):
        if len(edits) == settings.rho_max:
            break
        edge = (edit.layer, edit.src, edit.dst)
        mask_LEE[edge] = edit.kind == "promote"
        shared_E = graph.order_LE[edit.layer] < num_shared
        if edit.kind == "prune" and not _enough_reachable(
            mask_LEE[edit.layer], shared_E, visits[edit.layer]
        ):
            mask_LEE[edge] = True
            continue
        edits.append(edit)
        rest_LEE[edge] = settings.cooldown
        below_LEE[edge] = 0
        above_LEE[edge] = 0
    return edits, EdgeMemory(
        usage_LEE=memory.usage_LEE,
        demand_LEE=memory.demand_LEE,
        below_LEE=below_LEE,
        above_LEE=above_LEE,
        rest_LEE=rest_LEE,
        rounds=memory.rounds,
    )


def routed_edges(graph: ExpertGraph, num_shared: int) -> Tensor:
    """(L, E, E) bool: edges between experts that are chosen by score.

    Shared experts are visited by every token, so usage of and demand for their edges
    says nothing; they are never edited.
    """
    routed_LE = graph.order_LE >= num_shared
    both_LEE = routed_LE.unsqueeze(2) & routed_LE.unsqueeze(1)
    return both_LEE.triu()


def _observe(
    graph: ExpertGraph,
    routed_LEE: Tensor,
    memory: EdgeMemory,
    counts: EdgeCounts,
    settings: EditSettings,
) -> EdgeMemory:
    """Running averages and threshold streaks after one more round."""
    keep = settings.momentum
    averaged = EdgeMemory(
        usage_LEE=keep * memory.usage_LEE + (1 - keep) * counts.usage_LEE.double(),
        demand_LEE=keep * memory.demand_LEE + (1 - keep) * counts.demand_LEE.double(),
        below_LEE=memory.below_LEE,
        above_LEE=memory.above_LEE,
        rest_LEE=memory.rest_LEE,
        rounds=memory.rounds + 1,
    )
    usage_LEE, demand_LEE = _relative(graph, routed_LEE, averaged, settings)
    on_LEE = graph.edge_mask_LEE & routed_LEE
    off_LEE = ~graph.edge_mask_LEE & routed_LEE
    below_LEE = on_LEE & (usage_LEE < settings.tau_prune)
    above_LEE = off_LEE & (demand_LEE > settings.tau_promote)
    return EdgeMemory(
        usage_LEE=averaged.usage_LEE,
        demand_LEE=averaged.demand_LEE,
        below_LEE=(memory.below_LEE + 1) * below_LEE,
        above_LEE=(memory.above_LEE + 1) * above_LEE,
        rest_LEE=memory.rest_LEE,
        rounds=averaged.rounds,
    )


def _relative(
    graph: ExpertGraph,
    routed_LEE: Tensor,
    memory: EdgeMemory,
    settings: EditSettings,
) -> tuple[Tensor, Tensor]:
    """Usage and demand over the mean usage of the layer's kept routed edges."""
    correction = 1 - settings.momentum**memory.rounds if memory.rounds else 1.0
    usage_LEE = memory.usage_LEE / correction
    demand_LEE = memory.demand_LEE / correction
    on_LEE = graph.edge_mask_LEE & routed_LEE
    slots_L = on_LEE.sum(dim=(1, 2)).clamp(min=1)
    mean_L = ((usage_LEE * on_LEE).sum(dim=(1, 2)) / slots_L).clamp(min=1e-12)
    return usage_LEE / mean_L.view(-1, 1, 1), demand_LEE / mean_L.view(-1, 1, 1)


def _candidates(
    memory: EdgeMemory,
    usage_LEE: Tensor,
    demand_LEE: Tensor,
    voters_LEE: Tensor | None,
    settings: EditSettings,
) -> list[tuple[float, Edit]]:
    """(urgency, edit) of every edge that has crossed a threshold long enough."""
    rested_LEE = memory.rest_LEE == 0
    pruned = (rested_LEE & (memory.below_LEE >= settings.patience)).nonzero()
    wanted_LEE = rested_LEE & (memory.above_LEE >= settings.patience)
    if voters_LEE is not None and settings.min_voters > 1:
        wanted_LEE &= voters_LEE >= settings.min_voters
    promoted = wanted_LEE.nonzero()
    found = []
    for layer, src, dst in pruned.tolist():
        score = float(usage_LEE[layer, src, dst])
        ratio = settings.tau_prune / max(score, 1e-6)
        reason = (
            f"usage {score:.3f} of the layer's mean below {settings.tau_prune} for "
            f"{int(memory.below_LEE[layer, src, dst])} rounds"
        )
        edit = Edit(
            layer=layer, src=src, dst=dst, kind="prune", score=score, reason=reason
        )
        found.append((float(torch.tensor(ratio).log()), edit))
    for layer, src, dst in promoted.tolist():
        score = float(demand_LEE[layer, src, dst])
        reason = (
            f"demand {score:.3f} of the layer's mean usage above "
            f"{settings.tau_promote} for {int(memory.above_LEE[layer, src, dst])} rounds"
        )
        edit = Edit(
            layer=layer, src=src, dst=dst, kind="promote", score=score, reason=reason
        )
        ratio = score / settings.tau_promote
        found.append((float(torch.tensor(ratio).log()), edit))
    return found


def _enough_reachable(mask_EE: Tensor, shared_E: Tensor, needed: int) -> bool:
    if not bool(mask_EE.diagonal().any()):
        return False
    opened_EE = mask_EE | torch.diag(shared_E)
    return int(reachable_experts(opened_EE).sum()) >= needed
