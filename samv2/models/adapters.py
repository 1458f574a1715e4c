"""Row-LoRA adapters: frozen shared factors, and expert blocks as flat vectors.

The factors A_g, A_u (R x D) and B_d (D x R) of every layer are generated from the run's
seed and never sent: orthonormal rows (A) and columns (B), so each adapter row is a
coordinate in a random R-dimensional subspace (FFA-LoRA, arXiv 2403.12313, freezes A for
the same reason). Because they are common to all clients, averaging the trained rows
averages the weight changes exactly.

One expert's trainable numbers form one *block*, a flat float32 vector:

    [B_g[e] (F R) | B_u[e] (F R) | A_d[e] (R F) | gate row (D) | gate bias | u_e |
     edge strengths into e (E)]

Its expert id is ``layer * E + e``; the assembler is one more block, id ``L * E``
(:mod:`samv2.experts.block_ids`).

With G > 1 *siblings*, an expert has G sets of adapter rows, each for one kind of text.
The block above holds those of sibling 0. Sibling g has a block of rows alone, id
``L E + 1 + (g - 1) L E + layer E + e``, and the gate that tells kinds of text apart
(:mod:`samv2.experts.sibling_gate`) is the last block, id ``G L E + 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from samv2.common.errors import ModelError
from samv2.experts.block_ids import assembler_block, expert_block, gate_block
from samv2.experts.moe_layers import ExpertGraphMLP, FrozenFactors


def make_factors(
    *, seed: int, layer: int, model_width: int, rank: int, scale: float
) -> FrozenFactors:
    """The frozen factors of one layer, float32.

    Args:
        seed: of the run.
        layer: index among the converted layers.
        model_width: D.
        rank: R, 1 <= R <= D.
        scale: s, multiplies every adapter term.

    Raises:
        ModelError: the rank is outside 1..D.
    """
    if not 1 <= rank <= model_width:
        raise ModelError(f"adapter.rank is {rank}; it must lie in 1..{model_width}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)

    def orthonormal_DR() -> Tensor:
        normal = torch.randn(model_width, rank, generator=generator, dtype=torch.double)
        q, r = torch.linalg.qr(normal)
        return (q * r.diagonal().sign()).float()

    return FrozenFactors(
        gate_RD=orthonormal_DR().T.contiguous(),
        up_RD=orthonormal_DR().T.contiguous(),
        down_DR=orthonormal_DR(),
        scale=scale,
    )


Of = Callable[[nn.Parameter], Tensor]
"""A tensor for each parameter, in its shape: itself, or what an optimiser keeps of it."""


def itself(parameter: nn.Parameter) -> Tensor:
    """The parameter."""
    return parameter


def expert_parts(
    layer: ExpertGraphMLP, expert: int, sibling: int = 0, *, of: Of = itself
) -> list[Tensor]:
    """Views of one expert's trainable numbers, in the block's order.

    Args:
        layer: the expert's.
        expert: storage id.
        sibling: whose rows.
        of: what to view for a parameter.
    """
    columns = layer.sibling_columns(sibling)
    rows = [
        of(layer.adapter_gate_EFR)[expert, :, columns],
        of(layer.adapter_up_EFR)[expert, :, columns],
        of(layer.adapter_down_ERF)[expert, columns],
    ]
    if sibling:
        return rows
    return rows + [
        of(layer.gate_weight_ED)[expert],
        of(layer.gate_bias_E)[expert],
        of(layer.mix_E)[expert],
        of(layer.edge_strength_EE)[:, expert],
    ]


def block_parts(
    layers: Sequence[ExpertGraphMLP],
    assembler: nn.Module | None,
    gate: nn.Module | None = None,
    *,
    of: Of = itself,
) -> dict[int, list[Tensor]]:
    """Views of the numbers of every block of a model, by id.

    Args:
        layers: the converted layers in order.
        assembler: its parameters are one block; None for none.
        gate: the siblings' gate, another; None where there is one sibling.
        of: what to view for a parameter.
    """
    num_experts, experts = layers[0].num_experts, assembler_id(layers)
    parts: dict[int, list[Tensor]] = {}
    for sibling in range(layers[0].siblings):
        for index, layer in enumerate(layers):
            for expert in range(num_experts):
                number = index * num_experts + expert
                expert_id = expert_block(number, experts, sibling)
                parts[expert_id] = expert_parts(layer, expert, sibling, of=of)
    if assembler is not None:
        parts[assembler_id(layers)] = [of(part) for part in assembler.parameters()]
    if gate is not None:
        parts[gate_id(layers)] = [of(part) for part in gate.parameters()]
    return parts


def read_blocks(
    layers: Sequence[ExpertGraphMLP],
    assembler: nn.Module | None,
    gate: nn.Module | None = None,
    *,
    of: Of = itself,
) -> dict[int, Tensor]:
    """All trainable blocks of a model; arguments as of :func:`block_parts`.

    Returns:
        {expert_id: (n,) float32}, detached copies on the CPU.
    """
    parts = block_parts(layers, assembler, gate, of=of)
    return {expert_id: _flatten(views) for expert_id, views in parts.items()}


def write_blocks(
    layers: Sequence[ExpertGraphMLP],
    assembler: nn.Module | None,
    blocks: Mapping[int, Tensor],
    gate: nn.Module | None = None,
    *,
    of: Of = itself,
) -> None:
    """Copy blocks into a model's parameters, in place; absent ids keep their values.

    Raises:
        ModelError: an id that the model does not have, or a block of another size;
            nothing was written.
    """
    known = block_parts(layers, assembler, gate, of=of)
    chosen: list[tuple[list[Tensor], Tensor]] = []
    for expert_id, block in blocks.items():
        if expert_id not in known:
            raise ModelError(
                f"block {expert_id} is not one of the model's {len(layers)} layers of "
                f"{layers[0].num_experts} experts with {layers[0].siblings} siblings"
            )
        parts = known[expert_id]
        expected = sum(part.numel() for part in parts)
        if block.shape != (expected,):
            raise ModelError(
                f"block {expert_id} has shape {tuple(block.shape)}, the model needs "
                f"({expected},); is it from a run with another rank or model?"
            )
        chosen.append((parts, block))
    with torch.no_grad():
        for parts, block in chosen:
            sizes = [part.numel() for part in parts]
            placed = block.to(parts[0].device)
            for part, values in zip(parts, placed.split(sizes)):
                part.copy_(values.view(part.shape))


def assembler_id(layers: Sequence[ExpertGraphMLP]) -> int:
    """The id of the assembler's block: one past the last expert's."""
    return assembler_block(len(layers) * layers[0].num_experts)


def gate_id(layers: Sequence[ExpertGraphMLP]) -> int:
    """The id of the sibling gate's block, the last."""
    return gate_block(assembler_id(layers), layers[0].siblings)


def block_layers(
    layers: int, num_experts: int, siblings: int
) -> tuple[int, dict[int, int]]:
    """Where blocks belong.

    Args:
        layers: L.
        num_experts: E.
        siblings: G.

    Returns:
        The id of the assembler's block, and the converted layer of every expert's block,
        siblings' included, by its id.
    """
    experts = layers * num_experts
    found = {
        expert_block(number, experts, sibling): number // num_experts
        for sibling in range(siblings)
        for number in range(experts)
    }
    return assembler_block(experts), found


def _flatten(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1).float() for part in parts]).cpu()
