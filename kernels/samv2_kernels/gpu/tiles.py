"""What several kernels share: their tile of visits, and hidden units as float16.

Hidden units that NF4 weights are multiplied with are stored as float16: 11 bits of
mantissa instead of bfloat16's 8, and their products with magnitudes need no conversion.
Going forward they are stored at a quarter, which keeps magnitudes up to 262,000; larger
ones saturate. Gradients are of rows that the launcher has divided by a power of two.
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
    """float16, saturating; NaN stays NaN."""
    limited = tl.clamp(
        values, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL
    )
    return limited.to(tl.float16)
