"""Tile configurations that were measured on a GPU, kept on disk.

One JSON file, by default ``~/.cache/samv2_kernels/tuned.json``; the environment variable
``SAMV2_KERNELS_TUNED`` names another one, or switches all this off (``off``). An entry is
valid for one device name, Triton version, package version, kernel source and shape; all
are part of its key, which is a string in one canonical form, so that what was stored is
what is found again. A file that cannot be read is reported and ignored.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, SupportsIndex, cast

import torch
import triton

import samv2_kernels

Config = dict[str, int]
Key = Mapping[str, int | str]

VARIABLE = "SAMV2_KERNELS_TUNED"
OFF = ("off", "0")
FORMAT = 1
NOT_KERNELS = ("bench_cases.py", "configs.py", "spec.py", "specs.py")
"""Files of ``gpu/`` that do not change what a configuration compiles to."""

_forced: dict[str, Config] = {}
"""Of the whole process: CUDA's autograd runs backward passes in a thread of its own."""
_recorders: list[list[tuple[str, dict[str, int | str]]]] = []


class TunedWarning(UserWarning):
    """The file of tuned configurations is ignored."""


def cache_path() -> Path | None:
    """The file; None: switched off."""
    named = os.environ.get(VARIABLE)
    if named in OFF:
        return None
    if named:
        return Path(named).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "samv2_kernels" / "tuned.json"


@cache
def source_hash() -> str:
    """Of all kernels: a changed helper changes every kernel that calls it."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "gpu").glob("*.py")):
        if path.name not in NOT_KERNELS:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def device_name(index: int | None = None) -> str:
    """Name of a CUDA device; ``no GPU`` where there is none."""
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else "no GPU"


def plain(value: object) -> int | str:
    """A key's value as JSON gives it back.

    Raises:
        TypeError: neither an integer (of any library) nor a string.
    """
    if isinstance(value, str):
        return value
    return int(operator.index(cast(SupportsIndex, value)))


def entry_key(kernel: str, key: Key) -> str:
    """Canonical form of everything an entry depends on, on the current device.

    Args:
        kernel: name of the kernel.
        key: its shape, e.g. ``{"rows": 64, "width": 4096}``; the order does not matter.
    """
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    parts = {
        "device": device_name(index),
        "triton": triton.__version__,
        "package": samv2_kernels.__version__,
        "source": source_hash(),
        "kernel": kernel,
        "shape": {str(name): plain(value) for name, value in key.items()},
    }
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))


def checked(content: Any) -> dict[str, Config]:
    """Entries of a parsed file.

    Raises:
        ValueError: it is not what :func:`store_tuned` writes.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a file of tuned configurations of format {FORMAT}")
    entries = content.get("entries")
    if not isinstance(entries, dict):
        raise ValueError("no entries")
    for key, config in entries.items():
        values = config.values() if isinstance(config, dict) else [None]
        if not all(type(value) is int for value in values):
            raise ValueError(f"the configuration of {key} is {config!r}, not integers")
    return entries


def load_tuned(path: Path) -> dict[str, Config]:
    """Entries of a file by canonical key.

    Args:
        path: of the file; it need not exist.

    Returns:
        The entries; none, and a :class:`TunedWarning`, where the file is damaged.
    """
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path} is ignored: {error}. Delete it, or run python -m samv2_kernels.tune "
            "on a GPU to write it anew.",
            TunedWarning,
            stacklevel=2,
        )
        return {}


_loaded = cache(load_tuned)
"""Once per file and process; :func:`store_tuned` forgets what was loaded."""


def store_tuned(kernel: str, key: Key, config: Config, path: Path) -> None:
    """Add or replace one entry; a reader sees the old file or the new one.

    Args:
        kernel: name of the kernel.
        key: its shape.
        config: tile configuration, integers.
        path: of the file; folders are made. A damaged one is replaced.

    Raises:
        OSError: the file cannot be written.
        TypeError: a value is no integer.
    """
    entries = load_tuned(path)
    entries[entry_key(kernel, key)] = {
        name: operator.index(value) for name, value in config.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            content = {"format": FORMAT, "entries": entries}
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _loaded.cache_clear()


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Make :func:`lookup` answer with a configuration, whatever the shape.

    Holds for all threads of the process, until the block ends.
    """
    old = _forced.get(kernel)
    _forced[kernel] = config
    try:
        yield
    finally:
        if old is None:
            del _forced[kernel]
        else:
            _forced[kernel] = old


@contextmanager
def recorded() -> Iterator[list[tuple[str, dict[str, int | str]]]]:
    """Note which kernels and shapes :func:`lookup` is asked for, in order, each once."""
    asked: list[tuple[str, dict[str, int | str]]] = []
    _recorders.append(asked)
    try:
        yield asked
    finally:
        _recorders[:] = [other for other in _recorders if other is not asked]


def lookup(kernel: str, key: Key) -> Config | None:
    """Measured configuration of a kernel on the current device.

    Args:
        kernel: name of the kernel.
        key: its shape, as it was stored.

    Returns:
        A new dict, or None: not tuned, or switched off.
    """
    for asked in _recorders:
        entry = (kernel, {name: plain(value) for name, value in key.items()})
        if entry not in asked:
            asked.append(entry)
    if config := _forced.get(kernel):
        return dict(config)
    path = cache_path()
    if path is None:
        return None
    entries = _loaded(path)
    config = entries.get(entry_key(kernel, key)) if entries else None
    return dict(config) if config else None
