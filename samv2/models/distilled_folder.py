"""The gradient stage on a bootstrapped folder, which is replaced by what it becomes.

Shapes: B sequences, S positions, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from samv2.common.errors import ModelError
from samv2.common.settings import Settings
from samv2.experts.moe_layers import WalkOptions
from samv2.models.distillation import Distilled, distill
from samv2.models.expert_model import ExpertModel
from samv2.models.model_files import read_weights
from samv2.models.perplexity import Score, score_windows
from samv2.models.save import load_expert_model, save_expert_model

Scores = dict[int, dict[str, Score]]
"""By K, by domain."""


def distill_folder(
    folder: Path,
    dense_folder: Path,
    calibration_BS: Tensor,
    heldout: Mapping[str, Tensor],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Distilled, Scores]:
    """Train the repairs of a bootstrapped folder against the dense model.

    Both models are held in memory.

    Args:
        folder: an expert graph with at least one repaired K; rewritten if the training
            is kept.
        dense_folder: the dense model that it was made of.
        calibration_BS: (B, S) int64 token ids to learn from.
        heldout: by domain, (N, S) int64 windows to score afterwards.
        settings: section ``distill`` and the seed are used.
        progress: called with steps done and steps in all.

    Returns:
        What the training did, and the held-out scores of every repaired K.

    Raises:
        ModelError: the model has no repair, its blocks are quantised, or there is too
            little text.
    """
    model, tokenizer = load_expert_model(folder)
    if model.expert_config.quantise != "none":
        raise ModelError(
            f"the expert blocks in {folder} are {model.expert_config.quantise}, and the "
            "gradient stage trains float repairs; train first, quantise after"
        )
    dtype = model.llama.lm_head.weight.dtype
    found = distill(
        model,
        read_weights(dense_folder, dtype=dtype),
        calibration_BS,
        settings.distill,
        seed=settings.seed,
        progress=progress,
    )
    if found.kept:
        save_expert_model(model, tokenizer, folder)
    return found, {k: _scores(model, heldout, k) for k in model.expert_config.repaired}


def _scores(
    model: ExpertModel, heldout: Mapping[str, Tensor], k: int
) -> dict[str, Score]:
    options = WalkOptions(experts_per_token=k, use_assembler=False)
    return {
        name: score_windows(model, windows_NS, walk_options=options)
        for name, windows_NS in heldout.items()
    }
