"""All visits as one batch of padded shares: experts that have the same number of rows.

A matmul of a narrow expert is over before two threads have shared it, and one of a few
dozen rows reads a wide expert's weights more than it multiplies; a batched matmul over
several experts gives every thread an expert of its own. Narrow experts with even loads
are one share, wide ones with a few dozen rows go in pairs, others alone. The price is
padding, rows of the first token with weight 0.

Shapes: T tokens, D model width, E experts, V those of a share, F rows an expert, K slots,
U visits, m rows of every expert of a share, n rows in all, X, Y columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    rows = _counts(bounds)
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
    """int64 visits v = t K + slot; 0 for padding."""
    token_n: Tensor
    """int64 tokens t."""
    padding_n1: Tensor | None
    """bool; None if there is none."""
    visit_U: Tensor
    """int64 visits, rising."""
    row_U: Tensor
    """int64 their rows."""
    bag_T: Tensor
    """int64 where each token's visits begin among them."""

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
        total_TX = embedding_bag(self.row_U, rows_nX, self.bag_T, mode="sum")
        sums.total_TX = total_TX.to(sums.dtype)

    def put(self, into_TK: Tensor, value_n: Tensor) -> None:
        into_TK.view(-1)[self.visit_U] = value_n[self.row_U]

    def from_sorted(self, rows_UF: Tensor) -> Tensor:
        rows_nF = rows_UF.new_zeros(len(self), rows_UF.shape[1])
        rows_nF[self._sorted_row_U] = rows_UF
        return rows_nF

    def to_sorted(self, rows_nF: Tensor, into_UF: Tensor) -> None:
        torch.index_select(rows_nF, 0, self._sorted_row_U, out=into_UF)

    @property
    def _sorted_row_U(self) -> Tensor:
        """(U,) the rows that are not padding, which is the order by expert."""
        return self.row_U.sort()[0]

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


def pad_sorted(
    visit_U: Tensor,
    bounds: Sequence[int],
    shape_TK: Sequence[int],
    groups: list[list[int]],
) -> Padded:
    """Pad visits that are sorted by expert.

    Args:
        visit_U: (U,) int64 visits v = t K + slot; at least one.
        bounds: E + 1 exclusive offsets of the experts among them.
        shape_TK: (T, K).
        groups: what :func:`shares` made of them.
    """
    found, first = _laid_out(groups, bounds)
    begin_E, count_E = torch.tensor([first, _counts(bounds)])
    # From a place in the order to a row.
    ahead_E = begin_E - torch.tensor(bounds[:-1])
    row_U = ahead_E.repeat_interleave(count_E).add_(torch.arange(len(visit_U)))
    row_N = torch.full((shape_TK[0] * shape_TK[1],), -1)
    row_N[visit_U] = row_U
    row_TK = row_N.view(*shape_TK)
    return _padded(row_TK, row_TK >= 0, found)


def pad_visited(
    visited_TE: Tensor, bounds: Sequence[int], groups: list[list[int]]
) -> Padded:
    """Pad visits v = t E + e, in the order of tokens within an expert.

    Args:
        visited_TE: (T, E) bool; at least one is.
        bounds: E + 1 exclusive offsets of the experts among the visits by expert.
        groups: what :func:`shares` made of them.
    """
    found, first = _laid_out(groups, bounds)
    row_TE = visited_TE.cumsum(0).add_(torch.tensor(first) - 1)
    return _padded(row_TE, visited_TE, found)


def _padded(row_TK: Tensor, used_TK: Tensor, laid_out: list[Share]) -> Padded:
    """From the row of every used visit."""
    visit_U = used_TK.reshape(-1).nonzero().squeeze(1)
    row_U = row_TK.reshape(-1).take(visit_U)
    rows = laid_out[-1].rows.stop
    visit_n = torch.zeros(rows, dtype=torch.int64).index_copy_(0, row_U, visit_U)
    padding_n1 = None
    if rows > len(row_U):
        padding_n1 = torch.ones(rows, 1, dtype=torch.bool).index_fill_(0, row_U, False)
    count_T = used_TK.sum(1)
    return Padded(
        shares=laid_out,
        visit_n=visit_n,
        token_n=visit_n.div(used_TK.shape[1], rounding_mode="floor"),
        padding_n1=padding_n1,
        visit_U=visit_U,
        row_U=row_U,
        bag_T=count_T.cumsum(0).sub_(count_T),
    )


def _laid_out(
    groups: list[list[int]], bounds: Sequence[int]
) -> tuple[list[Share], list[int]]:
    """The shares back to back, and the first row of each expert."""
    counts = _counts(bounds)
    found, first, start = [], [0] * len(counts), 0
    for experts in groups:
        most = max(counts[e] for e in experts)
        for i, e in enumerate(experts):
            first[e] = start + i * most
        stop = start + len(experts) * most
        found.append(Share(experts=experts, rows=slice(start, stop)))
        start = stop
    return found, first


def _counts(bounds: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in zip(bounds, bounds[1:])]
