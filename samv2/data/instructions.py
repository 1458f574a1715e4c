"""Instruction data in the formats of Alpaca and Dolly → rows, documents, hold-out."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samv2.common.errors import DataError
from samv2.common.prompting import InstructionRow, Prompter

UNCATEGORISED = "uncategorised"
"""Category of a row that names none, as all of Alpaca's."""


def load_instructions(path: Path) -> list[InstructionRow]:
    """Read instruction rows; Alpaca's and Dolly's fields are told apart row by row.

    Args:
        path: ``.json`` (one list of objects) or ``.jsonl`` (one object a line).
            Alpaca: ``instruction``, ``input``, ``output``, optionally ``category``;
            Dolly: ``instruction``, ``context``, ``response``, ``category``.

    Returns:
        Rows in the order of the file; a row without a category is ``uncategorised``.

    Raises:
        DataError: no such file, not JSON, a row of neither format, or no row.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}: check the path.")
    rows = [_row(path, i, item) for i, item in enumerate(_objects(path), start=1)]
    if not rows:
        raise DataError(f"{path} holds no row: add some.")
    return rows


def hold_out(
    rows: Sequence[InstructionRow], per_category: int = 10, *, seed: int
) -> tuple[list[InstructionRow], list[InstructionRow]]:
    """Set aside some rows of every category, as Shepherd does (10 each).

    Args:
        rows: all rows.
        per_category: rows of each category that are set aside.
        seed: seed of the choice.

    Returns:
        ``(train, heldout)``, both in the order of ``rows``; no row is in both.

    Raises:
        DataError: a category has too few rows to leave one for training.
    """
    if per_category < 1:
        raise DataError(f"per_category is {per_category}: give 1 or more.")
    generator = random.Random(seed)
    chosen: set[int] = set()
    for category in dict.fromkeys(row.category for row in rows):
        places = [i for i, row in enumerate(rows) if row.category == category]
        if len(places) <= per_category:
            raise DataError(
                f"The category {category!r} has {len(places)} rows, which leaves none "
                f"to train on when {per_category} are held out: lower per_category or "
                "add rows."
            )
        chosen.update(generator.sample(places, per_category))
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


def categories(rows: Sequence[InstructionRow]) -> list[str]:
    """Return the category of each row: the labels that the splits take."""
    return [row.category for row in rows]


def to_documents(rows: Sequence[InstructionRow], prompter: Prompter) -> list[str]:
    """Write every row as one training document, prompt and response."""
    return [prompter.document(row) for row in rows]


def documents_by_category(
    rows: Sequence[InstructionRow], prompter: Prompter
) -> dict[str, list[str]]:
    """Write rows as documents grouped by category.

    Returns:
        Documents by category, as :func:`samv2.data.corpus.corpus_from_documents` takes
        with ``templated=True``.
    """
    documents: dict[str, list[str]] = {}
    for row in rows:
        documents.setdefault(row.category, []).append(prompter.document(row))
    return documents


def _objects(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}): use .json for one list of objects and "
            ".jsonl for one object a line."
        ) from error
    if not isinstance(content, list):
        raise DataError(
            f"{path} holds a {type(content).__name__}, not a list of objects."
        )
    return content


def _row(path: Path, number: int, item: Any) -> InstructionRow:
    if isinstance(item, dict):
        response = item.get("output", item.get("response"))
        fields: dict[str, Any] = {
            "instruction": item.get("instruction"),
            "response": response,
            "input": item.get("input", item.get("context")) or "",
            "category": item.get("category") or UNCATEGORISED,
        }
        if all(isinstance(value, str) for value in fields.values()):
            return InstructionRow(**fields)
    raise DataError(
        f"Row {number} of {path} is in neither format: give it the strings "
        "`instruction` and `output` (Alpaca, with `input`) or `instruction` and "
        "`response` (Dolly, with `context` and `category`)."
    )
