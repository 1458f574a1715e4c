"""The masked dense FFN on a CPU, with a backward of its own.

All experts are computed, side by side as the M = E F hidden units of one FFN, and those
of unvisited experts are multiplied by 0. It costs what the FFN costs, if the passes over
hidden units stay in the cache and work in place: a batch of small layers is cut into
rows, and v = m u, with the visited set m, is
kept in place of u. With dh = dy W_d^T + dl A_d:

    h = c silu(g) v    d u = c dh silu(g)    d g = c dh v silu'(g)
    d c = <silu(g) v, dh>    d x = d g W_g + d u W_u

as d c is that of visited experts alone, and c is 0 for the others.

Shapes: T tokens, D model width, E experts, F rows an expert, M = E F, R adapter rank, n
rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from samv2_kernels.gradients import wants_gradient

SMALL_WEIGHTS = 2**20
"""M D of layers whose weights stay in the cache, so that few rows may pass at a time."""
ROWS = 512
"""That do; a matmul of fewer is slower."""
LEAST_ROWS = 512
"""From which on this beats plain autograd, whose cost a pass is smaller."""


def masking_pays(x_TD: Tensor) -> bool:
    """Whether there is enough to do for :func:`masked_experts`."""
    return len(x_TD) >= LEAST_ROWS


def masked_experts(
    x_TD: Tensor,
    combine_TE: Tensor,
    visited_TE: Tensor,
    weights: Sequence[Tensor],
    rank: Sequence[Tensor | None],
    *,
    unit: bool,
) -> tuple[Tensor, Tensor]:
    """Run all experts and combine the visited ones.

    Args:
        x_TD: (T, D) inputs.
        combine_TE: (T, E) weights c; ignored where an expert is not visited.
        visited_TE: (T, E) bool.
        weights: gate, up and transposed down projection, (E, F, D) in x's dtype.
        rank: s A_g x, s A_u x, B_g, B_u and A_d of the adapters, or five times None.
        unit: c is 1 where an expert is visited.

    Returns:
        (T, D) y in x's dtype; and (T, R) l, or (T, 0).
    """
    given = (x_TD, combine_TE, *rank)
    save = wants_gradient(*given)
    return _Masked.apply(*given, visited_TE, unit, save, *weights)


class _Masked(torch.autograd.Function):
    """Arguments that may want a gradient come first, the blocks last."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        combine_TE: Tensor,
        low_gate_TR: Tensor | None,
        low_up_TR: Tensor | None,
        gate_EFR: Tensor | None,
        up_EFR: Tensor | None,
        down_ERF: Tensor | None,
        visited_TE: Tensor,
        unit: bool,
        save: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gate_MD, up_MD, down_MD = (part.flatten(0, 1) for part in weights)
        mask_TE = visited_TE.to(x_TD.dtype)
        combine = None if unit else combine_TE.to(x_TD.dtype)
        rank = 0 if down_ERF is None else down_ERF.shape[1]
        y_TD = torch.empty_like(x_TD)
        low_down_TR = x_TD.new_empty(len(x_TD), rank)
        kept: list[Tensor] = []
        for rows in _rows(x_TD, gate_MD):
            x_nD = x_TD[rows]
            gate_nM = torch.mm(x_nD, gate_MD.T, out=_hidden(x_nD, gate_MD))
            up_nM = torch.mm(x_nD, up_MD.T, out=_hidden(x_nD, up_MD))
            if rank:
                gate_nM.addmm_(low_gate_TR[rows], gate_EFR.flatten(0, 1).T)
                up_nM.addmm_(low_up_TR[rows], up_EFR.flatten(0, 1).T)
            _scale(up_nM, mask_TE[rows])
            active_nM = silu(gate_nM)
            hidden_nM = torch.mul(active_nM, up_nM)
            if combine is not None:
                _scale(hidden_nM, combine[rows])
            torch.mm(hidden_nM, down_MD, out=y_TD[rows])
            if rank:
                torch.mm(hidden_nM, _by_rank(down_ERF), out=low_down_TR[rows])
            kept += [gate_nM, up_nM, active_nM]
        if save:
            terms = (low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF)
            own = (mask_TE, combine, *terms)
            ctx.save_for_backward(*own, *weights, *kept)
            ctx.dtype = combine_TE.dtype
        return y_TD, low_down_TR

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y_TD: Tensor, grad_low_TR: Tensor
    ) -> tuple[Tensor | None, ...]:
        mask_TE, combine_TE, *saved = ctx.saved_tensors
        low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF = saved[:5]
        gate_MD, up_MD, down_MD = (part.flatten(0, 1) for part in saved[5:8])
        kept = iter(saved[8:])
        learns = down_ERF is not None
        dx_TD = torch.empty_like(grad_y_TD)
        dcombine_TE = torch.empty(mask_TE.shape, dtype=ctx.dtype)
        dgate_MR = dup_MR = ddown_MR = dlow_gate_TR = dlow_up_TR = None
        if learns:
            dgate_MR, dup_MR, ddown_MR = (
                part.new_zeros(len(gate_MD), part.shape[1])
                for part in (low_gate_TR, low_up_TR, grad_low_TR)
            )
            dlow_gate_TR = torch.empty_like(low_gate_TR)
            dlow_up_TR = torch.empty_like(low_up_TR)
        for rows in _rows(grad_y_TD, gate_MD):
            gate_nM, up_nM, active_nM = next(kept), next(kept), next(kept)
            mask_nE, dy_nD = mask_TE[rows], grad_y_TD[rows]
            weight_nE = mask_nE if combine_TE is None else combine_TE[rows] * mask_nE
            dh_nM = torch.mm(dy_nD, down_MD.T, out=_hidden(dy_nD, down_MD))
            if learns:
                dh_nM.addmm_(grad_low_TR[rows], _by_rank(down_ERF).T)
            product_nM = torch.empty_like(dh_nM)
            if learns:
                hidden_nM = torch.mul(active_nM, up_nM, out=product_nM)
                _scale(hidden_nM, weight_nE)
                ddown_MR.addmm_(hidden_nM.T, grad_low_TR[rows])
            dup_nM = torch.mul(active_nM, dh_nM)
            torch.mul(dup_nM, up_nM, out=product_nM)
            product_nEF = product_nM.unflatten(1, (mask_nE.shape[1], -1))
            dcombine_TE[rows] = product_nEF.sum(2, dtype=ctx.dtype)
            _scale(dup_nM, weight_nE)
            dh_nM.mul_(up_nM)
            if combine_TE is not None:
                _scale(dh_nM, weight_nE)
            dgate_nM = torch.ops.aten.silu_backward(dh_nM, gate_nM)
            dx_nD = torch.mm(dgate_nM, gate_MD, out=dx_TD[rows])
            torch.addmm(dx_nD, dup_nM, up_MD, out=dx_nD)
            if learns:
                dgate_MR.addmm_(dgate_nM.T, low_gate_TR[rows])
                dup_MR.addmm_(dup_nM.T, low_up_TR[rows])
                torch.mm(dgate_nM, gate_EFR.flatten(0, 1), out=dlow_gate_TR[rows])
                torch.mm(dup_nM, up_EFR.flatten(0, 1), out=dlow_up_TR[rows])
        found = [dx_TD, dcombine_TE, dlow_gate_TR, dlow_up_TR, *(None,) * 3]
        if learns:
            found[4], found[5] = dgate_MR.view_as(gate_EFR), dup_MR.view_as(up_EFR)
            found[6] = ddown_MR.view_as(gate_EFR).transpose(1, 2)
        wanted = zip(ctx.needs_input_grad, found)
        return *(part if needed else None for needed, part in wanted), *((None,) * 6)


def _rows(x_TD: Tensor, gate_MD: Tensor) -> Iterator[slice]:
    """Rows that pass at a time."""
    step = ROWS if gate_MD.numel() <= SMALL_WEIGHTS else max(1, len(x_TD))
    return (slice(i, min(i + step, len(x_TD))) for i in range(0, len(x_TD), step))


def _hidden(x_nD: Tensor, part_MD: Tensor) -> Tensor:
    """(n, M), uninitialised."""
    return x_nD.new_empty((len(x_nD), len(part_MD)))


def _scale(hidden_nM: Tensor, by_nE: Tensor) -> Tensor:
    """Multiply the experts' units, in place."""
    hidden_nM.unflatten(1, (by_nE.shape[1], -1)).mul_(by_nE.unsqueeze(2))
    return hidden_nM


def _by_rank(down_ERF: Tensor) -> Tensor:
    """(M, R)."""
    return down_ERF.transpose(1, 2).flatten(0, 1)
