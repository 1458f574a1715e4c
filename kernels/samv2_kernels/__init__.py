"""MoE dispatch along expert graphs and grouped expert MLPs; needs torch only.

Ops pick their kernel by device; :mod:`samv2_kernels.reference` has a plain-torch twin of
each, which kernels are checked against.
"""

from samv2_kernels.decoding import can_decode, for_decoding
from samv2_kernels.dispatch import VisitOrder, sort_visits, tile_table
from samv2_kernels.grouped import grouped_experts
from samv2_kernels.masked import masked_dense_experts
from samv2_kernels.reference import (
    UsageCounts,
    Visits,
    Walk,
    count_usage,
)
from samv2_kernels.routing import visit, visited_ids, walk
from samv2_kernels.weights import (
    DecodingWeights,
    ExpertAdapters,
    ExpertWeights,
    Nf4Weights,
    Surrogates,
    WordWeights,
)

__version__ = "0.1.0"

__all__ = [
    "DecodingWeights",
    "ExpertAdapters",
    "ExpertWeights",
    "Nf4Weights",
    "Surrogates",
    "UsageCounts",
    "VisitOrder",
    "Visits",
    "Walk",
    "WordWeights",
    "can_decode",
    "count_usage",
    "for_decoding",
    "grouped_experts",
    "masked_dense_experts",
    "sort_visits",
    "tile_table",
    "visit",
    "visited_ids",
    "walk",
]
