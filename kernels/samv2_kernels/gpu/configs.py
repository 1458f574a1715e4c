"""Which tile a kernel runs in: chosen by rule from the mean number of rows an expert.

The rule needs shapes only, so nothing is read back from the device. Measured choices of
``python -m samv2_kernels.tune`` take precedence (:mod:`samv2_kernels.tuned`). What ships
here was chosen by the machine code that it compiles to, not by timing: no kernel of this
package has been timed on a GPU.

Kernels: ``gate_up`` and ``hidden_grad`` reduce along the model width, ``to_tokens`` (the
down projection) and ``input_grad`` along an expert's rows, ``project`` and
``adapter_grad`` are the low-rank ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from samv2_kernels import tuned


@dataclass(frozen=True, kw_only=True)
class Config:
    """One tile and its schedule."""

    rows: int
    """Visits of a tile."""
    columns: int
    """Columns of a tile; of ``gate_up``, gate and up columns together."""
    step: int
    """Length of one turn of the reduction loop."""
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = f"{self.rows}x{self.columns}x{self.step}"
        return f"{tile} w{self.warps} s{self.stages}"


def _c(rows: int, columns: int, step: int, warps: int, stages: int) -> Config:
    return Config(rows=rows, columns=columns, step=step, warps=warps, stages=stages)


TABLE: Mapping[tuple[str, str], tuple[Config, ...]] = {
    ("gate_up", "nf4"): (
        _c(16, 64, 64, 2, 4),
        _c(32, 128, 64, 4, 3),
        _c(64, 128, 64, 4, 3),
    ),
    ("gate_up", "nested"): (_c(16, 64, 64, 2, 4), _c(32, 128, 64, 4, 3)),
    ("gate_up", "float"): (_c(16, 64, 64, 2, 4), _c(64, 128, 64, 4, 3)),
    ("hidden_grad", "nf4"): (_c(16, 64, 64, 2, 4), _c(32, 128, 64, 4, 3)),
    ("hidden_grad", "nested"): (_c(16, 64, 64, 2, 4), _c(32, 128, 64, 4, 3)),
    ("hidden_grad", "float"): (_c(16, 64, 64, 2, 4), _c(64, 64, 64, 4, 3)),
    ("to_tokens", "nf4"): (_c(16, 64, 32, 1, 3), _c(32, 64, 32, 1, 3)),
    ("to_tokens", "nested"): (_c(16, 64, 32, 1, 3),),
    ("to_tokens", "float"): (_c(16, 64, 32, 2, 3), _c(64, 64, 32, 4, 3)),
    ("input_grad", "nf4"): (_c(16, 64, 32, 1, 3), _c(32, 64, 32, 1, 3)),
    ("input_grad", "nested"): (_c(16, 64, 32, 1, 3), _c(32, 64, 32, 1, 3)),
    ("input_grad", "float"): (_c(16, 64, 32, 2, 4), _c(64, 128, 32, 4, 3)),
    ("gate_up", "float32"): (_c(16, 64, 32, 4, 3),),
    ("hidden_grad", "float32"): (_c(16, 64, 32, 4, 3),),
    ("to_tokens", "float32"): (_c(16, 64, 32, 4, 3),),
    ("input_grad", "float32"): (_c(16, 64, 32, 4, 3),),
    ("project", "float"): (_c(16, 16, 32, 1, 3), _c(64, 16, 32, 4, 3)),
    ("adapter_grad", "float"): (_c(32, 32, 32, 4, 3),),
}
"""Shipped configurations by (kernel, weights), rising in rows. ``float`` is bfloat16."""
WIDE_RANK = 64
"""Of adapters or surrogates; above it only the lowest tile has the registers."""

FILL = 0.75
"""A tile is taken if an expert's mean rows fill this share of it."""


def choose(
    kernel: str, weights: str, rows: float, *, rank: int = 0, **shape: int
) -> Config:
    """The configuration for one launch.

    Args:
        kernel: a name of the table.
        weights: ``nf4``, ``nested``, ``float`` or ``float32``.
        rows: mean rows an expert.
        rank: of the low-rank term.
        shape: what else a tuned choice depends on, e.g. ``D=4096, F=688``.

    Raises:
        KeyError: there is no such kernel with such weights.
    """
    options = TABLE[kernel, weights]
    if rank > WIDE_RANK:
        return options[0]
    key = {"weights": weights, "rows": _bucket(rows), **shape}
    found = tuned.lookup(kernel, key)
    if found is not None:
        return Config(**found)
    fitting = [option for option in options if rows >= FILL * option.rows]
    return fitting[-1] if fitting else options[0]


def candidates(kernel: str, arch: str) -> list[dict[str, int]]:
    """Configurations worth timing: the shipped ones with more and fewer stages.

    Args:
        kernel: a name of the table.
        arch: e.g. ``sm_86``; the candidates are the same everywhere.
    """
    del arch
    found: dict[Config, None] = {}
    for (name, _), options in TABLE.items():
        for option in options if name == kernel else ():
            for stages in (2, 3, 4, 5):
                found[replace(option, stages=stages)] = None
    return [asdict(each) for each in found]


def _bucket(rows: float) -> int:
    """Rows as the power of two at or above them: what is tuned once serves a range."""
    return 1 << max(0, int(-(-rows // 1)) - 1).bit_length()
