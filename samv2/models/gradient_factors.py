"""Adapter factors along the directions in which text wants the weights to change.

A row of W_g is changed by B_g A_g, so only its part in the span of A_g's R rows can be
learnt. Random rows catch R / D of a gradient's energy; the leading eigenvectors of
sum_b G_b' G_b / tr(G_b' G_b), of the gradients G_b of W on batches of calibration text,
catch most (LoRA-GA, arXiv 2407.05000, starts LoRA so; here the factors stay). For W_d the
same is done on its output side, for B_d. Clients get the factors with the model; nothing
more is sent.

Shapes: N windows, S tokens a window, M FFN rows, D model width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.experts.frozen_blocks import FrozenBlocks
from samv2.experts.moe_layers import WalkOptions
from samv2.models.expert_model import ExpertModel
from samv2.models.perplexity import next_token_loss

GRADIENT = "gradient"
WINDOWS, BATCH = 24, 4
"""Calibration windows that are looked at, and how many at a time."""
FACTORS = ("factor_gate_RD", "factor_up_RD", "factor_down_DR")


def fit_factors(
    model: ExpertModel,
    tokens_NS: Tensor,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Replace the frozen factors of every converted layer.

    Gradients of all converted FFNs are made once a batch, and each is dropped when its
    D x D moments are taken.

    Args:
        model: before any training; at the K that it will be trained with.
        tokens_NS: (N, S) int64 calibration windows; the first of them, spread evenly
            over all, are used.
        progress: called with batches done and in all.

    Raises:
        ModelError: blocks are NF4, which have no gradient.
    """
    layers = model.expert_layers
    if any(layer.packed for layer in layers):
        raise ModelError(
            "adapter.factors is 'gradient', but expert blocks are NF4; fit the factors "
            "before quantising, or use 'random'"
        )
    k = model.expert_config.experts_per_token
    model.requires_grad_(False)
    moments = [[_Moments(block) for block in _blocks(layer, k)] for layer in layers]
    chosen = torch.linspace(0, len(tokens_NS) - 1, min(WINDOWS, len(tokens_NS))).long()
    batches = tokens_NS[chosen].split(BATCH)
    for done, batch_BS in enumerate(batches, start=1):
        options = WalkOptions(use_assembler=False)
        next_token_loss(model, batch_BS, options).backward()
        progress(done, len(batches))
    for layer, parts in zip(layers, moments):
        for name, part in zip(FACTORS, parts):
            factor_RD = part.leading(layer.rank).to(getattr(layer, name))
            wanted = factor_RD.T if name.endswith("_DR") else factor_RD
            getattr(layer, name).copy_(wanted)
    model.expert_config = replace(model.expert_config, factors=GRADIENT)
    model.freeze_base()


def factor_tensors(model: ExpertModel) -> dict[str, Tensor]:
    """Fitted factors by the names they have on disk; none where the seed makes them."""
    if model.expert_config.factors != GRADIENT:
        return {}
    return {
        f"model.layers.{index}.mlp.{name}": getattr(layer, name).contiguous()
        for index, layer in zip(model.expert_config.layers, model.expert_layers)
        for name in FACTORS
    }


def _blocks(layer: FrozenBlocks, k: int) -> list[Tensor]:
    return [getattr(layer, name) for name in layer.names_at(k)]


class _Moments:
    """Sums the normalised second moments of a block's gradients over its rows."""

    def __init__(self, block_EFD: Tensor) -> None:
        width = block_EFD.shape[2]
        self.sum_DD = torch.zeros(width, width, dtype=torch.double)
        self._block = block_EFD.requires_grad_(True)
        self._hook = block_EFD.register_post_accumulate_grad_hook(self._take)

    def _take(self, block_EFD: Tensor) -> None:
        rows_MD = block_EFD.grad.flatten(0, 1).float()
        block_EFD.grad = None
        moments_DD = (rows_MD.T @ rows_MD).double()
        trace = float(moments_DD.trace())
        if trace > 0:
            self.sum_DD += moments_DD / trace

    def leading(self, rank: int) -> Tensor:
        """(R, D) orthonormal rows, the strongest first; ends the watch."""
        self._hook.remove()
        self._block.requires_grad_(False)
        return torch.linalg.eigh(self.sum_DD)[1].flip(1)[:, :rank].T.contiguous()
