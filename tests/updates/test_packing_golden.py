"""Frozen bytes: a change here breaks deployed receivers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from packing_frames import (
    BITS,
    bits_of,
    from_bits,
)
from torch import Tensor

from samv2 import _rle
from samv2.updates.packing import (
    Manifest,
    inspect,
    pack,
    unpack,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def pattern(numel: int, period: int, width: int, dtype: torch.dtype) -> Tensor:
    """Set where ``i % period < width``; integer arithmetic only, so frozen for good."""
    i = np.arange(numel, dtype=np.int64)
    noise = (i * 2654435761 + 12345) % 2**32 >> 7
    values = torch.from_numpy((noise % 2001 - 1000.5) / 512).to(dtype)
    bits = values.view(BITS[dtype])
    bits[torch.from_numpy((i + noise % 3) % period >= width)] = 0
    return values


def scattered(numel: int, share: float, dtype: torch.dtype) -> Tensor:
    """Set at hashed positions, about ``share`` of them; integer arithmetic only."""
    i = np.arange(numel, dtype=np.uint64)
    noise = (i * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    noise = (noise * noise * np.uint64(2654435761)) >> np.uint64(33)
    clear = torch.from_numpy((noise % np.uint64(1000)).astype(np.int64)) >= share * 1000
    return pattern(numel, 1, 1, dtype).masked_fill(clear, 0)


def golden_update() -> dict[int, Tensor]:
    return {
        1: torch.zeros(300),
        2: pattern(200, 1, 1, torch.float32),
        3: pattern(200, 4, 2, torch.float32),
        5: scattered(999, 0.03, torch.float32),
        8: scattered(400, 0.93, torch.float32),
        13: pattern(900, 150, 60, torch.bfloat16),
        21: pattern(77, 2, 1, torch.float16).reshape(7, 11),
        34: from_bits([0, 0x80000000, 1, 0x807FFFFF, 0x7F7FFFFF], torch.float32),
        55: torch.zeros(4, 0, dtype=torch.bfloat16),
    }


def golden_cases() -> list[dict[str, object]]:
    return json.loads((GOLDEN / "packing.json").read_text())


def test_golden_frames_hold_every_mode() -> None:
    modes = {mode for case in golden_cases() for mode in case["modes"]}  # type: ignore
    assert len(modes) == 6


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: str(case["file"]))
def test_golden_frames_are_frozen(case: dict[str, object]) -> None:
    golden = (GOLDEN / str(case["file"])).read_bytes()
    update = golden_update()
    manifest = Manifest.of(update)
    assert f"{manifest.fingerprint:016x}" == case["fingerprint"]
    if case["codec"] in ("bf16", "f16"):
        del update[34]  # holds the largest float32, which these round to infinity
    if case["file"] == "packing_empty.bin":
        update = {}
    frame = pack(
        update,
        manifest,
        round=int(str(case["round"])),
        codec=str(case["codec"]),
        stochastic_seed=case["stochastic_seed"],  # type: ignore[arg-type]
    )
    assert frame == golden
    decoded = unpack(golden, manifest, round=int(str(case["round"])))
    found = {
        str(i): f"{_rle.xxh3_64(bits_of(t).numpy().tobytes()):016x}"
        for i, t in decoded.items()
    }
    assert found == case["decoded_xxh3"]
    info = inspect(golden)
    modes = [mode for t in info.tensors for mode, n in t.modes.items() if n]
    assert modes == case["modes"]
