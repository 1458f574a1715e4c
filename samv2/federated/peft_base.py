"""What a run's PEFT adapter is for: its dense model, or its experts re-joined."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from samv2.data.shards import load_calibration
from samv2.federated.run_folder import RunFolder, is_run, stored_settings
from samv2.models.expert_model import ExpertModel
from samv2.models.export import rejoined_dense
from samv2.models.llama_loader import (
    DTYPES,
    model_folder,
    resolve_model,
)
from samv2.models.model_files import read_weights
from samv2.models.peft_export import check_is_lora, export_peft
from samv2.models.save import is_expert_model

TRIED_WINDOWS, TRIED_TOKENS = 8, 256
"""Windows a domain, and their length, that a trained assembler is tried on."""


def write_peft(
    source: Path,
    model: ExpertModel,
    folder: Path,
    *,
    place: Path,
    given: str | None = None,
) -> str:
    """Write ``adapter/``, and ``base/`` where the dense model is not known.

    Args:
        source: run directory, or bootstrapped folder.
        model: its model, with what was trained; K becomes the run's.
        folder: where to write.
        place: the path that ``folder`` will have.
        given: the dense model of a bootstrapped folder, as `samv2 bootstrap` takes it.

    Returns:
        Path or hub id of the adapter's base model.

    Raises:
        ModelError: the model is not the dense one plus LoRA, or not made of ``given``.
    """
    tokens_BS, spec = None, given
    dtype = model.llama.dtype
    if is_run(source):
        settings = stored_settings(source)
        model.set_experts_per_token(settings.experts.experts_per_token)
        tokens_BS = _text(RunFolder(root=source))
        if spec is None and not is_expert_model(Path(settings.model.path)):
            spec, dtype = settings.model.path, DTYPES[settings.model.dtype]
    packed = model.expert_config.quantise != "none"
    if spec is None or packed:
        check_is_lora(model, tokens_BS)
        rejoined_dense(model, dtype=dtype).save_pretrained(folder / "base")
        base = str((place / "base").resolve())
        export_peft(model, None, folder / "adapter", base=base, tokens_BS=tokens_BS)
        return base
    found = resolve_model(spec)
    path = model_folder(found)
    base = spec if found.kind == "hub" else str(path.resolve())
    dense = read_weights(path, dtype=dtype)
    export_peft(model, dense, folder / "adapter", base=base, tokens_BS=tokens_BS)
    return base


def _text(run: RunFolder) -> Tensor | None:
    """(B, S) windows of the run's calibration text, some of every domain."""
    if not run.shards.is_dir():
        return None
    parts = []
    for stream in load_calibration(run.shards).values():
        length = min(TRIED_TOKENS, len(stream))
        if length == TRIED_TOKENS:
            whole = stream[: len(stream) // length * length].view(-1, length)
            parts.append(whole[:TRIED_WINDOWS].long())
    return torch.cat(parts) if parts else None
