"""What a converted layer does with NF4 experts: names, checks, and what autograd keeps.

The format itself is :mod:`samv2_kernels.nf4`.

Shapes: E experts, F rows an expert, D model width, N = ceil(F D / 64) blocks and
H = ceil(F D / 2) bytes an expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from samv2.common.errors import ModelError
from samv2_kernels.nf4 import BLOCK, Nf4Experts, dequantise


def check_packed(name: str, packed: Nf4Experts) -> None:
    """Refuse packed experts that are not what their shape implies.

    Raises:
        ModelError: a part has another shape or dtype, or magnitudes that no block has.
    """
    experts, weights = packed.shape[0], prod(packed.shape[1:])
    wanted = {
        "codes_EH": ((experts, -(-weights // 2)), torch.uint8),
        "absmax_EN": ((experts, -(-weights // BLOCK)), torch.float32),
    }
    for part, (shape, dtype) in wanted.items():
        found = getattr(packed, part)
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise ModelError(
                f"{packed_name(name, part)} has shape {tuple(found.shape)} and dtype "
                f"{found.dtype}; {experts} NF4 experts of {weights} weights need {shape} "
                f"and {dtype}"
            )
    if not bool(((packed.absmax_EN >= 0) & packed.absmax_EN.isfinite()).all()):
        raise ModelError(
            f"{packed_name(name, 'absmax_EN')} has values that are negative or not "
            "finite; no block of weights has such a magnitude"
        )


def packed_name(name: str, part: str) -> str:
    """What a part of a packed tensor is called, e.g. ``gate_codes_EH`` of ``gate_EFD``."""
    return f"{name.removesuffix('_EFD')}_{part}"


def saved_packed(pairs: Iterable[tuple[Tensor, Nf4Experts]]) -> saved_tensors_hooks:
    """While it is active, autograd keeps packed experts instead of what they became.

    A backward pass needs frozen weights as well; without this, all layers' weights would
    be held in full from the forward pass on. They are unpacked again instead.

    Args:
        pairs: what :func:`dequantise` returned, and what it was made of.
    """
    packed_of = {
        weights_EFD.untyped_storage().data_ptr(): packed
        for weights_EFD, packed in pairs
    }

    def keep(tensor: Tensor) -> Tensor | _View:
        packed = packed_of.get(tensor.untyped_storage().data_ptr())
        if packed is None:
            # A saved output with its history would hold its own graph for ever.
            return tensor.detach()
        shape, stride = tuple(tensor.shape), tensor.stride()
        return _View(packed, tensor.dtype, shape, stride, tensor.storage_offset())

    def give(kept: Tensor | _View) -> Tensor:
        return kept.unpacked() if isinstance(kept, _View) else kept

    return saved_tensors_hooks(keep, give)


@dataclass(frozen=True)
class _View:
    """A view of unpacked weights, without the weights."""

    packed: Nf4Experts
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def unpacked(self) -> Tensor:
        """The view again; only the experts that it touches are unpacked."""
        weights = prod(self.packed.shape[1:])
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        first, last = self.offset // weights, (self.offset + reach) // weights
        some = dequantise(self.packed.experts(first, last + 1), self.dtype)
        return some.as_strided(self.shape, self.stride, self.offset - first * weights)
