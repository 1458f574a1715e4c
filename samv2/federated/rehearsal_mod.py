"""The faults of a rehearsal, as a Flower client mod around the honest client app."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from samv2.common.settings import Settings
from samv2.federated.client_round import TrainReply
from samv2.federated.grid import reply_from_record, reply_to_record
from samv2.federated.rehearsal import ATTEMPT, attack_of, fault_of, warning
from samv2.federated.workers import CLIENT_FAILED
from samv2.updates.packing import Manifest, pack, unpack

log = logging.getLogger(__name__)

FOREIGN_STYPE = "numpy.ndarray"
SCALE = 100.0
"""By which a scaled update is larger than the honest one."""


def rehearsal_mod(
    settings_of: Callable[[Context], Settings],
    client_of: Callable[[Context], int],
    manifest_of: Callable[[Message, Context], Manifest],
) -> Mod:
    """A mod that makes clients fail and lie as the section ``rehearsal`` says.

    Args:
        settings_of: of the run, from a client's context.
        client_of: its index.
        manifest_of: of the model's trainable blocks, from a request and a context.
    """

    def mod(message: Message, context: Context, honest: ClientAppCallable) -> Message:
        if not message.metadata.message_type.startswith("train"):
            return honest(message, context)
        settings = settings_of(context)
        if warning(settings) is None:
            return honest(message, context)
        client, round = client_of(context), int(message.content["config"]["round"])
        fault = fault_of(settings, round, client, _attempt(message.content))
        if fault is not None:
            log.warning("REHEARSAL: client %d, round %d: %s", client, round, fault)
            return _fail(fault, message)
        reply = honest(message, context)
        attack = attack_of(settings, round, client)
        if attack is None or reply.has_error():
            return reply
        log.warning("REHEARSAL: client %d, round %d: %s", client, round, attack)
        manifest = manifest_of(message, context)
        content = tampered(attack, reply.content, round, manifest, settings)
        return Message(content, reply_to=message)

    return mod


def _attempt(content: RecordDict) -> int:
    return int(content[ATTEMPT]["number"]) if ATTEMPT in content else 0


def _fail(fault: str, message: Message) -> Message:
    """Fail in one way; only a worker of the embedded grid really dies."""
    if fault == "silence":
        return None  # type: ignore[return-value]
    if fault == "error":
        return Message(Error(CLIENT_FAILED, "rehearsal: an error"), reply_to=message)
    if fault == "die" and multiprocessing.parent_process() is not None:
        os._exit(1)
    raise RuntimeError(f"rehearsal: {fault}")


def tampered(
    attack: str, content: RecordDict, round: int, manifest: Manifest, settings: Settings
) -> RecordDict:
    """An honest reply's content as a hostile client sends it.

    Args:
        attack: one of ``settings_checks.ATTACKS``.
        content: the honest reply's.
        round: of the request.
        manifest: of the blocks.
        settings: of the run, for the codec.
    """
    honest = reply_from_record(content)
    if attack in _FIELDS:
        return reply_to_record(replace(honest, **_FIELDS[attack](honest)))
    if attack in _FRAMES:
        frame = _FRAMES[attack](honest.update)
        return reply_to_record(replace(honest, update=frame))
    if attack in _VALUES:
        update = unpack(honest.update, manifest, round=round)
        block = min(update, key=lambda key: update[key].numel())
        made = update[block].new_full(update[block].shape, _VALUES[attack])
        frame = pack({block: made}, manifest, round=round)
        return reply_to_record(replace(honest, update=frame))
    if attack in _FACTORS:
        factor, shift = _FACTORS[attack]
        update = unpack(honest.update, manifest, round=round)
        changed: dict[int, Tensor] = {key: factor * x for key, x in update.items()}
        codec = settings.federation.codec
        frame = pack(changed, manifest, round=round + shift, codec=codec)
        return reply_to_record(replace(honest, update=frame))
    if attack == "float_examples":
        content["metrics"]["examples"] = honest.examples + 0.5
        return content
    arrays = dict(content["payload"])
    name = "evil" if attack == "foreign_keys" else "update"
    data = npz_bomb() if attack == "npz_bomb" else npy_bomb()
    arrays[name] = Array(dtype="float32", shape=(1,), stype=FOREIGN_STYPE, data=data)
    content["payload"] = ArrayRecord(arrays)
    return content


def npy_bomb() -> bytes:
    """A .npy file of 128 bytes whose header claims ten thousand million floats."""
    facts = "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000,), }"
    header = facts.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def npz_bomb(numbers: int = 1 << 22) -> bytes:
    """A .npz file, a thousandth of what it unpacks to (float64 zeros)."""
    file = io.BytesIO()
    np.savez_compressed(file, np.zeros(numbers))
    return file.getvalue()


def _flipped(frame: bytes) -> bytes:
    changed = bytearray(frame)
    changed[len(frame) // 2] ^= 1
    return bytes(changed)


_FIELDS: Mapping[str, Callable[[TrainReply], Mapping[str, int]]] = {
    "huge_examples": lambda reply: {"examples": 2**62},
    "negative_examples": lambda reply: {"examples": -reply.examples},
    "zero_examples": lambda reply: {"examples": 0},
    "wrong_graph": lambda reply: {"graph_version": reply.graph_version + 7},
}
_FRAMES: Mapping[str, Callable[[bytes], bytes]] = {
    "truncated": lambda frame: frame[:-3],
    "bit_flip": _flipped,
    "garbage": lambda frame: np.random.default_rng(len(frame)).bytes(len(frame)),
}
_VALUES = {"nan": float("nan"), "inf": float("inf")}
_FACTORS = {"sign_flip": (-1.0, 0), "scale": (SCALE, 0), "stale_round": (1.0, -1)}
"""{attack: (factor of the values, shift of the round)}."""
