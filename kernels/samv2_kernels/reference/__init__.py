"""Plain-torch twins of every op: the CPU path, and what kernels are checked against."""

from samv2_kernels.reference.grouped_mlp import (
    ExpertRows,
    expert_rows,
    flat_walk,
    grouped_experts,
    masked_dense_experts,
    rows_by_expert,
    spread_surrogates,
    surrogate_sum,
)
from samv2_kernels.reference.walk import (
    UsageCounts,
    Visits,
    Walk,
    choose_topk,
    count_usage,
    reach,
    topk_threshold,
    visit,
    walk,
)
from samv2_kernels.weights import (
    ExpertAdapters,
    ExpertWeights,
    Nf4Weights,
    Surrogates,
)

__all__ = [
    "ExpertAdapters",
    "ExpertRows",
    "ExpertWeights",
    "Nf4Weights",
    "Surrogates",
    "UsageCounts",
    "Visits",
    "Walk",
    "choose_topk",
    "count_usage",
    "expert_rows",
    "flat_walk",
    "grouped_experts",
    "masked_dense_experts",
    "reach",
    "rows_by_expert",
    "spread_surrogates",
    "surrogate_sum",
    "topk_threshold",
    "visit",
    "walk",
]
