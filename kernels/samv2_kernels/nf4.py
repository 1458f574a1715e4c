"""NF4, the 4-bit format of bitsandbytes, applied to each expert by itself.

The F D weights of an expert, row after row, are cut into blocks of 64; the last one may
be shorter. A block is its largest magnitude (float32) and a code for each weight, which
names the nearest of 16 levels of that magnitude; two codes share a byte, the first one
in its high half (QLoRA, arXiv 2305.14314). Blocks end where their expert ends: a row of
both tensors is what bitsandbytes makes of that expert alone, and some experts are some
rows.

Shapes: E experts, F rows an expert, D model width, N = ceil(F D / 64) blocks and
H = ceil(F D / 2) bytes an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The codebook: quantiles of a normal distribution, zero exact (QLoRA, appendix E)."""
SMALLEST = 1e-38
"""Magnitudes below this divide as this; a block of zeros stays zeros."""


@dataclass(frozen=True, kw_only=True)
class Nf4Experts:
    """The packed weights of E experts, in the byte order of bitsandbytes."""

    codes_EH: Tensor
    """(E, H) uint8, two codes a byte."""
    absmax_EN: Tensor
    """(E, N) float32, the largest magnitude of every block."""
    shape: tuple[int, int, int]
    """(E, F, D) of what is packed."""

    def experts(self, first: int, stop: int) -> Nf4Experts:
        """Experts ``first`` to ``stop - 1``, sharing memory."""
        return Nf4Experts(
            codes_EH=self.codes_EH[first:stop],
            absmax_EN=self.absmax_EN[first:stop],
            shape=(stop - first, *self.shape[1:]),
        )


@torch.no_grad()
def quantise(weights_EFD: Tensor) -> Nf4Experts:
    """Pack experts, each by itself, in the bits of bitsandbytes' CPU quantiser.

    Args:
        weights_EFD: (E, F, D) float32, float16 or bfloat16.
    """
    num_experts, weights = len(weights_EFD), prod(weights_EFD.shape[1:])
    flat_EP = padded(weights_EFD.flatten(1).float(), BLOCK)
    blocks_ENB = flat_EP.unflatten(1, (-1, BLOCK))
    absmax_EN = blocks_ENB.abs().amax(dim=2)
    inverse_EN1 = (1.0 / absmax_EN.clamp(min=SMALLEST)).unsqueeze(2)
    share_ENB = (blocks_ENB * inverse_EN1).clamp_(-1, 1)
    codes_EP = torch.bucketize(
        share_ENB, _bounds(weights_EFD.device), out_int32=True
    ).flatten(1)
    codes_EP = codes_EP.to(torch.uint8)
    bytes_EH = (codes_EP[:, ::2] << 4) | codes_EP[:, 1::2]
    return Nf4Experts(
        codes_EH=bytes_EH[:, : -(-weights // 2)].contiguous(),
        absmax_EN=absmax_EN.view(num_experts, -1),
        shape=tuple(weights_EFD.shape),
    )


@torch.no_grad()
def dequantise(packed: Nf4Experts, dtype: torch.dtype) -> Tensor:
    """The weights that packed experts stand for, (E, F, D), contiguous.

    Args:
        packed: of any number of experts.
        dtype: float32, float16 or bfloat16; products are rounded to it once.
    """
    codes_EP = padded(packed.codes_EH, BLOCK // 2)
    pairs = level_pairs(codes_EP.device).index_select(0, codes_EP.flatten().int())
    blocks_ENB = pairs.view(torch.float32).view(*packed.absmax_EN.shape, BLOCK)
    blocks_ENB.mul_(packed.absmax_EN.float().unsqueeze(2))
    flat_EP = blocks_ENB.to(dtype).flatten(1)
    return flat_EP[:, : prod(packed.shape[1:])].reshape(packed.shape).contiguous()


@cache
def level_pairs(device: torch.device) -> Tensor:
    """(256,) int64: what a byte's two codes stand for, as the bits of two float32."""
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    pairs = torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1)
    return pairs.view(torch.int64).squeeze(1).to(device)


def padded(rows_EX: Tensor, multiple: int) -> Tensor:
    """Zeros behind every row, up to the next multiple of a length."""
    missing = -rows_EX.shape[1] % multiple
    return pad(rows_EX, (0, missing)) if missing else rows_EX


@cache
def _bounds(device: torch.device) -> Tensor:
    """(15,) midpoints between the levels."""
    levels = torch.tensor(LEVELS, device=device)
    return (levels[:-1] + levels[1:]) / 2
