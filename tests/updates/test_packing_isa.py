"""Every instruction set gives the same bytes, values, sums and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packing_frames import DTYPES, ROUND, sparse
from torch import Tensor

from samv2 import _rle
from samv2.common.errors import FrameError
from samv2.updates.packing import (
    CODECS,
    Manifest,
    accumulate_all,
    pack,
    squared_norm,
    unpack,
)
from samv2.updates.sparsify import top_k

ROOT = Path(__file__).parents[2]
OTHERS = [name for name in ("avx512", "avx2", "scalar") if name != _rle.isa]
SIZES = (1, 63, 64, 65, 4097, 66_000)
DENSITIES = (0.002, 0.03, 0.3, 0.6, 0.97, 1.0)


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(
        b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


def update_of(dtype: torch.dtype) -> dict[int, Tensor]:
    return {
        100 * i
        + j: sparse(size, density, seed=i + j, dtype=dtype, span=1 + 15 * (j % 2))
        for i, size in enumerate(SIZES)
        for j, density in enumerate(DENSITIES)
    }


def fingerprints() -> dict[str, str]:
    """What the codec makes of all dtypes and codecs, as digests."""
    found = {}
    for dtype in DTYPES:
        update = update_of(dtype)
        manifest = Manifest.of(update)
        for codec in CODECS:
            for seed in (None, 7):
                frame = pack(
                    update, manifest, round=ROUND, codec=codec, stochastic_seed=seed
                )
                decoded = unpack(frame, manifest, round=ROUND)
                total = {id_: torch.full(t.shape, -0.0) for id_, t in update.items()}
                pairs = [(frame, 0.3), (frame, -1.7)]
                accumulate_all(pairs, manifest, total, round=ROUND)
                key = f"{dtype} {codec} {seed}"
                found[key] = hashlib.sha256(frame).hexdigest()
                found[f"{key} decoded"] = digest(*decoded.values())
                found[f"{key} sum"] = digest(*total.values())
                found[f"{key} norm"] = squared_norm(frame, manifest, round=ROUND).hex()
    floats = update_of(torch.float32)
    found["top_k"] = digest(*top_k(floats, 12_345).values())
    return found


def refusals() -> list[str]:
    """Reasons for one frame with each byte changed in turn, hashes unchanged."""
    update = {0: sparse(900, 0.05, seed=1), 4: sparse(300, 0.9, seed=2)}
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND)
    reasons = []
    for at in range(0, len(frame), 7):
        bad = bytearray(frame)
        bad[at] ^= 1 << (at % 8)
        try:
            unpack(bytes(bad), manifest, round=ROUND)
            reasons.append("accepted")
        except FrameError as error:
            reasons.append(error.reason)
    return reasons


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"SAMV2_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def skip_unless_offered(isa: str) -> None:
    """By a run of its own: a failure may print any text of these tests."""
    if "this machine offers" in run(isa, "-c", "from samv2 import _rle").stderr:
        pytest.skip(f"this machine has no {isa}")


@pytest.mark.parametrize("isa", OTHERS)
def test_every_instruction_set_gives_the_same(isa: str) -> None:
    skip_unless_offered(isa)
    script = (
        "import json, sys; sys.path[:0] = ['.', 'tests/updates'];"
        "from tests.updates.test_packing_isa import _rle, fingerprints, refusals;"
        "print(json.dumps([_rle.isa, fingerprints(), refusals()]))"
    )
    done = run(isa, "-c", script)
    assert done.returncode == 0, done.stderr
    taken, theirs, their_refusals = json.loads(done.stdout)
    assert taken == isa
    assert theirs == fingerprints()
    assert their_refusals == refusals()


@pytest.mark.skipif("SAMV2_ISA" in os.environ, reason="this is the inner run")
@pytest.mark.parametrize("isa", OTHERS)
def test_the_tests_of_the_codec_pass_on_every_instruction_set(isa: str) -> None:
    skip_unless_offered(isa)
    done = run(isa, "-m", "pytest", "-q", "tests/updates", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_instruction_set_is_named_with_what_there_is() -> None:
    done = run("sse9", "-c", "from samv2 import _rle")
    assert done.returncode != 0
    assert "SAMV2_ISA is 'sse9', this machine offers" in done.stderr
    assert "scalar" in done.stderr
