"""Which K a bootstrap converts for, and which one the saved model keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from transformers import PretrainedConfig

from samv2.common.errors import ConfigError
from samv2.common.settings import ExpertSettings, Settings
from samv2.data.sources import parse_domains
from samv2.models.bootstrap import initial_config, parse_layers


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """How a bootstrap chooses K, and what it scores."""

    flops: float | None = None
    """K is the largest whose share of the dense FFN arithmetic is at most this."""
    target_ppl_ratio: float | None = None
    """K is the smallest whose mean perplexity ratio to the dense model is at most this."""
    also_score: tuple[str, ...] = ()
    """Domains, as in ``data.domains``, that are scored and not calibrated on."""


class Rated(Protocol):
    """A K and how much perplexity it costs."""

    @property
    def experts_per_token(self) -> int:
        """K."""

    @property
    def ratio(self) -> float | None:
        """To the dense perplexity; None where it is not finite."""


def check_options(options: FrontierOptions, settings: Settings) -> None:
    """Refuse what can be refused before the model is looked at.

    Raises:
        ConfigError: with every fault of the options.
        DataError: an unknown domain, or one that is named twice.
    """
    faults = list(_faults(options, settings.experts))
    if faults:
        raise ConfigError(faults)
    parse_domains((*settings.data.domains, *options.also_score))


def _faults(options: FrontierOptions, experts: ExpertSettings) -> Iterator[str]:
    ratio = options.target_ppl_ratio
    if ratio is None:
        return
    if options.flops is not None:
        yield "--flops and --target-ppl-ratio exclude each other; give one"
    if not 1 < ratio < math.inf:
        yield (
            f"--target-ppl-ratio is {ratio:g}; use a number above 1, e.g. 1.25 for 25 % "
            "more perplexity than the dense model has"
        )
    if not repairs(experts):
        yield (
            "--target-ppl-ratio compares repaired K, but experts.repair is "
            f"{str(experts.repair).lower()} and experts.combine is {experts.combine!r}; "
            "use true and 'unit', or leave the option out"
        )


def repairs(experts: ExpertSettings) -> bool:
    """Whether a conversion with these settings has repairs."""
    return experts.repair and experts.combine == "unit"


def plan_experts(
    options: FrontierOptions, config: PretrainedConfig, settings: Settings
) -> Settings:
    """The settings with the K that the options ask for.

    Args:
        options: checked.
        config: of the dense model, which the settings fit.
        settings: with the user's K.

    Raises:
        ConfigError: no K is as cheap as ``--flops`` asks.
    """
    experts = settings.experts
    if options.flops is not None:
        return _with_k(settings, _k_for_flops(options.flops, config, settings))
    if options.target_ppl_ratio is None:
        return settings
    total = experts.num_experts
    tried = {total // 8, total // 4, total // 2, 3 * total // 4}
    tried = {k for k in tried if k >= max(1, experts.num_shared)}
    others = tried.union(experts.other_k) - {experts.experts_per_token, total}
    return replace(settings, experts=replace(experts, other_k=tuple(sorted(others))))


def smallest_k_within(target: float, points: Sequence[Rated]) -> int:
    """The smallest K whose ratio is at most the target; if there is none, the largest.

    Args:
        target: a ratio.
        points: by rising K; the last visits every expert.
    """
    for point in points:
        if point.ratio is not None and point.ratio <= target:
            return point.experts_per_token
    return points[-1].experts_per_token


def _k_for_flops(share: float, dense: PretrainedConfig, settings: Settings) -> int:
    """The largest K that costs at most a share with K visits in every layer."""
    experts = settings.experts
    layers = parse_layers(experts.layers, dense.num_hidden_layers)
    costs = {}
    for k in range(max(1, experts.num_shared), experts.num_experts + 1):
        config = initial_config(layers, _with_k(settings, k))
        costs[k] = config.flops_fraction(dense, k)
    most = max(costs.values())
    if share > math.ceil(most * 1000) / 1000:
        raise ConfigError(
            [
                f"--flops is {share:g}, but all experts together cost {most:.3f} of the "
                "dense FFN arithmetic; write a share such as 0.5"
            ]
        )
    fitting = [k for k, cost in costs.items() if cost <= share]
    if not fitting:
        least = min(costs, key=lambda k: costs[k])
        # Rounded up, so that what is named can be had.
        raise ConfigError(
            [
                f"--flops is {share:g}, but the least that can be had is "
                f"{math.ceil(costs[least] * 1000) / 1000:.3f} (K = {least} in "
                f"{len(layers)} of {dense.num_hidden_layers} layers); raise it, convert "
                "more layers (experts.layers), or lower experts.num_shared or "
                "experts.repair_rank"
            ]
        )
    return max(fitting)


def _with_k(settings: Settings, k: int) -> Settings:
    return replace(settings, experts=replace(settings.experts, experts_per_token=k))
