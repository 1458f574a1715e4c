"""Numbers as keys of JSON objects, which have only texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

V = TypeVar("V")


def text_keys(values: Mapping[int, V]) -> dict[str, V]:
    """A mapping by number as JSON has it, by rising number."""
    return {str(key): value for key, value in sorted(values.items())}


def number_keys(values: Mapping[str, V]) -> dict[int, V]:
    """The inverse of :func:`text_keys`.

    Raises:
        ValueError: a key is no whole number.
    """
    return {int(key): value for key, value in values.items()}
