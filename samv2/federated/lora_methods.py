"""Baselines that train ordinary LoRA: what sets one apart from another."""

from __future__ import annotations

from dataclasses import dataclass

from samv2.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoraMethod:
    """How adapters are trained and where they live."""

    name: str
    title: str
    """For tables and pictures."""
    averaged: bool
    """The server sends adapters and averages those that come back, and a client's
    optimiser is fresh each round. False: adapters and optimiser stay where they are
    trained, and nothing is sent."""
    pooled: bool = False
    """One adapter sees all clients' batches, one client a step in turn."""
    train_a: bool = True
    """Train and send A as well as B."""


METHODS = {
    method.name: method
    for method in (
        # Zhang et al. 2023, "Towards Building the Federated GPT" (Shepherd).
        LoraMethod(name="fedit", title="FedIT", averaged=True),
        # Sun et al. 2024, arXiv 2403.12313: the mean of B A is exact where A is fixed.
        LoraMethod(name="ffa-lora", title="FFA-LoRA", averaged=True, train_a=False),
        LoraMethod(name="local", title="local only", averaged=False),
        LoraMethod(name="central", title="centralised", averaged=False, pooled=True),
    )
}
"""Known methods by name."""


def lora_method(name: str) -> LoraMethod:
    """A method by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        raise ConfigError([f"method is {name!r}; use one of {', '.join(METHODS)}"])
    return METHODS[name]
