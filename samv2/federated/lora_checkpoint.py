"""Checkpoints of a LoRA baseline: one folder a round, written whole or not at all.

checkpoints/round_0003/adapter.safetensors   the averaged adapters
checkpoints/round_0003/state.json            round, method, starting perplexities
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from samv2.common.errors import CheckpointError
from samv2.common.files import replace_folder
from samv2.federated.checkpoint import latest_checkpoint

FORMAT = 1
TENSORS = "adapter.safetensors"
FACTS = "state.json"
KEEP = 2


def save_adapters(
    folder: Path,
    round: int,
    adapters: Mapping[str, Tensor],
    *,
    method: str,
    start: Mapping[str, float | None],
) -> None:
    """Write the state after a round; the newest two stay.

    Args:
        folder: the run's ``checkpoints`` folder.
        round: that is complete.
        adapters: the server's; empty where they stay with the clients.
        method: the baseline's name.
        start: held-out perplexities before the first round.
    """
    facts = {"format": FORMAT, "round": round, "method": method, "start": dict(start)}
    with replace_folder(Path(folder) / f"round_{round:04d}") as target:
        save_file(dict(adapters), target / TENSORS)
        (target / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    for old in sorted(Path(folder).glob("round_*"))[:-KEEP]:
        shutil.rmtree(old)


def load_adapters(
    folder: Path, method: str
) -> tuple[int, dict[str, Tensor], dict[str, float | None] | None]:
    """The newest round, its adapters and the starting perplexities.

    Returns:
        (0, {}, None) where no round is complete.

    Raises:
        CheckpointError: damaged, or of another method.
    """
    path = latest_checkpoint(folder)
    if path is None:
        return 0, {}, None
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        adapters = load_file(path / TENSORS)
        found = (facts["format"], facts["method"])
        round, start = int(facts["round"]), dict(facts["start"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove the folder to "
            "resume from the checkpoint before it"
        ) from None
    if found != (FORMAT, method):
        raise CheckpointError(
            f"{path} has format {found[0]} and method {found[1]!r}, needed are {FORMAT} "
            f"and {method!r}; choose another --log-dir, or give --overwrite"
        )
    return round, adapters, start
