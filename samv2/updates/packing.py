"""Updates as bytes: pack on the client, unpack or accumulate on the server.

The format is docs/wire_format.md; the codec is the C++ extension in csrc/, and
:mod:`samv2.updates._reference_decoder` is the same decoder in readable Python.
Functions that write into given memory are :func:`pack_into`, :func:`unpack` with
``out``, :func:`accumulate` and :func:`accumulate_all`; the others are pure. The extension
picks the fastest instruction set of the machine (AVX-512, AVX2 or portable code); the
environment variable ``SAMV2_ISA`` (``avx512``, ``avx2``, ``scalar``) forces one. All give
the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from samv2 import _rle
from samv2.common.errors import FrameError
from samv2.updates.frame_info import (
    CODECS,
    Frame,
    FrameInfo,
    TensorInfo,
    immutable,
    inspect,
)
from samv2.updates.manifest import DTYPE_CODES, Manifest, PackError

__all__ = [
    "CODECS",
    "FrameError",
    "FrameInfo",
    "Manifest",
    "PackError",
    "TensorInfo",
    "accumulate",
    "accumulate_all",
    "inspect",
    "pack",
    "pack_into",
    "squared_norm",
    "unpack",
]

_DEFAULT_QUANT_BLOCK = {"int8": 256, "nf4": 64, "int4": 64}
_MAX_FLOAT32 = torch.finfo(torch.float32).max


def pack(
    update: Mapping[int, Tensor],
    manifest: Manifest,
    *,
    round: int,
    codec: str = "raw",
    stochastic_seed: int | None = None,
    quant_block: int | None = None,
    block: int = 65536,
    error_feedback: bool = False,
) -> bytes:
    """Packs an update into one frame.

    An element is stored iff its bit pattern is not zero, so -0.0, denormals and NaN
    payloads survive the ``raw`` codec. Inputs are only read. Tensors that are not
    contiguous or not on the CPU are copied first. Other threads must not write to them.

    Args:
        update: ``{id: tensor}``; ids a subset of the manifest's, shapes and dtypes as
            the manifest says. May be empty.
        manifest: the round's manifest, the same on the receiver.
        round: round number, 0 to 2^64 - 1.
        codec: ``raw``, ``bf16``, ``f16``, or by absmax ``int8``, ``int4`` (linear) or
            ``nf4``. A 16-bit codec on a tensor of the same dtype is stored as ``raw``.
            NF4 suits dense values; after a top-k, where nothing is near zero, ``int4``
            has the smaller error.
        stochastic_seed: None rounds to nearest even. An int, 0 to 2^64 - 1, rounds
            stochastically and without bias, by a generator keyed by (seed, round, id,
            element); give each client its own seed.
        quant_block: values that share one float32 scale: a power of two from 32 to
            4096; default 256 for ``int8``, 64 for ``nf4`` and ``int4``; only for these.
        block: elements that share one index mode: a power of two, 4096 to 65536.
        error_feedback: recorded in the frame; changes nothing else.

    Returns:
        The frame.

    Raises:
        PackError: a tensor does not fit the manifest, a setting is out of range, a lossy
            codec meets a value that is not finite before or after rounding, or another
            thread is seen to write to a tensor.
    """
    frame = _encode(
        update,
        manifest,
        None,
        round=round,
        codec=codec,
        stochastic_seed=stochastic_seed,
        quant_block=quant_block,
        block=block,
        error_feedback=error_feedback,
    )
    assert isinstance(frame, bytes)
    return frame


def pack_into(
    update: Mapping[int, Tensor],
    manifest: Manifest,
    out: bytearray | memoryview,
    *,
    round: int,
    codec: str = "raw",
    stochastic_seed: int | None = None,
    quant_block: int | None = None,
    block: int = 65536,
    error_feedback: bool = False,
) -> int:
    """Packs an update into memory that is used again, which spares its page faults.

    Args:
        out: contiguous writable bytes, aligned to 64 bytes for the highest speed; the
            frame goes to their start.

    The other arguments are those of :func:`pack`.

    Returns:
        Length of the frame in bytes.

    Raises:
        PackError: as :func:`pack`; what ``out`` holds is then undefined. Or ``out`` is
            too small; it is then unchanged.
        BufferError, TypeError: ``out`` is read-only, or not contiguous bytes.
    """
    length = _encode(
        update,
        manifest,
        out,
        round=round,
        codec=codec,
        stochastic_seed=stochastic_seed,
        quant_block=quant_block,
        block=block,
        error_feedback=error_feedback,
    )
    assert isinstance(length, int)
    room = memoryview(out).nbytes
    if length > room:
        raise PackError(f"the frame has {length} bytes, `out` has room for {room}")
    return length


def _encode(
    update: Mapping[int, Tensor],
    manifest: Manifest,
    out: bytearray | memoryview | None,
    *,
    round: int,
    codec: str,
    stochastic_seed: int | None,
    quant_block: int | None,
    block: int,
    error_feedback: bool,
) -> bytes | int:
    if codec not in CODECS:
        raise PackError(f"codec is {codec!r}, known are {', '.join(CODECS)}")
    seed = None if stochastic_seed is None else _u64("stochastic_seed", stochastic_seed)
    try:
        return _rle.encode(
            [_source(id_, update[id_], manifest) for id_ in sorted(update)],
            codec=CODECS[codec],
            block_log2=_log2("block", block, 4096, 65536),
            quant_log2=_quant_log2(codec, quant_block),
            seed=seed,
            round=_u64("round", round),
            fingerprint=manifest.fingerprint,
            error_feedback=error_feedback,
            out=out,
        )
    except PackError:
        raise
    except ValueError as error:
        raise PackError(f"the update cannot be packed: {error}") from error


def unpack(
    frame: Frame,
    manifest: Manifest,
    *,
    round: int,
    allow_nonfinite: bool = False,
    out: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Decodes a frame into dense tensors.

    Args:
        frame: the received bytes; need not be trusted.
        manifest: the receiver's own manifest; the frame may carry a subset of its ids.
        round: the round the frame must belong to.
        allow_nonfinite: accept NaN and infinities.
        out: ``{id: tensor}``, contiguous CPU tensors of the manifest's shapes and dtypes
            for at least the frame's ids, that share no memory. They are written behind
            the back of autograd and in one pass, which spares new memory; if the frame
            is refused, what they hold is undefined. None makes new tensors, and only
            after the whole frame was checked.

    Returns:
        ``{id: tensor}`` for the ids in the frame.

    Raises:
        FrameError: the frame is refused; ``reason`` is a slug of docs/wire_format.md.
        PackError: ``round`` is out of range, or ``out`` lacks an id, does not fit, or
            has tensors that share memory.
    """
    expected = {
        "fingerprint": manifest.fingerprint,
        "round": _u64("round", round),
        "allow_nonfinite": allow_nonfinite,
    }
    if out is not None:
        buffers = {
            id_: _buffer(
                "out", id_, tensor, manifest.dtypes[manifest.position(id_)], manifest
            )
            for id_, tensor in out.items()
        }
        _refuse_overlap("out", out)
        ids, missing = _rle.decode_into(
            immutable(frame), manifest.rows, outputs=buffers, **expected
        )
        if missing:
            raise PackError(f"the frame carries ids {missing} that `out` lacks")
        return {id_: out[id_] for id_ in ids}
    result = {}
    for id_, array in _rle.decode(immutable(frame), manifest.rows, **expected):
        position = manifest.position(id_)
        flat = torch.from_numpy(array).view(manifest.dtypes[position])
        result[id_] = flat.reshape(manifest.shapes[position])
    return result


def accumulate(
    frame: Frame,
    manifest: Manifest,
    weight: float,
    accumulator: Mapping[int, Tensor],
    *,
    round: int,
    only: Iterable[int] | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Adds a weighted frame in place, without a dense tensor in between.

    The same as :func:`accumulate_all` of one frame.
    """
    accumulate_all(
        [(frame, weight)],
        manifest,
        accumulator,
        round=round,
        only=only,
        allow_nonfinite=allow_nonfinite,
    )


def accumulate_all(
    frames: Iterable[tuple[Frame, float]],
    manifest: Manifest,
    accumulator: Mapping[int, Tensor],
    *,
    round: int,
    only: Iterable[int] | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Adds weighted frames in place, block by block over all of them.

    At every stored position ``a = fl32(a + fl32(fl32(weight) * value))``, frame after
    frame in the given order, where ``value`` is what :func:`unpack` returns, widened to
    float32. Other positions are not touched. All or nothing: on any error no accumulator
    has changed. The result is that of adding one frame after the other, in the same
    bits; it is faster, because a block of the sums stays in the cache.

    Args:
        frames: received bytes, which need not be trusted, and their weights: finite,
            rounded to float32.
        manifest: the receiver's own manifest.
        accumulator: ``{id: tensor}``, contiguous float32 CPU tensors of the manifest's
            shapes, for at least the ids that are added, that share no memory. Autograd
            does not see the change.
        round: the round the frames must belong to.
        only: ids to add; others in the frames are checked and left out. None: all.
        allow_nonfinite: accept NaN and infinities.

    Raises:
        FrameError: a frame is refused.
        PackError: an accumulator is missing, does not fit, or shares memory with
            another, or an argument is out of range.
    """
    pairs = []
    for frame, weight in frames:
        if not abs(weight) <= _MAX_FLOAT32:
            raise PackError(f"weight is {weight}, it must be finite in float32")
        pairs.append((immutable(frame), weight))
    wanted = set(manifest.ids) if only is None else set(only)
    for id_ in wanted.difference(manifest.ids):
        manifest.position(id_)
    buffers = {
        id_: _buffer("accumulator", id_, tensor, torch.float32, manifest)
        for id_, tensor in accumulator.items()
        if id_ in wanted
    }
    _refuse_overlap("accumulator", {id_: accumulator[id_] for id_ in buffers})
    missing = _rle.accumulate(
        pairs,
        manifest.rows,
        fingerprint=manifest.fingerprint,
        round=_u64("round", round),
        allow_nonfinite=allow_nonfinite,
        accumulators=buffers,
        skip=set(manifest.ids) - wanted,
    )
    if missing:
        raise PackError(
            f"the frame carries ids {missing} that the accumulator lacks; add zeros for "
            "them, or leave them out with `only`"
        )


def squared_norm(frame: Frame, manifest: Manifest, *, round: int) -> float:
    """Sum of squares of all values a frame carries, in float64, without dense tensors.

    Raises:
        FrameError: the frame is refused.
    """
    norms = _rle.squared_norms(
        immutable(frame),
        manifest.rows,
        fingerprint=manifest.fingerprint,
        round=_u64("round", round),
        allow_nonfinite=False,
    )
    return sum(norms.values())


def _u64(name: str, value: int) -> int:
    if not 0 <= value < 2**64:
        raise PackError(f"{name} is {value}, it must be from 0 to 2^64 - 1")
    return value


def _log2(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most or value & (value - 1):
        raise PackError(
            f"{name} is {value}, it must be a power of two from {least} to {most}"
        )
    return value.bit_length() - 1


def _quant_log2(codec: str, quant_block: int | None) -> int:
    default = _DEFAULT_QUANT_BLOCK.get(codec)
    if default is None:
        if quant_block is not None:
            raise PackError(
                f"quant_block is {quant_block}, but codec {codec!r} has no scales; "
                "leave it out"
            )
        return 0
    return _log2(
        "quant_block", default if quant_block is None else quant_block, 32, 4096
    )


def _source(
    id_: int, tensor: Tensor, manifest: Manifest
) -> tuple[int, int, int, object]:
    position = manifest.position(id_)
    shape, dtype = manifest.shapes[position], manifest.dtypes[position]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise PackError(
            f"tensor {id_} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, the "
            f"manifest says {shape} and {dtype}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return id_, DTYPE_CODES[dtype], flat.numel(), _bits(flat)


def _bits(flat: Tensor) -> object:
    """The buffer of a tensor's bits; not every dtype has one of its values."""
    return flat.view(torch.int32 if flat.itemsize == 4 else torch.int16).numpy()


def _refuse_overlap(name: str, tensors: Mapping[int, Tensor]) -> None:
    """Tensors that share memory would be written over each other."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, id_)
        for id_, tensor in tensors.items()
        if tensor.numel() > 0
    )
    for (_, end, id_), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise PackError(f"{name} {id_} and {other} share memory; give each its own")


def _buffer(
    name: str, id_: int, tensor: Tensor, dtype: torch.dtype, manifest: Manifest
) -> object:
    shape = manifest.shapes[manifest.position(id_)]
    fits = (
        tensor.dtype == dtype
        and tensor.device.type == "cpu"
        and tuple(tensor.shape) == shape
        and tensor.is_contiguous()
    )
    if not fits:
        raise PackError(
            f"{name} {id_} is {tensor.dtype} on {tensor.device} with shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()}; it must be a "
            f"contiguous {dtype} CPU tensor of shape {shape}"
        )
    flat = tensor.detach().view(-1)
    if name == "accumulator":
        return flat.numpy()
    return _bits(flat)
