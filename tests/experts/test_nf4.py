"""NF4 experts of a layer: what is refused, and what autograd keeps of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.experts.nf4 import check_packed, saved_packed
from samv2_kernels.nf4 import Nf4Experts, dequantise, quantise
from tests.helpers import randn

DTYPES = [torch.float32, torch.bfloat16]


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.03 * randn(*shape, seed=1)).to(dtype)


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
