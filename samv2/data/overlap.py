"""Keep held-out text unseen: find and remove long passages that two texts share.

Dropping repeated long lines is not enough, since licences differ in one word of a
paragraph and source files repeat runs of short lines. If two texts share a passage of
2·L − 1 characters, it holds a whole *aligned* chunk of L characters of the first (one
that starts at a multiple of L). So the aligned chunks of the held-out text are indexed,
and every offset of the other text is looked up. Each window's hash is polynomial
modulo 2⁶⁴, computed for all offsets at once from prefix sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK_CHARS = 100
"""L: passages of 2·L − 1 = 199 characters or more are found for certain."""

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2**64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


def chunk_index(
    documents: Sequence[str], chunk_chars: int = CHUNK_CHARS
) -> NDArray[np.uint64]:
    """Hash the aligned chunks of all documents.

    Args:
        documents: texts that must stay unseen.
        chunk_chars: length L of a chunk in characters.

    Returns:
        Sorted unique hashes, uint64 (N,).
    """
    hashes = [_window_hashes(text, chunk_chars)[::chunk_chars] for text in documents]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))


def remove_shared(
    text: str, index: NDArray[np.uint64], chunk_chars: int = CHUNK_CHARS
) -> str:
    """Remove every line of a text that touches a chunk of the index.

    Args:
        text: text to clean.
        index: result of :func:`chunk_index` with the same ``chunk_chars``.
        chunk_chars: length L of a chunk in characters.

    Returns:
        Text that shares no passage of 2·L − 1 characters with the indexed documents;
        it may be empty. A hash collision can only remove a line too many.
    """
    while True:  # removing lines joins others, which can only shorten the text again
        hits = np.flatnonzero(np.isin(_window_hashes(text, chunk_chars), index))
        if not hits.size:
            return text
        text = _without_lines(text, hits, chunk_chars)


def _window_hashes(text: str, length: int) -> NDArray[np.uint64]:
    """Hash of the ``length`` characters from every offset, uint64 (n − length + 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    if codes.size < length:
        return np.empty(0, np.uint64)
    # sum_j c_j B^j over a window, divided by B^start, does not depend on the start.
    powers = np.full(codes.size, _BASE)
    powers[0] = 1
    terms = (codes.astype(np.uint64) + np.uint64(1)) * np.cumprod(powers)
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
    inverse = np.full(codes.size - length + 1, _INVERSE)
    inverse[0] = 1
    hashes: NDArray[np.uint64] = prefix[length:] - prefix[:-length]
    return hashes * np.cumprod(inverse)


def _without_lines(text: str, hits: NDArray[np.intp], length: int) -> str:
    """Drop the lines that overlap any window ``[hit, hit + length)``."""
    lines = text.split("\n")
    ends = np.cumsum([len(line) + 1 for line in lines])
    first = np.searchsorted(ends, hits, side="right")
    last = np.searchsorted(ends, hits + length - 1, side="right")
    depth = np.zeros(len(lines) + 1, np.int64)
    np.add.at(depth, first, 1)
    np.add.at(depth, last + 1, -1)
    covered = np.cumsum(depth)[: len(lines)] > 0
    return "\n".join(line for line, hit in zip(lines, covered) if not hit)
