"""Files and folders that are replaced whole: a crash leaves the old or the new one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes ``folder``'s place when the block succeeds.

    Everything in it is flushed to disk before the rename. On an error nothing changes.
    Replacing an existing folder takes two renames; power lost between them leaves the
    old one as ``.NAME-xxxx/old`` beside it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield made
        for path in made.rglob("*"):
            if path.is_file():
                flush(path)
        made.chmod(0o755)
        if folder.exists():
            _swap(made, folder)
        else:
            os.replace(made, folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _swap(made: Path, folder: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
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


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file by ``data``, flushed to disk before it takes the name.

    ``mode`` is the file's permissions; nobody has more at any moment.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
        flush(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a file by ``value`` as indented JSON; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def flush(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
