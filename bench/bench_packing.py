"""Packing speed against memcpy of the same process, per density, on one thread.

Run with ``pytest bench/bench_packing.py --benchmark-enable``. Every result is checked
before it is timed. ``extra_info`` holds ``x_memcpy`` (memcpy's time over ours, of the
dense bytes) and ``frame_bytes``; times on a shared machine move, ratios less so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from samv2.updates.packing import Manifest, accumulate, pack, unpack

DENSITIES = (0.001, 0.01, 0.1, 0.5, 0.9, 1.0)
LAYERS, EXPERTS, EXPERT_BLOCK = 30, 8, 3 * 192 * 16 + 576
"""SmolLM2-135M: 30 layers; 8 experts of 192 rows, rank 16, and a gate row of 576."""


def sparse(numel: int, density: float, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(numel, dtype=np.float32)
    values[values == 0] = 1
    values[rng.random(numel, dtype=np.float32) >= density] = 0
    return torch.from_numpy(values)


@cache
def update(case: str, density: float) -> dict[int, Tensor]:
    if case == "tensor-16MiB":
        return {0: sparse(1 << 22, density, seed=0)}
    return {
        id_: sparse(EXPERT_BLOCK, density, seed=id_) for id_ in range(LAYERS * EXPERTS)
    }


def best_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def memcpy_seconds(numel: int) -> float:
    source, target = np.ones(numel, np.float32), np.ones(numel, np.float32)
    return best_seconds(lambda: np.copyto(target, source))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("case", ["tensor-16MiB", "smollm2-adapters"])
@pytest.mark.parametrize("operation", ["encode", "decode", "accumulate"])
def test_packing_speed(
    benchmark: Callable[..., object], operation: str, case: str, density: float
) -> None:
    tensors = update(case, density)
    manifest = Manifest.of(tensors)
    frame = pack(tensors, manifest, round=1)
    total = {id_: torch.zeros_like(t) for id_, t in tensors.items()}

    decoded = unpack(frame, manifest, round=1)
    accumulate(frame, manifest, 2.0, total, round=1)
    for id_, tensor in tensors.items():
        assert torch.equal(
            decoded[id_].view(torch.int32), tensor.view(torch.int32)
        ), f"tensor {id_} did not survive"
        assert torch.equal(total[id_], 2.0 * tensor), f"tensor {id_} was added wrongly"

    run = {
        "encode": lambda: pack(tensors, manifest, round=1),
        "decode": lambda: unpack(frame, manifest, round=1),
        "accumulate": lambda: accumulate(frame, manifest, 0.5, total, round=1),
    }[operation]
    numel = sum(t.numel() for t in tensors.values())
    ratio = memcpy_seconds(numel) / best_seconds(run, repeats=5)
    benchmark.extra_info.update(  # type: ignore[attr-defined]
        x_memcpy=round(ratio, 3), frame_bytes=len(frame), dense_bytes=4 * numel
    )
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)  # type: ignore[attr-defined]
