"""What makes an expert graph out of a dense model; saved beside its weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PretrainedConfig

from samv2.common.errors import ModelError
from samv2.common.settings_checks import QUANTISATIONS
from samv2.experts.costs import ffn_flops_fraction


@dataclass(frozen=True, kw_only=True)
class ExpertModelConfig:
    """What makes an expert graph out of a dense model; saved beside its weights."""

    layers: tuple[int, ...]
    """Indices of the decoder layers that are converted."""
    num_experts: int
    """E."""
    experts_per_token: int
    """K, shared experts included."""
    num_shared: int
    """Experts that every token visits."""
    combine: str = "unit"
    """``unit`` (function-preserving) or ``softmax`` (EMoE)."""
    chains: bool = False
    """Whether edges carry data (trainable strengths)."""
    surrogate_rank: int = 0
    """Q; 0 means no surrogates."""
    repaired: tuple[int, ...] = ()
    """Values of K that have a repair of their own."""
    repair_rank: int = 0
    """Rank of the repairs' linear stand-ins."""
    visits: tuple[tuple[int, ...], ...] = ()
    """For each repaired K, the visits of every converted layer; empty: K everywhere."""
    logit_scales: tuple[float, ...] = ()
    """For each repaired K, the factor on its logits; empty: 1. See
    :mod:`samv2.models.logit_scale`."""
    quantise: str = "none"
    """``nf4`` where expert blocks are packed in 4 bits, else ``none``."""
    adapter_rank: int = 8
    """R."""
    adapter_scale: float = 2.0
    """s."""
    factors: str = "random"
    """``random``: made from the seed; ``gradient``: fitted and stored."""
    siblings: int = 1
    """G, sets of adapter rows that an expert has; see
    :mod:`samv2.experts.sibling_gate`."""
    assembler_width: int = 16
    """Hidden width of the assembler; 0 means none."""
    prefix_tokens: int = 32
    """Leading positions that form the assembler's context."""
    seed: int = 0
    """Of the frozen factors and the assembler's start."""
    base_fingerprint: str = ""
    """Of the dense model this was made from."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the inverse of :meth:`from_json`."""
        flat = ("layers", "repaired", "logit_scales")
        lists = {name: list(getattr(self, name)) for name in flat}
        return asdict(self) | lists | {"visits": [list(row) for row in self.visits]}

    def logit_scale(self, k: int) -> float:
        """What the last hidden states are multiplied by at K, and so the logits."""
        return dict(zip(self.repaired, self.logit_scales, strict=False)).get(k, 1.0)

    def layer_visits(self, position: int) -> dict[int, int]:
        """By K, how many visits one converted layer makes where that is not K itself."""
        return {
            k: row[position] for k, row in zip(self.repaired, self.visits, strict=False)
        }

    def layer_flops(
        self, position: int, k: int, *, model_width: int, rows: int
    ) -> float:
        """FFN multiply-adds of one converted layer at K over those of the dense layer.

        Args:
            position: among the converted layers.
            k: K.
            model_width: D.
            rows: M.
        """
        own = self.layer_visits(position).get(k, k)
        return ffn_flops_fraction(
            model_width=model_width,
            ffn_width=rows,
            num_experts=self.num_experts,
            experts_per_token=own,
            surrogate_rank=self.surrogate_rank,
            repair_rank=(
                min(self.repair_rank, model_width) if k in self.repaired else None
            ),
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ExpertModelConfig:
        """Read :meth:`to_json`'s object.

        Raises:
            ModelError: unknown or missing keys, by name, or values that do not fit.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ModelError(
                f"the expert model's config has unknown keys {unknown}; it was written "
                "by another version of samv2"
            )
        try:
            lists = {name: tuple(values[name]) for name in ("layers", "repaired")}
            lists["logit_scales"] = tuple(values.get("logit_scales", ()))
            visits = tuple(tuple(row) for row in values["visits"])
            config = cls(**(values | lists | {"visits": visits}))
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"the expert model's config is incomplete: {error}"
            ) from None
        if config.quantise not in QUANTISATIONS:
            raise ModelError(
                f"the expert model's config has quantise {config.quantise!r}, this "
                f"version of samv2 knows {', '.join(QUANTISATIONS)}; bootstrap it again"
            )
        found = [len(row) for row in config.visits]
        expected = [len(config.layers)] * len(config.repaired)
        if found and found != expected:
            raise ModelError(
                f"the expert model's config has visits for {found} layers, one row for "
                f"each of the K {list(config.repaired)}; it needs {expected}"
            )
        scales = config.logit_scales
        positive = all(isinstance(s, float) and 0 < s < math.inf for s in scales)
        if not positive or len(scales) not in (0, len(config.repaired)):
            raise ModelError(
                f"the expert model's config has logit_scales {list(scales)}; it needs one "
                f"positive number for each of the K {list(config.repaired)}, or none"
            )
        return config

    def flops_fraction(self, dense: PretrainedConfig, k: int) -> float:
        """FFN multiply-adds at K over the dense model's, dense layers counted as 1."""
        total = dense.num_hidden_layers
        width, rows = dense.hidden_size, dense.intermediate_size
        converted = sum(
            self.layer_flops(position, k, model_width=width, rows=rows)
            for position in range(len(self.layers))
        )
        return (total - len(self.layers) + converted) / total
