"""The masked dense FFN: the public function over its forms.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from torch import Tensor

from samv2_kernels import cpu, reference
from samv2_kernels.grouped import add_down, rank_terms, trained
from samv2_kernels.weights import ExpertAdapters, ExpertWeights, Surrogates


def masked_dense_experts(
    x_TD: Tensor,
    reached_TE: Tensor,
    combine_TE: Tensor,
    weights: ExpertWeights,
    *,
    adapters: ExpertAdapters | None = None,
    surrogates: Surrogates | None = None,
) -> Tensor:
    """The sum of :func:`grouped_experts` (no chains), computed as one dense FFN.

    Every expert is computed and the hidden units of unvisited ones are multiplied by
    zero: at K = E this is the FFN itself, and on a CPU it also beats grouping while a
    token visits more than a small share of narrow experts.

    Args:
        x_TD: (T, D) inputs.
        reached_TE: (T, E) the walk's r, 0/1 in value.
        combine_TE: (T, E) combine weights, ignored where r is 0; where they are r, that
            tensor itself costs least.
        weights: base blocks, in the dtype of ``x_TD``.
        adapters: row-LoRA, or None.
        surrogates: stand-ins of the experts that are not visited, or None for zero.

    Returns:
        (T, D) in the dtype of ``x_TD``; gradients as of :func:`grouped_experts`.
    """
    direct = cpu.is_plain_eager(x_TD) and cpu.masking_pays(x_TD)
    if trained(weights, surrogates) or not direct:
        return reference.masked_dense_experts(
            x_TD,
            reached_TE,
            combine_TE,
            weights,
            adapters=adapters,
            surrogates=surrogates,
        )
    y_TD = add_down(
        x_TD,
        adapters,
        *cpu.masked_experts(
            x_TD,
            combine_TE,
            reached_TE > 0.5,
            weights.per_expert.tensors,
            rank_terms(x_TD, adapters),
            unit=combine_TE is reached_TE,
        ),
    )
    if surrogates is not None:
        y_TD = y_TD + reference.spread_surrogates(x_TD, reached_TE, surrogates)
    return y_TD
