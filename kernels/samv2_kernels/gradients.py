"""Whether a result will be differentiated."""

from __future__ import annotations

import torch
from torch import Tensor


def wants_gradient(*parts: Tensor | None) -> bool:
    """Whether gradients are on and one of the parts that are there wants one."""
    return torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in parts
    )
