"""The sorted visits, cut into batches of whole experts that fit the cache.

Experts with few rows share a batch, so that gathering, scattering and what is done unit
by unit is one call for many of them; matmuls are made expert by expert. Where that is the
slower way, :mod:`samv2_kernels.cpu.padded` makes one batch of all experts.

Shapes: T tokens, D model width, E experts, V some of them, F rows an expert, K slots, U visits, n rows of
a batch, X, Y columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

BATCH_VALUES = 2**19
"""Of a batch's inputs; an expert that has more is a batch by itself."""
BAGGED_ROWS = 2
"""Up to which a product is a sum of the matrix's rows, and rows are added one by one."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The visits to one expert."""

    expert: int
    block: int
    """Of the stored base blocks."""
    rows: slice
    """Of its batch."""


class Matrices(Protocol):
    """One (X, Y) matrix an expert."""

    def of(self, group: Group) -> Tensor:
        """That of one expert, valid until the next call."""

    def stack(self, experts: list[int]) -> Tensor:
        """(V, X, Y): those of some experts; for padded batches alone."""


def take(stack_EXY: Tensor, which: Sequence[int]) -> Tensor:
    """(V, X, Y) some matrices of a stack, copied where they are not neighbours."""
    first, last = which[0], which[-1]
    if list(which) == list(range(first, last + 1)):
        return stack_EXY[first : last + 1]
    return stack_EXY[torch.tensor(which)]


class Sums:
    """Rows of visits added up by token, in float32 or wider until they are complete.

    Args:
        tokens: T.
        width: X.
        dtype: of the complete sums.
    """

    def __init__(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.shape = (tokens, width)
        self.dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.total_TX: Tensor | None = None
        self._wide_nX: Tensor | None = None

    def running(self) -> Tensor:
        """(T, X), to be added to in place."""
        if self.total_TX is None:
            self.total_TX = torch.zeros(self.shape, dtype=self.wide)
        return self.total_TX

    def widened(self, rows_nX: Tensor) -> Tensor:
        """(n, X) the same rows in the dtype of the running sum, until the next call."""
        if rows_nX.dtype == self.wide:
            return rows_nX
        if self._wide_nX is None or len(self._wide_nX) < len(rows_nX):
            self._wide_nX = torch.empty_like(rows_nX, dtype=self.wide)
        return self._wide_nX[: len(rows_nX)].copy_(rows_nX)

    def complete(self) -> Tensor:
        """(T, X)."""
        return self.running().to(self.dtype)


class Batch(Protocol):
    """Rows, one a visit, of some experts; and what is done with such rows."""

    token_n: Tensor
    """int64 tokens t."""

    def __len__(self) -> int: ...

    def of_tokens(self, rows_TX: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, X): the rows of the visits' tokens; into the first rows of ``out``."""

    def of_visits(self, values_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, 1): what every visit has a number of, in the rows' dtype; 0 for padding."""

    def multiply(
        self,
        rows_nX: Tensor,
        matrices: Matrices,
        out_nY: Tensor,
        *,
        add: bool = False,
    ) -> None:
        """Write, or add, the rows' products with their experts' matrices."""

    def outer(self, left_nX: Tensor, right_nY: Tensor, out_EXY: Tensor) -> None:
        """Write the experts' sums over rows of left times right."""

    def add(self, sums: Sums, rows_nX: Tensor) -> None:
        """Add the visits' rows to their tokens'."""

    def put(self, into_TK: Tensor, value_n: Tensor) -> None:
        """Write a number a visit."""

    def from_sorted(self, rows_UF: Tensor) -> Tensor:
        """(n, F): this batch's part of rows in the sorted order."""

    def to_sorted(self, rows_nF: Tensor, into_UF: Tensor) -> None:
        """Put this batch's rows in the sorted order."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The visits to some experts, back to back."""

    groups: tuple[Group, ...]
    rows: slice
    """Among the sorted visits."""
    visit_n: Tensor
    """int64 visits v = t K + slot."""
    token_n: Tensor

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def by_expert(self, *rows_nX: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each group with its part of every argument."""
        sizes = [group.rows.stop - group.rows.start for group in self.groups]
        return zip(self.groups, *(rows.split(sizes) for rows in rows_nX))

    def of_tokens(self, rows_TX: Tensor, out: Tensor | None = None) -> Tensor:
        if out is not None:
            out = out[: len(self)]
        return torch.index_select(rows_TX, 0, self.token_n, out=out)

    def of_visits(self, values_TK: Tensor, dtype: torch.dtype) -> Tensor:
        return values_TK.reshape(-1, 1)[self.visit_n].to(dtype)

    def multiply(
        self,
        rows_nX: Tensor,
        matrices: Matrices,
        out_nY: Tensor,
        *,
        add: bool = False,
    ) -> None:
        for group, rows, out in self.by_expert(rows_nX, out_nY):
            matrix_XY = matrices.of(group)
            if add:
                torch.addmm(out, rows, matrix_XY, out=out)
            elif len(rows) <= BAGGED_ROWS and matrix_XY.is_contiguous():
                out.copy_(_bagged(rows, matrix_XY))
            else:
                torch.mm(rows, matrix_XY, out=out)

    def outer(self, left_nX: Tensor, right_nY: Tensor, out_EXY: Tensor) -> None:
        for group, left, right in self.by_expert(left_nX, right_nY):
            torch.mm(left.T, right, out=out_EXY[group.expert])

    def add(self, sums: Sums, rows_nX: Tensor) -> None:
        if len(rows_nX) <= BAGGED_ROWS:
            for token, row_X in zip(self.token_n.tolist(), rows_nX):
                sums.running()[token] += row_X
            return
        sums.running().index_add_(0, self.token_n, sums.widened(rows_nX))

    def put(self, into_TK: Tensor, value_n: Tensor) -> None:
        into_TK.view(-1)[self.visit_n] = value_n

    def from_sorted(self, rows_UF: Tensor) -> Tensor:
        return rows_UF[self.rows]

    def to_sorted(self, rows_nF: Tensor, into_UF: Tensor) -> None:
        into_UF[self.rows] = rows_nF


def _bagged(rows_nX: Tensor, matrix_XY: Tensor) -> Tensor:
    """Their product: a weighted sum of the matrix's rows, each of them read as it lies,
    where a matmul would rearrange them first."""
    count, width = rows_nX.shape
    return embedding_bag(
        torch.arange(width).repeat(count),
        matrix_XY,
        torch.arange(0, count * width, width),
        mode="sum",
        per_sample_weights=rows_nX.reshape(-1),
    )


def runs(
    visit_U: Tensor,
    bounds: Sequence[int],
    blocks: Sequence[int],
    slots: int,
    width: int,
) -> list[Run]:
    """Cut the visits, by rising expert; experts without visits are left out.

    Args:
        visit_U: (U,) int64 visits v = t K + slot, sorted by expert.
        bounds: E + 1 exclusive offsets of the experts among them.
        blocks: the block of each expert.
        slots: K, at least 1.
        width: D.
    """
    token_U = visit_U.div(slots, rounding_mode="floor")
    most = max(1, BATCH_VALUES // width)
    found: list[Run] = []
    spans: list[tuple[int, int, int]] = []
    for e, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if spans and stop - spans[0][1] > most:
            found.append(_run(spans, blocks, visit_U, token_U))
            spans = []
        if start < stop:
            spans.append((e, start, stop))
    if spans:
        found.append(_run(spans, blocks, visit_U, token_U))
    return found


def _run(
    spans: list[tuple[int, int, int]],
    blocks: Sequence[int],
    visit_U: Tensor,
    token_U: Tensor,
) -> Run:
    """The visits of (expert, first row, stop row)s."""
    rows = slice(spans[0][1], spans[-1][2])
    return Run(
        groups=tuple(
            Group(
                expert=e,
                block=blocks[e],
                rows=slice(start - rows.start, stop - rows.start),
            )
            for e, start, stop in spans
        ),
        rows=rows,
        visit_n=visit_U[rows],
        token_n=token_U[rows],
    )
