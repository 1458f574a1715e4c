"""Held-out windows and their scores: the same for clients, preparation and `samv2 eval`.

Shapes: N windows, S tokens a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from samv2.data.shards import ClientShard
from samv2.data.tokens import windows
from samv2.models.perplexity import Score, score_windows

Held = dict[str, list[Tensor]]
"""{domain: (N, S) windows, one tensor a client that holds some}."""


def heldout_windows(clients: Iterable[ClientShard], length: int, limit: int) -> Held:
    """The windows that each client scores, by domain.

    Args:
        clients: in order.
        length: S.
        limit: most windows a client and domain.

    Returns:
        Windows of every held-out stream that has at least one.
    """
    held: Held = {}
    for client in clients:
        for domain, stream in client.heldout.items():
            if len(stream) >= length:
                held.setdefault(domain, []).append(windows(stream, length, limit))
    return held


def score_domains(
    model: Any, held: Mapping[str, Sequence[Tensor]], *, batch_size: int = 4
) -> dict[str, Score]:
    """Score by domain of a dense or expert model, summed over clients in order."""
    scores: dict[str, Score] = {}
    for domain, parts in held.items():
        scores[domain] = Score(nll=0.0, tokens=0)
        for windows_NS in parts:
            found = score_windows(model, windows_NS, batch_size=batch_size)
            scores[domain] = scores[domain] + found
    return scores
