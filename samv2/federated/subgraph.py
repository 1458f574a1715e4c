"""Which part of the model a client gets: the most gate mass that fits its budgets.

A knapsack: choose experts of the largest mass under ``memory_bytes`` and a K under
``flops``. All experts of a layer weigh the same and every layer keeps as many, so for each
number kept the best choice is each layer's heaviest experts, and the largest number that
fits is best: the greedy choice is the optimum, and a test holds it to brute force. Before
an expert is left out, the batch is passed in smaller parts, which costs time and nothing
else.

Shapes: L converted layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from samv2.common.errors import ConfigError
from samv2.common.settings import Settings
from samv2.common.threads import one_thread
from samv2.data.shards import load_calibration
from samv2.experts.block_ids import assembler_block, expert_block, gate_block
from samv2.experts.moe_layers import WalkOptions
from samv2.experts.sub_graph import SubGraph
from samv2.federated.memory import MemoryEstimate, estimate_memory
from samv2.federated.run_text import calibration_windows
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.expert_model import ExpertModel
from samv2.models.save import read_expert_config
from samv2.updates.packing import Manifest

LARGEST_BUDGET = 2**50
MASS_TOKENS = 4096
"""Calibration tokens on which experts are weighed for clients with budgets."""


@dataclass(frozen=True, kw_only=True)
class ClientBudget:
    """What one client can hold and compute; 0: no limit."""

    memory_bytes: int = 0
    """At the peak of training, as :mod:`samv2.federated.memory` counts."""
    flops: float = 0.0
    """FFN multiply-adds a token, over the dense model's."""

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self.memory_bytes > 0 or self.flops > 0


def budget_of(
    settings: Settings, client: int, node: Mapping[str, object] | None = None
) -> ClientBudget:
    """A client's budget: its node's config goes before the settings.

    Args:
        settings: section ``budgets``.
        client: its index.
        node: Flower's node config.

    Raises:
        ConfigError: the node config has another kind of value.
    """
    budgets, given = settings.budgets, node or {}
    memory = _nth(budgets.memory_bytes, client)
    flops = _nth(budgets.flops, client)
    try:
        memory = int(given.get("memory-budget-bytes", memory))
        flops = float(given.get("flops-budget", flops))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            [f"the node config's memory-budget-bytes or flops-budget is none: {error}"]
        ) from None
    return ClientBudget(memory_bytes=memory, flops=flops)


def believed_budget(memory_bytes: object, flops: object) -> ClientBudget:
    """A budget that a client has sent; nonsense is no limit."""
    whole = type(memory_bytes) is int and 0 <= memory_bytes <= LARGEST_BUDGET
    share = type(flops) is float and 0 <= flops <= 1e6
    return ClientBudget(
        memory_bytes=memory_bytes if whole else 0, flops=flops if share else 0.0
    )


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes sub-graphs of one model for one kind of training."""

    config: ExpertModelConfig
    dense: PretrainedConfig
    mass_LE: Tensor
    """(L, E) gate mass of each expert; see :func:`gate_mass`."""
    experts_per_token: int
    """K of the run."""
    batch_size: int
    """Windows a step."""
    sequence_length: int
    """Tokens a window."""
    weight_bytes: int = 2
    """Of a frozen weight and an activation."""

    def plan(self, budget: ClientBudget) -> SubGraph | None:
        """The part for a budget; None: the whole model, as the run has it.

        Raises:
            ConfigError: not even the smallest part fits, with what it would need.
        """
        if not budget.limited:
            return None
        k = self._visits(budget.flops)
        micro, experts = self._sizes(budget.memory_bytes, k)
        kept = keep_heaviest(self.mass_LE, experts, self.config.num_shared)
        part = SubGraph(
            kept=kept,
            num_experts=self.config.num_experts,
            experts_per_token=self._served(min(k, experts)),
            micro_batch=0 if micro == self.batch_size else micro,
        )
        same_k = part.experts_per_token == self.experts_per_token
        return None if part.whole and same_k and not part.micro_batch else part

    def memory(self, part: SubGraph | None) -> MemoryEstimate:
        """What training a part takes."""
        experts = self.config.num_experts if part is None else part.size
        k = self.experts_per_token if part is None else part.experts_per_token
        micro = 0 if part is None else part.micro_batch
        return self._estimate(experts, k, micro or self.batch_size)

    def _estimate(self, experts: int, k: int, micro: int) -> MemoryEstimate:
        return estimate_memory(
            self.config,
            self.dense,
            experts=experts,
            experts_per_token=k,
            tokens=micro * self.sequence_length,
            weight_bytes=self.weight_bytes,
        )

    def _visits(self, flops: float) -> int:
        """The largest K of the run's or less that fits; one with a repair, if any has."""
        least = max(1, self.config.num_shared)
        allowed = range(least, self.experts_per_token + 1)
        if not flops:
            return self.experts_per_token

        def share(k: int) -> float:
            return self.config.flops_fraction(self.dense, k)

        fits = [k for k in allowed if share(k) <= flops]
        if not fits:
            raise ConfigError(
                [
                    f"a client's FLOPs budget is {flops:g} of the dense model's, but K = "
                    f"{least} already takes {share(least):.3f}; raise the budget, or "
                    "convert more layers"
                ]
            )
        return self._served(max(fits))

    def _served(self, most: int) -> int:
        """The largest K up to ``most`` that has a repair; ``most`` where none has."""
        least = max(1, self.config.num_shared)
        if most == self.config.num_experts:
            return most
        return max(
            (k for k in self.config.repaired if least <= k <= most), default=most
        )

    def _sizes(self, memory_bytes: int, k: int) -> tuple[int, int]:
        """Windows that pass at once, and experts kept in each layer."""
        whole = self.config.num_experts
        if not memory_bytes:
            return self.batch_size, whole
        micros = [n for n in range(self.batch_size, 0, -1) if self.batch_size % n == 0]
        for micro in micros:
            if self._estimate(whole, k, micro).total <= memory_bytes:
                return micro, whole
        least = max(1, self.config.num_shared + 1)
        for experts in range(whole - 1, least - 1, -1):
            need = self._estimate(experts, min(k, experts), 1).total
            if need <= memory_bytes:
                return 1, experts
        raise ConfigError(
            [
                f"a client's memory budget is {memory_bytes:,} bytes, but the smallest "
                f"part of the model ({least} experts a layer, one window at a time) "
                f"takes {need:,}; raise the budget, shorten train.sequence_length or "
                "bootstrap with experts.quantise = 'nf4'"
            ]
        )


def planner_of(model: ExpertModel, shards: Path, settings: Settings) -> Planner | None:
    """A run's planner; None where the settings name no budgets.

    The gate mass is measured on the run's calibration text, so it is the same after a
    resume.

    Args:
        model: the bootstrapped model; it makes the run's K visits from now on.
        shards: folder of the run's text.
        settings: of the run.
    """
    if not settings.budgets.memory_bytes and not settings.budgets.flops:
        return None
    model.set_experts_per_token(settings.experts.experts_per_token)
    length = settings.train.sequence_length
    tokens_BS = calibration_windows(load_calibration(shards), MASS_TOKENS, length)
    with one_thread():  # the same parts on any number of cores
        mass_LE = gate_mass(model, tokens_BS.long())
    return Planner(
        config=model.expert_config,
        dense=model.config,
        mass_LE=mass_LE,
        experts_per_token=settings.experts.experts_per_token,
        batch_size=settings.train.batch_size,
        sequence_length=length,
        weight_bytes=model.llama.dtype.itemsize,
    )


def keep_heaviest(
    mass_LE: Tensor, experts: int, num_shared: int
) -> tuple[tuple[int, ...], ...]:
    """Each layer's experts of the largest mass, shared ones first; ties: the lower id.

    Args:
        mass_LE: (L, E).
        experts: how many to keep in each layer.
        num_shared: ids below this are always kept.
    """
    kept = []
    for mass_E in mass_LE.tolist():
        routed = sorted(
            range(num_shared, len(mass_E)), key=lambda expert: (-mass_E[expert], expert)
        )
        chosen = [*range(num_shared), *routed[: experts - num_shared]]
        kept.append(tuple(sorted(chosen)))
    return tuple(kept)


@torch.no_grad()
def gate_mass(model: ExpertModel, tokens_BS: Tensor) -> Tensor:
    """How much of the gate's softmax each expert holds where it is visited, (L, E).

    The mean over tokens; a layer's masses sum to 1 where every expert is visited.

    Args:
        model: at the K of the run.
        tokens_BS: (B, S) int64 calibration text.
    """
    layers = model.expert_layers
    mass_LE = torch.zeros(len(layers), layers[0].num_experts, dtype=torch.double)
    hooks = []
    for index, layer in enumerate(layers):

        def count(module: torch.nn.Module, args: tuple, index: int = index) -> None:
            x_TD = args[0].flatten(0, 1)
            share_TE = torch.softmax(module.scores(x_TD).double(), dim=1)
            visited_TE = module.visited(x_TD, module.experts_per_token)
            mass_LE[index] += (share_TE * visited_TE).sum(dim=0)

        hooks.append(layer.register_forward_pre_hook(count))
    try:
        for part_BS in tokens_BS.split(4):
            model.hidden_states(part_BS, WalkOptions(use_assembler=False))
    finally:
        for hook in hooks:
            hook.remove()
    return (mass_LE / tokens_BS.numel()).float()


def _nth(values: Sequence[float], client: int) -> float:
    return values[client % len(values)] if values else 0


def whole_manifest(folder: Path, model: ExpertModel) -> Manifest:
    """The manifest of the whole model's blocks, as the server has it.

    Args:
        folder: the bootstrapped model.
        model: a part of it.
    """
    config, _ = read_expert_config(Path(folder))
    experts, siblings = len(config.layers) * config.num_experts, config.siblings
    blocks = model.read_blocks()
    inside = len(config.layers) * model.expert_config.num_experts
    rows = len(blocks[0]) - model.expert_config.num_experts + config.num_experts
    sizes = dict.fromkeys(range(experts), rows)
    if assembler_block(inside) in blocks:
        sizes[assembler_block(experts)] = len(blocks[assembler_block(inside)])
    if siblings > 1:
        first, gate = expert_block(0, experts, 1), gate_block(experts, siblings)
        own = len(blocks[expert_block(0, inside, 1)])
        sizes |= dict.fromkeys(range(first, gate), own)
        sizes[gate] = len(blocks[gate_block(inside, siblings)])
    return Manifest(
        ids=tuple(sorted(sizes)),
        shapes=tuple((sizes[key],) for key in sorted(sizes)),
        dtypes=(torch.float32,) * len(sizes),
    )
