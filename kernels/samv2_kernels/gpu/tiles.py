"""What several kernels share: their tile of visits, and hidden units as float16.

Hidden units that NF4 weights are multiplied with are stored as float16: 11 bits of
mantissa instead of bfloat16's 8, and their products with magnitudes need no conversion.
Going forward they are stored at a quarter: normal numbers from 2.4e-4 to 262,016, below
that with an absolute error of 1.2e-7, above it saturated. (Of SmolLM2-135M's hidden
units the largest is some 3,000, and rows have a root mean square of 0.01 or more.)
Gradients are of rows that the launcher has divided by a power of two, and without their
combine weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

GRANULE = tl.constexpr(32)
HIDDEN_SHARE = tl.constexpr(0.25)
LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def tile_of(tiles_ptr, number):
    """(expert, first row, stop row) of a row tile; the expert is -1 for padding."""
    entry = tiles_ptr + 3 * number
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def to_half(values):
    """float16, saturating; what is not finite stays so."""
    limited = tl.clamp(values, -LARGEST_HALF, LARGEST_HALF)
    return tl.where(tl.abs(values) < float("inf"), limited, values).to(tl.float16)
