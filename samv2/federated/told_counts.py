"""What a client has told of its text: token counts, one file a round asked about.

Telling settles nothing: an answer may be late or refused, and a server that was killed
goes back to its checkpoint. So every request to score names the round whose counts the
server goes by, and the client compares its text with those.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samv2.common.errors import CheckpointError
from samv2.common.files import write_bytes
from samv2.data.shards import ClientShard
from samv2.experts.sibling_gate import count_tokens
from samv2.federated.drift import distance
from samv2.federated.siblings import pack_counts

KEEP = 3
"""Files that stay of those the server has gone by; it can go back a checkpoint."""
FILE = re.compile(r"counts_(\d{4,})\.safetensors")
WITHOUT_ROUND = "counts.safetensors"
"""As earlier versions named the file."""


def tell_counts(folder: Path, shard: ClientShard, *, round: int) -> bytes:
    """The frame with the token counts of a client's text; they are kept.

    Args:
        folder: where the client keeps its state.
        shard: the client's.
        round: whose text is asked about.
    """
    now = shard.at(round).train
    data = save({"counts_N": count_tokens(now)})
    write_bytes(_path(folder, round), data)
    return pack_counts(now)


def text_moved(folder: Path, shard: ClientShard, *, round: int, told: int) -> float:
    """How far a client's text in a round is from what the server goes by.

    Args:
        folder: where the client keeps its state; files of counts that the server cannot
            name any more are removed.
        shard: the client's.
        round: of the text.
        told: round of the counts that the server goes by; 0: it has none.

    Returns:
        Jensen-Shannon distance of the token counts, 0..1; 1 where the server has none.

    Raises:
        CheckpointError: the file of counts is damaged.
    """
    if told == 0:
        return 1.0
    told_N = load_counts(folder, round=told)
    if told_N is None:  # the folder is a new one
        told_N = count_tokens(shard.at(told).train)
    _drop_counts(folder, told=told)
    return distance(told_N, count_tokens(shard.at(round).train))


def load_counts(folder: Path, *, round: int) -> Tensor | None:
    """What :func:`tell_counts` kept of a round; None where there is nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = _path(folder, round)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("counts_N")
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"the token counts {path} are damaged ({error}); remove the file"
        ) from None


def _drop_counts(folder: Path, *, told: int) -> None:
    """Keep the newest until ``told``, and the newest after it: it may be told yet."""
    found = sorted(
        (int(match[1]), path)
        for path in Path(folder).glob("counts_*.safetensors")
        if (match := FILE.fullmatch(path.name))
    )
    until = [path for round, path in found if round <= told]
    later = [path for round, path in found if round > told]
    for path in [*until[:-KEEP], *later[:-1], Path(folder) / WITHOUT_ROUND]:
        path.unlink(missing_ok=True)


def _path(folder: Path, round: int) -> Path:
    return Path(folder) / f"counts_{round:04d}.safetensors"
