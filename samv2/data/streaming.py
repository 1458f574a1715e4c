"""Text that is too large to keep: the Pile and a mix of Wikipedias, document by document.

Both go through Hugging Face ``datasets`` in streaming mode and read a data set of the
hub or a local folder of JSON Lines or Parquet files alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset, interleave_datasets, load_dataset

from samv2.common.errors import DataError, FetchError

PILE = "monology/pile-uncopyrighted"
"""The Pile without the subsets whose licence is doubtful."""

WIKIPEDIA = "wikimedia/wikipedia"
"""Cleaned dumps of every Wikipedia; its configurations are ``<date>.<language>``."""

WIKIPEDIA_DATE = "20231101"
"""Date of the dump."""


@dataclass(frozen=True)
class StreamedDocument:
    """One document and what it is."""

    text: str
    """The text, not blank."""
    category: str
    """Subset of the Pile, or language."""


def stream_pile(
    path: str | Path = PILE,
    subsets: Collection[str] | None = None,
    *,
    split: str = "train",
    shuffle_seed: int | None = None,
    buffer_size: int = 10_000,
) -> Iterator[StreamedDocument]:
    """Stream the Pile; the category is ``meta.pile_set_name``.

    Args:
        path: data set on the hub, or a local folder in the same format.
        subsets: keep only these, e.g. ``{"FreeLaw", "PubMed Abstracts"}``; None for all.
        split: split of the data set.
        shuffle_seed: seed of a shuffle in a buffer; None keeps the order.
        buffer_size: documents in the buffer of the shuffle.

    Returns:
        Iterator over the documents that are not blank.

    Raises:
        FetchError: the data set cannot be opened.
        DataError: a row lacks ``text`` or ``meta.pile_set_name``.
    """
    rows = _open(path, split=split)
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed, buffer_size=buffer_size)
    documents = (
        StreamedDocument(_text(row, path), _pile_subset(row, path)) for row in rows
    )
    return (
        document
        for document in documents
        if document.text.strip() and (subsets is None or document.category in subsets)
    )


def stream_wikipedia_mix(
    path: str | Path = WIKIPEDIA,
    weights: Mapping[str, float] | None = None,
    *,
    seed: int,
    split: str = "train",
) -> Iterator[StreamedDocument]:
    """Stream articles of several languages in given proportions.

    Args:
        path: data set on the hub, or a local folder with one subfolder a language.
        weights: positive weight of each language, e.g. ``{"en": 3, "de": 1}``; they
            need not sum to 1. None: English, German and French alike.
        seed: seed of the draws of languages.
        split: split of the data set.

    Returns:
        Iterator over the articles that are not blank; the category is the language. It
        ends with the first language that ends, so no article comes twice.

    Raises:
        FetchError: a language cannot be opened.
        DataError: no language, or a weight that is not positive.
    """
    shares = {"en": 1.0, "de": 1.0, "fr": 1.0} if weights is None else dict(weights)
    if not shares or not all(math.isfinite(w) and w > 0 for w in shares.values()):
        raise DataError(
            f"The weights {shares} need at least one language, each with a positive "
            'number: for example {"en": 3, "de": 1}.'
        )
    total = sum(shares.values())
    mixed = interleave_datasets(
        [_open_language(path, language, split) for language in shares],
        probabilities=[weight / total for weight in shares.values()],
        seed=seed,
        stopping_strategy="first_exhausted",
    )
    documents = (
        StreamedDocument(_text(row, path), str(row["category"])) for row in mixed
    )
    return (document for document in documents if document.text.strip())


def take_documents(
    stream: Iterable[StreamedDocument],
    *,
    per_category: int,
    limit: int | None = None,
) -> dict[str, list[str]]:
    """Materialise the first documents of each category of a stream.

    Args:
        stream: documents; an endless one needs a ``limit``.
        per_category: keep at most this many of a category.
        limit: read at most this many documents in all, kept or not.

    Returns:
        Documents by category, as :func:`samv2.data.corpus.corpus_from_documents` takes.

    Raises:
        DataError: ``per_category`` or ``limit`` is below 1, or the stream is empty.
    """
    for name, value in (("per_category", per_category), ("limit", limit)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}: give 1 or more.")
    documents: dict[str, list[str]] = {}
    for document in islice(stream, limit):
        kept = documents.setdefault(document.category, [])
        if len(kept) < per_category:
            kept.append(document.text)
    if not documents:
        raise DataError("The stream holds no document: check the path and the subsets.")
    return documents


def _open(path: str | Path, config: str | None = None, *, split: str) -> Any:
    """Open one data set for streaming."""
    try:
        return load_dataset(str(path), config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        named = f"{path} ({config})" if config else str(path)
        raise FetchError(
            f"The data set {named} cannot be opened ({error}): check the name and the "
            "network, or give a local folder of .jsonl or .parquet files."
        ) from error


def _open_language(path: str | Path, language: str, split: str) -> IterableDataset:
    local = Path(path)
    if local.is_dir():
        if not (local / language).is_dir():
            known = sorted(child.name for child in local.iterdir() if child.is_dir())
            raise DataError(
                f"{local} has no folder for the language {language!r}: it has "
                f"{', '.join(known) or 'none'}."
            )
        rows = _open(local / language, split=split)
    else:
        rows = _open(path, f"{WIKIPEDIA_DATE}.{language}", split=split)
    return rows.select_columns(["text"]).map(lambda row: {**row, "category": language})


def _text(row: Mapping[str, Any], path: str | Path) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"A row of {path} has no string field `text` but {sorted(row)}: use a data "
            "set in the format of the Pile or of Wikipedia."
        )
    return text


def _pile_subset(row: Mapping[str, Any], path: str | Path) -> str:
    meta = row.get("meta")
    if isinstance(meta, str):  # some copies store the object as JSON
        try:
            meta = json.loads(meta)
        except ValueError:
            meta = None
    if not isinstance(meta, Mapping) or not meta.get("pile_set_name"):
        raise DataError(
            f"A row of {path} has no field `meta.pile_set_name`: use a data set in the "
            "format of the Pile."
        )
    return str(meta["pile_set_name"])
