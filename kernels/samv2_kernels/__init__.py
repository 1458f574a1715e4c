"""MoE dispatch along expert graphs and grouped expert MLPs; needs torch only.

Public ops pick their implementation by device; today every device runs the plain-torch
reference, which is also what later kernels are checked against.
"""

from samv2_kernels.reference import (
    ExpertAdapters,
    ExpertWeights,
    Surrogates,
    UsageCounts,
    Visits,
    Walk,
    count_usage,
    grouped_experts,
    masked_dense_experts,
    visit,
    walk,
)

__version__ = "0.1.0"

__all__ = [
    "ExpertAdapters",
    "ExpertWeights",
    "Surrogates",
    "UsageCounts",
    "Visits",
    "Walk",
    "count_usage",
    "grouped_experts",
    "masked_dense_experts",
    "visit",
    "walk",
]
