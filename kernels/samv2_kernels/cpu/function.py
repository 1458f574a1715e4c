"""Grouped experts on a CPU without the dispatcher's part in it.

In eager mode an op that is written in Python costs its callers a third of a millisecond a
forward and backward pass, which is what some thousand rows of a small expert cost. Where
nothing looks on, an autograd function calls the same passes, on visits that are sorted by
expert as they are found; and what the forward pass made for itself is there in the
backward pass.

Shapes: T tokens, D model width, E experts, F rows an expert, U visits, R adapter rank, Q
surrogate rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from samv2_kernels.cpu.batches import Batch
from samv2_kernels.cpu.blocks import Blocks, blocks_of
from samv2_kernels.cpu.passes import Task, backward, forward, visited_batches
from samv2_kernels.cpu.terms import rank_of, stand_ins_of
from samv2_kernels.gradients import wants_gradient


def is_plain_eager(x_TD: Tensor) -> bool:
    """Whether ops may be left out: eager mode on a CPU, no tracing, no transforms."""
    return (
        type(x_TD) in (Tensor, torch.nn.Parameter)
        and x_TD.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def direct_experts(
    x_TD: Tensor,
    combine_TE: Tensor,
    visited_TE: Tensor,
    weights: Sequence[Tensor],
    ffn_width: int,
    base_E: Tensor | None,
    rank: Sequence[Tensor | None],
    stand_ins: Sequence[Tensor | None],
    *,
    unit: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``samv2::expert_mlp`` on visits in no order.

    Args:
        x_TD: (T, D) inputs.
        combine_TE: (T, E) weight of every visit.
        visited_TE: (T, E) bool.
        rank: the op's arguments from ``low_gate_TR`` on.
        stand_ins: the op's last three, of which r is (T, E).
        unit: c is 1 where an expert is visited.

    Returns:
        (T, D) y, in x's dtype, or in float32 or wider if adapters have something to add;
        and (T, R) l, or (T, 0).
    """
    low_TQ, out_EQD, reached_TE = stand_ins
    given = (x_TD, combine_TE, *rank, low_TQ, reached_TE)
    save = wants_gradient(*given)
    return _Experts.apply(
        *given, out_EQD, visited_TE, ffn_width, base_E, unit, save, *weights
    )


class _Experts(torch.autograd.Function):
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
        low_TQ: Tensor | None,
        reached_TE: Tensor | None,
        out_EQD: Tensor | None,
        visited_TE: Tensor,
        ffn_width: int,
        base_E: Tensor | None,
        unit: bool,
        save: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        terms = (low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF)
        terms = (*terms, low_TQ, out_EQD, reached_TE)
        blocks = blocks_of(weights, x_TD, ffn_width, base_E)
        work = visited_batches(visited_TE, blocks, base_E)
        task = _task(combine_TE, unit, blocks, work, terms)
        # What adapters add comes before sums are rounded.
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        dtype = x_TD.dtype if down_ERF is None else wide
        y_TD, low_down_TR, kept = forward(task, x_TD, dtype, save=save)
        if save:
            parts = (part for each in kept for part in each)
            ctx.save_for_backward(combine_TE, base_E, *terms, *weights, *parts)
            ctx.work, ctx.unit = work, unit
            ctx.ffn_width, ctx.dtype = ffn_width, x_TD.dtype
        return y_TD, low_down_TR

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y_TD: Tensor, grad_low_TR: Tensor
    ) -> tuple[Tensor | None, ...]:
        combine_TE, base_E, *saved = ctx.saved_tensors
        terms, saved = saved[:8], saved[8:]
        count = len(saved) - 3 * len(ctx.work)
        weights, parts = saved[:count], saved[count:]
        grad_y_TD = grad_y_TD.to(ctx.dtype)
        blocks = blocks_of(weights, grad_y_TD, ctx.ffn_width, base_E)
        dx_TD, dcombine_TE, drank, dstand_ins = backward(
            _task(combine_TE, ctx.unit, blocks, ctx.work, terms),
            list(zip(parts[::3], parts[1::3], parts[2::3])),
            grad_y_TD,
            grad_low_TR.to(ctx.dtype),
        )
        found = (
            dx_TD,
            dcombine_TE,
            *((None,) * 5 if drank is None else drank.complete()),
            *((None,) * 2 if dstand_ins is None else dstand_ins.complete()),
        )
        wanted = zip(ctx.needs_input_grad, found)
        others = (None,) * (6 + count)
        return *(part if needed else None for needed, part in wanted), *others


def _task(
    combine_TE: Tensor,
    unit: bool,
    blocks: Blocks,
    work: list[Batch],
    terms: Sequence[Tensor | None],
) -> Task:
    return Task(
        combine_TK=combine_TE,
        unit=unit,
        blocks=blocks,
        work=work,
        rank=rank_of(*terms[:5]),
        stand_ins=stand_ins_of(*terms[5:]),
    )
