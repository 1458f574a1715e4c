"""AdamW's moments of a client's blocks, kept from one of its rounds to the next.

Blocks as in :mod:`samv2.models.adapters`: a client keeps the moments of what it trains
and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from samv2.models.adapters import read_blocks, write_blocks
from samv2.models.expert_model import ExpertModel

FIRST, SECOND = "exp_avg", "exp_avg_sq"


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What AdamW remembers (Kingma & Ba 2015; Loshchilov & Hutter 2019)."""

    steps: int = 0
    """Optimiser steps taken so far."""
    first: dict[int, Tensor] = field(default_factory=dict)
    """{expert_id: flat float32} running mean of gradients; zero blocks left out."""
    second: dict[int, Tensor] = field(default_factory=dict)
    """The same of squared gradients."""


def take_moments(optimizer: torch.optim.AdamW, model: ExpertModel) -> Moments:
    """The moments after some steps."""
    states = optimizer.state.values()
    return Moments(
        steps=max((int(state["step"]) for state in states), default=0),
        first=_blocks(optimizer, model, FIRST),
        second=_blocks(optimizer, model, SECOND),
    )


def give_moments(
    optimizer: torch.optim.AdamW, model: ExpertModel, moments: Moments
) -> None:
    """Let a new optimiser go on from kept moments; others start at zero.

    Raises:
        ModelError: the moments are of another model.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.steps)),
                FIRST: torch.zeros_like(parameter),
                SECOND: torch.zeros_like(parameter),
            }
    for name, blocks in ((FIRST, moments.first), (SECOND, moments.second)):
        write_blocks(
            model.expert_layers, model.assembler, blocks, of=_of(optimizer, name)
        )


def _blocks(
    optimizer: torch.optim.AdamW, model: ExpertModel, name: str
) -> dict[int, Tensor]:
    blocks = read_blocks(model.expert_layers, model.assembler, of=_of(optimizer, name))
    return {key: block for key, block in blocks.items() if bool(block.any())}


def _of(optimizer: torch.optim.AdamW, name: str) -> Callable[[nn.Parameter], Tensor]:
    """A parameter's moment; zeros, which nobody keeps, where it is not trained."""

    def of(parameter: nn.Parameter) -> Tensor:
        state = optimizer.state.get(parameter)
        return torch.zeros_like(parameter) if state is None else state[name]

    return of
