"""What adapters and surrogates add to the rows of a batch, forward and backward.

Shapes: T tokens, D model width, E experts, F rows an expert, K slots, n rows of a batch,
R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samv2_kernels.cpu.batches import Batch


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
        low_gate_nR = batch.of_tokens(self.low_gate_TR)
        low_up_nR = batch.of_tokens(self.low_up_TR)
        parts = batch.by_expert(gate_nF, up_nF, low_gate_nR, low_up_nR)
        for group, gate, up, low_gate, low_up in parts:
            gate.addmm_(low_gate, self.gate_EFR[group.expert].T)
            up.addmm_(low_up, self.up_EFR[group.expert].T)

    def leave(self, batch: Batch, hidden_nF: Tensor, low_down_TR: Tensor) -> None:
        """Add the weighted hidden rows' part of the down projection."""
        low_nR = hidden_nF.new_empty((len(batch), self.down_ERF.shape[1]))
        for group, hidden, low in batch.by_expert(hidden_nF, low_nR):
            torch.mm(hidden, self.down_ERF[group.expert].T, out=low)
        batch.add(low_down_TR, low_nR)


class RankGradients:
    """Gradients of a :class:`Rank`, filled batch by batch."""

    def __init__(self, rank: Rank, wide: torch.dtype) -> None:
        self.rank = rank
        self.low_gate_TR = torch.zeros_like(rank.low_gate_TR, dtype=wide)
        self.low_up_TR = torch.zeros_like(rank.low_up_TR, dtype=wide)
        self.gate_EFR = torch.zeros_like(rank.gate_EFR)
        self.up_EFR = torch.zeros_like(rank.up_EFR)
        self.down_ERF = torch.zeros_like(rank.down_ERF)

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
        weighted_nR = (grad_nR * weight_n1).to(hidden_nF.dtype)
        parts = batch.by_expert(dh_nF, grad_nR, weighted_nR, hidden_nF)
        for group, dh, grad, weighted, hidden in parts:
            dh.addmm_(grad, self.rank.down_ERF[group.expert])
            torch.mm(weighted.T, hidden, out=self.down_ERF[group.expert])

    def enter(self, batch: Batch, dgate_nF: Tensor, dup_nF: Tensor) -> None:
        """Through the gate and up projections."""
        rank = self.rank
        for low_TR, part_EFR, dlow_TR, dpart_EFR, d_nF in (
            (
                rank.low_gate_TR,
                rank.gate_EFR,
                self.low_gate_TR,
                self.gate_EFR,
                dgate_nF,
            ),
            (rank.low_up_TR, rank.up_EFR, self.low_up_TR, self.up_EFR, dup_nF),
        ):
            low_nR = batch.of_tokens(low_TR)
            dlow_nR = torch.empty_like(low_nR)
            for group, d, low, dlow in batch.by_expert(d_nF, low_nR, dlow_nR):
                torch.mm(d.T, low, out=dpart_EFR[group.expert])
                torch.mm(d, part_EFR[group.expert], out=dlow)
            batch.add(dlow_TR, dlow_nR)


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """The visited experts' surrogates, which their outputs replace."""

    low_TQ: Tensor
    out_EQD: Tensor
    reached_TK: Tensor

    def subtract(self, batch: Batch, y_nD: Tensor) -> None:
        """y -= r (U x) V_e^T."""
        low_nQ = batch.of_tokens(self.low_TQ)
        low_nQ.mul_(-batch.of_visits(self.reached_TK))
        for group, y, low in batch.by_expert(y_nD, low_nQ):
            y.addmm_(low, self.out_EQD[group.expert])


class StandInGradients:
    """Gradients of :class:`StandIns`, filled batch by batch."""

    def __init__(self, stand_ins: StandIns, wide: torch.dtype) -> None:
        self.stand_ins = stand_ins
        self.low_TQ = torch.zeros_like(stand_ins.low_TQ, dtype=wide)
        self.reached_TK = torch.zeros_like(stand_ins.reached_TK, dtype=wide)

    def subtract(self, batch: Batch, dy_nD: Tensor) -> None:
        """Through y -= r (U x) V_e^T."""
        low_nQ = batch.of_tokens(self.stand_ins.low_TQ)
        back_nQ = torch.empty_like(low_nQ)
        for group, dy, back in batch.by_expert(dy_nD, back_nQ):
            torch.mm(dy, self.stand_ins.out_EQD[group.expert].T, out=back)
        product_n = low_nQ.mul_(back_nQ).sum(1, dtype=self.reached_TK.dtype)
        self.reached_TK.view(-1)[batch.visit_n] = -product_n
        back_nQ.mul_(-batch.of_visits(self.stand_ins.reached_TK))
        batch.add(self.low_TQ, back_nQ)
