"""Reading files that may be absent, half written, or edited by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from samv2.common.errors import SamError

T = TypeVar("T")
DAMAGE = (
    SamError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What reading a damaged file raises."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A piece of a report that cannot be shown."""

    what: str
    """What is absent or damaged, as a sentence."""
    remedy: str
    """What makes it, as a sentence; code stands between backticks."""


def read_piece(
    path: Path, parse: Callable[[str], T], *, remedy: str, name: str = ""
) -> T | Missing:
    """A file's content, or what is wrong with it.

    Args:
        path: the file.
        parse: of its text; may raise whatever is in :data:`DAMAGE`.
        remedy: how the file comes to be.
        name: how the file is called in the message; default: its own name.
    """
    name = name or path.name
    if not path.is_file():
        return Missing(what=f"There is no {name}.", remedy=remedy)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except DAMAGE as error:
        return Missing(what=f"{name} cannot be read: {said(error)}.", remedy=remedy)


def read_json(
    path: Path, parse: Callable[[Any], T], *, remedy: str, name: str = ""
) -> T | Missing:
    """As :func:`read_piece`, of a JSON file's value."""

    def both(text: str) -> T:
        return parse(json.loads(text))

    return read_piece(path, both, remedy=remedy, name=name)


def said(error: BaseException) -> str:
    """An error in few words."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    text = str(error).strip().splitlines()
    return f"{text[0][:200].rstrip('.')}" if text else type(error).__name__


def number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: anything else.
    """
    found = maybe_number(value)
    if found is None:
        raise ValueError(f"{value!r} stands where a number should")
    return found


def maybe_number(value: Any) -> float | None:
    """A finite number; None of null, NaN and infinity.

    Raises:
        ValueError: not a number at all.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} stands where a number should")
    return float(value) if math.isfinite(value) else None


def whole(value: Any) -> int:
    """A whole number.

    Raises:
        ValueError: anything else.
    """
    found = number(value)
    if found != int(found):
        raise ValueError(f"{value!r} stands where a whole number should")
    return int(found)


def index_below(value: Any, limit: int) -> int:
    """A whole number in 0..limit - 1.

    Raises:
        ValueError: anything else.
    """
    found = whole(value)
    if not 0 <= found < limit:
        raise ValueError(f"{found} stands where 0..{limit - 1} should")
    return found


def text(value: Any) -> str:
    """A string.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r} stands where text should")
    return value


def numbers_by_name(value: Any) -> dict[str, float | None]:
    """An object of numbers.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} stands where an object should")
    return {text(key): maybe_number(item) for key, item in value.items()}


def geometric_mean(values: Mapping[str, float | None]) -> float | None:
    """Of perplexities; None where there is none, or one that is not known."""
    found = [value for value in values.values() if value is not None and value > 0]
    if not found or len(found) < len(values):
        return None
    return math.exp(sum(map(math.log, found)) / len(found))
