"""Shared passages: all long ones are found, nothing else is removed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from samv2.data.overlap import chunk_index, remove_shared

TEXT = st.text(alphabet="ab\né", max_size=60)


def passages(text: str, length: int) -> set[str]:
    return {text[i : i + length] for i in range(len(text) - length + 1)}


@given(documents=st.lists(TEXT, max_size=4), text=TEXT, chunk=st.integers(1, 6))
def test_no_passage_of_two_chunks_less_one_survives(
    documents: list[str], text: str, chunk: int
) -> None:
    cleaned = remove_shared(text, chunk_index(documents, chunk), chunk)
    forbidden = set().union(*(passages(d, 2 * chunk - 1) for d in documents))
    assert not passages(cleaned, 2 * chunk - 1) & forbidden


@given(documents=st.lists(TEXT, max_size=4), text=TEXT, chunk=st.integers(1, 6))
def test_only_lines_with_a_shared_passage_are_removed(
    documents: list[str], text: str, chunk: int
) -> None:
    shared = set().union(*(passages(d, chunk) for d in documents))
    cleaned = remove_shared(text, chunk_index(documents, chunk), chunk)
    if not passages(text, chunk) & shared:
        assert cleaned == text
    lines = iter(text.split("\n"))
    assert not cleaned or all(line in lines for line in cleaned.split("\n"))


def test_the_lines_of_a_shared_passage_go_and_the_others_stay() -> None:
    secret = "the quick brown fox jumps over the lazy dog"
    index = chunk_index(["xx" + secret], 10)
    text = f"before\nnow {secret} indeed\nafter"
    assert remove_shared(text, index, 10) == "before\nafter"


def test_a_passage_over_several_short_lines_is_found() -> None:
    index = chunk_index(["a = 1\nb = 2\nc = 3\nd = 4"], 10)
    assert remove_shared("x\na = 1\nb = 2\nc = 3\nd = 4\ny", index, 10) == "x\ny"


def test_nothing_indexed_removes_nothing() -> None:
    assert chunk_index(["short"], 100).size == 0
    assert remove_shared("any text", chunk_index([]), 3) == "any text"
