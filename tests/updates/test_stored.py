"""A stored frame is read from where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from samv2.updates.stored import read_frame


def test_a_frame_is_the_same_in_memory_and_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "frame.bin"
    path.write_bytes(b"\0frame\r\n")
    assert read_frame(path) == read_frame(b"\0frame\r\n") == b"\0frame\r\n"
    with pytest.raises(OSError, match="gone.bin"):
        read_frame(tmp_path / "gone.bin")
