"""What adapters and surrogates add to the rows of a batch, forward and backward.

Shapes: T tokens, D model width, E experts, F rows an expert, K slots, n rows of a batch,
R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samv2_kernels.cpu.batches import Batch, Sums
from samv2_kernels.cpu.blocks import Stack


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The adapters' low-rank terms."""

    low_gate_TR: Tensor
    low_up_TR: Tensor
    gate_EFR: Tensor
    up_EFR: Tensor
    down_ERF: Tensor

    def enter(self, batch: Batch, gate_nF: Tensor, up_nF: Tensor) -> None:
        """Add to the inputs of silu(gate) up."""
        for low_TR, part_EFR, into_nF in (
            (self.low_gate_TR, self.gate_EFR, gate_nF),
            (self.low_up_TR, self.up_EFR, up_nF),
        ):
            rows = Stack(part_EFR.transpose(1, 2))
            batch.multiply(batch.of_tokens(low_TR), rows, into_nF, add=True)

    def leave(self, batch: Batch, hidden_nF: Tensor, low_down: Sums) -> None:
        """Add the weighted hidden rows' part of the down projection."""
        low_nR = hidden_nF.new_empty((len(batch), self.down_ERF.shape[1]))
        batch.multiply(hidden_nF, Stack(self.down_ERF.transpose(1, 2)), low_nR)
        batch.add(low_down, low_nR)


class RankGradients:
    """Gradients of a :class:`Rank`, filled batch by batch."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.low_gate = Sums(*rank.low_gate_TR.shape, rank.low_gate_TR.dtype)
        self.low_up = Sums(*rank.low_up_TR.shape, rank.low_up_TR.dtype)
        self.gate_EFR = torch.zeros_like(rank.gate_EFR)
        self.up_EFR = torch.zeros_like(rank.up_EFR)
        self.down_ERF = torch.zeros_like(rank.down_ERF)

    def complete(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Those of the two low-rank inputs and of the rows, in their order in the op."""
        low_gate_TR, low_up_TR = self.low_gate.complete(), self.low_up.complete()
        return low_gate_TR, low_up_TR, self.gate_EFR, self.up_EFR, self.down_ERF

    def leave(
        self,
        batch: Batch,
        grad_low_TR: Tensor,
        weight_n1: Tensor,
        hidden_nF: Tensor,
        dh_nF: Tensor,
    ) -> None:
        """Through the down projection: the rows' gradient, and their part of dh."""
        grad_nR = batch.of_tokens(grad_low_TR)
        weighted_nR = grad_nR * weight_n1
        batch.multiply(grad_nR, Stack(self.rank.down_ERF), dh_nF, add=True)
        batch.outer(weighted_nR, hidden_nF, self.down_ERF)

    def enter(self, batch: Batch, dgate_nF: Tensor, dup_nF: Tensor) -> None:
        """Through the gate and up projections."""
        rank = self.rank
        for low_TR, part_EFR, dlow, dpart_EFR, d_nF in (
            (rank.low_gate_TR, rank.gate_EFR, self.low_gate, self.gate_EFR, dgate_nF),
            (rank.low_up_TR, rank.up_EFR, self.low_up, self.up_EFR, dup_nF),
        ):
            low_nR = batch.of_tokens(low_TR)
            dlow_nR = torch.empty_like(low_nR)
            batch.outer(d_nF, low_nR, dpart_EFR)
            batch.multiply(d_nF, Stack(part_EFR), dlow_nR)
            batch.add(dlow, dlow_nR)


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """The visited experts' surrogates, which their outputs replace."""

    low_TQ: Tensor
    out_EQD: Tensor
    reached_TK: Tensor

    def subtract(self, batch: Batch, y_nD: Tensor) -> None:
        """y -= r (U x) V_e^T."""
        low_nQ = batch.of_tokens(self.low_TQ)
        low_nQ.mul_(-batch.of_visits(self.reached_TK, low_nQ.dtype))
        batch.multiply(low_nQ, Stack(self.out_EQD), y_nD, add=True)


class StandInGradients:
    """Gradients of :class:`StandIns`, filled batch by batch."""

    def __init__(self, stand_ins: StandIns, wide: torch.dtype) -> None:
        self.stand_ins = stand_ins
        self.low = Sums(*stand_ins.low_TQ.shape, stand_ins.low_TQ.dtype)
        self.reached_TK = torch.zeros_like(stand_ins.reached_TK, dtype=wide)

    def subtract(self, batch: Batch, dy_nD: Tensor) -> None:
        """Through y -= r (U x) V_e^T."""
        low_nQ = batch.of_tokens(self.stand_ins.low_TQ)
        back_nQ = torch.empty_like(low_nQ)
        out_EDQ = self.stand_ins.out_EQD.transpose(1, 2)
        batch.multiply(dy_nD, Stack(out_EDQ), back_nQ)
        product_n = low_nQ.mul_(back_nQ).sum(1, dtype=self.reached_TK.dtype)
        batch.put(self.reached_TK, -product_n)
        back_nQ.mul_(-batch.of_visits(self.stand_ins.reached_TK, back_nQ.dtype))
        batch.add(self.low, back_nQ)

    def complete(self) -> tuple[Tensor, Tensor]:
        """Those of U x and of r."""
        return self.low.complete(), self.reached_TK.to(self.stand_ins.reached_TK.dtype)


def rank_of(
    low_gate_TR: Tensor | None,
    low_up_TR: Tensor | None,
    gate_EFR: Tensor | None,
    up_EFR: Tensor | None,
    down_ERF: Tensor | None,
) -> Rank | None:
    """The op's arguments of that name, if there are adapters."""
    if down_ERF is None:
        return None
    return Rank(
        low_gate_TR=low_gate_TR,
        low_up_TR=low_up_TR,
        gate_EFR=gate_EFR,
        up_EFR=up_EFR,
        down_ERF=down_ERF,
    )


def stand_ins_of(
    low_TQ: Tensor | None, out_EQD: Tensor | None, reached_TK: Tensor | None
) -> StandIns | None:
    """The op's arguments of that name, if there are surrogates."""
    if low_TQ is None:
        return None
    return StandIns(low_TQ=low_TQ, out_EQD=out_EQD, reached_TK=reached_TK)
