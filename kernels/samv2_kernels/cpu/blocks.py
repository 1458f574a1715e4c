"""Where an expert's weights come from on a CPU: float blocks, or NF4 one at a time.

Shapes: D model width, F rows an expert, B stored blocks, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from samv2_kernels.cpu.nf4 import project, unpack

GATE, UP, DOWN = 0, 1, 2


class Blocks(Protocol):
    """The base blocks of a layer."""

    def weight(self, part: int, block: int) -> Tensor:
        """(F, D) gate, up or transposed down projection, valid until the next call."""

    def enter(self, block: int, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> None:
        """Write x W_g^T and x W_u^T."""


class FloatBlocks:
    """Blocks in the dtype of the rows."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = [part.unbind() for part in parts]

    def weight(self, part: int, block: int) -> Tensor:
        return self.parts[part][block]

    def enter(self, block: int, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> None:
        torch.mm(x_nD, self.weight(GATE, block).T, out=gate_nF)
        torch.mm(x_nD, self.weight(UP, block).T, out=up_nF)


class Nf4Blocks:
    """Packed blocks; no more than one part of one block is unpacked at a time."""

    def __init__(
        self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.codes, self.absmax = tensors[:3], tensors[3:]
        self.shape = shape
        self.dtype = dtype

    def weight(self, part: int, block: int) -> Tensor:
        codes, absmax = self.codes[part][block], self.absmax[part][block]
        return unpack(codes, absmax, self.shape, self.dtype)

    def enter(self, block: int, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> None:
        torch.mm(x_nD, self.weight(GATE, block).T, out=gate_nF)
        torch.mm(x_nD, self.weight(UP, block).T, out=up_nF)


class DecodingBlocks:
    """Gate and up rows in decoding order, which are never unpacked."""

    def __init__(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> None:
        self.gate_up, self.gate_up_absmax, self.down, self.down_absmax = tensors
        self.shape = shape

    def weight(self, part: int, block: int) -> Tensor:
        if part != DOWN:
            raise ValueError(
                "blocks in decoding order have no backward: use Nf4Weights to train"
            )
        codes, absmax = self.down[block], self.down_absmax[block]
        return unpack(codes, absmax, self.shape, torch.bfloat16)

    def enter(self, block: int, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> None:
        both = project(x_nD, self.gate_up[block], self.gate_up_absmax[block])
        gate_nF.copy_(both[:, : self.shape[0]])
        up_nF.copy_(both[:, self.shape[0] :])


def blocks_of(weights: Sequence[Tensor], x_TD: Tensor, ffn_width: int) -> Blocks:
    """The blocks that an op's list of three, six or four tensors stands for."""
    shape = (ffn_width, x_TD.shape[1])
    if len(weights) == 3:
        return FloatBlocks(weights)
    if len(weights) == 6:
        return Nf4Blocks(weights, shape, x_TD.dtype)
    return DecodingBlocks(weights, shape)
