"""What the surroundings of a call may be: other threads, float modes, shared memory."""

from __future__ import annotations


import pytest
import torch
from packing_frames import ROUND, same_bits, sparse

from samv2.common.errors import FrameError
from samv2.updates.packing import (
    Manifest,
    pack,
    unpack,
)



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
