"""Poisoned allocations with margins, to prove what a kernel writes and where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor

MARGIN = 256


@contextmanager
def guarded(poison: int) -> Iterator[list[Tensor]]:
    """Fill what ``Tensor.new_empty`` gives with ``poison``, and watch what is around it.

    What ``Tensor.new_zeros`` gives is watched too.

    An element that a kernel does not write keeps the poison: two runs with different
    poisons that agree have written everything. Floats are filled with NaN instead, which
    shows in one run.

    Yields:
        The buffers so far; each holds an allocation between two margins.
    """
    buffers: list[Tensor] = []
    new_empty = Tensor.new_empty

    def within(like: Tensor, shape: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        sizes = torch.Size(shape[0] if not isinstance(shape[0], int) else shape)
        buffer = new_empty(like, prod(sizes) + 2 * MARGIN, **options)
        buffer.fill_(torch.nan if buffer.is_floating_point() else poison)
        buffers.append(buffer)
        return buffer[MARGIN : buffer.numel() - MARGIN].view(sizes)

    def poisoned(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        return within(like, shape, options)

    def zeroed(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        return within(like, shape, options).zero_()

    with (
        mock.patch.object(Tensor, "new_empty", poisoned),
        mock.patch.object(Tensor, "new_zeros", zeroed),
    ):
        yield buffers
    for buffer in buffers:
        margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
        untouched = margins.isnan() if buffer.is_floating_point() else margins == poison
        assert bool(untouched.all()), "written outside of an allocation"
