"""What visits cost: multiply-adds of a layer, and which way to run it on a CPU.

Shapes: T tokens, D model width, E experts, F rows an expert, K visits a token, Q rank.
"""

from __future__ import annotations

READ_ROWS, CALL_WEIGHTS, MOVE_ROWS = 16, 1_500_000, 30
"""What experts cost besides their products, in rows of an expert: reading its weights;
divided by their number, calling its products; divided by its width, moving a row."""
PADDED = 1.1
"""Rows that grouped experts multiply, over their visits."""


def grouping_pays(tokens: int, visits: int, shape: tuple[int, int, int]) -> bool:
    """Whether grouped experts beat the masked dense FFN on a CPU.

    Both are counted in rows that pass through one expert; ``bench/bench_experts.py``
    measures what comes of it.

    Args:
        tokens: T.
        visits: K.
        shape: (E, F, D) of the blocks.
    """
    num_experts, width, model_width = shape
    touched = min(num_experts, tokens * visits)
    moved = tokens * visits * (PADDED + MOVE_ROWS / width)
    grouped = moved + touched * (READ_ROWS + CALL_WEIGHTS / (width * model_width))
    return grouped < (tokens + READ_ROWS) * num_experts


def ffn_flops_fraction(
    *,
    model_width: int,
    ffn_width: int,
    num_experts: int,
    experts_per_token: int,
    surrogate_rank: int,
    repair_rank: int | None = None,
) -> float:
    """Multiply-adds of a converted FFN over those of the dense one, per token.

    Counts the gate (E D), the visited experts, shared ones included (K 3 F D), and what
    stands in for the others. With a repair of rank Q that is 2 Q D. With surrogates of
    rank Q it is their shared factor (Q D), then the sum of all and the visited ones or
    the absent ones alone (Q D each), whichever is fewer. Adapters are not counted.
    """
    dense = 3 * ffn_width * model_width
    if experts_per_token == num_experts:
        absent = 0
    elif repair_rank is not None:
        absent = 2 * repair_rank * model_width
    else:
        blocks = min(experts_per_token + 1, num_experts - experts_per_token)
        absent = surrogate_rank * model_width * (1 + blocks)
    gate = num_experts * model_width
    experts = experts_per_token * 3 * (ffn_width // num_experts) * model_width
    return (gate + experts + absent) / dense
