"""A run's text: corpus to client shards, calibration windows and traced sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from samv2.common.errors import DataError
from samv2.common.fetch import cache_dir
from samv2.common.settings import Settings
from samv2.data.corpus import Corpus, PartSizes, build_corpus
from samv2.data.drift import drift_specs, parse_drifts
from samv2.data.shards import (
    FederatedText,
    build_federated_text,
    save_federated_text,
)
from samv2.data.tokens import windows
from samv2.federated.run_folder import RunFolder
from samv2.models.bootstrap import spread

TRACED_TOKENS = 128
SHOWN_CLIENTS = 8
"""Clients whose text is described on the console."""


def make_corpus(
    settings: Settings, console: Console, *, domains: Sequence[str] | None = None
) -> Corpus:
    """Domains, divided into train, calibration and held-out text.

    A built-in source that cannot be fetched is left out with a message.

    Args:
        settings: how much text, and its division.
        console: for messages.
        domains: None: those that the settings start with.
    """
    data = settings.data
    return build_corpus(
        data.domains if domains is None else domains,
        cache=cache_dir(),
        seed=settings.seed,
        sizes=PartSizes(
            heldout_bytes=data.heldout_bytes,
            calibration_bytes=data.calibration_bytes,
            train_bytes=data.train_bytes,
            min_train_bytes=min(data.train_bytes, PartSizes().min_train_bytes),
        ),
        on_skip=lambda name, reason: console.print(
            f"[yellow]domain {name} is left out: {reason}[/yellow]"
        ),
        progress=console.print,
    )


def make_text(
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    console: Console,
) -> FederatedText:
    """Corpus to client shards, saved in the run directory."""
    length = settings.train.sequence_length
    clients = settings.federation.clients
    drifts = parse_drifts(settings.data.drift, clients)
    new = drift_specs(settings.data.domains, drifts)
    text = build_federated_text(
        make_corpus(settings, console),
        tokenizer,
        num_clients=clients,
        split=settings.data.split,
        alpha=settings.data.alpha,
        min_train_tokens=length,
        heldout_window=length,
        drifts=drifts,
        coming=make_corpus(settings, console, domains=new).domains if new else {},
        seed=settings.seed,
    )
    pieces = [stream for client in text.clients for stream in client.heldout.values()]
    if all(len(stream) < length for stream in pieces):
        raise DataError(
            f"no domain has {length} tokens of held-out text (the longest has "
            f"{max(map(len, pieces), default=0)}); raise data.heldout_bytes or lower "
            "train.sequence_length"
        )
    save_federated_text(text, run.shards)
    return text


def calibration_windows(
    calibration: Mapping[str, Tensor], total_tokens: int, length: int
) -> Tensor:
    """(N, length) windows, the same number from every domain, about ``total_tokens``.

    They are spread evenly over each domain's text, first and last window included: more
    documents, and so a better fit to text that was not seen. A domain with fewer windows
    gives all it has.

    Args:
        calibration: token stream of every domain.
        total_tokens: over all domains.
        length: tokens of a window.

    Raises:
        DataError: no domain has a whole window.
    """
    per_domain = max(1, total_tokens // (length * max(1, len(calibration))))
    parts = [
        spread(windows(stream, length), per_domain)
        for stream in calibration.values()
        if len(stream) >= length
    ]
    if not parts:
        raise DataError(
            f"no domain has {length} tokens of calibration text; raise "
            "data.calibration_bytes or lower train.sequence_length"
        )
    return torch.cat(parts)


def traced_sequences(text: FederatedText, settings: Settings) -> dict[str, Tensor]:
    """The first calibration tokens of every domain, all of one length."""
    streams = {
        name: stream for name, stream in text.calibration.items() if len(stream) > 1
    }
    if not streams:
        raise DataError(
            "there is no calibration text; raise data.calibration_bytes "
            f"(now {settings.data.calibration_bytes})"
        )
    length = min(TRACED_TOKENS, *(len(stream) for stream in streams.values()))
    return {name: stream[:length].long() for name, stream in streams.items()}


def say_text(text: FederatedText, console: Console) -> None:
    for client in text.clients[:SHOWN_CLIENTS]:
        console.print(f"  {client.description}, {len(client.train):,} train tokens")
        for round, later in client.later.items():
            names = ", ".join(later.heldout)
            console.print(f"    from round {round} on: {names}", style="dim")
    if len(text.clients) > SHOWN_CLIENTS:
        sizes = sorted(len(client.train) for client in text.clients)
        console.print(
            f"  ... {len(text.clients)} clients in all, of {sizes[0]:,} to "
            f"{sizes[-1]:,} train tokens"
        )
    console.print(
        "  heterogeneity of the split (mean Jensen-Shannon distance of the clients, "
        f"0 alike .. 1 disjoint): domains {text.index.category_heterogeneity:.2f}, "
        f"tokens {text.index.token_heterogeneity:.2f}"
    )
