"""Fetching wheels: verified, unpacked once, never half done, never outside the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from samv2.common import fetch, wheel_cache
from samv2.common.errors import FetchError
from samv2.common.fetch import WheelTarget, cache_dir, fetch_distribution
from samv2.common.wheel_cache import MARKER, entry_fault, file_sha256

FILES = {"textpack/data/one.txt": "first text\n", "textpack/data/two.txt": "second\n"}


def build_wheel(folder: Path, files: dict[str, str], tag: str = "py3-none-any") -> Path:
    """Write a valid wheel of ``textpack 1.0`` that holds the files."""
    info = "textpack-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: textpack\nVersion: 1.0\n"
    wheel_facts = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
    path = folder / f"textpack-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel_facts)
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def pip_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the package index there is for the real pip."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with a copy in place of pip, which is slow to start."""
    folder = tmp_path / "index"
    folder.mkdir()

    def copy(name: str, version: str, staging: Path, target: object) -> Path:
        (wheel,) = folder.glob(f"{name}-{version}-*.whl")
        return Path(shutil.copy(wheel, staging))

    monkeypatch.setattr(fetch, "_download", copy)
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to make every later use of pip an error."""

    def forbid() -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("pip was called")

        monkeypatch.setattr(fetch.subprocess, "run", refuse)

    return forbid


def leftovers(cache: Path) -> list[str]:
    """Names of all that is in the wheel cache."""
    return sorted(path.name for path in (cache / "wheels").iterdir())


def test_fetch_unpacks_once_and_is_offline_afterwards(
    pip_index: Path, tmp_path: Path, no_pip: Callable[[], None]
) -> None:
    sha256 = file_sha256(build_wheel(pip_index, FILES))
    messages: list[str] = []
    folder = fetch_distribution(
        "textpack", "1.0", cache=tmp_path, sha256=sha256, progress=messages.append
    )
    assert folder == tmp_path / "wheels" / "textpack-1.0"
    assert (folder / "textpack/data/one.txt").read_text() == "first text\n"
    assert messages == ["Downloading textpack 1.0.", "Unpacking textpack 1.0."]
    no_pip()
    assert fetch_distribution("textpack", "1.0", cache=tmp_path, sha256=sha256)
    assert entry_fault(folder, sha256="0" * 64) == "it comes from another wheel"
    assert leftovers(tmp_path) == ["textpack-1.0"]


def test_only_the_named_members_are_unpacked_and_more_are_fetched_later(
    index: Path, tmp_path: Path
) -> None:
    build_wheel(index, FILES)
    folder = fetch_distribution("textpack", "1.0", cache=tmp_path, members=["*/one*"])
    assert sorted(p.name for p in folder.rglob("*.txt")) == ["one.txt"]
    fetch_distribution("textpack", "1.0", cache=tmp_path, members=["*/two*"])
    assert sorted(p.name for p in folder.rglob("*.txt")) == ["one.txt", "two.txt"]


def test_members_that_match_nothing_are_an_error(index: Path, tmp_path: Path) -> None:
    build_wheel(index, FILES)
    with pytest.raises(FetchError, match="no file that matches"):
        fetch_distribution("textpack", "1.0", cache=tmp_path, members=["*.obo"])
    assert leftovers(tmp_path) == []


def test_another_checksum_is_refused_and_leaves_nothing(
    index: Path, tmp_path: Path
) -> None:
    found = file_sha256(build_wheel(index, FILES))
    with pytest.raises(FetchError, match=f"sha256 {found}, expected {'0' * 64}"):
        fetch_distribution("textpack", "1.0", cache=tmp_path, sha256="0" * 64)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda f: (f / MARKER).unlink(), "its marker is missing"),
        (lambda f: (f / MARKER).write_text("{"), "its marker is damaged"),
        (lambda f: (f / MARKER).write_text("[]"), "its marker is damaged"),
        (lambda f: (f / "textpack/data/one.txt").unlink(), "one.txt is missing"),
        (lambda f: (f / "textpack/data/one.txt").write_text("fIrst text\n"), "damaged"),
    ],
)
def test_a_damaged_entry_is_noticed_and_fetched_again(
    index: Path, tmp_path: Path, damage: Callable[[Path], object], fault: str
) -> None:
    build_wheel(index, FILES)
    folder = fetch_distribution("textpack", "1.0", cache=tmp_path)
    damage(folder)
    messages: list[str] = []
    fetch_distribution("textpack", "1.0", cache=tmp_path, progress=messages.append)
    assert fault in messages[0]
    assert (folder / "textpack/data/one.txt").read_text() == "first text\n"
    assert leftovers(tmp_path) == ["textpack-1.0"]


def test_an_interrupted_fetch_leaves_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(index, FILES)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "write_marker", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_distribution("textpack", "1.0", cache=tmp_path)
    assert leftovers(tmp_path) == []


def test_what_a_killed_fetch_left_is_removed_after_a_day(
    index: Path, tmp_path: Path
) -> None:
    build_wheel(index, FILES)
    old, young = tmp_path / "wheels/.partial-old", tmp_path / "wheels/.partial-young"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (0, 0))
    fetch_distribution("textpack", "1.0", cache=tmp_path)
    assert leftovers(tmp_path) == [".partial-young", "textpack-1.0"]


def test_two_processes_can_fetch_the_same_wheel_at_once(
    pip_index: Path, tmp_path: Path
) -> None:
    sha256 = file_sha256(build_wheel(pip_index, FILES))
    code = (
        "import sys; from pathlib import Path\n"
        "from samv2.common.fetch import fetch_distribution\n"
        "fetch_distribution('textpack', '1.0', cache=Path(sys.argv[1]))"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    running = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], env=environment)
        for _ in range(2)
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    assert entry_fault(tmp_path / "wheels/textpack-1.0", sha256=sha256) is None
    assert leftovers(tmp_path) == ["textpack-1.0"]


def test_publish_keeps_the_entry_that_another_process_made(tmp_path: Path) -> None:
    for name in ("entry", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
        wheel_cache.write_marker(tmp_path / name, "f" * 64, [])
    wheel_cache.publish(
        tmp_path / "mine", tmp_path / "entry", sha256="f" * 64, members=[]
    )
    assert (tmp_path / "entry/a.txt").read_text() == "entry"


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a\\..\\evil", "C:/evil"])
def test_entries_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    wheel = tmp_path / "bad.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("good.txt", "good")
        archive.writestr(name, "evil")
    with pytest.raises(FetchError, match="outside the cache"):
        wheel_cache.unpack(wheel, tmp_path / "out", [])
    assert list((tmp_path / "out").iterdir()) == []


def test_symbolic_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(FetchError, match="'link'"):
        wheel_cache.unpack(tmp_path / "bad.whl", tmp_path / "out", [])


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.whl").write_text("no zip")
    with pytest.raises(FetchError, match="not a readable wheel"):
        wheel_cache.unpack(tmp_path / "bad.whl", tmp_path / "out", [])


def test_a_wheel_that_is_nowhere_names_the_remedy(
    pip_index: Path, tmp_path: Path
) -> None:
    with pytest.raises(FetchError, match="textpack==1.0 could not.*demo --offline"):
        fetch_distribution("textpack", "1.0", cache=tmp_path)


def test_a_wheel_for_another_machine_can_be_read_as_files(
    pip_index: Path, tmp_path: Path
) -> None:
    build_wheel(pip_index, FILES, tag="cp39-cp39-win_amd64")
    with pytest.raises(FetchError):
        fetch_distribution("textpack", "1.0", cache=tmp_path)
    target = WheelTarget(python_version="3.9", abi="cp39", platform="win_amd64")
    folder = fetch_distribution("textpack", "1.0", cache=tmp_path, target=target)
    assert (folder / "textpack/data/two.txt").read_text() == "second\n"


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("WARNING: Retrying after connection broken by 'X'\nERROR: no", "offline"),
        ("Temporary failure in name resolution", "seems to be offline"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: No matching distribution found for a==1", "has no such wheel"),
        ("", "pip said nothing"),
    ],
)
def test_pip_complaints_become_remedies(stderr: str, words: str) -> None:
    assert words in fetch._explain("a==1", stderr)


@pytest.mark.parametrize(
    ("name", "version"), [("-r", "1"), ("a", "1 --pre"), ("", "1")]
)
def test_a_name_or_version_that_pip_would_misread_is_refused(
    tmp_path: Path, name: str, version: str
) -> None:
    with pytest.raises(FetchError, match="is not valid"):
        fetch_distribution(name, version, cache=tmp_path)


def test_a_cache_that_cannot_be_made_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="set SAMV2_CACHE"):
        fetch_distribution("textpack", "1.0", cache=tmp_path / "file")


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMV2_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("SAMV2_CACHE", "")
    assert cache_dir().name == "samv2"


def test_the_marker_records_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    wheel_cache.write_marker(tmp_path, "f" * 64, ["*.txt"])
    assert json.loads((tmp_path / MARKER).read_text()) == {
        "wheel_sha256": "f" * 64,
        "members": ["*.txt"],
        "files": {
            "a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        },
    }
