"""The gate's scores and its choice of experts, with the gradients that they pass on.

    g = G x + c,    q = top-K(g) in value,    d q / d g = sigmoid'(g - threshold)

Written as autograd functions, as plain autograd makes twice the passes over x.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GateScores(torch.autograd.Function):
    """(T, E) float32 scores of (T, D) inputs of any dtype, (E, D) and (E,) float32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return torch.addmm(bias_E, x_TD.to(weight_ED.dtype), weight_ED.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx_TD = dweight_ED = dbias_E = None
        if of_x:
            # In x's dtype, as its gradient is.
            dx_TD = grad_TE.to(x_TD.dtype) @ weight_ED.to(x_TD.dtype)
        if of_weight:
            dweight_ED = grad_TE.T @ x_TD.to(weight_ED.dtype)
        if of_bias:
            dbias_E = grad_TE.sum(0)
        return dx_TD, dweight_ED, dbias_E


class Choice(torch.autograd.Function):
    """(T, E) float q of (T, E) scores, (T, E) bool choice and (T, 1) threshold."""

    @staticmethod
    def forward(
        ctx: Any, scores_TE: Tensor, chosen_TE: Tensor, threshold_T1: Tensor
    ) -> Tensor:
        ctx.save_for_backward(scores_TE, threshold_T1)
        return chosen_TE.to(scores_TE.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None, None]:
        scores_TE, threshold_T1 = ctx.saved_tensors
        soft_TE = torch.sub(scores_TE, threshold_T1).sigmoid_()
        return torch.ops.aten.sigmoid_backward(grad_TE, soft_TE), None, None
