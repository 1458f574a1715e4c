"""How the trained blocks of a model are numbered; what is in them: models/adapters.

Experts of all layers come first, the assembler next; then, with G > 1 siblings, the rows
of sibling 1, 2, .. of every expert, and the siblings' gate last. An id follows from the
number of experts over all layers, L E, alone.
"""

from __future__ import annotations


def expert_block(expert: int, experts: int, sibling: int = 0) -> int:
    """The block of an expert, or of another sibling's rows of it.

    Args:
        expert: counted over layers: layer * E + storage id.
        experts: L E.
        sibling: whose rows.
    """
    return sibling * experts + expert + (sibling > 0)


def assembler_block(experts: int) -> int:
    """The assembler's block, of ``experts`` = L E experts."""
    return experts


def gate_block(experts: int, siblings: int) -> int:
    """The siblings' gate, the last block; there is one where ``siblings`` > 1."""
    return siblings * experts + 1
