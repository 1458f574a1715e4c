"""NF4 experts in the order that a CPU with AVX512-BF16 multiplies few rows with fastest.

bitsandbytes has a product that reads 4-bit rows without unpacking them. It wants 32 rows
interleaved and their magnitudes in bfloat16, with blocks that run along a row. An
expert's gate and up rows, side by side, have that form; its down projection, whose
blocks run across what is summed, keeps its own. The codes move and are not copied: the
form takes the place of :class:`Nf4Weights` while a model only generates, and has no
backward.

Shapes: D model width, B stored blocks, F rows an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samv2_kernels.cpu.nf4 import bitsandbytes
from samv2_kernels.nf4 import BLOCK
from samv2_kernels.weights import DecodingWeights, Nf4Weights

TILE = 32
"""Rows that are interleaved."""


def can_decode(ffn_width: int, model_width: int) -> bool:
    """Whether this machine and these widths have the form; imports bitsandbytes."""
    if (2 * ffn_width) % TILE or model_width % BLOCK:
        return False
    functions = bitsandbytes()
    return functions is not None and bool(functions.has_avx512bf16())


@torch.no_grad()
def for_decoding(weights: Nf4Weights) -> DecodingWeights:
    """Put a layer's gate and up rows in the order of bitsandbytes' CPU product.

    Args:
        weights: packed blocks on the CPU.

    Raises:
        ValueError: bitsandbytes is missing, the CPU has no AVX512-BF16, 2 F is not a
            multiple of 32 or D not one of 64.
    """
    blocks, ffn_width, width = weights.gate.shape
    if not can_decode(ffn_width, width):
        raise ValueError(
            f"experts of {ffn_width} x {width} weights cannot be put in decoding order: "
            f"that needs bitsandbytes, AVX512-BF16, twice the rows a multiple of {TILE} "
            f"and a width that is one of {BLOCK}"
        )
    codes = [
        part.codes_EH.view(blocks, ffn_width, width // 2)
        for part in (weights.gate, weights.up)
    ]
    absmax = [
        part.absmax_EN.view(blocks, ffn_width, width // BLOCK)
        for part in (weights.gate, weights.up)
    ]
    return DecodingWeights(
        gate_up_codes=_interleave(torch.cat(codes, dim=1)),
        gate_up_absmax=torch.cat(absmax, dim=1).bfloat16().transpose(1, 2).contiguous(),
        down=weights.down,
        base_E=weights.base_E,
    )


def _interleave(codes: Tensor) -> Tensor:
    """(B, rows, D / 2) bytes of two codes along a row, to bytes of two rows 16 apart.

    A tile's bytes are, for every pair of columns, those of rows 0 to 15 with the codes
    of rows 16 to 31 in their high halves, two columns a row.
    """
    blocks, rows, columns = codes.shape
    pairs = torch.stack((codes >> 4, codes & 15), dim=3)
    tiles = pairs.view(blocks, rows // TILE, 2, TILE // 2, columns, 2)
    low, high = tiles.permute(2, 0, 1, 4, 3, 5)
    return (low | (high << 4)).reshape(blocks, rows, columns).contiguous()
