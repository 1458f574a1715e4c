"""What a bootstrap reads, all of it checked before the long work: model and text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from samv2.common.errors import DataError, ModelError
from samv2.common.settings import Settings
from samv2.data.corpus import Corpus
from samv2.data.tokens import tokenize_documents, windows
from samv2.federated.frontier_choice import FrontierOptions, plan_experts
from samv2.federated.run_text import calibration_windows, make_corpus
from samv2.models.bootstrap import check_convertible
from samv2.models.dense_layers import DenseLayers
from samv2.models.llama_loader import DTYPES, model_folder, resolve_model
from samv2.models.model_files import (
    model_fingerprint,
    read_config,
    read_tokenizer,
)
from samv2.models.save import is_expert_model


@dataclass(frozen=True, kw_only=True)
class FrontierInputs:
    """Model, text and settings of one bootstrap."""

    source: DenseLayers
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Of the dense model."""
    settings: Settings
    """With the K that the options ask for."""
    calibration_NS: Tensor
    """(N, S) int64 windows of calibration text."""
    heldout: dict[str, Tensor]
    """By domain, (N, S) int64 windows of held-out text."""
    calibrated: tuple[str, ...]
    """Domains of the calibration text."""
    unseen: tuple[str, ...]
    """Domains that are scored only."""


def read_inputs(
    settings: Settings, options: FrontierOptions, console: Console
) -> FrontierInputs:
    """Open the model, choose K, and tokenise calibration and held-out text.

    Args:
        settings: sections ``model``, ``experts``, ``data`` and ``train`` are used.
        options: checked.
        console: where slow steps and domains that are left out are named.

    Raises:
        SamError: the model, a setting or the text does not fit.
    """
    source, tokenizer, fingerprint, settings = _open_model(settings, options, console)
    calibrated, unseen = _corpora(settings, options, console)
    heldout = _heldout(calibrated, tokenizer, settings)
    if unseen is not None:
        heldout |= _heldout(unseen, tokenizer, settings)
    return FrontierInputs(
        source=source,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        settings=settings,
        calibration_NS=calibration_windows(
            _token_streams(tokenizer, calibrated, "calibration"),
            settings.experts.calibration_tokens,
            settings.train.sequence_length,
        ),
        heldout=heldout,
        calibrated=calibrated.names,
        unseen=() if unseen is None else unseen.names,
    )


def _open_model(
    settings: Settings, options: FrontierOptions, console: Console
) -> tuple[DenseLayers, PreTrainedTokenizerBase, str, Settings]:
    """The checkpoint with no weight read, its tokenizer, and the settings with their K."""
    if is_expert_model(Path(settings.model.path).expanduser()):
        raise ModelError(
            f"{settings.model.path} is an expert graph already; give the dense model "
            "that it was made from, or train it: samv2 train --set "
            f"model.path={settings.model.path}"
        )
    source = resolve_model(settings.model.path, progress=console.print)
    folder = model_folder(source, progress=console.print)
    config = read_config(folder)
    check_convertible(config, settings)
    settings = plan_experts(options, config, settings)
    layers = DenseLayers.open(folder, dtype=DTYPES[settings.model.dtype])
    return layers, read_tokenizer(folder), model_fingerprint(folder), settings


def _corpora(
    settings: Settings, options: FrontierOptions, console: Console
) -> tuple[Corpus, Corpus | None]:
    """The settings' domains, and those that are scored only."""
    calibrated = make_corpus(settings, console)
    if not options.also_score:
        return calibrated, None
    data = replace(settings.data, domains=options.also_score)
    return calibrated, make_corpus(replace(settings, data=data), console)


def _heldout(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, Tensor]:
    """The windows that ``samv2 eval`` scores, by domain."""
    length, limit = settings.train.sequence_length, settings.federation.eval_windows
    streams = _token_streams(tokenizer, corpus, "heldout")
    for name, stream in streams.items():
        if len(stream) < length:
            raise DataError(
                f"domain {name} has {len(stream)} tokens of held-out text, fewer than "
                f"one window of {length}; raise data.heldout_bytes or lower "
                "train.sequence_length"
            )
    return {name: windows(stream, length, limit) for name, stream in streams.items()}


def _token_streams(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, part: str
) -> dict[str, Tensor]:
    return {
        name: tokenize_documents(tokenizer, text.part(part))
        for name, text in corpus.domains.items()
    }
