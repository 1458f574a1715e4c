"""Documents of a domain → train, calibration and held-out text that never overlap.

Built corpora are kept on disk, one JSON file a domain, under a key made of everything
that decides their content, so the second build reads one file a domain and needs
neither the wheel nor a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from samv2.common.errors import DataError
from samv2.common.fetch import Progress
from samv2.data.division import PARTS, DomainText, PartSizes, deduplicate, divide
from samv2.data.sources import (
    OnSkip,
    domain_identity,
    load_domain,
    parse_domain,
    parse_domains,
    skip_missing,
)
from samv2.data.user_text import own_split, read_own_split

__all__ = [
    "Corpus",
    "DomainText",
    "PartSizes",
    "build_corpus",
    "corpus_from_documents",
    "deduplicate",
    "divide",
]

FORMAT = 1
"""Raised whenever the same documents would be divided in another way."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Domains with their parts, in the order they were asked for."""

    domains: dict[str, DomainText]
    """Text by name of the domain."""
    seed: int
    """Seed of the division."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains, in order."""
        return tuple(self.domains)

    @property
    def sha256(self) -> dict[str, dict[str, str]]:
        """Checksum of each part of each domain: write it next to a result."""
        return {name: text.sha256 for name, text in self.domains.items()}


def corpus_from_documents(
    documents: Mapping[str, Sequence[str]],
    *,
    seed: int,
    sizes: PartSizes = PartSizes(),
    templated: bool = False,
) -> Corpus:
    """Deduplicate and divide documents that are at hand, e.g. from a stream.

    Args:
        documents: documents by name of the domain.
        seed: seed of the division.
        sizes: bytes of each part.
        templated: the documents share wording on purpose, as instructions do; only
            whole repeated documents are dropped and no line is removed.

    Raises:
        DataError: a domain has too little text, or there is no domain.
    """
    if not documents:
        raise DataError("There are no domains: give at least one with documents.")
    domains = {}
    for name, texts in documents.items():
        unique = list(dict.fromkeys(texts)) if templated else deduplicate(texts)
        domains[name] = divide(
            unique, name=name, seed=seed, sizes=sizes, templated=templated
        )
    return Corpus(domains=domains, seed=seed)


def build_corpus(
    specs: Sequence[str],
    *,
    cache: Path,
    seed: int,
    sizes: PartSizes = PartSizes(),
    on_skip: OnSkip | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Load, deduplicate and divide domains, or read them from the cache.

    Args:
        specs: built-in domains and ``NAME=PATH`` entries; a folder with its own split
            (see :func:`samv2.data.user_text.own_split`) keeps it, whatever the sizes.
        cache: root of the cache; corpora are in its folder ``corpora``.
        seed: seed of the division.
        sizes: bytes of each part.
        on_skip: called with name and reason of a domain whose source is missing; when
            None, a missing source is an error.
        progress: called with one sentence before every slow step.

    Raises:
        DataError: unknown domain, a domain too small for the sizes, none left.
        FetchError: a wheel is missing and ``on_skip`` is None.
    """
    named = parse_domains(specs)

    def build(spec: str) -> DomainText | DataError:
        name, own = parse_domain(spec)
        if own is not None and (files := own_split(own)) is not None:
            parts = read_own_split(files, sizes.calibration_bytes)
            return DomainText(name=name, **parts)
        path = cache / "corpora" / _file_name(spec, seed, sizes)
        text = _read_domain(path)
        if text is not None:
            return text
        documents = deduplicate(load_domain(spec, cache, progress=progress))
        try:
            text = divide(documents, name=name, seed=seed, sizes=sizes)
        except DataError as error:
            return error  # wrong sizes are the caller's fault and never skipped
        _write_domain(path, text)
        return text

    if on_skip is None:
        built = {name: build(spec) for name, spec in named.items()}
    else:
        built = skip_missing(named, build, on_skip)
    domains: dict[str, DomainText] = {}
    for name, result in built.items():
        if isinstance(result, DataError):
            raise result
        domains[name] = result
    return Corpus(domains=domains, seed=seed)


def _file_name(spec: str, seed: int, sizes: PartSizes) -> str:
    name, _ = parse_domain(spec)
    key = {
        "format": FORMAT,
        "name": name,
        "identity": domain_identity(spec),
        "seed": seed,
        "sizes": asdict(sizes),
    }
    text = json.dumps(key, sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def _read_domain(path: Path) -> DomainText | None:
    """Read a built domain; None if it is absent or damaged, so that it is rebuilt."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = {part: tuple(content[part]) for part in PARTS}
        text = DomainText(name=content["name"], **parts)
        return text if text.sha256 == content["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_domain(path: Path, text: DomainText) -> None:
    content = {**asdict(text), "sha256": text.sha256}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        staged = Path(folder) / path.name
        staged.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        os.replace(staged, path)
