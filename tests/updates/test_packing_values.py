"""Lossy codecs keep their error bounds; stochastic rounding is unbiased."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packing_frames import (
    DTYPES,
    ROUND,
    bits_of,
    bounded,
    round_trip,
    same_bits,
    sparse,
)
from torch import Tensor

from samv2.updates._reference_decoder import NF4_CODEBOOK
from samv2.updates.packing import (
    CODECS,
    Manifest,
    PackError,
    inspect,
    pack,
    unpack,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_lossy_codecs_match_the_reference_on_every_dtype(
    dtype: torch.dtype, codec: str, density: float
) -> None:
    tensor = sparse(10_001, density, seed=4, dtype=dtype)
    decoded = round_trip({3: tensor}, codec=codec)[3]
    assert ((decoded != 0) <= (tensor != 0)).all()


@bounded
@given(data=st.binary(max_size=400).filter(lambda b: len(b) % 4 == 0))
def test_sixteen_bit_codecs_round_to_nearest_even(data: bytes) -> None:
    """Against torch, on arbitrary finite float32 patterns."""
    bits = np.frombuffer(data, np.int32).copy()
    tensor = torch.from_numpy(bits).view(torch.float32)
    for codec, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        kept = tensor[tensor.to(dtype).isfinite()]
        assert same_bits(round_trip({0: kept}, codec=codec)[0], kept.to(dtype).float())


@pytest.mark.parametrize("exponent", range(-30, 17))
def test_float16_rounding_holds_at_every_exponent(exponent: int) -> None:
    """Ties, neighbours of ties, subnormals and the largest finite values."""
    steps = torch.arange(0, 1 << 13, 3, dtype=torch.float64)
    exact = (1 + steps / 2**12) * 2.0**exponent
    tensor = torch.cat([exact, -exact]).float()
    tensor = tensor[tensor.half().isfinite()]
    assert same_bits(round_trip({0: tensor}, codec="f16")[0], tensor.half().float())


@pytest.mark.parametrize(("codec", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("quant_block", [32, 256, 4096])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_absmax_error_is_half_a_step(
    codec: str, levels: int, quant_block: int, density: float
) -> None:
    tensor = sparse(70_001, density, seed=8)
    decoded = round_trip({0: tensor}, codec=codec, quant_block=quant_block)[0]
    stored = bits_of(tensor) != 0
    values, found = tensor[stored], decoded[stored]
    assert (decoded[~stored] == 0).all()
    padded = torch.zeros(-(-len(values) // quant_block) * quant_block)
    padded[: len(values)] = values.abs()
    step = padded.reshape(-1, quant_block).amax(1) / levels
    bound = step.repeat_interleave(quant_block)[: len(values)] * (0.5 + 1e-5)
    assert ((found - values).abs() <= bound).all()


@pytest.mark.parametrize("quant_block", [32, 64, 4096])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_nf4_takes_the_nearest_entry_of_the_codebook(
    quant_block: int, density: float
) -> None:
    tensor = sparse(70_001, density, seed=8)
    decoded = round_trip({0: tensor}, codec="nf4", quant_block=quant_block)[0]
    stored = bits_of(tensor) != 0
    values, found = tensor[stored].double(), decoded[stored].double()
    assert (decoded[~stored] == 0).all()
    padded = torch.zeros(-(-len(values) // quant_block) * quant_block).double()
    padded[: len(values)] = values.abs()
    scales = padded.reshape(-1, quant_block).amax(1)
    scale = scales.repeat_interleave(quant_block)[: len(values)]
    levels = NF4_CODEBOOK.double() * scale[:, None]
    nearest = (levels - values[:, None]).abs().amin(1)
    assert ((found - values).abs() <= nearest + 1e-6 * scale).all()


def test_nf4_codebook_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import get_4bit_type

    assert same_bits(NF4_CODEBOOK, get_4bit_type("nf4", device="cpu"))


def test_tiny_and_huge_blocks_have_safe_scales() -> None:
    tiny = torch.full((32,), 1e-31)
    huge = torch.full((32,), torch.finfo(torch.float32).max)
    zero_in_dense = torch.cat([huge[:31], torch.tensor([1.0])])
    tensor = torch.cat([tiny, huge, -huge, zero_in_dense])
    for codec in ("int8", "nf4", "int4"):
        decoded = round_trip({0: tensor}, codec=codec, quant_block=32)[0]
        assert (decoded[:32] == 0).all()
        torch.testing.assert_close(decoded[32:], tensor[32:], rtol=1e-6, atol=1.0)


def test_sixteen_bit_codec_of_its_own_dtype_is_raw() -> None:
    for codec, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        update = {0: sparse(500, 0.5, dtype=dtype)}
        manifest = Manifest.of(update)
        frame = pack(update, manifest, round=ROUND, codec=codec)
        assert frame == pack(update, manifest, round=ROUND)
        assert inspect(frame).lossless


@pytest.mark.parametrize(
    ("codec", "dtype", "value"),
    [
        (c, torch.float32, v)
        for c in ("bf16", "f16", "int8")
        for v in (math.nan, math.inf)
    ]
    + [
        ("f16", torch.float32, 65520.0),
        ("bf16", torch.float32, 3.4e38),
        ("bf16", torch.float16, 65504.0),
        ("int4", torch.bfloat16, -math.inf),
    ],
)
def test_lossy_codecs_refuse_what_they_cannot_carry(
    codec: str, dtype: torch.dtype, value: float
) -> None:
    update = {0: torch.tensor([1.0, value], dtype=dtype)}
    with pytest.raises(PackError, match="not finite"):
        pack(update, Manifest.of(update), round=ROUND, codec=codec)


@pytest.mark.parametrize("codec", ["bf16", "f16", "int8", "nf4", "int4"])
def test_stochastic_rounding_is_unbiased(codec: str) -> None:
    """Mean over 2^17 draws; 6 sigma of a coin with the step as its width."""
    count = 1 << 17
    value = 0.3017
    tensor = torch.full((count,), value)
    tensor[::32] = 1.0
    update = {0: tensor}
    manifest = Manifest.of(update)
    frame = pack(
        update,
        manifest,
        round=ROUND,
        codec=codec,
        stochastic_seed=1,
        quant_block=32 if codec in ("int8", "nf4", "int4") else None,
    )
    decoded = unpack(frame, manifest, round=ROUND)[0]
    draws = decoded[tensor != 1.0].double()
    levels = draws.unique()
    assert len(levels) == 2 and levels[0] < value < levels[1]
    step = float(levels[1] - levels[0])
    exact = float(tensor[1].double())
    assert abs(float(draws.mean()) - exact) < 6 * 0.5 * step / math.sqrt(len(draws))


def test_stochastic_rounding_of_subnormal_float16_is_unbiased() -> None:
    tensor = torch.full((1 << 16,), 2.0**-26)
    update = {0: tensor}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND, codec="f16", stochastic_seed=3)
    decoded = unpack(frame, manifest, round=ROUND)[0].double()
    assert set(decoded.tolist()) == {0.0, 2.0**-24}
    assert abs(float(decoded.mean()) / 2.0**-26 - 1) < 0.05


def test_stochastic_rounding_never_overflows() -> None:
    tensor = torch.full((500,), torch.finfo(torch.bfloat16).max)
    tensor = torch.nextafter(tensor, torch.tensor(math.inf))
    for codec, values in (("bf16", tensor), ("f16", torch.full((500,), 65519.0))):
        decoded = round_trip({0: values}, codec=codec, stochastic_seed=0)[0]
        assert decoded.isfinite().all()


def test_stochastic_rounding_depends_on_seed_round_id_and_element_only() -> None:
    tensor = sparse(3000, 0.4, seed=2)

    def decoded(id_: int, round: int, seed: int, other: Tensor) -> Tensor:
        update = {id_: tensor, id_ + 1: other}
        manifest = Manifest.of(update)
        options = {"round": round, "codec": "bf16", "stochastic_seed": seed}
        frame = pack(update, manifest, **options)  # type: ignore[arg-type]
        return unpack(frame, manifest, round=round)[id_]

    first = decoded(1, 1, 1, torch.ones(5))
    assert same_bits(first, decoded(1, 1, 1, torch.zeros(70)))
    for change in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert not same_bits(first, decoded(*change, torch.ones(5)))
    masked = tensor.clone()
    masked[:1500] = 0
    update = {1: masked, 2: torch.ones(5)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=1, codec="bf16", stochastic_seed=1)
    assert same_bits(unpack(frame, manifest, round=1)[1][1500:], first[1500:])
