"""All visits as one batch of padded shares: experts that have the same number of rows.

A matmul of a narrow expert is over before two threads have shared it, and one of a few
dozen rows reads a wide expert's weights more than it multiplies; a batched matmul over
several experts gives every thread an expert of its own. Narrow experts with even loads
are one share, wide ones with a few dozen rows go in pairs, others alone. The price is
padding, which repeats rows of the same expert with weight 0.

Shapes: T tokens, D model width, E experts, V those of a share, F rows an expert, K slots,
U visits, m rows of every expert of a share, n rows in all, X, Y columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from samv2_kernels.cpu.batches import Matrices, Sums

NARROW_WEIGHTS = 2**17
"""F D up to which a matmul of one expert is too small for threads."""
FEW_ROWS = 32
"""What a call of its own costs a narrow expert, in rows."""
PAIRED_ROWS = (16, 112)
"""Of wide experts that run faster in pairs: fewest and most."""
PADDING = 1.25
"""Most rows with padding over rows without."""


def padding_pays(bounds: Sequence[int], weights: int) -> bool:
    """Whether one padded share of all experts beats matmuls expert by expert.

    Args:
        bounds: E + 1 exclusive offsets of the experts among the sorted visits.
        weights: F D.
    """
    rows = [stop - start for start, stop in zip(bounds, bounds[1:]) if start < stop]
    limit = max(PADDING * sum(rows), sum(rows) + FEW_ROWS * len(rows))
    return weights <= NARROW_WEIGHTS and 0 < len(rows) * max(rows, default=0) <= limit


def shares(
    bounds: Sequence[int], weights: int, blocks: Sequence[int]
) -> list[list[int]]:
    """The visited experts by rising index, cut into those of a share.

    Args:
        bounds: E + 1 exclusive offsets of the experts among the sorted visits.
        weights: F D.
        blocks: the block of each expert; pairs have neighbouring blocks.
    """
    rows = [stop - start for start, stop in zip(bounds, bounds[1:])]
    visited = [e for e, count in enumerate(rows) if count]
    if padding_pays(bounds, weights):
        return [visited]
    found: list[list[int]] = []
    for e in visited:
        last = found[-1] if found else []
        if len(last) == 1 and blocks[last[0]] + 1 == blocks[e]:
            both = (rows[last[0]], rows[e])
            even = 2 * max(both) <= PADDING * sum(both)
            if even and PAIRED_ROWS[0] <= max(both) <= PAIRED_ROWS[1]:
                last.append(e)
                continue
        found.append([e])
    return found


@dataclass(frozen=True, kw_only=True)
class Share:
    """Experts whose products are one batched matmul."""

    experts: list[int]
    rows: slice
    """Of the batch: m for every expert, back to back."""


@dataclass(frozen=True, kw_only=True)
class Padded:
    """The visits to all visited experts, share after share."""

    shares: list[Share]
    visit_n: Tensor
    """int64 visits v = t K + slot; padding repeats others."""
    token_n: Tensor
    """int64 tokens t."""
    padding_n1: Tensor | None
    """bool; None if there is none."""
    row_n: Tensor
    """int64 place of every row among the sorted visits."""
    position_U: Tensor
    """int64 row of every visit, in the sorted order."""
    bags_U: Tensor
    """int64 the same in the order of tokens."""
    bag_T: Tensor
    """int64 where each token's part of it begins."""

    def __len__(self) -> int:
        return len(self.token_n)

    def of_tokens(self, rows_TX: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.index_select(rows_TX, 0, self.token_n, out=out)

    def of_visits(self, values_TK: Tensor, dtype: torch.dtype) -> Tensor:
        values_n1 = values_TK.reshape(-1).take(self.visit_n).to(dtype).unsqueeze(1)
        if self.padding_n1 is None:
            return values_n1
        return values_n1.masked_fill_(self.padding_n1, 0)

    def multiply(
        self,
        rows_nX: Tensor,
        matrices: Matrices,
        out_nY: Tensor,
        *,
        add: bool = False,
    ) -> None:
        for experts, rows_VmX, out_VmY in self._by_share(rows_nX, out_nY):
            matrix_VXY = matrices.stack(experts)
            if add:
                torch.baddbmm(out_VmY, rows_VmX, matrix_VXY, out=out_VmY)
            else:
                torch.bmm(rows_VmX, matrix_VXY, out=out_VmY)

    def outer(self, left_nX: Tensor, right_nY: Tensor, out_EXY: Tensor) -> None:
        for experts, left_VmX, right_VmY in self._by_share(left_nX, right_nY):
            first, last = experts[0], experts[-1]
            if last - first < len(experts):
                out_VXY = out_EXY[first : last + 1]
                torch.bmm(left_VmX.transpose(1, 2), right_VmY, out=out_VXY)
            else:
                out_EXY[torch.tensor(experts)] = left_VmX.transpose(1, 2) @ right_VmY

    def add(self, sums: Sums, rows_nX: Tensor) -> None:
        # The only batch: its sums are complete. They are made in float32 or wider.
        total_TX = embedding_bag(self.bags_U, rows_nX, self.bag_T, mode="sum")
        sums.total_TX = total_TX.to(sums.dtype)

    def put(self, into_TK: Tensor, value_n: Tensor) -> None:
        if self.padding_n1 is None:
            into_TK.view(-1)[self.visit_n] = value_n
        else:
            into_TK.view(-1)[self.visit_n[self.position_U]] = value_n[self.position_U]

    def from_sorted(self, rows_UF: Tensor) -> Tensor:
        return rows_UF if self.padding_n1 is None else rows_UF[self.row_n]

    def to_sorted(self, rows_nF: Tensor, into_UF: Tensor) -> None:
        torch.index_select(rows_nF, 0, self.position_U, out=into_UF)

    def _by_share(
        self, left_nX: Tensor, right_nY: Tensor
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Every share's experts with their (V, m, X) and (V, m, Y)."""
        for share in self.shares:
            count = len(share.experts)
            left, right = (
                rows[share.rows].view(count, -1, rows.shape[1])
                for rows in (left_nX, right_nY)
            )
            yield share.experts, left, right


def padded(
    visit_U: Tensor,
    bounds: Sequence[int],
    slots: int,
    tokens: int,
    groups: list[list[int]],
) -> Padded:
    """Pad the visits.

    Args:
        visit_U: (U,) int64 visits v = t K + slot, sorted by expert; at least one.
        bounds: E + 1 exclusive offsets of the experts among them.
        slots: K.
        tokens: T.
        groups: what :func:`shares` made of them.
    """
    most = [
        max(bounds[e + 1] - bounds[e] for e in experts)
        for experts in groups
        for _ in experts
    ]
    visited = [e for experts in groups for e in experts]
    ends = list(accumulate(most))
    stops = iter(ends)
    found, first = [], 0
    for experts in groups:
        stop = [next(stops) for _ in experts][-1]
        found.append(Share(experts=experts, rows=slice(first, stop)))
        first = stop

    row_n = torch.arange(first)
    padding_n1, position_U = None, row_n
    if first > len(visit_U):
        ahead = [end - m - bounds[e] for end, m, e in zip(ends, most, visited)]
        table_3V = torch.tensor([most, ahead, [bounds[e + 1] - 1 for e in visited]])
        ahead_n, last_n = table_3V[1:].repeat_interleave(table_3V[0], dim=1)
        wanted_n = row_n - ahead_n
        padding_n = wanted_n > last_n
        position_U = row_n[~padding_n]
        row_n, padding_n1 = torch.minimum(wanted_n, last_n), padding_n.unsqueeze(1)
    visit_n = visit_U if padding_n1 is None else visit_U[row_n]

    position_N = torch.full((tokens * slots,), -1)
    position_N[visit_U] = position_U
    bag_T = torch.arange(0, len(position_N), slots)
    if len(visit_U) < len(position_N):
        used_N = position_N >= 0
        count_T = used_N.view(-1, slots).sum(1)
        position_N, bag_T = position_N[used_N], count_T.cumsum(0) - count_T
    return Padded(
        shares=found,
        visit_n=visit_n,
        token_n=visit_n.div(slots, rounding_mode="floor"),
        padding_n1=padding_n1,
        row_n=row_n,
        position_U=position_U,
        bags_U=position_N,
        bag_T=bag_T,
    )
