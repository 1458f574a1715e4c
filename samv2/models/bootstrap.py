"""Bootstrap: a dense model becomes an expert graph, layer by layer, without training.

Calibration text runs through the model once. At every layer to convert, its FFN's rows
are clustered into experts on the activations seen there, surrogates and gate are fitted
in closed form, the layer is swapped, and its *converted* output feeds the next layer, so
that later layers are fitted to the stream they will see.

Shapes: B sequences, S positions, D model width, M FFN rows, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from samv2.common.errors import ModelError
from samv2.common.settings import Settings
from samv2.experts.calibration import (
    average_gate,
    fit_gate,
    fit_surrogates,
    input_moments,
)
from samv2.experts.emoe_cluster import ClusterStats, check_divisible, cluster_layer
from samv2.experts.graph import initial_graph
from samv2.experts.moe_layers import ExpertGraphMLP, FrozenFactors, WalkOptions
from samv2.models.adapters import make_factors
from samv2.models.assembler import Assembler
from samv2.models.expert_model import (
    ExpertDecoderLayer,
    ExpertModel,
    ExpertModelConfig,
)
from samv2_kernels import ExpertWeights, Walk

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""
STREAM_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Bootstrapped:
    """The converted model and what was measured on the way."""

    model: ExpertModel
    cluster_stats: tuple[ClusterStats, ...]
    layer_errors: tuple[float, ...]
    """Per converted layer: mean over calibration tokens of ||converted - dense FFN||
    over ||stream after the layer||."""


def parse_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """Indices named by ``all`` or by ranges such as ``1-``, ``4-20,25``.

    Raises:
        ModelError: the text is not of that form, or names a layer that is not there.
    """
    if spec.strip() == "all":
        return tuple(range(num_layers))
    chosen: set[int] = set()
    for part in spec.split(","):
        match = re.fullmatch(r"(\d+)(-(\d*))?", part.strip())
        if match is None:
            raise ModelError(
                f"experts.layers is {spec!r}; write 'all' or ranges such as '1-' or "
                "'4-20,25'"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[3] or num_layers - 1)
        if not first <= last < num_layers:
            raise ModelError(
                f"experts.layers names {part.strip()!r}, but the model has layers "
                f"0..{num_layers - 1}"
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def check_convertible(config: PretrainedConfig, settings: Settings) -> tuple[int, ...]:
    """Check everything that can be checked on a dense model's config, before long work.

    Returns:
        The indices of the layers to convert.

    Raises:
        ModelError: E does not divide the FFN, a layer is not there, the rank is too big.
    """
    check_divisible(config.intermediate_size, settings.experts.num_experts)
    for name, value in (
        ("adapter.rank", settings.adapter.rank),
        ("experts.surrogate_rank", settings.experts.surrogate_rank),
    ):
        if value > config.hidden_size:
            raise ModelError(
                f"{name} is {value}; it cannot exceed the model's width "
                f"{config.hidden_size}"
            )
    return parse_layers(settings.experts.layers, config.num_hidden_layers)


@torch.no_grad()
def bootstrap(
    llama: PreTrainedModel,
    calibration_BS: Tensor,
    settings: Settings,
    *,
    fingerprint: str = "",
    progress: Progress | None = None,
) -> Bootstrapped:
    """Convert a dense model in place.

    Args:
        llama: dense Llama-style causal LM in evaluation mode; its converted decoder
            layers are replaced.
        calibration_BS: (B, S) int64 token ids of calibration text.
        settings: sections ``experts``, ``adapter``, ``assembler`` and the seed are used.
        fingerprint: of the dense model, kept in the converted one's config.
        progress: called after every layer.

    Returns:
        The model, walking its initial graph, with zero adapters.

    Raises:
        ModelError: see :func:`check_convertible`.
    """
    layers = check_convertible(llama.config, settings)
    experts = settings.experts
    config = ExpertModelConfig(
        layers=layers,
        num_experts=experts.num_experts,
        experts_per_token=experts.experts_per_token,
        num_shared=experts.num_shared,
        combine=experts.combine,
        chains=experts.chains,
        surrogate_rank=experts.surrogate_rank if experts.combine == "unit" else 0,
        adapter_rank=settings.adapter.rank,
        adapter_scale=settings.adapter.scale,
        assembler_width=settings.assembler.width,
        prefix_tokens=settings.assembler.prefix_tokens,
        seed=settings.seed,
        base_fingerprint=fingerprint,
    )
    assembler = make_assembler(llama.config.hidden_size, config)
    stats: list[ClusterStats] = []
    errors: list[float] = []
    stream = _Stream(llama, calibration_BS)
    decoder = llama.model.layers
    for index in range(layers[-1] + 1):
        base = decoder[index]
        if index not in layers:
            stream.run_dense(base)
        else:
            x_ND, after_ND = stream.attend(base)
            dense_ND = _dense_ffn(base.mlp, x_ND)
            mlp, found = _convert(
                len(stats), base.mlp, x_ND, after_ND, dense_ND, config, settings
            )
            mlp.assembler = assembler
            decoder[index] = ExpertDecoderLayer(base, mlp)
            converted_ND, coactivation_EE = _run_converted(mlp, x_ND)
            mlp.edge_mask_EE.copy_(
                initial_graph(
                    coactivation_EE.unsqueeze(0), chain_degree=experts.chain_degree
                ).edge_mask_LEE[0]
            )
            errors.append(_relative_error(converted_ND, dense_ND, after_ND))
            stats.append(found)
            stream.advance(after_ND + converted_ND)
        if progress is not None:
            progress(index + 1, layers[-1] + 1)
    model = ExpertModel(llama, assembler, config)
    model.freeze_base()
    return Bootstrapped(
        model=model.eval(), cluster_stats=tuple(stats), layer_errors=tuple(errors)
    )


def make_assembler(model_width: int, config: ExpertModelConfig) -> Assembler | None:
    """The assembler that a config asks for, in its initial, fully open state."""
    if config.assembler_width == 0:
        return None
    return Assembler(
        model_width=model_width,
        num_layers=len(config.layers),
        num_experts=config.num_experts,
        hidden_width=config.assembler_width,
        seed=config.seed,
    )


class _Stream:
    """The residual stream of the calibration text between two layers."""

    def __init__(self, llama: PreTrainedModel, tokens_BS: Tensor) -> None:
        self.hidden_BSD = llama.model.embed_tokens(tokens_BS)
        self.positions_1S = torch.arange(tokens_BS.shape[1]).unsqueeze(0)
        self.embeddings = llama.model.rotary_emb(
            self.hidden_BSD[:1], position_ids=self.positions_1S
        )
        self.mask = create_causal_mask(
            config=llama.config,
            inputs_embeds=self.hidden_BSD[:1],
            attention_mask=None,
            past_key_values=None,
            position_ids=self.positions_1S,
        )

    def attend(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """FFN inputs and the residual stream after attention, (N, D) each."""
        inputs, residuals = [], []
        for part_BSD in self.hidden_BSD.split(STREAM_BATCH):
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(part_BSD),
                attention_mask=self.mask,
                position_ids=self.positions_1S,
                position_embeddings=self.embeddings,
            )
            residuals.append(part_BSD + attended)
            inputs.append(layer.post_attention_layernorm(residuals[-1]))
        return torch.cat(inputs).flatten(0, 1), torch.cat(residuals).flatten(0, 1)

    def advance(self, hidden_ND: Tensor) -> None:
        self.hidden_BSD = hidden_ND.view(self.hidden_BSD.shape)

    def run_dense(self, layer: nn.Module) -> None:
        x_ND, after_ND = self.attend(layer)
        self.advance(after_ND + _dense_ffn(layer.mlp, x_ND))


def _dense_ffn(mlp: nn.Module, x_ND: Tensor) -> Tensor:
    return torch.cat([mlp(part) for part in x_ND.split(2048)])


def _convert(
    position: int,
    mlp: nn.Module,
    x_ND: Tensor,
    after_ND: Tensor,
    dense_ND: Tensor,
    config: ExpertModelConfig,
    settings: Settings,
) -> tuple[ExpertGraphMLP, ClusterStats]:
    """One dense FFN as experts with a calibrated gate and surrogates."""
    gate_MD, up_MD = mlp.gate_proj.weight, mlp.up_proj.weight
    down_DM = mlp.down_proj.weight
    order, stats = cluster_layer(
        config.layers[position],
        gate_MD=gate_MD,
        up_MD=up_MD,
        down_DM=down_DM,
        hidden_NM=silu(x_ND @ gate_MD.T) * (x_ND @ up_MD.T),
        num_experts=config.num_experts,
        num_shared=config.num_shared,
        feature=settings.experts.feature,
        seed=settings.seed,
        starts=settings.experts.cluster_starts,
    )
    weights = split_experts(gate_MD, up_MD, down_DM, torch.from_numpy(order), config)
    moments = input_moments(x_ND, (after_ND + dense_ND).float().norm(dim=1))
    surrogates = None
    if config.surrogate_rank:
        surrogates = fit_surrogates(x_ND, weights, moments, config.surrogate_rank)
    if settings.experts.gate == "avg_k":
        gate = average_gate(weights)
    else:
        gate = fit_gate(x_ND, weights, moments, surrogates)
    factors = layer_factors(position, x_ND.shape[1], config)
    layer = ExpertGraphMLP(
        layer=position,
        weights=weights,
        gate=gate,
        surrogates=surrogates,
        factors=factors,
        edge_mask_EE=torch.eye(config.num_experts, dtype=torch.bool),
        order_E=torch.arange(config.num_experts),
        num_shared=config.num_shared,
        experts_per_token=config.experts_per_token,
        combine=config.combine,
        chains=config.chains,
        prefix_tokens=config.prefix_tokens,
    )
    return layer, stats


def layer_factors(
    position: int, model_width: int, config: ExpertModelConfig
) -> FrozenFactors:
    """The frozen adapter factors of one converted layer."""
    return make_factors(
        seed=config.seed,
        layer=position,
        model_width=model_width,
        rank=config.adapter_rank,
        scale=config.adapter_scale,
    )


def split_experts(
    gate_MD: Tensor,
    up_MD: Tensor,
    down_DM: Tensor,
    order_M: Tensor,
    config: ExpertModelConfig,
) -> ExpertWeights:
    """Re-order FFN rows and cut them into experts, (E, F, D) each, contiguous."""
    shape = (config.num_experts, -1, gate_MD.shape[1])
    return ExpertWeights(
        gate_EFD=gate_MD[order_M].reshape(shape),
        up_EFD=up_MD[order_M].reshape(shape),
        down_EFD=down_DM.T[order_M].reshape(shape),
    )


def _run_converted(mlp: ExpertGraphMLP, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's outputs on the server graph, and how often experts were co-chosen.

    Shared experts are left out: they fire with everyone, and an edge from an expert that
    is always visited would open its destination for good.
    """
    coactivation_EE = torch.zeros(mlp.num_experts, mlp.num_experts)

    def record(_: int, walked: Walk) -> None:
        chosen_TE = (walked.chosen_TE & ~mlp.shared_E).float()
        coactivation_EE.add_(chosen_TE.T @ chosen_TE)

    options = WalkOptions(use_assembler=False, recorder=record)
    outputs = [
        mlp(part_SD.unsqueeze(0), options)[0].squeeze(0) for part_SD in x_ND.split(2048)
    ]
    return torch.cat(outputs), coactivation_EE


def _relative_error(converted_ND: Tensor, dense_ND: Tensor, after_ND: Tensor) -> float:
    difference_N = (converted_ND - dense_ND).float().norm(dim=1)
    return float((difference_N / (after_ND + dense_ND).float().norm(dim=1)).mean())
