"""Another adapter rank or assembler on the same experts, without converting again.

Clusters, gates, surrogates and repairs know nothing of what will be trained on top: a
conversion starts with adapters at zero and an assembler that closes nothing. So one
conversion serves every rank, scale and assembler, bit for bit.

Shapes: E experts, F rows an expert, D model width, R adapter rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from samv2.common.errors import ModelError
from samv2.models.bootstrap import make_assembler
from samv2.models.convert_layer import layer_factors
from samv2.models.expert_model import ExpertModel
from samv2.models.gradient_factors import GRADIENT


def with_trainables(
    model: ExpertModel,
    *,
    adapter_rank: int,
    adapter_scale: float,
    siblings: int,
    assembler_width: int,
    prefix_tokens: int,
) -> ExpertModel:
    """A bootstrapped model's experts under fresh adapters and a fresh assembler.

    Args:
        model: before any training; its layers are changed in place and taken over.
        adapter_rank: R, 1 <= R <= D.
        adapter_scale: s.
        siblings: G.
        assembler_width: hidden width; 0 means no assembler.
        prefix_tokens: leading positions that form the assembler's context.

    Returns:
        The model that a conversion with these settings makes.

    Raises:
        ModelError: the rank is outside 1..D, or differs while factors are fitted.
    """
    fitted = model.expert_config.factors == GRADIENT
    if fitted and adapter_rank != model.expert_config.adapter_rank:
        raise ModelError(
            f"adapter.rank is {adapter_rank}, but the factors were fitted for "
            f"{model.expert_config.adapter_rank}; convert again"
        )
    config = replace(
        model.expert_config,
        adapter_rank=adapter_rank,
        adapter_scale=adapter_scale,
        siblings=siblings,
        assembler_width=assembler_width,
        prefix_tokens=prefix_tokens,
    )
    model.release()
    assembler = make_assembler(model.config.hidden_size, config)
    for position, layer in enumerate(model.expert_layers):
        experts, width, model_width = layer.shape
        if not fitted:
            factors = layer_factors(position, model_width, config)
            layer.factor_gate_RD = factors.gate_RD
            layer.factor_up_RD = factors.up_RD
            layer.factor_down_DR = factors.down_DR
        layer.scale, layer.siblings = adapter_scale, siblings
        columns = adapter_rank * siblings
        for name, shape in (
            ("adapter_gate_EFR", (experts, width, columns)),
            ("adapter_up_EFR", (experts, width, columns)),
            ("adapter_down_ERF", (experts, columns, width)),
        ):
            setattr(layer, name, nn.Parameter(torch.zeros(shape)))
        layer.prefix_tokens = prefix_tokens
        layer.assembler = assembler
    made = ExpertModel(model.llama, assembler, config)
    made.freeze_base()
    return made.eval()
