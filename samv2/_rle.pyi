"""Types of the C++ codec; see csrc/bindings.cpp. Use samv2.updates.packing instead."""

from numpy import int16, int32
from numpy.typing import NDArray

isa: str

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
    out: object | None,
) -> bytes | int: ...
def decode(
    frame: bytes,
    manifest: list[tuple[int, int, int]],
    *,
    fingerprint: int,
    round: int,
    allow_nonfinite: bool,
) -> list[tuple[int, NDArray[int32] | NDArray[int16]]]: ...
def decode_into(
    frame: bytes,
    manifest: list[tuple[int, int, int]],
    *,
    fingerprint: int,
    round: int,
    allow_nonfinite: bool,
    outputs: dict[int, object],
) -> tuple[list[int], list[int]]: ...
def accumulate(
    frames: list[tuple[bytes, float]],
    manifest: list[tuple[int, int, int]],
    *,
    fingerprint: int,
    round: int,
    allow_nonfinite: bool,
    accumulators: dict[int, object],
    skip: set[int],
) -> list[int]: ...
def squared_norms(
    frame: bytes,
    manifest: list[tuple[int, int, int]],
    *,
    fingerprint: int,
    round: int,
    allow_nonfinite: bool,
) -> dict[int, float]: ...
def kth_magnitude(sources: list[object], k: int) -> int: ...
def keep_largest(sources: list[object], keep: int, outputs: list[object]) -> None: ...
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
