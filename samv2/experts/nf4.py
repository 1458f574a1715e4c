"""NF4, the 4-bit format of bitsandbytes, applied to each expert by itself.

The F D weights of an expert, row after row, are cut into blocks of 64; the last one may
be shorter. A block is its largest magnitude (float32) and a code for each weight, which
names the nearest of 16 levels of that magnitude; two codes share a byte, the first one
in its high half (QLoRA, arXiv 2305.14314). Blocks end where their expert ends: a row of
both tensors is what bitsandbytes makes of that expert alone, and some experts are some
rows.

Shapes: E experts, F rows an expert, D model width, N = ceil(F D / 64) blocks and
H = ceil(F D / 2) bytes an expert.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad

from samv2.common.errors import ModelError

BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Nf4Experts:
    """The packed weights of E experts."""

    codes_EH: Tensor
    """(E, H) uint8, two codes a byte."""
    absmax_EN: Tensor
    """(E, N) float32, the largest magnitude of every block."""
    shape: tuple[int, int, int]
    """(E, F, D) of what is packed."""

    def experts(self, first: int, stop: int) -> Nf4Experts:
        """Experts ``first`` to ``stop - 1``, sharing memory."""
        return Nf4Experts(
            codes_EH=self.codes_EH[first:stop],
            absmax_EN=self.absmax_EN[first:stop],
            shape=(stop - first, *self.shape[1:]),
        )


@torch.no_grad()
def quantise(weights_EFD: Tensor) -> Nf4Experts:
    """Pack experts, each by itself.

    Args:
        weights_EFD: (E, F, D) float32, float16 or bfloat16.
    """
    flat_EP = _padded(weights_EFD.flatten(1), BLOCK)
    codes, state = _functional().quantize_4bit(
        flat_EP.contiguous(), blocksize=BLOCK, quant_type="nf4"
    )
    num_experts, weights = len(weights_EFD), prod(weights_EFD.shape[1:])
    codes_EP = codes.view(num_experts, -1)
    return Nf4Experts(
        codes_EH=codes_EP[:, : -(-weights // 2)].contiguous(),
        absmax_EN=state.absmax.view(num_experts, -1),
        shape=tuple(weights_EFD.shape),
    )


@torch.no_grad()
def dequantise(packed: Nf4Experts, dtype: torch.dtype) -> Tensor:
    """The weights that packed experts stand for, (E, F, D), contiguous.

    Args:
        packed: of any number of experts.
        dtype: float32, float16 or bfloat16; products are rounded to it once.
    """
    functional = _functional()
    codes_EP = _padded(packed.codes_EH, BLOCK // 2)
    state = functional.QuantState(
        absmax=packed.absmax_EN.float().flatten(),
        shape=torch.Size((len(codes_EP), 2 * codes_EP.shape[1])),
        dtype=dtype,
        blocksize=BLOCK,
        quant_type="nf4",
    )
    # As one column: bitsandbytes transposes what it is given as one row.
    flat_EP = functional.dequantize_4bit(codes_EP.reshape(-1, 1), state)
    return flat_EP[:, : prod(packed.shape[1:])].reshape(packed.shape).contiguous()


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


def _padded(rows_EX: Tensor, multiple: int) -> Tensor:
    """Zeros behind every row, up to the next multiple of a length."""
    missing = -rows_EX.shape[1] % multiple
    return pad(rows_EX, (0, missing)) if missing else rows_EX


def _functional() -> ModuleType:
    """bitsandbytes' functions; imported here, as that takes seconds that few need."""
    # It warns of an optional package whose fused product is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional
