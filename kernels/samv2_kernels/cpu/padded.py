"""All visits as one batch in which every visited expert has the same number of rows.

A matmul of a narrow expert is over before two threads have shared it; one batched matmul
over all experts is not. Its price is padding, which repeats rows of the same expert with
weight 0: it adds at most a quarter to the products, or ``FEW_ROWS`` rows an expert.

Shapes: T tokens, D model width, E experts, V visited ones, F rows an expert, K slots,
N = T K visits, U used ones, m rows of every visited expert, n = V m, X, Y columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from samv2_kernels.cpu.batches import Matrices, Sums

NARROW_WEIGHTS = 2**17
"""F D up to which a matmul of one expert is too small for threads."""
FEW_ROWS = 32
"""What a call of its own costs an expert, in rows."""


def padding_pays(bounds: list[int], weights: int) -> bool:
    """Whether one padded batch beats matmuls expert by expert.

    Args:
        bounds: E + 1 exclusive offsets of the experts among the sorted visits.
        weights: F D.
    """
    rows = [stop - start for start, stop in zip(bounds, bounds[1:]) if start < stop]
    limit = max(1.25 * sum(rows), sum(rows) + FEW_ROWS * len(rows))
    return weights <= NARROW_WEIGHTS and 0 < len(rows) * max(rows, default=0) <= limit


@dataclass(frozen=True, kw_only=True)
class Padded:
    """The visits to all visited experts, which have as many rows as the one with most."""

    expert_V: Tensor | None
    """int64; None if all are visited."""
    most: int
    """m."""
    visit_n: Tensor
    """int64 visits v = t K + slot; padding repeats others."""
    token_n: Tensor
    """int64 tokens t."""
    padding_n1: Tensor
    """bool."""
    row_n: Tensor
    """int64 place of every row among the sorted visits."""
    position_U: Tensor
    """int64 row of every used visit, in the sorted order."""
    bags_U: Tensor
    """int64 the same in the order of tokens."""
    bag_T: Tensor
    """int64 where each token's part of it begins."""

    def __len__(self) -> int:
        return len(self.token_n)

    def of_tokens(self, rows_TX: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.index_select(rows_TX, 0, self.token_n, out=out)

    def of_visits(self, values_TK: Tensor, dtype: torch.dtype) -> Tensor:
        values_n1 = values_TK.to(dtype).reshape(-1, 1).index_select(0, self.visit_n)
        return values_n1.masked_fill_(self.padding_n1, 0)

    def multiply(
        self,
        rows_nX: Tensor,
        matrices: Matrices,
        out_nY: Tensor,
        *,
        add: bool = False,
    ) -> None:
        rows_VmX, out_VmY = self._by_expert(rows_nX), self._by_expert(out_nY)
        matrix_VXY = matrices.stack(self.expert_V)
        if add:
            torch.baddbmm(out_VmY, rows_VmX, matrix_VXY, out=out_VmY)
        else:
            torch.bmm(rows_VmX, matrix_VXY, out=out_VmY)

    def outer(self, left_nX: Tensor, right_nY: Tensor, out_EXY: Tensor) -> None:
        left_VXm = self._by_expert(left_nX).transpose(1, 2)
        right_VmY = self._by_expert(right_nY)
        if self.expert_V is None:
            torch.bmm(left_VXm, right_VmY, out=out_EXY)
        else:
            out_EXY[self.expert_V] = left_VXm @ right_VmY

    def add(self, sums: Sums, rows_nX: Tensor) -> None:
        # The only batch: its sums are complete. They are made in float32 or wider.
        total_TX = embedding_bag(self.bags_U, rows_nX, self.bag_T, mode="sum")
        sums.total_TX = total_TX.to(sums.dtype)

    def put(self, into_TK: Tensor, value_n: Tensor) -> None:
        into_TK.view(-1)[self.visit_n[self.position_U]] = value_n[self.position_U]

    def saved(self, rows_NF: Tensor) -> Tensor:
        return rows_NF.index_select(0, self.row_n)

    def place(self, rows_NF: Tensor) -> Tensor:
        return rows_NF.new_empty((len(self), rows_NF.shape[1]))

    def save(self, rows_nF: Tensor, into_NF: Tensor) -> None:
        into_UF = into_NF[: len(self.position_U)]
        torch.index_select(rows_nF, 0, self.position_U, out=into_UF)

    def _by_expert(self, rows_nX: Tensor) -> Tensor:
        """(V, m, X)."""
        return rows_nX.view(-1, self.most, rows_nX.shape[1])


def padded(order_N: Tensor, bounds: list[int], slots: int) -> Padded:
    """Pad the visits.

    Args:
        order_N: (N,) int32 sorted visits of a ``VisitOrder``, of which some are used.
        bounds: E + 1 exclusive offsets of the experts among them.
        slots: K, at least 1.
    """
    spans = [
        (e, start, stop)
        for e, (start, stop) in enumerate(zip(bounds, bounds[1:]))
        if start < stop
    ]
    expert_V, start_V, stop_V = torch.tensor(spans).unbind(1)
    most = int((stop_V - start_V).max())
    row_Vm = start_V.unsqueeze(1) + torch.arange(most)
    last_V1 = stop_V.unsqueeze(1) - 1
    padding_Vm = row_Vm > last_V1
    row_n = torch.minimum(row_Vm, last_V1).view(-1)
    position_U = (~padding_Vm).view(-1).nonzero().squeeze(1)
    visit_N = order_N.long()
    visit_n = visit_N.index_select(0, row_n)

    position_N = torch.full_like(visit_N, -1)
    position_N[visit_N[: bounds[-1]]] = position_U
    bag_T = torch.arange(0, len(visit_N), slots)
    if len(position_U) < len(visit_N):
        used_N = position_N >= 0
        count_T = used_N.view(-1, slots).sum(1)
        position_N, bag_T = position_N[used_N], count_T.cumsum(0) - count_T
    return Padded(
        expert_V=None if len(spans) == len(bounds) - 1 else expert_V,
        most=most,
        visit_n=visit_n,
        token_n=visit_n.div(slots, rounding_mode="floor"),
        padding_n1=padding_Vm.view(-1, 1),
        row_n=row_n,
        position_U=position_U,
        bags_U=position_N,
        bag_T=bag_T,
    )
