"""The frozen weights of a call as kernels take them: floats, or NF4 of either kind.

Shapes: B stored blocks, F rows, D model width, W = D / 4 words a row, A = D / 64
quantisation blocks a row, T tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samv2_kernels.gpu.tiles import HIDDEN_SHARE
from samv2_kernels.nf4 import BLOCK
from samv2_kernels.nf4_layout import PLANES, bytes_to_words, check_width

FLOATS, NF4, NESTED = 3, 6, 13


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the three matrices; what its kind lacks points anywhere."""

    weights: Tensor
    """(B, F, D) floats or (B, F, W) int16 words."""
    absmax: Tensor
    """(B, F, A) float32 or uint8."""
    second: Tensor
    """(B, ceil(F A / 256)) float32."""
    offset: Tensor
    """(B,) float32."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Gate, up and transposed down projection."""

    kind: str
    """``float``, ``float32``, ``nf4`` or ``nested``."""
    parts: tuple[Part, Part, Part]
    table: Tensor
    """(256,) float32 of nested magnitudes."""

    @property
    def nf4(self) -> bool:
        """Whether weights are 4 bits."""
        return self.kind in ("nf4", "nested")

    @property
    def nested(self) -> bool:
        """Whether magnitudes are 8 bits."""
        return self.kind == "nested"

    @property
    def seconds(self) -> int:
        """Second-level magnitudes of one block."""
        return self.parts[0].second.shape[-1] if self.nested else 0

    @property
    def hidden_share(self) -> float:
        """What hidden units are multiplied by when they are stored."""
        return HIDDEN_SHARE.value if self.nf4 else 1.0

    def hidden_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which hidden units are stored, for inputs of a dtype."""
        return torch.float16 if self.nf4 else dtype

    def row_power(self, grad_y_TD: Tensor, grad_low_TR: Tensor) -> Tensor:
        """(T, 1) float32 power of two at the size of each row's largest gradient."""
        if not self.nf4:
            return grad_y_TD.new_ones((len(grad_y_TD), 1), dtype=torch.float32)
        largest_T1 = grad_y_TD.abs().amax(dim=1, keepdim=True).float()
        if grad_low_TR.shape[1]:
            low_T1 = grad_low_TR.abs().amax(dim=1, keepdim=True).float()
            largest_T1 = torch.maximum(largest_T1, low_T1)
        usable_T1 = largest_T1.isfinite() & (largest_T1 > 0)
        exponent_T1 = torch.where(usable_T1, torch.frexp(largest_T1).exponent, 0)
        return torch.ldexp(torch.ones_like(largest_T1), exponent_T1.clamp(-120, 120))


def blocks_of(weights: Sequence[Tensor], x_TD: Tensor, ffn_width: int) -> Blocks:
    """Tell what kind of weights an op was given.

    Args:
        weights: 3 float tensors; or 3 of codes and 3 of magnitudes; or 3 of codes, 3 of
            8-bit magnitudes, 3 of second-level magnitudes, 3 offsets and one table.
            Codes are int16 words, or bytes, which are reordered in every call.
        x_TD: the inputs.
        ffn_width: F.

    Raises:
        ValueError: inputs that kernels do not multiply with these weights, or rows that
            are no whole quantisation blocks, or wrong sizes or numbers of tensors.
    """
    dtype, size = x_TD.dtype, ffn_width * x_TD.shape[1]
    if len(weights) == FLOATS:
        dtypes = {each.dtype for each in weights}
        if dtypes != {dtype} or dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"the inputs are {dtype} and the weights {sorted(map(str, dtypes))}; "
                "kernels multiply float32 with float32 or bfloat16 with bfloat16"
            )
        parts = [
            Part(weights=aligned(each), absmax=each, second=each, offset=each)
            for each in weights
        ]
        kind = "float32" if dtype == torch.float32 else "float"
        return Blocks(kind=kind, parts=tuple(parts), table=weights[0])
    if len(weights) not in (NF4, NESTED):
        raise ValueError(
            f"got {len(weights)} weight tensors; float weights are {FLOATS}, NF4 "
            f"weights {NF4}, with nested magnitudes {NESTED}"
        )
    if dtype != torch.bfloat16:
        raise ValueError(
            f"the inputs are {dtype}; NF4 kernels multiply bfloat16. Cast the inputs, or "
            "use float weights"
        )
    check_width(x_TD.shape[1])
    parts = [_nf4_part(weights, number, size) for number in range(3)]
    nested = len(weights) == NESTED
    return Blocks(
        kind="nested" if nested else "nf4",
        parts=tuple(parts),
        table=weights[12] if nested else parts[0].absmax,
    )


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that 16-byte loads can read; copied where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _nf4_part(weights: Sequence[Tensor], number: int, size: int) -> Part:
    codes, absmax = weights[number], weights[3 + number]
    if codes.dtype == torch.uint8:
        codes = bytes_to_words(codes)
    if codes[0].numel() * PLANES != size or absmax[0].numel() * BLOCK != size:
        raise ValueError(
            f"a block has {codes[0].numel() * PLANES} codes and {absmax[0].numel()} "
            f"magnitudes; F x D = {size} weights need {size} and {size // BLOCK}"
        )
    nested = len(weights) == NESTED
    return Part(
        weights=aligned(codes),
        absmax=absmax.contiguous(),
        second=weights[6 + number].contiguous() if nested else absmax,
        offset=weights[9 + number].contiguous() if nested else absmax,
    )
