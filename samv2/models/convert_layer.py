"""One dense FFN becomes a graph of experts: a survey of the layer, then its repairs.

The survey looks at the dense model alone. It finds what all K share: the partition into
experts, gate, surrogates, which experts are chosen together, and what the layer would
lose at fewer visits. A repair belongs to one K and to the stream of the layers that were
converted before.

Shapes: B sequences, S positions, N = B S tokens, D model width, M FFN rows, E experts,
F = M / E, J projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from samv2.common.settings import Settings
from samv2.experts.allocation import Curve, survey_points
from samv2.experts.calibration import (
    Gate,
    Moments,
    average_gate,
    fit_gate,
    fit_surrogates,
    input_moments,
)
from samv2.experts.emoe_cluster import ClusterStats, cluster_layer
from samv2.experts.graph import initial_graph
from samv2.experts.moe_layers import ExpertGraphMLP, FrozenFactors
from samv2.experts.repair import START, Repair, RepairFit, RepairStatistics
from samv2.models.adapters import make_factors
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.text_stream import SEQUENCES_AT_ONCE
from samv2_kernels import ExpertWeights, Surrogates, visit

CLUSTERED_TOKENS = 4096
"""Co-activation, activation mass and curves are measured on at most so many tokens."""
LEAST_SHARE = 0.02
"""Residuals below this share of the dense stream weigh as if they were so large."""
PROJECTIONS = 64
"""Errors of the curves are measured on so many random projections of the output."""


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """What a layer's experts are, whatever K they will be visited with."""

    order_M: Tensor
    """(M,) int64: expert e owns rows ``order_M[e F : (e + 1) F]`` of the dense FFN."""
    gate: Gate
    surrogates: Surrogates | None
    edge_mask_EE: Tensor
    """(E, E) bool, the initial graph."""
    curve: Curve
    stats: ClusterStats


@torch.no_grad()
def survey_layer(
    position: int,
    mlp: nn.Module,
    x_ND: Tensor,
    after_ND: Tensor,
    config: ExpertModelConfig,
    settings: Settings,
) -> Surveyed:
    """Cluster and calibrate one dense FFN.

    Args:
        position: among the converted layers.
        mlp: SwiGLU with ``gate_proj``, ``up_proj``, ``down_proj``, no biases.
        x_ND: (N, D) its inputs on calibration tokens.
        after_ND: (N, D) the residual stream that its output is added to.
        config: of the model to be made.
        settings: section ``experts`` and the seed are used.
    """
    experts = settings.experts
    gate_MD, up_MD = mlp.gate_proj.weight, mlp.up_proj.weight
    down_DM = mlp.down_proj.weight
    hidden_NM = silu(x_ND @ gate_MD.T) * (x_ND @ up_MD.T)
    few = slice(None, None, max(1, -(-len(x_ND) // CLUSTERED_TOKENS)))
    order, stats = cluster_layer(
        config.layers[position],
        gate_MD=gate_MD,
        up_MD=up_MD,
        down_DM=down_DM,
        hidden_NM=hidden_NM[few],
        num_experts=config.num_experts,
        num_shared=config.num_shared,
        feature=experts.feature,
        seed=settings.seed,
        starts=experts.cluster_starts,
    )
    order_M = torch.from_numpy(order)
    weights = split_experts(gate_MD, up_MD, down_DM, order_M, config.num_experts)
    target_N = (after_ND + hidden_NM @ down_DM.T).float().norm(dim=1)
    moments = input_moments(x_ND, target_N)
    surrogates = None
    if config.surrogate_rank:
        surrogates = fit_surrogates(x_ND, weights, moments, config.surrogate_rank)
    if experts.gate == "avg_k":
        gate = average_gate(weights)
    else:
        logarithm = experts.gate == "ridge_log"
        gate = fit_gate(x_ND, weights, moments, surrogates, logarithm=logarithm)
    scores_NE = x_ND.float() @ gate.weight_ED.T + gate.bias_E
    chosen_NE = _top_k(scores_NE, config.experts_per_token, config.num_shared).float()
    chosen_NE[:, : config.num_shared] = 0
    graph = initial_graph(
        (chosen_NE.T @ chosen_NE).unsqueeze(0), chain_degree=experts.chain_degree
    )
    return Surveyed(
        order_M=order_M,
        gate=gate,
        surrogates=surrogates,
        edge_mask_EE=graph.edge_mask_LEE[0],
        curve=_curve(
            x_ND[few],
            hidden_NM[few][:, order_M],
            scores_NE[few],
            weights,
            input_moments(x_ND[few], target_N[few]),
            config,
        ),
        stats=stats,
    )


def build_layer(
    position: int,
    mlp: nn.Module,
    surveyed: Surveyed,
    visits: dict[int, int],
    config: ExpertModelConfig,
) -> ExpertGraphMLP:
    """The layer's experts, without repairs and with zero adapters.

    Args:
        position: among the converted layers.
        mlp: the dense FFN.
        surveyed: of this layer.
        visits: by K, how many visits this layer makes of it.
        config: of the model to be made.
    """
    return ExpertGraphMLP(
        layer=position,
        weights=split_experts(
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
            surveyed.order_M,
            config.num_experts,
        ),
        gate=surveyed.gate,
        surrogates=surveyed.surrogates,
        factors=layer_factors(position, mlp.gate_proj.weight.shape[1], config),
        edge_mask_EE=surveyed.edge_mask_EE.clone(),
        order_E=torch.arange(config.num_experts),
        num_shared=config.num_shared,
        experts_per_token=config.experts_per_token,
        combine=config.combine,
        chains=config.chains,
        prefix_tokens=config.prefix_tokens,
        siblings=config.siblings,
        visits=visits,
    )


@torch.no_grad()
def fit_repair(
    mlp: ExpertGraphMLP,
    k: int,
    x_BSD: Tensor,
    after_BSD: Tensor,
    dense_BSD: Tensor,
    *,
    rank: int,
    near: tuple[float, float] = START,
) -> tuple[RepairFit, Tensor]:
    """Give a layer the repair for K visits that brings its stream close to the dense one.

    A token weighs 1 / (|dense stream| |residual|): a step of iteratively reweighted least
    squares towards the mean *relative* error instead of its square, which tokens that
    went astray layers ago would rule. Hidden units are computed once, for the fit and for
    the stream, and held: B S M numbers in the dtype of x.

    Args:
        mlp: the layer; must have no repair for K yet.
        k: K.
        x_BSD: (B, S, D) FFN inputs in the stream that was converted for K.
        after_BSD: (B, S, D) that stream before the FFN's output is added.
        dense_BSD: (B', S, D) the dense stream after the layer; the first B' sequences are
            fitted to, the others only carried along.
        rank: of the linear stand-in; not used where the layer visits all experts.
        near: where the search for the ridges begins.

    Returns:
        How the repair was fitted, and (B, S, D) the stream after the repaired layer.
    """
    gate_MD, up_MD = mlp.gate_EFD.flatten(0, 1), mlp.up_EFD.flatten(0, 1)
    down_MD = mlp.down_EFD.flatten(0, 1)
    width = mlp.gate_EFD.shape[1]
    if mlp.visits_at(k) == mlp.num_experts:
        rank = 0
    statistics = RepairStatistics(*gate_MD.shape, device=x_BSD.device)
    size_BS = dense_BSD.float().norm(dim=2).clamp(min=1e-6)
    weight_BS = size_BS.square().reciprocal()
    weight_BS /= weight_BS.mean()
    hidden_BSM = x_BSD.new_empty(*x_BSD.shape[:2], len(gate_MD))

    def visit_experts(some: Tensor) -> Tensor:
        x_ND = x_BSD[some].flatten(0, 1)
        visited_NE = mlp.visited(x_ND, k).to(x_ND.dtype)
        hidden_NM = silu(x_ND @ gate_MD.T) * (x_ND @ up_MD.T)
        hidden_NM *= visited_NE.repeat_interleave(width, dim=1)
        hidden_BSM[some] = hidden_NM.view(len(some), *hidden_BSM.shape[1:])
        return hidden_NM

    for fold, rows in enumerate(_folds(len(dense_BSD))):
        for some in rows.split(SEQUENCES_AT_ONCE):
            hidden_NM = visit_experts(some)
            reached_ND = after_BSD[some].flatten(0, 1) + hidden_NM @ down_MD
            residual_ND = dense_BSD[some].flatten(0, 1).float() - reached_ND.float()
            share_N = residual_ND.norm(dim=1) / size_BS[some].flatten()
            weight_N = weight_BS[some].flatten() / share_N.clamp(min=LEAST_SHARE)
            x_ND = x_BSD[some].flatten(0, 1)
            statistics.add(hidden_NM, x_ND, residual_ND, weight_N, fold=fold)
    for some in torch.arange(len(dense_BSD), len(x_BSD)).split(SEQUENCES_AT_ONCE):
        visit_experts(some)
    fit = statistics.solve(rank, near=near)
    dtype = down_MD.dtype
    down_EFD = (down_MD.float() + fit.change_MD).to(dtype).view(mlp.down_EFD.shape)
    repair = Repair(
        down_EFD=down_EFD,
        in_QD=fit.in_QD.to(dtype),
        out_QD=fit.out_QD.to(dtype),
        bias_D=fit.bias_D,
    )
    mlp.add_repair(k, repair)
    moved = [
        after + (hidden @ down_EFD.flatten(0, 1) + mlp.stand_in(x, k))
        for after, hidden, x in zip(
            *(part.split(SEQUENCES_AT_ONCE) for part in (after_BSD, hidden_BSM, x_BSD))
        )
    ]
    return fit, torch.cat(moved)


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
    num_experts: int,
) -> ExpertWeights:
    """Re-order FFN rows and cut them into experts, (E, F, D) each, contiguous."""
    shape = (num_experts, -1, gate_MD.shape[1])
    return ExpertWeights(
        gate_EFD=gate_MD[order_M].reshape(shape),
        up_EFD=up_MD[order_M].reshape(shape),
        down_EFD=down_DM.T[order_M].reshape(shape),
    )


def _folds(num_sequences: int) -> tuple[Tensor, Tensor]:
    """Two halves of the sequences that alternate in runs of a few.

    Neighbours often stem from one document and should not be in both halves; nor should
    a half lack a domain.
    """
    run = max(1, num_sequences // 32)
    index_B = torch.arange(num_sequences)
    first_B = (index_B // run) % 2 == 0
    if num_sequences < 2:
        return index_B, index_B
    return index_B[first_B], index_B[~first_B]


def _top_k(scores_NE: Tensor, k: int, num_shared: int) -> Tensor:
    """(N, E) bool: the experts that the complete graph visits."""
    num_experts = scores_NE.shape[1]
    return visit(
        scores_NE,
        torch.eye(num_experts, dtype=torch.bool, device=scores_NE.device).unsqueeze(0),
        experts_per_token=k,
        shared_E=torch.arange(num_experts, device=scores_NE.device) < num_shared,
    ).visited_TE


def _curve(
    x_ND: Tensor,
    hidden_NM: Tensor,
    scores_NE: Tensor,
    weights: ExpertWeights,
    moments: Moments,
    config: ExpertModelConfig,
) -> Curve:
    """What is lost with the experts that are not visited, less its linear part."""
    num_experts, width, model_width = weights.gate_EFD.shape
    source = torch.Generator().manual_seed(config.seed)
    basis_DJ = torch.randn(model_width, PROJECTIONS, generator=source)
    basis_DJ = (basis_DJ / PROJECTIONS**0.5).to(x_ND.device, x_ND.dtype)
    down_MJ = weights.down_EFD.flatten(0, 1) @ basis_DJ
    hidden_NEF = hidden_NM.unflatten(1, (num_experts, width))
    weight_N1 = moments.weight_N.unsqueeze(1)
    centred_ND = (x_ND.float() - moments.mean_D) * weight_N1
    points = survey_points(num_experts, config.num_shared)
    errors = []
    for k in points:
        absent_NE = ~_top_k(scores_NE, k, config.num_shared)
        lost_NM = (hidden_NEF * absent_NE.to(x_ND.dtype).unsqueeze(2)).flatten(1)
        lost_NJ = (lost_NM @ down_MJ).float()
        lost_NJ -= (weight_N1 * lost_NJ).mean(dim=0)
        linear_DJ = moments.whiten_DD @ (centred_ND.T @ lost_NJ)
        left = (weight_N1 * lost_NJ.square()).sum() - linear_DJ.square().sum()
        errors.append(float((left / len(x_ND) * moments.level).clamp(min=0)))
    return Curve(visits=points, errors=tuple(errors))
