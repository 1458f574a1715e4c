"""Types of the C++ codec; see csrc/bindings.cpp. Use samv2.updates.packing instead."""

from numpy import int16, int32
from numpy.typing import NDArray

def encode(
    tensors: list[tuple[int, int, int, object]],
    *,
    codec: int,
    block_log2: int,
    quant_log2: int,
    seed: int | None,
    round: int,
    fingerprint: int,
    error_feedback: bool,
) -> bytes: ...
def decode(
    frame: bytes,
    manifest: list[tuple[int, int, int]],
    *,
    fingerprint: int,
    round: int,
    allow_nonfinite: bool,
) -> list[tuple[int, NDArray[int32] | NDArray[int16]]]: ...
def accumulate(
    frame: bytes,
    manifest: list[tuple[int, int, int]],
    *,
    fingerprint: int,
    round: int,
    allow_nonfinite: bool,
    weight: float,
    accumulators: dict[int, object],
    skip: set[int],
) -> list[int]: ...
def inspect(
    frame: bytes,
) -> tuple[
    int,
    int,
    int,
    int,
    list[tuple[int, int, int, int, int, int, int, int, int, int, int, tuple[int, ...]]],
]: ...
def xxh3_64(data: bytes) -> int: ...
