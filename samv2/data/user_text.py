"""A user's own text as a domain: a .txt file, a folder of them, or a .jsonl file.

A folder that holds ``train.txt`` and ``heldout.txt`` comes with its own split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from samv2.common.errors import DataError
from samv2.common.wheel_cache import file_sha256

DOCUMENT_BYTES = 16 * 1024
"""Longest document made of a .txt file, in UTF-8 bytes."""
SPLIT_PARTS = ("train", "heldout", "calibration")
"""Names, without .txt, of the files of a folder with its own split."""


def read_user_text(path: Path) -> list[str]:
    """Read documents from a path of the user's.

    Args:
        path: a ``.jsonl`` file (one object a line, its ``text`` field is one document),
            a ``.txt`` file, or a folder whose ``.txt`` files are read in name order,
            subfolders too. A .txt file is cut at blank lines into documents of at most
            16 KiB, because train and held-out text are kept apart by document.

    Returns:
        Documents, none of them blank.

    Raises:
        DataError: the path does not exist, is of another kind, or holds no text.
    """
    documents = [text for file in _files(path) for text in _documents(file)]
    if not documents:
        raise DataError(f"{path} holds no text: every document in it is blank.")
    return documents


def own_split(path: Path) -> dict[str, Path] | None:
    """The files of a folder that comes with its own split, by part.

    Args:
        path: a folder with ``train.txt`` and ``heldout.txt``, and ``calibration.txt`` if
            that is there; anything else has no split of its own.

    Raises:
        DataError: a folder with ``heldout.txt`` but not ``train.txt``, or with a split
            and other .txt files beside it.
    """
    if not path.is_dir():
        return None
    known = {part: path / f"{part}.txt" for part in SPLIT_PARTS}
    found = {part: file for part, file in known.items() if file.is_file()}
    if "heldout" not in found:
        return None
    if "train" not in found:
        raise DataError(
            f"The folder {path} holds heldout.txt but no train.txt: add it, or rename "
            "heldout.txt if the text shall be divided here."
        )
    others = sorted({f.name for f in _files(path) if f not in found.values()})
    if others:
        raise DataError(
            f"The folder {path} comes with its own split (train.txt, heldout.txt), but "
            f"also holds {', '.join(others)}: keep one or the other."
        )
    return found


def read_own_split(
    files: Mapping[str, Path], calibration_bytes: int
) -> dict[str, tuple[str, ...]]:
    """Read a split as it is: every file is one document, nothing is removed or moved.

    Args:
        files: see :func:`own_split`.
        calibration_bytes: without a calibration file, this much of the head of the train
            text is calibration text instead, in UTF-8 bytes; 0 leaves it out.

    Returns:
        Documents of ``train``, ``calibration`` and ``heldout``.

    Raises:
        DataError: a file is blank or not UTF-8, or too short to give calibration text.
    """
    texts = {part: _read(file) for part, file in files.items()}
    for part, file in files.items():
        if not texts[part].strip():
            raise DataError(f"{file} holds no text: every part of a split needs some.")
    if "calibration" not in texts and calibration_bytes:
        whole = texts["train"].encode()
        head = whole[:calibration_bytes].decode("utf-8", "ignore")
        texts["calibration"] = head
        texts["train"] = texts["train"][len(head) :]
        if not texts["train"].strip():
            raise DataError(
                f"{files['train']} has {len(whole):,} bytes, all of which calibration "
                f"would take ({calibration_bytes:,}): add text or a calibration.txt, or "
                "lower data.calibration_bytes."
            )
    return {
        part: (texts[part],) if texts.get(part) else ()
        for part in ("train", "calibration", "heldout")
    }


def user_text_identity(path: Path) -> str:
    """Return a sha256 over the names and bytes of all files that would be read."""
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


def split_text(text: str, max_bytes: int = DOCUMENT_BYTES) -> list[str]:
    """Cut a text at blank lines into pieces of at most ``max_bytes`` UTF-8 bytes.

    A paragraph that is longer than that is cut at line ends, a line that is longer
    still at characters.
    """
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for part in _parts(text, max_bytes):
        length = len(part.encode())
        if current and size + length > max_bytes:
            pieces.append("".join(current))
            current, size = [], 0
        current.append(part)
        size += length
    pieces.append("".join(current))
    return [piece.strip() for piece in pieces if piece.strip()]


def _parts(text: str, max_bytes: int) -> list[str]:
    """Cut into indivisible parts that add up to ``text``, each within the limit."""
    parts: list[str] = []
    for paragraph in text.split("\n\n"):
        paragraph += "\n\n"
        if len(paragraph.encode()) <= max_bytes:
            parts.append(paragraph)
            continue
        for line in paragraph.splitlines(keepends=True):
            step = max(1, max_bytes // 4)  # a character has at most 4 bytes
            whole = len(line.encode()) <= max_bytes
            parts += (
                [line]
                if whole
                else [line[i : i + step] for i in range(0, len(line), step)]
            )
    return parts


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise DataError(f"The folder {path} holds no .txt file: add one.")
        return files
    if not path.is_file():
        raise DataError(f"There is no file or folder {path}: check the path.")
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(
            f"{path} ends in {path.suffix!r}: give a .txt file, a folder of .txt "
            "files, or a .jsonl file with a `text` field."
        )
    return [path]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}): convert it to UTF-8."
        ) from error


def _documents(file: Path) -> list[str]:
    content = _read(file)
    if file.suffix != ".jsonl":
        return split_text(content)
    lines = enumerate(content.split("\n"), start=1)
    texts = [_text_field(file, i, line) for i, line in lines if line.strip()]
    return [text for text in texts if text.strip()]


def _text_field(file: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"Line {number} of {file} is not JSON ({error}): write one object a line."
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(
            f"Line {number} of {file} has no string field `text`: add it to every line."
        )
    # JSON may carry lone surrogates, which UTF-8 cannot.
    return str(row["text"]).encode("utf-8", "replace").decode("utf-8")
