"""Where an expert's weights come from on a CPU: float blocks, or NF4 one at a time.

Shapes: D model width, E experts, V some of them, F rows an expert, B stored blocks, n
rows of a batch, X, Y columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from samv2_kernels.cpu.batches import Batch, Group, Matrices, take
from samv2_kernels.cpu.nf4 import project, unpack

GATE, UP, DOWN = 0, 1, 2


class Stack:
    """Matrices of experts in one tensor."""

    def __init__(self, stack_EXY: Tensor) -> None:
        self.stack_EXY = stack_EXY

    def of(self, group: Group) -> Tensor:
        return self.stack_EXY[group.expert]

    def stack(self, experts: list[int]) -> Tensor:
        return take(self.stack_EXY, experts)


class Blocks(Protocol):
    """The base blocks of a layer."""

    shape: tuple[int, int]
    """(F, D)."""

    def part(self, part: int, *, transposed: bool = False) -> Matrices:
        """(F, D) gate, up or transposed down projections; transposed if asked for."""

    def enter(self, batch: Batch, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> None:
        """Write x W_g^T and x W_u^T."""


class Shared:
    """Matrices of blocks in one tensor."""

    def __init__(self, stack_BXY: Tensor, blocks: Sequence[int]) -> None:
        self.stack_BXY, self.blocks = stack_BXY, blocks

    def of(self, group: Group) -> Tensor:
        return self.stack_BXY[group.block]

    def stack(self, experts: list[int]) -> Tensor:
        return take(self.stack_BXY, [self.blocks[e] for e in experts])


class FloatBlocks:
    """Blocks in the dtype of the rows."""

    def __init__(self, parts: Sequence[Tensor], blocks: Sequence[int] | None) -> None:
        self.parts = parts
        self.blocks = blocks
        self.shape = tuple(parts[0].shape[1:])

    def part(self, part: int, *, transposed: bool = False) -> Matrices:
        matrices = self.parts[part]
        if transposed:
            matrices = matrices.transpose(1, 2)
        return Stack(matrices) if self.blocks is None else Shared(matrices, self.blocks)

    def enter(self, batch: Batch, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> None:
        batch.multiply(x_nD, self.part(GATE, transposed=True), gate_nF)
        batch.multiply(x_nD, self.part(UP, transposed=True), up_nF)


class Unpacked:
    """One part of the NF4 blocks, unpacked one by one."""

    def __init__(
        self,
        codes_BH: Tensor,
        absmax_BN: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        transposed: bool,
    ) -> None:
        self.codes_BH, self.absmax_BN = codes_BH, absmax_BN
        self.shape, self.dtype = shape, dtype
        self.transposed = transposed

    def of(self, group: Group) -> Tensor:
        codes_H, absmax_N = self.codes_BH[group.block], self.absmax_BN[group.block]
        matrix = unpack(codes_H, absmax_N, self.shape, self.dtype)
        return matrix.T if self.transposed else matrix

    def stack(self, experts: list[int]) -> Tensor:
        raise NotImplementedError("NF4 blocks are unpacked one at a time")


class Nf4Blocks:
    """Packed blocks; no more than one part of one block is unpacked at a time."""

    def __init__(
        self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.codes, self.absmax = tensors[:3], tensors[3:]
        self.shape = shape
        self.dtype = dtype

    def part(self, part: int, *, transposed: bool = False) -> Matrices:
        return Unpacked(
            self.codes[part], self.absmax[part], self.shape, self.dtype, transposed
        )

    def enter(self, batch: Batch, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> None:
        batch.multiply(x_nD, self.part(GATE, transposed=True), gate_nF)
        batch.multiply(x_nD, self.part(UP, transposed=True), up_nF)


class DecodingBlocks:
    """Gate and up rows in decoding order, which are never unpacked."""

    def __init__(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> None:
        self.gate_up, self.gate_up_absmax, self.down, self.down_absmax = tensors
        self.shape = shape

    def part(self, part: int, *, transposed: bool = False) -> Matrices:
        if part != DOWN:
            raise ValueError(
                "blocks in decoding order have no backward: use Nf4Weights to train"
            )
        return Unpacked(
            self.down, self.down_absmax, self.shape, torch.bfloat16, transposed
        )

    def enter(self, batch: Batch, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> None:
        for group, x, gate, up in batch.by_expert(x_nD, gate_nF, up_nF):
            codes, absmax = self.gate_up[group.block], self.gate_up_absmax[group.block]
            both = project(x, codes, absmax)
            gate.copy_(both[:, : self.shape[0]])
            up.copy_(both[:, self.shape[0] :])


def blocks_of(
    weights: Sequence[Tensor],
    x_TD: Tensor,
    ffn_width: int,
    base_E: Tensor | None,
) -> Blocks:
    """The blocks that an op's list of three, six or four tensors stands for."""
    shape = (ffn_width, x_TD.shape[1])
    if len(weights) == 3:
        return FloatBlocks(weights, None if base_E is None else base_E.tolist())
    if len(weights) == 6:
        return Nf4Blocks(weights, shape, x_TD.dtype)
    return DecodingBlocks(weights, shape)
