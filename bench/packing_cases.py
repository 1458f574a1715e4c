"""What the packing bench packs, and the figures that it holds the codec to.

The bars are multiples of the memcpy of the dense bytes in the same process (at least),
and of values plus entropy of the index, in bytes (at most). They hold for AVX-512; an
AVX2 path has to reach :data:`SHARE_OF_BARS` of the speeds. Lossy codecs are measured
without a bar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.updates.packing_frames import sparse

NUMEL = 1 << 24
"""Elements of a case: 64 MiB of float32, twice what the caches hold."""
ROW = 1024
SHARE_OF_BARS: Mapping[str | None, float] = {"avx512": 1.0, "avx2": 0.75, "scalar": 0.0}
"""By code path; a path that is not listed has to reach the bars in full."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tensor, how it is packed, and the bars."""

    name: str
    densities: tuple[float, ...]
    """Share of set elements, of equal parts of the tensor."""
    span: int = 1
    """Elements that are set or clear together."""
    codec: str = "raw"
    bits: float = 32
    """Bits a value takes, scales included."""
    encode: float | None = None
    """Least multiple of memcpy."""
    decode: float | None = None
    """Least multiple of memcpy."""
    size: float | None = None
    """Most bytes, as a multiple of values plus entropy."""

    def tensor(self) -> Tensor:
        """(NUMEL,) float32, the same at every call."""
        part = NUMEL // len(self.densities)
        parts = [
            sparse(part, density, seed=index, span=self.span)
            for index, density in enumerate(self.densities)
        ]
        return torch.cat(parts)

    def bound(self, tensor: Tensor) -> float:
        """Bytes of the values plus the entropy of which elements are set."""
        bits = 0.0
        for part in tensor.chunk(len(self.densities)):
            stored = int(part.count_nonzero())
            groups = part.numel() / self.span
            bits += stored * self.bits + groups * entropy(stored / part.numel())
        return bits / 8

    @property
    def most_bytes(self) -> float:
        """What no frame of one tensor may exceed: dense values, 0.005 % and 200 B."""
        return NUMEL * (self.bits / 8 + 4 * 0.00005) + 200


def entropy(p: float) -> float:
    """Bits of a coin that falls on one side with probability p."""
    q = 1 - p
    return -sum(x * math.log2(x) for x in (p, q) if x > 0)


def _unstructured() -> list[Case]:
    bars = {
        0.001: (1.5, 1.8, 1.04),
        0.01: (0.9, 1.5, 1.01),
        0.1: (0.45, 0.65, 1.01),
        0.5: (0.8, 1.2, 1.001),
        0.9: (0.4, 0.55, 1.001),
        1.0: (0.7, 0.9, 1.0001),
    }
    return [
        Case(name=_percent(p), densities=(p,), encode=e, decode=d, size=s)
        for p, (e, d, s) in bars.items()
    ]


def _rows() -> list[Case]:
    bars = {
        0.001: (1.7, 1.8, 1.03),
        0.01: (1.7, 1.8, 1.01),
        0.1: (1.7, 1.8, 1.01),
        0.5: (0.8, 0.9, 1.001),
        0.9: (0.8, 0.9, 1.001),
    }
    return [
        Case(
            name=f"rows of {ROW}, {_percent(p)}",
            densities=(p,),
            span=ROW,
            encode=e,
            decode=d,
            size=s,
        )
        for p, (e, d, s) in bars.items()
    ]


def _percent(p: float) -> str:
    return "dense" if p == 1 else f"{p * 100:g} %"


CASES = {
    case.name: case
    for case in [
        *_unstructured(),
        *_rows(),
        Case(name="spans of 16, 5 %", densities=(0.05,), span=16),
        Case(name="spans of 16, 50 %", densities=(0.5,), span=16),
        Case(name="mixture", densities=(0, 0, 0.001, 0.01, 0.1, 0.5, 0.95, 1)),
        *(
            Case(
                name=f"dense, {codec}",
                densities=(1.0,),
                codec=codec,
                bits=bits,
            )
            for codec, bits in {
                "bf16": 16,
                "f16": 16,
                "int8": 8 + 32 / 256,
                "nf4": 4 + 32 / 64,
                "int4": 4 + 32 / 64,
            }.items()
        ),
    ]
}
COMPARED = ("0.1 %", "1 %", "10 %", "50 %", "90 %", f"rows of {ROW}, 10 %")
"""Cases that other ways of packing run on too."""


def scattered(numel: int, density: float, *, seed: int, span: int = 1) -> Tensor:
    """About ``density`` of a tensor, in spans; quicker to make than ``sparse``."""
    rng = np.random.default_rng(seed)
    groups = numel // span
    chosen = rng.integers(groups, size=int(density * groups))
    values = np.zeros((groups, span), np.float32)
    values[chosen] = rng.standard_normal((len(chosen), span), dtype=np.float32)
    return torch.from_numpy(values.reshape(-1))
