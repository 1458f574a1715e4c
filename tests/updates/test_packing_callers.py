"""What the surroundings of a call may be: other threads, float modes, shared memory."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packing_frames import ROUND, same_bits, sparse
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.updates.packing import (
    CODECS,
    Manifest,
    PackError,
    accumulate,
    accumulate_all,
    pack,
    pack_into,
    squared_norm,
    unpack,
)
from samv2.updates.sparsify import top_k

ROOT = Path(__file__).parents[2]


def test_one_pass_names_damage_as_the_separate_steps_do() -> None:
    update = {3: sparse(9_000, 0.02, seed=1), 4: sparse(700, 0.9, seed=2)}
    manifest = Manifest.of(update)
    out = {id_: torch.zeros_like(t) for id_, t in update.items()}
    for codec in ("raw", "int4"):
        frame = pack(update, manifest, round=ROUND, codec=codec, block=4096)
        for at in range(len(frame)):
            bad = bytearray(frame)
            bad[at] ^= 1 << (at % 8)
            with pytest.raises(FrameError) as steps:
                unpack(bad, manifest, round=ROUND)
            with pytest.raises(FrameError) as one_pass:
                unpack(bad, manifest, round=ROUND, out=out)
            assert one_pass.value.reason == steps.value.reason


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_changes_is_refused_or_packed(
    codec: str, dtype: torch.dtype
) -> None:
    """The writer counts values before it writes them, and memory behind them is safe."""
    tensor = torch.zeros(1 << 18, dtype=dtype)
    manifest = Manifest.of({0: tensor})
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            tensor.zero_()
            tensor[::97] = 1.0
            tensor.fill_(1.5)
            tensor[::3] = 0.0

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(150):
            try:
                pack({0: tensor}, manifest, round=ROUND, codec=codec)
            except PackError as error:
                assert "changed while it was packed" in str(error)
    finally:
        stop.set()
        thread.join()
    frame = pack({0: tensor}, manifest, round=ROUND, codec=codec)
    left_alone = unpack(frame, manifest, round=ROUND)[0]
    assert torch.equal(left_alone != 0, tensor != 0)


@pytest.fixture
def flushed_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


def test_denormals_count_in_a_thread_that_flushes_them(flushed_denormals: None) -> None:
    bits = torch.arange(1, 257, dtype=torch.int32)
    denormals = {0: bits.view(torch.float32)}
    manifest = Manifest.of(denormals)
    frame = pack(denormals, manifest, round=ROUND)
    total = {0: torch.zeros(256)}
    accumulate_all([(frame, 1.0), (frame, 2.0)], manifest, total, round=ROUND)
    assert torch.equal(total[0].view(torch.int32), 3 * bits)
    assert squared_norm(frame, manifest, round=ROUND) > 0
    one = torch.full((1,), 2.0**-127)
    assert float(one * 1.0) == 0, "the thread's own mode came back"


def overlapping() -> dict[int, Tensor]:
    memory = torch.zeros(5_999)
    return {0: memory[:3_000], 1: memory[2_999:]}


def test_outputs_that_share_memory_are_refused_and_neighbours_are_not() -> None:
    update = {0: sparse(3_000, 0.5, seed=1), 1: sparse(3_000, 0.5, seed=2)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    shared = overlapping()
    with pytest.raises(PackError, match="out 0 and 1 share memory"):
        unpack(frame, manifest, round=ROUND, out=shared)
    with pytest.raises(PackError, match="accumulator 0 and 1 share memory"):
        accumulate(frame, manifest, 1.0, shared, round=ROUND)
    assert not shared[0].any() and not shared[1].any()
    accumulate(frame, manifest, 1.0, shared, round=ROUND, only=[1])
    assert torch.equal(shared[1], update[1])
    memory = torch.zeros(6_000)
    apart = {0: memory[3_000:], 1: memory[:3_000]}
    unpack(frame, manifest, round=ROUND, out=apart)
    assert same_bits(memory, torch.cat([update[1], update[0]]))


@pytest.mark.parametrize("codec", CODECS)
def test_frames_are_written_to_any_address(codec: str) -> None:
    update = {0: sparse(9_000, 0.3, seed=1), 1: sparse(70_000, 0.4, seed=2).half()}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND, codec=codec)
    memory = bytearray(len(frame) + 8)
    for offset in range(5):
        memory[:] = bytes(len(memory))
        out = memoryview(memory)[offset:]
        length = pack_into(update, manifest, out, round=ROUND, codec=codec)
        assert bytes(out[:length]) == frame
        assert not any(out[length:])


def test_top_k_keeps_float32_and_names_a_wrong_count() -> None:
    update = {0: torch.tensor([1.0, -3.0, 2.0])}
    torch.set_default_dtype(torch.float64)
    try:
        kept = top_k(update, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(kept[0], torch.tensor([0.0, -3.0, 0.0]))
    for keep in (-1, 4):
        with pytest.raises(ValueError, match="keep"):
            top_k(update, keep)


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_machine_can_run_the_code_of_another(
    isa: str, optimise: str, tmp_path: Path
) -> None:
    """The linker keeps one copy of a shared function, for whatever machine that was."""
    if not (shutil.which("g++") and shutil.which("nm")):
        pytest.skip("g++ or nm is not there")
    made = tmp_path / "isa.o"
    source = ROOT / "csrc" / f"isa_{isa}.cpp"
    flags = ["-std=c++17", "-fPIC", optimise, "-I", str(ROOT / "csrc")]
    subprocess.run(["g++", *flags, "-c", source, "-o", made], check=True)
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", made], check=True, capture_output=True, text=True
    )
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    assert not [name for kind, name in symbols if kind in "WVuTB"]
