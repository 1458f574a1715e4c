"""What it takes to compile one kernel in one configuration, without tensors or a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Weights = Literal["nf4", "bf16", "none"]
Direction = Literal["forward", "dx", "dw", "route"]


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One shipped configuration of a kernel."""

    kernel: str
    """Its name, e.g. ``gate_up``."""
    config: str
    """Tile and schedule in words, e.g. ``16x128x128 w4 s3``."""
    function: Any
    """The ``triton.jit`` function."""
    signature: Mapping[str, str]
    """Triton type of every argument that is not a constexpr, e.g. ``*bf16``, ``i32``."""
    constexprs: Mapping[str, Any]
    """Values of the constexpr arguments."""
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16; all pointers are taken to be."""
    num_warps: int = 4
    num_stages: int = 3
    rows_per_tile: int
    weights: Weights
    direction: Direction
    weights_per_step: int = 0
    """Weights that one program consumes in one turn of its main loop; 0: no matmul."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further compiler options."""
