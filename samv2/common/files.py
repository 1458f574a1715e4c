"""Files and folders that are replaced whole: a crash leaves the old or the new one."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HALF = re.compile(r"\.(.+)-[a-z0-9_]{8}")
"""Names of temporary files and folders; the group is what they were to become."""


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes ``folder``'s place when the block succeeds.

    Everything in it is flushed to disk before the rename. On an error nothing changes.
    Replacing an existing folder takes two renames; power lost between them leaves the
    old one as ``.NAME-xxxx/old`` beside it. Permissions follow the umask.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = _beside(folder)
    made.mkdir()
    try:
        yield made
        mode = made.stat().st_mode & 0o666
        for path in made.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # libraries have modes of their own
                flush(path)
        if folder.exists():
            _swap(made, folder)
        else:
            os.replace(made, folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _swap(made: Path, folder: Path) -> None:
    aside = _beside(folder)
    aside.mkdir()
    old = aside / "old"
    try:
        os.replace(folder, old)
        os.replace(made, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replace a file by ``data``, flushed to disk before it takes the name.

    ``mode`` is the file's permissions, less what the umask takes away; nobody has more
    at any moment.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = _beside(path)
    handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
        flush(path.parent)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a file by ``value`` as indented JSON; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def sweep(folder: Path, names: Callable[[str], bool] = lambda name: True) -> None:
    """Remove what a killed process left half written directly in a folder.

    Args:
        folder: where :func:`write_bytes` and :func:`replace_folder` wrote.
        names: which files and folders may have been written; others stay.

    An old folder that was moved aside and has no successor is put back.
    """
    for path in list(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        match = _HALF.fullmatch(path.name)
        if match is None or not names(match[1]):
            continue
        target, old = path.with_name(match[1]), path / "old"
        if old.exists() and not target.exists():
            os.replace(old, target)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, for :func:`sweep` to know, that is not taken."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def flush(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
