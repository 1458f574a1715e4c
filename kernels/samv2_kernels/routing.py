"""Routing: which experts a token visits, in which order, as ops that never wait for a GPU.

``samv2::walk`` finds the sets and the pre-order, without gradients. ``samv2::reached``
puts the gradient of the sweep on top: its forward is the visited set, its backward the
closed form of ``samv2_kernels.reference.sweep``.

Shapes: T tokens, E experts, K visits a token, M masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from samv2_kernels.gradients import wants_gradient
from samv2_kernels.reference.sweep import sweep_backward
from samv2_kernels.reference.walk import (
    Visits,
    Walk,
    find_visits,
    hard,
    hard_edges,
    preorder,
)
from samv2_kernels.reference.walk import visit as reference_visit
from samv2_kernels.reference.walk import visited_ids

__all__ = ["visit", "visited_ids", "walk"]


@torch.library.custom_op("samv2::walk", mutates_args=(), device_types="cpu")
def _walk(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    chosen_TE: Tensor | None,
    experts_per_token: int,
    fill: bool,
    order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ids, parent slots, depths; visited, swept and chosen sets."""
    found = find_visits(
        scores_TE,
        edge_mask_MEE,
        experts_per_token=experts_per_token,
        mask_index_T=mask_index_T,
        shared_E=shared_E,
        chosen_TE=chosen_TE,
        fill=fill,
    )
    if order:
        edges_MEE = hard_edges(edge_mask_MEE, shared_E)
        slots = preorder(
            found.visited_TE, scores_TE, edges_MEE, mask_index_T, experts_per_token
        )
    else:
        shape, dtype = (len(scores_TE), 0), torch.int64
        slots = tuple(scores_TE.new_empty(shape, dtype=dtype) for _ in range(3))
    # An op's results must not share memory, with its arguments neither.
    return *slots, *(found_TE.clone() for found_TE in found[1:])


@_walk.register_kernel("cuda")
def _(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    chosen_TE: Tensor | None,
    experts_per_token: int,
    fill: bool,
    order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from samv2_kernels.gpu.walk import walk_gpu

    return walk_gpu(
        scores_TE,
        edge_mask_MEE,
        experts_per_token=experts_per_token,
        mask_index_T=mask_index_T,
        shared_E=shared_E,
        chosen_TE=chosen_TE,
        fill=fill,
        order=order,
    )


@_walk.register_fake
def _(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    chosen_TE: Tensor | None,
    experts_per_token: int,
    fill: bool,
    order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape_TK = (scores_TE.shape[0], experts_per_token if order else 0)
    slots = [scores_TE.new_empty(shape_TK, dtype=torch.int64) for _ in range(3)]
    sets = [scores_TE.new_empty(scores_TE.shape, dtype=torch.bool) for _ in range(3)]
    return slots[0], slots[1], slots[2], sets[0], sets[1], sets[2]


@torch.library.custom_op("samv2::reached", mutates_args=())
def _reached(
    chosen_TE: Tensor,
    edge_mask_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    visited_TE: Tensor,
    swept_TE: Tensor,
) -> Tensor:
    """r, in the dtype of q; a completed walk's further visits have no gradient."""
    return visited_TE.to(chosen_TE.dtype)


@_reached.register_fake
def _(
    chosen_TE: Tensor,
    edge_mask_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    visited_TE: Tensor,
    swept_TE: Tensor,
) -> Tensor:
    return torch.empty_like(visited_TE, dtype=chosen_TE.dtype)


@torch.library.custom_op("samv2::reached_backward", mutates_args=())
def _reached_backward(
    grad_TE: Tensor,
    chosen_TE: Tensor,
    edge_mask_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    swept_TE: Tensor,
    of_edges: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of q (T, E) and of the edges (M, E, E), or (0, E, E) if not wanted."""
    return sweep_backward(
        grad_TE,
        chosen_TE,
        edge_mask_MEE,
        mask_index_T,
        shared_E,
        swept_TE,
        of_edges=of_edges,
    )


@_reached_backward.register_fake
def _(
    grad_TE: Tensor,
    chosen_TE: Tensor,
    edge_mask_MEE: Tensor,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    swept_TE: Tensor,
    of_edges: bool,
) -> tuple[Tensor, Tensor]:
    masks, experts, _ = edge_mask_MEE.shape
    shape = (masks if of_edges else 0, experts, experts)
    return torch.empty_like(grad_TE), grad_TE.new_empty(shape)


def _keep_sweep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    chosen_TE, edge_mask_MEE, mask_index_T, shared_E, _, swept_TE = inputs
    ctx.save_for_backward(chosen_TE, edge_mask_MEE, mask_index_T, shared_E, swept_TE)


def _sweep_gradient(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
    of_q, of_edges = ctx.needs_input_grad[:2]
    grad_q_TE, grad_MEE = _reached_backward(grad_TE, *ctx.saved_tensors, of_edges)
    edge_dtype = ctx.saved_tensors[1].dtype
    given = (grad_q_TE if of_q else None, grad_MEE.to(edge_dtype) if of_edges else None)
    return *given, None, None, None, None


_reached.register_autograd(_sweep_gradient, setup_context=_keep_sweep)


def walk(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    *,
    experts_per_token: int,
    mask_index_T: Tensor | None = None,
    shared_E: Tensor | None = None,
    chosen_TE: Tensor | None = None,
    fill: bool = False,
) -> Walk:
    """Walk every token through the expert graph.

    Tensors on a GPU take one Triton kernel and no host sync, others the reference.

    Args:
        scores_TE: (T, E) float32 or float64 scores g, finite.
        edge_mask_MEE: (M, E, E) upper-triangular masks: bool, or float with 0/1 values
            where gradients of the edges are wanted.
        experts_per_token: K, the most experts a token visits, shared ones included.
        mask_index_T: (T,) int64, which of the M masks a token uses; None means mask 0.
        shared_E: (E,) bool, experts that every token visits; None means none.
        chosen_TE: (T, E) straight-through q to use in place of the hard top-K choice
            (same values, with a gradient).
        fill: complete smaller sets best-first: repeatedly the best-scoring unvisited
            entry or child of a visited expert, until K are visited.

    Returns:
        The walk. Every token visits at least one expert: where nothing of its set can
        be entered, its best-scoring entry expert is visited. ``reached_TE`` has the
        gradient of the sweep in q and in the edges, once differentiable.

    Raises:
        ValueError: K is below 1 or exceeds E; and, where the arguments are on a CPU, K
            leaves no room for the shared experts or a mask has no entry at all. A GPU
            would have to be waited for to tell: there the walk has the first K of the
            shared experts, and a token whose mask has no entry visits nothing.
    """
    ids, parents, depths, reached_TE, chosen = _find(
        scores_TE,
        edge_mask_MEE,
        experts_per_token=experts_per_token,
        mask_index_T=mask_index_T,
        shared_E=shared_E,
        chosen_TE=chosen_TE,
        fill=fill,
        order=True,
    )
    return Walk(
        expert_ids_TK=ids,
        parent_slot_TK=parents,
        depth_TK=depths,
        reached_TE=reached_TE,
        chosen_TE=chosen,
    )


def visit(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    *,
    experts_per_token: int,
    mask_index_T: Tensor | None = None,
    shared_E: Tensor | None = None,
    chosen_TE: Tensor | None = None,
    fill: bool = False,
) -> Visits:
    """Find out which experts every token visits, for callers that need no order.

    Arguments, errors and visited sets are those of :func:`walk`.
    """
    if _all_enter(edge_mask_MEE):
        return reference_visit(
            scores_TE,
            edge_mask_MEE,
            experts_per_token=experts_per_token,
            mask_index_T=mask_index_T,
            shared_E=shared_E,
            chosen_TE=chosen_TE,
            fill=fill,
        )
    *_, reached_TE, chosen = _find(
        scores_TE,
        edge_mask_MEE,
        experts_per_token=experts_per_token,
        mask_index_T=mask_index_T,
        shared_E=shared_E,
        chosen_TE=chosen_TE,
        fill=fill,
        order=False,
    )
    return Visits(reached_TE=reached_TE, chosen_TE=chosen)


def _find(
    scores_TE: Tensor,
    edge_mask_MEE: Tensor,
    *,
    experts_per_token: int,
    mask_index_T: Tensor | None,
    shared_E: Tensor | None,
    chosen_TE: Tensor | None,
    fill: bool,
    order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ids, parent slots, depths, r and the chosen set."""
    num_experts = scores_TE.shape[1]
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(
            f"experts_per_token is {experts_per_token}; of {num_experts} experts it "
            f"must lie in 1..{num_experts}"
        )
    given = None if chosen_TE is None else hard(chosen_TE)
    ids, parents, depths, visited_TE, swept_TE, chosen = _walk(
        scores_TE.detach(),
        edge_mask_MEE.detach(),
        mask_index_T,
        shared_E,
        given,
        experts_per_token,
        fill,
        order,
    )
    if wants_gradient(edge_mask_MEE, chosen_TE):
        q_TE = (chosen if chosen_TE is None else chosen_TE).to(scores_TE.dtype)
        reached_TE = _reached(
            q_TE, edge_mask_MEE, mask_index_T, shared_E, visited_TE, swept_TE
        )
    else:
        reached_TE = visited_TE.to(scores_TE.dtype)
    return ids, parents, depths, reached_TE, chosen


def _all_enter(edge_mask_MEE: Tensor) -> bool:
    """Whether r is known to be q, in which plain torch is quicker than ops; asked only
    where the answer is free."""
    if edge_mask_MEE.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if wants_gradient(edge_mask_MEE):
        return False
    return bool(hard(edge_mask_MEE.diagonal(dim1=1, dim2=2)).all())
