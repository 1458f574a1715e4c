"""A layer over NF4 blocks is the layer over the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.experts.frozen_blocks import DOWN, GATE, UP, FrozenBlocks
from samv2.experts.moe_layers import ExpertGraphMLP, WalkOptions
from samv2_kernels import ExpertWeights
from samv2_kernels.nf4 import BLOCK, dequantise, quantise
from samv2_kernels.nf4_layout import from_words
from tests.experts.test_moe_layers import (
    EXPERTS,
    ROWS,
    WIDTH,
    make_layer,
    make_repair,
)
from tests.helpers import assert_close, randn

X_BSD = randn(2, 9, WIDTH, seed=40)


def make(chains: bool = False) -> ExpertGraphMLP:
    """A float layer with a repair for K = 3 and adapters that are not zero."""
    layer = make_layer(chains=chains)
    layer.add_repair(3, make_repair())
    for seed, (name, parameter) in enumerate(layer.named_parameters()):
        if "adapter" in name:
            parameter.data += 0.1 * randn(*parameter.shape, seed=seed)
    return layer


def twins(chains: bool = False) -> tuple[ExpertGraphMLP, ExpertGraphMLP]:
    """An NF4 layer, and a float layer of what its blocks stand for."""
    packed, plain = make(chains), make(chains)
    packed.quantise()
    for name in plain.block_names:
        stands_for = dequantise(packed.packed_block(name), torch.float32)
        assert not torch.equal(stands_for, getattr(plain, name))
        setattr(plain, name, stands_for)
    return packed, plain


def run(layer: ExpertGraphMLP, k: int, grouped: bool) -> dict[str, Tensor]:
    """Outputs, and gradients of the inputs and of all that is trained."""
    x_BSD = X_BSD.clone().requires_grad_()
    layer._groups = lambda x_TD, visits: grouped  # both paths, whatever pays on a CPU
    y_BSD, _ = layer(x_BSD, WalkOptions(experts_per_token=k))
    (y_BSD * randn(*y_BSD.shape, seed=41)).sum().backward()
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y_BSD.detach(), "x": x_BSD.grad, **gradients}


@pytest.mark.parametrize("k", [3, 4, EXPERTS])
@pytest.mark.parametrize("path", ["masked", "grouped", "chains"])
def test_outputs_and_gradients_are_those_of_the_unpacked_weights(
    k: int, path: str
) -> None:
    packed, plain = twins(chains=path == "chains")
    found, expected = (run(one, k, path != "masked") for one in (packed, plain))
    assert found.keys() == expected.keys() and "adapter_gate_EFR" in found
    for name, value in expected.items():
        assert bool(value.any()) or "adapter" not in name, name
        assert_close(name, found[name], value, "fp32")


def test_no_float_block_is_left() -> None:
    layer = make()
    layer.quantise()
    names = ("gate", "up", "down", "repair_3_down")
    assert layer.packed == tuple(f"{name}_EFD" for name in names)
    buffers = dict(layer.named_buffers())
    assert not any(name.endswith("_EFD") for name in buffers)
    weights = ROWS * WIDTH
    for name in names:
        assert buffers[f"{name}_codes_EH"].shape == (EXPERTS, -(-weights // 2))
        assert buffers[f"{name}_absmax_EN"].shape == (EXPERTS, -(-weights // BLOCK))
    held = dict(layer.state_dict())
    layer.quantise()
    assert layer.state_dict().keys() == held.keys(), "once is enough"


def test_a_packed_repair_is_read_as_what_it_stands_for() -> None:
    layer, plain = twins()
    found, expected = layer.repair(3), plain.repair(3)
    assert found is not None and expected is not None and layer.repair(4) is None
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name


def test_blocks_are_unpacked_to_the_dtype_of_the_inputs() -> None:
    layer, _ = twins()
    for dtype in (torch.float32, torch.bfloat16):
        made = layer.block("up_EFD", dtype)
        expected = layer.block("up_EFD", torch.float32).to(dtype)
        assert made.dtype == dtype and torch.equal(made, expected)


def test_blocks_of_another_shape_are_refused() -> None:
    layer = make()
    other = quantise(randn(EXPERTS, ROWS + 1, WIDTH, seed=1))
    with pytest.raises(
        ModelError, match=r"up_EFD is packed as \(6, 5, 8\); .* are \(6, 4, 8\)"
    ):
        layer.pack("up_EFD", other)
    assert not layer.packed


def test_words_are_made_once_and_anew_for_other_codes() -> None:
    layer = FrozenBlocks(
        ExpertWeights(**{n: randn(2, 3, 64, seed=1) for n in (GATE, UP, DOWN)}), None
    )
    layer.quantise()
    first = layer.words(GATE)
    assert torch.equal(from_words(first).codes_EH, layer.packed_block(GATE).codes_EH)
    assert layer.words(GATE) is first
    other = quantise(randn(2, 3, 64, seed=2))
    layer.gate_codes_EH = other.codes_EH
    assert torch.equal(from_words(layer.words(GATE)).codes_EH, other.codes_EH)
