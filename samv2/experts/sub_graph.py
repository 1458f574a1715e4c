"""A part of an expert graph: the experts that one client holds, and nothing of the others.

Every layer keeps the same number E' of its E experts, shared ones among them. Inside the
part experts are numbered 0..E'-1 by rising storage id; blocks, graphs and counts that
leave it carry the ids and positions of the whole, so that a server merges the update of a
part with those of others as they come.

Shapes: L layers, E experts of the whole, P = E' experts of the part, G siblings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from samv2.common.errors import GraphError
from samv2.experts.block_ids import assembler_block, expert_block, gate_block
from samv2.experts.graph import ExpertGraph


@dataclass(frozen=True, kw_only=True)
class SubGraph:
    """Which experts are kept."""

    kept: tuple[tuple[int, ...], ...]
    """Storage ids by layer, rising; as many in every layer."""
    num_experts: int
    """E of the whole."""
    experts_per_token: int
    """K of the client, shared experts included; at most E'."""
    micro_batch: int = 0
    """Windows that pass at once in training; 0: the whole batch."""

    def __post_init__(self) -> None:
        sizes = {len(layer) for layer in self.kept}
        rising = all(
            all(a < b for a, b in zip((-1, *layer), layer)) for layer in self.kept
        )
        if len(sizes) != 1 or not rising:
            raise GraphError(
                "a sub-graph must keep as many experts in every layer, by rising ids"
            )
        if max(layer[-1] if layer else -1 for layer in self.kept) >= self.num_experts:
            raise GraphError(
                f"a sub-graph names an expert beyond the {self.num_experts} there are"
            )
        if not 1 <= self.experts_per_token <= self.size or self.micro_batch < 0:
            raise GraphError(
                f"a sub-graph of {self.size} experts a layer has K = "
                f"{self.experts_per_token} and micro-batches of {self.micro_batch}"
            )

    @property
    def size(self) -> int:
        """E', experts kept in each layer."""
        return len(self.kept[0])

    @property
    def whole(self) -> bool:
        """Whether every expert is kept."""
        return self.size == self.num_experts

    def to_json(self) -> str:
        """One line; the inverse of :meth:`from_json`."""
        return json.dumps(
            {
                "kept": self.kept,
                "num_experts": self.num_experts,
                "experts_per_token": self.experts_per_token,
                "micro_batch": self.micro_batch,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> SubGraph:
        """Read a sub-graph that was sent.

        Raises:
            GraphError: the text is none.
        """
        try:
            values = json.loads(text)
            kept = tuple(tuple(int(item) for item in row) for row in values.pop("kept"))
            return cls(kept=kept, **{key: int(values[key]) for key in values})
        except (
            ValueError,
            TypeError,
            KeyError,
            RecursionError,
            AttributeError,
        ) as error:
            raise GraphError(
                f"the sub-graph that was sent cannot be read: {error}"
            ) from None

    def block_ids(self, siblings: int) -> dict[int, int]:
        """{block id inside the part: block id of the whole}, experts' and the others'."""
        own, whole = len(self.kept) * self.size, len(self.kept) * self.num_experts
        kept = [
            layer * self.num_experts + expert
            for layer, row in enumerate(self.kept)
            for expert in row
        ]
        ids = {assembler_block(own): assembler_block(whole)}
        for sibling in range(siblings):
            for inside, outside in enumerate(kept):
                key = expert_block(inside, own, sibling)
                ids[key] = expert_block(outside, whole, sibling)
        if siblings > 1:
            ids[gate_block(own, siblings)] = gate_block(whole, siblings)
        return ids

    def inward(self, blocks: Mapping[int, Tensor], siblings: int) -> dict[int, Tensor]:
        """Blocks of the whole as the part has them; those of others are left out."""
        ids = self.block_ids(siblings)
        return {
            inside: self._cut(inside, blocks[outside])
            for inside, outside in ids.items()
            if outside in blocks
        }

    def outward(self, blocks: Mapping[int, Tensor], siblings: int) -> dict[int, Tensor]:
        """Blocks of the part under the ids of the whole; strengths of edges from experts
        that are not kept are 0."""
        ids = self.block_ids(siblings)
        return {ids[key]: self._widen(key, block) for key, block in blocks.items()}

    def graph(self, whole: ExpertGraph) -> ExpertGraph:
        """The whole's graph between the kept experts; a layer that would have no entry
        gets all of them."""
        masks, orders = [], []
        for layer, kept in enumerate(self.kept):
            position_P = self.positions(whole, layer)
            mask_PP = whole.edge_mask_LEE[layer][position_P][:, position_P]
            if not bool(mask_PP.diagonal().any()):
                mask_PP = mask_PP | torch.eye(len(kept), dtype=torch.bool)
            index = {expert: place for place, expert in enumerate(kept)}
            placed = whole.order_LE[layer][position_P].tolist()
            masks.append(mask_PP)
            orders.append(torch.tensor([index[expert] for expert in placed]))
        return ExpertGraph(
            edge_mask_LEE=torch.stack(masks),
            order_LE=torch.stack(orders),
            version=whole.version,
        )

    def positions(self, whole: ExpertGraph, layer: int) -> Tensor:
        """(P,) int64: where the kept experts stand in a layer of the whole, rising."""
        is_kept = torch.zeros(self.num_experts, dtype=torch.bool)
        is_kept[list(self.kept[layer])] = True
        return is_kept[whole.order_LE[layer]].nonzero().flatten()

    def widen_counts(self, counts_LPP: Tensor, whole: ExpertGraph) -> Tensor:
        """Counts of the part's edges in the positions of the whole, (L, E, E)."""
        layers, experts = len(self.kept), self.num_experts
        counts_LEE = counts_LPP.new_zeros((layers, experts, experts))
        for layer in range(layers):
            position_P = self.positions(whole, layer)
            counts_LEE[layer, position_P[:, None], position_P] = counts_LPP[layer]
        return counts_LEE

    def _cut(self, inside: int, block: Tensor) -> Tensor:
        if inside >= len(self.kept) * self.size:
            return block
        kept = list(self.kept[inside // self.size])
        head, strengths_E = block[: -self.num_experts], block[-self.num_experts :]
        return torch.cat([head, strengths_E[kept]])

    def _widen(self, inside: int, block: Tensor) -> Tensor:
        if inside >= len(self.kept) * self.size:
            return block
        strengths_E = block.new_zeros(self.num_experts)
        strengths_E[list(self.kept[inside // self.size])] = block[-self.size :]
        return torch.cat([block[: -self.size], strengths_E])
