"""Each block takes its cheapest mode, and sizes keep their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packing_frames import (
    ROUND,
    assert_lossless,
    bounded,
    modes_of,
    sparse,
)
from torch import Tensor

from samv2.updates.packing import (
    Manifest,
    inspect,
    pack,
)


@pytest.mark.parametrize(
    ("mode", "tensor"),
    [
        ("absent", torch.zeros(70_000)),
        ("dense", torch.ones(70_000)),
        ("bitmap", sparse(65536, 0.5)),
        ("rice", sparse(65536, 0.01)),
        ("rice_zeros", sparse(65536, 0.95)),
        ("runs", sparse(65536, 0.3, span=256)),
    ],
)
def test_each_mode_is_chosen_where_it_is_the_cheapest(
    mode: str, tensor: Tensor
) -> None:
    assert set(modes_of(tensor)) == {mode}
    assert_lossless({0: tensor})


def test_modes_are_chosen_block_by_block() -> None:
    tensor = torch.cat(
        [
            torch.zeros(65536),
            torch.ones(65536),
            sparse(65536, 0.5),
            sparse(65536, 0.02),
            sparse(65536, 0.9),
            sparse(65536, 0.4, span=512),
        ]
    )
    assert set(modes_of(tensor).values()) == {1} and len(modes_of(tensor)) == 6
    assert_lossless({0: tensor})


def test_mode_counts_the_width_of_the_values() -> None:
    """97 % set: leaving out the zeros pays for float32, but not at 4 bits a value."""
    tensor = sparse(65536, 0.97)
    assert modes_of(tensor) == {"rice_zeros": 1}
    assert modes_of(tensor, codec="int4") == {"dense": 1}


@pytest.mark.parametrize(
    ("density", "span", "most"),
    [(0.001, 1, 1.04), (0.01, 1, 1.01), (0.1, 1, 1.01), (0.5, 1, 1.001)]
    + [(0.9, 1, 1.001), (0.001, 1024, 1.03), (0.01, 1024, 1.01)]
    + [(0.1, 1024, 1.01), (0.5, 1024, 1.001), (0.9, 1024, 1.001)],
)
def test_size_is_near_values_plus_entropy(
    density: float, span: int, most: float
) -> None:
    """The targets of the format: bytes over (values + entropy of the index)."""
    numel = 1 << 22
    tensor = sparse(numel, density, seed=1, span=span)
    update = {0: tensor}
    frame = pack(update, Manifest.of(update), round=ROUND)
    values = 4 * int(torch.count_nonzero(tensor))
    assert len(frame) <= most * (values + entropy_bytes(numel // span, density))


def test_blocks_of_all_kinds_together_are_near_values_plus_entropy() -> None:
    densities = (0.0, 0.0, 0.001, 0.01, 0.1, 0.5, 0.95, 1.0)
    numel = 1 << 19
    tensor = torch.cat([sparse(numel, p, seed=2) for p in densities])
    update = {0: tensor}
    frame = pack(update, Manifest.of(update), round=ROUND)
    values = 4 * int(torch.count_nonzero(tensor))
    bound = values + sum(entropy_bytes(numel, p) for p in densities)
    assert len(frame) <= 1.001 * bound


def entropy_bytes(count: int, p: float) -> float:
    """Least bytes that tell which of ``count`` things are set, each with chance p."""
    bits = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
    return count * bits / 8


@pytest.mark.parametrize("codec", ["bf16", "f16", "int8", "int4"])
@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_quantised_values_take_their_width_and_scales(
    codec: str, density: float
) -> None:
    """A float32 scale costs int8 an eighth of a bit, and int4 half a bit."""
    numel = 1 << 20
    update = {0: sparse(numel, density, seed=3)}
    frame = pack(update, Manifest.of(update), round=ROUND, codec=codec)
    bits = {"bf16": 16, "f16": 16, "int8": 8.125, "int4": 4.5}[codec]
    stored = inspect(frame).tensors[0].nnz
    bound = stored * bits / 8 + entropy_bytes(numel, density)
    assert len(frame) <= 1.01 * bound + 200
    assert len(frame) <= numel * (bits / 8 + 4 * 0.00005) + 200


@pytest.mark.parametrize("span", [1, 2, 16, 1024])
@pytest.mark.parametrize("density", [0.0, 0.5, 0.97, 0.99999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_is_never_more_than_dense_and_a_little(
    density: float, span: int, dtype: torch.dtype
) -> None:
    """Dense, 0.005 % of float32, and 200 bytes."""
    tensor = sparse((1 << 20) + 3, density, span=span, dtype=dtype)
    update = {0: tensor}
    frame = pack(update, Manifest.of(update), round=ROUND)
    dense = tensor.numel() * tensor.element_size()
    descriptors = 0.00005 * 4 * tensor.numel()
    assert len(frame) <= dense + descriptors + 200


@bounded
@given(numel=st.integers(0, 9000), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_small_tensors_stay_in_the_bound(numel: int, density: float, seed: int) -> None:
    update = {0: sparse(numel, density, seed=seed)}
    frame = pack(update, Manifest.of(update), round=ROUND, block=4096)
    blocks = -(-numel // 4096)
    assert len(frame) <= 72 + 32 + 4 * numel + -(-blocks // 8) + 8 * blocks + 63


def test_inspect_adds_up() -> None:
    update = {1: sparse(70_000, 0.1), 2: sparse(300, 0.5, dtype=torch.float16)}
    manifest = Manifest.of(update)
    frame = pack(
        update, manifest, round=ROUND, codec="int8", quant_block=64, error_feedback=True
    )
    info = inspect(frame)
    assert (info.version, info.round) == ((1, 0), ROUND)
    assert info.fingerprint == manifest.fingerprint
    assert not info.lossless and info.error_feedback
    assert info.total_bytes == len(frame)
    assert 72 + sum(32 + t.body_bytes for t in info.tensors) == len(frame)
    first = info.tensors[0]
    assert (first.id, first.dtype, first.codec) == (1, torch.float32, "int8")
    assert (first.numel, first.block, first.quant_block) == (70_000, 65536, 64)
    assert first.nnz == first.value_bytes == int(torch.count_nonzero(update[1]))
    assert first.scale_bytes == 4 * -(-first.nnz // 64)
    assert sum(first.modes.values()) == 2
