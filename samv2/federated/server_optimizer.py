"""From a round's mean change to new blocks: the server's own optimiser.

    fedavg    theta += eta d
    fedavgm   m = beta m + d                                  theta += eta m
    fedadam   m = beta m + (1 - beta) d
              v = beta2 v + (1 - beta2) d^2                   theta += eta m / (sqrt(v) + eps)

FedAvgM is Hsu et al. 2019 (arXiv 1909.06335), FedAdam Reddi et al. 2021 (arXiv
2003.00295, Algorithm 2: m starts at 0, v at eps^2, no bias correction). A block that
nobody sent keeps its value and its moments, as in lazy Adam. All is float32.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samv2.common.settings import AggregationSettings


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What the optimiser carries from round to round; blocks never sent are absent."""

    first: dict[int, Tensor] = field(default_factory=dict)
    """{expert_id: m, in the block's shape}; of ``fedavgm`` and ``fedadam``."""
    second: dict[int, Tensor] = field(default_factory=dict)
    """{expert_id: v, in the block's shape}; of ``fedadam``."""


def server_step(
    blocks: Mapping[int, Tensor],
    change: Mapping[int, Tensor],
    moments: Moments,
    settings: AggregationSettings,
) -> tuple[dict[int, Tensor], Moments]:
    """One step of the server's optimiser; the arguments are not changed.

    Args:
        blocks: {expert_id: flat float32}.
        change: {expert_id: d}, of those that somebody sent.
        moments: of the rounds before.
        settings: ``optimizer``, ``learning_rate`` (eta), ``momentum`` (beta), ``beta2``
            and ``epsilon`` (eps).

    Returns:
        The blocks and the moments after the step.
    """
    eta, beta = settings.learning_rate, settings.momentum
    new, first, second = dict(blocks), dict(moments.first), dict(moments.second)
    for key, d in change.items():
        step = d
        if settings.optimizer == "fedavgm":
            step = first[key] = beta * first.get(key, torch.zeros_like(d)) + d
        elif settings.optimizer == "fedadam":
            start = torch.full_like(d, settings.epsilon**2)
            m = beta * first.get(key, torch.zeros_like(d)) + (1 - beta) * d
            v = settings.beta2 * second.get(key, start)
            v = v + (1 - settings.beta2) * d.square()
            first[key], second[key] = m, v
            step = m / (v.sqrt() + settings.epsilon)
        new[key] = blocks[key] + eta * step
    return new, Moments(first=first, second=second)


def forget(moments: Moments, rewritten: Container[int]) -> Moments:
    """The moments without those of blocks that something else than a step has changed."""

    def kept(blocks: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {key: value for key, value in blocks.items() if key not in rewritten}

    return Moments(first=kept(moments.first), second=kept(moments.second))
