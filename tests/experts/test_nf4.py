"""NF4 experts: the format, bit for bit, and what autograd keeps of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.experts.nf4 import check_packed, saved_packed
from samv2_kernels.nf4 import BLOCK, Nf4Experts, dequantise, quantise
from tests.helpers import randn

# QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal distribution, zero exact.
LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
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


@pytest.mark.parametrize("shape", [(4, 6, 64), (4, 5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_unpacks_again_and_keeps_no_weights(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Of a flat, transposed view of all experts, and of views of single ones."""
    packed = quantise(weights(*shape))
    x_ND = randn(3, shape[2], seed=2, dtype=dtype).requires_grad_()

    def loss(weights_EFD: Tensor) -> Tensor:
        every = (x_ND @ weights_EFD.flatten(0, 1).T).square().sum()
        one = (x_ND @ weights_EFD[2].T).sin() @ weights_EFD[3]
        return every + one.sum()

    loss(dequantise(packed, dtype)).backward()
    expected, x_ND.grad = x_ND.grad, None
    unpacked = dequantise(packed, dtype)
    with saved_packed([(unpacked, packed)]):
        found = loss(unpacked)
    unpacked.fill_(torch.nan)  # whoever holds it still would compute NaN
    found.backward()
    assert expected is not None and bool(expected.any())
    assert torch.equal(x_ND.grad, expected)


def test_what_autograd_saved_is_freed_with_its_graph() -> None:
    """The hooks make no cycle that only the garbage collector would find."""
    packed = quantise(weights(4, 6, 64))
    x_ND = randn(3, 64, seed=2).requires_grad_()
    unpacked = dequantise(packed, torch.float32)
    gc.disable()
    try:
        with saved_packed([(unpacked, packed)]):
            made = torch.softmax((x_ND @ unpacked[0].T).exp(), dim=1)
        gone = weakref.ref(made)
        del made
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda p: replace(p, codes_EH=p.codes_EH[:, :-1]),
            r"gate_codes_EH has shape \(4, 191\) and dtype torch.uint8; 4 NF4 experts of "
            r"384 weights need \(4, 192\) and torch.uint8",
        ),
        (
            lambda p: replace(p, codes_EH=p.codes_EH.view(torch.int8)),
            "gate_codes_EH .* dtype torch.int8",
        ),
        (
            lambda p: replace(p, absmax_EN=p.absmax_EN[:3]),
            r"gate_absmax_EN has shape \(3, 6\)",
        ),
        (
            lambda p: replace(p, absmax_EN=p.absmax_EN.bfloat16()),
            "gate_absmax_EN .* dtype torch.bfloat16",
        ),
        (lambda p: replace(p, absmax_EN=-p.absmax_EN), "gate_absmax_EN .* negative"),
        (lambda p: replace(p, absmax_EN=p.absmax_EN / 0), "negative or not finite"),
    ],
)
def test_damage_is_refused_by_name(
    change: Callable[[Nf4Experts], Nf4Experts], message: str
) -> None:
    packed = quantise(weights(4, 6, 64))
    check_packed("gate_EFD", packed)
    with pytest.raises(ModelError, match=message):
        check_packed("gate_EFD", change(packed))
