"""``samv2 inspect``: a frame in words, and refusals with their meaning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from samv2 import _rle
from samv2.cli import main
from samv2.commands.inspect_frame import BLOCK_WORDS
from samv2.common.errors import FrameError
from samv2.updates.frame_info import MODES, verify
from samv2.updates.frame_reasons import REASONS
from samv2.updates.packing import Manifest, inspect, pack

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.bin"))


@pytest.fixture
def frame_file(tmp_path: Path) -> Path:
    """A frame of two tensors: one of four blocks, one dense in int8."""
    scattered = torch.zeros(200_000)
    scattered[:70_000:100] = 1.5
    scattered[140_000:] = -2.0
    update = {3: scattered, 8: torch.arange(1.0, 1001.0)}
    path = tmp_path / "update.bin"
    frame = pack(
        update, Manifest.of(update), round=12, codec="int8", error_feedback=True
    )
    path.write_bytes(frame)
    return path


def shown(
    capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0
) -> Any:
    """What the command printed: output and errors."""
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == status
    return capsys.readouterr()


def test_a_frame_is_told_in_words(
    frame_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = inspect(frame_file.read_bytes())
    printed = shown(capsys, frame_file)
    assert printed.err == ""
    words = " ".join(printed.out.split())
    for part in (
        "version 1.0",
        "rounded by a codec",
        "error feedback",
        "round 12",
        f"fingerprint {info.fingerprint:016x}",
        f"bytes {info.total_bytes:,}",
        "8 f32 int8 1,000 1,000 100% 1 dense 0 1,000 16",
    ):
        assert part in words, f"{part!r} is not in: {printed.out}"


def test_blocks_are_counted_by_mode(
    frame_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor, _ = inspect(frame_file.read_bytes()).tensors
    words = "".join(shown(capsys, frame_file).out.split())
    for mode, count in tensor.modes.items():
        if count:
            first, *rest = BLOCK_WORDS[mode].split()
            assert f"{count}{first}" in words and all(word in words for word in rest)
    assert set(BLOCK_WORDS) == set(MODES)


def test_json_adds_up(frame_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, frame_file, "--json").out)
    info = inspect(frame_file.read_bytes())
    assert found["file"] == str(frame_file) and found["refused"] is None
    assert (found["version"], found["round"]) == ([1, 0], 12)
    assert (found["lossless"], found["error_feedback"]) == (False, True)
    assert int(found["fingerprint"], 16) == info.fingerprint
    parts = ("index_bytes", "value_bytes", "scale_bytes", "header_bytes")
    sizes = sum(tensor[part] for tensor in found["tensors"] for part in parts)
    assert 72 + sizes == found["bytes"] == frame_file.stat().st_size
    first = found["tensors"][0]
    assert (first["id"], first["dtype"], first["codec"]) == (3, "float32", "int8")
    assert (first["numel"], first["dense_bytes"]) == (200_000, 800_000)
    assert first["modes"] == dict(info.tensors[0].modes)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_frozen_frames_are_sound(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert path.name in shown(capsys, path).out.replace("\n", "")
    assert json.loads(shown(capsys, path, "--json").out)["refused"] is None


def test_the_frames_of_a_run(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = sorted((run_folder / "frames").iterdir())
    assert [path.name for path in frames] == [
        f"round_0001_client_{client:04d}.{kind}"
        for client in range(2)
        for kind in ("bin", "usage.bin")
    ]
    paths, counts = frames[::2], frames[1::2]
    logged = [
        line.split()
        for line in (run_folder / "pack_sizes.txt").read_text().splitlines()
    ]
    for path, row in zip(paths, logged[2:], strict=True):
        found = json.loads(shown(capsys, path, "--json").out)
        assert (found["round"], found["bytes"]) == (1, int(row[7]))
        assert len(found["tensors"]) == int(row[2])
    for path in counts:
        found = json.loads(shown(capsys, path, "--json").out)
        assert found["lossless"] and [item["id"] for item in found["tensors"]] == [
            0,
            1,
            2,
        ]


def refused(
    path: Path, frame: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> Any:
    """What is printed of a frame that must be refused for ``reason``."""
    path.write_bytes(frame)
    as_json = json.loads(shown(capsys, path, "--json", status=1).out)
    assert as_json["refused"]["reason"] == reason
    assert as_json["refused"]["meaning"] == REASONS[reason]
    printed = shown(capsys, path, status=1)
    assert f"{path} is refused" in printed.err
    assert f"[{reason}]" in printed.err and REASONS[reason] in printed.err
    return printed


def test_refusals_have_a_reason_and_its_meaning(
    frame_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = frame_file.read_bytes()
    damaged = frame[:-20] + bytes([frame[-20] ^ 1]) + frame[-19:]
    for bad, reason in (
        (b"", "truncated"),
        (b"x" * 100, "magic"),
        (frame[:-1], "frame_length"),
        (damaged, "body_hash"),
    ):
        assert refused(frame_file, bad, reason, capsys).out == ""


def test_values_are_checked_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A frame that is whole, but that no server takes: the table is shown as well."""
    update = {1: torch.tensor([1.0, float("nan"), 0.0])}
    frame = pack(update, Manifest.of(update), round=1)
    inspect(frame)
    with pytest.raises(FrameError, match="nonfinite"):
        verify(frame)
    printed = refused(tmp_path / "nan.bin", frame, "nonfinite", capsys)
    assert "bitmap" in printed.out
    values = frame.index(update[1][:1].numpy().tobytes())
    clear = bytearray(frame)
    clear[values : values + 8] = bytes(8)
    clear[-8:] = _rle.xxh3_64(bytes(clear[96:-8])).to_bytes(8, "little")
    refused(tmp_path / "zero.bin", bytes(clear), "zero_value", capsys)


def test_a_path_that_is_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, words in (
        (tmp_path, "is a folder; name one file in it"),
        (tmp_path / "none.bin", "does not exist; check the path"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["inspect", str(path)])
        assert caught.value.code == 2
        assert f"{path} {words}" in capsys.readouterr().err


def test_every_documented_reason_has_its_meaning() -> None:
    text = (ROOT / "docs" / "wire_format.md").read_text(encoding="utf-8")
    table = text.split("## 10.")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|$", table, re.MULTILINE)
    assert dict(rows) == dict(REASONS)
