"""Corpora: deduplicated, divided without overlap, cached under what decides them."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from samv2.common.errors import DataError, FetchError
from samv2.data import corpus as corpus_module
from samv2.data import sources
from samv2.data.corpus import (
    PartSizes,
    build_corpus,
    corpus_from_documents,
    deduplicate,
    divide,
)
from samv2.data.division import PARTS
from samv2.data.extractors import python_source

MakeDocuments = Callable[..., list[str]]

LONG = "This line is long enough that it counts as a long line of the licence, sixty."
SMALL = PartSizes(
    heldout_bytes=3000, calibration_bytes=2000, train_bytes=9000, min_train_bytes=4000
)


def size(documents: tuple[str, ...]) -> int:
    return sum(len(document.encode()) for document in documents)


def test_long_lines_stay_only_where_they_come_first() -> None:
    documents = [
        f"one\n{LONG}\nshort line",
        f"two is here\n{LONG.upper()}!!\nshort line",
    ]
    assert deduplicate(documents) == [
        f"one\n{LONG}\nshort line",
        "two is here\nshort line",
    ]


def test_a_line_repeated_inside_a_document_goes_too() -> None:
    assert deduplicate([f"{LONG}\n{LONG}"]) == [LONG]


def test_documents_that_dedup_empties_are_left_out() -> None:
    assert deduplicate([LONG, LONG, "tiny"]) == [LONG]


def test_lone_surrogates_are_replaced() -> None:
    assert deduplicate(["a document with a lone \ud83d surrogate"]) == [
        "a document with a lone ? surrogate"
    ]


def test_parts_have_their_sizes_and_share_no_document(
    random_documents: MakeDocuments,
) -> None:
    documents = random_documents("law", 80)
    text = divide(documents, name="law", seed=0, sizes=SMALL)
    assert (size(text.heldout), size(text.calibration)) == (3000, 2000)
    assert size(text.train) == 9000
    origins = [{document.split()[1] for document in text.part(part)} for part in PARTS]
    assert (
        not origins[0] & origins[1] | origins[0] & origins[2] | origins[1] & origins[2]
    )


def test_division_depends_on_seed_and_name_only(
    random_documents: MakeDocuments,
) -> None:
    documents = random_documents("law", 80)
    text = divide(documents, name="law", seed=0, sizes=SMALL)
    assert divide(documents, name="law", seed=0, sizes=SMALL) == text
    assert divide(documents, name="law", seed=1, sizes=SMALL).heldout != text.heldout
    assert divide(documents, name="news", seed=0, sizes=SMALL).heldout != text.heldout


def test_long_documents_are_cut_so_that_several_are_held_out(
    random_documents: MakeDocuments,
) -> None:
    documents = random_documents("law", 12, words=5000)
    sizes = PartSizes(heldout_bytes=40_000, calibration_bytes=20_000)
    text = divide(documents, name="law", seed=0, sizes=sizes)
    assert [len(d.encode()) for d in text.heldout] == [16384, 16384, 40_000 - 32_768]
    assert [len(d.encode()) for d in text.calibration] == [16384, 20_000 - 16384]


def test_a_cut_inside_a_character_wastes_no_document() -> None:
    documents = [chr(0x4E00 + 40 * i + j) * 50 for i in range(20) for j in range(2)]
    sizes = PartSizes(
        heldout_bytes=1000, calibration_bytes=500, train_bytes=2000, min_train_bytes=1
    )
    text = divide(documents, name="zh", seed=0, sizes=sizes)
    assert (size(text.heldout), size(text.calibration)) == (999, 498)
    assert len(text.heldout) == 7 and len(text.train) > 13


def test_templated_documents_keep_their_common_wording() -> None:
    documents = [f"{LONG * 3}\nanswer number {i} of many" for i in range(200)]
    given = {"task": [*documents, *documents]}
    corpus = corpus_from_documents(given, seed=0, sizes=SMALL, templated=True)
    whole = [d for part in PARTS for d in corpus.domains["task"].part(part)[:-1]]
    assert all(document.startswith(LONG * 3) for document in whole)
    assert len(set(whole)) == len(whole)
    bare = corpus_from_documents(given, seed=0, sizes=SMALL)
    assert sum(d.startswith(LONG) for d in bare.domains["task"].train) <= 1


def test_a_domain_that_is_too_small_names_the_sizes(
    random_documents: MakeDocuments,
) -> None:
    documents = random_documents("law", 10)
    expected = "'law' is too small: 10 documents .* 3,000, calibration 2,000 .* 4,000"
    with pytest.raises(DataError, match=expected):
        divide(documents, name="law", seed=0, sizes=SMALL)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(DataError, match="heldout_bytes is 0"):
        PartSizes(heldout_bytes=0)
    assert PartSizes(calibration_bytes=0).calibration_bytes == 0


def test_real_text_never_overlaps_between_parts() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = deduplicate(python_source(root)[::3])
    sizes = PartSizes(train_bytes=300_000, heldout_bytes=40_000)
    text = divide(documents, name="python", seed=0, sizes=sizes)
    seen: set[str] = set()
    for part in PARTS[::-1]:  # held-out, calibration, train
        chunks = {d[i : i + 200] for d in text.part(part) for i in range(len(d) - 199)}
        assert len(chunks) > 20_000
        assert not chunks & seen
        seen |= chunks
    documents_of_parts = [set(text.part(part)) for part in PARTS]
    assert sum(map(len, documents_of_parts)) == len(set.union(*documents_of_parts))


@pytest.fixture
def notes(tmp_path: Path, random_documents: MakeDocuments) -> str:
    """A user's domain as it is written on the command line."""
    rows = [json.dumps({"text": text}) for text in random_documents("notes", 80)]
    (tmp_path / "notes.jsonl").write_text("\n".join(rows))
    return f"notes={tmp_path / 'notes.jsonl'}"


def test_a_second_build_is_read_from_disk(
    tmp_path: Path, notes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_corpus([notes], cache=tmp_path, seed=0, sizes=SMALL)
    assert first.names == ("notes",)
    monkeypatch.setattr(corpus_module, "load_domain", None)
    second = build_corpus([notes], cache=tmp_path, seed=0, sizes=SMALL)
    assert second == first and second.sha256 == first.sha256
    assert set(first.sha256["notes"]) == set(PARTS)
    assert len({*first.sha256["notes"].values()}) == 3


def test_the_cache_key_holds_seed_sizes_and_content(tmp_path: Path, notes: str) -> None:
    built = [build_corpus([notes], cache=tmp_path, seed=s, sizes=SMALL) for s in (0, 1)]
    assert built[0].sha256 != built[1].sha256
    other = PartSizes(**{**SMALL.__dict__, "train_bytes": 8000})
    assert (
        size(
            build_corpus([notes], cache=tmp_path, seed=0, sizes=other)
            .domains["notes"]
            .train
        )
        == 8000
    )
    path = Path(notes.partition("=")[2])
    path.write_text("\n".join(path.read_text().split("\n")[:70]))
    changed = build_corpus([notes], cache=tmp_path, seed=0, sizes=SMALL)
    assert changed.sha256 != built[0].sha256
    assert len(list((tmp_path / "corpora").iterdir())) == 4


def test_a_damaged_corpus_is_built_again(tmp_path: Path, notes: str) -> None:
    first = build_corpus([notes], cache=tmp_path, seed=0, sizes=SMALL)
    (path,) = (tmp_path / "corpora").iterdir()
    for damaged in ("{", "[]", path.read_text().replace("notes 1", "notes 9", 1)):
        path.write_text(damaged)
        assert build_corpus([notes], cache=tmp_path, seed=0, sizes=SMALL) == first


def test_a_missing_source_is_skipped_or_an_error(
    tmp_path: Path, notes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> Path:
        raise FetchError("this machine seems to be offline")

    monkeypatch.setattr(sources, "fetch_distribution", offline)
    skipped: dict[str, str] = {}
    built = build_corpus(
        ["legal", notes],
        cache=tmp_path,
        seed=0,
        sizes=SMALL,
        on_skip=skipped.__setitem__,
    )
    assert built.names == ("notes",)
    assert skipped == {"legal": "this machine seems to be offline"}
    with pytest.raises(FetchError):
        build_corpus(["legal", notes], cache=tmp_path, seed=0, sizes=SMALL)


def test_a_domain_too_small_is_never_skipped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'pydoc' is too small"):
        build_corpus(
            ["pydoc"],
            cache=tmp_path,
            seed=0,
            sizes=PartSizes(min_train_bytes=10**7),
            on_skip=lambda name, reason: None,
        )


def test_no_domain_is_an_error() -> None:
    with pytest.raises(DataError, match="no domains"):
        corpus_from_documents({}, seed=0)
