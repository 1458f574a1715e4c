"""A packed frame in memory or in a file: a round may have more frames than memory."""

from __future__ import annotations

from pathlib import Path

Stored = bytes | Path
"""A frame, or the file that holds one."""


def read_frame(stored: Stored) -> bytes:
    """The frame itself.

    Raises:
        OSError: its file cannot be read.
    """
    return stored if isinstance(stored, bytes) else stored.read_bytes()
