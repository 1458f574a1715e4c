"""This process's memory, as Linux tells it.

The peak is VmHWM, which starts anew with a program; ``ru_maxrss`` would start at what the
parent had.
"""

from __future__ import annotations

from pathlib import Path


def memory_bytes(name: str) -> int:
    """A line of this process's memory: ``VmRSS`` now, ``VmHWM`` at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; this bench needs Linux")
