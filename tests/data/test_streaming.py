"""Streaming the Pile and Wikipedia from local folders in the same format, offline."""

from __future__ import annotations

import json
import socket
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from samv2.common.errors import DataError, FetchError
from samv2.data import streaming
from samv2.data.streaming import (
    StreamedDocument,
    stream_pile,
    stream_wikipedia_mix,
    take_documents,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test of this file may open a connection."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pile_rows(count: int = 12) -> list[dict[str, Any]]:
    subsets = ["FreeLaw", "Github", "ArXiv"]
    return [
        {"text": f"document {i}", "meta": {"pile_set_name": subsets[i % 3]}}
        for i in range(count)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """A small copy of the Pile."""
    write_lines(tmp_path / "pile/train.jsonl", pile_rows())
    return tmp_path / "pile"


@pytest.fixture
def wikipedia(tmp_path: Path) -> Path:
    """A small Wikipedia in two languages."""
    for language in ("en", "de"):
        titles = [f"{language} {i}" for i in range(200)]
        rows = [{"id": title, "title": title, "text": title} for title in titles]
        write_lines(tmp_path / "wiki" / language / "train.jsonl", rows)
    return tmp_path / "wiki"


def test_the_pile_streams_in_order_with_its_subsets(pile: Path) -> None:
    documents = list(stream_pile(pile))
    assert documents[:2] == [
        StreamedDocument("document 0", "FreeLaw"),
        StreamedDocument("document 1", "Github"),
    ]
    assert len(documents) == 12


def test_parquet_is_read_like_json_lines(pile: Path, tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    table = pyarrow.Table.from_pylist(pile_rows())
    pyarrow.parquet.write_table(table, tmp_path / "parquet/train.parquet")
    assert list(stream_pile(tmp_path / "parquet")) == list(stream_pile(pile))


def test_only_the_chosen_subsets_come(pile: Path) -> None:
    documents = list(stream_pile(pile, subsets={"ArXiv"}))
    assert [d.text for d in documents] == [f"document {i}" for i in (2, 5, 8, 11)]


def test_a_shuffle_follows_its_seed(pile: Path) -> None:
    first = list(stream_pile(pile, shuffle_seed=1))
    assert first == list(stream_pile(pile, shuffle_seed=1))
    assert first != list(stream_pile(pile))
    assert Counter(first) == Counter(stream_pile(pile))


def test_metadata_may_be_json_text_and_blank_documents_are_left_out(
    tmp_path: Path,
) -> None:
    rows = [{**row, "meta": json.dumps(row["meta"])} for row in pile_rows(3)]
    write_lines(tmp_path / "p/train.jsonl", [*rows, {**rows[0], "text": " \n"}])
    assert [d.category for d in stream_pile(tmp_path / "p")] == [
        "FreeLaw",
        "Github",
        "ArXiv",
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "meta": {"other": "x"}}, "meta.pile_set_name"),
        ({"text": "a", "meta": "no json"}, "meta.pile_set_name"),
        ({"text": "a"}, "meta.pile_set_name"),
        ({"body": "a"}, r"`text` but \['body'\]"),
    ],
)
def test_rows_of_another_format_are_named(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    write_lines(tmp_path / "p/train.jsonl", [row])
    with pytest.raises(DataError, match=words):
        list(stream_pile(tmp_path / "p"))


def test_wikipedias_are_mixed_by_weight(wikipedia: Path) -> None:
    stream = stream_wikipedia_mix(wikipedia, {"en": 3, "de": 1}, seed=0)
    documents = list(islice(stream, 200))
    counts = Counter(document.category for document in documents)
    assert counts.keys() == {"en", "de"} and 125 < counts["en"] < 175
    assert all(d.text.startswith(d.category) for d in documents)


def test_the_mix_follows_its_seed_and_repeats_no_article(wikipedia: Path) -> None:
    def mix(seed: int) -> list[StreamedDocument]:
        return list(stream_wikipedia_mix(wikipedia, {"en": 1, "de": 2}, seed=seed))

    documents = mix(7)
    assert documents == mix(7) != mix(8)
    assert len(set(documents)) == len(documents) > 200


@pytest.mark.parametrize("weights", [{}, {"en": 0.0}, {"en": float("nan")}])
def test_weights_must_be_positive(wikipedia: Path, weights: dict[str, float]) -> None:
    with pytest.raises(DataError, match="positive"):
        stream_wikipedia_mix(wikipedia, weights, seed=0)


def test_a_language_that_is_not_there_is_named(wikipedia: Path) -> None:
    with pytest.raises(DataError, match="language 'fr': it has de, en"):
        stream_wikipedia_mix(wikipedia, {"en": 1, "fr": 1}, seed=0)


def test_a_data_set_that_cannot_be_opened_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FetchError, match="empty cannot be opened.*check the name"):
        stream_pile(tmp_path / "empty")


def test_the_hub_is_asked_for_the_default_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[object, ...]] = []

    def record(*args: object, **options: object) -> None:
        asked.append((*args, options["streaming"], options["split"]))
        raise ConnectionError("no network")

    monkeypatch.setattr(streaming, "load_dataset", record)
    with pytest.raises(FetchError, match="monology/pile-uncopyrighted cannot"):
        stream_pile()
    with pytest.raises(FetchError, match=r"wikimedia/wikipedia \(20231101.en\)"):
        stream_wikipedia_mix(seed=0)
    assert asked == [
        ("monology/pile-uncopyrighted", None, True, "train"),
        ("wikimedia/wikipedia", "20231101.en", True, "train"),
    ]


def test_documents_are_taken_up_to_a_number_per_category(pile: Path) -> None:
    taken = take_documents(stream_pile(pile), per_category=2)
    assert taken == {
        "FreeLaw": ["document 0", "document 3"],
        "Github": ["document 1", "document 4"],
        "ArXiv": ["document 2", "document 5"],
    }
    few = take_documents(stream_pile(pile), per_category=2, limit=4)
    assert few["FreeLaw"] == ["document 0", "document 3"]
    assert few["ArXiv"] == ["document 2"]


def test_taking_nothing_is_an_error(pile: Path) -> None:
    with pytest.raises(DataError, match="holds no document"):
        take_documents(stream_pile(pile, subsets=["none"]), per_category=1)
    with pytest.raises(DataError, match="per_category is 0"):
        take_documents([], per_category=0)
    with pytest.raises(DataError, match="limit is 0"):
        take_documents([], per_category=1, limit=0)
