"""The gradient of the reachability sweep in closed form, where q and A are 0/1.

Of r_j = q_j (1 - c_j) with c_j = (1 - A_jj) prod_{i<j} (1 - r_i A_ij): let n_j be the
number of reached parents of j, and G_j the gradient that arrives at r_j from above. Then

    G_i   = g_i + sum_{j>i} G_j q_j (1 - A_jj) A_ij ([n_j = 0] + [n_j = 1] r_i)
    dq_j  = G_j (1 - c_j)
    dA_jj = G_j q_j [n_j = 0]
    dA_ij = G_j q_j (1 - A_jj) r_i [n_j = A_ij]                        for i < j

Only chosen experts that may not be entered pass gradient on, so the sum has few terms,
and the edges' gradients are one matmul a mask.

Shapes: T tokens, E experts, M masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the backward sweep needs to know of the forward one."""

    swept_TE: Tensor
    """r, 0/1 in the gradient's dtype."""
    chosen_TE: Tensor
    """bool; q."""
    closed_TE: Tensor
    """bool; chosen, but may not be entered."""
    orphan_TE: Tensor
    """bool; n = 0."""
    single_TE: Tensor
    """bool; n = 1."""


def sweep_backward(
    grad_TE: Tensor,
    chosen_TE: Tensor,
    edge_mask_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    swept_TE: Tensor,
    *,
    of_edges: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`samv2_kernels.reference.reach`, without a host sync on a GPU.

    Args:
        grad_TE: (T, E) gradient of r.
        chosen_TE: (T, E) q, bool or float with 0/1 values.
        edge_mask_MEE: (M, E, E) A, bool or float with 0/1 values.
        mask_index_T: (T,) int64, which mask a token uses; None means mask 0.
        shared_E: (E,) bool, experts whose q and A_jj are 1 whatever the arguments say.
        swept_TE: (T, E) bool r.
        of_edges: whether the edges' gradient is wanted.

    Returns:
        (T, E) and (M, E, E) gradients in the dtype of ``grad_TE``, the latter (0, E, E)
        if not wanted.
    """
    hard_MEE = edge_mask_MEE > 0.5
    chosen_TE = chosen_TE > 0.5
    if shared_E is not None:
        hard_MEE = hard_MEE | torch.diag(shared_E)
        chosen_TE = chosen_TE | shared_E
    entry_ME = hard_MEE.diagonal(dim1=1, dim2=2)
    none_EE = grad_TE.new_empty((0, *hard_MEE.shape[1:]))
    # Asking is free on a CPU: where all may be entered, r is q.
    if not of_edges and grad_TE.device.type == "cpu" and bool(entry_ME.all()):
        return _unshared(grad_TE, shared_E), none_EE

    entry_TE = entry_ME[:1] if mask_index_T is None else entry_ME[mask_index_T]
    edges_MEE = hard_MEE.triu(1).to(grad_TE.dtype)
    sweep = _sweep(swept_TE, chosen_TE, entry_TE, edges_MEE, mask_index_T)
    total_TE = _arriving(grad_TE, sweep, edges_MEE, mask_index_T)
    grad_q_TE = _unshared(total_TE * (entry_TE | ~sweep.orphan_TE), shared_E)
    if not of_edges:
        return grad_q_TE, none_EE
    return grad_q_TE, _edge_gradient(total_TE, sweep, hard_MEE, mask_index_T, shared_E)


def _sweep(
    swept_TE: Tensor,
    chosen_TE: Tensor,
    entry_TE: Tensor,
    edges_MEE: Tensor,
    mask_index_T: Tensor | None,
) -> Sweep:
    swept_TE = swept_TE.to(edges_MEE.dtype)
    if mask_index_T is None:
        parents_TE = swept_TE @ edges_MEE[0]
    else:
        tokens_T = torch.arange(len(swept_TE), device=swept_TE.device)
        parents_TE = (swept_TE @ edges_MEE)[mask_index_T, tokens_T]
    return Sweep(
        swept_TE=swept_TE,
        chosen_TE=chosen_TE,
        closed_TE=chosen_TE & ~entry_TE,
        orphan_TE=parents_TE == 0,
        single_TE=parents_TE == 1,
    )


def _arriving(
    grad_TE: Tensor, sweep: Sweep, edges_MEE: Tensor, mask_index_T: Tensor | None
) -> Tensor:
    """G, by falling expert."""
    total_TE = grad_TE
    for j in _columns(sweep.closed_TE):
        column_ME = edges_MEE[:, :, j]
        column_TE = column_ME[:1] if mask_index_T is None else column_ME[mask_index_T]
        own = slice(j, j + 1)
        passed_TE = sweep.orphan_TE[:, own] + sweep.single_TE[:, own] * sweep.swept_TE
        given_T1 = total_TE[:, own] * sweep.closed_TE[:, own]
        total_TE = total_TE + given_T1 * passed_TE * column_TE
    return total_TE


def _columns(closed_TE: Tensor) -> Sequence[int]:
    """Falling experts that may pass gradient on; on a CPU, those that do."""
    if closed_TE.device.type == "cpu":
        return closed_TE.any(dim=0).nonzero().flatten().tolist()[::-1]
    return range(closed_TE.shape[1] - 1, 0, -1)


def _edge_gradient(
    total_TE: Tensor,
    sweep: Sweep,
    hard_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
) -> Tensor:
    member_MT = total_TE.new_ones((len(hard_MEE), len(total_TE)))
    if mask_index_T is not None:
        masks_M1 = torch.arange(len(hard_MEE), device=total_TE.device).unsqueeze(1)
        member_MT = (mask_index_T == masks_M1).to(total_TE.dtype)
    elif len(hard_MEE) > 1:
        member_MT[1:] = 0
    from_MET = (member_MT.unsqueeze(2) * sweep.swept_TE).transpose(1, 2)
    passed_TE = total_TE * sweep.closed_TE
    of_off_MEE = from_MET @ (passed_TE * sweep.orphan_TE)
    of_on_MEE = from_MET @ (passed_TE * sweep.single_TE)
    entered_TE = total_TE * (sweep.chosen_TE & sweep.orphan_TE)
    of_entry_ME = member_MT @ _unshared(entered_TE, shared_E)
    return torch.where(hard_MEE, of_on_MEE, of_off_MEE).triu(1) + torch.diag_embed(
        of_entry_ME
    )


def _unshared(grad_TE: Tensor, shared_E: Tensor | None) -> Tensor:
    """A new tensor without what shared experts got: they are visited regardless."""
    if shared_E is None:
        return grad_TE.clone()
    return grad_TE.masked_fill(shared_E, 0.0)
