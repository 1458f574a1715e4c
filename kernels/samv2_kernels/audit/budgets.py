"""The budgets that every shipped configuration must keep, and who breaks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from samv2_kernels.audit.model import ARCHITECTURES
from samv2_kernels.audit.row import Row

COUNTED_ARCHS = ("sm_80", "sm_86", "sm_89")
"""Where instructions a weight have a limit; on sm_90 they are only reported."""
SMALL_TILE_ROWS = 32
Limit = float | Callable[[Row], float]


@dataclass(frozen=True)
class Budget:
    """A limit on one figure of the rows it applies to."""

    figure: str
    """Field of :class:`Row`; a row that lacks it breaks the budget."""
    limit: Limit
    at_least: bool = False
    """The limit is the smallest allowed value, not the largest."""
    where: Callable[[Row], bool] = lambda row: True
    meaning: str = ""

    def broken_by(self, row: Row) -> str | None:
        """What is wrong with a row; None: nothing, or the budget is not for it."""
        if not self.where(row):
            return None
        limit = self.limit(row) if callable(self.limit) else self.limit
        value = getattr(row, self.figure)
        word = "at least" if self.at_least else "at most"
        if value is not None and (value >= limit if self.at_least else value <= limit):
            return None
        shown = f"{value:.6g}" if value is not None else "unknown"
        return f"{self.figure} is {shown}, must be {word} {limit:g} ({self.meaning})"


def multiplies_weights(row: Row) -> bool:
    """Whether the kernel is a matmul with weights."""
    return row.has_matmul and row.weights != "none"


def nf4(direction: str, small: bool | None = None) -> Callable[[Row], bool]:
    """Rows of an NF4 matmul whose instructions have a limit."""
    return lambda row: (
        multiplies_weights(row)
        and row.weights == "nf4"
        and row.direction == direction
        and row.arch in COUNTED_ARCHS
        and (small is None or small == (row.rows_per_tile <= SMALL_TILE_ROWS))
    )


BUDGETS = (
    Budget("spill_bytes", 0, meaning="no register spills"),
    Budget(
        "shared_bytes",
        lambda row: ARCHITECTURES[row.arch].shared_bytes_per_block,
        meaning="what a block of this architecture can have",
    ),
    Budget("blocks_per_sm", 1, at_least=True, meaning="a block must fit an SM at all"),
    Budget(
        "tensor_core_ops",
        1,
        at_least=True,
        where=lambda row: row.has_matmul,
        meaning="matmuls run on tensor cores",
    ),
    Budget(
        "widest_weight_load_bytes",
        16,
        at_least=True,
        where=multiplies_weights,
        meaning="weights are loaded 16 bytes at a time",
    ),
    Budget(
        "weights_loaded_per_step",
        lambda row: row.weights_per_step,
        at_least=True,
        where=multiplies_weights,
        meaning="the spec's weights_per_step, which must not exceed what is loaded",
    ),
    Budget(
        "instructions_per_weight",
        6.5,
        where=nf4("forward", small=True),
        meaning=f"NF4 forward, tiles of up to {SMALL_TILE_ROWS} rows",
    ),
    Budget(
        "instructions_per_weight",
        7.5,
        where=nf4("forward", small=False),
        meaning=f"NF4 forward, tiles of more than {SMALL_TILE_ROWS} rows",
    ),
    Budget(
        "instructions_per_weight", 8.0, where=nf4("dx"), meaning="NF4 input gradient"
    ),
)
"""All limits. A figure that a row lacks where a budget needs it breaks that budget."""


def broken(row: Row) -> Iterator[str]:
    """What is wrong with a row, one sentence a budget."""
    for budget in BUDGETS:
        if message := budget.broken_by(row):
            yield message
