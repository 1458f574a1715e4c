"""A run at K = E as a PEFT adapter: plain LoRA on the dense model it was made of.

With every expert visited, a converted FFN is the dense one plus, row by row,

    gate: W_g + s B_g A_g      up: W_u + s B_u A_u      down: W_d + s B_d A_d

where A_g, A_u and B_d are frozen and the rows of B_g, B_u and the columns of A_d are the
experts' adapter rows. That is LoRA of rank R and scaling s, once the rows, which are
stored expert by expert, are back in the dense model's order. The order is found by
matching base rows bit for bit.

Shapes: D model width, E experts, F rows an expert, M = E F FFN rows, R adapter rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from samv2.common.errors import ModelError
from samv2.common.files import write_json
from samv2.experts.frozen_blocks import DOWN, GATE, UP
from samv2.experts.graph import reachable_experts
from samv2.experts.moe_layers import ExpertGraphMLP, WalkOptions
from samv2.models.assembler import Assembler
from samv2.models.expert_model import ExpertModel
from samv2.models.export import check_plain
from samv2_kernels import Walk

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SILU_LEAST = -0.2785
"""The minimum of silu, rounded down."""


def export_peft(
    model: ExpertModel,
    dense: nn.Module | None,
    folder: Path,
    *,
    base: str,
    tokens_BS: Tensor | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``PeftModel.from_pretrained(dense, folder)`` then has the logits of ``model``.

    Args:
        model: trained, at K = E.
        dense: the model that it was made of; None where the adapter is for the model
            that :func:`samv2.models.export.rejoined_dense` makes, whose rows are in
            expert order.
        folder: is made where it is missing.
        base: path or hub id of the dense model, for the adapter's config.
        tokens_BS: (B, S) int64 text on which a trained assembler must close nothing.

    Raises:
        ModelError: the model is not the dense one plus LoRA, or not made of ``dense``.
    """
    check_is_lora(model, tokens_BS)
    weights: dict[str, Tensor] = {}
    for position, index in enumerate(model.expert_config.layers):
        layer = model.expert_layers[position]
        order_M = torch.arange(layer.shape[0] * layer.shape[1])
        if dense is not None:
            order_M = dense_rows(layer, dense.model.layers[index].mlp, index)
        for name, tensor in _lora(layer, order_M).items():
            key = f"base_model.model.model.layers.{index}.mlp.{name}.weight"
            weights[key] = tensor.contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, _config(model, base))


def check_is_lora(model: ExpertModel, tokens_BS: Tensor | None = None) -> None:
    """Refuse a model that is not its dense one plus LoRA.

    Args:
        model: at the K that it is to be exported with.
        tokens_BS: (B, S) int64 text for an assembler whose openness cannot be proved.

    Raises:
        ModelError: K < E, combine weights, chains, experts that no walk reaches, or an
            assembler that may close some.
    """
    config = model.expert_config
    k, experts = config.experts_per_token, config.num_experts
    if k != experts:
        raise ModelError(
            f"experts_per_token is {k} of {experts}: experts that are left out, and what "
            "stands in for them, are no LoRA. Train with experts.experts_per_token = "
            f"{experts} for a PEFT adapter; without --peft, the export is the model at "
            f"K = {experts}"
        )
    for position, layer in enumerate(model.expert_layers):
        check_plain(layer)
        shared_E = layer.shared_E[layer.order_E]
        reached_E = reachable_experts(layer.edge_mask_EE | torch.diag(shared_E))
        if lost := layer.order_E[~reached_E].tolist():
            raise ModelError(
                f"the run's edits have cut off experts {lost} of converted layer "
                f"{position}, so tokens do not visit all of them and the model is no "
                "LoRA; train with edits.rho_max = 0"
            )
    if model.assembler is not None and not provably_open(model.assembler):
        _check_assembler(model, tokens_BS)


@torch.no_grad()
def provably_open(assembler: Assembler) -> bool:
    """Whether no context whatever can close an entry, by bounds on its logits.

    A context is scaled to norm sqrt(D), so a hidden unit lies within its bias and
    layer's share plus or minus the norm of its weights times sqrt(D); silu and the
    output layer are bounded in turn.
    """
    width = assembler.hidden.in_features - assembler.layer_embedding.embedding_dim
    weight_HD, weight_HJ = assembler.hidden.weight.split(
        [width, assembler.layer_embedding.embedding_dim], dim=1
    )
    reach_H = weight_HD.norm(dim=1) * width**0.5
    centre_LH = assembler.layer_embedding.weight @ weight_HJ.T + assembler.hidden.bias
    highest_LH = nn.functional.silu((centre_LH + reach_H).clamp(min=0))
    size = assembler.num_experts
    entries = (assembler.edge_index_P % (size + 1) == 0).nonzero().squeeze(1)
    out_EH, bias_E = assembler.out.weight[entries], assembler.out.bias[entries]
    lowest_LE = (
        highest_LH @ out_EH.clamp(max=0).T
        + SILU_LEAST * out_EH.clamp(min=0).sum(dim=1)
        + bias_E
    )
    return bool((lowest_LE > 0).all())


@torch.no_grad()
def _check_assembler(model: ExpertModel, tokens_BS: Tensor | None) -> None:
    """Look whether every token of some text visits every expert."""
    remedy = "train with assembler.width = 0, or train.train_assembler = false"
    if tokens_BS is None or not tokens_BS.numel():
        raise ModelError(
            "the trained assembler may close experts for some contexts, and there is no "
            f"text to try it on; {remedy}"
        )
    missed: dict[int, int] = {}

    def look(layer: int, walked: Walk) -> None:
        missed[layer] = int((~walked.visited_TE).any(dim=1).sum())

    model.hidden_states(tokens_BS, WalkOptions(recorder=look))
    worst = max(missed, key=lambda layer: missed[layer])
    if missed[worst]:
        raise ModelError(
            f"the trained assembler closes experts of converted layer {worst} for "
            f"{missed[worst]} of {tokens_BS.numel()} tokens, so the model is no LoRA; "
            f"{remedy}"
        )


def dense_rows(layer: ExpertGraphMLP, mlp: nn.Module, index: int) -> Tensor:
    """For each row of the dense FFN, its place among the layer's rows, (M,) int64.

    Rows of gate, up and down projection are matched together, bit for bit; equal ones
    are interchangeable.

    Args:
        layer: the converted FFN.
        mlp: the dense one.
        index: of the decoder layer, for messages.

    Raises:
        ModelError: the blocks are NF4, or the layer was not made of this FFN.
    """
    if layer.packed:
        raise ModelError(
            "expert blocks are NF4, which no dense model's rows equal; use the re-joined "
            "model beside the adapter as its base"
        )
    stored = [getattr(layer, name).flatten(0, 1) for name in (GATE, UP, DOWN)]
    given = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
    dtype = stored[0].dtype
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(_row_bytes(stored, dtype)):
        places.setdefault(row, []).append(place)
    found = [places.get(row, []) for row in _row_bytes(given, dtype)]
    order = [same.pop() if same else -1 for same in found]
    missing = order.count(-1)
    if missing or len(order) != len(stored[0]):
        raise ModelError(
            f"{missing} of {len(order)} FFN rows of layer {index} are not among the "
            f"expert graph's {len(stored[0])}: it was made of another model, or of this "
            "one in another dtype; name the right one with --base"
        )
    return torch.tensor(order)


def _row_bytes(parts: list[Tensor], dtype: torch.dtype) -> list[bytes]:
    rows_MD = torch.cat([part.detach().to(dtype) for part in parts], dim=1)
    return [row.tobytes() for row in rows_MD.contiguous().view(torch.uint8).numpy()]


def _lora(layer: ExpertGraphMLP, order_M: Tensor) -> dict[str, Tensor]:
    """A and B of the three projections, float32, rows in the dense model's order."""
    a = layer.adapters
    down_RM = a.down_ERF.detach().transpose(0, 1).flatten(1)
    return {
        "gate_proj.lora_A": a.shared_gate_RD,
        "gate_proj.lora_B": a.gate_EFR.detach().flatten(0, 1)[order_M],
        "up_proj.lora_A": a.shared_up_RD,
        "up_proj.lora_B": a.up_EFR.detach().flatten(0, 1)[order_M],
        "down_proj.lora_A": down_RM[:, order_M],
        "down_proj.lora_B": a.shared_down_DR,
    }


def _config(model: ExpertModel, base: str) -> dict[str, Any]:
    """``adapter_config.json``; scaling is ``lora_alpha / r``: s.

    Written as it is: importing peft would load all that it can adapt.
    """
    config = model.expert_config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.adapter_rank,
        "lora_alpha": config.adapter_rank * config.adapter_scale,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": list(PROJECTIONS),
        "layers_to_transform": list(config.layers),
        "layers_pattern": "layers",
    }
