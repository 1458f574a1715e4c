"""Seconds and bytes of the codec, beside memcpy.

Run as a script, it prints the rows of all cases as JSON; ``SAMV2_ISA`` (scalar, avx2,
avx512) chooses the code path when the extension is imported, so each path needs a
process of its own.

**Clock.** CPU time of this thread, the least of many repetitions, contenders taking
turns with memcpy: other processes on the machine take time on the clock and now and then
bandwidth, but not the least CPU time; what remains falls on memcpy and codec alike. The
codec uses one thread, so no work escapes.

**Pages.** What is copied, packed and unpacked lies on pages of 4 KiB, where torch puts its
tensors; numpy asks for huge ones, on which memcpy gains more than the codec.
``SAMV2_BENCH_HUGE=1`` asks for them too.

**Warm memory.** Fresh pages cost several times what the codec does, and whoever decodes
round after round has warm ones. So the allocator is told to keep what is freed;
``SAMV2_BENCH_FRESH=1`` leaves it as it is.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from packing_cases import CASES, Case
from torch import Tensor

from samv2 import _rle
from samv2.updates.packing import Manifest, accumulate, pack, pack_into, unpack
from tests.updates.packing_frames import same_bits

ROUND = 1
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def code_path() -> str | None:
    """``scalar``, ``avx2`` or ``avx512``; None where the build has only one."""
    return getattr(_rle, "isa", None)


def keep_memory_warm() -> None:
    """Let glibc's allocator use freed memory again instead of returning it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and os.environ.get("SAMV2_BENCH_FRESH") != "1":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def fastest(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    least: int = 5,
    most: int = 40,
) -> dict[str, float]:
    """Least CPU seconds of each, taking turns; a first turn only warms memory up.

    Args:
        runs: the contenders.
        seconds: after which no further turn begins.
        least: turns that are taken in any case.
        most: turns at most.
    """
    best = dict.fromkeys(runs, float("inf"))
    begin = time.perf_counter()
    for turn in range(most + 1):
        if turn > least and time.perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            start = time.thread_time_ns()
            run()
            taken = (time.thread_time_ns() - start) / 1e9
            if turn:
                best[name] = min(best[name], taken)
    return best


def on_pages(tensor: Tensor) -> Tensor:
    """A copy on pages of the kind that the run asks for."""
    memory = mmap.mmap(-1, max(1, tensor.nbytes))
    if os.environ.get("SAMV2_BENCH_HUGE") == "1":
        memory.madvise(mmap.MADV_HUGEPAGE)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel())
    return copy.copy_(tensor)


class Packed:
    """One tensor with all that is needed to pack and unpack it again and again."""

    def __init__(self, tensor: Tensor, codec: str = "raw") -> None:
        self.update = {0: on_pages(tensor)}
        self.codec = codec
        self.manifest = Manifest.of(self.update)
        self.total = {0: on_pages(torch.zeros_like(tensor))}
        self.copied = on_pages(torch.ones_like(tensor))
        self.frame = pack(self.update, self.manifest, round=ROUND, codec=codec)
        self.decoded = {0: on_pages(torch.ones_like(tensor))}
        frame = on_pages(torch.ones(len(self.frame), dtype=torch.uint8))
        self.packed = memoryview(frame.numpy())

    def encode(self) -> int:
        return pack_into(
            self.update, self.manifest, self.packed, round=ROUND, codec=self.codec
        )

    def decode(self) -> dict[int, Tensor]:
        return unpack(self.frame, self.manifest, round=ROUND, out=self.decoded)

    def accumulate(self) -> None:
        accumulate(self.frame, self.manifest, 0.5, self.total, round=ROUND)

    def memcpy(self) -> None:
        tensor = self.update[0]
        ctypes.memmove(self.copied.data_ptr(), tensor.data_ptr(), tensor.nbytes)

    def check(self) -> None:
        """Every result is right before it is timed."""
        assert self.packed[: self.encode()] == self.frame, "two frames of one update"
        decoded = self.decode()[0]
        if self.codec == "raw":
            assert same_bits(decoded, self.update[0]), "a value did not survive"
        else:
            error = float((decoded - self.update[0]).abs().max())
            scale = float(self.update[0].abs().max())
            most = scale / (6 if self.codec == "nf4" else 13)
            assert error <= most, f"{self.codec} is off by {error / scale:.3f}"
        self.total[0].zero_()
        self.accumulate()
        assert torch.equal(self.total[0], 0.5 * decoded), "a value was added wrongly"

    @property
    def operations(self) -> dict[str, Callable[[], object]]:
        return {
            "encode": self.encode,
            "decode": self.decode,
            "accumulate": self.accumulate,
        }


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a case; speeds are memcpy's time over ours."""

    case: str
    memcpy_ms: float
    encode: float
    decode: float
    accumulate: float
    frame_bytes: int
    frame_hash: int
    size: float
    """Bytes over (values + entropy)."""
    of_dense: float
    """Bytes over float32."""

    def miss(self, operation: str, share: float) -> str | None:
        """What is wrong with a speed, with ``share`` of its bar asked for."""
        bar = getattr(CASES[self.case], operation, None)
        reached = getattr(self, operation)
        if bar is None or reached >= share * bar:
            return None
        return (
            f"{self.case}: {operation} at {reached:.2f} x memcpy, needed "
            f"{share * bar:.2f}"
        )


def measure(case: Case, packed: Packed, *, seconds: float = 2.0) -> Row:
    """Time a checked case."""
    tensor, size = packed.update[0], len(packed.frame)
    best = fastest({"memcpy": packed.memcpy, **packed.operations}, seconds=seconds)
    return Row(
        case=case.name,
        memcpy_ms=1e3 * best["memcpy"],
        **{name: best["memcpy"] / best[name] for name in packed.operations},
        frame_bytes=size,
        frame_hash=_rle.xxh3_64(packed.frame),
        size=size / case.bound(tensor),
        of_dense=size / tensor.nbytes,
    )


def main() -> None:
    """All cases, for the code path of this process."""
    keep_memory_warm()
    torch.set_num_threads(1)
    rows = []
    for case in CASES.values():
        packed = Packed(case.tensor(), case.codec)
        packed.check()
        rows.append(asdict(measure(case, packed, seconds=1.0)))
    json.dump({"code_path": code_path(), "rows": rows}, sys.stdout)


@cache
def rows_on_path(path: str) -> tuple[str | None, dict[str, Row]]:
    """The path that a process asked for ``path`` takes, and its rows by case.

    None and no rows where the machine cannot take it.
    """
    script = Path(__file__).resolve()
    root = script.parents[1]
    search = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"SAMV2_ISA": path, "PYTHONPATH": search},
        cwd=root,
        capture_output=True,
        text=True,
    )
    if "SAMV2_ISA is" in done.stderr:
        return None, {}
    if done.returncode:
        raise RuntimeError(f"measuring {path} failed:\n{done.stderr}")
    answer = json.loads(done.stdout)
    return answer["code_path"], {row["case"]: Row(**row) for row in answer["rows"]}


if __name__ == "__main__":
    main()
