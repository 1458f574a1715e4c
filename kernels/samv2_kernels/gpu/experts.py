"""The expert op on a GPU: forward and backward out of Triton kernels.

Nothing is read back from the device and grids depend on shapes alone, so a call can be
captured in a CUDA graph. Rows stay where they are: kernels read them through the visit
order, and add their results to the tokens, slot after slot.

Shapes: T tokens, D model width, E experts, B stored blocks, F rows an expert, K slots,
N = T K visits, R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samv2_kernels.gpu import launch
from samv2_kernels.gpu.blocks import blocks_of
from samv2_kernels.gpu.device import on_its_device
from samv2_kernels.gpu.launch import Call


@on_its_device
def expert_mlp_forward(
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
    """See :func:`samv2_kernels.expert_mlp.expert_mlp`.

    Raises:
        ValueError: dtypes that no kernel multiplies, or NF4 with a model width that is
            not a multiple of 64.
    """
    x_TD, combine_TK = x_TD.contiguous(), combine_TK.float().contiguous()
    blocks = blocks_of(weights, x_TD, ffn_width)
    call = Call(x_TD, combine_TK, order_N, offsets, blocks, base_E, ffn_width)
    rank = 0 if down_ERF is None else down_ERF.shape[1]
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    low_down_TR = x_TD.new_zeros((call.tokens, rank), dtype=torch.float32)
    rows = order_N.shape[0]
    hidden_NF = x_TD.new_empty((rows, ffn_width), dtype=blocks.hidden_dtype(x_TD.dtype))
    kept = (rows if save else 0, ffn_width)
    gate_NF, up_NF = x_TD.new_empty(kept), x_TD.new_empty(kept)
    if not rows:
        return y_TD, low_down_TR, gate_NF, up_NF
    lows = (low_gate_TR, low_up_TR, gate_EFR, up_EFR)
    launch.gate_up(call, lows, hidden_NF, gate_NF, up_NF, save)
    # Hidden units are stored at a quarter beside NF4.
    scale_TK = combine_TK / blocks.hidden_share
    surrogate = (low_TQ, out_EQD, reached_TK)
    launch.to_tokens(call, "to_tokens", (hidden_NF,), scale_TK, surrogate, y_TD)
    if down_ERF is not None:
        launch.project(call, hidden_NF, down_ERF, (1, ffn_width), scale_TK, low_down_TR)
    return y_TD, low_down_TR, gate_NF, up_NF


@on_its_device
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`samv2_kernels.expert_mlp.expert_mlp_backward`.

    Beside NF4, rows of the output's gradient are divided by a power of two first and
    what comes of them is multiplied by it in the end, which is exact: float16 suffices
    for gradients of any size.
    """
    x_TD, combine32_TK = x_TD.contiguous(), combine_TK.float().contiguous()
    grad_y_TD, grad_low_TR = grad_y_TD.contiguous(), grad_low_down_TR.contiguous()
    dtype, tokens = x_TD.dtype, x_TD.shape[0]
    blocks = blocks_of(weights, x_TD, ffn_width)
    call = Call(x_TD, combine32_TK, order_N, offsets, blocks, base_E, ffn_width)
    # Custom ops may not return one tensor twice, so each absent one is its own.
    absent = [x_TD.new_empty(0) for _ in range(7)]
    dx_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    dcombine_TK = torch.zeros_like(combine32_TK)
    adapters = (low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF)
    stand_in = (low_TQ, out_EQD, reached_TK)
    if tokens * combine_TK.shape[1]:
        power_T1 = blocks.row_power(grad_y_TD, grad_low_TR)
        dy_TD = (grad_y_TD / power_T1).to(dtype)
        q_TR = (grad_low_TR / power_T1).to(dtype)
        dgate_NF, dup_NF, part_N = launch.hidden_grad(
            call, dy_TD, q_TR, down_ERF, gate_NF, up_NF
        )
        dcombine_N = torch.zeros_like(part_N).scatter_(0, order_N.long(), part_N)
        dcombine_TK = dcombine_N.view_as(dcombine_TK) * power_T1
        hidden_grads = (dgate_NF, dup_NF)
        launch.to_tokens(
            call, "input_grad", hidden_grads, combine32_TK, (None,) * 3, dx_TD
        )
        dx_TD *= power_T1
        if down_ERF is not None:
            absent[:5] = _adapter_grads(
                call,
                hidden_grads,
                (gate_NF, up_NF),
                adapters,
                grad_low_TR,
                power_T1,
            )
        if low_TQ is not None:
            absent[5:] = _stand_in_grads(call, grad_y_TD.to(dtype), stand_in)
    else:
        given = (*adapters, low_TQ, reached_TK)
        absent = [
            x_TD.new_empty(0) if each is None else each.new_zeros(each.shape)
            for each in given
        ]
    return (dx_TD.to(dtype), dcombine_TK.to(combine_TK.dtype), *absent)


def _adapter_grads(
    call: Call,
    hidden_grads: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    adapters: tuple[Tensor | None, ...],
    grad_low_TR: Tensor,
    power_T1: Tensor,
) -> list[Tensor]:
    """Of the low-rank inputs and of the adapters' rows."""
    low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF = adapters
    dtype, found = call.x_TD.dtype, []
    for rows_NF, bank_EFR in zip(hidden_grads, (gate_EFR, up_EFR)):
        rank = bank_EFR.shape[2]
        out_TR = call.x_TD.new_zeros((call.tokens, rank), dtype=torch.float32)
        launch.project(call, rows_NF, bank_EFR, (rank, 1), call.combine_TK, out_TR)
        found.append((out_TR * power_T1).to(dtype))
    lows = [(low * power_T1).to(dtype) for low in (low_gate_TR, low_up_TR)]
    lows.append(grad_low_TR.to(dtype))
    banks = [bank.new_empty(bank.shape) for bank in (gate_EFR, up_EFR, down_ERF)]
    launch.adapter_grad(call, hidden_grads, saved, lows, banks)
    return [*found, *banks]


def _stand_in_grads(
    call: Call, dy_TD: Tensor, stand_in: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """Of the surrogates' low-rank input and of the walk's r."""
    low_TQ, out_EQD, reached_TK = stand_in
    dlow_TQ = call.x_TD.new_zeros(low_TQ.shape, dtype=torch.float32)
    dreached_TK = call.x_TD.new_zeros(reached_TK.shape, dtype=torch.float32)
    launch.project(
        call,
        dy_TD,
        out_EQD,
        (1, call.D),
        reached_TK.float().contiguous(),
        dlow_TQ,
        low_TQ.contiguous(),
        dreached_TK,
    )
    return [dlow_TQ.to(low_TQ.dtype), dreached_TK.to(reached_TK.dtype)]
