"""Magnitudes of NF4 blocks in 8 bits: bitsandbytes' double quantisation, by expert.

The N magnitudes of an expert, minus their mean, are cut into blocks of 256; a block is
its largest magnitude and a code for each, which names one of 256 values of a map with
seven exponents (QLoRA, arXiv 2305.14314, section 3; 8-bit dynamic quantisation, arXiv
1511.04561). That takes half a bit a weight down to an eighth.

What bitsandbytes packed is read as it is (:func:`unnest` gives its bits). Packing chooses
the nearest value; bitsandbytes' CPU code looks codes up in a table and is off by one next
to midpoints.

Shapes: E experts, N blocks of 64 an expert, S = ceil(N / 256) blocks of 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from samv2_kernels.nf4 import SMALLEST, padded

NESTED_BLOCK = 256
EXPONENTS = 7


@dataclass(frozen=True, kw_only=True)
class NestedAbsmax:
    """Magnitudes of E experts."""

    codes_EN: Tensor
    """(E, N) uint8."""
    second_ES: Tensor
    """(E, S) float32, the largest deviation of every block of 256."""
    offset_E: Tensor
    """(E,) float32, the mean magnitude."""


@cache
def _values() -> tuple[float, ...]:
    """The map's 256 values, rising."""
    found = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        size = 10 ** (exponent + 1 - EXPONENTS)
        found += (size * means).tolist() + (-size * means).tolist()
    return tuple(sorted(found))


def nested_values(device: torch.device | str = "cpu") -> Tensor:
    """(256,) float32, rising: what codes stand for, as a share of a block's size."""
    return torch.tensor(_values(), dtype=torch.float32, device=device)


@torch.no_grad()
def nest(absmax_EN: Tensor) -> NestedAbsmax:
    """Pack magnitudes to 8 bits.

    Args:
        absmax_EN: (E, N) float32.
    """
    offset_E = absmax_EN.mean(dim=1)
    blocks_ESB = padded(absmax_EN - offset_E.unsqueeze(1), NESTED_BLOCK).unflatten(
        1, (-1, NESTED_BLOCK)
    )
    second_ES = blocks_ESB.abs().amax(dim=2)
    share_ESB = blocks_ESB / second_ES.clamp(min=SMALLEST).unsqueeze(2)
    values = nested_values(absmax_EN.device)
    middles = (values[1:] + values[:-1]) / 2
    codes_EN = torch.bucketize(share_ESB, middles).flatten(1)[:, : absmax_EN.shape[1]]
    return NestedAbsmax(
        codes_EN=codes_EN.to(torch.uint8), second_ES=second_ES, offset_E=offset_E
    )


@torch.no_grad()
def unnest(nested: NestedAbsmax) -> Tensor:
    """(E, N) float32 magnitudes."""
    count = nested.codes_EN.shape[1]
    shares_EN = nested_values(nested.codes_EN.device)[nested.codes_EN.int()]
    second_EN = nested.second_ES.repeat_interleave(NESTED_BLOCK, dim=1)[:, :count]
    return shares_EN * second_EN + nested.offset_E.unsqueeze(1)
