"""NF4 experts: the format, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from samv2_kernels.nf4 import (
    BLOCK,
)
from samv2_kernels.nf4 import LEVELS as CODEBOOK
from samv2_kernels.nf4 import Nf4Experts, dequantise, level_pairs, quantise
from tests.helpers import randn

LEVELS = torch.tensor(CODEBOOK)
SHAPES = [(8, 16, 64), (3, 10, 20), (2, 5, 7), (1, 1, 1), (4, 8, 8), (2, 3, 64)]
"""Whole blocks, short last ones, odd numbers of weights, one weight, one block."""
DTYPES = [torch.float32, torch.bfloat16]


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.03 * randn(*shape, seed=1)).to(dtype)


def by_hand(packed: Nf4Experts) -> Tensor:
    """Level times magnitude, one weight at a time, in float32."""
    experts, rows, width = packed.shape
    made = torch.zeros(experts, rows * width)
    for expert in range(experts):
        for place in range(rows * width):
            byte = int(packed.codes_EH[expert, place // 2])
            code = byte >> 4 if place % 2 == 0 else byte & 15
            absmax = packed.absmax_EN[expert, place // BLOCK]
            made[expert, place] = LEVELS[code] * absmax
    return made.view(packed.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_expert_is_what_bitsandbytes_makes_of_it_alone(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    weights_EFD = weights(*shape, dtype=dtype)
    packed = quantise(weights_EFD)
    assert packed.shape == shape
    for expert, weights_FD in enumerate(weights_EFD):
        codes, state = bnb.quantize_4bit(weights_FD, blocksize=64, quant_type="nf4")
        assert torch.equal(packed.codes_EH[expert], codes.flatten())
        assert torch.equal(packed.absmax_EN[expert], state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_stand_for_levels_of_a_blocks_magnitude(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    packed = quantise(weights(*shape, dtype=dtype))
    found = dequantise(packed, dtype)
    assert found.is_contiguous() and found.dtype == dtype
    assert torch.equal(found, by_hand(packed).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_gets_the_nearest_level(shape: tuple[int, int, int]) -> None:
    weights_EFD = weights(*shape)
    packed = quantise(weights_EFD)
    found_EP = dequantise(packed, torch.float32).flatten(1)
    for weights_P, found_P, absmax_N in zip(
        weights_EFD.flatten(1), found_EP, packed.absmax_EN
    ):
        blocks = zip(weights_P.split(BLOCK), found_P.split(BLOCK), absmax_N)
        for block, found, absmax in blocks:
            assert absmax == block.abs().max()
            gap = (block[:, None] - LEVELS * absmax).abs().min(dim=1).values
            assert torch.allclose((block - found).abs(), gap, atol=1e-6 * float(absmax))


def test_zeros_stay_zeros() -> None:
    packed = quantise(torch.zeros(2, 3, 30))
    assert not packed.absmax_EN.any() and not dequantise(packed, torch.float32).any()


@pytest.mark.parametrize("shape", [(6, 16, 64), (6, 5, 7)])
def test_some_experts_are_some_rows(shape: tuple[int, int, int]) -> None:
    weights_EFD = weights(*shape)
    some = quantise(weights_EFD).experts(2, 5)
    alone = quantise(weights_EFD[2:5])
    assert some.shape == alone.shape == (3, *shape[1:])
    assert torch.equal(some.codes_EH, alone.codes_EH)
    assert torch.equal(some.absmax_EN, alone.absmax_EN)
    whole = dequantise(quantise(weights_EFD), torch.float32)
    assert torch.equal(dequantise(some, torch.float32), whole[2:5])


def test_four_and_a_half_bits_a_weight() -> None:
    packed = quantise(weights(4, 16, 64))
    held = packed.codes_EH.nbytes + packed.absmax_EN.nbytes
    assert held * 8 == 4.5 * 4 * 16 * 64


def test_the_codebook_is_that_of_bitsandbytes() -> None:
    assert torch.equal(LEVELS, bnb.get_4bit_type("nf4", device="cpu"))


def test_every_byte_stands_for_two_levels() -> None:
    pairs = level_pairs(torch.device("cpu")).view(torch.float32).view(256, 2)
    for byte in range(256):
        assert pairs[byte].tolist() == [LEVELS[byte >> 4], LEVELS[byte & 15]]
    codes, state = bnb.quantize_4bit(
        torch.randn(4, 128), quant_type="nf4", blocksize=64
    )
    codes = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    state.absmax, state.shape = torch.ones(8), torch.Size((4, 128))
    expected = bnb.dequantize_4bit(codes, state)
    packed = Nf4Experts(
        codes_EH=codes.view(1, 256), absmax_EN=torch.ones(1, 8), shape=(1, 4, 128)
    )
    assert torch.equal(dequantise(packed, torch.float32)[0], expected)
