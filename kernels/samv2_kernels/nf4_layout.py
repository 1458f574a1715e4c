"""NF4 in the order that the Triton kernels read, and back; no bit is lost.

bitsandbytes puts neighbouring weights into one byte. Kernels want one 16-bit word to
hold four weights that lie 16 apart, so that decoded words are four tiles of neighbouring
weights (:mod:`samv2_kernels.gpu.decode`): in a block of 64 weights, code j of word g
(bits 4j..4j+3) is weight 16 j + g.

Shapes: B stored experts, F rows, D model width (a multiple of 64), W = D / 4 words a
row, A = D / 64 blocks a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samv2_kernels.nf4 import BLOCK, Nf4Experts
from samv2_kernels.nf4_nested import NestedAbsmax, nest, unnest

PLANES = 4


@dataclass(frozen=True, kw_only=True)
class Nf4Words:
    """Packed experts as kernels read them."""

    words_BFW: Tensor
    """(B, F, D / 4) int16."""
    absmax_BFA: Tensor
    """(B, F, D / 64) float32, or uint8 codes where ``nested`` is given."""
    nested: NestedAbsmax | None = None
    """What the codes of magnitudes stand for."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, F, D) of what is packed."""
        blocks, rows, words = self.words_BFW.shape
        return blocks, rows, PLANES * words


def check_width(model_width: int) -> None:
    """Refuse rows that are not whole quantisation blocks.

    Raises:
        ValueError: the width is not a multiple of 64, so that a block would run from one
            row into the next.
    """
    if model_width % BLOCK:
        raise ValueError(
            f"the model width is {model_width}; NF4 kernels need a multiple of {BLOCK}. "
            "Keep these weights as bfloat16"
        )


def bytes_to_words(codes_EH: Tensor) -> Tensor:
    """(E, H) bytes of bitsandbytes, whole blocks, to (E, H / 2) int16 words."""
    codes = torch.stack((codes_EH >> 4, codes_EH & 15), dim=2).view(
        len(codes_EH), -1, PLANES, BLOCK // PLANES
    )
    c0, c1, c2, c3 = codes.int().unbind(2)
    words = c0 | c1 << 4 | c2 << 8 | c3 << 12
    # The upper half of the range wraps to negative numbers: the same bits.
    words = torch.where(words > 32767, words - 65536, words).to(torch.int16)
    return words.flatten(1)


def to_words(packed: Nf4Experts, *, nested: bool = False) -> Nf4Words:
    """Reorder codes; the same codes and magnitudes in another order.

    Args:
        packed: B experts.
        nested: pack the magnitudes to 8 bits, which loses a little.

    Raises:
        ValueError: the model width is not a multiple of 64.
    """
    experts, rows, width = packed.shape
    check_width(width)
    second = nest(packed.absmax_EN) if nested else None
    absmax_EN = packed.absmax_EN if second is None else second.codes_EN
    return Nf4Words(
        words_BFW=bytes_to_words(packed.codes_EH).view(experts, rows, width // PLANES),
        absmax_BFA=absmax_EN.view(experts, rows, width // BLOCK),
        nested=second,
    )


def from_words(packed: Nf4Words) -> Nf4Experts:
    """The inverse of :func:`to_words`; nested magnitudes become float32."""
    experts, rows, width = packed.shape
    words = packed.words_BFW.int().view(experts, rows, width // BLOCK, BLOCK // PLANES)
    planes = [(words >> 4 * j) & 15 for j in range(PLANES)]
    codes = torch.stack(planes, dim=3).to(torch.uint8).view(experts, -1, 2)
    return Nf4Experts(
        codes_EH=codes[:, :, 0] << 4 | codes[:, :, 1],
        absmax_EN=(
            packed.absmax_BFA.reshape(experts, -1)
            if packed.nested is None
            else unnest(packed.nested)
        ),
        shape=(experts, rows, width),
    )
