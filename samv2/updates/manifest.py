"""What a round's updates may hold: ids, shapes and dtypes that both sides know.

A receiver decodes by its own manifest and never by sizes that a frame states.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from samv2 import _rle
from samv2.common.errors import SamError

DTYPE_CODES: Mapping[torch.dtype, int] = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
}
"""Codes of the source dtypes on the wire and in the fingerprint."""

_MAX_ID = 2**32 - 1
_MAX_NUMEL = 2**48
_MAX_NDIM = 255


class PackError(SamError, ValueError):
    """A caller's tensor, manifest or setting does not fit; no frame is to blame."""


@dataclass(frozen=True)
class Manifest:
    """The tensors that a frame of one round may carry; a frame carries a subset.

    Raises:
        PackError: on construction, with every fault of the manifest listed.
    """

    ids: tuple[int, ...]
    """Tensor ids, strictly increasing, 0 to 2^32 - 1."""

    shapes: tuple[tuple[int, ...], ...]
    """One shape per id; dimensions may be 0, ``()`` is a scalar."""

    dtypes: tuple[torch.dtype, ...]
    """One of float32, float16, bfloat16 per id."""

    def __post_init__(self) -> None:
        faults = self._faults()
        if faults:
            raise PackError("this manifest cannot be used: " + "; ".join(faults))

    @classmethod
    def of(cls, update: Mapping[int, Tensor]) -> Manifest:
        """The manifest that describes exactly the tensors of ``update``.

        Args:
            update: ``{id: tensor}`` in any order; tensors of any shape.

        Raises:
            PackError: an id or dtype that a frame cannot carry.
        """
        ids = tuple(sorted(update))
        return cls(
            ids=ids,
            shapes=tuple(tuple(update[i].shape) for i in ids),
            dtypes=tuple(update[i].dtype for i in ids),
        )

    @cached_property
    def fingerprint(self) -> int:
        """xxh3-64 (0 to 2^64 - 1) of the canonical bytes in docs/wire_format.md."""
        parts = [b"samv2-manifest-1", struct.pack("<I", len(self.ids))]
        for id_, shape, dtype in zip(self.ids, self.shapes, self.dtypes, strict=True):
            parts.append(struct.pack("<IBB", id_, DTYPE_CODES[dtype], len(shape)))
            parts.append(struct.pack(f"<{len(shape)}Q", *shape))
        return _rle.xxh3_64(b"".join(parts))

    def numel(self, id: int) -> int:
        """Number of elements of tensor ``id``.

        Raises:
            PackError: ``id`` is not in the manifest.
        """
        return math.prod(self.shapes[self.position(id)])

    def position(self, id: int) -> int:
        """Index of ``id`` in ``ids``, ``shapes`` and ``dtypes``.

        Raises:
            PackError: ``id`` is not in the manifest.
        """
        if id not in self._positions:
            raise PackError(
                f"tensor id {id!r} is not in the manifest of {len(self.ids)} tensors; "
                "make the manifest from the round's full parameter set"
            )
        return self._positions[id]

    @cached_property
    def rows(self) -> list[tuple[int, int, int]]:
        """``(id, dtype code, numel)`` per tensor, as the codec wants it."""
        return [
            (id_, DTYPE_CODES[dtype], math.prod(shape))
            for id_, shape, dtype in zip(
                self.ids, self.shapes, self.dtypes, strict=True
            )
        ]

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {id_: index for index, id_ in enumerate(self.ids)}

    def _faults(self) -> list[str]:
        lengths = (len(self.ids), len(self.shapes), len(self.dtypes))
        if len(set(lengths)) != 1:
            return [
                f"ids, shapes and dtypes have {lengths} entries, they need equally many"
            ]
        faults = []
        for id_ in self.ids:
            if type(id_) is not int or not 0 <= id_ <= _MAX_ID:
                faults.append(f"id {id_!r} is not an int from 0 to {_MAX_ID}")
        if not faults:
            for before, after in zip(self.ids, self.ids[1:]):
                if before >= after:
                    faults.append(
                        f"id {after} follows id {before}, ids must increase strictly"
                    )
        for id_, shape, dtype in zip(self.ids, self.shapes, self.dtypes, strict=True):
            if any(type(size) is not int or size < 0 for size in shape):
                faults.append(f"shape {shape} of id {id_!r} has a bad dimension")
            elif len(shape) > _MAX_NDIM or math.prod(shape) > _MAX_NUMEL:
                faults.append(f"shape {shape} of id {id_!r} is too large")
            if dtype not in DTYPE_CODES:
                faults.append(
                    f"dtype {dtype} of id {id_!r} is not float32, float16 or bfloat16"
                )
        return faults
