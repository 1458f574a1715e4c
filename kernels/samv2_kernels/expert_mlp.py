"""Grouped SwiGLU experts as an op with a backward of its own.

For the visit of token t in slot s to expert e, whose stored block is b:

    g = W_g[b] x_t + B_g[e] (s A_g x_t)        u likewise,  h = silu(g) u
    y_t += c_ts W_d[b] h - r_ts V_e (U x_t)    l_t += c_ts A_d[e] h

c are the combine weights and r the walk's reached set. The caller makes what is
common to a token's visits (s A_g x, U x, s B_d l) with plain matmuls and their autograd;
see :mod:`samv2_kernels.grouped`. Blocks, factors and V_e are frozen.

Shapes: T tokens, D model width, E experts, B stored blocks, F rows an expert, K slots,
N = T K visits, R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samv2_kernels import cpu

Gradients = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]
"""Of x, combine, low_gate, low_up, gate, up, down, low_TQ and reached."""
GRADIENTS_OF = (0, 1, 7, 8, 9, 10, 11, 12, 14)
"""Where those stand among the op's arguments."""
ARGUMENTS = 16


@torch.library.custom_op("samv2::expert_mlp", mutates_args=(), device_types="cpu")
def expert_mlp(
    x_TD: Tensor,
    combine_TK: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    ffn_width: int,
    base_E: Tensor | None,
    low_gate_TR: Tensor | None,
    low_up_TR: Tensor | None,
    gate_EFR: Tensor | None,
    up_EFR: Tensor | None,
    down_ERF: Tensor | None,
    low_TQ: Tensor | None,
    out_EQD: Tensor | None,
    reached_TK: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run sorted visits and add them up by token.

    Args:
        x_TD: (T, D) inputs.
        combine_TK: (T, K) weight of every visit; ignored where a slot is unused.
        order_N: (N,) int32 sorted visits; see :func:`samv2_kernels.sort_visits`.
        offsets: (E K + 1,) int32, their groups.
        weights: gate, up and transposed down projection, (B, F, D) in x's dtype; or the
            codes of the three in NF4, then the largest magnitudes of the three.
        ffn_width: F.
        base_E: (E,) int64 block of each expert; None: expert e has block e.
        low_gate_TR: (T, R) s A_g x in x's dtype; None, as the next four, if no adapters.
        low_up_TR: (T, R) s A_u x.
        gate_EFR: (E, F, R) B_g in x's dtype.
        up_EFR: (E, F, R) B_u.
        down_ERF: (E, R, F) A_d.
        low_TQ: (T, Q) U x in x's dtype; None, as the next two, if no surrogates.
        out_EQD: (E, Q, D) V_e, transposed.
        reached_TK: (T, K) r of every visit.
        save: keep g and u, which the backward pass needs.

    Returns:
        (T, D) y and (T, R) l, or (T, 0), in float32 or wider; and (N, F) g and u in
        sorted order and x's dtype, or (0, F).
    """
    return cpu.expert_mlp_forward(
        x_TD,
        combine_TK,
        order_N,
        offsets,
        weights,
        ffn_width,
        base_E,
        low_gate_TR,
        low_up_TR,
        gate_EFR,
        up_EFR,
        down_ERF,
        low_TQ,
        out_EQD,
        reached_TK,
        save,
    )


@torch.library.custom_op(
    "samv2::expert_mlp_backward", mutates_args=(), device_types="cpu"
)
def expert_mlp_backward(
    grad_y_TD: Tensor,
    grad_low_down_TR: Tensor,
    x_TD: Tensor,
    combine_TK: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    ffn_width: int,
    base_E: Tensor | None,
    low_gate_TR: Tensor | None,
    low_up_TR: Tensor | None,
    gate_EFR: Tensor | None,
    up_EFR: Tensor | None,
    down_ERF: Tensor | None,
    low_TQ: Tensor | None,
    out_EQD: Tensor | None,
    reached_TK: Tensor | None,
    gate_NF: Tensor,
    up_NF: Tensor,
) -> Gradients:
    """Gradients of :func:`expert_mlp`.

    Args:
        grad_y_TD: of y.
        grad_low_down_TR: of l.
        gate_NF: (N, F) the g that the forward pass saved.
        up_NF: (N, F) u.

    The others are the forward pass's arguments.

    Returns:
        The gradients of x_TD, combine_TK, low_gate_TR, low_up_TR, gate_EFR, up_EFR,
        down_ERF, low_TQ and reached_TK; an empty tensor for each that is None. Those of
        unused slots are 0.
    """
    return cpu.expert_mlp_backward(
        grad_y_TD,
        grad_low_down_TR,
        x_TD,
        combine_TK,
        order_N,
        offsets,
        weights,
        ffn_width,
        base_E,
        low_gate_TR,
        low_up_TR,
        gate_EFR,
        up_EFR,
        down_ERF,
        low_TQ,
        out_EQD,
        reached_TK,
        gate_NF,
        up_NF,
    )


@expert_mlp.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from samv2_kernels.gpu.experts import expert_mlp_forward

    return expert_mlp_forward(*arguments)


@expert_mlp_backward.register_kernel("cuda")
def _(*arguments: Any) -> Gradients:
    from samv2_kernels.gpu.experts import expert_mlp_backward

    return expert_mlp_backward(*arguments)


@expert_mlp.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_TD, order_N, ffn_width = arguments[0], arguments[2], arguments[5]
    down_ERF, save = arguments[11], arguments[15]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    rank = 0 if down_ERF is None else down_ERF.shape[1]
    rows = order_N.shape[0] if save else 0
    return (
        torch.empty_like(x_TD, dtype=wide, memory_format=torch.contiguous_format),
        x_TD.new_empty((x_TD.shape[0], rank), dtype=wide),
        x_TD.new_empty((rows, ffn_width)),
        x_TD.new_empty((rows, ffn_width)),
    )


@expert_mlp_backward.register_fake
def _(*arguments: Any) -> Gradients:
    forward = arguments[2:]
    like = (forward[index] for index in GRADIENTS_OF)
    contiguous = torch.contiguous_format
    return tuple(
        (
            forward[0].new_empty(0)
            if each is None
            else torch.empty_like(each, memory_format=contiguous)
        )
        for each in like
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    weights, ctx.ffn_width = inputs[4], inputs[5]
    kept = (*inputs[:4], *inputs[6:15])
    ctx.save_for_backward(*kept, *output[2:], *weights)


def _backward(
    ctx: Any, grad_y_TD: Tensor | None, grad_low_TR: Tensor | None, *_: Any
) -> tuple[Tensor | list[None] | None, ...]:
    saved = ctx.saved_tensors
    x_TD, down_ERF = saved[0], saved[9]
    found: list[Any] = [None] * ARGUMENTS
    found[4] = [None] * len(saved[15:])
    if grad_y_TD is None and grad_low_TR is None:
        return tuple(found)
    if len(saved[13]) != len(saved[2]):
        raise ValueError("expert_mlp ran with save=False; its backward needs save=True")
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    rank = 0 if down_ERF is None else down_ERF.shape[1]
    if grad_y_TD is None:
        grad_y_TD = torch.zeros_like(x_TD, dtype=wide)
    if grad_low_TR is None:
        grad_low_TR = x_TD.new_zeros((x_TD.shape[0], rank), dtype=wide)
    gradients = expert_mlp_backward(
        grad_y_TD,
        grad_low_TR,
        *saved[:4],
        list(saved[15:]),
        ctx.ffn_width,
        *saved[4:13],
        *saved[13:15],
    )
    for index, gradient in zip(GRADIENTS_OF, gradients):
        found[index] = gradient if ctx.needs_input_grad[index] else None
    return tuple(found)


expert_mlp.register_autograd(_backward, setup_context=_setup)
