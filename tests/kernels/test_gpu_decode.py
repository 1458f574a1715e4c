"""Decoding NF4 words: all 65,536 of them, by both ways, to the bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from samv2_kernels.gpu.decode import (
    LIFT,
    block_scale,
    codebook_error,
    decode_half,
    decode_half_portable,
    decode_lifted,
    decode_lifted_portable,
    half_levels,
    lifted_levels,
)
from samv2_kernels.nf4 import LEVELS, quantise
from samv2_kernels.nf4_nested import nest, nested_values, unnest
from tests.helpers import randn
from tests.kernels.interpreter import exact


@triton.jit
def _decode_kernel(words_ptr, out_ptr, WAY: tl.constexpr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    words = tl.load(words_ptr + place)
    if WAY == 0:
        w0, w1, w2, w3 = decode_lifted(words)
    elif WAY == 1:
        w0, w1, w2, w3 = decode_lifted_portable(words)
    elif WAY == 2:
        w0, w1, w2, w3 = decode_half(words)
    else:
        w0, w1, w2, w3 = decode_half_portable(words)
    tl.store(out_ptr + place, w0)
    tl.store(out_ptr + COUNT + place, w1)
    tl.store(out_ptr + 2 * COUNT + place, w2)
    tl.store(out_ptr + 3 * COUNT + place, w3)


def every_word() -> Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("way", range(4))
def test_every_word_is_decoded_to_the_bit(way: int) -> None:
    levels = lifted_levels() if way < 2 else half_levels()
    words = every_word()
    found = torch.full((4, len(words)), torch.nan, dtype=levels.dtype)
    with exact():
        _decode_kernel[(1,)](words, found, WAY=way, COUNT=len(words))
    for j in range(4):
        expected = levels[(words.int() >> 4 * j) & 15]
        assert torch.equal(found[j].view(torch.int16), expected.view(torch.int16)), j


def test_the_lift_halves_what_rounding_the_codebook_loses() -> None:
    """Over the codes of normal weights; no other factor in 1..2 is much better."""
    packed = quantise(randn(1, 400, 640, seed=0))
    codes = torch.stack((packed.codes_EH >> 4, packed.codes_EH & 15))
    shares = torch.bincount(codes.flatten().int(), minlength=16).double()
    shares /= shares.sum()
    assert codebook_error(LIFT, shares) < 0.6 * codebook_error(1.0, shares)
    others = [codebook_error(1 + step / 1000, shares) for step in range(1000)]
    assert codebook_error(LIFT, shares) < 1.1 * min(others)


def test_half_precision_levels_are_exact_to_eleven_bits() -> None:
    gap = half_levels().double() - torch.tensor(LEVELS, dtype=torch.float64)
    assert float(gap.abs().max()) <= 2.0**-12


@triton.jit
def _scale_kernel(
    absmax_ptr,
    second_ptr,
    table_ptr,
    offset,
    out_ptr,
    count,
    NESTED: tl.constexpr,
    MASKED: tl.constexpr,
):
    place = tl.arange(0, 1024)
    near = tl.minimum(place, count - 1)
    scale = block_scale(
        absmax_ptr,
        second_ptr,
        table_ptr,
        offset,
        place if MASKED else near,
        place < count,
        NESTED,
        MASKED,
    )
    tl.store(out_ptr + place, scale)


@pytest.mark.parametrize("masked", [False, True])
def test_magnitudes_of_either_kind(masked: bool) -> None:
    absmax_EN = randn(1, 900, seed=1).abs() * 0.1
    nested = nest(absmax_EN)
    for stored, expected in (
        (absmax_EN, absmax_EN),
        (nested.codes_EN, unnest(nested)),
    ):
        found = torch.full((1024,), torch.nan)
        _scale_kernel[(1,)](
            stored,
            nested.second_ES,
            nested_values(),
            float(nested.offset_E),
            found,
            900,
            NESTED=stored is nested.codes_EN,
            MASKED=masked,
        )
        assert torch.allclose(found[:900], expected[0], rtol=1e-6, atol=0)
        if masked:
            assert not found[900:].any()
