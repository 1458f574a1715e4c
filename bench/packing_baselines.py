"""Other ways of packing the same tensor, all lossless; bits, not floats, are compared.

General compressors see the dense bytes, blosc2 after its bit shuffle. ``zstandard``, ``lz4`` and ``blosc2`` come with
``pip install -e ".[bench]"``; one that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

THRESHOLDS: dict[str, Callable[[Tensor, int], float]] = {
    "torch.topk": lambda x, k: float(x.abs().topk(k).values[-1]),
    "torch.kthvalue": lambda x, k: float(x.abs().kthvalue(len(x) - k + 1).values),
    "numpy.partition": lambda x, k: float(
        np.partition(np.abs(x.numpy()), len(x) - k)[len(x) - k]
    ),
}
"""The k-th largest magnitude of a flat tensor."""
Bits = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A way of packing."""

    name: str
    encode: Callable[[Bits], Any]
    """Bit patterns to anything."""
    decode: Callable[[Any, Bits], Bits]
    """That and a warm output to the bit patterns, in the output or in new memory."""
    size: Callable[[Any], int]
    """Bytes of what was encoded."""
    package: str | None = None
    """What has to be installed."""

    @property
    def installed(self) -> bool:
        return (
            self.package is None or importlib.util.find_spec(self.package) is not None
        )


def bits_of(tensor: Tensor) -> Bits:
    """A float32 tensor's bit patterns, in place."""
    return tensor.numpy().view(np.int32)


def _positions(bits: Bits) -> tuple[Any, Any]:
    index = np.flatnonzero(bits)
    return index.astype(np.int32), bits.take(index)


def _from_positions(encoded: tuple[Any, Any], out: Bits) -> Bits:
    out.fill(0)
    out[encoded[0]] = encoded[1]
    return out


def _bitmap(bits: Bits) -> tuple[Any, Any]:
    mask = bits != 0
    return np.packbits(mask), bits[mask]


def _from_bitmap(encoded: tuple[Any, Any], out: Bits) -> Bits:
    out.fill(0)
    out[np.unpackbits(encoded[0], count=out.size).view(bool)] = encoded[1]
    return out


def _zstd(bits: Bits) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress(bits)


def _from_zstd(encoded: bytes, out: Bits) -> Bits:
    import zstandard

    plain = zstandard.ZstdDecompressor().decompress(encoded)
    return np.frombuffer(plain, np.int32)


def _lz4(bits: Bits) -> bytes:
    import lz4.block

    return lz4.block.compress(bits, store_size=False)


def _from_lz4(encoded: bytes, out: Bits) -> Bits:
    import lz4.block

    plain = lz4.block.decompress(encoded, uncompressed_size=out.nbytes)
    return np.frombuffer(plain, np.int32)


def _blosc2(bits: Bits, codec: str) -> bytes:
    import blosc2

    return blosc2.compress2(
        bits,
        codec=blosc2.Codec[codec],
        clevel=1,
        filters=[blosc2.Filter.BITSHUFFLE],
        filters_meta=[0],
        typesize=4,
        nthreads=1,
    )


def _from_blosc2(encoded: bytes, out: Bits) -> Bits:
    import blosc2

    blosc2.decompress2(encoded, dst=out, nthreads=1)
    return out


def _both(encoded: tuple[Any, Any]) -> int:
    return sum(part.nbytes for part in encoded)


BASELINES = (
    Baseline(
        name="numpy positions",
        encode=_positions,
        decode=_from_positions,
        size=_both,
    ),
    Baseline(name="numpy bitmap", encode=_bitmap, decode=_from_bitmap, size=_both),
    Baseline(
        name="zstd -1", encode=_zstd, decode=_from_zstd, size=len, package="zstandard"
    ),
    Baseline(name="lz4", encode=_lz4, decode=_from_lz4, size=len, package="lz4"),
    *(
        Baseline(
            name=f"blosc2 {codec.lower()}",
            encode=partial(_blosc2, codec=codec),
            decode=_from_blosc2,
            size=len,
            package="blosc2",
        )
        for codec in ("ZSTD", "LZ4")
    ),
)
