"""Write the benchmark protocols' text: one folder a domain, split as they say.

    python bench/protocol_text.py FOLDER [DOMAIN ...]

Long lines that repeat in a domain are dropped, documents shuffled with seed 0; the first,
each cut to 16 KiB, are held out until there are 64 KiB, and those that follow are for
training, up to 2 MiB. ``samv2 bench-federation`` takes the folders as ``NAME=FOLDER/NAME``
and keeps the split to the letter. ``samv2``'s own division (:mod:`samv2.data.division`)
also keeps passages from being in two parts; the protocols were measured without that.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from samv2.common.fetch import cache_dir
from samv2.data.division import deduplicate
from samv2.data.sources import load_domain

DOMAINS = ("legal", "bible", "biomed", "chat", "python", "wiki")
HELDOUT_BYTES, TRAIN_BYTES, DOCUMENT_BYTES = 2**16, 2**21, 2**14


def protocol_split(documents: Sequence[str]) -> tuple[str, str]:
    """Train and held-out text of one domain.

    Args:
        documents: deduplicated, in the order of their source.
    """
    shuffled = list(documents)
    random.Random(0).shuffle(shuffled)
    heldout: list[str] = []
    size = 0
    while shuffled and size < HELDOUT_BYTES:
        document = _cut(shuffled.pop(0), DOCUMENT_BYTES)
        heldout.append(document)
        size += len(document.encode()) + 2
    train: list[str] = []
    size = 0
    for document in shuffled:
        if size >= TRAIN_BYTES:
            break
        train.append(document)
        size += len(document.encode()) + 2
    return "\n\n".join(train), _cut("\n\n".join(heldout), HELDOUT_BYTES)


def _cut(text: str, most: int) -> str:
    return text.encode()[:most].decode("utf-8", "ignore")


def main() -> None:
    """Write the folders and print what ``--set`` takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("domains", nargs="*", default=list(DOMAINS))
    arguments = parser.parse_args()
    for name in arguments.domains:
        documents = deduplicate(load_domain(name, cache_dir(), progress=print))
        train, heldout = protocol_split(documents)
        folder = arguments.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, text in (("train", train), ("heldout", heldout)):
            (folder / f"{part}.txt").write_text(text, encoding="utf-8")
            digest = hashlib.sha256(text.encode()).hexdigest()[:10]
            print(f"{name} {part}: {len(text.encode()):,} bytes, sha256 {digest}")
    given = ",".join(f"{name}={arguments.folder / name}" for name in arguments.domains)
    print(f"\n--set data.domains={given}")


if __name__ == "__main__":
    main()
