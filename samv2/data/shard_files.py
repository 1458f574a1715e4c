"""Federated text on disk: one safetensors file a client, plus ``index.json``.

A client's file is complete in itself, so a client can be handed its own file and
nothing else. Every file is written under another name and renamed; the index is written
last, so a folder without an index is an unfinished one.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from samv2.common.errors import DataError
from samv2.data.shard_types import (
    ClientShard,
    FederatedIndex,
    FederatedText,
    LaterText,
)

FORMAT = 1
"""Version of the folder's layout."""

_INDEX = "index.json"
_CALIBRATION = "calibration.safetensors"
_HELDOUT_PREFIX = "heldout."
_LATER = re.compile(r"later\.(\d+)\.(train|heldout\.(.+))", re.DOTALL)


def save_federated_text(text: FederatedText, folder: Path) -> None:
    """Write all clients, the calibration text and the index; replaces older ones.

    Args:
        text: what to write.
        folder: made if it does not exist. Tokens are stored as int32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)
    for stale in folder.glob("client_*.safetensors"):
        stale.unlink()
    for client in text.clients:
        tensors = {f"{_HELDOUT_PREFIX}{n}": s for n, s in client.heldout.items()}
        for round, later in client.later.items():
            tensors[f"later.{round}.train"] = later.train
            for name, stream in later.heldout.items():
                tensors[f"later.{round}.{_HELDOUT_PREFIX}{name}"] = stream
        facts = {
            "index": client.index,
            "category_counts": client.category_counts,
            "description": client.description,
            "tokenizer_fingerprint": client.tokenizer_fingerprint,
        }
        path = folder / client_file(client.index)
        _write_tensors(path, {"train": client.train, **tensors}, facts)
    _write_tensors(folder / _CALIBRATION, text.calibration, {})
    _write_index(folder, text.index)


def load_client(
    folder: Path, index: int, *, tokenizer_fingerprint: str | None = None
) -> ClientShard:
    """Read one client's shard; no other file is opened.

    Args:
        folder: folder with the client's file.
        index: number of the client, from 0.
        tokenizer_fingerprint: that of the tokenizer in use; unchecked if None.

    Raises:
        DataError: no such client, a damaged file, tokens of another tokenizer.
    """
    tensors, facts = _read_tensors(folder / client_file(index))
    try:
        shard = ClientShard(
            index=int(facts["index"]),
            train=tensors["train"],
            heldout={
                name.removeprefix(_HELDOUT_PREFIX): stream
                for name, stream in tensors.items()
                if name.startswith(_HELDOUT_PREFIX)
            },
            category_counts=dict(facts["category_counts"]),
            description=str(facts["description"]),
            tokenizer_fingerprint=str(facts["tokenizer_fingerprint"]),
            later=_read_later(tensors),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / client_file(index)} lacks {error}: it is not a client's file; "
            "build the federated text again."
        ) from error
    if tokenizer_fingerprint not in (None, shard.tokenizer_fingerprint):
        raise DataError(
            f"The tokens of client {index} were made by the tokenizer "
            f"{shard.tokenizer_fingerprint[:12]}, not by {tokenizer_fingerprint[:12]}: "
            "use the model they were made for or build the federated text again."
        )
    return shard


def _read_later(tensors: Mapping[str, Tensor]) -> dict[int, LaterText]:
    """Text by the first round of it."""
    trains: dict[int, Tensor] = {}
    heldouts: dict[int, dict[str, Tensor]] = {}
    for name, stream in tensors.items():
        if match := _LATER.fullmatch(name):
            round = int(match[1])
            if match[3] is None:
                trains[round] = stream
            else:
                heldouts.setdefault(round, {})[match[3]] = stream
    return {
        round: LaterText(train=train, heldout=heldouts.get(round, {}))
        for round, train in sorted(trains.items())
    }


def load_calibration(folder: Path) -> dict[str, Tensor]:
    """Read the calibration tokens by domain, long (N,); DataError if damaged."""
    return _read_tensors(folder / _CALIBRATION)[0]


def load_index(folder: Path) -> FederatedIndex:
    """Read the figures of all clients.

    Raises:
        DataError: the index is missing, damaged or of another version.
    """
    path = folder / _INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        if version != FORMAT:
            raise DataError(
                f"{path} has the format {version}, this version reads {FORMAT}: build "
                "the federated text again."
            )
        lists = ("domains", "category_counts", "train_tokens")
        return FederatedIndex(**{**content, **{n: tuple(content[n]) for n in lists}})
    except FileNotFoundError as error:
        raise DataError(
            f"There is no {path}: the folder is not federated text, or writing it was "
            "interrupted; build it again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({error}): build the federated text again."
        ) from error


def load_federated_text(folder: Path) -> FederatedText:
    """Read everything that :func:`save_federated_text` wrote."""
    index = load_index(folder)
    clients = tuple(load_client(folder, i) for i in range(index.num_clients))
    return FederatedText(
        clients=clients, calibration=load_calibration(folder), index=index
    )


def client_file(index: int) -> str:
    """The name of a client's file in a folder of shards."""
    return f"client_{index:05d}.safetensors"


def _write_tensors(
    path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    small = {name: tensor.to(torch.int32) for name, tensor in tensors.items()}
    metadata = {"format": str(FORMAT), "facts": json.dumps(facts)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        staged = Path(folder) / path.name
        save_file(small, staged, metadata=metadata)
        os.replace(staged, path)


def _write_index(folder: Path, index: FederatedIndex) -> None:
    content = json.dumps({"format": FORMAT, **asdict(index)}, indent=1)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as staging:
        staged = Path(staging) / _INDEX
        staged.write_text(content + "\n", encoding="utf-8")
        os.replace(staged, folder / _INDEX)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as long, and the facts in the file's header."""
    if not path.is_file():
        raise DataError(
            f"There is no {path}: check the client's number and the folder."
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {name: file.get_tensor(name).long() for name in file.keys()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}): build the federated text again."
        ) from error
    return tensors, facts
