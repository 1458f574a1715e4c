"""Frames for tests: updates with a given structure, and frames built field by field."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor

from samv2 import _rle
from samv2.updates import _reference_decoder
from samv2.updates.packing import FrameError, Manifest, inspect, pack, unpack

ROUND = 11
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
bounded = settings(deadline=None, max_examples=60, derandomize=True)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16}
BITS[torch.bfloat16] = torch.int16


def bits_of(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor, flat."""
    return tensor.contiguous().reshape(-1).view(BITS[tensor.dtype])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal shapes, dtypes and bit patterns (NaN payloads and zero signs included)."""
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(bits_of(left), bits_of(right))
    )


def sparse(
    numel: int,
    density: float,
    *,
    seed: int = 0,
    span: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gaussian values in spans of ``span`` elements, +0.0 elsewhere."""
    rng = np.random.default_rng(seed)
    keep = np.repeat(rng.random(-(-numel // span)) < density, span)[:numel]
    values = rng.standard_normal(numel, dtype=np.float32)
    values[values == 0] = 1
    tensor = torch.from_numpy(np.where(keep, values, np.float32(0)))
    return tensor.to(dtype)


def round_trip(update: dict[int, Tensor], **options: object) -> dict[int, Tensor]:
    """Packs, unpacks with C++ and with the reference, and holds the two together."""
    manifest = Manifest.of(update)
    frame = pack(update, manifest, round=ROUND, **options)  # type: ignore[arg-type]
    decoded = unpack(frame, manifest, round=ROUND, allow_nonfinite=True)
    reference = _reference_decoder.decode(
        frame, manifest, round=ROUND, allow_nonfinite=True
    )
    assert list(decoded) == list(reference) == sorted(update)
    for id_ in update:
        assert same_bits(decoded[id_], reference[id_])
    return decoded


def assert_lossless(update: dict[int, Tensor], **options: object) -> None:
    decoded = round_trip(update, **options)
    for id_, tensor in update.items():
        assert same_bits(decoded[id_], tensor)


def from_bits(patterns: list[int], dtype: torch.dtype) -> Tensor:
    kind = np.uint32 if dtype == torch.float32 else np.uint16
    return torch.from_numpy(np.array(patterns, kind)).view(dtype)


def modes_of(tensor: Tensor, **options: object) -> dict[str, int]:
    """Modes that occur in the frame of one tensor, with their numbers of blocks."""
    update = {0: tensor}
    frame = pack(update, Manifest.of(update), round=ROUND, **options)  # type: ignore[arg-type]
    modes = inspect(frame).tensors[0].modes
    return {mode: count for mode, count in modes.items() if count}


@dataclass
class Block:
    """One present block: descriptor fields and index stream."""

    mode: int
    n: int
    index: bytes = b""
    k: int = 0
    spare: int = 0
    index_bytes: int | None = None


@dataclass
class Body:
    """One tensor; None means: whatever is right."""

    id: int = 7
    dtype: int = 0
    codec: int = 0
    block_log2: int = 12
    quant_log2: int = 0
    numel: int = 100
    nnz: int | None = None
    body_bytes: int | None = None
    presence: bytes = b"\x01"
    blocks: Sequence[Block] = ()
    values: bytes = b""
    scales: bytes = b""
    padding: bytes = b"\0"
    tail: bytes = b""

    def encode(self, offset: int) -> bytes:
        data = self.presence
        for b in self.blocks:
            length = len(b.index) if b.index_bytes is None else b.index_bytes
            data += struct.pack("<BBHHH", b.mode, b.k, b.n - 1, length, b.spare)
        data += b"".join(b.index for b in self.blocks)
        data += self.padding * (-(offset + len(data)) % 64)
        return data + self.values + self.scales + self.tail


@dataclass
class FrameSpec:
    """A whole frame; ``header`` overrides header fields by name."""

    manifest: Manifest
    bodies: Sequence[Body]
    round: int = 5
    header: dict[str, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        count = len(self.bodies)
        directory, bodies = b"", b""
        for body in self.bodies:
            data = body.encode(64 + 32 * count + len(bodies))
            nnz = sum(b.n for b in body.blocks) if body.nnz is None else body.nnz
            length = len(data) if body.body_bytes is None else body.body_bytes
            directory += struct.pack(
                "<IBBBBQQQ",
                body.id,
                body.dtype,
                body.codec,
                body.block_log2,
                body.quant_log2,
                body.numel,
                nnz,
                length,
            )
            bodies += data
        fields = {
            "magic": 0x324D5393,
            "major": 1,
            "minor": 0,
            "flags": int(all(body.codec == 0 for body in self.bodies)),
            "frame_len": 72 + len(directory) + len(bodies),
            "n_tensors": count,
            "dir_len": len(directory),
            "total_numel": sum(body.numel for body in self.bodies) % 2**64,
            "fingerprint": self.manifest.fingerprint,
            "round": self.round,
            "reserved": 0,
        } | self.header
        header = struct.pack("<IBBHQIIQQQQQ", *fields.values(), 0)
        return rehash(header + directory + bodies + bytes(8))


def rehash(frame: bytes) -> bytes:
    """The frame with both hashes made right, as far as its lengths allow."""
    data = bytearray(frame)
    if len(data) < 72:
        return bytes(data)
    (directory,) = struct.unpack_from("<I", data, 20)
    bodies = min(64 + directory, len(data) - 8)
    digest = _rle.xxh3_64(bytes(data[:56] + data[64:bodies]))
    struct.pack_into("<Q", data, 56, digest)
    struct.pack_into("<Q", data, len(data) - 8, _rle.xxh3_64(bytes(data[bodies:-8])))
    return bytes(data)


Verdict = dict[int, Tensor] | str
"""Decoded tensors, or the reason of a refusal."""


def verdict_of_both(
    frame: bytes, manifest: Manifest, *, round: int, allow_nonfinite: bool
) -> Verdict:
    """What the C++ codec says of a frame; the reference must say the same.

    NaN payloads may differ: a conversion between formats need not keep them.
    """

    def verdict(decode: Callable[..., dict[int, Tensor]]) -> Verdict:
        try:
            return decode(frame, manifest, round=round, allow_nonfinite=allow_nonfinite)
        except FrameError as refusal:
            return refusal.reason

    found, wanted = verdict(unpack), verdict(_reference_decoder.decode)
    if isinstance(found, str) or isinstance(wanted, str):
        assert found == wanted
        return found
    assert found.keys() == wanted.keys()
    for id_, tensor in found.items():
        nan = tensor.isnan() & wanted[id_].isnan()
        assert same_bits(tensor.masked_fill(nan, 0), wanted[id_].masked_fill(nan, 0))
    return found


class BitString:
    """Builds index streams by hand: bits in stream order, then bytes."""

    def __init__(self) -> None:
        self.bits: list[int] = []

    def rice(self, value: int, k: int) -> BitString:
        self.bits += [0] * (value >> k) + [1]
        self.bits += [value >> i & 1 for i in range(k)]
        return self

    def raw(self, *bits: int) -> BitString:
        self.bits += bits
        return self

    def encode(self) -> bytes:
        return np.packbits(np.array(self.bits, np.uint8), bitorder="little").tobytes()
