"""Updates as bytes: pack on the client, unpack or accumulate on the server.

The format is docs/wire_format.md; the codec is the C++ extension in csrc/, and
:mod:`samv2.updates._reference_decoder` is the same decoder in readable Python.
Every function here is pure but :func:`accumulate`, which adds in place.
"""

from __future__ import annotations

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
    "inspect",
    "pack",
    "unpack",
]

_DEFAULT_QUANT_BLOCK = {"int8": 256, "int4": 64}
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
    contiguous or not on the CPU are copied first.

    Args:
        update: ``{id: tensor}``; ids a subset of the manifest's, shapes and dtypes as
            the manifest says. May be empty.
        manifest: the round's manifest, the same on the receiver.
        round: round number, 0 to 2^64 - 1.
        codec: ``raw``, ``bf16``, ``f16``, ``int8`` or ``int4`` (both by absmax).
            A 16-bit codec on a tensor of the same dtype is stored as ``raw``.
        stochastic_seed: None rounds to nearest even. An int, 0 to 2^64 - 1, rounds
            stochastically and without bias, by a generator keyed by (seed, round, id,
            element); give each client its own seed.
        quant_block: values that share one float32 scale: a power of two from 32 to
            4096; default 256 for ``int8``, 64 for ``int4``; only for these two.
        block: elements that share one index mode: a power of two, 4096 to 65536.
        error_feedback: recorded in the frame; changes nothing else.

    Returns:
        The frame.

    Raises:
        PackError: a tensor does not fit the manifest, a setting is out of range, or a
            lossy codec meets a value that is not finite before or after rounding.
    """
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
        )
    except PackError:
        raise
    except ValueError as error:
        raise PackError(f"the update cannot be packed: {error}") from error


def unpack(
    frame: Frame, manifest: Manifest, *, round: int, allow_nonfinite: bool = False
) -> dict[int, Tensor]:
    """Decodes a frame into dense tensors.

    Args:
        frame: the received bytes; need not be trusted.
        manifest: the receiver's own manifest; the frame may carry a subset of its ids.
        round: the round the frame must belong to.
        allow_nonfinite: accept NaN and infinities.

    Returns:
        ``{id: tensor}`` for the ids in the frame; new CPU tensors with the manifest's
        shapes and dtypes.

    Raises:
        FrameError: the frame is refused; ``reason`` is a slug of docs/wire_format.md.
        PackError: ``round`` is out of range.
    """
    arrays = _rle.decode(
        immutable(frame),
        manifest.rows,
        fingerprint=manifest.fingerprint,
        round=_u64("round", round),
        allow_nonfinite=allow_nonfinite,
    )
    result = {}
    for id_, array in arrays:
        position = manifest.position(id_)
        flat = torch.from_numpy(array).view(manifest.dtypes[position])
        result[id_] = flat.reshape(manifest.shapes[position])
    return result


def accumulate(
    frame: Frame,
    manifest: Manifest,
    weight: float,
    accumulator: dict[int, Tensor],
    *,
    round: int,
    only: Iterable[int] | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Adds a weighted frame in place, without a dense tensor in between.

    At every stored position ``a = fl32(a + fl32(fl32(weight) * value))``, where
    ``value`` is what :func:`unpack` returns, widened to float32. Other positions are
    not touched. All or nothing: on any error no accumulator has changed.

    Args:
        frame: the received bytes; need not be trusted.
        manifest: the receiver's own manifest.
        weight: finite; rounded to float32.
        accumulator: ``{id: tensor}``, contiguous float32 CPU tensors of the manifest's
            shapes, for at least the ids that are added.
        round: the round the frame must belong to.
        only: ids to add; others in the frame are checked and left out. None: all.
        allow_nonfinite: accept NaN and infinities.

    Raises:
        FrameError: the frame is refused.
        PackError: an accumulator is missing or does not fit, or an argument is out of
            range.
    """
    if not abs(weight) <= _MAX_FLOAT32:
        raise PackError(f"weight is {weight}, it must be finite in float32")
    wanted = set(manifest.ids) if only is None else set(only)
    for id_ in wanted.difference(manifest.ids):
        manifest.position(id_)
    buffers = {
        id_: _accumulator_buffer(id_, tensor, manifest)
        for id_, tensor in accumulator.items()
        if id_ in wanted
    }
    missing = _rle.accumulate(
        immutable(frame),
        manifest.rows,
        fingerprint=manifest.fingerprint,
        round=_u64("round", round),
        allow_nonfinite=allow_nonfinite,
        weight=weight,
        accumulators=buffers,
        skip=set(manifest.ids) - wanted,
    )
    if missing:
        raise PackError(
            f"the frame carries ids {missing} that the accumulator lacks; add zeros for "
            "them, or leave them out with `only`"
        )


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
    bits = flat.view(torch.int32 if dtype == torch.float32 else torch.int16)
    return id_, DTYPE_CODES[dtype], flat.numel(), bits.numpy()


def _accumulator_buffer(id_: int, tensor: Tensor, manifest: Manifest) -> object:
    shape = manifest.shapes[manifest.position(id_)]
    fits = (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tuple(tensor.shape) == shape
        and tensor.is_contiguous()
    )
    if not fits:
        raise PackError(
            f"accumulator {id_} is {tensor.dtype} on {tensor.device} with shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()}; it must be a "
            f"contiguous float32 CPU tensor of shape {shape}"
        )
    return tensor.detach().view(-1).numpy()
