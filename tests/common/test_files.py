"""Files and folders are replaced whole or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest

from samv2.common import files
from samv2.common.files import replace_folder, sweep, write_bytes, write_json


class Crash(BaseException):
    """Something that nobody catches, like a KeyboardInterrupt."""


def fill(folder: Path, text: str) -> None:
    with replace_folder(folder) as target:
        (target / "inner").mkdir()
        (target / "a.txt").write_text(text)
        (target / "inner" / "b.txt").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    fill(folder, "one")
    (folder / "left over").write_text("old")
    fill(folder, "two")
    assert contents(folder) == {"a.txt": "two", "inner/b.txt": "two"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [ValueError, Crash])
def test_a_failure_while_writing_changes_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    fill(tmp_path / "model", "old")
    with pytest.raises(error):
        with replace_folder(tmp_path / "model") as target:
            (target / "a.txt").write_text("half")
            raise error
    with pytest.raises(error):
        with replace_folder(tmp_path / "other"):
            raise error
    assert contents(tmp_path) == {"model/a.txt": "old", "model/inner/b.txt": "old"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_at_either_rename_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    fill(tmp_path / "model", "old")
    rename, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="no space"):
        fill(tmp_path / "model", "new")
    assert len(calls) >= failing
    assert contents(tmp_path) == {"model/a.txt": "old", "model/inner/b.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_everything_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    flush, rename = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda p: (log.append(p.name), flush(p)))
    monkeypatch.setattr(
        files.os, "replace", lambda a, b: (log.append("rename"), rename(a, b))
    )
    fill(tmp_path / "model", "one")
    assert sorted(log[:2]) == ["a.txt", "b.txt"]
    assert log[2:] == ["rename", tmp_path.name]


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"one")
    write_bytes(path, b"")
    assert path.read_bytes() == b""
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [item.name for item in path.parent.iterdir()] == ["file"]
    write_bytes(path, b"mine", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
def test_a_failure_while_writing_a_file_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(files.os, name, fail)
        with pytest.raises(Crash):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("umask, bits", [(0o077, 0o700), (0o027, 0o750), (0, 0o777)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, bits: int) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):
            fill(tmp_path / "model", "x")
            write_bytes(tmp_path / "file", b"x")
            write_bytes(tmp_path / "secret", b"x", mode=0o600)
    finally:
        os.umask(before)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert found == {"model": bits, "file": bits & 0o666, "secret": 0o600}


def test_json_round_trips(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"ü": "ß"}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and text.endswith("\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_json_refuses_what_is_no_number(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text() == "1\n"


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".config.toml-ab12cd34").write_text("half")
    (tmp_path / ".round_0001-zz_zz_99").mkdir()
    (tmp_path / ".round_0001-zz_zz_99" / "state.json").write_text("half")
    (tmp_path / ".theirs-ab12cd34").write_text("of somebody else")
    (tmp_path / ".model-ab12cd34" / "old").mkdir(parents=True)
    (tmp_path / ".model-ab12cd34" / "old" / "weights").write_text("old")
    for name in (".gitignore", "config.toml", ".short-abc", ".env-LOCALFILE"):
        (tmp_path / name).write_text("stays")
    sweep(tmp_path, lambda name: name != "theirs")
    assert {path.name for path in tmp_path.iterdir()} == {
        ".theirs-ab12cd34",
        "model",
        ".gitignore",
        "config.toml",
        ".short-abc",
        ".env-LOCALFILE",
    }
    assert (tmp_path / "model" / "weights").read_text() == "old"
    sweep(tmp_path / "missing")
