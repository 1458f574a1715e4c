"""Bootstrap outside a run: convert, save, and measure quality against arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from samv2.common.files import write_json
from samv2.common.settings import Settings
from samv2.common.telemetry import progress_bar
from samv2.data.corpus import Corpus
from samv2.data.tokens import tokenize_documents, windows
from samv2.experts.moe_layers import WalkOptions
from samv2.federated.prepare import (
    convert_and_save,
    write_stats,
)
from samv2.federated.run_folder import check_output
from samv2.federated.run_text import calibration_windows, make_corpus
from samv2.models.bootstrap import check_convertible
from samv2.models.llama_loader import DTYPES, load_llama, peek_config
from samv2.models.perplexity import score_windows


def bootstrap_with_frontier(
    settings: Settings, output: Path, *, overwrite: bool, console: Console
) -> list[dict[str, Any]]:
    """Convert ``settings.model.path``, save it, and score it at several K.

    Args:
        settings: sections ``model``, ``experts``, ``data`` and ``train`` are used.
        output: folder to write; also gets ``frontier.json`` and ``cluster_stats.txt``.
        overwrite: replace an expert graph there.
        console: where progress is shown.

    Returns:
        The frontier: one object per K, by rising K.

    Raises:
        CheckpointError: ``output`` exists and may not be replaced.
        SamError: a setting, the model or the text does not fit.
    """
    check_output(output, overwrite=overwrite, expert=True)
    check_convertible(
        peek_config(settings.model.path, progress=console.print), settings
    )
    loaded = load_llama(settings.model.path, dtype=DTYPES[settings.model.dtype])
    corpus = make_corpus(settings, console)
    length, limit = settings.train.sequence_length, settings.federation.eval_windows
    heldout = _token_streams(loaded.tokenizer, corpus, "heldout")
    held = {name: windows(stream, length, limit) for name, stream in heldout.items()}
    dense = {name: _perplexity(loaded.model, part) for name, part in held.items()}
    calibration = calibration_windows(
        _token_streams(loaded.tokenizer, corpus, "calibration"),
        settings.experts.calibration_tokens,
        length,
    )
    made = convert_and_save(loaded, calibration, settings, output, console)
    write_stats(output, made, settings)
    frontier = []
    ks = frontier_ks(settings.experts.experts_per_token, settings.experts)
    with progress_bar(console, "Scoring K", len(ks)) as advance:
        for done, k in enumerate(ks, start=1):
            options = WalkOptions(experts_per_token=k)
            scored = {
                name: _perplexity(made.model, part, options)
                for name, part in held.items()
            }
            frontier.append(
                {
                    "experts_per_token": k,
                    "ffn_flops_fraction": made.model.flops_fraction(k),
                    "perplexity": scored,
                    "dense_perplexity": dense,
                }
            )
            advance(done, len(ks))
    write_json(output / "frontier.json", frontier)
    return frontier


def frontier_ks(chosen: int, experts: Any) -> list[int]:
    """K = E/4, E/2, 3E/4, E and the chosen one, as far as they can be walked."""
    total = experts.num_experts
    wanted = {total // 4, total // 2, 3 * total // 4, total, chosen}
    return sorted(k for k in wanted if k >= max(1, experts.num_shared))


def _perplexity(
    model: Any, held_NS: Any, options: WalkOptions | None = None
) -> float | None:
    value = score_windows(model, held_NS, walk_options=options).perplexity
    return value if math.isfinite(value) else None


def _token_streams(tokenizer: Any, corpus: Corpus, part: str) -> dict[str, Any]:
    return {
        name: tokenize_documents(tokenizer, getattr(text, part))
        for name, text in corpus.domains.items()
    }
