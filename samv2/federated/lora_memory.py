"""Adapters and optimiser of a client whose training is not interrupted by a server.

One safetensors file a round, written whole or not at all. A round reads the file of the
round before, so a round that is run again after a crash starts from the same state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from samv2.common.errors import CheckpointError
from samv2.common.files import write_bytes

KEEP = 2
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter."""


def save_memory(
    folder: Path,
    round: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write adapters and optimiser after ``round``; the newest two files stay."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[name] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    write_bytes(_file(folder, round), save(tensors))
    for path in sorted(Path(folder).glob("round_*.safetensors"))[:-KEEP]:
        path.unlink(missing_ok=True)


def load_memory(
    folder: Path,
    round: int,
    names: Iterable[str],
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Tensor]:
    """Adapters after ``round``; the optimiser, if given, goes on from there.

    Args:
        folder: the client's.
        round: from 1.
        names: of the adapters, in the optimiser's order.
        optimizer: fresh, over the same adapters.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = _file(folder, round)
    try:
        tensors = load(path.read_bytes())
        adapters = {name: tensors[name] for name in names}
        if optimizer is not None:
            for name, parameter in zip(adapters, optimizer.param_groups[0]["params"]):
                kept = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
                for moment, values in kept.items():
                    if values.ndim:  # the number of steps stays on the CPU
                        kept[moment] = values.to(parameter.device)
                optimizer.state[parameter] = kept
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}); start the method again with "
            "--overwrite"
        ) from None
    return adapters


def _file(folder: Path, round: int) -> Path:
    return Path(folder) / f"round_{round:04d}.safetensors"
