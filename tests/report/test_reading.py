"""Files that are absent or damaged become a sentence, never an exception."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from samv2.common.errors import CheckpointError
from samv2.report.reading import (
    Missing,
    geometric_mean,
    index_below,
    maybe_number,
    number,
    numbers_by_name,
    read_json,
    read_piece,
    said,
    text,
    whole,
)


def test_a_piece_is_read_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "piece.txt"
    absent = read_piece(path, str, remedy="Make it.")
    assert absent == Missing(what="There is no piece.txt.", remedy="Make it.")
    path.write_text("seven")
    assert read_piece(path, len, remedy="") == 5
    broken = read_piece(path, int, remedy="Again.", name="the number")
    assert isinstance(broken, Missing) and broken.remedy == "Again."
    assert broken.what.startswith("the number cannot be read: invalid literal")
    path.write_bytes(b"\xff\xfe")
    assert "utf-8" in read_piece(path, str, remedy="").what
    path.unlink()
    path.mkdir()
    assert isinstance(read_piece(path, str, remedy=""), Missing)


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2", "null", '{"b": 1}', "[" * 100_000, "7", '"x"']
)
def test_json_is_read_or_missing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "piece.json"
    path.write_text('{"a": [1, 2]}')
    assert read_json(path, lambda value: value["a"][1], remedy="") == 2
    path.write_text(content)
    found = read_json(path, lambda value: value["a"][1], remedy="Again.")
    assert isinstance(found, Missing) and found.remedy == "Again."


def test_errors_in_few_words() -> None:
    assert said(KeyError("round")) == "it lacks 'round'"
    assert said(ValueError("one.\ntwo")) == "one"
    assert said(IndexError()) == "IndexError"
    assert len(said(CheckpointError("long " * 100))) <= 200


def test_numbers() -> None:
    assert number(2) == 2.0 and maybe_number(0.5) == 0.5 and whole(3.0) == 3
    assert maybe_number(None) is None
    assert maybe_number(math.nan) is None and maybe_number(-math.inf) is None
    for wrong in ("2", True, [1], {}):
        with pytest.raises(ValueError, match="stands where a number should"):
            maybe_number(wrong)
    for wrong in (None, math.inf):
        with pytest.raises(ValueError, match="number should"):
            number(wrong)
    with pytest.raises(ValueError, match="2.5 stands where a whole number should"):
        whole(2.5)
    assert index_below(0, 1) == 0
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="0..3 should"):
            index_below(wrong, 4)


def test_text_and_objects() -> None:
    assert text("a") == "a"
    with pytest.raises(ValueError, match="text should"):
        text(1)
    assert numbers_by_name({"a": 1, "b": None}) == {"a": 1.0, "b": None}
    with pytest.raises(ValueError, match="object should"):
        numbers_by_name([1])


def test_geometric_mean() -> None:
    assert geometric_mean({"a": 2.0, "b": 8.0}) == pytest.approx(4.0)
    assert geometric_mean({"a": 2.0, "b": None}) is None
    assert geometric_mean({"a": 0.0}) is None
    assert geometric_mean({}) is None
