"""NF4 in the kernels' order and back, and magnitudes in 8 bits: no bit is lost."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from samv2_kernels.nf4 import Nf4Experts, dequantise, quantise
from samv2_kernels.nf4_layout import from_words, to_words
from samv2_kernels.nf4_nested import NestedAbsmax, nest, nested_values, unnest
from tests.helpers import generator, randn

SHAPES = [(3, 5, 64), (2, 6, 576), (1, 1, 128), (4, 3, 192)]


def every_byte() -> Nf4Experts:
    """One expert whose bytes are 0..255."""
    return Nf4Experts(
        codes_EH=torch.arange(256, dtype=torch.uint8).unsqueeze(0),
        absmax_EN=torch.arange(1.0, 9.0).unsqueeze(0),
        shape=(1, 4, 128),
    )


def test_every_byte_survives_the_way_there_and_back() -> None:
    packed = every_byte()
    words = to_words(packed)
    back = from_words(words)
    assert words.shape == back.shape == packed.shape
    assert torch.equal(back.codes_EH, packed.codes_EH)
    assert torch.equal(back.absmax_EN, packed.absmax_EN)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_experts_survive_it(shape: tuple[int, int, int]) -> None:
    packed = quantise(randn(*shape, seed=1))
    back = from_words(to_words(packed))
    assert torch.equal(back.codes_EH, packed.codes_EH)
    assert torch.equal(back.absmax_EN, packed.absmax_EN)


def test_codes_of_a_word_lie_sixteen_weights_apart() -> None:
    packed = quantise(randn(2, 3, 128, seed=2))
    flat = torch.stack((packed.codes_EH >> 4, packed.codes_EH & 15), dim=2)
    codes = flat.view(2, 3, 128).int()
    words = to_words(packed).words_BFW.int()
    for chunk in range(2):
        for g in range(16):
            for j in range(4):
                found = (words[:, :, 16 * chunk + g] >> 4 * j) & 15
                assert torch.equal(found, codes[:, :, 64 * chunk + 16 * j + g])


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(
        ValueError, match="width is 96; NF4 kernels need a multiple of 64"
    ):
        to_words(quantise(randn(1, 2, 96, seed=0)))


def test_the_map_of_magnitudes_is_that_of_bitsandbytes() -> None:
    assert torch.equal(nested_values(), bnb.create_dynamic_map())


@pytest.mark.parametrize("count", [1, 255, 256, 257, 900])
def test_what_bitsandbytes_nested_is_read_in_its_bits(count: int) -> None:
    absmax_N = torch.rand(count, generator=generator(3)) * 0.1
    offset = absmax_N.mean()
    codes_N, state = bnb.quantize_blockwise(absmax_N - offset, blocksize=256)
    nested = NestedAbsmax(
        codes_EN=codes_N.unsqueeze(0),
        second_ES=state.absmax.unsqueeze(0),
        offset_E=offset.unsqueeze(0),
    )
    expected = bnb.dequantize_blockwise(codes_N, state) + offset
    assert torch.equal(unnest(nested)[0], expected)


@pytest.mark.parametrize("count", [1, 256, 900])
def test_nesting_chooses_the_nearest_value(count: int) -> None:
    absmax_EN = torch.rand((2, count), generator=generator(4)) * 0.1
    nested = nest(absmax_EN)
    assert torch.equal(nested.offset_E, absmax_EN.mean(dim=1))
    sizes = nested.second_ES.repeat_interleave(256, dim=1)[:, :count]
    gap = absmax_EN - nested.offset_E.unsqueeze(1)
    every = nested_values() * sizes.unsqueeze(2)
    least = (gap.unsqueeze(2) - every).abs().amin(dim=2)
    error = (unnest(nested) - absmax_EN).abs()
    assert torch.allclose(error, least, atol=1e-8)
    assert float(error.max()) < 0.01 * float(sizes.max() + 1e-6)


def test_nested_words_keep_their_meaning() -> None:
    packed = quantise(randn(3, 8, 128, seed=5))
    words = to_words(packed, nested=True)
    assert words.absmax_BFA.dtype == torch.uint8 and words.absmax_BFA.shape == (3, 8, 2)
    back = from_words(words)
    assert torch.equal(back.codes_EH, packed.codes_EH)
    assert torch.equal(back.absmax_EN, unnest(nest(packed.absmax_EN)))
    error = dequantise(back, torch.float32) - dequantise(packed, torch.float32)
    assert 0 < float(error.abs().max()) < 0.05


def test_equal_magnitudes_are_kept() -> None:
    nested = nest(torch.full((1, 300), 0.5))
    assert not nested.second_ES.any()
    assert torch.equal(unnest(nested), torch.full((1, 300), 0.5))
