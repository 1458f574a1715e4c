"""Every malformed frame is refused, for its own reason, before anything is written."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from packing_frames import (
    BitString,
    Block,
    Body,
    FrameSpec,
    rehash,
    same_bits,
    sparse,
    verdict_of_both,
)

from samv2.updates import _reference_decoder
from samv2.updates.packing import (
    FrameError,
    Manifest,
    accumulate,
    inspect,
    pack,
    unpack,
)

ROOT = Path(__file__).parents[2]
F32, F16, BF16 = 0, 1, 2
ROUND = 5
MANIFEST = Manifest(
    ids=(3, 7, 9),
    shapes=((100,), (100,), (70_000,)),
    dtypes=(torch.float32, torch.float32, torch.float16),
)


def ones(count: int) -> bytes:
    return struct.pack("<f", 1.0) * count


def gaps(*values: int, k: int = 0) -> bytes:
    stream = BitString()
    for value in values:
        stream.rice(value, k)
    return stream.encode()


def two(**fields: object) -> Body:
    """Elements 1 and 4 of tensor 7 are 1.0; any field replaced."""
    good: dict[str, object] = dict(
        blocks=[Block(3, 2, gaps(1, 2))], values=ones(2), numel=100
    )
    return Body(**(good | fields))  # type: ignore[arg-type]


def frame(*bodies: Body, **header: int) -> bytes:
    return FrameSpec(MANIFEST, bodies, ROUND, header).encode()


def block(**fields: object) -> bytes:
    """``two`` with fields of its only block replaced."""
    good: dict[str, object] = dict(mode=3, n=2, index=gaps(1, 2))
    return frame(two(blocks=[Block(**(good | fields))]))  # type: ignore[arg-type]


def quantised(codes: bytes, scale: float, n: int = 2, **fields: object) -> bytes:
    index = gaps(*[1] * n)
    good: dict[str, object] = dict(
        codec=3,
        quant_log2=5,
        values=codes,
        scales=struct.pack("<f", scale),
        blocks=[Block(3, n, index)],
    )
    return frame(two(**(good | fields)))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def bitmap(*positions: int, size: int = 104) -> bytes:
    bits = np.zeros(size, np.uint8)
    bits[list(positions)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


GOOD = frame(two())
HUGE = 2**64 - 1

MALFORMED: list[tuple[str, str, Callable[[], bytes]]] = [
    ("truncated", "71 bytes", lambda: GOOD[:71]),
    ("truncated", "nothing", lambda: b""),
    ("magic", "another magic", lambda: frame(two(), magic=0x324D5394)),
    ("version", "major 2", lambda: frame(two(), major=2)),
    ("version", "minor 1 with flags", lambda: frame(two(), minor=1)),
    ("flags", "unknown flag", lambda: frame(two(), flags=5)),
    ("flags", "raw but not lossless", lambda: frame(two(), flags=0)),
    ("frame_length", "one more", lambda: frame(two(), frame_len=len(GOOD) + 1)),
    ("frame_length", "2^64 - 1", lambda: frame(two(), frame_len=HUGE)),
    ("tensor_count", "four of three", lambda: frame(*[two()] * 4)),
    ("tensor_count", "2^32 - 1", lambda: frame(two(), n_tensors=2**32 - 1)),
    ("directory_length", "not 32 a tensor", lambda: frame(two(), dir_len=33)),
    (
        "directory_length",
        "past the end",
        lambda: frame(n_tensors=3, dir_len=96),
    ),
    ("header_hash", "flipped hash", lambda: flipped(GOOD, 56)),
    ("header_hash", "flipped directory", lambda: flipped(GOOD, 90)),
    ("reserved", "reserved word", lambda: frame(two(), reserved=1)),
    ("fingerprint", "another manifest", lambda: frame(two(), fingerprint=1)),
    ("round", "another round", lambda: frame(two(), round=6)),
    ("id_order", "duplicate", lambda: frame(two(), two())),
    ("id_order", "falling", lambda: frame(two(), two(id=3))),
    ("dtype", "unknown", lambda: frame(two(dtype=3))),
    ("dtype", "not the manifest's", lambda: frame(two(dtype=F16))),
    ("codec", "unknown", lambda: frame(two(codec=6))),
    ("codec", "the one behind the last", lambda: frame(two(codec=7))),
    ("codec", "f16 of f16", lambda: frame(two(id=9, dtype=F16, codec=2))),
    ("codec", "bf16 of bf16", lambda: frame(two(dtype=BF16, codec=1))),
    ("block_size", "2^11", lambda: frame(two(block_log2=11))),
    ("block_size", "2^17", lambda: frame(two(block_log2=17))),
    ("quant_block", "raw with scales", lambda: frame(two(quant_log2=5))),
    ("quant_block", "2^4", lambda: quantised(b"\1\1", 1.0, quant_log2=4)),
    ("quant_block", "2^13", lambda: quantised(b"\1\1", 1.0, quant_log2=13)),
    ("unknown_id", "id 8", lambda: frame(two(id=8))),
    ("unknown_id", "id 2^32 - 1", lambda: frame(two(id=2**32 - 1))),
    ("numel", "101 of 100", lambda: frame(two(numel=101))),
    ("numel", "2^64 - 1", lambda: frame(two(numel=HUGE))),
    ("nnz", "more than numel", lambda: frame(two(nnz=101))),
    ("nnz", "2^64 - 1", lambda: frame(two(nnz=HUGE))),
    ("total_numel", "off by one", lambda: frame(two(), total_numel=101)),
    ("body_length", "past the end", lambda: frame(two(body_bytes=1000))),
    ("body_length", "2^64 - 1", lambda: frame(two(body_bytes=HUGE))),
    ("body_length", "bytes after the last", lambda: frame(two(body_bytes=39))),
    ("body_length", "bytes after values", lambda: frame(two(tail=b"\0"))),
    (
        "body_length",
        "no presence",
        lambda: frame(
            two(),
            Body(id=9, dtype=1, numel=70_000, body_bytes=0, presence=b"", padding=b""),
        ),
    ),
    (
        "body_length",
        "no descriptors",
        lambda: frame(two(blocks=(), values=b"", padding=b"")),
    ),
    ("body_length", "values missing", lambda: frame(two(values=ones(1)))),
    ("body_hash", "flipped value", lambda: flipped(GOOD, len(GOOD) - 9)),
    ("body_hash", "flipped trailer", lambda: flipped(GOOD, len(GOOD) - 1)),
    ("presence_padding", "spare bit", lambda: frame(two(presence=b"\x03"))),
    ("mode", "absent", lambda: block(mode=0)),
    ("mode", "six", lambda: block(mode=6)),
    ("mode", "seven", lambda: block(mode=7)),
    ("descriptor_reserved", "spare word", lambda: block(spare=1)),
    ("rice_parameter", "k1 in mode 3", lambda: block(k=0x10)),
    (
        "rice_parameter",
        "k0 in a bitmap",
        lambda: block(mode=2, index=bitmap(1, 4), k=1),
    ),
    (
        "block_count",
        "more than the block",
        lambda: frame(two(nnz=100, blocks=[Block(3, 101, gaps(1))])),
    ),
    ("block_count", "full but not dense", lambda: block(n=100)),
    ("block_count", "dense but not full", lambda: block(mode=1, index=b"")),
    ("index_length", "dense with index", lambda: block(mode=1, n=100)),
    ("index_length", "short bitmap", lambda: block(mode=2, index=bytes(12))),
    ("index_length", "longer than a bitmap", lambda: block(index=bytes(14))),
    ("nnz_sum", "descriptor says 2", lambda: frame(two(nnz=3))),
    ("padding", "not zero", lambda: frame(two(padding=b"\1"))),
    ("index_overrun", "no stream", lambda: block(index=b"")),
    ("index_overrun", "one code of two", lambda: block(index=gaps(7))),
    ("index_overrun", "cut remainder", lambda: block(index=b"\x01", k=8)),
    ("unary", "past the cap", lambda: block(index=gaps(20, 0), k=3)),
    ("unary", "only zeros", lambda: block(index=bytes(12), k=2)),
    (
        "index_range",
        "gaps add up to 100",
        lambda: block(index=gaps(50, 49, k=4), k=4),
    ),
    (
        "index_range",
        "span past the end",
        lambda: block(mode=5, index=gaps(99, k=4), k=4),
    ),
    ("index_padding", "spare bits", lambda: block(index=b"\xf2")),
    (
        "index_padding",
        "spare bits of a bitmap",
        lambda: block(mode=2, index=bitmap(1, 101)),
    ),
    ("index_unused", "spare byte", lambda: block(index=gaps(1, 2) + b"\0")),
    (
        "bitmap_count",
        "three of two",
        lambda: block(mode=2, index=bitmap(1, 4, 9)),
    ),
    ("span_length", "all coded", lambda: block(mode=5, index=gaps(1, 1, 0))),
    (
        "nonfinite",
        "NaN",
        lambda: frame(two(values=ones(1) + struct.pack("<f", np.nan))),
    ),
    (
        "nonfinite",
        "infinite bf16 code",
        lambda: frame(two(codec=1, values=b"\x80\x3f\x80\x7f")),
    ),
    (
        "nonfinite",
        "bf16 code beyond float16",
        lambda: frame(
            two(
                id=9,
                dtype=F16,
                codec=1,
                numel=70_000,
                presence=b"\x01\0\0",
                values=b"\x80\x3f\x80\x47",
            )
        ),
    ),
    ("zero_value", "raw zero", lambda: frame(two(values=ones(1) + bytes(4)))),
    (
        "empty_block",
        "dense zeros",
        lambda: frame(two(blocks=[Block(1, 100)], values=bytes(400))),
    ),
    ("scale", "negative", lambda: quantised(b"\1\1", -1.0)),
    ("scale", "negative zero", lambda: quantised(b"\0\0", -0.0)),
    ("scale", "NaN", lambda: quantised(b"\1\1", np.nan)),
    ("scale", "infinite", lambda: quantised(b"\0\0", np.inf)),
    ("scale", "infinite highest level", lambda: quantised(b"\1\1", 1e37)),
    ("code", "int8 -128", lambda: quantised(b"\x80\1", 1.0)),
    ("code", "int4 -8", lambda: quantised(b"\x18", 1.0, codec=5)),
    ("zero_scale", "code 1", lambda: quantised(b"\1\1", 0.0)),
    ("zero_scale", "nf4 zero is code 7", lambda: quantised(b"\x07", 0.0, codec=4)),
    ("scale", "nf4 infinite", lambda: quantised(b"\x77", float("inf"), codec=4)),
    ("value_padding", "odd nf4", lambda: quantised(b"\x77\x77", 1.0, n=3, codec=4)),
    ("value_padding", "odd int4", lambda: quantised(b"\x11\x11", 1.0, n=3, codec=5)),
]


@pytest.mark.parametrize(
    ("reason", "build"),
    [pytest.param(r, build, id=f"{r}-{what}") for r, what, build in MALFORMED],
)
def test_malformed_frame_is_refused_with_its_reason(
    reason: str, build: Callable[[], bytes]
) -> None:
    data = build()
    with pytest.raises(FrameError) as refusal:
        unpack(data, MANIFEST, round=ROUND)
    assert refusal.value.reason == reason, refusal.value
    with pytest.raises(FrameError) as refusal:
        _reference_decoder.decode(data, MANIFEST, round=ROUND)
    assert refusal.value.reason == reason, refusal.value


def test_the_frame_that_the_malformed_ones_start_from_is_good() -> None:
    decoded = unpack(GOOD, MANIFEST, round=ROUND)
    expected = torch.zeros(100)
    expected[[1, 4]] = 1.0
    assert list(decoded) == [7]
    assert same_bits(decoded[7], expected)
    good = quantised(b"\x7f\x81", 0.5)
    assert unpack(good, MANIFEST, round=ROUND)[7].sum() == 0
    assert unpack(frame(two(), minor=1, flags=0), MANIFEST, round=ROUND)


def test_every_reason_is_tested_documented_and_used() -> None:
    tested = {reason for reason, _, _ in MALFORMED}
    document = (ROOT / "docs" / "wire_format.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", document, re.MULTILINE))
    sources = "".join(p.read_text() for p in (ROOT / "csrc").glob("*.*"))
    used = set(re.findall(r'(?:Refused|refuse)\(\s*"(\w+)"', sources))
    used |= set(re.findall(r'expect\([^;"]*?"(\w+)"', sources))
    used |= set(re.findall(r'(?:return |fail\(|refuse\()\{"(\w+)"', sources))
    assert tested == documented == used


def test_total_of_element_counts_cannot_overflow() -> None:
    bodies = (Body(id=3, numel=HUGE), Body(id=7, numel=HUGE))
    with pytest.raises(FrameError) as refusal:
        inspect(frame(*bodies))
    assert refusal.value.reason == "total_numel"


def test_inspect_pays_nothing_for_a_claimed_size() -> None:
    with pytest.raises(FrameError) as refusal:
        inspect(frame(Body(id=3, numel=2**63)))
    assert refusal.value.reason == "body_length"


def small_frames() -> list[tuple[bytes, Manifest]]:
    update = {
        1: sparse(300, 0.05, seed=1).reshape(3, 100),
        4: sparse(90, 0.5, seed=2, dtype=torch.bfloat16),
        6: sparse(120, 1.0, seed=3, dtype=torch.float16),
        8: sparse(400, 0.3, seed=4, span=20),
        9: sparse(200, 0.97, seed=5),
        11: torch.zeros(0, 5),
        12: torch.zeros(17),
    }
    manifest = Manifest.of(update)
    codecs = ("raw", "bf16", "f16", "int8", "nf4", "int4")
    return [
        (pack(update, manifest, round=ROUND, codec=codec), manifest) for codec in codecs
    ]


def test_every_truncation_is_refused() -> None:
    for data, manifest in small_frames()[::3]:
        for length in range(len(data)):
            with pytest.raises(FrameError):
                unpack(data[:length], manifest, round=ROUND)


def test_appended_bytes_are_refused() -> None:
    for data, manifest in small_frames():
        with pytest.raises(FrameError):
            unpack(data + b"\0", manifest, round=ROUND)


def test_every_single_byte_flip_is_refused() -> None:
    rng = np.random.default_rng(0)
    for data, manifest in small_frames():
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= int(rng.integers(1, 256))
            with pytest.raises(FrameError):
                unpack(bytes(changed), manifest, round=ROUND)
            with pytest.raises(FrameError):
                inspect(bytes(changed))


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three random edits with right hashes, biased towards the small fields."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        limit = len(data) if rng.random() < 0.7 else min(len(data), 700)
        at = int(rng.integers(0, limit))
        kind = rng.integers(0, 3)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            changed[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        else:
            changed[at] = int(rng.integers(0, 256))
    if rng.random() < 0.1:
        changed = changed[: int(rng.integers(0, len(changed)))]
    return rehash(bytes(changed))


@pytest.mark.parametrize("allow_nonfinite", [False, True])
def test_mutations_with_right_hashes_agree_with_the_reference(
    allow_nonfinite: bool,
) -> None:
    rng = np.random.default_rng(20 + allow_nonfinite)
    reasons: set[str] = set()
    accepted = 0
    for data, manifest in small_frames():
        for _ in range(250):
            changed = mutated(data, rng)
            verdict = verdict_of_both(
                changed, manifest, round=ROUND, allow_nonfinite=allow_nonfinite
            )
            if isinstance(verdict, str):
                reasons.add(verdict)
            else:
                accepted += 1
    assert len(reasons) > 15 and accepted > 50


def test_mutated_index_streams_stay_in_bounds() -> None:
    """Large blocks of every mode, random bytes in the index plane, right hashes."""
    rng = np.random.default_rng(3)
    parts = [
        sparse(65536, 0.01, seed=1),
        sparse(65536, 0.9, seed=2),
        sparse(65536, 0.3, seed=3, span=100),
        sparse(65536, 0.5, seed=4),
    ]
    update = {0: torch.cat(parts)}
    manifest = Manifest.of(update)
    data = pack(update, manifest, round=ROUND)
    info = inspect(data).tensors[0]
    assert all(info.modes[m] for m in ("rice", "rice_zeros", "runs", "bitmap"))
    index = 96 + 1 + 8 * 4
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 40)):
            at = index + int(rng.integers(0, info.index_bytes))
            changed[at] = int(rng.choice([0, 0, 255, rng.integers(0, 256)]))
        with contextlib.suppress(FrameError):
            unpack(rehash(bytes(changed)), manifest, round=ROUND)


def test_refused_frame_leaves_the_accumulator_untouched() -> None:
    """The fault is the very last value, behind good tensors."""
    update = {0: sparse(5000, 0.1, seed=0), 1: torch.tensor([0.0, torch.nan])}
    manifest = Manifest.of(update)
    data = pack(update, manifest, round=ROUND)
    accumulator = {i: torch.full_like(t, 2.0) for i, t in update.items()}
    with pytest.raises(FrameError) as refusal:
        accumulate(data, manifest, 1.0, accumulator, round=ROUND)
    assert refusal.value.reason == "nonfinite"
    assert all((t == 2.0).all() for t in accumulator.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nonfinite_values_pass_only_when_allowed(
    value: float, dtype: torch.dtype
) -> None:
    update = {0: torch.tensor([1.0, value, 0.0], dtype=dtype)}
    manifest = Manifest.of(update)
    data = pack(update, manifest, round=ROUND)
    with pytest.raises(FrameError) as refusal:
        unpack(data, manifest, round=ROUND)
    assert refusal.value.reason == "nonfinite"
    decoded = unpack(data, manifest, round=ROUND, allow_nonfinite=True)
    assert same_bits(decoded[0], update[0])
