"""The sorted visits, cut into batches of whole experts that fit the cache.

Experts with few rows share a batch, so that gathering, scattering and what is done unit
by unit is one call for many of them; matmuls are made expert by expert.

Shapes: T tokens, E experts, K slots, N = T K visits, n rows of a batch, X columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BATCH_BYTES = 2**20
"""Of a batch's inputs; an expert that has more is a batch by itself."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The visits to one expert."""

    expert: int
    block: int
    """Of the stored base blocks."""
    rows: slice
    """Of its batch."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The visits to some experts."""

    groups: tuple[Group, ...]
    rows: slice
    """Among the sorted visits."""
    visit_n: Tensor
    """int64 visits v = t K + slot."""
    token_n: Tensor
    """int64 tokens t."""

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def by_expert(self, *rows_nX: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each group with its part of every argument."""
        sizes = [group.rows.stop - group.rows.start for group in self.groups]
        return zip(self.groups, *(rows.split(sizes) for rows in rows_nX))

    def of_visits(self, values_TK: Tensor) -> Tensor:
        """(n, 1): what every visit has a number of."""
        return values_TK.reshape(-1, 1)[self.visit_n]

    def of_tokens(self, rows_TX: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, X): the rows of the visits' tokens; into the first rows of ``out``."""
        if out is not None:
            out = out[: len(self)]
        return torch.index_select(rows_TX, 0, self.token_n, out=out)

    def add(self, into_TX: Tensor, rows_nX: Tensor, out: Tensor | None = None) -> None:
        """Add the visits' rows to their tokens', in the dtype of the sum.

        ``out`` is a buffer of that dtype with at least as many rows.
        """
        if out is None:
            wide_nX = rows_nX.to(into_TX.dtype)
        else:
            wide_nX = out[: len(self)].copy_(rows_nX)
        into_TX.index_add_(0, self.token_n, wide_nX)


def batches(
    order_N: Tensor,
    offsets: Tensor,
    base_E: Tensor | None,
    slots: int,
    row_bytes: int,
) -> list[Batch]:
    """Cut the visits, by rising expert; experts without visits are left out.

    Args:
        order_N: (N,) int32 sorted visits of a ``VisitOrder``.
        offsets: (E K + 1,) int32, its offsets.
        base_E: (E,) int64, the block of each expert; None: its own index.
        slots: K, at least 1.
        row_bytes: of an input.
    """
    visit_N = order_N.long()
    token_N = visit_N.div(slots, rounding_mode="floor")
    bounds = offsets[::slots].tolist()
    blocks = range(len(bounds) - 1) if base_E is None else base_E.tolist()
    most = max(1, BATCH_BYTES // row_bytes)
    found: list[Batch] = []
    spans: list[tuple[int, int, int]] = []
    for e, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if spans and stop - spans[0][1] > most:
            found.append(_batch(spans, blocks, visit_N, token_N))
            spans = []
        if start < stop:
            spans.append((e, start, stop))
    if spans:
        found.append(_batch(spans, blocks, visit_N, token_N))
    return found


def _batch(
    spans: list[tuple[int, int, int]],
    blocks: range | list[int],
    visit_N: Tensor,
    token_N: Tensor,
) -> Batch:
    """One batch of (expert, first row, stop row)."""
    rows = slice(spans[0][1], spans[-1][2])
    return Batch(
        groups=tuple(
            Group(
                expert=e,
                block=blocks[e],
                rows=slice(start - rows.start, stop - rows.start),
            )
            for e, start, stop in spans
        ),
        rows=rows,
        visit_n=visit_N[rows],
        token_n=token_N[rows],
    )
