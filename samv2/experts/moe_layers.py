"""The FFN of a converted layer: route, walk, run the visited experts, combine.

    unit:     y = sum_{e visited} (1 + u_e p_e) FFN_e(h_e) + sum_{e not visited} S_e(x)
    softmax:  y = sum_{e visited} p_e FFN_e(h_e)

``unit`` is the function-preserving combine: p is the softmax over all routed scores, u
is trainable and 0 at the start, so K = E is the dense FFN (the 1 + u p form is CMoE's,
arXiv 2502.04416). At a K that has a repair, FFN_e is computed with the repair's down
projection and its one linear stand-in takes the place of the sum of surrogates.
``softmax`` is EMoE's formula with p over the visited experts (the top-K on the complete
graph); on a converted SwiGLU model it scales every expert down and takes perplexity from
tens to millions, even at K = E. It is here for models trained that way.

Shapes: B sequences, S positions, T = B S tokens, D model width, E experts, F rows an
expert, R adapter rank, G siblings, K visits a token, M masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from samv2.common.errors import ModelError
from samv2.common.settings_checks import COMBINES
from samv2.experts.calibration import Gate
from samv2.experts.costs import grouping_pays
from samv2.experts.frozen_blocks import FrozenBlocks
from samv2.experts.repair import Repair
from samv2.experts.straight_through import Choice, GateScores
from samv2_kernels import (
    ExpertAdapters,
    ExpertWeights,
    Surrogates,
    Visits,
    Walk,
    grouped_experts,
    masked_dense_experts,
    visit,
    walk,
)
from samv2_kernels.reference import choose_topk, topk_threshold

Recorder = Callable[[int, Walk], None]
"""Called with the layer's index and its walk on every forward pass."""
MaskMaker = Callable[..., Tensor]
"""The assembler's call: (context_BD, layer, server_mask_EE, ...) -> (B, E, E)."""


@dataclass(frozen=True, kw_only=True)
class WalkOptions:
    """What a caller may choose for one forward pass."""

    experts_per_token: int | None = None
    """K for this pass; None keeps each layer's own."""
    use_assembler: bool = True
    """False walks the server graph alone."""
    temperature: float = 1.0
    """Of the assembler's soft mask (training)."""
    generator: torch.Generator | None = None
    """Noise of the assembler's mask; None means evaluation: no noise."""
    fill: bool = False
    """Complete smaller sets best-first."""
    recorder: Recorder | None = None
    """Sees every walk; used for usage counts and traces."""
    siblings: tuple[int, ...] | None = None
    """Adapter siblings that take part; None: all."""
    share_BSG: Tensor | None = None
    """(B, S, G) the siblings' shares, of those that take part; None: they count alike.
    :class:`ExpertModel` fills it in."""


@dataclass(frozen=True, kw_only=True)
class PrefixState:
    """Sum of the FFN inputs of a sequence's prefix seen so far, for the assembler."""

    sum_BD: Tensor
    count: int
    """Prefix positions summed, at most the prefix length."""
    offset: int
    """Positions seen in all."""


@dataclass(frozen=True, kw_only=True)
class FrozenFactors:
    """The adapters' factors that all experts and clients share."""

    gate_RD: Tensor
    up_RD: Tensor
    down_DR: Tensor
    scale: float


class ExpertGraphMLP(FrozenBlocks):
    """A SwiGLU FFN as a graph of experts.

    Args:
        layer: index among the converted layers.
        weights: base blocks, (E, F, D) each.
        gate: calibrated or averaged gate.
        surrogates: linear stand-ins, or None.
        factors: the adapters' frozen factors.
        edge_mask_EE: (E, E) bool, the server graph.
        order_E: (E,) int64, storage id at each position.
        num_shared: experts 0..num_shared-1 (storage ids) are always visited.
        experts_per_token: K, shared experts included.
        combine: ``unit`` or ``softmax``.
        chains: run edges with their strengths (alpha); False keeps alpha at 0, so that
            edges gate reachability and carry no data.
        assembler: makes masks from a prefix's context, or None.
        prefix_tokens: how many leading positions form the context.
        siblings: G, sets of adapter rows that an expert has.
        visits: by K, how many visits this layer makes where that is not K itself: under
            one budget, layers that need more visits take them from others.
    """

    def __init__(
        self,
        *,
        layer: int,
        weights: ExpertWeights,
        gate: Gate,
        surrogates: Surrogates | None,
        factors: FrozenFactors,
        edge_mask_EE: Tensor,
        order_E: Tensor,
        num_shared: int,
        experts_per_token: int,
        combine: str = "unit",
        chains: bool = False,
        assembler: MaskMaker | None = None,
        prefix_tokens: int = 32,
        siblings: int = 1,
        visits: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(weights, surrogates)
        num_experts, width, _ = self.shape
        columns = factors.gate_RD.shape[0] * siblings
        if combine not in COMBINES:
            raise ModelError(f"experts.combine is {combine!r}; use one of {COMBINES}")
        check_visits(experts_per_token, num_shared, num_experts)
        self.layer = layer
        self.experts_per_token = experts_per_token
        self.num_shared = num_shared
        self.combine = combine
        self.chains = chains
        self.prefix_tokens = prefix_tokens
        self.assembler = assembler
        self.scale = factors.scale
        self.siblings = siblings

        self.visits = dict(visits or {})
        for visited in self.visits.values():
            check_visits(visited, num_shared, num_experts)
        self.register_buffer("factor_gate_RD", factors.gate_RD)
        self.register_buffer("factor_up_RD", factors.up_RD)
        self.register_buffer("factor_down_DR", factors.down_DR)
        self.register_buffer("edge_mask_EE", edge_mask_EE)
        self.register_buffer("order_E", order_E)
        shared_E = torch.zeros(num_experts, dtype=torch.bool)
        shared_E[:num_shared] = True
        self.register_buffer("shared_E", shared_E, persistent=False)

        self.gate_weight_ED = nn.Parameter(gate.weight_ED.float().clone())
        self.gate_bias_E = nn.Parameter(gate.bias_E.float().clone())
        self.mix_E = nn.Parameter(torch.zeros(num_experts))
        self.edge_strength_EE = nn.Parameter(torch.zeros(num_experts, num_experts))
        # Sibling g has columns g R to (g + 1) R.
        self.adapter_gate_EFR = nn.Parameter(torch.zeros(num_experts, width, columns))
        self.adapter_up_EFR = nn.Parameter(torch.zeros(num_experts, width, columns))
        self.adapter_down_ERF = nn.Parameter(torch.zeros(num_experts, columns, width))

    @property
    def rank(self) -> int:
        """R, of one sibling."""
        return self.factor_gate_RD.shape[0]

    @property
    def adapters(self) -> ExpertAdapters:
        """The trainable rows with their frozen factors, where there is one sibling."""
        return self.mixed_adapters(None, None)

    def mixed_adapters(
        self, siblings: tuple[int, ...] | None, share_TG: Tensor | None
    ) -> ExpertAdapters:
        """The rows of some siblings, and their shares.

        Args:
            siblings: those that take part; None: all.
            share_TG: (T, G) shares of those; None: there is one, or they count alike.
        """
        rows = (self.adapter_gate_EFR, self.adapter_up_EFR, self.adapter_down_ERF)
        if siblings is not None and len(siblings) < self.siblings:
            rows = self._of_siblings(siblings)
        gate_EFR, up_EFR, down_ERF = rows
        count = gate_EFR.shape[2] // self.rank
        if share_TG is None and count > 1:
            # Rows that count alike are one set: their mean.
            gate_EFR, up_EFR = (
                part.unflatten(2, (count, -1)).mean(2) for part in (gate_EFR, up_EFR)
            )
            down_ERF = down_ERF.unflatten(1, (count, -1)).mean(1)
        return ExpertAdapters(
            shared_gate_RD=self.factor_gate_RD,
            shared_up_RD=self.factor_up_RD,
            shared_down_DR=self.factor_down_DR,
            gate_EFR=gate_EFR,
            up_EFR=up_EFR,
            down_ERF=down_ERF,
            scale=self.scale,
            share_TG=share_TG,
        )

    def sibling_columns(self, sibling: int) -> slice:
        """Where a sibling's rows lie in the adapters' columns."""
        return slice(sibling * self.rank, (sibling + 1) * self.rank)

    def _of_siblings(self, siblings: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        columns = [self.sibling_columns(item) for item in siblings]
        gate, up, down = (
            self.adapter_gate_EFR,
            self.adapter_up_EFR,
            self.adapter_down_ERF,
        )
        return (
            torch.cat([gate[:, :, part] for part in columns], dim=2),
            torch.cat([up[:, :, part] for part in columns], dim=2),
            torch.cat([down[:, part] for part in columns], dim=1),
        )

    def _applied_adapters(self, options: WalkOptions) -> ExpertAdapters | None:
        """The adapters, or None where they add nothing and nobody asks for gradients."""
        rows = (self.adapter_gate_EFR, self.adapter_up_EFR, self.adapter_down_ERF)
        learning = torch.is_grad_enabled() and any(part.requires_grad for part in rows)
        if not learning and not any(bool(part.any()) for part in rows):
            return None
        share = options.share_BSG
        share_TG = None if share is None else share.flatten(0, 1)
        return self.mixed_adapters(options.siblings, share_TG)

    def add_repair(self, k: int, repair: Repair) -> None:
        """See :meth:`FrozenBlocks.add_repair`.

        Raises:
            ModelError: K = E, which needs no repair, or the combine is not ``unit``.
        """
        if self.combine != "unit":
            raise ModelError(
                f"experts.combine is {self.combine!r}; repairs are fitted to 'unit'"
            )
        super().add_repair(k, repair)

    def forward(
        self,
        x_BSD: Tensor,
        options: WalkOptions | None = None,
        prefix: PrefixState | None = None,
    ) -> tuple[Tensor, PrefixState]:
        """Run the layer.

        Args:
            x_BSD: (B, S, D) FFN inputs of S consecutive positions.
            options: choices for this pass; None means evaluation defaults.
            prefix: state after the positions before these; None at position 0.

        Returns:
            (B, S, D) outputs, and the state to pass with the following positions.
        """
        options = options or WalkOptions()
        batch, length, model_width = x_BSD.shape
        state = self._advance(x_BSD, prefix)
        x_TD = x_BSD.reshape(-1, model_width)
        scores_TE = self.scores(x_TD)
        k = options.experts_per_token
        if k is None:
            k = self.experts_per_token
        check_visits(k, self.num_shared, self.num_experts)
        own = self.visits_at(k)
        walked = self._walk(scores_TE, state, batch, length, own, options)
        if options.recorder is not None and isinstance(walked, Walk):
            options.recorder(self.layer, walked)
        y_TD = self._experts(
            x_TD,
            walked,
            self._weigh(scores_TE, walked),
            k,
            self._applied_adapters(options),
        )
        return y_TD.view(batch, length, model_width), state

    def visits_at(self, k: int) -> int:
        """How many visits this layer makes when the model is asked for ``k``."""
        return self.visits.get(k, k)

    def scores(self, x_TD: Tensor) -> Tensor:
        """g = G x + c, (T, E) float32."""
        return GateScores.apply(x_TD, self.gate_weight_ED, self.gate_bias_E)

    def visited(self, x_TD: Tensor, k: int) -> Tensor:
        """(T, E) bool: what (T, D) inputs visit on the server graph at K = ``k``."""
        scores_TE = self.scores(x_TD)
        reached_TE = visit(
            scores_TE[:, self.order_E].detach(),
            self.edge_mask_EE.unsqueeze(0),
            experts_per_token=self.visits_at(k),
            shared_E=self.shared_E[self.order_E],
        ).visited_TE
        return reached_TE[:, torch.argsort(self.order_E)]

    def _advance(self, x_BSD: Tensor, prefix: PrefixState | None) -> PrefixState:
        """Add this chunk's part of the prefix to the context sum."""
        offset = 0 if prefix is None else prefix.offset
        inside = min(max(self.prefix_tokens - offset, 0), x_BSD.shape[1])
        if self.assembler is None:
            # Nobody asks for the sum.
            sum_BD = x_BSD.new_zeros((len(x_BSD), x_BSD.shape[2]), dtype=torch.float32)
        else:
            prefix_BPD = x_BSD.detach()[:, :inside]
            sum_BD = prefix_BPD.sum(dim=1, dtype=torch.float32)
        return PrefixState(
            sum_BD=sum_BD if prefix is None else prefix.sum_BD + sum_BD,
            count=inside if prefix is None else prefix.count + inside,
            offset=offset + x_BSD.shape[1],
        )

    def _walk(
        self,
        scores_TE: Tensor,
        state: PrefixState,
        batch: int,
        length: int,
        k: int,
        options: WalkOptions,
    ) -> Visits:
        """Walk in positions; the result is in storage ids.

        It has the order of the visits, which is costly, only where that is looked at.
        """
        masks_MEE = self.edge_mask_EE.unsqueeze(0)
        mask_index_T = None
        assembled = self.assembler is not None and options.use_assembler
        if assembled and state.offset > self.prefix_tokens:
            context_BD = state.sum_BD / max(state.count, 1)
            made_BEE = self.assembler(
                context_BD,
                self.layer,
                self.edge_mask_EE,
                temperature=options.temperature,
                generator=options.generator,
            )
            masks_MEE = torch.cat([masks_MEE.to(made_BEE.dtype), made_BEE])
            position_S = torch.arange(length) + state.offset - length
            inside_S = (position_S < self.prefix_tokens).to(scores_TE.device)
            own_B1 = 1 + torch.arange(batch, device=scores_TE.device).unsqueeze(1)
            mask_index_T = torch.where(inside_S, 0, own_B1).reshape(-1)

        stays = _stays(self.order_E)
        placed_TE = scores_TE if stays else scores_TE[:, self.order_E]
        shared_E = self.shared_E[self.order_E] if self.num_shared else None
        ordered = options.recorder is not None or self.chains
        walked = (walk if ordered else visit)(
            placed_TE.detach(),
            masks_MEE,
            experts_per_token=k,
            mask_index_T=mask_index_T,
            shared_E=shared_E,
            chosen_TE=self._choose(placed_TE, shared_E, k),
            fill=options.fill,
        )
        if stays:
            return walked
        return _renamed(walked, self.order_E, torch.argsort(self.order_E))

    def _choose(self, scores_TE: Tensor, shared_E: Tensor | None, k: int) -> Tensor:
        """q: hard in value, with the gradient of sigmoid(g - threshold)."""
        visits = k - self.num_shared
        routed_TE = scores_TE.detach()
        if shared_E is not None:
            routed_TE = routed_TE.masked_fill(shared_E, -torch.inf)
        learnt = scores_TE.requires_grad and torch.is_grad_enabled()
        if not learnt or not 0 < visits < self.num_experts - self.num_shared:
            return choose_topk(routed_TE, visits)
        threshold_T1 = topk_threshold(routed_TE, visits)
        chosen_TE = choose_topk(routed_TE, visits, threshold_T1=threshold_T1)
        return Choice.apply(scores_TE, chosen_TE, threshold_T1)

    def _groups(self, x_TD: Tensor, visits: int) -> bool:
        """Whether visits run grouped by expert rather than as one masked FFN."""
        if self.chains or x_TD.is_cuda:
            return True
        return grouping_pays(len(x_TD), visits, self.shape)

    @property
    def _mixes(self) -> bool:
        """Whether u changes the weights or is learnt; on a GPU nobody waits to tell."""
        learning = torch.is_grad_enabled() and self.mix_E.requires_grad
        return learning or self.mix_E.device.type != "cpu" or bool(self.mix_E.any())

    def _weigh(self, scores_TE: Tensor, walked: Visits) -> Tensor:
        """Combine weights of the visited experts, (T, E) float32."""
        if self.combine == "softmax":
            visited_TE = scores_TE.masked_fill(~walked.visited_TE, -torch.inf)
            return torch.softmax(visited_TE, dim=1) * walked.reached_TE
        if self.num_shared == self.num_experts or not self._mixes:
            return walked.reached_TE
        routed_TE = scores_TE
        if self.num_shared:
            routed_TE = scores_TE.masked_fill(self.shared_E, -torch.inf)
        share_TE = torch.softmax(routed_TE, dim=1)
        return walked.reached_TE * (1 + self.mix_E * share_TE)

    def _experts(
        self,
        x_TD: Tensor,
        walked: Visits,
        combine_TE: Tensor,
        k: int,
        adapters: ExpertAdapters | None,
    ) -> Tensor:
        repaired = k in self.repaired
        stand_ins = not repaired and self.combine == "unit"
        surrogates = self.surrogates if stand_ins else None
        visits = self.visits_at(k)
        if self._groups(x_TD, visits):
            y_TD = grouped_experts(
                x_TD,
                walked,
                combine_TE,
                self.blocks(k, x_TD.dtype),
                experts_per_token=visits,
                adapters=adapters,
                surrogates=surrogates,
                edge_strength_EE=self.edge_strength_EE if self.chains else None,
            )
        else:
            with self.unpacked(k, x_TD.dtype) as weights:
                y_TD = masked_dense_experts(
                    x_TD,
                    walked.reached_TE,
                    combine_TE,
                    weights,
                    adapters=adapters,
                    surrogates=surrogates,
                )
        if repaired:
            return y_TD + self.stand_in(x_TD, k)
        if stand_ins and self.dropped_out_QD is not None:
            return y_TD + self.stand_in_for_dropped(x_TD)
        return y_TD


def check_visits(experts_per_token: int, num_shared: int, num_experts: int) -> None:
    """Refuse a K that cannot be walked.

    Raises:
        ModelError: K is outside num_shared..E, or below 1.
    """
    if not max(1, num_shared) <= experts_per_token <= num_experts:
        raise ModelError(
            f"experts_per_token is {experts_per_token}; with {num_shared} shared experts "
            f"of {num_experts} it must lie in {max(1, num_shared)}..{num_experts}"
        )


def to_positions(walked: Walk, order_E: Tensor) -> Walk:
    """A walk in storage ids, as recorders see it, in positions of the graph."""
    return _renamed(walked, torch.argsort(order_E), order_E)


V = TypeVar("V", bound=Visits)


def _stays(order_E: Tensor) -> bool:
    """Whether storage ids are known to be positions; asked only where that is free."""
    if order_E.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return order_E.tolist() == list(range(len(order_E)))


def _renamed(walked: V, new_id_E: Tensor, old_id_E: Tensor) -> V:
    """Expert i is called ``new_id_E[i]``; column j of the result was ``old_id_E[j]``."""
    columns = {
        "reached_TE": walked.reached_TE[:, old_id_E],
        "chosen_TE": walked.chosen_TE[:, old_id_E],
    }
    if isinstance(walked, Walk):
        used_TK = walked.expert_ids_TK >= 0
        ids_TK = new_id_E[walked.expert_ids_TK.clamp(min=0)]
        columns["expert_ids_TK"] = torch.where(used_TK, ids_TK, -1)
    return replace(walked, **columns)
