"""Manifests and arguments: fingerprints, and every fault named."""

from __future__ import annotations

import pytest
import torch
from packing_frames import (
    ROUND,
)
from torch import Tensor

from samv2 import _rle
from samv2.updates.packing import (
    Manifest,
    PackError,
    pack,
)


def test_fingerprint_is_the_documented_one_and_tells_manifests_apart() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)
    manifest = Manifest.of({9: b, 2: a})
    document = bytes.fromhex(
        b"samv2-manifest-1".hex()
        + "02000000"
        + "02000000"
        + "00"
        + "02"
        + "0200000000000000"
        + "0300000000000000"
        + "09000000"
        + "02"
        + "01"
        + "0400000000000000"
    )
    assert manifest.fingerprint == _rle.xxh3_64(document)
    others = [{2: a}, {2: a.t(), 9: b}, {3: a, 9: b}, {2: a, 9: b.half()}, {}]
    prints = {Manifest.of(other).fingerprint for other in others}
    assert len(prints | {manifest.fingerprint}) == len(others) + 1


def test_hash_is_xxh3() -> None:
    assert _rle.xxh3_64(b"") == 0x2D06800538D394C2
    xxhash = pytest.importorskip("xxhash")
    for length in (1, 16, 17, 200, 240, 241, 1024, 100_000):
        data = bytes(i * 7 % 251 for i in range(length))
        assert _rle.xxh3_64(data) == xxhash.xxh3_64_intdigest(data)


def test_manifest_lists_every_fault() -> None:
    with pytest.raises(PackError) as error:
        Manifest(ids=(3, 3), shapes=((1,), (-1,)), dtypes=(torch.float32, torch.int8))
    for part in ("id 3 follows id 3", "(-1,)", "torch.int8"):
        assert part in str(error.value)
    with pytest.raises(PackError, match="equally many"):
        Manifest(ids=(3,), shapes=(), dtypes=())
    with pytest.raises(PackError, match="2|4294967295"):
        Manifest.of({2**32: torch.ones(1)})
    with pytest.raises(PackError, match="too large"):
        Manifest(ids=(1,), shapes=((2**40, 2**40),), dtypes=(torch.float32,))
    with pytest.raises(PackError, match="id 8"):
        Manifest.of({}).numel(8)
    assert Manifest.of({4: torch.ones(2, 5)}).numel(4) == 10


@pytest.mark.parametrize(
    ("update", "options", "message"),
    [
        ({1: torch.ones(3)}, {}, "id 1 is not in the manifest"),
        ({0: torch.ones(4)}, {}, "shape"),
        ({0: torch.ones(3).half()}, {}, "dtype"),
        ({}, {"codec": "fp8"}, "codec"),
        ({}, {"codec": "int8", "quant_block": 48}, "quant_block"),
        ({}, {"codec": "int4", "quant_block": 16}, "quant_block"),
        ({}, {"quant_block": 64}, "no scales"),
        ({}, {"block": 1000}, "block"),
        ({}, {"round": -1}, "round"),
        ({}, {"stochastic_seed": 2**64}, "stochastic_seed"),
    ],
)
def test_wrong_arguments_are_named(
    update: dict[int, Tensor], options: dict[str, object], message: str
) -> None:
    manifest = Manifest.of({0: torch.ones(3)})
    arguments = {"round": ROUND} | options
    with pytest.raises(PackError, match=message):
        pack(update, manifest, **arguments)  # type: ignore[arg-type]
