"""The wire format as readable Python: a specification in code, and a judge in tests.

Decodes exactly the frames that the C++ codec decodes, to the same bits, and refuses the
others for the same reason. It is slow: one Python step per code. Nothing in the product
calls it. Section numbers are those of docs/wire_format.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from samv2 import _rle
from samv2.common.errors import FrameError
from samv2.updates.manifest import DTYPE_CODES, Manifest

RAW, BF16, F16, INT8, NF4, INT4 = 0, 1, 2, 3, 4, 5
DENSE, BITMAP, GAPS, CLEAR_GAPS, SPANS = 1, 2, 3, 4, 5
LEVELS = {INT8: 127, NF4: 1, INT4: 7}
ZERO_CODE = {INT8: 0, NF4: 7, INT4: 0}
NF4_CODEBOOK = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
FLOAT_DTYPE = {BF16: torch.bfloat16, F16: torch.float16}
SOURCE_DTYPE = {code: dtype for dtype, code in DTYPE_CODES.items()}


def require(holds: bool, reason: str) -> None:
    """Refuses the frame with ``reason`` unless ``holds``."""
    if not holds:
        raise FrameError(reason, f"the reference decoder refuses this frame: {reason}")


@dataclass(frozen=True)
class Entry:
    """A directory entry (section 3)."""

    id: int
    dtype: int
    codec: int
    block_log2: int
    quant_log2: int
    numel: int
    nnz: int
    body_bytes: int

    @property
    def quantised(self) -> bool:
        return self.codec in LEVELS

    @property
    def value_bytes(self) -> int:
        if self.codec in (NF4, INT4):
            return (self.nnz + 1) // 2
        width = {RAW: 4 if self.dtype == 0 else 2, BF16: 2, F16: 2, INT8: 1}
        return width[self.codec] * self.nnz

    @property
    def scales(self) -> int:
        return -(-self.nnz // (1 << self.quant_log2)) if self.quantised else 0


@dataclass(frozen=True)
class Block:
    """A block descriptor (section 4), with its place in tensor and frame."""

    begin: int
    elements: int
    mode: int
    k0: int
    k1: int
    n: int
    index: bytes


@dataclass(frozen=True)
class Body:
    """A body whose layout was checked (section 4)."""

    blocks: list[Block]
    values: bytes
    scales: bytes


def decode(
    frame: bytes, manifest: Manifest, *, round: int, allow_nonfinite: bool = False
) -> dict[int, Tensor]:
    """The same contract as :func:`samv2.updates.packing.unpack`."""
    entries = read_header(frame, manifest, round)
    at = 64 + 32 * len(entries)
    bodies = []
    for entry in entries:
        bodies.append(read_layout(frame, at, entry))
        at += entry.body_bytes
    result = {}
    for entry, body in zip(entries, bodies, strict=True):
        flat = decode_tensor(entry, body, allow_nonfinite)
        result[entry.id] = flat.reshape(manifest.shapes[manifest.position(entry.id)])
    return result


def read_header(frame: bytes, manifest: Manifest, round: int) -> list[Entry]:
    """Header, hashes and directory, in the order of section 6."""
    require(len(frame) >= 72, "truncated")
    require(frame[:4] == b"\x93SM\x32", "magic")
    major, minor, flags, length, tensors, directory, total = struct.unpack_from(
        "<BBHQIIQ", frame, 4
    )
    fingerprint, wire_round, reserved, digest = struct.unpack_from("<QQQQ", frame, 32)
    require(major == 1 and (minor == 0 or flags == 0), "version")
    require(flags & ~3 == 0, "flags")
    require(length == len(frame), "frame_length")
    require(tensors <= len(manifest.ids), "tensor_count")
    require(directory == 32 * tensors, "directory_length")
    require(directory <= len(frame) - 72, "directory_length")
    bodies = 64 + directory
    require(_rle.xxh3_64(frame[:56] + frame[64:bodies]) == digest, "header_hash")
    require(reserved == 0, "reserved")
    require(fingerprint == manifest.fingerprint, "fingerprint")
    require(wire_round == round, "round")

    entries: list[Entry] = []
    room = len(frame) - bodies - 8
    for i in range(tensors):
        entry = Entry(*struct.unpack_from("<IBBBBQQQ", frame, 64 + 32 * i))
        require(not entries or entry.id > entries[-1].id, "id_order")
        check_entry(entry, manifest)
        require(entry.body_bytes <= room, "body_length")
        room -= entry.body_bytes
        entries.append(entry)
    require(room == 0, "body_length")
    require(sum(entry.numel for entry in entries) == total, "total_numel")
    lossless = all(entry.codec == RAW for entry in entries)
    require(minor != 0 or bool(flags & 1) == lossless, "flags")
    (body_digest,) = struct.unpack_from("<Q", frame, len(frame) - 8)
    require(_rle.xxh3_64(frame[bodies:-8]) == body_digest, "body_hash")
    return entries


def check_entry(entry: Entry, manifest: Manifest) -> None:
    """What one directory entry may say (section 3)."""
    require(entry.dtype in (0, 1, 2), "dtype")
    require(entry.codec in (RAW, BF16, F16, INT8, NF4, INT4), "codec")
    source = SOURCE_DTYPE[entry.dtype]
    require(FLOAT_DTYPE.get(entry.codec) != source, "codec")
    require(12 <= entry.block_log2 <= 16, "block_size")
    quant_ok = 5 <= entry.quant_log2 <= 12 if entry.quantised else entry.quant_log2 == 0
    require(quant_ok, "quant_block")
    require(entry.id in manifest.ids, "unknown_id")
    require(source == manifest.dtypes[manifest.position(entry.id)], "dtype")
    require(entry.numel == manifest.numel(entry.id), "numel")
    require(entry.nnz <= entry.numel, "nnz")


def read_layout(frame: bytes, begin: int, entry: Entry) -> Body:
    """Presence bits, descriptors and the lengths they imply (section 4)."""
    at, end = begin, begin + entry.body_bytes

    def take(count: int) -> bytes:
        nonlocal at
        require(count <= end - at, "body_length")
        at += count
        return frame[at - count : at]

    size = 1 << entry.block_log2
    count = -(-entry.numel // size)
    presence = int.from_bytes(take((count + 7) // 8), "little")
    require(presence >> count == 0, "presence_padding")
    descriptors = take(8 * presence.bit_count())
    present = [b for b in range(count) if presence >> b & 1]
    rows: list[tuple[Block, int]] = []
    for nth, b in enumerate(present):
        mode, k, n, index_bytes, spare = struct.unpack_from(
            "<BBHHH", descriptors, 8 * nth
        )
        elements = min(size, entry.numel - b * size)
        check_descriptor(mode, k & 15, k >> 4, n + 1, index_bytes, spare, elements)
        block = Block(b * size, elements, mode, k & 15, k >> 4, n + 1, b"")
        rows.append((block, index_bytes))
    require(sum(block.n for block, _ in rows) == entry.nnz, "nnz_sum")
    streams = take(sum(index_bytes for _, index_bytes in rows))
    require(not any(take(-at % 64)), "padding")
    values, scales = take(entry.value_bytes), take(4 * entry.scales)
    require(at == end, "body_length")

    blocks = []
    cursor = 0
    for block, index_bytes in rows:
        blocks.append(replace(block, index=streams[cursor : cursor + index_bytes]))
        cursor += index_bytes
    return Body(blocks, values, scales)


def check_descriptor(
    mode: int, k0: int, k1: int, n: int, index_bytes: int, spare: int, elements: int
) -> None:
    """What one block descriptor may say (section 4)."""
    require(DENSE <= mode <= SPANS, "mode")
    require(spare == 0, "descriptor_reserved")
    require(k0 == 0 or mode in (GAPS, CLEAR_GAPS, SPANS), "rice_parameter")
    require(k1 == 0 or mode == SPANS, "rice_parameter")
    require(n == elements if mode == DENSE else n < elements, "block_count")
    bitmap = (elements + 7) // 8
    if mode == DENSE:
        require(index_bytes == 0, "index_length")
    elif mode == BITMAP:
        require(index_bytes == bitmap, "index_length")
    else:
        require(index_bytes <= bitmap, "index_length")


class Bits:
    """An index stream as one big integer, least significant bit first (section 5)."""

    def __init__(self, data: bytes) -> None:
        self.value = int.from_bytes(data, "little")
        self.left = 8 * len(data)

    def rice(self, k: int, elements: int) -> int:
        """The next Rice code: q zeros, a one, then k low bits; the value q * 2^k + low."""
        ends = self.value == 0
        quotient = self.left if ends else (self.value & -self.value).bit_length() - 1
        require(quotient <= elements >> k, "unary")
        require(not ends, "index_overrun")
        self.skip(quotient + 1)
        low = self.value & ((1 << k) - 1)
        self.skip(k)
        return quotient << k | low

    def skip(self, count: int) -> None:
        require(count <= self.left, "index_overrun")
        self.value >>= count
        self.left -= count

    @property
    def exhausted(self) -> bool:
        return self.left < 8 and self.value == 0

    def finish(self) -> None:
        require(self.left < 8, "index_unused")
        require(self.value == 0, "index_padding")


def decode_index(block: Block) -> np.ndarray:
    """Rising positions of the set elements within the block, int64 (section 5)."""
    if block.mode == DENSE:
        return np.arange(block.elements)
    if block.mode == BITMAP:
        bits = np.unpackbits(np.frombuffer(block.index, np.uint8), bitorder="little")
        require(not bits[block.elements :].any(), "index_padding")
        require(int(bits.sum()) == block.n, "bitmap_count")
        return np.flatnonzero(bits)
    if block.mode == SPANS:
        return decode_spans(block)
    stream = Bits(block.index)
    codes = block.n if block.mode == GAPS else block.elements - block.n
    found = []
    position = -1
    for _ in range(codes):
        position += stream.rice(block.k0, block.elements) + 1
        require(position < block.elements, "index_range")
        found.append(position)
    stream.finish()
    if block.mode == GAPS:
        return np.array(found, dtype=np.int64)
    return np.setdiff1d(np.arange(block.elements), found)


def decode_spans(block: Block) -> np.ndarray:
    """Mode 5: zero-span, span, zero-span, ..., the last span implied (section 5)."""
    stream = Bits(block.index)
    spans: list[np.ndarray] = []
    position, left = 0, block.n
    while left:
        position += stream.rice(block.k0, block.elements) + (1 if spans else 0)
        length = left
        if not stream.exhausted:
            length = stream.rice(block.k1, block.elements) + 1
            require(length < left, "span_length")
        require(position + length <= block.elements, "index_range")
        spans.append(np.arange(position, position + length))
        position += length
        left -= length
    stream.finish()
    return np.concatenate(spans)


def decode_tensor(entry: Entry, body: Body, allow_nonfinite: bool) -> Tensor:
    """A flat tensor of the source dtype (section 5 for places, section 7 for values)."""
    source = SOURCE_DTYPE[entry.dtype]
    bits = torch.int32 if entry.dtype == 0 else torch.int16
    flat = torch.zeros(entry.numel, dtype=bits)
    values = decode_raw(entry, body) if entry.codec == RAW else None
    places = []
    start = 0
    for block in body.blocks:
        places.append(torch.from_numpy(block.begin + decode_index(block)))
        if values is not None:
            check_raw(values[start : start + block.n], source, block, allow_nonfinite)
        start += block.n
    if values is None:
        values = decode_lossy(entry, body, allow_nonfinite)
    if places:
        flat[torch.cat(places)] = values
    return flat.view(source)


def as_tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)


def decode_raw(entry: Entry, body: Body) -> Tensor:
    return as_tensor(body.values, torch.int32 if entry.dtype == 0 else torch.int16)


def check_raw(
    bits: Tensor, source: torch.dtype, block: Block, allow_nonfinite: bool
) -> None:
    """A stored raw value is not zero, except among others in a dense block."""
    finite = bool(torch.isfinite(bits.view(source)).all())
    require(allow_nonfinite or finite, "nonfinite")
    if block.mode == DENSE:
        require(bool((bits != 0).any()), "empty_block")
    else:
        require(bool((bits != 0).all()), "zero_value")


def decode_lossy(entry: Entry, body: Body, allow_nonfinite: bool) -> Tensor:
    """Values as bits of the source dtype: code to float32, then round to the source."""
    source = SOURCE_DTYPE[entry.dtype]
    if entry.quantised:
        values = decode_quantised(entry, body, source)
    else:
        values = as_tensor(body.values, FLOAT_DTYPE[entry.codec]).float().to(source)
        finite = bool(torch.isfinite(values).all())
        require(allow_nonfinite or finite, "nonfinite")
    return values.view(torch.int32 if entry.dtype == 0 else torch.int16)


def decode_quantised(entry: Entry, body: Body, source: torch.dtype) -> Tensor:
    """Absmax codes: value = level of the code * scale of its quantisation block."""
    levels = LEVELS[entry.codec]
    scales = as_tensor(body.scales, torch.float32)
    highest = (scales * levels).to(source)
    positive = as_tensor(body.scales, torch.int32) >= 0
    require(bool(torch.isfinite(highest).all() and positive.all()), "scale")
    if entry.codec == INT8:
        codes = as_tensor(body.values, torch.int8).int()
        spare = 0
    else:
        both = as_tensor(body.values, torch.uint8).int()
        nibbles = torch.stack([both & 15, both >> 4], dim=1).reshape(-1)
        spare = int(nibbles[entry.nnz :].sum())
        codes = nibbles[: entry.nnz]
        if entry.codec == INT4:
            codes = codes - ((codes & 8) << 1)
    size = 1 << entry.quant_log2
    for block in range(math.ceil(entry.nnz / size)):
        part = codes[block * size : (block + 1) * size]
        require(entry.codec == NF4 or bool((part >= -levels).all()), "code")
        zeros = bool((part == ZERO_CODE[entry.codec]).all())
        require(bool(scales[block] != 0) or zeros, "zero_scale")
    require(spare == 0, "value_padding")
    per_value = scales.repeat_interleave(size)[: entry.nnz]
    factors = NF4_CODEBOOK[codes.long()] if entry.codec == NF4 else codes.float()
    return (factors * per_value).to(source)
