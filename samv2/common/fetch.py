"""Files that ship inside wheels: download once, verify, unpack, never import.

A wheel is a zip archive, so text and models that a distribution carries can be read
without installing or importing it. An entry of the cache is a folder
``<cache>/wheels/<name>-<version>/`` with the unpacked files and a marker that records
the checksum of the wheel and of every file. The marker is written last and the folder
is renamed into place as a whole, so an interrupted fetch leaves nothing that looks
complete, and two processes can fetch the same wheel at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from samv2.common.errors import FetchError
from samv2.common.wheel_cache import (
    STAGING_PREFIX,
    entry_fault,
    file_sha256,
    publish,
    unpack,
    wider_members,
    write_marker,
)

_STALE_SECONDS = 24 * 3600
_OFFLINE = re.compile(
    r"connection broken|NewConnectionError|name resolution|Name or service not known"
    r"|getaddrinfo|Network is unreachable|timed out|ProxyError|Max retries|--no-index",
    re.IGNORECASE,
)

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class WheelTarget:
    """Which of a distribution's binary wheels to read, whatever this machine is.

    Only for data inside a wheel that also holds compiled code: the same wheel, and so
    the same checksum, is then read everywhere.
    """

    python_version: str
    """Interpreter version, e.g. ``"3.11"``."""
    abi: str
    """ABI tag, e.g. ``"cp311"``."""
    platform: str
    """Platform tag, e.g. ``"manylinux_2_28_x86_64"``."""


def cache_dir() -> Path:
    """Folder for downloads and built corpora.

    Returns:
        The environment variable ``SAMV2_CACHE`` when it is set and not empty, else the
        user cache folder of the platform. The folder need not exist yet.
    """
    chosen = os.environ.get("SAMV2_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("samv2")


def fetch_distribution(
    name: str,
    version: str,
    *,
    cache: Path,
    sha256: str | None = None,
    members: Sequence[str] = (),
    target: WheelTarget | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder with the unpacked files of one wheel, fetching it if needed.

    Args:
        name: distribution name on the package index.
        version: exact version.
        cache: root of the cache, see :func:`cache_dir`.
        sha256: expected checksum of the wheel file, hexadecimal; unchecked if None.
        members: shell patterns of the files to unpack; empty means all of them.
        target: the binary wheel to read; None means one that fits this machine.
        progress: called with one sentence before every slow step.

    Returns:
        ``cache/wheels/<name>-<version>``. A second call is offline and only verifies.

    Raises:
        FetchError: no network, no such wheel, a wrong checksum or an unsafe archive.
    """
    _check_requirement(name, version)
    say = progress or _silent
    wheels = cache / "wheels"
    folder = wheels / f"{name}-{version}"
    fault = entry_fault(folder, sha256=sha256, members=members)
    if fault is None:
        return folder
    if folder.exists():
        say(f"The cached {name} {version} is not usable ({fault}); fetching it again.")
        members = wider_members(members, folder)
    _make_folder(wheels)
    _remove_stale(wheels)
    with tempfile.TemporaryDirectory(dir=wheels, prefix=STAGING_PREFIX) as staging:
        say(f"Downloading {name} {version}.")
        wheel = _download(name, version, Path(staging), target)
        found = file_sha256(wheel)
        if sha256 is not None and found != sha256:
            raise FetchError(
                f"The wheel of {name} {version} has sha256 {found}, expected {sha256}: "
                "it is not the file that was pinned. Try again; if it stays so, do "
                "not use it and check which package index pip is set to use."
            )
        say(f"Unpacking {name} {version}.")
        unpacked = Path(staging) / "unpacked"
        unpack(wheel, unpacked, members)
        write_marker(unpacked, found, members)
        publish(unpacked, folder, sha256=sha256, members=members)
    return folder


def _silent(message: str) -> None:
    """Ignore a progress message."""


def _check_requirement(name: str, version: str) -> None:
    for label, value in (("name", name), ("version", version)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+!-]*", value):
            raise FetchError(
                f"The distribution {label} {value!r} is not valid: use letters, "
                "digits, dots, dashes and underscores."
            )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"The cache folder {folder} cannot be made ({error}): set SAMV2_CACHE to a "
            "folder you can write to."
        ) from error


def _remove_stale(wheels: Path) -> None:
    """Remove what killed fetches left behind more than a day ago."""
    for path in wheels.glob(f"{STAGING_PREFIX}*"):
        try:
            age_seconds = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        if age_seconds > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _download(
    name: str, version: str, staging: Path, target: WheelTarget | None
) -> Path:
    """Run ``pip download`` for one wheel and return its path."""
    requirement = f"{name}=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(staging)]
    if target is not None:
        command += ["--implementation", "cp", "--abi", target.abi]
        command += ["--platform", target.platform]
        command += ["--python-version", target.python_version]
    result = subprocess.run(
        [*command, requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(staging.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise FetchError(_explain(requirement, result.stderr))


def _explain(requirement: str, stderr: str) -> str:
    """Turn pip's complaint into one that names the remedy."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "pip said nothing"
    if "No module named pip" in stderr:
        remedy = "pip is missing here: run `python -m ensurepip` and try again"
    elif _OFFLINE.search(stderr):
        remedy = (
            "this machine seems to be offline, or its package index cannot be "
            "reached: try again with a network, or go on without this download "
            "(`samv2 demo --offline`)"
        )
    else:
        remedy = (
            "the package index has no such wheel, or this machine is offline: try "
            "again with a network, or go on without this download "
            "(`samv2 demo --offline`)"
        )
    return f"{requirement} could not be downloaded: {remedy}. pip's last words: {last}"
