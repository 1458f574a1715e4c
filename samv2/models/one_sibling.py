"""A model of one sibling, for what can hold one set of adapters only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from samv2.common.errors import ModelError
from samv2.models.expert_model import ExpertModel

MEAN = "mean"


@torch.no_grad()
def keep_sibling(model: ExpertModel, which: str) -> ExpertModel:
    """The model with one set of adapters: a sibling's, or the mean of all.

    Args:
        model: its layers are changed in place and taken over.
        which: a sibling's index, or ``mean``: what averaging over all clients gives.

    Raises:
        ModelError: there is no such sibling.
    """
    siblings = model.expert_config.siblings
    known = [str(index) for index in range(siblings)]
    if which not in (*known, MEAN):
        raise ModelError(
            f"--sibling is {which!r}, but the model's siblings are 0..{siblings - 1}; "
            f"name one of them, or {MEAN!r}"
        )
    chosen = None if which == MEAN else (int(which),)
    for layer in model.expert_layers:
        kept = layer.mixed_adapters(chosen, None)
        layer.adapter_gate_EFR = nn.Parameter(kept.gate_EFR.contiguous())
        layer.adapter_up_EFR = nn.Parameter(kept.up_EFR.contiguous())
        layer.adapter_down_ERF = nn.Parameter(kept.down_ERF.contiguous())
        layer.siblings = 1
    model.release()
    config = replace(model.expert_config, siblings=1)
    made = ExpertModel(model.llama, model.assembler, config)
    made.freeze_base()
    return made.eval()
