"""What a frame states about itself, read without a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from samv2 import _rle
from samv2.updates.manifest import DTYPE_CODES

CODECS: Mapping[str, int] = {
    "raw": 0,
    "bf16": 1,
    "f16": 2,
    "int8": 3,
    "nf4": 4,
    "int4": 5,
}
"""Value codecs by name; ``raw`` is bit-exact, the others are lossy."""

MODES = ("absent", "dense", "bitmap", "rice", "rice_zeros", "runs")
"""Names of the block modes, in the order of their codes."""

Frame = bytes | bytearray | memoryview
"""Mutable frames are copied once, so nobody can change them while they are read."""

_CODEC_NAMES = {code: name for name, code in CODECS.items()}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a frame, as its directory entry and block descriptors state."""

    id: int
    """Tensor id of the manifest."""
    dtype: torch.dtype
    """Source dtype, which is the dtype of the decoded tensor."""
    codec: str
    """Value codec, a key of :data:`CODECS`."""
    numel: int
    """Elements, zeros included."""
    nnz: int
    """Stored values: the set elements, and all elements of dense blocks."""
    block: int
    """Elements a block."""
    quant_block: int | None
    """Stored values a scale; None for codecs without scales."""
    index_bytes: int
    """Bytes of all index streams."""
    value_bytes: int
    """Bytes of the value plane."""
    scale_bytes: int
    """Bytes of the scales."""
    body_bytes: int
    """All bytes of the body: the three above, presence bits, descriptors, padding."""
    modes: Mapping[str, int]
    """Number of blocks per mode; every key of :data:`MODES` is there."""


@dataclass(frozen=True, kw_only=True)
class FrameInfo:
    """What a frame states about itself; see :func:`inspect`."""

    version: tuple[int, int]
    """Major and minor version."""
    round: int
    """Round the frame was packed for."""
    fingerprint: int
    """Fingerprint of the manifest it was packed with."""
    lossless: bool
    """True if every tensor is stored bit for bit."""
    error_feedback: bool
    """True if the sender keeps what the codec lost for a later round."""
    tensors: tuple[TensorInfo, ...]
    """The tensors, by rising id."""
    total_bytes: int
    """Length of the frame in bytes."""


def inspect(frame: Frame) -> FrameInfo:
    """Describes a frame without a manifest, for logs and tests.

    Checks hashes, directory and block layout, but neither index streams nor values, and
    compares nothing with a manifest or round. Takes memory in proportion to the frame.

    Raises:
        FrameError: the header, directory or layout is malformed.
    """
    data = immutable(frame)
    minor, flags, fingerprint, round_, rows = _rle.inspect(data)
    return FrameInfo(
        version=(1, minor),
        round=round_,
        fingerprint=fingerprint,
        lossless=bool(flags & 1),
        error_feedback=bool(flags & 2),
        tensors=tuple(
            TensorInfo(
                id=id_,
                dtype=_DTYPES[dtype],
                codec=_CODEC_NAMES[codec],
                numel=numel,
                nnz=nnz,
                block=1 << block_log2,
                quant_block=1 << quant_log2 if quant_log2 else None,
                index_bytes=index_bytes,
                value_bytes=value_bytes,
                scale_bytes=scale_bytes,
                body_bytes=body_bytes,
                modes=dict(zip(MODES, modes, strict=True)),
            )
            for (
                id_,
                dtype,
                codec,
                block_log2,
                quant_log2,
                numel,
                nnz,
                index_bytes,
                value_bytes,
                scale_bytes,
                body_bytes,
                modes,
            ) in rows
        ),
        total_bytes=len(data),
    )


def verify(frame: Frame) -> None:
    """Checks all of a frame that its own header allows, index streams and values too.

    What :func:`inspect` leaves out; only a receiver can compare with its manifest and
    round. Takes a constant amount of memory beyond the frame, and time in proportion to
    the elements that the frame states: for a person's own files.

    Raises:
        FrameError: a receiver would refuse the frame whatever its manifest.
    """
    data = immutable(frame)
    info = inspect(data)
    _rle.accumulate(
        [(data, 0.0)],
        [(t.id, DTYPE_CODES[t.dtype], t.numel) for t in info.tensors],
        fingerprint=info.fingerprint,
        round=info.round,
        allow_nonfinite=False,
        accumulators={},
        skip={t.id for t in info.tensors},
    )


def squared_norms(frame: Frame) -> dict[int, float]:
    """{id: sum of squares of a tensor's values}, as :func:`verify` reads them.

    Raises:
        FrameError: a receiver would refuse the frame whatever its manifest.
    """
    data = immutable(frame)
    info = inspect(data)
    return _rle.squared_norms(
        data,
        [(t.id, DTYPE_CODES[t.dtype], t.numel) for t in info.tensors],
        fingerprint=info.fingerprint,
        round=info.round,
        allow_nonfinite=False,
    )


def immutable(frame: Frame) -> bytes:
    """The frame as bytes that no other thread can change."""
    return frame if isinstance(frame, bytes) else bytes(frame)
