"""Dispatch: the visits of a batch, sorted by expert, and the tiles that cover them.

Shapes: T tokens, E experts, K slots, N = T K visits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samv2_kernels.reference.dispatch import sort_visits as reference_sort
from samv2_kernels.reference.dispatch import tile_table as reference_tiles


@dataclass(frozen=True, kw_only=True)
class VisitOrder:
    """Visits sorted by (expert, slot, token)."""

    order_N: Tensor
    """(N,) int32 visits v = t K + slot; unused visits last, by v."""
    offsets: Tensor
    """(E K + 1,) int32, exclusive: expert e in slot s owns
    ``order_N[offsets[e K + s] : offsets[e K + s + 1]]``, and expert e in all slots
    ``order_N[offsets[e K] : offsets[(e + 1) K]]``; the last entry counts used visits."""


@torch.library.custom_op("samv2::sort_visits", mutates_args=(), device_types="cpu")
def _sort_visits(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return reference_sort(expert_ids_TK, num_experts)


@_sort_visits.register_kernel("cuda")
def _(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    from samv2_kernels.gpu.sort import sort_visits_gpu

    return sort_visits_gpu(expert_ids_TK, num_experts)


@_sort_visits.register_fake
def _(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    tokens, slots = expert_ids_TK.shape
    order_N = expert_ids_TK.new_empty(tokens * slots, dtype=torch.int32)
    return order_N, order_N.new_empty(num_experts * slots + 1)


def sort_visits(expert_ids_TK: Tensor, num_experts: int) -> VisitOrder:
    """Sort the visits of a batch by expert, then slot, then token.

    A token makes at most one visit a slot, and a parent has an earlier slot than its
    child, so the visits of one slot may read and write token rows without conflict.
    No host sync, and no atomics: the same order on every run.

    Args:
        expert_ids_TK: (T, K) integer experts in 0..E - 1, or -1 for an unused visit.
        num_experts: E.

    Returns:
        The order and the groups' offsets.

    Raises:
        ValueError: ``expert_ids_TK`` is not a matrix of integers, or ``num_experts`` is
            below 1; or, on a CPU, an id is no expert. A GPU would have to be waited for
            to tell: there such ids give an undefined order.
    """
    if expert_ids_TK.dim() != 2:
        raise ValueError(
            f"expert_ids_TK has shape {tuple(expert_ids_TK.shape)}; it must be (T, K)"
        )
    if expert_ids_TK.is_floating_point() or expert_ids_TK.dtype == torch.bool:
        raise ValueError(
            f"expert_ids_TK is {expert_ids_TK.dtype}; it must hold integers: experts, or "
            "-1 for an unused visit"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}, it must be at least 1")
    _check_ids(expert_ids_TK, num_experts)
    order_N, offsets = _sort_visits(expert_ids_TK, num_experts)
    return VisitOrder(order_N=order_N, offsets=offsets)


def _check_ids(expert_ids_TK: Tensor, num_experts: int) -> None:
    """Where asking is free, refuse ids that are no experts."""
    is_cpu = expert_ids_TK.device.type == "cpu"
    if not is_cpu or torch.compiler.is_compiling() or not expert_ids_TK.numel():
        return
    least, most = (int(value) for value in expert_ids_TK.aminmax())
    if least < -1 or most >= num_experts:
        raise ValueError(
            f"expert_ids_TK has ids {least}..{most}; with {num_experts} experts they must "
            f"lie in -1..{num_experts - 1}, -1 for an unused visit"
        )


def tile_table(
    offsets: Tensor,
    *,
    num_experts: int,
    slots: int,
    tokens: int,
    rows_per_tile: int,
    by_slot: bool,
) -> Tensor:
    """Cut the sorted visits into tiles that cross no expert.

    Its size depends on T, K and E alone, so that a grid over it is fixed.

    Args:
        offsets: (E K + 1,) int32 of a :class:`VisitOrder`.
        num_experts: E.
        slots: K.
        tokens: T.
        rows_per_tile: most visits of a tile.
        by_slot: make one table a slot, whose tiles do not cross slots either.

    Returns:
        (S, L, 3) int32 entries (expert, first row, stop row) into the sorted order, by
        rising expert; S = K by slot, else 1; L = ceil(rows / rows_per_tile) + E with
        rows = T by slot, else T K. Entries that are not needed have expert -1.

    Raises:
        ValueError: ``rows_per_tile`` is below 1, or ``offsets`` has not E K + 1 entries.
    """
    if rows_per_tile < 1:
        raise ValueError(f"rows_per_tile is {rows_per_tile}, it must be at least 1")
    if offsets.shape != (num_experts * slots + 1,):
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)}; {num_experts} experts and {slots} "
            f"slots need ({num_experts * slots + 1},)"
        )
    if offsets.is_cuda:
        from samv2_kernels.gpu.sort import tile_table_gpu as how
    else:
        how = reference_tiles
    return how(
        offsets,
        num_experts=num_experts,
        slots=slots,
        tokens=tokens,
        rows_per_tile=rows_per_tile,
        by_slot=by_slot,
    )
