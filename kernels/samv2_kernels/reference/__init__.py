"""Plain-torch twins of every op: the CPU path, and what kernels are checked against."""

from samv2_kernels.reference.grouped_mlp import (
    Dispatch,
    ExpertAdapters,
    ExpertWeights,
    Surrogates,
    dispatch,
    expert_rows,
    grouped_experts,
    masked_dense_experts,
    surrogate_sum,
)
from samv2_kernels.reference.walk import (
    UsageCounts,
    Visits,
    Walk,
    choose_topk,
    count_usage,
    reach,
    visit,
    walk,
)

__all__ = [
    "Dispatch",
    "ExpertAdapters",
    "ExpertWeights",
    "Surrogates",
    "UsageCounts",
    "Visits",
    "Walk",
    "choose_topk",
    "count_usage",
    "dispatch",
    "expert_rows",
    "grouped_experts",
    "masked_dense_experts",
    "reach",
    "surrogate_sum",
    "visit",
    "walk",
]
