"""An expert model as a plain Hugging Face one: adapters merged, experts re-joined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from samv2.common.errors import ModelError
from samv2.experts.frozen_blocks import DOWN, GATE, UP
from samv2.experts.moe_layers import ExpertGraphMLP
from samv2.models.expert_model import ExpertModel


@torch.no_grad()
def export_dense(
    model: ExpertModel, *, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """A plain Hugging Face model with adapters merged and experts re-joined.

    Its logits are those of the expert model at K = E walking the full graph, i.e. with
    every expert visited, where both compute in float32. NF4 blocks are exported as the
    weights that they stand for.

    Args:
        model: base weights in any dtype.
        dtype: of the result; float32 keeps all of what was trained, bfloat16 rounds the
            merged weights and halves the size.

    Raises:
        ModelError: the combine weights or chains make the K = E model no plain FFN.
    """
    return _assembled(model, _merge_layer, dtype)


@torch.no_grad()
def rejoined_dense(
    model: ExpertModel, *, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The dense model that an expert graph was made of, as a plain Hugging Face model.

    The base blocks alone: nothing that was trained, repaired or combined. Rows of an FFN
    are in expert order, which changes its output by rounding only. NF4 blocks are the
    weights that they stand for.

    Args:
        model: trained or not.
        dtype: of the result.
    """
    return _assembled(model, base_layer, dtype)


def _assembled(
    model: ExpertModel,
    ffn_of: Callable[[ExpertGraphMLP], dict[str, Tensor]],
    dtype: torch.dtype,
) -> torch.nn.Module:
    """The Hugging Face model with ``ffn_of``'s weights in its converted layers."""
    with no_init_weights():
        dense = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    target = dense.state_dict()
    source = model.llama.state_dict()
    for name in target:
        if ".mlp." not in name:
            target[name].copy_(source[name])
    for position, index in enumerate(model.expert_config.layers):
        merged = ffn_of(model.expert_layers[position])
        for name, tensor in merged.items():
            target[f"model.layers.{index}.mlp.{name}.weight"].copy_(tensor)
    for index in range(model.config.num_hidden_layers):
        if index not in model.expert_config.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                key = f"model.layers.{index}.mlp.{name}.weight"
                target[key].copy_(source[key])
    dense.tie_weights()
    return dense.eval()


def base_layer(layer: ExpertGraphMLP) -> dict[str, Tensor]:
    """gate_proj, up_proj, down_proj without what was trained, in float32, expert order."""
    gate_EFD, up_EFD, down_EFD = (
        layer.block(name, torch.float32) for name in (GATE, UP, DOWN)
    )
    return {
        "gate_proj": gate_EFD.flatten(0, 1),
        "up_proj": up_EFD.flatten(0, 1),
        "down_proj": down_EFD.flatten(0, 1).T,
    }


def check_plain(layer: ExpertGraphMLP) -> None:
    """Refuse a layer that is no plain FFN when every expert is visited.

    Raises:
        ModelError: it has combine weights, chains or siblings.
    """
    if layer.siblings > 1:
        raise ModelError(
            f"adapters have {layer.siblings} siblings, chosen by the text, so the model is "
            "not a plain FFN; export one of them with --sibling N (the run's "
            "siblings.json says which client's text each is for), or their mean with "
            "--sibling mean"
        )
    if layer.combine != "unit":
        raise ModelError(
            f"experts.combine is {layer.combine!r}: its K = E model is not a plain FFN "
            "and cannot be exported; only 'unit' can"
        )
    if layer.chains and bool(layer.edge_strength_EE.any()):
        raise ModelError(
            "edges carry data (non-zero strengths), so the model is not a plain FFN and "
            "cannot be exported; train with experts.chains = false"
        )
    if bool(layer.mix_E.any()):
        raise ModelError(
            "combine weights depend on the token (u is not 0), so the model is not a "
            "plain FFN and cannot be exported; train with train.train_mix = false"
        )


def _merge_layer(layer: ExpertGraphMLP) -> dict[str, Tensor]:
    """gate_proj, up_proj, down_proj of one layer with its adapters, in float32."""
    check_plain(layer)
    a = layer.adapters
    gate_EFD, up_EFD, down_EFD = (
        layer.block(name, torch.float32) for name in (GATE, UP, DOWN)
    )
    down_EFD = down_EFD + a.scale * torch.einsum(
        "erf,dr->efd", a.down_ERF, a.shared_down_DR
    )
    gate_EFD = gate_EFD + a.scale * a.gate_EFR @ a.shared_gate_RD
    up_EFD = up_EFD + a.scale * a.up_EFR @ a.shared_up_RD
    return {
        "gate_proj": gate_EFD.flatten(0, 1),
        "up_proj": up_EFD.flatten(0, 1),
        "down_proj": down_EFD.flatten(0, 1).T,
    }
