"""Documents of one domain → train, calibration and held-out parts that never overlap."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from samv2.common.errors import DataError
from samv2.data.overlap import chunk_index, remove_shared

EVALUATION_DOCUMENT_BYTES = 16 * 1024
"""Cut of a held-out or calibration document, so that several documents are in."""

_CUT_LOSS = 3  # bytes that a cut inside a UTF-8 character can leave unused

PARTS = ("train", "calibration", "heldout")


@dataclass(frozen=True, kw_only=True)
class PartSizes:
    """How much text of a domain each part gets, in UTF-8 bytes."""

    heldout_bytes: int = 64 * 1024
    """Held-out text; exactly this much but for the cut of a character."""
    calibration_bytes: int = 64 * 1024
    """Text on which converted layers are calibrated."""
    train_bytes: int = 2 * 1024 * 1024
    """At most this much train text."""
    min_train_bytes: int = 64 * 1024
    """A domain with less train text than this is refused."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (0 if name == "calibration_bytes" else 1):
                raise DataError(f"{name} is {value}: give a positive number of bytes.")


@dataclass(frozen=True, kw_only=True)
class DomainText:
    """The three parts of one domain; no document is in two of them."""

    name: str
    """Name of the domain."""
    train: tuple[str, ...]
    """Documents for training."""
    calibration: tuple[str, ...]
    """Documents for calibration, each at most 16 KiB."""
    heldout: tuple[str, ...]
    """Documents for evaluation, each at most 16 KiB."""

    def part(self, name: str) -> tuple[str, ...]:
        """Return the documents of ``train``, ``calibration`` or ``heldout``."""
        return {
            "train": self.train,
            "calibration": self.calibration,
            "heldout": self.heldout,
        }[name]

    @property
    def sha256(self) -> dict[str, str]:
        """Checksum of each part's documents, hexadecimal."""
        return {part: _documents_sha256(self.part(part)) for part in PARTS}


def deduplicate(documents: Sequence[str], min_chars: int = 60) -> list[str]:
    """Drop every long line that was seen before, over the whole domain.

    Licences and file headers repeat themselves; without this, held-out text leaks.

    Args:
        documents: documents of one domain, in order; the first occurrence stays.
        min_chars: length from which a line counts as long, in characters after lower
            casing and with all but letters and digits reduced to single blanks.

    Returns:
        Documents longer than 20 characters; a document emptied by this is left out.
    """
    seen: set[str] = set()
    kept_documents = []
    for document in documents:
        kept_lines = []
        for line in _encodable(document).split("\n"):
            key = re.sub(r"\W+", " ", line).strip().lower()
            if len(key) < min_chars or key not in seen:
                kept_lines.append(line)
            if len(key) >= min_chars:
                seen.add(key)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept_lines)).strip()
        if len(text) > 20:
            kept_documents.append(text)
    return kept_documents


def divide(
    documents: Sequence[str],
    *,
    name: str,
    seed: int,
    sizes: PartSizes = PartSizes(),
    templated: bool = False,
) -> DomainText:
    """Divide one domain into held-out, calibration and train documents.

    The documents are shuffled; the first fill the held-out part, the next the
    calibration part, the next the train part. No document is in two parts, and lines
    that would give a part a passage of 199 characters or more of an earlier part are
    removed (see :mod:`samv2.data.overlap`).

    Args:
        documents: deduplicated documents, see :func:`deduplicate`.
        name: name of the domain, part of the shuffle's seed.
        seed: seed of the shuffle; the same inputs give the same parts.
        sizes: bytes of each part.
        templated: the documents share wording on purpose: remove no passage, only keep
            the documents apart.

    Raises:
        DataError: the domain has too little text for these sizes.
    """
    shuffled = list(documents)
    random.Random(f"{seed}/{name}").shuffle(shuffled)
    index = chunk_index(())
    parts: dict[str, tuple[str, ...]] = {}
    start = 0
    for part, budget, longest in (
        ("heldout", sizes.heldout_bytes, EVALUATION_DOCUMENT_BYTES),
        ("calibration", sizes.calibration_bytes, EVALUATION_DOCUMENT_BYTES),
        ("train", sizes.train_bytes, sizes.train_bytes),
    ):
        taken: list[str] = []
        remaining = budget
        while remaining > _CUT_LOSS and start < len(shuffled):
            text = _encodable(shuffled[start])
            if not templated:
                text = remove_shared(text, index)
            text = _cut(text.strip(), min(longest, remaining))
            start += 1
            if text:
                taken.append(text)
                remaining -= len(text.encode())
        needed = sizes.min_train_bytes if part == "train" else budget - _CUT_LOSS
        if budget - remaining < needed:
            raise DataError(
                _too_small(name, documents, part, budget - remaining, sizes)
            )
        parts[part] = tuple(taken)
        index = np.union1d(index, chunk_index(taken))
    return DomainText(name=name, **parts)


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON may carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _cut(text: str, max_bytes: int) -> str:
    """The longest beginning of a text within ``max_bytes`` UTF-8 bytes."""
    return text.encode()[:max_bytes].decode("utf-8", "ignore")


def _too_small(
    name: str, documents: Sequence[str], part: str, found: int, sizes: PartSizes
) -> str:
    total = sum(len(document.encode()) for document in documents)
    return (
        f"The domain {name!r} is too small: {len(documents)} documents with {total:,} "
        f"bytes left only {found:,} bytes for its {part} part, but held-out text "
        f"needs {sizes.heldout_bytes:,}, calibration {sizes.calibration_bytes:,} and "
        f"train at least {sizes.min_train_bytes:,} bytes in documents of their own "
        f"(of a held-out or calibration document {EVALUATION_DOCUMENT_BYTES:,} bytes "
        "count): add text or lower the sizes."
    )


def _documents_sha256(documents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()
