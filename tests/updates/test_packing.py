"""Frames come back bit for bit, and accumulate adds exactly what they hold."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packing_frames import (
    DTYPES,
    ROUND,
    assert_lossless,
    bounded,
    from_bits,
    round_trip,
    same_bits,
    sparse,
)
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.updates.packing import (
    CODECS,
    Manifest,
    PackError,
    accumulate,
    accumulate_all,
    inspect,
    pack,
    pack_into,
    squared_norm,
    unpack,
)

ODD_SIZES = (0, 1, 2, 63, 64, 65, 4095, 4097, 65535, 65536, 65537)


@bounded
@given(
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_bit_pattern_survives(dtype: torch.dtype, data: st.DataObject) -> None:
    width = 32 if dtype == torch.float32 else 16
    special = [0, 1, 1 << (width - 1), (1 << width) - 1, 0x7F80, 0x7FC1, 0x7C01]
    pattern = st.sampled_from(special) | st.integers(0, 2**width - 1)
    patterns = data.draw(st.lists(pattern, max_size=200))
    assert_lossless({2**32 - 1: from_bits(patterns, dtype)})


@bounded
@given(
    numel=st.sampled_from(ODD_SIZES) | st.integers(0, 20_000),
    density=st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.5, 0.9, 0.999, 1.0]),
    span=st.sampled_from([1, 1, 7, 64, 1000]),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([4096, 65536]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_structure_survives(
    numel: int, density: float, span: int, dtype: torch.dtype, block: int, seed: int
) -> None:
    tensor = sparse(numel, density, seed=seed, span=span, dtype=dtype)
    assert_lossless({5: tensor}, block=block)


@bounded
@given(
    lengths=st.lists(st.integers(0, 300), max_size=60),
    starts_set=st.booleans(),
)
def test_any_run_structure_survives(lengths: list[int], starts_set: bool) -> None:
    set_ = [(i % 2 == 0) == starts_set for i in range(len(lengths))]
    tensor = torch.from_numpy(np.repeat(np.array(set_, np.float32), lengths))
    assert_lossless({0: tensor})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pattern_of_sixteen_bits_survives(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    assert_lossless({0: patterns.view(dtype), 1: patterns[::7].view(dtype)})


@pytest.mark.parametrize("numel", ODD_SIZES)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_odd_sizes_survive(numel: int, density: float) -> None:
    assert_lossless({0: sparse(numel, density)})


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (5, 7, 11), (4097, 3)])
def test_shapes_come_back(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    assert_lossless({0: tensor, 9: tensor.to(torch.bfloat16)})


def test_one_frame_carries_many_tensors_of_all_dtypes() -> None:
    update = {
        id_: sparse(5000 + id_ % 100, 0.1, seed=id_, dtype=DTYPES[id_ % 3])
        for id_ in (70, 3, 1, 2**31, 12)
    }
    assert_lossless(update)


def test_empty_update_is_a_frame_of_72_bytes() -> None:
    manifest = Manifest.of({1: torch.ones(3)})
    frame = pack({}, manifest, round=ROUND)
    assert len(frame) == 72
    assert unpack(frame, manifest, round=ROUND) == {}
    assert inspect(frame).tensors == ()


def test_frame_may_carry_a_subset_of_the_manifest() -> None:
    full = {id_: sparse(300, 0.2, seed=id_) for id_ in (1, 4, 6, 9)}
    manifest = Manifest.of(full)
    part = {id_: full[id_] for id_ in (4, 9)}
    decoded = unpack(pack(part, manifest, round=ROUND), manifest, round=ROUND)
    assert list(decoded) == [4, 9]
    assert all(same_bits(decoded[id_], part[id_]) for id_ in part)


def test_views_are_packed_in_row_major_order_and_left_alone() -> None:
    base = sparse(60 * 40, 0.3).reshape(60, 40)
    before = base.clone()
    update = {0: base.t(), 1: base[::2, 1:7], 2: base.expand(2, 60, 40)}
    decoded = round_trip(update)
    assert all(same_bits(decoded[i], t.contiguous()) for i, t in update.items())
    assert same_bits(base, before)


def test_mutable_frames_and_tensors_with_gradients_are_accepted() -> None:
    update = {0: sparse(100, 0.5).requires_grad_()}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    for data in (bytearray(frame), memoryview(frame)):
        decoded = unpack(data, manifest, round=ROUND)[0]
        assert same_bits(decoded, update[0].detach())
        decoded += 1


def test_threads_may_share_a_frame_and_inputs() -> None:
    update = {id_: sparse(100_000, 0.1, seed=id_) for id_ in range(3)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    with ThreadPoolExecutor(4) as pool:
        frames = pool.map(lambda _: pack(update, manifest, round=ROUND), range(8))
        assert all(other == frame for other in frames)
        for decoded in pool.map(
            lambda _: unpack(frame, manifest, round=ROUND), range(8)
        ):
            assert all(same_bits(decoded[i], update[i]) for i in update)


def test_packing_is_canonical() -> None:
    """Order of the mapping does not matter, and decode then encode is the identity."""
    update = {id_: sparse(9000, 0.07, seed=id_) for id_ in range(3)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    shuffled = {id_: update[id_] for id_ in (2, 0, 1)}
    assert pack(shuffled, manifest, round=ROUND) == frame
    decoded = unpack(frame, manifest, round=ROUND)
    assert pack(decoded, manifest, round=ROUND) == frame


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.003, 0.5, 1.0])
def test_accumulate_is_unpack_times_weight_plus_sum(
    codec: str, dtype: torch.dtype, density: float
) -> None:
    """Bit for bit: one float32 product, then one float32 sum."""
    update = {
        2: sparse(66_000, density, seed=1, dtype=dtype).reshape(2, -1),
        5: sparse(130, 0.5, seed=2, dtype=dtype),
    }
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND, codec=codec)
    start = {
        i: sparse(t.numel(), 1, seed=i).reshape(t.shape) for i, t in update.items()
    }
    found = {i: t.clone() for i, t in start.items()}
    accumulate(frame, manifest, 1 / 3, found, round=ROUND)
    weight = torch.tensor(1 / 3, dtype=torch.float32)
    for id_, dense in unpack(frame, manifest, round=ROUND).items():
        assert same_bits(found[id_], start[id_] + weight * dense.float())


def test_accumulate_does_not_touch_elements_that_are_not_stored() -> None:
    update = {0: torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])}
    manifest = Manifest.of(update)
    total = {0: torch.full((9,), -0.0)}
    accumulate(pack(update, manifest, round=1), manifest, 2.0, total, round=1)
    expected = torch.full((9,), -0.0)
    expected[1] = 2.0
    assert same_bits(total[0], expected)


def test_accumulate_only_the_ids_asked_for() -> None:
    update = {i: sparse(200, 0.5, seed=i) for i in range(4)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    total = {i: torch.zeros(200) for i in (1, 2)}
    accumulate(frame, manifest, 1.0, total, round=ROUND, only=[2])
    assert same_bits(total[2], update[2]) and not total[1].any()


def test_accumulate_needs_an_accumulator_for_every_id_it_adds() -> None:
    update = {i: sparse(200, 0.5, seed=i) for i in range(4)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    total = {i: torch.zeros(200) for i in (0, 2)}
    with pytest.raises(PackError, match=r"ids \[1, 3\]"):
        accumulate(frame, manifest, 1.0, total, round=ROUND)
    assert not any(t.any() for t in total.values())


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(20),
        torch.zeros(10, dtype=torch.float64),
        torch.zeros(20)[::2],
    ],
)
def test_accumulator_that_does_not_fit_is_an_error(wrong: Tensor) -> None:
    update = {0: torch.ones(10)}
    manifest = Manifest.of(update)
    with pytest.raises(PackError, match="accumulator 0"):
        accumulate(pack(update, manifest, round=1), manifest, 1.0, {0: wrong}, round=1)


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e39])
def test_weight_must_be_finite(weight: float) -> None:
    manifest = Manifest.of({})
    with pytest.raises(PackError, match="weight"):
        accumulate(pack({}, manifest, round=1), manifest, weight, {}, round=1)


def test_pack_into_writes_the_same_frame_and_nothing_behind_it() -> None:
    update = {0: sparse(70_000, 0.3, seed=1), 5: sparse(3_000, 1.0, seed=2)}
    manifest = Manifest.of(update)
    for codec in CODECS:
        frame = pack(update, manifest, round=ROUND, codec=codec)
        memory = bytearray(b"\xab" * (len(frame) + 80))
        length = pack_into(update, manifest, memory, round=ROUND, codec=codec)
        assert bytes(memory[:length]) == frame
        assert memory[length:] == b"\xab" * 80


def test_pack_into_refuses_memory_that_is_too_small_and_leaves_it_alone() -> None:
    update = {0: torch.ones(100)}
    manifest = Manifest.of(update)
    memory = bytearray(len(pack(update, manifest, round=ROUND)) - 1)
    with pytest.raises(PackError, match="room for"):
        pack_into(update, manifest, memory, round=ROUND)
    assert not any(memory)
    with pytest.raises(BufferError):
        pack_into(update, manifest, memoryview(bytes(900)), round=ROUND)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.003, 0.5, 1.0])
def test_unpack_into_given_tensors_overwrites_every_element(
    codec: str, dtype: torch.dtype, density: float
) -> None:
    update = {2: sparse(70_007, density, seed=4, dtype=dtype).reshape(7, -1)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND, codec=codec)
    out = {2: torch.full((7, 10_001), 3.0, dtype=dtype)}
    found = unpack(frame, manifest, round=ROUND, out=out)
    assert found[2] is out[2]
    assert same_bits(out[2], unpack(frame, manifest, round=ROUND)[2])


def test_unpack_streams_large_tensors_to_any_alignment() -> None:
    tensor = torch.cat([sparse(1_200_000, p, seed=3) for p in (0.01, 0.4, 1.0, 0.0)])
    manifest = Manifest.of({0: tensor})
    frame = pack({0: tensor}, manifest, round=ROUND)
    assert same_bits(unpack(frame, manifest, round=ROUND)[0], tensor)
    for skip in (0, 1, 3):
        memory = torch.ones(tensor.numel() + 8)
        out = memory[skip : skip + tensor.numel()]
        unpack(frame, manifest, round=ROUND, out={0: out})
        assert same_bits(out, tensor)
        assert (memory[:skip] == 1).all() and (
            memory[skip + tensor.numel() :] == 1
        ).all()


def test_unpack_needs_given_tensors_that_fit() -> None:
    update = {i: sparse(200, 0.5, seed=i) for i in range(3)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    with pytest.raises(PackError, match=r"ids \[1, 2\] that `out` lacks"):
        unpack(frame, manifest, round=ROUND, out={0: torch.zeros(200)})
    with pytest.raises(PackError, match="out 0"):
        unpack(frame, manifest, round=ROUND, out={0: torch.zeros(200).half()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_frames_add_up_as_one_after_the_other(dtype: torch.dtype) -> None:
    updates = [
        {
            id_: sparse(70_000, density, seed=10 * client + id_, dtype=dtype)
            for id_ in range(client % 2, 3)
        }
        for client, density in enumerate((0.004, 0.2, 0.7, 1.0, 0.03))
    ]
    manifest = Manifest.of(updates[0])
    pairs = [
        (pack(update, manifest, round=ROUND, codec=codec, block=block), weight)
        for update, codec, block, weight in zip(
            updates,
            ("raw", "int8", "bf16", "int4", "raw"),
            (65536, 4096, 65536, 8192, 4096),
            (0.1, 3.0, -2.5, 0.7, 1e-3),
        )
    ]
    together = {id_: torch.full((70_000,), -0.0) for id_ in range(3)}
    apart = {id_: t.clone() for id_, t in together.items()}
    accumulate_all(iter(pairs), manifest, together, round=ROUND)
    for frame, weight in pairs:
        accumulate(frame, manifest, weight, apart, round=ROUND)
    for id_, total in together.items():
        assert same_bits(total, apart[id_])


def test_one_refused_frame_among_many_leaves_all_sums_untouched() -> None:
    update = {0: sparse(5_000, 0.2, seed=1)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    total = {0: torch.zeros(5_000)}
    with pytest.raises(FrameError):
        accumulate_all([(frame, 1.0), (frame[:-1], 1.0)], manifest, total, round=ROUND)
    assert not total[0].any()


def test_squared_norm_is_that_of_the_decoded_values() -> None:
    update = {0: sparse(70_000, 0.2, seed=1), 3: sparse(900, 1.0, seed=2)}
    manifest = Manifest.of(update)
    for codec in CODECS:
        frame = pack(update, manifest, round=ROUND, codec=codec)
        decoded = unpack(frame, manifest, round=ROUND)
        exact = sum(float(t.double().square().sum()) for t in decoded.values())
        found = squared_norm(frame, manifest, round=ROUND)
        assert math.isclose(found, exact, rel_tol=1e-12)
