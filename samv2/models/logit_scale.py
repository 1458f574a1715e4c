"""How sure a repaired model may be: one factor on its logits for each K.

A repair is a ridge regression, so it shrinks what it cannot predict; the norms behind it
undo that, and the converted model is surer of its next token than it should be. What is
left is one number for each K, found by temperature scaling (Guo et al. 2017, On
Calibration of Modern Neural Networks), here against the dense model's distributions
instead of labels, on text that no repair was fitted to:

    min_s  mean_n  CE(softmax(z_n), softmax(s h_n W'))

It is convex in s; its derivatives are the mean gap and the mean variance of the logits
h_n W', so Newton's method finds it in a few passes. The hidden states behind the final
norm are multiplied by s, which is the same as multiplying the logits.

Shapes: B sequences, S positions, N rows, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 256
RESERVED_EVERY = 16
"""Of the calibration sequences, one in so many is kept from the repairs."""
LOWEST, HIGHEST = 0.2, 2.0
PASSES, CLOSE = 12, 1e-4


def reserved_rows(total: int) -> Tensor:
    """(B,) bool: which of `total` calibration sequences no repair may see.

    Evenly spaced, max(1, B // 16) of them; with fewer than two sequences, none.
    """
    reserved_B = torch.zeros(total, dtype=torch.bool)
    if total > 1:
        count = max(1, total // RESERVED_EVERY)
        middle = (torch.arange(count) * 2 + 1) * total // (2 * count)
        reserved_B[middle] = True
    return reserved_B


def split_calibration(calibration_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Calibration text for the repairs, and what is reserved to judge them by.

    Args:
        calibration_BS: (B, S), in any order of domains.

    Returns:
        (B - B', S) and (B', S), by `reserved_rows`.
    """
    reserved_B = reserved_rows(len(calibration_BS))
    return calibration_BS[~reserved_B], calibration_BS[reserved_B]


def scaled(values: Tensor, scale: float) -> Tensor:
    """Hidden states or logits at a factor; untouched, to the bit, at 1."""
    return values if scale == 1 else values * scale


@torch.no_grad()
def fit_logit_scale(
    hidden_BSD: Tensor, dense_BSD: Tensor, head_VD: Tensor, *, start: float = 1.0
) -> float:
    """The factor on the converted model's logits that comes closest to the dense model.

    Args:
        hidden_BSD: (B, S, D) the converted model's last hidden states, behind its norm.
        dense_BSD: (B, S, D) the dense model's, same tokens.
        head_VD: (V, D) the head of both.
        start: where the search begins.

    Returns:
        s in 0.2..2; 1 where there are no rows, or they are not finite.
    """
    rows_ND, wanted_ND = hidden_BSD.flatten(0, -2), dense_BSD.flatten(0, -2)
    finite = bool(rows_ND.isfinite().all()) and bool(wanted_ND.isfinite().all())
    if not len(rows_ND) or not finite:
        return 1.0
    scale, lowest, highest = start, LOWEST, HIGHEST
    for _ in range(PASSES):
        slope, curvature = _derivatives(rows_ND, wanted_ND, head_VD, scale)
        # Convex: the slope's sign says on which side the minimum lies.
        lowest, highest = (scale, highest) if slope < 0 else (lowest, scale)
        step = scale - slope / curvature if curvature > 0 else scale
        if not lowest < step < highest:
            step = (lowest + highest) / 2
        if abs(step - scale) < CLOSE:
            return step
        scale = step
    return scale


def _derivatives(
    rows_ND: Tensor, wanted_ND: Tensor, head_VD: Tensor, scale: float
) -> tuple[float, float]:
    """First and second derivative of the mean cross-entropy in s."""
    slope, curvature = 0.0, 0.0
    parts = zip(rows_ND.split(ROWS_AT_ONCE), wanted_ND.split(ROWS_AT_ONCE))
    for rows, wanted in parts:
        logits_NV = (rows @ head_VD.T).float()
        target_NV = torch.softmax((wanted @ head_VD.T).float(), dim=1)
        share_NV = torch.softmax(scale * logits_NV, dim=1)
        mean_N1 = (share_NV * logits_NV).sum(dim=1, keepdim=True)
        slope += float((mean_N1.squeeze(1) - (target_NV * logits_NV).sum(dim=1)).sum())
        logits_NV -= mean_N1
        curvature += float((share_NV * logits_NV.square_()).sum())
    return slope / len(rows_ND), curvature / len(rows_ND)
